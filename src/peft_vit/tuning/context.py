"""What the studies of a tuning stand on: images with their folds, backbones that can be had, and how runs are done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from peft_vit.backbones import BackboneShape, architecture_of, check_weights, describe, size_step_of, source_of
from peft_vit.config import BackboneConfig, Compute, Flips, WeightsSource, named_backbone
from peft_vit.errors import UserError
from peft_vit.forecasting.estimate import product_rates
from peft_vit.runs.machine import choose_precision, cpu_count, resolve_device
from peft_vit.tasks import DecidingMetric
from peft_vit.tuning.running import Runner
from peft_vit.tuning.state import State
from peft_vit.tuning.tune_request import TuneRequest

FOLDS = 5
_MOST_VALIDATION = 500
_BATCH = 32


@dataclass(frozen=True)
class TuningContext:
    """What all stages after the first know.

    Attributes:
        state: of the tuning.
        runner: does the runs of a study.
        seen: of the images, see `data.inspect_images`.
        images_file: which of them are sealed.
        counts: images of each class that are not sealed.
        metric: what decides.
        different: of them, a copy not counted; None: all are.
        sealed_images: how many are.
    """

    state: State
    runner: Runner
    seen: Any
    images_file: Path
    counts: tuple[int, ...]
    metric: DecidingMetric
    different: int | None = None
    sealed_images: int = 0

    @property
    def request(self) -> TuneRequest:
        """Return what was asked for."""
        return self.state.request

    @property
    def images(self) -> int:
        """Return how many images are not sealed."""
        return sum(self.counts)

    @property
    def test_images(self) -> int:
        """Return how many images a fold tests, about."""
        return self.images // FOLDS

    @property
    def validation_images(self) -> int:
        """Return how many images validate: a fifth of the different ones that a fold leaves."""
        different = self.images if self.different is None else self.different
        left = different - different // FOLDS
        return max(2, len(self.counts), min(left // 5, _MOST_VALIDATION))

    @property
    def train_images(self) -> int:
        """Return how many images are trained on in a fold, about: no copies of those that validate."""
        copies = self.images / (self.different or self.images)  # of an image, with itself
        return self.images - self.test_images - round(copies * self.validation_images)

    @property
    def correlation(self) -> float:
        """Return the test images of a fold over its training images, see `StoppingRule`."""
        return -(-self.images // FOLDS) / self.train_images

    @property
    def batch_size(self) -> int:
        """Return the images of a step."""
        return min(_BATCH, max(1, self.train_images))

    @property
    def flips(self) -> Flips:
        """Return how training images are flipped: as probes have chosen, left-right until then."""
        found: Flips = self.state.file.decided.get("probes", {}).get("flips", "horizontal")
        return found

    @cached_property
    def backbones(self) -> dict[str, BackboneConfig]:
        """Return the models that can be had, by name; others are told.

        Raises:
            UserError: if none can be had, with the reason of the last.
        """
        found: dict[str, BackboneConfig] = {}
        fault: UserError | None = None
        for name in dict.fromkeys(self.request.models):
            try:
                backbone = named_backbone(name, self._weights(name))
                check_weights(backbone)
            except UserError as error:
                fault = error
                self.state.tell(f"  {name} can't be had: {error.message}")
            else:
                found[name] = backbone
        if not found:
            assert fault is not None
            own = self.request.weights not in (None, *get_args(WeightsSource))
            raise fault.about("--weights") if own else fault
        return found

    def _weights(self, model: str) -> str | None:
        """Return where a model's weights come from, decided once; an earlier version did not ask the hub."""
        state, asked, decision = self.state, self.request.weights, f"weights {model}"
        backbone = named_backbone(model, asked)
        is_old = state.begun and decision not in state.file.decided
        if asked is not None or backbone.library != "timm" or is_old:
            return asked

        def source() -> str:
            source, line = source_of(backbone.model)
            if line:
                state.tell(f"  {line}")
            return source

        return state.once(decision, source)

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
            (best, rate), *slower = rates.items()
            if best == "int8" and slower:
                gain = rate / slower[0][1]
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
        **settings: Any,
    ) -> dict[str, Any]:
        """Return a study on the folds: seed s tests on fold s % 5 of repetition s // 5."""
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
                "validation_images": self.validation_images,
                "split_seed": request.seed,
            },
            "experiments": [{**one, "training": {**one["training"], "compute": self.compute}} for one in experiments],
            **settings,
        }
