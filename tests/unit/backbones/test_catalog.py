"""The catalog: shapes without weights."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import timm
import torch
from torch.overrides import TorchFunctionMode

from peft_vit.core.backbones import MODELS, Architecture, Backbone, describe, native_size, size_step_of
from peft_vit.core.backbones.catalog import build_model, create_skeleton
from peft_vit.core.config import BackboneConfig

ROWS = Path(__file__).parents[3] / "benchmarks" / "results" / "backbones.csv"
LISTED = {
    row["model"]: row["module"]
    for row in csv.DictReader(ROWS.read_text(encoding="utf-8").splitlines())
    if row["module"] != "transformers"
}
ONE_A_FAMILY = {module: name for name, module in LISTED.items()}
# Found by tokens, and the step of their sizes: some take no size but their own; patches of 14 px merged two by two.
OTHERS = {
    "davit_tiny": 32,
    "pvt_v2_b0": 32,
    "cait_xxs24_224": 32,
    "crossvit_9_240": 240,
    "efficientformer_l1": 224,
    "deepseek_vit_412m": 56,
}


def _config(model: str) -> BackboneConfig:
    return BackboneConfig(model=model, weights="random")


@pytest.mark.parametrize("name", list(MODELS))
def test_every_listed_model_can_be_adapted_and_has_hub_weights(name: str) -> None:
    shape = describe(_config(name), 112)
    blocks = shape.sites[-1].layer + 1
    assert len(shape.sites) == (7 if name.startswith("eva02") else 6) * blocks  # a gated MLP has three matrices
    assert timm.get_pretrained_cfg(name).hf_hub_id.startswith(f"timm/{name}.")


def test_parameters_by_hand() -> None:
    """DeiT-Ti has 5,717,416 parameters with its head of 1,000 classes; ViT-S/14 is counted here."""
    tiny = describe(_config("deit_tiny_patch16_224"), 224)
    assert (tiny.sites[0].in_features, len(tiny.sites)) == (192, 72)
    assert tiny.parameters == 5_717_416 - 1000 * (192 + 1)
    small = describe(_config("vit_small_patch14_dinov2"), 84)
    assert (small.sites[0].in_features, len(small.sites)) == (384, 72)
    width, hidden, tokens = 384, 1536, 1 + 6 * 6
    norm, scale = 2 * width, width
    block = 2 * norm + 2 * scale + 4 * width * (width + 1) + hidden * (width + 1) + width * (hidden + 1)
    assert small.parameters == 12 * block + width * (3 * 14 * 14 + 1) + width + tokens * width + norm


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deit_small_patch16_224", 4.6),  # arXiv 2012.12877
        ("swin_tiny_patch4_window7_224", 4.5),  # arXiv 2103.14030, table 1
        ("hiera_tiny_224", 4.9),  # arXiv 2306.00989, table 2
    ],
)
def test_multiply_adds_are_the_published_ones(name: str, billions: float) -> None:
    shape = describe(_config(name), 224)
    assert shape.multiply_adds / 1e9 == pytest.approx(billions, abs=0.051)
    of_sites = sum(site.tokens * site.in_features * site.out_features for site in shape.sites)
    assert 0.9 * shape.multiply_adds < of_sites < shape.multiply_adds  # the rest is attention, and patches


def test_values_at_the_matrices_by_hand() -> None:
    """Of a plain block 16 a token and width; Swin's stages have 2, 2, 6, 2 blocks, and a merge between two of them."""
    tokens, width = (112 // 16) ** 2 + 1, 192
    assert sum(describe(_config("deit_tiny_patch16_224"), 112).values_by_block) == 12 * 16 * tokens * width
    blocks = sum(n * 16 * 56**2 // 4**stage * 96 * 2**stage for stage, n in enumerate((2, 2, 6, 2)))
    merges = sum(56**2 // 4**stage * 96 * 2 ** (stage - 1) * (4 + 2) for stage in (1, 2, 3))
    assert sum(describe(_config("swin_tiny_patch4_window7_224"), 224).values_by_block) == blocks + merges


FAST = {*ONE_A_FAMILY.values(), *OTHERS}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in {**LISTED, **OTHERS}]
)
def test_a_model_takes_the_sizes_that_are_chosen(name: str) -> None:
    architecture = Architecture("timm", name)
    step, native = size_step_of(architecture), native_size(architecture)
    for size in {max(step, -(-64 // step) * step), max(step, (native - 1) // step * step), native}:
        with torch.device("meta"):
            model = build_model(architecture, size, 2).eval()
            logits = model(torch.zeros(1, *Backbone(model).input_size))  # (1, 3, S, S) -> (1, 2)
        assert logits.shape == (1, 2), size


def test_a_model_whose_stages_divide_images_has_no_sizes_of_a_few_pixels() -> None:
    assert {name: size_step_of(Architecture("timm", name)) for name in OTHERS} == OTHERS


class Called(TorchFunctionMode):
    """Names what PyTorch is asked to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_is_drawn_for_a_model_without_memory() -> None:
    """Whose weights come from a file: shapes of what fills a matrix are computed in Python, 30 ms for each model."""
    draws = {"uniform_", "normal_", "erfinv_", "clamp_"}
    with Called() as whole:
        build_model(Architecture("timm", "test_vit"), 32, 5)
    assert draws & whole.names
    with Called() as called:
        create_skeleton(Architecture("timm", "test_vit"), 32, 5)
    assert not draws & called.names
