"""The variance of a difference on folds against the correlated t test's of baycomp, its authors' package."""

import numpy as np
import pytest

from peft_vit.base.statistics.odds import means_of_images

baycomp = pytest.importorskip("baycomp")


@pytest.mark.parametrize("repetitions", [1, 3])
def test_a_difference_has_the_mean_and_on_average_the_variance_of_the_correlated_t_test(repetitions: int) -> None:
    rng, found, theirs = np.random.default_rng(repetitions), [], []
    for _ in range(400):
        folds = np.array([rng.permutation(200) % 5 for _ in range(repetitions)])
        hard = rng.random(200) + 0.3 * rng.standard_normal((2, repetitions, 200))  # each run has errors of its own
        scores = (hard < 0.8).astype(float)
        measured = means_of_images(scores, folds)
        of_folds = [[scores[c, r][folds[r] == f].mean() for r in range(repetitions) for f in range(5)] for c in (0, 1)]
        mean, variance, _ = baycomp.CorrelatedTTest.compute_statistics(*np.array(of_folds), runs=repetitions)
        assert measured.means[1] - measured.means[0] == pytest.approx(mean)
        v = measured.covariance
        found.append(v[0, 0] + v[1, 1] - 2 * v[0, 1])
        theirs.append(variance)
    assert 1 < np.mean(found) / np.mean(theirs) < 1.1  # and what runs scatter beyond their images, by chance
    assert np.std(found) < 0.5 * np.std(theirs)  # of 200 images instead of five scores
