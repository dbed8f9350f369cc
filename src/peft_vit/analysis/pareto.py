"""Which experiments nobody beats at their cost: Pareto fronts of accuracy against what a model takes.

Who stands on a front is read off validation accuracy, since to pick the best of many on test would be to choose on
test. What test then says stands beside: the accuracy there, whether the experiment would stand on the front of test
accuracies too, and whether its lead over the next cheaper one on the front is decided by the paired test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from peft_vit.analysis.comparison import Estimate, MethodResult, compare, decide
from peft_vit.analysis.studies import Study
from peft_vit.statistics import Interval

CostName = Literal["final_parameters", "stored_bytes", "seconds_per_step", "latency_s"]  # of a `MethodResult`
_TIMED: tuple[CostName, ...] = ("seconds_per_step", "latency_s")


@dataclass(frozen=True)
class FrontPoint:
    """One experiment, means over its seeds."""

    experiment: str
    cost: float  # in the unit of the front's cost
    validation_accuracy: float  # mean
    test_accuracy: Interval  # mean with interval
    on_front: bool  # whether no other has at least this validation accuracy at no more cost, and more of one of both
    on_test_front: bool  # the same of test accuracy; described, not used
    # test accuracy minus that of the one before it on the front; None off the front and for the cheapest
    lead: Estimate | None


@dataclass(frozen=True)
class Front:
    """Accuracy against one cost."""

    cost: CostName  # which
    # every experiment with a known cost, cheapest first, then by name; empty where costs can't be compared
    points: tuple[FrontPoint, ...]
    left_out: tuple[str, ...]  # experiments for which the cost was not recorded
    refused: str  # why costs can't be compared; empty if they can

    @property
    def on_front(self) -> tuple[FrontPoint, ...]:
        """Return who stands on it, cheapest first."""
        return tuple(point for point in self.points if point.on_front)


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> tuple[bool, ...]:
    """Return which of n pairs nothing dominates, from (n,) each; small costs and large values are better.

    A pair is dominated if another has no larger cost and no smaller value, and differs from it. So equal pairs stand or
    fall together. Source: Pareto (1906); the sweep by cost is Kung, Luccio & Preparata, Journal of the ACM 22 (1975).

    Raises:
        ValueError: for unequal lengths, or a number that is not one.
    """
    if len(costs) != len(values):
        raise ValueError(f"pairs need equal lengths, got {len(costs)} and {len(values)}")
    if any(math.isnan(number) for number in (*costs, *values)):
        raise ValueError("expected numbers, got NaN")
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -values[i]))
    on_front = [False] * len(costs)
    best: int | None = None  # the pair of largest value among those so far, of these the cheapest
    for i in order:
        equal = best is not None and (costs[i], values[i]) == (costs[best], values[best])
        if best is None or values[i] > values[best] or equal:
            on_front[i] = True
            best = i
    return tuple(on_front)


def fronts(study: Study, methods: Sequence[MethodResult]) -> tuple[Front, ...]:
    """Return one front for each cost that any experiment has recorded; `methods` are the study's `method_results`.

    Without validation images nothing says who stands on one, and there is none.
    """
    if any(m.validation_accuracy is None for m in methods):
        return ()
    made = []
    machines = {run.hardware for run in study.runs}
    for cost in get_args(CostName):
        known = [(value, m.experiment.name, m) for m in methods if (value := getattr(m, cost)) is not None]
        left_out = tuple(m.experiment.name for m in methods if getattr(m, cost) is None)
        if cost in _TIMED and len(machines) > 1 and known:
            refused = f"the runs come from {len(machines)} machines or numbers of threads, so seconds can't be compared"
            made.append(Front(cost, (), left_out, refused))
        elif known:
            made.append(Front(cost, _points(study, sorted(known, key=lambda point: point[:2])), left_out, ""))
    return tuple(made)


def _points(study: Study, ordered: Sequence[tuple[float, str, MethodResult]]) -> tuple[FrontPoint, ...]:
    """Return points of experiments with their costs, cheapest first."""
    costs = [cost for cost, _, _ in ordered]
    validated = [m.validation_accuracy.estimate for _, _, m in ordered if m.validation_accuracy is not None]
    on_front = pareto_front(costs, validated)
    on_test_front = pareto_front(costs, [m.test_accuracy.estimate for _, _, m in ordered])
    members = [name for (_, name, _), is_on in zip(ordered, on_front, strict=True) if is_on]
    steps = [compare(study.of(name), study.of(cheaper), name, cheaper) for cheaper, name in pairwise(members)]
    lead_of = {lead.name: lead for lead in decide(steps, study.untested)}
    return tuple(
        FrontPoint(name, cost, validation, m.test_accuracy, is_on, on_test, lead_of.get(name))
        for (cost, name, m), validation, is_on, on_test in zip(ordered, validated, on_front, on_test_front, strict=True)
    )
