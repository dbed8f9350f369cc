"""Every experiment against every other: one family of paired tests, corrected as one.

The claim of a pair (A, B) is "A is more accurate than B", A the earlier one in the study's order; so it is refuted
where B is the more accurate one. Pairs of runs, test, interval and correction are those of `analysis.comparison`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from peft_vit.analysis.comparison import DECIMALS, Comparison, correct, draws, pairing_note, same_problem
from peft_vit.analysis.studies import Run, Study
from peft_vit.statistics import (
    EffectSize,
    Interval,
    Significance,
    effect_size,
    paired_difference,
    paired_improvement,
    wilcoxon,
)

MOST_PAIRS = 20_000  # of experiments, 200 of them: a few seconds
_NONE = -1  # in a column: the run draws nothing that a seed could make equal


@dataclass(frozen=True)
class Pair:
    """Two experiments. Effect and improvement describe; neither decides.

    Attributes:
        comparison: difference, interval, test, verdict.
        effect: the difference in units of its standard deviation over pairs of runs; None without any.
        improvement: share of pairs of runs in which the first is the more accurate one, ties as half; None likewise.
    """

    comparison: Comparison
    effect: EffectSize | None
    improvement: Interval | None


@dataclass(frozen=True)
class AllPairs:
    """Comparisons of all pairs of experiments that have a finished run.

    Attributes:
        experiments: their names, in the study's order.
        pairs: in the order (1, 2), (1, 3), ..., (2, 3), ...; empty if there are too many.
        not_formed: pairs that were not formed because they are more than MOST_PAIRS; 0 otherwise.
    """

    experiments: tuple[str, ...]
    pairs: tuple[Pair, ...]
    not_formed: int

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Return difference, test and verdict of each pair."""
        return tuple(pair.comparison for pair in self.pairs)

    @property
    def decided(self) -> tuple[Pair, ...]:
        """Return the pairs that the test decided."""
        return tuple(pair for pair in self.pairs if pair.comparison.verdict != "not decided")


@dataclass(frozen=True)
class _Column:
    """One experiment's runs by seed: accuracy, and codes of what must be, and should be, equal in a pair."""

    name: str
    accuracy: np.ndarray  # (seeds,), NaN without a run
    problem: np.ndarray  # (seeds,)
    draws: np.ndarray  # (seeds,); _NONE: of a probe, which draws nothing


def all_pairs(study: Study, most: int = MOST_PAIRS) -> AllPairs:
    """Compare every experiment with every other on test accuracy, Holm-corrected over all pairs.

    The same as `comparison.compare` for each pair, but runs are looked at once and not once a pair, and the exact test
    is computed once for each pattern of signed ranks.

    Args:
        study: all runs.
        most: above this number of pairs none is formed.
    """
    runs_of: dict[str, list[Run]] = {}
    for run in study.runs:
        runs_of.setdefault(run.experiment.name, []).append(run)
    names = tuple(e.name for e in study.experiments if e.name in runs_of)
    count = len(names) * (len(names) - 1) // 2
    if count > most:
        return AllPairs(names, (), count)
    seeds = np.array(sorted({run.seed for run in study.runs}), dtype=np.int64)
    columns = _columns(names, runs_of, seeds)
    known: dict[tuple[bytes, int], Significance] = {}
    family = [_compare(a, b, seeds, known) for a, b in combinations(columns, 2)]
    return AllPairs(names, tuple(_pair(comparison) for comparison in correct(family)), 0)


def _pair(comparison: Comparison) -> Pair:
    if not comparison.by_seed:
        return Pair(comparison, None, None)
    return Pair(comparison, effect_size(comparison.by_seed), paired_improvement(comparison.by_seed))


def _columns(names: Sequence[str], runs_of: dict[str, list[Run]], seeds: np.ndarray) -> list[_Column]:
    position = {int(seed): i for i, seed in enumerate(seeds)}
    problems: dict[object, int] = {}
    seen: dict[object, int] = {}
    columns = []
    for name in names:
        column = _Column(name, np.full(len(seeds), np.nan), *(np.zeros(len(seeds), dtype=np.int64) for _ in range(2)))
        for run in runs_of[name]:
            at = position[run.seed]
            column.accuracy[at] = run.test.accuracy
            column.problem[at] = problems.setdefault(same_problem(run), len(problems))
            column.draws[at] = _NONE if (drawn := draws(run)) is None else seen.setdefault(drawn, len(seen))
        columns.append(column)
    return columns


def _compare(a: _Column, b: _Column, seeds: np.ndarray, known: dict[tuple[bytes, int], Significance]) -> Comparison:
    both = np.isfinite(a.accuracy) & np.isfinite(b.accuracy)
    paired = both & (a.problem == b.problem)
    differ = (a.draws != b.draws) & (a.draws != _NONE) & (b.draws != _NONE)
    note = pairing_note(refused=int(both.sum() - paired.sum()), other_draws=bool(differ[paired].any()))
    if not paired.any():
        reason = note or "no pair of runs with the same seed"
        return Comparison(a.name, b.name, None, (), (), None, None, "not decided", reason)
    values, against = a.accuracy[paired], b.accuracy[paired]
    differences = np.round(values - against, DECIMALS)
    return Comparison(
        name=a.name,
        reference=b.name,
        difference=paired_difference(values, against),
        by_seed=tuple(differences.tolist()),
        seeds=tuple(seeds[paired].tolist()),
        significance=_test(differences, known),
        adjusted_p=None,
        verdict="not decided",
        note=note,
    )


def _test(differences: np.ndarray, known: dict[tuple[bytes, int], Significance]) -> Significance:
    """Return the signed-rank test, which depends on nothing but ranks and signs, from those already computed."""
    nonzero = differences[differences != 0]
    _, group, size = np.unique(np.abs(nonzero), return_inverse=True, return_counts=True)
    doubled = (2 * np.cumsum(size) - size + 1)[group]  # twice the midranks, whole numbers
    positive = int(doubled[nonzero > 0].sum())
    key = (np.sort(doubled).tobytes() + differences.size.to_bytes(8), positive)
    if key not in known:
        known[key] = wilcoxon(differences)
    return known[key]
