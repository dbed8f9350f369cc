"""An adapter of the product form by the singular value decomposition of its update.

With thin QR decompositions B = Q_b R_b and A^T = Q_a R_a, the singular value decomposition of the r x r matrix
R_b R_a^T = U S V^T gives that of the product, B A = (Q_b U) S (Q_a V)^T: no matrix of the weight's size is formed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from peft_vit.adapters.adapted_model import Adapter
from peft_vit.adapters.resizable import unwrapped


@torch.no_grad()
def singular_values(adapter: Adapter) -> Tensor:
    """Return those of the update, (rank,), the largest first; in groups of inputs each value of A counts for each."""
    core = torch.linalg.qr(adapter.lora_B.float()).R @ torch.linalg.qr(adapter.lora_A.float().T).R.T  # (r, r)
    return torch.linalg.svdvals(core) * abs(adapter.scale) * adapter.pool**0.5


@torch.no_grad()
def to_singular_triplets(adapter: Adapter) -> None:
    """Turn the triplets into the update's singular ones, b_i = sqrt(s_i) u_i and a_i = sqrt(s_i) v_i, in that order.

    The update stays as it was; moments of an optimiser belong to the triplets before.
    """
    left, right = torch.linalg.qr(adapter.lora_B.float()), torch.linalg.qr(adapter.lora_A.float().T)
    u, values, v_transposed = torch.linalg.svd(left.R @ right.R.T)
    root = values.sqrt()
    adapter.lora_B.copy_(left.Q @ u * root)  # (out, r)
    adapter.lora_A.copy_(root[:, None] * (v_transposed @ right.Q.T))  # (r, in / pool)


def write_in_singular_triplets(
    adapters: Mapping[str, Adapter], optimizer: torch.optim.Optimizer, ranks: Mapping[str, int]
) -> None:
    """Turn those adapters to singular triplets whose rank is about to change; what Adam knew of the others is gone."""
    state = unwrapped(optimizer).state
    for name, adapter in adapters.items():
        if ranks[name] != adapter.rank:
            to_singular_triplets(adapter)
            for parameter in (adapter.lora_A, adapter.lora_B):
                state.pop(parameter, None)
