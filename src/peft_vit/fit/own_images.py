"""A study of one run on somebody's own folder of images, with what was not said chosen after images and time."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from peft_vit.base.console import OnProgress, duration
from peft_vit.base.errors import UserError
from peft_vit.base.files import write_whole
from peft_vit.core.adapters.footprint import available_memory_bytes
from peft_vit.core.adapters.peft_format import peft_sha256
from peft_vit.core.backbones import (
    BackboneShape,
    architecture_of,
    check_weights,
    describe,
    interpolation_of,
    native_size,
    size_step_of,
    source_of,
)
from peft_vit.core.config import (
    LABEL_SMOOTHING,
    USUAL_TASK,
    BackboneConfig,
    Compute,
    StudyConfig,
    bytes_of,
    named_backbone,
    study_from_mapping,
    type_of_bits,
)
from peft_vit.core.methods import METHODS, TrainOptions
from peft_vit.core.tasks import TASKS, expected_gain
from peft_vit.data import (
    ImageIndex,
    ImagesFile,
    PixelStore,
    existing,
    find_images,
    images_file,
    index_inspected,
    inspect_images,
    make_splits,
    open_index,
)
from peft_vit.fit.image_sizes import on_new_images, sizes_to_try
from peft_vit.fit.request import TrainRequest
from peft_vit.runs.costs.estimate import Throughput, kept_values, product_rates
from peft_vit.runs.costs.time_limit import ENOUGH_STEPS, FEWEST_FOLDS, FOLDS, fit, images_to_test, validate_every
from peft_vit.runs.machine import choose_precision, cpu_count, resolve_device
from peft_vit.runs.records.storage import FOLDS_STUDY

if TYPE_CHECKING:
    from peft_vit.core.records import RunRecord, RunSpec
    from peft_vit.fit.image_sizes import SizeTrial

_MOST_VALIDATION, _MOST_TEST = 500, 2000  # images, however many there are
_FEWEST_TEST = 2
# Steps without a gain: a few hundred validation images scatter by some points from one validation to the next, so 50
# steps end before LoRA has learned what it can (seen in a pilot on Fashion-MNIST).
_PATIENCE_STEPS = 150
_LEAST_STEPS, _WISHED_STEPS, _MOST_STEPS, _STEPS_APART = 20, 200, 1000, 10
_SIDES = (4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)  # patches a side that are tried, below the model's own
_WORTH_A_LINE_S = 30
_WITHIN = 1.05  # times the minutes: what is chosen here is rounded
_TEST_PASSES = 2  # of an image: of the regression and of the model, or for features and for what is unlike them
_SHARE_OF_SIZES = 0.2  # of the minutes, for regressions at several sizes
_FASTER, _SLOWER = 0.5, 2.0  # than foreseen, as far as a few regressions are believed
FEWEST_VALIDATION = 30  # images; where fewer would validate, all are trained on, and folds tell how good the model is
_MEMORY_SHARE = 0.5  # of what is free, for what a step keeps


@dataclass(frozen=True)
class Counts:
    """Images that are trained on, and read to validate and to test.

    Fewer than `FEWEST_VALIDATION` would tell too little: then none validates, all are trained on, and further trainings
    without a fold of them each tell how good the model is, see `fold_study`.
    """

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class OwnImages:
    """A person's images after they were inspected.

    Attributes:
        index: of those that are used.
        content: of the file that says which these are.
        side: the median of their shorter sides, pixels.
        dataset: how a configuration calls their kind.
        path: likewise, of the folder, zip or table.
        expected_s: what a regression takes at the image sizes that are to be tried, rising; empty if none are.
        forecast: of what runs on them take.
        lines: what to know of them.
        store: holds what was decoded.
    """

    index: ImageIndex
    content: ImagesFile
    side: float
    dataset: str
    path: Path
    expected_s: dict[int, float]
    forecast: Forecast
    lines: list[str]
    store: PixelStore

    def write(self, file: Path) -> None:
        """Write the file that a study names as `data.images_file`."""
        write_whole(file, self.content.model_dump_json(indent=1).encode())

    def keep_pixels(self, study: StudyConfig, *, test: bool = True) -> None:
        """Put what was decoded where the study's runs find it; test images, if they are read."""
        index = open_index(study.data)
        splits = make_splits(index, study.data, study.seeds[0])
        self.store.hand_over(index, splits if test else replace(splits, test=splits.test[:0]))


@contextmanager
def open_images(request: TrainRequest, on_progress: Callable[[int, int], None] | None = None) -> Iterator[OwnImages]:
    """Find somebody's images, choose their size, and decode each once; what can't be read is left out.

    Args:
        request: of the command, or in Python.
        on_progress: gets how many images are decoded, and of how many.

    Raises:
        UserError: see `find_images` and `inspect_images`.
    """
    images = find_images(existing(str(request.images)), request.task)
    files = images.files
    own = None if files.is_test is None else sum(files.is_test)
    forecast = Forecast(request, _share(request, *files.read(), own))
    expected_s = forecast.sizes_in_time()
    sizes = list(expected_s) or [request.image_size or forecast.largest_size()]
    interpolation = interpolation_of(architecture_of(_backbone(request)))
    with PixelStore([] if request.smoke else sizes, interpolation) as store:
        least = 3 if own is None else 2  # of which the splits leave each class one to train on
        inspection = inspect_images(images, least=least, strict=request.strict, store=store, on_progress=on_progress)
        content = ImagesFile.model_validate_json(json.dumps(images_file(inspection, seed=None)))
        lines = [line for line in (images.taken, *inspection.remarks()) if line is not None]
        index = index_inspected(images, content, request.images)
        forecast = forecast.now(count_images(request, index))
        side = inspection.shorter_side
        yield OwnImages(index, content, side, images.dataset, images.path, expected_s, forecast, lines, store)


def named_files(request: TrainRequest) -> dict[str, str]:
    """Return the SHA-256 of the weights and of the adapter that a request names by a path, by how it does.

    Raises:
        UserError: if they can't be read.
    """
    files, backbone = {}, _backbone(request)
    if backbone.weights == "file" and not request.smoke:
        option = "model" if request.weights in (None, "file") else "weights"
        with _typed(request.option(option).name):
            hashes = check_weights(backbone), architecture_of(backbone).config_sha256
        files[request.spelled(option, getattr(request, option))] = " ".join(filter(None, hashes))
    if request.init_adapter is not None:
        with _typed("--init-adapter"):
            files[request.spelled("init_adapter", request.init_adapter)] = peft_sha256(request.init_adapter)
    return files


@contextmanager
def _typed(option: str) -> Iterator[None]:
    """Name the option that was typed in errors of a file that it names."""
    try:
        yield
    except UserError as error:
        raise error.about(option) from None


def with_weights(request: TrainRequest) -> tuple[TrainRequest, str]:
    """Return a request that names where the weights are from, and a line on it; see `source_of`."""
    backbone = _backbone(request)
    if request.weights is not None or backbone.library != "timm":
        return request, ""
    source, line = source_of(backbone.model)
    return request.model_copy(update={"weights": source}), line


def regressions(
    request: TrainRequest,
    images: OwnImages,
    file: Path,
    log: Callable[[str], None],
    on_progress: OnProgress | None = None,
) -> list[SizeTrial]:
    """Return what a regression on frozen features has at the image sizes that fit a fifth of the minutes.

    Empty where nothing is to be chosen by images.

    Args:
        request: as for `study_of`.
        images: of the request.
        file: where it was written which of them are used.
        log: gets a line each size.
        on_progress: see `try_sizes`.

    Raises:
        UserError: if the model's weights can't be loaded.
    """
    if not images.expected_s:
        return []
    from peft_vit.fit.image_sizes import try_sizes
    from peft_vit.runs.scheduling.plan import plan_study

    images.keep_pixels(regression_at(request, "sizes", images, file, min(images.expected_s)), test=False)

    def spec_of(size: int) -> RunSpec:
        study = regression_at(request, "sizes", images, file, size, images.forecast.compute)
        return plan_study(study, request.output, file=None).runs[0].spec

    return try_sizes(spec_of, images.expected_s, 60 * request.minutes * _SHARE_OF_SIZES, log, on_progress)


def regression_at(
    request: TrainRequest,
    name: str,
    images: OwnImages,
    file: Path,
    image_size: int,
    compute: Compute = "float",
    l2: float | None = None,
) -> StudyConfig:
    """Return the study of a regression on frozen features of the same images, with a penalty if one is known.

    It reads as many test images as `Forecast.tested` says.
    """
    counts = count_images(request, images.index)
    plain = request.model_copy(update={"method": "linear"})
    shape = describe(_backbone(request), image_size)
    experiment = experiment_for(plain, counts, shape, 0, compute)
    experiment["training"]["probe_l2"] = l2
    data = _data(request, images, file, image_size) | images.forecast.tested(shape)
    return _study(plain, name, data, experiment)


def study_of(
    request: TrainRequest,
    name: str,
    images: OwnImages,
    file: Path,
    trials: Sequence[SizeTrial] = (),
    spent_s: float = 0.0,
) -> tuple[StudyConfig, str]:
    """Return the study, and a line that says what was chosen.

    A fifth of the images validates, a fifth tests, at most 500 and 2,000. Where the folder has its own test split, a
    fifth of the others validates.

    Args:
        request: of the command, or in Python.
        name: of the study.
        images: of the request, see `open_images`.
        file: where it was written which of them are used.
        trials: see `regressions`; the size is chosen by them.
        spent_s: of the minutes.

    Raises:
        UserError: if the time is too short, or what was asked for does not fit.
    """
    counts = count_images(request, images.index)
    forecast = images.forecast.now(counts, spent_s, trials)
    chosen = forecast.most_promising(trials, images.side) if trials else forecast.largest_size()
    image_size = request.image_size or chosen
    shape = describe(forecast.backbone, image_size)
    steps = _requested_steps(request, counts) or forecast.most_steps(shape)
    experiment = experiment_for(request, counts, shape, steps, forecast.compute)
    for trial in trials:
        if trial.image_size == image_size:  # more images tell the penalty than those that validate
            experiment["training"]["probe_l2"] = trial.l2
    data = _data(request, images, file, image_size) | forecast.tested(shape)
    study = _study(request, name, data, experiment)
    return study, f"{forecast.line(shape, image_size, steps)}{forecast.test_line(shape)}"


def fold_study(request: TrainRequest, images: OwnImages, file: Path, record: RunRecord) -> StudyConfig:
    """Return the study that trains as a run did, without a fold of its images, and tests on that, each fold in turn.

    Steps are as many fewer as images are. Each chooses its own penalty: the run's was chosen on what the fold tests.

    Args:
        request: as for `study_of`.
        images: of the request.
        file: where it was written which of them are used.
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
    shape = describe(_backbone(request), spec.data.image_size)
    experiment = experiment_for(request, counts, shape, steps, spec.experiment.training.decided_compute)
    data = _data(request, images, file, spec.data.image_size) | {"folds": folds}
    study = _study(request, FOLDS_STUDY, data, experiment)
    measures = study.measures.model_copy(update={"features": False})
    return study.model_copy(update={"seeds": tuple(range(folds)), "measures": measures})


def refuse_among_images(folder: Path, output: Path) -> None:
    """Refuse an output in a folder of images.

    Raises:
        UserError: naming it.
    """
    place, images = (Path(os.path.realpath(os.path.expanduser(path))) for path in (output, folder))
    if place == images or images in place.parents:
        reason = f"lies in {folder}, among your images; choose a folder elsewhere"
        raise UserError(reason, file=output, field="--output")


def count_images(request: TrainRequest, index: ImageIndex) -> Counts:
    """Return how a folder's images are shared out."""
    own = None if index.official_test is None else int(index.official_test.sum())
    return _share(request, index.class_names, index.labels, own)


def _share(request: TrainRequest, names: Sequence[str], labels: np.ndarray, own: int | None) -> Counts:
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
        self.backbone = _backbone(request)
        self._device = resolve_device(request.device)

    def now(self, counts: Counts, spent_s: float = 0.0, trials: Sequence[SizeTrial] = ()) -> Self:
        """Return the same machine's forecast for so many images, with so much less of the minutes, at a trial's pace.

        The trial of the largest size says the most: a small one is over before the machine has shown its pace.
        """
        forecast = copy.copy(self)
        forecast.counts, forecast.limit_s = counts, self.limit_s - spent_s
        paces = [trial.pace for trial in trials if trial.pace is not None]
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
        architecture = architecture_of(self.backbone)
        patch, native = size_step_of(architecture), native_size(architecture)
        wished = _requested_steps(self.request, self.counts) or _WISHED_STEPS
        steps = 0 if self.request.is_probe else wished

        def seconds(size: int) -> float:
            shape = describe(self.backbone, size)
            return self.seconds(shape, steps) if self._fits_memory(shape) else math.inf

        sizes = sorted({native, *(side * patch for side in _SIDES if side * patch < native)}, reverse=True)
        return fit(sizes, seconds, self.limit_s) or sizes[-1]

    def most_promising(self, trials: Sequence[SizeTrial], side: float) -> int:
        """Return the size where a regression, and what training adds to it in the steps that fit, promise most.

        Few images tell little of sizes, see `on_new_images`; larger ones leave fewer steps, see `expected_gain`.

        Args:
            trials: a regression a size.
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

        values = {trial.image_size: trial.value for trial in trials}
        told = on_new_images(values, trials[0].images, side)
        return max(told, key=lambda size: told[size] + gain(size))  # of equal ones, also where none fits, the smallest

    def _fits_memory(self, shape: BackboneShape) -> bool:
        at_once = self.request.micro_batch_size or (1 if self.request.memory_limit else self.request.batch_size)
        room = available_memory_bytes()
        if self.request.memory_limit is not None:
            room = min(room, bytes_of(self.request.memory_limit))
        return 4 * at_once * kept_values(shape, self._recomputed(shape)) <= _MEMORY_SHARE * room

    def _steps_in_time(self, shape: BackboneShape) -> int | None:
        options = range(_MOST_STEPS, _LEAST_STEPS - 1, -_STEPS_APART)
        return fit(options, lambda some: self.seconds(shape, some), self.limit_s)

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


def _data(request: TrainRequest, images: OwnImages, file: Path, image_size: int) -> dict[str, Any]:
    """Return a section `data`."""
    counts, own = count_images(request, images.index), images.index.official_test
    data = {"dataset": images.dataset, "path": str(images.path), "images_file": str(file), "image_size": image_size}
    data |= {"validation_images": counts.validation, "test_images": counts.test if own is None else request.test_images}
    if request.task is not None or images.index.task is not TASKS[USUAL_TASK]:  # also of made-up images
        data["task"] = images.index.task.name
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
        "backbone": _backbone(request).model_dump(exclude_unset=True),
        "data": data,
        "experiments": [experiment],
        "measures": {"features": True, "logits": data["validation_images"] == 0},
    }
    return study_from_mapping(mapping, file=request.images)


def _backbone(request: TrainRequest) -> BackboneConfig:
    return named_backbone(request.model, request.weights)
