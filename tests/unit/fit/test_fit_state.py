"""What a call that goes on keeps of the first one."""

from pathlib import Path

import pytest

from peft_vit.fit.fit import Fit
from peft_vit.fit.request import TuneRequest


@pytest.mark.parametrize(("first", "then", "threads"), [(None, None, 5), (2, None, 2), (2, 2, 2), (None, 5, 5)])
def test_threads_stay_as_the_first_call_had_them(tmp_path: Path, monkeypatch, first, then, threads) -> None:
    for usable, asked in ((5, first), (9, then)):
        monkeypatch.setattr("peft_vit.fit.fit.cpu_count", lambda usable=usable: usable)
        request = TuneRequest(images=Path("images"), output=tmp_path, threads=asked)
        fit = Fit(request, lambda _: None)
        fit.enter(tmp_path)
        fit.begun = True
        fit.save()
        assert fit.file.threads == threads
