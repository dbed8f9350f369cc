"""Tables that set experiments against one another: all pairs, and Pareto fronts."""

from __future__ import annotations

from collections.abc import Sequence

from peft_vit.analysis import AllPairs, Comparison, Front, Pair
from peft_vit.analysis.pareto import CostName, FrontPoint
from peft_vit.report.document import Block, Paragraph, Raw, Row, Table
from peft_vit.report.formatting import (
    count,
    fixed,
    joined,
    megabytes,
    percent,
    percent_interval,
    points_interval,
    signed,
)
from peft_vit.report.tables import OVER_SEEDS, comparison_values, measured, tested

MATRIX_UP_TO = 12  # experiments; a wider one can't be read
DECIDED_UP_TO = 40  # rows; the CSV file has every pair

_PAIRS_NOTE = (
    "The exact Wilcoxon signed-rank test at 5 % decides, with Holm's correction over all {pairs} pairs; pairs of runs "
    "share seed, weights and images. Not decided does not mean equal."
)


def pair_blocks(pairs: AllPairs) -> tuple[Block, ...]:
    """Return all pairs: a matrix of few experiments, the decided pairs of many, always with how many are decided."""
    if pairs.not_formed:
        return (
            Paragraph(
                f"{len(pairs.experiments)} experiments make {count(pairs.not_formed)} pairs, too many to compare all: "
                "none was formed. The differences to the references above stand."
            ),
        )
    if len(pairs.experiments) <= 2:
        return ()  # one pair: it stands against the reference already
    small = len(pairs.experiments) <= MATRIX_UP_TO
    decided = _decided_table(pairs, holds_data=not small) if pairs.decided or not small else None
    return (*([_matrix(pairs)] if small else []), *([decided] if decided else []))


def _matrix(pairs: AllPairs) -> Table:
    by_names = {(p.comparison.name, p.comparison.reference): p.comparison for p in pairs.pairs}
    numbered = [(str(i), name) for i, name in enumerate(pairs.experiments, start=1)]

    def cell(row: str, column: str) -> str:
        if row == column:
            return "–"
        forward, backward = by_names.get((row, column)), by_names.get((column, row))
        return _cell(forward, 1) if forward is not None else _cell(backward, -1)

    return Table.of(
        "all_pairs",
        "All pairs: row minus column, points of test accuracy",
        ({"experiment": f"{n} {row}"} | {m: cell(row, other) for m, other in numbered} for n, row in numbered),
        f"▲: the row is the more accurate one, ▼: the column is. {_count_sentence(pairs)} "
        f"{_PAIRS_NOTE.format(pairs=len(pairs.pairs))} Intervals, effect sizes and p-values are in the CSV file.",
        data=map(_pair_data, pairs.pairs),
    )


def _cell(comparison: Comparison | None, sign: int) -> str:
    if comparison is None or comparison.difference is None:
        return "no pair"
    mark = {"supported": " ▲", "refuted": " ▼", "not decided": ""}[comparison.verdict]
    if sign < 0:
        mark = mark.translate(str.maketrans("▲▼", "▼▲"))
    return f"{signed(sign * 100 * comparison.difference.estimate)}{mark}"


def _count_sentence(pairs: AllPairs) -> str:
    without = sum(pair.comparison.difference is None for pair in pairs.pairs)
    needed = {c.significance.minimum_n for c in pairs.comparisons if c.significance is not None}
    seeds = f" A decision among so many needs at least {max(needed)} seeds." if needed else ""
    nothing = f" {count(without)} have no runs in common." if without else ""
    return f"{count(len(pairs.decided))} of {count(len(pairs.pairs))} pairs are decided.{nothing}{seeds}"


def _decided_table(pairs: AllPairs, *, holds_data: bool) -> Table:
    # Largest difference first: the rows that are left out are those that say least.
    ordered = sorted(pairs.decided, key=lambda p: (-_size(p), p.comparison.name, p.comparison.reference))
    shown = ordered[:DECIDED_UP_TO]
    left = len(ordered) - len(shown)
    more = f" {count(left)} more decided pairs are in the CSV file." if left else ""
    return Table.of(
        "all_pairs" if holds_data else "decided_pairs",
        "Decided pairs of experiments, largest difference first",
        map(_decided_row, shown),
        f"{_count_sentence(pairs)}{more} {_PAIRS_NOTE.format(pairs=count(len(pairs.pairs)))} {OVER_SEEDS} Effect "
        "size: the difference in units of its spread over seeds; a large one can be few points.",
        data=map(_pair_data, pairs.pairs if holds_data else ordered),
    )


def _size(pair: Pair) -> float:
    return abs(pair.comparison.difference.estimate) if pair.comparison.difference is not None else 0.0


def _decided_row(pair: Pair) -> Row:
    comparison, effect, improvement = pair.comparison, pair.effect, pair.improvement
    forward = comparison.verdict == "supported"
    better, worse = (comparison.name, comparison.reference)[:: 1 if forward else -1]
    interval = comparison.difference
    if interval is not None and not forward and interval.low is not None and interval.high is not None:
        text = f"{signed(-100 * interval.estimate)} [{signed(-100 * interval.high)}, {signed(-100 * interval.low)}]"
    else:
        text = points_interval(interval)
    share = None if improvement is None else improvement.estimate if forward else 1 - improvement.estimate
    return {
        "more accurate": better,
        "less accurate": worse,
        "difference (points)": text,
        "n": str(len(comparison.by_seed)),
        "effect size (Hedges' g)": "–" if effect is None or effect.g is None else fixed(abs(effect.g)),
        "seeds that agree": "–" if share is None else percent(share),
        "test": tested(comparison),
    }


def _pair_data(pair: Pair) -> dict[str, Raw]:
    comparison, effect = pair.comparison, pair.effect
    return {
        "experiment": comparison.name,
        "reference": comparison.reference,
        **measured("difference", comparison.difference),
        **comparison_values(comparison),
        "cohens_d": None if effect is None else effect.d,
        "cohens_d_low": None if effect is None else effect.low,
        "cohens_d_high": None if effect is None else effect.high,
        "hedges_g": None if effect is None else effect.g,
        **measured("improvement", pair.improvement),
    }


_COST_WORDS: dict[CostName, str] = {
    "final_parameters": "trainable parameters",
    "stored_bytes": "bytes to store",
    "seconds_per_step": "seconds a step",
    "latency_s": "latency of one image",
}


def front_blocks(fronts: Sequence[Front]) -> tuple[Block, ...]:
    """Return who stands on each Pareto front, and what could not be put on one."""
    if not fronts:
        return ()
    said = []
    for front in fronts:
        words = _COST_WORDS[front.cost]
        if front.refused:
            said.append(Paragraph(f"No Pareto front of {words}: {front.refused}."))
        elif front.left_out:
            said.append(
                Paragraph(f"Not on the Pareto front of {words}, as it was not recorded: {joined(front.left_out)}.")
            )
    return (_fronts_table(fronts), *said) if any(front.points for front in fronts) else tuple(said)


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
    )


def _front_row(front: Front, point: FrontPoint) -> Row:
    lead = point.lead
    return {
        "front of": _COST_WORDS[front.cost],
        "experiment": point.experiment,
        "takes": _cost(front.cost, point.cost),
        "validation": percent(point.validation_accuracy),
        "test accuracy": percent_interval(point.test_accuracy),
        "lead over the one before (points)": "–" if lead is None else points_interval(lead.difference),
        "more accurate?": "cheapest" if lead is None else lead.verdict,
        "test": "–" if lead is None else tested(lead),
        "on the front of test accuracies": "yes" if point.on_test_front else "no",
    }


def _cost(name: CostName, value: float) -> str:
    if name == "final_parameters":
        return count(value)
    if name == "stored_bytes":
        return megabytes(value)
    return f"{fixed(1000 * value, 1)} ms" if name == "latency_s" else f"{fixed(value, 3)} s"


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
        **measured("lead", None if lead is None else lead.difference),
        "p_holm": None if lead is None else lead.adjusted_p,
        "verdict": None if lead is None else lead.verdict,
    }
