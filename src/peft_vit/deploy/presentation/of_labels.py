"""Several labels an image, or none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from peft_vit.core.records import Decision
from peft_vit.core.tasks import MULTILABEL, Meaning
from peft_vit.core.tasks.metric import Outputs
from peft_vit.core.tasks.multilabel import above_thresholds, average_precision, f1
from peft_vit.deploy.presentation.presentation import (
    Counts,
    ImageSelection,
    LabelledOutputs,
    Prediction,
    Presentation,
    Rows,
    of_ranking,
    ranked,
)

_LABELS_SHOWN, _IMAGES_SHOWN = 6, 4  # whose errors a page shows, those with most of them, and images of each


class ManyLabels(Presentation):
    """See `Presentation`."""

    task = MULTILABEL
    note = "A label is predicted from its threshold on, which has the largest F1 on the validation images."
    promise = (
        "Prediction sets",
        "An image's labels in its set",
        "Labels in a set",
        "Means over the test images that have a label; they chose nothing. `predict --coverage` gives such sets: the "
        "labels that an image may have. They hold about as much as asked.",
    )
    holds = "The set at {0:g} % holds about {0:g} % of an image's labels on average"

    def prediction(
        self, outputs: Outputs, names: Sequence[str], meaning: Meaning, coverage: float | None, top: int
    ) -> Prediction:
        """Return the labels that reach their threshold, the most probable ones, and with a coverage a set."""
        decision = cast("Decision", meaning)
        set_threshold = math.inf if coverage is None else decision.threshold(coverage)[0]
        (p,) = self.task.predicted(outputs[None], decision)
        return of_ranking(
            ranked(names, p),
            top,
            labels=ranked(names, p, p >= decision.thresholds),
            classes=ranked(names, p, p >= set_threshold),
        )

    def for_browser(self, meaning: Meaning, coverage: float | None) -> dict[str, Any]:
        """Return the temperature, and thresholds of labels and of sets."""
        decision = cast("Decision", meaning)
        known = {"coverage": coverage, "threshold": decision.threshold(coverage)[0]} if coverage else None
        return {
            "says": "which of {} labels it has",
            "kind": "labels",
            "temperature": decision.temperature,
            "thresholds": decision.thresholds,
            "set": known,
        }

    def cells(self, prediction: Prediction, with_sets: bool) -> dict[str, Any]:
        """Return its labels, the most probable ones with their probabilities, and the set."""
        return {"labels": [name for name, _ in prediction.labels], **super().cells(prediction, with_sets)}

    def measures(self, outputs: LabelledOutputs) -> Rows:
        """Return images, average precision, threshold, precision, recall and F1 of each label."""
        labels, predicted, names, decision = outputs
        rows = []
        for k, name in enumerate(names):
            known = ~np.isnan(labels[:, k])
            truth, scores = labels[known, k] == 1, predicted[known, k]
            threshold = 0.5 if decision is None else decision.thresholds[k]
            reported, positives = scores >= threshold, int(truth.sum())
            hits = int((truth & reported).sum())
            precision = average_precision(scores, truth, np.ones((1, len(truth))))[0] if positives else None
            rows.append(
                {
                    "Label": name,
                    "Images with it": positives,
                    "of": len(truth),
                    "Average precision": precision,
                    "Threshold": threshold,
                    "Told": int(reported.sum()),
                    "Precision": hits / reported.sum() if reported.any() else None,
                    "Recall": hits / positives if positives else None,
                    "F1": float(f1(hits, reported.sum(), positives)) if positives else None,
                }
            )
        return rows

    def cooccurrence(self, outputs: LabelledOutputs) -> tuple[Counts, Counts]:
        """Return on how many images two labels are, in truth and as predicted."""
        true = (outputs.labels == 1).astype(np.int64)
        predicted = above_thresholds(outputs.predicted, outputs.decision).astype(np.int64)
        return true.T @ true, predicted.T @ predicted

    def image_selections(self, outputs: LabelledOutputs) -> Iterator[ImageSelection]:
        """Yield the surest false alarms, and the misses that it holds for least probable, of each label."""
        labels, predicted, names, decision = outputs
        reported = above_thresholds(predicted, decision)
        kinds = (
            ("false_alarms", reported & (labels == 0), -predicted, "is predicted and not there"),
            ("misses", ~reported & (labels == 1), predicted, "is there and not predicted"),
        )
        for slug, wrong, order, what in kinds:
            most = np.argsort(-wrong.sum(0), kind="stable")[:_LABELS_SHOWN]
            groups = []
            for k in (int(k) for k in most if wrong[:, k].any()):
                rows = np.flatnonzero(wrong[:, k])
                worst = rows[np.argsort(order[rows, k], kind="stable")][:_IMAGES_SHOWN].tolist()
                images = []
                for n in worst:
                    truth = self.task.text(labels[n], names).replace("|", ", ")
                    images.append((n, (f"{names[k]}: {predicted[n, k]:.1%}", f"is {truth}")))
                groups.append((f"{names[k]}: {len(worst)} of {len(rows)}", tuple(images)))
            if groups:
                rule = f"Of each label the images on which it {what}, the surest first. Is the label right?"
                yield ImageSelection(slug, f"The surest {slug.replace('_', ' ')}", rule, tuple(groups))
