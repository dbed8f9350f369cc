"""Blocks by matrix types: final ranks, and importance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import SubFigure

from peft_vit.core.config import ExperimentConfig
from peft_vit.deploy.page.document import Drawing, Raw
from peft_vit.deploy.page.figure import GRID, METHOD_COLORS, PAPER, SEQUENTIAL, Canvas, draw
from peft_vit.deploy.page.formatting import fixed
from peft_vit.lab.analysis import Allocation, ImportancePattern
from peft_vit.lab.analysis.layers import Grid

PANEL_IN = 2.8  # of an experiment
_COLORS = matplotlib.colormaps[SEQUENTIAL].with_extremes(bad=GRID)  # where there is nothing it is that of the grid


def rank_maps(allocations: Sequence[Allocation], note: str) -> Drawing:
    """Draw the mean final rank of every site; `note` is a sentence for the caption, with a space before it."""
    caption = "Rank of every module at the end, mean over seeds. Rows are blocks, columns are matrices."
    return _maps("rank_maps", "Ranks by layer and matrix", caption + note, allocations)


def importance_maps(patterns: Sequence[ImportancePattern], note: str) -> Drawing:
    """Draw the final relative score of every site; `note` is a sentence for the caption, with a space before it."""
    caption = (
        "Scores at the last decision, divided by the mean over their run's modules: 1 is an average module. Mean over "
        "seeds, each experiment on its own scale. A score is what the method decided with; it is not a measured harm."
    )
    return _maps("importance_by_layer", "Importance by layer", caption + note, patterns)


def _maps(slug: str, title: str, caption: str, maps: Sequence[Allocation | ImportancePattern]) -> Drawing:
    """Draw a panel an experiment; its first measure is drawn, the data have all."""

    def paint(canvas: Canvas) -> None:
        columns = 1 if canvas.narrow else 2
        parts = canvas.figure.subfigures(-(-len(maps) // columns), columns, squeeze=False).flat
        for part, panel in zip(parts, maps, strict=False):
            titled(canvas, part, panel.experiment)
            measure, values = next(iter(panel.measures.items()))
            norm, axes = Normalize(0, max(1.0, *values.values())), part.subplots()
            heat(canvas, axes, panel.experiment.name, panel.grid, values, norm, measure.replace("_", " "))
            color_bar(part, norm, axes, "")

    data: list[dict[str, Raw]] = []
    for panel in maps:
        for block, matrix, site in panel.grid.cells():
            cell: dict[str, Raw] = {"experiment": panel.experiment.name, "block": block, "matrix": matrix}
            values = {name: by_site.get(site) for name, by_site in panel.measures.items()}
            data.append(cell | values | {"seeds": panel.seeds})
    if any(not site for panel in maps for *_, site in panel.grid.cells()):
        caption += " Grey: the block has no such matrix."
    return draw(slug, title, caption, PANEL_IN * -(-len(maps) // 2), paint, data, PANEL_IN * len(maps))


def titled(canvas: Canvas, part: SubFigure, experiment: ExperimentConfig) -> None:
    """Write the experiment above its part of a figure."""
    canvas.series(experiment.name, METHOD_COLORS[experiment.method])
    part.suptitle(experiment.name, x=0.01, ha="left", fontweight="bold", fontsize="medium")


def heat(
    canvas: Canvas, axes: Axes, name: str, grid: Grid, values: Mapping[str, float], norm: Normalize, what: str
) -> None:
    """Draw values of sites, block 0 at the top, as vector cells."""
    cells = list(grid.cells())
    shape = (len(grid.blocks), len(grid.matrices))
    array = np.reshape([values.get(site, np.nan) for *_, site in cells], shape)
    mesh = axes.pcolormesh(np.ma.masked_invalid(array), cmap=_COLORS, norm=norm, edgecolors=PAPER, linewidth=0.4)
    axes.set_ylim(len(grid.blocks), 0)
    turned: dict[str, Any] = {"rotation": 90, "va": "center"} if canvas.narrow else {"rotation": 45}
    axes.set_xticks(np.arange(len(grid.matrices)) + 0.5, grid.matrices, rotation_mode="anchor", ha="right", **turned)
    axes.set_yticks(np.arange(len(grid.blocks)) + 0.5, [str(block) for block in grid.blocks])
    axes.tick_params(length=0, labelsize=7.5 if len(grid.blocks) <= 14 else 6.5)
    axes.set_ylabel("block")
    axes.spines[:].set_visible(False)
    texts = [
        f"block {block}, {matrix}\n{f'{what} {fixed(values[site])}' if site else 'no such matrix in this block'}"
        for block, matrix, site in cells
    ]
    canvas.add(name, mesh, texts)


def color_bar(part: SubFigure, norm: Normalize, axes: Axes | list[Axes], label: str) -> None:
    """Draw the scale of a part of a figure."""
    bar = part.colorbar(ScalarMappable(norm, _COLORS), ax=axes, pad=0.02, aspect=24)
    bar.outline.set_visible(False)
    assert bar.solids is not None
    bar.solids.set(rasterized=False, edgecolor="face")  # equal images would share an id
    bar.set_label(label)
    bar.ax.tick_params(length=0)
