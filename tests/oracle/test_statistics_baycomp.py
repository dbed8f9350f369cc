"""The Bayesian correlated t test against baycomp, its authors' package."""

import numpy as np
import pytest

from peft_vit.statistics.odds import means_of_folds, posterior

baycomp = pytest.importorskip("baycomp")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("repetitions", [1, 3])
@pytest.mark.parametrize("margin", [0.0, 0.01])
def test_two_candidates_have_the_odds_of_the_correlated_t_test(seed: int, repetitions: int, margin: float) -> None:
    rng = np.random.default_rng(seed)
    reference, candidate = rng.normal([[0.81], [0.80]], 0.02, (2, 5 * repetitions))
    measured = means_of_folds([reference, candidate], test_share=1 / 5)
    theirs = baycomp.CorrelatedTTest.probs(candidate, reference, rope=margin, runs=repetitions)
    better, worse = theirs[0], theirs[-1]  # of the candidate by more than the rope
    known = posterior(measured, shrink=False)  # a mixture over 64 quantiles
    assert known.chance_of_loss(1, 0, margin) == pytest.approx(worse, abs=2e-3)
    assert known.chance_of_loss(0, 1, margin) == pytest.approx(better, abs=2e-3)
