"""What a call that goes on says before it does anything."""

import json
from pathlib import Path

import pytest

from peft_vit.forecasting.time_limit import Limit
from peft_vit.tuning.state import TUNE_FILE, State, TuneFile
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


def test_an_output_that_was_begun_before_there_were_integers_goes_on_in_float(tmp_path: Path) -> None:
    request = TuneRequest(images=Path("images"), output=tmp_path)
    asked = {name: value for name, value in request.kept().items() if name != "compute"}
    (tmp_path / TUNE_FILE).write_text(TuneFile(asked=json.loads(json.dumps(asked))).model_dump_json())
    state = State.opened(request, lambda _: None)
    assert state.once("compute", lambda: "int8") == "float"


@pytest.mark.parametrize(("first", "then", "threads"), [(None, None, 5), (2, None, 2), (2, 2, 2), (None, 5, 5)])
def test_threads_stay_as_the_first_call_had_them(tmp_path: Path, monkeypatch, first, then, threads) -> None:
    for usable, asked in ((5, first), (9, then)):
        monkeypatch.setattr("peft_vit.runs.machine.cpu_count", lambda usable=usable: usable)
        request = TuneRequest(images=Path("images"), output=tmp_path, threads=asked)
        state = State.opened(request, lambda _: None)
        state.begun = True
        state.save()
        assert state.request.threads == threads
