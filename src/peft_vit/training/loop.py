"""The training loop. It knows no method: hooks score, resize and quantize; it steps, evaluates, chooses, records."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from peft_vit.adapters import adapted_modules, current_ranks, restore_trained, set_ranks, site_adapters, trained_tensors
from peft_vit.adapters.peft_layers import peft_layers, peft_ranks
from peft_vit.backbones import Backbone, freeze_batch_norm, soften
from peft_vit.config import TrainingConfig
from peft_vit.data import Data, mixed
from peft_vit.errors import DivergedError, UserError, is_out_of_memory, named
from peft_vit.evaluation import measure, optimizer_bytes, predict, trainable_parameters
from peft_vit.records import Evaluation, StepRow
from peft_vit.training.activation_checkpointing import blocks_of, recomputed
from peft_vit.training.checkpoint import (
    State,
    generators_state,
    load_generators_state,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from peft_vit.training.hooks import BeforeTraining, Hook, Overhead, call_each
from peft_vit.training.learning_rate import build_scheduler
from peft_vit.training.optimization import build_optimizer, loss_weights, optimization_step, weighted_cross_entropy
from peft_vit.training.runtime import Calibration, RuntimeConfig


@dataclass
class TrainingResult:
    """What the loop saw. The model is left in the chosen state."""

    steps: list[StepRow] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    chosen: Evaluation | None = None  # None without validation images
    chosen_step: int = 0
    initial_parameters: int = 0
    peak_parameters: int = 0
    optimizer_bytes: int = 0  # when training ended
    optimizer_sha256: str = ""  # likewise
    overhead_s: Overhead = field(default_factory=Overhead)

    @property
    def seconds_per_step(self) -> float:
        """Return the median time of a step."""
        return statistics.median(row.seconds for row in self.steps)


def steps_per_epoch(train_images: int, batch_size: int) -> int:
    """Return the number of batches that hold every image once; the last one may be smaller."""
    return -(-train_images // batch_size)


@dataclass(frozen=True)
class Progress:
    """What a watcher is told after each step.

    Attributes:
        step: done so far.
        total_steps: of the run.
        loss: of this step's batch, without penalties.
        validation_accuracy: at the latest validation; None before the first.
        mean_rank: over the adapted sites; None without any.
        mean_bits: stored bits a weight of the quantized layers, scales, offsets and, as long as the schedule keeps it,
            the float weight included; None without any.
    """

    step: int
    total_steps: int
    loss: float
    validation_accuracy: float | None
    mean_rank: float | None = None
    mean_bits: float | None = None


def train(
    model: nn.Module,
    data: Data,
    config: TrainingConfig,
    runtime: RuntimeConfig,
    *,
    seed: int,
    hooks: Sequence[Hook] = (),
    on_progress: Callable[[Progress], None] | None = None,
    between_steps: Callable[[int, Callable[[], State]], None] | None = None,
    resume: State | None = None,
    overhead: Overhead | None = None,
    softening: float = 1.0,
) -> TrainingResult:
    """Train, evaluate now and then, and leave the model in the deployable state that validation prefers.

    Validation accuracy chooses; of equal ones the lower NLL. Without validation images the last step's model is taken,
    whatever it is worth. The test split is not touched. With `head_start: probe`
    the model as it is before the first step, with its updates left out, is the first that may be chosen: training
    never returns less, on validation, than the head it started from.

    Args:
        model: with adapters attached, on the runtime's device.
        data: images and labels.
        config: how long and how fast.
        runtime: device, precision and normalisation.
        seed: of data order and augmentation.
        hooks: what the method does around a step.
        on_progress: told after each step.
        between_steps: told how many steps are done, and handed what returns the training's state then; first before
            the first step, and after the last one of an epoch only when it was validated. It may raise.
        resume: such a state, to go on from; model and hooks are those of the start.
        overhead: takes the seconds of validation and hooks.
        softening: what the head's logits are divided by, but where the model before the first step is validated.

    Raises:
        DivergedError: if loss, gradient or predictions are no longer finite.
        UserError: if the state to go on from is not one of this training's.
    """
    overhead = Overhead() if overhead is None else overhead
    fresh = resume is None
    head = Backbone(model).head
    if fresh:
        soften(head, softening)
        weights, smoothing = loss_weights(config, data, runtime.device), config.label_smoothing
        loss = partial(weighted_cross_entropy, weights=weights, label_smoothing=smoothing)
        before = BeforeTraining(Calibration(data, runtime, seed).batch, loss, overhead)
        for hook in hooks:
            hook.begin(model, before)
    training = TrainingState(model, data, config, runtime, hooks, overhead, resume)
    del resume  # or its tensors would stay in memory when ranks or better weights have taken their place
    gauges = Gauges(model)

    def tell() -> None:
        if on_progress is not None:
            on_progress(gauges.progress(training.result, training.end))

    def pause() -> None:
        if between_steps is not None:
            between_steps(training.steps, training.state)

    if fresh and config.head_start == "probe" and training.validates:
        soften(head, 1 / softening)
        training.validate()
        soften(head, softening)
    model.train()
    freeze_batch_norm(model)
    pause()
    for images, labels in training.batches(seed):  # (B, 3, S, S), (B,) or (B, classes)
        training.step(images, labels)
        tell()
        if training.validation_is_due:
            training.validate()
            training.end_if_nothing_is_gained()
            tell()
        pause()
    return training.finish()


class TrainingState:
    """A training between two steps: all that the next one depends on, and what the record will say of those before.

    The arguments are those of `train`; to go on from a state, the model is brought to where it was.

    Raises:
        UserError: if the state to go on from is not one of this training's.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        config: TrainingConfig,
        runtime: RuntimeConfig,
        hooks: Sequence[Hook],
        overhead: Overhead,
        resume: State | None,
    ) -> None:
        self.model = model
        self.result = TrainingResult(initial_parameters=trainable_parameters(model), overhead_s=overhead)
        self.end = config.total_steps(len(data.train))
        self._data, self._config, self._runtime = data, config, runtime
        self._epoch_steps = steps_per_epoch(len(data.train), config.batch_size)
        self.validates = len(data.validation) > 0
        self._validated_at = frozenset(config.validation_steps(len(data.train)) if self.validates else ())
        self._class_weights = loss_weights(config, data, runtime.device)  # (classes,)
        if config.is_undecided:
            problem = "is kept where a study is planned; here, give micro_batch_size or activation_checkpointing"
            raise UserError(problem, field="training.memory_limit")
        blocks = blocks_of(model)
        self._recomputed = blocks[: config.recomputed_of(len(blocks))]
        self._hooks = hooks
        self._best = BestState()
        if resume is not None:
            with _of_this_run(resume):
                load_model_state(model, resume.part("model"))
        self._optimizer = build_optimizer(model, config)
        self._scheduler, self._decay = build_scheduler(self._optimizer, config, self.end)
        if resume is not None:
            with _of_this_run(resume):
                self._load(resume)
        call_each(hooks, "attach", overhead, model, self._optimizer)
        if resume is not None:  # last: whatever was built anew may have drawn from them
            with _of_this_run(resume):
                load_generators_state(resume.part("generators"))

    @property
    def steps(self) -> int:
        """Return how many steps are done."""
        return len(self.result.steps)

    @property
    def epoch(self) -> int:
        """Return the epoch of the last step, from 1; 0 before the first."""
        return -(-self.steps // self._epoch_steps)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a batch for each step that is left, in the order of the seed.

        Images are (B, 3, S, S), labels (B,), or shares of each class (B, classes) where batches are mixed.
        """
        augmentation, classes = self._config.augmentation, len(self._data.class_names)
        while not self.ended:
            epoch = self._data.train.shuffled_batches(
                self._config.batch_size,
                self._runtime.mean,
                self._runtime.std,
                augmentation=augmentation,
                seed=seed,
                epoch=self.steps // self._epoch_steps + 1,
                skip=self.steps % self._epoch_steps,
            )
            for images, labels in epoch:
                yield mixed(images, labels, augmentation, classes=classes, seed=seed, step=self.steps + 1)
                if self.ended:
                    break

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Do one step on a batch, images (B, 3, S, S) and labels (B,) or shares of each class (B, classes)."""
        started = time.perf_counter()
        learning_rate = self._optimizer.param_groups[0]["lr"]
        notes = {name: value for hook in self._hooks for name, value in hook.notes().items()}
        number = self.steps + 1
        outcome = optimization_step(
            self.model,
            self._optimizer,
            self._losses(images, labels),
            number,
            hooks=self._hooks,
            clip_norm=self._config.clip_norm,
            overhead=self.result.overhead_s,
        )
        row = StepRow(
            step=number,
            loss=outcome.loss,
            learning_rate=learning_rate,
            gradient_norm=outcome.gradient_norm,
            seconds=time.perf_counter() - started,
            penalties=outcome.penalties,
            **notes,
        )
        self._scheduler.step()
        self.result.steps.append(row)
        self.result.peak_parameters = max(self.result.peak_parameters, trainable_parameters(self.model))

    def _losses(self, images: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Yield what each micro-batch of M images has in the loss of its batch of B: its own mean, times M / B.

        The last batch of an epoch may be smaller, and its last micro-batch too.
        """
        runtime, at_once = self._runtime, self._config.images_at_once
        for some, theirs in zip(images.split(at_once), labels.split(at_once), strict=True):  # (M, 3, S, S), (M, ...)
            bf16 = torch.autocast(runtime.device.type, torch.bfloat16, enabled=runtime.precision == "bf16")
            with bf16, recomputed(self._recomputed):
                logits = self.model(some.to(runtime.device))  # (M, classes)
            mean = weighted_cross_entropy(
                logits.float(), theirs.to(runtime.device), self._class_weights, self._config.label_smoothing
            )
            yield mean * (len(some) / len(images))

    @property
    def ended(self) -> bool:
        """Return whether no step is left."""
        return self.steps >= self.end

    @property
    def validation_is_due(self) -> bool:
        """Return whether validation comes after the last step."""
        return self.validates and (self.ended or self.steps in self._validated_at)

    def end_if_nothing_is_gained(self) -> None:
        """Let the learning rate come down, or end, once `patience` validations in a row have brought no gain."""
        if self._config.patience is None or self._best.stale < self._config.patience:
            return
        if self._decay is None:
            self.end = self.steps
        else:
            self.end = self._decay.bring_down(self.steps)

    def validate(self) -> None:
        """Evaluate on the validation split, and remember the weights if they are the best so far."""
        with self.result.overhead_s.of("evaluation"):
            evaluation = self._evaluation()
            self.result.evaluations.append(evaluation)
            final = all(hook.deployable(evaluation.step) for hook in self._hooks)
            self._best.offer(evaluation, self.model, without_updates=not final)

    def _evaluation(self) -> Evaluation:
        runtime = self._runtime
        # No larger than in training, or a method that keeps few activations would have its largest memory here.
        batches = self._data.validation.ordered_batches(self._config.images_at_once, runtime.mean, runtime.std)
        logits, labels = predict(self.model, batches, device=runtime.device, precision=runtime.precision)
        if not np.isfinite(logits).all():
            raise DivergedError(f"predictions after step {self.steps} are not finite; lower the learning rate")
        return Evaluation(
            step=self.steps,
            epoch=self.epoch,
            deployable=all(
                hook.deployable(self.steps) if self.steps else hook.start_deployable() for hook in self._hooks
            ),
            metrics=measure(logits, labels),
        )

    def finish(self) -> TrainingResult:
        """Take the chosen weights, those of the last step if nothing was validated, and return what happened."""
        result = self.result
        result.peak_parameters = max(result.peak_parameters, result.initial_parameters)
        result.optimizer_bytes = optimizer_bytes(self._optimizer)
        result.optimizer_sha256 = optimizer_state(self._optimizer).sha256()
        if self.validates:
            result.chosen = self._best.restore(self.model)
        elif not all(hook.deployable(self.steps) for hook in self._hooks):
            raise RuntimeError(
                "the last step's state is not deployable; the schedule was not checked against the steps"
            )
        result.chosen_step = self.steps if result.chosen is None else result.chosen.step
        return result

    def state(self) -> State:
        """Return what a training that is built anew needs to go on from here, to the bit."""
        result = self.result
        counted = {
            "steps": [row.model_dump(mode="json") for row in result.steps],
            "evaluations": [one.model_dump(mode="json") for one in result.evaluations],
            "initial_parameters": result.initial_parameters,
            "peak_parameters": result.peak_parameters,
            "end": self.end,
        }
        return State.of_parts(
            model=model_state(self.model),
            optimizer=optimizer_state(self._optimizer),
            scheduler=State({}, self._scheduler.state_dict()),
            best=self._best.state(),
            counted=State({}, counted),
            generators=generators_state(),
            hooks=State.of_parts(**{str(place): hook.state() for place, hook in enumerate(self._hooks)}),
        )

    def _load(self, state: State) -> None:
        load_optimizer_state(self._optimizer, state.part("optimizer"))
        self._scheduler.load_state_dict(state.part("scheduler").values)
        self._best.load_state(state.part("best"))
        counted, result = state.part("counted").values, self.result
        result.steps = [StepRow.model_validate(row) for row in counted["steps"]]
        result.evaluations = [Evaluation.model_validate(one) for one in counted["evaluations"]]
        self.end = counted["end"]
        result.initial_parameters = counted["initial_parameters"]
        result.peak_parameters = counted["peak_parameters"]
        of_hooks = state.part("hooks")
        if len(of_hooks.values) != len(self._hooks):
            raise ValueError(f"it is of {len(of_hooks.values)} hooks, not {len(self._hooks)}")
        for place, hook in enumerate(self._hooks):
            hook.load_state(self.model, of_hooks.part(str(place)))


@contextmanager
def _of_this_run(state: State) -> Iterator[None]:
    """Refuse a state that can't be loaded within."""
    try:
        with named(state.source):
            yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        if is_out_of_memory(error):  # says nothing of the state
            raise
        reason = f"{type(error).__name__}: {error}"
        problem = f"is not of this run ({reason}); remove it and the run starts anew"
        raise UserError(problem, file=state.source, field="state") from None


_RANKS = TypeAdapter(dict[str, int])


class BestState:
    """Keeps a copy of what was trained, in the best deployable state so far."""

    def __init__(self) -> None:
        self.evaluation: Evaluation | None = None
        self.stale = 0  # deployable evaluations since the best one
        self._ranks: dict[str, int] = {}
        self._tensors: dict[str, Tensor] = {}
        self._source: Path | None = None  # the checkpoint that they came from, if they did

    def offer(self, evaluation: Evaluation, model: nn.Module, *, without_updates: bool = False) -> None:
        """Take a state if it is better; without updates its sites have no rank, which is within every budget."""
        if not evaluation.deployable:
            return
        self.stale += 1
        if self.evaluation is None or _quality(evaluation) > _quality(self.evaluation):
            self.evaluation, self.stale, self._source = evaluation, 0, None
            tensors = trained_tensors(model)
            self._ranks = current_ranks(model)
            if without_updates:
                self._ranks = dict.fromkeys(self._ranks, 0)
                updates = {id(one) for adapter in site_adapters(model).values() for one in adapter.parameters()}
                tensors = {
                    name: one for name, one in model.named_parameters() if name in tensors and id(one) not in updates
                }
            self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def state(self) -> State:
        """Return what it keeps."""
        evaluation = None if self.evaluation is None else self.evaluation.model_dump(mode="json")
        return State(self._tensors, {"evaluation": evaluation, "ranks": self._ranks, "stale": self.stale})

    def load_state(self, state: State) -> None:
        """Go on from such a state."""
        evaluation = state.values["evaluation"]
        self.evaluation = None if evaluation is None else Evaluation.model_validate(evaluation)
        self._ranks = _RANKS.validate_python(state.values["ranks"], strict=True)
        self.stale = int(state.values["stale"])
        self._tensors, self._source = state.tensors, state.source

    def restore(self, model: nn.Module) -> Evaluation:
        """Bring a model to the best state, and return its evaluation."""
        if self.evaluation is None:
            raise RuntimeError("no validation found a deployable state; the schedule was not checked against the steps")
        set_ranks(model, self._ranks, file=self._source)
        restore_trained(model, self._tensors, file=self._source)
        return self.evaluation


def _quality(evaluation: Evaluation) -> tuple[float, float]:
    return evaluation.metrics.accuracy, -evaluation.metrics.nll


class Gauges:
    """Ranks and bits of a model that is ready to be trained; what does not move is looked up once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._adapters = list(site_adapters(model).values())
        self._masked_by_peft = bool(peft_layers(model)) and not self._adapters
        self._quantized = [layer for _, layer in adapted_modules(model) if layer.quantized is not None]
        self._weights = sum(layer.in_features * layer.out_features for layer in self._quantized)
        self._packed_bytes = sum(layer.quantized.nbytes for layer in self._quantized if layer.quantized is not None)

    def progress(self, result: TrainingResult, total_steps: int) -> Progress:
        """Return what a watcher is told after the last step of a training."""
        ranks = [adapter.rank for adapter in self._adapters]
        if self._masked_by_peft:  # PEFT's AdaLoRA only masks triplets
            ranks = list(peft_ranks(self._model).values())
        floats = sum(layer.weight.nbytes for layer in self._quantized if layer.weight is not None)
        return Progress(
            step=len(result.steps),
            total_steps=total_steps,
            loss=result.steps[-1].loss,
            validation_accuracy=result.evaluations[-1].metrics.accuracy if result.evaluations else None,
            mean_rank=sum(ranks) / len(ranks) if ranks else None,
            mean_bits=8 * (self._packed_bytes + floats) / self._weights if self._quantized else None,
        )
