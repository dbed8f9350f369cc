"""The test that something leads every one of several rivals, or that one of them leads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from peft_vit.base.statistics import Significance, wilcoxon


def wilcoxon_against_each(rivals: Sequence[ArrayLike]) -> tuple[Significance, Significance]:
    """Test whether something leads each of k rivals, and whether some rival leads it: k arrays (n,) of differences.

    To take the largest rival of each pair instead would compare a value with the maximum of noisy ones, which lies
    above it even if all are equal in truth.

    Leads every rival: the largest of the k p-values, those that point the other way counted as 1; no correction is
    needed, as all must be small (Berger, Technometrics 24 (1982), intersection-union). Some rival leads: k times the
    smallest of those that point that way (Bonferroni). A test points a way if its mean and its ranks both do.

    Assumption: as in `wilcoxon`, for the differences to each rival; nothing on how rivals depend on each other.

    Returns:
        The test that can show "leads every rival", and the one that can show "some rival leads".
    """
    tests = [wilcoxon(values) for values in rivals]
    towards = [_points(values, test) for values, test in zip(rivals, tests, strict=True)]
    least = min(tests, key=lambda test: test.n)
    ahead, behind = (
        [(test.p_value or 0.0) if way == sign else 1.0 for test, way in zip(tests, towards, strict=True)]
        for sign in (1, -1)
    )
    shown = replace(
        least, test=f"{least.test}, each of {len(rivals)} rivals", p_value=max(ahead), direction=int(min(towards) > 0)
    )
    against = tests[behind.index(min(behind))]
    opposite = replace(
        against,
        test=f"{against.test}, the worst of {len(rivals)} rivals",
        p_value=min(1.0, len(rivals) * min(behind)),
        comparisons=len(rivals),
        direction=-int(min(towards) < 0),
    )
    return shown, opposite


def _points(values: ArrayLike, test: Significance) -> int:
    """Return the sign that mean and ranks share; 0 if they share none."""
    sign = int(np.sign(math.fsum(np.asarray(values, dtype=np.float64))))
    return sign if sign == test.direction else 0
