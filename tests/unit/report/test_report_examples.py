"""Example images: the four groups are counted, what is shown follows from the stated rule, nothing is fetched."""

import base64
import csv
import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import planted
import pytest
from PIL import Image

from peft_vit.base.errors import UserError
from peft_vit.cli import main
from peft_vit.core.records import Predictions, RunRecord
from peft_vit.lab.analysis.image_examples import GROUPS, MOST_SHOWN, ImageExamples, image_examples
from peft_vit.lab.report import build_report

EXPERIMENTS = planted.experiments()
N = 40
POSITIONS = list(range(500, 500 + 3 * N, 3))
LABELS = [i % 2 for i in range(N)]


def predictions(seed: int, wrong: set[int]) -> Predictions:
    rng = np.random.default_rng(seed)
    return Predictions(
        images=POSITIONS,
        labels=LABELS,
        predicted=[1 - label if i in wrong else label for i, label in enumerate(LABELS)],
        probability=[float(p) for p in rng.uniform(0.5, 1, N)],
    )


def with_predictions(name: str, seed: int, accuracy: float, wrong: set[int]) -> RunRecord:
    record = planted.record(EXPERIMENTS[name], seed, accuracy)
    return record.model_copy(update={"predictions": predictions(round(1000 * accuracy) + seed, wrong)})


# Wrong in both: 0, 1; only the baseline right: 2; only the best right: 3..11; of the other 28 both are right.
RECORDS = [
    with_predictions("linear_probe", 0, 0.7, {0, 1, *range(3, 12)}),
    with_predictions("lora_r8", 0, 0.8, {0, 1, 2}),
    with_predictions("linear_probe", 1, 0.7, {5}),
    with_predictions("lora_r8", 1, 0.8, set()),
]
COUNTS = {0: [28, 9, 1, 2], 1: [39, 1, 0, 0]}


def examples(records: list[RunRecord], best: str = "lora_r8") -> ImageExamples:
    chosen = image_examples(planted.study_of(records), best)
    assert isinstance(chosen, ImageExamples)
    return chosen


def test_the_four_groups_are_counted_for_every_seed_and_what_is_shown_follows_from_the_rule() -> None:
    chosen = examples(RECORDS)
    assert (chosen.best, chosen.baseline, chosen.seeds) == ("lora_r8", "linear_probe", (0, 1))
    assert {seed: list(counts.values()) for seed, counts in chosen.counts.items()} == COUNTS
    best, baseline = RECORDS[1].predictions, RECORDS[0].predictions
    assert best is not None
    assert baseline is not None
    gap = np.abs(np.array(best.probability) - np.array(baseline.probability))
    only_best = sorted(range(3, 12), key=lambda i: (-gap[i], POSITIONS[i]))[:6]
    shown = [[image.position for image in chosen.shown(group)] for group in GROUPS]
    assert shown[1:3] == [[POSITIONS[i] for i in only_best], [POSITIONS[2]]]
    assert (len(shown[0]), set(shown[3])) == (MOST_SHOWN, {POSITIONS[0], POSITIONS[1]})


def test_without_a_linear_probe_the_smallest_lora_is_the_baseline() -> None:
    records = [
        with_predictions(name, 0, a, set()) for name, a in (("lora_r4", 0.7), ("lora_r1", 0.6), ("lora_r8", 0.8))
    ]
    assert examples(records).baseline == "lora_r1"
    assert isinstance(image_examples(planted.study_of(records[1:2]), "lora_r1"), str)


def changed(record: RunRecord, **changes: object) -> RunRecord:
    assert record.predictions is not None
    return record.model_copy(update={"predictions": record.predictions.model_copy(update=changes)})


def test_runs_on_different_images_or_without_whole_predictions_are_left_out_by_name() -> None:
    other = changed(RECORDS[2], images=[p + 1 for p in POSITIONS])
    chosen = examples([*RECORDS[:2], other, RECORDS[3]])
    assert (chosen.seeds, chosen.left_out) == ((0,), ("seed 1: the two runs were tested on different images",))
    none = [record.model_copy(update={"predictions": None}) for record in RECORDS]
    nothing = {"images": [], "labels": [], "predicted": [], "probability": []}
    for records, why in (
        (none[:2], "seed 0: the records do not hold predictions"),
        (none, "seeds 0, 1: the records do not hold predictions"),  # one reason, said once
        ([changed(record, **nothing) for record in RECORDS[:2]], "seed 0: the predictions are not"),
    ):
        reason = image_examples(planted.study_of(records), "lora_r8")
        assert isinstance(reason, str)
        assert reason.startswith(why)


def grey(position: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 3), position % 256).save(file, format="PNG")
    return file.getvalue()


def test_the_page_shows_each_chosen_image_with_both_predictions_and_escapes_names_of_classes(tmp_path: Path) -> None:
    hostile = '"><script>x'
    positions_asked_for: list[int] = []

    def thumbnails(record: RunRecord, positions: list[int]) -> list[bytes]:
        assert (record.spec.experiment.name, record.spec.seed) == ("lora_r8", 0)
        positions_asked_for.extend(positions)
        return [grey(position) for position in positions]

    records = [record.model_copy(update={"class_names": [hostile, "b"]}) for record in RECORDS]
    results = planted.write(tmp_path / "results", records)
    files = build_report(results, tmp_path / "report", thumbnails=thumbnails)
    assert files.html is not None
    page = files.html.read_text().replace("<wbr>", "")
    shown = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="image (\d+): [^"]+">', page)
    expected = [(grey(position), position) for position in positions_asked_for]
    assert [(base64.b64decode(data), int(position)) for data, position in shown] == expected
    assert len(expected) == 6 + 6 + 1 + 2
    assert hostile not in page
    assert "Only lora_r8 right: 9 of 40 images" in page
    assert "CC BY-NC-SA 4.0: research only" in page[page.index('class="gallery"') :]
    table = next(f for f in files.tables if f.name == "quickstart_examples.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert Counter(row["group"] for row in rows) == dict(zip(GROUPS, COUNTS[0], strict=True))
    by_seed = list(csv.DictReader(next(f for f in files.tables if "agreement.csv" in f.name).read_text().splitlines()))
    assert [[int(row[group.replace(" ", "_")]) for group in GROUPS] for row in by_seed] == list(COUNTS.values())


def test_without_pictures_the_page_says_why_and_keeps_the_table(tmp_path: Path) -> None:
    def absent(record: RunRecord, positions: list[int]) -> list[bytes]:
        raise UserError("is not on this machine, and is not downloaded for this", file="elpv-dataset==1.0.0.post1")

    files = build_report(planted.write(tmp_path / "results", RECORDS), tmp_path / "report", thumbnails=absent)
    assert files.html is not None
    page = files.html.read_text().replace("<wbr>", "")
    assert "No pictures: elpv-dataset==1.0.0.post1: is not on this machine" in page
    assert "<img" not in page
    assert f"| both wrong | {POSITIONS[0]} | functional | defective, " in files.markdown.read_text()


def test_the_command_asks_for_pictures_where_there_are_predictions(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path / "empty"))
    results = planted.write(tmp_path / "results", RECORDS)
    for options, why in (((), "is not on this machine"), (("--no-examples",), "none were asked")):
        with pytest.raises(SystemExit) as ended:
            main(["report", str(results), *options])
        assert ended.value.code == 0
        page = (results / "report" / "report.html").read_text()
        assert re.search(f"No pictures: [^<]*{why}", page.replace("<wbr>", ""))
