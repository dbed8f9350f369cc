"""A person's labelled images come in: found, looked at once, some set aside for the test, and what decides."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_vit.base.console import no_progress
from peft_vit.base.errors import UserError, foreign_fault
from peft_vit.base.files import read_bytes, write_whole
from peft_vit.core.adapters.peft_format import start_sha256
from peft_vit.core.backbones import (
    Architecture,
    architecture_of,
    check_weights,
    interpolation_of,
    native_size,
    size_step_of,
)
from peft_vit.core.config import StudyConfig, named_backbone
from peft_vit.core.tasks import DecidingMetric, Scores, Task, metric_of
from peft_vit.core.training import fewest_groups
from peft_vit.data import (
    ImageIndex,
    Images,
    ImagesFile,
    Inspection,
    PixelStore,
    images_file,
    index_inspected,
    inspect_images,
    make_splits,
    open_index,
)
from peft_vit.fit.request import Advanced, FitRequest, TrainRequest
from peft_vit.runs.records.storage import ADAPTER_FILE, RECORD_FILE, read_record, resolve_latest, single_run
from peft_vit.runs.this_machine.machine import check_devices

if TYPE_CHECKING:
    from peft_vit.fit.fit import Fit

IMAGES_FILE = "images.json"  # which images are used, which test, and which are copies
_MOST_KEPT = 1 << 30  # bytes of decoded images
_SMALLEST, _LARGEST = 56, 640  # pixels, of images that are tried
_SURE_S = 10.0  # of reading, until it is known how long it takes


@dataclass(frozen=True)
class LabelledSet:
    """A person's images after they were inspected.

    Attributes:
        inspection: what was found.
        content: of the file that says which images are used and which are the test set.
        file: where that is, as studies name it in `data.images_file`.
        index: of the images that are used.
        requested_metric: None: the images say which one decides.
        store: holds what was decoded.
        earlier_split: folder of an earlier call, of other images on the same path, whose test images test again.
        metric_before: what decided in the last call that was to split the same images alike; None: there is none.
    """

    inspection: Inspection
    content: ImagesFile
    file: Path
    index: ImageIndex
    requested_metric: DecidingMetric | None
    store: PixelStore | None = None
    earlier_split: Path | None = None
    metric_before: DecidingMetric | None = None

    @property
    def task(self) -> Task:
        """Return what is learned."""
        return self.index.task

    @cached_property
    def metric(self) -> DecidingMetric:
        """Return what decides."""
        return self.requested_metric or self.inspection.metric

    @cached_property
    def num_dev(self) -> int:
        """Return how many images are not of the test set."""
        return int(self.index.dev.sum())

    @cached_property
    def num_different(self) -> int:
        """Return how many of these there are, copies counted once."""
        return len(np.unique(self.index.groups[self.index.dev]))

    @property
    def num_test(self) -> int:
        """Return how many images are of the test set."""
        return len(self.index.labels) - self.num_dev

    @property
    def num_outputs(self) -> int:
        """Return the width of the head."""
        return self.task.head_width(self.index.class_names)

    @cached_property
    def scores(self) -> Scores:
        """Return the metric as shares of which more is better, by which everything is compared."""
        return Scores.on(self.task, self.metric, self.index.labels[self.index.dev])

    @cached_property
    def rarest(self) -> float:
        """Return how many different images the rarest class has outside of the test set."""
        labels = self.index.labels[self.index.dev]
        return fewest_groups(self.task.strata(labels), self.index.groups[self.index.dev])

    @property
    def shots(self) -> float:
        """Return likewise of classes, of which an image has one; infinite of other tasks."""
        return self.rarest if self.task.one_class else math.inf

    @cached_property
    def effective_share(self) -> float:
        """Return by what share of images the metric would be known as well if all counted the same."""
        return self.metric.images_alike(self.index.labels[self.index.dev]) / self.num_dev

    def data(self, image_size: int) -> dict[str, Any]:
        """Return what a section `data` says of which images these are."""
        images = self.inspection.images
        # Absolute, also for calls from another directory.
        place = {"path": str(images.path.absolute()), "images_file": str(self.file.absolute())}
        return {"dataset": images.dataset, **place, "image_size": image_size}

    @property
    def written(self) -> bytes:
        """Return the content as the file has it."""
        return self.content.model_dump_json(indent=1).encode()

    def keep_pixels(self, study: StudyConfig) -> None:
        """Put what was decoded where the study's runs find it."""
        if self.store is not None and study.data.image_size in self.store.sizes:
            index = open_index(study.data)
            # of another model than the first, or of images that become square in another way
            if (index.interpolation, index.resize or "squash") != (self.store.interpolation, self.store.resize):
                return
            self.store.hand_over(index, make_splits(index, study.data, study.seeds[0]))


def look(fit: Fit) -> None:
    """Look at the images, and set some aside for the test; nothing is written.

    Raises:
        UserError: see `inspect_images`; and for more devices than there are here.
    """
    request = fit.request
    if request.devices > 1 and request.executor == "local":
        check_devices(request.devices, request.device)
    found = request.found
    pixels = fit.opened.enter_context(pixel_store(request, found))
    images = take_in(request, found, fit.folder / IMAGES_FILE, pixels, _reading(fit))
    if images.inspection.images.taken:
        fit.emit(images.inspection.images.taken)
    for line in images.inspection.lines(images.requested_metric):
        fit.emit(f"  {line}")
    if (before := images.metric_before) is not None and before.name != images.metric.name:
        fit.emit(f"  the last call's was {before.words}; its numbers and these can't be compared")
    fit.begin(images)
    split = "a fifth of them"
    if images.inspection.holdout is not None:
        split = "the folder's own test split"
    elif request.test_images is not None:
        split = "as you asked" if request.group is None else "about as you asked: groups stay whole"
    elif images.earlier_split is not None:
        split = f"those that tested in {images.earlier_split} among them"
    validate = f", {fit.num_validation:,} to validate" if fit.num_validation else ""
    fit.emit(f"  {fit.num_train:,} to train{validate}, {images.num_test:,} to test ({split})")


def _reading(fit: Fit) -> Callable[[int, int], None]:
    """Return what says how many images are read, and refuses so many that reading them takes all the minutes."""
    clock = fit.limit.clock
    began = clock()

    def read(done: int, count: int) -> None:
        fit.emit(Advanced("reading images", done, count))
        spent_s = clock() - began
        if spent_s > _SURE_S and (whole_s := spent_s * count / done) > 60 * fit.request.minutes:
            about = f"reading {count:,} images takes about {whole_s / 60:.1f} minutes here"
            raise UserError(f"{about}; give more than {math.ceil(whole_s / 60)}", field="--minutes")

    return read


def keep_images(fit: Fit) -> None:
    """Write which images are used in the fit's folder, or refuse others than it was begun with.

    Raises:
        UserError: if the folder has other images than when the fit was begun, naming what changed; and if the file is
            there already and holds something else.
    """
    fit.images = images = replace(fit.images, file=(fit.folder / IMAGES_FILE).absolute())
    if fit.begun:
        with foreign_fault("can't be read", images.file, remedy="choose another --output"):
            kept = json.loads(read_bytes(images.file))
        now = images.content.model_dump(mode="json", exclude={"left_out", "asked", "digests", "labels"})
        if changed := [name for name in now if kept.get(name) != now[name]]:
            what = "a file was changed, added or removed" if "sha256" in changed else f"{', '.join(changed)} differ"
            message = f"holds other images than when {fit.folder} was begun: {what}; put them back, or choose another"
            raise UserError(f"{message} --output", file=images.inspection.path)
    elif images.file.exists() and read_bytes(images.file) != images.written:
        raise UserError("exists already, of other images; move it away, or choose another --output", file=images.file)
    write_whole(images.file, images.written)


def sizes_to_try(architecture: Architecture) -> list[int]:
    """Return image sizes that a model takes, rising by about the square root of 2 up to its own, which is the last."""
    step, native = size_step_of(architecture), native_size(architecture)
    smallest = max(_SMALLEST, 2 * step)
    wished = [smallest * 2 ** (power / 2) for power in range(12)]
    sizes = {round(side / step) * step for side in wished if side < min(native, _LARGEST) / 1.1}
    return sorted({*sizes, *([native] if native <= _LARGEST else [])}) or [native]


def pixel_store(request: FitRequest, images: Images) -> PixelStore:
    """Return what keeps images at all sizes that may be trained on as they are decoded, if that is no more than 1 GB.

    Raises:
        UserError: if a model is not known, or takes no such images.
    """
    architecture = architecture_of(named_backbone(request.models[0], request.weights))
    sizes = [] if request.smoke else list(request.image_sizes) or sizes_to_try(architecture)
    taken = 3 * len(images.classes) * sum(size**2 for size in sizes)
    return PixelStore(sizes if taken <= _MOST_KEPT else [], interpolation_of(architecture), request.resize or "squash")


def take_in(
    request: FitRequest,
    images: Images,
    file: Path,
    store: PixelStore | None = None,
    on_progress: Callable[[int, int], None] = no_progress,
) -> LabelledSet:
    """Look at each of a person's images once, and leave out what can't be used; nothing is written.

    Args:
        request: of the command, or in Python.
        images: of the request, see `find_images`.
        file: where it will be said which images are used, and which test.
        store: keeps what is decoded.
        on_progress: gets how many images were read, and of how many.

    Raises:
        UserError: see `inspect_images`.
    """
    metric = None if request.metric == "auto" else images.task.metric(request.metric)
    least = request.least_of_a_class[1 if images.tested else 0]
    inspection = inspect_images(images, least=least, strict=request.strict, store=store, on_progress=on_progress)
    split_by = os.path.realpath(images.path), request.split_seed, request.test_images
    starts = request.from_run is not None
    folder: Path | None = None
    earlier: ImagesFile | None = None
    if request.from_run is not None:
        folder = resolve_latest(request.from_run)
        earlier = ImagesFile.read(folder / IMAGES_FILE)
    elif images.together is None:  # of `train` in this output, or of `tune` beside it, the last that was asked alike
        outputs = request.output if request.main_study else request.output.absolute().parent
        folder, earlier = next((call for call in earlier_calls(outputs) if call[1].asked == split_by), (None, None))
    sealed = images_file(inspection, *split_by[1:], earlier, starts=starts) | {"asked": split_by}
    content = ImagesFile.model_validate_json(json.dumps(sealed))
    index = index_inspected(images, content, request.images)
    keeps = earlier and content.tested & earlier.tested and (starts or content.digests != earlier.digests)
    before: DecidingMetric | None = None
    with suppress(UserError, OSError):  # the last call is not done
        before = None if folder is None else metric_of(read_record(single_run(folder) / RECORD_FILE).spec)
    return LabelledSet(inspection, content, file, index, metric, store, folder if keeps else None, before)


def earlier_calls(*outputs: Path) -> Iterator[tuple[Path, ImagesFile]]:
    """Yield the folders of calls in some outputs, and which images they used, the last first."""
    files = (file for folder in outputs for file in folder.glob(f"*/{IMAGES_FILE}") if not file.parent.is_symlink())
    for file in sorted(files, key=os.path.getmtime, reverse=True):
        with suppress(UserError):  # damaged: it is as if it were not there
            yield file.parent, ImagesFile.read(file)


def named_files(request: TrainRequest) -> dict[str, str]:
    """Return the SHA-256 of the weights and of the adapter that a request names by a path, by how it does.

    Raises:
        UserError: if they can't be read.
    """
    digests, backbone = dict[str, Callable[[], str]](), named_backbone(request.model, request.weights)
    if backbone.weights == "file" and not request.smoke:

        def of_weights() -> str:
            return " ".join(filter(None, (check_weights(backbone), architecture_of(backbone).config_sha256)))

        digests["model" if request.weights in (None, "file") else "weights"] = of_weights
    if request.init_adapter is not None:
        digests["init_adapter"] = partial(start_sha256, request.init_adapter)
    if request.from_run is not None:
        digests["from_run"] = partial(start_sha256, single_run(request.from_run) / ADAPTER_FILE)
    files = {}
    for option, digest in digests.items():
        try:
            files[request.spelled(option, getattr(request, option))] = digest()
        except UserError as error:
            raise error.about(request.option(option).name) from None
    return files


def refuse_among_images(folder: Path, output: Path) -> None:
    """Refuse an output in a folder of images.

    Raises:
        UserError: naming it.
    """
    place, images = (Path(os.path.realpath(os.path.expanduser(path))) for path in (output, folder))
    if place == images or images in place.parents:
        reason = f"lies in {folder}, among your images; choose a folder elsewhere"
        raise UserError(reason, file=output, field="--output")
