from dataclasses import replace

import numpy as np
import pytest

from peft_vit.base.statistics import (
    beyond_margin,
    equivalence,
    holm,
    minimum_n_wilcoxon,
    noninferiority,
    verdict,
    wilcoxon,
)


def test_verdicts_follow_the_sign_where_seeds_suffice() -> None:
    clear, few, nothing = (wilcoxon(values) for values in (np.arange(1.0, 9), [1.0, 2.0], [0.0, 0.0, 0.0]))
    assert (verdict(4.5, clear, clear.p_value), verdict(4.5, clear, 0.06)) == ("supported", "not decided")
    assert verdict(-4.5, wilcoxon(-np.arange(1.0, 9)), clear.p_value) == "refuted"
    assert few.sentence() == "not decidable with n = 2, needs at least 6"
    assert verdict(1.5, few, 0.0) == "not decided"
    assert (nothing.n, nothing.dropped, nothing.p_value) == (0, 3, 1.0)
    assert nothing.sentence() == "not decidable with n = 0 (3 more without a difference), needs at least 6"


def test_one_seed_far_out_does_not_turn_the_verdict() -> None:
    """Eleven of twelve seeds lose, and the twelfth gains more than all of them: the ranks say no, the mean says yes."""
    differences = [*(-0.01 * (i + 1) for i in range(11)), 5.0]
    ranks = wilcoxon(differences)
    assert ranks.p_value < 0.05
    assert ranks.direction == -1
    assert verdict(sum(differences) / 12, ranks, ranks.p_value) == "not decided"


@pytest.mark.parametrize("comparisons", [1, 3, 11])
@pytest.mark.parametrize("n", [1, 5, 6, 7, 8, 9, 10])
def test_minimum_n_of_a_family_is_where_holm_lets_the_extreme_outcome_pass(comparisons, n) -> None:
    needed = minimum_n_wilcoxon(0.05, comparisons)
    extreme = replace(wilcoxon([float(i + 1) for i in range(n)]), minimum_n=needed)
    adjusted = holm([extreme.p_value, *[1.0] * (comparisons - 1)])[0]
    assert (adjusted <= 0.05) == (n >= extreme.minimum_n) == extreme.decidable
    assert wilcoxon([1.0] * n).p_value == extreme.p_value  # all signs alike are as rare with ties


@pytest.mark.parametrize(
    "test", [lambda x: equivalence(x, 2.0), lambda x: noninferiority(x, 0.1), lambda x: beyond_margin(x, 0.1)]
)
def test_two_pairs_can_pass_any_family_under_a_t_test(test) -> None:
    significance = test([1.0, 1.0 + 1e-9])
    assert (significance.minimum_n, significance.decidable) == (2, True)
    assert holm([significance.p_value, *[1.0] * 999])[0] < 0.05
