"""The report as files: complete, the same bytes again, closed against hostile names, without torch."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import planted
import pytest
import unfinished
from golden import check_golden
from no_posix import run_without_posix

from peft_vit.base.errors import UserError
from peft_vit.cli import main
from peft_vit.core.records import RunRecord
from peft_vit.deploy.page.document import SECTION_TITLES
from peft_vit.lab.report import ReportFiles, build_report

FIGURES = {
    "accuracy_by_method",
    "differences_to_linear_probe",
    "differences_to_lora_r8",
    "loss_curves",
    "importance_by_layer",
    "rank_maps",
}
EXPERIMENTS = planted.experiments()
LINEAR_ONLY = [planted.record(EXPERIMENTS["linear_probe"], 0, 0.7)]
TORN = planted.record(EXPERIMENTS["lora_r8"], 1, 0.8).model_dump_json().encode()[:5000]
HOSTILE = '"><script>alert(1)</script>|`x`\x07 $y$ ../../../etc'


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    folder = tmp_path_factory.mktemp("quickstart")
    return build_report(planted.write(folder / "results", planted.quickstart()), folder / "report")


@pytest.fixture(scope="module")
def linear_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of one run, on which most can't be printed."""
    return planted.write(tmp_path_factory.mktemp("linear") / "results", LINEAR_ONLY)


def texts(results: Path, output: Path) -> tuple[str, str]:
    """Return the Markdown and the page of a report, which has no title without text below it."""
    files = build_report(results, output)
    assert files.html is not None
    markdown, page = files.markdown.read_text(), files.html.read_text()
    assert not re.search(r"^(#+ [^\n]*|\*\*[^\n]*\*\*)\n+(?=##? |\Z)", markdown, re.MULTILINE)
    assert not re.search(r"<h[23][^>]*>[^<]*</h[23]>\s*(</section>|<h2|<ul></ul>|<dl></dl>)", page)
    return markdown, re.sub("<wbr>", "", page)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


class Page(HTMLParser):
    """Collects tags, ids and addresses, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "link", "br", "wbr", "img", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.scripts: list[str | None] = []  # the type of each
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append(dict(attrs).get("type"))
        self.addresses += [
            v or "" for k, v in attrs if k in {"src", "href", "xlink:href", "action"} or k.startswith("on")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_every_figure_comes_as_png_and_svg(built: ReportFiles) -> None:
    figures = [file for file in (built.markdown.parent / "figures").iterdir() if file.suffix != ".csv"]
    assert {file.name for file in figures} == {f"quickstart_{f}.{s}" for f in FIGURES for s in ("png", "svg")}
    for file in figures:
        start = file.read_bytes()[:300]
        assert start.startswith(b"\x89PNG") if file.suffix == ".png" else b"<svg" in start or b"<?xml" in start


def test_the_page_needs_no_network_and_runs_one_script_of_its_own(built: ReportFiles) -> None:
    text = built.html.read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("svg") == len(FIGURES)
    assert not {"link", "iframe", "img"} & set(page.tags)
    assert [kind for kind in page.scripts if kind != "application/json"] == [None]
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_markdown_has_exactly_the_five_sections(built: ReportFiles) -> None:
    text = built.markdown.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == list(SECTION_TITLES)
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (built.markdown.parent / path).is_file()


def test_findings_have_estimates_in_full_precision(tmp_path: Path) -> None:
    accuracy = {"linear_probe": 450, "full_finetuning": 470, "lora_r4": 465, "lora_r8": 480}
    records = [
        planted.record(EXPERIMENTS[name], seed, (images + seed + name.startswith("lora") * seed) / 600)
        for name, images in accuracy.items()
        for seed in range(3)
    ]
    files = build_report(planted.write(tmp_path / "results", records), tmp_path / "report")
    (table,) = (files.markdown.parent / "tables").glob("*_findings.csv")
    rows = {(row["id"], row["subject"]): row for row in csv.DictReader(table.read_text().splitlines())}
    row = rows["lora-beats-full", "lora_r8 against full_finetuning"]
    assert float(row["estimate"]) == pytest.approx((10 + 11 + 12) / 3 / 600, rel=1e-12)
    assert (row["verdict"], int(row["n"]), row["n_of"]) == ("not decided", 3, "pairs")


def test_one_run_says_why_most_is_missing_and_needs_no_page(linear_only: Path, tmp_path: Path) -> None:
    markdown, page = texts(linear_only, tmp_path / "report")
    check_golden("report/one_run.md", markdown)
    assert "Warnings</h3>" not in page
    assert build_report(linear_only, tmp_path / "analysis", page=False).html is None
    report, analysis = contents(tmp_path / "report"), contents(tmp_path / "analysis")
    assert report.pop("report.html")
    assert report == analysis


def test_smoke_and_real_studies_stand_apart_with_the_notice_above_the_numbers(tmp_path: Path) -> None:
    planted.write(tmp_path / "results" / "real", LINEAR_ONLY)
    smoke = planted.record(EXPERIMENTS["linear_probe"], 0, 0.5, smoke=True)
    planted.write(tmp_path / "results" / "smoke", [smoke])
    markdown, page = texts(tmp_path / "results", tmp_path / "report")
    tables = {file.name for file in (tmp_path / "report" / "tables").iterdir()}
    assert tables >= {"quickstart_accuracy.csv", "quickstart_smoke_accuracy.csv"}
    assert markdown.count("### quickstart (smoke)") == len(SECTION_TITLES)
    article = page[page.index('id="quickstart_smoke"') :]
    assert article.index("Smoke runs have random weights") < article.index("50.0")
    assert article.count("Smoke runs have random weights") == 1, "it is no warning beside"


def test_hostile_names_are_escaped_everywhere(tmp_path: Path) -> None:
    base = planted.record(EXPERIMENTS["linear_probe"], 0, 0.7, provenance_changes={"weights_name": HOSTILE})
    record = base.model_copy(update={"class_names": [HOSTILE, "b"]})
    for place, record_ in enumerate((record, planted.failed(EXPERIMENTS["lora_r8"], 0, HOSTILE))):
        file = tmp_path / "results" / str(place) / "record.json"
        file.parent.mkdir(parents=True)
        file.write_text(record_.model_dump_json())
    markdown, page = texts(tmp_path / "results", tmp_path / "report")
    assert Page(page).scripts.count(None) == 1, "ours, and no other"
    assert "<script" not in markdown
    assert "\x07" not in page + markdown
    assert re.search(r"&lt;script&gt;alert\(1\)", page)
    assert r"\|\`x\`" in markdown, "neither the table nor the code span is broken"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "results"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_still_gives_a_page_and_stands_in_its_data(
    few: list[RunRecord], tmp_path: Path, loss: float
) -> None:
    steps = [few[0].steps[0].model_copy(update={"loss": loss}), *few[0].steps[1:]]
    records = [few[0].model_copy(update={"steps": steps}), *few[1:2]]
    _, page = texts(planted.write(tmp_path, records), tmp_path / "report")
    blocks = [
        json.loads(block, parse_constant=lambda name: pytest.fail(f"{name} is no JSON, no browser reads it"))
        for block in re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    ]
    (course,) = (block for block in blocks if block["file"] == "quickstart_loss_curves.csv")
    assert any(repr(loss) in column["values"] for column in course["columns"])


@pytest.mark.parametrize("format", ["html", "md"])
def test_what_is_left_out_is_told_above_every_number_and_by_the_command(format: str, tmp_path: Path, capsys) -> None:
    results, out = unfinished.results_with(tmp_path / "out", TORN), tmp_path / "report"

    def code() -> int:
        with pytest.raises(SystemExit) as ended:
            main(["report", str(results), "--format", format, "--output", str(out)])
        return int(ended.value.code or 0)

    assert code() == 1
    printed = capsys.readouterr()
    markdown, left_out = (out / "analysis_summary.md").read_text(), f"Left out: {unfinished.BAD}: "
    assert "analysis_summary.md" in printed.out
    (line,) = (
        line for line in printed.err.splitlines() if not line.startswith("writing the report")
    )  # on a busy machine
    assert line.startswith(f"left out: {results / unfinished.BAD}: is not a readable record")
    assert markdown.index(left_out) < markdown.index("70.0")
    if format == "html":
        page = (out / "report.html").read_text()
        counted = re.search(r">\d+ warnings?</a>", page)
        assert counted is not None
        assert counted.start() < page.index("70.0")  # it leads to them
        assert left_out in re.sub("<wbr>", "", page)
    (results / unfinished.BAD).unlink()
    (results / "within").symlink_to(results)  # of which nothing is missed
    (results / "linked").symlink_to(tmp_path)
    assert code() == 0
    assert (
        f"note: {results / 'linked'}: is a link to a folder" in capsys.readouterr().err
    )  # after a busy machine's progress
    for file in results.rglob("record.json"):
        file.write_text("[]")
    assert code() == 2
    said = [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if not line.startswith("writing the ")]
    assert said == ["error", *["left out"] * 2]


def hopeless() -> list[RunRecord]:
    """Return two failed runs whose tracebacks would like to be markup."""
    return [
        planted.failed(EXPERIMENTS["linear_probe"], seed, "out of memory").model_copy(
            update={"traceback": 'File "a.py", line 1\n    x = <b>1</b>\x1b[2J\nMemoryError'}
        )
        for seed in (0, 1)
    ]


UNFINISHED = {
    "goes_on": (
        [*unfinished.GOOD[:2], planted.failed(EXPERIMENTS["linear_probe"], 2, "out of memory")],
        {"lora_r8/seed_1": unfinished.attempt("failed", error="killed")},
    ),
    "nothing_finished": (hopeless(), {"lora_r8/seed_1": unfinished.attempt("interrupted", total_steps=90)}),
    "only_its_file": ([], {}),
}


@pytest.mark.parametrize("name", UNFINISHED)
def test_a_study_that_is_not_done_says_what_was_planned_and_how_to_go_on(name: str, tmp_path: Path) -> None:
    results = unfinished.planned(tmp_path / "out", *UNFINISHED[name])
    if name == "nothing_finished":
        (results / "quickstart/lora_r8/seed_1/checkpoint-7").mkdir()
    markdown, page = texts(results, tmp_path / "report")
    check_golden(f"report/{name}.md", markdown)
    planned = re.search(r"6 planned = [^|]+", markdown)
    assert planned is not None
    assert planned[0].strip() in page
    assert (tmp_path / "report" / "figures").exists() == (name == "goes_on")
    folded = re.findall(r"<details><summary>[^<]*failed</summary>.*?</details>", page, re.DOTALL)
    assert len(folded) == {"goes_on": 1, "nothing_finished": 2, "only_its_file": 0}[name]
    if name == "nothing_finished":
        assert all("    x = &lt;b&gt;1&lt;/b&gt; [2J\nMemoryError</pre>" in details for details in folded)


def test_a_call_of_train_without_a_run_has_one_card_that_says_how_to_continue(tmp_path: Path) -> None:
    results = unfinished.planned(tmp_path / "out", [], {})
    files = build_report(results, tmp_path / "report", call="peft-vit train 'my images' --minutes 5")
    assert files.markdown.read_text().count("peft-vit train 'my images' --minutes 5") == 1
    page = files.html.read_text()
    assert page.count("<section") == 1
    assert "<table" not in page
    assert "peft-vit train &#39;my images&#39; --minutes 5</code>" in page


@pytest.mark.parametrize(
    ("results", "output", "names"),
    [("empty", "out", "empty"), ("nowhere", "out", "nowhere")]
    + [("good", output, output) for output in ("a_file", "a_file/below", "x" * 300)],
)
def test_no_results_or_no_place_is_one_line_that_names_it(
    results: str, output: str, names: str, linear_only: Path, tmp_path: Path
) -> None:
    (tmp_path / "a_file").write_text("kept")
    (tmp_path / "empty").mkdir()
    source = linear_only if results == "good" else tmp_path / results
    for page in (True, False):
        with pytest.raises(UserError) as caught:
            build_report(source, tmp_path / output, page=page)
        assert caught.value.file == str(tmp_path / names)
        assert results != "good" or "--output" in caught.value.message
    assert (tmp_path / "a_file").read_text() == "kept"
    assert not (tmp_path / "out").exists()


def test_a_report_needs_neither_torch_nor_anything_of_posix(linear_only: Path, tmp_path: Path) -> None:
    command, absent = f"report {linear_only} --output {tmp_path / 'report'}", ["torch", "timm", "matplotlib.pyplot"]
    run_without_posix(tmp_path, command, imports="import matplotlib.font_manager, pandas", absent=absent)
    assert (tmp_path / "report" / "report.html").exists()


BUILD = """
import sys
from pathlib import Path
from peft_vit.lab.report import build_report
build_report(Path(sys.argv[1]), Path(sys.argv[2]), publication=True)
"""


@pytest.mark.slow
def test_two_processes_with_other_hashes_write_the_same_bytes(few: list[RunRecord], tmp_path: Path) -> None:
    records = [r for r in few if r.spec.experiment.name in {"linear_probe", "adalora_top_k_fisher"}]
    broken = planted.failed(EXPERIMENTS["lora_r4"], 0, "out of memory")
    results = unfinished.planned(tmp_path / "out", [*records, broken], {})
    (results / "metrics.csv").write_text("1")
    (results / "quickstart" / "lora_r2" / "seed_0").mkdir(parents=True)
    (results / "quickstart" / "lora_r2" / "seed_0" / "record.json").write_bytes(TORN)
    outputs = {seed: tmp_path / f"report-{seed}" for seed in ("1", "2")}
    builds = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD, str(results), str(output)],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": seed},
        )
        for seed, output in outputs.items()
    ]
    assert [build.wait() for build in builds] == [0, 0]
    first, second = map(contents, outputs.values())
    assert {"report.html", "figures/publication/captions.md"} <= first.keys()
    assert first == second
