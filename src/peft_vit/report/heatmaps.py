"""Blocks by matrix types: ranks over training, and importance."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure

from peft_vit.analysis import Allocation, ImportancePattern
from peft_vit.analysis.grid import Grid
from peft_vit.report.document import Drawing
from peft_vit.report.style import GRID, METHOD_COLORS, MUTED, PAPER, SEQUENTIAL, draw, quiet_grid

_PANEL_IN = 2.25


def _colors() -> Colormap:
    """Return the color map; what was not recorded has the color of the grid."""
    return matplotlib.colormaps[SEQUENTIAL].with_extremes(bad=GRID)


def _heat(axes: Axes, values: np.ndarray, norm: Normalize, grid: Grid, *, labels: bool = True) -> None:
    """Draw (blocks, matrices), block 0 at the top, as vector cells."""
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=_colors(), norm=norm, edgecolors=PAPER, linewidth=0.4)
    axes.set_ylim(len(grid.blocks), 0)
    axes.set_xticks(np.arange(len(grid.matrices)) + 0.5, grid.matrices, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(grid.blocks)) + 0.5, [str(block) for block in grid.blocks])
    axes.tick_params(length=0, labelleft=labels, labelsize=7.5)
    if labels:
        axes.set_ylabel("block")
    for spine in axes.spines.values():
        spine.set_visible(False)


def rank_maps(allocations: Sequence[Allocation]) -> Drawing:
    """Draw the mean rank of every site at the start, in the middle and at the end of each AdaLoRA experiment."""
    highest = max(float(np.nanmax(a.maps[index].ranks)) for a in allocations for index in _shown(a))
    norm = Normalize(0, max(1.0, highest))
    columns = 3

    def paint(figure: Figure) -> None:
        rows = figure.subfigures(len(allocations), 1, squeeze=False)[:, 0]
        for subfigure, allocation in zip(rows, allocations, strict=True):
            subfigure.suptitle(allocation.experiment.name, x=0.01, ha="left", fontsize=9, fontweight="bold")
            panels = subfigure.subplots(1, columns, squeeze=False)[0]
            shown = _shown(allocation)
            for axes in panels[len(shown) :]:
                axes.set_visible(False)
            for column, (axes, index) in enumerate(zip(panels, shown, strict=False)):
                entry = allocation.maps[index]
                _heat(axes, entry.ranks, norm, allocation.grid, labels=column == 0)
                total = round(float(np.nansum(entry.ranks)))
                axes.set_title(f"from step {entry.step}: {total} ranks", fontsize=8.5)
            bar = subfigure.colorbar(ScalarMappable(norm, _colors()), ax=list(panels), pad=0.02, aspect=24)
            bar.outline.set_visible(False)
            bar.set_label("rank")
            bar.ax.tick_params(length=0)

    caption = (
        "Rank of every site from the given step on, mean over seeds: at the start, in the middle of "
        "the recorded updates, and at the end. Rows are blocks, columns are matrices; all panels "
        "share one color scale."
    )
    height = (_PANEL_IN + 0.55) * len(allocations)
    return draw("rank_maps", "Ranks by layer and matrix over training", caption, height, paint)


def _shown(allocation: Allocation) -> list[int]:
    """Return which of the recorded maps are drawn: the first, the middle one, the last."""
    return sorted({0, len(allocation.maps) // 2, len(allocation.maps) - 1})


def importance_maps(patterns: Sequence[ImportancePattern]) -> Drawing:
    """Draw the final relative score of every site, and its course over blocks for attention and MLP."""

    def paint(figure: Figure) -> None:
        rows = figure.subfigures(len(patterns), 1, squeeze=False)[:, 0]
        for subfigure, pattern in zip(rows, patterns, strict=True):
            subfigure.suptitle(pattern.experiment.name, x=0.01, ha="left", fontsize=9, fontweight="bold")
            left, right = subfigure.subplots(1, 2, width_ratios=(1, 1.35))
            mean = np.mean(pattern.relative_final, axis=0)  # (blocks, matrices)
            norm = Normalize(0, float(np.nanmax(mean)))
            _heat(left, mean, norm, pattern.grid)
            bar = subfigure.colorbar(ScalarMappable(norm, _colors()), ax=left, pad=0.03, aspect=24)
            bar.outline.set_visible(False)
            bar.ax.tick_params(length=0)
            _block_lines(right, pattern)

    caption = (
        "Scores at the last decision, divided by the mean over the sites of their run: 1 is an "
        "average site. Left: every site, mean over seeds, each experiment on its own scale. Right: "
        "mean by block of the attention sites and of the MLP sites, thin lines for single seeds. A "
        "score is what the method decided with; it is not a measured harm."
    )
    height = (_PANEL_IN + 0.55) * len(patterns)
    return draw("importance_by_layer", "Importance by layer", caption, height, paint)


def _block_lines(axes: Axes, pattern: ImportancePattern) -> None:
    attention = pattern.grid.is_attention()
    groups = (
        ("attention", attention, METHOD_COLORS["lora"], "o"),
        ("MLP", ~attention, METHOD_COLORS["adalora"], "s"),
    )
    for label, columns, color, marker in groups:
        if not columns.any():
            continue
        by_seed = np.mean(pattern.relative_final[:, :, columns], axis=2)  # (seeds, blocks)
        for one in by_seed:
            axes.plot(pattern.grid.blocks, one, color=color, lw=0.8, alpha=0.45)
        axes.plot(pattern.grid.blocks, by_seed.mean(axis=0), color=color, lw=1.8, marker=marker, ms=4, label=label)
    axes.axhline(1, color=MUTED, lw=0.8, ls=(0, (4, 3)))
    axes.set_ylim(bottom=0)
    axes.set_xticks(pattern.grid.blocks[:: max(1, len(pattern.grid.blocks) // 12)])
    axes.set_xlabel("block")
    axes.set_ylabel("relative score")
    axes.legend(loc="best")
    quiet_grid(axes)
