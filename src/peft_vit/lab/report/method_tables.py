"""Tables of methods: what they reach and cost, and how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from peft_vit.core.tasks import Scores
from peft_vit.deploy.page.document import Column, Table, interval_columns, only_in_file, table
from peft_vit.deploy.page.formatting import (
    better_above,
    better_question,
    count,
    fixed,
    joined,
    megabytes,
    number_interval,
    points,
    points_interval,
    score_interval,
    score_of,
)
from peft_vit.lab.analysis import Allocation, Estimate, MethodResult
from peft_vit.lab.analysis.comparison import SAME_SIZE
from peft_vit.lab.analysis.convergence import SETTLED_WITHIN_NATS, late_loss_deviation, roughness, settled_step
from peft_vit.lab.report.columns import (
    EXPERIMENT,
    FAMILY_NOTE,
    OVER_SEEDS,
    comparison_values,
    interval_of,
    mean_of,
    tested,
    to_thousandths,
)

ACCURACY = Scores()
_RUNS = Column("n", lambda m: len(m.runs))


def accuracy_table(methods: Sequence[MethodResult]) -> Table:
    """Return test accuracy by experiment, or of other tasks what decides, each seed visible."""
    scores = methods[0].runs[0].scores
    may_pass = " and may pass 100 %" if scores.metric.is_share else ""
    words, of_classes = scores.metric.words, scores.metric.counts_images
    validated = all(m.validation_accuracy is not None for m in methods)
    chose = "Validation chose the epoch" if validated else "Without validation images the last step's model was used"
    return table(
        "accuracy",
        f"Test {words} by method",
        methods,
        [
            EXPERIMENT,
            *only_in_file(method="experiment.method"),
            Column(
                f"test {words}",
                "test_accuracy",
                partial(score_interval, scores),
                partial(interval_columns, "test_accuracy" if of_classes else "test_score"),
            ),
            _RUNS,
            Column(
                "each seed (%)" if scores.metric.is_share else "each seed",
                "by_seed",
                lambda by_seed: joined(
                    f"{seed}: {score_of(scores, score).removesuffix(' %')}" for seed, score in by_seed.items()
                ),
                lambda by_seed: {f"seed_{seed}": score for seed, score in by_seed.items()},
            ),
            Column("validation", "validation_accuracy.estimate", partial(score_of, scores), "validation_accuracy"),
            *([Column("above majority (points)", "above_majority.estimate", points, "above_majority")] * of_classes),
        ],
        f"n counts seeds. {OVER_SEEDS} With two seeds they are wide{may_pass}. {chose}; test was read once.",
    )


def cost_table(methods: Sequence[MethodResult]) -> Table:
    """Return what each experiment costs."""
    return table(
        "cost",
        "Cost by method",
        methods,
        [
            EXPERIMENT,
            Column("trainable at end", "final_parameters", count),
            mean_of("largest", "peak_parameters", lambda run: run.parameters.peak, count),
            mean_of(
                "adapter alone", "adapter_parameters", lambda run: run.parameters.final - run.parameters.head, count
            ),
            mean_of("frozen", "frozen_bytes", lambda run: run.bytes.frozen_bytes, megabytes),
            mean_of("adapter file", "adapter_file_bytes", lambda run: run.bytes.adapter_file_bytes, megabytes),
            Column("s a step", "seconds_per_step", lambda s: fixed(s, 3)),
            mean_of("latency (ms)", "latency_s", lambda run: run.record.latency_s.get(1), lambda s: fixed(1000 * s, 1)),
            mean_of("memory of a run", "own_memory_bytes", lambda run: run.record.own_memory_bytes, megabytes),
            *only_in_file(n=lambda m: len(m.runs)),
        ],
        "Means over seeds. Trainable parameters include the head and are counted on the live model; "
        "'adapter alone' is the end without the head. Latency: a forward pass of one image. Memory of a run: what "
        "it added to its process's memory at most, the model included; – in older records. MB are 10⁶ bytes. "
        "Seconds and memory hold for the machine named under provenance.",
    )


def convergence_table(methods: Sequence[MethodResult]) -> Table:
    """Return how steadily each experiment's loss came down."""
    return table(
        "convergence",
        "How steadily the loss came down",
        methods,
        [
            EXPERIMENT,
            interval_of("late deviation (nats)", "late_deviation", late_loss_deviation, to_thousandths),
            interval_of("roughness (nats)", "roughness", roughness, to_thousandths),
            interval_of("near the end from step", "settled_step", settled_step, partial(number_interval, decimals=0)),
            Column("of steps", lambda m: max(len(run.record.steps) for run in m.runs), data="steps"),
            Column("n", lambda m: len(m.runs), data="n"),
        ],
        "Late deviation: standard deviation of the training loss about its own line over the last third of the "
        "steps. Roughness: spread of a step's loss about the mean of its neighbours. Both hold the noise of "
        "minibatches. Near the end: first evaluation from which on the validation loss stays within "
        f"{SETTLED_WITHIN_NATS} nats of its last value. – : not measurable in these records. {OVER_SEEDS}",
        folded=True,
    )


def comparison_table(comparisons: Sequence[Estimate], reference: str, scores: Scores) -> Table:
    """Return paired differences against one reference, in the unit of scores."""
    return differences_table(
        f"against_{reference}",
        f"Differences to {reference}, paired by seed",
        [c for c in comparisons if c.reference == reference],
        f"Differences in test {scores.metric.words} between runs that share seed, weights and images; n counts pairs. "
        f"{better_above(scores)}{FAMILY_NOTE}",
        scores,
    )


def differences_table(slug: str, title: str, comparisons: Sequence[Estimate], note: str, scores: Scores) -> Table:
    """Return one family of comparisons, in the unit of scores."""
    return table(
        slug,
        title,
        comparisons,
        [
            Column("experiment", "name", data="experiment"),
            Column("", "reference"),
            Column(
                f"difference ({scores.unit})",
                "interval",
                points_interval,
                partial(interval_columns, "difference"),
                none=points_interval(None),
            ),
            Column(
                "each seed",
                "by_seed",
                lambda by_seed: joined(map(points, by_seed.values())),
                lambda by_seed: {f"seed_{seed}": difference for seed, difference in by_seed.items()},
            ),
            Column("n", lambda c: len(c.by_seed)),
            Column(better_question(scores), "verdict", data=""),
            Column("test", lambda c: c, tested, comparison_values),
        ],
        note,
    )


def against_fixed_table(allocations: Sequence[Allocation]) -> Table:
    """Return whether adaptive ranks paid."""
    return differences_table(
        "allocation_against_fixed",
        "Adaptive against fixed ranks at equal trainable parameters",
        [a.against_fixed for a in allocations],
        "Test accuracy minus that of fixed-rank LoRA, read off the line through the same seed's LoRA "
        "runs at the same number of trainable parameters (linear in its logarithm, no extrapolation; "
        f"within {100 * SAME_SIZE:.0f} % is equal). {FAMILY_NOTE}",
        ACCURACY,
    )
