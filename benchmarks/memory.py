"""Peak memory of training steps, each side in a process of its own with the same allocator.

    python benchmarks/memory.py [--image-size 112] [--threads 2]

Prints the largest resident memory during six steps, less what the process held once the model was built: activations,
gradients and optimizer state.
"""

from __future__ import annotations

from common import machine, measured_alone, parser, with_one_side, with_tuned_allocator, write

with_tuned_allocator()

import resource  # noqa: E402

import psutil  # noqa: E402
import sides  # noqa: E402
import torch  # noqa: E402

STEPS = 6
SIDES = {
    "floor": lambda size, bf16: sides.floor(size, bf16=bf16),
    "PEFT LoRA r=8": lambda size, bf16: sides.peft_lora(size, bf16=bf16),
    "peft-vit LoRA r=8": lambda size, bf16: sides.lora(size, bf16=bf16),
    "PEFT AdaLoRA 12 -> 8": lambda size, bf16: sides.peft_adalora(size, bf16=bf16, total_steps=48),
    "peft-vit AdaLoRA 12 -> 8": lambda size, bf16: sides.adalora(size, bf16=bf16, total_steps=48)[0],
}


def measure(name: str, size: int, threads: int, *, bf16: bool) -> tuple[int, int]:
    """Return (peak resident bytes of this process, of which training took)."""
    torch.set_num_threads(threads)
    side = SIDES[name](size, bf16)
    before = psutil.Process().memory_info().rss
    for _ in range(STEPS):
        side.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak, peak - before


def main() -> None:
    options = with_one_side(parser(__doc__, image_size=112, threads=2), SIDES)
    if options.side:
        print(*measure(options.side, options.image_size, options.threads, bf16=options.bf16))
        return
    rows = []
    for precision in ("fp32", "bf16"):
        for name, peak, training in measured_alone(__file__, SIDES, options, bf16=precision == "bf16"):
            print(
                f"{precision}  {name:28} peak {peak / 1e6:7.0f} MB, of which training {training / 1e6:7.0f} MB",
                flush=True,
            )
            rows.append({"precision": precision, "side": name, "peak_bytes": peak, "training_bytes": training})
    setting = {"model": sides.MODEL, "image_size": options.image_size, "batch": sides.BATCH, "steps": STEPS}
    write("memory", {"machine": machine(options.threads), "setting": setting, "rows": rows})


if __name__ == "__main__":
    main()
