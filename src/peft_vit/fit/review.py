"""A person's labels looked at again: which of them is least believed by models that were not trained on its image.

An image of label y has probabilities p of a model that was fitted to others. The lower p[y] is, the less the label is
believed: its self-confidence (Northcutt et al. 2021, "Confident Learning"). p[y] less the largest other one finds fewer
(Fashion-MNIST, 5 % wrong: 0.40 of the first twenty, not 0.75). Test images are never ranked: who corrects only the
labels that a model doubts makes the test easier for models like it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from peft_vit.base.console import OnProgress
from peft_vit.base.errors import UserError
from peft_vit.base.seeding import numpy_generator
from peft_vit.base.statistics import probabilities
from peft_vit.core.training import Features, can_hold_out, held_out_fit
from peft_vit.data import ImageIndex, ImagesFile, images_file, index_inspected, inspect_images
from peft_vit.data.inspection.inspect import listed
from peft_vit.deploy.export import fold_records
from peft_vit.deploy.features import cached_features
from peft_vit.deploy.formats.header import ExportMetadata
from peft_vit.deploy.page.document import Block, Column, StudyDocument, Table, table
from peft_vit.deploy.page.formatting import percent, plain
from peft_vit.deploy.page.quality import PREDICTED, TOGETHER
from peft_vit.deploy.restore import finished_record
from peft_vit.fit.intake import earlier_calls
from peft_vit.fit.outcomes import Outcome, pooled
from peft_vit.fit.request import TrainRequest
from peft_vit.runs.records.storage import STUDIES_FOLDER, single_run

if TYPE_CHECKING:
    from peft_vit.deploy.page.class_blocks import Pictures

Predicted = tuple[
    ImageIndex, NDArray[np.int64], NDArray[np.float64]
]  # images, positions of some (n,), logits of each (n, K)
_SORTED = "They are sorted by the probability of the label."
_AT_RANDOM = "Test labels are drawn at random, never by what a model doubts: or the test favours models like it."


class Review(NamedTuple):
    """What came of looking at labels again."""

    images: ImageIndex
    came_out: list[str]  # sentences
    shown: list[tuple[Table, list[int]]]  # what to look at, and the positions of these images
    doubts: list[dict[str, Any]]  # labels to check: name, label, is_test, and what is believed how surely, see `label`


def by_regression(
    asked: TrainRequest,
    seed: int | None,
    opened: Callable[[], tuple[nn.Module, ExportMetadata]],
    on_progress: OnProgress,
) -> Predicted:
    """Predict images that do not test by regressions on the frozen features of others.

    The test images are those of the last call of `train` or `tune` on the same images, of the folders where these write
    by default, that had this seed; or else those that such a call would set aside.

    Args:
        asked: says which images.
        seed: that drew the test images; None: any.
        opened: returns the model that has the features, and how it takes images.
        on_progress: gets how many images are read, and then embedded.

    Raises:
        UserError: see `inspect_images`; if a class has one image alone beside the test images.
    """
    inspection = inspect_images(asked.found, least=2, on_progress=on_progress)
    place = os.path.realpath(asked.found.path)
    calls = ((content.asked, content) for _, content in earlier_calls(asked.output, Path()))
    alike = ((by[1:], one) for by, one in calls if by is not None and by[0] == place and seed in (None, by[1]))
    drawn, earlier = next(alike, ((seed or 0, None), None))
    content = ImagesFile.model_validate_json(json.dumps(images_file(inspection, *drawn, earlier)))
    index = index_inspected(asked.found, content, asked.images)
    dev = np.flatnonzero(index.dev)
    labels, groups = index.labels[dev], index.groups[dev]
    if not can_hold_out(labels, groups):
        reason = "has one image alone of a class, beside those of the test, and no other one predicts it"
        raise UserError(f"{reason}; add images, or remove the class", file=asked.images)
    names = [index.title(place) for place in dev.tolist()]
    model, card = opened()
    _, features, faults = cached_features(model, card, asked.found.tree, names, partial(on_progress, what="embedding"))
    if faults:  # since they were read
        raise faults[0]
    metric = index.task.deciding(np.bincount(labels))
    return index, dev, held_out_fit(Features(features, labels), groups, metric)[1]


def by_folds(asked: TrainRequest, run: Path) -> Predicted:
    """Return what a call's trainings on folds have said of the images that these left out.

    Args:
        asked: says which images.
        run: the folder of the call.

    Raises:
        UserError: if there are no such trainings, or images or labels have changed.
    """
    record, folder = finished_record(run), single_run(run)
    folds = fold_records(folder, record.spec, (folder.parent / STUDIES_FOLDER,))
    outcomes = [Outcome.of(fold, file.parent) for file, fold in folds]
    if not outcomes or record.spec.data.images_file is None:
        reason = "has kept no predictions of images that were left out of training, since others validated it"
        raise UserError(f"{reason}; leave --model out", file=run, field="--model")
    file = Path(record.spec.data.images_file)
    index = index_inspected(asked.found, ImagesFile.read(file), file)
    logits, labels, positions = pooled(outcomes, index.task)
    if [*index.class_names] != [*record.class_names] or (index.labels[positions] != labels).any():
        reason = f"has other labels than {run} was trained on; train again, or leave --model out"
        raise UserError(reason, file=asked.images)
    return index, positions, logits


def review_labels(predicted: Predicted, shown: int) -> Review:
    """Rank labels by what was predicted of the images; if several times of one, the first counts.

    Args:
        predicted: images and logits.
        shown: how many doubted labels are shown at most.
    """
    index, positions, logits = predicted
    places, first = np.unique(positions, return_index=True)  # (images,)
    labels, outputs = index.labels[places], logits[first]  # (images,), (images, K)
    p = probabilities(outputs, index.task.temperature(torch.from_numpy(outputs), torch.from_numpy(labels)))
    probability = p[np.arange(len(p)), labels]  # (images,)

    def described(place: int, **more: Any) -> dict[str, Any]:
        return {"position": place, "file": index.title(place), "label": index.label(place), **more}

    ranked = [
        described(
            int(places[k]),
            believed=index.class_names[p[k].argmax()],
            sure=float(p[k].max()),
            probability=probability[k],
        )
        for k in np.argsort(probability, kind="stable")
    ]
    every = [row for row in ranked if row["believed"] != row["label"]]
    doubted, test = every[:shown], np.flatnonzero(~index.dev)
    checked = [*map(described, numpy_generator(0, "review").permutation(test)[: len(doubted)].tolist())]
    groups = np.where(np.bincount(index.groups)[index.groups] > 1, index.groups, -1)  # of copies
    copies = [
        described(place, group=groups[place]) for place in np.argsort(groups, kind="stable") if groups[place] >= 0
    ]
    named = [Column("File", "file"), Column("Label", "label")]
    of_label = Column("Its probability", "probability", percent)
    believed = [*named, of_label, Column("Believed", "believed"), Column("How sure", "sure", percent)]
    parts = [
        (doubted, table("labels", "Labels to check", doubted, believed, f"{PREDICTED} {_SORTED}", data=ranked)),
        (checked, table("test_labels", "Test labels to check", checked, named, _AT_RANDOM)),
        (copies, table("copies", "Near copies", copies, [*named, Column("Group", "group")], TOGETHER)),
    ]
    came_out = [f"{len(every):,} of {len(ranked):,} labels are less probable than another class."]
    if missing := len(index.labels) - len(test) - len(ranked):
        came_out.append(f"{missing:,} images have no prediction: the training for it is not done.")
    if checked:
        came_out.append(f"Check {len(checked):,} of the {len(test):,} test images, too. {_AT_RANDOM}")
    if index.left_out:
        came_out += ["Left out, in training, too:", *listed(index.left_out)]
    doubts = [
        {"name": row["file"], "is_test": "sure" not in row}
        | {key: row[key] for key in ("label", "believed", "sure") if key in row}
        for row in [*doubted, *checked]
    ]
    return Review(index, came_out, [(made, [row["position"] for row in rows]) for rows, made in parts if rows], doubts)


def review_document(review: Review, images: str, pictures: Pictures | None) -> StudyDocument:
    """Return the page of a review of images that have a name; pictures as in `model_document`."""
    from peft_vit.deploy.page.class_blocks import gallery  # with matplotlib

    sections: dict[str, tuple[Block, ...]] = {}
    for shown, places in review.shown:
        lines = [tuple(plain(": ".join(cell)) for cell in zip(shown.columns, row, strict=True)) for row in shown.rows]
        made = gallery(
            f"{shown.slug}_pictures", "", shown.note, [("", list(zip(places, lines, strict=True)))], pictures
        )
        sections[shown.title] = (replace(shown, folded=True), *([] if isinstance(made, str) else [made]))
    return StudyDocument(
        label=f"The labels of {images}",
        slug="review",
        alerts=(),
        warnings=(),
        cards=(),
        came_out=tuple(map(plain, review.came_out)),
        sections=sections,
        not_shown=("Which of these labels are wrong: you decide that.",),
        runs=(),
        kind="model",
    )
