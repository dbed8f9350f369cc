"""What may become the model: a recipe says everything that its training depends on, and what its file takes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from peft_vit.core.backbones import BackboneShape
from peft_vit.core.config import BITS_OF_TYPE, METHOD_KINDS, Augment, MethodName, QuantizationType
from peft_vit.core.methods import METHODS, TrainOptions
from peft_vit.core.methods.method import DEFAULT_RANK
from peft_vit.core.methods.quantized import file_bytes, packing_of
from peft_vit.runs.measures.held_out import reference_bytes

DEFAULT_RATE = 1e-3  # of LoRA
GRAPH_BYTES = 2800  # of an ONNX file, a matrix of the blocks; a ViT-S has 0.19 MB for its 72
ROUNDED: tuple[QuantizationType, ...] = ("int8", "nf4", "int2")  # after training; int3 takes 4 bits in a file


@dataclass(frozen=True)
class Recipe:
    """A model that could be trained."""

    model: str  # of the backbone
    image_size: int  # in pixels
    method: MethodName = "linear"  # a probe, which takes no step
    rank: int = 0  # 0: the method's own
    rate: float = 0.0  # of learning, at its highest; 0 of a probe
    steps: int = 0  # on a fold; the last training has as many more as there are more images
    bits: QuantizationType | None = None  # number format of the blocks' matrices; None: float
    # they are rounded: never, while training (QA-LoRA), or after it
    when: Literal["never", "training", "after"] = "never"
    augment: Augment | None = None  # how training images are changed; None: as usual for the task

    @property
    def is_probe(self) -> bool:
        """Return whether only a head is fitted, on features of the frozen backbone."""
        return METHOD_KINDS[self.method].trains == "head"

    @property
    def rounded_to(self) -> QuantizationType | None:
        """Return the number format to which it is rounded after training; None: it is not."""
        return self.bits if self.when == "after" else None

    @property
    def trained(self) -> Self:
        """Return what is trained for it: the same in float, where bits come after training."""
        return replace(self, bits=None, when="never") if self.rounded_to else self

    @property
    def plain(self) -> Self:
        """Return LoRA of the usual rank with as many steps, by which it is known whether more of them gain."""
        rate = float(f"{self.rate / rate_of(self.method, 1.0):.3g}")
        return replace(self, method="lora", rank=0, rate=rate, bits=None, when="never", augment=None)

    @property
    def half(self) -> Self:
        """Return it with half of its steps."""
        return replace(self, steps=self.steps // 2)

    def rounded(self, bits: QuantizationType) -> Self:
        """Return it with weights that are rounded after training."""
        return replace(self, bits=bits, when="after")

    @property
    def name(self) -> str:
        """Return the name of the experiment that trains it, among those of its model and size."""
        if self.is_probe:
            return "linear"
        bits = f"_{self.bits}" if self.when == "training" else ""
        augment = f"_{self.augment}" if self.augment else ""
        return f"{self.method}{bits}_r{self.rank or DEFAULT_RANK}_{self.rate:g}_{self.steps}{augment}".replace(".", "-")

    @property
    def place(self) -> str:
        """Return what the studies of its model and size are called, after what they are for."""
        plain = re.sub(r"[^a-z0-9_]+", "-", self.model.lower()).strip("-_")
        if plain != self.model or len(plain) > 40:
            plain = f"{plain[:40]}-{hashlib.sha256(self.model.encode()).hexdigest()[:6]}"
        return f"{plain}-{self.image_size}"

    @property
    def title(self) -> str:
        """Return what it is, for people."""
        rank = f" of rank {self.rank}" if self.rank else ""
        bits = [] if self.bits is None else [f"{BITS_OF_TYPE[self.bits]} bits ({self.bits})"]
        augment = [f"augment {self.augment}"] if self.augment else []
        method = METHOD_KINDS[self.method].title.partition(",")[0]
        return ", ".join([f"{method}{rank}", *bits, *augment, f"{self.image_size} px"])

    @property
    def settings(self) -> str:
        """Return how it is trained, for people; empty of a probe."""
        return "" if self.is_probe else f"{self.steps} steps at {self.rate:g}"

    def options(self, shape: BackboneShape, **limits: Any) -> TrainOptions:
        """Return what the method's settings depend on; `limits` of the updates as `TrainOptions` has them."""
        bits = {} if self.bits is None or self.when != "training" else {"bits": self.bits}
        given = {"rank": self.rank or None, "budget": None} | bits | limits
        return TrainOptions(steps=max(1, self.steps), shape=shape, **given)

    def sections(self, shape: BackboneShape, **limits: Any) -> dict[str, Any]:
        """Return what the method brings to an experiment; raises UserError if no rank fits the bytes."""
        return METHODS[self.method].defaults(self.options(shape, **limits))

    def file_bytes(self, shape: BackboneShape, classes: int, images: int) -> int:
        """Return what its file takes, see `file_bytes`, with the features of so many training images."""
        packing = None
        if self.bits is not None:
            packing = packing_of(list(shape.sites), self.bits) if self.rounded_to else self.sections(shape)["qa_lora"]
        values = shape.parameters + classes * (shape.head_inputs + 1)
        return (
            file_bytes(shape.sites, values, packing) + reference_bytes(shape, images) + GRAPH_BYTES * len(shape.sites)
        )


def lora(model: str, image_size: int, steps: int, rate: float = DEFAULT_RATE) -> Recipe:
    """Return LoRA of the usual rank."""
    return Recipe(model, image_size, "lora", rate=rate, steps=steps)


def rate_of(method: str, rate: float = DEFAULT_RATE) -> float:
    """Return the peak of a method's learning rate that goes with one of LoRA, as in `train`."""
    return peak_of(METHODS[method].learning_rate, rate)


def peak_of(plateau: float, rate: float = DEFAULT_RATE) -> float:
    """Return the peak of one cycle that goes with a plateau of `train`, as LoRA's `rate` does with LoRA's plateau."""
    return float(f"{rate * plateau / METHODS['lora'].learning_rate:.3g}")
