"""The loop equals a plain one, chooses among deployable states, leaves the test split alone; what watchers read."""

from dataclasses import replace

import allocation_runs
import numpy as np
import pytest
import torch
from prepared_methods import METHODS, DeployableFrom
from tiny_models import random_model
from torch.nn import functional as F

from peft_vit import AdaLoRAController
from peft_vit.core.adapters import adapted_modules, attach_adapters, current_ranks, set_ranks
from peft_vit.core.adapters.footprint import trainable_parameters
from peft_vit.core.adapters.low_rank import SiteAdapter
from peft_vit.core.adapters.peft_layers import peft_ranks
from peft_vit.core.backbones import find_sites
from peft_vit.core.config import AUGMENTATION_OF_FLIPS, TrainingConfig
from peft_vit.core.records import Evaluation, Metrics
from peft_vit.core.tasks import CLASSIFICATION
from peft_vit.core.tasks.classification import ACCURACY, BALANCED_ACCURACY
from peft_vit.core.training import AllocationHook, loss_weights, train
from peft_vit.core.training.loop import BestState, evaluations_since_best
from peft_vit.core.training.metrics import predict

pytestmark = pytest.mark.part("trainer")


def config(**settings) -> TrainingConfig:
    return TrainingConfig(**{"epochs": 3, "batch_size": 8, "learning_rate": 3e-3, **settings})


def lora(model):
    attach_adapters(model, find_sites(model), 2, scale=2.0, seed=0)
    return model


def metrics_of(accuracy: float, **others: float) -> Metrics:
    return Metrics(**{"n": 9, "accuracy": accuracy, "balanced_accuracy": accuracy, "nll": 1.0, "ece": 0.0, **others})


def plain_loop(model, data, runtime, weights) -> list[float]:
    """Train as a person would, without the package's loop, and return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3, weight_decay=0.01)
    course = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=9, cycle_momentum=False)
    losses = []
    for epoch in (1, 2, 3):
        for images, labels in data.train.shuffled_batches(
            8, runtime.mean, runtime.std, augmentation=AUGMENTATION_OF_FLIPS["horizontal"], seed=4, epoch=epoch
        ):
            losses_by_image = F.cross_entropy(model(images), labels, reduction="none")
            loss = (losses_by_image * (1 if weights is None else weights[labels])).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            course.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("weighted", [False, True])
def test_it_equals_a_plain_loop(tiny_vit, data, runtime, weighted) -> None:
    images = data()
    counts = np.bincount(images.train.labels)
    assert set(counts) == {3, 6}
    weights = torch.tensor(18 / (5 * counts), dtype=torch.float32)
    torch.testing.assert_close(loss_weights(config(class_weights="balanced"), images, runtime.device), weights)
    result = train(
        lora(tiny_vit()),
        images,
        config(class_weights="balanced" if weighted else "none"),
        runtime,
        seed=4,
        hooks=[DeployableFrom(9)],
    )
    expected = plain_loop(lora(tiny_vit()), images, runtime, weights if weighted else None)
    assert [row.loss for row in result.steps] == pytest.approx(expected, rel=1e-5)
    assert [row.step for row in result.steps] == list(range(1, 10))
    assert all(row.quantized_share is None for row in result.steps)
    assert result.seconds_per_step == np.median([row.seconds for row in result.steps])
    assert min(expected[-3:]) < expected[0]  # it learns


def test_validation_chooses_the_best_deployable_epoch_and_the_model_is_left_there(tiny_vit, data, runtime) -> None:
    free = train(lora(tiny_vit()), data(), config(), runtime, seed=0)
    assert [evaluation.step for evaluation in free.evaluations] == [3, 6, 9]
    best = max(free.evaluations, key=lambda e: (e.metrics.accuracy, -e.metrics.nll))
    assert free.chosen == best
    for earliest in (1, 4, 7):
        model, images = lora(tiny_vit()), data()
        result = train(model, images, config(), runtime, seed=0, hooks=[DeployableFrom(earliest)])
        allowed = [evaluation for evaluation in result.evaluations if evaluation.step >= earliest]
        assert [evaluation.deployable for evaluation in result.evaluations] == [s >= earliest for s in (3, 6, 9)]
        assert result.chosen == max(allowed, key=lambda e: (e.metrics.accuracy, -e.metrics.nll))
        batches = images.validation.ordered_batches(32, runtime.mean, runtime.std)
        assert CLASSIFICATION.measure(*predict(model, batches, precision="fp32")) == result.chosen.metrics
    with pytest.raises(RuntimeError, match="no validation found a deployable state"):
        train(lora(tiny_vit()), data(), config(), runtime, seed=0, hooks=[DeployableFrom(10)])


@pytest.mark.parametrize(("start", "chosen"), [(0.0, 9), (0.6, 9), (0.9, 0)])
def test_the_last_step_is_kept_unless_the_start_is_better(tiny_vit, data, runtime, monkeypatch, start, chosen) -> None:
    said = iter((0.9, 0.95, 0.5))  # after steps 3, 6 and 9
    monkeypatch.setattr(type(CLASSIFICATION), "measure", lambda *_: metrics_of(next(said)))
    watched, unwatched = lora(tiny_vit()), lora(tiny_vit())
    nine = replace(data(), validation=data().validation.chosen(np.arange(9)))
    result = train(watched, nine, config(keep="last"), runtime, seed=0, probe=metrics_of(start))
    assert [evaluation.step for evaluation in result.evaluations] == [0, 3, 6, 9]
    assert result.chosen_step == chosen
    blind = replace(data(), validation=data().validation.chosen(np.empty(0, dtype=np.int64)))
    train(unwatched, blind, config(), runtime, seed=0)
    ends = [torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]) for model in (watched, unwatched)]
    assert torch.equal(*ends) == (chosen == 9)


def test_balanced_accuracy_chooses_and_counts_patience_where_it_decides() -> None:
    rows = [(0.9, 0.5), (0.8, 0.6), (0.8, 0.6), (0.85, 0.55)]  # accuracy, balanced accuracy
    chosen = {}
    for metric in (ACCURACY, BALANCED_ACCURACY):
        best, evaluations = BestState(metric), []
        for step, (accuracy, balanced) in enumerate(rows):
            metrics = metrics_of(accuracy, balanced_accuracy=balanced, nll=1.0 - step)
            evaluations.append(Evaluation(step=step, epoch=step, deployable=True, metrics=metrics))
            best.offer(evaluations[-1], torch.nn.Linear(1, 1))
        chosen[metric.name] = (best.evaluation.step, evaluations_since_best(evaluations, metric))
    assert chosen == {"accuracy": (0, 3), "balanced_accuracy": (2, 1)}  # of equal ones the lower loss


def test_an_earlier_choice_comes_back_with_its_ranks(tiny_vit, batch, fill_adapters) -> None:
    def evaluation(step: int, accuracy: float) -> Evaluation:
        return Evaluation(step=step, epoch=step, deployable=True, metrics=metrics_of(accuracy))

    model, best = lora(tiny_vit()), BestState(ACCURACY)
    fill_adapters(model)
    ranks = current_ranks(model)
    with torch.no_grad():
        logits = model(batch[0])
    best.offer(evaluation(1, 0.9), model)
    set_ranks(model, dict.fromkeys(ranks, 1))
    best.offer(evaluation(2, 0.8), model)
    best.offer(evaluation(3, 0.9), model)  # of equal ones the first stays
    assert best.restore(model).step == 1
    assert current_ranks(model) == ranks
    with torch.no_grad():
        assert torch.equal(model(batch[0]), logits)


def test_counts_and_history_with_moving_ranks(tiny_vit, data, runtime) -> None:
    model = tiny_vit()
    settings = allocation_runs.config(
        total_rank_budget=12, initial_budget=36, allocation_strategy="top_k", importance_metric="fisher", final_steps=3
    )
    hook = AllocationHook(AdaLoRAController(model, settings, 9))
    before = trainable_parameters(model)
    result = train(model, data(), config(), runtime, seed=0, hooks=[hook])
    assert result.initial_parameters == before
    assert result.peak_parameters >= before > trainable_parameters(model)
    assert sum(current_ranks(model).values()) == 12
    assert [evaluation.deployable for evaluation in result.evaluations] == [False, True, True]
    assert result.overhead_s.keys() == {"scoring", "reallocation", "penalty", "evaluation"}
    assert result.optimizer_bytes >= 2 * 4 * trainable_parameters(model)


def test_seconds_count_by_the_purpose_of_each_call(tiny_vit, data, runtime, monkeypatch) -> None:
    class Slow(DeployableFrom):
        """Lets the clock go on by a power of ten in each call, so that sums tell who is in them."""

        def attach(self, model, optimizer) -> None:
            now[0] += 1e-4

        def penalties(self, model):
            now[0] += 1e-3
            return {}

        def after_backward(self, model, step) -> None:
            now[0] += 0.01

        def before_step(self, model, step) -> None:
            now[0] += 0.1

        def after_step(self, model, optimizer, step) -> None:
            now[0] += 1.0

    class Split(Slow):
        name = "allocation"
        purposes = AllocationHook.purposes

    now = [0.0]
    monkeypatch.setattr("peft_vit.core.training.hooks.time.perf_counter", lambda: now[0])
    result = train(lora(tiny_vit()), data(), config(epochs=1), runtime, seed=0, hooks=[Slow(1), Split(1)])  # 3 steps
    assert result.overhead_s.pop("evaluation") == 0
    assert result.overhead_s == {
        "late": pytest.approx(3 * 1.111 + 1e-4),
        "scoring": pytest.approx(3 * 0.11),
        "reallocation": pytest.approx(3 + 1e-4),
        "penalty": pytest.approx(3e-3),
    }


def test_bf16_trains_float32_parameters(tiny_vit, data, runtime) -> None:
    model = lora(tiny_vit())
    reduced = type(runtime)(runtime.device, "bf16", runtime.mean, runtime.std)
    result = train(model, data(), config(epochs=1), reduced, seed=0)
    full = train(lora(tiny_vit()), data(), config(epochs=1), runtime, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert result.steps[0].loss == pytest.approx(full.steps[0].loss, rel=0.05)
    assert result.steps[0].loss != full.steps[0].loss


@pytest.mark.parametrize("method", ["lora", "full"])
def test_batch_norm_keeps_the_statistics_of_pretraining(data, runtime, method) -> None:
    """What is kept of a run are parameters, so a model that comes back has to compute with the statistics it had."""
    model = random_model("tiny_hybrid")
    if method == "lora":
        lora(model)
    statistics = {name: tensor.clone() for name, tensor in model.named_buffers() if "running" in name}
    assert statistics
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if ".bn.weight" in name}
    seen = []
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.register_forward_hook(lambda module, _, __: seen.append(module.training))
    train(model, data(), config(epochs=1), runtime, seed=4)
    assert all(torch.equal(dict(model.named_buffers())[name], tensor) for name, tensor in statistics.items())
    assert seen
    assert not any(seen)
    moved = [not torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in before.items()]
    assert moved == [method == "full"] * len(moved)


def stored_bits(model) -> float:
    bits = weights = 0
    for _, layer in adapted_modules(model):
        floats = [] if layer.weight is None else [layer.weight]
        stored = [layer.quantized.codes, layer.quantized.scales, layer.quantized.offsets, *floats]
        bits += sum(8 * tensor.element_size() * tensor.numel() for tensor in stored)
        weights += layer.in_features * layer.out_features
    return bits / weights


def rows(model) -> list[int]:
    return [len(module.lora_A) for module in model.modules() if isinstance(module, SiteAdapter)]


@pytest.mark.parametrize("method", ["linear", "lora", "adalora", "peft_adalora", "qa_lora"])
def test_a_watcher_reads_what_the_tensors_say(tiny_vit, data, runtime, method) -> None:
    if method.startswith("peft"):
        pytest.importorskip("peft")
    model, reports = tiny_vit(), []
    hooks = METHODS[method](model)

    def watch(progress) -> None:
        reports.append(progress)
        ranks = list(peft_ranks(model).values()) if method == "peft_adalora" else rows(model)
        assert progress.mean_rank == (np.mean(ranks) if ranks else None)
        assert progress.mean_bits == (pytest.approx(stored_bits(model)) if method == "qa_lora" else None)

    train(model, data(), config(epochs=4), runtime, seed=0, hooks=hooks, on_progress=watch)
    steps = [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12, 12]
    assert [(progress.step, progress.total_steps) for progress in reports] == [(step, 12) for step in steps]
    assert [progress.validation_score is None for progress in reports] == [True] * 3 + [False] * 13
    assert (len({progress.mean_rank for progress in reports}) > 1) == method.endswith("adalora")
    if method == "qa_lora":  # 4 bits, and a scale and an offset of 16 bits for 16 weights; before, a float beside them
        assert {round(progress.mean_bits, 6) for progress in reports} == {38.0, 6.0}
