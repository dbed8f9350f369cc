"""Wrong labels that are planted, and how many of the first twenty that `peft-vit review` lists are among them.

60 images of each class of a set get wrong labels in one of three ways: 5 % or 10 % of them one of the other classes, or
10 % the class that a regression on the true labels confuses theirs with most. Then each is predicted by regressions on
frozen features of others, as in `review` without a test set.

    python benchmarks/label_errors.py digits fashion-mnist --image-size 84 --plantings 5

adds a row for each planting to `benchmarks/results/label_errors.csv`: the share of wrong labels among the first twenty,
beside that of a random order, which is the share that was planted.
"""

from __future__ import annotations

import time

import numpy as np
from common import RESULTS, append_row, parser, rows_of
from few_labels import images_of
from numpy.typing import NDArray

from peft_vit.core.config import DEFAULT_MODEL
from peft_vit.core.tasks.classification import ACCURACY, log_softmax
from peft_vit.core.training import Features, held_out_fit
from peft_vit.data import ImageIndex
from peft_vit.deploy.features import embed_images, open_pretrained
from peft_vit.deploy.formats.header import FloatArray
from peft_vit.fit.review import review_labels
from peft_vit.runs.this_machine.machine import git_state

_OF_A_CLASS, _FIRST = 60, 20
_WAYS = {"uniform 5 %": 0.05, "uniform 10 %": 0.1, "confused 10 %": 0.1}
_COLUMNS = ("set", "way", "planting", "images", "planted", "image_size", "wrong_of_first_20", "seconds", "commit")


def features_of(name: str, image_size: int) -> tuple[FloatArray, NDArray[np.int64]]:
    """Return features (N, D) and classes (N,) of the first images of each class."""
    pictures: dict[str, list[NDArray[np.uint8]]] = {}
    for class_name, picture in images_of(name):
        of_class = pictures.setdefault(class_name, [])
        if len(of_class) < _OF_A_CLASS:
            of_class.append(np.asarray(picture))
    model, card = open_pretrained(DEFAULT_MODEL, None, image_size)
    labels = np.repeat(np.arange(len(pictures)), [len(of_class) for _, of_class in sorted(pictures.items())])
    flat = [picture for _, of_class in sorted(pictures.items()) for picture in of_class]
    return embed_images(model, card, flat)[1], labels


def planted(
    labels: NDArray[np.int64], share: float, confused: NDArray[np.int64] | None, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return labels (N,) of which a share is wrong: any other class, or the one that stands for theirs, (K,)."""
    wrong = rng.permutation(len(labels))[: round(share * len(labels))]
    given, classes = labels.copy(), labels.max() + 1
    others = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
    given[wrong] = others if confused is None else confused[labels[wrong]]
    return given


def wrong_of_first(features: FloatArray, labels: NDArray[np.int64], given: NDArray[np.int64]) -> float:
    """Return the share of wrong labels among those that are believed least."""
    names = tuple(map(str, range(labels.max() + 1)))
    index = ImageIndex(given, names, None, "", lambda _: None)  # type: ignore[arg-type, return-value]  # is not read
    logits = held_out_fit(Features(features, given), np.arange(len(given)), ACCURACY)[1]
    (table, _), *_ = review_labels((index, np.arange(len(given)), logits), _FIRST).shown
    first = [int(row["position"] or 0) for row in table.data[:_FIRST]]
    return float((labels[first] != given[first]).mean())


def main() -> None:
    """Plant wrong labels, and add rows."""
    options = parser(__doc__, image_size=84, plantings=5)
    options.add_argument("sets", nargs="+")
    asked = options.parse_args()
    file = RESULTS / "label_errors.csv"
    for name in asked.sets:
        features, labels = features_of(name, asked.image_size)
        logits = held_out_fit(Features(features, labels), np.arange(len(labels)), ACCURACY)[1]
        p = np.exp(log_softmax(logits))
        p[np.arange(len(labels)), labels] = 0
        confused = np.array([p[labels == k].sum(0).argmax() for k in range(labels.max() + 1)])
        for planting in range(asked.plantings):
            for way, share in _WAYS.items():
                rng, started = np.random.default_rng([planting, round(1000 * share), way.startswith("c")]), time.time()
                given = planted(labels, share, confused if way.startswith("c") else None, rng)
                found = wrong_of_first(features, labels, given)
                values = (name, way, planting, len(labels), share, asked.image_size, found)
                row = dict(zip(_COLUMNS, (*values, round(time.time() - started, 1), git_state()[0]), strict=True))
                append_row(file, _COLUMNS, row)
                print(*values, flush=True)
    rows = rows_of(file)
    for name, way in dict.fromkeys((row["set"], row["way"]) for row in rows):
        shares = [float(row["wrong_of_first_20"]) for row in rows if (row["set"], row["way"]) == (name, way)]
        print(f"{name}, {way}: {np.mean(shares):.2f} (standard deviation {np.std(shares, ddof=1):.2f})")


if __name__ == "__main__":
    main()
