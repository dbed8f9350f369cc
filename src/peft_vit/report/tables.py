"""Tables of methods: what a reader sees, and the unrounded values for the CSV file."""

from __future__ import annotations

from collections.abc import Sequence

from peft_vit.analysis import Comparison, MethodResult
from peft_vit.analysis.comparison import outcome
from peft_vit.report.document import Raw, Table
from peft_vit.report.numbers import (
    count,
    fixed,
    megabytes,
    number_interval,
    percent,
    percent_interval,
    points_interval,
    signed,
)
from peft_vit.statistics import Interval

OTHER_SEEDS = "what other seeds would change, on the same test images unless each seed draws its own"
OVER_SEEDS = f"95 % t intervals in brackets: {OTHER_SEEDS}."


def ends(name: str, interval: Interval | None) -> dict[str, Raw]:
    """Return an interval as columns of a CSV file."""
    if interval is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None, "n": 0}
    return {name: interval.estimate, f"{name}_low": interval.low, f"{name}_high": interval.high, "n": interval.n}


def measured(name: str, interval: Interval | None) -> dict[str, Raw]:
    """Return an interval as columns of a CSV file in which several stand beside one another: its n is named too."""
    return {f"{name}_n" if key == "n" else key: value for key, value in ends(name, interval).items()}


def with_n(name: str, n: int) -> str:
    """Return a column's heading with the number of seeds behind it."""
    return f"{name} (n = {n})"


def accuracy_table(methods: Sequence[MethodResult]) -> Table:
    """Return test accuracy by experiment, each seed visible."""
    return Table(
        slug="accuracy",
        title="Test accuracy by method",
        columns=("experiment", "test accuracy", "n", "each seed (%)", "validation", "above majority (points)"),
        rows=tuple(
            (
                m.experiment.name,
                percent_interval(m.test_accuracy),
                str(len(m.seeds)),
                _by_seed(m.by_seed, m.seeds),
                percent(m.validation_accuracy.estimate),
                signed(100 * m.above_majority.estimate),
            )
            for m in methods
        ),
        note=(
            f"n counts seeds. {OVER_SEEDS} With two seeds they are wide and may pass 100 %. Validation chose "
            "the epoch; test was read once."
        ),
        data=tuple(
            {
                "experiment": m.experiment.name,
                "method": m.experiment.method,
                **ends("test_accuracy", m.test_accuracy),
                "validation_accuracy": m.validation_accuracy.estimate,
                "above_majority": m.above_majority.estimate,
                **{f"seed_{seed}": value for seed, value in zip(m.seeds, m.by_seed, strict=True)},
            }
            for m in methods
        ),
    )


def cost_table(methods: Sequence[MethodResult]) -> Table:
    """Return what each experiment costs."""
    return Table(
        slug="cost",
        title="Cost by method",
        columns=(
            "experiment",
            "trainable at end",
            "largest",
            "adapter alone",
            "frozen",
            "adapter file",
            "s a step",
            "latency (ms)",
            "memory of a run",
        ),
        rows=tuple(
            (
                m.experiment.name,
                count(m.final_parameters),
                count(m.peak_parameters),
                count(m.adapter_parameters),
                megabytes(m.frozen_bytes),
                megabytes(m.adapter_file_bytes),
                "–" if m.seconds_per_step is None else fixed(m.seconds_per_step, 3),
                "–" if m.latency_s is None else fixed(1000 * m.latency_s, 1),
                "–" if m.own_memory_bytes is None else megabytes(m.own_memory_bytes),
            )
            for m in methods
        ),
        note=(
            "Means over seeds. Trainable parameters include the head and are counted on the live model; "
            "'adapter alone' is the end without the head. Latency: a forward pass of one image. Memory of a run: what "
            "it added to its process's memory at most, the model included; – in older records. MB are 10⁶ bytes. "
            "Seconds and memory hold for the machine named under provenance."
        ),
        data=tuple(
            {
                "experiment": m.experiment.name,
                "final_parameters": m.final_parameters,
                "peak_parameters": m.peak_parameters,
                "adapter_parameters": m.adapter_parameters,
                "frozen_bytes": m.frozen_bytes,
                "adapter_file_bytes": m.adapter_file_bytes,
                "seconds_per_step": m.seconds_per_step,
                "latency_s": m.latency_s,
                "own_memory_bytes": m.own_memory_bytes,
                "n": len(m.seeds),
            }
            for m in methods
        ),
    )


def quality_table(methods: Sequence[MethodResult]) -> Table:
    """Return the other measures of right answers on test; how far they can be believed stands with calibration."""
    return Table(
        slug="quality",
        title="Other measures on test",
        columns=("experiment", "balanced accuracy", "AUROC", "n"),
        rows=tuple(
            (
                m.experiment.name,
                percent_interval(m.balanced_accuracy),
                "–" if m.auroc is None else number_interval(m.auroc, 3),
                str(m.balanced_accuracy.n),
            )
            for m in methods
        ),
        note=f"n counts seeds. AUROC for two classes only. {OVER_SEEDS}",
        data=tuple(
            {
                "experiment": m.experiment.name,
                **measured("balanced_accuracy", m.balanced_accuracy),
                **measured("auroc", m.auroc),
            }
            for m in methods
        ),
    )


def comparison_table(comparisons: Sequence[Comparison], reference: str) -> Table:
    """Return paired differences against one reference."""
    against = [c for c in comparisons if c.reference == reference]
    note = (
        f"Differences in test accuracy between runs that share seed, weights and images; n counts pairs. {FAMILY_NOTE}"
    )
    return differences_table(f"against_{reference}", f"Differences to {reference}, paired by seed", against, note)


FAMILY_NOTE = (
    "The exact Wilcoxon signed-rank test at 5 % decides, with Holm's correction over the rows of "
    "this table; the 95 % t interval beside it describes what other seeds would change."
)


def differences_table(slug: str, title: str, comparisons: Sequence[Comparison], note: str) -> Table:
    """Return one family of comparisons."""
    return Table(
        slug=slug,
        title=title,
        columns=("experiment", "difference (points)", "each seed", "n", "more accurate?", "test"),
        rows=tuple(
            (
                c.name,
                points_interval(c.difference),
                ", ".join(signed(100 * d) for d in c.by_seed),
                str(len(c.by_seed)),
                c.verdict,
                outcome(c) + (f" ({c.note})" if c.note else ""),
            )
            for c in comparisons
        ),
        note=note,
        data=tuple(
            {
                "experiment": c.name,
                "reference": c.reference,
                **ends("difference", c.difference),
                **{f"seed_{seed}": value for seed, value in zip(c.seeds, c.by_seed, strict=True)},
                "p_value": None if c.significance is None else c.significance.p_value,
                "p_holm": c.adjusted_p,
                "needed_n": None if c.significance is None else c.significance.minimum_n,
                "verdict": c.verdict,
                "note": c.note,
            }
            for c in comparisons
        ),
    )


def _by_seed(values: Sequence[float], seeds: Sequence[int]) -> str:
    return ", ".join(f"{seed}: {fixed(100 * value, 1)}" for seed, value in zip(seeds, values, strict=True))
