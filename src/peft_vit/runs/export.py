"""From a finished run's folder back to its model, and on to files that run elsewhere."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from peft_vit.adapters import adapted_modules, load_trained, read_adapter_file
from peft_vit.adapters.peft_format import attach_fused, export_peft
from peft_vit.adapters.peft_tuner import saved_module_ranks
from peft_vit.backbones import LoadedBackbone, choose_attention, load_run_backbone
from peft_vit.config import ExperimentConfig, QaLoraConfig
from peft_vit.data import DATASETS, LabelledImages, load_data
from peft_vit.deployment import (
    Classifier,
    Merged,
    ModelCard,
    OnnxRuntime,
    check_int8,
    export_onnx,
    export_openvino,
    input_ranges,
    load_pretrained,
    merge,
    open_exported,
    require_onnx_export,
    require_openvino_export,
    save_low_bit,
    save_pretrained,
    torch_classifier,
)
from peft_vit.errors import UserError, agreeing_with
from peft_vit.methods import prepare
from peft_vit.methods.qa_lora import packed_at_once
from peft_vit.records import ADAPTER_FILE, RECORD_FILE, RunRecord, RunSpec, read_record, write_atomically
from peft_vit.safe_io import read_bytes
from peft_vit.statistics import Interval, paired_proportions
from peft_vit.training import Hook

_COMPARED_AT_ONCE = 32
_CALIBRATED_ON = 128  # training images, for the ranges of activations
LARGEST_LOSS = 0.5  # points of accuracy that activations in 8 bits may lose where nothing else is said

FileFormat = Literal["onnx", "openvino", "safetensors", "pretrained"]


# How each is written, and opened again to be compared.
_Write: TypeAlias = Callable[[nn.Module, Path, ModelCard], None]
_WAYS: dict[FileFormat, tuple[_Write, Callable[[Path, ModelCard], Classifier]]] = {
    "onnx": (export_onnx, lambda file, _: open_exported(file)),
    "openvino": (export_openvino, lambda file, _: open_exported(file)),
    "safetensors": (save_low_bit, lambda file, _: open_exported(file)),
    "pretrained": (save_pretrained, lambda folder, card: torch_classifier(load_pretrained(folder, card), card)),
}
_ENDINGS: dict[FileFormat, str] = {"onnx": ".onnx", "openvino": ".xml", "safetensors": ".safetensors"}
_REQUIRE: dict[FileFormat, Callable[[], None]] = {"onnx": require_onnx_export, "openvino": require_openvino_export}


@dataclass(frozen=True)
class RestoredRun:
    """A run's model as it was saved, and what is known of it."""

    record: RunRecord
    backbone: LoadedBackbone
    model: nn.Module  # carries adapters and head at the chosen step; on the CPU, in evaluation mode

    @property
    def card(self) -> ModelCard:
        """Return what an export says of the model."""
        return model_card(self.record.spec, self.backbone, self.record.class_names)


def model_card(spec: RunSpec, backbone: LoadedBackbone, class_names: Sequence[str]) -> ModelCard:
    """Return what an export says of a run's model."""
    return ModelCard(
        run=spec.run_id,
        library=backbone.architecture.library,
        model=backbone.architecture.name,
        config=backbone.architecture.config,
        weights_name=backbone.weights_name,
        weights_sha256=backbone.weights_sha256,
        image_size=spec.data.image_size,
        interpolation=spec.data.interpolation or "bicubic",
        channels=DATASETS[spec.data.dataset].channels,
        mean=backbone.mean,
        std=backbone.std,
        class_names=tuple(class_names),
    )


@dataclass(frozen=True)
class Comparison:
    """An exported file, opened again, against the run's model as it was trained; both in float32."""

    images: int  # of the run's validation split
    same_predictions: float  # share
    logit_error: float  # largest difference over the largest magnitude
    trained_accuracy: float
    exported_accuracy: float
    accuracy_loss: Interval  # how much lower the latter is; of the population of images, see `paired_proportions`


@dataclass(frozen=True)
class Exported:
    """What an export did."""

    merged: Merged
    comparison: Comparison | None  # None: the run's images are not there
    not_compared: str = ""  # why
    activations: Literal["float32", "int8"] = "float32"


@dataclass(frozen=True)
class OnnxOptions:
    """How an ONNX file multiplies by low-bit weights; None is what a user has not asked for.

    Attributes:
        runtime: see `deployment.export_onnx`; None: small.
        activations: int8: both factors in 8 bits; it expands codes as fast does.
        accept_loss: the most points of accuracy on the validation images that int8 may lose; None: LARGEST_LOSS.
    """

    runtime: OnnxRuntime | None = None
    activations: Literal["int8"] | None = None
    accept_loss: float | None = None

    def check(self, format: FileFormat | Literal["peft", "history", "tensorboard"]) -> None:
        """Refuse options that would have no effect.

        Raises:
            UserError: names the option.
        """
        given = {"--runtime": self.runtime, "--activations": self.activations, "--accept-loss": self.accept_loss}
        asked = [option for option, value in given.items() if value is not None]
        if format != "onnx" and asked:
            raise UserError("has an effect only with --format onnx", field=asked[0])
        if self.activations is None and self.accept_loss is not None:
            raise UserError("has an effect only with --activations int8", field="--accept-loss")
        if self.activations is not None and self.runtime == "small":
            raise UserError(
                "expands the codes as --runtime fast does; leave out --runtime small", field="--activations"
            )
        if self.accept_loss is not None and not 0 <= self.accept_loss <= 100:  # also NaN
            raise UserError(f"expected 0 to 100 points, got {self.accept_loss}", field="--accept-loss")


def export_run_to_peft(run_dir: Path, output_dir: Path) -> None:
    """Write a run's adapter and head in PEFT's format, with peft_vit.json beside them.

    Args:
        run_dir: holds record.json and adapter.safetensors.
        output_dir: created; must be empty.

    Raises:
        UserError: if the run can't be restored, or its method has no PEFT counterpart.
    """
    if why := _done_record(run_dir).spec.experiment.kind.why_not_peft:
        raise UserError(
            f"{why}; use --format safetensors, onnx or openvino, or export a run of lora, adalora or linear, or "
            "of PEFT's methods",
            file=run_dir,
        )
    run = restore_run(run_dir)
    export_peft(run.model, output_dir, run.card.model_dump(mode="json"))


def export_run_to_file(run_dir: Path, file: Path, format: FileFormat, options: OnnxOptions = OnnxOptions()) -> Exported:
    """Merge a run's adapters, write the model, and compare what was written with the model.

    Args:
        run_dir: holds record.json and adapter.safetensors.
        file: ends in .onnx, .safetensors or, of openvino, .xml, with a .bin beside it; replaced if it exists. Of
            pretrained a folder, new or empty.
        format: onnx: for onnxruntime; openvino: for OpenVINO; safetensors: packed weights, for this package;
            pretrained: float weights, for timm or transformers.
        options: of onnx.

    Raises:
        UserError: if the run can't be restored, an option has no effect on it, activations in 8 bits lose too much or
            its images are not there to tell, or the file can't be written.
    """
    options.check(format)
    ending = _ENDINGS.get(format)
    if ending is not None and file.suffix != ending:
        raise UserError(f"expected a name that ends in {ending}", file=file, field="--output")
    if format in _REQUIRE:
        _REQUIRE[format]()
    run = restore_run(run_dir)
    if options.runtime or options.activations:
        _check_packed(run, run_dir, options)
    merged = merge(run.model, run.card)
    spec = run.record.spec
    if options.activations is not None:
        return Exported(merged, _export_int8(run, merged.model, file, options), activations="int8")
    write, open_again = _WAYS[format]
    if options.runtime is not None:
        write = partial(export_onnx, runtime=options.runtime)
    write(merged.model, file, run.card)
    try:
        images = load_data(spec.data, spec.seed, smoke=spec.smoke).validation
    except UserError as error:
        return Exported(merged, None, str(error))
    return Exported(merged, compare(torch_classifier(run.model, run.card), open_again(file, run.card), images))


def _check_packed(run: RestoredRun, run_dir: Path, options: OnnxOptions) -> None:
    if all(module.quantized is None for _, module in adapted_modules(run.model)):
        option = "--runtime" if options.activations is None else "--activations"
        raise UserError(f"has no effect on this run, whose weights are floats: {run_dir}; leave it out", field=option)
    if options.activations is not None:
        check_int8(run.model)


def _export_int8(run: RestoredRun, merged: nn.Module, file: Path, options: OnnxOptions) -> Comparison:
    """Write a file that multiplies in 8 bits if it is as accurate on the run's validation images as it has to be."""
    spec, card = run.record.spec, run.card
    try:
        data = load_data(spec.data, spec.seed, smoke=spec.smoke)
    except UserError as error:
        raise UserError(
            f"is calibrated on the run's training images, and they are not there: {error}", field="--activations"
        ) from None
    rows = np.linspace(0, len(data.train) - 1, min(len(data.train), _CALIBRATED_ON)).round().astype(int)
    calibration = data.train.chosen(rows).ordered_batches(_COMPARED_AT_ONCE, card.mean, card.std)
    ranges = input_ranges(merged, (images for images, _ in calibration))
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "model.onnx"
        export_onnx(merged, trial, card, input_ranges=ranges)
        found = compare(torch_classifier(run.model, card), open_exported(trial), data.validation)
        content = trial.read_bytes()
    accepted = LARGEST_LOSS if options.accept_loss is None else options.accept_loss
    lost = 100 * found.accuracy_loss.estimate
    if lost > accepted:
        raise UserError(
            f"int8 loses {said_loss(found)}, more than the {accepted:g} that are accepted; export without it, or take "
            f"it all the same with --accept-loss {math.ceil(10 * lost) / 10:g}",
            field="--activations",
        )
    try:
        write_atomically(file, content)
    except OSError as error:
        raise UserError(f"can't be written ({error.strerror}); choose another place", file=file) from None
    return found


def said_loss(found: Comparison) -> str:
    """Return the accuracy that was lost, in points, with its interval."""
    loss = found.accuracy_loss
    assert loss.low is not None
    assert loss.high is not None
    return (
        f"{100 * loss.estimate:.2f} points of accuracy on {loss.n} validation images "
        f"({100 * loss.confidence:.0f} % interval {100 * loss.low:.2f} to {100 * loss.high:.2f})"
    )


def file_bytes(model: Path) -> int:
    """Return the bytes of an exported model: of a folder all files, of an .xml the .bin beside it, too."""
    if model.is_dir():
        return sum(one.stat().st_size for one in model.iterdir() if one.is_file())
    parts = [model, *([model.with_suffix(".bin")] if model.suffix == ".xml" else [])]
    return sum(part.stat().st_size for part in parts)


def compare(trained: Classifier, exported: Classifier, images: LabelledImages) -> Comparison:
    """Return how far a classifier's outputs are from another's, on labelled images."""
    logits: list[tuple[Tensor, Tensor]] = []
    labels = []
    card = trained.card
    for batch, targets in images.ordered_batches(_COMPARED_AT_ONCE, card.mean, card.std):
        logits.append((trained.logits(batch), exported.logits(batch)))
        labels.append(targets)
    before, after = (torch.cat(side) for side in zip(*logits, strict=True))
    truth = torch.cat(labels)
    right_before, right_after = (side.argmax(1) == truth for side in (before, after))
    losses, gains = int((right_before & ~right_after).sum()), int((right_after & ~right_before).sum())
    return Comparison(
        images=len(truth),
        same_predictions=float((before.argmax(1) == after.argmax(1)).float().mean()),
        logit_error=float((after - before).abs().max() / before.abs().max()),
        trained_accuracy=float(right_before.float().mean()),
        exported_accuracy=float(right_after.float().mean()),
        accuracy_loss=paired_proportions(losses, gains, len(truth)),
    )


def open_model(path: Path, weights: str | None = None) -> Classifier:
    """Return the classifier of a run's folder, or of anything that `peft-vit export` has written.

    Args:
        path: of a file or folder.
        weights: of a PEFT folder's base, see `deployment.open_peft`.

    Raises:
        UserError: if it is none of these, or is damaged.
    """
    if weights is None and os.path.isfile(path / RECORD_FILE):  # unlike Path.is_file, also False for an impossible name
        run = restore_run(path)
        return torch_classifier(run.model, run.card)
    return open_exported(path, weights)


def restore_run(run_dir: Path) -> RestoredRun:
    """Build a run's backbone again, prepare it as its method says, and load what was trained.

    Raises:
        UserError: if the run failed, a file is missing or has changed, or the backbone's weights are others now.
    """
    record = _done_record(run_dir)
    spec, provenance = record.spec, record.provenance
    assert provenance is not None
    file = run_dir / ADAPTER_FILE
    try:
        found = hashlib.sha256(read_bytes(file, None)).hexdigest()
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror}); move or rerun the whole run", file=file) from None
    if found != record.adapter_sha256:
        problem = f"has SHA-256 {found}, its {RECORD_FILE} says {record.adapter_sha256}; rerun this run"
        raise UserError(problem, file=file, field="adapter_sha256")
    with agreeing_with(run_dir / RECORD_FILE):
        backbone = load_run_backbone(spec, len(record.class_names), mapped=packed_at_once(spec.experiment))
    if backbone.weights_sha256 != provenance.weights_sha256:
        raise UserError(
            f"{backbone.weights_name} has SHA-256 {backbone.weights_sha256}, the run was trained on "
            f"{provenance.weights_sha256}; get those weights again",
            file=run_dir / RECORD_FILE,
            field="provenance",
        )
    if provenance.config_sha256 not in (None, backbone.architecture.config_sha256):
        raise UserError(
            f"config.json or preprocessor_config.json of {backbone.architecture.name} is not what the run was trained "
            "with; get those files again",
            file=run_dir / RECORD_FILE,
            field="provenance",
        )
    with agreeing_with(run_dir / RECORD_FILE):
        if spec.experiment.start is None:
            total_steps = spec.experiment.total_steps(record.split_sizes["train"])
            prepare_as_saved(backbone.model, spec.experiment, file, total_steps=total_steps, seed=spec.seed)
        else:  # the adapter that it went on from need not be there any more: its scales stand in the file
            attach_fused(backbone.model, read_adapter_file(file).scales, seed=spec.seed)
        load_trained(backbone.model, file)
    choose_attention(backbone.model, torch.device("cpu"), spec.precision)  # as in the run: equal to the last bit
    for _, module in adapted_modules(backbone.model):
        if module.quantized is not None:
            module.drop_float()  # wherever the schedule starts, a saved run stands on quantized weights alone
    return RestoredRun(record, backbone, backbone.model.eval())


def prepare_as_saved(
    model: nn.Module, experiment: ExperimentConfig, file: Path, *, total_steps: int, seed: int
) -> list[Hook]:
    """Do as `prepare`, with the formats and ranks that `adaptive_bits` chose for a run, out of its adapter file."""
    qa_lora = experiment.section(QaLoraConfig)
    adaptive = None if qa_lora is None else qa_lora.adaptive_bits
    return prepare(
        model,
        experiment,
        total_steps=total_steps,
        seed=seed,
        formats=read_adapter_file(file).formats if adaptive is not None else None,
        ranks=read_adapter_file(file).ranks if adaptive is not None and adaptive.ranks else None,
        module_ranks=saved_module_ranks(file) if experiment.kind.uses_peft else None,
    )


def _done_record(run_dir: Path) -> RunRecord:
    record = read_record(run_dir / RECORD_FILE)
    if record.status != "done" or record.provenance is None:
        raise UserError(f"this run failed ({record.error}); rerun it", file=run_dir / RECORD_FILE, field="status")
    if not record.class_names:
        raise UserError("holds no class; rerun this run", file=run_dir / RECORD_FILE, field="class_names")
    return record
