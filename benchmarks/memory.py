"""Peak memory of training steps, each side in a process of its own with the same allocator.

    python benchmarks/memory.py [--threads 2]

Small: ViT-S/14, 112 px, batches of 32, under the allocator of peft-vit's workers, which keeps freed memory. Large:
ViT-B/16, 224 px, batches of 8, fp32, where freed memory returns to the system at once. Prints the largest resident
memory during some steps, beyond what the process held once the model was built (activations, gradients, optimizer
state), and beyond what it held after its imports.
"""

from __future__ import annotations

import sys

from common import RETURNING, machine, measured_alone, parser, with_allocator, with_one_side, write

from peft_vit.runs.executors.local import ALLOCATOR

LARGE = "ViT-B/16: "
with_allocator(RETURNING if any(LARGE in word for word in sys.argv) else ALLOCATOR)

from collections.abc import Callable  # noqa: E402 - torch must be loaded under the allocator

import psutil  # noqa: E402
import sides  # noqa: E402
import torch  # noqa: E402

from peft_vit.core.adapters.footprint import peak_memory_bytes, reset_peak_memory  # noqa: E402
from peft_vit.core.training.optimization import blocks_of, recomputed  # noqa: E402
from peft_vit.runs.this_machine.machine import bf16_support  # noqa: E402

STEPS = 6
SMALL_SIDES = {
    "floor": lambda bf16: sides.floor(112, bf16=bf16),
    "PEFT LoRA r=8": lambda bf16: sides.peft_lora(112, bf16=bf16),
    "peft-vit LoRA r=8": lambda bf16: sides.lora(112, bf16=bf16),
    "peft-vit LoRA r=8, light": lambda bf16: sides.lora(112, bf16=bf16, light=True),
    "peft-vit LoRA r=8, int8": lambda bf16: sides.lora(112, bf16=bf16, integers=True),
    "PEFT AdaLoRA 12 -> 8": lambda bf16: sides.peft_adalora(112, bf16=bf16, total_steps=48),
    "peft-vit AdaLoRA 12 -> 8": lambda bf16: sides.adalora(112, bf16=bf16, total_steps=48)[0],
}
LARGE_MODEL, LARGE_SIZE, LARGE_BATCH = "vit_base_patch16_224", 224, 8
NATIVE = bf16_support(sides.DEVICE).native
Build = Callable[[], sides.Side]
LARGE_BUILDS: dict[str, Build] = {
    "floor": lambda: sides.floor(LARGE_SIZE, bf16=False, name=LARGE_MODEL),
    "PEFT LoRA r=8": lambda: sides.peft_lora(LARGE_SIZE, bf16=False, name=LARGE_MODEL),
    "PEFT over bitsandbytes nf4": lambda: sides.peft_qlora(LARGE_SIZE, bf16=False, name=LARGE_MODEL),
    "peft-vit LoRA r=8": lambda: sides.lora(LARGE_SIZE, bf16=False, name=LARGE_MODEL),
    "peft-vit LoRA r=8, light": lambda: sides.lora(LARGE_SIZE, bf16=False, light=True, name=LARGE_MODEL),
    "peft-vit LoRA r=8, int8": lambda: sides.lora(LARGE_SIZE, bf16=NATIVE, integers=True, name=LARGE_MODEL),
    "peft-vit QA-LoRA nf4": lambda: sides.qa_lora(LARGE_SIZE, bf16=False, type="nf4", name=LARGE_MODEL),
}
AGAIN = ", blocks"  # computed again in the backward pass
LARGE_SIDES = {
    f"{LARGE}{name}{way}": (build, way)
    for name, build in LARGE_BUILDS.items()
    for way in ("", AGAIN)
    if name != "floor" or not way
}


def recompute(side: sides.Side) -> None:
    """Let a side's forward passes keep no more than its blocks' inputs, by this package's means or by timm's own."""
    if isinstance(side.model, sides.peft.PeftModel):
        side.model.base_model.model.set_grad_checkpointing(True)
        return
    step = side.step

    def step_recomputing() -> None:
        with recomputed(blocks_of(side.model)):  # around both halves of a batch
            step()

    side.step = step_recomputing  # type: ignore[method-assign]


def measure(name: str, threads: int, *, bf16: bool) -> tuple[int, int, int]:
    """Return bytes: the peak, the peak beyond the built model, and beyond imports."""
    torch.set_num_threads(threads)
    imported = psutil.Process().memory_info().rss
    build, way = LARGE_SIDES.get(name, (lambda: SMALL_SIDES[name](bf16), ""))
    if name.startswith(LARGE):
        sides.BATCH = LARGE_BATCH
    side = build()
    reset_peak_memory()
    built = psutil.Process().memory_info().rss
    if way == AGAIN:
        recompute(side)
    for _ in range(STEPS):
        side.step()
    peak = peak_memory_bytes()
    return peak, peak - built, peak - imported


def main() -> None:
    options = with_one_side(parser(__doc__, image_size=112, threads=2), [*SMALL_SIDES, *LARGE_SIDES])
    if options.side:
        print(*measure(options.side, options.threads, bf16=options.bf16))
        return
    rows = []
    for names, precision in ((SMALL_SIDES, "fp32"), (SMALL_SIDES, "bf16"), (LARGE_SIDES, "fp32")):
        for name, peak, training, in_all in measured_alone(
            __file__, names, options, bf16=precision == "bf16", numbers=3
        ):
            print(
                f"{precision}  {name:46} {training / 1e6:7.0f} MB beyond the model, {in_all / 1e6:7.0f} MB beyond "
                "imports",
                flush=True,
            )
            rows.append(
                {
                    "precision": precision,
                    "side": name,
                    "peak_bytes": peak,
                    "training_bytes": training,
                    "beyond_imports_bytes": in_all,
                }
            )
    setting = {
        "small": {"model": sides.MODEL, "image_size": 112, "batch": sides.BATCH, "allocator": ALLOCATOR},
        "large": {"model": LARGE_MODEL, "image_size": LARGE_SIZE, "batch": LARGE_BATCH, "allocator": RETURNING},
        "steps": STEPS,
    }
    about = machine(options.threads)
    del about["allocator"]
    write("memory", {"machine": about, "setting": setting, "rows": rows})


if __name__ == "__main__":
    main()
