"""Models of other families: a step's time over the frozen floor, and how long it takes to find sites and to check them.

    python benchmarks/families.py [--rounds 8] [--threads 2] [--shared]

Steps as in step_time.py: LoRA at rank 8 on all matrices, batches of 32, random weights, fp32, all sides in turn. Sites
are found by one forward pass of one image, adapters are checked by a forward and a backward pass of one; each round
builds the model anew, since what is counted is kept with it. Ratios and seconds are of medians. --shared is for a
machine that others use: it takes one thread, and counts the processor time of this process alone.
"""

from __future__ import annotations

from common import in_turn, machine, parser, table, with_tuned_allocator, write

with_tuned_allocator()

import statistics  # noqa: E402 - torch must be loaded under the tuned allocator
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import sides  # noqa: E402
import torch  # noqa: E402

from peft_vit.core.adapters import attach_adapters, check_gradients  # noqa: E402
from peft_vit.core.backbones import find_sites  # noqa: E402

STEPS = {"vit_small_patch16_dinov3": 112, "swin_tiny_patch4_window7_224": 128}  # image size, in pixels
SITES = ("vit_base_patch16_224", *STEPS)
FLOOR = "floor: frozen timm model"
Clock = Callable[[], float]


def steps(name: str, size: int, rounds: int, clock: Clock) -> dict[str, Any]:
    """Compare a step of LoRA, by PEFT and by us, with the floor."""
    calls = {
        FLOOR: sides.floor(size, bf16=False, name=name).step,
        "PEFT LoRA r=8": sides.peft_lora(size, bf16=False, name=name).step,
        "peft-vit LoRA r=8": sides.lora(size, bf16=False, name=name).step,
    }
    seconds = in_turn(calls, rounds, warm_up=1, clock=clock)
    return {"image_size": size, "sides": table(f"LoRA r=8, {name}, fp32, {size} px: a step", seconds, FLOOR)}


def sites_of(name: str, rounds: int, clock: Clock) -> dict[str, Any]:
    """Return the seconds of finding sites at 224 px, and of checking that adapters there act."""
    found, checked = [], []
    for _ in range(rounds):
        model = sides.vit(224, name)
        started = clock()
        sites = find_sites(model)
        found.append(clock() - started)
        attach_adapters(model, sites, sides.RANK, scale=sides.SCALE, seed=0, check=False)
        started = clock()
        check_gradients(model)
        checked.append(clock() - started)
    finding_s, checking_s = statistics.median(found), statistics.median(checked)
    print(f"  {name:32} {len(sites):4} sites   finding {finding_s:6.3f} s   checking {checking_s:6.3f} s", flush=True)
    return {"sites": len(sites), "finding_s": round(finding_s, 4), "checking_s": round(checking_s, 4)}


def main() -> None:
    made = parser(__doc__, rounds=8, threads=2)
    made.add_argument("--shared", action="store_true", help="count this process alone, on one thread")
    options = made.parse_args()
    threads = 1 if options.shared else options.threads
    clock = time.process_time if options.shared else time.perf_counter
    torch.set_num_threads(threads)
    print("\nSites at 224 px, fp32")
    found = {name: sites_of(name, options.rounds, clock) for name in SITES}
    write(
        "families",
        {
            "machine": machine(threads),
            "setting": {
                "batch": sides.BATCH,
                "rounds": options.rounds,
                "clock": "processor time of the process" if options.shared else "wall",
            },
            "sites": found,
            "lora_fp32": {name: steps(name, size, options.rounds, clock) for name, size in STEPS.items()},
        },
    )


if __name__ == "__main__":
    main()
