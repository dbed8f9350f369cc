"""What a file knows of how far its model can be believed, and what predict makes of it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import CARD

from peft_vit.base.errors import UserError
from peft_vit.core.records import Calibrated
from peft_vit.core.tasks import CLASSIFICATION, OF_FOLDS
from peft_vit.deploy import Classifier, check_coverage, predict_files
from peft_vit.deploy.formats.header import ExportMetadata

KNOWN = Calibrated(images=60, temperature=2.0, coverages=(0.8, 0.9, 0.95), thresholds=(0.2, 0.75, 0.9))
CALIBRATED = CARD.model_copy(update={"calibrated": KNOWN})
LOGITS = [2.0, 4.0, 3.0, -1.0, 0.0]


def probability(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp(z / temperature) for z in logits]
    return [weight / sum(weights) for weight in weights]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "one.png")
    return tmp_path / "one.png"


def predicted(card: ExportMetadata, image: Path, coverage: float | None = None):
    classifier = Classifier(lambda images: np.array([LOGITS] * len(images), np.float32), card)
    (prediction,) = predict_files(classifier, [image], coverage)
    return prediction


def test_probabilities_are_calibrated_where_the_file_says_how(image: Path) -> None:
    assert predicted(CARD, image).probability == pytest.approx(probability(LOGITS, 1.0)[1])
    prediction = predicted(CALIBRATED, image)
    assert prediction.probability == pytest.approx(probability(LOGITS, 2.0)[1])
    assert (prediction.class_name, prediction.classes) == ("b", ())


@pytest.mark.parametrize(
    ("coverage", "classes"),
    [(0.8, "b"), (0.85, "bc"), (0.9, "bc"), (0.92, "bca"), (0.95, "bca")],  # p: b 0.46, c 0.28, a 0.17, e 0.06
)
def test_sets_follow_the_next_threshold_and_begin_with_the_most_probable(
    image: Path, coverage: float, classes: str
) -> None:
    prediction = predicted(CALIBRATED, image, coverage)
    p = dict(zip("abcde", probability(LOGITS, 2.0), strict=True))
    assert [name for name, _ in prediction.classes] == list(classes)
    assert [value for _, value in prediction.classes] == pytest.approx([p[name] for name in classes])


@pytest.mark.parametrize(
    ("calibrated", "coverage"),
    [
        (None, 0.9),
        (Calibrated(images=2, temperature=1.0, coverages=(), thresholds=()), 0.9),
        (KNOWN, 0.99),
        (KNOWN, 0.5),
        (KNOWN, math.nan),
    ],
)
def test_a_coverage_without_threshold_is_refused(calibrated: Calibrated | None, coverage: float) -> None:
    with pytest.raises(UserError) as refused:
        check_coverage(CARD.model_copy(update={"calibrated": calibrated}), coverage)
    assert refused.value.field == "coverage"


def test_few_images_have_no_thresholds_for_high_coverages() -> None:
    rng = np.random.default_rng(0)
    calibrated = CLASSIFICATION.meaning(
        rng.normal(size=(18, 3)), rng.integers(0, 3, 18), OF_FOLDS, np.tile(np.arange(9), 2)
    )
    assert calibrated.images == 9
    assert calibrated.coverages == tuple(percent / 100 for percent in range(80, 91))  # (9 + 1) 0.91 is above 9
    assert list(calibrated.thresholds) == sorted(calibrated.thresholds)


def test_cards_of_before_read_and_write_as_they_did() -> None:
    assert "calibrated" not in json.loads(CARD.model_dump_json())
    assert all(ExportMetadata.model_validate_json(card.model_dump_json()) == card for card in (CARD, CALIBRATED))
