"""QA-LoRA's training step: time over the frozen float floor, peak memory, stored bits a weight.

    make bench        or        python benchmarks/qa_lora.py [--rounds 12] [--image-size 112] [--threads 2]

ViT-S/14, batches of 32, rank 8 on all six matrices, AdamW, clipping. For the time every side makes one step a round, in
turn, in one process, with the same threads and allocator; ratios are of medians. Memory is the largest resident memory
during six steps, each side in a process of its own that first gives back what building the model took.
"""

from __future__ import annotations

from common import in_turn, machine, measured_alone, parser, table, with_one_side, with_tuned_allocator, write

with_tuned_allocator()

import argparse  # noqa: E402 - torch must be loaded under the tuned allocator
import ctypes  # noqa: E402
import gc  # noqa: E402
import re  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import sides  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from peft_vit.core.adapters import adapted_modules  # noqa: E402
from peft_vit.core.adapters.adapted_product import FrozenWeight  # noqa: E402

FLOOR = "floor: frozen timm model"
STEPS = 6
SIDES = {
    FLOOR: sides.floor,
    "PEFT LoRA over bitsandbytes NF4": sides.peft_qlora,
    "peft-vit QA-LoRA nf4, groups of 32": lambda size, bf16: sides.qa_lora(size, bf16=bf16, type="nf4"),
    "peft-vit QA-LoRA int4, groups of 32": lambda size, bf16: sides.qa_lora(size, bf16=bf16, type="int4"),
    "peft-vit nf4 without groups": lambda size, bf16: sides.qa_lora(size, bf16=bf16, type="nf4", group_size=None),
    "peft-vit int4 without groups": lambda size, bf16: sides.qa_lora(size, bf16=bf16, type="int4", group_size=None),
}
ONCE = "peft-vit QA-LoRA nf4, groups of 32, unpacked once"


def unpacked_once(size: int, *, bf16: bool) -> sides.Side:
    """Return the nf4 side with each float weight kept from its forward to its backward pass."""
    side = SIDES["peft-vit QA-LoRA nf4, groups of 32"](size, bf16=bf16)
    kept: dict[int, Tensor] = {}
    unpack, step = FrozenWeight.unpack, side.step

    def keep(frozen: FrozenWeight, added: Tensor | None = None) -> Tensor:
        if id(frozen.quantized) in kept:
            return kept.pop(id(frozen.quantized))
        return kept.setdefault(id(frozen.quantized), unpack(frozen, added))

    def step_keeping() -> None:
        with mock.patch.object(FrozenWeight, "unpack", keep):
            step()
        kept.clear()  # the first block's query, key and value pass no gradient on

    side.step = step_keeping  # type: ignore[method-assign]
    return side


def step_times(size: int, rounds: int, *, bf16: bool) -> list[dict[str, Any]]:
    """Compare the time of a training step."""
    chosen = SIDES if bf16 else {**SIDES, ONCE: unpacked_once}
    calls = {name: make(size, bf16=bf16).step for name, make in chosen.items()}
    title = f"QA-LoRA, r={sides.RANK}, {'bf16' if bf16 else 'fp32'}, {size} px: time of a step"
    return table(title, in_turn(calls, rounds), FLOOR)


def measure_memory(name: str, size: int, *, bf16: bool) -> tuple[int, int]:
    """Return this process's resident bytes before, and the most during, the steps of one side."""
    side = {**SIDES, ONCE: unpacked_once}[name](size, bf16=bf16)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the largest resident memory so far to the present one
    before = _resident_bytes("VmRSS")
    for _ in range(STEPS):
        side.step()
    return before, _resident_bytes("VmHWM")


def _resident_bytes(entry: str) -> int:
    found = re.search(rf"^{entry}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare peak memory, each side in a process of its own."""
    print(f"\nPeak resident memory of {STEPS} steps, {options.image_size} px")
    rows = []
    for bf16 in (False, True):
        precision, chosen = ("bf16", [*SIDES]) if bf16 else ("fp32", [*SIDES, ONCE])
        for name, before, peak in measured_alone(__file__, chosen, options, bf16=bf16):
            print(
                f"  {precision}  {name:50} peak {peak / 1e6:6.0f} MB, at the start {before / 1e6:6.0f} MB", flush=True
            )
            rows.append({"precision": precision, "side": name, "peak_bytes": peak, "start_bytes": before})
    return rows


def stored_bits(size: int) -> list[dict[str, Any]]:
    """Count the bits a weight of the frozen linear layers, scales and offsets in float16 included."""
    print("\nStored bits a weight")
    rows = []
    for type in ("nf4", "int4"):
        for group_size, offset in ((32, True), (64, False), (None, False)):
            side = sides.qa_lora(size, bf16=False, type=type, group_size=group_size, offset=offset)
            packed = [module.quantized for _, module in adapted_modules(side.model) if module.quantized is not None]
            weights = sum(quantized.shape[0] * quantized.shape[1] for quantized in packed)
            bits = 8 * sum(quantized.nbytes for quantized in packed) / weights
            print(f"  {type}, group {group_size}, {'with' if offset else 'without'} offset: {bits:.3f}", flush=True)
            rows.append({"type": type, "group_size": group_size, "offset": offset, "bits_per_weight": round(bits, 4)})
    return rows


def main() -> None:
    options = with_one_side(parser(__doc__, rounds=12, image_size=112, threads=2), [*SIDES, ONCE])
    torch.set_num_threads(options.threads)
    size = options.image_size
    if options.side:
        print(*measure_memory(options.side, size, bf16=options.bf16))
        return
    write(
        "qa_lora",
        {
            "machine": machine(options.threads),
            "setting": {"model": sides.MODEL, "image_size": size, "batch": sides.BATCH, "rounds": options.rounds},
            "fp32": step_times(size, options.rounds, bf16=False),
            "bf16": step_times(size, options.rounds, bf16=True),
            "memory": memory(options),
            "stored_bits": stored_bits(size),
        },
    )


if __name__ == "__main__":
    main()
