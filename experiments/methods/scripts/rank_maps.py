"""Ranks of adaptive methods by layer and matrix: at the start, in the middle and at the end of training."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.colors import Normalize

from peft_vit.deploy.page.document import Drawing, Raw
from peft_vit.deploy.page.figure import Canvas, draw
from peft_vit.lab.analysis import Study
from peft_vit.lab.analysis.layers import Grid
from peft_vit.lab.report.figures import PANEL_IN, color_bar, heat, titled

Maps = dict[int, dict[str, float]]  # step -> site -> mean rank over seeds from then on


def maps_of(study: Study, experiment: str) -> tuple[Grid, Maps]:
    """Return where sites stand, and their ranks at the first, the middle and the last step that all seeds share."""
    runs = study.runs_of(experiment)
    sites = runs[0].adapted_sites()
    by_run = [{entry.step: entry.ranks for entry in run.record.rank_history} for run in runs]
    steps = sorted(set.intersection(*map(set, by_run)))
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    return Grid.of(sites), {
        step: {site.name: fmean(ranks[step].get(site.name, 0) for ranks in by_run) for site in sites} for step in chosen
    }


def rank_maps(study: Study, experiments: Sequence[str]) -> Drawing:
    """Draw three panels an experiment."""
    shown = {name: maps_of(study, name) for name in experiments}
    by_name = {experiment.name: experiment for experiment in study.experiments}
    norm = Normalize(0, max(rank for _, maps in shown.values() for ranks in maps.values() for rank in ranks.values()))

    def paint(canvas: Canvas) -> None:
        parts = canvas.figure.subfigures(len(shown), 1, squeeze=False).flat
        for part, (name, (grid, maps)) in zip(parts, shown.items(), strict=True):
            titled(canvas, part, by_name[name])
            panels = part.subplots(1, len(maps))
            for axes, (step, ranks) in zip(panels, maps.items(), strict=True):
                heat(canvas, axes, name, grid, ranks, norm, "rank")
                axes.set_title(f"from step {step}: {round(sum(ranks.values()))} ranks")
                if axes is not panels[0]:
                    axes.set_ylabel("")
                    axes.tick_params(labelleft=False)
            color_bar(part, norm, list(panels), "rank")

    caption = (
        "Rank of every module from the given step on, mean over seeds: at the start, in the middle of the recorded "
        "updates, and at the end. Rows are blocks, columns are matrices; all panels share one color scale."
    )
    data: list[dict[str, Raw]] = [
        {"experiment": name, "step": step, "block": block, "matrix": matrix, "rank": ranks.get(site)}
        for name, (grid, maps) in shown.items()
        for step, ranks in maps.items()
        for block, matrix, site in grid.cells()
    ]
    title = "Ranks by layer and matrix over training"
    return draw("rank_maps", title, caption, PANEL_IN * len(shown), paint, data)
