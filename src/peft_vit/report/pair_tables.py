"""Tables that set experiments against one another: all pairs, and Pareto fronts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peft_vit.analysis import AllPairs, Front, Pair
from peft_vit.analysis.pareto import FrontPoint
from peft_vit.report.document import Block, Paragraph, Raw, Row, Table
from peft_vit.report.formatting import (
    COSTS,
    count,
    fixed,
    joined,
    known,
    percent,
    percent_interval,
    points,
    points_interval,
    scaled,
)
from peft_vit.report.tables import OVER_SEEDS, comparison_values, measured, tested
from peft_vit.statistics import Interval

MATRIX_UP_TO = 12  # experiments; a wider one can't be read
DECIDED_UP_TO = 40  # rows; the CSV file has every pair

_PAIRS_NOTE = (
    "The exact Wilcoxon signed-rank test at 5 % decides, with Holm's correction over all {pairs} pairs; pairs of runs "
    "share seed, weights and images. Not decided does not mean equal."
)


def pair_blocks(pairs: AllPairs) -> Iterator[Block]:
    """Yield all pairs: a matrix of few experiments, the decided pairs of many, always with how many are decided."""
    if pairs.not_formed:
        yield Paragraph(
            f"{len(pairs.experiments)} experiments make {count(pairs.not_formed)} pairs, too many to compare all: "
            "none was formed. The differences to the references above stand."
        )
    elif len(pairs.experiments) > MATRIX_UP_TO:
        yield _decided_table(pairs, holds_data=True)
    elif len(pairs.experiments) > 2:  # one pair stands against the reference already
        yield _matrix(pairs)
        if pairs.decided:
            yield _decided_table(pairs, holds_data=False)


def _matrix(pairs: AllPairs) -> Table:
    found = {(p.comparison.name, p.comparison.reference): p.comparison for p in pairs.pairs}
    numbered = [(str(i), name) for i, name in enumerate(pairs.experiments, start=1)]

    def text(row: str, column: str) -> str:
        if row == column:
            return "–"
        comparison, sign = (found[row, column], 1) if (row, column) in found else (found[column, row], -1)
        if comparison.interval is None:
            return "no pair"
        marks = {"supported": ("", " ▲", " ▼"), "refuted": ("", " ▼", " ▲"), "not decided": ("", "", "")}
        return points(sign * comparison.interval.estimate) + marks[comparison.verdict][sign]

    return Table.of(
        "all_pairs",
        "All pairs: row minus column, points of test accuracy",
        ({"experiment": f"{n} {row}"} | {m: text(row, other) for m, other in numbered} for n, row in numbered),
        f"▲: the row is the more accurate one, ▼: the column is. {_count_sentence(pairs)} "
        f"{_PAIRS_NOTE.format(pairs=len(pairs.pairs))} Intervals, effect sizes and p-values are in the CSV file.",
        data=map(_pair_data, pairs.pairs),
    )


def _count_sentence(pairs: AllPairs) -> str:
    without = sum(pair.comparison.interval is None for pair in pairs.pairs)
    needed = {c.significance.minimum_n for c in (pair.comparison for pair in pairs.pairs) if c.significance is not None}
    seeds = f" A decision among so many needs at least {max(needed)} seeds." if needed else ""
    nothing = f" {count(without)} have no runs in common." if without else ""
    return f"{count(len(pairs.decided))} of {count(len(pairs.pairs))} pairs are decided.{nothing}{seeds}"


def _decided_table(pairs: AllPairs, *, holds_data: bool) -> Table:
    decided = [(pair, pair.comparison.interval) for pair in pairs.decided if pair.comparison.interval is not None]
    # Largest difference first: the rows that are left out are those that say least.
    decided.sort(key=lambda one: (-abs(one[1].estimate), one[0].comparison.name, one[0].comparison.reference))
    left = len(decided) - DECIDED_UP_TO
    more = f" {count(left)} more decided pairs are in the CSV file." if left > 0 else ""
    return Table.of(
        "all_pairs" if holds_data else "decided_pairs",
        "Decided pairs of experiments, largest difference first",
        (_decided_row(pair, difference) for pair, difference in decided[:DECIDED_UP_TO]),
        f"{_count_sentence(pairs)}{more} {_PAIRS_NOTE.format(pairs=count(len(pairs.pairs)))} {OVER_SEEDS} Effect "
        "size: the difference in units of its spread over seeds; a large one can be few points.",
        data=map(_pair_data, pairs.pairs if holds_data else [pair for pair, _ in decided]),
    )


def _decided_row(pair: Pair, difference: Interval) -> Row:
    """Return a row in which the more accurate experiment stands first."""
    comparison, effect = pair.comparison, pair.effect
    better, worse = comparison.name, comparison.reference
    agree = None if pair.improvement is None else pair.improvement.estimate
    if comparison.verdict == "refuted":
        better, worse, agree = worse, better, None if agree is None else 1 - agree
        difference = scaled(difference, -1)
    return {
        "more accurate": better,
        "less accurate": worse,
        "difference (points)": points_interval(difference),
        "n": len(comparison.by_seed),
        "effect size (Hedges' g)": known(None if effect is None or effect.g is None else abs(effect.g), fixed),
        "seeds that agree": known(agree, percent),
        "test": tested(comparison),
    }


def _pair_data(pair: Pair) -> dict[str, Raw]:
    comparison, effect = pair.comparison, pair.effect
    return {
        "experiment": comparison.name,
        "reference": comparison.reference,
        **measured("difference", comparison.interval),
        **comparison_values(comparison),
        "cohens_d": None if effect is None else effect.d,
        "cohens_d_low": None if effect is None else effect.low,
        "cohens_d_high": None if effect is None else effect.high,
        "hedges_g": None if effect is None else effect.g,
        **measured("improvement", pair.improvement),
    }


def front_blocks(fronts: Sequence[Front]) -> Iterator[Block]:
    """Yield who stands on each Pareto front, and what could not be put on one."""
    if any(front.points for front in fronts):
        yield _fronts_table(fronts)
    for front in fronts:
        words = COSTS[front.cost].what
        if front.refused:
            yield Paragraph(f"No Pareto front of {words}: {front.refused}.")
        elif front.left_out:
            yield Paragraph(f"Not on the Pareto front of {words}, as it was not recorded: {joined(front.left_out)}.")


def _fronts_table(fronts: Sequence[Front]) -> Table:
    return Table.of(
        "pareto_fronts",
        "Pareto fronts: who is most accurate for what it takes",
        (_front_row(front, point) for front in fronts for point in front.on_front),
        "Chosen by mean validation accuracy: no other experiment has at least as much of it and takes no more. "
        "Cheapest first. The lead is the paired difference in test accuracy to the row above, decided by the exact "
        "Wilcoxon signed-rank test at 5 % with Holm's correction over one front. "
        f"{OVER_SEEDS} The CSV file has every experiment, on a front or not.",
        data=(_front_data(front, point) for front in fronts for point in front.points),
        folded=True,
    )


def _front_row(front: Front, point: FrontPoint) -> Row:
    lead, cost = point.lead, COSTS[front.cost]
    return {
        "front of": cost.what,
        "experiment": point.experiment,
        "takes": cost.write(point.cost),
        "validation": percent(point.validation_accuracy),
        "test accuracy": percent_interval(point.test_accuracy),
        "lead over the one before (points)": known(lead, lambda c: points_interval(c.interval)),
        "more accurate?": "cheapest" if lead is None else lead.verdict,
        "test": known(lead, tested),
        "on the front of test accuracies": "yes" if point.on_test_front else "no",
    }


def _front_data(front: Front, point: FrontPoint) -> dict[str, Raw]:
    lead = point.lead
    return {
        "cost": front.cost,
        "experiment": point.experiment,
        "value": point.cost,
        "validation_accuracy": point.validation_accuracy,
        **measured("test_accuracy", point.test_accuracy),
        "on_front": int(point.on_front),
        "on_test_front": int(point.on_test_front),
        "before": None if lead is None else lead.reference,
        **measured("lead", None if lead is None else lead.interval),
        "p_holm": None if lead is None else lead.adjusted_p,
        "verdict": None if lead is None else lead.verdict,
    }
