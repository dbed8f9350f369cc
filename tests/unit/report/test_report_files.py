"""The report as files: complete, the same bytes again, closed against hostile names, without torch."""

import csv
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import planted
import pytest

from peft_vit.analysis import analyze
from peft_vit.errors import UserError
from peft_vit.records import RunRecord
from peft_vit.report import ReportFiles, build_report
from peft_vit.report.document import SECTION_TITLES
from peft_vit.report.sections import study_documents

FIGURES = {
    "accuracy_by_method",
    "accuracy_by_parameters",
    "accuracy_by_bytes",
    "differences_to_linear_probe",
    "differences_to_lora_r8",
    "loss_curves",
    "pareto_fronts",
    "importance_by_layer",
    "rank_maps",
}
EXPERIMENTS = planted.experiments()
LINEAR_ONLY = [planted.record(EXPERIMENTS["linear_probe"], 0, 0.7)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    folder = tmp_path_factory.mktemp("quickstart")
    return build_report(planted.write(folder / "results", planted.quickstart()), folder / "report")


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
    assert {file.name for file in built.figures} == {f"quickstart_{f}.{s}" for f in FIGURES for s in ("png", "svg")}
    for file in built.figures:
        start = file.read_bytes()[:300]
        assert start.startswith(b"\x89PNG") if file.suffix == ".png" else b"<svg" in start or b"<?xml" in start


def test_the_page_needs_no_network_and_runs_one_script_of_its_own(built: ReportFiles) -> None:
    page = Page(built.html.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == len(FIGURES)
    assert not {"link", "iframe", "img"} & set(page.tags)
    assert [kind for kind in page.scripts if kind != "application/json"] == [None]
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)


def test_ids_on_the_page_are_unique_and_links_arrive(built: ReportFiles) -> None:
    text = built.html.read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    targets = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
    assert set(targets) <= set(ids)


def test_markdown_has_exactly_the_five_sections(built: ReportFiles) -> None:
    text = built.markdown.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == list(SECTION_TITLES)
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (built.markdown.parent / path).is_file()


def test_page_and_markdown_state_accuracy_with_n_and_each_seed(built: ReportFiles) -> None:
    lora = [r.test.accuracy for r in planted.quickstart() if r.spec.experiment.name == "lora_r8" and r.test]
    line = next(x for x in built.markdown.read_text().splitlines() if x.startswith("| lora_r8 | ") and " % [" in x)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1].startswith(f"{100 * np.mean(lora):.1f} % [")
    assert cells[2:4] == ["2", f"0: {100 * lora[0]:.1f}, 1: {100 * lora[1]:.1f}"]


def test_what_is_looked_up_is_folded_and_the_main_tables_are_not(few: list[RunRecord]) -> None:
    study = planted.study_of(few)
    (document,) = study_documents([analyze(study)])
    folded = {table.slug: table.folded for table in document.tables()}
    assert {"quality", "calibration_against_lora_r8", "allocation", "findings"} <= {
        s for s, is_so in folded.items() if is_so
    }
    assert {"accuracy", "all_pairs", "cost", "verdicts"} <= {slug for slug, is_so in folded.items() if not is_so}


def test_verdicts_findings_and_what_it_can_say_nothing_about(tmp_path: Path) -> None:
    accuracy = {"linear_probe": 450, "full_finetuning": 470, "lora_r4": 465, "lora_r8": 480}
    records = [
        planted.record(EXPERIMENTS[name], seed, (images + seed + name.startswith("lora") * seed) / 600)
        for name, images in accuracy.items()
        for seed in range(3)
    ]
    files = build_report(planted.write(tmp_path / "results", records), tmp_path / "report")
    assert files.html is not None
    page, summary = files.html.read_text(), files.markdown.read_text()
    for text in (page, summary[summary.index("## Insights") :]):
        assert "Every run is more accurate than always naming the most frequent class" in text
        assert "Attention sites score higher than MLP sites, in the mean per triplet" in text
        assert "no experiment of method linear" not in text, "it is there"
        assert "no experiment of method " in text
    (table,) = (file for file in files.tables if file.name.endswith("_findings.csv"))
    rows = {(row["id"], row["subject"]): row for row in csv.DictReader(table.read_text().splitlines())}
    row = rows["lora-beats-full", "lora_r8 against full_finetuning"]
    assert float(row["estimate"]) == pytest.approx((10 + 11 + 12) / 3 / 600, rel=1e-12)
    assert (row["verdict"], int(row["n"]), row["n_of"]) == ("not decided", 3, "pairs")


def test_the_rest_is_the_same_without_the_page(tmp_path: Path) -> None:
    results = planted.write(tmp_path / "results", LINEAR_ONLY)
    build_report(results, tmp_path / "report")
    markdown = build_report(results, tmp_path / "analysis", page=False).markdown
    assert markdown == tmp_path / "analysis" / "analysis_summary.md"
    report, analysis = contents(tmp_path / "report"), contents(tmp_path / "analysis")
    assert report.pop("report.html")
    assert report == analysis


def test_warnings_are_counted_above_the_answer_and_told_below_it(tmp_path: Path) -> None:
    warned = planted.record(EXPERIMENTS["linear_probe"], 0, 0.7, changes={"warnings": ["top_k takes every site"]})
    files = build_report(planted.write(tmp_path / "results", [warned]), tmp_path / "report")
    text, page = files.markdown.read_text(), files.html.read_text()
    assert text.index("Warning: top") < text.index("70.0")
    counted, answer = '<a href="#quickstart-warnings">1 warning</a>', "What came out"
    assert page.index(counted) < page.index(answer) < page.index("Warning: top") < page.index("Method comparison</h2>")


def test_a_page_without_warnings_counts_none(tmp_path: Path) -> None:
    files = build_report(planted.write(tmp_path / "results", LINEAR_ONLY), tmp_path / "report")
    assert files.html is not None
    assert "Warnings</h3>" not in files.html.read_text()


def test_missing_data_leaves_a_sentence_that_says_why(tmp_path: Path) -> None:
    files = build_report(planted.write(tmp_path / "results", LINEAR_ONLY), tmp_path / "report")
    for text in (files.markdown.read_text(), files.html.read_text()):
        assert "No rank maps: the study has no finished AdaLoRA run" in text
        assert "No figure of importance" in text
        assert "No finished run of this study quantized the backbone." in text
        assert "No paired differences" in text
        assert "[no interval]" in text


def test_smoke_and_real_studies_stand_apart_with_the_notice_above_the_numbers(tmp_path: Path) -> None:
    smoke = planted.record(EXPERIMENTS["linear_probe"], 0, 0.5, smoke=True)
    planted.write(tmp_path / "results" / "real", LINEAR_ONLY)
    planted.write(tmp_path / "results" / "smoke", [smoke])
    files = build_report(tmp_path / "results", tmp_path / "report")
    assert {file.name for file in files.tables} >= {"quickstart_accuracy.csv", "quickstart_smoke_accuracy.csv"}
    markdown, page = files.markdown.read_text(), files.html.read_text()
    assert markdown.count("### quickstart (smoke)") == len(SECTION_TITLES)
    article = page[page.index('id="quickstart_smoke"') :]
    assert article.index("Smoke runs: random weights") < article.index("50.0")
    assert article.count("Smoke runs: random weights") == 1, "it is no warning beside"


HOSTILE = '"><script>alert(1)</script>|`x`\x07 $y$ ../../../etc'


def test_hostile_names_are_escaped_everywhere(tmp_path: Path) -> None:
    base = planted.record(EXPERIMENTS["linear_probe"], 0, 0.7, provenance_changes={"weights_name": HOSTILE})
    record = base.model_copy(update={"class_names": [HOSTILE, "b"]})
    crash = planted.failed(EXPERIMENTS["lora_r8"], 0, HOSTILE)
    folder = tmp_path / "results"
    for i, one in enumerate((record, crash)):
        file = folder / str(i) / "record.json"
        file.parent.mkdir(parents=True)
        file.write_text(one.model_dump_json())
    files = build_report(folder, tmp_path / "report")
    page, markdown = files.html.read_text(), files.markdown.read_text()
    assert Page(page).scripts.count(None) == 1, "ours, and no other"
    assert "<script" not in markdown
    assert "\x07" not in page + markdown
    assert re.search(r"&lt;script&gt;alert\(1\)", page)
    assert r"\|\`x\`" in markdown, "neither the table nor the code span is broken"
    written = [*files.figures, *files.tables, files.html, files.markdown]
    assert all(tmp_path / "report" in file.resolve().parents for file in written)


def test_an_empty_or_missing_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no record\.json"):
        build_report(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        build_report(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("page", [True, False])
@pytest.mark.parametrize("output", ["a_file", "a_file/below", "x" * 300])
def test_an_output_directory_that_cannot_be_is_one_line(page: bool, output: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("kept")
    results = planted.write(tmp_path / "results", LINEAR_ONLY)
    with pytest.raises(UserError, match=r"can't be written to \(.+\); choose another --output$") as caught:
        build_report(results, tmp_path / output, page=page)
    assert caught.value.file == str(tmp_path / output)
    assert (tmp_path / "a_file").read_text() == "kept"


def test_a_report_needs_no_torch(tmp_path: Path) -> None:
    planted.write(tmp_path / "results", LINEAR_ONLY)
    code = (
        "import sys; from pathlib import Path; from peft_vit.report import build_report\n"
        "assert 'torch' not in sys.modules, 'imported with the package'\n"
        f"build_report(Path({str(tmp_path / 'results')!r}), Path({str(tmp_path / 'out')!r}))\n"
        "assert not {'torch', 'timm', 'matplotlib.pyplot'} & set(sys.modules), 'imported while building'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_report_needs_nothing_of_posix(tmp_path: Path) -> None:
    """As on Windows: no `fcntl` and the like, and `os` without what is of POSIX."""
    planted.write(tmp_path / "results", LINEAR_ONLY)
    code = f"""
import os, sys
import matplotlib.font_manager, multiprocessing, pandas, subprocess, tempfile  # what these do on POSIX is theirs
for name in ("fcntl", "grp", "pwd", "resource", "syslog", "termios"):
    sys.modules[name] = None
for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "fork", "getuid", "pread", "pwrite", "uname"):
    delattr(os, name)
import peft_vit.analysis, peft_vit.config, peft_vit.records, peft_vit.report, peft_vit.statistics
from peft_vit.cli import main
main(["report", {str(tmp_path / "results")!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "report" / "report.html").exists()
