"""An adapter and its head alone, in few bytes: a file that belongs to a backbone whose hash it names.

Of each site dW = B A with B (out, r), which has the scale in it, and A (r, in / pool). The rows of A and the columns of
B are stored as `quantization.row_rounding` says, site by site in the model's order; so are the rows of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_args

import torch
from pydantic import Field
from torch import Tensor, nn

from peft_vit.base.errors import UserError, named
from peft_vit.core.adapters import AdaptedLinear, SiteAdapter, adapted_modules, trained_tensors
from peft_vit.core.adapters.peft_layers import tuner_layers
from peft_vit.core.backbones import Backbone, Site
from peft_vit.core.backbones.backbone import linear_layers
from peft_vit.core.quantization.row_rounding import pack_rows, unpack_rows
from peft_vit.deploy.formats.header import AGAIN, ExportMetadata, Header
from peft_vit.deploy.formats.torch_files import LowBitHeader, low_bit_parts, read_tensors, signed_tensors, tensor_file

_OF_HEAD = "head_"  # before "codes" and "scales"
_HEAD_ROWS = ("head_codes", "head_scales")
_TENSORS = {"codes", "scales", *_HEAD_ROWS, "head_bias"}
_Rank = Annotated[int, Field(ge=0, le=65_536)]
StoredBits: TypeAlias = Literal[1, 2, 4, 8, 16, 32]


class AdapterHeader(Header):
    """What an adapter's file says of itself."""

    base: str  # SHA-256 that the backbone's file says of itself
    weights: str  # how that holds its matrices
    bits: StoredBits
    head_bits: StoredBits
    pool: int = Field(ge=1)  # inputs on which an update is constant
    ranks: tuple[_Rank, ...]  # of each site in the model's order


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter as its file holds it."""

    header: AdapterHeader
    tensors: dict[str, Tensor]

    @classmethod
    def of_model(cls, model: nn.Module, card: ExportMetadata, base: LowBitHeader, bits: StoredBits) -> PackedAdapter:
        """Return what was trained of a model, without what shows images unlike its own.

        Args:
            model: that holds it.
            card: of the model.
            base: header of the backbone's file.
            bits: of the adapter's values; the head's weight has at least 8, since 4 lose two points
                (`calibration/scripts/head_bits.py`).

        Raises:
            UserError: if more than adapters and head was trained, or the PEFT library has done it.
        """
        backbone = Backbone(model)
        head_bits: StoredBits = 8 if bits < 8 else bits
        beside = [name for name in trained_tensors(model) if ".sites." not in name]
        others = sorted(set(beside) - backbone.of_head(beside))
        if others or tuner_layers(model):
            why = f"{others[0]} was trained, too" if others else "the PEFT library trained it"
            raise UserError(f"{why}; a bundle holds runs of lora, adalora, qa_lora, qa_adalora, linear and qa_linear")
        factors, ranks, pools = [], [], {1}
        for site in backbone.sites:
            adapter, rows = _adapter_on(model, site)
            ranks.append(0 if adapter is None else adapter.rank)
            if adapter is not None and adapter.rank:
                # Rounded ones, rounded again, need not be the same.
                left, right = adapter.exact_factors() if adapter.bits == bits else adapter.factors()
                factors += [right, left[rows].T]  # (r, in / pool), (r, out)
                pools.add(adapter.pool)
        header = AdapterHeader(
            card=card.model_copy(update={"unlike": None, "integer_bits": None}),
            base=base.sha256,
            weights=number_formats(base),
            bits=bits,
            head_bits=head_bits,
            pool=max(pools),
            ranks=tuple(ranks),
        )
        tensors = pack_rows(factors, bits)
        layers = linear_layers(backbone.head)
        weight = torch.cat([layer.weight.detach() / len(layers) for layer in layers], dim=1)  # (classes, width)
        bias = torch.stack([layer.bias.detach() for layer in layers]).mean(0)
        tensors |= {f"{_OF_HEAD}{name}": tensor for name, tensor in pack_rows([weight], head_bits).items()}
        tensors["head_bias"] = bias.half() if head_bits < 32 else bias
        return cls(*signed_tensors(header, tensors))

    @classmethod
    def read(cls, file: Path) -> PackedAdapter:
        """Return a file's adapter; raises UserError if it is none, is damaged, or was changed after it was written."""
        return cls(*read_tensors(AdapterHeader, file, "bundle"))

    def content(self) -> bytes:
        """Return the file's content."""
        return tensor_file(self.header, self.tensors)

    def check(self, base: LowBitHeader, sites: Sequence[Site], width: int, file: Path) -> None:
        """Refuse an adapter of another backbone, or one that does not fit.

        Raises:
            UserError: saying how the two backbones differ.
        """
        theirs, ours = self.header.card, base.card
        differences = {
            "the model": (theirs.model, ours.model),
            "weights": (theirs.weights_sha256, ours.weights_sha256),
            "images": (f"{theirs.image_size} px", f"{ours.image_size} px"),
            "matrices in": (self.header.weights, number_formats(base)),
            "a backbone of SHA-256": (self.header.base, base.sha256),
        }
        for what, (of_adapter, of_base) in differences.items():
            if of_adapter != of_base:
                message = f"was trained on {what} {of_adapter}, and this backbone has {of_base}"
                raise UserError(f"{message}; put it into another bundle", file=file)
        with named(file):
            if any(site.in_features % self.header.pool for site in sites):
                raise UserError(f"has updates for {self.header.pool} inputs at once, which no matrix has; {AGAIN}")
            if len(self.header.ranks) != len(sites):
                raise UserError(f"has ranks of {len(self.header.ranks)} matrices, the model {len(sites)}")
            bias, classes = self.tensors.get("head_bias", torch.empty(0)), len(theirs.class_names)
            fits = bias.shape == (classes,) and bias.dtype in (torch.float16, torch.float32)
            if not fits or not self.tensors.keys() <= _TENSORS:
                raise UserError(f"does not hold an adapter and a head of {classes} outputs; export the run again")
            factors = [factor for pair in self.updates(sites) for factor in pair]
            if not all(bool(part.isfinite().all()) for part in (*factors, *self.head(width))):
                raise UserError("holds values that are not finite; train it again")

    def updates(self, sites: Sequence[Site], pool: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return A (r, in / pool) and B transposed, (r, out), of each site in float32; `pool` divides its own."""
        header = self.header
        own = header.pool if any(header.ranks) else pool or 1  # a head alone has none
        shapes = [
            (rank, size)
            for site, rank in zip(sites, header.ranks, strict=True)
            for size in (site.in_features // own, site.out_features)
        ]
        parts = {name: tensor for name, tensor in self.tensors.items() if name in ("codes", "scales")}
        factors = unpack_rows(parts, shapes, header.bits)
        times = own // (pool or own)
        return [
            (a if times == 1 else a.repeat_interleave(times, 1), b)
            for a, b in zip(factors[::2], factors[1::2], strict=True)
        ]

    def head(self, width: int) -> tuple[Tensor, Tensor]:
        """Return weight (classes, width) and bias (classes,) in float32."""
        header, bias = self.header, self.tensors.get("head_bias", torch.empty(0))
        parts = {key.removeprefix(_OF_HEAD): tensor for key, tensor in self.tensors.items() if key in _HEAD_ROWS}
        (weight,) = unpack_rows(parts, [(len(bias), width)], header.head_bits)
        return weight, bias.float()


def trained_bits(model: nn.Module) -> StoredBits | None:
    """Return the bits that a model's adapters were trained to be stored in; None: they were not."""
    adapters = [adapter for _, module in adapted_modules(model) for _, adapter in module.adapters()]
    return next((bits for bits in get_args(StoredBits) if adapters and adapters[0].bits == bits), None)


def number_formats(base: LowBitHeader) -> str:
    """Return how a backbone holds its matrices: "float32", or "nf4 in groups of 32"."""
    formats = {f"{layer.type} in groups of {layer.group_size or 'a row'}" for layer in base.layers.values()}
    return " and ".join(sorted(formats)) or "float32"


def backbone_of(model: nn.Module, card: ExportMetadata) -> tuple[LowBitHeader, dict[str, Tensor]]:
    """Return a model's backbone as `save_low_bit` writes it, on the model's memory; it has a head of one class.

    The model is changed: its adapters go, its head, and the offsets of a codebook, which are 0 until an update is
    merged into them.
    """
    for _, module in adapted_modules(model):
        module.sites, module.matmul, packed = nn.ModuleDict(), None, module.quantized
        if packed is None or packed.offsets is None or not packed.format.has_codebook:
            continue
        if not packed.offsets.any():
            module.quantized = replace(packed, offsets=None, format=replace(packed.format, offset=False))
    for name, layer in Backbone(model).heads.items():
        head = nn.Linear(layer.in_features, 1)
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        model.set_submodule(name, head)
    of_weights = {
        "library",
        "model",
        "config",
        "head_blocks",
        "weights_name",
        "weights_sha256",
        "image_size",
        "mean",
        "std",
    }
    weights = card.model_dump(include=of_weights)
    return low_bit_parts(model, ExportMetadata(run="backbone", channels=3, class_names=("backbone",), **weights))


def _adapter_on(model: nn.Module, site: Site) -> tuple[SiteAdapter | None, slice]:
    """Return the adapter on a site, and the rows of it that are the site's: PEFT's q, k and v share one."""
    module = model.get_submodule(site.module)
    for place, adapter in module.adapters() if isinstance(module, AdaptedLinear) else ():
        (start, stop), (first, last) = place.rows, site.rows
        if start <= first and last <= stop:
            return adapter, slice(first - start, last - start)
    return None, slice(0)
