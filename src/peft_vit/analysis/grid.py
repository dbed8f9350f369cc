"""Values by site as a matrix of blocks and matrix types, the shape in which people read a transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peft_vit.config import SITE_MATRICES
from peft_vit.records import Role, SiteInfo


@dataclass(frozen=True)
class Grid:
    """Where each site stands: rows are blocks, columns are the matrix types that carry an adapter."""

    blocks: tuple[int, ...]
    matrices: tuple[str, ...]
    sites: tuple[SiteInfo, ...]

    @classmethod
    def of(cls, sites: Sequence[SiteInfo]) -> Grid:
        """Lay out the sites of a run."""
        present = dict.fromkeys(site.matrix for site in sites)
        blocks = tuple(sorted({site.block for site in sites}))
        matrices = [m for m in (*SITE_MATRICES, *present) if m in present]
        return cls(blocks, tuple(dict.fromkeys(matrices)), tuple(sites))

    def fill(self, values: Mapping[str, float]) -> np.ndarray:
        """Return (blocks, matrices); NaN where no value was recorded."""
        array = np.full((len(self.blocks), len(self.matrices)), np.nan)
        for site in self.sites:
            if site.name in values:
                array[self._place(site)] = values[site.name]
        return array

    def has_matrix(self) -> np.ndarray:
        """Return (blocks, matrices) whether a block has such a matrix; Swin merges patches between stages alone."""
        return ~np.isnan(self.fill({site.name: 1.0 for site in self.sites}))

    def pick(self, values: np.ndarray, site: SiteInfo) -> float:
        """Return a site's entry of a (blocks, matrices) array."""
        return float(values[self._place(site)])

    def _place(self, site: SiteInfo) -> tuple[int, int]:
        return self.blocks.index(site.block), self.matrices.index(site.matrix)

    def columns_of(self, role: Role) -> np.ndarray:
        """Return (matrices,) whether a column holds matrices of a role."""
        roles = {site.matrix: site.role for site in self.sites}
        return np.array([roles[matrix] == role for matrix in self.matrices])
