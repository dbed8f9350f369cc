"""How far a run's model can be believed: found on validation images, tried on test images, kept with the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from peft_vit.base.errors import UserError, os_fault
from peft_vit.base.files import sha256_of
from peft_vit.base.seeding import numpy_generator
from peft_vit.base.statistics import Neighbours, TemperaturePrior, conformal_quantile
from peft_vit.base.statistics.drawing import stratified_sample
from peft_vit.core.backbones import BackboneShape
from peft_vit.core.records import FEWEST_HELD_OUT, RunRecord, Unlike
from peft_vit.core.tasks import Labels, Task, meaning_fields
from peft_vit.core.training.images import Data, LabelledImages
from peft_vit.runs.measures.neighbours import neighbours_bytes, read_neighbours
from peft_vit.runs.records.storage import FEATURES_FILE, RECORD_FILE

MAX_REFERENCE_IMAGES = 2000  # training images whose features are kept
UNLIKE_COVERAGE = 0.95  # share of images like the held-out ones that are not flagged
# Of temperatures that were best on test images, see docs/explanation/probabilities.md. Validation images chose the step
# and look better than others do; a few of them would make a model too sure.
PRIOR = TemperaturePrior(median=1.5, spread=0.35)


class Outputs(NamedTuple):
    """What a model says of images."""

    logits: NDArray[np.float32]  # (N, classes)
    labels: Labels  # N, as the task says
    middle: NDArray[np.float32] | None  # (N, D), see `Backbone.logits_and_middle`; None: not asked for


def reference_images(data: Data, seed: int) -> LabelledImages:
    """Return the training images whose features are kept: all, or `MAX_REFERENCE_IMAGES`, each class with its share.

    Of copies, near ones too, it is one, whichever. A copy lies as close to another as its format rounds pixels, and
    every new image lies farther away: of 120 digits, each as PNG and as JPEG, at 56 px, 120 of 120 new ones
    were flagged, and 5.9 with one of each (6.5 of PNG alone, means of ten choices).
    """
    train, rng = data.train, numpy_generator(seed, "features")
    order = rng.permutation(len(train))
    different = np.sort(order[np.unique(data.groups[train.positions[order]], return_index=True)[1]])
    drawn = stratified_sample(different, data.task.strata(train.labels), min(MAX_REFERENCE_IMAGES, len(different)), rng)
    return train.chosen(drawn)


def reference_bytes(shape: BackboneShape, images: int) -> int:
    """Return the bytes that features of so many training images take: one each, of what comes to the middle block."""
    blocks = shape.sites[-1].layer + 1
    width = next(site.in_features for site in shape.sites if site.layer >= blocks // 2)
    return min(MAX_REFERENCE_IMAGES, images) * width if images >= FEWEST_HELD_OUT else 0


def calibration_of(
    validation: Outputs, test: Outputs, known: NDArray[np.float32] | None, task: Task
) -> tuple[dict[str, Any], bytes | None]:
    """Return what outputs mean, what is unlike the training images, and what both come to on test images.

    Args:
        validation: of images that were not trained on; there may be none.
        test: likewise, and nothing was chosen by them.
        known: features of training images, (n, D); None: none are kept.
        task: that the model learned.

    Returns:
        The fields of a record that say it, and the content of the file of features.
    """
    meaning = task.meaning(validation.logits, validation.labels, PRIOR)
    unlike = features = flagged = tested = None
    if known is not None and test.middle is not None and len(known) + len(validation.labels) >= FEWEST_HELD_OUT:
        neighbours, unlike = fit_neighbours(known, validation.middle)
        features = neighbours_bytes(neighbours)
        flagged = int((neighbours.distances(test.middle) > unlike.threshold).sum())
    if len(validation.labels) or unlike is not None:
        tested = task.tested(meaning, test.logits, test.labels, flagged)
    return {**meaning_fields(meaning), "unlike": unlike, "tested_calibration": tested}, features


def fit_neighbours(train: NDArray[np.float32], validation: NDArray[np.float32] | None) -> tuple[Neighbours, Unlike]:
    """Return what is kept of training images, and when an image is unlike them, by features (n, D) and (m, D).

    Validation images say that, and so do training images, each of these left out in turn: training has fitted them, but
    the middle of the network hardly moves, and the 95 % of few are known badly. Of models of digits, two sets of
    drawings and, twice, Fashion-MNIST, with 60 to 100 validation images, 19, 14, 39, 29 and 41 of 400 test images were
    beyond the threshold of these alone, 26, 20, 19, 20 and 38 beyond that of both. All features are of one model: with
    weights of 4 bits 27 to 241 of 400 test images of two sets were beyond a threshold by float weights, beyond which 12
    and 17 were with these.
    """
    known = Neighbours.of(train)
    apart = known.leave_one_out_distances()  # (n,)
    if validation is not None:
        apart = np.concatenate([apart, known.distances(validation)])
    return known, Unlike(images=len(apart), threshold=conformal_quantile(apart, UNLIKE_COVERAGE))


def read_run_neighbours(run_dir: Path, record: RunRecord) -> Neighbours | None:
    """Return the training features that lie beside a record; None if it names none.

    Raises:
        UserError: if the file is missing, or another than the record says.
    """
    if record.features_sha256 is None:
        return None
    file, remedy = run_dir / FEATURES_FILE, "move or rerun the whole run"
    with os_fault("can't be read", file, remedy=remedy):
        digest = sha256_of(file)
    if digest != record.features_sha256:
        message = f"has SHA-256 {digest}, its {RECORD_FILE} says {record.features_sha256}; rerun this run"
        raise UserError(message, file=file, field="features_sha256")
    return read_neighbours(file)
