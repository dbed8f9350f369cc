"""Which images come next, what is proposed for the others, and what is known of the accuracy."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from peft_vit.label import order
from peft_vit.label.order import expected_accuracy, herding, propose, wall


def drawn(images: int, classes: int = 3, noise: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return features (N, 12) and classes (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=images)
    return (rng.normal(size=(classes, 12))[labels] + noise * rng.normal(size=(images, 12))).astype(np.float32), labels


def slow_herding(features, labelled, available, count, uncertainty):
    """Do what the objective says, sum by sum, over unit vectors."""
    z = (features.astype(float) - features.mean(0)) / features.std(0)
    unit = [x / np.sqrt(sum(v * v for v in x)) for x in z]
    chosen = [i for i in range(len(unit)) if labelled[i] >= 0]
    apart = [[distance for b in chosen if (distance := np.linalg.norm(unit[a] - unit[b])) > 0.01] for a in chosen]
    radius = np.median([min(distances) ** 2 for distances in apart]) ** 0.5 if len(chosen) > 1 else 1.0

    def kernel(a, b):
        return np.exp(-((np.linalg.norm(unit[a] - unit[b]) / radius) ** 2))

    pool, new = np.flatnonzero(available), []
    for _ in range(count):
        covered = {n: max((kernel(n, y) for y in chosen), default=0.0) for n in pool}
        gains = {
            x: sum(uncertainty[n] * max(kernel(n, x) - covered[n], 0) for n in pool) for x in pool if x not in chosen
        }
        new.append(max(gains, key=gains.__getitem__))
        chosen.append(new[-1])
    return new


@pytest.mark.parametrize("known", [0, 1, 9])
def test_herding_is_what_the_formula_says(known: int) -> None:
    features, labels = drawn(40)
    labelled = np.where(np.arange(40) < known, labels, -1)
    features[1] = features[0]  # copies, which say nothing of the radius
    available = (labelled < 0) & (np.arange(40) % 5 != 4)
    probabilities = np.random.default_rng(1).dirichlet(np.ones(3), size=40) if known else None
    first, second = np.sort(probabilities, 1)[:, :-3:-1].T if known else (np.zeros(40), np.zeros(40))
    expected = slow_herding(features, labelled, available, 6, 1 - (first - second))
    assert herding(features, labelled, available, 6, probabilities) == expected


def test_herding_covers_a_sample_of_many_images_another_one_with_each_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_COVERED", 10)
    features, labels = drawn(60)
    labelled, chosen = np.full(60, -1), list[int]()
    for _ in range(20):
        (new,) = herding(features, labelled, labelled < 0, 1)
        labelled[new] = labels[new]
        chosen.append(new)
    assert len(set(chosen)) == 20
    assert len(herding(features, labelled, labelled < 0, 100)) == 10


@pytest.mark.parametrize("known", [8, 150])  # fewer than features, and more
def test_proposals_are_those_of_a_logistic_regression(known: int) -> None:
    features, labels = drawn(200)
    labelled = np.where(np.arange(200) < known, labels, -1)
    z = StandardScaler().fit(features.astype(float)).transform(features.astype(float))
    model = LogisticRegression(C=1 / (order._L2 * known), tol=1e-8, max_iter=5000).fit(z[:known], labels[:known])
    proposed = propose(features, labelled, 5)  # of two classes there is no image
    assert (proposed[:, 3:] == 0).all()
    ours, theirs = (
        logits - logits.mean(1, keepdims=True) for logits in (np.log(proposed[:, :3]), model.decision_function(z))
    )
    temperature = (theirs**2).sum() / (ours * theirs).sum()
    np.testing.assert_allclose(ours * temperature, theirs, atol=0.05)


def test_proposals_are_as_sure_as_images_left_out_of_the_fit_say(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = drawn(800, noise=3.0)
    labelled = np.where(np.arange(800) < 40, labels, -1)
    proposed = propose(features, labelled, 3)[40:]
    right = (proposed.argmax(1) == labels[40:]).mean()
    monkeypatch.setattr(order, "_temperature", lambda *_: 1.0)
    too_sure = propose(features, labelled, 3)[40:].max(1).mean() - right
    assert too_sure > 0.1
    assert abs(proposed.max(1).mean() - right) < too_sure / 2


def test_nothing_is_proposed_before_there_are_two_classes() -> None:
    labelled = np.where(np.arange(20) < 2, 1, -1)
    assert (propose(drawn(20)[0], labelled, 4) == 0.25).all()


def test_a_wall_is_of_the_surest_class_that_has_enough_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "FEWEST_OF_CLASS", 3)
    sure = np.concatenate([np.full(30, 0.91), np.linspace(0.99, 0.7, 30), np.full(6, 0.99)])
    classes = np.repeat([0, 1, 2], [30, 30, 6])
    probabilities = np.repeat((1 - sure)[:, None] / 2, 3, axis=1)
    probabilities[np.arange(66), classes] = sure
    available = np.ones(66, dtype=bool)
    available[[*range(3), *range(30, 33), *range(60, 63)]] = False
    assert wall(probabilities, available, 9) == (0, list(range(3, 23)))  # of class 1 they are less sure
    available[:20] = False
    shown = wall(probabilities, available, 9)
    assert shown == (0, list(range(20, 30)))
    label, images = wall(probabilities, available & (classes > 0), 9) or (0, [])
    assert label == 1  # class 2 has too few
    assert images == list(range(33, 33 + len(images)))
    assert sure[images].mean() >= 0.9 > sure[[*images, images[-1] + 1]].mean()
    assert wall(probabilities, available & (classes == 2), 9) is None
    assert wall(probabilities, available, 8) is None  # labels of three classes


def test_the_accuracy_is_of_test_images_and_more_labels_bring_what_halves_say() -> None:
    features, labels = drawn(600, noise=1.5)
    tested = np.where(np.arange(600) < 300, labels, -1)
    few, many = (np.where(np.arange(600) >= 600 - known, labels, -1) for known in (20, 300))
    of_few, of_many = (expected_accuracy(features, known, tested, 3) for known in (few, many))
    assert of_few is not None
    assert of_many is not None
    right = propose(features, few, 3)[:300].argmax(1) == labels[:300]
    assert of_few.now.estimate == pytest.approx(right.mean())
    assert of_few.now.low < of_few.now.estimate < of_few.now.high
    assert of_few.gain is not None
    assert of_many.gain is not None
    assert of_few.gain.estimate > of_many.gain.estimate + 0.01
    assert expected_accuracy(features, few, np.full(600, -1), 3) is None
    assert expected_accuracy(features, np.where(labels == 0, few, -1), tested, 3) is None
    two = np.full(600, -1)
    two[[500, 501]] = 0, 1
    assert expected_accuracy(features, two, tested, 3).gain is None
