"""One training by one process and by two of gloo, how far apart: the table of docs/how_to/gpu.md.

A random ViT of two blocks learns 69 images of 32 px for twenty steps of 32, 32 and 5 images, in float64 and in float32;
`tests/unit/training/test_training_processes.py` asserts bounds of the same. Distances are relative, of the summed
gradients of the first step before they are clipped; differences are the largest of what was trained. Of int8 products
it counts the rounded activations of the first step that differ.

    OMP_NUM_THREADS=1 python benchmarks/devices.py

prints the rows and writes `benchmarks/results/devices.json`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import machine, parser, write
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from trained_together import first_codes, together, trained_each

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("lora", {}),
    "LoRA, int8 products": ("lora", {"compute": "int8"}),
    "AdaLoRA": ("adalora", {}),
    "AdaLoRA, ranks grow": ("growing", {}),
    "QA-LoRA": ("qa_lora", {}),
    "QA-LoRA, micro-batches of 8": ("qa_lora", {"micro_batch_size": 8}),
    "both, checkpointed blocks": ("qa_adalora", {"activation_checkpointing": "blocks"}),
}


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the relative distance of two sets of tensors."""
    both = [torch.cat([one[name].double().flatten() for name in theirs]) for one in (ours, theirs)]
    return float((both[0] - both[1]).norm() / both[1].norm())


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Return the largest difference of an element of two sets of tensors."""
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs if theirs[name].numel())


def compared(alone: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return how far two processes are from one, and whether they agree to the bit."""
    told = ("sha256", "optimizer_sha256", "ranks", "bits", "steps", "evaluations", "chosen_step")
    return {
        "first_gradients": distance(first["gradients"], alone["gradients"]),
        "trained": difference(first["tensors"], alone["tensors"]),
        "largest_trained": max(float(own.abs().max()) for own in alone["tensors"].values() if own.numel()),
        "same_ranks_and_bits": all(first[name] == alone[name] for name in ("ranks", "history", "bits")),
        "both_processes_equal": all(first[name] == second[name] for name in told),
    }


def main() -> None:
    """Train each case by one process and by two, and print the table's rows."""
    parser(__doc__).parse_args()
    torch.set_num_threads(1)
    cases = {
        f"{name} {width}": (method, settings, {"double": width == "float64"})
        for name, (method, settings) in CASES.items()
        for width in ("float64", "float32")
        if width == "float32" or "compute" not in settings
    }
    with tempfile.TemporaryDirectory() as place:
        alone, pair = trained_each(cases), together(trained_each, 2, Path(place), cases)
        codes = first_codes(), [torch.cat(rows) for rows in zip(*together(first_codes, 2, Path(place)), strict=True)]
    rows = {case: compared(alone[case], pair[0][case], pair[1][case]) for case in cases}
    for name in CASES:
        own = [rows.get(f"{name} {width}", {}) for width in ("float64", "float32")]
        cells = [f"{one[key]:.0e}" if one else "–" for key in ("first_gradients", "trained") for one in own]
        equal = [
            "yes" if all(one[key] for one in own if one) else "no"
            for key in ("same_ranks_and_bits", "both_processes_equal")
        ]
        print(f"| {' | '.join([name, *cells, *equal])} |")
    ties = {
        "differ": sum(int((one != two).sum()) for one, two in zip(*codes, strict=True)),
        "of": sum(one.numel() for one in codes[0]),
        "largest": max(int((one.int() - two.int()).abs().max()) for one, two in zip(*codes, strict=True)),
    }
    print(f"int8: {ties['differ']} of {ties['of']:,} rounded activations differ, by at most {ties['largest']}")
    write("devices", {"machine": machine(threads=1), "rows": rows, "int8_codes": ties})


if __name__ == "__main__":
    main()
