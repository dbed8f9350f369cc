"""The replay of kept studies: the document says what results hold, and runs and answers are counted right."""

from __future__ import annotations

import pytest

from experiments.scripts import evidence
from experiments.tuning.scripts import replay

pytestmark = pytest.mark.part("analyzer")

NOISE = (0.9, -1.1, 0.3, -0.6, 1.4, -0.8, 0.1, 0.7, -1.3, 0.4)  # points


def test_the_document_says_what_results_hold() -> None:
    text = replay.DOCUMENT.read_text()
    assert "<!-- stopping-replay -->" in text
    assert evidence.filled(text, replay.tables()) == text, "run experiments/tuning/scripts/replay.py"


def test_runs_count_until_a_comparison_stops_and_those_of_the_control_to_the_last() -> None:
    differences = {"far": [(8 + one) / 100 for one in NOISE], "equal": [0.0] * 10}
    found = {(one.asked, one.form): one for one in replay.replays("planted", differences)}
    assert len(found) == 6
    asked = found["superiority", "obrien-fleming"]
    far, equal = asked.looked
    assert (far.looks[-1].pairs, equal.looks[-1].pairs) == (4, 10)
    assert asked.share == (4 + 10 + 10) / 30
    assert (asked.verdicts("supported"), asked.verdicts("refuted"), asked.verdicts("not decided")) == (1, 0, 1)
    assert (asked.lost, asked.gained, asked.reversed) == (0, 0, 0)


def test_what_is_lost_or_reversed_is_told() -> None:
    first, *_ = replay.replays("planted", {"far": [(8 + one) / 100 for one in NOISE]})
    below, *_ = replay.replays("planted", {"far": [(one - 8) / 100 for one in NOISE]})
    level, *_ = replay.replays("planted", {"far": [one / 100 for one in NOISE]})

    def beside(fixed: replay.Replay, looked: replay.Replay) -> tuple[int, int, int]:
        one = replay.Replay("planted", "superiority", "pocock", fixed.fixed, looked.looked, 10)
        return one.lost, one.gained, one.reversed

    assert beside(first, first) == (0, 0, 0)
    assert beside(first, level) == beside(below, level) == (1, 0, 0)
    assert beside(level, first) == (0, 1, 0)
    assert beside(first, below) == (0, 0, 1)
