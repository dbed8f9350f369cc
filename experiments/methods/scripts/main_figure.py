"""Accuracy against bytes on three data sets, as one SVG that follows a reader's light or dark page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.transforms import ScaledTranslation

from experiments.methods.scripts.study_tables import KINDS, SHOWN, titled
from peft_vit.deploy.page.document import Drawing
from peft_vit.deploy.page.figure import GRID, INK, MARKERS, METHOD_COLORS, MUTED, PAPER, THEME, Canvas, draw, quiet_grid
from peft_vit.lab.analysis import Analysis, MethodResult

_SPAN = 5.0  # points of accuracy that each panel shows, so that differences compare
_DODGE_PT = 7.0  # from marker to marker where sizes are about the same
_DARK = {INK: "#e6e9ec", MUTED: "#9aa5b0", GRID: "#343b43", PAPER: "#171b20"}


def accuracy_and_bytes(analyses: Mapping[str, Analysis]) -> Drawing:
    """Draw mean accuracy and its interval over seeds against the bytes to store, a panel a data set."""
    shown = {title: _of(analyses[study]) for study, title in KINDS.items()}

    def paint(canvas: Canvas) -> None:
        figure = canvas.figure
        panels = figure.subplots(1, len(shown))
        for axes, (title, methods) in zip(panels, shown.items(), strict=True):
            middle = [100 * method.test_accuracy.estimate for method in methods]
            places = [method.stored_bytes / 1e6 for method in methods]
            for place, method in enumerate(methods):
                accuracy, name = method.test_accuracy, method.experiment.name
                assert accuracy.high is not None
                beside = [other for other in range(len(places)) if abs(places[other] - places[place]) < 5]  # MB
                moved_pt = (beside.index(place) - (len(beside) - 1) / 2) * _DODGE_PT
                axes.errorbar(
                    places[place],
                    middle[place],
                    yerr=100 * (accuracy.high - accuracy.estimate),
                    fmt=MARKERS[SHOWN.index(name)],
                    color=METHOD_COLORS[method.experiment.method],
                    mec=PAPER,
                    mew=0.5,
                    ms=7,
                    elinewidth=1.4,
                    label=titled(name),
                    transform=axes.transData + ScaledTranslation(moved_pt / 72, 0, figure.dpi_scale_trans),
                )
            centre = (min(middle) + max(middle)) / 2
            axes.set(xlim=(0, 115), ylim=(centre - _SPAN / 2, centre + _SPAN / 2), title=title, xticks=(0, 50, 100))
            axes.set_xlabel("MB to store")
            quiet_grid(axes)
        panels[0].set_ylabel("test accuracy (%)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SHOWN))

    rows = [
        {
            "data": title,
            "experiment": method.experiment.name,
            "stored_bytes": method.stored_bytes,
            "accuracy": method.test_accuracy.estimate,
            "high": method.test_accuracy.high,
        }
        for title, methods in shown.items()
        for method in methods
    ]
    return draw("accuracy_by_bytes", "Accuracy against bytes to store", "", 2.7, paint, rows)


def _of(analysis: Analysis) -> Sequence[MethodResult]:
    by_name = {method.experiment.name: method for method in analysis.methods}
    return [by_name[name] for name in SHOWN]


def for_both_pages(svg: str) -> str:
    """Return an SVG whose ink, paper and grid follow the light or dark page on which it stands."""
    own = {color: variable[len("var(") : -1] for color, variable in THEME.items()}  # "var(--ink)" to "--ink"
    light = " ".join(f"{name}: {color};" for color, name in own.items())
    dark = " ".join(f"{name}: {_DARK[color]};" for color, name in own.items())
    for color, variable in THEME.items():
        svg = svg.replace(color, variable)
    style = f"<style>:root {{ {light} }} @media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}</style>"
    start = svg.index(">", svg.index("<svg")) + 1
    return f"{svg[:start]}\n {style}{svg[start:]}"
