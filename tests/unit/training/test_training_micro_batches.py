"""A batch that passes in parts makes the step, scores and ranks of the whole batch, within rounding."""

import pytest
import torch
from prepared_methods import METHODS, adalora, lora
from torch import nn

from peft_vit.core.adapters import current_ranks, trained_tensors
from peft_vit.core.config import METRICS, TrainingConfig
from peft_vit.core.records import StepRow
from peft_vit.core.training import Hook, train

pytestmark = pytest.mark.part("trainer")
IMAGES = 21  # in batches of 8, 8 and 5: in micro-batches of 4 the last one is of a single image
CLOSE = {"rel": 2e-4, "abs": 1e-7}


class Gradients(Hook):
    """Keeps what a hook sees after the backward pass, and how many images went through the model at a time."""

    name = "gradients"

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []
        self.images: list[int] = []
        model.register_forward_pre_hook(lambda _, given: self.images.append(len(given[0])) if model.training else None)

    def after_backward(self, model, step) -> None:
        trained = model.named_parameters()
        self.seen.append({name: parameter.grad.clone() for name, parameter in trained if parameter.grad is not None})


@pytest.fixture
def trained(tiny_vit, data, runtime):
    """Train a method for some epochs of three steps, by plain descent, which does not enlarge what rounding changes."""

    def run(prepare, micro_batch_size, epochs=4, **training):
        model = tiny_vit()
        hooks = [*prepare(model), Gradients(model)]
        settings = {"batch_size": 8, "learning_rate": 0.02, "optimizer": "sgd", "epochs": epochs, **training}
        settings["augmentation"] = tuple(settings.get("augmentation", ["flip"]))
        config = TrainingConfig(**settings, micro_batch_size=micro_batch_size)
        return model, hooks, train(model, data(train=IMAGES), config, runtime, seed=4, hooks=hooks)

    return run


def numbers_of(row: StepRow) -> dict[str, float]:
    return row.model_dump(exclude={"seconds", "penalties"}, exclude_none=True) | row.penalties


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize(
    "training",
    [
        {},
        {"clip_norm": 0.01},
        {"class_weights": "balanced"},
        {"label_smoothing": 0.2},
        {"augmentation": ["mixup"]},
        {"augmentation": ["cutmix"]},
        {"augmentation": ["flip", "mixup", "cutmix"], "class_weights": "balanced", "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_hooks_see_the_gradient_of_the_whole_batch(trained, training, micro_batch_size) -> None:
    whole, (seen_whole,), expected = trained(lora, None, epochs=1, **training)
    parts, (seen_parts,), result = trained(lora, micro_batch_size, epochs=1, **training)
    assert seen_whole.images == [8, 8, 5]
    assert sum(seen_parts.images) == IMAGES
    assert max(seen_parts.images) == micro_batch_size
    for gradients, in_parts in zip(seen_whole.seen, seen_parts.seen, strict=True):
        torch.testing.assert_close(in_parts, gradients, rtol=1e-3, atol=1e-6)
    for row, other in zip(expected.steps, result.steps, strict=True):
        assert numbers_of(other) == pytest.approx(numbers_of(row), rel=1e-4)
    assert result.chosen.metrics.nll == pytest.approx(expected.chosen.metrics.nll, rel=1e-4)
    torch.testing.assert_close(trained_tensors(parts), trained_tensors(whole), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_scores_as_with_the_whole_batch(trained, metric) -> None:
    """Sites lose their rank, are probed and come back."""
    prepare = adalora(importance_metric=metric, budget_schedule="constant", parametrization="product")
    training = {"class_weights": "balanced", "label_smoothing": 0.1, "augmentation": ["mixup"]}
    _, (whole, _), _ = trained(prepare, None, **training)
    _, (parts, _), _ = trained(prepare, 4, **training)
    expected, controller = whole.controller, parts.controller
    assert controller.rank_history == expected.rank_history
    assert controller.probe_history == expected.probe_history
    assert bool(controller.probe_history) == (METRICS[metric].probe_power is not None)
    assert len(controller.score_history) == len(expected.score_history) > 2
    for scores, in_parts in zip(expected.score_history, controller.score_history, strict=True):
        assert in_parts["scores"] == pytest.approx(scores["scores"], **CLOSE)
    if METRICS[metric].reads_gradient:
        assert len({score for score in controller.score_history[-1]["scores"].values() if score > 0}) > 9


def tensors_of(state) -> list[torch.Tensor]:
    """Return the tensors of a state, in its order, after one value so that there is one."""
    tensors = [torch.zeros(1)]
    for part in state.values() if isinstance(state, dict) else ():
        tensors += [part] if isinstance(part, torch.Tensor) else tensors_of(part)[1:]
    return tensors


@pytest.mark.parametrize(
    "method", ["full", "adalora", "global", "with_penalty", "qa_lora", "managed_pace", "qa_adalora", "peft_adalora"]
)
def test_every_method_takes_the_steps_of_the_whole_batch(trained, method) -> None:
    if method.startswith("peft"):
        pytest.importorskip("peft")
    whole, hooks, expected = trained(METHODS[method], None)
    parts, theirs, result = trained(METHODS[method], 4)
    for row, other in zip(expected.steps, result.steps, strict=True):
        assert numbers_of(other) == pytest.approx(numbers_of(row), **CLOSE)
    assert current_ranks(parts) == current_ranks(whole)
    torch.testing.assert_close(trained_tensors(parts), trained_tensors(whole), rtol=1e-2, atol=1e-5)
    for hook, other in zip(hooks[:-1], theirs[:-1], strict=True):
        if hasattr(hook, "rank_history"):  # PEFT's masks
            assert other.rank_history == hook.rank_history
        tensors = [torch.nn.utils.parameters_to_vector(tensors_of(each.state_dict())) for each in (other, hook)]
        torch.testing.assert_close(*tensors, rtol=1e-2, atol=1e-6)
