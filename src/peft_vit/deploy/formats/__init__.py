"""Files that run elsewhere: safetensors, ONNX, OpenVINO, adapters in kilobytes, and what opens them."""
