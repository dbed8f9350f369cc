"""Blocks by matrix types: ranks over training, and importance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

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
from peft_vit.report.document import Drawing, Panel, Player, Raw
from peft_vit.report.formatting import fixed
from peft_vit.report.hover import HoverPoints, title_of
from peft_vit.report.style import GRID, METHOD_COLORS, MUTED, PAPER, SEQUENTIAL, draw, is_narrow, quiet_grid

_PANEL_IN = 2.25
SINGLE_SEEDS = 10  # with more, a band from the lowest to the highest stands for them
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
    axes.tick_params(length=0, labelleft=labels, labelsize=_tick_size(len(grid.blocks)))
    if labels:
        axes.set_ylabel("block")
    for spine in axes.spines.values():
        spine.set_visible(False)
    return mesh


def _tick_size(blocks: int) -> float:
    return 7.5 if blocks <= 14 else 6.5


def _cell_texts(grid: Grid, values: Sequence[str], what: str) -> list[str]:
    """Return what each cell says, by row."""
    places = [f"block {block}, {matrix}" for block in grid.blocks for matrix in grid.matrices]
    return [f"{place}\n{what} {value or 'not recorded'}" for place, value in zip(places, values, strict=True)]


def _cells(values: np.ndarray, decimals: int = 2) -> tuple[str, ...]:
    """Return values by row as they are shown; empty where there is none."""
    return tuple(fixed(float(v), decimals) if np.isfinite(v) else "" for v in values.ravel())


def rank_maps(allocations: Sequence[Allocation], note: str = "") -> Drawing:
    """Draw the mean rank of every site at the start, in the middle and at the end of each AdaLoRA experiment.

    Args:
        allocations: what to draw.
        note: a sentence for the caption, with a space before it.
    """
    frames = {a.experiment.name: _frames(a, len(allocations)) for a in allocations}
    highest = max(float(np.nanmax(a.maps[i].ranks)) for a in allocations for i in frames[a.experiment.name])
    norm = Normalize(0, max(1.0, highest))

    def paint(figure: Figure) -> HoverPoints:
        hover, panels = HoverPoints(), []
        rows = figure.subfigures(len(allocations), 1, squeeze=False)[:, 0]
        for subfigure, allocation in zip(rows, allocations, strict=True):
            subfigure.suptitle(allocation.experiment.name, x=0.01, ha="left", fontweight="bold", fontsize="medium")
            panels += _rank_row(subfigure, hover, allocation, norm, frames[allocation.experiment.name])
        hover.player = _player(allocations, frames, norm, panels)
        return hover

    skipped = any(len(frames[a.experiment.name]) < len(a.maps) for a in allocations)
    caption = (
        "Rank of every site from the given step on, mean over seeds: at the start, in the middle of "
        "the recorded updates, and at the end. Rows are blocks, columns are matrices; all panels "
        f"share one color scale.{PARTLY if skipped else ''}{note}"
    )
    height = (_PANEL_IN + 0.55) * len(allocations)
    data = [row for a in allocations for row in _rank_rows(a, frames[a.experiment.name])]
    return draw("rank_maps", "Ranks by layer and matrix over training", caption, height, paint, data)


def _frames(allocation: Allocation, experiments: int) -> list[int]:
    """Return which recorded maps the page carries: all, or as many as keep it small; those drawn are among them."""
    count, cells = len(allocation.maps), len(allocation.grid.blocks) * len(allocation.grid.matrices)
    most = max(5, CELLS // (cells * experiments))
    if count <= most:
        return list(range(count))
    return sorted({*(int(i) for i in np.linspace(0, count - 1, most)), *_shown(allocation)})


def _rank_row(
    subfigure: SubFigure, hover: HoverPoints, allocation: Allocation, norm: Normalize, frames: list[int]
) -> list[Panel]:
    """Draw one experiment, and return the map that can move, if any."""
    name, grid, shown = allocation.experiment.name, allocation.grid, _shown(allocation)
    hover.series(name, METHOD_COLORS[allocation.experiment.method])
    end = "\n" if is_narrow(subfigure) else " "
    moving: list[Panel] = []
    panels = subfigure.subplots(1, 3, squeeze=False)[0]
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    for column, (axes, index) in enumerate(zip(panels, shown, strict=False)):
        entry = allocation.maps[index]
        mesh = _heat(axes, entry.ranks, norm, grid, labels=column == 0)
        title = axes.set_title(_map_title(entry, end))
        first = hover.add(name, mesh, _cell_texts(grid, _cells(entry.ranks), "rank"))
        if index == len(allocation.maps) // 2 and len(frames) > 1:
            title_of(mesh, title)
            maps = [allocation.maps[i] for i in frames]
            moving = [
                Panel(
                    gid=str(mesh.get_gid()),
                    first_point=first,
                    titles=tuple(_map_title(m, end) for m in maps),
                    frames=tuple(_cells(m.ranks) for m in maps),
                    frame_at=(),
                )
            ]
    bar = subfigure.colorbar(ScalarMappable(norm, _colors()), ax=list(panels), pad=0.02, aspect=24)
    bar.outline.set_visible(False)
    bar.set_label("rank")
    bar.ax.tick_params(length=0)
    return moving


def _map_title(entry: RankMap, end: str) -> str:
    return f"from step {entry.step}:{end}{round(float(np.nansum(entry.ranks)))} ranks"


def _player(
    allocations: Sequence[Allocation], frames: dict[str, list[int]], norm: Normalize, panels: list[Panel]
) -> Player | None:
    """Return the walk through all steps at which a map changed; at each, a map shows what was in force."""
    moving = [a for a in allocations if len(frames[a.experiment.name]) > 1]
    if not moving:
        return None
    steps_of = [[a.maps[i].step for i in frames[a.experiment.name]] for a in moving]
    steps = sorted({step for one in steps_of for step in one})
    placed = tuple(
        replace(panel, frame_at=tuple(max(0, int(np.searchsorted(one, step, side="right")) - 1) for step in steps))
        for panel, one in zip(panels, steps_of, strict=True)
    )
    start = steps.index(moving[0].maps[len(moving[0].maps) // 2].step)
    colors = tuple(to_hex(color) for color in _colors()(np.arange(256)))
    return Player(tuple(steps), start, "rank", colors, GRID, float(norm.vmax or 1.0), placed)


def _rank_rows(allocation: Allocation, frames: list[int]) -> list[dict[str, Raw]]:
    grid = allocation.grid
    return [
        {
            "experiment": allocation.experiment.name,
            "step": allocation.maps[i].step,
            "block": block,
            "matrix": matrix,
            "rank": _known(allocation.maps[i].ranks[row, column]),
        }
        for i in frames
        for row, block in enumerate(grid.blocks)
        for column, matrix in enumerate(grid.matrices)
    ]


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _shown(allocation: Allocation) -> list[int]:
    """Return which of the recorded maps are drawn: the first, the middle one, the last."""
    return sorted({0, len(allocation.maps) // 2, len(allocation.maps) - 1})


def importance_maps(patterns: Sequence[ImportancePattern], note: str = "") -> Drawing:
    """Draw the final relative score of every site, and its course over blocks for attention and MLP.

    Args:
        patterns: what to draw.
        note: a sentence for the caption, with a space before it.
    """

    def paint(figure: Figure) -> HoverPoints:
        hover = HoverPoints()
        rows = figure.subfigures(len(patterns), 1, squeeze=False)[:, 0]
        for subfigure, pattern in zip(rows, patterns, strict=True):
            name = pattern.experiment.name
            hover.series(name, METHOD_COLORS[pattern.experiment.method])
            subfigure.suptitle(name, x=0.01, ha="left", fontweight="bold", fontsize="medium")
            left, right = subfigure.subplots(1, 2, width_ratios=(1, 1.35))
            mean = np.mean(pattern.relative_final, axis=0)  # (blocks, matrices)
            norm = Normalize(0, float(np.nanmax(mean)))
            mesh = _heat(left, mean, norm, pattern.grid)
            hover.add(name, mesh, _cell_texts(pattern.grid, _cells(mean), "relative score"))
            bar = subfigure.colorbar(ScalarMappable(norm, _colors()), ax=left, pad=0.03, aspect=24)
            bar.outline.set_visible(False)
            bar.ax.tick_params(length=0)
            _block_lines(right, hover, pattern)
        return hover

    many = any(len(p.seeds) > SINGLE_SEEDS for p in patterns)
    seeds = (
        f"band from the lowest to the highest of more than {SINGLE_SEEDS} seeds"
        if many
        else "thin lines for single seeds"
    )
    caption = (
        "Scores at the last decision, divided by the mean over the sites of their run: 1 is an "
        "average site. Left: every site, mean over seeds, each experiment on its own scale. Right: "
        f"mean by block of the attention sites and of the MLP sites, {seeds}. A "
        f"score is what the method decided with; it is not a measured harm.{note}"
    )
    height = (_PANEL_IN + 0.55) * len(patterns)
    data = [row for pattern in patterns for row in _score_rows(pattern)]
    return draw("importance_by_layer", "Importance by layer", caption, height, paint, data)


def _score_rows(pattern: ImportancePattern) -> list[dict[str, Raw]]:
    mean, grid = np.mean(pattern.relative_final, axis=0), pattern.grid
    return [
        {
            "experiment": pattern.experiment.name,
            "block": block,
            "matrix": matrix,
            "relative_score": _known(mean[row, column]),
            "score": _known(pattern.raw_final[row, column]),
            "seeds": len(pattern.seeds),
        }
        for row, block in enumerate(grid.blocks)
        for column, matrix in enumerate(grid.matrices)
    ]


def _block_lines(axes: Axes, hover: HoverPoints, pattern: ImportancePattern) -> None:
    attention, blocks, name = pattern.grid.is_attention(), pattern.grid.blocks, pattern.experiment.name
    groups = (("attention", attention, METHOD_COLORS["lora"], "o"), ("MLP", ~attention, METHOD_COLORS["adalora"], "s"))
    for label, columns, color, marker in groups:
        if not columns.any():
            continue
        by_seed = np.mean(pattern.relative_final[:, :, columns], axis=2)  # (seeds, blocks)
        if len(by_seed) > SINGLE_SEEDS:
            band = axes.fill_between(blocks, by_seed.min(axis=0), by_seed.max(axis=0), color=color, alpha=0.2, lw=0)
            hover.add(name, band)
        else:
            for one in by_seed:
                (thin,) = axes.plot(blocks, one, color=color, lw=0.8, alpha=0.45)
                hover.add(name, thin)
        mean = by_seed.mean(axis=0)
        (line,) = axes.plot(blocks, mean, color=color, lw=1.8, marker=marker, ms=4, label=label)
        texts = [
            f"block {b}, mean of {label} sites\nrelative score {fixed(float(v))}"
            for b, v in zip(blocks, mean, strict=True)
        ]
        hover.add(name, line, texts)
    axes.axhline(1, color=MUTED, lw=0.8, ls=(0, (4, 3)))
    axes.set_ylim(bottom=0)
    axes.set_xticks(blocks[:: max(1, len(blocks) // (6 if is_narrow(axes.figure) else 12))])
    axes.set_xlabel("block")
    axes.set_ylabel("relative score")
    axes.legend(loc="best")
    quiet_grid(axes)
