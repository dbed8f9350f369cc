"""From a finished run's folder to files that run elsewhere.

A float run's weights may become fewer bits on the way: its adapters are merged, then the matrices of its blocks become
packed ones (post-training quantization).
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from peft_vit.base.console import OnProgress, no_progress
from peft_vit.base.errors import UserError, os_fault
from peft_vit.base.extras import require_extra
from peft_vit.base.files import refuse_existing, whole_folder
from peft_vit.base.statistics import Interval, Neighbours
from peft_vit.core.adapters import AdaptedLinear, packed_weights
from peft_vit.core.adapters.footprint import storage_bytes
from peft_vit.core.adapters.peft_format import export_peft
from peft_vit.core.backbones import Backbone, fused_sites
from peft_vit.core.config import (
    BITS_OF_TYPE,
    CARD_FILE,
    EXPORTS,
    IMAGES_ROUNDED_BY,
    PEFT_FILE,
    ExportFormat,
    QaLoraConfig,
    QuantizationType,
    Rounding,
)
from peft_vit.core.methods import METHODS
from peft_vit.core.methods.quantized import packing_of
from peft_vit.core.records import Calibrated, Decision, RunRecord, RunSpec
from peft_vit.core.tasks import TASKS, DecidingMetric, Labels, meaning_fields, metric_of, rows_of, thresholds_of
from peft_vit.core.training import Calibration, RuntimeConfig
from peft_vit.core.training.images import Data, LabelledImages
from peft_vit.core.training.metrics import predict_with_middle
from peft_vit.core.training.quantized_layers import QuantizedLayer, format_of
from peft_vit.core.training.quantized_layers import packed_weights as rounded_weights
from peft_vit.deploy import (
    Classifier,
    ExportMetadata,
    Merged,
    OnnxRuntime,
    export_onnx,
    merge,
    open_exported,
    torch_classifier,
    writer_of,
)
from peft_vit.deploy.formats.header import FloatArray, write_exported
from peft_vit.deploy.restore import RestoredRun, finished_record, restore_run
from peft_vit.runs.measures.held_out import PRIOR, Outputs, fit_neighbours, reference_images
from peft_vit.runs.measures.neighbours import neighbours_bytes
from peft_vit.runs.records.storage import FEATURES_FILE, FOLDS_STUDY, RECORD_FILE, read_record, single_run

_COMPARED_AT_ONCE = 32
_COMPARED_WITH = 128  # training images, where the run validated on none
_ELSEWHERE = "choose another place"
LARGEST_LOSS = 0.5  # points that activations in 8 bits may lose where nothing else is said

Split: TypeAlias = Literal["validation", "training", "test", "held-out"]


@dataclass(frozen=True)
class Comparison:
    """An exported file, opened again, against the run's model as it was trained; both in float32."""

    images: int
    split: Split  # of the run, that they are of
    same_predictions: float  # share
    logit_error: float  # largest difference over the largest magnitude
    metric: DecidingMetric  # by which they are compared: what decides in the run
    trained: float  # its value
    exported: float
    loss: Interval  # how much worse the latter is; of the population of images
    unit: float  # of a loss that is counted in points: 1, or a standard deviation of the numbers

    @property
    def lost_points(self) -> float:
        """Return the loss in hundredths of its unit."""
        return 100 * self.loss.estimate / self.unit

    def values_text(self) -> str:
        """Return the metric before and after."""
        if self.metric.is_share:
            return f"{self.metric.words} {100 * self.trained:.2f} % before and {100 * self.exported:.2f} % after"
        return f"{self.metric.words} {self.trained:.4g} before and {self.exported:.4g} after"

    def loss_text(self) -> str:
        """Return what it lost or gained, in points, with the interval of the loss."""

        def hundredths(share: float) -> str:
            return f"{round(100 * share / self.unit, 2) + 0.0:.2f}"  # + 0.0: of -0.0 too it is 0.0

        loss, points = self.loss, "points of" if self.unit == 1 else "hundredths of a standard deviation in"
        interval = f"no interval: {loss.reason}"
        if loss.low is not None and loss.high is not None:
            other = f"a loss of {hundredths(loss.low)} to {hundredths(loss.high)}"
            interval = f"on other images {other}, {100 * loss.confidence:.0f} % interval"
        size, way = hundredths(abs(loss.estimate)), "gained" if loss.estimate < 0 else "lost"
        return f"{way} {size} {points} {self.metric.words} on {loss.n} {self.split} images ({interval})"


@dataclass(frozen=True)
class ModelToWrite:
    """A run's model as files hold it, and what it is compared with."""

    run: RestoredRun
    merged: Merged
    card: ExportMetadata
    reference: Neighbours | None  # features of training images, of this model; None: nothing says what is unlike them
    data: Data | None  # the run's images; None: they are not there
    missing: str  # why
    float_bytes: int | None = None  # of the merged model, where it was packed after training

    def need_data(self, field: str, lossy: str) -> Data:
        """Return the run's images; raises UserError if they are not there."""
        if self.data is None:
            message = f"needs the run's images to measure what {lossy} loses, and they are not there: {self.missing}"
            raise UserError(message, field=field)
        return self.data


@dataclass(frozen=True)
class Exported:
    """What an export did."""

    source: ModelToWrite
    comparison: Comparison | None  # None: the run's images are not there
    activations: Literal["float32", "int8"]
    on_folds: Comparison | None = None  # what bits lose, where nothing validated; None: it isn't known


@dataclass(frozen=True)
class OnnxOptions:
    """How an ONNX file multiplies; None: not requested.

    Attributes:
        runtime: see `deployment.export_onnx`; None: small.
        activations: int8: frozen layers multiply 8-bit integers, as `training.compute: int8` does.
        accept_loss: the most points on the validation images that int8 may lose; None: LARGEST_LOSS.
    """

    runtime: OnnxRuntime | None = None
    activations: Literal["int8"] | None = None
    accept_loss: float | None = None


def export_run_to_peft(run_dir: Path, output_dir: Path, *, overwrite: bool = False) -> ExportMetadata:
    """Write a run's adapter and head in PEFT's format, with peft_vit.json beside them, and return what that holds.

    Args:
        run_dir: holds record.json and adapter.safetensors.
        output_dir: new or empty.
        overwrite: replace an earlier export.

    Raises:
        UserError: if the run can't be restored, its method has no PEFT counterpart, or something is in the way.
    """
    _check_room(output_dir, None, overwrite)
    if why := METHODS[finished_record(run_dir).spec.experiment.method].why_not_peft:
        raise UserError(
            f"{why}; use --format safetensors, onnx or openvino, or export a run of lora, adalora or linear, or "
            "of PEFT's methods",
            file=run_dir,
        )
    run = restore_run(run_dir)
    with os_fault("can't be written", output_dir, remedy=_ELSEWHERE), whole_folder(output_dir) as made:
        export_peft(run.model, made, run.card.model_dump(mode="json"))
        if run.reference is not None:
            write_exported(made / FEATURES_FILE, neighbours_bytes(run.reference))
    return run.card


def _check_room(output: Path, kind: ExportFormat | None, overwrite: bool) -> None:
    """Refuse to write over what is there; None: PEFT's folder."""
    is_folder = kind is None or not kind.ending
    marks = (CARD_FILE, PEFT_FILE) if is_folder else ()
    for place in (output, *(output.with_suffix(ending) for ending in (kind.beside if kind else ()))):
        refuse_existing(place, is_folder=is_folder, overwrite=overwrite, marks=marks)


def export_run_to_file(
    run_dir: Path,
    file: Path,
    format: str,
    options: OnnxOptions = OnnxOptions(),
    *,
    bits: QuantizationType | None = None,
    rounding: Rounding | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = no_progress,
) -> Exported:
    """Merge a run's adapters, write the model, and compare what was written with the model.

    They are compared on the run's validation images; on training images, where it validated on none: these don't tell
    what bits lose, and images that trainings on folds have left out do. Where float weights are packed, validation
    images also tell again how far probabilities can be believed.

    Args:
        run_dir: holds record.json and adapter.safetensors.
        file: ends as the format says; of pretrained a folder, new or empty.
        format: of EXPORTS.
        options: of onnx.
        bits: the type in which the float weights of the blocks are packed; None: they stay as they are.
        rounding: of these, see `logits_by_type`.
        overwrite: replace what is there; of a folder only of an earlier export.
        on_progress: gets how far it is.

    Raises:
        UserError: if something is in the way, the run can't be restored, an option has no effect on it, activations in
            8 bits lose too much or its images are not there to tell what bits lose, or the file can't be written.
    """
    kind = EXPORTS[format]
    if kind.ending and file.suffix != kind.ending:
        raise UserError(f"expected a name that ends in {kind.ending}", file=file, field="--output")
    _check_room(file, kind, overwrite)
    if kind.extra is not None:
        require_extra(kind.extra, f"--format {format}")
    source = model_to_write(run_dir, bits, rounding, options.runtime, on_progress)
    on_progress(0, 0, "writing the file, and comparing it with the run's model")
    done = write_model(source, file, format, options)
    if bits is None or done.comparison is None or done.comparison.split != "training":
        return done
    folder = single_run(run_dir).absolute()
    return replace(done, on_folds=_compare_on_folds(source.run, folder, bits, rounding, on_progress))


def model_to_write(
    run_dir: Path,
    bits: QuantizationType | None = None,
    rounding: Rounding | None = None,
    runtime: OnnxRuntime | None = None,
    on_progress: OnProgress = no_progress,
) -> ModelToWrite:
    """Restore a run, merge its adapters, and pack its float weights where that is asked for.

    Raises:
        UserError: if the run can't be restored, has nothing packed that a runtime could run, or its images are not
            there to tell what bits lose.
    """
    run = restore_run(run_dir)
    if runtime is not None and bits is None and not packed_weights(run.model):
        reason = f"has no effect on this run, whose weights are floats: {run_dir}; leave it out"
        raise UserError(reason, field="--runtime")
    merged = merge(run.model, run.card) if bits is None else merge_float(run)
    data, missing = None, ""
    try:
        data = run.load_data()
    except UserError as error:
        missing = str(error.about(None))  # not of a key that nobody wrote
    source = ModelToWrite(run, merged, run.card, run.reference, data, missing)
    if bits is None:
        return source
    images = source.need_data("--bits", bits)
    model, card, reference = pack_after_training(merged.model, run, images, bits, rounding, on_progress)
    float_bytes = storage_bytes(merged.model.state_dict().values())
    return replace(source, merged=replace(merged, model=model), card=card, reference=reference, float_bytes=float_bytes)


def write_model(
    source: ModelToWrite, file: Path, format: str, options: OnnxOptions, meaning: Calibrated | Decision | None = None
) -> Exported:
    """Write a model, see `export_run_to_file`, which checks that there is room for it; the source stays as it is."""
    model, card, comparison = source.merged.model, source.card, None
    if meaning is not None:
        card = card.model_copy(update=meaning_fields(meaning))
    if options.activations is not None:
        comparison = _write_int8(source, file, card, options)
    else:
        write = writer_of(format) if options.runtime is None else partial(export_onnx, runtime=options.runtime)
        if EXPORTS[format].ending:
            write(model, file, card, source.reference)
        else:
            with os_fault("can't be written", file, remedy=_ELSEWHERE), whole_folder(file) as made:
                write(model, made, card, source.reference)
        if source.data is not None:
            comparison = compare(source.run, open_exported(file), *images_to_compare(source.data))
    return Exported(source, comparison, options.activations or "float32")


def _write_int8(source: ModelToWrite, file: Path, card: ExportMetadata, options: OnnxOptions) -> Comparison:
    """Write a model that multiplies in 8 bits, only if it is as accurate as it has to be."""
    images, split = images_to_compare(source.need_data("--activations", "int8"))
    if split == "training" and options.accept_loss is None:
        raise UserError(
            "this run has no validation images to measure what int8 loses; export without it, or accept a loss "
            "on training images with --accept-loss",
            field="--activations",
        )
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "model.onnx"
        export_onnx(source.merged.model, trial, card, activations="int8", reference=source.reference)
        comparison, content = compare(source.run, open_exported(trial), images, split), trial.read_bytes()
    accepted = LARGEST_LOSS if options.accept_loss is None else options.accept_loss
    if comparison.lost_points > accepted:
        raise UserError(
            f"int8 {comparison.loss_text()}, more than the {accepted:g} that are accepted; export without it, or "
            f"accept it with --accept-loss {math.ceil(10 * comparison.lost_points) / 10:g}",
            field="--activations",
        )
    write_exported(file, content)
    return comparison


def images_to_compare(data: Data) -> tuple[LabelledImages, Split]:
    """Return a run's validation images, or of its training images some where there are none, and which they are."""
    if len(data.validation):
        return data.validation, "validation"
    places = np.linspace(0, len(data.train) - 1, min(len(data.train), _COMPARED_WITH))
    return data.train.chosen(places.round().astype(int)), "training"


def compare(run: RestoredRun, exported: Classifier, images: LabelledImages, split: Split) -> Comparison:
    """Return how far a classifier's outputs are from those of a run's model, on labelled images of the run's split."""
    trained = torch_classifier(run.model, run.card)
    outputs: list[tuple[Labels, ...]] = []  # (B, K) of both, and labels (B, ...)
    for batch, labels in images.ordered_batches(_COMPARED_AT_ONCE, run.card.mean, run.card.std):
        pixels = batch.numpy()
        outputs.append((trained.logits(pixels), exported.logits(pixels), labels.numpy()))
    was, now, truth = map(np.concatenate, zip(*outputs, strict=True))
    return _compared(run, was, now, truth, exported.card.decision, split)


def fold_records(run_dir: Path, spec: RunSpec, studies: Sequence[Path] = ()) -> Iterator[tuple[Path, RunRecord]]:
    """Yield records of trainings like a run's without a fold of its images each, with their logits on that fold.

    Args:
        run_dir: of the run.
        spec: of it.
        studies: where to look, beside the run's own place.
    """
    images = {"image_size", "images_file", "path"}
    # Beside a call's first run; one folder above its linear probe, which is a study of its own.
    places = (*run_dir.parents[1:3], *studies)
    of_folds = f"{FOLDS_STUDY}*/{spec.experiment.name}/*/{RECORD_FILE}"
    for file in sorted(file for place in places for file in place.glob(of_folds)):
        record = read_record(file)
        alike = record.spec.data.model_dump(include=images) == spec.data.model_dump(include=images)
        done = alike and record.spec.data.folds is not None and record.status == "done"
        if done and record.predictions is not None and record.predictions.logits is not None:
            yield file, record


def _compare_on_folds(
    run: RestoredRun, run_dir: Path, bits: QuantizationType, rounding: Rounding | None, on_progress: OnProgress
) -> Comparison | None:
    """Return what bits lose of models that were trained like a run without a fold of its images each, on that fold.

    None: there are none, as `train` makes them where nothing validates.
    """
    task, parts = TASKS[run.card.task].restored(run.card.decision), []
    folds = list(fold_records(run_dir, run.record.spec))
    for number, (file, record) in enumerate(folds):
        on_progress(number, len(folds), "rounding the models of folds")
        assert record.predictions is not None
        fold_task = TASKS[record.spec.task].restored(record.decision)
        pair = np.asarray(record.predictions.logits), logits_by_type(file.parent, [bits], rounding)[bits]
        parts.append((*(task.aligned(one, fold_task) for one in pair), rows_of(record.predictions.labels)))
    if not parts:
        return None
    was, now, labels = map(np.concatenate, zip(*parts, strict=True))
    return _compared(run, was, now, labels, run.card.decision, "held-out")


def _compared(
    run: RestoredRun, was: Labels, now: Labels, labels: Labels, decision_now: Decision | None, split: Split
) -> Comparison:
    """Return how far outputs of a run's model, (N, K), are from what they were."""
    decision = run.card.decision
    task, metric = TASKS[run.card.task], metric_of(run.record.spec)
    before, after = task.predicted(was, decision), task.predicted(now, decision_now)
    thresholds = thresholds_of(decision), thresholds_of(decision_now)
    values = [metric.interval(labels, *outputs).estimate for outputs in zip((before, after), thresholds, strict=True)]
    return Comparison(
        images=len(labels),
        split=split,
        same_predictions=float(task.same(was, now, decision, decision_now).mean()),
        logit_error=float(np.abs(now - was).max() / np.abs(was).max()),
        metric=metric,
        trained=values[0],
        exported=values[1],
        loss=metric.loss(labels, before, after, *thresholds),
        unit=metric.unit(decision),
    )


# --- fewer bits after training ---


def merge_float(run: RestoredRun) -> Merged:
    """Merge a run's adapters into its float weights.

    Raises:
        UserError: if these are packed already.
    """
    merged = merge(run.model, run.card)
    if merged.how != "float":
        types = " and ".join(sorted({weight.format.type for weight in packed_weights(run.model).values()}))
        raise UserError(f"has no effect on this run, whose weights are {types} already; leave it out", field="--bits")
    return merged


def round_weights(
    model: nn.Module,
    type: QuantizationType,
    images: Tensor | None = None,
    offset: bool | None = None,
    on_progress: OnProgress = no_progress,
) -> nn.Module:
    """Return a model whose blocks' matrices are packed; the given one stays as it is.

    Args:
        model: without adapters, its weights in float.
        type: of codes, see `packing_of`.
        images: training images (N, 3, S, S), normalised, by which GPTQ rounds; None: to nearest.
        offset: see `packing_of`.
        on_progress: gets how many matrices are packed.
    """
    model, layers = copy.deepcopy(model), {}
    sites = Backbone.within(model).sites
    for name in fused_sites(sites):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layers[name] = QuantizedLayer(AdaptedLinear(linear), ())
        model.set_submodule(name, layers[name].module)
    formats = dict.fromkeys(layers, format_of(QaLoraConfig(**packing_of(sites, type, offset))))
    rounding: Rounding = "nearest" if images is None else "gptq"
    for done, (name, weight) in enumerate(rounded_weights(model, layers, formats, rounding, images), start=1):
        on_progress(done, len(layers), "rounding matrices")
        layers[name].module.quantized = weight
        layers[name].module.drop_float()  # at once: GPTQ rounds the next layer by what this one makes of the images
    return model.requires_grad_(False).eval()


def images_rounded_by(type: QuantizationType) -> int:
    """Return how many training images GPTQ takes where nothing is said; 0: to nearest.

    In 8 bits nearest loses nothing, in 4 a quarter of the images is nearly as good
    (`calibration/scripts/rounding_images.py`).
    """
    return {8: 0, 4: IMAGES_ROUNDED_BY // 4}.get(BITS_OF_TYPE[type], IMAGES_ROUNDED_BY)


def pack_after_training(
    model: nn.Module,
    run: RestoredRun,
    data: Data,
    type: QuantizationType,
    rounding: Rounding | None,
    on_progress: OnProgress = no_progress,
) -> tuple[nn.Module, ExportMetadata, Neighbours | None]:
    """Return a run's merged float model with packed weights, its card, and what it knows of training images.

    What validation images say, and the features of training images, are those of the rounded model.
    """
    images, card = _images_to_round_by(run, data, type, rounding), run.card
    rounded = round_weights(model, type, images, on_progress=on_progress)
    changes: dict[str, Any] = {}
    reference, middle = None, None
    if len(data.validation):
        meaning = card.meaning
        prior = PRIOR._replace(median=PRIOR.median if meaning is None else meaning.temperature)
        validation = _outputs(rounded, data.validation, card)
        changes = meaning_fields(data.task.meaning(validation.logits, validation.labels, prior))
        middle = validation.middle
    if run.reference is not None:
        train = _outputs(rounded, reference_images(data, run.record.spec.seed), card).middle
        assert train is not None
        reference, changes["unlike"] = fit_neighbours(train, middle)
    return rounded, card.model_copy(update=changes), reference


def logits_by_type(
    run_dir: Path, types: Sequence[QuantizationType], rounding: Rounding | None = None, offset: bool | None = None
) -> dict[QuantizationType, FloatArray]:
    """Return what a float run's model says of its test images, (N, classes), with weights in each type in turn.

    The run is restored and merged once. Where many runs are tested on folds, these are images that none of them was
    trained on and no verdict is kept for.

    Args:
        run_dir: holds record.json and adapter.safetensors.
        types: of codes.
        rounding: nearest; gptq, on IMAGES_ROUNDED_BY images; None: see `images_rounded_by`.
        offset: see `packing_of`.

    Raises:
        UserError: if the run can't be restored, its weights are packed already, or its images are not there.
    """
    run = restore_run(run_dir)
    model, data = merge_float(run).model, run.load_data()
    tested, logits = data.test.open(), {}
    for type in types:
        rounded = round_weights(model, type, _images_to_round_by(run, data, type, rounding), offset)
        logits[type] = _outputs(rounded, tested, run.card).logits
    return logits


def _images_to_round_by(
    run: RestoredRun, data: Data, type: QuantizationType, rounding: Rounding | None
) -> Tensor | None:
    """Return training images for GPTQ; None: to nearest."""
    count = {"nearest": 0, "gptq": IMAGES_ROUNDED_BY, None: images_rounded_by(type)}[rounding]
    runtime = RuntimeConfig(torch.device("cpu"), "fp32", run.card.mean, run.card.std)
    return Calibration(data, runtime, run.record.spec.seed).images(count) if count else None


def _outputs(model: nn.Module, images: LabelledImages, card: ExportMetadata) -> Outputs:
    batches = images.ordered_batches(32, card.mean, card.std)
    return Outputs(*predict_with_middle(model, batches, precision="fp32"))
