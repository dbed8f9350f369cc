"""Blocks by matrix types: ranks over training, and importance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, Normalize, to_hex
from matplotlib.figure import Figure, SubFigure

from peft_vit.analysis import Allocation, ImportancePattern
from peft_vit.analysis.allocation import RankMap
from peft_vit.analysis.grid import Grid
from peft_vit.analysis.importance import row_means
from peft_vit.records import Role
from peft_vit.report.document import Drawing, Raw
from peft_vit.report.formatting import fixed
from peft_vit.report.hover import HoverPoints, coded
from peft_vit.report.plot_selection import SINGLE_SEEDS
from peft_vit.report.style import (
    DASHED,
    GRID,
    METHOD_COLORS,
    MUTED,
    PAPER,
    SEQUENTIAL,
    THEME,
    draw,
    is_narrow,
    quiet_grid,
)

T = TypeVar("T", Allocation, ImportancePattern)
_PANEL_IN = 2.25
CELLS = 60_000  # of all maps that the page carries together
PARTLY = " To keep the page small, it and the data hold a part of the recorded updates, evenly chosen."


def _colors() -> Colormap:
    """Return the color map; what was not recorded has the color of the grid."""
    return matplotlib.colormaps[SEQUENTIAL].with_extremes(bad=GRID)


def _heat(axes: Axes, values: np.ndarray, norm: Normalize, grid: Grid, *, labels: bool = True) -> QuadMesh:
    """Draw (blocks, matrices), block 0 at the top, as vector cells."""
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap=_colors(), norm=norm, edgecolors=PAPER, linewidth=0.4)
    axes.set_ylim(len(grid.blocks), 0)
    turned: dict[str, Any] = {"rotation": 45, "ha": "right"}
    if is_narrow(axes.figure):
        turned = {"rotation": 90, "ha": "right", "va": "center"}
    axes.set_xticks(np.arange(len(grid.matrices)) + 0.5, grid.matrices, rotation_mode="anchor", **turned)
    axes.set_yticks(np.arange(len(grid.blocks)) + 0.5, [str(block) for block in grid.blocks])
    axes.tick_params(length=0, labelleft=labels, labelsize=7.5 if len(grid.blocks) <= 14 else 6.5)
    if labels:
        axes.set_ylabel("block")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def _color_bar(subfigure: SubFigure, norm: Normalize, axes: Axes | list[Axes], pad: float, label: str = "") -> None:
    bar = subfigure.colorbar(ScalarMappable(norm, _colors()), ax=axes, pad=pad, aspect=24)
    bar.outline.set_visible(False)
    bar.set_label(label)
    bar.ax.tick_params(length=0)


def _by_experiment(figure: Figure, hover: HoverPoints, items: Sequence[T]) -> Iterator[tuple[SubFigure, T]]:
    """Yield a titled part of the figure for each item, from the top."""
    for subfigure, item in zip(figure.subfigures(len(items), 1, squeeze=False)[:, 0], items, strict=True):
        own = item.experiment
        hover.series(own.name, METHOD_COLORS[own.method])
        subfigure.suptitle(own.name, x=0.01, ha="left", fontweight="bold", fontsize="medium")
        yield subfigure, item


def _cell_texts(grid: Grid, values: np.ndarray, what: str) -> list[str]:
    """Return what each cell says, by row."""
    places = [f"block {block}, {matrix}" for block in grid.blocks for matrix in grid.matrices]
    return [
        f"{place}\n{what} {value or 'not recorded'}" if there else f"{place}\nno such matrix in this block"
        for place, value, there in zip(places, _cells(values), grid.has_matrix().ravel(), strict=True)
    ]


def _empty_cells(grids: Iterable[Grid]) -> str:
    """Return what a caption says of them, with a space before it; nothing if every block has every matrix."""
    return "" if all(grid.has_matrix().all() for grid in grids) else " Grey: the block has no such matrix."


def _cells(values: np.ndarray) -> tuple[str, ...]:
    """Return values by row as they are shown; empty where there is none."""
    return tuple(fixed(float(v)) if np.isfinite(v) else "" for v in values.ravel())


def _grid_rows(grid: Grid, values: dict[str, np.ndarray]) -> Iterator[dict[str, Raw]]:
    """Yield a row for each cell: its block and matrix, and the value in each (blocks, matrices) array."""
    for row, block in enumerate(grid.blocks):
        for column, matrix in enumerate(grid.matrices):
            cells = {name: float(array[row, column]) for name, array in values.items()}
            known = {name: value if np.isfinite(value) else None for name, value in cells.items()}
            yield {"block": block, "matrix": matrix, **known}


def rank_maps(allocations: Sequence[Allocation], note: str = "") -> Drawing:
    """Draw the mean rank of every site at the start, in the middle and at the end of each AdaLoRA experiment.

    Args:
        allocations: what to draw.
        note: a sentence for the caption, with a space before it.
    """
    frames = {a.experiment.name: _frames(a, len(allocations)) for a in allocations}
    highest = max(float(np.nanmax(m.ranks)) for of in frames.values() for m in of)
    norm = Normalize(0, max(1.0, highest))

    moving = [a for a in allocations if len(frames[a.experiment.name]) > 1]
    walk = sorted({m.step for a in moving for m in frames[a.experiment.name]})

    def paint(figure: Figure) -> HoverPoints:
        hover, panels = HoverPoints(), []
        for subfigure, allocation in _by_experiment(figure, hover, allocations):
            panels += _rank_row(subfigure, hover, allocation, norm, frames[allocation.experiment.name], walk)
        if moving:
            start = walk.index(moving[0].maps[len(moving[0].maps) // 2].step)
            hover.player = _player(walk, start, norm, panels)
        return hover

    skipped = any(len(frames[a.experiment.name]) < len(a.maps) for a in allocations)
    caption = (
        "Rank of every site from the given step on, mean over seeds: at the start, in the middle of "
        "the recorded updates, and at the end. Rows are blocks, columns are matrices; all panels "
        f"share one color scale.{_empty_cells(a.grid for a in allocations)}{PARTLY if skipped else ''}{note}"
    )
    data: list[dict[str, Raw]] = [
        {"experiment": a.experiment.name, "step": entry.step, **cell}
        for a in allocations
        for entry in frames[a.experiment.name]
        for cell in _grid_rows(a.grid, {"rank": entry.ranks})
    ]
    height = (_PANEL_IN + 0.55) * len(allocations)
    return draw("rank_maps", "Ranks by layer and matrix over training", caption, height, paint, data)


def _frames(allocation: Allocation, experiments: int) -> list[RankMap]:
    """Return the maps that the page carries: all, or as many as keep it small; those drawn are among them."""
    count, cells = len(allocation.maps), len(allocation.grid.blocks) * len(allocation.grid.matrices)
    most = max(5, CELLS // (cells * experiments))
    if count <= most:
        return list(allocation.maps)
    return [allocation.maps[i] for i in sorted({*np.linspace(0, count - 1, most).astype(int), *_shown(allocation)})]


def _shown(allocation: Allocation) -> list[int]:
    """Return which of the recorded maps are drawn: the first, the middle one, the last."""
    return sorted({0, len(allocation.maps) // 2, len(allocation.maps) - 1})


def _rank_row(
    subfigure: SubFigure,
    hover: HoverPoints,
    allocation: Allocation,
    norm: Normalize,
    frames: list[RankMap],
    walk: list[int],
) -> list[dict[str, Any]]:
    """Draw one experiment, and return the map that can move, if any: at each step it shows what was in force."""
    name, grid, shown = allocation.experiment.name, allocation.grid, _shown(allocation)
    end = "\n" if is_narrow(subfigure) else " "
    moving: list[dict[str, Any]] = []
    panels = subfigure.subplots(1, 3, squeeze=False)[0]
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for column, (axes, index) in enumerate(zip(panels, shown, strict=False)):
        entry = allocation.maps[index]
        mesh = _heat(axes, entry.ranks, norm, grid, labels=column == 0)
        title = axes.set_title(_map_title(entry, end))
        first = hover.add(name, mesh, _cell_texts(grid, entry.ranks, "rank"))
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
    _color_bar(subfigure, norm, list(panels), 0.02, "rank")
    return moving


def _map_title(entry: RankMap, end: str) -> str:
    return f"from step {entry.step}:{end}{round(float(np.nansum(entry.ranks)))} ranks"


def _player(walk: list[int], start: int, norm: Normalize, panels: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the walk through all steps at which a map changed, as the page's script reads it."""
    return {
        "steps": walk,
        "start": start,  # index of the step to begin with
        "unit": "rank",  # a word before the number
        "colors": [to_hex(color) for color in _colors()(np.arange(256))],  # from 0 to `highest`
        "missing": THEME[GRID],  # a cell without a value
        "highest": float(norm.vmax or 1.0),
        "panels": panels,
    }


def importance_maps(patterns: Sequence[ImportancePattern], note: str = "") -> Drawing:
    """Draw the final relative score of every site, and its course over blocks for attention and MLP.

    Args:
        patterns: what to draw.
        note: a sentence for the caption, with a space before it.
    """
    means = {p.experiment.name: np.mean(p.relative_final, axis=0) for p in patterns}  # (blocks, matrices) each

    def paint(figure: Figure) -> HoverPoints:
        hover = HoverPoints()
        for subfigure, pattern in _by_experiment(figure, hover, patterns):
            name = pattern.experiment.name
            left, right = subfigure.subplots(1, 2, width_ratios=(1, 1.35))
            norm = Normalize(0, float(np.nanmax(means[name])))
            mesh = _heat(left, means[name], norm, pattern.grid)
            hover.add(name, mesh, _cell_texts(pattern.grid, means[name], "relative score"))
            _color_bar(subfigure, norm, left, 0.03)
            _block_lines(right, hover, pattern)
        return hover

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
    height = (_PANEL_IN + 0.55) * len(patterns)
    return draw("importance_by_layer", "Importance by layer", caption, height, paint, data)


def _block_lines(axes: Axes, hover: HoverPoints, pattern: ImportancePattern) -> None:
    blocks, name = pattern.grid.blocks, pattern.experiment.name
    groups: tuple[tuple[str, Role, str, str], ...] = (
        ("attention", "attention", METHOD_COLORS["lora"], "o"),
        ("MLP", "mlp", METHOD_COLORS["adalora"], "s"),
    )
    for label, role, color, marker in groups:
        columns = pattern.grid.columns_of(role)
        if not columns.any():
            continue
        by_seed = np.stack([row_means(one[:, columns]) for one in pattern.relative_final])  # (seeds, blocks)
        if len(by_seed) > SINGLE_SEEDS:
            low, high = by_seed.min(axis=0), by_seed.max(axis=0)
            hover.add(name, axes.fill_between(blocks, low, high, color=color, alpha=0.2, lw=0))
        else:
            for one in by_seed:
                hover.plot(name, axes, blocks, one, color=color, lw=0.8, alpha=0.45)
        mean = by_seed.mean(axis=0)
        texts = [
            f"block {b}, mean of {label} sites\nrelative score {fixed(float(v))}"
            for b, v in zip(blocks, mean, strict=True)
        ]
        hover.plot(name, axes, blocks, mean, texts, color=color, lw=1.8, marker=marker, ms=4, label=label)
    axes.axhline(1, color=MUTED, lw=0.8, ls=DASHED)
    axes.set_ylim(bottom=0)
    axes.set_xticks(blocks[:: max(1, len(blocks) // (6 if is_narrow(axes.figure) else 12))])
    axes.set_xlabel("block")
    axes.set_ylabel("relative score")
    axes.legend(loc="best")
    quiet_grid(axes)
