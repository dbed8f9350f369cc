"""A limited time goes to the most experiments that get enough seeds for a verdict, and then to further seeds."""

import itertools
import random

import pytest
import scipy.stats

from peft_vit.studies.time_limit import choose, makespan, most_decided, seed_by_seed, seeds_for_verdict

pytestmark = pytest.mark.part("runner")


def runs(*seconds: float, seeds: int = 12) -> list[list[float]]:
    """Make a row an experiment whose runs all take the same."""
    return [[one] * seeds for one in seconds]


def test_so_many_seeds_can_decide_and_one_less_can_not() -> None:
    """Against scipy: the most extreme data, and Bonferroni's first step, which is also Holm's."""
    for experiments in range(2, 12):
        needed = seeds_for_verdict(experiments, 100)
        for seeds, decided in ((needed, True), (needed - 1, False)):
            p = scipy.stats.wilcoxon(range(1, seeds + 1), method="exact").pvalue
            assert bool((experiments - 1) * p <= 0.05) is decided, (experiments, seeds)
    assert [seeds_for_verdict(2, seeds) for seeds in (5, 6, 7)] == [None, 6, 6]
    assert seeds_for_verdict(1, 100) is None


def test_at_most_so_many_experiments_can_be_decided() -> None:
    assert [most_decided(10, seeds) for seeds in (1, 5, 6, 7, 8)] == [0, 0, 2, 4, 7]
    assert most_decided(3, 10) == 3
    assert most_decided(1, 10) == 0


def test_runs_come_seed_by_seed() -> None:
    rows = [["a0", "a1", "a2"], ["b0", "b1", "b2"], ["c0", "c1", "c2"]]
    assert seed_by_seed(rows, 2, 3) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_if_all_fits_nothing_is_left_out() -> None:
    found = choose(runs(10, 10, 10), 1, left_s=360)
    assert (found.experiments, found.seeds, found.needed, found.fits) == (3, 12, 7, True)


@pytest.mark.parametrize(
    ("left_s", "experiments", "seeds"),
    [
        (359, 3, 11),  # 3 x 7 x 10 s x 1.3 = 273 s
        (273, 3, 9),
        (272, 2, 12),  # no three any more: what that leaves goes into further seeds of two
        (156, 2, 7),  # 2 x 6 x 10 s x 1.3
    ],
)
def test_the_most_experiments_with_a_verdict_and_then_further_seeds(left_s, experiments, seeds) -> None:
    found = choose(runs(10, 10, 10), 1, left_s)
    assert (found.experiments, found.seeds, found.fits) == (experiments, seeds, True)
    assert found.needed == seeds_for_verdict(experiments, 12)


def test_too_little_for_two_experiments_does_not_fit() -> None:
    found = choose(runs(10, 10, 10), 1, 155)
    assert (found.experiments, found.seeds, found.needed, found.fits) == (2, 7, 6, False)


def test_experiments_that_seeds_cannot_decide_are_not_taken_before_all_fits() -> None:
    """Six seeds decide one comparison: a third experiment would take both verdicts away."""
    assert choose(runs(1, 1, 1, seeds=6), 1, left_s=17).experiments == 2
    assert choose(runs(1, 1, 1, seeds=6), 1, left_s=18).experiments == 3


def test_a_study_that_can_decide_nothing_is_only_bounded() -> None:
    found = choose(runs(10, 10, 10, seeds=3), 1, left_s=65)
    assert (found.experiments, found.seeds, found.needed, found.fits) == (3, 2, None, True)
    found = choose(runs(10, seeds=20), 1, left_s=45)
    assert (found.experiments, found.seeds, found.needed) == (1, 4, None)
    assert not choose(runs(10, seeds=20), 1, left_s=5).fits


def test_what_is_done_costs_nothing_and_what_was_begun_is_not_given_up() -> None:
    done = [[0.0] * 7 + [10.0] * 5] * 3 + [[10.0] * 12]
    assert choose(done, 1, left_s=80, at_least=3, begun=3).experiments == 3
    assert choose(done, 1, left_s=105, at_least=3, begun=3).experiments == 4  # 8 seeds: 3 x 1 + 8, with 30 % to spare
    found = choose(runs(10, 10, 10, 10), 1, left_s=50, at_least=3)
    assert (found.experiments, found.seeds, found.fits) == (3, 1, False)


def test_an_experiment_with_a_done_run_counts_as_a_comparison() -> None:
    """Holm corrects for what stands in the report, whether it goes on or not."""
    rows = [[10.0] * 12, [10.0] * 12, [0.0] + [10.0] * 11]
    assert choose(rows, 1, left_s=185).needed == 6
    assert choose(rows, 1, left_s=185, begun=3).needed == 7


def test_the_choice_is_the_best_of_all_there_are() -> None:
    """Against a search over all pairs of experiments and seeds."""
    draw = random.Random(3)
    for _ in range(200):
        workers, seeds = draw.choice((1, 2, 3)), draw.choice((6, 7, 8, 12))
        rows = [[draw.uniform(1, 20)] * seeds for _ in range(draw.choice((2, 3, 5)))]
        left_s = draw.uniform(10, 900)
        found = choose(rows, workers, left_s)

        def takes(experiments: int, some: int, rows=rows, workers=workers) -> float:
            return makespan([rows[e][0] for _ in range(some) for e in range(experiments)], workers)

        whole = takes(len(rows), seeds) <= left_s
        decided = [
            e
            for e, needed in itertools.product(range(2, len(rows) + 1), range(6, seeds + 1))
            if (e - 1) * 2 / 2**needed <= 0.05 and 1.3 * takes(e, needed) <= left_s
        ]
        assert found.fits is (whole or bool(decided))
        expected = len(rows) if whole else max(decided, default=2)
        assert found.experiments == expected
        assert found.seeds == max((s for s in range(1, seeds + 1) if takes(expected, s) <= left_s), default=0)
