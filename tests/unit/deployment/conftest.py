"""A small timm model whose layers are quantized and carry filled adapters, ready to be merged and exported."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from peft_vit.adapters import adapted_modules, attach_adapters
from peft_vit.backbones import find_sites
from peft_vit.deployment import ModelCard
from peft_vit.quantization import QuantizationFormat, quantize

CARD = ModelCard(
    run="study/experiment/seed_0",
    model="test_vit",
    weights_name="none",
    weights_sha256=None,
    image_size=32,
    channels=3,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.25),
    class_names=("a", "b", "c", "d", "e"),
)


@pytest.fixture
def card() -> ModelCard:
    return CARD


@pytest.fixture
def quantized_vit(fill_adapters: Callable[[nn.Module], None]) -> Callable[..., nn.Module]:
    """Make timm's test_vit with every site quantized and adapted; pool is the group size, or 1 without groups."""

    def make(format: QuantizationFormat, seed: int = 0, std: float = 0.1) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = timm.create_model(CARD.model, img_size=CARD.image_size, num_classes=len(CARD.class_names))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        sites = find_sites(model)
        attach_adapters(
            model,
            sites,
            dict.fromkeys((site.name for site in sites), 2),
            scale=1.5,
            seed=seed,
            pool=format.group_size or 1,
        )
        fill_adapters(model, std=std)  # type: ignore[call-arg]
        for _, module in adapted_modules(model):
            assert module.weight is not None
            module.set_quantized(quantize(module.weight, format))
            module.drop_float()
        return model.eval()

    return make
