"""Comparisons that stop: what a study's declared looks say of each experiment against the control, from its records.

Nothing of a look is kept: differences are paired by seed in the declared order, up to the first seed that lacks one of
both runs, and `statistics.sequential.follow` tells from these alone which looks there were and what follows. So a
study that was interrupted, continued or run in another order has the same verdicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from peft_vit.analysis.comparison import accuracy_on_test, compare
from peft_vit.analysis.studies import Run, Study
from peft_vit.config import StoppingConfig, StudyConfig
from peft_vit.statistics.sequential import Course, StoppingRule, follow


def courses(configuration: StudyConfig, study: Study | None) -> tuple[Course, ...]:
    """Return the course of each comparison with the control, in the order of the experiments.

    Args:
        configuration: with a section `stopping`.
        study: the records; None: there are none yet.
    """
    stopping = configuration.stopping
    assert stopping is not None
    runs = () if study is None else study.runs
    rule = _rule(stopping, len(configuration.seeds), _correlation(configuration, runs))
    names = [one.name for one in configuration.experiments if one.name != stopping.control]
    return follow({name: _differences(configuration, stopping, study, name) for name in names}, rule)


def _rule(stopping: StoppingConfig, seeds: int, correlation: float) -> StoppingRule:
    return StoppingRule(
        asked=stopping.asked,
        margin=1.0 if stopping.margin is None else stopping.margin / 100,  # not read where it is not asked for
        looks=stopping.looks_at(seeds),
        level=stopping.level,
        form=stopping.spending,
        correlation=correlation,
        futility=stopping.futility,
    )


def _correlation(configuration: StudyConfig, runs: Sequence[Run]) -> float:
    """Return test images over training images, at most, where seeds test on folds; else 0.

    Source: Nadeau & Bengio, Machine Learning 52 (2003).
    """
    if configuration.data.folds is None:
        return 0.0
    sizes = [run.record.split_sizes for run in runs]
    return max((size["test"] / size["train"] for size in sizes), default=0.0)


def _differences(configuration: StudyConfig, stopping: StoppingConfig, study: Study | None, name: str) -> list[float]:
    if study is None:
        return []
    value = accuracy_on_test if stopping.metric == "accuracy" else _balanced_accuracy
    found = compare(study.of(name), study.of(stopping.control), name, stopping.control, value)
    by_seed = dict(zip(found.seeds, found.by_seed, strict=True))
    return [by_seed[seed] for seed in takewhile(by_seed.__contains__, configuration.seeds)]


def _balanced_accuracy(run: Run) -> float:
    return run.test.balanced_accuracy
