"""A small timm model whose layers are quantized and carry filled adapters, ready to be merged and exported."""

from collections.abc import Callable

import pytest
from tiny_models import CARD, random_model
from torch import nn

from peft_vit.adapters import adapted_modules, attach_adapters
from peft_vit.backbones import find_sites
from peft_vit.deployment import ModelCard
from peft_vit.quantization import QuantizationFormat, quantize


@pytest.fixture
def card() -> ModelCard:
    return CARD


@pytest.fixture
def quantized_vit(fill_adapters: Callable[[nn.Module], None]) -> Callable[[QuantizationFormat], nn.Module]:
    """Make timm's test_vit with every site quantized and adapted; updates are pooled over groups."""

    def make(format: QuantizationFormat) -> nn.Module:
        model = random_model("test_vit")
        attach_adapters(model, find_sites(model), 2, scale=1.5, seed=0, pool=format.group_size or 1)
        fill_adapters(model)
        for _, module in adapted_modules(model):
            assert module.weight is not None
            module.set_quantized(quantize(module.weight, format))
            module.drop_float()
        return model.eval()

    return make
