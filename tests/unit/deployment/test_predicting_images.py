"""What predict shows a model of an image file is what training would have shown it; what it can't show it says."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import CARD

from peft_vit.base.errors import UserError
from peft_vit.core.config import DataConfig
from peft_vit.core.records import Decision
from peft_vit.core.training.images import normalised
from peft_vit.data import find_images, open_index, to_pixels
from peft_vit.deploy import Classifier, predict_files
from peft_vit.deploy.page.quality import later_lines
from peft_vit.deploy.testing import score_images


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    colour, deep = rng.integers(0, 256, (40, 30, 4), np.uint8), rng.integers(0, 2**16, (40, 30), np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
    Image.fromarray(colour[..., :3]).save(folder / "cat/turned.jpg", exif=exif)
    Image.fromarray(colour).save(folder / "cat/alpha.png")
    Image.fromarray(colour, mode="CMYK").save(folder / "cat/inks.jpg")
    Image.fromarray(deep).save(folder / "dog/deep.png")
    Image.fromarray(deep).save(folder / "dog/deep.tif")
    Image.fromarray(deep > 30_000).save(folder / "dog/bits.png")


def test_predict_sees_what_training_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    write_images(tmp_path / "images")
    (tmp_path / "images/cat/._turned.jpg").write_bytes(b"what macOS leaves behind")
    (tmp_path / "images/.thumbnails").mkdir()
    (tmp_path / "images/.thumbnails/deep.png").write_bytes(b"of a desktop")
    index = open_index(
        DataConfig(dataset="image-folder", path=str(tmp_path / "images"), image_size=28, validation_images=2)
    )
    trained = np.stack([to_pixels(index.read(i), CARD.image_size, 3) for i in range(6)])  # (6, S, S, 3)
    seen = []

    def logits(images: np.ndarray) -> np.ndarray:
        seen.append(torch.from_numpy(images))
        return np.zeros((len(images), len(CARD.class_names)), np.float32)

    predictions = list(
        predict_files(Classifier(logits, CARD.model_copy(update={"channels": 3})), [tmp_path / "images"])
    )
    assert [prediction.file.name for prediction in predictions] == [name.split("/")[1] for name in index.names]
    expected = normalised(torch.from_numpy(trained).permute(0, 3, 1, 2), CARD.mean, CARD.std)
    assert torch.equal(torch.cat(seen), expected)
    assert len(torch.unique(expected[3])) > 100  # 16 bits are no clipped white


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, unreadable: Callable[[Path], None]) -> None:
    write_images(tmp_path)
    unreadable(tmp_path / "dog")
    classifier = Classifier(lambda images: np.zeros((len(images), len(CARD.class_names)), np.float32), CARD)
    *predicted, refused = predict_files(classifier, [tmp_path])
    assert [prediction.file for prediction in predicted] == sorted((tmp_path / "cat").iterdir())
    assert isinstance(refused, UserError)
    assert str(refused) == f"{tmp_path / 'dog'}: can't be read (Permission denied); make it readable, or remove it"


# --- labelled ones, of which a table has columns ---


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
