"""From a trained model to files that run elsewhere: merging, safetensors, ONNX, OpenVINO, and predictions from them."""

from peft_vit.deployment.calibrated import Calibrated
from peft_vit.deployment.low_bit_file import load_low_bit, save_low_bit
from peft_vit.deployment.merging import Merged, merge
from peft_vit.deployment.model_card import ModelCard
from peft_vit.deployment.onnx_expanded import input_ranges
from peft_vit.deployment.onnx_file import OnnxRuntime, check_int8, export_onnx, open_onnx
from peft_vit.deployment.openvino_file import export_openvino, open_openvino
from peft_vit.deployment.predicting import (
    Classifier,
    Prediction,
    check_coverage,
    open_exported,
    predict_files,
    predict_images,
    torch_classifier,
)
from peft_vit.deployment.pretrained import load_pretrained, save_pretrained
