"""A model of several labels, or of numbers, is tested on tables with its columns."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import CARD

from peft_vit.base.errors import UserError
from peft_vit.core.records import Decision
from peft_vit.data import find_images
from peft_vit.deploy import Classifier
from peft_vit.deploy.page.trained import later_lines
from peft_vit.deploy.testing import score_images

LABELS = Decision(images=20, temperature=1.0, thresholds=(0.5, 0.5))


def scored(folder: Path, header: str, *rows: str) -> list[str]:
    for number in range(len(rows)):
        Image.new("RGB", (20, 20), (80 * number, 0, 0)).save(folder / f"{number}.png")
    lines = [f"path,{header}", *(f"{number}.png,{row}" for number, row in enumerate(rows))]
    (folder / "new.csv").write_text("\n".join(lines))
    card = CARD.model_copy(update={"class_names": ("a", "b"), "channels": 3, "task": "multilabel", "decision": LABELS})
    # The redder an image, the more of b and the less of a.
    classifier = Classifier(lambda images: images[:, 0].mean((1, 2))[:, None] * np.float32([[-1, 1]]), card)
    return later_lines(score_images(classifier, find_images(folder / "new.csv", "multilabel")))


def test_columns_go_to_the_outputs_of_their_names(tmp_path: Path) -> None:
    first, second = scored(tmp_path, "b,a", "0,1", "0,1", "1,0", "1,0")
    assert "100.0 %" in first
    assert second.startswith("Its own test is not known")


@pytest.mark.parametrize(
    ("header", "stated"), [("a,c", "has 'c', which the model does not know"), ("a", "lacks 'b', which the model has")]
)
def test_other_columns_are_refused(tmp_path: Path, header: str, stated: str) -> None:
    rows = ("1,0"[: len(header)], "0,1"[: len(header)])
    with pytest.raises(UserError, match=stated) as caught:
        scored(tmp_path, header, *rows)
    assert caught.value.file == str(tmp_path / "new.csv")
