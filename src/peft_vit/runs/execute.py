"""One run, from its specification to its record and the content of its adapter file."""

from __future__ import annotations

import errno
import hashlib
import platform
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_vit.adapters import adapted_sites, adapter_bytes, packed_weights, update_ranks
from peft_vit.adapters.peft_format import doubts_about, peft_sha256
from peft_vit.adapters.peft_tuner import load_peft
from peft_vit.backbones import LoadedBackbone, choose_attention, load_run_backbone
from peft_vit.config import QaLoraConfig
from peft_vit.data import Data, LabelledImages, load_data
from peft_vit.errors import (
    DataWarning,
    DivergedError,
    SilentNoEffectWarning,
    UnderflowWarning,
    UserError,
    is_out_of_memory,
)
from peft_vit.evaluation import (
    LogitsAndLabels,
    frozen_bytes,
    give_memory_back,
    head_parameters,
    measure,
    predict,
    predictions,
    trainable_bytes,
    trainable_parameters,
)
from peft_vit.methods import METHODS, Preparation
from peft_vit.methods.qa_lora import keeps_codes, packed_at_once
from peft_vit.records import ByteCounts, Failure, ParameterCounts, Provenance, RankEntry, RunRecord, RunSpec
from peft_vit.runs.device import resolve_device
from peft_vit.runs.head_start import start_head
from peft_vit.runs.measures import take_measures
from peft_vit.runs.provenance import cpu_count, hash_arrays, loaded_git_state, package_versions, processor_name
from peft_vit.runs.resume import RECORDED, Attempt
from peft_vit.training import (
    AfterTraining,
    Calibration,
    Checkpoints,
    ChosenBits,
    Hook,
    Interrupted,
    Progress,
    RuntimeConfig,
    TrainingResult,
    allocate_bits,
    loss_weights,
    steps_per_epoch,
    train,
)

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Finished:
    """What came out of a run; nothing of it is written yet.

    Attributes:
        record: what happened.
        adapter: content of the adapter file; None if the run failed.
    """

    record: RunRecord
    adapter: bytes | None


def run_one(
    spec: RunSpec,
    *,
    on_progress: OnProgress | None = None,
    checkpoints: Checkpoints | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Finished:
    """Do one run, from where its newest checkpoint has left it; a failure is recorded with its reason, not raised.

    Args:
        spec: what to do.
        on_progress: told after each step.
        checkpoints: where to keep what the run needs to go on; None: nothing is written at all.
        should_stop: asked after each step.

    Raises:
        Interrupted: if it should stop; a checkpoint was written then.
    """

    def record_of(outcome: dict[str, Any]) -> RunRecord:
        known = attempt.so_far()
        return RunRecord(
            spec=spec,
            spec_digest=known.spec_digest,
            started_at=known.started_at,
            seconds=known.seconds,
            warnings=known.warnings,
            **outcome,
        )

    adapter = None
    with warnings.catch_warnings(record=True) as caught:
        for category in RECORDED:
            warnings.simplefilter("always", category)
        attempt = Attempt(spec, checkpoints, should_stop, caught)
        try:
            outcome, adapter = _execute(spec, attempt, on_progress)
            record = record_of(outcome)
        except Interrupted:
            raise
        except Exception as error:
            plain = isinstance(error, UserError) and not isinstance(error, DivergedError)
            kind = _kind(error)
            reason = str(error) if plain else f"{type(error).__name__}: {error}"
            if kind == "error" and not plain:  # a program's fault as a rule; a changed checkpoint can bring it out too
                reason += attempt.gone_on_from
            failed = {"status": "failed", "error": reason, "failure": kind, "traceback": traceback.format_exc()}
            adapter, record = None, record_of(failed)
    for entry in caught:
        if entry.category not in (SilentNoEffectWarning, UnderflowWarning, DataWarning):  # of those the record speaks
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)
    return Finished(record, adapter)


def _kind(error: Exception) -> Failure:
    """Return what kind of failure an exception is."""
    if isinstance(error, DivergedError):
        return "diverged"
    if is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, OSError):
        return "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "io"
    return "error"


def _execute(spec: RunSpec, attempt: Attempt, on_progress: OnProgress | None) -> tuple[dict[str, Any], bytes]:
    if METHODS[spec.experiment.method].uses_peft:
        load_peft()
    memory = attempt.watch_memory()
    torch.set_num_threads(spec.threads)
    device = resolve_device(spec.device)
    data = load_data(spec.data, spec.seed, smoke=spec.smoke)
    for text in data.warnings:
        warnings.warn(DataWarning(text), stacklevel=2)
    attempt.look_back(data.data_sha256)
    packed = packed_at_once(spec.experiment)
    load = partial(load_run_backbone, spec, len(data.class_names), mapped=packed)
    backbone = load()
    model = backbone.model if packed is not None else backbone.model.to(device)
    choose_attention(model, device, spec.precision)
    backbone_total = sum(p.numel() for p in model.parameters()) - head_parameters(model)
    runtime = RuntimeConfig(device, spec.precision, backbone.mean, backbone.std)
    calibration = Calibration(data, runtime, spec.seed)
    hooks = _prepare(model, spec, attempt, calibration, spec.experiment.total_steps(len(data.train)))
    model.to(device)  # those that are packed come packed
    # Now that the head is the one that training starts from.
    provenance = attempt.begin(_provenance(spec, data, backbone, device))
    if (start := spec.experiment.start) is not None:
        weights = provenance.weights_name, provenance.weights_sha256
        for doubt in doubts_about(Path(start), spec.backbone.model, *weights, data.class_names):
            warnings.warn(SilentNoEffectWarning(doubt), stacklevel=2)
    sites = [site.info() for site in adapted_sites(model).values()]
    ranks = update_ranks(model)
    memory.prepared()
    result, tested = _train_and_test(model, data, spec, runtime, hooks, attempt, on_progress)
    keeps = keeps_codes(spec.experiment)
    said = {
        "spec": spec.model_dump(mode="json"),
        "class_names": list(data.class_names),
        "weights_name": provenance.weights_name,
        "weights_sha256": provenance.weights_sha256,
    }
    content = adapter_bytes(model, said, packed=keeps)
    until_here = attempt.so_far()  # its memory, too: the float weights may come back for a comparison
    give_memory_back()  # or what the steps took would lie beside them
    after = AfterTraining(
        steps=result.steps,
        class_weights=loss_weights(spec.experiment.training, data, device),
        calibration_batch=calibration.batch,
        float_weights=lambda: dict(load().model.state_dict()),
        overhead=attempt.overhead,
    )
    for hook in hooks:
        hook.finish(model, after)
    outcome = {
        "status": "done",
        "provenance": provenance,
        "bit_allocation": attempt.known.bit_allocation,
        "head_fit": attempt.known.head_fit,
        "overhead_s": attempt.overhead,
        "peak_memory_bytes": until_here.peak_memory_bytes,
        "own_memory_bytes": until_here.own_memory_bytes,
        "sites": sites,
        "rank_history": [RankEntry(step=0, budget=None, ranks=ranks)] if ranks else [],
        **_images(data),
        **{field: value for hook in hooks for field, value in hook.record(model).items()},
        **_trained(model, result, backbone_total, content, holds_packed=keeps),
        **tested,
        **take_measures(model, backbone, data, spec, runtime, attempt.overhead),
    }
    return outcome, content


def _prepare(
    model: nn.Module, spec: RunSpec, attempt: Attempt, calibration: Calibration, total_steps: int
) -> list[Hook]:
    """Let the method change the model, with the bits and ranks that calibration images choose if that was asked for."""
    config, known = spec.experiment.section(QaLoraConfig), attempt.known
    bits: ChosenBits | None = None
    if config is not None and config.adaptive_bits is not None:
        if known.bit_allocation is not None:  # an earlier attempt has chosen
            bits = ChosenBits.of_record(known.bit_allocation, config)
        else:
            with attempt.overhead.of("bit_allocation"):
                batch = config.adaptive_bits.calibration_images
                bits = allocate_bits(model, config, *calibration.batch(batch), seed=spec.seed)
            known.bit_allocation = bits.record
    with attempt.overhead.of("rounding") if keeps_codes(spec.experiment) else nullcontext():
        preparation = Preparation(
            total_steps=total_steps,
            seed=spec.seed,
            formats=None if bits is None else bits.formats,
            ranks=None if bits is None else bits.ranks,
            calibration=calibration.images,
        )
        return METHODS[spec.experiment.method].prepare(model, spec.experiment, preparation)


def _train_and_test(
    model: nn.Module,
    data: Data,
    spec: RunSpec,
    runtime: RuntimeConfig,
    hooks: list[Hook],
    attempt: Attempt,
    on_progress: OnProgress | None,
) -> tuple[TrainingResult, dict[str, Any]]:
    head = start_head(model, spec, attempt, data, hooks, runtime)
    if spec.experiment.is_probe:
        return head.result(model), _test(data, spec, head.predict)
    result = train(
        model,
        data,
        spec.experiment.training,
        runtime,
        seed=spec.seed,
        hooks=hooks,
        on_progress=on_progress,
        between_steps=attempt.between_steps,
        resume=attempt.take_training(),
        overhead=attempt.overhead,
        softening=head.softening,
    )

    def predict_images(images: LabelledImages) -> LogitsAndLabels:
        batches = images.ordered_batches(spec.experiment.training.images_at_once, runtime.mean, runtime.std)
        return predict(model, batches, device=runtime.device, precision=runtime.precision)

    return result, _test(data, spec, predict_images)


def _test(data: Data, spec: RunSpec, predict_images: Callable[[LabelledImages], LogitsAndLabels]) -> dict[str, Any]:
    """Read the test split, the only time, and return what was measured and what was predicted there."""
    images = data.test.open()
    logits, labels = predict_images(images)
    kept = predictions(logits, labels, images.positions, keep_logits=spec.measures.logits)
    return {"test": measure(logits, labels), "predictions": kept}


def _provenance(spec: RunSpec, data: Data, backbone: LoadedBackbone, device: torch.device) -> Provenance:
    commit, dirty = loaded_git_state()
    start = spec.experiment.start
    training = spec.experiment.training
    steps = 0 if spec.experiment.is_probe else spec.experiment.total_steps(len(data.train))
    epochs = -(-steps // steps_per_epoch(len(data.train), training.batch_size))
    orders = (data.train.order(spec.seed, epoch) for epoch in range(1, epochs + 1))
    return Provenance(
        packages=package_versions(spec.backbone.library),
        python=platform.python_version(),
        platform=platform.platform(),
        processor=processor_name(),
        cpu_count=cpu_count(),
        device=str(device),
        threads=torch.get_num_threads(),
        git_hash=commit,
        git_dirty=dirty,
        weights_name=backbone.weights_name,
        weights_sha256=backbone.weights_sha256,
        config_sha256=backbone.architecture.config_sha256,
        random_weights=backbone.random_weights,
        data_sha256=data.data_sha256,
        split_sha256=data.split_sha256,
        head_init_sha256=hash_arrays(backbone.backbone.head.parameters()),
        data_order_sha256=hash_arrays(orders),
        start_sha256=None if start is None else peft_sha256(Path(start)),
    )


def _images(data: Data) -> dict[str, Any]:
    """Return what a record says of the images; majority: the accuracy of a constant guess at its best."""
    majority = {"test": float(data.test.class_counts().max() / len(data.test))}
    if len(data.validation):
        most = torch.bincount(torch.from_numpy(data.validation.labels)).max().item()
        majority = {"validation": most / len(data.validation), **majority}
    return {
        "class_names": list(data.class_names),
        "split_sizes": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        "majority_accuracy": majority,
    }


def _trained(
    model: nn.Module, result: TrainingResult, backbone_total: int, content: bytes, *, holds_packed: bool
) -> dict[str, Any]:
    """Return the course of training, the state that it chose, and what is counted on that."""
    file_bytes = len(content)
    if holds_packed:  # they count as frozen
        file_bytes -= sum(weight.nbytes for weight in packed_weights(model).values())
    return {
        "steps": result.steps,
        "evaluations": result.evaluations,
        "chosen_step": result.chosen_step,
        "validation": None if result.chosen is None else result.chosen.metrics,
        "seconds_per_step": result.seconds_per_step if result.optimizer_sha256 else None,  # a probe takes no step
        "optimizer_sha256": result.optimizer_sha256 or None,
        "adapter_sha256": hashlib.sha256(content).hexdigest(),
        "parameters": ParameterCounts(
            initial=result.initial_parameters,
            final=trainable_parameters(model),
            peak=result.peak_parameters,
            head=head_parameters(model),
            backbone_total=backbone_total,
        ),
        "bytes": ByteCounts(
            frozen_bytes=frozen_bytes(model),
            trainable_bytes=trainable_bytes(model),
            optimizer_bytes=result.optimizer_bytes,
            adapter_file_bytes=file_bytes,
        ),
    }
