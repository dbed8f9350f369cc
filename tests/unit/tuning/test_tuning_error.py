"""The declared error of tunings, small; `benchmarks/tune_error.py` does 200 of each kind."""

import pytest
import tune_error


@pytest.mark.parametrize("losses", [(0.0101,), (0.0, 0.02)])
def test_a_model_that_loses_more_than_the_margin_is_rarely_shown(losses: tuple[float, ...]) -> None:
    found = tune_error.errors(25, 120.0, losses)
    assert found["shown and wrong"] <= 2 / 25  # of 25 at 5 %, more than two are seen in 13 % of all cases


def test_a_clear_case_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_error, "_SCATTER", 0.003)
    monkeypatch.setattr(tune_error, "_COUNTS", (1000, 1000))  # as few as 410 images can't show that two are equal
    found = tune_error.errors(10, 120.0, (0.0,))
    assert found["shown to be smaller"] >= 0.8
