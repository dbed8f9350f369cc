"""Shards as of webdataset: found, labelled, divided, read in place, shared by processes, and refused in one line."""

import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from trained_together import together

from peft_vit.base.errors import UserError
from peft_vit.core.config import DataConfig
from peft_vit.core.tasks import TASKS
from peft_vit.core.training import processes
from peft_vit.data import existing, find_images, load_data, open_index
from peft_vit.data.files import expanded_braces
from peft_vit.data.inspection.inspect import inspect_images

pytestmark = pytest.mark.part("runner")


def png(number: int) -> bytes:
    """Return a picture that no other number has."""
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)).save(content, "png")
    return content.getvalue()


def write(file: Path, members: dict[str, bytes | str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            data = content.encode() if isinstance(content, str) else content
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def samples(start: int, count: int, suffix: str = ".cls", label=lambda k: str(k % 2)) -> dict[str, bytes | str]:
    """Return members of samples of two classes."""
    numbers = range(start, start + count)
    return {name: part for k in numbers for name, part in ((f"{k:04}.png", png(k)), (f"{k:04}{suffix}", label(k)))}


def config(path: Path | str, **more) -> DataConfig:
    asked = {"image_size": 32, "validation_images": 4, "test_images": 4, **more}
    return DataConfig(dataset="webdataset", path=str(path), **asked)


@pytest.mark.parametrize(
    ("suffix", "label", "names"),
    [
        (".cls", lambda k: str(k % 2), ("0", "1")),
        (".cls", lambda k: ("cat", "dog")[k % 2], ("cat", "dog")),
        (".txt", lambda k: f"{('cat', 'dog')[k % 2]}\n", ("cat", "dog")),
        (".json", lambda k: json.dumps({"label": k % 2, "width": 16}), ("0", "1")),
        (".json", lambda k: json.dumps({"class": ("cat", "dog")[k % 2]}), ("cat", "dog")),
    ],
)
def test_labels_and_images_of_shards(cache, tmp_path, suffix, label, names) -> None:
    for at in (0, 1):
        write(tmp_path / f"a-{at}.tar", samples(6 * at, 6, suffix, label))
    index = open_index(config(tmp_path / "*.tar"))
    assert index.class_names == names
    assert index.labels.tolist() == [k % 2 for k in range(12)]
    assert index.official_test is None
    for k in range(12):
        expected = Image.open(io.BytesIO(png(k)))
        assert (np.asarray(index.read(k)) == np.asarray(expected)).all()
    assert index.names[7] == "a-1.tar/0007.png"


def test_the_library_datasets_reads_the_same_samples(cache, tmp_path) -> None:
    load_dataset = pytest.importorskip("datasets").load_dataset
    files = [str(write(tmp_path / f"{at}.tar", samples(5 * at, 5))) for at in (0, 1)]
    rows = load_dataset("webdataset", data_files=files, split="train", streaming=True)
    index = open_index(config(tmp_path))  # the folder stands for all in it
    theirs = [(np.asarray(row["png"]), int(row["cls"])) for row in rows]
    assert len(theirs) == len(index.labels) == 10
    for k, (pixels, label) in enumerate(theirs):
        assert (pixels == np.asarray(index.read(k))).all()
        assert label == int(index.class_names[index.labels[k]])


@pytest.mark.parametrize(
    ("shards", "tested"),
    [
        (("set-train-00", "set-test-00"), 1),
        (("train/00", "val/00"), 1),
        (("train-0", "val-0", "test-0"), 2),
        (("latest-0", "testing1"), None),  # no words of their own
        (("test-0", "test-1"), None),  # nothing would train
    ],
)
def test_shards_that_are_called_test_are_the_test_split(cache, tmp_path, shards, tested) -> None:
    for at, name in enumerate(shards):
        write(tmp_path / f"{name}.tar", samples(4 * at, 4))
    index = open_index(config(tmp_path / "**/*.tar", test_images=4 if tested is None else None))
    of_test = None if tested is None else {shards[tested]}
    if of_test is None:
        assert index.official_test is None
    else:
        held = {
            name.rpartition(".tar/")[0] for name, test in zip(index.names, index.official_test, strict=True) if test
        }
        assert held == of_test


def test_several_labels_and_braces(cache, tmp_path) -> None:
    for at in (8, 9, 10):
        write(
            tmp_path / f"s-{at:03}.tar", samples(at, 4, ".json", lambda k: json.dumps({"label": ["a", "b"][: k % 3]}))
        )
    images = find_images(existing(f"{tmp_path}/s-{{008..009}}.tar"), "multilabel")
    assert (images.task, len(images.classes)) == (TASKS["multilabel"], 8)
    assert expanded_braces("{a,b}-{08..10}") == ["a-08", "a-09", "a-10", "b-08", "b-09", "b-10"]


def test_samples_that_cannot_be_used_are_left_out(cache, tmp_path) -> None:
    odd = {
        "a.png": png(90),
        "b.cls": "1",
        "c.png": png(91),
        "c.jpg": png(92),
        "c.cls": "0",
        "._d.png": b"",
        "e.json": "{",
    }
    write(tmp_path / "x.tar", {**samples(0, 12), **odd, "f.png": png(93), "f.json": "{"})
    found = inspect_images(tmp_path / "x.tar", least=2)
    assert set(found.left_out) == {"x.tar/a.png", "x.tar/b", "x.tar/c", "x.tar/e", "x.tar/f.png"}
    assert len(found.names) == 12
    with pytest.raises(UserError):  # a study says exactly what it takes
        open_index(config(tmp_path / "x.tar"))


def _mixed(file: Path) -> None:
    write(file, samples(0, 4) | samples(4, 4, label=lambda _: "cat"))


def _truncated(file: Path) -> None:
    write(file, samples(0, 8))
    file.write_bytes(file.read_bytes()[:2000])


def _overwritten(file: Path) -> None:
    write(file, samples(0, 8))
    content = bytearray(file.read_bytes())
    content[content.index(b"0003.png")] ^= 255  # the header's checksum is another
    file.write_bytes(content)


def _gzipped(file: Path) -> None:
    write(file, samples(0, 8))
    file.write_bytes(gzip.compress(file.read_bytes()))


@pytest.mark.parametrize(
    "spoil",
    [
        _mixed,
        _truncated,
        _overwritten,
        _gzipped,
        lambda file: write(file, {f"{k}.png": png(k) for k in range(4)}),
        lambda file: write(file, {f"{k}.cls": "1" for k in range(4)}),
        lambda file: write(file, {f"{k}.{side}.png": png(k) for k in range(4) for side in "ab"}),
        lambda file: write(file, {"../0.png": png(0), "../0.cls": "1"}),
        lambda file: write(file, {}),
        lambda file: file.write_bytes(b"no tar at all"),
        lambda file: None,
    ],
)
def test_what_is_wrong_with_shards_is_one_line(cache, tmp_path, spoil) -> None:
    spoil(tmp_path / "a.tar")
    with pytest.raises(UserError) as refused:
        find_images(existing(f"{tmp_path}/*.tar"))
    assert len(str(refused.value).splitlines()) == 1
    assert refused.value.file is not None


def test_a_shard_that_changes_is_read_again(cache, tmp_path) -> None:
    file = write(tmp_path / "a.tar", samples(0, 8))
    before = open_index(config(file)).sha256
    write(file, samples(0, 7) | samples(50, 1))
    assert open_index(config(file)).sha256 != before
    write(tmp_path / "b" / "a.tar", samples(0, 8))
    assert open_index(config(tmp_path / "b" / "a.tar")).sha256 == before


def test_each_image_is_of_one_process_once_an_epoch(cache, tmp_path) -> None:
    for at, count in enumerate((3, 20, 14)):  # as no process could share them out
        write(tmp_path / f"{at}.tar", samples(20 * at, count))
    parts = together(_epoch, 2, tmp_path, str(tmp_path / "*.tar"))
    assert all(0 < len(part) < 29 for part in parts)
    data = load_data(config(tmp_path / "*.tar"), 0)
    assert sorted([*parts[0], *parts[1]]) == sorted(map(_mark, data.train.pixels))


def _epoch(path: str) -> list[float]:
    data, seen = load_data(config(path), 0), []
    assert processes.count() == 2
    for batch, _ in data.train.shuffled_batches(5, (0, 0, 0), (1, 1, 1), augmentation=(), seed=3, epoch=1):
        seen += [_mark(255 * image.permute(1, 2, 0).numpy()) for image in batch]
    return seen


def _mark(pixels: np.ndarray) -> float:
    return round(float((pixels.astype(np.float64) * np.arange(pixels.size).reshape(pixels.shape)).mean()), 1)


def test_shards_elsewhere_are_fetched_once(cache, tmp_path) -> None:
    far = MemoryFileSystem()
    for at in (0, 1):
        far.pipe(f"/bucket/train/{at}.tar", write(tmp_path / "a.tar", samples(8 * at, 8)).read_bytes())
    index = open_index(config("memory://bucket/*/*.tar"))
    assert index.names[8] == "train/1.tar/0008.png"
    far.rm("/bucket", recursive=True)
    assert open_index(config(Path("memory://bucket/*/*.tar"))).sha256 == index.sha256  # a path has lost a slash
    shutil.rmtree(cache)
    for address in ("memory://bucket/*.tar", "memory://bucket/a.tar", "nothing://bucket/a.tar"):
        with pytest.raises(UserError) as refused:
            open_index(config(address))
        assert refused.value.field == "data.path"
