"""Copies that are planted among the images of a set: how many are found, and what is taken for one that is none.

60 images of a set are mirrored, cropped to 90 to 97 % of their sides, saved as JPEG of quality 50, and shifted by up to
4 pixels (2 of images below 64 pixels, 1 below 24). They stand among all images, at most 1,000, and are found if they
are in a group with their own, as labels let them be. The other groups are shown in `--sheet`, for a person to count
what is no copy.

    python benchmarks/copies.py digits fashion-mnist elpv stamps emoji --sheet FOLDER
    python benchmarks/copies.py --frames

`--frames` draws films of 120 of Debian's stamps (`few_labels.py` says which package), 8 frames each: a frame is turned
by 3 degrees, enlarged by 2 % and moved by 2 of 96 pixels against the one before. A regression on frozen features learns
their kinds. It prints the accuracy that folds promise, with and without groups of copies, and the accuracy on one frame
each of 300 other stamps. A row a line goes to `benchmarks/results/copies.csv`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, append_row, parser
from few_labels import images_of
from PIL import Image

from peft_vit.core.config import DEFAULT_MODEL
from peft_vit.core.tasks.classification import ACCURACY
from peft_vit.core.training import Features, fit_probe, held_out_fit
from peft_vit.data.inspection.copies import compared_thumbnail, copy_pairs, groups_of
from peft_vit.data.inspection.inspect import links_of_one_label
from peft_vit.data.pixels import decode_image, to_pixels
from peft_vit.deploy.features import embed_images, open_pretrained
from peft_vit.runs.this_machine.machine import git_state

_COLUMNS = ("set", "what", "images", "value", "commit")
_MOST, _PLANTED, _FIGURES, _OTHERS, _FRAMES, _SIDE = 1000, 60, 120, 300, 8, 96


def groups_among(pictures: list[Image.Image], labels: np.ndarray) -> np.ndarray:
    """Return groups of copies, (N,), by labels (N,)."""
    pairs = copy_pairs(np.stack([compared_thumbnail(to_pixels(picture, 64, 3)) for picture in pictures]))
    return groups_of(np.arange(len(pictures)), links_of_one_label(pairs, labels))


def planted(picture: Image.Image, rng: np.random.Generator) -> dict[str, Image.Image]:
    """Return copies of an image."""
    (width, height), share, file = picture.size, rng.uniform(0.9, 0.97), io.BytesIO()
    x, y = rng.uniform(0, 1 - share, 2)
    box = (x * width, y * height, (x + share) * width, (y + share) * height)
    picture.save(file, "JPEG", quality=50)
    k = next(k for k, side in ((4, 64), (2, 24), (1, 0)) if min(picture.size) >= side)
    dx, dy = rng.integers(-k, k + 1, 2) + k
    padded = np.pad(np.asarray(picture), ((k, k), (k, k), (0, 0)), mode="edge")
    return {
        "mirrored": picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "cropped": picture.resize(picture.size, Image.Resampling.BICUBIC, box=box),
        "JPEG 50": decode_image(file.getvalue, "copy.jpg").convert("RGB"),
        "shifted": Image.fromarray(padded[dy : dy + height, dx : dx + width]),
    }


def of_set(name: str, sheet: Path | None) -> dict[str, float]:
    """Return the share of images in groups, and of planted copies that are found."""
    pairs = [*images_of(name)]
    rng = np.random.default_rng(0)
    pairs = [pairs[k] for k in rng.permutation(len(pairs))[:_MOST]]
    pictures, labels = [picture.convert("RGB") for _, picture in pairs], np.array([label for label, _ in pairs])
    groups = groups_among(pictures, labels)
    sizes = np.bincount(groups)
    found = {"in groups": float((sizes[groups] > 1).mean())}
    if sheet is not None:
        some = [np.flatnonzero(groups == group)[:2] for group in np.flatnonzero(sizes > 1)]
        large = Image.new("RGB", (20 * 66, (len(some) // 10 + 1) * 66), "grey")
        for place, pair in enumerate(some):
            for k, i in enumerate(pair):
                large.paste(pictures[i].resize((64, 64)), (place % 10 * 132 + k * 64, place // 10 * 66))
        large.save(sheet / f"copies-{name}.png")
        print(name, f"{len(some)} groups:", sheet / f"copies-{name}.png")
    own = rng.permutation(len(pictures))[:_PLANTED]
    copies = [planted(pictures[i], rng) for i in own]
    every = [copy[what] for what in copies[0] for copy in copies]
    among = groups_among([*pictures, *every], np.concatenate([labels, *[labels[own]] * len(copies[0])]))
    for what, of_copies in zip(copies[0], np.split(among[len(pictures) :], len(copies[0])), strict=True):
        found[what] = float((among[own] == of_copies).mean())
    return found | {"images": len(pictures)}


def of_frames() -> dict[str, float]:
    """Return what folds promise on films, and what holds on other figures."""
    pairs = [(name, picture) for name, picture in images_of("stamps")]
    order = np.random.default_rng(0).permutation(len(pairs))[: _FIGURES + _OTHERS]
    kinds = {name: k for k, name in enumerate(sorted({name for name, _ in pairs}))}

    def frame(picture: Image.Image, k: int) -> Image.Image:
        side = round(_SIDE * 0.7 * 1.02**k)
        figure = picture.convert("RGB").resize((side, side)).rotate(3 * k, fillcolor="white")
        ground = Image.new("RGB", (_SIDE, _SIDE), "white")
        ground.paste(figure, ((_SIDE - side) // 2 - 8 + 2 * k, (_SIDE - side) // 2))
        return ground

    films = [frame(pairs[i][1], k) for i in order[:_FIGURES] for k in range(_FRAMES)]
    others = [frame(pairs[i][1], 0) for i in order[_FIGURES:]]
    labels, true = (np.array([kinds[pairs[i][0]] for i in some]) for some in np.split(order, [_FIGURES]))
    model, card = open_pretrained(DEFAULT_MODEL, None, 56)
    features, of_others = (embed_images(model, card, [*map(np.asarray, some)])[1] for some in (films, others))
    train, film = Features(features, labels.repeat(_FRAMES)), np.arange(_FIGURES).repeat(_FRAMES)
    groups = groups_among(films, train.labels)
    result = {"images": len(films), "groups": len(np.unique(groups))}
    of_one = [len(np.unique(film[groups == group])) == 1 for group in np.unique(groups)]
    result |= {"groups of one film": float(np.mean(of_one))}
    for what, of in (("one by one", np.arange(len(films))), ("groups", groups), ("films", film)):
        strength, logits = held_out_fit(train, of, ACCURACY, l2=(0.01, 0.1, 1.0))
        head: Any = fit_probe(train, None, None, None, ACCURACY, l2=[strength])  # type: ignore[arg-type]
        outputs = of_others @ head.weight.numpy().T + head.bias.numpy()
        result[f"promised by {what}"] = float((logits.argmax(1) == train.labels).mean())
        result[f"holds, {what}"] = float((outputs.argmax(1) == true).mean())
    return result


def main() -> None:
    """Look for copies, and add rows."""
    options = parser(__doc__)
    options.add_argument("sets", nargs="*")
    options.add_argument("--sheet", type=Path)
    options.add_argument("--frames", action="store_true")
    asked = options.parse_args()
    for name in (*asked.sets, *(["frames"] if asked.frames else [])):
        found = of_frames() if name == "frames" else of_set(name, asked.sheet)
        print(name, found, flush=True)
        for what, value in found.items():
            row = {"set": name, "what": what, "images": found["images"], "value": value, "commit": git_state()[0]}
            append_row(RESULTS / "copies.csv", _COLUMNS, row)


if __name__ == "__main__":
    main()
