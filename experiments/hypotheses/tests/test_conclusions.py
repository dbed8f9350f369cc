"""One verdict over several experiments."""

import numpy as np
import pytest

from experiments.hypotheses.conclusions import Registered, conclude, reasons
from experiments.hypotheses.registry import _marked
from peft_vit.base.statistics.estimates import Kind
from peft_vit.lab.analysis.findings import estimated, judge

VALUES = {"+": np.arange(1.0, 11), "-": -np.arange(1.0, 11), "0": [1.0, -2, 3, -4], ".": []}


def found(signs: str, test: Kind = "superiority"):
    sentence = Registered(id="h", text="s", test=test, unit="share", family="f", source="me", reason="why")
    rows = [(sentence, estimated(f"e{i}", dict(enumerate(VALUES[sign])))) for i, sign in enumerate(signs)]
    return [_marked(one, sentence, "study", "registered") for one in judge(rows)]


@pytest.mark.parametrize(
    ("signs", "expected", "counts"),
    [
        ("++", "supported", "supported in 2 of 2"),
        ("+0", "not decided", "supported in 1, not decided in 1 of 2"),
        ("-0", "refuted", "refuted in 1, not decided in 1 of 2"),
        ("+-", "not decided", "supported in 1, refuted in 1 of 2"),
        ("00", "not decided", "not decided in 2 of 2"),
        ("+.", "supported", ""),
        ("..", "no data", ""),
    ],
)
def test_one_verdict_over_several_experiments(signs: str, expected: str, counts: str) -> None:
    (conclusion,) = conclude(found(signs))
    assert (conclusion.verdict, conclusion.counts) == (expected, counts)


def test_what_is_described_has_no_verdict_and_nothing_is_no_data_and_no_part_of_a_family() -> None:
    (described,) = found("+", "described")
    assert (described.verdict, described.outcome) == ("not decided", "described, not tested: why")
    some, nothing = found("+.")
    assert (some.family, some.mark) == (1, "registered")
    assert (nothing.verdict, nothing.interval, nothing.mark) == ("no data", None, None)
    (conclusion,) = conclude([nothing])
    assert reasons(conclusion) == "no finished run shows it"
