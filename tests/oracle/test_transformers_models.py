"""Models of transformers: what this package makes of their folders, against transformers itself."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tiny_transformers
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import adapted_modules, attach_adapters, site_adapters
from peft_vit.core.adapters.attach import effects
from peft_vit.core.adapters.peft_format import export_peft
from peft_vit.core.backbones import Architecture, LoadedBackbone, find_sites, load_backbone, native_size
from peft_vit.core.backbones.families.transformers_models import TOWERS
from peft_vit.core.config import BackboneConfig
from peft_vit.core.quantization import QuantizationFormat, quantize
from peft_vit.deploy import (
    ExportMetadata,
    export_onnx,
    load_low_bit,
    load_pretrained,
    merge,
    open_exported,
    save_low_bit,
    save_pretrained,
)
from peft_vit.deploy.formats.torch_files import open_peft
from peft_vit.deploy.predicting import prepared


def loaded(model: Path | str, image_size: int = 32, **others: object) -> LoadedBackbone:
    settings = {"library": "transformers", "model": str(model), "weights": "file"} | others
    return load_backbone(BackboneConfig.model_validate(settings), image_size=image_size, num_classes=5, seed=0)


def images(image_size: int = 32) -> Tensor:
    return torch.randn(3, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))


def card_of(backbone: LoadedBackbone, image_size: int = 32) -> ExportMetadata:
    return ExportMetadata(
        run="study/experiment/seed_0",
        library="transformers",
        model=backbone.architecture.name,
        config=backbone.architecture.config,
        weights_name=backbone.weights_name,
        weights_sha256=backbone.weights_sha256,
        image_size=image_size,
        channels=3,
        mean=backbone.mean,
        std=backbone.std,
        class_names=("a", "b", "c", "d", "e"),
    )


def by_transformers(original: nn.Module, kind: str, x: Tensor, head: nn.Linear) -> Tensor:
    """Return the logits of transformers' own forward pass, with a head instead of its own or on its pooled output."""
    call = {"pixel_values": x, "interpolate_pos_encoding": True}
    if kind.startswith("siglip2"):
        patches = [image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 3, 4, 0).reshape(-1, 192) for image in x]
        grid = x.shape[-1] // 8
        call = {
            "pixel_values": torch.stack(patches),
            "pixel_attention_mask": torch.ones(len(x), grid**2, dtype=torch.int32),
            "spatial_shapes": torch.tensor([[grid, grid]] * len(x)),
        }
    if kind in TOWERS:
        return head(original(**call).pooler_output)
    original.classifier = head
    return original(**call).logits


@pytest.mark.parametrize("image_size", [32, 64])
@pytest.mark.parametrize("kind", tiny_transformers.TYPES)
def test_logits_are_those_of_transformers(kind: str, image_size: int, tmp_path: Path) -> None:
    original = tiny_transformers.folder_of(kind, tmp_path)
    backbone = loaded(tmp_path, image_size)
    model = backbone.model.eval()
    with torch.inference_mode():
        expected = by_transformers(original, kind, images(image_size), model.classifier)
        torch.testing.assert_close(model(images(image_size)), expected, rtol=1e-5, atol=1e-6)
    assert backbone.mean == tiny_transformers.MEAN
    assert backbone.std == tiny_transformers.STD
    assert backbone.weights_name == f"folder {tmp_path.name}"


@pytest.mark.parametrize("kind", tiny_transformers.TYPES)
def test_every_matrix_is_a_site_and_acts_and_nothing_is_drawn_in_training(kind: str, tmp_path: Path) -> None:
    tiny_transformers.folder_of(kind, tmp_path)
    model = loaded(tmp_path).model.train()
    before = torch.get_rng_state()
    assert torch.equal(model(images()), model(images()))
    assert torch.equal(torch.get_rng_state(), before)
    sites = find_sites(model)
    kinds = {site.kind for site in sites}
    assert kinds == {"query", "key", "value", "out", "fc1", "fc2"} | ({"reduction"} if "swin" in kind else set())
    blocks = 4 if "swin" in kind else 2
    assert len(sites) == 6 * blocks + ("swin" in kind)
    assert {site.layer for site in sites} == set(range(blocks))
    attach_adapters(model, sites, 2, scale=1.0, seed=0)
    assert not [name for name, effect in effects(model).items() if effect.fault]


def trained(folder: Path, kind: str, image_size: int = 32) -> tuple[LoadedBackbone, Tensor]:
    """Return a model with filled adapters on all sites, and its logits."""
    tiny_transformers.folder_of(kind, folder)
    backbone = loaded(folder, image_size)
    attach_adapters(backbone.model, find_sites(backbone.model), 2, scale=1.0, seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in site_adapters(backbone.model).values():
            adapter.lora_B.copy_(0.2 * torch.randn(adapter.lora_B.shape, generator=generator))
    backbone.model.eval()
    with torch.inference_mode():
        return backbone, backbone.model(images(image_size))


@pytest.mark.parametrize("kind", ["vit", "dinov3_vit", "siglip2", "swin"])
def test_what_is_written_loads_without_this_package_and_computes_the_same(kind: str, tmp_path: Path) -> None:
    size = 64
    backbone, logits = trained(tmp_path / "base", kind, size)
    card = card_of(backbone, size)
    merged = merge(backbone.model, card).model
    save_pretrained(merged, tmp_path / "merged", card)
    said = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())
    assert (said["image_mean"], said["image_std"]) == (list(card.mean), list(card.std))
    with torch.inference_mode():
        if kind in TOWERS:
            tower = transformers.AutoModel.from_pretrained(tmp_path / "merged")
            head = nn.Linear(32, 5)
            head.load_state_dict(load_file(tmp_path / "merged" / "head.safetensors"))
            again = by_transformers(tower.eval(), kind, images(size), head)
        else:
            whole = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
            assert whole.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}
            again = by_transformers(whole, kind, images(size), whole.classifier)
        torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(load_pretrained(tmp_path / "merged", card)(images(size)), again)


@pytest.mark.parametrize("resize", [None, "letterbox", "crop"])
def test_its_processor_makes_images_square_as_training_did(resize: str | None, tmp_path: Path) -> None:
    tiny_transformers.folder_of("vit", tmp_path / "base")
    backbone = loaded(tmp_path / "base", 64)
    card = card_of(backbone, 64).model_copy(update={"resize": resize, "interpolation": "bilinear"})
    save_pretrained(backbone.model, tmp_path / "merged", card)
    grey = np.add.outer(np.linspace(0, 100, 90), np.linspace(0, 150, 200)).astype(np.uint8)
    image = np.stack([grey] * 3, 2)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "merged")(image, return_tensors="np")
    rows = slice(19, 44) if resize == "letterbox" else slice(64)  # its bars have the model's mean, ours ImageNet's
    gaps = 255 * (theirs["pixel_values"][0] - prepared(image, card)) * np.array(card.std)[:, None, None]
    assert np.abs(gaps[:, rows]).max() < (4 if resize == "letterbox" else 2)  # of 255


def test_peft_reads_the_adapter_over_the_model_of_transformers(tmp_path: Path) -> None:
    backbone, logits = trained(tmp_path / "base", "dinov2")
    export_peft(backbone.model, tmp_path / "adapter", {})
    base = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(pixel_values=images()).logits, logits, rtol=1e-5, atol=1e-5)


def test_an_exported_adapter_is_put_on_the_model_that_it_was_trained_on(tmp_path: Path) -> None:
    """A configuration that was changed since, with as many weights, would make another model."""
    backbone, logits = trained(tmp_path / "base", "vit")
    export_peft(backbone.model, tmp_path / "adapter", card_of(backbone).model_dump(mode="json"))
    changed(tmp_path / "base", num_attention_heads=4)
    again = open_peft(tmp_path / "adapter", str(tmp_path / "base"))
    torch.testing.assert_close(torch.from_numpy(again.logits(images().numpy())), logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "siglip2", "swin"])
def test_onnxruntime_computes_the_same(kind: str, tmp_path: Path) -> None:
    backbone, logits = trained(tmp_path / "base", kind)
    card = card_of(backbone)
    export_onnx(merge(backbone.model, card).model, tmp_path / "model.onnx", card)
    opened = open_exported(tmp_path / "model.onnx")
    assert opened.card == card
    torch.testing.assert_close(torch.from_numpy(opened.logits(images().numpy())), logits, rtol=1e-4, atol=1e-4)


def test_packed_weights_come_back_without_the_folder_that_they_came_from(tmp_path: Path) -> None:
    backbone, _ = trained(tmp_path / "base", "vit")
    for _, module in adapted_modules(backbone.model):
        assert module.weight is not None
        module.set_quantized(quantize(module.weight, QuantizationFormat("int4", None, False, torch.float16)))
        module.drop_float()
    card = card_of(backbone)
    merged = merge(backbone.model, card).model
    save_low_bit(merged, tmp_path / "model.safetensors", card)
    for file in (tmp_path / "base").iterdir():
        file.unlink()
    again, read = load_low_bit(tmp_path / "model.safetensors")
    assert read == card
    with torch.inference_mode():
        torch.testing.assert_close(again(images()), merged(images()))


def changed(folder: Path, name: str = "config.json", **settings: object) -> None:
    """Change a folder's configuration."""
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def without_last_mlp(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (name,) = [name for name in tensors if ".1." in name and name.endswith("intermediate.dense.weight")]  # fc1, on disk
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda _: {"weights": "hub"}, "is a folder; its weights come from its file"),
        (lambda _: {"model": "nowhere/at-all"}, "is not a folder; name one that save_pretrained wrote"),
        (lambda _: {"sha256": "0" * 64}, "the configuration expects 0000"),
        (lambda _: {"model": "/nowhere/model", "weights": "hub"}, r"/nowhere/model: .* is not a folder"),
        (lambda _: {"model": "/nowhere/model", "weights": "random"}, r"/nowhere/model: .* is not a folder"),
        (lambda _: {"model": "a/b", "weights": "hub"}, "could not get a/b from the hub .* name a folder"),
        (lambda _: {"model": "bert", "weights": "random"}, "bert is not a Vision Transformer"),
        (lambda _: {"model": "resnet", "weights": "random"}, "ResNetForImageClassification has no linear layer in a"),
        (lambda folder: (folder / "config.json").unlink(), r"backbone\.model: holds no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: .* is not the configuration"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "holds no preprocessor_config.json"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("[]"), "is not an image processor"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "can't be read as weights"),
        (lambda folder: changed(folder, num_channels=1), "takes images of 1 channels; expected a model of the three"),
        (lambda folder: changed(folder, auto_map={"AutoConfig": "own.Config"}), "of its own .*, which is never"),
        (without_last_mlp, r"lacks tensors .* vit\.layers\.1\.mlp\.fc1\.weight"),
    ],
)
def test_refused_in_a_line(spoil, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_transformers.folder_of("vit", tmp_path)
    changes = spoil(tmp_path)
    with pytest.raises(UserError, match=fault) as caught:
        loaded(**{"model": tmp_path} | (changes if isinstance(changes, dict) else {}))
    assert "\n" not in str(caught.value)


def with_own_code(folder: Path, name: str, kind: str) -> Path:
    """Make a folder's model one of somebody's own code, and return the file that this makes where it is run."""
    mark = folder.parent / "ran"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Own: pass\n")
    changed(folder, name, auto_map={kind: "own.Own"}, model_type="own", image_processor_type="OwnProcessor")
    return mark


@pytest.mark.parametrize(
    ("name", "kind"), [("config.json", "AutoConfig"), ("preprocessor_config.json", "AutoImageProcessor")]
)
def test_a_model_s_own_code_is_never_run_whatever_is_answered(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    tiny_transformers.folder_of("vit", tmp_path / "base")
    mark = with_own_code(tmp_path / "base", name, kind)
    with pytest.raises(UserError, match=rf"{name}: .* names Python code of its own \(auto_map\)"):
        loaded(tmp_path / "base")
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["vit", "dinov3_vit"])
def test_an_exported_folder_s_own_code_is_never_run_whatever_is_answered(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: "y")
    backbone, _ = trained(tmp_path / "base", kind)
    folder, card = tmp_path / "merged", card_of(backbone)
    save_pretrained(merge(backbone.model, card).model, folder, card)
    mark = with_own_code(folder, "config.json", "AutoConfig")
    names = ("config.json", "head.safetensors", "model.safetensors", "preprocessor_config.json")
    files = [(name, folder / name) for name in names if (folder / name).exists()]
    lines = [card.model_dump_json(), *(f"{name} {sha256(file.read_bytes()).hexdigest()}" for name, file in files)]
    signed = {"version": 1, "card": json.loads(lines[0]), "sha256": sha256("\n".join(lines).encode()).hexdigest()}
    (folder / "peft_vit.json").write_text(json.dumps(signed))
    with pytest.raises(UserError, match=r"config\.json: .* names Python code of its own \(auto_map\)"):
        open_exported(folder)
    assert not mark.exists()


def test_nothing_beside_the_hashed_files_is_read(tmp_path: Path) -> None:
    backbone, logits = trained(tmp_path / "base", "vit")
    folder, card = tmp_path / "merged", card_of(backbone)
    save_pretrained(merge(backbone.model, card).model, folder, card)
    whole = transformers.AutoModelForImageClassification.from_pretrained(folder)
    adapted = get_peft_model(whole, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)  # which transformers adds when it loads the folder
    with torch.inference_mode():
        torch.testing.assert_close(load_pretrained(folder, card)(images()), logits, rtol=1e-5, atol=1e-5)
    processor = {"image_processor": {"image_processor_type": "ViTImageProcessor", "image_mean": [0.9] * 3}}
    (tmp_path / "base" / "processor_config.json").write_text(json.dumps(processor))
    assert loaded(tmp_path / "base").mean == tiny_transformers.MEAN


def test_attention_from_the_hub_is_not_asked_for(tmp_path: Path) -> None:
    backbone, logits = trained(tmp_path / "base", "vit")
    card = card_of(backbone)
    assert card.config is not None
    content = json.loads(card.config)
    content["config"]["attn_implementation"] = "somebody/attention"
    card = card.model_copy(update={"config": json.dumps(content)})
    save_low_bit(merge(backbone.model, card).model, tmp_path / "model.safetensors", card)
    model, _ = load_low_bit(tmp_path / "model.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(model(images()), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"config": {"model_type": "vit", "patch_size": 0}},
        {"config": {"model_type": "vit", "hidden_act": "nothing"}},
        {"config": {"model_type": "vit", "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1001}},
        {"config": {"model_type": "swin", "embed_dim": 4, "num_heads": [1, 1], "depths": [1, 1000]}},
        {"images": {}},
        {"images": {"mean": [0] * 3, "std": [1] * 3, "interpolation": "bicubic", "side": "wide"}},
    ],
)
def test_a_card_of_a_model_that_can_t_be_built_is_refused_in_one_line(change: dict[str, Any]) -> None:
    images = {"mean": [0] * 3, "std": [1] * 3, "interpolation": "bicubic"}
    content = {"config": {"model_type": "vit"}, "images": images} | change
    with pytest.raises(UserError, match=r"can.t build a/model|a/model has more than 1000 layers"):
        native_size(Architecture("transformers", "a/model", json.dumps(content)))


@pytest.mark.parametrize("act", [find_sites, lambda model: attach_adapters(model, [], 2, scale=1.0, seed=0)])
def test_a_model_that_transformers_has_loaded_is_refused_with_what_to_do(act) -> None:
    with pytest.raises(UserError, match=r"ViTForImageClassification .* load_backbone\(BackboneConfig\(library='transf"):
        act(tiny_transformers.model_of("vit"))


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cached folder of the hub, in two shards, without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--somebody--vit"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    tiny_transformers.folder_of("vit", folder).save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*"))) == 2
    return folder


def test_a_model_of_the_hub_comes_from_its_cache(on_the_hub: Path, tmp_path: Path) -> None:
    backbone = loaded("somebody/vit", weights="hub")
    assert backbone.weights_name == "hub somebody/vit"
    theirs = transformers.AutoModelForImageClassification.from_pretrained(on_the_hub).state_dict()
    for name, tensor in backbone.model.state_dict().items():
        if not name.startswith("classifier"):
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)


@pytest.mark.parametrize("file", ["preprocessor_config.json", "model-00002-of-00002.safetensors"])
def test_what_is_cached_in_part_is_asked_of_the_hub(file: str, on_the_hub: Path) -> None:
    (on_the_hub / file).unlink()
    with pytest.raises(UserError, match="could not get somebody/vit from the hub"):
        loaded("somebody/vit", weights="hub")
