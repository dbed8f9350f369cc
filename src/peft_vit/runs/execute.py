"""One run, from its specification to its record and the content of its adapter file, whatever interrupts it."""

from __future__ import annotations

import errno
import hashlib
import platform
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from peft_vit.base.errors import (
    DataWarning,
    DivergedError,
    SilentNoEffectWarning,
    UnderflowWarning,
    UserError,
    is_out_of_memory,
    one_line,
    printable,
)
from peft_vit.core.adapters import (
    adapted_sites,
    adapter_bytes,
    float_matmul,
    packed_weights,
    trained_tensors,
    update_ranks,
    use_float_matmul,
    use_int8_matmul,
)
from peft_vit.core.adapters.footprint import (
    MemoryWatch,
    frozen_bytes,
    head_parameters,
    release_memory,
    storage_bytes,
    trainable_parameters,
)
from peft_vit.core.adapters.peft_format import base_mismatches, start_sha256
from peft_vit.core.adapters.peft_tuner import load_peft
from peft_vit.core.backbones import LoadedBackbone, choose_attention, load_run_backbone, weights_licence
from peft_vit.core.config import QaLoraConfig
from peft_vit.core.methods import METHODS, PrepareContext
from peft_vit.core.methods.quantized import bytes_in_4_bits, keeps_codes, packed_at_once
from peft_vit.core.quantization.integers import Int8Matmul
from peft_vit.core.records import (
    BitAllocation,
    ByteCounts,
    Failure,
    HeadFit,
    ParameterCounts,
    ProbeTest,
    Provenance,
    RankEntry,
    RunRecord,
    RunSpec,
)
from peft_vit.core.training import (
    Calibration,
    CheckpointKeeper,
    Checkpoints,
    CheckpointWarning,
    ChosenBits,
    Helped,
    Hook,
    HookContext,
    Interrupted,
    LostProcessError,
    Member,
    Overhead,
    Progress,
    RuntimeConfig,
    State,
    TrainingResult,
    allocate_bits,
    head_logits,
    processes,
    train,
)
from peft_vit.core.training.images import Data, LabelledImages
from peft_vit.core.training.metrics import predict, predict_with_middle
from peft_vit.data import load_data
from peft_vit.runs.head_init import SharedFeatures, init_head
from peft_vit.runs.measures.held_out import Outputs, calibration_of, reference_images
from peft_vit.runs.measures.removal_and_latency import leave_out_updates, time_forward
from peft_vit.runs.this_machine import matmuls
from peft_vit.runs.this_machine.machine import (
    cpu_count,
    hash_arrays,
    loaded_git_state,
    package_versions,
    processor_name,
    resolve_device,
)

OnProgress = Callable[[Progress], None]
# What a record keeps of the warnings.
_RECORDED = (SilentNoEffectWarning, UnderflowWarning, DataWarning, CheckpointWarning)
# Of what a run is made of: with another one it would be another run.
_MUST_MATCH = (
    "data_sha256",
    "split_sha256",
    "weights_name",
    "weights_sha256",
    "config_sha256",
    "random_weights",
    "head_init_sha256",
    "data_order_sha256",
    "start_sha256",
)
# What carried it out: with another one the numbers may round otherwise.
_MAY_DIFFER = ("python", "processor", "device", "devices", "integer_bits", "git_hash")  # and the packages' versions


@dataclass(frozen=True)
class Finished:
    """What came out of a run; nothing of it is written yet.

    Attributes:
        record: what happened.
        adapter: content of the adapter file; None if the run failed.
        features: content of the file of training features; None: there is none.
    """

    record: RunRecord
    adapter: bytes | None
    features: bytes | None = None


def run_one(
    spec: RunSpec,
    *,
    on_progress: OnProgress | None = None,
    checkpoints: Checkpoints | None = None,
    should_stop: Callable[[], bool] | None = None,
    member: Member | None = None,
) -> Finished:
    """Do one run, from where its newest checkpoint has left it; a failure is recorded with its reason, not raised.

    Several processes do it together if each calls this. The first reads and writes checkpoints, fits the head before
    training and tests after it.

    Args:
        spec: what to do.
        on_progress: called after each step.
        checkpoints: where to keep what the run needs to continue; None: nothing is written at all.
        should_stop: asked after each step.
        member: the place of this process among several; None: it is alone, or they have met already.

    Raises:
        Interrupted: if it should stop, here or in another process; a checkpoint was written then.
        Helped: in all processes but the first, when training is over.
    """
    with warnings.catch_warnings(record=True) as caught:
        for category in _RECORDED:
            warnings.simplefilter("always", category)
        first = (processes.rank() if member is None else member.rank) == 0
        attempt = ResumableRun(spec, checkpoints if first else None, should_stop, caught)
        try:
            with nullcontext() if member is None else member.joined():
                finished = _execute(spec, attempt, on_progress)
        except (Interrupted, Helped):
            raise
        except Exception as error:
            plain = isinstance(error, UserError | LostProcessError) and not isinstance(error, DivergedError)
            kind = _failure_of(error)
            reason = str(error) if plain else f"{type(error).__name__}: {error}"
            if kind == "error" and attempt.source is not None and attempt.training is None:
                # A program's fault as a rule; a changed checkpoint can bring it out too.
                remedy = "if that was changed, remove the checkpoint-* folders there, and it starts again"
                reason = f"{' '.join(reason.split())} (the run had continued from {attempt.source}; {remedy})"
            record = RunRecord(
                spec=spec,
                status="failed",
                error=reason,
                failure=kind,
                traceback=traceback.format_exc(),
                **attempt.update().model_dump(include={"spec_digest", "started_at", "seconds", "warnings"}),
            )
            finished = Finished(record, None)
    for entry in caught:
        if entry.category not in (SilentNoEffectWarning, UnderflowWarning, DataWarning):  # of those the record speaks
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)
    return finished


def _failure_of(error: Exception) -> Failure:
    """Return what kind of failure an exception is."""
    if isinstance(error, DivergedError):
        return "diverged"
    if isinstance(error, LostProcessError):
        return "killed"
    if is_out_of_memory(error):
        return "out_of_memory"
    if isinstance(error, OSError):
        return "disk_full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "io"
    return "error"


# --- one walk from the specification to what the record holds ---------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """What a run begins with: its images, and the pretrained model, which nothing has changed yet.

    Attributes:
        packed_targets: matrices that the method packs at once; they stay in the weights' file until then, and the model
            on the CPU. None: it packs none.
    """

    spec: RunSpec
    device: torch.device
    data: Data
    backbone: LoadedBackbone
    runtime: RuntimeConfig
    packed_targets: Sequence[str] | None

    @classmethod
    def of(cls, spec: RunSpec, *, test: bool = True) -> Self:
        """Load what a specification names; without `test` no images that test.

        Raises:
            UserError: as `load_data`, `load_run_backbone`.
        """
        torch.set_num_threads(max(1, spec.threads // processes.local_count()))
        device = resolve_device(spec.device)
        data = load_data(spec.data, spec.seed, smoke=spec.smoke, test=test)
        packed_targets = packed_at_once(spec.experiment)
        backbone = load_run_backbone(spec, data.task.head_width(data.class_names), mapped=packed_targets)
        if packed_targets is None:
            backbone.model.to(device)
        choose_attention(backbone.model, device, spec.precision)
        runtime = RuntimeConfig(device, spec.precision, backbone.mean, backbone.std)
        return cls(spec, device, data, backbone, runtime, packed_targets)

    def made_ready(self) -> Provenance:
        """Let the model, which its method has prepared, multiply as was asked for; return what the run is made of."""
        model = self.backbone.model.to(self.device)  # what is packed comes packed
        training, product = self.spec.experiment.training, None
        if training.compute == "int8":

            def find() -> Int8Matmul | None:
                if processes.rank() > 0:
                    return None
                choice = matmuls.choose_product(self.device, self.spec.precision, training.integer_bits)
                return choice.usable(self.device)

            product = processes.of_first(processes.in_each(find))  # as the first process has found it fastest
        if product is not None:
            product = use_int8_matmul(model, product)
        return provenance_of(self, product)

    def float_weights(self) -> dict[str, Tensor]:
        """Load the weights again, as they were."""
        width = self.data.task.head_width(self.data.class_names)
        return dict(load_run_backbone(self.spec, width, mapped=self.packed_targets).model.state_dict())


def _execute(spec: RunSpec, attempt: ResumableRun, on_progress: OnProgress | None) -> Finished:
    """Do what a run is, from loading to its record."""
    experiment = spec.experiment
    if METHODS[experiment.method].uses_peft:
        load_peft()
    attempt.memory = memory = MemoryWatch()  # before anything of the run is read, after the libraries that it needs
    overhead = attempt.read()
    loaded = processes.in_each(lambda: Loaded.of(spec))
    data, backbone, runtime, model = loaded.data, loaded.backbone, loaded.runtime, loaded.backbone.model
    for text in data.warnings:
        warnings.warn(DataWarning(text), stacklevel=2)
    backbone_total = sum(p.numel() for p in model.parameters()) - head_parameters(model)
    calibration = Calibration(data, runtime, spec.seed)

    hooks = _prepare(model, spec, attempt, calibration, experiment.total_steps(len(data.train)))
    # Now that the head is the one that training starts from.
    provenance = attempt.begin(_same_everywhere(processes.in_each(loaded.made_ready)))
    if (start := experiment.start) is not None:
        weights = provenance.weights_name, provenance.weights_sha256
        for doubt in base_mismatches(Path(start), spec.backbone.model, *weights, data.class_names):
            warnings.warn(SilentNoEffectWarning(doubt), stacklevel=2)
    sites = [site.info() for site in adapted_sites(model).values()]
    ranks = update_ranks(model)
    memory.prepared()

    result, tested, features = _train_and_test(loaded, hooks, attempt, on_progress)
    metadata = {
        "spec": spec.model_dump(mode="json"),
        "class_names": list(data.class_names),
        "weights_name": provenance.weights_name,
        "weights_sha256": provenance.weights_sha256,
    }
    packed_bytes = 0
    if keeps_codes(experiment):  # in the file, where they count as frozen
        packed_bytes = sum(weight.nbytes for weight in packed_weights(model).values())
    content = adapter_bytes(model, metadata, packed=keeps_codes(experiment))
    attempt.update()
    attempt.memory = None  # the float weights may come back for a comparison
    release_memory()  # or what the steps took would lie beside them
    context = HookContext(calibration.images, loaded.float_weights, overhead)
    for hook in hooks:
        hook.finish(model, context)
    method_fields: dict[str, Any] = {"rank_history": [RankEntry(step=0, budget=None, ranks=ranks)] if ranks else []}
    for hook in hooks:
        method_fields |= hook.record(model)
    counts = ParameterCounts(
        initial=result.initial_parameters,
        final=trainable_parameters(model),
        peak=result.peak_parameters,
        head=head_parameters(model),
        backbone_total=backbone_total,
    )
    sizes = ByteCounts(
        frozen_bytes=frozen_bytes(model),
        trainable_bytes=storage_bytes(trained_tensors(model).values()),
        optimizer_bytes=result.optimizer_bytes,
        adapter_file_bytes=len(content) - packed_bytes,
        in_4_bits_bytes=bytes_in_4_bits(model, backbone_total + counts.head),
    )
    by_class = _class_counts(data)
    removal, latency_s = None, {}
    if spec.measures.removal_images is not None and experiment.has_adapters:
        with overhead.of("removal"):
            removal = leave_out_updates(model, data, spec, runtime)
    if spec.measures.latency_batches:
        with overhead.of("latency"):
            latency_s = time_forward(backbone, data, spec, runtime)
    record = RunRecord(
        spec=spec,
        status="done",
        class_names=list(data.class_names),
        split_sizes={"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        class_counts=by_class,
        left_out=dict(data.left_out),
        majority_accuracy={
            split: max(counts) / sum(counts) for split, counts in by_class.items() if split != "train" and any(counts)
        },
        sites=sites,
        **method_fields,
        steps=result.steps,
        evaluations=result.evaluations,
        chosen_step=result.chosen_step,
        validation=None if result.chosen is None else result.chosen.metrics,
        **tested,
        features_sha256=None if features is None else hashlib.sha256(features).hexdigest(),
        seconds_per_step=result.seconds_per_step if result.optimizer_sha256 else None,  # a probe takes no step
        optimizer_sha256=result.optimizer_sha256 or None,
        adapter_sha256=hashlib.sha256(content).hexdigest(),
        parameters=counts,
        bytes=sizes,
        removal=removal,
        latency_s=latency_s,
        **dict(attempt.update()),
    )
    return Finished(record, content, features)


def _prepare(
    model: nn.Module, spec: RunSpec, attempt: ResumableRun, calibration: Calibration, total_steps: int
) -> list[Hook]:
    """Let the method change the model, with the bits and ranks that calibration images choose if that was asked for."""
    config, overhead = spec.experiment.section(QaLoraConfig), attempt.overhead
    bits: ChosenBits | None = None
    if config is not None and config.adaptive_bits is not None:
        if attempt.known.bit_allocation is None and processes.rank() == 0:  # or an earlier attempt has chosen
            with overhead.of("bit_allocation"):
                batch = calibration.batch(config.adaptive_bits.calibration_images)
                attempt.known.bit_allocation = allocate_bits(model, config, *batch, seed=spec.seed).record
        attempt.known.bit_allocation = processes.of_first(attempt.known.bit_allocation)
        bits = ChosenBits.of_record(attempt.known.bit_allocation, config)
    with overhead.of("rounding") if keeps_codes(spec.experiment) else nullcontext():
        context = PrepareContext(
            total_steps=total_steps,
            seed=spec.seed,
            formats=None if bits is None else bits.formats,
            ranks=None if bits is None else bits.ranks,
            calibration=calibration.images,
        )
        return METHODS[spec.experiment.method].prepare(model, spec.experiment, context)


def _train_and_test(
    loaded: Loaded, hooks: list[Hook], attempt: ResumableRun, on_progress: OnProgress | None
) -> tuple[TrainingResult, dict[str, Any], bytes | None]:
    """Train, read the test split, once, and return what it says in a record, and the content of the features' file.

    With a probe to start from that is before training, while its features are there; training can't reach the images.
    Where frozen layers multiply integers, training does so alone, with the validation that chooses a step. All that is
    told, calibrated or kept is measured on the model that is delivered, which multiplies in float.
    """
    model, data, spec, runtime = loaded.backbone.model, loaded.data, loaded.spec, loaded.runtime
    training, is_probe = spec.experiment.training, spec.experiment.is_probe
    head, temperature, probed = loaded.backbone.backbone.head, 1.0, None
    images: LabelledImages | None = None
    provenance = attempt.known.provenance
    assert provenance is not None
    features = SharedFeatures(model, spec, provenance, hooks, runtime, data.task)
    provenance = provenance.model_copy(update={"integer_bits": None})
    in_float = SharedFeatures(model, spec, provenance, hooks, runtime, data.task)
    if (is_probe or training.head_start == "probe") and attempt.source is None and processes.rank() == 0:
        probe, temperature, probed, meaning = init_head(head, features, data, spec, runtime, attempt.overhead)
        attempt.known.head_fit = probe.fit
        if not is_probe and spec.experiment.start is None:  # else it is no linear probe
            images = data.test.open()
            with attempt.overhead.of("features"), float_matmul(model):
                values = in_float.of(images).values
            logits = head_logits(head, values, runtime)
            attempt.known.probe_test = ProbeTest(
                metrics=data.task.measure(logits, images.labels, meaning),
                predicted=data.task.predicted(logits, meaning).tolist(),
                thresholds=() if meaning is None else meaning.thresholds,
            )
    if is_probe:
        fitted = trainable_parameters(model)
        result = TrainingResult(
            steps=list(probe.steps),
            evaluations=list(probe.evaluations),
            chosen=probe.chosen,
            chosen_step=probe.chosen_step,
            initial_parameters=fitted,
            peak_parameters=fitted,
        )
    else:
        result = train(
            model,
            data,
            training,
            runtime,
            seed=spec.seed,
            hooks=hooks,
            on_progress=on_progress,
            between_steps=attempt.between_steps,
            resume=attempt.take_training(),
            overhead=attempt.overhead,
            probe=probed,
            temperature=temperature,
        )
    if processes.rank() > 0:
        raise Helped

    def outputs(of: LabelledImages) -> Outputs:
        batches = of.ordered_batches(training.images_at_once, runtime.mean, runtime.std)
        if spec.measures.features:
            found = Outputs(*predict_with_middle(model, batches, precision=runtime.precision))
        elif is_probe:
            found = Outputs(np.empty((0, 0), np.float32), of.labels, None)
        else:
            found = Outputs(*predict(model, batches, precision=runtime.precision), None)
        if is_probe:  # its logits are of the features that it was fitted to
            return found._replace(logits=head_logits(head, in_float.of(of).values, runtime))
        return found

    if spec.multiplies_integers:
        attempt.update()  # of the memory that training took
        use_float_matmul(model)
    images = images or data.test.open()
    test = outputs(images)
    with attempt.overhead.of("calibration"):
        none = Outputs(test.logits[:0], data.validation.labels, None)
        validation = outputs(data.validation) if len(data.validation) else none
        known = outputs(reference_images(data, spec.seed)).middle if spec.measures.features else None
        tested, kept_features = calibration_of(validation, test, known, data.task)
    decision, keep = tested["decision"], spec.measures.logits
    predicted = data.task.predictions(test.logits, test.labels, images.positions, keep_logits=keep, decision=decision)
    predicted = predicted.model_copy(update={"files": data.test_files})
    tested |= {"predictions": predicted, "test": data.task.measure(test.logits, test.labels, decision)}
    return result, tested, kept_features


def _same_everywhere(own: Provenance) -> Provenance:
    """Return what a run is made of, with the numbers of processes and machines, if it is so in every process.

    Raises:
        UserError: in each of them, if it is not.
    """
    every = processes.gathered((own, platform.node()))

    def facts(one: Provenance) -> dict[str, Any]:
        fields = {*_MUST_MATCH, "python", "git_hash", "integer_bits", *(["processor"] if one.device == "cpu" else [])}
        return {**one.packages, **one.model_dump(include=fields)}

    expected = facts(every[0][0])
    for number, (other, node) in enumerate(every):
        for name, value in facts(other).items():
            if value != expected.get(name):
                reason = f"process {number} on {node} has {name} {value}, the first one {expected.get(name)}"
                raise UserError(f"{reason}; give all the same images, versions and kind of processor", field="devices")
    return own.model_copy(update={"devices": len(every), "nodes": len({node for _, node in every})})


def provenance_of(loaded: Loaded, product: Int8Matmul | None) -> Provenance:
    """Return what a run is made of, and what carries it out."""
    spec, data, backbone = loaded.spec, loaded.data, loaded.backbone
    commit, dirty = loaded_git_state()
    start = spec.experiment.start
    steps = 0 if spec.experiment.is_probe else spec.experiment.total_steps(len(data.train))
    epochs = -(-steps // spec.experiment.training.epoch_steps(len(data.train)))
    return Provenance(
        packages=package_versions(spec.backbone.library),
        python=platform.python_version(),
        platform=platform.platform(),
        processor=processor_name(),
        cpu_count=cpu_count(),
        device=str(loaded.device),
        threads=torch.get_num_threads(),
        git_hash=commit,
        git_dirty=dirty,
        weights_name=backbone.weights_name,
        weights_sha256=backbone.weights_sha256,
        config_sha256=backbone.architecture.config_sha256,
        weights_licence=weights_licence(spec.backbone),
        random_weights=backbone.weights_sha256 is None,
        data_sha256=data.data_sha256,
        split_sha256=data.split_sha256,
        head_init_sha256=hash_arrays(backbone.backbone.head.parameters()),
        data_order_sha256=hash_arrays(data.train.order(spec.seed, epoch) for epoch in range(1, epochs + 1)),
        start_sha256=None if start is None else start_sha256(Path(start)),
        integer_bits=None if product is None else product.bits,
        product=None if product is None else product.name,
    )


def _class_counts(data: Data) -> dict[str, list[int]]:
    """Return the images of each class, (K,), by split."""
    if not data.task.one_class:
        return {}
    splits = {"train": data.train.labels, "validation": data.validation.labels}
    counts = {name: data.task.counts(labels, len(data.class_names)) for name, labels in splits.items()}
    return {name: each.tolist() for name, each in (counts | {"test": data.test.class_counts()}).items()}


# --- the attempts before and after ------------------------------------------------------------------------------------


class PartialRecord(BaseModel):
    """What of a run's record is known before its end: of all its attempts, as far as checkpoints tell."""

    model_config = ConfigDict(extra="forbid")

    spec_digest: str
    started_at: str  # ISO 8601, UTC
    provenance: Provenance | None = None  # what training began with
    bit_allocation: BitAllocation | None = None
    head_fit: HeadFit | None = None
    probe_test: ProbeTest | None = None
    seconds: float = 0.0  # what came after an attempt's last checkpoint is lost
    overhead_s: dict[str, float] = {"checkpoints": 0.0}
    warnings: list[str] = []
    peak_memory_bytes: int = 0
    own_memory_bytes: int | None = 0  # None: the system does not tell


class ResumableRun:
    """What `run_one` knows of the run's past, and keeps for its future.

    A checkpoint's state is {"training": see `TrainingState.state_dict`, "run": see `PartialRecord`}.

    Args:
        spec: what is attempted.
        checkpoints: where they lie; None: there are none and none are written.
        should_stop: asked between two steps.
        caught: the warnings so far, as `warnings.catch_warnings` collects them.

    Attributes:
        known: of the attempts before, and what this one has found since; `update` brings its sums up to date.
        overhead: seconds by purpose, of all attempts.
        source: the checkpoint that it continues from, if there is one.
        training: the training's state there, until it is taken.
        memory: of this attempt, while it is watched.
    """

    def __init__(
        self,
        spec: RunSpec,
        checkpoints: Checkpoints | None,
        should_stop: Callable[[], bool] | None,
        caught: Sequence[warnings.WarningMessage],
    ) -> None:
        self._keeper = None if checkpoints is None else CheckpointKeeper(checkpoints)
        self._should_stop, self._caught = should_stop, caught
        self._since = time.perf_counter()
        self.training: State | None = None
        self.source: Path | None = None
        self.memory: MemoryWatch | None = None
        self.known = PartialRecord(
            spec_digest=spec.digest(), started_at=datetime.now(UTC).isoformat(timespec="seconds")
        )
        self.overhead = Overhead(self.known.overhead_s)

    def read(self) -> Overhead:
        """Read the newest checkpoint that is whole, if there is one, and return the seconds that it has counted."""
        state = None if self._keeper is None else self._keeper.newest()
        if state is not None:
            self.source = state.source
            try:
                known, self.training = PartialRecord.model_validate(state["run"]), State(state["training"])
            except (LookupError, TypeError, ValueError) as error:
                raise self._mismatch("state", f"{type(error).__name__}: {one_line(error)}") from None
            if known.spec_digest != self.known.spec_digest:
                raise self._mismatch("spec_digest", "it was made with another configuration")
            self.known, self.overhead = known, Overhead(known.overhead_s)
        return self.overhead

    def begin(self, provenance: Provenance) -> Provenance:
        """Take note of what the training is about to start from.

        Returns:
            The provenance of the first attempt.
        """
        first = self.known.provenance
        if self.source is None or first is None:
            self.known.provenance = provenance
            return provenance
        for field in _MUST_MATCH:
            if (was := getattr(first, field)) != (now := getattr(provenance, field)):
                raise self._mismatch(field, f"{was} when the run began, {now} now")
        old_tools, new_tools = (
            {**p.packages, **{name: getattr(p, name) for name in _MAY_DIFFER}} for p in (first, provenance)
        )
        changes = [
            f"{name} {new_tools.get(name)} instead of {old_tools.get(name)}"
            for name in {**old_tools, **new_tools}
            if old_tools.get(name) != new_tools.get(name)
        ]
        if changes:
            text = (
                f"the run continued from step {self._step} with {', '.join(changes)}; without the "
                "interruption, its numbers may "
            )
            warnings.warn(f"{text}have been rounded differently", CheckpointWarning, stacklevel=2)
        return first

    def _mismatch(self, field: str, reason: str) -> UserError:
        return UserError(
            f"the run can't continue from the checkpoint of step {self._step}: {reason}; remove the checkpoint-* "
            "folders there, and the run starts again",
            file=None if self.source is None else self.source.parent,
            field=field,
        )

    @property
    def _step(self) -> int:
        return 0 if self._keeper is None else self._keeper.step

    def take_training(self) -> State | None:
        """Hand out the training's state, once: nothing of it is held here while the training continues."""
        state, self.training = self.training, None
        return state

    def between_steps(self, step: int, training: Callable[[], State]) -> None:
        """Keep a checkpoint if one is due, or if the run is to stop.

        Raises:
            Interrupted: if it is to stop.
            OSError: if the checkpoint can't be written.
        """
        stops = processes.any_of(self._should_stop is not None and self._should_stop())
        if self._keeper is not None and step > 0 and (stops or self._keeper.is_due()):
            with self.overhead.of("checkpoints"):
                run = self.update().model_dump(mode="json")
                self._keeper.keep(step, lambda: State(training=training(), run=run))
        if stops:
            raise Interrupted(self._step)

    def update(self) -> PartialRecord:
        """Bring the sums up to date. Warnings are there once: an attempt repeats those of the start.

        They may quote names of files, which may be any bytes, and a record is UTF-8.
        """
        known, now = self.known, time.perf_counter()
        known.seconds, self._since = known.seconds + now - self._since, now
        known.overhead_s = dict(self.overhead)
        texts = [printable(str(entry.message)) for entry in self._caught if entry.category in _RECORDED]
        known.warnings = list(dict.fromkeys([*known.warnings, *texts]))
        if self.memory is not None:
            known.peak_memory_bytes = max(known.peak_memory_bytes, self.memory.peak_bytes)
            own_bytes = self.memory.own_bytes
            known.own_memory_bytes = (
                None if own_bytes is None or known.own_memory_bytes is None else max(known.own_memory_bytes, own_bytes)
            )
        return known
