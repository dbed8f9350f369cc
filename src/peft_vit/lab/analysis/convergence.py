"""How steadily a run's loss came down, measured on its recorded steps; one number a run, to be paired by seed.

The recorded loss is that of one minibatch (task loss, without penalties, nats). Minibatches differ, so every
measure here holds their noise too. Runs of one seed see the same images in the same order: in paired differences
most of it drops out.
"""

from __future__ import annotations

import math

import numpy as np

from peft_vit.lab.analysis.studies import Run

LATE_SHARE = 1 / 3  # of the steps
SETTLED_WITHIN_NATS = 0.02  # of the final validation loss
_FEWEST = 3  # losses: with fewer nothing is left beside a line


def late_loss_deviation(run: Run) -> float | None:
    """Return the standard deviation of the task loss about its own line, over the last third of the steps; nats.

    ``sqrt(sum_i (y_i - a - b t_i)^2 / (m - 2))`` with t_i the last m = ceil(n / 3) of n steps and a, b the
    least-squares line through them. The line is taken away because a loss that still falls is not unstable; m - 2
    because the line has two free numbers. No robust measure in its place: rare spikes are what is asked for.
    Source: the residual standard error of linear regression, e.g. Draper & Smith, Applied Regression Analysis
    (1998), 1.4.

    It grows with the loss itself, since the losses of single images spread more where they are larger.

    Returns:
        None where nothing can be measured: fewer than 3 steps in the last third, or a loss that is not finite or of
        an absurd size.
    """
    steps, losses = _losses(run)
    late = math.ceil(len(losses) * LATE_SHARE)
    if late < _FEWEST:
        return None
    t, y = steps[-late:], losses[-late:]
    t, y = t - np.mean(t), y - np.mean(y)
    residuals = y - t * (math.fsum(t * y) / math.fsum(t * t))
    return math.sqrt(math.fsum(residuals**2) / (late - 2))


def roughness(run: Run) -> float | None:
    """Return how far a step's loss lies off the line through its two neighbours, as a standard deviation; nats.

    ``sqrt(2 / 3 * sum_i ((y_(i-1) + y_(i+1)) / 2 - y_i)^2 / (n - 2))`` over the n - 2 inner steps. If losses are a
    smooth course plus independent noise, its square is an unbiased estimate of the noise's variance as far as the
    course is a line over any three steps; so a steep or bent course is not called rough, and no smoothing window
    has to be chosen. (1/4 + 1 + 1/4 = 3/2 variances of the noise are in each square.) Source: Gasser, Sroka,
    Jennen-Steinmetz, Biometrika 73 (1986), 625, for equal spacing; second differences instead of the first ones of
    von Neumann (1941).

    Returns:
        None where nothing can be measured: fewer than 3 steps, or a loss that is not finite or of an absurd size.
    """
    _, losses = _losses(run)
    if len(losses) < _FEWEST:
        return None
    off = (losses[:-2] + losses[2:]) / 2 - losses[1:-1]
    return math.sqrt(2 / 3 * math.fsum(off**2) / (len(losses) - 2))


def settled_step(run: Run) -> int | None:
    """Return the first evaluated step from which on the validation loss stays near where it ends.

    ``min {s : |v_t - v_end| <= SETTLED_WITHIN_NATS for all evaluated t >= s}``, v the mean negative log likelihood.
    From there on, not there once: a loss that passes the final value on its way down, and comes back to it from below,
    has not settled at the first crossing. Evaluations are an epoch apart, and so is what this can tell.

    Returns:
        None without an evaluation. At the latest the last evaluation, which is near itself.
    """
    settled = None
    evaluations = sorted(run.record.evaluations, key=lambda evaluation: evaluation.step, reverse=True)
    for evaluation in evaluations:
        if not abs(evaluation.metrics.nll - evaluations[0].metrics.nll) <= SETTLED_WITHIN_NATS:
            break
        settled = evaluation.step
    return settled


def _losses(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and their losses; none if one of these is not finite, or its square or a sum of these may not be."""
    rows = sorted(run.record.steps, key=lambda row: row.step)
    if not all(abs(row.loss) < 1e150 for row in rows):
        rows = []
    return np.array([row.step for row in rows], dtype=np.float64), np.array([row.loss for row in rows])
