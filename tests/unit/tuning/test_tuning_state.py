"""What a call that goes on says before it does anything."""

from pathlib import Path

from peft_vit.forecasting.time_limit import Limit
from peft_vit.tuning.state import State, TuneFile
from peft_vit.tuning.tune_request import TuneRequest


def test_what_more_minutes_do_not_change_is_said() -> None:
    for decided, said in (
        ((), ""),
        (("machine", "tried"), "goes on: steps stay as they were chosen"),
        (("machine", "tried", "probes", "rates"), "goes on: steps, image size and learning rates stay as they were"),
    ):
        told: list[str] = []
        file = TuneFile(asked={}, decided={name: {} for name in decided})
        request = TuneRequest(images=Path("images"), output=Path("output"))
        State(request, told.append, Limit(10.0, 0.0), file).tell_what_stays()
        assert "".join(told).startswith(said)
        assert bool(told) == bool(decided)
