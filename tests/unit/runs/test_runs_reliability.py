"""A run is calibrated on its validation images, says what that came to on test images, and keeps training features."""

import numpy as np
import pytest
from done_runs import do_one, with_data
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import probabilities
from peft_vit.data import load_data
from peft_vit.deploy.restore import open_model, restore_run
from peft_vit.runs.records.run_rows import outcome_digest
from peft_vit.runs.records.storage import FEATURES_FILE, run_folder

pytestmark = pytest.mark.part("runner")


def measured(config, **measures):
    return config.model_copy(update={"measures": config.measures.model_copy(update=measures)})


@pytest.mark.parametrize("method", ["lora", "linear"])
def test_a_run_says_how_far_it_can_be_believed_and_what_is_unlike_its_images(study, tmp_path, method) -> None:
    config = with_data(study(method), validation_images=24, train_images=16)
    record = do_one(measured(config, features=True, logits=True), tmp_path)
    tested, calibrated = record.tested_calibration, record.calibrated
    labels, logits = np.array(record.predictions.labels), np.array(record.predictions.logits)
    p = probabilities(logits, calibrated.temperature)
    np.testing.assert_allclose(tested.probability, p.max(1), atol=1e-6)
    assert tested.nll == pytest.approx(float(-np.log(p[np.arange(len(p)), labels]).mean()), abs=1e-6)
    inside = 1 - p <= calibrated.threshold(0.9)
    inside[np.arange(len(p)), p.argmax(1)] = True
    assert tested.covered[0.9] == pytest.approx(inside[np.arange(len(p)), labels].mean())
    assert tested.set_size[0.9] == pytest.approx(inside.sum(1).mean())
    assert (calibrated.images, record.unlike.images) == (24, 24 + 16)

    folder = run_folder(tmp_path, record.spec)
    model, data = open_model(folder), load_data(record.spec.data, record.spec.seed)
    assert (model.card.calibrated, model.card.unlike) == (calibrated, record.unlike)
    known = restore_run(folder).reference.codes.astype(float) / 16  # (16, D), in standard deviations

    def distances(images) -> np.ndarray:
        pixels = np.concatenate([b.numpy() for b, _ in images.ordered_batches(32, model.card.mean, model.card.std)])
        return model.with_distances(pixels)[1]

    between = ((known[:, None] - known) ** 2).mean(2) ** 0.5 + np.diag([np.inf] * 16)
    apart = np.sort(np.concatenate([between.min(1), distances(data.validation)]))
    assert record.unlike.threshold == pytest.approx(apart[38], rel=1e-4)  # ceil(41 * 0.95) - 1
    assert int((distances(data.test.open()) > record.unlike.threshold).sum()) == tested.unlike

    (folder / FEATURES_FILE).write_bytes(b"other")
    with pytest.raises(UserError, match="rerun this run"):
        open_model(folder)


def test_few_images_give_a_temperature_and_no_flag(study, tmp_path) -> None:
    few = with_data(study("lora"), validation_images=8, train_images=11)
    record = do_one(measured(few, features=True), tmp_path)
    assert record.calibrated.images == 8
    assert record.calibrated.temperature > 0
    assert (record.unlike, record.features_sha256, record.tested_calibration.unlike) == (None, None, None)
    assert not (run_folder(tmp_path, record.spec) / FEATURES_FILE).exists()
    assert open_model(run_folder(tmp_path, record.spec)).with_distances is None


def test_a_run_of_a_study_is_calibrated_and_its_outcome_is_what_it_was(study, tmp_path) -> None:
    plain = do_one(study("lora"), tmp_path / "plain")
    assert plain.calibrated is not None
    assert plain.features_sha256 is None
    before = plain.model_copy(update={"calibrated": None, "tested_calibration": None})
    assert outcome_digest(plain) == outcome_digest(before)
    assert "calibrated" not in before.model_dump(mode="json")


def test_copies_of_training_images_do_not_make_new_images_unlike(study, tmp_path) -> None:
    rng, digits = np.random.default_rng(0), load_digits()
    for i in rng.permutation(len(digits.target))[:120]:
        for copy in range(2):  # of those that are tested one is used
            file = tmp_path / "images" / str(digits.target[i] % 2) / f"{i}-{copy}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[i] * 15).astype(np.uint8)).resize((32, 32)).save(file)
    sizes = {"validation_images": 0, "test_images": 40, "train_images": None}
    config = with_data(study("lora"), dataset="image-folder", path=str(tmp_path / "images"), **sizes)
    record = do_one(measured(config, features=True), tmp_path)
    # Of 80 exchangeable distances the 77th is the threshold: how many of 40 further ones lie beyond is beta-binomial.
    assert record.tested_calibration.unlike <= stats.betabinom(40, 4, 77).ppf(0.999)
    assert (record.split_sizes["train"], record.unlike.images) == (160, 80)
