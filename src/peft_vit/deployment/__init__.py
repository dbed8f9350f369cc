"""From a trained model to files that run elsewhere: merging, safetensors, ONNX, OpenVINO, and predictions from them."""

from peft_vit.deployment.model_card import Classifier, ModelCard
from peft_vit.deployment.onnx_file import OnnxRuntime, check_int8, export_onnx, input_ranges
from peft_vit.deployment.openvino_file import export_openvino
from peft_vit.deployment.predicting import (
    Prediction,
    check_coverage,
    format_named,
    open_exported,
    predict_files,
    predict_images,
)
from peft_vit.deployment.torch_files import (
    Merged,
    load_low_bit,
    load_pretrained,
    merge,
    save_low_bit,
    save_pretrained,
    torch_classifier,
)
