"""The frozen weight of a linear layer: float, packed, or on the way from one to the other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from peft_vit.quantization import QuantizedTensor


@dataclass(frozen=True, eq=False)
class FrozenWeight:
    """The weight under adapters, (1 - share) * float + share * quantized, of shape (out, in).

    Attributes:
        floating: the float weight; None once it has been freed, and then the share counts as 1.
        quantized: the packed weight; None if there is none, and then the share counts as 0.
        share: 0 to 1.
    """

    floating: Tensor | None
    quantized: QuantizedTensor | None = None
    share: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """Return the numbers of outputs and inputs."""
        weight = self.quantized if self.floating is None else self.floating
        assert weight is not None
        rows, columns = weight.shape
        return rows, columns

    @property
    def is_float(self) -> bool:
        """Whether the float weight alone is in use."""
        return self.quantized is None or (self.floating is not None and self.share == 0)

    @property
    def group_size(self) -> int:
        """Return how many inputs share a scale of the packed weight; 1 where all do, or nothing is packed."""
        groups = 1 if self.quantized is None else self.quantized.groups
        return 1 if groups == 1 else self.shape[1] // groups

    def columns(self, columns: slice) -> FrozenWeight:
        """Return the weight of some inputs, whole groups and whole bytes of a packed one."""
        if columns == slice(0, self.shape[1]):
            return self
        floating = None if self.floating is None else self.floating[:, columns]
        quantized = None if self.quantized is None else self.quantized.columns(columns)
        return FrozenWeight(floating, quantized, self.share)

    def unpack(self, added: Tensor | None = None) -> Tensor:
        """Return the weight in float, (out, in), without a gradient and in memory of its own.

        Args:
            added: (out, groups), added to every weight of the group of inputs.
        """
        if self.floating is None or (self.quantized is not None and self.share == 1):
            assert self.quantized is not None
            return self.quantized.dequantize(added=added)
        weight = self.floating.detach()
        if self.is_float:
            weight = weight.clone()
        else:
            assert self.quantized is not None
            weight = self.quantized.dequantize(weight.dtype).lerp_(weight, 1 - self.share)
        if added is not None:
            weight.unflatten(1, (added.shape[1], -1)).add_(added.detach().unsqueeze(-1))
        return weight
