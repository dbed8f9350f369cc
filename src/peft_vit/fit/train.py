"""`peft-vit train`: a regression at several image sizes, one training, and the better of both.

What was not said is chosen after images and time. Each call is a study of one run in a folder of its own, where the
same call continues.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from peft_vit.base.console import OnProgress, duration, print_lines, progress
from peft_vit.base.errors import UserError
from peft_vit.core.adapters.footprint import available_memory_bytes
from peft_vit.core.backbones import (
    BackboneShape,
    architecture_of,
    default_weights_source,
    describe,
    interpolation_of,
    size_step_of,
)
from peft_vit.core.config import (
    LABEL_SMOOTHING,
    USUAL_TASK,
    Compute,
    StudyConfig,
    bytes_of,
    named_as_typed,
    named_backbone,
    study_from_mapping,
    type_of_bits,
)
from peft_vit.core.methods import METHODS, TrainOptions
from peft_vit.core.records import RunRecord, RunSpec
from peft_vit.core.tasks import TASKS, expected_gain, metric_of
from peft_vit.data import ImageIndex, PixelStore, existing, find_images, make_splits
from peft_vit.fit.calls import (
    REQUEST_FILE,
    SIZES_FILE,
    RequestFile,
    SizesFile,
    TrainRun,
    call_folder,
    earlier_call,
    write_request,
    write_sizes,
)
from peft_vit.fit.decide import gain_over, posterior_by_size
from peft_vit.fit.events import Emit, Message, print_event
from peft_vit.fit.intake import IMAGES_FILE, LabelledSet, named_files, refuse_among_images, take_in
from peft_vit.fit.outcomes import ByFolds, known_by_folds
from peft_vit.fit.regressions import Regression, sizes_to_try, try_sizes
from peft_vit.fit.request import TrainRequest
from peft_vit.runs.costs.estimate import Throughput, kept_values, product_rates
from peft_vit.runs.costs.time_limit import (
    ENOUGH_STEPS,
    FEWEST_FOLDS,
    FOLDS,
    first_that_fits,
    images_to_test,
    validate_every,
)
from peft_vit.runs.records.progress import StudyLock, study_lock
from peft_vit.runs.records.storage import (
    FOLDS_STUDY,
    RECORD_FILE,
    link_latest,
    read_record,
    read_study_file,
    run_folder,
    single_run,
    write_record,
)
from peft_vit.runs.scheduling.carry_out import carry_out
from peft_vit.runs.scheduling.display import plan_notes
from peft_vit.runs.scheduling.plan import Plan, plan_study
from peft_vit.runs.scheduling.profiling import measure_step
from peft_vit.runs.this_machine.machine import choose_precision, cpu_count, resolve_device

_MOST_VALIDATION, _MOST_TEST = 500, 2000  # images, however many there are
_FEWEST_TEST = 2
# Steps without a gain: a few hundred validation images scatter by some points from one validation to the next, so 50
# steps end before LoRA has learned what it can (seen in a pilot on Fashion-MNIST).
_PATIENCE_STEPS = 150
_LEAST_STEPS, _WISHED_STEPS, _MOST_STEPS, _STEPS_APART = 20, 200, 1000, 10
_WORTH_A_LINE_S = 30
_WITHIN = 1.05  # times the minutes: what is chosen here is rounded
_TEST_PASSES = 2  # of an image: of the regression and of the model, or for features and for what is unlike them
_SHARE_OF_SIZES = 0.2  # of the minutes, for regressions at several sizes
_FASTER, _SLOWER = 0.5, 2.0  # than foreseen, as far as a few regressions are believed
FEWEST_VALIDATION = 30  # images; where fewer would validate, all are trained on, and folds tell how good the model is
_MEMORY_SHARE = 0.5  # of what is free, for what a step keeps


# --- the call ---------------------------------------------------------------------------------------------------------


def train(request: TrainRequest, emit: Emit = print_event) -> TrainRun:
    """Do one run on somebody's own images, in a folder of its own; the same call continues in its folder.

    Returns:
        The call, whose run is done or has failed.

    Raises:
        UserError: before anything is trained, for anything that would fail later; later if there is no room for a
            result.
        KeyboardInterrupt: see `drive`.
    """
    refuse_among_images(request.images, request.output)
    with named_as_typed(TrainRequest), ExitStack() as stack:
        files = named_files(request)
        with progress("reading images") as on_progress:
            images, forecast = stack.enter_context(open_images(request, on_progress))
        print_lines(filter(None, (images.inspection.images.taken, *images.inspection.remarks())))
        asked = RequestFile.of(request, images.index, files)
        run, changes = earlier_call(asked)
        if run is not None and run.status().state == "done" and not run.folds_left() and run.size_left() is None:
            link_latest(run.folder)
            done = f"This call was done before, in {run.folder}."
            emit(Message(f"{done} Another setting, such as --seed 1, makes a new run."))
            return run
        counts = forecast.counts
        several = images.task.images_of(len(images.index.labels), images.index.class_names)
        validated = f"{counts.validation} to validate, " if counts.validation else ""
        shares = f"{counts.train} to train, {validated}{counts.test} to test."
        print_lines(filter(None, [f"{several}: {shares}", changes]))
        with call_folder(request.output, request.label, None if run is None else run.folder) as lock:
            images = replace(images, file=lock.folder.absolute() / IMAGES_FILE)
            training = Training(request, images, forecast, TrainRun(lock.folder, asked), emit)
            training.carry_out(lock)
            return training.run


@dataclass
class Training:
    """A call under way."""

    request: TrainRequest
    images: LabelledSet
    forecast: Forecast
    run: TrainRun
    emit: Emit

    def tell(self, text: str) -> None:
        """Say something."""
        self.emit(Message(text))

    def carry_out(self, lock: StudyLock) -> None:
        """Do what is not done: the run, the folds that tell how good it is, and a regression that may be better."""
        run = self.run
        if run.status().state != "done":
            with progress("getting ready") as on_progress:
                plan, chosen = self._plan(on_progress)
            link_latest(run.folder)
            about = f"it takes about {duration(plan.runs[0].estimate.seconds)} in all."
            start = f"Continues from step {run.step} of {plan.runs[0].total_steps}" if run.step else "Starts"
            print_lines(filter(None, [chosen, *plan_notes(plan)]))
            print_lines([f"{start} in {run.folder}; {about}"])
            carry_out(plan, lock, alone=True)
        else:
            self.images.write()
            link_latest(run.folder)
            self.tell(f"Training is done in {run.folder}; the rest measures how good it is.")
        if run.folds_left():
            self._know_by_folds()
        if (size := run.size_left()) is not None:
            self._regression_beside(size)

    def _plan(self, on_progress: OnProgress) -> tuple[Plan, str]:
        """Plan the run, and choose what was not said; nothing of it stays if that fails.

        What was asked for is written first: if the process is killed meanwhile, the same call continues in its folder.

        Returns:
            The plan, and a line on what was chosen.
        """
        folder, images = self.run.folder, self.images
        begun, chosen = read_study_file(folder), ""
        with ExitStack() as undo:
            if begun is None:
                for written in (images.file, folder / REQUEST_FILE, folder / SIZES_FILE):
                    undo.callback(written.unlink, missing_ok=True)
                write_request(folder, self.run.asked)
            images.write()  # a call that goes on leaves out as well what is new and can't be read
            if begun is None or self.request.smoke:  # whose file holds the compressed one
                self._choose_weights()
                started = time.monotonic()
                trials = self._regressions(on_progress)
                spent_s = time.monotonic() - started
                study, chosen = study_of(self.request, folder.name, images, self.forecast, trials, spent_s)
                if trials:
                    kept = {name: {at: getattr(own, name) for at, own in trials.items()} for name in ("share", "l2")}
                    signed, first = {at: own.value for at, own in trials.items()}, next(iter(trials.values()))
                    found = SizesFile(values=kept["share"], signed=signed, l2=kept["l2"], seconds=spent_s)
                    write_sizes(folder, found.model_copy(update={"images": first.images}))
            else:
                study = begun.configuration
            measure = partial(measure_step, log=self.tell)
            plan = plan_study(study, self.request.output, file=None, smoke=self.request.smoke, measure_step=measure)
            if not self.request.smoke:
                images.keep_pixels(plan.study)
            undo.pop_all()
        return plan, chosen

    def _choose_weights(self) -> None:
        """Decide where the weights come from, and say it; see `default_weights_source`."""
        backbone = named_backbone(self.request.model, self.request.weights)
        if self.request.weights is None and backbone.library == "timm":
            source, line = default_weights_source(backbone.model)
            self.request = self.request.model_copy(update={"weights": source})
            if line:
                self.tell(line)

    def _regressions(self, on_progress: OnProgress) -> dict[int, Regression]:
        """Return regressions on frozen features at the image sizes that fit a fifth of the minutes."""
        expected_s, request = self.forecast.expected_s, self.request
        if not expected_s:
            return {}
        smallest = regression_at(request, "sizes", self.images, self.forecast, min(expected_s))
        self.images.keep_pixels(smallest, test=False)

        def spec_of(size: int) -> RunSpec:
            study = regression_at(request, "sizes", self.images, self.forecast, size, self.forecast.compute)
            return plan_study(study, request.output, file=None).runs[0].spec

        return try_sizes(spec_of, expected_s, 60 * request.minutes * _SHARE_OF_SIZES, self.tell, on_progress)

    def _know_by_folds(self) -> None:
        """Find by trainings on folds how far the model can be believed, and whether a regression is better."""
        run, record = self.run, self.run.record()
        assert record is not None
        size, sizes = record.spec.data.image_size, run.sizes() or SizesFile(values={})
        known = self._by_folds(run.folder, run.folder.parent, record)
        signed = sizes.signed if known.of_probe is None else {**sizes.signed, size: known.of_probe}
        metric = metric_of(record.spec)
        its = {"the model": known.value, **{f"a regression at {at} px": signed[at] for at in sorted(signed)}}
        said = ", ".join(f"{name} {metric.text(metric.sign * value)}" for name, value in its.items())
        print_lines([f"On images that are left out of training in turn: {said}."])
        found = {"signed": signed, "trained": known.value, "upper": known.upper}
        write_sizes(run.folder, sizes.model_copy(update=found))

    def _by_folds(self, folder: Path, results_dir: Path, record: RunRecord) -> ByFolds:
        """Train like a run without a fold of its images each, and write into its record how far it can be believed."""
        request = self.request.model_copy(update={"weights": self.request.weights or record.spec.backbone.weights})
        study = fold_study(request, self.images, record)
        self.images.keep_pixels(study)
        with study_lock(folder / study.name) as lock:
            plan = plan_study(study, folder, file=None)
            if plan.pending:
                about = duration(sum(planned.estimate.seconds for planned in plan.pending))
                how = f"{len(study.seeds)} trainings, each without a part of them, measure how good it is"
                print_lines([f"The images are too few to set some aside for validation: {how}; about {about}."])
                carry_out(plan, lock)
        known = known_by_folds(record, plan, folder)
        write_record(results_dir, known.record)
        return known

    def _regression_beside(self, image_size: int) -> None:
        """Make a regression of another size, and deliver it if it is clearly better on validation."""
        run, trained, sizes = self.run, self.run.record(), self.run.sizes()
        assert trained is not None
        assert sizes is not None
        request = self.request.model_copy(update={"weights": self.request.weights or trained.spec.backbone.weights})
        name = f"{run.folder.name[:46]}-regression-{image_size}px"  # a study's name has at most 64 letters
        begun = read_study_file(run.folder / name)
        if begun is None:
            l2, compute = sizes.l2.get(image_size), trained.spec.experiment.training.decided_compute
            study = regression_at(request, name, self.images, self.forecast, image_size, compute, l2)
        else:  # the machine may have another pace now, which says how many images test
            study = begun.configuration
        self.images.keep_pixels(study)
        with study_lock(run.folder / study.name) as lock:
            plan = plan_study(study, run.folder, file=None)
            if plan.pending:
                tested = self.forecast.test_line(describe(self.forecast.backbone, image_size))
                print_lines([f"A regression at {image_size} px may be better; making it.{tested}"])
                carry_out(plan, lock, alone=True)
        folder = run_folder(run.folder, plan.runs[0].spec)
        regression, metric = read_record(folder / RECORD_FILE), metric_of(trained.spec)
        delivered = single_run(run.folder)
        if regression.status != "done":
            pass
        elif trained.validation is None or regression.validation is None:  # folds have told that it is better
            self._by_folds(run.folder / study.name, run.folder, regression)
            self.tell(f"The model is the regression at {image_size} px.")
            delivered = folder
        elif not self._keeps(trained, regression, sizes, image_size):
            was, has = (metric.text(metric.of(own)) for own in (trained.validation, regression.validation))
            how = f"{has} on validation images, and training had {was}"
            self.tell(f"The model is the regression at {image_size} px: {how}.")
            delivered = folder
        run.deliver(delivered)

    def _keeps(self, trained: RunRecord, regression: RunRecord, sizes: SizesFile, image_size: int) -> bool:
        """Tell whether what was trained is kept beside a regression of another size, by validation images."""
        assert trained.validation is not None
        assert regression.validation is not None
        counts, own, metric = self.forecast.counts, trained.spec.data.image_size, metric_of(trained.spec)
        images = sizes.images or counts.train + counts.validation
        expected = gain_over(sizes.values, image_size, own, trained.chosen_step or 0, images, self.images.side)
        index = self.images.index
        labels = index.labels[make_splits(index, trained.spec.data, trained.spec.seed).validation]
        alike = metric.images_alike(labels)
        return metric.worth(trained.validation, before=regression.validation, expected=expected, images=alike)


@contextmanager
def open_images(
    request: TrainRequest, on_progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[LabelledSet, Forecast]]:
    """Find somebody's images, choose the sizes that are tried, and decode each once; what can't be read is left out.

    Args:
        request: of the command, or in Python.
        on_progress: gets how many images are decoded, and of how many.

    Raises:
        UserError: see `take_in`.
    """
    found = find_images(existing(str(request.images)), request.task)
    files = found.files
    own = None if files.is_test is None else sum(files.is_test)
    forecast = Forecast(request, _split_sizes(request, *files.read(), own))
    forecast.expected_s = forecast.sizes_in_time()
    sizes = list(forecast.expected_s) or [request.image_size or forecast.largest_size()]
    with PixelStore([] if request.smoke else sizes, interpolation_of(architecture_of(forecast.backbone))) as store:
        least = 3 if own is None else 2  # of which the splits leave each class one to train on
        limits = {"least": least, "strict": request.strict}
        images = take_in(request, found, Path(IMAGES_FILE), seed=None, store=store, on_progress=on_progress, **limits)
        yield images, forecast.now(count_images(request, images.index))


# --- images and time --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Images that are trained on, and read to validate and to test.

    Fewer than `FEWEST_VALIDATION` would tell too little: then none validates, all are trained on, and further trainings
    without a fold of them each tell how good the model is, see `fold_study`.
    """

    train: int
    validation: int
    test: int


def count_images(request: TrainRequest, index: ImageIndex) -> Counts:
    """Return how a folder's images are shared out."""
    own = None if index.official_test is None else int(index.official_test.sum())
    return _split_sizes(request, index.class_names, index.labels, own)


def _split_sizes(request: TrainRequest, names: Sequence[str], labels: np.ndarray, own: int | None) -> Counts:
    images, classes = len(labels), len(names)
    usable = images - (own or 0)
    validation, fifth = (max(classes, min(usable // 5, most)) for most in (_MOST_VALIDATION, _MOST_TEST))
    test = request.test_images or (fifth if own is None else own)
    if own is None and request.test_images is None and fifth < _FEWEST_TEST:
        message = f"{images} images are too few: a fifth of them tests, at least {_FEWEST_TEST}; give more"
        raise UserError(message, file="train")
    if validation < FEWEST_VALIDATION and request.shots is None and not request.smoke:
        validation = 0
    train = images - validation - test if request.shots is None else request.shots * classes
    return Counts(max(1, train), validation, test)


class Forecast:
    """What a run takes here, by image size and steps; how fast this machine multiplies is measured once, in 0.2 s."""

    def __init__(self, request: TrainRequest, counts: Counts) -> None:
        self.request = request
        self.counts = counts
        self.limit_s = 60 * request.minutes
        self.pace = 1.0  # times longer than foreseen
        self.backbone = named_backbone(request.model, request.weights)
        self.expected_s: dict[int, float] = {}  # of regressions at the image sizes that are to be tried, rising
        self._device = resolve_device(request.device)

    def now(self, counts: Counts, spent_s: float = 0.0, trials: Mapping[int, Regression] | None = None) -> Self:
        """Return the same machine's forecast for so many images, with so much less of the minutes, at a trial's pace.

        The trial of the largest size says the most: a small one is over before the machine has shown its pace.
        """
        forecast = copy.copy(self)
        forecast.counts, forecast.limit_s = counts, self.limit_s - spent_s
        paces = [own.pace for own in (trials or {}).values() if own.pace is not None]
        forecast.pace = min(max(paces[-1], _FASTER), _SLOWER) if paces else self.pace
        return forecast

    @cached_property
    def _rates(self) -> dict[Compute, float]:
        request, patch = self.request, size_step_of(architecture_of(self.backbone))
        shape = describe(self.backbone, (request.image_size or 8 * patch) // patch * patch)
        precision = choose_precision(request.precision, None, self._device).chosen
        asked = request.compute if request.may_multiply_integers else "float"
        if request.smoke and asked == "auto":
            asked = "float"  # it is planned again when it goes on, perhaps at another pace
        return product_rates(asked, shape, self._device, precision, request.threads or cpu_count())

    @property
    def compute(self) -> Compute:
        """Return the faster way of multiplying, of those that were asked for."""
        return next(iter(self._rates))

    @property
    def throughput(self) -> Throughput:
        """Return how much of what a run consists of is done in a second."""
        return Throughput.estimated(self._rates[self.compute])

    def seconds(self, shape: BackboneShape, steps: int, throughput: Throughput | None = None) -> float:
        """Return what a run takes at most without its test: features for the probe, steps, validations."""
        throughput = throughput or self.throughput
        request, counts = self.request, self.counts
        batch = min(request.batch_size, counts.train)
        step_s = throughput.step_s(shape, request.method, batch, self._recomputed(shape))
        validations = 2 + steps // validate_every(counts.validation, request.batch_size)
        images = 2 * counts.train + validations * counts.validation
        folds = 0 if counts.validation else _folds_beside(steps)
        trained_s = (1 + folds) * throughput.start_s + _trained_on_folds(steps, folds) * step_s
        return self.pace * (trained_s + images * throughput.image_s(shape))

    def tested(self, shape: BackboneShape) -> dict[str, int]:
        """Return of how many test images, as a section `data` says it, its share of the minutes reads the answers.

        Nothing is chosen by it. Empty: of all, as also where a number was asked for.
        """
        count = images_to_test(self.counts.test, self._test_s(shape), self.request.minutes)
        all_ = self.request.test_images is not None or self.request.smoke or count == self.counts.test
        return {} if all_ else {"tested_images": count}

    def test_line(self, shape: BackboneShape) -> str:
        """Return a further sentence: how long the test takes, and of how many images it is; empty of made-up ones."""
        every, drawn = self.counts.test, self.tested(shape).get("tested_images")
        about = f"about {duration((drawn or every) * self._test_s(shape))} on top of the minutes"
        if self.request.smoke:
            return ""
        if drawn is None:
            return f" Testing {every:,} images takes {about}."
        everything = self.request.spelled("test_images", every)
        return f" The test reads {drawn:,} of {every:,} images, drawn at random, {about}; {everything} reads all."

    def _test_s(self, shape: BackboneShape) -> float:
        """Return the seconds of a test image."""
        return self.pace * _TEST_PASSES * self.throughput.image_s(shape)

    def sizes_in_time(self) -> dict[int, float]:
        """Return the image sizes whose regressions may fit their share of the minutes, and the seconds of each.

        If a size was asked for, it is the only one; its regression chooses the penalty and shows the machine's pace.
        The machine may turn out to be faster than its first moments tell: `try_sizes` then goes further.
        """
        request, share_s = self.request, self.limit_s * _SHARE_OF_SIZES
        if request.init_adapter is not None or request.smoke:
            return {}
        images, throughput = self.counts.train + self.counts.validation, self.throughput
        expected_s: dict[int, float] = {}
        asked = request.image_size
        for size in sizes_to_try(architecture_of(self.backbone)) if asked is None else [asked]:
            seconds = throughput.start_s + images * throughput.image_s(describe(self.backbone, size))
            if expected_s and _FASTER * (sum(expected_s.values()) + seconds) > share_s:
                break
            expected_s[size] = seconds
        return expected_s

    def largest_size(self) -> int:
        """Return the largest image size, up to the model's own, at which the wished steps fit time and memory."""
        wished = _requested_steps(self.request, self.counts) or _WISHED_STEPS
        steps = 0 if self.request.is_probe else wished

        def seconds(size: int) -> float:
            shape = describe(self.backbone, size)
            return self.seconds(shape, steps) if self._fits_memory(shape) else math.inf

        sizes = sizes_to_try(architecture_of(self.backbone))[::-1]
        return first_that_fits(sizes, seconds, self.limit_s) or sizes[-1]

    def most_promising(self, trials: Mapping[int, Regression], side: float) -> int:
        """Return the size where a regression, and what training adds to it in the steps that fit, promise most.

        Few images tell little of sizes, see `posterior_by_size`; larger ones leave fewer steps, see `expected_gain`.

        Args:
            trials: a regression by size.
            side: the shorter one of the images themselves, in pixels.
        """

        def gain(image_size: int) -> float:
            if self.request.is_probe:
                return 0.0
            shape = describe(self.backbone, image_size)
            steps = _requested_steps(self.request, self.counts) or self._steps_in_time(shape)
            if steps is None or self.seconds(shape, steps) > self.limit_s or not self._fits_memory(shape):
                return -math.inf
            return expected_gain(steps)

        observed = {size: own.share for size, own in trials.items()}
        posterior = posterior_by_size(observed, next(iter(trials.values())).images, side)
        return max(posterior, key=lambda size: posterior[size] + gain(size))  # of equal ones the smallest

    def _fits_memory(self, shape: BackboneShape) -> bool:
        at_once = self.request.micro_batch_size or (1 if self.request.memory_limit else self.request.batch_size)
        room = available_memory_bytes()
        if self.request.memory_limit is not None:
            room = min(room, bytes_of(self.request.memory_limit))
        return 4 * at_once * kept_values(shape, self._recomputed(shape)) <= _MEMORY_SHARE * room

    def _steps_in_time(self, shape: BackboneShape) -> int | None:
        options = range(_MOST_STEPS, _LEAST_STEPS - 1, -_STEPS_APART)
        return first_that_fits(options, lambda some: self.seconds(shape, some), self.limit_s)

    def _recomputed(self, shape: BackboneShape) -> int:
        blocks = len(shape.values_by_block)
        if self.request.memory_limit is not None:  # at most
            return blocks - 1
        return blocks if self.request.activation_checkpointing == "blocks" else 0

    def most_steps(self, shape: BackboneShape) -> int:
        """Return how many steps fit the time, in tens.

        Raises:
            UserError: if they are too few to learn anything.
        """
        if self.request.is_probe:
            return 0
        steps = self._steps_in_time(shape)
        if steps is None:
            wanted = self.seconds(shape, _LEAST_STEPS) / 60
            raise UserError(
                f"{self.request.minutes:g} minutes are too few for {_LEAST_STEPS} steps here, which take about "
                f"{wanted:.1f}; raise it, lower --image-size, or use --method linear",
                field="--minutes",
            )
        return steps

    def line(self, shape: BackboneShape, image_size: int, steps: int) -> str:
        """Return what was chosen, and whether the minutes are too few for it."""
        ends = self.request.epochs is None and self.counts.validation > 0
        length = f", up to {steps} steps, stops early when validation stops improving" if ends else f", {steps} steps"
        length = "" if self.request.is_probe else length
        line = f"Images of {image_size} px{length}."
        in_float = Throughput.estimated(self._rates.get("float", self._rates[self.compute]))
        saved_s = self.seconds(shape, steps, in_float) - self.seconds(shape, steps)
        if self.compute == "int8":
            saves = f", which saves about {saved_s / 60:.1f} minutes" if saved_s >= _WORTH_A_LINE_S else ""
            line += f" Frozen layers multiply 8-bit integers{saves}."
        if (whole_s := self.seconds(shape, steps)) > self.limit_s * _WITHIN:
            line += f" This may take {whole_s / 60:.0f} minutes here, more than --minutes {self.request.minutes:g}."
        return line


def _folds_beside(steps: int) -> int:
    """Return how many trainings on folds tell how good one of so many steps is; regressions cost next to nothing."""
    return FEWEST_FOLDS if 0 < steps < ENOUGH_STEPS else FOLDS


def _trained_on_folds(steps: int, folds: int) -> int:
    """Return the steps of a training and of those without a fold each, as much shorter as images are fewer."""
    return steps + folds * round(steps * (folds - 1) / max(1, folds))


def _requested_steps(request: TrainRequest, counts: Counts) -> int | None:
    """Return the steps that were asked for, outright or in epochs."""
    return request.steps if request.epochs is None else request.epochs * -(-counts.train // request.batch_size)


# --- the studies of a call --------------------------------------------------------------------------------------------


def study_of(
    request: TrainRequest,
    name: str,
    images: LabelledSet,
    forecast: Forecast,
    trials: Mapping[int, Regression] | None = None,
    spent_s: float = 0.0,
) -> tuple[StudyConfig, str]:
    """Return the study, and a line that says what was chosen.

    A fifth of the images validates, a fifth tests, at most 500 and 2,000. Where the folder has its own test split, a
    fifth of the others validates.

    Args:
        request: of the command, or in Python.
        name: of the study.
        images: of the request, see `open_images`.
        forecast: of what runs on them take.
        trials: regressions by size, by which the size is chosen.
        spent_s: of the minutes.

    Raises:
        UserError: if the time is too short, or what was asked for does not fit.
    """
    counts = count_images(request, images.index)
    forecast = forecast.now(counts, spent_s, trials)
    chosen = forecast.most_promising(trials, images.side) if trials else forecast.largest_size()
    image_size = request.image_size or chosen
    shape = describe(forecast.backbone, image_size)
    steps = _requested_steps(request, counts) or forecast.most_steps(shape)
    experiment = experiment_for(request, counts, shape, steps, forecast.compute)
    if trials and image_size in trials:  # more images tell the penalty than those that validate
        experiment["training"]["probe_l2"] = trials[image_size].l2
    study = _study(request, name, _data(request, images, image_size) | forecast.tested(shape), experiment)
    return study, f"{forecast.line(shape, image_size, steps)}{forecast.test_line(shape)}"


def regression_at(
    request: TrainRequest,
    name: str,
    images: LabelledSet,
    forecast: Forecast,
    image_size: int,
    compute: Compute = "float",
    l2: float | None = None,
) -> StudyConfig:
    """Return the study of a regression on frozen features of the same images, with a penalty if one is known.

    It reads as many test images as `Forecast.tested` says.
    """
    plain = request.model_copy(update={"method": "linear"})
    shape = describe(named_backbone(request.model, request.weights), image_size)
    experiment = experiment_for(plain, count_images(request, images.index), shape, 0, compute)
    experiment["training"]["probe_l2"] = l2
    return _study(plain, name, _data(request, images, image_size) | forecast.tested(shape), experiment)


def fold_study(request: TrainRequest, images: LabelledSet, record: RunRecord) -> StudyConfig:
    """Return the study that trains as a run did, without a fold of its images, and tests on that, each fold in turn.

    Steps are as many fewer as images are. Each chooses its own penalty: the run's was chosen on what the fold tests.

    Args:
        request: as for `study_of`.
        images: of the request.
        record: of the run, for which nothing validated.
    """
    spec = record.spec
    if spec.experiment.is_probe:
        request = request.model_copy(update={"method": "linear"})
    index = images.index
    train = make_splits(index, spec.data, spec.seed).train
    folds = min(_folds_beside(spec.experiment.training.steps or 0), len(np.unique(index.groups[train])))
    counts = Counts(len(train) - len(train) // folds, 0, len(train) // folds)
    steps = max(1, round((spec.experiment.training.steps or 0) * (folds - 1) / folds))
    shape = describe(named_backbone(request.model, request.weights), spec.data.image_size)
    experiment = experiment_for(request, counts, shape, steps, spec.experiment.training.decided_compute)
    study = _study(request, FOLDS_STUDY, _data(request, images, spec.data.image_size) | {"folds": folds}, experiment)
    measures = study.measures.model_copy(update={"features": False})
    return study.model_copy(update={"seeds": tuple(range(folds)), "measures": measures})


def experiment_for(
    request: TrainRequest, counts: Counts, shape: BackboneShape, steps: int, compute: Compute = "float"
) -> dict[str, Any]:
    """Return an experiment as a configuration holds it, with the defaults of `train` for what was not asked for."""
    training: dict[str, Any] = {"batch_size": request.batch_size, "compute": compute, "metric": request.metric}
    training["class_weights"] = request.class_weights
    method, budget = METHODS[request.method], request.budget
    options = TrainOptions(
        rank=request.rank,
        budget=None if budget is None else budget.number,
        budget_unit="ranks" if budget is None else budget.unit,
        steps=steps,
        shape=shape,
        adapter_bytes=None if request.adapter_bytes is None else bytes_of(request.adapter_bytes),
        bits=type_of_bits(request.bits or "4"),
    )
    if not request.is_probe:
        rate = method.learning_rate_for(options) if request.learning_rate is None else request.learning_rate
        head_start = "probe" if request.init_adapter is None else "random"  # an adapter brings its head
        training |= {"learning_rate": rate, "head_start": head_start, "micro_batch_size": request.micro_batch_size}
        training |= {"label_smoothing": LABEL_SMOOTHING, "loss": request.loss}
        limits = {"activation_checkpointing": request.activation_checkpointing, "memory_limit": request.memory_limit}
        training |= {name: value for name, value in limits.items() if value is not None}
        if request.epochs is not None:
            training["epochs"] = request.epochs
            training |= {"keep": "last"} if counts.validation else {}
        elif not counts.validation:
            training |= {"steps": steps, "schedule": "warmup_stable_decay"}
        else:
            every = min(validate_every(counts.validation, request.batch_size), steps)
            schedule = {"schedule": "warmup_stable_decay", "patience": max(5, -(-_PATIENCE_STEPS // every))}
            training |= {"steps": steps, "validate_every": every, "keep": "last", **schedule}
    adapter = request.init_adapter
    sections = method.defaults(options) if adapter is None else {"lora": {"start": str(adapter)}}
    return {"name": request.experiment, "method": request.method, "training": training, **sections}


def _data(request: TrainRequest, images: LabelledSet, image_size: int) -> dict[str, Any]:
    """Return a section `data`."""
    counts, own = count_images(request, images.index), images.index.official_test
    data = images.data(image_size) | {"validation_images": counts.validation}
    data["test_images"] = counts.test if own is None else request.test_images
    if request.task is not None or images.task is not TASKS[USUAL_TASK]:  # also of made-up images
        data["task"] = images.task.name
    if request.shots is not None:
        data |= {"shots_per_class": request.shots, "train_subset": "per_seed"}
    return data


def _study(request: TrainRequest, name: str, data: dict[str, Any], experiment: dict[str, Any]) -> StudyConfig:
    if not TASKS[data.get("task", USUAL_TASK)].smooths:
        experiment["training"].pop("label_smoothing", None)
    mapping = {
        "name": name,
        "seeds": [request.seed],
        "threads": request.threads or cpu_count(),
        "precision": request.precision,
        "device": request.device,
        "backbone": named_backbone(request.model, request.weights).model_dump(exclude_unset=True),
        "data": data,
        "experiments": [experiment],
        "measures": {"features": True, "logits": data["validation_images"] == 0},
    }
    return study_from_mapping(mapping, file=request.images)
