"""What a Vision Transformer's answer rests on, by its attention and one backward pass.

This is the rule for self-attention of Chefer, Gur and Wolf (ICCV 2021, arXiv 2103.15679).
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from peft_vit.deploy.formats.header import FloatArray


class _Weights(TorchFunctionMode):
    """Keeps the weights of each attention, (B, heads, queries, keys), in the order of the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:  # which does not tell them
            query, key, value = args[:3]
            scores = query @ key.mT * (kwargs.get("scale") or query.shape[-1] ** -0.5)
            if (mask := kwargs.get("attn_mask")) is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            self.found.append(scores.softmax(-1))
            return self.found[-1] @ value
        made = func(*args, **kwargs)
        if func in (Tensor.softmax, torch.softmax, functional.softmax) and made.ndim == 4:
            self.found.append(made)
        return made


def attended(model: nn.Module, image: FloatArray) -> FloatArray | None:
    """Return how much the class that a model says rests on each patch of a normalised image (3, S, S).

    With A_l the attention weights of block l, (heads, T, T), G_l the gradient of the class's log-probability by them,
    and e that reads the class token (all patches alike, where there is none), patches have

        e (I + C_L) ... (I + C_1),    C_l = mean over heads of max(G_l A_l, 0).

    Returns:
        (side, side) of patches; None: not every token attends to all, as in windows.
    """
    weights = _Weights()
    with torch.enable_grad(), weights:
        log_probability = model(torch.from_numpy(image[None]).requires_grad_()).log_softmax(-1).max()
    found = [one for one in weights.found if one.requires_grad]
    tokens = found[0].shape[-1] if found else 0
    if not found or any(one.shape[-2:] != (tokens, tokens) for one in found):
        return None
    side = isqrt(tokens)  # the tokens before those of patches are few
    read = torch.zeros(tokens)
    read[: 1 if tokens > side**2 else tokens] = 1
    gradients = torch.autograd.grad(log_probability, found)
    for one, gradient in zip(reversed(found), reversed(gradients), strict=True):
        read = read + read @ (one * gradient).clamp(min=0).mean(1)[0].detach()  # (T,)
    patches: FloatArray = read[-(side**2) :].reshape(side, side).numpy()
    return patches
