"""Which of several models to take, and how sure one can be: odds from what they scored on the same folds of images.

`means_of_images` says what was measured: means, and the covariance of their errors, which is small between models that
are right on the same images. `posterior` shrinks the means towards each other, since the best of several was lucky as a
rule. `choose_model` takes the smallest model that is expected to lose little.

Sources: Corani & Benavoli, Machine Learning 100 (2015), and Benavoli, Corani, Demšar & Zaffalon, JMLR 18(77) (2017),
on posteriors of correlated folds; Nadeau & Bengio, Machine Learning 52 (2003), on their variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from peft_vit.base.statistics.intervals import CONFIDENCE, Interval, critical_z, proportion_interval

Floats = NDArray[np.float64]

SHOWN, _UNSHRUNK = 0.95, 0.75  # so sure, a claim is called shown; and as sure at least without shrinkage
_TOLERANCE = 0.1  # of the margin: the expected loss beyond it that a smaller model may have
_AS_SMALL = 1.05  # times the bytes of the smallest: images of other sizes change no more
_QUANTILES = 64  # of what a posterior is a mixture over
_SHRINKAGE = 2.5  # a of the prior of s, see `posterior`: between simulated tunings of equal models and real ones
_FLOOR = 0.1  # images, squared, in the variance of a candidate's right ones: two that never differed may yet
_RUNS = 10  # runs that the excess of their scatter is shrunk by


@dataclass(frozen=True)
class FoldMeans:
    """Means of C candidates over the same folds, each as if it had been scored on all of them."""

    means: Floats  # (C,)
    covariance: Floats  # (C, C) of the means, as estimates of what new images would give
    run_variance: Floats  # (C,) by what one more training of the same recipe scatters
    degrees: float  # of freedom of the covariance
    images: int  # that were scored
    counts: bool = True  # scores are shares of these images


def means_of_images(
    scores: ArrayLike, folds: ArrayLike, classes: ArrayLike | None = None, *, counts: bool = True
) -> FoldMeans:
    """Return means over images that repeated folds predict.

    Candidates and fold runs are two ways of a layout, ``score = theta_c + beta_j + error``, solved by least squares, so
    that a candidate which was dropped is compared on the folds that it has. The covariance is Nadeau & Bengio's: with
    s^2 the variance of a fold's score, ``s^2 (1 / J + n_test / n_train)`` of J folds, since trainings share most of
    their images, and all of them with the last training. s^2 is that of its images, more steady than that of five
    scores. Added are

    - the excess, pooled over candidates, by which runs scatter more than their images do;
    - a trace for each candidate, so that two that never differed are not proven equal.

    Args:
        scores: (C, R, N) of candidates, repetitions, images: 1 for right, 0 for wrong, or what else each image brings;
            NaN where a run was not done.
        folds: (R, N), the fold of a repetition that an image is tested in, from 0 on.
        classes: (N,), if all classes are to count the same (balanced accuracy).
        counts: each score is 1 or 0.

    Raises:
        ValueError: if a candidate has no scores, or shares no fold with the others.
    """
    values, fold_of = np.asarray(scores, dtype=np.float64), np.asarray(folds, dtype=np.int64)
    (candidates, repetitions, images), number = values.shape, int(fold_of.max()) + 1
    run_of = (fold_of + number * np.arange(repetitions)[:, None]).ravel()  # (R N,)
    runs = np.eye(number * repetitions)[run_of]  # (R N, J) one-hot
    strata = np.zeros(images) if classes is None else np.asarray(classes)
    changed = 1.0 if counts else max(4 * float(np.nanvar(values)), 1e-12)  # by one image, squared
    _, labels, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    weights = (images / (len(sizes) * sizes))[labels]  # (N,), so that the plain mean is that over classes
    of_class = np.array([np.nanmean(values[..., labels == label]) for label in range(len(sizes))])
    values = of_class.mean() + weights * (values - of_class[labels])  # around a class's own, so that folds hardly move
    known = ~np.isnan(values).reshape(candidates, -1)  # (C, R N)
    values = np.where(known, values.reshape(candidates, -1), 0.0)
    theta, beta, moved = _two_way(known @ runs, values @ runs)
    errors = np.where(known, values - theta[:, None] - beta[run_of], 0.0)
    for label in range(len(sizes)):
        inside = known & np.tile(labels == label, repetitions)  # (C, R N)
        errors -= inside * (np.where(inside, errors, 0.0).sum(1) / np.maximum(1, inside.sum(1)))[:, None]
    influence = np.zeros_like(errors)  # (C, R N) of each prediction on the means
    for run in range(runs.shape[1]):
        influence[:, run_of == run] = moved[:, :, run] @ errors[:, run_of == run]
    alone = influence @ influence.T  # (C, C), the covariance if every prediction were of an image of its own
    done = int((known.any(0) @ runs > 0).sum())
    apart = influence - influence.mean(0)  # of the mean over candidates
    within, between = float((apart**2).sum()), float(((apart @ runs) ** 2).sum()) * done / max(1, done - 1)
    excess = max(0.0, between / max(within, 1e-300) - 1) * done / (done + _RUNS)
    times = np.sqrt(known.sum(1) / images)  # (C,) roots of how often every image was predicted
    num_images = known.reshape(candidates, repetitions, images).any(1).sum(1)  # (C,) images
    shared = number / (number - 1) * np.outer(times, times)  # J n_test / n_train
    covariance = alone * (1 + excess + shared)
    covariance += np.diag(_FLOOR * changed * np.mean(weights**2) / num_images**2)
    run_variance = excess * (apart**2).sum(1) * (known @ runs > 0).sum(1)
    return FoldMeans(theta, covariance, run_variance, images - 1.0, images, counts)


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

    def excess_loss(self, candidate: int, reference: int, margin: float) -> float:
        """Return the expectation of ``max(0, loss - margin)``: ``s phi(z) + (m - margin) Phi(z)`` of a normal loss."""
        mean, deviation = self.loss(candidate, reference)
        z = (mean - margin) / deviation
        density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        return float((deviation * density + (mean - margin) * scipy.special.ndtr(z)).mean())


def posterior(measured: FoldMeans, *, shrink: bool = True) -> Posterior:
    """Return what is known of the true means.

    ``measured ~ N(theta, V)``, ``theta ~ N(mu, g V)``, mu flat (Zellner's g prior): two models that differ on many
    images are measured less well, and may differ in truth, by as much. Given ``s = 1 / (1 + g)``, means are shrunk to
    ``level = 1'P measured / 1'P1`` with ``P = V^-1``:

        theta ~ N(level + (1 - s) (measured - level), (1 - s) V + s 11' / 1'P1)

    How much is learned from all candidates: with a prior Beta(a, 1), s has a gamma distribution that ends at 1, of
    shape ``(C - 1) / 2 + a`` and rate ``(measured - level)' P (measured - level) / 2`` (Strawderman, Annals of
    Mathematical Statistics 42 (1971), with a = 1). Of few degrees f of freedom, V is ``V f / chi^2_f``. Quantiles of
    both make the mixture. Without shrinkage s is 0.
    """
    candidates, precision = len(measured.means), np.linalg.inv(measured.covariance)
    total = precision.sum()
    level = float(precision.sum(0) @ measured.means / total)
    apart = measured.means - level  # (C,)
    quantiles = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    scale = measured.degrees / scipy.special.chdtri(measured.degrees, np.random.default_rng(0).permutation(quantiles))
    shape, rate = (candidates - 1) / 2 + _SHRINKAGE, np.maximum(apart @ precision @ apart / scale / 2, 0.01)  # (M,)
    s = scipy.special.gammaincinv(shape, quantiles * scipy.special.gammainc(shape, rate)) / rate * shrink
    means = level + (1 - s)[:, None] * apart
    covariances = (1 - s)[:, None, None] * measured.covariance + (s / total)[:, None, None]
    return Posterior(means, scale[:, None, None] * covariances)


@dataclass(frozen=True)
class ModelEstimate:
    """What is known of one candidate, in the unit of the scores."""

    score: Interval  # of its next training, on new images
    loss: float  # against the reference, expected; below 0 a gain
    chance_of_loss: float  # by more than the margin
    excess_loss: float  # the margin, expected
    # it is 95 % sure that no more is lost than the margin, and 75 % without shrinkage: else one of many that loses just
    # more would be shown in more than one of 20 cases, if the others are equal
    shown: bool


@dataclass(frozen=True)
class ModelChoice:
    """Which candidate to take, and what each is worth beside the best with float weights."""

    chosen: int
    reference: int  # the float candidate that is expected to be the best
    estimates: tuple[ModelEstimate, ...]  # of all, in their order


def choose_model(
    measured: FoldMeans, sizes: Sequence[float], fitting: Sequence[int], floats: Sequence[int], margin: float
) -> ModelChoice:
    """Take the smallest model whose expected loss beyond the margin is below a tenth of it, else the best expected.

    Of models that are hardly larger than it, that with the least expected loss.

    Args:
        measured: of all candidates: of each method what sizes and rates were chosen for it, on these folds or others.
        sizes: of each, in bytes.
        fitting: positions of those that may be taken, which keep within the limits.
        floats: of those with float weights; none: all count.
        margin: in the unit of the scores.
    """
    known, unshrunk = posterior(measured), posterior(measured, shrink=False)
    mean = known.means.mean(0)
    reference = max(floats or range(len(mean)), key=lambda candidate: mean[candidate])

    def estimate_of(candidate: int) -> ModelEstimate:
        score = _score(measured, known, candidate)
        if candidate == reference:
            return ModelEstimate(score, 0.0, 0.0, 0.0, True)
        pair = candidate, reference
        chance, alone = known.chance_of_loss(*pair, margin), unshrunk.chance_of_loss(*pair, margin)
        loss, beyond = float(known.loss(*pair)[0].mean()), known.excess_loss(*pair, margin)
        return ModelEstimate(score, loss, chance, beyond, chance <= 1 - SHOWN and alone <= 1 - _UNSHRUNK)

    estimates = tuple(estimate_of(candidate) for candidate in range(len(mean)))
    tolerable = [candidate for candidate in fitting if estimates[candidate].excess_loss < _TOLERANCE * margin]
    best = max(fitting, key=lambda candidate: mean[candidate])
    smallest = min((sizes[candidate] for candidate in tolerable), default=0.0)
    nearly_smallest = [candidate for candidate in tolerable if sizes[candidate] <= _AS_SMALL * smallest]
    chosen = min(nearly_smallest, key=lambda candidate: (estimates[candidate].loss, sizes[candidate]), default=best)
    return ModelChoice(chosen, reference, estimates)


def _score(measured: FoldMeans, known: Posterior, candidate: int) -> Interval:
    """Return the score of the next training: of shares Wilson's interval of as many images as would scatter so."""
    mean, variance = float(known.means[:, candidate].mean()), float(known.means[:, candidate].var())
    variance += float(known.covariances[:, candidate, candidate].mean() + measured.run_variance[candidate])
    if not measured.counts:
        half = critical_z() * math.sqrt(variance)
        return Interval(mean, mean - half, mean + half, measured.images, CONFIDENCE)
    share = min(max(mean, 0.0), 1.0)
    inner = (share * measured.images + 1) / (measured.images + 2)
    images = max(1, round(inner * (1 - inner) / variance))
    return replace(proportion_interval(share * images, images), n=measured.images)
