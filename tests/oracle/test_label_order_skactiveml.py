"""The order of `label` against scikit-activeml: coverage is its MaxHerding, uncertainty its margins.

Its MaxHerding (Bae, Noh and Sutherland 2024) is herding without uncertainty. `UncertaintySampling` has utilities of
margins. It holds no herding weighted by them, and what `label` does not do, such as TypiClust, has nothing to compare.
"""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from peft_vit.label.order import herding

pytest.importorskip("skactiveml")
from skactiveml.classifier import SklearnClassifier
from skactiveml.pool import MaxHerding, UncertaintySampling


def drawn(images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features (N, 12) and classes (N,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=images)
    return (rng.normal(size=(3, 12))[labels] + rng.normal(size=(images, 12))).astype(np.float32), labels


def standardized(features: np.ndarray) -> np.ndarray:
    return StandardScaler().fit_transform(features.astype(float))


@pytest.mark.parametrize("known", [0, 1, 4, 20])
@pytest.mark.parametrize("seed", range(3))
def test_without_uncertainty_it_is_max_herding(known: int, seed: int) -> None:
    features, labels = drawn(80, seed)
    z = standardized(features)
    unit = z[:known] / np.linalg.norm(z[:known], axis=1, keepdims=True)
    gamma = 1.0  # without a pair
    if known > 1:
        squares = ((unit[:, None] - unit) ** 2).sum(-1) + 9 * np.eye(known)
        gamma = 1 / np.median(squares.min(1))
    given = np.where(np.arange(80) < known, labels, np.nan)
    theirs = MaxHerding(metric="rbf", metric_dict={"gamma": gamma}, random_state=0)
    ours = herding(features, np.where(np.isnan(given), -1, labels), np.isnan(given), 12)
    assert len(set(ours)) == 12
    for chosen in ours:  # one by one, as two images that are nearest to each other are equally good
        utilities = theirs.query(z, given, return_utilities=True)[1][0]
        assert utilities[chosen] >= np.nanmax(utilities) * (1 - 1e-5)
        given[chosen] = labels[chosen]


def test_uncertainty_is_their_margin() -> None:
    """Where every image covers itself alone, the order is that of uncertainty."""
    features, labels = drawn(60, 0)
    z = standardized(features)
    is_known = np.arange(60) < 20
    model = SklearnClassifier(LogisticRegression(), classes=[0, 1, 2]).fit(z[:20], labels[:20])
    theirs = UncertaintySampling(method="margin_sampling")
    given = np.where(is_known, labels, np.nan)
    _, utilities = theirs.query(z, given, clf=model, fit_clf=False, batch_size=1, return_utilities=True)
    alone = np.eye(60, dtype=np.float32)  # all distances are equal
    alone[:20] = alone[0]  # the known ones are copies, so that the scale is 1
    probabilities = model.predict_proba(z)
    ours = herding(alone, np.where(is_known, labels, -1), ~is_known, 40, probabilities)
    wanted = [i for i in np.argsort(-utilities[0], kind="stable").tolist() if not is_known[i]]
    assert ours[:10] == wanted[:10]
