"""A classifier of images as scikit-learn has them: what `train` does, with fit, predict and score."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import nullcontext, redirect_stdout
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self
from warnings import warn

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from peft_vit.api import Images, load, naming_arguments, train
from peft_vit.base.errors import DataWarning, UserError, foreign_fault, os_fault
from peft_vit.base.files import make_folder, read_bytes, write_whole
from peft_vit.core.config import DEFAULT_MODEL, SEEDS, exported_format
from peft_vit.data.sources.in_memory import held_images, write_table

if TYPE_CHECKING:
    from peft_vit.core.config import (
        ActivationCheckpointing,
        Augment,
        ClassWeights,
        ComputeSetting,
        Device,
        MetricSetting,
        PrecisionSetting,
        Resize,
    )

_MODEL_FILE, _FILE = "model.safetensors", "classifier.json"


class ViTClassifier(ClassifierMixin, BaseEstimator):
    """A Vision Transformer that is fine-tuned on images: an estimator of scikit-learn around `train`.

    `fit` validates on a fifth of its images, tests on two, and trains on all others. It starts from a logistic
    regression on the features of the frozen backbone, and keeps that if it is clearly better on validation images. Each
    fit is a run in a folder below `output`; the same fit again reads what is there.

    X is a list or an array of paths, PIL images or arrays; an array or tensor (N, H, W), (N, H, W, 3) or (N, 3, H, W)
    of integers from 0 to 255 or floats from 0 to 1; a DataFrame with a column image, img, path or file; or a torch or
    Hugging Face Dataset. If it holds labels (a column `label`, pairs of image and label), you may leave y out. Images
    that are not files are written to the cache.

    Args:
        method: linear, lora, adalora, qa_lora, ..., as in `train`.
        test_images: how many images of `fit` test, for the report on the run: at least 2, or None for a fifth.
        output: the folder in which each fit makes its own.
        random_state: the number for all random choices.
        verbose: print what `train` prints.

    All others are arguments of `train`.

    Attributes:
        classes_: the labels, sorted.
        model_: the `TrainedModel`, with the run's record and report.
    """

    @naming_arguments
    def __init__(
        self,
        method: str = "lora",
        *,
        shots: int | None = None,
        test_images: int | None = 2,
        model: str = DEFAULT_MODEL,
        weights: str | None = None,
        image_size: int | None = None,
        resize: Resize | None = None,
        augment: Augment | None = None,
        minutes: float = 10.0,
        steps: int | None = None,
        epochs: int | None = None,
        learning_rate: float | None = None,
        metric: MetricSetting = "auto",
        class_weights: ClassWeights = "none",
        batch_size: int = 32,
        micro_batch_size: int | None = None,
        activation_checkpointing: ActivationCheckpointing | None = None,
        memory_limit: str | None = None,
        rank: int | None = None,
        budget: int | str | None = None,
        adapter_bytes: str | None = None,
        bits: int | str | None = None,
        init_adapter: str | None = None,
        head_blocks: Literal[1, 4] | None = None,
        precision: PrecisionSetting = "auto",
        compute: ComputeSetting = "auto",
        device: Device = "auto",
        threads: int | None = None,
        devices: int = 1,
        output: str | Path = "peft-vit-runs/fits",
        random_state: int | np.random.RandomState | None = 0,
        verbose: bool = False,
    ) -> None:
        self.__dict__.update({name: value for name, value in locals().items() if name != "self"})

    def fit(self, X: Images, y: Any = None) -> Self:
        """Train on images and their labels; leave y out if X holds them.

        Raises:
            UserError: in one line, for images or arguments that can't be used.
            ValueError: of scikit-learn, for labels that are not classes, or not as many as images.
        """
        table, classes = write_table(X, y)
        given = self.get_params(deep=False)
        seed, verbose = given.pop("random_state"), given.pop("verbose")
        if not isinstance(seed, Integral):
            seed = check_random_state(seed).randint(len(SEEDS))
        given["output"] = Path(given["output"]).expanduser().absolute()  # the model is read from there later
        with nullcontext() if verbose else redirect_stdout(io.StringIO()):
            self.model_ = train(table, seed=int(seed), **given)
        record = self.model_.record
        assert record is not None
        for name, why in list(record.left_out.items())[:1]:
            several = f"{DataWarning.PREFIX}{len(record.left_out)} are left out, such as {name}, which {why}"
            warn(several, DataWarning, stacklevel=2)
        self.classes_ = classes
        return self

    def predict_proba(self, X: Images) -> NDArray[np.float64]:
        """Return the probability of each class, (N, K) in the order of `classes_`."""
        check_is_fitted(self)
        places = [self.model_.classes.index(str(label)) for label in self.classes_]
        return self.model_.predict_proba(image for image, _ in held_images(X))[:, places]

    def predict(self, X: Images) -> NDArray[Any]:
        """Return the most probable class of each image, (N,)."""
        probabilities = self.predict_proba(X)
        labels: NDArray[Any] = self.classes_[probabilities.argmax(1)]
        return labels

    def score(self, X: Images, y: Any = None, sample_weight: Any = None) -> float:
        """Return the accuracy; leave y out if X holds labels."""
        labels = [label for _, label in held_images(X)] if y is None else y
        return float(accuracy_score(labels, self.predict(X), sample_weight=sample_weight))

    def save(self, folder: str | Path) -> None:
        """Write the model, which needs nothing else to predict, and the arguments; replace an earlier one.

        Raises:
            UserError: if the folder holds other files, or can't be written.
        """
        check_is_fitted(self)
        folder, held = Path(folder).expanduser(), self.model_.path
        file = folder / _MODEL_FILE
        with os_fault("can't be written", folder, remedy="choose another place"):
            make_folder(folder)
            if any(folder.iterdir()) and not (folder / _FILE).exists():
                raise UserError("holds other files; choose a new or an empty folder", file=folder)
            if exported_format(held) and held.absolute() != file.absolute():
                shutil.copy(held, file)
        if not exported_format(held):
            from peft_vit.deploy.export import export_run_to_file

            export_run_to_file(held, file, "safetensors", overwrite=True)
        given = self.get_params(deep=False)
        if not isinstance(self.random_state, int | None):  # a generator, of which JSON holds nothing
            del given["random_state"]
        content = {"arguments": given, "classes": self.classes_.tolist()}
        write_whole(folder / _FILE, json.dumps(content, default=str, indent=1).encode())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Return what `save` wrote.

        Raises:
            UserError: if the folder holds none, or it is damaged.
        """
        file = Path(folder).expanduser() / _FILE
        with foreign_fault("can't be read", file, remedy="name a folder that ViTClassifier.save wrote"):
            content = json.loads(read_bytes(file))
            classifier = cls(**content["arguments"])
            classifier.classes_ = np.array(content["classes"])
        classifier.model_ = load(file.with_name(_MODEL_FILE))
        if not {str(label) for label in classifier.classes_} <= set(classifier.model_.classes):
            raise UserError("names classes that the model beside it does not have; save both again", file=file)
        return classifier

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = False, True
        tags.input_tags.positive_only = True
        return tags
