"""The stages between the look at the images and the choice; what depended on time is kept, the rest is in records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peft_vit.errors import UserError
from peft_vit.forecasting.estimate import Throughput
from peft_vit.forecasting.time_limit import Limit, validate_every
from peft_vit.records import RECORD_FILE
from peft_vit.tuning.candidates import Design, Kind, designs, of_kind, training_of
from peft_vit.tuning.contest import contestants
from peft_vit.tuning.context import FOLDS, TuningContext
from peft_vit.tuning.final import train_finally
from peft_vit.tuning.limits import MEMORY_LIMIT, TimeExport, within_bytes, within_latency, within_memory
from peft_vit.tuning.probes import BackboneChoice, probe_all, sizes_of, worth_trying
from peft_vit.tuning.race import LOOKS, RaceResult, Scores, images_that_count, race, rule_of
from peft_vit.tuning.rates import BestRate, find_rates
from peft_vit.tuning.result import Candidate, ProbeResult, RateResult
from peft_vit.tuning.running import Outcome, Outcomes
from peft_vit.tuning.schedule import LEAST_STEPS, Schedule, refuse_little_time, run_s, schedule, step_s
from peft_vit.tuning.throughput import NOT_MEASURED, MeasureThroughput, measured, said_ms, throughput_of

_LEAST_MEASURED_S = 20.0
_RACE_SEEDS = tuple(range(FOLDS, FOLDS + LOOKS[-1]))  # repetition 0 has chosen sizes and rates
Tried = dict[str, dict[int, Schedule]]  # by model and size


def until(context: TuningContext, *reserved: str, ending_s: float = 0.0) -> Limit:
    """Return the limit of a stage that leaves their shares to later ones, and to the last two what they will take."""
    limit = context.state.limit
    ending = max(ending_s, context.state.share_s("final", "output"))
    return Limit(limit.minutes - (context.state.share_s(*reserved) + ending) / 60, limit.started, limit.clock)


# --- before anything is trained ---------------------------------------------------------------------------------------


def look_at_machine(
    context: TuningContext, measure: MeasureThroughput, time_export: TimeExport
) -> tuple[Throughput, Tried]:
    """Refuse limits that nothing meets, measure what runs take, and return what is worth a probe.

    Raises:
        UserError: for such a limit, and if there is no time for a single comparison.
    """
    sizes = {model: sizes_of(context, model) for model in context.backbones}
    classes = len(context.counts)
    by_model = {model: designs(context.shape(model, some[0]), LEAST_STEPS, classes) for model, some in sizes.items()}
    allowed = within_bytes(context.request, by_model)
    sizes = within_latency(context, {model: sizes[model] for model in allowed}, time_export)
    first = next(iter(sizes))
    machine = _measured(context, first, sizes[first], by_model[first], measure)
    shapes = {model: {size: context.shape(model, size) for size in some} for model, some in sizes.items()}
    fitting: Tried = {}
    for model, some in shapes.items():
        found = {size: schedule(context, machine, shape, allowed[model]) for size, shape in some.items()}
        taken = {size: one for size, one in found.items() if one is not None}
        if taken:
            fitting[model] = taken
    if not fitting and not context.state.begun:
        raise refuse_little_time(context, machine, list(shapes[first].values()))
    kept = context.state.once("tried", lambda: _plain(worth_trying(context, machine, fitting)))
    return machine, _tried(kept)


def _measured(
    context: TuningContext, model: str, sizes: Sequence[int], some: list[Design], measure: MeasureThroughput
) -> Throughput:
    experiments = [_experiment(context, of_kind(some, kind), 1e-3, LEAST_STEPS) for kind in ("lora", "lora_nf4")]
    middle = sizes[len(sizes) // 2]  # steps at the largest would take the time of measuring alone
    study = context.study("machine", model, middle, [0], experiments)
    budget_s = max(_LEAST_MEASURED_S, context.state.share_s("machine"))
    tell = context.state.tell
    kept = context.state.once("throughput", lambda: measured(study, budget_s, lambda text: tell(f"  {text}"), measure))
    machine = throughput_of(kept)
    shape = context.shape(model, middle)
    image_ms = said_ms(machine.image_s(shape))
    passed = "was not measured, the machine is too busy" if image_ms == NOT_MEASURED else f"takes {image_ms} an image"
    seconds = step_s(context, machine, shape)
    tell(f"  at {middle} px a forward pass {passed}, a step of {context.batch_size} images {seconds:.2f} s")
    return machine


def _experiment(
    context: TuningContext, design: Design, rate: float | None, steps: int, memory: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    training = training_of(
        design.kind,
        learning_rate=rate,
        steps=steps,
        validate_every=validate_every(context.validation_images, context.batch_size),
        batch_size=context.batch_size,
        metric=context.metric,
        flips=context.flips,
        memory=memory or {},
    )
    return design.experiment(training)


def _rate(design: Design, found: Mapping[Kind, BestRate]) -> float | None:
    """Return the learning rate of a design, None of a probe."""
    return None if design.kind is None else found[design.kind].learning_rate * design.rate_factor


def _plain(tried: Tried) -> dict[str, Any]:
    return {model: {str(size): asdict(one) for size, one in some.items()} for model, some in tried.items()}


def _tried(kept: Mapping[str, Any]) -> Tried:
    return {
        model: {int(size): Schedule(**{**one, "kinds": tuple(one["kinds"])}) for size, one in some.items()}
        for model, some in kept.items()
    }


def keep_memory(context: TuningContext, tried: Tried) -> tuple[Tried, dict[tuple[str, int], dict[str, Any]]]:
    """Return what keeps within the limit of memory, by model and size, and the settings that do.

    Raises:
        UserError: if nothing does, with the least that would do.
    """
    if context.request.memory_limit is None:
        return tried, {}
    settings: dict[tuple[str, int], dict[str, Any]] = {}
    fault = None
    for model, some in tried.items():
        for size, one in some.items():
            lora = of_kind(designs(context.shape(model, size), one.steps, len(context.counts)), "lora")
            try:
                settings[model, size] = within_memory(context, model, size, _experiment(context, lora, 1e-3, one.steps))
            except UserError as error:
                if error.field != MEMORY_LIMIT:
                    raise
                context.state.tell(f"  {model} at {size} px: {error}")
                fault = error
    if not settings:
        assert fault is not None
        raise fault
    kept = {
        model: {size: one for size, one in some.items() if (model, size) in settings} for model, some in tried.items()
    }
    return {model: some for model, some in kept.items() if some}, settings


# --- probes, rates, race, final ---------------------------------------------------------------------------------------


def designed(context: TuningContext, backbone: BackboneChoice, steps: int) -> list[Design]:
    """Return everything that could be trained in so many steps, the smallest file first."""
    return designs(context.shape(backbone.model, backbone.image_size), steps, len(context.counts))


def choose_backbone(
    context: TuningContext, machine: Throughput, tried: Tried
) -> tuple[BackboneChoice, tuple[ProbeResult, ...]]:
    """Fit the probes, and return the model and the image size that are gone on with; how images are flipped is kept."""
    limit = until(context, "rates", "race")

    def decide() -> dict[str, Any]:
        backbone, probes, flips = probe_all(context, machine, tried, limit)
        return {
            "model": backbone.model,
            "image_size": backbone.image_size,
            "probes": [asdict(one) for one in probes],
            "flips": flips,
        }

    kept = context.state.once("probes", decide)
    model, size = kept["model"], kept["image_size"]
    backbone = BackboneChoice(model, size, tried[model][size])
    probes = tuple(ProbeResult(**one) for one in kept["probes"])
    context.state.tell(f"  chosen: {model} at {size} px, {next(one.why for one in probes if one.chosen)}")
    fits = f"{backbone.schedule.steps} steps a run, about {backbone.schedule.run_s:.0f} s"
    context.state.tell(f"  runs have at most {fits}; about {backbone.schedule.races} fit the race")
    return backbone, probes


def choose_rates(
    context: TuningContext, backbone: BackboneChoice, memory: Mapping[str, Any]
) -> tuple[dict[Kind, BestRate], tuple[RateResult, ...]]:
    """Look for the learning rate of each kind, and tell it."""
    one = backbone.schedule
    limit = until(context, "race", ending_s=one.ending_s)

    def decide() -> dict[str, Any]:
        found, rates = find_rates(
            context,
            backbone.model,
            backbone.image_size,
            partial(designed, context, backbone),
            one.kinds,
            one.steps,
            one.validate_every,
            memory,
            limit,
        )
        return {
            "found": {kind: asdict(best) for kind, best in found.items()},
            "rates": [asdict(each) for each in rates],
        }

    kept = context.state.once("rates", decide)
    found: dict[Kind, BestRate] = {kind: BestRate(**best) for kind, best in kept["found"].items()}
    rates = tuple(RateResult(**{**each, "scores": tuple(each["scores"])}) for each in kept["rates"])
    context.state.tell("  ranked by the folds' validation and test images, half each; told are validation images")
    for kind, best in found.items():
        context.state.tell(f"  {kind}: {best.learning_rate:g}, {best.score:.1%} of validation images")
    return found, rates


@dataclass(frozen=True)
class Contest:
    """The race of a tuning, as a study on the folds; `done` is what is known of it."""

    context: TuningContext
    backbone: BackboneChoice
    candidates: tuple[Candidate, ...]
    reference: str
    study: dict[str, Any]

    done: Outcomes = field(default_factory=dict)

    def folds(self, name: str) -> list[Outcome]:
        """Return what came of a candidate on the folds that are done, in their order."""
        return _in_order(self.done, name)

    def failed(self) -> set[str]:
        """Return who has failed on the first fold that is missing: it has a record, and nothing came of it."""
        race = self.context.state.studies / self.study["name"]
        at = {one.name: _RACE_SEEDS[len(self.folds(one.name)) :] for one in self.candidates if not one.left_out}
        return {
            name for name, seeds in at.items() if seeds and (race / name / f"seed_{seeds[0]}" / RECORD_FILE).exists()
        }

    def run(self) -> RaceResult:
        """Race until it is decided, or until only the last stages have time."""
        limit = until(self.context, ending_s=self.backbone.schedule.ending_s)

        def scores(names: Sequence[str], pairs: int) -> Scores:
            self.done.update(self.context.runner(self.study, limit, (names, _RACE_SEEDS[:pairs])))
            return {one.name: [fold.test for fold in self.folds(one.name)] for one in self.candidates}

        most = self.context.request.max_bytes
        return race(
            self.candidates,
            self.reference,
            rule_of(self.context.request.margin_share, self.context.correlation, _images(self.context)),
            scores,
            lambda one: most is None or one.bytes <= most,
            self.context.state.tell,
        )


def _images(context: TuningContext) -> int:
    return images_that_count(context.counts, context.different, context.metric)


def _in_order(done: Outcomes, name: str) -> list[Outcome]:
    """Return a candidate's folds up to the first that is missing: pairs come in the declared order."""
    found = []
    for seed in _RACE_SEEDS:
        if (name, seed) not in done:
            break
        found.append(done[name, seed])
    return found


def prepare_race(
    context: TuningContext, backbone: BackboneChoice, found: Mapping[Kind, BestRate], memory: Mapping[str, Any]
) -> Contest:
    """Say who races against which reference, and who does not and why."""
    one, request = backbone.schedule, context.request
    some = designed(context, backbone, one.steps)
    experiments = {
        design.name: _experiment(context, design, _rate(design, found), one.steps, memory)
        for design in some
        if design.kind is None or design.kind in found
    }
    candidates, reference = contestants(
        some, found, one, request.margin_share, request.max_bytes, experiments, context.validation_images
    )
    racing = [candidate for candidate in candidates if not candidate.left_out]
    tell = context.state.tell
    tell(f"  the reference: {reference}, {found[_kind_of(some, reference)].score:.1%} of validation images")
    for candidate in candidates:
        role = "the reference" if candidate.name == reference else candidate.left_out or "races"
        tell(f"  {candidate.name}, {candidate.bytes / 1e6:.1f} MB: {role}")
    stopping = {
        "control": reference,
        "asked": "non-inferiority",
        "margin": request.margin,
        "looks": list(LOOKS),
        "images": _images(context),
        "metric": context.metric.name,
    }
    study = context.study(
        "race",
        backbone.model,
        backbone.image_size,
        _RACE_SEEDS,
        [dict(candidate.experiment) for candidate in racing],
        **({"stopping": stopping} if len(racing) > 1 else {}),
        measures={"logits": True},
    )
    return Contest(context, backbone, tuple(candidates), reference, study)


def _kind_of(some: Sequence[Design], name: str) -> Kind:
    kind = next(one.kind for one in some if one.name == name)
    assert kind is not None
    return kind


def more_time(contest: Contest, machine: Throughput, raced: RaceResult) -> str | None:
    """Return what more time would buy, in words; None: nothing."""
    failed = contest.failed()
    open_ = [] if contest.reference in failed else [name for name in raced.open if name not in failed]
    if raced.open and not open_:
        return f"nothing: {', '.join(sorted(failed))} failed, as is told above; the same command tries again"
    if not open_:
        most = f"nothing: {LOOKS[-1]} folds are the most that tell anything on these images; more images would"
        return None if raced.shown else most
    context, backbone = contest.context, contest.backbone
    shape = context.shape(backbone.model, backbone.image_size)
    own_s = run_s(context, machine, shape, backbone.schedule.steps)
    left = {one.name: LOOKS[-1] - one.pairs for one in raced.candidates if one.name in open_}
    missing = sum(left.values()) + max(left.values())  # of the reference, too
    share = context.state.share_s("race") / (60 * context.request.minutes)
    needed_s = max(missing * own_s / (1 - share), missing * own_s + backbone.schedule.ending_s)
    minutes = math.ceil(needed_s / 60) + 1
    return (
        f"about {minutes} more minutes would bring {', '.join(open_)} to {LOOKS[-1]} folds, the most that are "
        f"looked at: the same command goes on, with --minutes {minutes}"
    )


def finish(
    contest: Contest, found: Mapping[Kind, BestRate], raced: RaceResult, memory: Mapping[str, Any]
) -> dict[str, Path]:
    """Train the chosen one and the reference on all that is not sealed, and return their folders by name.

    Raises:
        UserError: if they have no fold, which says how long they have to be trained: time ended, or it failed.
    """
    context, backbone = contest.context, contest.backbone
    names = list(dict.fromkeys((raced.chosen, contest.reference)))
    some = designed(context, backbone, backbone.schedule.steps)
    rates = {one.name: rate for one in some if one.name in names and (rate := _rate(one, found)) is not None}
    folds = {name: contest.folds(name) for name in names}
    for name, done in folds.items():
        if not done and name in contest.failed():
            raise UserError(f"the first fold of {name} failed, as is told above; the same command tries it again")
        if not done:
            problem = f"ended before {name} had a single fold in the race; give more, and the same command goes on"
            raise UserError(problem, field="--minutes")
    ending, left = backbone.schedule.ending_s, max(0.0, context.state.limit.left_s)
    if ending > left:
        takes = f"the last training and the output take about {ending / 60:.1f} minutes, and {left / 60:.1f} are left"
        context.state.tell(f"  {takes}: this call takes longer than --minutes")
    return train_finally(context, backbone, partial(designed, context, backbone), names, rates, folds, memory)
