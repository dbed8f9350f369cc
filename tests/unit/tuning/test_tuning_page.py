"""What the page of a tuning says of verdicts that are missing, and of who has read the sealed images."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peft_vit.tuning.page import _how_sure, _notices


def told(folder: Path, *stopped: str | None) -> Any:
    candidates = [SimpleNamespace(course=SimpleNamespace(stopped=one)) for one in stopped]
    runs = {name: folder / "final" / name / "seed_0" for name in ("probe-2", "lora-2")}
    choice = SimpleNamespace(candidates=candidates, shown=False, final_runs=runs, chosen="probe-2", more_time=None)
    exports = SimpleNamespace(missed=(), int8_loss=None)
    return SimpleNamespace(choice=choice, exports=exports, chosen=SimpleNamespace(provenance=None))


@pytest.mark.parametrize(
    ("stopped", "said"),
    [(("maximum", "futile"), "comparisons have ended without an answer"), (("maximum", None), "time ended before")],
)
def test_why_nothing_was_decided_is_told(tmp_path: Path, stopped: tuple[str | None, ...], said: str) -> None:
    (notice,) = _notices(told(tmp_path, *stopped))
    assert notice.startswith(f"NOT DECIDED: {said}")


def test_models_of_earlier_calls_that_read_the_sealed_images_are_counted(tmp_path: Path) -> None:
    for name in ("probe-2", "lora-2"):
        (tmp_path / "final" / name / "seed_0").mkdir(parents=True)
        (tmp_path / "final" / name / "seed_0" / "record.json").touch()
    assert "read once, by the chosen model and the reference" in " ".join(_how_sure(told(tmp_path)))
    (tmp_path / "final" / "lora-1" / "seed_0").mkdir(parents=True)
    (tmp_path / "final" / "lora-1" / "seed_0" / "record.json").touch()
    assert "read by 3 models, 1 of them of earlier calls" in " ".join(_how_sure(told(tmp_path)))
