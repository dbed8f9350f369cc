"""Bad input is one line, exit code 2, and nothing lost; a run is done once; help needs no torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from written_runs import run_and_write

from peft_vit.cli import main
from peft_vit.config import load_study
from peft_vit.experiments import plan_study
from peft_vit.records import read_records

pytestmark = [pytest.mark.part("configuration"), pytest.mark.usefixtures("cache")]

STUDY = """\
name: tiny
seeds: [0]
threads: 1
device: cpu
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
    "wrong type": ("epochs: 2", "epochs: two", "training.epochs", "'two'"),
    "duplicate key": ("  epochs: 2\n", "  epochs: 2\n  epochs: 3\n", "epochs", "remove"),
    "unknown data set": ("dataset: digits", "dataset: digit", "data.dataset", "'digits'"),
    "unknown model": ("model: test_vit", "model: tset_vit", "backbone.model", "did you mean test_vit"),
    "a ResNet": ("model: test_vit", "model: resnet10t", "backbone.model", "ResNet"),
    "rank 0": ("lora: {rank: 2}", "lora: {rank: 0}", "experiments[1].lora.rank", "greater than or equal to 1"),
    "rank above the width": ("lora: {rank: 2}", "lora: {rank: 65}", "experiments[1].lora.rank", "at most 64"),
    "group size": ("group_size: 16", "group_size: 24", "experiments[3].qa_lora.group_size", "does not divide the 64"),
    "rank above the groups": ("group_size: 16", "group_size: 64", "experiments[3].qa_lora.rank", "at most 1"),
    "budget below the minima": (
        "total_rank_budget: 40", "minimum_rank: 2\n      total_rank_budget: 40",
        "experiments[2].adalora.total_rank_budget", "expected 72",
    ),
    "nf4 with 8 bits": ("quantization_bits: 4", "quantization_bits: 8", "experiments[3].qa_lora", "nf4 stores 4 bits"),
    "no step to decide": ("warmup_steps: 2", "warmup_steps: 6", "experiments[2].adalora.warmup_steps", "train longer"),
    "no step to finish": (
        "group_size: 16", "group_size: 16\n      quantization_end_step: 7",
        "experiments[3].qa_lora.quantization_end_step", "within 6 steps",
    ),
    "no device": ("device: cpu", f"device: {MISSING_DEVICE}", "device", "use auto or cpu"),
    "image size": ("image_size: 32", "image_size: 33", "data.image_size", "use 32 or 48"),
    "too many images": ("train_images: 24", "train_images: 9999", "data.train_images", "ask for fewer"),
    "missing folder": ("dataset: digits", "dataset: image-folder\n  path: /nowhere", "data.path", "/nowhere"),
    "other weights of a tag": ("model: test_vit", "model: test_vit.in2k", "backbone.model", "expected one of"),
}  # fmt: skip


def write(folder: Path, text: str = STUDY) -> Path:
    file = folder / "study.yaml"
    file.write_text(text)
    return file


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Return the line that a command prints on bad input, after checking that it is the only one."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.endswith("\n")
    (line,) = error.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    return line


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
def test_a_bad_configuration(fault, tmp_path, finished, capsys) -> None:
    old, new, field, remedy = BAD[fault]
    assert STUDY.count(old) == 1
    file = write(tmp_path, STUDY.replace(old, new))
    before = snapshot(finished)
    line = refusal(capsys, "run", file, "--output-dir", finished)
    assert str(file) in line or "/nowhere" in line
    assert field in line
    assert remedy in line
    assert snapshot(finished) == before


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "give the path of a YAML file"), ("", ""), ("- a\n", ""), ("a: [1\n", ""), ("\x00", "")],
)
def test_what_is_no_configuration(command, content, said, tmp_path, capsys) -> None:
    file = tmp_path / "study.yaml"
    if content is not None:
        file.write_text(content)
    line = refusal(capsys, command, file, "--output-dir", tmp_path / "out")
    assert str(file) in line
    assert said in line


def test_bad_weights_files(tmp_path, finished, capsys) -> None:
    weights = tmp_path / "weights.safetensors"
    text = STUDY.replace("weights: random", f"weights: file\n  file: {weights}\n  sha256: '{SHA}'")
    file, before = write(tmp_path, text), snapshot(finished)
    line = refusal(capsys, "run", file, "--output-dir", tmp_path / "out")
    assert "backbone.file" in line
    assert "does not exist" in line
    assert str(weights) in line
    save_file({"a": torch.zeros(1)}, weights)
    line = refusal(capsys, "run", file, "--output-dir", tmp_path / "out")
    assert "backbone.sha256" in line
    assert SHA in line
    assert "get the right file or correct the hash" in line
    assert not (tmp_path / "out").exists()
    assert snapshot(finished) == before


def test_a_corrupted_image(tmp_path, capsys) -> None:
    for index in range(60):
        image = tmp_path / "images" / f"class_{index % 3}" / f"{index:02d}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (32, 32), index).save(image)
    broken = tmp_path / "images" / "class_1" / "04.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    file = write(tmp_path, STUDY.replace("dataset: digits", f"dataset: image-folder\n  path: {tmp_path / 'images'}"))
    file.write_text(file.read_text().replace("train_images: 24", "train_images: 20"))
    line = refusal(capsys, "run", file, "--output-dir", tmp_path / "out")
    assert "04.png" in line
    assert "replace it or take it out" in line
    line = refusal(
        capsys, "train", tmp_path / "images", "--method", "lora", "--model", "test_vit", "--weights", "random",
        "--image-size", "32", "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert "04.png" in line
    assert list((tmp_path / "out").rglob("*.json")) == []


def test_two_studies_of_one_name_and_a_changed_study(tmp_path, finished, capsys) -> None:
    first = write(tmp_path)
    (tmp_path / "other").mkdir()
    second = write(tmp_path / "other")
    before = snapshot(finished)
    assert "'tiny' names two of the given studies" in refusal(capsys, "run", first, second, "--output-dir", finished)
    changed = write(tmp_path, STUDY.replace("train_images: 24", "train_images: 25"))
    line = refusal(capsys, "run", changed, "--output-dir", finished)
    assert "probe/seed_0/record.json" in line
    assert "data.train_images: 24 -> 25" in line
    assert snapshot(finished) == before


def test_results_that_are_not_there(tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    for command in ("analyze", "report"):
        for folder, said in (("missing", "does not exist"), ("empty", "holds no record.json")):
            line = refusal(capsys, command, tmp_path / folder)
            assert str(tmp_path / folder) in line
            assert said in line


@pytest.mark.part("runner")
def test_a_study_is_done_once_and_a_failed_run_again(tmp_path, capsys) -> None:
    head, _, _ = STUDY.partition("  - name: low_rank")
    diverging = (
        "  - {name: diverging, method: full, training: {learning_rate: 1e30, optimizer: sgd, clip_norm: null}}\n"
    )
    file, out = write(tmp_path, head + diverging), tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["run", str(file), "--output-dir", str(out)])
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert "1 runs failed:" in said.err
    assert "tiny/diverging/seed_0: DivergedError" in said.err
    assert "[1/2] tiny/probe/seed_0: validation" in said.out
    assert {r.spec.experiment.name: r.status for r in read_records(out)} == {"probe": "done", "diverging": "failed"}
    before = snapshot(out)
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(file), "--output-dir", str(out)])
    assert ended.value.code == 0
    assert "2 runs: 1 to do" in capsys.readouterr().out
    assert snapshot(out) == before
    done = write(tmp_path, head)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(done), "--output-dir", str(out)])
    assert ended.value.code == 0
    assert "1 runs: 0 to do in about 0.0 minutes, 1 already done and skipped." in capsys.readouterr().out
    assert snapshot(out) == before


def test_lists(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # narrower, names are folded
    for command, wanted in (("datasets", "elpv"), ("models", "vit_small_patch14_dinov2")):
        with pytest.raises(SystemExit) as ended:
            main([command])
        assert ended.value.code == 0
        assert wanted in capsys.readouterr().out


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "import peft_vit",
        "from peft_vit.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit as e:\n    assert e.code == 0",
        "from peft_vit import AdaLoraConfig, QaLoraConfig",
    ],
)
def test_no_torch_is_imported(code) -> None:
    done = python("-c", f"{code}\nimport sys\nassert not {{'torch', 'timm', 'numpy'}} & set(sys.modules), 'imported'")
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
    done = python("-m", "peft_vit.cli", "run", str(file), "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {file}:15: ")
    assert "training.epochs" in line
