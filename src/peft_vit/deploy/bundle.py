"""Many adapters on one backbone: it is in memory and on disk once, and a batch may mix them."""

from __future__ import annotations

import copy
import math
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from peft_vit.base.console import OnProgress, no_progress
from peft_vit.base.errors import UserError, named, os_fault
from peft_vit.core.adapters import save_memory
from peft_vit.core.backbones import Backbone
from peft_vit.core.config import BUNDLE_FILE, is_bundle
from peft_vit.deploy import Classifier, ExportMetadata, Prediction, predict_images
from peft_vit.deploy.export import Comparison, compare, images_to_compare
from peft_vit.deploy.formats.header import FloatArray, write_exported
from peft_vit.deploy.formats.packed_adapter import PackedAdapter, StoredBits, backbone_of, trained_bits
from peft_vit.deploy.formats.torch_files import LowBitHeader, build_low_bit, read_low_bit, tensor_file
from peft_vit.deploy.predicting import GivenImage, prediction_of, prepared
from peft_vit.deploy.restore import RestoredRun, restore_run
from peft_vit.runs.records.storage import RECORD_FILE, resolve_latest, single_run

_AT_ONCE = 32
_ROWS_AT_ONCE = 192  # about as many are multiplied with a weight each time that it is unpacked, see `Bundle.logits`
_LISTED = 10


class Bundle:
    """Many adapters, each with its own head, on one backbone.

    Args:
        base: the backbone: `backbone.safetensors` of a folder that `export --bundle` has written, or a run's folder.
        adapters: by name, what was trained on it: other files of such a folder, or folders of runs.

    Raises:
        UserError: if a file or a run can't be read, an adapter belongs to another backbone, or to one in other bits.
    """

    def __init__(self, base: str | Path, adapters: Mapping[str, str | Path]) -> None:
        base = Path(base).expanduser()
        if _is_run(base):
            self._header, tensors, _ = _split(restore_run(base), 32, base)
        else:
            self._header, tensors = read_low_bit(base)
        model = build_low_bit(self._header, tensors, base)
        self._backbone = Backbone(model)
        self._adapters: dict[str, PackedAdapter] = {}
        self._width = self._backbone.head.in_features
        self._lock = threading.Lock()  # over what one pass adds
        self._updates: list[list[tuple[Tensor, Tensor]]] = []  # of each image in a pass, or of all, by site
        self._pool = 1  # adjacent inputs that share a column of each A there
        save_memory(model)
        sites = self._backbone.sites
        weights = sum(site.in_features * site.out_features for site in sites)
        self._rows = sum(site.multiply_adds for site in sites) / weights  # of an image, the mean over weights
        places: dict[str, list[int]] = {}
        for place, site in enumerate(sites):
            places.setdefault(site.module, []).append(place)
        for module, of_module in places.items():
            model.get_submodule(module).register_forward_hook(partial(self._add, of_module))
        for name, path in {name: Path(path).expanduser() for name, path in adapters.items()}.items():
            self.add(name, _split(restore_run(path), 32, path)[2] if _is_run(path) else PackedAdapter.read(path), path)

    @classmethod
    def load(cls, folder: str | Path) -> Bundle:
        """Open a folder that `export --bundle` has written: its backbone, and all other .safetensors files as adapters.

        Raises:
            UserError: as the constructor, or if it is not such a folder.
        """
        folder = Path(folder).expanduser()
        if not is_bundle(folder):
            raise UserError(
                f"is not a bundle, since it holds no {BUNDLE_FILE}; `peft-vit export --bundle` writes it", file=folder
            )
        files = sorted(file for file in folder.glob("*.safetensors") if file.name != BUNDLE_FILE)
        return cls(folder / BUNDLE_FILE, {file.stem: file for file in files})

    def add(self, name: str, adapter: PackedAdapter, file: Path) -> None:
        """Take one more adapter; raises UserError, naming its file, if it does not belong to the backbone."""
        adapter.check(self._header, self._backbone.sites, self._width, file)
        self._adapters[name] = adapter

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return tuple(self._adapters)

    @property
    def cards(self) -> dict[str, ExportMetadata]:
        """By adapter, how images become its input, and what its outputs mean."""
        return {name: adapter.header.card for name, adapter in self._adapters.items()}

    def logits(self, images: FloatArray, names: str | Sequence[str]) -> list[FloatArray]:
        """Return the logits (classes,) of each image by its own adapter; those of all pass the backbone together.

        Each layer multiplies all images with its weight, and each image with the two thin matrices of its adapter.
        Weights are unpacked piece by piece. Many images pass in parts of about 192 tokens, one after the other: what is
        between layers then takes less memory, but each weight, and each adapter in a part, is unpacked for it.

        Args:
            images: (B, 3, S, S), normalised.
            names: of the adapters, one for all images or one each.

        Raises:
            UserError: if there is no adapter of a name, not one name an image, or the images have another shape.
        """
        size = self._header.card.image_size
        if images.shape[1:] != (3, size, size) or images.dtype.kind != "f":
            got = f"{images.shape} {images.dtype}"
            raise UserError(f"expected normalised images (B, 3, {size}, {size}) in float32, got {got}", field="images")
        images = images.astype(np.float32, copy=False)
        different = sorted({names} if isinstance(names, str) else set(names))
        names = _names_by_image(names, len(images))
        adapters = [self._adapter(name) for name in different]
        if not names:
            return []
        which = np.array([different.index(name) for name in names])  # (B,)
        parts = min(len(names), round(len(names) * self._rows / _ROWS_AT_ONCE)) or 1
        pairs = zip(np.array_split(images, parts), np.array_split(which, parts), strict=True)
        features = torch.cat([self._features(part, adapters, numbers) for part, numbers in pairs])  # (B, width)
        outputs: list[Any] = [None] * len(names)
        for number, adapter in enumerate(adapters):
            weight, bias = adapter.head(self._width)
            (places,) = (which == number).nonzero()
            for place, logits in zip(places, (features[places] @ weight.T + bias).numpy(), strict=True):
                outputs[place] = logits
        return outputs

    def _features(self, images: FloatArray, adapters: Sequence[PackedAdapter], which: NDArray[np.int64]) -> Tensor:
        present = {number: adapters[number] for number in set(which.tolist())}
        pool = math.gcd(*(one.header.pool for one in present.values() if any(one.header.ranks))) or 1  # 0 of none
        updates = {number: one.updates(self._backbone.sites, pool) for number, one in present.items()}
        with self._lock, torch.inference_mode():
            self._pool = pool
            self._updates = [updates[number] for number in (which.tolist() if len(updates) > 1 else updates)]
            try:
                return self._backbone.features(torch.from_numpy(images))  # (B, width)
            finally:
                self._updates = []

    def _add(self, places: Sequence[int], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Add to a module's outputs, in place, what each adapter adds to its images on the sites at these places."""
        images = len(self._updates)  # or 1, of all
        x = inputs[0].reshape(images, -1, inputs[0].shape[-1] // self._pool, self._pool).sum(-1)  # (B, T, in / pool)
        y = output.view(images, -1, output.shape[-1])  # (B, T, out)
        for place in places:
            pairs = zip(*(updates[place] for updates in self._updates), strict=True)
            right, left = (pad_sequence([*factors], batch_first=True) for factors in pairs)  # (B, R, ...)
            if right.shape[1]:
                y[..., self._backbone.sites[place].span].baddbmm_(x @ right.mT, left)

    def _adapter(self, name: str) -> PackedAdapter:
        if name not in self._adapters:
            listed = ", ".join(self.names[:_LISTED]) + (", ..." if len(self.names) > _LISTED else "")
            has = f"has no adapter {name!r}, but" if name else "has"
            problem = f"{has} {listed}; name one" if listed else "has no adapters yet; export a run into it"
            raise UserError(f"the bundle {problem}", field="--adapter")
        return self._adapters[name]

    def classifier(self, name: str | None = None) -> Classifier:
        """Return one adapter's classifier, or the only one's; raises UserError if there is none of the name."""
        chosen = self.names[0] if name is None and len(self.names) == 1 else name or ""
        card = self._adapter(chosen).header.card
        return Classifier(lambda images: np.stack(self.logits(images, chosen)), card)

    def predict(
        self,
        images: Iterable[GivenImage | str],
        names: str | Sequence[str],
        coverage: float | None = None,
        *,
        top: int = 1,
    ) -> list[Prediction]:
        """Return one prediction an image; those of several adapters pass the backbone together.

        Args:
            images: paths of image files, and arrays (H, W), (H, W, 3) or (H, W, 4) uint8.
            names: of the adapters, one for all images or one each.
            coverage: about how often the true class is to be in an image's set of classes; None: no sets.
            top: how many of the most probable classes to return.

        Raises:
            UserError: for the first image that can't be read; as `logits`.
        """
        if isinstance(images, str | Path):
            raise UserError(f"expected a list of images, got {images}", field="images")
        given = [Path(image) if isinstance(image, str) else image for image in images]
        if isinstance(names, str):
            return predict_images(self.classifier(names), given, coverage, top)
        predictions, names = [], _names_by_image(names, len(given))
        for start in range(0, len(given), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            cards = [self._adapter(name).header.card for name in names[part]]
            pixels = [prepared(image, card) for image, card in zip(given[part], cards, strict=True)]
            rows = self.logits(np.stack(pixels), names[part])
            answered = zip(given[part], rows, cards, strict=True)
            predictions += [prediction_of(image, row, card, coverage, top) for image, row, card in answered]
        return predictions


def _names_by_image(names: str | Sequence[str], images: int) -> list[str]:
    if isinstance(names, str):
        return [names] * images
    if len(names) != images:
        raise UserError(f"expected one adapter's name, or one each of {images} images, got {len(names)}")
    return list(names)


def _is_run(path: Path) -> bool:
    return os.path.isfile(single_run(path) / RECORD_FILE)


def _split(
    run: RestoredRun, bits: StoredBits | None, path: Path
) -> tuple[LowBitHeader, dict[str, Tensor], PackedAdapter]:
    """Return header and tensors of a run's backbone, and its adapter in so many bits."""
    bits = bits or trained_bits(run.model) or 16
    header, tensors = backbone_of(copy.deepcopy(run.model), run.card)
    with named(path):
        return header, tensors, PackedAdapter.of_model(run.model, run.card, header, bits)


@dataclass(frozen=True)
class BundledAdapter:
    """What became of one run."""

    name: str
    file_bytes: int
    comparison: Comparison | None  # None: the run's images are not there


def export_bundle(
    runs: Sequence[Path],
    folder: Path,
    *,
    bits: StoredBits | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = no_progress,
) -> list[BundledAdapter]:
    """Write the one backbone of several runs, and a file each with adapter and head, called as the run's folder.

    A run of a study is called by its experiment and seed.

    A folder that holds the same backbone gets more adapters. Each is compared with its run on the run's images.

    Args:
        runs: folders of runs, or of calls of `train`.
        folder: new, empty, or a bundle of the same backbone.
        bits: of the adapters' values; None: those that they were trained in, else 16.
        overwrite: replace adapters of these names.
        on_progress: gets how many runs of how many are done.

    Raises:
        UserError: if a run can't be restored or does not belong to the backbone; then nothing is written.
    """
    names = [_name_of(resolve_latest(path)) for path in runs]
    if taken := [name for name in names if names.count(name) > 1 or f"{name}.safetensors" == BUNDLE_FILE]:
        message = f"{taken[0]} can't be the name of two adapters, or the backbone's; rename a folder"
        raise UserError(message, file=runs[names.index(taken[0])])
    bundle, done = None, []
    if is_bundle(folder):
        bundle = Bundle(folder / BUNDLE_FILE, {})
    elif os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError("is not a bundle; name one, or a new or an empty folder", file=folder, field="--bundle")
    for file in (folder / f"{name}.safetensors" for name in names):
        if os.path.lexists(file) and not overwrite:
            raise UserError("exists already; rename the run's folder, or --overwrite", file=file, field="--bundle")
    with os_fault("can't be written", folder, remedy="choose another place"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
            for number, (name, path) in enumerate(zip(names, runs, strict=True), start=1):
                run, file = restore_run(path), Path(place, f"{name}.safetensors")
                header, tensors, packed = _split(run, bits, path)
                if bundle is None:
                    write_exported(file.with_name(BUNDLE_FILE), tensor_file(header, tensors))
                    bundle = Bundle(file.with_name(BUNDLE_FILE), {})
                bundle.add(name, packed, path)
                write_exported(file, content := packed.content())
                done.append(BundledAdapter(name, len(content), _compared(run, bundle.classifier(name))))
                on_progress(number, len(runs))
            folder.mkdir(exist_ok=True)
            for name in sorted(os.listdir(place), key=lambda name: name != BUNDLE_FILE):
                os.replace(Path(place, name), folder / name)
    return done


def _name_of(path: Path) -> str:
    """Return an adapter's name: of its folder, with the experiment's where that is a seed's."""
    return f"{path.absolute().parent.name}-{path.name}" if re.fullmatch(r"seed_\d+", path.name) else path.name


def _compared(run: RestoredRun, bundled: Classifier) -> Comparison | None:
    try:
        data = run.load_data()
    except UserError:
        return None
    return compare(run, bundled, *images_to_compare(data))
