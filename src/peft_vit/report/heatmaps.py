"""Blocks by matrix types: ranks over training, and importance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import Normalize, to_hex
from matplotlib.figure import SubFigure

from peft_vit.analysis import Allocation, ImportancePattern
from peft_vit.analysis.layers import Grid, RankMap, row_means
from peft_vit.records import Role
from peft_vit.report.document import Drawing, Raw
from peft_vit.report.figure import (
    DASHED,
    GRID,
    METHOD_COLORS,
    MUTED,
    PAPER,
    SEQUENTIAL,
    SINGLE_SEEDS,
    THEME,
    Canvas,
    draw,
    quiet_grid,
)
from peft_vit.report.formatting import fixed
from peft_vit.report.html import coded

T = TypeVar("T", Allocation, ImportancePattern)
_PANEL_IN = 2.8  # of an experiment
_COLORS = matplotlib.colormaps[SEQUENTIAL].with_extremes(bad=GRID)  # what was not recorded has the color of the grid
CELLS = 60_000  # of all maps that the page carries together
_PARTLY = " To keep the page small, it and the data hold a part of the recorded updates, evenly chosen."


def _heat(
    canvas: Canvas, axes: Axes, name: str, grid: Grid, values: np.ndarray, norm: Normalize, what: str, labels: bool
) -> tuple[QuadMesh, int]:
    """Draw (blocks, matrices), block 0 at the top, as vector cells; return them and the index of the first's point."""
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap=_COLORS, norm=norm, edgecolors=PAPER, linewidth=0.4)
    axes.set_ylim(len(grid.blocks), 0)
    turned: dict[str, Any] = {"rotation": 90, "va": "center"} if canvas.narrow else {"rotation": 45}
    axes.set_xticks(np.arange(len(grid.matrices)) + 0.5, grid.matrices, rotation_mode="anchor", ha="right", **turned)
    axes.set_yticks(np.arange(len(grid.blocks)) + 0.5, [str(block) for block in grid.blocks])
    axes.tick_params(length=0, labelleft=labels, labelsize=7.5 if len(grid.blocks) <= 14 else 6.5)
    if labels:
        axes.set_ylabel("block")
    for spine in axes.spines.values():
        spine.set_visible(False)
    texts = [
        f"block {block}, {matrix}\n"
        + (f"{what} {value or 'not recorded'}" if there else "no such matrix in this block")
        for (block, matrix), value, there in zip(_places(grid), _cells(values), grid.has_matrix().ravel(), strict=True)
    ]
    return mesh, canvas.add(name, mesh, texts)


def _places(grid: Grid) -> list[tuple[int, str]]:
    """Return block and matrix of each cell, by row."""
    return [(block, matrix) for block in grid.blocks for matrix in grid.matrices]


def _cells(values: np.ndarray) -> list[str]:
    """Return values by row as they are shown; empty where there is none."""
    return [fixed(float(v)) if np.isfinite(v) else "" for v in values.ravel()]


def _grid_rows(grid: Grid, values: Mapping[str, np.ndarray]) -> Iterator[dict[str, Raw]]:
    """Yield a row for each cell: its block and matrix, and the value in each (blocks, matrices) array."""
    for index, (block, matrix) in enumerate(_places(grid)):
        cells = {name: float(array.flat[index]) for name, array in values.items()}
        yield {"block": block, "matrix": matrix, **{n: v if np.isfinite(v) else None for n, v in cells.items()}}


def _empty_cells(grids: Iterable[Grid]) -> str:
    """Return what a caption says of them, with a space before it; nothing if every block has every matrix."""
    return "" if all(grid.has_matrix().all() for grid in grids) else " Grey: the block has no such matrix."


def _color_bar(part: SubFigure, norm: Normalize, axes: Axes | list[Axes], pad: float, label: str = "") -> None:
    bar = part.colorbar(ScalarMappable(norm, _COLORS), ax=axes, pad=pad, aspect=24)
    bar.outline.set_visible(False)
    bar.set_label(label)
    bar.ax.tick_params(length=0)


def _by_experiment(canvas: Canvas, items: Sequence[T]) -> Iterator[tuple[SubFigure, str, T]]:
    """Yield a titled part of the figure for each item, from the top, and the experiment's name."""
    for part, item in zip(canvas.figure.subfigures(len(items), 1, squeeze=False)[:, 0], items, strict=True):
        own = item.experiment
        canvas.series(own.name, METHOD_COLORS[own.method])
        part.suptitle(own.name, x=0.01, ha="left", fontweight="bold", fontsize="medium")
        yield part, own.name, item


def rank_maps(allocations: Sequence[Allocation], note: str = "") -> Drawing:
    """Draw the mean rank of every site at the start, in the middle and at the end of each AdaLoRA experiment.

    Args:
        allocations: what to draw.
        note: a sentence for the caption, with a space before it.
    """
    frames = {a.experiment.name: _frames(a, len(allocations)) for a in allocations}
    highest = max(1.0, *(float(np.nanmax(m.ranks)) for of in frames.values() for m in of))
    norm = Normalize(0, highest)
    moving = [a for a in allocations if len(frames[a.experiment.name]) > 1]
    walk = sorted({m.step for a in moving for m in frames[a.experiment.name]})

    def paint(canvas: Canvas) -> None:
        panels: list[dict[str, Any]] = []
        for part, name, allocation in _by_experiment(canvas, allocations):
            panels += _rank_row(canvas, part, allocation, norm, frames[name], walk)
        if moving:
            canvas.player = {  # the walk through all steps at which a map changed, as the page's script reads it
                "steps": walk,
                "start": walk.index(moving[0].maps[len(moving[0].maps) // 2].step),  # index of the step to begin with
                "unit": "rank",  # a word before the number
                "colors": [to_hex(color) for color in _COLORS(np.arange(256))],  # from 0 to `highest`
                "missing": THEME[GRID],  # a cell without a value
                "highest": highest,
                "panels": panels,
            }

    skipped = any(len(frames[a.experiment.name]) < len(a.maps) for a in allocations)
    caption = (
        "Rank of every site from the given step on, mean over seeds: at the start, in the middle of "
        "the recorded updates, and at the end. Rows are blocks, columns are matrices; all panels "
        f"share one color scale.{_empty_cells(a.grid for a in allocations)}{_PARTLY if skipped else ''}{note}"
    )
    data: list[dict[str, Raw]] = [
        {"experiment": a.experiment.name, "step": entry.step, **cell}
        for a in allocations
        for entry in frames[a.experiment.name]
        for cell in _grid_rows(a.grid, {"rank": entry.ranks})
    ]
    title = "Ranks by layer and matrix over training"
    return draw("rank_maps", title, caption, _PANEL_IN * len(allocations), paint, data)


def _shown(allocation: Allocation) -> list[int]:
    """Return which of the recorded maps are drawn: the first, the middle one, the last."""
    return sorted({0, len(allocation.maps) // 2, len(allocation.maps) - 1})


def _frames(allocation: Allocation, experiments: int) -> list[RankMap]:
    """Return the maps that the page carries: all, or as many as keep it small; those drawn are among them."""
    count, most = len(allocation.maps), max(5, CELLS // (len(_places(allocation.grid)) * experiments))
    if count <= most:
        return list(allocation.maps)
    return [allocation.maps[i] for i in sorted({*np.linspace(0, count - 1, most).astype(int), *_shown(allocation)})]


def _rank_row(
    canvas: Canvas, part: SubFigure, allocation: Allocation, norm: Normalize, frames: list[RankMap], walk: list[int]
) -> list[dict[str, Any]]:
    """Draw one experiment, and return the map that can move, if any: at each step it shows what was in force."""
    name, shown, end = allocation.experiment.name, _shown(allocation), "\n" if canvas.narrow else " "
    moving: list[dict[str, Any]] = []
    panels = part.subplots(1, 3, squeeze=False)[0]
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for column, (axes, index) in enumerate(zip(panels, shown, strict=False)):
        entry = allocation.maps[index]
        mesh, first = _heat(canvas, axes, name, allocation.grid, entry.ranks, norm, "rank", column == 0)
        title = axes.set_title(_map_title(entry, end))
        if index == len(allocation.maps) // 2 and len(frames) > 1:
            title.set_gid(f"{mesh.get_gid()}-title")  # so that it can change with its map
            in_force = np.searchsorted([m.step for m in frames], walk, side="right") - 1
            moving = [
                {
                    "gid": mesh.get_gid(),  # of its cells in the SVG; that of its title ends in ``-title``
                    "first": first,  # index of its first cell among the points; cells follow by row
                    "titles": [_map_title(m, end) for m in frames],
                    "at": np.maximum(0, in_force).tolist(),  # the frame to show at each step
                    "cells": entry.ranks.size,
                    **coded(text for m in frames for text in _cells(m.ranks)),
                }
            ]
    _color_bar(part, norm, list(panels), 0.02, "rank")
    return moving


def _map_title(entry: RankMap, end: str) -> str:
    return f"from step {entry.step}:{end}{round(float(np.nansum(entry.ranks)))} ranks"


def importance_maps(patterns: Sequence[ImportancePattern], note: str = "") -> Drawing:
    """Draw the final relative score of every site, and its course over blocks for attention and MLP.

    Args:
        patterns: what to draw.
        note: a sentence for the caption, with a space before it.
    """
    means = {p.experiment.name: np.mean(p.relative_final, axis=0) for p in patterns}  # (blocks, matrices) each

    def paint(canvas: Canvas) -> None:
        for part, name, pattern in _by_experiment(canvas, patterns):
            left, right = part.subplots(1, 2, width_ratios=(1, 1.35))
            norm = Normalize(0, float(np.nanmax(means[name])))
            _heat(canvas, left, name, pattern.grid, means[name], norm, "relative score", True)
            _color_bar(part, norm, left, 0.03)
            _block_lines(canvas, right, pattern)

    seeds = "thin lines for single seeds"
    if any(len(p.seeds) > SINGLE_SEEDS for p in patterns):
        seeds = f"band from the lowest to the highest of more than {SINGLE_SEEDS} seeds"
    caption = (
        "Scores at the last decision, divided by the mean over the sites of their run: 1 is an "
        "average site. Left: every site, mean over seeds, each experiment on its own scale. Right: "
        f"mean by block of the attention sites and of the MLP sites, {seeds}. A "
        f"score is what the method decided with; it is not a measured harm."
        f"{_empty_cells(p.grid for p in patterns)}{note}"
    )
    data: list[dict[str, Raw]] = [
        {"experiment": p.experiment.name, **cell, "seeds": len(p.seeds)}
        for p in patterns
        for cell in _grid_rows(p.grid, {"relative_score": means[p.experiment.name], "score": p.raw_final})
    ]
    return draw("importance_by_layer", "Importance by layer", caption, _PANEL_IN * len(patterns), paint, data)


def _block_lines(canvas: Canvas, axes: Axes, pattern: ImportancePattern) -> None:
    blocks, name = pattern.grid.blocks, pattern.experiment.name
    groups: tuple[tuple[str, Role, str, str], ...] = (
        ("attention", "attention", METHOD_COLORS["lora"], "o"),
        ("MLP", "mlp", METHOD_COLORS["adalora"], "s"),
    )
    for label, role, color, marker in groups:
        columns = pattern.grid.columns_of(role)
        if not columns.any():
            continue
        by_seed = np.stack([row_means(scores[:, columns]) for scores in pattern.relative_final])  # (seeds, blocks)
        if len(by_seed) > SINGLE_SEEDS:
            low, high = by_seed.min(axis=0), by_seed.max(axis=0)
            canvas.add(name, axes.fill_between(blocks, low, high, color=color, alpha=0.2, lw=0))
        else:
            for scores in by_seed:
                canvas.plot(name, axes, blocks, scores, color=color, lw=0.8, alpha=0.45)
        mean = by_seed.mean(axis=0)
        texts = [
            f"block {block}, mean of {label} sites\nrelative score {fixed(float(value))}"
            for block, value in zip(blocks, mean, strict=True)
        ]
        canvas.plot(name, axes, blocks, mean, texts, color=color, lw=1.8, marker=marker, ms=4, label=label)
    axes.axhline(1, color=MUTED, lw=0.8, ls=DASHED)
    axes.set_ylim(bottom=0)
    axes.set_xticks(blocks[:: max(1, len(blocks) // (6 if canvas.narrow else 12))])
    axes.set_xlabel("block")
    axes.set_ylabel("relative score")
    axes.legend(loc="best")
    quiet_grid(axes)
