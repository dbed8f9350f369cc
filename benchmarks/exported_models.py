"""Exported models beside the trained ones: agreement on the runs' own test images, and bytes over float32's.

    python benchmarks/exported_models.py RUN_DIR...

Each finished run (`peft-vit run` or `train`) is merged and written as ONNX and OpenVINO, opened again as `predict`
opens it, and asked for the logits of all test images; the trained model computes them in float32, adapters beside its
weights. The base of the bytes is the same model with float weights in the same format. Nothing is chosen by these
images.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import machine, write

from peft_vit.core.adapters import plain_model
from peft_vit.core.config import exported_bytes
from peft_vit.data import load_data
from peft_vit.deploy import export_onnx, export_openvino, merge, open_exported
from peft_vit.deploy.export import compare
from peft_vit.deploy.restore import RestoredRun, restore_run

WRITERS = {"onnx": (export_onnx, ".onnx"), "openvino": (export_openvino, ".xml")}


def measured(run: RestoredRun, kind: str, folder: Path) -> dict[str, Any]:
    """Export a run's model and its float form, and compare the former with the trained one on the test images."""
    spec, (export, ending) = run.record.spec, WRITERS[kind]
    merged = merge(run.model, run.card).model
    float32 = plain_model(merged, run.card.architecture, run.card.image_size, len(run.card.class_names))
    sizes = []
    for name, model in (("model", merged), ("float32", float32)):
        export(model, folder / f"{name}{ending}", run.card)
        sizes.append(exported_bytes(folder / f"{name}{ending}"))
    images = load_data(spec.data, spec.seed, smoke=spec.smoke).test.open()
    exported = open_exported(folder / f"model{ending}")
    found = compare(run, exported, images, "test")
    return {
        "run": spec.run_id,
        "format": kind,
        "bytes": sizes[0],
        "of_float32": sizes[0] / sizes[1],
        "test_images": found.images,
        "same_predictions": found.same_predictions,
        "logit_error": found.logit_error,
        "trained_accuracy": found.trained,
        "exported_accuracy": found.exported,
    }


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    rows = []
    for run_dir in options.parse_args(arguments).run_dirs:
        run = restore_run(run_dir)
        for kind in WRITERS:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(row := measured(run, kind, Path(folder)))
            print(
                f"{row['run']:36} {kind:9} {row['bytes'] / 1e6:6.1f} MB, {row['of_float32']:.3f} of float32;  "
                f"{row['test_images']} test images: {100 * row['same_predictions']:.2f} % of predictions equal, logits "
                f"within {row['logit_error']:.1e} relative, accuracy {100 * row['trained_accuracy']:.2f} % before and "
                f"{100 * row['exported_accuracy']:.2f} % after",
                flush=True,
            )
    write("exported_models", {"machine": machine(1), "rows": rows})


if __name__ == "__main__":
    main()
