"""How images that are not square become so: what folds choose as `tune` does, and what it has on test images.

    python -m experiments.floor.scripts.resize FOLDER... --image-size 112

Each folder has `train/` and `test/` with a folder a class. A regression on frozen class tokens is fitted to images that
are squashed, fitted in with bars, and cropped, its penalty chosen by five folds. A way is chosen if it is better by
more than the standard error of the paired difference on left-out training images. `--trim` cuts transparent borders.
A row for each way in `results/resize.csv`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.floor.scripts.images import RESULTS, Rows, pretrained, runtime_of
from peft_vit.data.pixels import decode_image, to_pixels

_WAYS = ("squash", "letterbox", "crop")


def read(folder: Path, trim: bool) -> tuple[list[Image.Image], NDArray[np.int64], list[tuple[int, int]]]:
    """Return images, labels and sizes."""
    images, labels = [], []
    for label, name in enumerate(sorted(path.name for path in folder.iterdir())):
        for file in sorted((folder / name).glob("*.png")):
            image = decode_image(file.read_bytes, str(file))
            if trim and (box := image.convert("RGBA").getchannel("A").getbbox()):
                image = image.crop(box)
            images.append(image)
            labels.append(label)
    return images, np.array(labels), [image.size for image in images]


@torch.inference_mode()
def class_tokens(model: Any, runtime: Any, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return class tokens (N, D) of pixels (N, S, S, 3)."""
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (runtime.mean, runtime.std))
    parts = []
    for batch in torch.from_numpy(pixels).permute(0, 3, 1, 2).split(32):
        parts.append(model.forward_features((batch / 255 - mean) / std)[:, 0].numpy())
    return np.concatenate(parts)


def main() -> None:
    """Regress what is not there."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("folders", nargs="+", type=Path)
    asked.add_argument("--image-size", type=int, default=112)
    asked.add_argument("--trim", action="store_true")
    options = asked.parse_args()
    values = ("oblong", "folds", "gain", "se", "chosen", "test_images", "test")
    rows = Rows(RESULTS / "resize.csv", ("set", "image_size", "way"), values)
    for folder in options.folders:
        name = folder.name + ("-trimmed" if options.trim else "")
        if rows.has(name, options.image_size, _WAYS[-1]):
            continue
        (train, labels, sides), (test, truth, _) = (read(folder / part, options.trim) for part in ("train", "test"))
        backbone = pretrained(options.image_size, len(set(labels)))
        runtime = runtime_of(backbone)
        left_out, right = {}, {}
        for way in _WAYS:
            values_of = [
                class_tokens(
                    backbone.model, runtime, np.stack([to_pixels(one, options.image_size, 3, resize=way) for one in of])
                )
                for of in (train, test)
            ]
            folds = StratifiedKFold(5, shuffle=True, random_state=0)
            model = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=np.logspace(-4, 0, 7), cv=3, max_iter=500))
            left_out[way] = cross_val_predict(model, values_of[0], labels, cv=folds) == labels
            right[way] = model.fit(values_of[0], labels).predict(values_of[1]) == truth
        gains = {way: left_out[way].astype(float) - left_out["squash"] for way in _WAYS}
        errors = {way: gain.std() / len(gain) ** 0.5 for way, gain in gains.items()}
        best = max(_WAYS, key=lambda way: gains[way].mean() - errors[way])
        for way in _WAYS:
            rows.add(
                set=name,
                image_size=options.image_size,
                way=way,
                oblong=round(float(np.mean([max(side) > 1.2 * min(side) for side in sides])), 3),
                folds=round(100 * float(left_out[way].mean()), 2),
                gain=round(100 * float(gains[way].mean()), 2),
                se=round(100 * float(errors[way]), 2),
                chosen=int(way == best),
                test_images=len(truth),
                test=round(100 * float(right[way].mean()), 2),
            )


if __name__ == "__main__":
    main()
