"""Whether a step, a pass of features or an exported file has become slower: ratios of one run against stated bounds.

    make bench-quick        or        python benchmarks/quick.py [--rounds 5] [--image-size 112] [--threads 2]

ViT-S/14, batches of 32. Every side makes one step a round, in turn, in one process; ratios are of medians, over the
frozen float32 model (`floor`) or over PEFT's side, so they hold on a processor that nobody has seen. A ratio that is a
tenth above its bound is measured again, with twice the rounds; if it is so again, the exit code is 1. Nothing is
written: the kept numbers are those of the other benchmarks. Products of 8 bits are those that are chosen here. Where
AMX multiplies bfloat16, PyTorch's are slower, `compute: auto` does not take them, and they have no bound.
"""

from __future__ import annotations

from common import in_turn, parser, with_tuned_allocator

with_tuned_allocator()

import statistics  # noqa: E402 - torch must be loaded under the tuned allocator
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import sides  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from peft_vit.core.adapters import attach_adapters  # noqa: E402
from peft_vit.core.adapters.matmuls import fastest_matmul  # noqa: E402
from peft_vit.core.backbones import Architecture, find_sites  # noqa: E402
from peft_vit.core.training import QALoRATrainer  # noqa: E402
from peft_vit.deploy import export_onnx, merge, open_exported  # noqa: E402
from peft_vit.deploy.measures.check import card_of_random  # noqa: E402
from peft_vit.runs.this_machine.machine import bf16_support, instruction_sets  # noqa: E402

TOLERANCE = 1.10


class Bound(NamedTuple):
    """The largest ratio of two sides' times that is expected, where products of 8 bits are exact and where not."""

    side: str
    over: str
    exact: float
    not_exact: float


STEPS = (
    Bound("LoRA, fp32", "floor", 1.12, 1.12),
    Bound("LoRA, fp32", "PEFT LoRA, fp32", 0.90, 0.90),
    Bound("LoRA, bf16", "PEFT LoRA, bf16", 0.72, 0.72),
    Bound("LoRA, int8", "floor", 0.60, 0.85),
    Bound("QA-LoRA nf4, fp32", "floor", 1.15, 1.15),
    Bound("QA-LoRA nf4, fp32", "PEFT NF4, fp32", 0.88, 0.88),
    Bound("QA-LoRA int4, int8", "floor", 0.62, 0.95),
)
PASSES = (
    Bound("features, int8", "features, fp32", 0.45, 0.65),
    Bound("ONNX, float32", "features, fp32", 1.0, 1.0),
    Bound("ONNX, nf4 small", "ONNX, float32", 1.4, 1.4),
)


def steps(size: int) -> dict[str, Callable[[], Any]]:
    """Return one step of each side."""
    bf16 = bf16_support(sides.DEVICE).native
    calls: dict[str, Callable[[], Any]] = {
        "floor": sides.floor(size, bf16=False).step,
        "PEFT LoRA, fp32": sides.peft_lora(size, bf16=False).step,
        "PEFT NF4, fp32": sides.peft_qlora(size, bf16=False).step,
        "LoRA, fp32": sides.lora(size, bf16=False).step,
        "LoRA, int8": sides.lora(size, bf16=bf16, integers=True).step,
        "QA-LoRA nf4, fp32": sides.qa_lora(size, bf16=False, type="nf4").step,
        "QA-LoRA int4, int8": sides.qa_lora(size, bf16=bf16, type="int4", integers=True).step,
    }
    if bf16:
        calls["PEFT LoRA, bf16"] = sides.peft_lora(size, bf16=True).step
        calls["LoRA, bf16"] = sides.lora(size, bf16=True).step
    return calls


def passes(size: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """Return a forward pass of each form of a model."""
    images = torch.randn(sides.BATCH, 3, size, size)
    pixels = images.numpy()

    def exported(name: str, model: nn.Module) -> Callable[[], Any]:
        card = card_of_random(Architecture("timm", sides.MODEL), size, ("0", "1"), "quick")
        export_onnx(merge(model.eval(), card).model, folder / name, card)
        runtime = open_exported(folder / name)
        return lambda: runtime.logits(pixels)

    adapted = sides.vit(size)
    attach_adapters(adapted, find_sites(adapted), sides.RANK, scale=sides.SCALE, seed=0)
    packed = sides.qa_lora(size, bf16=False, type="nf4")
    (trainer,) = packed.hooks
    assert isinstance(trainer, QALoRATrainer)
    return {
        "features, fp32": sides.features(size),
        "features, int8": sides.features(size, integers=True),
        "ONNX, float32": exported("float32.onnx", adapted),
        "ONNX, nf4 small": exported("nf4.onnx", packed.model),
    }


def too_slow(calls: dict[str, Callable[[], Any]], bounds: tuple[Bound, ...], rounds: int) -> list[Bound]:
    """Time all sides, print each ratio beside its bound, and return the bounds that are not kept."""
    medians = {name: statistics.median(values) for name, values in in_turn(calls, rounds).items()}
    exact = fastest_matmul(sides.DEVICE).bits == 8
    missed = []
    for bound in bounds:
        if bound.side in medians:
            most = bound.exact if exact else bound.not_exact
            ratio = medians[bound.side] / medians[bound.over]
            kept = ratio <= TOLERANCE * most
            print(f"  {bound.side:20} over {bound.over:16} {ratio:5.2f}  bound {most:4.2f}{'' if kept else '  ABOVE'}")
            missed += [] if kept else [bound]
    return missed


def main() -> int:
    options = parser(__doc__, rounds=5, image_size=112, threads=2).parse_args()
    torch.set_num_threads(options.threads)
    size, missed, amx = options.image_size, [], "amx_bf16" in instruction_sets()
    with tempfile.TemporaryDirectory() as folder:
        for title, every, bounds, times in (
            ("Steps", steps(size), STEPS, 1),
            ("Forward passes", passes(size, Path(folder)), PASSES, 3),
        ):
            print(f"\n{title}, {size} px, median of {times * options.rounds}")
            calls = {name: call for name, call in every.items() if not (amx and "int8" in name)}
            again = too_slow(calls, bounds, times * options.rounds)
            if again:
                print("  once more, twice as long:")
                needed = {name for bound in again for name in (bound.side, bound.over)}
                chosen = {name: call for name, call in calls.items() if name in needed}
                missed += too_slow(chosen, tuple(again), 2 * times * options.rounds)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
