"""LoRA over model, image size and batch: peak memory beside PEFT's, and time over the frozen floor.

    python benchmarks/lora_shapes.py [--threads 1] [--rounds 5] [--models S B L]

ViT-S/16, B/16 and L/16, fp32, LoRA r=8 on all six matrices. Memory: each side in a process of its own, in which freed
memory returns to the system at once; the peak of two steps beyond what was held after the imports. Time: of S and B,
all sides in turn in one process, medians; with one thread it is the processor's time that counts, so that what else a
machine does matters less; with `--rounds 0` nothing is timed. Of L one step is done for its memory, and none is timed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from typing import Any

from common import RETURNING, in_turn, machine, parser, with_allocator, write

with_allocator(RETURNING)

import psutil  # noqa: E402 - torch must be loaded under the allocator
import sides  # noqa: E402
import torch  # noqa: E402

from peft_vit.core.adapters.footprint import peak_memory_bytes, reset_peak_memory  # noqa: E402

MODELS = {"S": "vit_small_patch16_224", "B": "vit_base_patch16_224", "L": "vit_large_patch16_224"}
SIZES, BATCHES = (112, 224), (1, 8, 32)
BUILDS = {"floor": sides.floor, "PEFT": sides.peft_lora, "peft-vit": sides.lora}
CELLS = [(model, size, batch) for model in MODELS for size in SIZES for batch in BATCHES]
CELLS.remove(("L", 224, 32))  # one step on one thread takes longer than all others


def step_memory(name: str, model: str, size: int, batch: int) -> int:
    """Return the bytes that a side takes beyond the imports, at most, during steps."""
    imported = psutil.Process().memory_info().rss
    sides.BATCH = batch
    side = BUILDS[name](size, bf16=False, name=MODELS[model])
    reset_peak_memory()
    for _ in range(1 if model == "L" else 2):
        side.step()
    return peak_memory_bytes() - imported


def memory_alone(name: str, cell: tuple[str, int, int], threads: int) -> int:
    """Return the same, measured in a process of its own."""
    command = [sys.executable, __file__, "--threads", str(threads), "--one", name, *map(str, cell)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def step_times(model: str, size: int, batch: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the time of each side's step over that of the floor."""
    sides.BATCH = batch
    calls = {name: build(size, bf16=False, name=MODELS[model]).step for name, build in BUILDS.items()}
    clock = time.process_time if options.threads == 1 else time.perf_counter
    rounds = options.rounds * max(1, 8 // (batch * (size // 112) ** 2))
    seconds = {name: sorted(one)[len(one) // 2] for name, one in in_turn(calls, rounds, clock=clock).items()}
    return {name: seconds[name] / seconds["floor"] for name in ("PEFT", "peft-vit")}


def main() -> None:
    asked = parser(__doc__, threads=1, rounds=5)
    asked.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    asked.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = asked.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        name, model, size, batch = options.one
        print(step_memory(name, model, int(size), int(batch)))
        return
    rows: list[dict[str, Any]] = []
    for cell in CELLS:
        model, size, batch = cell
        if model not in options.models:
            continue
        memory = {name: memory_alone(name, cell, options.threads) for name in ("PEFT", "peft-vit")}
        times = {} if model == "L" or not options.rounds else step_times(*cell, options)
        said = "".join(f"   {name} {ratio:.3f} of the floor's time" for name, ratio in times.items())
        print(
            f"ViT-{model}/16 {size} px, batch {batch:2}:   PEFT {memory['PEFT'] / 1e6:6.0f} MB, peft-vit "
            f"{memory['peft-vit'] / 1e6:6.0f} MB, {memory['peft-vit'] / memory['PEFT']:.3f}{said}",
            flush=True,
        )
        rows.append(
            {"model": model, "image_size": size, "batch": batch, "beyond_imports_bytes": memory, "over_floor": times}
        )
    about = machine(options.threads)
    about["allocator"] = RETURNING
    clock = "processor" if options.threads == 1 else "wall"
    write("lora_shapes", {"machine": about, "clock": clock, "rows": rows})


if __name__ == "__main__":
    main()
