"""Comparisons that stop: what a study's section `stopping` says of each experiment against a control, from its records.

The product keeps that section, and reads nothing in it; this does. Nothing of a look is kept: differences are paired
by seed in the declared order, up to the first seed that lacks one of both runs, and `sequential.follow` says from these
alone which looks there were and what follows. So a study that was interrupted, continued or run in another order has
the same verdicts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from experiments.stopping.sequential import Asked, Look, SequentialResult, SequentialTest, Stopped, StoppingRule, follow
from experiments.stopping.spending import Spending
from peft_vit.base.errors import UserError, problem_of
from peft_vit.base.settings import AS_WRITTEN, OnlyWith, Settings, exactly_one
from peft_vit.base.statistics import Interval, Verdict
from peft_vit.core.config import StudyConfig
from peft_vit.core.tasks import Scores
from peft_vit.deploy.page.document import Column, Table, interval_columns, only_in_file, table
from peft_vit.deploy.page.formatting import better_above, points_interval
from peft_vit.lab.analysis import Study
from peft_vit.lab.analysis.comparison import compare

ENDS = {
    Stopped.DECIDED: "decided",
    Stopped.FUTILE: "stopped as futile",
    Stopped.MAXIMUM: "at the last look",
    None: "open",
}
QUESTIONS = {"noninferiority": "not worse", "superiority": "better"}  # fields of a sequential result and of its looks
FEWEST_PAIRS = 2  # one pair has no spread: a look at it decides nothing

# --- what a study declares --------------------------------------------------------------------------------------------


class StoppingConfig(Settings):
    """When a comparison stops; the study's seeds are the most that may be run."""

    control: str = Field(min_length=1, description="The experiment that all others are compared with")
    asked: Asked = Field(
        default="both", description="What to show: better than the control, not worse by the margin, or both"
    )
    margin: Annotated[float | None, OnlyWith(asked=("non-inferiority", "both"))] = Field(
        default=None,
        gt=0,
        lt=100,
        description="The margin of non-inferiority, in points, or of an error in % of the numbers' standard deviation",
    )
    looks: tuple[Annotated[int, Field(ge=FEWEST_PAIRS)], ...] | None = Field(
        default=None, min_length=1, description="Compare after these numbers of seeds; the last is that of the study"
    )
    every: int | None = Field(
        default=None, ge=FEWEST_PAIRS, description="Instead of looks: compare after every so many seeds"
    )
    spending: Spending = Field(
        default="obrien-fleming",
        description="The shape of the bounds: obrien-fleming asks for more at first, pocock for the same at each look",
    )
    level: float = Field(
        default=0.05, gt=0, lt=0.5, description="The error rate of all comparisons together, one-sided"
    )
    futility: float = Field(
        default=0.05, ge=0, lt=1, description="Stop a comparison whose predictive power is below this; 0: never"
    )

    @model_validator(mode="after")
    def _says_what_it_needs(self) -> Self:
        if self.asked != "superiority" and self.margin is None:
            raise ValueError(f"asked: {self.asked} needs the field 'margin', in points; add it")
        exactly_one(self, "looks", "every")
        if self.looks is not None and list(self.looks) != sorted(set(self.looks)):
            raise ValueError(f"looks have to rise, got {list(self.looks)}")
        return self

    def looks_at(self, seeds: int) -> tuple[int, ...]:
        """Return the numbers of pairs at which a study of so many seeds is looked at; the last is all."""
        if self.looks is not None:
            return self.looks
        assert self.every is not None
        return (*range(self.every, seeds, self.every), seeds)


def stopping_of(study: StudyConfig) -> StoppingConfig | None:
    """Return what a study declares; None without a section `stopping`.

    Raises:
        UserError: with the field, if it says something wrong, or something that does not fit the study.
    """
    if study.stopping is None:
        return None
    try:  # through JSON, so that strict checking still turns lists into tuples
        stopping = StoppingConfig.model_validate_json(json.dumps(study.stopping), context=AS_WRITTEN)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(problem_of(first), field=".".join(("stopping", *map(str, first["loc"])))) from None
    if problem := _does_not_fit(stopping, study):
        raise UserError(problem, field="stopping")
    return stopping


def _does_not_fit(stopping: StoppingConfig, study: StudyConfig) -> str | None:
    """Return why looks can't decide this study's comparisons, and what to do; None: they can."""
    names, seeds = [experiment.name for experiment in study.experiments], len(study.seeds)
    if stopping.control not in names:
        return f"control: {stopping.control!r} is not one of the study's experiments, which are {', '.join(names)}"
    if len(names) < 2 or seeds < FEWEST_PAIRS:
        return f"compares experiments by at least {FEWEST_PAIRS} seeds, so give two and more of both"
    if stopping.looks is not None and stopping.looks[-1] != seeds:
        return f"looks end at {stopping.looks[-1]}, and the study has {seeds} seeds; make both the same"
    if stopping.every is not None and stopping.every > seeds:
        return f"every: {stopping.every} is more than the study's {seeds} seeds; lower it"
    probes = [experiment.name for experiment in study.experiments if experiment.is_probe]
    same = not study.data.tests_by_seed and study.data.train_subset == "fixed"
    if same and stopping.control in probes and len(probes) > 1:
        other = next(name for name in probes if name != stopping.control)
        return (
            f"{other} and its control {stopping.control} are linear probes, the same with every seed, so no number of "
            "seeds decides; give each seed its own images (data.test_split), or leave one out"
        )
    return None


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
    )


# --- what its records say ---------------------------------------------------------------------------------------------


def declared(study: Study) -> StudyConfig | None:
    """Return the configuration whose `stopping` says when a study's comparisons stop; None without one."""
    return next(
        (configuration for configuration in study.plan.configurations if configuration.stopping is not None), None
    )


def follow_study(configuration: StudyConfig, study: Study | None) -> tuple[SequentialResult, ...]:
    """Return what became of each comparison with the control, in the order of the experiments.

    Args:
        configuration: with a section `stopping`.
        study: the records; None: there are none yet.

    Raises:
        UserError: see `stopping_of`.
    """
    stopping = stopping_of(configuration)
    assert stopping is not None
    runs = () if study is None else study.runs
    correlation = 0.0  # without the first declared fold's runs there is no pair, so bounds do not move with other ones
    if configuration.data.folds is not None:  # folds differ by an image. Nadeau & Bengio, Machine Learning 52 (2003)
        sizes = [run.record.split_sizes for run in runs if run.seed == configuration.seeds[0]]
        correlation = sizes[0]["test"] / sizes[0]["train"] if sizes else 0.0
    names = [experiment.name for experiment in configuration.experiments if experiment.name != stopping.control]
    differences = {
        name: [] if study is None else [*paired(study, configuration.seeds, name, stopping.control).values()]
        for name in names
    }
    return follow(differences, stopping_rule(stopping, len(configuration.seeds), correlation))


def paired(study: Study, seeds: Sequence[int], name: str, control: str) -> dict[int, float]:
    """Return seed -> difference to the control, in the declared order, up to the first seed that lacks one of both."""
    by_seed = compare(study.runs_of(name), study.runs_of(control), name, control).by_seed
    return {seed: by_seed[seed] for seed in takewhile(by_seed.__contains__, seeds)}


# --- in words ---------------------------------------------------------------------------------------------------------


def repeated_interval(look: Look, level: float) -> Interval:
    """Return the interval of a look, which holds together with those of the others; without ends if it has none."""
    if not math.isfinite(look.high - look.low):
        return Interval(look.difference, None, None, look.pairs, 1 - 2 * level, "too few pairs, or no spread")
    return Interval(look.difference, look.low, look.high, look.pairs, 1 - 2 * level)


def p_value_of(test: SequentialTest | None, verdict: Verdict) -> float | None:
    """Return the p-value over all looks, of what was shown or, if nothing was, of the claim; None: it is not asked."""
    if test is None:
        return None
    return test.opposite_p_value if verdict == Verdict.REFUTED else test.p_value


def stopping_table(results: Sequence[SequentialResult], stopping: StoppingConfig, scores: Scores) -> Table:
    """Return where each comparison stands: repeated interval, what became of each question, and why it stopped."""
    words = scores.metric.words

    def question(field: str, words: str) -> Column:
        def answer(result: SequentialResult) -> tuple[str, float | None]:
            verdict = getattr(result, field)
            return verdict, p_value_of(getattr(result.looks[-1], field), verdict) if result.looks else None

        return Column(
            f"{words} by {stopping.margin:g}?" if field == "noninferiority" else f"{words}?",
            answer,
            lambda of: of[0] if of[1] is None else f"{of[0]} (p = {of[1]:.3g})",
            lambda of: {field: of[0], f"{field}_p": of[1]},
        )

    return table(
        "stopping",
        f"Comparisons with {stopping.control} that stop",
        results,
        [
            Column("experiment", "name", data="experiment"),
            *only_in_file(control=lambda _: stopping.control),
            Column("pairs", lambda result: result.looks[-1].pairs if result.looks else 0, data="pairs"),
            Column(
                f"difference ({scores.unit})",
                lambda result: repeated_interval(result.looks[-1], stopping.level) if result.looks else None,
                points_interval,
                partial(interval_columns, "difference"),
                none=points_interval(None),
            ),
            *(
                question(field, words)
                for field, words in QUESTIONS.items()
                if stopping.asked.replace("-", "") in (field, "both")
            ),
            Column("state", "stopped", lambda why: ENDS[why], none=ENDS[None]),
        ],
        f"Differences in test {words} between runs that share seed, weights and images, after the declared looks. "
        f"{better_above(scores)}p-values hold over all looks and comparisons ({stopping.spending}), at "
        f"{100 * stopping.level:g} % one-sided; intervals are repeated ones of {100 - 200 * stopping.level:g} %: those "
        "of all looks of a comparison hold together.",
    )
