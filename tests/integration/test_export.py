"""A finished run comes back as it was tested, and PEFT loads it over the plain timm model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from peft_vit.base.files import sha256_of
from peft_vit.core.tasks import CLASSIFICATION
from peft_vit.core.training.metrics import predict
from peft_vit.data import load_data
from peft_vit.deploy.restore import RestoredRun, restore_run
from peft_vit.runs.records.storage import ADAPTER_FILE, RECORD_FILE, read_record

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("cache")


def recorded(run: RestoredRun) -> dict[str, float]:
    """Return the test metrics that the record holds."""
    assert run.record.test is not None
    return run.record.test.model_dump(exclude_none=True)


def metrics_on_test(model: torch.nn.Module, run_dir: Path) -> dict[str, float]:
    """Measure a model on the run's test split, images normalized as the pretraining did."""
    spec = read_record(run_dir / RECORD_FILE).spec
    cfg = timm.get_pretrained_cfg("test_vit")
    batches = load_data(spec.data, spec.seed, smoke=False).test.open().ordered_batches(32, cfg.mean, cfg.std)
    return CLASSIFICATION.measure(*predict(model, batches, precision="fp32")).model_dump(exclude_none=True)


@pytest.mark.parametrize("name", ["full", "nf4", "packed_linear", "dora", "int4_adaptive", "mixed"])  # the others below
def test_a_restored_run_has_its_test_metrics(run_of, name) -> None:
    run = restore_run(run_of(name))
    assert metrics_on_test(run.model, run_of(name)) == pytest.approx(recorded(run), rel=1e-5)


@pytest.mark.parametrize("name", ["linear", "lora", "adaptive", "triplets", "theirs", "theirs_adaptive"])
def test_peft_loads_an_export_over_the_plain_model(run_of, weights, tmp_path, command, name) -> None:
    command("export", run_of(name), "--format", "peft", "--output", tmp_path / "out")
    base = json.loads((tmp_path / "out" / "peft_vit.json").read_text())
    assert (base["weights_name"], base["weights_sha256"]) == ("file base.safetensors", sha256_of(weights))
    assert base["class_names"] == ["class_0", "class_1", "class_2"]
    plain = timm.create_model(base["model"], img_size=base["image_size"])
    plain.load_state_dict(load_file(weights))
    plain.reset_classifier(len(base["class_names"]))
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    ours = restore_run(run_of(name))
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(theirs(images), ours.model(images), rtol=0, atol=1e-5)
    for model, tolerance in ((theirs, 1e-4), (ours.model, 1e-5)):
        assert metrics_on_test(model, run_of(name)) == pytest.approx(recorded(ours), rel=tolerance)


@pytest.fixture
def refusal(refused: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """Return a call of the export: the one line that it prints, after checking that it wrote nothing."""

    def call(run_dir: Path, output: Path = tmp_path / "out") -> str:
        before = sorted(output.rglob("*"))
        line = refused("export", run_dir, "--format", "peft", "--output", output)
        assert sorted(output.rglob("*")) == before
        return line

    return call


def test_what_has_no_counterpart_or_no_room(run_of, tmp_path, refusal) -> None:
    for name, reason in (("full", "every weight"), ("nf4", "quantized weights"), ("int4", "--format safetensors")):
        line = refusal(run_of(name))
        assert reason in line
        assert "lora, adalora or linear" in line
    (tmp_path / "thesis.txt").write_text("keep me")
    assert "holds files already" in refusal(run_of("lora"), tmp_path)


@pytest.fixture
def run_dir(run_of: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a run's folder that a test may spoil."""
    return Path(shutil.copytree(run_of("lora"), tmp_path / "run"))


def test_a_folder_that_is_no_good_run(run_of, run_dir, refusal) -> None:
    assert "does not exist; name the folder of a run" in refusal(run_dir.parent / "nowhere")
    tensors = load_file(run_dir / ADAPTER_FILE)
    (run_dir / ADAPTER_FILE).unlink()
    assert ADAPTER_FILE in refusal(run_dir)
    save_file(tensors, run_dir / ADAPTER_FILE)  # the same values, without the header
    line = refusal(run_dir)
    assert f"{ADAPTER_FILE}: adapter_sha256: has SHA-256 " in line
    assert RECORD_FILE in line  # one of the two was changed, and who knows which
    shutil.copy(run_of("lora") / ADAPTER_FILE, run_dir)
    record = (run_dir / RECORD_FILE).read_text()
    content = json.loads(record)
    for field, value in (("class_names", []), ("class_names", ["a"] * 2), ("split_sizes", {"test": 4})):
        (run_dir / RECORD_FILE).write_text(json.dumps(content | {field: value}))
        assert RECORD_FILE in refusal(run_dir)
    (run_dir / RECORD_FILE).write_text(record.replace(".safetensors", ".safetensozs"))
    line = refusal(run_dir)
    assert ".safetensozs: expected a .safetensors, .pth or .pt file" in line
    assert line.endswith(f"; or {RECORD_FILE} is wrong")
    (run_dir / RECORD_FILE).write_text(record.replace('"status": "done"', '"status": "failed"', 1))
    assert "this run failed" in refusal(run_dir)


def test_other_weights_of_the_same_name(run_dir, tmp_path, refusal) -> None:
    other = tmp_path / "base.safetensors"
    save_file(timm.create_model("test_vit", img_size=32).state_dict(), other)
    record = json.loads((run_dir / RECORD_FILE).read_text())
    record["spec"]["backbone"]["file"] = str(other)
    (run_dir / RECORD_FILE).write_text(json.dumps(record))
    line = refusal(run_dir)
    assert sha256_of(other) in line
    assert "trained on" in line
