"""What a PyTorch user imports: backbones, adapters, allocation, quantization, tasks, methods, the training loop."""
