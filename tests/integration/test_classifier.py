"""ViTClassifier as scikit-learn's tools use it: on images, and in scikit-learn's own checks as far as images allow."""

import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import SkipTestWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks

from peft_vit import ViTClassifier
from peft_vit.base.errors import DataWarning, UserError

pytestmark = pytest.mark.usefixtures("in_this_process", "cache")


@pytest.fixture(scope="module")
def photos() -> tuple[np.ndarray, np.ndarray]:
    """Return 24 images of two classes, by whose colour a model can tell them, and their numbers."""
    labels = np.tile([10, 9], 12)  # as text in another order
    colours = np.where(labels[:, None] == 9, (220, 60, 60), (60, 60, 220))
    noise = np.random.default_rng(0).normal(0, 20, (24, 16, 16, 3))
    return (colours[:, None, None] + noise).clip(0, 255).astype(np.uint8), labels


@pytest.fixture
def classifier(tmp_path: Path, weights: Path) -> ViTClassifier:
    settings = {"model": "test_vit", "image_size": 32, "threads": 1, "precision": "fp32", "device": "cpu"}
    return ViTClassifier("linear", weights=str(weights), output=str(tmp_path / "runs"), **settings)


def test_it_fits_predicts_and_is_saved(classifier, photos, tmp_path, capsys) -> None:
    images, labels = photos
    assert classifier.fit(images[:16], labels[:16]) is classifier
    assert capsys.readouterr().out == ""
    assert classifier.classes_.tolist() == [9, 10]
    assert classifier.model_.record.split_sizes == {"train": 12, "validation": 2, "test": 2}
    probabilities = classifier.predict_proba(images[16:])
    assert probabilities.shape == (8, 2)
    assert probabilities.argmax(1).tolist() == (labels[16:] == 10).astype(int).tolist()
    assert classifier.predict(images[16:] / 255).tolist() == labels[16:].tolist()
    assert classifier.score([*map(Image.fromarray, images[16:])], labels[16:]) == 1.0
    assert classifier.score(list(zip(images[16:], labels[16:], strict=True))) == 1.0
    with pytest.raises(UserError, match=r"got \(8, 768\)"):
        classifier.predict(images[16:].reshape(8, -1))

    classifier.save(tmp_path / "saved")
    loaded = ViTClassifier.load(tmp_path / "saved")
    assert repr(loaded) == repr(classifier)
    np.testing.assert_allclose(loaded.predict_proba(images), classifier.predict_proba(images), atol=1e-6)
    loaded.save(tmp_path / "again")
    assert ViTClassifier.load(tmp_path / "again").predict(images).tolist() == labels.tolist()
    kept = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(kept.predict_proba(images), classifier.predict_proba(images))
    for again in (classifier, loaded):  # which takes the place of the earlier one
        again.save(tmp_path / "saved")
        assert ViTClassifier.load(tmp_path / "saved").predict(images).tolist() == labels.tolist()
    with pytest.raises(UserError, match="runs: holds other files; choose a new or an empty folder"):
        classifier.save(tmp_path / "runs")
    with pytest.raises(UserError, match=r"name a folder that ViTClassifier\.save wrote"):
        ViTClassifier.load(tmp_path)
    file = tmp_path / "saved" / "classifier.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"classes": ["nothing"]}))
    with pytest.raises(UserError, match=r"classifier\.json: names classes that the model beside it does not have"):
        ViTClassifier.load(tmp_path / "saved")


def test_it_takes_a_table_and_says_what_it_leaves_out(classifier, photos, tmp_path) -> None:
    images, labels = photos
    paths = [tmp_path / f"{place}.png" for place in range(24)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    table = pd.DataFrame({"path": paths, "label": np.where(labels == 9, "nine", "ten")})
    classifier.fit(table)
    assert classifier.classes_.tolist() == ["nine", "ten"]
    assert classifier.score(table) == 1.0
    paths[3].write_text("no image")
    with pytest.warns(DataWarning, match=r"1 are left out, such as .*3\.png, which "):
        classifier.fit(table)


def test_it_works_in_scikit_learns_tools(classifier, photos, capsys) -> None:
    images, labels = photos
    assert cross_val_score(classifier, images, labels, cv=3).tolist() == [1, 1, 1]
    pipeline = make_pipeline(FunctionTransformer(lambda held: held[..., ::-1]), clone(classifier))
    search = GridSearchCV(pipeline, {"vitclassifier__random_state": [0, 1]}, cv=2).fit(images, labels)
    assert search.best_score_ == 1
    assert search.predict(images).tolist() == labels.tolist()
    with pytest.raises(ValueError, match="n_splits=20 cannot be greater than the number of members in each class"):
        cross_val_score(classifier, images, labels, cv=20)
    drawn = clone(classifier).set_params(random_state=np.random.RandomState(3), verbose=True)
    first = drawn.fit(images, labels).model_.record.spec.seed
    assert "Starts in " in capsys.readouterr().out
    assert drawn.fit(images, labels).model_.record.spec.seed != first


def test_scikit_learn_leaves_out_checks_on_tables(classifier) -> None:
    with pytest.warns(SkipTestWarning, match="requires input  of type"):
        estimator_checks.check_estimator(classifier)


# All of scikit-learn's checks that need no table of numbers: those fit to (N, features), which are no images.
CHECKS = [
    "check_do_not_raise_errors_in_init_or_set_params",
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_tags_renamed",
    "check_estimators_unfitted",
    "check_get_params_invariance",
    "check_mixin_order",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_set_params",
    "check_valid_tag_types",
]


@pytest.mark.parametrize("name", CHECKS)
def test_scikit_learns_checks(name, classifier) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(estimator_checks, name)("ViTClassifier", classifier)
