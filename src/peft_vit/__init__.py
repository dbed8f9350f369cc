"""peft-vit: small, accurate image classifiers from a folder of labelled images, with LoRA, AdaLoRA and QA-LoRA."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_vit import integrations
    from peft_vit.api import TrainedModel, embed, load, load_results, train, tune
    from peft_vit.classifier import ViTClassifier
    from peft_vit.core.allocation.adalora_controller import AdaLoRAController
    from peft_vit.core.config import AdaLoraConfig, QaLoraConfig
    from peft_vit.core.training.adaptive_bits import allocate_bits
    from peft_vit.core.training.qa_lora import QALoRATrainer
    from peft_vit.deploy.bundle import Bundle

__all__ = [
    "AdaLoRAController",
    "AdaLoraConfig",
    "Bundle",
    "QALoRATrainer",
    "QaLoraConfig",
    "TrainedModel",
    "ViTClassifier",
    "allocate_bits",
    "embed",
    "load",
    "load_results",
    "train",
    "tune",
]

_HOME = {
    "AdaLoRAController": "core.allocation.adalora_controller",
    "QALoRATrainer": "core.training.qa_lora",
    "AdaLoraConfig": "core.config",
    "Bundle": "deploy.bundle",
    "QaLoraConfig": "core.config",
    "TrainedModel": "api",
    "ViTClassifier": "classifier",
    "allocate_bits": "core.training.adaptive_bits",
    "embed": "api",
    "load": "api",
    "load_results": "api",
    "train": "api",
    "tune": "api",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import peft_vit` and the command line's --help need no torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("peft-vit")
    if name == "integrations":
        return import_module("peft_vit.integrations")
    if name in _HOME:
        return getattr(import_module(f"peft_vit.{_HOME[name]}"), name)
    raise AttributeError(f"module 'peft_vit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__", "integrations"]
