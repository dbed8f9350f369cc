"""Which of several models to take, and how sure one can be: odds from what they scored on the same folds of images.

Three steps. `means_of_images` (or `means_of_folds`, where there is a score of a fold alone) says what was measured: the
candidates' means and the covariance of their errors, which is small between models that are right on the same images.
`posterior` shrinks the means towards each other, as the best of many was lucky as a rule. `choose` takes the smallest
model whose expected loss beyond a margin is small.

Pass everything that was scored on these folds, what was dropped early too: what a winner was chosen from says how lucky
it may have been. That some were dropped because of their scores biases nothing then (Rubin, Biometrika 63 (1976)).

Sources: Corani & Benavoli, Machine Learning 100 (2015), and Benavoli, Corani, Demšar & Zaffalon, JMLR 18(77) (2017), on
posteriors of correlated folds; Nadeau & Bengio, Machine Learning 52 (2003), on their variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

from peft_vit.statistics.intervals import CONFIDENCE, Interval, proportion_interval

Floats = NDArray[np.float64]

SHOWN = 0.95  # so sure, a claim is called shown
_TENTH = 0.1  # of the margin: the expected loss beyond it that a smaller model may have
_SCALES = 0.25 * 2.0 ** np.arange(7)  # of true differences, in typical standard errors of measured ones
_CHAINS, _BURN_IN, _SWEEPS = 48, 40, 20


# --- what was measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Means of C candidates over the same folds, and the covariance of their errors.

    Attributes:
        means: (C,), each as if it had been scored on all folds.
        covariance: (C, C), of means as estimates of what other images would give.
        run_variance: (C,), what one more training by the same recipe scatters by.
        degrees: of freedom of the covariance.
        images: behind the means; None: scores are no shares of right images.
    """

    means: Floats
    covariance: Floats
    run_variance: Floats
    degrees: float
    images: int | None = None


def means_of_images(scores: ArrayLike, folds: ArrayLike, classes: ArrayLike | None = None) -> Measured:
    """Return means over images that repeated folds predict.

    Candidates and fold runs are two ways of a layout, ``score = theta_c + beta_j + error``, solved by least squares, so
    that candidates which were dropped after some folds are compared on the folds that they share. The covariance sums
    the images' influences u_i: an image counts once however often it was predicted (Liang & Zeger, Biometrika 73
    (1986)). Three things are added:

    - runs that scatter more than their images do: the excess, pooled over candidates;
    - training images that all runs share: n_test / n_train of the variance of one prediction of every image, which is
      Nadeau & Bengio's correction with the repeated test images already counted;
    - an image that only one of two models has right, for each: 2 / n^2 in the variance of a difference, so that models
      which never differed are not proven equal (Bonett & Price, JEBS 37 (2012)).

    Args:
        scores: (C, R, N) of candidates, repetitions, images: 1 for right, 0 for wrong; NaN where a run was not done.
        folds: (R, N), the fold of a repetition that an image is tested in, from 0 on.
        classes: (N,), if every class is to count the same (balanced accuracy).

    Raises:
        ValueError: for a candidate without scores, or folds shared with no other.
    """
    values, fold_of = np.asarray(scores, dtype=np.float64), np.asarray(folds, dtype=np.int64)
    candidates, repetitions, images = values.shape
    number = int(fold_of.max()) + 1
    run_of = (fold_of + number * np.arange(repetitions)[:, None]).ravel()  # (R N,)
    runs = np.eye(number * repetitions)[run_of]  # (R N, J) one-hot
    weights, values = _weighted(values, classes)
    known = ~np.isnan(values).reshape(candidates, -1)  # (C, R N)
    values = np.where(known, values.reshape(candidates, -1), 0.0)
    theta, beta, moved = _two_way(known @ runs, values @ runs)
    errors = np.where(known, values - theta[:, None] - beta[run_of], 0.0)
    influence = np.zeros_like(errors)  # (C, R N), what each prediction's error moves the means by
    for run in range(runs.shape[1]):
        of_run = run_of == run
        influence[:, of_run] = moved[:, :, run] @ errors[:, of_run]
    by_image = influence.reshape(values.shape[0], repetitions, images).sum(1)  # (C, N)
    by_run = influence @ runs  # (C, J)
    once = influence @ influence.T  # (C, C), the covariance if every prediction were of an image of its own
    done = int(runs[known.any(0)].any(0).sum())
    excess = max(0.0, _scatter(by_run @ by_run.T) * done / max(1, done - 1) / max(_scatter(once), 1e-300) - 1)
    times = np.sqrt(known.sum(1) / images)  # (C,) roots of how often every image was predicted
    seen = known.reshape(candidates, repetitions, images).any(1).sum(1)  # (C,) images
    covariance = by_image @ by_image.T * images / (images - 1) + excess * once
    covariance += once * np.outer(times, times) / (number - 1)
    covariance += np.diag(np.mean(weights**2) / seen**2)
    return Measured(
        theta, covariance, excess * np.diag(_contrasts(once)) * (known @ runs > 0).sum(1), images - 1.0, images
    )


def means_of_folds(scores: ArrayLike, test_share: float) -> Measured:
    """Return means over J scores of folds, with Nadeau & Bengio's variance ``s^2 (1 / J + rho / (1 - rho))``.

    With two candidates and a flat prior the posterior of their difference is that of the Bayesian correlated t test.
    Of more, correlations are shrunk towards their mean, the more the fewer folds there are.

    Args:
        scores: (C, J), all there.
        test_share: rho, the share of images that a fold tests.
    """
    values = np.asarray(scores, dtype=np.float64)
    candidates, folds = values.shape
    errors = values - values.mean(1, keepdims=True)
    sample = errors @ errors.T / (folds - 1)  # (C, C)
    deviations = np.sqrt(np.diag(sample))
    scale = np.outer(deviations, deviations)
    correlation = np.divide(sample, scale, out=np.eye(candidates), where=scale > 0)
    others = ~np.eye(candidates, dtype=bool)
    mean = np.where(others, correlation[others].mean() if candidates > 1 else 0.0, 1.0)
    share = candidates / (candidates + folds) if candidates > 2 else 0.0
    shrunk = scale * ((1 - share) * correlation + share * mean)
    factor = 1 / folds + test_share / (1 - test_share)
    return Measured(values.mean(1), factor * shrunk, np.diag(shrunk).copy(), folds - 1.0)


def _weighted(values: Floats, classes: ArrayLike | None) -> tuple[Floats, Floats]:
    """Return weights of images (N,), 1 on average, and values whose plain mean is the mean over classes.

    Around the class's own mean over candidates, so that which classes a fold holds moves little.
    """
    images = values.shape[-1]
    if classes is None:
        return np.ones(images), values
    _, labels, counts = np.unique(np.asarray(classes), return_inverse=True, return_counts=True)
    weights = (images / (len(counts) * counts))[labels]
    means = np.array([np.nanmean(values[..., labels == k]) for k in range(len(counts))])
    return weights, means.mean() + weights * (values - means[labels])


def _two_way(counts: Floats, totals: Floats) -> tuple[Floats, Floats, Floats]:
    """Return theta (C,), beta (J,), and by what the sum of candidate c's values in run j moves theta: (C, C, J)."""
    candidates, runs = counts.shape
    rows, columns = np.nonzero(counts)
    done = counts.max(0)  # (J,)
    design = np.hstack([np.eye(candidates)[rows], np.eye(runs)[columns] - done / done.sum()])  # betas are 0 on average
    normal = (design.T * counts[rows, columns]) @ design
    if np.linalg.matrix_rank(normal, hermitian=True) < candidates + np.count_nonzero(done) - 1:
        raise ValueError("a candidate has no scores, or shares no fold with the others")
    solver = np.linalg.pinv(normal, hermitian=True) @ design.T  # (C + J, rows)
    solution = solver @ totals[rows, columns]
    moved = np.zeros((candidates, candidates, runs))
    moved[:, rows, columns] = solver[:candidates]
    beta = solution[candidates:]
    return solution[:candidates], beta - done @ beta / done.sum(), moved


def _contrasts(matrix: Floats) -> Floats:
    """Return the covariance of differences to the mean of all."""
    return matrix - matrix.mean(0) - matrix.mean(1)[:, None] + matrix.mean()


def _scatter(matrix: Floats) -> float:
    return float(np.trace(_contrasts(matrix)))


# --- what follows for the truth ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Posterior:
    """True means of C candidates: an even mixture of M normal distributions."""

    means: Floats  # (M, C)
    covariances: Floats  # (M, C, C)

    @property
    def mean(self) -> Floats:
        """Return the expectation of each, (C,)."""
        return np.asarray(self.means.mean(0))

    def variance(self, candidate: int) -> float:
        """Return the variance of one."""
        return float(self.covariances[:, candidate, candidate].mean() + self.means[:, candidate].var())

    def chance_of_loss(self, candidate: int, reference: int, margin: float) -> float:
        """Return the probability that a candidate lies more than a margin below another."""
        mean, deviation = self._loss(candidate, reference)
        return float(scipy.special.ndtr((mean - margin) / deviation).mean()) if candidate != reference else 0.0

    def loss_beyond(self, candidate: int, reference: int, margin: float) -> float:
        """Return the expectation of ``max(0, loss - margin)``, ``s phi(z) + (m - margin) Phi(z)`` of a normal loss."""
        if candidate == reference:
            return 0.0
        mean, deviation = self._loss(candidate, reference)
        z = (mean - margin) / deviation
        density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        return float((deviation * density + (mean - margin) * scipy.special.ndtr(z)).mean())

    def _loss(self, candidate: int, reference: int) -> tuple[Floats, Floats]:
        """Return means and standard deviations (M,) of ``theta_reference - theta_candidate``."""
        pair = np.ix_(range(len(self.means)), [reference, candidate], [reference, candidate])
        both = self.covariances[pair]  # (M, 2, 2)
        variance = both[:, 0, 0] + both[:, 1, 1] - 2 * both[:, 0, 1]
        return self.means[:, reference] - self.means[:, candidate], np.sqrt(np.maximum(variance, 1e-16))


def posterior(measured: Measured, seed: int = 0) -> Posterior:
    """Return what is known of the true means.

    ``measured ~ N(theta, V)``, ``theta_c = mu + delta_c``, mu flat, ``delta_c ~ sum_k pi_k N(0, s_k^2)`` on a grid of
    scales and pi Dirichlet: where candidates hardly differ, or all do, or one alone, pi learns it from all of them
    (Stephens, Biostatistics 18 (2017), adaptive shrinkage; here with correlated errors). Gibbs' sampler draws scales and
    pi in many chains; given the scales everything is normal, and that is what is returned, not the draws. With few
    degrees of freedom each chain draws ``V f / chi^2_f``: Student's t.

    Deterministic for a seed.
    """
    rng = np.random.default_rng(seed)
    candidates = len(measured.means)
    spread = math.sqrt(max(float(np.trace(_contrasts(measured.covariance))) / max(1, candidates - 1), 1e-16))
    scales = spread * _SCALES  # (K,)
    drawn = scipy.special.chdtri(measured.degrees, (np.arange(_CHAINS) + 0.5) / _CHAINS) / measured.degrees
    precision = np.linalg.inv(measured.covariance) * rng.permutation(drawn)[:, None, None]  # (M, C, C)
    row = precision.sum(2)  # (M, C)
    total = row.sum(1)[:, None]  # (M, 1)
    of_deltas = precision - row[:, :, None] * row[:, None, :] / total[:, :, None]  # mu integrated out
    pulled = of_deltas @ measured.means  # (M, C)
    chosen = rng.integers(len(scales), size=(_CHAINS, candidates))
    weights = np.full((_CHAINS, len(scales)), 1 / len(scales))
    means, covariances = [], []
    identity = np.eye(candidates)
    for sweep in range(_BURN_IN + _SWEEPS):
        inner = of_deltas + identity / scales[chosen][:, None, :] ** 2
        covariance = np.linalg.inv(inner)  # (M, C, C)
        mean = np.einsum("mcd,md->mc", covariance, pulled)
        if sweep >= _BURN_IN:
            # mu given delta is normal, with mean (row . (measured - delta)) / total
            share = row / total  # (M, C)
            lift = identity - share[:, None, :]  # theta = delta + mu = lift delta + share . measured
            means.append(np.einsum("mcd,md->mc", lift, mean) + (share @ measured.means)[:, None])
            covariances.append(lift @ covariance @ lift.transpose(0, 2, 1) + 1 / total[:, :, None])
        noise = rng.standard_normal((_CHAINS, candidates, 1))
        deltas = mean + (np.linalg.cholesky(covariance) @ noise)[:, :, 0]
        logits = np.log(weights)[:, None, :] - np.log(scales) - (deltas[:, :, None] / scales) ** 2 / 2  # (M, C, K)
        chosen = (logits + rng.gumbel(size=logits.shape)).argmax(2)
        counts = (chosen[:, :, None] == np.arange(len(scales))).sum(1)  # (M, K)
        gammas = rng.standard_gamma(counts + 1 / len(scales)) + 1e-300
        weights = gammas / gammas.sum(1, keepdims=True)
    return Posterior(np.concatenate(means), np.concatenate(covariances))


# --- what to take -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Odds:
    """What was taken, and how sure that is.

    Attributes:
        chosen: position of a candidate.
        reference: likewise, the float candidate with the highest expectation.
        accuracy: of the chosen one once it is trained, on new images, with a 95 % interval.
        loss: against the reference, expected; below 0 it gains.
        chance_of_loss: that the reference is better by more than the margin.
        loss_beyond: the margin, expected.
        shown: it is 95 % sure that the reference is not better by more than the margin.
    """

    chosen: int
    reference: int
    accuracy: Interval
    loss: float
    chance_of_loss: float
    loss_beyond: float
    shown: bool


def choose(
    measured: Measured,
    sizes: Sequence[int],
    *,
    fitting: Sequence[int],
    floats: Sequence[int],
    margin: float,
    seed: int = 0,
) -> Odds:
    """Take the smallest model whose expected loss beyond the margin is below a tenth of the margin.

    If there is none, that with the least expected loss.

    Args:
        measured: of all candidates.
        sizes: bytes of each.
        fitting: positions of those that may be taken: within the limits, and able to be trained.
        floats: positions of those with float weights, of which the best is what losses count from; may be empty: all.
        margin: in the unit of the scores.
        seed: of the posterior's draws.
    """
    known = posterior(measured, seed)
    mean = known.mean
    reference = max(floats or range(len(mean)), key=lambda candidate: mean[candidate])
    beyond = {candidate: known.loss_beyond(candidate, reference, margin) for candidate in fitting}
    sound = [candidate for candidate in fitting if beyond[candidate] < _TENTH * margin]
    if sound:
        chosen = min(sound, key=lambda candidate: (sizes[candidate], beyond[candidate]))
    else:
        chosen = max(fitting, key=lambda candidate: mean[candidate])
    chance = known.chance_of_loss(chosen, reference, margin)
    return Odds(
        chosen,
        reference,
        _on_new_images(measured, known, chosen),
        float(mean[reference] - mean[chosen]),
        chance,
        beyond[chosen],
        chance <= 1 - SHOWN,
    )


def _on_new_images(measured: Measured, known: Posterior, chosen: int) -> Interval:
    """Return a score with its interval: Wilson's of as many images as would scatter so, or a normal one."""
    mean = float(known.mean[chosen])
    variance = known.variance(chosen) + float(measured.run_variance[chosen])
    if measured.images is None:
        half = float(scipy.special.ndtri(0.5 + CONFIDENCE / 2)) * math.sqrt(variance)
        return Interval(mean, mean - half, mean + half, len(measured.means), CONFIDENCE)
    share = min(1.0, max(0.0, mean))
    inner = (share * measured.images + 1) / (measured.images + 2)
    images = inner * (1 - inner) / variance
    wilson = proportion_interval(share * images, images)  # type: ignore[arg-type]
    return Interval(share, wilson.low, wilson.high, measured.images, CONFIDENCE)
