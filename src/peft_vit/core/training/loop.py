"""The training loop. It knows no method: hooks score, resize and quantize; it steps, evaluates, chooses, records."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_vit.base.errors import DivergedError, UserError
from peft_vit.core.adapters import (
    adapted_modules,
    current_ranks,
    remember_sources,
    restore_trained,
    set_ranks,
    site_adapters,
    trained_tensors,
    update_ranks,
)
from peft_vit.core.adapters.footprint import optimizer_bytes, trainable_parameters
from peft_vit.core.backbones import Backbone, apply_temperature, freeze_batch_norm
from peft_vit.core.backbones.passes import class_token_alone
from peft_vit.core.config import TrainingConfig
from peft_vit.core.records import Evaluation, Metrics, StepRow
from peft_vit.core.tasks import DecidingMetric, expected_gain
from peft_vit.core.training import processes
from peft_vit.core.training.checkpoint import (
    State,
    generators_state,
    load_generators_state,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_sha256,
)
from peft_vit.core.training.halves import loss_in_halves, takes_halves
from peft_vit.core.training.hooks import Calibration, Hook, HookContext, Overhead, RuntimeConfig, call_each
from peft_vit.core.training.images import Data, mixed
from peft_vit.core.training.metrics import autocast, predict
from peft_vit.core.training.optimization import (
    blocks_of,
    build_optimizer,
    build_scheduler,
    loss_weights,
    one_cycle,
    optimization_step,
    recomputed,
)

_TIMED_STEPS = 8  # by whose pace it is told how many there is time for


@dataclass
class TrainingResult:
    """History and choice of a training; the model is left in the chosen state."""

    steps: list[StepRow] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    chosen: Evaluation | None = None  # None without validation images
    chosen_step: int = 0
    initial_parameters: int = 0
    peak_parameters: int = 0
    optimizer_bytes: int = 0  # when training ended
    optimizer_sha256: str = ""  # when training ended
    overhead_s: Overhead = field(default_factory=Overhead)

    @property
    def seconds_per_step(self) -> float:
        """Return the median time of a step."""
        return statistics.median(row.seconds for row in self.steps)


@dataclass(frozen=True)
class Progress:
    """Progress after a step, for callbacks.

    Attributes:
        step: done so far.
        total_steps: of the run.
        loss: of this step's batch, without penalties.
        validation_score: what decides, at the latest validation; None before the first.
        mean_rank: over the adapted sites; None without any.
        mean_bits: stored bits a weight of the quantized layers, scales, offsets and, as long as the schedule keeps it,
            the float weight included; None without any.
    """

    step: int
    total_steps: int
    loss: float
    validation_score: float | None
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
    probe: Metrics | None = None,
    temperature: float = 1.0,
) -> TrainingResult:
    """Train, evaluate now and then, and leave the model in the deployable state that validation prefers.

    What `training.metric` names chooses on validation; of equal ones the lower NLL. With `keep: last` it has the choice
    of the last step and the start alone, see `DecidingMetric.worth`: of many validations on few images the best one is
    so by luck. Without validation images the last step's model is taken, whatever it is worth. The test split is not
    touched. With `probe` the model as it is before the first step, with its updates left out, is the first that may be
    chosen: the best is never below that on validation, however a forward pass would round.

    Of several processes, see `processes`, the first begins or continues, and hands its state to the others. All take
    the same steps and reach the same state.

    Args:
        model: with adapters attached, on the runtime's device.
        data: images and labels.
        config: how long and how fast.
        runtime: device, precision and normalisation.
        seed: of data order and augmentation.
        hooks: what the method does around a step.
        on_progress: called after each step.
        between_steps: called with how many steps are done, and what returns the training's state then; first before
            the first step, and after the last one of an epoch only when it was validated. It may raise.
        resume: such a state, to continue from; model and hooks are those of the start.
        overhead: takes the seconds of validation and hooks.
        probe: how good the model is on validation before the first step; None: it may not be chosen.
        temperature: what the head's logits are divided by in training, beyond what that was measured with.

    Raises:
        DivergedError: if loss, gradient or predictions are no longer finite.
        UserError: if the state to continue from is of a model with other target modules or shapes, or a `memory_limit`
            has not been replaced by what keeps within it.
    """
    if config.is_undecided:
        message = "is for studies alone; here, give micro_batch_size or activation_checkpointing"
        raise UserError(message, field="training.memory_limit")
    overhead, first = Overhead() if overhead is None else overhead, processes.rank() == 0
    fresh = resume is None and first
    if fresh:
        context = HookContext(Calibration(data, runtime, seed).images, overhead=overhead)
        for hook in hooks:
            hook.begin(model, context)
    if not first:
        resume = processes.of_first(resume)
    training = TrainingState(model, data, config, runtime, hooks, overhead, resume)
    del resume  # or its tensors would stay in memory when ranks or better weights have taken their place

    def report() -> None:
        if on_progress is not None:
            on_progress(training.progress())

    def between() -> None:
        if between_steps is not None:
            between_steps(training.steps, training.state_dict)

    if fresh:
        if probe is not None:
            training.offer(probe)
        apply_temperature(Backbone(model).head, temperature)
    if first and processes.count() > 1:
        processes.of_first(training.state_dict())
    model.train()
    freeze_batch_norm(model)
    between()
    for images, labels, share in training.batches(seed):  # (B, 3, S, S), (B,) or (B, classes)
        training.step(images, labels, share)
        report()
        if training.validates and (training.ended or training.steps in training.validated_at):
            training.validate()
            report()
        between()
    return training.finish()


class TrainingState:
    """A training between two steps: all state that the next one depends on, and the history for the record.

    A step needs less time or memory than it would by lower precision, micro-batches, halves of a batch on two threads,
    the class token alone in the last block, and blocks and codes that the backward pass computes again.

    The arguments are those of `train`; to continue from a state, the model is brought to where it was.
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
        self.validates = len(data.validation) > 0
        self.validated_at = frozenset(config.validation_steps(len(data.train)))
        self._data, self._config, self._runtime, self._hooks = data, config, runtime, hooks
        self._epoch_steps = config.epoch_steps(len(data.train))
        self._metric = data.task.metric(config.metric)
        self._best = BestState(self._metric)
        weights, smoothing = loss_weights(config, data, runtime.device), config.label_smoothing  # (classes,)
        self._loss = partial(data.task.loss, weights=weights, label_smoothing=smoothing, name=config.loss)
        if config.activation_checkpointing in ("light", "adaptive"):
            remember_sources(model)
        blocks = blocks_of(model)
        self._recomputed = blocks[: config.recomputed_of(len(blocks))]
        self._halves = takes_halves(model, runtime.device)
        if resume is not None:
            load_model_state(model, resume["model"])
        self._optimizer = build_optimizer(model, config)
        self._scheduler, self._decay = build_scheduler(self._optimizer, config, self.end)
        if resume is not None:
            self._load_state_dict(resume)
        call_each(hooks, "attach", overhead, model, self._optimizer)
        if resume is not None:  # last: whatever was built again may have drawn from them
            load_generators_state(resume["generators"])

    @property
    def steps(self) -> int:
        """Return how many steps are done."""
        return len(self.result.steps)

    @property
    def ended(self) -> bool:
        """Return whether no step is left."""
        return self.steps >= self.end

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Yield this process's part of a batch for each step that is left, in the order of the seed, and its share.

        Images are (B, 3, S, S), labels (B,), or shares of each class (B, classes) where batches are mixed.
        """
        augmentation, task = self._config.augmentation, self._data.task
        width = task.head_width(self._data.class_names)
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
                of_epoch = self.steps % self._epoch_steps
                share = self._data.train.own_share(self._config.batch_size, of_epoch, augmentation)
                yield (
                    *mixed(images, labels, augmentation, task=task, width=width, seed=seed, step=self.steps + 1),
                    share,
                )
                if self.ended:
                    break

    def _losses(self, images: Tensor, labels: Tensor, share: float) -> Iterator[Tensor]:
        """Yield the part of each micro-batch of M images in the loss of a batch of B: its mean times share * M / B.

        The last batch of an epoch may be smaller, and its last micro-batch too.

        Args:
            images: (B, 3, S, S).
            labels: (B,), or shares of each class (B, classes).
            share: of these images in a batch that several processes have.
        """
        device, at_once = self._runtime.device, self._config.images_at_once

        def loss_of(x: Tensor, targets: Tensor) -> Tensor:
            with autocast(device, self._runtime.precision):
                logits = self.model(x.to(device))  # (M, classes)
            mean = self._loss(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.to(device))
            return mean * (share * len(x) / len(images))

        for x, targets in zip(images.split(at_once), labels.split(at_once), strict=True):  # (M, 3, S, S), (M, ...)
            with class_token_alone(self.model), recomputed(self._recomputed):
                loss = loss_in_halves(loss_of, x, targets) if self._halves and len(x) > 1 else loss_of(x, targets)
            yield loss

    def step(self, images: Tensor, labels: Tensor, share: float) -> None:
        """Do one step on this process's share of a batch, images (B, 3, S, S) and labels (B,) or (B, classes)."""
        started = time.perf_counter()
        learning_rate = self._optimizer.param_groups[0]["lr"]
        notes = {name: value for hook in self._hooks for name, value in hook.notes().items()}
        number = self.steps + 1
        outcome = optimization_step(
            self.model,
            self._optimizer,
            self._losses(images, labels, share),
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
        if self._config.seconds is not None and number % _TIMED_STEPS == 0 and not self.ended:
            self._keep_to(self._config.seconds)

    def _keep_to(self, most_s: float) -> None:
        """Let training end sooner if its steps, at the pace of the latest, would take longer than so many seconds.

        In the first half, a cycle becomes longer again if they are faster by then; first steps are often slow.
        """
        seconds, done = [row.seconds for row in self.result.steps], self.steps
        total = self._config.total_steps(len(self._data.train))
        left = int((most_s - sum(seconds)) / statistics.median(seconds[-_TIMED_STEPS:]))
        end = processes.of_first(min(total, done + max(1, left)))
        if self._decay is not None:
            if end <= self._decay.least_end(done):
                self.end = self._decay.bring_down(done)
        elif end < self.end or (end > self.end and 2 * done < total):
            self.end, self._scheduler = end, one_cycle(self._optimizer, self._config, end, done)

    def validate(self) -> None:
        """Evaluate on the validation split, and remember the weights if they are the best so far.

        Once `patience` validations in a row have brought no gain, the learning rate comes down, or training ends.
        """
        runtime, steps = self._runtime, self.steps
        with self.result.overhead_s.of("evaluation"):
            # No larger than in training, or a method that keeps few activations would have its largest memory here.
            images, logits = self._data.validation, None
            if len(own := processes.own_rows(len(images))):
                part = images if len(own) == len(images) else images.chosen(own)
                batches = part.ordered_batches(self._config.images_at_once, runtime.mean, runtime.std)
                logits, _ = predict(self.model, batches, precision=runtime.precision)
            logits = processes.of_all(logits)  # (N, classes)
            if not np.isfinite(logits).all():
                raise DivergedError(f"predictions after step {steps} are not finite; lower the learning rate")
            self.offer(self._data.task.measure(logits, images.labels))
        stale = evaluations_since_best(self.result.evaluations, self._metric)
        if self._config.patience is not None and stale >= self._config.patience:
            self.end = self.steps if self._decay is None else self._decay.bring_down(self.steps)

    def offer(self, metrics: Metrics) -> None:
        """Take note of how good the model is on validation now, and remember the weights if it is the best so far."""
        steps = self.steps
        within_budget = all(hook.deployable(steps) for hook in self._hooks)
        deployable = within_budget if steps else all(hook.start_deployable() for hook in self._hooks)
        epoch = -(-steps // self._epoch_steps)  # of the last step, from 1; 0 before the first
        evaluation = Evaluation(step=steps, epoch=epoch, deployable=deployable, metrics=metrics)
        self.result.evaluations.append(evaluation)
        if self._config.keep == "best" or not steps:
            self._best.offer(evaluation, self.model, without_updates=not within_budget)

    def progress(self) -> Progress:
        """Return the progress after a step."""
        ranks = update_ranks(self.model).values()
        layers = [layer for _, layer in adapted_modules(self.model) if layer.quantized is not None]
        weights = sum(layer.in_features * layer.out_features for layer in layers)
        tensors = [part for layer in layers for part in (layer.quantized, layer.weight) if part is not None]
        return Progress(
            step=self.steps,
            total_steps=self.end,
            loss=self.result.steps[-1].loss,
            validation_score=self._metric.of(self.result.evaluations[-1].metrics) if self.result.evaluations else None,
            mean_rank=sum(ranks) / len(ranks) if ranks else None,
            mean_bits=8 * sum(part.nbytes for part in tensors) / weights if layers else None,
        )

    def finish(self) -> TrainingResult:
        """Load the chosen weights, those of the last step without validation, and return the result."""
        result = self.result
        result.peak_parameters = max(result.peak_parameters, result.initial_parameters)
        result.optimizer_bytes = optimizer_bytes(self._optimizer)
        result.optimizer_sha256 = optimizer_sha256(self._optimizer)
        if self.validates:
            start, final = self._best.evaluation, result.evaluations[-1]
            gain, images = expected_gain(self.steps), self._metric.images_alike(self._data.validation.labels)
            is_worth = start is None or self._metric.worth(
                final.metrics, before=start.metrics, expected=gain, images=images
            )
            if self._config.keep == "last" and final.deployable and is_worth:
                self._best.take(final, self.model)
            result.chosen = self._best.restore(self.model)
        result.chosen_step = self.steps if result.chosen is None else result.chosen.step
        return result

    def state_dict(self) -> State:
        """Return the state from which a training that is built again continues to the bit."""
        result = self.result
        return State(
            model=model_state(self.model),
            optimizer=self._optimizer.state_dict(),
            scheduler=self._scheduler.state_dict(),
            best=self._best.state_dict(),
            hooks=[hook.state_dict() for hook in self._hooks],
            steps=[row.model_dump(mode="json") for row in result.steps],
            evaluations=[evaluation.model_dump(mode="json") for evaluation in result.evaluations],
            initial_parameters=result.initial_parameters,
            peak_parameters=result.peak_parameters,
            end=self.end,
            generators=generators_state(),
        )

    def _load_state_dict(self, state: State) -> None:
        load_optimizer_state(self._optimizer, state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self._best.load_state_dict(state["best"])
        self.result.steps = [StepRow.model_validate(row) for row in state["steps"]]
        self.result.evaluations = [Evaluation.model_validate(evaluation) for evaluation in state["evaluations"]]
        self.result.initial_parameters = state["initial_parameters"]
        self.result.peak_parameters = state["peak_parameters"]
        self.end = state["end"]
        for hook, of_hook in zip(self._hooks, state["hooks"], strict=True):
            hook.load_state_dict(of_hook, self.model)


def evaluations_since_best(evaluations: Sequence[Evaluation], metric: DecidingMetric) -> int:
    """Return how many deployable evaluations came after the best one, of equal ones the first."""
    quality = [metric.quality(evaluation.metrics) for evaluation in evaluations if evaluation.deployable]
    best = max(range(len(quality)), key=quality.__getitem__, default=-1)
    return len(quality) - 1 - best


class BestState:
    """A copy of the trained tensors in the best deployable state so far by the deciding metric."""

    def __init__(self, metric: DecidingMetric) -> None:
        self._quality = metric.quality
        self.evaluation: Evaluation | None = None
        self._ranks: dict[str, int] = {}
        self._tensors: dict[str, Tensor] = {}

    def offer(self, evaluation: Evaluation, model: nn.Module, *, without_updates: bool = False) -> None:
        """Take a deployable state if it is better."""
        best = self.evaluation
        if evaluation.deployable and (best is None or self._quality(evaluation.metrics) > self._quality(best.metrics)):
            self.take(evaluation, model, without_updates=without_updates)

    def take(self, evaluation: Evaluation, model: nn.Module, *, without_updates: bool = False) -> None:
        """Take a state; without updates its sites have no rank, which is within every budget."""
        self.evaluation = evaluation
        tensors, self._ranks = trained_tensors(model), current_ranks(model)
        if without_updates:
            self._ranks = dict.fromkeys(self._ranks, 0)
            updates = {id(p) for adapter in site_adapters(model).values() for p in adapter.parameters()}
            of_updates = {name for name, p in model.named_parameters() if id(p) in updates}
            tensors = {name: tensor for name, tensor in tensors.items() if name not in of_updates}
        self._tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def restore(self, model: nn.Module) -> Evaluation:
        """Bring a model to the best state, and return its evaluation."""
        if self.evaluation is None:
            raise RuntimeError("no validation found a deployable state; the schedule was not checked against the steps")
        set_ranks(model, self._ranks)
        restore_trained(model, self._tensors)
        return self.evaluation

    def state_dict(self) -> dict[str, Any]:
        """Return evaluation, ranks and tensors of the best state."""
        evaluation = None if self.evaluation is None else self.evaluation.model_dump(mode="json")
        return {"evaluation": evaluation, "ranks": self._ranks, "tensors": self._tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from such a state."""
        if state["evaluation"] is not None:
            self.evaluation = Evaluation.model_validate(state["evaluation"])
        self._tensors, self._ranks = dict(state["tensors"]), dict(state["ranks"])
