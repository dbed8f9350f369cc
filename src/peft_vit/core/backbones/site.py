"""Sites: the weight matrices of a Vision Transformer that may carry an adapter. PEFT calls them target modules.

Where a model fuses several matrices in one Linear, as timm does with query, key and value (3 D rows, in this order),
each is a site with a rank of its own: a slice of the fused module's rows. The product with the input stays one.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peft_vit.base.errors import UserError
from peft_vit.core.config import MATRICES
from peft_vit.core.records import Role, SiteInfo


@dataclass(frozen=True)
class Site:
    """One weight matrix, or one slice of a fused one, of shape (out_features, in_features)."""

    name: str  # blocks.3.attn.query
    module: str  # of the model, that holds it: blocks.3.attn.qkv
    rows: tuple[int, int]  # [start, stop) of the module's output rows
    layer: int  # number of its block, from 0
    kind: str  # in the family's own words: query
    role: Role
    in_features: int
    out_features: int
    tokens: int  # of one image that pass through it

    @property
    def span(self) -> slice:
        """Return the rows as a slice."""
        return slice(*self.rows)

    @property
    def multiply_adds(self) -> int:
        """Return the multiply-adds of its product for one image."""
        return self.tokens * self.in_features * self.out_features

    def info(self) -> SiteInfo:
        """Return what a record keeps of this site."""
        return SiteInfo(
            name=self.name,
            block=self.layer,
            matrix=self.kind,
            role=self.role,
            in_features=self.in_features,
            out_features=self.out_features,
        )


@dataclass(frozen=True)
class LinearLayout:
    """A linear module of a block, and the matrices that it holds.

    Attributes:
        module: its path in the model, `blocks.3.attn.qkv`.
        layer: number of the block.
        kinds: what slices of its rows are, from the first row on.
        role: of all of them.
        rows: how many each slice has; None: all the same number.
    """

    module: str
    layer: int
    kinds: tuple[str, ...]
    role: Role
    rows: tuple[int, ...] | None = None

    def site_names(self) -> list[str]:
        """Return the names of its sites, `blocks.3.attn.query`."""
        parent = self.module.rpartition(".")[0]
        return [f"{parent}.{kind}" for kind in self.kinds]


def select_sites(sites: Sequence[Site], targets: Sequence[str]) -> list[Site]:
    """Return the sites that targets ask for, out of all of a model.

    Args:
        sites: all of them.
        targets: kinds of matrices, of which the six of a plain block together, the default, stand for all that a model
            has; and patterns as a shell has them, which match the whole name of a site or of its module.

    Raises:
        UserError: if a target is not a kind of this model's, a pattern matches nothing, or there is no target.
    """
    patterns = [target for target in targets if any(sign in target for sign in ".*?[")]
    kinds = list(dict.fromkeys(site.kind for site in sites))
    wanted = [target for target in targets if target not in patterns]
    if set(wanted) == set(MATRICES):
        wanted = kinds
    unknown = [target for target in wanted if target not in kinds]
    if unknown or not targets:
        wrong = f"unknown matrix {unknown[0]!r}" if unknown else "no matrix is named"
        raise UserError(f"{wrong}; expected some of {', '.join(kinds)}", field="targets")
    for pattern in patterns:
        if not any(_matches(site, pattern) for site in sites):
            names = [name for site in sites for name in (site.module, site.name)]
            near = difflib.get_close_matches(pattern, dict.fromkeys(names), n=3, cutoff=0.0)
            raise UserError(f"no target module matches {pattern!r}; the nearest are {', '.join(near)}", field="targets")
    return [site for site in sites if site.kind in wanted or any(_matches(site, pattern) for pattern in patterns)]


def _matches(site: Site, pattern: str) -> bool:
    return fnmatch.fnmatchcase(site.name, pattern) or fnmatch.fnmatchcase(site.module, pattern)


def select_modules(sites: Sequence[Site], targets: Sequence[str]) -> dict[str, Site]:
    """Return one site for each module that targets ask for, out of all of a model: where a module has one adapter.

    Raises:
        UserError: as `select_sites`, and if targets ask for some parts of a fused matrix alone.
    """
    wanted = select_sites(sites, targets)
    modules = {site.module for site in wanted}
    left = next((site for site in sites if site.module in modules and site not in wanted), None)
    if left is not None:
        named = [site.kind for site in wanted if site.module == left.module]
        *some, last = [site.kind for site in sites if site.module == left.module]
        raise UserError(
            f"names {' and '.join(named)} alone, but {', '.join(some)} and {last} are one module of this model and one "
            "for PEFT; name all of them or none",
            field="targets",
        )
    return fused_sites(wanted)


def fused_sites(sites: Sequence[Site]) -> dict[str, Site]:
    """Return one site for each module, by its name: query, key and value of a fused matrix are `blocks.3.attn.qkv`.

    Of a fused matrix all parts or none are given.
    """
    fused: dict[str, Site] = {}
    for site in sites:
        whole = site
        if site.module in fused:
            stop, leaf = site.rows[1], site.module.rpartition(".")[2]  # the last part's end counts
            whole = replace(site, name=site.module, kind=leaf, rows=(0, stop), out_features=stop)
        fused[site.module] = whole
    return fused
