"""The first stage: what is in the folder, what is for the test, what decides; and what all stages know of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np

from peft_vit.base.errors import UserError
from peft_vit.base.files import read_bytes, write_whole
from peft_vit.core.backbones import BackboneShape, architecture_of, check_weights, describe, size_step_of, source_of
from peft_vit.core.config import BackboneConfig, Compute, Flips, WeightsSource, named_backbone
from peft_vit.core.tasks import DecidingMetric, Scores
from peft_vit.core.training import fewest_groups
from peft_vit.data import existing, find_images, images_file, inspect_images
from peft_vit.fit.outcomes import Runner
from peft_vit.fit.state import State
from peft_vit.fit.tune_request import TuneRequest
from peft_vit.runs.costs.estimate import product_rates
from peft_vit.runs.costs.time_limit import FOLDS
from peft_vit.runs.machine import choose_precision, cpu_count, resolve_device

_BATCH = 32


@dataclass(frozen=True)
class TuningContext:
    """What all stages after the first know."""

    state: State  # of the tuning
    runner: Runner  # does the runs of a study
    seen: Any  # of the images, see `data.inspect_images`
    images_file: Path  # which of them are sealed
    outputs: int  # of the head
    images: int  # that are not sealed
    metric: DecidingMetric  # what decides
    different: int | None = None  # of them, a copy not counted; None: all are
    sealed_images: int = 0  # how many are
    scores: Scores = field(default_factory=Scores)  # by which everything is compared
    rarest: float = math.inf  # different images of the rarest class
    alike: float = 1.0  # share of images by which the metric would be known as well if all counted the same

    @property
    def request(self) -> TuneRequest:
        """Return what was asked for."""
        return self.state.request

    @property
    def test_images(self) -> int:
        """Return how many images a fold tests, about."""
        return self.images // FOLDS

    @property
    def train_images(self) -> int:
        """Return how many images are trained on in a fold, about."""
        return self.images - self.test_images

    @property
    def batch_size(self) -> int:
        """Return the images of a step."""
        return min(_BATCH, max(1, self.train_images))

    @property
    def flips(self) -> Flips:
        """Return how training images are flipped: as regressions have chosen, left-right until then."""
        flips: Flips = self.state.file.decided.get("flips", "horizontal")
        return flips

    @cached_property
    def backbones(self) -> dict[str, BackboneConfig]:
        """Return the models that can be loaded, by name; others are reported.

        Raises:
            UserError: if none can be loaded, with the reason of the last.
        """
        found: dict[str, BackboneConfig] = {}
        fault: UserError | None = None
        for name in dict.fromkeys(self.request.models):
            try:
                backbone = named_backbone(name, self._weights(name))
                check_weights(backbone)
            except UserError as error:
                fault = error
                self.state.tell(f"  {name} can't be loaded: {error.message}")
            else:
                found[name] = backbone
        if not found:
            assert fault is not None
            own = self.request.weights not in (None, *get_args(WeightsSource))
            raise fault.about("--weights") if own else fault
        return found

    def _weights(self, model: str) -> str | None:
        """Return where a model's weights come from, decided once."""
        state, asked = self.state, self.request.weights
        backbone = named_backbone(model, asked)
        if asked is not None or backbone.library != "timm":
            return asked

        def source() -> str:
            source, line = source_of(backbone.model)
            if line:
                state.tell(f"  {line}")
            return source

        return state.once(f"weights {model}", source)

    @cached_property
    def compute(self) -> Compute:
        """Return how frozen layers multiply in all runs, decided once."""
        request = self.request
        if request.compute == "float":
            return "float"

        def fastest() -> Compute:
            device = resolve_device(request.device)
            precision = choose_precision(request.precision, None, device).chosen
            name, backbone = next(iter(self.backbones.items()))
            shape = self.shape(name, 8 * size_step_of(architecture_of(backbone)))
            rates = product_rates(request.compute, shape, device, precision, request.threads or cpu_count())
            best = next(iter(rates))
            if best == "int8" and "float" in rates:
                gain = rates["int8"] / rates["float"]
                self.state.tell(f"  frozen layers multiply 8-bit integers, which is {gain:.1f} times as fast here")
            return best

        return self.state.once("compute", fastest)

    def shape(self, model: str, image_size: int) -> BackboneShape:
        """Return a backbone's shape."""
        return describe(self.backbones[model], image_size)

    def study(
        self,
        name: str,
        model: str,
        image_size: int,
        seeds: Sequence[int],
        experiments: Sequence[Mapping[str, Any]],
        **data: Any,
    ) -> dict[str, Any]:
        """Return a study on the folds: seed s tests on fold s % 5 of repetition s // 5. Nothing validates.

        Args:
            name, model, image_size, seeds: of the study, its backbone, its images in pixels, its runs.
            experiments: as a configuration holds them.
            data: beside what all have; `folds: null` trains on all that is not for the test, which tests.
        """
        request = self.request
        return {
            "name": name,
            "seeds": list(seeds),
            "threads": request.threads or cpu_count(),
            "precision": request.precision,
            "device": request.device,
            "backbone": self.backbones[model].model_dump(exclude_unset=True),
            "data": {
                "dataset": self.seen.images.dataset,
                "path": str(self.seen.path.absolute()),
                "images_file": str(self.images_file.absolute()),
                "image_size": image_size,
                "folds": FOLDS,
                "validation_images": 0,
                "split_seed": request.seed,
                **({} if request.task is None else {"task": request.task}),
                **data,
            },
            "experiments": [{**one, "training": {**one["training"], "compute": self.compute}} for one in experiments],
            "measures": {"logits": True},
        }


IMAGES_FILE = "images.json"
_SURE_S = 3.0  # of decoding, until it is known how long it takes
MakeRunner = Callable[[State, DecidingMetric], Runner]


def context_of(state: State, make_runner: MakeRunner) -> TuningContext:
    """Look at the images, set some aside for the test, and return what all other stages build on.

    Raises:
        UserError: see `inspect_images`; if the folder has other images than when the output was begun; and if
            images.json is there already and holds something else.
    """
    images = find_images(existing(str(state.request.images)), state.request.task)
    task = images.files.task
    asked = None if state.request.metric == "auto" else task.metric(state.request.metric)
    seen = inspect_images(images, on_progress=_telling_if_slow(state))
    for line in seen.lines(asked):
        state.tell(f"  {line}")
    content = json.dumps(images_file(seen, state.request.seed), indent=1) + "\n"
    place = state.request.output / IMAGES_FILE
    if state.begun:
        _refuse_others(state.request.images, place, content)
    if state.begun or not place.exists():
        write_whole(place, content.encode())
    elif read_bytes(place) != content.encode():  # equal: a call was killed before its output was begun
        raise UserError("exists already, of other images; move it away, or choose another --output", file=place)
    found = json.loads(content)
    sealed, left_out = set(found["sealed"]), set(found["left_out"])
    used = np.array([name not in sealed and name not in left_out for name in seen.names], dtype=bool)
    own = "the folder's own test split" if seen.holdout is not None else f"a fifth of {task.fifth_of}"
    state.tell(f"  test set, read at the end: {len(sealed):,} images, {own}; choices use the other {used.sum():,}")
    different, metric = len(np.unique(seen.groups[used])), asked or seen.metric
    scores = Scores.on(task, metric, seen.labels[used])
    outputs, runner, count = task.head_width(seen.class_names), make_runner(state, metric), int(used.sum())
    rarest = fewest_groups(task.strata(seen.labels[used]), seen.groups[used])
    alike = metric.images_alike(seen.labels[used]) / count
    return TuningContext(
        state, runner, seen, place, outputs, count, metric, different, len(sealed), scores, rarest, alike
    )


def _telling_if_slow(state: State) -> Callable[[int, int], None]:
    """Return what says once, soon after the beginning, that reading so many images takes more than its share.

    Raises:
        UserError: if it takes all the time that there is.
    """
    started, told = state.clock(), False

    def on_progress(done: int, count: int) -> None:
        nonlocal told
        spent_s = state.clock() - started
        whole_s = spent_s * count / done
        if told or spent_s < _SURE_S or whole_s <= state.share_s("look"):
            return
        told = True
        about = f"reading {count:,} images takes about {whole_s / 60:.1f} minutes"
        if whole_s > 60 * state.request.minutes:
            raise UserError(f"{about} here; give more than {math.ceil(whole_s / 60)}", field="--minutes")
        state.tell(f"  {about}, more than its share; less is trained")

    return on_progress


def _refuse_others(images: Path, place: Path, content: str) -> None:
    """Refuse to continue with other images than those that the output was begun with."""
    try:
        before, now = json.loads(read_bytes(place)), json.loads(content)
    except (OSError, ValueError) as error:
        raise UserError(f"can't be read ({error}); choose another --output", file=place) from None
    changed = [name for name in now if name != "left_out" and before.get(name) != now[name]]
    if changed:
        what = "a file was changed, added or removed" if "sha256" in changed else f"{', '.join(changed)} differ"
        message = f"holds other images than when {place.parent} was begun: {what}; put them back, or choose another"
        raise UserError(f"{message} --output", file=images)
