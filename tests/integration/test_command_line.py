"""Bad input is one line, exit code 2, and nothing lost; a run is done once; help needs no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from planted_runs import PlantedRuns
from pyarrow import parquet
from safetensors.torch import save_file
from written_runs import run_and_write

from peft_vit.config import load_study
from peft_vit.forecasting.time_limit import Limit
from peft_vit.records import read_records, read_study_file
from peft_vit.records.progress import study_lock
from peft_vit.studies import commands
from peft_vit.studies.plan import plan_study

pytestmark = [pytest.mark.part("configuration"), pytest.mark.usefixtures("cache")]

STUDY = """\
name: tiny
seeds: [0]
threads: 1
device: cpu
precision: fp32
backbone:
  model: test_vit
  weights: random
data:
  dataset: digits
  image_size: 32
  train_images: 24
  validation_images: 20
  test_images: 20
training:
  epochs: 2
  batch_size: 8
  learning_rate: 3e-3
experiments:
  - name: probe
    method: linear
  - name: low_rank
    method: lora
    lora: {rank: 2}
  - name: adaptive
    method: adalora
    adalora:
      total_rank_budget: 40
      allocation_strategy: top_k
      importance_metric: fisher
      update_frequency: 1
      warmup_steps: 2
  - name: quantized
    method: qa_lora
    qa_lora:
      quantization_bits: 4
      quantization_type: nf4
      quantization_schedule: linear
      gradient_scaling_factor: 1.0
      use_group_quantization: true
      group_size: 16
      rank: 2
"""
MISSING_DEVICE = "cuda" if not torch.cuda.is_available() else "mps"
SHA = "0" * 64

# What is replaced in the study, by what, and what the line must say: the field, and a part of the remedy.
BAD = {
    "unknown key": ("epochs: 2", "epohcs: 2", "training.epohcs", "unknown key"),
    "unknown model": ("model: test_vit", "model: tset_vit", "backbone.model", "did you mean test_vit"),
    "a ResNet": ("model: test_vit", "model: resnet10t", "backbone.model", "ResNet"),
    "rank above the width": ("lora: {rank: 2}", "lora: {rank: 65}", "experiments[1].lora.rank", "at most 64"),
    "no step to decide": ("warmup_steps: 2", "warmup_steps: 6", "experiments[2].adalora.warmup_steps", "train longer"),
    "no device": ("device: cpu", f"device: {MISSING_DEVICE}", "device", "use auto or cpu"),
    "image size": ("image_size: 32", "image_size: 33", "data.image_size", "use 32 or 48"),
    "too many images": ("train_images: 24", "train_images: 9999", "data.train_images", "ask for fewer"),
    "missing folder": ("dataset: digits", "dataset: image-folder\n  path: /nowhere", "data.path", "/nowhere"),
    "other weights of a tag": ("model: test_vit", "model: test_vit.in2k", "backbone.model", "expected one of"),
}


def write(folder: Path, text: str = STUDY) -> Path:
    file = folder / "study.yaml"
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def finished(_session_cache: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with one finished run of the study."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_VIT_CACHE", _session_cache)
        file = write(folder)
        record = run_and_write(plan_study(load_study(file), folder / "out", file=file).runs[0].spec, folder / "out")
    assert record.status == "done"
    return folder / "out"


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(f): (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_configuration(fault, tmp_path, finished, refused) -> None:
    old, new, field, remedy = BAD[fault]
    assert STUDY.count(old) == 1
    file = write(tmp_path, STUDY.replace(old, new))
    before = snapshot(finished)
    line = refused("run", file, "--output", finished)
    assert str(file) in line or "/nowhere" in line
    assert field in line
    assert remedy in line
    assert snapshot(finished) == before


@pytest.mark.parametrize("name", ["run", "plan"])
@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "give the path of a YAML file"), ("", ""), ("- a\n", ""), ("a: [1\n", ""), ("\x00", "")],
)
def test_what_is_no_configuration(name, content, said, tmp_path, refused) -> None:
    file = tmp_path / "study.yaml"
    if content is not None:
        file.write_text(content)
    line = refused(name, file, "--output", tmp_path / "out")
    assert str(file) in line
    assert said in line


def test_bad_weights_files(tmp_path, finished, refused) -> None:
    weights = tmp_path / "weights.safetensors"
    text = STUDY.replace("weights: random", f"weights: file\n  file: {weights}\n  sha256: '{SHA}'")
    file, before = write(tmp_path, text), snapshot(finished)
    line = refused("run", file, "--output", tmp_path / "out")
    assert "backbone.file" in line
    assert "does not exist" in line
    assert str(weights) in line
    save_file({"a": torch.zeros(1)}, weights)
    line = refused("run", file, "--output", tmp_path / "out")
    assert "backbone.sha256" in line
    assert SHA in line
    assert "correct the hash" in line
    assert not (tmp_path / "out").exists()
    assert snapshot(finished) == before


def test_a_corrupted_image(images, tmp_path, refused) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    (folder / "class_1" / "04.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    text = STUDY.replace("dataset: digits", f"dataset: image-folder\n  path: {folder}")
    file = write(tmp_path, text.replace("_images: 20", "_images: 12"))
    own = ("--method", "lora", "--model", "test_vit", "--weights", "random", "--image-size", "32")
    for words in (("run", file), ("train", folder, *own)):
        line = refused(*words, "--output", tmp_path / "out")
        assert "04.png" in line
        assert "replace it or take it out" in line
    assert list((tmp_path / "out").rglob("*.json")) == []


def test_two_studies_of_one_name_and_a_changed_study(tmp_path, finished, command, refused) -> None:
    first = write(tmp_path)
    (tmp_path / "other").mkdir()
    second = write(tmp_path / "other")
    before = snapshot(finished)
    assert "'tiny' names two of the given studies" in refused("run", first, second, "--output", finished)
    changed = write(tmp_path, STUDY.replace("train_images: 24", "train_images: 25"))
    said = command("run", changed, "--output", finished, code=2).err.splitlines()
    assert "probe/seed_0/record.json: was made with another configuration" in said[0]
    assert said[-3:] == [" data:", "-  train_images: 24", "+  train_images: 25"]
    assert snapshot(finished) == before


DIVERGING = "  - {name: diverging, method: full, training: {learning_rate: 1e30, optimizer: sgd, clip_norm: null}}\n"


@pytest.mark.part("runner")
@pytest.mark.usefixtures("in_this_process")
def test_a_study_is_done_once_and_a_failed_run_again(tmp_path, command) -> None:
    head, _, _ = STUDY.partition("  - name: low_rank")
    file, out = write(tmp_path, head + DIVERGING), tmp_path / "out"
    run = ("run", file, "--output", out)
    command(*run, "--method", "linear")
    assert "tiny: 2 planned = 1 done + 0 failed + 0 pending + 0 running + 1 skipped" in command("status", out).out
    said = command(*run, code=1)
    assert "1 run failed:" in said.err
    assert "tiny/diverging/seed_0: DivergedError" in said.err
    assert "[1/1] tiny/diverging/seed_0: FAILED, DivergedError" in said.out
    assert {r.spec.experiment.name: r.status for r in read_records(out)} == {"probe": "done", "diverging": "failed"}
    before = snapshot(out)
    assert "2 runs: 1 to do" in command("plan", file, "--output", out).out
    assert command("status", out).out.splitlines() == [
        "tiny: 2 planned = 1 done + 1 failed + 0 pending + 0 running + 0 skipped",
        f"  failed   diverging/seed_0: {next(r.error for r in read_records(out) if r.status == 'failed')}",
    ]
    assert "tiny/diverging/seed_0: DivergedError" in command(*run, "--skip-failed", code=1).err
    assert snapshot(out) == before
    assert "1 run: 0 to do, 1 already done and skipped." in command(*run, "--method", "linear").out
    command(*run, code=1)
    assert "attempt 2: DivergedError" in command("status", out).out


@pytest.mark.part("runner")
@pytest.mark.usefixtures("in_this_process")
def test_a_study_that_was_begun_goes_on_as_it_was(tmp_path, command) -> None:
    head, _, _ = STUDY.partition("  - name: low_rank")
    head = head.replace("method: linear", "method: full")  # a probe alone would refuse the study's epochs
    file, out = write(tmp_path, head), tmp_path / "out"
    command("run", file, "--output", out)
    record = out / "tiny/probe/seed_0/record.json"
    written = record.stat().st_mtime_ns
    for old, new in (("batch_size: 8", "batch_size: 4"), ("seeds: [0]", "seeds: [1]"), ("name: probe", "name: other")):
        said = command("run", write(tmp_path, head.replace(old, new)), "--output", out, code=2).err
        assert f"{out / 'tiny/study.json'}: configuration: was begun with another configuration" in said.splitlines()[0]
        assert f"+++ {file}" in said
    more = head.replace("seeds: [0]", "description: more\nexecution: {retries: 0}\nseeds: [0, 1]")
    command("run", write(tmp_path, more), "--output", out)
    assert "tiny: 2 planned = 2 done + 0 failed + 0 pending + 0 running + 0 skipped" in command("status", out).out
    assert record.stat().st_mtime_ns == written
    for format in ("md", "html"):
        command("report", out, "--format", format)


OWN = ("--method", "lora", "--model", "test_vit", "--weights", "random")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "{file}", "--minutes", "0"), "error: --minutes: input should be greater than 0, got 0"),
        (("run", "{file}", "--minutes", "nan"), "error: --minutes: input should be a finite number, got nan"),
        (("run", "{file}", "--dry-run", "--minutes", "0"), "error: --minutes: input should be greater than 0, got 0"),
        (("run", "{file}", "{file}", "--minutes", "9"), "error: --minutes: is of one study, and 2 are given"),
        (("report", "{missing}"), "{missing}: does not exist"),
        (("report", "{empty}", "--format", "md"), "{empty}: holds no record.json"),
        (("status", "{empty}"), "holds no study; run one first"),
        (("status", "{missing}"), "does not exist"),
        (("status", "{damaged}"), "study.json: smoke: is missing; move it away"),
        (("train", "{empty}", *OWN, "--steps", "0"), "'--steps'"),
        (("train", "{empty}", *OWN, "--learning-rate", "0"), "error: --learning-rate: input should be greater than 0"),
        (("train", "{empty}", *OWN, "--init-adapter", "a", "--rank", "4"), "error: --rank: has no effect with --init-"),
        (("train", "{empty}", *OWN, "--output", "{empty}/out"), "--output: lies in {empty}"),
        (("tune", "{empty}", "--max-latency", "50"), "error: --max-latency: '50' is not a time above 0"),
        (("bench", "a.onnx", "--batch", "1,x"), "error: --batch: expected whole numbers above 0, as in 1,32; got 'x'"),
    ],
)
def test_what_can_not_be_asked_for_is_one_line_and_leaves_nothing(words, said, tmp_path, refused, monkeypatch) -> None:
    places = {name: tmp_path / name for name in ("missing", "empty", "damaged")} | {"file": write(tmp_path)}
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged" / "tiny").mkdir(parents=True)
    (tmp_path / "damaged" / "tiny" / "study.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    assert said.format(**places) in refused(*(word.format(**places) for word in words))
    assert snapshot(tmp_path) == before


@pytest.fixture
def runs_of_a_minute(monkeypatch) -> PlantedRuns:
    """Let every run of the study take a minute, by its record and by the clock."""
    now = [0.0]
    executor = PlantedRuns(lambda *_: 0.9)
    carry_out = executor._record

    def a_minute_later(run):
        now[0] += 60
        return carry_out(run).model_copy(update={"seconds": 60.0})

    executor._record = a_minute_later
    monkeypatch.setattr(commands, "Limit", lambda minutes, _: Limit(minutes, now[0], clock=lambda: now[0]))
    monkeypatch.setattr("peft_vit.studies.executors.local.LocalExecutor", lambda *_, **__: executor)
    return executor


@pytest.mark.part("runner")
def test_within_minutes_runs_start_seed_by_seed_and_the_rest_is_left(tmp_path, command, runs_of_a_minute) -> None:
    head, _, _ = STUDY.partition("  - name: adaptive")
    file, out = write(tmp_path, head.replace("seeds: [0]", "seeds: [1, 0, 2]")), tmp_path / "out"
    run = ("run", file, "--output", out, "--minutes", "3.5")
    assert "6 runs: 6 to do in about" in command(*run, "--dry-run").out
    assert not out.exists()
    said = command(*run).out
    assert runs_of_a_minute.done == ["probe/seed_1", "low_rank/seed_1", "probe/seed_0"]
    assert "Left: 3 of the study's runs; the same command goes on, for another 3.5 minutes." in said
    assert "tiny: 6 planned = 3 done + 0 failed + 3 pending" in command("status", out).out
    command("run", file, "--output", out, "--minutes", "1.5", "--method", "lora", "--seeds", "2")
    assert runs_of_a_minute.done[3:] == ["low_rank/seed_2"]
    assert "Left: " not in command(*run).out
    assert runs_of_a_minute.done[4:] == ["low_rank/seed_0", "probe/seed_2"]
    before = snapshot(out)
    assert "6 runs: 0 to do, 6 already done and skipped." in command(*run).out
    assert snapshot(out) == before
    command("run", file, "--output", out)  # as the same study, without a limit
    assert read_study_file(out / "tiny").configuration.data == load_study(file).data


@pytest.mark.part("runner")
def test_a_table_without_the_column_that_is_asked_for(tmp_path, refused) -> None:
    pytest.importorskip("datasets")
    images = pa.array([{"bytes": b"", "path": None}] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    (tmp_path / "set").mkdir()
    parquet.write_table(pa.table({"image": images, "kind": ["a", "b"]}), tmp_path / "set" / "train.parquet")
    text = STUDY.replace("dataset: digits", f"dataset: hf\n  path: {tmp_path / 'set'}\n  label_column: label")
    line = refused("run", write(tmp_path, text), "--output", tmp_path / "out")
    assert f"{tmp_path / 'set'}: data.label_column: there is no column 'label'; expected one of image, kind" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_who_comes_second_leaves_and_names_the_first(tmp_path, command, refused) -> None:
    file, out = write(tmp_path), tmp_path / "out"
    with study_lock(out / "tiny"):
        line = refused("run", file, "--output", out)
        assert f"{out / 'tiny'}: another command works on this study, process {os.getpid()} on " in line
        done = python("-c", SECOND, str(file), str(out))  # and has not waited for torch before
        assert (done.returncode, done.stdout) == (2, "")
        command("plan", file, "--output", out)  # planning disturbs nobody
    assert not out.exists()


SECOND = """
import sys
from peft_vit.cli import main
try:
    main(["run", sys.argv[1], "--output", sys.argv[2]])
except SystemExit as end:
    assert "torch" not in sys.modules
    raise
"""


def test_lists(command, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # narrower, names are folded
    for name, wanted in (("datasets", "elpv"), ("models", "vit_small_patch14_dinov2")):
        assert wanted in command(name).out


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "import peft_vit\npeft_vit.tune, peft_vit.train, peft_vit.load_results",
        "from peft_vit.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0",
        "from peft_vit import AdaLoraConfig, QaLoraConfig",
    ],
)
def test_no_torch_is_imported(code) -> None:
    done = python(
        "-c", f"{code}\nimport sys\nassert not {{'torch', 'timm', 'numpy', 'pandas'}} & set(sys.modules), 'imported'"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_import_alone_brings_nothing_that_does_not_come_with_python() -> None:
    """So that it takes a few hundredths of a second."""
    brought = "{name.split('.')[0] for name in sys.modules.keys() - before}"
    code = f"import sys\nbefore = set(sys.modules)\nimport peft_vit\nfound = {brought} - sys.stdlib_module_names"
    done = python("-c", f"{code}\nassert found == {{'peft_vit'}}, found")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_data_sets_bring_no_library_that_only_one_of_them_needs() -> None:
    unwanted = {"datasets", "pyarrow", "torchvision", "transformers"}
    done = python("-c", f"import peft_vit.data, sys; assert not {unwanted} & set(sys.modules), 'imported'")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_public_names() -> None:
    import peft_vit
    from peft_vit.allocation.adalora_controller import AdaLoRAController
    from peft_vit.training.qa_lora import QALoRATrainer

    assert peft_vit.AdaLoRAController is AdaLoRAController
    assert peft_vit.QALoRATrainer is QALoRATrainer
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        peft_vit.Nothing  # noqa: B018


def test_a_real_process_ends_with_one_line(tmp_path) -> None:
    file = write(tmp_path, STUDY.replace("epochs: 2", "epochs: -2"))
    done = python("-m", "peft_vit.cli", "run", str(file), "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {file}:16: ")
    assert "training.epochs" in line
