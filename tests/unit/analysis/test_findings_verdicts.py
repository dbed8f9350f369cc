"""From values to verdicts: Holm, margins, ties, and how many seeds it takes. Error rates: tests/unit/statistics."""

from typing import Any

import numpy as np
import pytest

from peft_vit.base.statistics import wilcoxon
from peft_vit.base.statistics.estimates import Estimate
from peft_vit.lab.analysis.findings import Finding, Sentence, estimated, judge

pytestmark = pytest.mark.part("analyzer")


def sentence(test: str = "superiority", name: str = "h", **changes: Any) -> Sentence:
    values = {"family": "f", **changes}
    return Sentence(id=name, text="s", test=test, unit="share", **values)


def values_of(values: Any, subject: str = "a") -> Estimate:
    return estimated(subject, dict(enumerate(map(float, values))))


def found(values: Any, test: str = "superiority", **changes: Any) -> Finding:
    (finding,) = judge([(sentence(test, **changes), values_of(values))])
    return finding


# --- superiority ------------------------------------------------------------------------------------------------------


def test_the_margin_is_subtracted_and_the_estimate_is_not() -> None:
    values = [0.51, 0.52, 0.53, 0.54, 0.55, 0.56]
    above, below = found(values, margin=0.5), found(values, margin=0.6)
    assert (above.verdict, below.verdict) == ("supported", "refuted")
    assert above.interval.estimate == below.interval.estimate == pytest.approx(0.535)
    assert found(values, margin=0.535).verdict == "not decided"
    assert above.test == "exact Wilcoxon signed-rank, margin 0.5"


@pytest.mark.parametrize("with_updates", [0.82, 0.57, 0.93])
def test_values_at_the_margin_but_for_rounding_decide_nothing(with_updates) -> None:
    at_margin = np.full(8, with_updates) - (with_updates - 0.01)
    assert (at_margin != 0.01).any() or with_updates != 0.82, "0.82 - 0.81 is not 0.01 as floats are"
    finding = found(at_margin, margin=0.01)
    assert (finding.verdict, finding.adjusted_p) == ("not decided", 1.0)
    about = found(-at_margin, "equivalence", margin=0.005, expected=-0.01)
    assert about.outcome == "not decidable: the differences have no spread"


@pytest.mark.parametrize(
    ("families", "outcome"), [("fff", "not decidable with n = 6, needs at least 7"), ("fgh", ""), (("", "", ""), "")]
)
def test_a_larger_family_needs_more_seeds_and_a_sentence_without_one_is_its_own(families, outcome) -> None:
    rows = [(sentence(name=f"h{i}", family=of), values_of(np.arange(1, 7))) for i, of in enumerate(families)]
    for finding in judge(rows):
        assert finding.verdict == ("not decided" if outcome else "supported")
        assert outcome in finding.outcome


def test_holm_over_a_family_by_hand() -> None:
    rows = [np.arange(1, 11), np.array([-1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), np.array([-4, 5, -6, 7, -1, 2, 3, -8, 9, 10])]
    raw = [wilcoxon(row).p_value for row in rows]
    assert raw == sorted(raw)
    findings = judge([(sentence(name=f"h{i}"), values_of(row)) for i, row in enumerate(rows)])
    by_hand = [3 * raw[0], max(3 * raw[0], 2 * raw[1]), max(3 * raw[0], 2 * raw[1], raw[2])]
    assert [f.adjusted_p for f in findings] == pytest.approx(by_hand, abs=1e-12)


# --- within a margin --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test", "change", "settings", "expected"),
    [
        ("equivalence", lambda x: x, {}, "supported"),
        ("equivalence", lambda x: x + 0.1, {}, "refuted"),
        ("equivalence", lambda x: x - 0.1, {}, "refuted"),
        ("equivalence", lambda x: x * 50, {}, "not decided"),
        ("equivalence", lambda x: x - 0.1, {"expected": -0.1}, "supported"),
        ("noninferiority", lambda x: x, {}, "supported"),
        ("noninferiority", lambda x: x + 0.1, {}, "supported"),
        ("noninferiority", lambda x: x - 0.0095, {}, "not decided"),
        ("noninferiority", lambda x: x - 0.03, {}, "refuted"),
    ],
)
def test_within_a_margin(test, change, settings, expected) -> None:
    values = change(np.array([0.001, -0.002, 0.003, 0.0, 0.002, -0.001]))
    assert found(values, test, margin=0.01, **settings).verdict == expected


def test_what_is_counted_says_nothing_of_other_runs() -> None:
    assert found([0.1, 0.2], "counted", margin=0.0).verdict == "supported"
    below = found([0.1, 0.0], "counted", margin=0.0)
    assert (below.verdict, below.test) == ("refuted", "none")
    assert below.outcome.startswith("1 of 2 lie above 0;")
