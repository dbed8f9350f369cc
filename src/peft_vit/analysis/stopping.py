"""Comparisons that stop: what a study's declared looks say of each experiment against the control, from its records.

Nothing of a look is kept: differences are paired by seed in the declared order, up to the first seed that lacks one of
both runs, and `statistics.sequential.follow` tells from these alone which looks there were and what follows. So a
study that was interrupted, continued or run in another order has the same verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice, takewhile

from peft_vit.analysis.comparison import BY_LOOKS, Comparison, accuracy_on_test, compare, correct, references
from peft_vit.analysis.studies import Run, Study
from peft_vit.config import FEWEST_PAIRS, StoppingConfig, StudyConfig
from peft_vit.statistics import Interval, Significance
from peft_vit.statistics.sequential import Course, Look, SequentialTest, StoppingRule, follow


def compare_all(study: Study, reference: str, names: Collection[str] | None = None) -> tuple[Comparison, ...]:
    """Compare every other experiment with a reference, as one family: of tests, or where declared, of looks.

    Args:
        study: with finished runs of the reference.
        reference: what others are compared with.
        names: which of them; of looks the family is what was declared all the same. None: all.
    """
    others = [e.name for e in study.experiments if e.name != reference and study.of(e.name)]
    others = [name for name in others if names is None or name in names]
    found = [compare(study.of(name), study.of(reference), name, reference) for name in others]
    stopping = study.stopping
    if stopping is None or reference != stopping.control or stopping.metric != "accuracy":
        return correct(found, study.untested)
    course_of = {course.name: course for course in study_courses(study)}
    return tuple(_by_looks(one, course_of[one.name], stopping, pairs_seen(study, course_of[one.name])) for one in found)


def compare_with_references(study: Study) -> tuple[Comparison, ...]:
    """Compare every experiment with each of the study's references: a family for each of them."""
    return tuple(found for reference in references(study) for found in compare_all(study, reference))


def _by_looks(fixed: Comparison, course: Course, stopping: StoppingConfig, by_seed: Mapping[int, float]) -> Comparison:
    """Return a comparison, of all pairs that there are, as it stands after its last look."""
    if not course.looks:
        note = f"{len(fixed.by_seed)} pair(s), not looked at yet"
        return replace(fixed, difference=None, by_seed=(), seeds=(), significance=None, note=note)
    look = course.looks[-1]
    verdict = course.superiority or "not decided"
    p_value = p_value_of(look.superiority, verdict)
    return replace(
        fixed,
        difference=repeated_interval(look, stopping),
        by_seed=tuple(by_seed.values()),
        seeds=tuple(by_seed),
        significance=None if p_value is None else Significance(BY_LOOKS, look.pairs, p_value, FEWEST_PAIRS),
        adjusted_p=p_value,
        verdict=verdict,
        note="; ".join(filter(None, (fixed.note, *answers(course, stopping)))),
    )


def repeated_interval(look: Look, stopping: StoppingConfig) -> Interval:
    """Return the interval of a look, which holds together with those of the others; without ends if it has none."""
    if not math.isfinite(look.high - look.low):
        return Interval(look.difference, None, None, look.pairs, 1 - 2 * stopping.level, "too few pairs, or no spread")
    return Interval(look.difference, look.low, look.high, look.pairs, 1 - 2 * stopping.level)


def p_value_of(test: SequentialTest | None, verdict: str) -> float | None:
    """Return the p-value over all looks, of what was shown or, if nothing was, of the claim; None: it is not asked."""
    if test is None:
        return None
    return test.opposite_p_value if verdict == "refuted" else test.p_value


def answers(course: Course, stopping: StoppingConfig) -> tuple[str, ...]:
    """Return what became of non-inferiority, and why a comparison has stopped, in words."""
    said = []
    look, verdict = course.looks[-1], course.noninferiority
    if verdict is not None:
        p_value = p_value_of(look.noninferiority, verdict) or 0.0
        said.append(f"not worse by {stopping.margin:g}: {verdict}, p = {p_value:.3g}")
    said.append(ENDS[course.stopped])
    return tuple(said)


ENDS = {"decided": "decided", "futile": "stopped as futile", "maximum": "at the last look", None: "open"}


def pairs_seen(study: Study, course: Course) -> dict[int, float]:
    """Return seed -> difference of the pairs that the last look of a comparison was at."""
    assert study.plan.declared is not None
    seen = course.looks[-1].pairs if course.looks else 0
    return dict(islice(paired(study.plan.declared, study, course.name).items(), seen))


def study_courses(study: Study) -> tuple[Course, ...]:
    """Return the course of each comparison of a study that declared when they stop; of another study none."""
    declared = study.plan.declared
    return () if declared is None else courses(declared, study)


def courses(configuration: StudyConfig, study: Study | None) -> tuple[Course, ...]:
    """Return the course of each comparison with the control, in the order of the experiments.

    Args:
        configuration: with a section `stopping`.
        study: the records; None: there are none yet.
    """
    stopping = configuration.stopping
    assert stopping is not None
    runs = () if study is None else study.runs
    rule = stopping_rule(stopping, len(configuration.seeds), _correlation(configuration, runs))
    names = [one.name for one in configuration.experiments if one.name != stopping.control]
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


def _correlation(configuration: StudyConfig, runs: Sequence[Run]) -> float:
    """Return test images over training images of the first declared fold, where seeds test on folds; else 0.

    Without its runs there is no pair, so bounds do not move with what else is done; folds differ by an image.
    Source: Nadeau & Bengio, Machine Learning 52 (2003).
    """
    if configuration.data.folds is None:
        return 0.0
    first = (run.record.split_sizes for run in runs if run.seed == configuration.seeds[0])
    return next((size["test"] / size["train"] for size in first), 0.0)


def paired(configuration: StudyConfig, study: Study | None, name: str) -> dict[int, float]:
    """Return seed -> difference to the control, in the declared order, up to the first seed that lacks one of both."""
    stopping = configuration.stopping
    assert stopping is not None
    if study is None:
        return {}

    def value(run: Run) -> float:
        return accuracy_on_test(run) if stopping.metric == "accuracy" else run.test.balanced_accuracy

    found = compare(study.of(name), study.of(stopping.control), name, stopping.control, value)
    by_seed = dict(zip(found.seeds, found.by_seed, strict=True))
    return {seed: by_seed[seed] for seed in takewhile(by_seed.__contains__, configuration.seeds)}
