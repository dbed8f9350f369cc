"""From a trained model to files that run elsewhere: merging, safetensors, ONNX, OpenVINO, and predictions from them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peft_vit.deploy.formats.header import Classifier, ExportMetadata
from peft_vit.deploy.predicting import (
    ImageFile,
    check_coverage,
    image_files,
    open_exported,
    predict_files,
    predict_images,
    writer_of,
)
from peft_vit.deploy.presentation import Prediction

if TYPE_CHECKING:
    from peft_vit.deploy.formats.onnx_file import OnnxRuntime, export_onnx
    from peft_vit.deploy.formats.openvino_file import export_openvino
    from peft_vit.deploy.formats.torch_files import (
        Merged,
        load_low_bit,
        load_pretrained,
        merge,
        save_low_bit,
        save_pretrained,
        torch_classifier,
    )

_WITH_TORCH = {
    "formats.onnx_file": ("OnnxRuntime", "export_onnx"),
    "formats.openvino_file": ("export_openvino",),
    "formats.torch_files": (
        "Merged",
        "load_low_bit",
        "load_pretrained",
        "merge",
        "save_low_bit",
        "save_pretrained",
        "torch_classifier",
    ),
}


def __getattr__(name: str) -> Any:
    """Import on first use: predicting from a file for another runtime needs no torch."""
    for module, names in _WITH_TORCH.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
