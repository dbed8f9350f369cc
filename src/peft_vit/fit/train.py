"""`peft-vit train`: image sizes, one training, and what folds say of it; the better of it and of a linear probe.

What was not said is chosen after images and time. Each call is a study of one run in a folder of its own, where the
same call continues. Its stages, with which `tune` begins, too, each take the `Fit`, say what they find, and can be
killed:

- look: a fifth of the images, or the folder's own test split, is set aside for the test; the others make five folds.
- sizes: see there.
- first: one training where regressions, and what training usually adds in the steps that fit, promise the most. It is
  a model that can be delivered; all else looks for a better one.
- folds: the same without a fold of the images each, beside the best regression: how good it is, what its outputs
  mean, and whether the regression is better.
- final: the recipe that was taken, if it is another one than was trained first, on all images that are not for the
  test. It ends as on folds, at the last of so many steps, as many times more as there are more images to train on;
  where more steps gain on folds, up to twice as many, four times if they were few.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from peft_vit.base.console import duration
from peft_vit.base.errors import UserError, checked
from peft_vit.base.files import read_bytes, write_whole
from peft_vit.base.statistics.intervals import paired_proportions
from peft_vit.core.config import METHOD_KINDS, USUAL_TASK, named_as_typed
from peft_vit.core.records import RunRecord
from peft_vit.core.tasks import TASKS
from peft_vit.data import ImagesFile
from peft_vit.deploy.page.formatting import percent, points_interval
from peft_vit.deploy.page.quality import TOO_FEW
from peft_vit.deploy.restore import finished_record
from peft_vit.fit.calls import REQUEST_FILE, RequestFile, TrainRun, call_folder, earlier_call, write_request
from peft_vit.fit.decide import meaning_of_last, worth_training
from peft_vit.fit.fit import Environment, Fit, FitFile
from peft_vit.fit.intake import (
    IMAGES_FILE,
    LabelledSet,
    earlier_calls,
    keep_images,
    look,
    named_files,
    refuse_among_images,
)
from peft_vit.fit.outcomes import EveryRunFailedError, Outcome, predictions_on, with_meaning
from peft_vit.fit.recipe import Recipe
from peft_vit.fit.request import TUNE_FILE, Emit, TrainRequest, print_event
from peft_vit.fit.sizes import (
    SizeResult,
    allowed_sizes,
    best_linear_probe,
    try_sizes,
    usual_recipe,
    with_length,
    within_memory,
)
from peft_vit.runs.costs.time_limit import FEWEST_FOLDS, Limit, first_that_fits
from peft_vit.runs.records.storage import (
    DELIVERED_FILE,
    RECORD_FILE,
    link_latest,
    read_record,
    resolve_latest,
    write_record,
)

_LEAST_ON_FOLDS = 16  # steps: temperatures of so short trainings fit a longer one
_ENDLESS_S = 1e8


def train(
    request: TrainRequest,
    emit: Emit = print_event,
    environment: Environment | None = None,
    started: float | None = None,
) -> TrainRun:
    """Do one run on somebody's own images, in a folder of its own; the same call continues in its folder.

    Args:
        request: what was asked for.
        emit: gets what happens.
        environment: how the outside world is asked.
        started: when it was called, by `time.monotonic`, from when its minutes count; None: now.

    Returns:
        The call, whose run is done or has failed.

    Raises:
        UserError: before anything is trained, for anything that would fail later; later if there is no room for a
            result.
        KeyboardInterrupt: after Ctrl-C; the same request continues.
    """
    refuse_among_images(request.images, request.output)
    earlier = None if request.from_run is None else EarlierRun.read(request.from_run)
    request = request if earlier is None else earlier.taken_over(request)
    fit = Fit(request, emit, environment, started)
    with named_as_typed(TrainRequest), fit.opened:
        files = named_files(request)
        with fit.stage("look"):
            look(fit)
        asked = RequestFile.of(request, fit.images.index, files)
        run, changes = earlier_call(asked)
        if run is not None and run.is_done:
            link_latest(run.folder)
            fit.emit(f"This call was done before, in {run.folder}. Another setting, such as --seed 1, makes a new run.")
            return run
        if changes:
            fit.emit(changes)
        split_by = fit.images.content.asked
        calls = (folder for folder, images in earlier_calls(request.output) if images.asked == split_by)
        if corrected := corrected_since(fit.images, calls if earlier is None else [earlier.folder]):
            fit.emit(corrected)
        with call_folder(request.output, request.label, None if run is None else run.folder) as lock:
            run = TrainRun(lock.folder, asked)
            fit.enter(lock.folder, lock)
            where = f"from step {run.step} in" if run.step else "in"
            fit.emit(f"{'Continues' if fit.begun else 'Starts'} {where} {run.folder}")
            if earlier is not None:
                fit.decisions.flips = earlier.record.spec.experiment.training.flips
            _carry_out(fit, run)
            if earlier is not None and run.is_done:
                fit.emit(earlier.change_to(run))
        return run


def _carry_out(fit: Fit, run: TrainRun) -> None:
    """Do what is not done: image sizes, the training, folds, and a linear probe if it is better.

    The record of what becomes the model says what its outputs mean, as folds of like trainings tell.
    """
    begun = fit.begun
    try:
        write_request(run.folder, run.asked)
        keep_images(fit)
        fit.begun = True
        sizes, recipe, longer = begin(fit, allowed_sizes(fit))
    except BaseException:
        if not begun:  # refused, or interrupted before anything is trained: nothing of it stays
            for file in (run.folder / REQUEST_FILE, fit.file_path, fit.images.file):
                file.unlink(missing_ok=True)
        raise
    try:
        with fit.stage("first"):
            outcome, _ = train_last(fit, recipe, longer)
    except EveryRunFailedError:  # its record says why
        return
    known = recipe
    if fit.request.validates and not (fit.num_validation or fit.request.smoke or fit.images.shots < 2):
        probe = best_linear_probe(fit, sizes)
        beside = recipe if probe.score is None else probe.probe
        with fit.stage("folds"):
            known = know_by_folds(fit, recipe, beside, fit.until(-fit.over_s))
        last = fit.costs.last_steps(recipe, longer)
        if not recipe.is_probe and beside.is_probe and not worth_training(fit, known, last, beside):
            with fit.stage("final"):
                recipe, known, longer = beside, beside, 1.0
                outcome, _ = train_last(fit, recipe, longer)
    folds, record, task = fit.frame.of(known), read_record(outcome.folder / RECORD_FILE), outcome.learned
    validated = record.decision or record.calibrated
    meaning = meaning_of_last(fit, recipe, known, longer, task) if folds or not validated else None
    if meaning is not None:
        on_folds = predictions_on(folds, task, meaning, fit.images.index)
        record = with_meaning(record, meaning, folds, outcome).model_copy(update={"on_folds": on_folds})
        write_record(fit.results_dir(outcome.folder.parts[-3]), record)
    if outcome.folder.parents[1] != run.folder:
        fit.emit(f"The model is the linear probe at {recipe.image_size} px.")
        place = outcome.folder.relative_to(run.folder).as_posix()
        write_whole(run.folder / DELIVERED_FILE, f"{place}\n".encode())
    fit.decisions.delivered = recipe, fit.longest_done(recipe)
    fit.save()
    link_latest(run.folder)


# --- what an earlier call has done: `--from`, and what became of its test images and labels ---------------------------

_REMEDY = "leave --from out"


@dataclass(frozen=True)
class EarlierRun:
    """A call of `train` or `tune` that is done.

    Attributes:
        folder: of the call.
        asked: what it was asked for; of `tune` what would train its model.
        record: of the run that is its model.
        images: that it had.
    """

    folder: Path
    asked: TrainRequest
    record: RunRecord
    images: ImagesFile

    @classmethod
    def read(cls, place: Path) -> EarlierRun:
        """Read what lies in its folder.

        Raises:
            UserError: if that is not such a folder, or its run can't be started from.
        """
        folder = resolve_latest(place)
        tuned = FitFile.read(folder / TUNE_FILE)
        if not os.path.isfile(folder / IMAGES_FILE) or not (tuned or os.path.isfile(folder / REQUEST_FILE)):
            reason = "is not the folder of a call of `train` or `tune`, with its model and which images tested it"
            raise UserError(f"{reason}; name one, as peft-vit-runs/0001-lora", file=place, field="--from")
        if tuned is None:
            with checked(folder / REQUEST_FILE, _REMEDY):
                asked = RequestFile.model_validate_json(read_bytes(folder / REQUEST_FILE)).request
        elif tuned.decisions.delivered is None:
            raise UserError("is not done; give its command again to continue", file=place, field="--from")
        else:
            values = {name: tuned.asked.get(name) for name in ("images", "weights", "resize", "group")}
            values["adapter_bytes"] = tuned.asked["max-adapter-bytes"]
            asked = TrainRequest.model_validate({**values, "model": tuned.decisions.delivered[0].model})
        record, images = finished_record(folder), ImagesFile.read(folder / IMAGES_FILE)
        method, task = record.spec.experiment.method, record.spec.task
        faults = (
            (method not in ("lora", "linear"), f"was trained with {method}, and --from takes lora and linear"),
            (task != USUAL_TASK, f"learned {task}, and --from takes {USUAL_TASK}"),
            (asked.adapter_bytes is not None, "was trained with --adapter-bytes, which --from does not take"),
            (asked.group is not None, "was split with --group, which --from does not keep"),
            (asked.smoke, "was trained with --smoke"),
        )
        for is_so, reason in faults:
            if is_so:
                raise UserError(f"{reason}; {_REMEDY}", file=place, field="--from")
        return cls(folder, asked, record, images)

    def taken_over(self, request: TrainRequest) -> TrainRequest:
        """Return a request with this run's method, model and image size.

        Raises:
            UserError: if it asks for others, or its images are of another task or lack a class.
        """
        found, spec = request.found, self.record.spec
        if found.task is not TASKS[spec.task]:
            reason = f"learned {spec.task}, and these images have {found.task.name}; {_REMEDY}"
            raise UserError(reason, file=self.folder, field="--from")
        if missing := [name for name in self.record.class_names if name not in found.read()[0]]:
            reason = f"knows class '{missing[0]}', of which no image is here; add some, or {_REMEDY}"
            raise UserError(reason, file=self.folder, field="--from")
        own = {
            "method": spec.experiment.method,
            "model": self.asked.model,
            "weights": self.asked.weights,
            "image_size": spec.data.image_size,
            "resize": spec.data.resize or "squash",
            "head_blocks": spec.backbone.head_blocks,
        }
        for name, value in own.items():
            if (given := getattr(request, name)) not in (value, type(request).model_fields[name].default):
                reason = f"{given} is asked for, and {self.folder} has {value}; leave it out"
                raise UserError(reason, field=request.option(name).name)
        return request.model_copy(update=own)

    def change_to(self, run: TrainRun) -> str:
        """Say how often this model was right on images that tested it, and how often that of another call is."""
        later = run.record()
        assert later is not None
        before = _tested(self.record, self.images)
        after = _tested(later, ImagesFile.read(run.folder / IMAGES_FILE))
        both = [
            (*before[image], *of_now)
            for image, of_now in after.items()
            if image in before and of_now[1] in self.record.class_names
        ]
        pairs = [(earlier == label, said == label) for earlier, _, said, label in both]  # by the labels of now
        if not pairs:
            return f"No image that tested {self.folder} tests here, so what changed for its classes is not known."
        lost, gained = (pairs.count(change) for change in ((True, False), (False, True)))
        shares = (percent(sum(right) / len(pairs)) for right in zip(*pairs, strict=True))
        change = paired_proportions(gained, lost, len(pairs))
        unclear = TOO_FEW if change.may_be_zero else ""
        images = f"The {len(pairs):,} images that tested {self.folder.name}: {' right before, '.join(shares)} now"
        return f"{images}, {points_interval(change)} points (95 % interval){unclear}."


def corrected_since(images: LabelledSet, folders: Iterable[Path]) -> str:
    """Say how many test labels changed since the first call of some that is done, and what its model scores by both.

    Args:
        images: of now.
        folders: of the calls.

    Returns:
        A line; empty if none changed.
    """
    index, digests = images.index, images.content.digests
    now = {digests[index.title(i)]: index.label(i) for i in np.flatnonzero(~index.dev).tolist()}
    for folder in folders:
        with suppress(UserError):  # not done, or damaged
            record = finished_record(folder)
            if record.spec.smoke or TASKS[record.spec.task] is not images.task or images.task is not TASKS[USUAL_TASK]:
                continue
            tested = _tested(record, ImagesFile.read(folder / IMAGES_FILE))
            both = [(*tested[image], label) for image, label in now.items() if image in tested]
            if not (changed := sum(then != label for _, then, label in both)):
                return ""
            right = (percent(sum(said == labels[k] for said, *labels in both) / len(both)) for k in (0, 1))
            counted = f"{changed:,} test label{' was' if changed == 1 else 's were'} changed since {folder}"
            scores = " by the labels of then, ".join(right)
            return f"{counted}. Of {len(both):,} test images its model is right on {scores} by those of now."
    return ""


def _tested(record: RunRecord, images: ImagesFile) -> dict[str, tuple[str, str]]:
    """Return what a run said of its test images, and what they are, by their contents."""
    names, found = record.class_names, record.predictions
    assert found is not None
    of_classes = (np.asarray(column, np.int64) for column in (found.predicted, found.labels))
    rows = zip(found.files or (), *of_classes, strict=True)
    return {images.digests[file]: (names[said], names[label]) for file, said, label in rows}


# --- what `tune` does, too --------------------------------------------------------------------------------------------


def begin(fit: Fit, allowed: Mapping[str, Sequence[int]]) -> tuple[list[SizeResult], Recipe, float]:
    """Compare the image sizes that are allowed by model, and return them with what is trained first, see there."""
    fit.load_earlier()
    with fit.stage("sizes"):
        sizes = [with_length(fit, size) for size in try_sizes(fit, allowed)]
        return sizes, *choose_first(fit, sizes)


def choose_first(fit: Fit, sizes: Sequence[SizeResult]) -> tuple[Recipe, float]:
    """Return what is trained first, and how many times longer than on folds; decided once.

    That is the training or the regression that promises the most. What was asked for is trained, however little it
    promises, if it fits.
    """
    if fit.decisions.first is None:
        fit.decisions.first = _most_promising(fit, sizes)
        fit.save()
    recipe, longer = fit.decisions.first
    steps = fit.costs.last_steps(recipe, longer)
    about_s = fit.costs.features_s(recipe) + fit.costs.last_s(recipe, steps)
    length = "" if recipe.is_probe else f", {'up to ' if fit.num_validation else ''}{steps:,} steps"
    fit.emit(f"  to train: {recipe.title}{length}, about {duration(about_s)}")
    if about_s > fit.limit.left_s + fit.over_s:
        fit.emit(f"  that is more than is left of --minutes {fit.request.minutes:g}")
    return recipe, longer


def _most_promising(fit: Fit, sizes: Sequence[SizeResult]) -> tuple[Recipe, float]:
    request, probe = fit.request, best_linear_probe(fit, sizes)
    if request.is_probe:
        return usual_recipe(fit, probe.model, probe.image_size), 1.0
    is_given = request.steps_for(fit.num_train) is not None or request.from_run is not None
    if is_given and fit.images.shots < 2:
        raise UserError("a class has a single image beside the test; add images", file=request.images)
    # Folds leave two of three; a training that starts from a run has none.
    too_few = request.steps_for(fit.num_train) is None and fit.images.shots < (3 if request.start is None else 2)
    fitting = [one for one in sizes if not too_few and one.steps and within_memory(fit, one.probe)]
    if fitting:
        best = max(fitting, key=lambda size: (size.promise, size.image_size if size.score is None else 0))
        if is_given or best.promise >= probe.expected:
            return usual_recipe(fit, best.model, best.image_size, best.steps), best.longer
    least = fit.costs.least_minutes(usual_recipe(fit, probe.model, sizes[0].image_size))
    if request.from_run is not None:  # whose model is better than a probe from the start
        reason = f"no training from {request.from_run} fits; give about {least}, or keep its model"
        raise UserError(reason, field="--minutes")
    why = f"no time to train; give about --minutes {least}"
    if too_few:
        why = "a class has fewer than 3 images to learn from, so it is a linear probe; add images"
    elif fitting:
        why = "a linear probe promises more than the trainings that fit; give more --minutes"
    fit.emit(f"  {why}")
    return probe.probe, 1.0


def know_by_folds(fit: Fit, recipe: Recipe, probe: Recipe, limit: Limit) -> Recipe:
    """Train a recipe without a fold of the images each, beside a regression, as far as there is time.

    Returns:
        What was trained: the recipe, with as many fewer steps as three folds need to fit, or two.
    """
    options = [recipe]
    if not fit.request.steps_for(fit.num_train):
        options += [replace(recipe, steps=fewer) for fewer in range(recipe.steps - 8, _LEAST_ON_FOLDS - 1, -8)]
    options = [own for own in options if fit.frame.seeds(own)] or options
    for count in (FEWEST_FOLDS, FEWEST_FOLDS - 1):
        folds = range(min(count, fit.images.num_different))
        beside_s = 0.0 if probe == recipe else fit.seconds(probe, folds)
        trained = first_that_fits(options, partial(fit.seconds, seeds=folds), limit.left_s - beside_s)
        if trained is not None:
            fit.run(list(dict.fromkeys((trained, probe))), folds, limit)
            return trained
    return recipe


def train_last(fit: Fit, recipe: Recipe, longer: float) -> tuple[Outcome, Outcome]:
    """Train a recipe on everything that is not for the test, so many times longer than on folds.

    The test comes on top of the minutes, on images drawn at random where not all of them fit their share. Once for a
    size, since its other models are read on the same images; a call with more minutes reads no others.

    Returns:
        What it came to on the test images, and what the same run came to before its weights were rounded; where
        nothing is rounded after training, twice the same.

    Raises:
        EveryRunFailedError: if it failed.
    """
    request, decisions, costs = fit.request, fit.decisions, fit.costs
    steps, is_done = costs.last_steps(recipe, longer), (recipe.trained, longer) in decisions.trained
    tested = fit.once(decisions.tested_images, recipe.place, lambda: costs.tested_images(recipe))
    if not is_done:
        fit.emit(costs.test_line(recipe, tested))
    data = {"validation_images": 0 if recipe.is_probe and not request.is_probe else fit.num_validation}
    if tested < fit.images.num_test:
        data["tested_images"] = tested
    if request.shots is None and (count := costs.trained_images(recipe)) < fit.num_train:
        data["train_images"] = fit.once(decisions.trained_images, recipe.place, lambda: count)
    name, is_first = f"final-{recipe.place}", decisions.first is not None and recipe == decisions.first[0]
    if request.main_study:
        name = fit.folder.name if is_first else f"{fit.folder.name[:46]}-probe-{recipe.image_size}px"
    last = replace(recipe.trained, steps=steps)
    experiment = fit.experiment(last, last=True)
    if METHOD_KINDS[recipe.method].may_end_sooner and request.steps_for(fit.num_train) is None:
        most_s = partial(costs.most_steps_s, recipe, steps, is_first)
        experiment["training"]["seconds"] = fit.once(decisions.last_s, f"{recipe.place} {last.name}", most_s)
    study = fit.study(name, recipe, [request.seed], [experiment], folds=None, **data)
    study["measures"] |= {"features": True, "latency_batches": [1] if request.main_study else []}
    (outcome,) = fit.carry_out(study, fit.until(-_ENDLESS_S)).values()  # it has to be brought to its end
    if not is_done:
        decisions.trained.append((recipe.trained, longer))
        if not recipe.is_probe:
            fit.pace.add(outcome.seconds, costs.last_s(recipe, outcome.steps))
            if outcome.steps < steps and not fit.num_validation:
                fit.emit(f"  {outcome.steps} of {steps} steps, since they took longer than before")
        fit.save()
    if (bits := recipe.rounded_to) is None:
        return outcome, outcome
    return outcome.with_logits(fit.rounded_logits(outcome.folder, [bits])[bits]), outcome
