"""The probe is the optimum that an independent solver finds, and its features are what the head sees."""

import numpy as np
import pytest
import torch
from qa_lora_settings import config as qa_lora
from scipy.optimize import minimize
from scipy.special import logsumexp
from sklearn.linear_model import Ridge
from torch import nn

from peft_vit import QALoRATrainer
from peft_vit.core.adapters import freeze_backbone
from peft_vit.core.backbones import find_sites
from peft_vit.core.tasks import REGRESSION
from peft_vit.core.tasks.classification import ACCURACY, BALANCED_ACCURACY
from peft_vit.core.training import FLIP_AXES, Features, can_hold_out, fit_probe, head_inputs, head_logits, held_out_fit
from peft_vit.core.training.images import LabelledImages

pytestmark = pytest.mark.part("runner")


def features(classes: int, count: int = 90, width: int = 6, seed: int = 0) -> Features:
    """Make overlapping classes, unequally frequent, with features of unlike means and spreads."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, count) // 2 * 2 % classes])
    values = np.random.default_rng(9).normal(size=(classes, width))[labels] + rng.normal(size=(len(labels), width))
    values = values * np.linspace(0.2, 3, width) + np.linspace(-4, 4, width)
    return Features(values.astype(np.float32), labels.astype(np.int64))


def softmax_objective(flat, z, labels, weights, l2, classes):
    """Return the penalized mean loss and its gradient, with a row of weights for every class, also for two."""
    weight, bias = flat[:-classes].reshape(classes, -1), flat[-classes:]
    logits = z @ weight.T + bias
    log_p = logits - logsumexp(logits, axis=1, keepdims=True)
    share = weights / weights.sum()
    value = -(share * log_p[np.arange(len(z)), labels]).sum() + l2 / 2 * (weight**2).sum()
    residual = share[:, None] * (np.exp(log_p) - np.eye(classes)[labels])
    return value, np.concatenate([(residual.T @ z + l2 * weight).ravel(), residual.sum(0)])


def logits_of(probe, features: Features):
    return features.values.astype(np.float64) @ probe.weight.double().numpy().T + probe.bias.double().numpy()


def nll(logits, labels) -> float:
    return float(np.mean(logsumexp(logits, axis=1) - logits[np.arange(len(logits)), labels]))


def centred(logits):
    """Take away what a softmax does not see."""
    return logits - logits.mean(1, keepdims=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("l2", [0.03, 0.3])  # the fit is off by its gradient over l2 at most
def test_it_is_the_optimum_that_another_solver_finds(runtime, classes, weighted, l2) -> None:
    train, other = features(classes), features(classes, count=40, seed=1)
    by_class = np.linspace(0.5, 2.5, classes) if weighted else None
    probe = fit_probe(train, other, nn.Linear(6, classes), runtime, ACCURACY, class_weights=by_class, l2=(l2,))

    x = train.values.astype(np.float64)
    mean, spread = x.mean(0), x.std(0)
    weights = np.ones(len(x)) if by_class is None else by_class[train.labels]
    arguments = (x - mean) / spread, train.labels, weights, l2, classes
    optimum = minimize(
        softmax_objective,
        np.zeros(7 * classes),
        arguments,
        method="L-BFGS-B",
        jac=True,
        options={"maxiter": 20_000, "maxfun": 20_000, "ftol": 0, "gtol": 1e-10},
    )
    assert np.linalg.norm(softmax_objective(optimum.x, *arguments)[1]) < 1e-7
    weight, bias = optimum.x[:-classes].reshape(classes, -1), optimum.x[-classes:]
    for split in (train, other):  # the head takes features as they are: the standardization is folded into it
        expected = ((split.values - mean) / spread) @ weight.T + bias
        np.testing.assert_allclose(centred(logits_of(probe, split)), centred(expected), rtol=0, atol=1e-5)

    assert probe.fit.gradient_norm < 1e-5
    unfolded = probe.weight.double().numpy() * spread
    at = np.concatenate([unfolded.ravel(), probe.bias.double().numpy() + probe.weight.double().numpy() @ mean])
    assert np.linalg.norm(softmax_objective(at, *arguments)[1]) < 1e-5
    task_loss = optimum.fun - l2 / 2 * (weight**2).sum()
    assert probe.steps[0].loss == pytest.approx(task_loss, abs=1e-6)


def test_a_constant_feature_does_no_harm(runtime) -> None:
    train, validation = features(3), features(3, seed=1)

    def with_constant(features: Features, value: float) -> Features:
        column = np.full((len(features.labels), 1), value, np.float32)
        return Features(np.concatenate([features.values, column], 1), features.labels)

    without = fit_probe(train, validation, nn.Linear(6, 3), runtime, ACCURACY, l2=(0.1,))
    probe = fit_probe(
        with_constant(train, 1.1), with_constant(validation, 9.0), nn.Linear(7, 3), runtime, ACCURACY, l2=(0.1,)
    )
    assert float(probe.weight[:, 6].abs().max()) < 1e-9
    torch.testing.assert_close(probe.weight[:, :6], without.weight, rtol=0, atol=1e-5)
    assert probe.chosen.metrics.accuracy == without.chosen.metrics.accuracy


def test_validation_chooses_the_strength(runtime) -> None:
    """Where labels are noise a strong penalty wins, where they are not a weak one, which is also surer of itself."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(60, 40)).astype(np.float32)
    noise = Features(values, (rng.random(60) < 0.3).astype(np.int64))
    majority = Features(rng.normal(size=(60, 40)).astype(np.float32), np.arange(60) // 55)
    split = Features(values, (values[:, 0] + values[:, 1] > 0.6).astype(np.int64))
    strengths = (1e-3, 1e3)
    head = nn.Linear(40, 2)
    before = head.weight.clone()
    assert fit_probe(noise, majority, head, runtime, ACCURACY, l2=strengths).fit.chosen_l2 == 1e3
    probe = fit_probe(split, split, head, runtime, ACCURACY, l2=strengths)
    assert probe.fit.chosen_l2 == 1e-3
    assert probe.fit.l2 == (1e3, 1e-3)
    assert probe.chosen.metrics == probe.fit.chosen
    assert [evaluation.metrics for evaluation in probe.evaluations] == list(probe.fit.validation)
    assert torch.equal(head.weight, before)
    apart = Features(np.repeat([[-9.0], [9.0]], 30, 0).astype(np.float32), np.repeat([0, 1], 30))
    equal = fit_probe(apart, apart, nn.Linear(1, 2), runtime, ACCURACY, l2=(0.01, 0.1))
    assert [metrics.accuracy for metrics in equal.fit.validation] == [1.0, 1.0]
    assert equal.fit.chosen_l2 == 0.01  # the lower NLL
    probe.set_head(head)
    assert torch.equal(head.weight, probe.weight)


def test_where_classes_count_the_same_another_penalty_is_chosen(runtime) -> None:
    """A strong one leaves the bias alone: a constant guess, right on five of six images and on one of two classes."""
    labels = np.arange(120) // 100
    values = np.random.default_rng(0).normal(size=(2, 120, 30)).astype(np.float32)
    values[:, :, 0] += 1.5 * labels
    train, validation = (Features(of_split, labels) for of_split in values)
    chosen = [
        fit_probe(train, validation, nn.Linear(30, 2), runtime, metric, l2=(1e-3, 1e3)).fit.chosen_l2
        for metric in (ACCURACY, BALANCED_ACCURACY)
    ]
    assert chosen == [1e3, 1e-3]


# --- what the head sees -----------------------------------------------------------------------------------------------


def packed(model):
    """Pack the weights, without adapters."""
    none = dict.fromkeys((site.name for site in find_sites(model)), 0)
    QALoRATrainer(model, qa_lora(), 1, seed=0, ranks=none)
    freeze_backbone(model)
    return model


@pytest.fixture
def images() -> LabelledImages:
    rng = np.random.default_rng(0)
    return LabelledImages(rng.integers(0, 256, (11, 32, 32, 3), dtype=np.uint8), np.arange(11) % 5)


@pytest.mark.parametrize("prepare", [lambda model: model, packed], ids=["plain", "packed"])
def test_the_head_sees_its_inputs_and_nothing_else(tiny_vit, images, runtime, prepare) -> None:
    plain = tiny_vit().eval()
    model = prepare(tiny_vit()).train()
    seen = head_inputs(model, images, runtime, 4)
    assert model.training
    assert seen.dtype == np.float32
    ((batch, _),) = images.ordered_batches(11, runtime.mean, runtime.std)
    model.eval()
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(batch), pre_logits=True)
        logits, unpacked = model(batch), plain(batch)
    np.testing.assert_allclose(seen, expected.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(head_logits(model.head, seen, runtime), logits.numpy(), rtol=0, atol=1e-5)
    assert torch.equal(logits, unpacked) == (prepare is not packed)
    assert not model.head._forward_pre_hooks


def test_an_image_s_features_depend_on_no_other_image(tiny_vit, images, runtime) -> None:
    model = tiny_vit()
    whole = head_inputs(model, images, runtime, 4)
    for count in (1, 4, 6, 9):  # the last batch is filled up
        assert np.array_equal(head_inputs(model, images.chosen(np.arange(count)), runtime, 4), whole[:count])
    backwards = head_inputs(model, images.chosen(np.arange(11)[::-1]), runtime, 4)
    np.testing.assert_allclose(backwards[::-1], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("flips", "ways"), [("none", 1), ("horizontal", 2), ("both", 4)])
def test_flips_are_those_of_the_pixels(tiny_vit, images, runtime, flips, ways) -> None:
    model = tiny_vit()
    axes = FLIP_AXES[flips]
    assert len(set(axes)) == ways
    assert axes[0] == ()
    inputs = [head_inputs(model, images, runtime, 4, flipped) for flipped in axes]
    for flipped, values in zip(axes, inputs, strict=True):
        pixels = np.flip(images.pixels, [{-1: 2, -2: 1}[axis] for axis in flipped]).copy()
        assert np.array_equal(values, head_inputs(model, LabelledImages(pixels, images.labels), runtime, 4))
    assert all(not np.allclose(inputs[0], other) for other in inputs[1:])


def test_logits_have_the_setting_s_precision(runtime) -> None:
    head, values = nn.Linear(6, 3), features(3).values
    reduced = type(runtime)(runtime.device, "bf16", runtime.mean, runtime.std)
    exact, rounded = head_logits(head, values, runtime), head_logits(head, values, reduced)
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=0.2)


def assert_cooled_to_half_a_guess(probe, train: Features, temperature: float) -> None:
    """Check that the factor is the least power of two with which the loss on training images is log(classes) / 2."""
    factor = probe.training_temperature(train, temperature)
    logits = logits_of(probe, train) / temperature
    assert factor in (2, 4, 8, 16, 32)
    assert nll(2 * logits / factor, train.labels) < np.log(logits.shape[1]) / 2 <= nll(logits / factor, train.labels)
    assert probe.training_temperature(train, 1000 * temperature) == 1


@pytest.mark.parametrize("classes", [2, 5])
def test_a_head_start_has_the_temperature_with_the_lowest_loss_on_validation(runtime, classes) -> None:
    train, clean = features(classes, count=30, width=40), features(classes, count=200, width=40, seed=1)
    wrong = np.arange(len(clean.labels)) % 5 == 0  # a fifth of the labels: whoever is sure of all is punished
    validation = Features(clean.values, np.where(wrong, (clean.labels + 1) % classes, clean.labels))
    head = nn.Linear(40, classes)
    probe = fit_probe(train, validation, head, runtime, ACCURACY, l2=(1e-4,))  # 30 points in 40 dimensions: separated
    assert probe.steps[0].loss < 0.01
    temperature = probe.temperature(validation)
    logits = logits_of(probe, validation)
    grid = np.exp(np.linspace(np.log(0.1), np.log(100), 2000))
    losses = [nll(logits / candidate, validation.labels) for candidate in grid]
    assert temperature == pytest.approx(grid[np.argmin(losses)], rel=0.01)
    assert temperature > 1.5
    assert_cooled_to_half_a_guess(probe, train, temperature)
    probe.set_head(head, temperature)
    with torch.no_grad():
        again = head(torch.from_numpy(validation.values)).numpy()
    assert again == pytest.approx(logits / temperature, abs=1e-4)


def test_ridge_chooses_its_penalty_on_images_left_out_one_by_one_in_all_ways() -> None:
    """An image and its mirror image are one: the penalty is that with the least error on both being left out."""
    rng = np.random.default_rng(3)
    own = rng.normal(size=(50, 30))
    numbers = own[:, :2] @ rng.normal(size=(2, 1)) + 0.7 * rng.normal(size=(50, 1))
    ways = np.concatenate([own, own + 0.05 * rng.normal(size=own.shape)])  # nearly the same, flipped
    task = REGRESSION.fitted(numbers)
    features = Features(ways.astype(np.float32), np.tile(numbers, (2, 1)), task)
    strengths = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
    chosen, outputs = held_out_fit(features, np.arange(50), task.metric("mae"), l2=strengths)
    values = features.values.astype(np.float64)
    z = (values - values.mean(0)) / values.std(0)
    said = {l2: np.empty((50, 1)) for l2 in strengths}
    for i in range(50):
        rest, targets = (np.delete(array, [i, i + 50], axis=0) for array in (z, features.labels))
        for l2 in strengths:
            said[l2][i] = Ridge(alpha=100 * l2).fit(rest, targets).predict(z[[i]])
    errors = {l2: np.abs(predicted - numbers).mean() for l2, predicted in said.items()}
    assert chosen == min(errors, key=errors.get)
    assert strengths[0] > chosen > strengths[-1]
    assert task.predicted(outputs) == pytest.approx(said[chosen])


def test_copies_are_left_out_together() -> None:
    """Noise can't be predicted; where each image is there four times, a fit to the others would know it."""
    rng = np.random.default_rng(0)
    values, labels = rng.standard_normal((40, 60)).astype(np.float32), np.arange(40) % 2
    features = Features(np.tile(values, (4, 1)), np.tile(labels, 4))

    def right(groups: np.ndarray) -> float:
        _, logits = held_out_fit(features, groups, ACCURACY)
        return float((logits.argmax(1) == features.labels).mean())

    assert right(np.tile(np.arange(40), 4)) < 0.75
    assert right(np.arange(160)) == 1
    assert can_hold_out(labels, np.arange(40))
    assert not can_hold_out(labels, np.where(labels == 0, 0, np.arange(40)))
