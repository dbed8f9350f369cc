"""The stages between the look at the images and the choice; what depended on time is kept, the rest is in records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from peft_vit.errors import UserError
from peft_vit.records import RECORD_FILE
from peft_vit.studies.time_limit import Limit
from peft_vit.tuning.candidates import Design, Kind, designs, of_kind, training_of
from peft_vit.tuning.contest import contestants
from peft_vit.tuning.final import train_finally
from peft_vit.tuning.ground import FOLDS, Ground
from peft_vit.tuning.limits import MEMORY_LIMIT, TimeExport, within_bytes, within_latency, within_memory
from peft_vit.tuning.machine import NOT_MEASURED, Machine, MeasurePace, measured, said_ms
from peft_vit.tuning.probes import Backing, probe_all, sizes_of, worth_trying
from peft_vit.tuning.race import LOOKS, Raced, Scores, race, rule_of
from peft_vit.tuning.rates import Found, find_rates
from peft_vit.tuning.result import Candidate, Probed, Rated
from peft_vit.tuning.running import Outcome, Outcomes
from peft_vit.tuning.schedule import LEAST_STEPS, Schedule, refuse_little_time, run_s, schedule, validate_every

_LEAST_MEASURED_S = 20.0
_RACE_SEEDS = tuple(range(FOLDS, FOLDS + LOOKS[-1]))  # repetition 0 has chosen sizes and rates
Tried = dict[str, dict[int, Schedule]]  # by model and size


def until(ground: Ground, *reserved: str, ending_s: float = 0.0) -> Limit:
    """Return the limit of a stage that leaves their shares to later ones, and to the last two what they will take."""
    limit = ground.state.limit
    ending = max(ending_s, ground.state.share_s("final", "output"))
    return Limit(limit.minutes - (ground.state.share_s(*reserved) + ending) / 60, limit.started, limit.clock)


# --- before anything is trained ---------------------------------------------------------------------------------------


def look_at_machine(ground: Ground, measure: MeasurePace, time_export: TimeExport) -> tuple[Machine, Tried]:
    """Refuse limits that nothing meets, measure what runs take, and return what is worth a probe.

    Raises:
        UserError: for such a limit, and if there is no time for a single comparison.
    """
    sizes = {model: sizes_of(ground, model) for model in ground.backbones}
    classes = len(ground.counts)
    by_model = {model: designs(ground.shape(model, some[0]), LEAST_STEPS, classes) for model, some in sizes.items()}
    allowed = within_bytes(ground.request, by_model)
    sizes = within_latency(ground, {model: sizes[model] for model in allowed}, time_export)
    first = next(iter(sizes))
    machine = _measured(ground, first, sizes[first], by_model[first], measure)
    shapes = {model: {size: ground.shape(model, size) for size in some} for model, some in sizes.items()}
    fitting: Tried = {}
    for model, some in shapes.items():
        found = {size: schedule(ground, machine, shape, allowed[model]) for size, shape in some.items()}
        taken = {size: one for size, one in found.items() if one is not None}
        if taken:
            fitting[model] = taken
    if not fitting and not ground.state.begun:
        raise refuse_little_time(ground, machine, list(shapes[first].values()))
    kept = ground.state.once("tried", lambda: _plain(worth_trying(ground, machine, fitting)))
    return machine, _tried(kept)


def _measured(ground: Ground, model: str, sizes: Sequence[int], some: list[Design], measure: MeasurePace) -> Machine:
    experiments = [_experiment(ground, of_kind(some, kind), 1e-3, LEAST_STEPS) for kind in ("lora", "lora_nf4")]
    middle = sizes[len(sizes) // 2]  # steps at the largest would take the time of measuring alone
    study = ground.study("machine", model, middle, [0], experiments)
    budget_s = max(_LEAST_MEASURED_S, ground.state.share_s("machine"))
    shapes = [ground.shape(model, size) for size in sizes]
    tell = ground.state.tell
    kept = ground.state.once(
        "machine", lambda: measured(study, shapes, budget_s, lambda text: tell(f"  {text}"), measure)
    )
    machine = Machine.of(kept)
    shape = ground.shape(model, middle)
    image_ms = said_ms(machine.image(shape))
    passed = "was not measured, the machine is too busy" if image_ms == NOT_MEASURED else f"takes {image_ms} an image"
    tell(f"  at {middle} px a forward pass {passed}, a step of {ground.batch_size} images {machine.step(shape):.2f} s")
    return machine


def _experiment(
    ground: Ground, design: Design, rate: float | None, steps: int, memory: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    training = training_of(
        design.kind,
        learning_rate=rate,
        steps=steps,
        validate_every=validate_every(ground),
        batch_size=ground.batch_size,
        class_weights=ground.class_weights,
        flips=ground.flips,
        memory=memory or {},
    )
    return design.experiment(training)


def _plain(tried: Tried) -> dict[str, Any]:
    return {model: {str(size): asdict(one) for size, one in some.items()} for model, some in tried.items()}


def _tried(kept: Mapping[str, Any]) -> Tried:
    return {
        model: {int(size): Schedule(**{**one, "kinds": tuple(one["kinds"])}) for size, one in some.items()}
        for model, some in kept.items()
    }


def keep_memory(ground: Ground, tried: Tried) -> tuple[Tried, dict[tuple[str, int], dict[str, Any]]]:
    """Return what keeps within the limit of memory, by model and size, and the settings that do.

    Raises:
        UserError: if nothing does, with the least that would do.
    """
    if ground.request.memory_limit is None:
        return tried, {}
    settings: dict[tuple[str, int], dict[str, Any]] = {}
    fault = None
    for model, some in tried.items():
        for size, one in some.items():
            lora = of_kind(designs(ground.shape(model, size), one.steps, len(ground.counts)), "lora")
            try:
                settings[model, size] = within_memory(ground, model, size, _experiment(ground, lora, 1e-3, one.steps))
            except UserError as error:
                if error.field != MEMORY_LIMIT:
                    raise
                ground.state.tell(f"  {model} at {size} px: {error}")
                fault = error
    if not settings:
        assert fault is not None
        raise fault
    kept = {
        model: {size: one for size, one in some.items() if (model, size) in settings} for model, some in tried.items()
    }
    return {model: some for model, some in kept.items() if some}, settings


# --- probes, rates, race, final ---------------------------------------------------------------------------------------


def designed(ground: Ground, backing: Backing, steps: int) -> list[Design]:
    """Return everything that could be trained in so many steps, the smallest file first."""
    return designs(ground.shape(backing.model, backing.image_size), steps, len(ground.counts))


def choose_backing(ground: Ground, machine: Machine, tried: Tried) -> tuple[Backing, tuple[Probed, ...]]:
    """Fit the probes, and return the model and the image size that are gone on with; how images are flipped is kept."""
    limit = until(ground, "rates", "race")

    def decide() -> dict[str, Any]:
        backing, probes, flips = probe_all(ground, machine, tried, limit)
        return {
            "model": backing.model,
            "image_size": backing.image_size,
            "probes": [asdict(one) for one in probes],
            "flips": flips,
        }

    kept = ground.state.once("probes", decide)
    model, size = kept["model"], kept["image_size"]
    backing = Backing(model, size, tried[model][size])
    probes = tuple(Probed(**one) for one in kept["probes"])
    ground.state.tell(f"  chosen: {model} at {size} px, {next(one.why for one in probes if one.chosen)}")
    fits = f"{backing.schedule.steps} steps a run, about {backing.schedule.run_s:.0f} s"
    ground.state.tell(f"  runs have at most {fits}; about {backing.schedule.races} fit the race")
    return backing, probes


def choose_rates(
    ground: Ground, backing: Backing, memory: Mapping[str, Any]
) -> tuple[dict[Kind, Found], tuple[Rated, ...]]:
    """Look for the learning rate of each kind, and tell it."""
    one = backing.schedule
    limit = until(ground, "race", ending_s=one.ending_s)

    def decide() -> dict[str, Any]:
        found, rates = find_rates(
            ground,
            backing.model,
            backing.image_size,
            partial(designed, ground, backing),
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

    kept = ground.state.once("rates", decide)
    found: dict[Kind, Found] = {kind: Found(**best) for kind, best in kept["found"].items()}
    rates = tuple(Rated(**{**each, "scores": tuple(each["scores"])}) for each in kept["rates"])
    for kind, best in found.items():
        ground.state.tell(f"  {kind}: {best.learning_rate:g}, {best.score:.1%} of validation images")
    return found, rates


@dataclass(frozen=True)
class Contest:
    """The race of a tuning, as a study on the folds; `done` is what is known of it."""

    ground: Ground
    backing: Backing
    candidates: tuple[Candidate, ...]
    reference: str
    study: dict[str, Any]

    done: Outcomes = field(default_factory=dict)

    def folds(self, name: str) -> list[Outcome]:
        """Return what came of a candidate on the folds that are done, in their order."""
        return _in_order(self.done, name)

    def failed(self) -> set[str]:
        """Return who has failed on the first fold that is missing: it has a record, and nothing came of it."""
        race = self.ground.state.studies / self.study["name"]
        at = {one.name: _RACE_SEEDS[len(self.folds(one.name)) :] for one in self.candidates if not one.left_out}
        return {
            name for name, seeds in at.items() if seeds and (race / name / f"seed_{seeds[0]}" / RECORD_FILE).exists()
        }

    def run(self) -> Raced:
        """Race until it is decided, or until only the last stages have time."""
        limit = until(self.ground, ending_s=self.backing.schedule.ending_s)

        def scores(names: Sequence[str], pairs: int) -> Scores:
            self.done.update(self.ground.runner(self.study, limit, (names, _RACE_SEEDS[:pairs])))
            return {one.name: [fold.test for fold in self.folds(one.name)] for one in self.candidates}

        most = self.ground.request.max_bytes
        return race(
            self.candidates,
            self.reference,
            rule_of(self.ground.request.margin_share, self.ground.correlation),
            scores,
            lambda one: most is None or one.bytes <= most,
            self.ground.state.tell,
        )


def _in_order(done: Outcomes, name: str) -> list[Outcome]:
    """Return a candidate's folds up to the first that is missing: pairs come in the declared order."""
    found = []
    for seed in _RACE_SEEDS:
        if (name, seed) not in done:
            break
        found.append(done[name, seed])
    return found


def prepare_race(ground: Ground, backing: Backing, found: Mapping[Kind, Found], memory: Mapping[str, Any]) -> Contest:
    """Say who races against which reference, and who does not and why."""
    one, request = backing.schedule, ground.request
    some = designed(ground, backing, one.steps)
    rates = {kind: best.learning_rate for kind, best in found.items()}
    experiments = {
        design.name: _experiment(ground, design, None if design.kind is None else rates[design.kind], one.steps, memory)
        for design in some
        if design.kind is None or design.kind in rates
    }
    candidates, reference = contestants(
        some, found, one, request.margin_share, request.max_bytes, experiments, ground.validation_images
    )
    racing = [candidate for candidate in candidates if not candidate.left_out]
    tell = ground.state.tell
    tell(f"  the reference: {reference}, {found[_kind_of(some, reference)].score:.1%} of validation images")
    for candidate in candidates:
        role = "the reference" if candidate.name == reference else candidate.left_out or "races"
        tell(f"  {candidate.name}, {candidate.bytes / 1e6:.1f} MB: {role}")
    stopping = {
        "control": reference,
        "asked": "non-inferiority",
        "margin": request.margin,
        "looks": list(LOOKS),
        "metric": ground.metric,
    }
    study = ground.study(
        "race",
        backing.model,
        backing.image_size,
        _RACE_SEEDS,
        [dict(candidate.experiment) for candidate in racing],
        **({"stopping": stopping} if len(racing) > 1 else {}),
        measures={"logits": True},
    )
    return Contest(ground, backing, tuple(candidates), reference, study)


def _kind_of(some: Sequence[Design], name: str) -> Kind:
    kind = next(one.kind for one in some if one.name == name)
    assert kind is not None
    return kind


def more_time(contest: Contest, machine: Machine, raced: Raced) -> str | None:
    """Return what more time would buy, in words; None: nothing."""
    failed = contest.failed()
    open_ = [] if contest.reference in failed else [name for name in raced.open if name not in failed]
    if raced.open and not open_:
        return f"nothing: {', '.join(sorted(failed))} failed, as is told above; the same command tries again"
    if not open_:
        most = f"nothing: {LOOKS[-1]} folds are the most that tell anything on these images; more images would"
        return None if raced.shown else most
    ground, backing = contest.ground, contest.backing
    shape = ground.shape(backing.model, backing.image_size)
    own_s = run_s(ground, machine, shape, backing.schedule.steps)
    left = {one.name: LOOKS[-1] - one.pairs for one in raced.candidates if one.name in open_}
    missing = sum(left.values()) + max(left.values())  # of the reference, too
    share = ground.state.share_s("race") / (60 * ground.request.minutes)
    needed_s = max(missing * own_s / (1 - share), missing * own_s + backing.schedule.ending_s)
    minutes = math.ceil(needed_s / 60) + 1
    return (
        f"about {minutes} more minutes would bring {', '.join(open_)} to {LOOKS[-1]} folds, the most that are "
        f"looked at: the same command goes on, with --minutes {minutes}"
    )


def finish(contest: Contest, found: Mapping[Kind, Found], raced: Raced, memory: Mapping[str, Any]) -> dict[str, Path]:
    """Train the chosen one and the reference on all that is not sealed, and return their folders by name.

    Raises:
        UserError: if time ended before they had a fold, which says how long they have to be trained.
    """
    ground, backing = contest.ground, contest.backing
    names = list(dict.fromkeys((raced.chosen, contest.reference)))
    some = designed(ground, backing, backing.schedule.steps)
    rates = {one.name: found[one.kind].learning_rate for one in some if one.name in names and one.kind is not None}
    folds = {name: contest.folds(name) for name in names}
    for name, done in folds.items():
        if not done:
            problem = f"ended before {name} had a single fold in the race; give more, and the same command goes on"
            raise UserError(problem, field="--minutes")
    ending, left = backing.schedule.ending_s, max(0.0, ground.state.limit.left_s)
    if ending > left:
        takes = f"the last training and the output take about {ending / 60:.1f} minutes, and {left / 60:.1f} are left"
        ground.state.tell(f"  {takes}: this call takes longer than --minutes")
    return train_finally(ground, backing, partial(designed, ground, backing), names, rates, folds, memory)
