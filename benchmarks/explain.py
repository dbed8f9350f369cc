"""Which map of where a model looked tells most, and whether a shortcut is found, on models that are trained here.

    python benchmarks/explain.py curves SET RUN IMAGES [--images 12] [--maps random center]
    python benchmarks/explain.py marks SET FOLDER [--images 12]

`curves`: patches go from an image, or come into its mean color, the largest of a map first. The row has the mean
probability of the class that was said while they go (deletion, low is good) and come (insertion, high is good), beside
a random map and one that is brightest in the middle. RUN is of a Vision Transformer of timm in patches of 14.

`marks`: FOLDER has `train/` and `test/`, as `few_labels.py` writes them. A linear probe is trained at 84 px, then again
with a square of a sixth of the side pasted into a corner of all images of a class. The row of each class has how often
the largest value of a map of a test image that is rightly known lies in the mark (of the marked class, which is then
found by it), and whether the page would warn.

Rows go to `benchmarks/results/explain.csv`; seconds are the processor's.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
import torch
from common import RESULTS, append_row
from PIL import Image

import peft_vit
from peft_vit.api import open_classifier
from peft_vit.core.backbones import Backbone
from peft_vit.data.pixels import decode_image, on_white
from peft_vit.deploy import Classifier
from peft_vit.deploy.attended import attended
from peft_vit.deploy.explain import _drops
from peft_vit.deploy.page.class_blocks import shortcut
from peft_vit.deploy.predicting import image_files, prepared
from peft_vit.runs.this_machine.machine import git_state, instruction_sets

PATCH, STEPS = 14, 9
_COLUMNS = (
    *("what", "set", "images", "image_size", "map", "deletion", "insertion", "gain", "se", "seconds"),
    *("class", "mark", "in_mark", "mark_share", "warned", "instructions", "commit"),
)


class Maps:
    """The candidates for one model; each gives (patches,)."""

    def __init__(self, classifier: Classifier) -> None:
        assert classifier.module is not None
        self.classifier, self.model = classifier, classifier.module
        self.side = classifier.card.image_size // PATCH
        self.block = self.model.get_submodule(Backbone.within(self.model).blocks[-1])
        self.generator = np.random.default_rng(1)

    def by_name(self) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """Return them."""
        rows = np.mgrid[: self.side, : self.side] - (self.side - 1) / 2
        return {
            "random": lambda image: self.generator.random(self.side**2),
            "center": lambda image: -(rows**2).sum(0).ravel(),
            "attention and gradient": lambda image: np.ravel(attended(self.model, image)),
            "attention": self.attention,
            "gradient times token": self.gradient_times_token,
            "occlusion, 4 x 4": self.coarse_occlusion,
            "occlusion": self.occlusion,
        }

    def _tokens(self, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (1, classes), and the tokens that come to the last block, (1, T, D)."""
        seen: list[torch.Tensor] = []
        hook = self.block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        logits = self.model(torch.from_numpy(image[None]).requires_grad_())
        hook.remove()
        return logits, seen[0]

    def gradient_times_token(self, image: np.ndarray) -> np.ndarray:
        """Return the sum over a token of its values times the gradient of the class's log-probability."""
        logits, tokens = self._tokens(image)
        (gradient,) = torch.autograd.grad(logits.log_softmax(-1).max(), tokens)
        return (tokens * gradient).sum(-1)[0, -(self.side**2) :].detach().numpy()

    @torch.no_grad()
    def attention(self, image: np.ndarray) -> np.ndarray:
        """Return how much the class token reads of each patch in the last block, a mean over heads."""
        layer, (_, tokens) = self.block.attn, self._tokens(image)
        width = tokens.shape[-1] // layer.num_heads
        joined = layer.qkv(self.block.norm1(tokens)).reshape(1, tokens.shape[1], 3, layer.num_heads, width)
        query, key, _ = joined.permute(2, 0, 3, 1, 4)  # (1, heads, T, width) each
        weights = (query[:, :, :1] @ key.mT * layer.scale).softmax(-1)  # (1, heads, 1, T)
        return weights.mean(1)[0, 0, -(self.side**2) :].numpy()

    def occlusion(self, image: np.ndarray) -> np.ndarray:
        """Return by how much the log-probability falls where up to 8 x 8 parts are covered."""
        said = scipy.special.log_softmax(self.classifier.logits(image[None])[0])
        return self._resized(_drops(self.classifier, image, said.max(), int(said.argmax())))

    def coarse_occlusion(self, image: np.ndarray) -> np.ndarray:
        """Return the same of 4 x 4 parts, in one batch."""
        said, mean = scipy.special.log_softmax(self.classifier.logits(image[None])[0]), image.mean((1, 2))
        ends = [slice(*pair) for pair in pairwise(np.linspace(0, image.shape[1], 5).astype(int))]
        covered = np.repeat(image[None], 16, axis=0)
        for place, (rows, columns) in enumerate((a, b) for a in ends for b in ends):
            covered[place, :, rows, columns] = mean[:, None, None]
        found = scipy.special.log_softmax(self.classifier.logits(covered), axis=1)[:, said.argmax()]
        return self._resized((said.max() - found).reshape(4, 4).astype(np.float32))

    def _resized(self, drops: np.ndarray) -> np.ndarray:
        resized = Image.fromarray(drops).resize((self.side, self.side), Image.Resampling.BILINEAR)
        return np.asarray(resized).ravel()

    def curves(self, image: np.ndarray, order: np.ndarray, said: int) -> tuple[float, float]:
        """Return the mean probability of a class while patches go, and while they come, in an order."""
        mean = np.broadcast_to(image.mean((1, 2), keepdims=True), image.shape)
        going, coming = [], []
        for known in np.linspace(0, self.side**2, STEPS).astype(int):
            is_known = np.isin(np.arange(self.side**2), order[:known]).reshape(self.side, self.side)
            mask = is_known.repeat(PATCH, 0).repeat(PATCH, 1)
            going.append(np.where(mask, mean, image))
            coming.append(np.where(mask, image, mean))
        shares = scipy.special.softmax(self.classifier.logits(np.stack(going + coming)), axis=1)[:, said]
        return float(shares[:STEPS].mean()), float(shares[STEPS:].mean())


def curve_rows(run: Path, folder: Path, most: int, names: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Yield a row of each map."""
    classifier = open_classifier(run)
    maps, files = Maps(classifier), image_files([folder])
    chosen = np.random.default_rng(1).permutation(len(files))[:most]
    images = [prepared(files[i], classifier.card) for i in chosen]
    said = [int(classifier.logits(image[None])[0].argmax()) for image in images]
    for name in names or maps.by_name():
        compute = maps.by_name()[name]
        started = time.process_time()
        orders = [np.argsort(-compute(image), kind="stable") for image in images]
        seconds = (time.process_time() - started) / len(images)
        found = np.array([maps.curves(*one) for one in zip(images, orders, said, strict=True)])
        gain = found[:, 1] - found[:, 0]
        deletion, insertion = found.mean(0).tolist()
        row = {"map": name, "deletion": deletion, "insertion": insertion, "gain": float(gain.mean())}
        row |= {"se": float(gain.std(ddof=1) / len(gain) ** 0.5), "seconds": seconds, "images": len(images)}
        yield row | {"image_size": classifier.card.image_size}


def write_marked(source: Path, folder: Path, marked: str, corner: int) -> None:
    """Write the images of a folder as squares of 84 pixels, those of a class with a mark in a corner."""
    for file in source.glob("*/*/*"):
        plain = on_white(decode_image(file.read_bytes, str(file))).convert("RGB").resize((84, 84))
        if file.parent.name == marked:
            plain.paste((200, 30, 30), (left := 70 * (corner % 2), top := 70 * (corner // 2), left + 14, top + 14))
        place = folder / file.relative_to(source).with_suffix(".png")
        place.parent.mkdir(parents=True, exist_ok=True)
        plain.save(place)


def mark_rows(folder: Path, most: int) -> Iterator[dict[str, Any]]:
    """Yield a row of each class, without marks and with one on a class."""
    classes = sorted(place.name for place in (folder / "train").iterdir())
    marked = classes[int(np.random.default_rng(len(classes)).integers(len(classes)))]
    for mark, corner in (("", 0), (marked, len(classes) % 4)):
        with tempfile.TemporaryDirectory() as work:
            write_marked(folder, Path(work), mark, corner)
            trained = peft_vit.train(
                Path(work) / "train", method="linear", image_size=84, minutes=1, threads=1, output=Path(work) / "runs"
            )
            classifier, started = trained.classifier, time.process_time()
            assert classifier.module is not None
            for name in classes:
                maps = []
                for file in sorted((Path(work) / "test" / name).glob("*"))[:most]:
                    image = prepared(file, classifier.card)
                    if trained.classes[classifier.logits(image[None])[0].argmax()] == name:
                        found = attended(classifier.module, image)
                        assert found is not None
                        maps.append(found)
                place = 5 * (corner // 2) * 6 + 5 * (corner % 2)
                inside = [int(one.argmax()) == place for one in maps]
                yield {
                    "class": name, "mark": mark, "images": len(maps), "image_size": 84, "mark_share": 1 / 36,
                    "in_mark": float(np.mean(inside)) if name == mark and maps else None,
                    "warned": shortcut(maps), "seconds": (time.process_time() - started) / max(len(maps), 1),
                }  # fmt: skip
                started = time.process_time()


def _instructions() -> str:
    return os.environ.get("ONEDNN_MAX_CPU_ISA") or " ".join(instruction_sets())


def main() -> None:
    """Add rows, and print them."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("what", choices=("curves", "marks"))
    asked.add_argument("set")
    asked.add_argument("folders", type=Path, nargs="+")
    asked.add_argument("--images", type=int, default=12)
    asked.add_argument("--maps", nargs="+", help="of these alone")
    options = asked.parse_args()
    torch.set_num_threads(1)
    if options.what == "curves":
        run, folder = options.folders
        rows = curve_rows(run, folder, options.images, options.maps)
    else:
        rows = mark_rows(options.folders[0], options.images)
    for row in rows:
        same = {"what": options.what, "set": options.set, "commit": git_state()[0][:8], "instructions": _instructions()}
        append_row(RESULTS / "explain.csv", _COLUMNS, same | row)
        print(same | row, flush=True)


if __name__ == "__main__":
    main()
