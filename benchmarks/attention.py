"""timm's fused attention against plain matrix products on a CPU: forward and backward of one ViT-S block's attention.

    python benchmarks/attention.py [--rounds 20] [--threads 2]

Batches of 32, six heads of 64. `backbones.choose_attention` follows from these numbers.
"""

from __future__ import annotations

from common import in_turn, machine, parser, table, with_tuned_allocator, write

with_tuned_allocator()

from collections.abc import Callable  # noqa: E402 - torch must be loaded under the tuned allocator

import torch  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

HEADS, HEAD_WIDTH = 6, 64
TOKENS = (37, 65, 145, 197, 257, 530)  # 84, 112, 168 px in patches of 14; 224 px in patches of 16 and 14; 322 px


def passes(tokens: int, dtype: torch.dtype, *, fused: bool) -> Callable[[], None]:
    """Return a call that does one forward and backward pass, as timm's Attention computes it."""
    inputs = torch.randn(32, tokens, 3 * HEADS * HEAD_WIDTH, dtype=dtype, requires_grad=True)

    def call() -> None:
        query, key, value = inputs.reshape(32, tokens, 3, HEADS, HEAD_WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        if fused:
            output = scaled_dot_product_attention(query, key, value)
        else:
            output = ((query * HEAD_WIDTH**-0.5) @ key.transpose(-2, -1)).softmax(-1) @ value
        torch.autograd.grad(output.sum(), inputs)

    return call


def main() -> None:
    """Time both ways at every length."""
    options = parser(__doc__, rounds=20, threads=2).parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in TOKENS:
            sides = {name: passes(tokens, dtype, fused=name == "fused") for name in ("fused", "plain")}
            title = f"{tokens} tokens, {str(dtype).removeprefix('torch.')}"
            for row in table(title, in_turn(sides, options.rounds), "fused"):
                rows.append({"tokens": tokens, "dtype": str(dtype), **row})
    write("attention", {"machine": machine(options.threads), "rows": rows})


if __name__ == "__main__":
    main()
