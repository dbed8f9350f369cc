"""Tables of methods: what they reach and cost, whether they can be believed, and how they differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from peft_vit.base.statistics.reliability import BINS
from peft_vit.core.tasks import Scores
from peft_vit.deploy.page.document import Block, Paragraph, Raw, Table
from peft_vit.deploy.page.formatting import (
    better_above,
    better_question,
    count,
    fixed,
    joined,
    known,
    megabytes,
    number_interval,
    percent,
    percent_interval,
    points,
    points_interval,
    scaled,
    score_interval,
    score_of,
)
from peft_vit.deploy.page.tables import Column, csv_rows, interval_columns, only_in_file, own_interval_columns, table
from peft_vit.lab.analysis import AllPairs, Calibration, Estimate, Front, MethodResult, Pair
from peft_vit.lab.analysis.comparison import CostName
from peft_vit.lab.analysis.convergence import SETTLED_WITHIN_NATS, late_loss_deviation, roughness, settled_step
from peft_vit.lab.analysis.reliability import MEASURES, OVERCONFIDENCE, Measure
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

DECIDED_UP_TO = 40  # rows; the CSV file has every pair
_RUNS = Column("n", lambda m: len(m.runs))


def accuracy_table(methods: Sequence[MethodResult]) -> Table:
    """Return test accuracy by experiment, or of other tasks what decides, each seed visible."""
    scores = methods[0].runs[0].scores if methods else Scores()
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
                lambda of: joined(f"{seed}: {score_of(scores, own).removesuffix(' %')}" for seed, own in of.items()),
                lambda of: {f"seed_{seed}": score for seed, score in of.items()},
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
            Column("frozen", "frozen_bytes", megabytes),
            Column("adapter file", "adapter_file_bytes", megabytes),
            Column("s a step", "seconds_per_step", lambda s: fixed(s, 3)),
            Column("latency (ms)", "latency_s", lambda s: fixed(1000 * s, 1)),
            mean_of("memory of a run", "own_memory_bytes", lambda run: run.record.own_memory_bytes, megabytes),
            *only_in_file(n=lambda m: len(m.runs)),
        ],
        "Means over seeds. Trainable parameters include the head and are counted on the live model; "
        "'adapter alone' is the end without the head. Latency: a forward pass of one image. Memory of a run: what "
        "it added to its process's memory at most, the model included; – in older records. MB are 10⁶ bytes. "
        "Seconds and memory hold for the machine named under provenance.",
    )


def quality_table(methods: Sequence[MethodResult]) -> Table:
    """Return the other measures of right answers on test; how far they can be believed stands with calibration."""
    return table(
        "quality",
        "Other measures on test",
        methods,
        [
            EXPERIMENT,
            interval_of("balanced accuracy", "balanced_accuracy", lambda r: r.test.balanced_accuracy, percent_interval),
            interval_of("AUROC", "auroc", lambda run: run.test.auroc, to_thousandths),
            _RUNS,
        ],
        f"n counts seeds. AUROC for two classes only. {OVER_SEEDS}",
        folded=True,
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
            interval_of("near the end from step", "settled_step", settled_step, lambda of: number_interval(of, 0)),
            Column("of steps", lambda m: max(len(run.record.steps) for run in m.runs), data="steps"),
            Column("n", lambda m: len(m.runs), data="n"),
        ],
        "Late deviation: standard deviation of the training loss about its own line over the last third of the "
        "steps. Roughness: spread of a step's loss about the mean of its neighbours. Both hold the noise of "
        "minibatches. Near the end: first evaluation from which on the validation loss stays within "
        f"{SETTLED_WITHIN_NATS} nats of its last value. – : not measurable in these records. {OVER_SEEDS}",
        folded=True,
    )


_CALIBRATION: dict[Measure, str] = {
    "nll": "NLL (nats)",
    "ece": "ECE",
    "adaptive_ece": "adaptive ECE",
    "brier": "Brier score",
}


def calibration_blocks(methods: Sequence[MethodResult], calibrations: Sequence[Calibration]) -> Iterator[Block]:
    """Yield calibration by experiment, and what is not known of it."""
    if not calibrations:
        return
    without = {c.experiment.name: c.without for c in calibrations}
    yield table(
        "calibration",
        "Calibration on test",
        methods,
        [
            EXPERIMENT,
            *(interval_of(_CALIBRATION[name], name, of, to_thousandths) for name, of in MEASURES.items()),
            interval_of("overconfidence", "overconfidence", OVERCONFIDENCE, to_thousandths),
            _RUNS,
            *only_in_file(seeds_without_predictions=lambda m: " ".join(map(str, without[m.experiment.name]))),
        ],
        f"Smaller is better. ECE: gap between confidence and accuracy over {BINS} bins, equally wide or, adaptive, "
        "of equal counts; it is biased upwards where bins hold few images. Brier score: mean squared error of the "
        "probability of the predicted class; with two classes that is the usual one. Overconfidence: mean "
        f"confidence minus accuracy, best at 0. n counts seeds. {OVER_SEEDS}",
        folded=True,
    )
    lacking = [c.experiment.name for c in calibrations if not c.seeds] + [
        f"{c.experiment.name} ({len(c.without)} of {len(c.without) + len(c.seeds)})"
        for c in calibrations
        if c.seeds and c.without
    ]
    if lacking:
        yield Paragraph(f"Runs without recorded predictions, so without all but NLL and ECE: {joined(lacking)}.")


def comparison_table(comparisons: Sequence[Estimate], reference: str, scores: Scores | None = None) -> Table:
    """Return paired differences against one reference, in the unit of scores; None: of accuracy."""
    scores = scores or Scores()
    against = [c for c in comparisons if c.reference == reference]
    note = (
        f"Differences in test {scores.metric.words} between runs that share seed, weights and images; n counts pairs. "
    )
    note += better_above(scores) + FAMILY_NOTE
    return differences_table(
        f"against_{reference}", f"Differences to {reference}, paired by seed", against, note, scores
    )


def differences_table(
    slug: str, title: str, comparisons: Sequence[Estimate], note: str, scores: Scores | None = None
) -> Table:
    """Return one family of comparisons, in the unit of scores; None: of accuracy."""
    scores = scores or Scores()
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


def pair_blocks(pairs: AllPairs) -> Iterator[Block]:
    """Yield the pairs that are decided, and how many of all these are."""
    if pairs.not_formed:
        yield Paragraph(
            f"{len(pairs.experiments)} experiments make {count(pairs.not_formed)} pairs, too many to compare all, "
            "so none was formed. The differences to the references are above."
        )
    elif len(pairs.experiments) > 2:  # one pair stands against the reference already
        yield _pairs_table(pairs)


def _pairs_table(pairs: AllPairs) -> Table:
    def size(pair: Pair) -> float:
        assert pair.comparison.interval is not None
        return abs(pair.comparison.interval.estimate)

    # Largest difference first: the rows that are left out are those that say least.
    decided = sorted(pairs.decided, key=lambda pair: (-size(pair), pair.comparison.name, pair.comparison.reference))
    compared = [pair.comparison for pair in pairs.pairs]
    without = sum(c.interval is None for c in compared)
    needed = max((c.significance.minimum_n for c in compared if c.significance is not None), default=0)
    notes = [
        f"{count(len(decided))} of {count(len(compared))} pairs are decided.",
        f"{count(without)} have no runs in common." if without else "",
        f"A decision among so many needs at least {needed} seeds." if needed else "",
        f"{count(len(decided) - DECIDED_UP_TO)} more decided pairs are in the CSV file."
        if len(decided) > DECIDED_UP_TO
        else "",
        "The exact Wilcoxon signed-rank test at 5 % decides, with Holm's correction over all "
        f"{count(len(compared))} pairs; pairs of runs share seed, weights and images. Not decided does not mean equal. "
        f"{OVER_SEEDS} Effect size: the difference in units of its spread over seeds; a large one can be few points. "
        "The CSV file has every pair.",
    ]
    return table(
        "all_pairs",
        "Decided pairs of experiments, largest difference first",
        map(_decided_row, decided[:DECIDED_UP_TO]),
        None,
        " ".join(filter(None, notes)),
        data=map(_pair_data, pairs.pairs),
    )


def _decided_row(pair: Pair) -> dict[str, str]:
    """Return a row in which the more accurate experiment stands first."""
    comparison, effect, difference = pair.comparison, pair.effect, pair.comparison.interval
    assert difference is not None
    names = [comparison.name, comparison.reference]
    agree = None if pair.improvement is None else pair.improvement.estimate
    if comparison.verdict == "refuted":
        names.reverse()
        agree = None if agree is None else 1 - agree
        difference = scaled(difference, -1)
    return {
        "more accurate": names[0],
        "less accurate": names[1],
        "difference (points)": points_interval(difference),
        "n": str(len(comparison.by_seed)),
        "effect size (Hedges' g)": known(None if effect is None or effect.g is None else abs(effect.g), fixed),
        "seeds that agree": known(agree, percent),
        "test": tested(comparison),
    }


def _pair_data(pair: Pair) -> dict[str, Raw]:
    comparison, effect = pair.comparison, pair.effect
    return {
        "experiment": comparison.name,
        "reference": comparison.reference,
        **own_interval_columns("difference", comparison.interval),
        **comparison_values(comparison),
        "cohens_d": None if effect is None else effect.d,
        "cohens_d_low": None if effect is None else effect.low,
        "cohens_d_high": None if effect is None else effect.high,
        "hedges_g": None if effect is None else effect.g,
        **own_interval_columns("improvement", pair.improvement),
    }


_FRONT = [
    Column("front of", "front", lambda name: COSTS[name].what, "cost"),
    Column("experiment", "experiment"),
    Column("takes", lambda row: COSTS[row["front"]].write(row["cost"])),
    *only_in_file(value="cost"),
    Column("validation", "validation_accuracy", percent),
    Column("test accuracy", "test_accuracy", percent_interval, partial(own_interval_columns, "test_accuracy")),
    *only_in_file(
        on_front=lambda row: int(row["on_front"]),
        on_test_front=lambda row: int(row["on_test_front"]),
        before="lead.reference",
    ),
    Column("lead over the one before (points)", "lead", lambda c: points_interval(c.interval), ""),
    Column("", "lead.interval", data=partial(own_interval_columns, "lead")),
    *only_in_file(p_holm="lead.adjusted_p"),
    Column("more accurate?", "lead.verdict", data="verdict", none="cheapest"),
    Column("test", "lead", tested, ""),
    Column("on the front of test accuracies", "on_test_front", lambda is_on: "yes" if is_on else "no", ""),
]


def front_blocks(fronts: Sequence[Front]) -> Iterator[Block]:
    """Yield what is on each Pareto front, and what could not be put on one."""
    rows = [{"front": front.cost, **vars(point)} for front in fronts for point in front.points]
    if rows:
        yield table(
            "pareto_fronts",
            "Pareto fronts: the most accurate at each cost",
            [row for row in rows if row["on_front"]],
            _FRONT,
            "Chosen by mean validation accuracy: no other experiment has at least as much of it and takes no more. "
            "Cheapest first. The lead is the paired difference in test accuracy to the row above, decided by the exact "
            "Wilcoxon signed-rank test at 5 % with Holm's correction over one front. "
            f"{OVER_SEEDS} The CSV file has every experiment, on a front or not.",
            data=csv_rows(rows, _FRONT),
            folded=True,
        )
    for front in fronts:
        words = COSTS[front.cost].what
        if front.refused:
            yield Paragraph(f"No Pareto front of {words}: {front.refused}.")
        elif front.left_out:
            yield Paragraph(f"Not on the Pareto front of {words}, as it was not recorded: {joined(front.left_out)}.")


class CostWords(NamedTuple):
    """How a cost is written: in a table, and in the text of a value."""

    what: str
    write: Callable[[float], str]
    unit: str = ""  # what a value alone does not say
    scale: float = 1.0  # of an axis


COSTS: dict[CostName, CostWords] = {
    "final_parameters": CostWords("trainable parameters", count, " trainable parameters"),
    "stored_bytes": CostWords("bytes to store", megabytes, " to store", 1e-6),
    "seconds_per_step": CostWords("seconds a step", lambda s: f"{fixed(s, 3)} s"),
    "latency_s": CostWords("latency of one image", lambda s: f"{fixed(1000 * s, 1)} ms"),
}
