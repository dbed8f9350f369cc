"""Comparisons that stop, as a table: where each stands after its last look."""

from __future__ import annotations

from collections.abc import Sequence

from peft_vit.analysis.stopping import ENDS, p_value_of, repeated_interval
from peft_vit.config import StoppingConfig
from peft_vit.report.document import Cell, Table
from peft_vit.report.formatting import points_interval
from peft_vit.report.tables import ends
from peft_vit.statistics.sequential import Course

QUESTIONS = {"noninferiority": "not worse", "superiority": "better"}  # fields of a course and of its looks


def stopping_table(courses: Sequence[Course], stopping: StoppingConfig) -> Table:
    """Return where each comparison stands: repeated interval, what became of each question, and why it stopped."""
    metric = stopping.metric.replace("_", " ")
    return Table.of(
        "stopping",
        f"Comparisons with {stopping.control} that stop",
        (_row(course, stopping) for course in courses),
        f"Differences in test {metric} between runs that share seed, weights and images, after the declared looks. "
        f"p-values hold over all looks and comparisons ({stopping.spending}), at {100 * stopping.level:g} % one-sided; "
        f"intervals are repeated ones of {100 - 200 * stopping.level:g} %: those of all looks of a comparison hold "
        "together.",
    )


def _row(course: Course, stopping: StoppingConfig) -> dict[str, Cell | str]:
    look = course.looks[-1] if course.looks else None
    interval = None if look is None else repeated_interval(look, stopping)
    row: dict[str, Cell | str] = {
        "experiment": Cell(course.name, {"experiment": course.name, "control": stopping.control}),
        "pairs": Cell(str(0 if look is None else look.pairs), {"pairs": 0 if look is None else look.pairs}),
        "difference (points)": Cell(points_interval(interval), ends("difference", interval)),
    }
    for field, words in QUESTIONS.items():
        verdict = getattr(course, field)
        if verdict is not None:
            p_value = None if look is None else p_value_of(getattr(look, field), verdict)
            said = verdict if p_value is None else f"{verdict} (p = {p_value:.3g})"
            margin = f" by {stopping.margin:g}" if field == "noninferiority" else ""
            row[f"{words}{margin}?"] = Cell(said, {field: verdict, f"{field}_p": p_value})
    row["state"] = Cell(ENDS[course.stopped], {"stopped": course.stopped})
    return row
