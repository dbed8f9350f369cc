"""A finished run comes back as it was tested, and PEFT loads it over the plain timm model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from peft_vit.cli import main
from peft_vit.data import load_data
from peft_vit.evaluation import measure, predict
from peft_vit.records import ADAPTER_FILE, RECORD_FILE, read_record
from peft_vit.runs.export import RestoredRun, restore_run
from peft_vit.safe_io import sha256_of

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("cache")

ADALORA = {
    "importance_metric": "sensitivity",
    "update_frequency": 1,
    "warmup_steps": 2,
    "final_steps": 2,
    "allocation_strategy": "global",
}
EXPERIMENTS = {
    "linear": {"method": "linear", "training": {}},
    "packed_linear": {
        "method": "qa_linear",
        "training": {},
        "qa_lora": {
            "quantization_bits": 4,
            "quantization_type": "nf4",
            "use_group_quantization": True,
            "group_size": 16,
        },
    },
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora": {"rank": 2, "scale": 1.7}},
    "adaptive": {"method": "adalora", "adalora": {**ADALORA, "total_rank_budget": 40}},
    "triplets": {"method": "adalora", "adalora": {**ADALORA, "total_rank_budget": 20, "parametrization": "svd"}},
    "theirs": {"method": "peft_lora", "peft_lora": {"rank": 2, "scale": 1.7}},
    "theirs_adaptive": {
        "method": "peft_adalora",
        "peft_adalora": {
            "initial_rank": 4,
            "target_rank": 2,
            "warmup_steps": 1,
            "update_frequency": 2,
            "final_steps": 2,
        },
    },
    "quantized": {
        "method": "qa_lora",
        "qa_lora": {
            "quantization_bits": 4,
            "quantization_type": "nf4",
            "quantization_schedule": "linear",
            "gradient_scaling_factor": 1.0,
            "use_group_quantization": True,
            "group_size": 16,
            "rank": 2,
        },
    },
}


@pytest.fixture(scope="module")
def runs(do_runs) -> dict[str, Path]:
    return do_runs(EXPERIMENTS, dataset="digits", train_images=24, validation_images=20, test_images=30)


def recorded(run: RestoredRun) -> dict[str, float]:
    """Return the test metrics that the record holds."""
    assert run.record.test is not None
    return run.record.test.model_dump(exclude_none=True)


def metrics_on_test(model: torch.nn.Module, run_dir: Path) -> dict[str, float]:
    """Measure a model on the run's test split, images normalized as the pretraining did."""
    spec = read_record(run_dir / RECORD_FILE).spec
    cfg = timm.get_pretrained_cfg("test_vit")
    batches = load_data(spec.data, spec.seed, smoke=False).test.open().ordered_batches(32, cfg.mean, cfg.std)
    return measure(*predict(model, batches, device=torch.device("cpu"), precision="fp32")).model_dump(exclude_none=True)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_restored_run_has_its_test_metrics(runs, name) -> None:
    run = restore_run(runs[name])
    assert metrics_on_test(run.model, runs[name]) == pytest.approx(recorded(run), rel=1e-5)


@pytest.mark.parametrize("name", ["linear", "lora", "adaptive", "triplets", "theirs", "theirs_adaptive"])
def test_peft_loads_an_export_over_the_plain_model(runs, weights, tmp_path, capsys, name) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(runs[name]), "--format", "peft", "--output", str(tmp_path / "out")])
    assert ended.value.code == 0
    assert str(tmp_path / "out" / "peft_vit.json") in capsys.readouterr().out
    base = json.loads((tmp_path / "out" / "peft_vit.json").read_text())
    assert base["weights_sha256"] == sha256_of(weights)
    assert base["weights_name"] == "file base.safetensors"
    assert base["class_names"] == [str(digit) for digit in range(10)]

    plain = timm.create_model(base["model"], img_size=base["image_size"])
    plain.load_state_dict(load_file(weights))
    plain.reset_classifier(len(base["class_names"]))
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    ours = restore_run(runs[name])
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(images), ours.model(images), rtol=0, atol=1e-5)
    assert metrics_on_test(theirs, runs[name]) == pytest.approx(recorded(ours), rel=1e-4)


def refusal(capsys: pytest.CaptureFixture[str], run_dir: Path, output: Path) -> str:
    """Return the one line that the command prints, after checking that it wrote nothing."""
    before = sorted(output.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run_dir), "--output", str(output)])
    assert ended.value.code == 2
    assert sorted(output.rglob("*")) == before
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(("name", "reason"), [("full", "every weight"), ("quantized", "quantized weights")])
def test_methods_without_a_counterpart(runs, tmp_path, capsys, name, reason) -> None:
    line = refusal(capsys, runs[name], tmp_path / "out")
    assert reason in line
    assert "lora, adalora or linear" in line


def test_a_folder_that_is_no_good_run(runs, tmp_path, capsys) -> None:
    assert "record.json" in refusal(capsys, tmp_path / "nowhere", tmp_path / "out")
    run_dir = tmp_path / "run"
    shutil.copytree(runs["lora"], run_dir)
    tensors = load_file(run_dir / ADAPTER_FILE)
    (run_dir / ADAPTER_FILE).unlink()
    assert ADAPTER_FILE in refusal(capsys, run_dir, tmp_path / "out")
    save_file(tensors, run_dir / ADAPTER_FILE)  # the same values, without the header
    line = refusal(capsys, run_dir, tmp_path / "out")
    assert f"{ADAPTER_FILE}: adapter_sha256: has SHA-256 " in line
    assert RECORD_FILE in line  # one of the two was changed, and who knows which
    shutil.copy(runs["lora"] / ADAPTER_FILE, run_dir)
    record = (run_dir / RECORD_FILE).read_text()
    content = json.loads(record)
    for names, said in (([], f"{RECORD_FILE}: class_names: holds no class"), (["a"] * 9, f"or {RECORD_FILE} is wrong")):
        (run_dir / RECORD_FILE).write_text(json.dumps(content | {"class_names": names}))
        assert said in refusal(capsys, run_dir, tmp_path / "out")
    (run_dir / RECORD_FILE).write_text(record.replace(".safetensors", ".safetensozs"))
    line = refusal(capsys, run_dir, tmp_path / "out")
    assert ".safetensozs: backbone.file: expected a .safetensors, .pth or .pt file" in line
    assert line.endswith(f"; or {RECORD_FILE} is wrong")
    (run_dir / RECORD_FILE).write_text(record.replace('"status": "done"', '"status": "failed"', 1))
    assert "this run failed" in refusal(capsys, run_dir, tmp_path / "out")


def test_other_weights_of_the_same_name(runs, tmp_path, capsys) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(runs["lora"], run_dir)
    other = tmp_path / "base.safetensors"
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), other)
    record = (run_dir / RECORD_FILE).read_text()
    content = json.loads(record)
    for names, said in (([], f"{RECORD_FILE}: class_names: holds no class"), (["a"] * 9, f"or {RECORD_FILE} is wrong")):
        (run_dir / RECORD_FILE).write_text(json.dumps(content | {"class_names": names}))
        assert said in refusal(capsys, run_dir, tmp_path / "out")
    moved, count = re.subn(r'"file": "[^"]*base\.safetensors"', f'"file": "{other}"', record)
    assert count == 1
    (run_dir / RECORD_FILE).write_text(moved)
    line = refusal(capsys, run_dir, tmp_path / "out")
    assert sha256_of(other) in line
    assert "trained on" in line


def test_an_export_overwrites_nothing(runs, tmp_path, capsys) -> None:
    (tmp_path / "thesis.txt").write_text("keep me")
    assert "holds files already" in refusal(capsys, runs["lora"], tmp_path)
