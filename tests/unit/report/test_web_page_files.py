"""The folder and the one file of a page that asks a model: what is in them, and what is refused."""

import base64
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from html import unescape
from importlib import resources
from itertools import product
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image
from tiny_models import CARD

from peft_vit.base.errors import UserError
from peft_vit.core.records import Calibrated, Unlike
from peft_vit.data import to_pixels
from peft_vit.deploy.page import web_page
from peft_vit.deploy.page.web_page import runtime_files, write_web_page

RUNTIME = {name: name.encode() for name in web_page._RUNTIME}
CALIBRATED = Calibrated(images=60, temperature=2.0, coverages=(0.8, 0.95), thresholds=(0.4, 0.7))


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take small files for those of onnxruntime-web."""
    hashes = {name: base64.b64encode(hashlib.sha384(content).digest()).decode() for name, content in RUNTIME.items()}
    monkeypatch.setattr(web_page, "_RUNTIME", {name: f"sha384-{digest}" for name, digest in hashes.items()})


def handed_over(script: str) -> dict[str, bytes]:
    """Return the files in a script."""
    found = re.findall(r'"([^"]+)": "([^"]+)"', script)
    return {name: gzip.decompress(base64.b64decode(packed)) for name, packed in found}


def facts_in(page: str) -> dict[str, object]:
    (text,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', page)
    facts: dict[str, object] = json.loads(text)
    return facts


def test_a_folder_holds_the_page_the_model_and_the_runtime(tmp_path: Path) -> None:
    card = CARD.model_copy(
        update={"calibrated": CALIBRATED, "unlike": Unlike(images=40, threshold=1.5), "interpolation": "lanczos"}
    )
    page = write_web_page(tmp_path / "web", b"the model", card, RUNTIME)
    assert page == tmp_path / "web" / "index.html"
    assert {file.name for file in page.parent.iterdir()} == {"index.html", "model.js", "runtime.js"}
    assert handed_over((page.parent / "model.js").read_text()) == {"model.onnx": b"the model"}
    assert handed_over((page.parent / "runtime.js").read_text()) == RUNTIME
    text = page.read_text()
    facts = facts_in(text)
    assert facts.pop("runtime")["url"] is None  # type: ignore[index]
    of_card = card.model_dump(mode="json", include={"run", "model", "channels", "interpolation", "mean", "std"})
    assert facts == of_card | {
        "classes": [*"abcde"],
        "size": 32,
        "resize": "squash",
        "ground": [124, 116, 104],
        "pillow": int(PIL.__version__.split(".")[0]),
        "temperature": 2.0,
        "kind": "classes",
        "says": "which of {} classes it is of",
        "set": {"coverage": 0.9, "threshold": 0.7},
        "unlike": 1.5,
    }
    assert "The set at 90 % holds the true class of about 90 in 100 images, if they are like those" in text
    assert "connect-src 'none'" in unescape(text)
    assert "jsdelivr" not in text.partition("<script")[0]


def test_one_file_allows_its_own_scripts_and_the_pinned_files_alone(tmp_path: Path) -> None:
    names = ("</script><script>alert(1)</script>", "b", "c", "d", "e")
    page = write_web_page(tmp_path / "a.html", b"model", CARD.model_copy(update={"class_names": names}), None)
    assert [file.name for file in tmp_path.iterdir()] == ["a.html"]
    text = page.read_text()
    facts = facts_in(text)
    assert facts["classes"] == [*names]
    assert (facts["temperature"], facts["set"], facts["unlike"]) == (1.0, None, None)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', text)
    for script in scripts:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    (connects,) = re.findall(r"connect-src (.*?);", policy)
    urls = connects.split()
    assert [url.rpartition("/")[2] for url in urls] == list(RUNTIME)
    assert all(url.startswith("https://cdn.jsdelivr.net/npm/onnxruntime-web@1.") for url in urls)
    again = page.read_bytes()
    write_web_page(tmp_path / "a.html", b"model", CARD.model_copy(update={"class_names": names}), None)
    assert page.read_bytes() == again, "nothing in it tells the time"


def test_the_sets_that_a_model_has_no_thresholds_for_are_left_out(tmp_path: Path) -> None:
    few = CALIBRATED.model_copy(update={"coverages": (), "thresholds": ()})
    page = write_web_page(tmp_path / "a.html", b"model", CARD.model_copy(update={"calibrated": few}), None)
    assert facts_in(page.read_text())["set"] is None


@pytest.mark.usefixtures("pinned")
@pytest.mark.parametrize("place", ["", "dist"])
def test_the_runtime_comes_out_of_a_folder_or_npms_package(tmp_path: Path, monkeypatch, place: str) -> None:
    (tmp_path / place).mkdir(exist_ok=True)
    for name, content in RUNTIME.items():
        (tmp_path / place / name).write_bytes(content)
    assert runtime_files(tmp_path) == RUNTIME
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as tar:
        for name, content in RUNTIME.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(web_page, "fetch_npm", lambda _: tmp_path / "package.tgz")
    assert runtime_files(None) == RUNTIME


@pytest.mark.parametrize("content", [None, b"another version"])
def test_a_folder_without_the_runtime_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / next(iter(RUNTIME))
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as refused:
        runtime_files(tmp_path)
    assert (refused.value.file, refused.value.field) == (str(file), "--runtime-files")


@pytest.mark.parametrize(("place", "size"), [("page.html", 2_000_001), ("file/page.html", 1)])
def test_what_can_not_become_a_page_is_refused(tmp_path: Path, monkeypatch, place: str, size: int) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(web_page, "LARGEST_MB", 1)
    with pytest.raises(UserError) as refused:
        write_web_page(tmp_path / place, bytes(size), CARD, None)
    assert refused.value.file == str(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node.js to run the page's script")
@pytest.mark.parametrize("pillow", [12, 13])
def test_the_script_s_pixels_are_those_of_the_pillow_that_exported_it(pillow: int, tmp_path: Path) -> None:
    """Of another version than the one that is installed they are made here axis by axis, in its order."""
    script = resources.files("peft_vit.deploy.page").joinpath("templates", "web.js").read_text(encoding="utf-8")
    prepare = re.search(r"const sinc = .*?(?=// --- what it says)", script, re.DOTALL)
    assert prepare is not None
    rng, size, cases = np.random.default_rng(0), 32, []
    for width, height in [(50, 300), (300, 50), (40, 100), (64, 96), (64, 97), (16, 40), (32, 40), (20, 20)]:
        for interpolation in ("bilinear", "bicubic", "lanczos"):
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
            columns_first = pillow >= 13 and height > size and height - size > 2 * (width - size)
            between, resampling = (
                (width, size) if columns_first else (size, height),
                Image.Resampling[interpolation.upper()],
            )
            expected = np.asarray(image.resize(between, resampling).resize((size, size), resampling))
            if pillow == int(PIL.__version__.partition(".")[0]):
                assert np.array_equal(np.asarray(image.resize((size, size), resampling)), expected)
            facts = {"size": size, "channels": 3, "interpolation": interpolation, "pillow": pillow, "resize": "squash"}
            rgba = np.asarray(image.convert("RGBA")).ravel().tolist()
            bitmap = {"width": width, "height": height, "rgba": rgba}
            cases.append((facts | {"mean": [0, 0, 0], "std": [1, 1, 1]}, bitmap, expected))
    for resize, sides in product(("letterbox", "crop"), [(50, 300), (300, 50), (33, 64), (64, 35), (32, 35), (37, 32)]):
        if pillow == int(PIL.__version__.partition(".")[0]):
            image = Image.fromarray(rng.integers(0, 256, (*sides, 3), np.uint8))
            bitmap = {"width": sides[1], "height": sides[0], "rgba": np.asarray(image.convert("RGBA")).ravel().tolist()}
            facts = cases[1][0] | {"resize": resize, "ground": [124, 116, 104]}
            cases.append((facts, bitmap, to_pixels(image, size, 3, "bicubic", resize)))
    (tmp_path / "cases.json").write_text(json.dumps([case[:2] for case in cases]))
    (tmp_path / "page.js").write_text(
        "const STRIP = 1 << 22, ONE = 1 << 22; let facts;\n"
        "const context = { fillRect() {}, drawImage(bitmap, x, y) { this.bitmap = bitmap; },\n"
        "  getImageData() { return { data: this.bitmap.rgba }; } };\n"
        f"const document = {{ createElement: () => ({{ getContext: () => context }}) }};\n{prepare[0]}\n"
        "const cases = JSON.parse(require('fs').readFileSync(process.argv[2]));\n"
        "const told = cases.map(([own, bitmap]) => { facts = own; return Array.from(prepared(bitmap)); });\n"
        "console.log(JSON.stringify(told));\n"
    )
    told = subprocess.run(
        ["node", tmp_path / "page.js", tmp_path / "cases.json"], capture_output=True, check=True, text=True
    ).stdout
    for values, (facts, bitmap, expected) in zip(json.loads(told), cases, strict=True):
        pixels = np.rint(255 * np.array(values)).reshape(3, size, size).transpose(1, 2, 0)
        assert np.array_equal(pixels, expected), (facts, bitmap["width"], bitmap["height"])
