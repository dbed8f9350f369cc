"""Comparisons that stop: each one's course from look to look against the bounds that decide it, and where it stands."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from peft_vit.analysis import Study
from peft_vit.analysis.stopping import ENDS, repeated_interval
from peft_vit.config import StoppingConfig
from peft_vit.report.document import Block, Drawing, Raw
from peft_vit.report.formatting import fixed, margin_in_points, points_interval, signed
from peft_vit.report.hover import HoverPoints
from peft_vit.report.method_tables import QUESTIONS, stopping_table
from peft_vit.report.plot_selection import leading, selection_note
from peft_vit.report.style import DASHED, INK, METHOD_COLORS, MUTED, draw, is_narrow, quiet_grid
from peft_vit.report.tables import ends
from peft_vit.statistics.sequential import Course, Look, SequentialTest

PANELS = 12
_COLUMNS, _PANEL_IN = 3, 1.75
_DASHES = {"noninferiority": DASHED, "superiority": "-"}


def stopping_blocks(study: Study, courses: Sequence[Course], validation: Mapping[str, float]) -> Iterator[Block]:
    """Yield figure and table of the comparisons that stop; nothing of a study that declared none.

    Args:
        study: the study.
        courses: of its comparisons.
        validation: experiment -> mean validation accuracy, by which panels are chosen if there are too many.
    """
    if study.stopping is None:
        return
    looked = [course for course in courses if course.looks]
    if looked:
        colors = {one.name: METHOD_COLORS[one.method] for one in study.experiments}
        yield courses_figure(looked, study.stopping, colors, validation)
    yield stopping_table(courses, study.stopping)


def courses_figure(
    courses: Sequence[Course], stopping: StoppingConfig, colors: Mapping[str, str], validation: Mapping[str, float]
) -> Drawing:
    """Draw a panel a comparison: its mean difference from look to look, between the bounds that decide it.

    Args:
        courses: that have been looked at, at least one.
        stopping: what was declared.
        colors: by experiment.
        validation: see `stopping_blocks`.
    """
    drawn = leading(courses, validation, PANELS, lambda course: course.name)
    asked = [field for field in QUESTIONS if getattr(drawn[0], field) is not None]
    legend = [
        Line2D([], [], color=MUTED, marker="o", ms=4, lw=1.2, label="difference, with its repeated interval"),
        *(
            Line2D([], [], color=INK, lw=1, ls=_DASHES[field], label=f"bounds of “{QUESTIONS[field]}”")
            for field in asked
        ),
    ]

    def paint(figure: Figure) -> HoverPoints:
        hover = HoverPoints()
        columns = 1 if is_narrow(figure) else min(_COLUMNS, len(drawn))
        panels = figure.subplots(math.ceil(len(drawn) / columns), columns, squeeze=False)
        for axes, course in zip(panels.flat, drawn, strict=False):
            _panel(axes, hover, course, stopping, colors[course.name], asked)
            axes.set_xlim(0, 1.05 * max(look.pairs for one in drawn for look in one.looks))
        for axes in panels.flat[len(drawn) :]:
            axes.set_axis_off()
        for axes in panels.flat[max(0, len(drawn) - columns) : len(drawn)]:
            axes.set_xlabel("pairs")
        figure.supylabel(f"minus {stopping.control} (points)", fontsize="medium")
        figure.legend(handles=legend, loc="outside lower center", ncols=1 if is_narrow(figure) else len(legend))
        return hover

    margin = "" if stopping.margin is None else f" Not worse is meant by {margin_in_points(stopping.margin / 100)}."
    caption = (
        f"Mean difference to {stopping.control} at each look, over the pairs that there were. Above the upper of two "
        "bounds of a question its answer is yes, below the lower one the opposite is shown. Bounds beyond the picture "
        "were hardly to be reached at that look; all come closer when other comparisons are decided."
        f"{margin} The table has the verdicts.{selection_note(len(drawn), len(courses))}"
    )
    rows = math.ceil(len(drawn) / _COLUMNS)
    return draw(
        "courses",
        f"Courses of the comparisons with {stopping.control}",
        caption,
        0.9 + _PANEL_IN * rows,
        paint,
        [_data(course, look, stopping) for course in courses for look in course.looks],
        narrow_height_in=1.2 + _PANEL_IN * len(drawn),
    )


def _panel(
    axes: Axes, hover: HoverPoints, course: Course, stopping: StoppingConfig, color: str, asked: Sequence[str]
) -> None:
    pairs = [look.pairs for look in course.looks]
    differences = [100 * look.difference for look in course.looks]
    axes.axhline(0, color=MUTED, lw=0.8, zorder=1)
    bounds = []
    for field in asked:
        tests: list[SequentialTest] = [getattr(look, field) for look in course.looks]
        for side in ("upper_bound", "lower_bound"):
            values = [100 * getattr(test, side) if math.isfinite(getattr(test, side)) else math.nan for test in tests]
            axes.plot(pairs, values, color=INK, lw=1, ls=_DASHES[field], marker="_", ms=7, zorder=2)
            bounds += [value for value in values[-1:] if not math.isnan(value)]
    hover.series(course.name, color, "o")
    for look in course.looks:
        if math.isfinite(look.high - look.low):
            ends_of = [100 * look.low, 100 * look.high]
            hover.plot(course.name, axes, [look.pairs] * 2, ends_of, color=color, lw=2.2, alpha=0.35, zorder=3)
    says = [_says(look, stopping) for look in course.looks]
    hover.plot(course.name, axes, pairs, differences, says, color=color, marker="o", ms=4, lw=1.2, zorder=4)
    reach = 1.4 * max([0.5, *map(abs, differences), *map(abs, bounds)])
    axes.set_ylim(-reach, reach)
    axes.set_title(f"{course.name}: {ENDS[course.stopped]}", fontsize="small")
    quiet_grid(axes, "y")


def _says(look: Look, stopping: StoppingConfig) -> str:
    lines = [f"{look.pairs} pairs: {points_interval(repeated_interval(look, stopping))} points"]
    for field, words in QUESTIONS.items():
        test: SequentialTest | None = getattr(look, field)
        if test is not None:
            bounds = (test.upper_bound, test.lower_bound)
            takes, opposite = (signed(100 * one) if math.isfinite(one) else "more pairs" for one in bounds)
            lines.append(f"{words}? takes {takes}, the opposite {opposite}; p = {fixed(test.p_value, 3)}")
    return "\n".join(lines)


def _data(course: Course, look: Look, stopping: StoppingConfig) -> dict[str, Raw]:
    row: dict[str, Raw] = {"experiment": course.name, "control": stopping.control, "pairs": look.pairs}
    row |= {key: value for key, value in ends("difference", repeated_interval(look, stopping)).items() if key != "n"}
    for field in QUESTIONS:
        test: SequentialTest | None = getattr(look, field)
        if test is not None:
            for side in ("upper_bound", "lower_bound"):
                value = getattr(test, side)
                row[f"{field}_{side}"] = value if math.isfinite(value) else None
            row |= {f"{field}_p": test.p_value, f"{field}_opposite_p": test.opposite_p_value}
            row[f"{field}"] = getattr(course, field)
    return row | {"stopped": course.stopped}
