"""A model on new labelled images: how good it is on them, and how that differs from its own test. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from peft_vit.base.console import OnProgress, no_progress, some_of
from peft_vit.base.errors import UserError
from peft_vit.core.records import RunRecord
from peft_vit.core.tasks import TASKS, Labels, metric_of
from peft_vit.data import Images
from peft_vit.deploy.formats.header import Classifier, ExportMetadata
from peft_vit.deploy.page.quality import ImagesTest, score_on
from peft_vit.deploy.predicting import ImageFile, outputs_of

_NAMED = 5  # classes in a line


def score_images(
    classifier: Classifier, images: Images, record: RunRecord | None = None, on_progress: OnProgress = no_progress
) -> ImagesTest:
    """Predict labelled images, those of their own test split if they have one.

    Args:
        classifier: what is tested.
        images: see `find_images`.
        record: of the run that made it; None: it is not there, so the new images say which metric decides.
        on_progress: gets how many images are done, and of how many.

    Raises:
        UserError: if they have other classes, or no image can be read.
    """
    card = classifier.card
    if images.tested:
        images = images.without(images.classes.keys() - images.tested)
    labels, names = _labels_by(card, images, list(images.classes.values())), list(images.classes)
    outputs, rows, distances, unreadable = [], [], [], []
    given = [ImageFile(images.tree.location / name, partial(images.tree.read, name)) for name in names]
    for row, (_, computed) in enumerate(outputs_of(classifier, given)):
        if isinstance(computed, UserError):
            unreadable.append(computed)
        else:
            rows.append(row)
            outputs.append(computed[0])
            distances.append(computed[1])
        on_progress(row + 1, len(names))
    if not rows:
        raise UserError("holds no image that can be read", file=images.path)
    logits, labels = np.stack(outputs), labels[rows]  # (N, classes), (N,) or (N, classes)
    task = TASKS[card.task].restored(card.decision)
    counts = task.counts(labels, len(card.class_names))  # (classes,)
    metric = task.deciding(counts[counts > 0]) if record is None else metric_of(record.spec)
    own = None
    if record is not None and record.predictions is not None:
        own = score_on(record.predictions, metric, record.decision)
    unlike = None
    if card.unlike is not None:
        unlike = sum(distance > card.unlike.threshold for distance in distances if distance is not None)
    predictions = task.predictions(logits, labels, np.array(rows), decision=card.decision)
    return ImagesTest(
        task=card.task,
        class_names=card.class_names,
        predictions=predictions.model_copy(update={"files": [names[row] for row in rows]}),
        calibrated=card.calibrated,
        decision=card.decision,
        test=task.measure(logits, labels, card.decision),
        tested_calibration=task.tested(card.meaning, logits, labels, unlike),
        metric=metric,
        own=own,
        unreadable=unreadable,
    )


def _labels_by(card: ExportMetadata, images: Images, cells: Sequence[str]) -> Labels:
    """Return labels as the model has its outputs: (N,), or (N, classes)."""
    task, columns = images.task, images.columns
    names, labels = task.read(cells, columns)
    places = {name: place for place, name in enumerate(card.class_names)}
    listed = task.one_class or columns == ("label",)  # then a class that no image has is no fault
    for fault, others in (
        ("has {}, which the model does not know", [name for name in names if name not in places]),
        ("lacks {}, which the model has", [] if listed else [name for name in places if name not in names]),
    ):
        if others:
            known = f"{', '.join(card.class_names[:_NAMED])}{', ...' if len(places) > _NAMED else ''}"
            message = fault.format(some_of([*map(repr, others)], _NAMED))
            raise UserError(f"{message}; name classes as the model does: {known}", file=images.path)
    by_place = [places[name] for name in names]
    if task.one_class:
        return np.array(by_place)[labels]
    filled = np.zeros((len(labels), len(places)))
    filled[:, by_place] = labels
    return filled
