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

from peft_vit.adapters import current_ranks, restore_trained, set_ranks, site_adapters, trained_tensors
from peft_vit.config import TrainingConfig
from peft_vit.data import Data
from peft_vit.errors import DivergedError, UserError, is_out_of_memory, named
from peft_vit.evaluation import measure, optimizer_bytes, predict, trainable_parameters
from peft_vit.records import Evaluation, StepRow
from peft_vit.training.keeping import (
    generators_state,
    load_generators_state,
    load_model_state,
    load_optimizer_state,
    model_state,
    optimizer_state,
)
from peft_vit.training.learning_rate import build_scheduler
from peft_vit.training.loss import Criterion, class_weights, weighted_cross_entropy
from peft_vit.training.optimization import StepHook, optimization_step
from peft_vit.training.progress import Gauges, Progress
from peft_vit.training.runtime import RuntimeConfig
from peft_vit.training.state import State


@dataclass
class TrainingResult:
    """What the loop saw. The model is left in the chosen state."""

    steps: list[StepRow] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    chosen: Evaluation | None = None
    initial_parameters: int = 0
    peak_parameters: int = 0
    optimizer_bytes: int = 0  # when training ended
    optimizer_sha256: str = ""  # likewise
    overhead_s: dict[str, float] = field(default_factory=dict)

    @property
    def seconds_per_step(self) -> float:
        """Return the median time of a step."""
        return statistics.median(row.seconds for row in self.steps)


def steps_per_epoch(train_images: int, batch_size: int) -> int:
    """Return the number of batches that hold every image once; the last one may be smaller."""
    return -(-train_images // batch_size)


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """Return the optimiser over everything that is trainable."""
    assert config.learning_rate is not None
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, config.learning_rate, momentum=0.9, weight_decay=config.weight_decay)
    fused = {parameter.device.type for parameter in parameters} <= {"cpu", "cuda"}  # one kernel a tensor, not twelve
    return torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay, fused=fused)


def train(
    model: nn.Module,
    data: Data,
    config: TrainingConfig,
    setting: RuntimeConfig,
    *,
    seed: int,
    hooks: Sequence[StepHook] = (),
    on_progress: Callable[[Progress], None] | None = None,
    between_steps: Callable[[int, Callable[[], State]], None] | None = None,
    resume: State | None = None,
) -> TrainingResult:
    """Train, evaluate now and then, and leave the model in the deployable state that validation prefers.

    Validation accuracy chooses; of equal ones the lower NLL. The test split is not touched. With `head_start: probe`
    the model as it is before the first step, with its updates left out, is the first that may be chosen: training
    never returns less, on validation, than the head it started from.

    Args:
        model: with adapters attached, on the setting's device.
        data: images and labels.
        config: how long and how fast.
        setting: device, precision and normalisation.
        seed: of data order and augmentation.
        hooks: what the method does around a step.
        on_progress: told after each step.
        between_steps: told how many steps are done, and handed what returns the training's state then; first before
            the first step, and after the last one of an epoch only when it was validated. It may raise.
        resume: such a state, to go on from; model and hooks are those of the start.

    Raises:
        DivergedError: if loss, gradient or predictions are no longer finite.
        UserError: if the state to go on from is not one of this training's.
    """
    epoch_steps = steps_per_epoch(len(data.train), config.batch_size)
    course = _Course(model, config, hooks, len(data.train), resume)
    fresh = resume is None
    del resume  # or its tensors would stay in memory when ranks or better weights have taken their place
    result, gauges = course.result, Gauges(model)
    weights = class_weights(data.train.labels, len(data.class_names)) if config.class_weights else None
    criterion = partial(weighted_cross_entropy, weights=None if weights is None else weights.to(setting.device))

    def tell(loss: float) -> None:
        if on_progress is not None:
            last = result.evaluations[-1].metrics.accuracy if result.evaluations else None
            ranks, bits = gauges.mean_rank(), gauges.mean_bits()
            on_progress(Progress(len(result.steps), course.end, loss, last, ranks, bits))

    def pause() -> None:
        if between_steps is not None:
            between_steps(len(result.steps), course.state)

    if fresh and config.head_start == "probe":
        course.validate(data, setting, epoch=0)
    model.train()
    pause()
    while not course.ended:
        epoch = len(result.steps) // epoch_steps + 1
        batches = data.train.shuffled_batches(
            config.batch_size,
            setting.mean,
            setting.std,
            flips=setting.flips,
            seed=seed,
            epoch=epoch,
            skip=len(result.steps) % epoch_steps,
        )
        for images, labels in batches:
            course.step(criterion, images, labels, setting)
            tell(result.steps[-1].loss)
            if course.validation_is_due:
                course.validate(data, setting, epoch)
                course.end_if_nothing_is_gained()
                tell(result.steps[-1].loss)
            pause()
            if course.ended:
                break
    return course.finish()


class _Course:
    """A training between two steps: all that the next one depends on, and what the record will say of those before.

    Args:
        model: with adapters attached; under `resume` brought to where it was.
        config: how long and how fast.
        hooks: likewise.
        train_images: of an epoch.
        resume: a state of this class, or None at the start.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        hooks: Sequence[StepHook],
        train_images: int,
        resume: State | None,
    ) -> None:
        self.model = model
        self.config = config
        self.end = config.total_steps(train_images)
        self._validated_at = frozenset(config.validation_steps(train_images))
        self.hooks = [_Timed(hook) for hook in hooks]
        self.result = TrainingResult(initial_parameters=trainable_parameters(model))
        self.best = _Best()
        if resume is not None:
            self._refuse_another_state(lambda state: load_model_state(model, state.part("model")), resume)
        self.optimizer = build_optimizer(model, config)
        self.scheduler, self._decay = build_scheduler(self.optimizer, config, self.end)
        if resume is not None:
            self._refuse_another_state(self._load, resume)
        for hook in self.hooks:
            hook.attach(model, self.optimizer)
        if resume is not None:  # last: whatever was built anew may have drawn from them
            self._refuse_another_state(lambda state: load_generators_state(state.part("generators")), resume)

    def step(self, criterion: Criterion, images: Tensor, labels: Tensor, setting: RuntimeConfig) -> None:
        """Do one step on a batch."""
        result = self.result
        number = len(result.steps) + 1
        row = _step(self.model, self.optimizer, criterion, images, labels, number, self.config, setting, self.hooks)
        self.scheduler.step()
        result.steps.append(row)
        result.peak_parameters = max(result.peak_parameters, trainable_parameters(self.model))

    @property
    def ended(self) -> bool:
        """Return whether no step is left."""
        return len(self.result.steps) >= self.end

    @property
    def validation_is_due(self) -> bool:
        """Return whether validation comes after the last step."""
        return self.ended or len(self.result.steps) in self._validated_at

    def end_if_nothing_is_gained(self) -> None:
        """Let the learning rate come down, or end, once `patience` validations in a row have brought no gain."""
        if self.config.patience is None or self.best.stale < self.config.patience:
            return
        if self._decay is None:
            self.end = len(self.result.steps)
        else:
            self.end = self._decay.bring_down(len(self.result.steps))

    def validate(self, data: Data, setting: RuntimeConfig, epoch: int) -> None:
        """Evaluate on the validation split, and remember the weights if they are the best so far."""
        started = time.perf_counter()
        result = self.result
        evaluation = _validate(self.model, data, self.config, setting, len(result.steps), epoch, self.hooks)
        result.evaluations.append(evaluation)
        final = all(hook.deployable(evaluation.step) for hook in self.hooks)
        self.best.offer(evaluation, self.model, without_updates=not final)
        result.overhead_s["evaluation"] = result.overhead_s.get("evaluation", 0.0) + time.perf_counter() - started

    def finish(self) -> TrainingResult:
        """Take the chosen weights, and return what happened."""
        result = self.result
        result.peak_parameters = max(result.peak_parameters, result.initial_parameters)
        result.optimizer_bytes = optimizer_bytes(self.optimizer)
        result.optimizer_sha256 = optimizer_state(self.optimizer).sha256()
        for hook in self.hooks:
            for purpose, seconds in hook.seconds.items():
                result.overhead_s[purpose] = result.overhead_s.get(purpose, 0.0) + seconds
        result.chosen = self.best.restore(self.model)
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
            "overhead_s": dict(result.overhead_s),
            "hooks_s": [dict(hook.seconds) for hook in self.hooks],
        }
        return State.of_parts(
            model=model_state(self.model),
            optimizer=optimizer_state(self.optimizer),
            scheduler=State({}, self.scheduler.state_dict()),
            best=self.best.state(),
            counted=State({}, counted),
            generators=generators_state(),
            hooks=State.of_parts(**{str(place): hook.state() for place, hook in enumerate(self.hooks)}),
        )

    def _load(self, state: State) -> None:
        load_optimizer_state(self.optimizer, state.part("optimizer"))
        self.scheduler.load_state_dict(state.part("scheduler").values)
        self.best.load_state(state.part("best"))
        counted, result = state.part("counted").values, self.result
        result.steps = [StepRow.model_validate(row) for row in counted["steps"]]
        result.evaluations = [Evaluation.model_validate(one) for one in counted["evaluations"]]
        self.end = counted["end"]
        result.initial_parameters = counted["initial_parameters"]
        result.peak_parameters = counted["peak_parameters"]
        result.overhead_s = dict(counted["overhead_s"])
        for place, (hook, seconds) in enumerate(zip(self.hooks, counted["hooks_s"], strict=True)):
            hook.seconds = dict(seconds)
            hook.load_state(self.model, state.part("hooks").part(str(place)))

    def _refuse_another_state(self, load: Callable[[State], None], state: State) -> None:
        try:
            with named(state.source):
                load(state)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            if is_out_of_memory(error):  # says nothing of the state
                raise
            reason = f"{type(error).__name__}: {error}"
            problem = f"is not of this run ({reason}); remove it and the run starts anew"
            raise UserError(problem, file=state.source, field="state") from None


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    criterion: Criterion,
    images: Tensor,
    labels: Tensor,
    step: int,
    config: TrainingConfig,
    setting: RuntimeConfig,
    hooks: Sequence[StepHook],
) -> StepRow:
    started = time.perf_counter()
    learning_rate = optimizer.param_groups[0]["lr"]
    notes = {name: value for hook in hooks for name, value in hook.notes().items()}
    with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.precision == "bf16"):
        logits = model(images.to(setting.device))
    loss = criterion(logits.float(), labels.to(setting.device))
    outcome = optimization_step(model, optimizer, loss, step, hooks=hooks, clip_norm=config.clip_norm)
    return StepRow(
        step=step,
        loss=outcome.loss,
        learning_rate=learning_rate,
        gradient_norm=outcome.gradient_norm,
        seconds=time.perf_counter() - started,
        penalties=outcome.penalties,
        **notes,
    )


def _validate(
    model: nn.Module,
    data: Data,
    config: TrainingConfig,
    setting: RuntimeConfig,
    step: int,
    epoch: int,
    hooks: Sequence[StepHook],
) -> Evaluation:
    # No larger than in training, or a method that keeps few activations would have its largest memory here.
    batches = data.validation.ordered_batches(config.batch_size, setting.mean, setting.std)
    logits, labels = predict(model, batches, device=setting.device, precision=setting.precision)
    if not np.isfinite(logits).all():
        raise DivergedError(f"predictions after step {step} are not finite; lower the learning rate")
    metrics = measure(logits, labels)
    deployable = all(hook.deployable(step) if step else hook.start_deployable() for hook in hooks)
    return Evaluation(step=step, epoch=epoch, deployable=deployable, metrics=metrics)


_RANKS = TypeAdapter(dict[str, int])


class _Best:
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
        evaluation = None if self.evaluation is None else self.evaluation.model_dump(mode="json")
        return State(self._tensors, {"evaluation": evaluation, "ranks": self._ranks, "stale": self.stale})

    def load_state(self, state: State) -> None:
        evaluation = state.values["evaluation"]
        self.evaluation = None if evaluation is None else Evaluation.model_validate(evaluation)
        self._ranks = _RANKS.validate_python(state.values["ranks"], strict=True)
        self.stale = int(state.values["stale"])
        self._tensors, self._source = state.tensors, state.source

    def restore(self, model: nn.Module) -> Evaluation:
        if self.evaluation is None:
            raise RuntimeError("no validation found a deployable state; the schedule was not checked against the steps")
        set_ranks(model, self._ranks, file=self._source)
        restore_trained(model, self._tensors, file=self._source)
        return self.evaluation


def _quality(evaluation: Evaluation) -> tuple[float, float]:
    return evaluation.metrics.accuracy, -evaluation.metrics.nll


class _Timed:
    """Adds up the seconds that a hook takes, by purpose; otherwise it is the hook."""

    def __init__(self, hook: StepHook) -> None:
        self.hook = hook
        self.name = hook.name
        self.seconds: dict[str, float] = {}

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with self._counted("attach"):
            self.hook.attach(model, optimizer)

    def penalties(self, model: nn.Module) -> dict[str, Tensor]:
        with self._counted("penalties"):
            return self.hook.penalties(model)

    def after_backward(self, model: nn.Module, step: int) -> None:
        with self._counted("after_backward"):
            self.hook.after_backward(model, step)

    def before_step(self, model: nn.Module, step: int) -> None:
        with self._counted("before_step"):
            self.hook.before_step(model, step)

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        with self._counted("after_step"):
            self.hook.after_step(model, optimizer, step)

    @contextmanager
    def _counted(self, call: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        purpose = getattr(self.hook, "purposes", {}).get(call, self.name)
        self.seconds[purpose] = self.seconds.get(purpose, 0.0) + time.perf_counter() - started

    def notes(self) -> dict[str, float]:
        return self.hook.notes()

    def deployable(self, step: int) -> bool:
        return self.hook.deployable(step)

    def start_deployable(self) -> bool:
        return self.hook.start_deployable()

    def state(self) -> State:
        return self.hook.state()

    def load_state(self, model: nn.Module, state: State) -> None:
        self.hook.load_state(model, state)
