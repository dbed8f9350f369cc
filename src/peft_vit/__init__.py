"""peft-vit: which layers of a Vision Transformer deserve rank, how much, and how many bits can go."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_vit.allocation.adalora_controller import AdaLoRAController
    from peft_vit.api import load_results, train, tune
    from peft_vit.config import AdaLoraConfig, QaLoraConfig
    from peft_vit.training.adaptive_bits import allocate_bits
    from peft_vit.training.qa_lora import QALoRATrainer

__all__ = [
    "AdaLoRAController",
    "AdaLoraConfig",
    "QALoRATrainer",
    "QaLoraConfig",
    "allocate_bits",
    "load_results",
    "train",
    "tune",
]

_HOME = {
    "AdaLoRAController": "peft_vit.allocation.adalora_controller",
    "QALoRATrainer": "peft_vit.training.qa_lora",
    "AdaLoraConfig": "peft_vit.config",
    "QaLoraConfig": "peft_vit.config",
    "allocate_bits": "peft_vit.training.adaptive_bits",
    "load_results": "peft_vit.api",
    "train": "peft_vit.api",
    "tune": "peft_vit.api",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import peft_vit` and the command line's --help need no torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("peft-vit")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'peft_vit' has no attribute {name!r}")
