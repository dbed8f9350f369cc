"""Learning rates by successive halving (arXiv 1502.07943), with Optuna's grid and pruner, and equal effort a kind.

Every rate of a kind has a run of half the steps on the first fold; the pruner says which go on, and two of them have a
run of all steps on the second fold. The best mean wins, on the folds' validation and test images; where the accuracy is
equal, which few images make likely, the lower NLL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_vit.errors import UserError
from peft_vit.forecasting.time_limit import Limit
from peft_vit.tuning.candidates import Design, Kind, of_kind, training_of
from peft_vit.tuning.context import TuningContext
from peft_vit.tuning.result import RateResult
from peft_vit.tuning.running import Outcome, Outcomes

RATES = (3e-4, 1e-3, 3e-3)
WHOLE_RUNS = 2  # of a kind, at the rates that go on
_NLL_WEIGHT = 1e-3  # below the share of one image


@dataclass(frozen=True)
class BestRate:
    """What became of a kind.

    Attributes:
        learning_rate: the best.
        score: validation score of its whole run, or of its half one if time ended before.
        nll: likewise.
    """

    learning_rate: float
    score: float
    nll: float


def find_rates(
    context: TuningContext,
    model: str,
    image_size: int,
    designed: Callable[[int], list[Design]],
    kinds: Sequence[Kind],
    steps: int,
    validate_every: int,
    memory: Mapping[str, Any],
    limit: Limit,
) -> tuple[dict[Kind, BestRate], tuple[RateResult, ...]]:
    """Return the best rate of each kind that could be trained, and all that was tried.

    Args:
        context: of the tuning.
        model: of the backbone.
        image_size: in pixels.
        designed: everything that could be trained, in so many steps.
        kinds: whose rates are looked for.
        steps: of a whole run.
        validate_every: steps.
        memory: settings that keep within a limit of memory.
        limit: when what runs is stopped.

    Raises:
        UserError: if the time ends before float LoRA or anything else has a whole run.
    """

    def done(asked: Mapping[Kind, Sequence[float]], seed: int, some: int) -> Outcomes:
        experiments = []
        for kind, rates in asked.items():
            for rate in rates:
                training = training_of(
                    kind,
                    learning_rate=rate,
                    steps=some,
                    validate_every=validate_every,
                    batch_size=context.batch_size,
                    metric=context.metric,
                    flips=context.flips,
                    memory=memory,
                )
                experiments.append(of_kind(designed(some), kind).experiment(training, _name(kind, rate, some)))
        if not experiments:
            return {}
        return context.runner(context.study("rates", model, image_size, [seed], experiments), limit)

    half = max(1, steps // 2)
    first = done(dict.fromkeys(kinds, RATES), 0, half)
    halvings = {kind: SuccessiveHalving(kind, context.request.seed, half) for kind in kinds}
    for kind, halving in halvings.items():
        for rate in halving.rates:
            halving.hear(rate, first.get((_name(kind, rate, half), 0)))
    goes_on = {kind: halving.goes_on() for kind, halving in halvings.items() if halving.heard}
    second = done(goes_on, 1, steps)
    found: dict[Kind, BestRate] = {}
    told: list[RateResult] = []
    for kind, halving in halvings.items():
        whole = {rate: second.get((_name(kind, rate, steps), 1)) for rate in goes_on.get(kind, ())}
        best = halving.best({rate: one for rate, one in whole.items() if one is not None})
        if best is not None:
            found[kind] = best
        for rate in RATES:
            outcomes = [one for one in (halving.heard.get(rate), whole.get(rate)) if one is not None]
            scores = tuple(one.validation or 0.0 for one in outcomes)
            chosen = best is not None and best.learning_rate == rate
            told.append(RateResult(kind, rate, scores, (half, half + steps)[len(scores) - 1] if scores else 0, chosen))
    if not found:
        raise UserError(
            "ended before any learning rate was found; give more, and the same command goes on", field="--minutes"
        )
    return found, tuple(told)


def _name(kind: str, rate: float, steps: int) -> str:
    return f"{kind}_{rate:g}_{steps}".replace(".", "-").replace("+", "")


class SuccessiveHalving:
    """The rates of a kind: Optuna asks for them and says which go on."""

    def __init__(self, kind: Kind, seed: int, half: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._half = half
        self._study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.GridSampler({"learning_rate": list(RATES)}, seed=seed),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=half, reduction_factor=2),
            study_name=kind,
        )
        self._trials = [self._study.ask() for _ in RATES]
        self.rates = [trial.suggest_float("learning_rate", min(RATES), max(RATES), log=True) for trial in self._trials]
        self.heard: dict[float, Outcome] = {}

    def hear(self, rate: float, outcome: Outcome | None) -> None:
        """Report a run of half the steps; None: it failed, or there was no time for it."""
        if outcome is not None:
            self.heard[rate] = outcome
            self._trials[self.rates.index(rate)].report(_value(outcome), self._half)

    def goes_on(self) -> list[float]:
        """Return the rates that get a whole run, the best first; as many for each kind."""
        kept = [rate for rate in self.heard if not self._trials[self.rates.index(rate)].should_prune()]
        others = [rate for rate in self.heard if rate not in kept]
        best_first = [*sorted(kept, key=self._at, reverse=True), *sorted(others, key=self._at, reverse=True)]
        return best_first[:WHOLE_RUNS]

    def best(self, whole: Mapping[float, Outcome]) -> BestRate | None:
        """Return the rate with the best mean of its half and its whole run; without whole ones, of the halves."""
        last = whole or self.heard
        if not last:
            return None
        rate = max(last, key=lambda one: _value(last[one]) + self._at(one))
        return BestRate(rate, last[rate].validation or 0.0, last[rate].nll or 0.0)

    def _at(self, rate: float) -> float:
        return _value(self.heard[rate])


def _value(outcome: Outcome) -> float:
    """Return what rates are ranked by: the fold's validation and test images, half each.

    Validation has chosen the step, so its score is that of the luckiest one; the fold's test images have chosen
    nothing. They are not the sealed ones, and the race has other folds.
    """
    return (outcome.validation or 0.0) / 2 + outcome.test / 2 - _NLL_WEIGHT * (outcome.nll or 0.0)
