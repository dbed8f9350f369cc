"""Which of several models to take, and how sure one can be: odds from what they scored on the same folds of images.

`means_of_images` (or `means_of_folds`, where there is but a score a fold) says what was measured: means, and the
covariance of their errors, which is small between models that are right on the same images. `posterior` shrinks the
means towards each other, since the best of many was lucky as a rule. `choose` takes the smallest model that is
expected to lose little.

Pass everything that was scored on these folds, also what was dropped early: what a winner was chosen from says how
lucky it may have been, and to drop by scores that are passed biases nothing (Rubin, Biometrika 63 (1976)).

Sources: Corani & Benavoli, Machine Learning 100 (2015), and Benavoli, Corani, Demšar & Zaffalon, JMLR 18(77) (2017),
on posteriors of correlated folds; Nadeau & Bengio, Machine Learning 52 (2003), on their variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from peft_vit.statistics.intervals import CONFIDENCE, Interval

Floats = NDArray[np.float64]

SHOWN = 0.95  # so sure, a claim is called shown
_TENTH = 0.1  # of the margin: the expected loss beyond it that a smaller model may have
_SCALES = 0.25 * 2.0 ** np.arange(7)  # of true differences, in typical standard errors of measured ones
_CHAINS, _BURN_IN, _SWEEPS = 48, 30, 20
_REPEATED = (
    0.2  # share of a difference's variance over images that is the same in each repetition; 0.05 to 0.4 were seen
)


# --- what was measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldMeans:
    """Means of C candidates over the same folds, each as if it had been scored on all of them."""

    means: Floats  # (C,)
    covariance: Floats  # (C, C) of the means, as estimates of what new images would give
    run_variance: Floats  # (C,) by what one more training of the same recipe scatters
    degrees: float  # of freedom of the covariance
    images: int | None = None  # if scores are shares of so many


def means_of_images(scores: ArrayLike, folds: ArrayLike, classes: ArrayLike | None = None) -> FoldMeans:
    """Return means over images that repeated folds predict.

    Candidates and fold runs are two ways of a layout, ``score = theta_c + beta_j + error``, solved by least squares, so
    that a candidate which was dropped is compared on the folds that it has. The covariance sums influences of images:
    one counts once however often it is predicted (Liang & Zeger, Biometrika 73 (1986)). Three things are added:

    - runs that scatter more than their images do: the excess, pooled over candidates;
    - training images that all runs share: n_test / n_train of the variance of predicting every image once, which is
      Nadeau & Bengio's correction without what test images that come again already add;
    - for each candidate an image that it alone has right, 2 / n^2 in the variance of a difference, so that two that
      never differed are not proven equal (Bonett & Price, Journal of Educational and Behavioral Statistics 37 (2012)).

    Args:
        scores: (C, R, N) of candidates, repetitions, images: 1 for right, 0 for wrong; NaN where a run was not done.
        folds: (R, N), the fold of a repetition that an image is tested in, from 0 on.
        classes: (N,), if all classes are to count the same (balanced accuracy).

    Raises:
        ValueError: if a candidate has no scores, or shares no fold with the others.
    """
    values, fold_of = np.asarray(scores, dtype=np.float64), np.asarray(folds, dtype=np.int64)
    (candidates, repetitions, images), number = values.shape, int(fold_of.max()) + 1
    run_of = (fold_of + number * np.arange(repetitions)[:, None]).ravel()  # (R N,)
    runs = np.eye(number * repetitions)[run_of]  # (R N, J) one-hot
    weights = np.ones(images)
    if (
        classes is not None
    ):  # the plain mean becomes that over classes; around a class's mean, so that folds hardly move
        _, labels, counts = np.unique(np.asarray(classes), return_inverse=True, return_counts=True)
        weights = (images / (len(counts) * counts))[labels]
        of_class = np.array([np.nanmean(values[..., labels == label]) for label in range(len(counts))])
        values = of_class.mean() + weights * (values - of_class[labels])
    known = ~np.isnan(values).reshape(candidates, -1)  # (C, R N)
    values = np.where(known, values.reshape(candidates, -1), 0.0)
    theta, beta, moved = _two_way(known @ runs, values @ runs)
    errors = np.where(known, values - theta[:, None] - beta[run_of], 0.0)
    influence = np.zeros_like(errors)  # (C, R N) of each prediction on the means
    for run in range(runs.shape[1]):
        influence[:, run_of == run] = moved[:, :, run] @ errors[:, run_of == run]
    by_image = influence.reshape(candidates, repetitions, images).sum(1)  # (C, N)
    by_run = influence @ runs  # (C, J)
    once = influence @ influence.T  # (C, C), the covariance if every prediction were of an image of its own
    done = int((known.any(0) @ runs > 0).sum())
    excess = max(0.0, _scatter(by_run) * done / max(1, done - 1) / max(_scatter(influence), 1e-300) - 1)
    times = np.sqrt(known.sum(1) / images)  # (C,) roots of how often every image was predicted
    seen = known.reshape(candidates, repetitions, images).any(1).sum(1)  # (C,) images
    covariance = by_image @ by_image.T * images / (images - 1) + once * (excess + np.outer(times, times) / (number - 1))
    covariance += np.diag(np.mean(weights**2) / seen**2)
    run_variance = excess * ((influence - influence.mean(0)) ** 2).sum(1) * (known @ runs > 0).sum(1)
    return FoldMeans(theta, covariance, run_variance, images - 1.0, images)


def _two_way(counts: Floats, totals: Floats) -> tuple[Floats, Floats, Floats]:
    """Return theta (C,), beta (J,), and by what the sum of candidate c's values in run j moves theta: (C, C, J)."""
    candidates, runs = counts.shape
    rows, columns = np.nonzero(counts)
    share = counts.max(0) / counts.max(0).sum()  # (J,) of images; betas are 0 on average over them
    design = np.hstack([np.eye(candidates)[rows], np.eye(runs)[columns] - share])
    normal = (design.T * counts[rows, columns]) @ design
    if np.linalg.matrix_rank(normal, hermitian=True) < candidates + np.count_nonzero(share) - 1:
        raise ValueError("a candidate has no scores, or shares no fold with the others")
    solver = np.linalg.pinv(normal, hermitian=True) @ design.T  # (C + J, rows)
    solution = solver @ totals[rows, columns]
    moved = np.zeros((candidates, candidates, runs))
    moved[:, rows, columns] = solver[:candidates]
    return solution[:candidates], solution[candidates:] - share @ solution[candidates:], moved


def _scatter(influence: Floats) -> float:
    """Return the sum of squares of (C, n) values around their mean over candidates."""
    return float(((influence - influence.mean(0)) ** 2).sum())


def means_of_folds(scores: ArrayLike, test_share: float) -> FoldMeans:
    """Return means over J scores of folds, with Nadeau & Bengio's variance ``s^2 (1 / J + rho / (1 - rho))``.

    With two candidates and a flat prior, what is known of their difference is the Bayesian correlated t test. Of more,
    correlations are pulled to their mean, since few folds tell little of each.

    Args:
        scores: (C, J), all there.
        test_share: rho, the share of images that a fold tests.
    """
    values = np.asarray(scores, dtype=np.float64)
    candidates, folds = values.shape
    sample = np.atleast_2d(np.cov(values))  # (C, C)
    deviations = np.sqrt(np.diag(sample))
    scale = np.outer(deviations, deviations)
    correlation = np.divide(sample, scale, out=np.eye(candidates), where=scale > 0)
    mean = (correlation.sum() - candidates) / max(1, candidates * (candidates - 1))
    pull = candidates / (candidates + folds) if candidates > 2 else 0.0
    pulled = scale * np.where(np.eye(candidates, dtype=bool), 1.0, (1 - pull) * correlation + pull * mean)
    factor = 1 / folds + test_share / (1 - test_share)
    return FoldMeans(values.mean(1), factor * pulled, deviations**2, folds - 1.0)


def chance_without_shrinkage(measured: FoldMeans, candidate: int, reference: int, margin: float) -> float:
    """Return the probability that a candidate lies more than a margin below another, by a flat prior on both.

    Student's t around the measured difference: with `means_of_folds` the Bayesian correlated t test. Of one that was
    chosen for its scores it says too much.
    """
    v = measured.covariance
    error = math.sqrt(v[candidate, candidate] + v[reference, reference] - 2 * v[candidate, reference])
    loss = measured.means[reference] - measured.means[candidate]
    return float(scipy.special.stdtr(measured.degrees, (loss - margin) / error))


# --- what follows for the truth ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Posterior:
    """True means of C candidates: an even mixture of M normal distributions."""

    means: Floats  # (M, C)
    covariances: Floats  # (M, C, C)

    def loss(self, candidate: int, reference: int) -> tuple[Floats, Floats]:
        """Return means and standard deviations (M,) of ``theta_reference - theta_candidate``."""
        v = self.covariances
        variance = v[:, reference, reference] + v[:, candidate, candidate] - 2 * v[:, reference, candidate]
        return self.means[:, reference] - self.means[:, candidate], np.sqrt(np.maximum(variance, 1e-18))

    def chance_of_loss(self, candidate: int, reference: int, margin: float) -> float:
        """Return the probability that a candidate lies more than a margin below another."""
        mean, deviation = self.loss(candidate, reference)
        return float(scipy.special.ndtr((mean - margin) / deviation).mean())

    def loss_beyond(self, candidate: int, reference: int, margin: float) -> float:
        """Return the expectation of ``max(0, loss - margin)``: ``s phi(z) + (m - margin) Phi(z)`` of a normal loss."""
        mean, deviation = self.loss(candidate, reference)
        z = (mean - margin) / deviation
        density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        return float((deviation * density + (mean - margin) * scipy.special.ndtr(z)).mean())


def posterior(measured: FoldMeans, seed: int = 0) -> Posterior:
    """Return what is known of the true means; the same for the same seed.

    ``measured ~ N(theta, V)``, ``theta_c = mu + delta_c``, mu flat, ``delta_c ~ sum_k pi_k N(0, s_k^2)`` on a grid of
    scales, pi ~ Dirichlet: from all candidates pi learns whether they hardly differ, or widely, or one alone (Stephens,
    Biostatistics 18 (2017), here with correlated errors). Gibbs' sampler draws scales and pi in many chains; given the
    scales theta is normal, and those distributions are returned. Of few degrees f a chain has ``V f / chi^2_f``.
    """
    rng = np.random.default_rng(seed)
    candidates, unit = len(measured.means), np.eye(len(measured.means))
    centred = measured.covariance - measured.covariance.mean(0)
    scales = _SCALES * math.sqrt(max(np.trace(centred) / max(1, candidates - 1), 1e-18))  # (K,)
    quantiles = scipy.special.chdtri(measured.degrees, (np.arange(_CHAINS) + 0.5) / _CHAINS) / measured.degrees
    precision = np.linalg.inv(measured.covariance) * rng.permutation(quantiles)[:, None, None]  # (M, C, C)
    row, total = precision.sum(2), precision.sum((1, 2))  # (M, C), (M,)
    share = row / total[:, None]
    of_delta = precision - row[:, :, None] * share[:, None, :]  # with mu integrated out
    pull, level = of_delta @ measured.means, share @ measured.means  # (M, C), (M,)
    lift = unit - share[:, None, :]  # theta = lift delta + level + noise of mu
    chosen = rng.integers(len(scales), size=(_CHAINS, candidates))
    weights = np.full((_CHAINS, 1, len(scales)), 1 / len(scales))
    means, covariances = [], []
    for sweep in range(_BURN_IN + _SWEEPS):
        covariance = np.linalg.inv(of_delta + unit / scales[chosen][:, None] ** 2)  # (M, C, C)
        mean = (covariance @ pull[:, :, None])[:, :, 0]  # (M, C)
        if sweep >= _BURN_IN:
            means.append((lift @ mean[:, :, None])[:, :, 0] + level[:, None])
            covariances.append(lift @ covariance @ lift.transpose(0, 2, 1) + 1 / total[:, None, None])
        noise = np.linalg.cholesky(covariance) @ rng.standard_normal((_CHAINS, candidates, 1))
        delta = mean[:, :, None] + noise  # (M, C, 1)
        logits = np.log(weights) - np.log(scales) - (delta / scales) ** 2 / 2  # (M, C, K)
        chosen = (logits + rng.gumbel(size=logits.shape)).argmax(2)
        counts = (chosen[:, :, None] == np.arange(len(scales))).sum(1, keepdims=True)  # (M, 1, K)
        gammas = rng.standard_gamma(counts + 1 / len(scales)) + 1e-300
        weights = gammas / gammas.sum(2, keepdims=True)
    return Posterior(np.concatenate(means), np.concatenate(covariances))


# --- what to take -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Odds:
    """What is known of one candidate, in the unit of the scores."""

    score: Interval  # of its next training, on new images
    loss: float  # against the reference, expected; below 0 a gain
    chance_of_loss: float  # by more than the margin
    loss_beyond: float  # the margin, expected
    shown: bool  # that it does not lose more than the margin: 95 % sure, with and without shrinkage


@dataclass(frozen=True)
class Choice:
    """Which candidate to take, and what each is worth beside the best with float weights."""

    chosen: int
    reference: int  # the float candidate that is expected to be the best
    odds: tuple[Odds, ...]  # of all, in their order


def choose(
    measured: FoldMeans, sizes: Sequence[float], fitting: Sequence[int], floats: Sequence[int], margin: float
) -> Choice:
    """Take the smallest model whose expected loss beyond the margin is below a tenth of it, else the best expected.

    Args:
        measured: of all candidates.
        sizes: of each, in bytes.
        fitting: positions of those that may be taken, which keep within the limits.
        floats: of those with float weights; none: all count.
        margin: in the unit of the scores.
    """
    known = posterior(measured)
    mean = known.means.mean(0)
    reference = max(floats or range(len(mean)), key=lambda candidate: mean[candidate])
    odds = tuple(_odds(measured, known, candidate, reference, margin) for candidate in range(len(mean)))
    sound = [candidate for candidate in fitting if odds[candidate].loss_beyond < _TENTH * margin]
    least = max(fitting, key=lambda candidate: mean[candidate])
    chosen = min(sound, key=lambda candidate: (sizes[candidate], odds[candidate].loss), default=least)
    return Choice(chosen, reference, odds)


def _odds(measured: FoldMeans, known: Posterior, candidate: int, reference: int, margin: float) -> Odds:
    mean, variance = float(known.means[:, candidate].mean()), float(known.means[:, candidate].var())
    variance += float(known.covariances[:, candidate, candidate].mean() + measured.run_variance[candidate])
    score = _interval(mean, variance, measured.images)
    if candidate == reference:
        return Odds(score, 0.0, 0.0, 0.0, True)
    chance = known.chance_of_loss(candidate, reference, margin)
    largest = max(chance, chance_without_shrinkage(measured, candidate, reference, margin))
    loss = float(known.loss(candidate, reference)[0].mean())
    return Odds(score, loss, chance, known.loss_beyond(candidate, reference, margin), largest <= 1 - SHOWN)


def _interval(mean: float, variance: float, images: int | None) -> Interval:
    """Return a score's interval: of a share Wilson's of as many images as would scatter so, which stays within 0 to 1."""
    z = float(scipy.special.ndtri(0.5 + CONFIDENCE / 2))
    if images is None:
        return Interval(mean, mean - z * math.sqrt(variance), mean + z * math.sqrt(variance), 0, CONFIDENCE)
    share = min(max(mean, 0.0), 1.0)
    inner = (share * images + 1) / (images + 2)
    n = inner * (1 - inner) / variance
    center = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(share, max(0.0, center - half), min(1.0, center + half), images, CONFIDENCE)


@dataclass(frozen=True)
class Resolution:
    """What so many images can tell, before anything is scored."""

    difference: float  # two models have to differ by so much, for chance to be ruled out
    accuracy: float  # half the width of its interval
    shown: float  # probability at least that a model which loses nothing is shown to lose less than the margin


def resolvable(
    images: int,
    margin: float,
    *,
    folds: int = 5,
    repetitions: int = 1,
    disagreement: float = 0.1,
    accuracy: float = 0.8,
) -> Resolution:
    """Return what images can resolve, all shares.

    Args:
        images: that folds divide.
        margin: of a comparison.
        folds: of a repetition.
        repetitions: of all folds.
        disagreement: share of images that one of two models alone has right; adapters of one backbone have 0.02 to 0.14.
        accuracy: that is expected.
    """
    shared = 1 / (folds - 1)
    repeated = _REPEATED + (1 - _REPEATED) / repetitions
    error = math.sqrt(disagreement * (repeated + shared) / images + 2 / images**2)
    z, one_sided = scipy.special.ndtri([0.5 + CONFIDENCE / 2, SHOWN])
    half = z * math.sqrt(accuracy * (1 - accuracy) * (1 + shared) / images)
    return Resolution(float(z * error), float(half), float(scipy.special.ndtr(margin / error - one_sided)))
