"""PEFT loads what we export, and we load what PEFT saves: the same logits, and training goes on."""

import copy
import json
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from peft_vit.base.errors import SilentNoEffectWarning, UserError
from peft_vit.core.adapters import (
    adapter_bytes,
    attach_adapters,
    current_ranks,
    freeze_backbone,
    load_trained,
    merged_state_dict,
    resize_adapters,
    site_adapters,
)
from peft_vit.core.adapters.peft_format import BASE_FILE, CONFIG_FILE, TENSORS_FILE, export_peft, import_peft
from peft_vit.core.backbones import find_sites
from peft_vit.core.quantization import QuantizationFormat, quantize

peft = pytest.importorskip("peft")

TOLERANCE = 1e-5
BASE = {"weights_name": "of a test", "weights_sha256": None}
UNEVEN = (0, 3, 1, 2, 0, 4, 2)  # by site in turn: some modules get no rank, some qkv get it for two of three


def logits(model, batch):
    with torch.inference_mode():
        return model.eval()(batch[0])


def ours_with(tiny_vit, fill_adapters, ranks, *, depth=2, parametrization="product"):
    """Return our model with random factors and a head unlike the base's."""
    model = tiny_vit(depth=depth)
    sites = find_sites(model)
    named = {site.name: ranks[index % len(ranks)] for index, site in enumerate(sites)}
    gain = {"lambda_gain": 3.0} if parametrization == "svd" else {}
    attach_adapters(model, sites, named, scale=1.7, seed=0, parametrization=parametrization, **gain)
    fill_adapters(model, std=0.5 if parametrization == "svd" else 0.2)
    with torch.no_grad():
        model.head.weight.mul_(-1.5)
    return model


@pytest.mark.parametrize("parametrization", ["product", "svd"])
@pytest.mark.parametrize(
    ("ranks", "depth"), [((2,), 2), (UNEVEN, 2), ((1, 2, 3), 6), ((0,), 2)], ids=["equal", "uneven", "deep", "none"]
)
def test_peft_gives_the_same_logits(tiny_vit, fill_adapters, batch, tmp_path, ranks, depth, parametrization) -> None:
    ours = ours_with(tiny_vit, fill_adapters, ranks, depth=depth, parametrization=parametrization)
    expected = logits(ours, batch)
    assert (expected - logits(tiny_vit(depth=depth), batch)).abs().max() > 0.1
    export_peft(ours, tmp_path, BASE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that it misses or can't place
        theirs = peft.PeftModel.from_pretrained(tiny_vit(depth=depth), tmp_path)
    torch.testing.assert_close(logits(theirs, batch), expected, rtol=0, atol=TOLERANCE)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(dict(merged.named_parameters()), merged_state_dict(ours), rtol=0, atol=TOLERANCE)


def test_query_key_value_equal_a_block_diagonal_lora_on_the_fused_matrix(tiny_vit, batch, fill_adapters) -> None:
    rank, scale = 3, 1.5
    ours = tiny_vit()
    attach_adapters(ours, find_sites(ours, ("query", "key", "value")), rank, scale=scale, seed=0)
    fill_adapters(ours)
    config = peft.LoraConfig(r=3 * rank, lora_alpha=scale * 3 * rank, lora_dropout=0.0, target_modules=r".*attn\.qkv")
    theirs = peft.get_peft_model(tiny_vit(), config)
    adapters = site_adapters(ours)
    with torch.no_grad():
        for block in range(2):
            three = [adapters[f"blocks.{block}.attn.{matrix}"] for matrix in ("query", "key", "value")]
            layer = theirs.base_model.model.blocks[block].attn.qkv
            layer.lora_A.default.weight.copy_(torch.cat([adapter.lora_A for adapter in three]))
            layer.lora_B.default.weight.copy_(torch.block_diag(*(adapter.lora_B for adapter in three)))
    outputs = [model(batch[0]) for model in (ours, theirs)]
    for output in outputs:
        F.cross_entropy(output, batch[1]).backward()
    torch.testing.assert_close(*outputs, rtol=0, atol=TOLERANCE)
    for block in range(2):
        layer = theirs.base_model.model.blocks[block].attn.qkv
        for index, matrix in enumerate(("query", "key", "value")):
            adapter, span = adapters[f"blocks.{block}.attn.{matrix}"], slice(index * rank, (index + 1) * rank)
            rows = slice(64 * index, 64 * (index + 1))
            expected = layer.lora_B.default.weight.grad[rows, span]
            torch.testing.assert_close(
                adapter.lora_A.grad, layer.lora_A.default.weight.grad[span], rtol=0, atol=TOLERANCE
            )
            torch.testing.assert_close(adapter.lora_B.grad, expected, rtol=0, atol=TOLERANCE)


def test_a_linear_probe_is_a_head_alone(tiny_vit, batch, tmp_path) -> None:
    ours = tiny_vit()
    freeze_backbone(ours)
    with torch.no_grad():
        ours.head.weight.mul_(-2)
    export_peft(ours, tmp_path, BASE)
    assert set(load_file(tmp_path / TENSORS_FILE)) == {"base_model.model.head.weight", "base_model.model.head.bias"}
    assert json.loads((tmp_path / BASE_FILE).read_text()) == BASE
    theirs = peft.PeftModel.from_pretrained(tiny_vit(), tmp_path)
    torch.testing.assert_close(logits(theirs, batch), logits(ours, batch), rtol=0, atol=TOLERANCE)
    restored = tiny_vit()
    import_peft(restored, tmp_path)
    torch.testing.assert_close(logits(restored, batch), logits(ours, batch), rtol=0, atol=0)


def test_what_peft_cannot_express_is_refused(tiny_vit, fill_adapters, tmp_path) -> None:
    with pytest.raises(UserError, match="cls_token was trained too"):
        export_peft(tiny_vit(), tmp_path, BASE)
    pooled = tiny_vit()
    attach_adapters(pooled, find_sites(pooled), 2, scale=1.0, seed=0, pool=16)
    with pytest.raises(UserError, match="quantized weight"):
        export_peft(pooled, tmp_path, BASE)
    packed = ours_with(tiny_vit, fill_adapters, (2,))
    layer = packed.blocks[1].mlp.fc1
    layer.set_quantized(quantize(layer.weight, QuantizationFormat("int8", group_size=32, offset=True)))
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.fc1 belongs to a quantized weight"):
        export_peft(packed, tmp_path, BASE)
    with pytest.raises(UserError, match="num_classes"):
        export_peft(tiny_vit(num_classes=0), tmp_path, BASE)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="holds files already"):
        export_peft(ours_with(tiny_vit, fill_adapters, (2,)), tmp_path, BASE)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def saved_by_peft(model, folder, *, std=0.1, **settings):
    """Save a PEFT adapter with random factors and head; return PEFT's model."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["qkv", "attn.proj", "fc1", "fc2"], **settings}
    theirs = peft.get_peft_model(model, peft.LoraConfig(**{"modules_to_save": ["head"], **settings}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(folder)
    return theirs


SETTINGS = {
    "usual": {},
    "fused qkv alone": {"target_modules": ["qkv"]},
    "rank-stabilized": {"use_rslora": True},
    "a regular expression for targets": {"target_modules": r"blocks\.1\..*(qkv|fc2)"},
    "no head": {"modules_to_save": None},
    "patterns": {
        "rank_pattern": {"^blocks.0.mlp.fc1": 5, "fc1": 2, "blocks.1.attn.qkv": 7},
        "alpha_pattern": {"qkv": 2.5, "^mlp.fc2": 99.0, "1.attn.qkv": 15.0},
    },
    "patterns, rank-stabilized": {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"qkv": 2.5}, "use_rslora": True},
    "gaussian start": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_logits_after_import_are_those_of_peft(tiny_vit, batch, tmp_path, settings) -> None:
    saved_by_peft(tiny_vit(), tmp_path, **settings)
    ours = tiny_vit()
    import_peft(ours, tmp_path)
    # Loaded, not the trained one: PEFT sorts the patterns in the file, which may change the first that hits.
    expected = logits(peft.PeftModel.from_pretrained(tiny_vit(), tmp_path), batch)
    assert (expected - logits(tiny_vit(), batch)).abs().max() > 0.1
    torch.testing.assert_close(logits(ours, batch), expected, rtol=0, atol=TOLERANCE)


def test_qkv_is_one_site_and_the_patch_embedding_none(tiny_vit, tmp_path) -> None:
    saved_by_peft(tiny_vit(), tmp_path, r=4)
    ours = tiny_vit()
    import_peft(ours, tmp_path)
    names = ("attn.qkv", "attn.out", "mlp.fc1", "mlp.fc2")
    assert current_ranks(ours) == {f"blocks.{block}.{name}": 4 for block in range(2) for name in names}
    trainable = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert all(".sites." in name or name.startswith("head.") for name in trainable)
    with pytest.raises(UserError, match="already carries adapters"):
        import_peft(ours, tmp_path)


def test_an_imported_adapter_resizes_saves_and_goes_back_to_peft(tiny_vit, batch, tmp_path) -> None:
    saved_by_peft(tiny_vit(), tmp_path / "theirs")
    ours = tiny_vit()
    import_peft(ours, tmp_path / "theirs")
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-3)
    F.cross_entropy(ours(batch[0]), batch[1]).backward()
    optimizer.step()
    before = logits(ours, batch)
    scores = {name: torch.ones(adapter.rank) for name, adapter in site_adapters(ours).items()}
    resize_adapters(ours, optimizer, {"blocks.0.attn.qkv": 5}, scores)
    torch.testing.assert_close(logits(ours, batch), before, rtol=1e-6, atol=1e-6)

    (tmp_path / "ours.safetensors").write_bytes(adapter_bytes(ours, {}))
    restored = tiny_vit()
    import_peft(restored, tmp_path / "theirs")
    load_trained(restored, tmp_path / "ours.safetensors")
    torch.testing.assert_close(logits(restored, batch), logits(ours, batch), rtol=0, atol=0)

    export_peft(ours, tmp_path / "back", BASE)
    theirs = peft.PeftModel.from_pretrained(tiny_vit(), tmp_path / "back")
    torch.testing.assert_close(logits(theirs, batch), logits(ours, batch), rtol=0, atol=TOLERANCE)


def test_dropout_is_left_out_loudly(tiny_vit, tmp_path) -> None:
    saved_by_peft(tiny_vit(), tmp_path, lora_dropout=0.25)
    with pytest.warns(SilentNoEffectWarning, match=r"lora_dropout 0\.25"):
        import_peft(tiny_vit(), tmp_path)


# What is put into the configuration, the field that the one line must name, and a part of what it must say.
BAD_SETTINGS = {
    "dora": ({"use_dora": True}, "use_dora", "not supported"),
    "bias": ({"bias": "all"}, "bias", "not supported"),
    "lora bias": ({"lora_bias": True}, "lora_bias", "not supported"),
    "fan in": ({"fan_in_fan_out": True}, "fan_in_fan_out", "not supported"),
    "from the future": ({"use_magic": 0.5}, "use_magic", "not supported"),
    "another type": ({"peft_type": "ADALORA"}, "peft_type", "LORA"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights", "pissa"),
    "rank 0": ({"r": 0}, "r", "greater than or equal to 1"),
    "a rank of text": ({"r": "8"}, "r", "integer"),
    "another rank": ({"r": 2}, "lora_A.weight", "expected shape (2, 64), got (3, 64)"),
    "a huge rank": ({"r": 10**18}, "lora_A.weight", "expected shape"),
    "infinite alpha": ({"lora_alpha": math.inf}, "lora_alpha", "finite"),
    "alpha NaN": ({"alpha_pattern": {"qkv": math.nan}}, "alpha_pattern", "finite"),
    "slow expression": ({"alpha_pattern": {"(.*)*x": 1.0}}, "alpha_pattern", "pattern"),
    "expression": ({"rank_pattern": {"blocks.[01].mlp.fc1": 3}}, "rank_pattern", "pattern"),
    "other targets": ({"target_modules": ["qkv"]}, "target_modules", "blocks.0.attn.proj"),
    "no targets": ({"target_modules": None}, "target_modules", ""),
    "another module saved": ({"modules_to_save": ["head", "norm"]}, "modules_to_save", "head"),
    "head not named": ({"modules_to_save": None}, "head.bias", "modules_to_save"),
    "a field with lines": ({"a\nb\x1b[31m": 1}, "a\\nb\\x1b", "not supported"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Return the files of a PEFT adapter: configuration and tensors."""
    from timm.models.vision_transformer import VisionTransformer

    folder = tmp_path_factory.mktemp("good")
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    saved_by_peft(VisionTransformer(**shape, num_classes=5), folder)
    return json.loads((folder / CONFIG_FILE).read_text()), load_file(folder / TENSORS_FILE)


def refusal(model, folder, config, tensors):
    """Import and return the line of refusal, after checking that the model was left as it was."""
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file(tensors, folder / TENSORS_FILE)
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(UserError) as raised:
        import_peft(model, folder)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    line = str(raised.value)
    assert line.isprintable()
    return line


@pytest.mark.parametrize("fault", BAD_SETTINGS)
def test_settings_that_change_the_model_are_refused_by_name(tiny_vit, tmp_path, good, fault) -> None:
    change, field, said = BAD_SETTINGS[fault]
    line = refusal(tiny_vit(), tmp_path, good[0] | change, good[1])
    assert str(tmp_path) in line
    assert CONFIG_FILE in line
    assert field in line
    assert said in line


QKV_A, HEAD = "base_model.model.blocks.0.attn.qkv.lora_A.weight", "base_model.model.head.weight"
BAD_TENSORS = {
    "a factor is missing": (lambda t: t.pop(QKV_A), QKV_A, "is missing"),
    "not finite": (lambda t: t[QKV_A].fill_(math.nan), QKV_A, "not finite"),
    "whole numbers": (lambda t: t.update({QKV_A: torch.ones(3, 64, dtype=torch.int32)}), QKV_A, "not floating-point"),
    "another width": (lambda t: t.update({QKV_A: torch.ones(3, 32)}), QKV_A, "expected shape (3, 64), got (3, 32)"),
    "another head": (lambda t: t.update({HEAD: torch.ones(9, 64)}), HEAD, "reset_classifier"),
    "head is missing": (lambda t: t.pop(HEAD), HEAD, "is missing"),
    "patch embedding": (
        lambda t: t.update({"base_model.model.patch_embed.proj.lora_A.weight": torch.ones(3, 3, 8, 8)}),
        "patch_embed.proj.lora_A",
        "no place here",
    ),
    "a block too many": (
        lambda t: t.update({QKV_A.replace("blocks.0", "blocks.2"): torch.ones(3, 64)}),
        "blocks.2",
        "no place here",
    ),
    "a path for a name": (lambda t: t.update({"../../etc/\x1b[0m\n": torch.ones(1)}), "../../etc/\\x1b", "no place"),
    "a private attribute": (
        lambda t: t.update({"base_model.model.__class__.lora_A.weight": torch.ones(1)}),
        "__class__",
        "no place here",
    ),
}


@pytest.mark.parametrize("fault", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(tiny_vit, tmp_path, good, fault) -> None:
    change, field, said = BAD_TENSORS[fault]
    tensors = {name: tensor.clone() for name, tensor in good[1].items()}
    change(tensors)
    line = refusal(tiny_vit(), tmp_path, good[0], tensors)
    assert str(tmp_path / TENSORS_FILE) in line
    assert field in line
    assert said in line


@pytest.mark.parametrize("content", ["", "[]", "3", "{", "[" * 100_000, "\x00", '{"peft_type": "LORA"}', None])
def test_no_configuration(tiny_vit, tmp_path, content) -> None:
    if content is not None:
        (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(UserError, match=CONFIG_FILE):
        import_peft(tiny_vit(), tmp_path)


def test_only_safetensors_is_read(tiny_vit, tmp_path, good) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps(good[0]))
    torch.save(good[1], tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"\.bin file is not read"):
        import_peft(tiny_vit(), tmp_path)
    (tmp_path / "adapter_model.bin").rename(tmp_path / TENSORS_FILE)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        import_peft(tiny_vit(), tmp_path)


def test_half_precision_files_become_float32(tiny_vit, batch, tmp_path, good) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps(good[0]))
    save_file({name: tensor.bfloat16() for name, tensor in good[1].items()}, tmp_path / TENSORS_FILE)
    ours, theirs = tiny_vit(), peft.PeftModel.from_pretrained(tiny_vit(), tmp_path)
    import_peft(ours, tmp_path)
    assert {adapter.lora_A.dtype for adapter in site_adapters(ours).values()} == {torch.float32}
    torch.testing.assert_close(logits(ours, batch), logits(theirs, batch), rtol=0, atol=TOLERANCE)
