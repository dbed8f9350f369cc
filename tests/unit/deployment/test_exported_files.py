"""What holds for a file of every format: it is the model, says what it is, and is refused when anything was changed."""

import html
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_files import compared, damaged, packed_model, signed_onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform, resolve_data_config
from tiny_models import SHALLOW_CARD as CARD
from tiny_models import random_model
from torch import nn

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import attach_adapters
from peft_vit.core.backbones import find_sites
from peft_vit.core.config import EXPORTS
from peft_vit.core.quantization import QuantizationFormat
from peft_vit.core.records import Decision, Unlike
from peft_vit.deploy import (
    ExportMetadata,
    export_onnx,
    export_openvino,
    open_exported,
    predict_images,
    torch_classifier,
    writer_of,
)
from peft_vit.deploy.formats.header import HEADER, UNSIGNED, Header
from peft_vit.deploy.formats.runtimes import openvino_content
from peft_vit.deploy.predicting import prepared

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("openvino")
NAMES = [name for name, kind in EXPORTS.items() if kind.ending]
Written = tuple[nn.Module, dict[str, Path]]


def write(model: nn.Module, name: str, folder: Path) -> Path:
    file = folder / f"model{EXPORTS[name].ending}"
    writer_of(name)(model, file, CARD, None)
    return file


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    packed = [QuantizationFormat("int4", 32, True, torch.float16)]
    model, folder = packed_model(packed, random_model("shallow_vit")), tmp_path_factory.mktemp("files")
    return model, {name: write(model, name, folder) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_the_model_says_and_what_it_is(written: Written, tmp_path: Path, name: str) -> None:
    model, files = written
    assert compared(model, files[name], 3)[0] <= (1e-3 if name == "openvino" else 1e-5)
    assert open_exported(files[name]).card == CARD
    plain = random_model("shallow_vit").eval()
    assert compared(plain, write(plain, name, tmp_path), 3)[0] <= 1e-5


@pytest.mark.parametrize("resize", ["letterbox", "crop"])
def test_every_file_says_how_images_become_square(tmp_path: Path, resize: str) -> None:
    model, card = random_model("shallow_vit").eval(), CARD.model_copy(update={"resize": resize})
    images = [*np.random.default_rng(0).integers(0, 256, (3, 30, 80, 3), np.uint8)]
    expected = [p.probability for p in predict_images(torch_classifier(model, card), images)]
    assert expected != [p.probability for p in predict_images(torch_classifier(model, CARD), images)]
    for name in [*NAMES, "pretrained"]:
        file = tmp_path / f"{name}{EXPORTS[name].ending}"
        writer_of(name)(model, file, card, None)
        assert [p.probability for p in predict_images(open_exported(file), images)] == pytest.approx(expected, 1e-3)
    image = Image.fromarray(images[0])
    timms = create_transform(**resolve_data_config(json.loads((file / "config.json").read_text())["pretrained_cfg"]))
    rows, columns = slice(None), slice(None)
    if resize == "letterbox":  # its bars have the model's mean, ours ImageNet's
        rows = slice(10, 22)
    ours = prepared(images[0], card)[:, rows, columns]
    np.testing.assert_allclose(timms(image)[:, rows, columns], ours, atol=1e-5)


def signed_again(file: Path, folder: Path, card: ExportMetadata) -> Path:
    """Write a file for another runtime with another card and its hash, as anybody can who wants to be believed."""
    header, content, again = Header(card=card), file.read_bytes(), folder / file.name
    if file.suffix == ".onnx":
        again.write_bytes(signed_onnx(content, card))
        return again
    weights = file.with_suffix(".bin").read_bytes()
    (own,) = re.findall(rb'<%b value="([^"]*)"' % HEADER.encode(), content)
    unsigned = content.replace(own, html.escape(header.model_dump_json()).encode())
    digest = header.signed(openvino_content(unsigned, weights)).sha256
    again.write_bytes(unsigned.replace(UNSIGNED.encode(), digest.encode()))
    again.with_suffix(".bin").write_bytes(weights)
    return again


MULTILABEL = {"task": "multilabel", "class_names": tuple("abcde")}
SETS = {"images": 30, "thresholds": (0.5,) * 5, "coverages": (0.8, 0.9), "set_thresholds": (0.4,)}


@pytest.mark.parametrize(
    "change",
    [
        {"class_names": tuple("abcdefg")},
        {"class_names": tuple("ab")},
        {"image_size": 48},
        {"unlike": Unlike(images=40, threshold=1.0)},
        MULTILABEL,
        MULTILABEL | {"decision": Decision(images=30, thresholds=(0.5,) * 3)},
        MULTILABEL | {"decision": Decision.model_construct(**SETS)},
        {"task": "regression", "decision": Decision(images=9, center=(1.0,) * 3, spread=(1.0,) * 3)},
    ],
)
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_a_card_that_is_not_its_model_s_is_refused_in_one_line(
    written: Written, tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    file = signed_again(written[1][name], tmp_path, CARD.model_copy(update=change))
    with pytest.raises(UserError) as refused:
        predict_images(open_exported(file), [np.zeros((40, 40, 3), np.uint8)])
    assert refused.value.file == str(file)
    assert "was changed" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_adapters_is_refused(tmp_path: Path, name: str) -> None:
    model = random_model("shallow_vit")
    attach_adapters(model, find_sites(model, ("out",)), 2, scale=1.0, seed=0)
    with pytest.raises(UserError, match="merge the model first"):
        write(model, name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("export", "kind", "group", "fault"),
    [
        (export_onnx, "int4", 8, r"qkv has groups of 8 inputs"),
        (export_openvino, "fp4", 32, r"qkv is in fp4.*export onnx or safetensors"),
    ],
)
def test_a_format_that_a_runtime_lacks_is_refused(tmp_path: Path, export, kind: str, group: int, fault: str) -> None:
    with pytest.raises(UserError, match=rf"blocks\.0\.attn\.{fault}"):
        export(packed_model([QuantizationFormat(kind, group, True)]), tmp_path / "model.xml", CARD)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in NAMES if EXPORTS[name].extra])
def test_a_library_is_an_extra(written: Written, tmp_path: Path, without, name: str) -> None:
    without(EXPORTS[name].runtime)
    for call in (lambda: write(written[0], name, tmp_path), lambda: open_exported(written[1][name])):
        with pytest.raises(UserError, match=re.escape(f"pip install 'peft-vit[{EXPORTS[name].extra}]'")):
            call()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_cut_or_altered_file_is_refused(written: Written, tmp_path: Path, name: str, data) -> None:
    source = written[1][name]
    parts = [source.with_suffix(ending) for ending in (EXPORTS[name].ending, *EXPORTS[name].beside)]
    spoiled = data.draw(st.sampled_from(parts))
    for part in parts:
        content = part.read_bytes()
        (tmp_path / part.name).write_bytes(damaged(content, data) if part == spoiled else content)
    with pytest.raises(UserError, match=rf"{re.escape(source.name)}") as refused:
        open_exported(tmp_path / source.name)
    assert "\n" not in str(refused.value)


def test_a_folder_of_timm_is_the_model_and_refused_when_a_file_in_it_was_changed(tmp_path: Path) -> None:
    model, folder = random_model("shallow_vit").eval(), tmp_path / "folder"
    writer_of("pretrained")(model, folder, CARD, None)
    assert compared(model, folder, 3)[0] <= 1e-5
    assert open_exported(folder).card == CARD
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        file.write_bytes(content.replace(b"0.3", b"0.4", 1) if file.suffix == ".json" else content[:-1] + b"!")
        with pytest.raises(UserError, match=r"folder: was changed after it was written"):
            open_exported(folder)
        file.unlink()
        with pytest.raises(UserError):
            open_exported(folder)
        file.write_bytes(content)
    assert len(list(folder.iterdir())) == 3


def test_a_missing_half_is_named(written: Written, tmp_path: Path) -> None:
    (tmp_path / "model.xml").write_bytes(written[1]["openvino"].read_bytes())
    with pytest.raises(UserError, match=r"model\.bin: can't be read"):
        open_exported(tmp_path / "model.xml")


@pytest.mark.parametrize("suffix", ["", *(EXPORTS[name].ending for name in NAMES)])
@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "nowhere", "pipe"])
def test_names_and_pipes_that_could_not_be_opened(tmp_path: Path, name: str, suffix: str) -> None:
    if name == "pipe":
        os.mkfifo(tmp_path / f"pipe{suffix}")
    with pytest.raises(UserError):
        open_exported(tmp_path / f"{name}{suffix}")
