"""`review` lists labels that models doubt, and `similar` the nearest images; each is computed again, slowly."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tuned import choice_of, write_images

from peft_vit.data import ImageIndex, images_file, inspect_images
from peft_vit.fit.review import review_labels

pytestmark = pytest.mark.usefixtures("cache")
MODEL = ("--model", "test_vit", "--weights", "random", "--image-size", "32")


@pytest.fixture
def labelled(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder, and copy the images there, one of them with a wrong label, one broken."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(images, "photos")
    Path("photos/class_0/15.png").rename("photos/class_1/wrong.png")
    Path("photos/class_2/broken.png").write_text("no image")
    shutil.copy("photos/class_2/07.png", "photos/class_2/copy.png")
    return Path("photos")


def rows_of(file: str) -> list[dict[str, str]]:
    with Path("peft-vit-review", "tables", file).open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_the_wrong_label_comes_first_and_no_test_label_is_ranked(command, labelled: Path) -> None:
    said = command("review", labelled, *MODEL, "--top", 3)
    ranked, checked = rows_of("review_labels.csv"), rows_of("review_test_labels.csv")
    assert ranked[0]["file"] == "class_1/wrong.png"
    assert ranked[0]["believed"] == "class_0"
    probabilities = [float(row["probability"]) for row in ranked]
    assert probabilities == sorted(probabilities)
    assert not {row["file"] for row in ranked} & {row["file"] for row in checked}
    doubted = sum(row["believed"] != row["label"] for row in ranked)
    assert len(checked) == min(3, doubted)
    shown = re.findall(r"^ class_\S+ +class_\d +(\d+\.\d) % +class_", said.out, re.MULTILINE)
    assert shown == [f"{100 * probability:.1f}" for probability in probabilities[: len(shown)]] != []
    assert said.out.startswith(f"{doubted} of {len(ranked)} labels are less probable than another class.\n")
    assert "  class_2/broken.png: is not an image of a known format" in said.out
    assert {row["file"] for row in rows_of("review_copies.csv")} == {"class_2/07.png", "class_2/copy.png"}
    page = Path("peft-vit-review/report.html").read_text()
    assert page.count("<figure><img") == min(3, doubted) + len(checked) + 2


def test_probabilities_are_those_of_a_loop_over_images() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (30, 4)), rng.integers(0, 4, 40)
    test = np.arange(40) >= 30
    index = ImageIndex(labels, tuple("abcd"), test, "", lambda _: Image.new("L", (1, 1)))
    (table, positions), *_ = review_labels((index, np.arange(30), logits), 5).shown

    def shares(i: int, t: float) -> list[float]:
        exponents = [math.exp(value / t) for value in logits[i]]
        return [one / sum(exponents) for one in exponents]

    temperatures = np.geomspace(0.1, 100, 4000)
    nll = [sum(-math.log(shares(i, t)[labels[i]]) for i in range(30)) for t in temperatures]
    best = temperatures[int(np.argmin(nll))]
    of_labels = [shares(i, best)[labels[i]] for i in range(30)]
    order = sorted(range(30), key=of_labels.__getitem__)
    assert positions == [i for i in order if logits[i].argmax() != labels[i]][:5]
    assert [row["probability"] for row in table.data] == pytest.approx(sorted(of_labels), abs=0.01)


def test_the_order_is_cleanlabs_of_self_confidence() -> None:
    rank = pytest.importorskip("cleanlab.rank")
    rng = np.random.default_rng(1)
    p, labels = rng.dirichlet(np.ones(4), 50), rng.integers(0, 4, 50)
    index = ImageIndex(labels, tuple("abcd"), None, "", lambda _: Image.new("L", (1, 1)))
    (table, _), *_ = review_labels((index, np.arange(50), np.log(p)), 5).shown
    calibrated = p ** (1 / index.task.temperature(torch.from_numpy(np.log(p)), torch.from_numpy(labels)))
    calibrated /= calibrated.sum(1, keepdims=True)
    quality = rank.get_label_quality_scores(labels, calibrated, method="self_confidence")
    assert [row["position"] for row in table.data] == np.argsort(quality).tolist()
    assert [row["probability"] for row in table.data] == pytest.approx(np.sort(quality).tolist())


def test_the_test_images_are_those_of_the_call_with_the_seed(command, labelled: Path) -> None:
    content = images_file(inspect_images(labelled, least=2), 1, 6) | {"asked": (str(labelled.resolve()), 1, 6)}
    sealed = {*content["sealed"]}
    Path("peft-vit-tune").mkdir()  # as that call leaves it
    Path("peft-vit-tune/images.json").write_text(json.dumps(content))

    def ranked(*options: Any) -> set[str]:
        command("review", labelled, *MODEL, *options)
        return {row["file"] for row in rows_of("review_labels.csv")}

    assert not ranked() & sealed
    assert ranked("--seed", 0) & sealed


def test_trainings_on_folds_predict_what_they_left_out(command, refused, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(Path("photos"))
    final = choice_of(Path("photos"), Path("output")).before_rounding
    command("review", "photos", "--model", final.folder)
    expected = {}
    for file in Path("output/studies").glob("folds-*/*/*/record.json"):
        predictions = json.loads(file.read_text())["predictions"]
        names = predictions["files"]
        for name, logits in zip(names, predictions["logits"], strict=True):
            expected[name] = f"class_{np.argmax(logits)}"
    assert {row["file"]: row["believed"] for row in rows_of("review_labels.csv")} == expected
    Path("photos/class_0/00.png").rename("photos/class_1/moved.png")
    assert "output/images.json" in refused("review", "photos", "--model", final.folder)
    said = command("export", final.folder, "--bits", 8, "--output", "model.safetensors")
    assert "1 labels are others by now" in said.out
    assert "% of predictions equal" in said.out
    Path("photos/class_1/moved.png").unlink()
    assert "output/images.json" in refused("review", "photos", "--model", final.folder)


@pytest.mark.parametrize("packed", [False, True])
def test_similar_images_are_those_of_the_largest_cosine(command, labelled: Path, packed: bool) -> None:
    where = Path(shutil.make_archive("photos", "zip", labelled)) if packed else labelled
    call = ("similar", labelled / "class_2/07.png", where, *MODEL, "--json", "--top", 5)
    said = command(*call, code=1)
    assert "broken.png" in said.err
    found: list[dict[str, Any]] = json.loads(said.out)
    files = [*map(str, sorted(labelled.rglob("[0-9cw]*.png")))]
    command("embed", *files, "--output", "x.npy", *MODEL)
    unit = np.load("x.npy")
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    own = unit[files.index("photos/class_2/07.png")]
    cosines = sorted((float(own @ row) for row, file in zip(unit, files, strict=True)), reverse=True)
    skipped = 0 if packed else 1  # a zip's copy of it is another file
    assert [row["cosine"] for row in found] == pytest.approx(cosines[skipped : skipped + 5], abs=1e-5)
    assert Path(found[1 - skipped]["file"]).name in ("copy.png", "07.png")
    assert command(*call, code=1).out == said.out


@pytest.mark.parametrize(
    ("call", "stated"),
    [
        ("review photos/class_0", "photos/class_0: "),
        ("review photos --output photos/review", "photos/review: --output: "),
        ("review numbers.csv", "numbers.csv: "),
        ("review few", "few: class 'b' has 1 "),
        ("review photos --undo", "photos/corrections.jsonl: holds nothing to undo"),
        ("review packed.zip --page", "packed.zip: can't be changed here"),
        ("review two --image-size 32 --model test_vit --weights random", "two: has one image alone of a class"),
        ("review photos --model run", "--model: has kept no predictions"),
        ("review photos --model run --image-size 32", "--image-size, --weights: have no effect"),
        ("similar photos photos", "photos: is a folder"),
        ("similar photos/class_2/broken.png photos", "photos/class_2/broken.png: "),
        ("similar photos/class_2/07.png nowhere", "nowhere: "),
    ],
)
def test_bad_input_is_refused(refused, run_of, labelled: Path, call: str, stated: str) -> None:
    Path("run").symlink_to(run_of("linear"))
    shutil.make_archive("packed", "zip", labelled)
    Path("numbers.csv").write_text("path,size\n" + "".join(f"photos/class_0/0{k}.png,{k}.5\n" for k in range(9)))
    for folder, counts in {"few": (9, 1), "two": (4, 2)}.items():
        for name, count in zip("ab", counts, strict=True):
            Path(folder, name).mkdir(parents=True)
            for k in range(count):
                shutil.copy(labelled / f"class_{'ab'.index(name)}" / f"0{k}.png", f"{folder}/{name}")
    assert stated in refused(*call.split(), *(MODEL if call.startswith("similar") else ()))
