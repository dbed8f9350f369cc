"""The page of one model: its whole text once, what it warns of, and what is left out where there is nothing."""

import json
import re
from html import unescape
from pathlib import Path
from shlex import quote
from typing import Any
from urllib.parse import unquote

import numpy as np
import planted
import pytest
from chromium import check_page, context_of, needs_chromium, running_chromium
from golden import check_golden
from PIL import Image

from peft_vit.base.errors import UserError
from peft_vit.core.records import HeadFit, Predictions, ProbeTest, RunRecord
from peft_vit.deploy.page.quality import result_lines
from peft_vit.deploy.presentation import Explanation
from peft_vit.lab.report import build_report

NAMES = ["crack", "dirt", "good"]
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010804000000b51c0c020000000b4944415478da6364f80f00010501012718e366"
    "0000000049454e44ae426082"
)


def record_of(
    experiment: str = "lora_r8", *, counts: tuple[int, ...] = (30, 30, 30), wrong: int = 9, **changes: Any
) -> RunRecord:
    """Return a run on somebody's own images; of each class so many are tested, and every so-many-th is wrong."""
    labels = np.repeat(np.arange(len(counts)), counts)
    n = len(labels)
    predicted = np.where(np.arange(n) % wrong, labels, (labels + 1) % len(counts))
    predictions = Predictions(
        images=list(range(n)),
        labels=labels.tolist(),
        predicted=predicted.tolist(),
        probability=np.linspace(0.6, 0.99, n).tolist(),
        files=[f"{NAMES[label]}/{place:03}.jpg" for place, label in enumerate(labels)],
    )
    start = planted.metrics(0.70, 40)
    fit = HeadFit(l2=(0.1,), validation=(start,), chosen_l2=0.1, gradient_norm=0.0, images=120)
    record = planted.record(planted.experiments()[experiment], 0, 0.8)
    if max(counts) > 3 * min(counts):
        training = record.spec.experiment.training.model_copy(update={"metric": "balanced_accuracy"})
        balanced = record.spec.experiment.model_copy(update={"training": training})
        record = record.model_copy(update={"spec": record.spec.model_copy(update={"experiment": balanced})})
    spec = record.spec.model_copy(
        update={"data": record.spec.data.model_copy(update={"dataset": "image-folder", "path": "photos"})}
    )
    values = {
        "spec": spec,
        "class_names": NAMES[: len(counts)],
        "split_sizes": {"train": 120, "validation": 40, "test": n},
        "predictions": predictions,
        "majority_accuracy": {"test": max(counts) / n},
        "validation": planted.metrics(0.85, 40),
        "head_fit": fit,
        "latency_s": {1: 0.0123},
        "class_counts": {"train": [40] * len(counts), "test": list(counts)},
    }
    return record.model_copy(update=values | changes)


def card_of(folder: Path, *records: RunRecord) -> str:
    return build_report(planted.write(folder / "results", list(records)), folder / "report").markdown.read_text()


def page_of(run: Path, output: Path | None = None, **asked: Any) -> Path:
    html = build_report(run, output or run / "report", **asked).html
    assert html is not None
    return html


def text_of(page: Path) -> str:
    """Return the text of a page as lines, up to the provenance."""
    body = re.sub(r"(?s)<(script|style|svg).*?</\1>", "", page.read_text())
    texts = unescape(re.sub(r"<[^>]*>", "\n", body.replace("<wbr>", "")))
    lines = (" ".join(line.split()) for line in texts.split("\n"))
    return "\n".join(line for line in lines if line).rpartition("\nProvenance\n")[0]


def test_the_whole_page(tmp_path: Path) -> None:
    asked: list[list[int]] = []

    def thumbnails(record: RunRecord, positions: Any) -> list[bytes]:
        asked.append(list(positions))
        return [PNG] * len(positions)

    on_folds = Predictions(
        images=[90, 91, 92, 93, 92],
        labels=[0, 1, 2, 0, 2],
        predicted=[1, 1, 0, 1, 2],
        probability=[0.6, 0.9, 0.7, 0.9, 0.9],
        files=[f"{name}.jpg" for name in "abcdc"],
        label_probability=[0.3, 0.9, 0.1, 0.2, 0.9],  # the second time c is right
    )
    record = record_of(warnings=["Images: 2 files are left out as copies"], on_folds=on_folds)
    content = {"sha256": 64 * "0", "left_out": {}, "digests": {}, "labels": [], "trained": [], "sealed": []}
    content["copies"] = [["b.jpg", "d.jpg"], ["z.jpg", "c.jpg"]]
    content["digests"] = dict.fromkeys(("a.jpg", "b.jpg", "c.jpg", "d.jpg", "z.jpg"), 16 * "0")
    content["labels"] = ["cat"] * 5
    (tmp_path / "images.json").write_text(json.dumps(content))
    data = record.spec.data.model_copy(update={"images_file": str(tmp_path / "images.json")})
    record = record.model_copy(update={"spec": record.spec.model_copy(update={"data": data})})
    results = planted.write(tmp_path / "runs", [record])
    page = page_of(results, thumbnails=thumbnails)
    assert page == results / "report" / "report.html"
    assert page.read_text().count("<img ") == sum(map(len, asked)) == 8 + 6 + 10 + 3 + 4
    assert asked[3:] == [[92, 93, 90], [1, 3, 4, 2]]
    assert (page.parent / "card.md").read_text().startswith("---\n")
    assert re.search('<code tabindex="0">peft-vit predict [^<]* PHOTO.jpg</code>', page.read_text())  # on one line
    assert page.read_text().count('data-key="crack, predicted as dirt"') == 2 + 4  # a cell's examples and mistakes
    assert "`" not in text_of(page)
    check_golden("model_page.txt", text_of(page).replace(str(tmp_path), "FOLDER") + "\n")


@pytest.mark.parametrize("place", ["web/index.html", "model.html"])
def test_a_page_for_the_browser_is_linked_where_there_is_one(tmp_path: Path, place: str) -> None:
    run = planted.write(tmp_path / "a call", [record_of()]) / record_of().spec.run_id
    command = f"peft-vit export {quote(str(run))} --format web --bits 4"
    assert command in text_of(page_of(run))
    (run / place).parent.mkdir(exist_ok=True)
    (run / place).write_text("")
    page = page_of(run, tmp_path / "of the call")
    assert command not in text_of(page)
    (address,) = re.findall(r'<a href="([^"#]+)">Try it in the browser</a>', page.read_text())
    assert (page.parent / unquote(address)).resolve() == (run / place).resolve()


def test_studies_of_several_runs_keep_their_page_and_each_run_has_its_own(tmp_path: Path) -> None:
    first = record_of()
    second = first.model_copy(update={"spec": first.spec.model_copy(update={"seed": 1})})
    assert card_of(tmp_path, first, second).startswith("# Analysis summary")
    page = page_of(tmp_path / "results" / first.spec.run_id)
    assert "A model for photos" in text_of(page)
    assert "<img " not in page.read_text()
    assert "The most confident mistakes" in text_of(page)  # as a table


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({"experiment": "linear_probe"}, "It is a linear probe", "How it learned"),
        ({"head_fit": None, "latency_s": {}}, "It is right on", "inear probe"),
        ({"counts": (9, 9, 9)}, "27 images are too few to tell whether its", "Confidence and accuracy"),
        ({"wrong": 1000}, "most frequent mistake: crack predicted as dirt (1 of 30 images)", "no mistake"),
        ({"counts": (60, 5, 5)}, "balanced accuracy counts", "(accuracy, 95 % interval)"),
        ({"counts": (60, 0, 5)}, "- No test image is of dirt:", "Mistake about dirt"),
        ({"wrong": 1}, "It is no better than always naming the most frequent class", "It makes no mistake"),
        ({"warnings": ["Images: 2 images are of two classes; one of the labels is wrong"]}, "> **Images: 2", "x x"),
    ],
)
def test_what_is_said_and_what_is_left_out(tmp_path: Path, changes: dict[str, Any], said: str, unsaid: str) -> None:
    card = card_of(tmp_path, record_of(**changes))
    assert said in card
    assert unsaid not in card


@pytest.mark.parametrize("counts", [(30, 30, 30), (60, 5, 5)])
@pytest.mark.parametrize("chosen_step", [0, 48])
def test_the_page_says_of_the_probe_what_the_terminal_says(tmp_path: Path, counts, chosen_step) -> None:
    tested = ProbeTest(metrics=planted.metrics(0.4, sum(counts)), predicted=[0] * sum(counts))
    record = record_of(counts=counts, probe_test=tested, chosen_step=chosen_step)
    _, probe, gain, *_ = result_lines(record, tmp_path, record.seconds)
    assert f"- {probe}\n- {gain}\n" in card_of(tmp_path, record)
    assert "A linear probe has 33.3 %" in probe  # one of three classes, in either metric


def test_a_model_without_pretrained_weights_is_warned_of_first(tmp_path: Path) -> None:
    record = record_of(provenance=planted.provenance(0, random_weights=True))
    page = page_of(planted.write(tmp_path, [record]))
    assert text_of(page).split("\n")[2].startswith("The backbone's weights are random")


def test_pictures_that_are_not_at_hand_are_said(tmp_path: Path) -> None:
    def absent(*_: Any) -> list[bytes]:
        raise UserError("the images are gone")

    page = page_of(planted.write(tmp_path, [record_of()]), thumbnails=absent)
    assert "No pictures: the images are gone." in text_of(page)
    assert "crack/000.jpg" in text_of(page)


def test_the_page_shows_where_the_model_looked_and_warns_of_the_class_known_by_a_corner(tmp_path: Path) -> None:
    record = record_of()

    def maps(of: RunRecord, positions: Any) -> list[Explanation]:
        assert record.predictions is not None
        for_cracks = np.eye(8, dtype=np.float32)[0][:, None] * np.eye(8, dtype=np.float32)[7]  # the upper right
        middle = np.roll(for_cracks, (3, -4), (0, 1))
        truths = [record.predictions.labels[position] for position in positions]
        picture = Image.new("RGB", (224, 224))
        return [Explanation("", middle if truth else for_cracks, picture, "attention") for truth in truths]

    pictures = lambda _, positions: [PNG] * len(positions)  # noqa: E731
    page = page_of(planted.write(tmp_path, [record]), thumbnails=pictures, maps=maps)
    assert page.read_text().count("<img ") == 2 * (8 + 6) + 10
    text = text_of(page)
    assert re.findall("It may know (.*) by a shortcut: it looks at the upper right corner", text) == ["crack"]
    assert "Where it looked" in text


@pytest.mark.slow
@needs_chromium
def test_axe_finds_nothing_a_phone_shows_all_and_a_cell_leads_to_its_images(tmp_path: Path) -> None:
    page = page_of(planted.write(tmp_path, [record_of()]), thumbnails=lambda _, positions: [PNG] * len(positions))
    check_page(page)
    with running_chromium() as browser:
        wide = context_of(browser).new_page()
        wide.goto(page.as_uri())
        for key in ("ArrowRight", "ArrowRight", "Enter"):  # the second cell: crack, predicted as dirt
            wide.locator("#model-confusion .drawing").press(key)
        assert wide.locator(".found").count() == 2 + 4
        wide.locator(".command button").first.click()
        assert wide.locator(".command button").first.inner_text() == "Copied"
        phone = context_of(browser, viewport={"width": 360, "height": 740}).new_page()
        phone.goto(page.as_uri())
        assert phone.get_by_text("Accuracy", exact=True).first.bounding_box()["y"] < 200
