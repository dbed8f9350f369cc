"""What a call that goes on says before it does anything."""

from pathlib import Path

import pytest

from peft_vit.forecasting.time_limit import Limit
from peft_vit.tuning.request import TuneRequest
from peft_vit.tuning.state import State, TuneFile


@pytest.mark.parametrize(
    ("decided", "expected"),
    [
        ((), []),
        (("machine", "tried"), ["goes on: steps stay as they were chosen; to choose anew, take another --output"]),
        (
            ("machine", "tried", "probes", "rates"),
            [
                "goes on: steps, image size and learning rates stay as they were chosen; to choose anew, take another "
                "--output"
            ],
        ),
    ],
)
def test_what_more_minutes_do_not_change_is_said(decided: tuple[str, ...], expected: list[str]) -> None:
    told: list[str] = []
    file = TuneFile(asked={}, decided={name: {} for name in decided})
    State(
        TuneRequest(images=Path("images"), output=Path("output")), told.append, Limit(10.0, 0.0), file
    ).tell_what_stays()
    assert told == expected
