"""Tables beside accuracy: whether confidence can be believed, and how steadily the loss came down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peft_vit.analysis import Calibration, CalibrationDifferences, Estimate, MethodResult
from peft_vit.analysis.calibration import BINS, Bin
from peft_vit.analysis.convergence import SETTLED_WITHIN_NATS, late_loss_deviation, roughness, settled_step
from peft_vit.report.document import Block, Cell, Paragraph, Table
from peft_vit.report.formatting import fixed, joined, number_interval, percent
from peft_vit.report.tables import (
    OVER_SEEDS,
    Column,
    cell,
    comparison_values,
    ends,
    interval_cell,
    interval_cells,
    to_thousandths,
)

_TITLES: dict[str, str] = {"nll": "NLL (nats)", "ece": "ECE", "adaptive_ece": "adaptive ECE", "brier": "Brier score"}


def calibration_blocks(
    calibrations: Sequence[Calibration], differences: Sequence[CalibrationDifferences]
) -> Iterator[Block]:
    """Yield calibration by experiment, its differences to the references, reliability bins, and what is not known."""
    if not calibrations:
        return
    yield _calibration_table(calibrations)
    for reference in dict.fromkeys(family.reference for family in differences):
        yield _differences_table([family for family in differences if family.reference == reference], reference)
    if bins := [c for c in calibrations if c.bins]:
        yield _reliability_table(bins)
    without = [c.experiment.name for c in calibrations if not c.seeds]
    partly = [c for c in calibrations if c.seeds and c.without]
    partly_named = (f"{c.experiment.name} ({len(c.without)} of {len(c.without) + len(c.seeds)})" for c in partly)
    if named := [*without, *partly_named]:
        yield Paragraph(f"Runs without recorded predictions, so without all but NLL and ECE: {joined(named)}.")


def _calibration_table(calibrations: Sequence[Calibration]) -> Table:
    columns = _TITLES | {"overconfidence": "overconfidence"}
    return Table.of(
        "calibration",
        "Calibration on test",
        (
            {
                "experiment": cell("experiment", c.experiment.name),
                **{title: interval_cell(name, c.intervals[name], to_thousandths) for name, title in columns.items()},
                "n": Cell(
                    str(len(c.seeds) + len(c.without)),
                    {"seeds_without_predictions": " ".join(str(seed) for seed in c.without)},
                ),
            }
            for c in calibrations
        ),
        f"Smaller is better. ECE: gap between confidence and accuracy over {BINS} bins, equally wide or, adaptive, "
        "of equal counts; it is biased upwards where bins hold few images. Brier score: mean squared error of the "
        "probability of the predicted class; with two classes that is the usual one. Overconfidence: mean "
        f"confidence minus accuracy, best at 0. n counts seeds. {OVER_SEEDS}",
        folded=True,
    )


def _differences_table(families: Sequence[CalibrationDifferences], reference: str) -> Table:
    rows = list(zip(*(family.comparisons for family in families), strict=True))  # one an experiment, one a measure
    return Table.of(
        f"calibration_against_{reference}",
        f"Calibration minus that of {reference}, paired by seed",
        (
            {"experiment": row[0].name}
            | {_TITLES[family.measure]: _difference(c) for family, c in zip(families, row, strict=True)}
            for row in rows
        ),
        "Negative is better calibrated; p-values are in the CSV file. The exact Wilcoxon signed-rank test at 5 % "
        f"decides, with Holm's correction over the rows, for each measure apart. {OVER_SEEDS}",
        data=(
            {
                "experiment": c.name,
                "reference": reference,
                "measure": family.measure,
                **ends("difference", c.interval),
                **comparison_values(c),
                "verdict": {"supported": "larger", "refuted": "smaller"}.get(c.verdict, c.verdict),
            }
            for row in rows
            for family, c in zip(families, row, strict=True)
        ),
        folded=True,
    )


def _difference(comparison: Estimate) -> str:
    if comparison.interval is None:
        return comparison.note
    word = {"supported": "worse", "refuted": "better", "not decided": "not decided"}[comparison.verdict]
    return f"{to_thousandths(comparison.interval)}, {word}"


def _reliability_table(calibrations: Sequence[Calibration]) -> Table:
    filled = [m for m in range(BINS) if any(c.bins[m].count for c in calibrations)]

    def text(one: Bin) -> str:
        if one.confidence is None or one.accuracy is None:
            return "–"
        return f"{percent(one.confidence)} / {percent(one.accuracy)} ({one.count:,})"

    titles = {m: f"{fixed(100 * m / BINS, 0)} to {percent((m + 1) / BINS)}" for m in filled}
    return Table.of(
        "reliability",
        "Reliability: mean confidence / accuracy (predictions) by confidence",
        ({"experiment": c.experiment.name} | {titles[m]: text(c.bins[m]) for m in filled} for c in calibrations),
        "Predictions of all seeds together: they share test images, so their number is no sample size and no "
        "interval is given. Accuracy below confidence is overconfidence.",
        data=(
            {
                "experiment": c.experiment.name,
                "low": one.low,
                "high": one.high,
                "count": one.count,
                "mean_confidence": one.confidence,
                "accuracy": one.accuracy,
            }
            for c in calibrations
            for one in c.bins
        ),
        folded=True,
    )


_CONVERGENCE = (
    Column("late_deviation", "late deviation (nats)", late_loss_deviation, to_thousandths),
    Column("roughness", "roughness (nats)", roughness, to_thousandths),
    Column("settled_step", "near the end from step", settled_step, lambda found: number_interval(found, 0)),
)


def convergence_table(methods: Sequence[MethodResult]) -> Table:
    """Return how steadily each experiment's loss came down."""
    return Table.of(
        "convergence",
        "How steadily the loss came down",
        (
            {
                "experiment": cell("experiment", m.experiment.name),
                **interval_cells(_CONVERGENCE, m.runs),
                "of steps": cell("steps", max(len(run.record.steps) for run in m.runs)),
                "n": cell("n", len(m.runs)),
            }
            for m in methods
        ),
        "Late deviation: standard deviation of the training loss about its own line over the last third of the "
        "steps. Roughness: spread of a step's loss about the mean of its neighbours. Both hold the noise of "
        "minibatches. Near the end: first evaluation from which on the validation loss stays within "
        f"{SETTLED_WITHIN_NATS} nats of its last value. – : not measurable in these records. {OVER_SEEDS}",
        folded=True,
    )
