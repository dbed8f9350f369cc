"""Sites: the weight matrices of a Vision Transformer that may carry an adapter.

timm fuses query, key and value in one Linear of 3 D rows, in this order. The three are separate sites with
separate ranks: each is a slice of the fused module's rows, and the product with the input stays one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from peft_vit.config import MATRICES, Matrix, SiteMatrix
from peft_vit.errors import UserError
from peft_vit.records import SiteInfo

# Where timm's block keeps a matrix: path of the module below the block, and which of its equal row slices.
_HOLDER: dict[Matrix, tuple[str, int, int]] = {
    "query": ("attn.qkv", 0, 3),
    "key": ("attn.qkv", 1, 3),
    "value": ("attn.qkv", 2, 3),
    "out": ("attn.proj", 0, 1),
    "fc1": ("mlp.fc1", 0, 1),
    "fc2": ("mlp.fc2", 0, 1),
}


@dataclass(frozen=True)
class Site:
    """One weight matrix, or one slice of a fused one, of shape (out_features, in_features)."""

    name: str  # blocks.3.attn.query
    block: int
    matrix: Matrix
    module: str  # timm's module that holds it: blocks.3.attn.qkv
    rows: tuple[int, int]  # [start, stop) of the module's output rows
    in_features: int
    out_features: int

    def info(self) -> SiteInfo:
        """Return what a record keeps of this site."""
        return SiteInfo(
            name=self.name,
            block=self.block,
            matrix=self.matrix,
            in_features=self.in_features,
            out_features=self.out_features,
        )


def find_sites(model: nn.Module, targets: Sequence[Matrix] = MATRICES) -> tuple[Site, ...]:
    """List the sites of a model: block by block; query, key, value, out, fc1, fc2 within a block.

    Modules are read by their `in_features` and `out_features`, so replacing Linear layers by adapted ones
    leaves the sites as they are.

    Args:
        model: a timm VisionTransformer.
        targets: the matrices wanted, in any order.

    Raises:
        UserError: if the model is of another class or has several heads, a target is unknown, or a block lacks
            a wanted matrix.
    """
    if not isinstance(model, VisionTransformer):
        raise UserError(f"{type(model).__name__} is not a timm VisionTransformer; no other class can be adapted")
    if not isinstance(model.get_classifier(), nn.Linear | nn.Identity):
        raise UserError(
            f"{type(model).__name__} has more than one classifier head; choose a model without distillation"
        )
    unknown = [target for target in targets if target not in MATRICES]
    if unknown or not targets:
        wrong = f"unknown matrix {unknown[0]!r}" if unknown else "no matrix asked for"
        raise UserError(f"{wrong}; expected some of {', '.join(MATRICES)}", field="targets")
    return tuple(
        _find_site(model, block, matrix)
        for block in range(len(model.blocks))
        for matrix in MATRICES
        if matrix in targets
    )


def tokens_per_image(model: nn.Module) -> int:
    """Return the tokens that pass through every block of a timm VisionTransformer: patches, class token, registers."""
    patches: int = model.patch_embed.num_patches  # type: ignore[union-attr, assignment]
    prefix: int = model.num_prefix_tokens  # type: ignore[assignment]
    return patches + prefix


def fused_sites(sites: Sequence[Site]) -> dict[str, SiteInfo]:
    """Return one site for each module, by its name: query, key and value of a fused matrix are `blocks.3.attn.qkv`.

    Args:
        sites: from `find_sites`; of a fused matrix all three parts or none.
    """
    fused = {}
    for site in sites:
        matrix: SiteMatrix = "qkv" if _HOLDER[site.matrix][2] > 1 else site.matrix
        fused[site.module] = SiteInfo(
            name=f"{site.name.rpartition('.')[0]}.{matrix}",
            block=site.block,
            matrix=matrix,
            in_features=site.in_features,
            out_features=site.rows[1],  # the last part's end counts
        )
    return fused


def _find_site(model: nn.Module, block: int, matrix: Matrix) -> Site:
    path, part, parts = _HOLDER[matrix]
    module = f"blocks.{block}.{path}"
    name = f"blocks.{block}.{path.split('.')[0]}.{matrix}"
    in_features, out_features = _features(model, module, name)
    if out_features % parts:
        raise _missing(name, f"{module} has {out_features} rows, not query, key and value of one size")
    if matrix == "fc1":
        hidden, _ = _features(model, f"blocks.{block}.mlp.fc2", name)
        if hidden != out_features:
            raise _missing(name, f"{module} has {out_features} rows but fc2 takes {hidden} inputs (a gated MLP)")
    size = out_features // parts
    return Site(name, block, matrix, module, (part * size, (part + 1) * size), in_features, size)


def _features(model: nn.Module, module: str, site: str) -> tuple[int, int]:
    try:
        found = model.get_submodule(module)
        return int(found.in_features), int(found.out_features)  # type: ignore[arg-type]
    except (AttributeError, TypeError):
        raise _missing(site, f"there is no linear module {module}") from None


def _missing(site: str, reason: str) -> UserError:
    return UserError(f"this model has no site {site}: {reason}; choose a model with plain blocks")
