"""The thin scripts, as a person calls them: from any directory, on a study of seconds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from experiments.scripts import analyze_adaptive_results as analyzer
from experiments.scripts import run_adaptive_experiments as runner
from experiments.scripts import update_docs
from peft_vit.runs.records.scan import read_records

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "experiments" / "scripts"
pytestmark = pytest.mark.usefixtures("cache")
SECTIONS = (
    "## Layer importance patterns",
    "## Allocation effectiveness",
    "## Quantization impact",
    "## Method comparison",
    "## Insights",
)
STUDY = """
name: three_methods
seeds: [0]
threads: 1
precision: fp32
backbone: {model: test_vit, weights: random}
data: {dataset: digits, image_size: 32, validation_images: 100, test_images: 100}
training: {epochs: 1, learning_rate: 1e-3}
experiments:
  - {name: lora_r2, method: lora, lora: {rank: 2}}
  - name: adaptive
    method: adalora
    adalora:
      {total_rank_budget: 36, allocation_strategy: proportional, importance_metric: magnitude,
       update_frequency: 10, warmup_steps: 10}
  - name: four_bits
    method: qa_lora
    qa_lora:
      {quantization_bits: 4, quantization_type: nf4, quantization_schedule: constant, gradient_scaling_factor: 1.0,
       use_group_quantization: true, group_size: 16, rank: 2}
"""


def call(module: ModuleType, *arguments: str | Path) -> int:
    """Run a script's main and return its exit code."""
    try:
        module.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("study") / "three_methods.yaml"
    file.write_text(STUDY)
    return file


@pytest.fixture(scope="module")
def results(study: Path) -> Path:
    """Run the study once, in a process of its own, from another directory than the repository."""
    script = str(SCRIPTS / "run_adaptive_experiments.py")
    arguments = ["--run-all", "--config", study.name, "--smoke", "--output-dir", "out"]
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=study.parent,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PEFT_VIT_CACHE": str(study.parent / "cache")},
    )
    assert done.returncode == 0, done.stderr
    return study.parent / "out"


@pytest.mark.part("runner")
def test_run_all_does_every_run_and_marks_smoke(results: Path) -> None:
    records = list(read_records(results))
    assert [record.spec.run_id for record in records] == [
        "three_methods/adaptive/seed_0",
        "three_methods/four_bits/seed_0",
        "three_methods/lora_r2/seed_0",
    ]
    assert all(record.status == "done" and record.spec.smoke for record in records)
    assert all((results / record.spec.run_id / "adapter.safetensors").exists() for record in records)


@pytest.mark.part("runner")
def test_the_same_command_skips_what_is_done(study: Path, results: Path, capsys) -> None:
    before = {file: file.stat().st_mtime_ns for file in results.rglob("*") if file.is_file()}
    assert call(runner, "--run-all", "--config", study, "--smoke", "--output-dir", results) == 0
    assert "3 already done and skipped" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in results.rglob("*") if file.is_file()} == before


@pytest.mark.part("runner")
@pytest.mark.parametrize(
    ("flag", "names"),
    [
        (
            "--run-adalora",
            ["adalora_proportional_magnitude", "adalora_threshold_gradient_norm", "adalora_top_k_fisher"],
        ),
        ("--run-qa-lora", ["nf4_constant", "int8_linear", "fp4_cosine"]),
    ],
)
def test_dry_run_of_a_full_size_file_writes_nothing(
    flag: str, names: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(runner, flag, "--smoke", "--dry-run", "--output-dir", "out") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert "lora_r8" not in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.part("runner")
def test_run_all_alone_means_the_three_full_size_files() -> None:
    files = [Path(word) for word in runner.command(runner.parse(["--run-all"])) if word.endswith(".yaml")]
    assert [file.name for file in files] == [
        "fixed_rank_baselines.yaml",
        "adalora_comprehensive_experiment.yaml",
        "qa_lora_comprehensive_experiment.yaml",
    ]
    assert all(file.is_file() for file in files)


@pytest.mark.part("runner")
def test_one_method_of_a_given_study_is_the_same_run_as_in_the_whole(study: Path, results: Path, capsys) -> None:
    assert call(runner, "--run-adalora", "--config", study, "--smoke", "--dry-run", "--output-dir", results) == 0
    assert "1 run: 0 to do" in capsys.readouterr().out


@pytest.mark.part("runner")
def test_a_study_without_the_method_is_refused_in_one_line(tmp_path: Path, capsys) -> None:
    assert call(runner, "--run-adalora", "--config", runner.BASELINES, "--output-dir", tmp_path) == 2
    error = capsys.readouterr().err
    assert error == f"error: {runner.BASELINES}: experiments: no experiment is of method adalora\n"


@pytest.mark.part("runner")
@pytest.mark.parametrize("arguments", [(), ("--run-all", "--run-adalora"), ("--run-all", "--config", "missing.yaml")])
def test_a_wrong_call_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert call(runner, *arguments) == 2


@pytest.mark.part("analyzer")
def test_analysis_has_the_five_sections_in_order(results: Path, tmp_path: Path) -> None:
    assert call(analyzer, "--results-dir", results, "--output-dir", tmp_path) == 0
    text = (tmp_path / "analysis_summary.md").read_text(encoding="utf-8")
    places = [text.index(section) for section in SECTIONS]
    assert places == sorted(places)
    assert "Smoke runs" in text[: places[0]]


@pytest.mark.part("analyzer")
def test_an_empty_directory_is_one_line_and_exit_2(tmp_path: Path, capsys) -> None:
    assert call(analyzer, "--results-dir", tmp_path, "--output-dir", tmp_path / "summary") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path) in error
    assert not (tmp_path / "summary").exists()


@pytest.mark.part("runner")
@pytest.mark.parametrize(("flags", "name"), [((), "adaptive"), (("--smoke",), "adaptive_smoke")])
def test_runs_go_into_the_repository_wherever_the_script_is_called(flags, name, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = runner.command(runner.parse(["--run-all", *flags]))
    assert arguments[arguments.index("--output") + 1] == str(ROOT / "experiments" / "outputs" / name)


@pytest.mark.part("analyzer")
def test_default_directories_lie_in_the_repository(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    asked = analyzer.parse([])
    assert asked.results_dir == ROOT / "experiments" / "outputs" / "adaptive" == runner.OUTPUTS / "adaptive"
    assert asked.output_dir == ROOT / "experiments" / "outputs" / "adaptive_analysis"


def test_documents_are_filled_from_records_and_then_stay(results: Path, tmp_path: Path, capsys) -> None:
    copies = [Path(shutil.copy(document, tmp_path)) for document in update_docs.DOCUMENTS]
    assert call(update_docs, results, *copies) == 0
    filled = [copy.read_bytes() for copy in copies]
    record = next(read_records(results))
    assert record.test is not None
    assert record.parameters is not None
    for text in (content.decode() for content in filled):
        row = next(line for line in text.splitlines() if line.startswith("| `adaptive`"))
        assert f"| {100 * record.test.accuracy:.1f} |" in row
        assert f"| {record.parameters.final:,} |" in row
        assert "Smoke runs" in text  # a number that means nothing says so
    capsys.readouterr()
    assert call(update_docs, results, *copies) == 0
    assert capsys.readouterr().out.count("unchanged") == len(copies)
    assert [copy.read_bytes() for copy in copies] == filled


@pytest.mark.parametrize(
    "marks", ["", "<!-- quickstart-table -->", "<!-- /quickstart-table --><!-- quickstart-table -->"]
)
def test_a_document_without_both_marks_is_left_alone(results: Path, tmp_path: Path, marks: str, capsys) -> None:
    document = tmp_path / "page.md"
    document.write_text(f"text {marks} text")
    assert call(update_docs, results, document) == 2
    assert capsys.readouterr().err.startswith(f"error: {document}: expected <!-- quickstart-table -->")
    assert document.read_text() == f"text {marks} text"


def test_every_part_that_a_test_names_is_one_of_the_seven() -> None:
    """Another would make the validation fail, which is run by hand."""
    files = [file for folder in ("tests", "experiments") for file in (ROOT / folder).rglob("test_*.py")]
    found = {
        part for file in files for part in re.findall(r"mark\.part\(\"([^\"]+)\"\)", file.read_text(encoding="utf-8"))
    }
    assert found == set(PARTS)


def marked_tests(parts: tuple[str, ...]) -> str:
    return "".join(f"@pytest.mark.part({part!r})\ndef test_{i}():\n    pass\n\n\n" for i, part in enumerate(parts))


PARTS = ("controller", "trainer", "configuration", "importance analysis", "quantization", "runner", "analyzer")
FAILING = "@pytest.mark.part('runner')\ndef test_fails():\n    assert 1 == 2\n"
NO_SETUP = (
    "@pytest.fixture\ndef broken():\n    raise OSError\n\n\n"
    "@pytest.mark.part('runner')\ndef test_starts(broken):\n    pass\n"
)


@pytest.mark.parametrize(
    ("tests", "code", "printed"),
    [
        (marked_tests(PARTS) + "def test_unmarked():\n    assert False\n", 0, "Passed: 7\nFailed: 0\nTotal: 7\n"),
        (marked_tests(PARTS) + FAILING, 1, "Passed: 7\nFailed: 1\nTotal: 8\n"),
        (marked_tests(PARTS) + NO_SETUP, 1, "Passed: 7\nFailed: 1\nTotal: 8\n"),
        (marked_tests(PARTS[1:]), 1, "part 'controller' has no passing test\nPassed: 6\nFailed: 0\nTotal: 6\n"),
        (marked_tests((*PARTS, "misspelt")), 1, "part 'misspelt' is not one of"),
        ("import missing_module\n", 1, "can't be collected"),
    ],
    ids=["all pass", "one fails", "one cannot start", "a part without test", "unknown part", "no import"],
)
def test_the_validation_counts_and_fails_when_it_should(
    tmp_path: Path, monkeypatch, capfd, tests: str, code: int, printed: str
) -> None:
    """It runs over other tests than the repository's, which lie in modules of a name that nothing else has."""
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['part(name): a part']\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "experiments").mkdir()
    (tmp_path / "tests" / f"test_{tmp_path.name}.py").write_text(f"import pytest\n\n\n{tests}")
    monkeypatch.syspath_prepend(ROOT)
    import test_adaptive_experiments as validation

    monkeypatch.setattr(validation, "ROOT", tmp_path)
    assert validation.main(["-n", "0", "-p", "no:cacheprovider"]) == code
    assert printed in capfd.readouterr().out


def test_the_validation_counts_over_processes_names_failures_and_leaves_out_slow_tests(
    tmp_path: Path, monkeypatch, capfd
) -> None:
    marks = "markers = ['part(name): a part', 'slow: waits long']"
    (tmp_path / "pyproject.toml").write_text(f"[tool.pytest.ini_options]\n{marks}\n")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "tests").mkdir()
    parts = ["controller", "trainer", "configuration", "importance analysis", "quantization", "runner", "analyzer"]
    tests = [f"@pytest.mark.part({part!r})\ndef test_{place}(): pass\n" for place, part in enumerate(parts)]
    tests.append("@pytest.mark.part('runner')\ndef test_fails(): assert 0\n")
    tests.append("@pytest.mark.slow\n@pytest.mark.part('runner')\ndef test_waits(): assert 0\n")
    (tmp_path / "tests" / f"test_{tmp_path.name}.py").write_text("import pytest\n\n" + "\n".join(tests))
    monkeypatch.syspath_prepend(ROOT)
    import test_adaptive_experiments as validation

    monkeypatch.setattr(validation, "ROOT", tmp_path)
    assert validation.main(["-p", "no:cacheprovider"]) == 1
    printed = capfd.readouterr().out
    assert "::test_fails" in printed.split("failed: ")[1].splitlines()[0]
    assert printed.endswith("Passed: 7\nFailed: 1\nTotal: 8\n")
