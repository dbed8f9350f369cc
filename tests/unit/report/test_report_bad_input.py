"""The report on results that are not whole: it is written, says what is not in it, and how to go on."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import planted
import pytest
import unfinished

from peft_vit.cli import main
from peft_vit.records import RunRecord
from peft_vit.report import build_report

EXPERIMENTS = planted.experiments()
TORN = planted.record(EXPERIMENTS["lora_r8"], 1, 0.8).model_dump_json().encode()[:5000]


def texts(results: Path, output: Path) -> tuple[str, str]:
    files = build_report(results, output)
    assert files.html is not None
    return files.markdown.read_text(), files.html.read_text()


def code(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_what_is_left_out_is_told_above_every_number(tmp_path: Path) -> None:
    markdown, page = texts(unfinished.results_with(tmp_path / "out", TORN), tmp_path / "report")
    left_out = f"Left out: {unfinished.BAD}: "
    assert markdown.index(left_out) < markdown.index("70.0")
    counted = re.search(r">\d+ warnings?</a>", page)
    assert counted is not None
    assert counted.start() < page.index("70.0")  # it leads to them
    assert left_out in re.sub("<wbr>", "", page)


@pytest.mark.parametrize("format", ["html", "md"])
def test_the_command_names_it_and_ends_with_1(format: str, tmp_path: Path, capsys) -> None:
    results = unfinished.results_with(tmp_path / "out", TORN)
    assert code("report", results, "--format", format, "--output", tmp_path / "report") == 1
    said = capsys.readouterr()
    assert (tmp_path / "report" / "analysis_summary.md").is_file()
    assert "analysis_summary.md" in said.out
    (line,) = said.err.splitlines()
    assert line.startswith(f"left out: {results / unfinished.BAD}: is not a readable record")
    (results / unfinished.BAD).unlink()
    (results / "metrics.csv").write_text("1")
    assert code("report", results, "--format", format, "--output", tmp_path / "report") == 0
    assert capsys.readouterr().err.startswith(f"note: {results / 'metrics.csv'}: is no file of a study")


def test_nothing_readable_is_an_error_with_every_name(tmp_path: Path, capsys) -> None:
    results = unfinished.results_with(tmp_path / "out", b"{}")
    for seed in range(3):
        (results / f"quickstart/linear_probe/seed_{seed}/record.json").write_text("[]")
    assert code("report", results, "--output", tmp_path / "report") == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["error", "left out", "left out", "left out"]
    assert not (tmp_path / "report").exists()


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


def test_a_study_that_goes_on_says_which_runs_are_missing(tmp_path: Path) -> None:
    broken = planted.failed(EXPERIMENTS["linear_probe"], 2, "out of memory")
    begun = {"lora_r8/seed_1": unfinished.attempt("failed", error="killed")}
    results = unfinished.planned(tmp_path / "out", [*unfinished.GOOD[:2], broken], begun)
    markdown, page = texts(results, tmp_path / "report")
    for text in (markdown, re.sub("<wbr>", "", page)):
        assert "6 planned = 2 done + 1 failed + 3 pending" in text
        assert "Incomplete: 3 of 6 planned runs are not done yet" in text
        assert "peft-vit run CONFIG --output DIR" in text
    assert "| lora_r8 | 1 | pending | to be tried again after: killed |" in markdown
    assert "| linear_probe | 2 | failed | out of memory |" in markdown
    assert "70.0" in markdown, "what is done is reported"


def hopeless() -> list[RunRecord]:
    """Return two failed runs whose tracebacks would like to be markup."""
    return [
        planted.failed(EXPERIMENTS["linear_probe"], seed, "out of memory").model_copy(
            update={"traceback": 'File "a.py", line 1\n    x = <b>1</b>\x1b[2J\nMemoryError'}
        )
        for seed in (0, 1)
    ]


def test_a_study_with_nothing_finished_still_says_what_was_planned_and_why_not(tmp_path: Path) -> None:
    begun = {"lora_r8/seed_1": unfinished.attempt("interrupted", total_steps=90)}
    results = unfinished.planned(tmp_path / "out", hopeless(), begun)
    (results / "quickstart/lora_r8/seed_1/checkpoint-7").mkdir()
    markdown, page = texts(results, tmp_path / "report")
    assert not (tmp_path / "report" / "figures").exists()
    for text in (markdown, re.sub("<wbr>", "", page)):
        assert "vit_small_patch14_dinov2" in text
        assert "6 planned = 0 done + 2 failed + 4 pending" in text
        assert "Nothing: no run of this study has finished." in text
        assert "What was planned" in text
        assert "rank 8" in text
        assert "goes on from step 7 of 90" in text
        assert "peft-vit run CONFIG" in text
    assert "| linear_probe | 0, 1 | failed | out of memory |" in markdown
    folded = re.findall(r"<details><summary>[^<]*(?:<wbr>[^<]*)*failed</summary>.*?</details>", page, re.DOTALL)
    assert len(folded) == 2
    assert all("    x = &lt;b&gt;1&lt;/b&gt; [2J\nMemoryError</pre>" in one for one in folded)


def assert_no_bare_title(markdown: str, page: str) -> None:
    assert not re.search(r"^(#+ [^\n]*|\*\*[^\n]*\*\*)\n+(?=#|\Z)", markdown, re.MULTILINE)
    assert not re.search(r"<h[23][^>]*>[^<]*</h[23]>\s*(</section>|<h2|<ul></ul>|<dl></dl>)", page)


def test_a_study_of_which_only_its_file_is_there_has_a_page_without_bare_titles(tmp_path: Path) -> None:
    markdown, page = texts(unfinished.planned(tmp_path / "out", [], {}), tmp_path / "report")
    assert "6 planned = 0 done + 0 failed + 6 pending" in markdown
    assert "elpv, 84 × 84 pixels" in markdown
    assert_no_bare_title(markdown, page)
    assert_no_bare_title(*texts(unfinished.planned(tmp_path / "two", hopeless(), {}), tmp_path / "report"))
    assert_no_bare_title(*texts(planted.write(tmp_path / "three", unfinished.GOOD), tmp_path / "report"))
    with pytest.raises(AssertionError):
        assert_no_bare_title("## Insights\n", page)


BUILD = """
import sys
from pathlib import Path
from peft_vit.report import build_report
build_report(Path(sys.argv[1]), Path(sys.argv[2]), publication=True)
"""


@pytest.mark.slow
def test_two_processes_with_other_hashes_write_the_same_bytes(few: list[RunRecord], tmp_path: Path) -> None:
    kept = [r for r in few if r.spec.experiment.name in {"linear_probe", "adalora_top_k_fisher"}]
    broken = planted.failed(EXPERIMENTS["lora_r4"], 0, "out of memory")
    results = unfinished.planned(tmp_path / "out", [*kept, broken], {})
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
    first, second = (
        {str(file.relative_to(output)): file.read_bytes() for file in sorted(output.rglob("*")) if file.is_file()}
        for output in outputs.values()
    )
    assert list(first) == list(second)
    assert {"report.html", "figures/publication/captions.md"} <= first.keys()
    assert [name for name in first if first[name] != second[name]] == []
