"""Blocks by matrix types: ranks over training, and importance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import SubFigure

from peft_vit.deploy.page.document import Drawing, Raw
from peft_vit.deploy.page.figure import GRID, METHOD_COLORS, PAPER, SEQUENTIAL, Canvas, draw
from peft_vit.deploy.page.formatting import fixed
from peft_vit.lab.analysis import Allocation, ImportancePattern
from peft_vit.lab.analysis.layers import Grid

T = TypeVar("T", Allocation, ImportancePattern)
_PANEL_IN = 2.8  # of an experiment
_COLORS = matplotlib.colormaps[SEQUENTIAL].with_extremes(bad=GRID)  # what was not recorded has the color of the grid


def _heat(
    canvas: Canvas, axes: Axes, name: str, grid: Grid, values: np.ndarray, norm: Normalize, what: str, labels: bool
) -> None:
    """Draw (blocks, matrices), block 0 at the top, as vector cells."""
    mesh = axes.pcolormesh(np.ma.masked_invalid(values), cmap=_COLORS, norm=norm, edgecolors=PAPER, linewidth=0.4)
    axes.set_ylim(len(grid.blocks), 0)
    turned: dict[str, Any] = {"rotation": 90, "va": "center"} if canvas.narrow else {"rotation": 45}
    axes.set_xticks(np.arange(len(grid.matrices)) + 0.5, grid.matrices, rotation_mode="anchor", ha="right", **turned)
    axes.set_yticks(np.arange(len(grid.blocks)) + 0.5, [str(block) for block in grid.blocks])
    axes.tick_params(length=0, labelleft=labels, labelsize=7.5 if len(grid.blocks) <= 14 else 6.5)
    if labels:
        axes.set_ylabel("block")
    axes.spines[:].set_visible(False)
    missing = np.where(grid.has_matrix().ravel(), f"{what} not recorded", "no such matrix in this block")
    cells = zip(_places(grid), values.ravel(), missing, strict=True)
    texts = [
        f"block {block}, {matrix}\n{f'{what} {fixed(float(value))}' if np.isfinite(value) else instead}"
        for (block, matrix), value, instead in cells
    ]
    canvas.add(name, mesh, texts)


def _places(grid: Grid) -> list[tuple[int, str]]:
    """Return block and matrix of each cell, by row."""
    return [(block, matrix) for block in grid.blocks for matrix in grid.matrices]


def _grid_rows(grid: Grid, values: Mapping[str, np.ndarray]) -> Iterator[dict[str, Raw]]:
    """Yield a row for each cell: its block and matrix, and the value in each (blocks, matrices) array."""
    for index, (block, matrix) in enumerate(_places(grid)):
        cells = {name: float(array.flat[index]) for name, array in values.items()}
        yield {"block": block, "matrix": matrix, **{n: v if np.isfinite(v) else None for n, v in cells.items()}}


def _empty_cells(grids: Iterable[Grid]) -> str:
    """Return what a caption says of them, with a space before it; nothing if every block has every matrix."""
    return "" if all(grid.has_matrix().all() for grid in grids) else " Grey: the block has no such matrix."


def _color_bar(part: SubFigure, norm: Normalize, axes: Axes | list[Axes], label: str) -> None:
    bar = part.colorbar(ScalarMappable(norm, _COLORS), ax=axes, pad=0.02, aspect=24)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set(rasterized=False, edgecolor="face")  # equal images would share an id
    bar.set_label(label)
    bar.ax.tick_params(length=0)


def _by_experiment(canvas: Canvas, items: Sequence[T], columns: int) -> Iterator[tuple[SubFigure, str, T]]:
    """Yield a titled part of the figure for each item, by row, and the experiment's name."""
    parts = canvas.figure.subfigures(-(-len(items) // columns), columns, squeeze=False).flat
    for part, item in zip(parts, items, strict=False):
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
    shown = {
        a.experiment.name: [a.maps[i] for i in sorted({0, len(a.maps) // 2, len(a.maps) - 1})] for a in allocations
    }
    norm = Normalize(0, max(1.0, *(float(np.nanmax(entry.ranks)) for maps in shown.values() for entry in maps)))

    def paint(canvas: Canvas) -> None:
        end = "\n" if canvas.narrow else " "
        for part, name, allocation in _by_experiment(canvas, allocations, 1):
            panels = part.subplots(1, 3)
            for axes in panels[len(shown[name]) :]:
                axes.set_visible(False)
            for axes, entry in zip(panels, shown[name], strict=False):
                _heat(canvas, axes, name, allocation.grid, entry.ranks, norm, "rank", axes is panels[0])
                axes.set_title(f"from step {entry.step}:{end}{round(float(np.nansum(entry.ranks)))} ranks")
            _color_bar(part, norm, list(panels), "rank")

    caption = (
        "Rank of every module from the given step on, mean over seeds: at the start, in the middle of "
        "the recorded updates, and at the end. Rows are blocks, columns are matrices; all panels "
        f"share one color scale.{_empty_cells(a.grid for a in allocations)}{note}"
    )
    data: list[dict[str, Raw]] = [
        {"experiment": a.experiment.name, "step": entry.step, **cell}
        for a in allocations
        for entry in shown[a.experiment.name]
        for cell in _grid_rows(a.grid, {"rank": entry.ranks})
    ]
    title = "Ranks by layer and matrix over training"
    return draw("rank_maps", title, caption, _PANEL_IN * len(allocations), paint, data)


def importance_maps(patterns: Sequence[ImportancePattern], note: str = "") -> Drawing:
    """Draw the final relative score of every site.

    Args:
        patterns: what to draw.
        note: a sentence for the caption, with a space before it.
    """

    def paint(canvas: Canvas) -> None:
        for part, name, pattern in _by_experiment(canvas, patterns, 1 if canvas.narrow else 2):
            axes = part.subplots()
            norm = Normalize(0, float(np.nanmax(pattern.relative_final)))
            _heat(canvas, axes, name, pattern.grid, pattern.relative_final, norm, "relative score", True)
            _color_bar(part, norm, axes, "")

    caption = (
        "Scores at the last decision, divided by the mean over their run's modules: 1 is an average module. Mean over "
        "seeds, each experiment on its own scale. A score is what the method decided with; it is not a measured harm."
        f"{_empty_cells(p.grid for p in patterns)}{note}"
    )
    data: list[dict[str, Raw]] = [
        {"experiment": p.experiment.name, **cell, "seeds": len(p.seeds)}
        for p in patterns
        for cell in _grid_rows(p.grid, {"relative_score": p.relative_final, "score": p.raw_final})
    ]
    height, narrow = _PANEL_IN * -(-len(patterns) // 2), _PANEL_IN * len(patterns)
    return draw("importance_by_layer", "Importance by layer", caption, height, paint, data, narrow)
