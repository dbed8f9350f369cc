"""Every experiment against every other: one family of paired tests, corrected as one.

The claim of a pair (A, B) is "A is more accurate than B", A the earlier one in the study's order; so it is refuted
where B is the more accurate one. Pairs of runs, test, interval and correction are those of `analysis.comparison`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from peft_vit.analysis.comparison import Comparison, compare, correct
from peft_vit.analysis.studies import Study
from peft_vit.statistics import EffectSize, Interval, effect_size, paired_improvement

MOST_PAIRS = 20_000  # of experiments, 200 of them: a few seconds


@dataclass(frozen=True)
class Pair:
    """Two experiments. Effect and improvement describe; neither decides."""

    comparison: Comparison  # difference, interval, test, verdict
    effect: EffectSize | None  # the difference in units of its standard deviation over pairs of runs; None without any
    # share of pairs of runs in which the first is the more accurate one, ties as half; None likewise
    improvement: Interval | None


@dataclass(frozen=True)
class AllPairs:
    """Comparisons of all pairs of experiments that have a finished run."""

    experiments: tuple[str, ...]  # their names, in the study's order
    pairs: tuple[Pair, ...]  # in the order (1, 2), (1, 3), ..., (2, 3), ...; empty if there are too many
    not_formed: int  # pairs that were not formed because they are more than MOST_PAIRS; 0 otherwise

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Return difference, test and verdict of each pair."""
        return tuple(pair.comparison for pair in self.pairs)

    @property
    def decided(self) -> tuple[Pair, ...]:
        """Return the pairs that the test decided."""
        return tuple(pair for pair in self.pairs if pair.comparison.verdict != "not decided")


def all_pairs(study: Study, most: int = MOST_PAIRS) -> AllPairs:
    """Compare every experiment with every other on test accuracy, Holm-corrected; above `most` pairs none is formed."""
    names = tuple(e.name for e in study.experiments if study.of(e.name))
    count = len(names) * (len(names) - 1) // 2
    if count > most:
        return AllPairs(names, (), count)
    family = correct([compare(study.of(a), study.of(b), a, b) for a, b in combinations(names, 2)], study.untested)
    return AllPairs(names, tuple(map(_pair, family)), 0)


def _pair(comparison: Comparison) -> Pair:
    if not comparison.by_seed:
        return Pair(comparison, None, None)
    return Pair(comparison, effect_size(comparison.by_seed), paired_improvement(comparison.by_seed))
