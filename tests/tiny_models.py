"""Tiny models: one of each way in which timm's families hold matrices, random values, a site, a card."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import SwiGLUPacked
from timm.models import register_model
from timm.models.beit import _create_beit
from timm.models.deit import _create_deit
from timm.models.eva import _cfg, _create_eva, _dinov3_cfg
from timm.models.hiera import _create_hiera
from timm.models.naflexvit import NaFlexVitCfg, _create_naflexvit
from timm.models.swin_transformer import _create_swin_transformer
from timm.models.swin_transformer_v2 import _create_swin_transformer_v2
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    _create_vision_transformer,
)
from timm.models.vision_transformer_hybrid import ConvStem, _create_vision_transformer_hybrid
from torch import nn

from peft_vit.core.backbones import Architecture, Site
from peft_vit.core.backbones.catalog import create_model
from peft_vit.deploy import ExportMetadata

TINY_EVAS = ("tiny_dinov3", "tiny_eva02", "tiny_eva02_fused")
_ROW: dict[str, Any] = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
_EVA = {**_ROW, "use_rot_pos_emb": True}
_EVA02 = {**_EVA, "swiglu_mlp": True, "ref_feat_shape": (4, 4)}
_STAGES: dict[str, Any] = {
    "patch_size": 4,
    "embed_dim": 32,
    "num_heads": (1, 2),
    "depths": (2, 2),
    "img_size": 32,
    "mlp_ratio": 2,
}
_PARALLEL: dict[str, Any] = {"class_token": False, "global_pool": "avg", "qkv_bias": False}


def _hybrid(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    stem = ConvStem(channels=(16, 64), depth=2, kernel_size=(4, 2), stride=(4, 2), padding=0)
    settings = {**_ROW, "patch_size": 1, "embed_args": {"proj": False}}
    return _create_vision_transformer_hybrid(name, stem, pretrained=pretrained, **settings | kwargs)


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "tiny_hybrid": _hybrid,
    "tiny_swiglu": partial(_create_vision_transformer, **_ROW | {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}),
    "tiny_pool": partial(_create_vision_transformer, **_ROW, class_token=False, global_pool="map"),
    "tiny_branches": partial(_create_vision_transformer, **_ROW, block_fn=ParallelThingsBlock),
    "tiny_parallel": partial(_create_vision_transformer, **_ROW | _PARALLEL, block_fn=ParallelScalingBlock),
    "tiny_difference": partial(_create_vision_transformer, **_ROW | _PARALLEL, block_fn=DiffParallelScalingBlock),
    "tiny_beit": partial(_create_beit, **_ROW, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1),
    "tiny_swin": partial(_create_swin_transformer, **_STAGES, window_size=4),
    "tiny_swin_v2": partial(_create_swin_transformer_v2, **_STAGES, window_size=4),
    "tiny_hiera": partial(
        _create_hiera, embed_dim=32, num_heads=1, stages=(1, 2), q_pool=1, img_size=32, mask_unit_size=(4, 4)
    ),
    "tiny_distilled": partial(_create_deit, **_ROW, distilled=True),
    "tiny_naflex": partial(_create_naflexvit, cfg=NaFlexVitCfg(**_ROW, global_pool="avg", reg_tokens=2)),
    "tiny_dinov3": partial(  # fused query, key and value without bias, registers, rotary positions
        _create_eva,
        **_EVA,
        dynamic_img_size=True,
        qkv_bias=False,
        init_values=1.0,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        use_abs_pos_emb=False,
        num_reg_tokens=4,
        use_fc_norm=False,
    ),
    # As EVA-02 base: query, key, value, gate and up are modules of their own.
    "tiny_eva02": partial(_create_eva, **_EVA02, qkv_fused=False, scale_mlp=True),
    # As EVA-02 small: query, key and value fused with the bias beside, gate and up fused too.
    "tiny_eva02_fused": partial(_create_eva, **_EVA02),
}
TINY_FAMILIES = (*_BUILDERS,)


def _register(name: str, build: Callable[..., nn.Module]) -> None:
    def make(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        config = kwargs.pop("pretrained_cfg", None) or (_dinov3_cfg() if name == "tiny_dinov3" else _cfg())
        return build(name, pretrained, pretrained_cfg=config, **kwargs)

    make.__name__ = make.__qualname__ = name
    register_model(make)


for _name, _build in _BUILDERS.items():
    _register(_name, _build)
# timm's test_vit with two or four of its six blocks: torch's exporter takes a third of the time.
_SHALLOW: dict[str, Any] = {"patch_size": 16, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 3}
for _name, _depth in {"shallow_vit": 2, "four_blocks": 4}.items():
    _settings = _SHALLOW | {"depth": _depth}
    _register(_name, partial(_create_vision_transformer, **_settings, dynamic_img_size=True))


def random_model(name: str) -> nn.Module:
    """Make a model of timm by name, for 32 px and 5 classes; all its values are random, biases and norms too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = create_model(Architecture("timm", name), 32, 5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


CARD = ExportMetadata(  # of random_model("test_vit")
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
SHALLOW_CARD = CARD.model_copy(update={"model": "shallow_vit"})


def loose_site(kind: str, rows: tuple[int, int], in_features: int) -> Site:
    """Return a site on rows of a layer that is no part of a model."""
    name = f"blocks.0.attn.{kind}"
    return Site(name, "blocks.0.attn.qkv", rows, 0, kind, "attention", in_features, rows[1] - rows[0], tokens=5)
