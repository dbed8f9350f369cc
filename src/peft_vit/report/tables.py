"""Cells and rows that tables share, and tables of methods."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_vit.analysis import Estimate, MethodResult, Run
from peft_vit.analysis.comparison import BY_LOOKS, known_interval, known_mean, outcome
from peft_vit.report.document import UNSEEN, Cell, Raw, Row, Table
from peft_vit.report.formatting import (
    count,
    fixed,
    known,
    megabytes,
    number_interval,
    percent,
    percent_interval,
    points,
    points_interval,
)
from peft_vit.statistics import Interval

OTHER_SEEDS = "what other seeds would change, on the same test images unless each seed draws its own"
OVER_SEEDS = f"95 % t intervals in brackets: {OTHER_SEEDS}."
FAMILY_NOTE = (
    "The exact Wilcoxon signed-rank test at 5 % decides, with Holm's correction over the rows of "
    "this table; the 95 % t interval beside it describes what other seeds would change."
)
LOOKS_NOTE = (
    "Looks at declared numbers of seeds decide; intervals and p-values account for them, and for all comparisons."
)


def cell(name: str, value: Any, write: Callable[[Any], str] = str) -> Cell:
    """Return the cell of a number or text, whose column in the CSV file has that name; – where it is not known."""
    return Cell(known(value, write), {name: value})


def interval_cell(name: str, found: Interval | None, write: Callable[[Interval], str]) -> Cell:
    """Return the cell of an interval whose n has a column of its own; – where there is none."""
    return Cell(known(found, write), measured(name, found))


def ends(name: str, interval: Interval | None) -> dict[str, Raw]:
    """Return an interval as columns of a CSV file."""
    if interval is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None, "n": 0}
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high, "n": interval.n}


def measured(name: str, interval: Interval | None) -> dict[str, Raw]:
    """Return an interval as columns of a CSV file in which several stand beside one another: its n is named too."""
    return {f"{name}_n" if key == "n" else key: value for key, value in ends(name, interval).items()}


def comparison_values(comparison: Estimate) -> dict[str, Raw]:
    """Return what decided a comparison."""
    significance = comparison.significance
    return {
        "p_value": None if significance is None else significance.p_value,
        "p_holm": comparison.adjusted_p,
        "needed_n": None if significance is None else significance.minimum_n,
        "verdict": comparison.verdict,
        "note": comparison.note,
    }


def tested(comparison: Estimate) -> str:
    """Return what the test said, with its note."""
    return outcome(comparison) + (f" ({comparison.note})" if comparison.note else "")


def to_thousandths(found: Interval) -> str:
    """Return a number with its interval, three decimals each."""
    return number_interval(found, 3)


def crossed(first: str, keys: Iterable[Hashable], columns: Mapping[str, Mapping[Any, str]]) -> Iterator[Row]:
    """Yield a row for each key, below `first`, with a column for each experiment; – where one lacks the key."""
    for key in keys:
        yield {first: str(key)} | {heading: texts.get(key, "–") for heading, texts in columns.items()}


@dataclass(frozen=True)
class Column:
    """A column of a table of experiments: the mean over their runs of what each recorded; – where none did."""

    key: str  # of the CSV file
    title: str
    of: Callable[[Run], float | None]
    write: Callable[[Any], str]  # of the mean, or of its interval


def interval_cells(columns: Iterable[Column], runs: Sequence[Run]) -> dict[str, Cell]:
    """Return the cells of an experiment's runs in columns of intervals over seeds, by heading."""
    return {c.title: interval_cell(c.key, known_interval(map(c.of, runs)), c.write) for c in columns}


def accuracy_table(methods: Sequence[MethodResult]) -> Table:
    """Return test accuracy by experiment, each seed visible."""
    validated = all(m.validation_accuracy is not None for m in methods)
    chose = "Validation chose the epoch" if validated else "Without validation images the last step's model was taken"
    return Table.of(
        "accuracy",
        "Test accuracy by method",
        (
            {
                "experiment": cell("experiment", m.experiment.name),
                UNSEEN: Cell("", {"method": m.experiment.method}),
                "test accuracy": Cell(percent_interval(m.test_accuracy), ends("test_accuracy", m.test_accuracy)),
                "n": len(m.seeds),
                "each seed (%)": Cell(
                    ", ".join(f"{s}: {fixed(100 * value, 1)}" for s, value in zip(m.seeds, m.by_seed, strict=True)),
                    {f"seed_{seed}": accuracy for seed, accuracy in zip(m.seeds, m.by_seed, strict=True)},
                ),
                "validation": cell(
                    "validation_accuracy", m.validation_accuracy and m.validation_accuracy.estimate, percent
                ),
                "above majority (points)": cell("above_majority", m.above_majority.estimate, points),
            }
            for m in methods
        ),
        f"n counts seeds. {OVER_SEEDS} With two seeds they are wide and may pass 100 %. {chose}; test was read once.",
    )


_COSTS = (
    Column("final_parameters", "trainable at end", lambda run: run.parameters.final, count),
    Column("peak_parameters", "largest", lambda run: run.parameters.peak, count),
    Column("adapter_parameters", "adapter alone", lambda run: run.parameters.final - run.parameters.head, count),
    Column("frozen_bytes", "frozen", lambda run: run.bytes.frozen_bytes, megabytes),
    Column("adapter_file_bytes", "adapter file", lambda run: run.bytes.adapter_file_bytes, megabytes),
    Column("seconds_per_step", "s a step", lambda run: run.record.seconds_per_step, lambda s: fixed(s, 3)),
    Column("latency_s", "latency (ms)", lambda run: run.record.latency_s.get(1), lambda s: fixed(1000 * s, 1)),
    Column("own_memory_bytes", "memory of a run", lambda run: run.record.own_memory_bytes, megabytes),
)


def cost_table(methods: Sequence[MethodResult]) -> Table:
    """Return what each experiment costs."""
    return Table.of(
        "cost",
        "Cost by method",
        (
            {
                "experiment": cell("experiment", m.experiment.name),
                **{c.title: cell(c.key, known_mean(map(c.of, m.runs)), c.write) for c in _COSTS},
                UNSEEN: Cell("", {"n": len(m.seeds)}),
            }
            for m in methods
        ),
        "Means over seeds. Trainable parameters include the head and are counted on the live model; "
        "'adapter alone' is the end without the head. Latency: a forward pass of one image. Memory of a run: what "
        "it added to its process's memory at most, the model included; – in older records. MB are 10⁶ bytes. "
        "Seconds and memory hold for the machine named under provenance.",
    )


_QUALITY = (
    Column("balanced_accuracy", "balanced accuracy", lambda run: run.test.balanced_accuracy, percent_interval),
    Column("auroc", "AUROC", lambda run: run.test.auroc, to_thousandths),
)


def quality_table(methods: Sequence[MethodResult]) -> Table:
    """Return the other measures of right answers on test; how far they can be believed stands with calibration."""
    return Table.of(
        "quality",
        "Other measures on test",
        (
            {"experiment": cell("experiment", m.experiment.name), **interval_cells(_QUALITY, m.runs), "n": len(m.runs)}
            for m in methods
        ),
        f"n counts seeds. AUROC for two classes only. {OVER_SEEDS}",
        folded=True,
    )


def comparison_table(comparisons: Sequence[Estimate], reference: str) -> Table:
    """Return paired differences against one reference."""
    against = [c for c in comparisons if c.reference == reference]
    looks = any(c.significance is not None and c.significance.test == BY_LOOKS for c in against)
    note = "Differences in test accuracy between runs that share seed, weights and images; n counts pairs. "
    note += LOOKS_NOTE if looks else FAMILY_NOTE
    return differences_table(f"against_{reference}", f"Differences to {reference}, paired by seed", against, note)


def differences_table(slug: str, title: str, comparisons: Sequence[Estimate], note: str) -> Table:
    """Return one family of comparisons."""
    return Table.of(
        slug,
        title,
        (
            {
                "experiment": Cell(c.name, {"experiment": c.name, "reference": c.reference}),
                "difference (points)": Cell(points_interval(c.interval), ends("difference", c.interval)),
                "each seed": Cell(
                    ", ".join(map(points, c.by_seed.values())),
                    {f"seed_{seed}": difference for seed, difference in c.by_seed.items()},
                ),
                "n": len(c.by_seed),
                "more accurate?": c.verdict,
                "test": Cell(tested(c), comparison_values(c)),
            }
            for c in comparisons
        ),
        note,
    )
