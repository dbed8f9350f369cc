import pytest

from peft_vit.statistics import holm, minimum_n_wilcoxon, paired_t, verdict, wilcoxon


def test_minimum_n_of_one_and_of_three_comparisons() -> None:
    assert minimum_n_wilcoxon(0.05) == 6
    assert minimum_n_wilcoxon(0.05, comparisons=3) == 7
    assert minimum_n_wilcoxon(0.05, comparisons=11) == 9


@pytest.mark.parametrize("n", range(1, 12))
def test_minimum_n_is_where_the_extreme_outcome_becomes_significant(n: int) -> None:
    extreme = wilcoxon([float(i + 1) for i in range(n)])
    assert extreme.p_value is not None
    assert (extreme.p_value <= 0.05) == (n >= extreme.minimum_n) == extreme.decidable


def test_too_few_seeds_say_so() -> None:
    assert wilcoxon([1.0, 2.0]).sentence() == "not decidable with n = 2, needs at least 6"
    assert verdict(1.5, wilcoxon([1.0, 2.0]), 0.0) == "not decided"


def test_no_difference_at_all() -> None:
    nothing = wilcoxon([0.0, 0.0, 0.0])
    assert (nothing.n, nothing.dropped, nothing.p_value) == (0, 3, 1.0)
    assert nothing.sentence() == "not decidable with n = 0 (3 more without a difference), needs at least 6"


def test_verdicts_follow_the_sign() -> None:
    clear = wilcoxon([float(i + 1) for i in range(8)])
    assert verdict(4.5, clear, clear.p_value) == "supported"
    assert verdict(-4.5, clear, clear.p_value) == "refuted"
    assert verdict(4.5, clear, 0.06) == "not decided"


def test_constant_differences_have_no_t_test() -> None:
    assert paired_t([0.5, 0.5, 0.5]).p_value is None
    assert paired_t([0.5]).sentence() == "not decidable with n = 1, needs at least 2"


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([]) == ()


def test_bad_level_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha"):
        minimum_n_wilcoxon(0.0)
