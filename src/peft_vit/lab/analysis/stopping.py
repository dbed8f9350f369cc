"""Comparisons that stop: what a study's declared looks say of each experiment against the control, from its records.

Nothing of a look is kept: differences are paired by seed in the declared order, up to the first seed that lacks one of
both runs, and `statistics.sequential.follow` says from these alone which looks there were and what follows. So a
study that was interrupted, continued or run in another order has the same verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from itertools import islice, takewhile
from typing import Literal

from peft_vit.base.statistics import Interval, Significance, Verdict
from peft_vit.base.statistics.estimates import BY_LOOKS, Estimate, decide, together
from peft_vit.base.statistics.sequential import Look, SequentialResult, SequentialTest, Stopped, StoppingRule, follow
from peft_vit.core.config import FEWEST_PAIRS, StoppingConfig, StudyConfig
from peft_vit.lab.analysis.comparison import accuracy_on_test, compare, references
from peft_vit.lab.analysis.studies import Run, Study

ENDS = {
    Stopped.DECIDED: "decided",
    Stopped.FUTILE: "stopped as futile",
    Stopped.MAXIMUM: "at the last look",
    None: "open",
}


def compare_all(study: Study, reference: str, names: Collection[str] | None = None) -> tuple[Estimate, ...]:
    """Compare every other experiment with a reference, as one family: of tests, or where declared, of looks.

    Args:
        study: with finished runs of the reference.
        reference: what others are compared with.
        names: which of them; of looks the family is what was declared all the same. None: all.
    """
    others = [e.name for e in study.experiments if e.name != reference and study.of(e.name)]
    others = [name for name in others if names is None or name in names]
    compared = [compare(study.of(name), study.of(reference), name, reference) for name in others]
    stopping = study.stopping
    if stopping is None or reference != stopping.control or stopping.metric != "accuracy":
        return decide(compared, study.untested)
    result_of = {result.name: result for result in sequential_results(study)}
    looked = []
    for estimate in compared:
        result = result_of[estimate.name]
        notes: tuple[str, ...] = (f"{len(estimate.by_seed)} pair(s), not looked at yet",)
        if result.looks:
            notes = (estimate.note, *answers(result, stopping))
        looked.append(replace(at_last_look(study, result, "superiority"), note=together(*notes)))
    return tuple(looked)


def compare_with_references(study: Study) -> tuple[Estimate, ...]:
    """Compare every experiment with each of the study's references: a family for each of them."""
    return tuple(estimate for reference in references(study) for estimate in compare_all(study, reference))


def at_last_look(study: Study, result: SequentialResult, asked: Literal["superiority", "noninferiority"]) -> Estimate:
    """Return a comparison with the control as it stands after its last look; without values before the first."""
    stopping = study.stopping
    assert stopping is not None
    verdict = getattr(result, asked) or Verdict.NOT_DECIDED
    estimate = Estimate(name=result.name, reference=stopping.control, n_of="pairs", verdict=verdict)
    if not result.looks:
        return estimate
    look = result.looks[-1]
    assert study.plan.declared is not None
    p_value = p_value_of(getattr(look, asked), verdict)
    return replace(
        estimate,
        by_seed=dict(islice(paired(study.plan.declared, study, result.name).items(), look.pairs)),
        interval=repeated_interval(look, stopping),
        significance=None if p_value is None else Significance(BY_LOOKS, look.pairs, p_value, FEWEST_PAIRS),
        adjusted_p=p_value,
    )


def repeated_interval(look: Look, stopping: StoppingConfig) -> Interval:
    """Return the interval of a look, which holds together with those of the others; without ends if it has none."""
    if not math.isfinite(look.high - look.low):
        return Interval(look.difference, None, None, look.pairs, 1 - 2 * stopping.level, "too few pairs, or no spread")
    return Interval(look.difference, look.low, look.high, look.pairs, 1 - 2 * stopping.level)


def p_value_of(test: SequentialTest | None, verdict: Verdict) -> float | None:
    """Return the p-value over all looks, of what was shown or, if nothing was, of the claim; None: it is not asked."""
    if test is None:
        return None
    return test.opposite_p_value if verdict == Verdict.REFUTED else test.p_value


def answers(result: SequentialResult, stopping: StoppingConfig) -> tuple[str, ...]:
    """Return what became of non-inferiority, and why a comparison has stopped, in words."""
    margin = []
    verdict = result.noninferiority
    if verdict is not None:
        p_value = p_value_of(result.looks[-1].noninferiority, verdict) or 0.0
        margin.append(f"not worse by {stopping.margin:g}: {verdict}, p = {p_value:.3g}")
    return (*margin, ENDS[result.stopped])


def sequential_results(study: Study) -> tuple[SequentialResult, ...]:
    """Return what became of each comparison of a study that declared when they stop; of another study none."""
    declared = study.plan.declared
    return () if declared is None else follow_study(declared, study)


def follow_study(configuration: StudyConfig, study: Study | None) -> tuple[SequentialResult, ...]:
    """Return what became of each comparison with the control, in the order of the experiments.

    Args:
        configuration: with a section `stopping`.
        study: the records; None: there are none yet.
    """
    stopping = configuration.stopping
    assert stopping is not None
    runs = () if study is None else study.runs
    correlation = 0.0  # without the first declared fold's runs there is no pair, so bounds do not move with other ones
    if configuration.data.folds is not None:  # folds differ by an image. Nadeau & Bengio, Machine Learning 52 (2003)
        sizes = [run.record.split_sizes for run in runs if run.seed == configuration.seeds[0]]
        correlation = sizes[0]["test"] / sizes[0]["train"] if sizes else 0.0
    rule = stopping_rule(stopping, len(configuration.seeds), correlation)
    names = [experiment.name for experiment in configuration.experiments if experiment.name != stopping.control]
    return follow({name: [*paired(configuration, study, name).values()] for name in names}, rule)


def stopping_rule(stopping: StoppingConfig, seeds: int, correlation: float = 0.0) -> StoppingRule:
    """Return what a section `stopping` declares of a study with so many seeds; see `StoppingRule.correlation`."""
    return StoppingRule(
        asked=stopping.asked,
        margin=1.0 if stopping.margin is None else stopping.margin / 100,  # not read where it is not asked for
        looks=stopping.looks_at(seeds),
        level=stopping.level,
        form=stopping.spending,
        correlation=correlation,
        futility=stopping.futility,
        images=stopping.images,
    )


def paired(configuration: StudyConfig, study: Study | None, name: str) -> dict[int, float]:
    """Return seed -> difference to the control, in the declared order, up to the first seed that lacks one of both."""
    stopping = configuration.stopping
    assert stopping is not None
    if study is None:
        return {}

    def value(run: Run) -> float:
        return accuracy_on_test(run) if stopping.metric == "accuracy" else run.test.balanced_accuracy

    by_seed = compare(study.of(name), study.of(stopping.control), name, stopping.control, value).by_seed
    return {seed: by_seed[seed] for seed in takewhile(by_seed.__contains__, configuration.seeds)}
