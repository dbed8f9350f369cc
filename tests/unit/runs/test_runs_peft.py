"""PEFT's methods beside ours: the same split, head, order of images and records; what would fail is refused early."""

import pytest
from done_runs import restored
from written_runs import planned, run_and_write

from peft_vit.base.errors import UserError
from peft_vit.core.adapters.footprint import trainable_parameters
from peft_vit.core.adapters.peft_layers import peft_layers
from peft_vit.lab.report import build_report
from peft_vit.runs.records.storage import ADAPTER_FILE, read_record, run_folder
from peft_vit.runs.scheduling.plan import smoke_study
from peft_vit.runs.this_machine.machine import package_versions

pytest.importorskip("peft")
pytestmark = pytest.mark.part("runner")


@pytest.fixture
def beside(study):
    """Make a study of the linear probe, our LoRA and PEFT's two methods; keyword arguments change PEFT's AdaLoRA."""

    def make(**adalora):
        config = study("linear", "lora", "peft_lora", "peft_adalora")
        *others, adaptive = config.experiments
        settings = adaptive.peft_adalora.model_copy(update={"update_frequency": 2, "final_steps": 2, **adalora})
        changed = adaptive.model_copy(update={"peft_adalora": settings})
        return config.model_copy(update={"experiments": (*others, changed)})

    return make


def test_without_peft_a_plan_is_one_line(beside, tmp_path, without) -> None:
    without("peft")
    with pytest.raises(UserError) as caught:
        planned(beside(), tmp_path)
    assert caught.value.field == "experiments[2].method"
    assert "pip install 'peft-vit[peft]'" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert "peft" not in package_versions()


@pytest.mark.slow
def test_runs_are_recorded_as_ours_are(beside, tmp_path) -> None:
    """That they are paired with ours and repeat: test_runs_execute.py."""
    folder = tmp_path / "runs"
    runs = planned(beside(), folder).runs
    records = {run.spec.experiment.name: run_and_write(run.spec, folder) for run in runs}
    assert [record.error for record in records.values()] == [None] * 4
    assert all("peft" in record.provenance.packages for record in records.values())
    fixed, adaptive = records["peft_lora"], records["peft_adalora"]
    assert fixed.steps[-1].loss != records["lora"].steps[-1].loss
    for record in (fixed, adaptive):
        assert record == read_record(run_folder(folder, record.spec) / "record.json")
        matrices = {"qkv": "attn.qkv", "out": "attn.out", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
        first = {site.matrix: site.name for site in record.sites[:4]}
        assert first == {matrix: f"blocks.0.{name}" for matrix, name in matrices.items()}
        assert (record.sites[0].in_features, record.sites[0].out_features) == (64, 192)
        extra = 1 if record is adaptive else 0
        size = sum(
            record.rank_history[0].ranks[site.name] * (site.in_features + site.out_features + extra)
            for site in record.sites
        )
        assert record.parameters.initial == record.parameters.final == record.parameters.peak == size + 650
        assert record.bytes.trainable_bytes == 4 * record.parameters.final
        file = run_folder(folder, record.spec) / ADAPTER_FILE
        assert record.bytes.adapter_file_bytes == file.stat().st_size
    assert set(fixed.rank_history[-1].ranks.values()) == {2}
    assert [(e.step, e.budget) for e in adaptive.rank_history] == [(0, 96), (2, 62), (4, 48)]
    assert sum(adaptive.rank_history[-1].ranks.values()) == 48
    assert all(row.penalties["orthogonality"] > 0 for row in adaptive.steps)
    assert [e.deployable for e in adaptive.evaluations] == [False, True]
    text = build_report(folder, tmp_path / "report").markdown.read_text()
    assert all(name in text for name in ("peft_lora", "peft_adalora"))


@pytest.mark.parametrize("name", ["peft_lora", "peft_adalora"])
def test_a_saved_adapter_is_restored(beside, tmp_path, name) -> None:
    (spec,) = (run.spec for run in planned(beside(), tmp_path).runs if run.spec.experiment.name == name)
    record = run_and_write(spec, tmp_path)
    model = restored(record, tmp_path).model
    assert trainable_parameters(model) == record.parameters.final
    if name == "peft_adalora":
        live = [int((layer.lora_E["default"] != 0).sum()) for layer in peft_layers(model).values()]
        assert live == list(record.rank_history[-1].ranks.values())


def test_smoke_keeps_the_method_and_shortens_its_schedule(beside, tmp_path) -> None:
    small = smoke_study(beside(warmup_steps=100, update_frequency=50), patch_size=16)
    assert [e.method for e in small.experiments] == ["linear", "lora", "peft_lora", "peft_adalora"]
    runs = planned(beside(warmup_steps=100, update_frequency=50), tmp_path, smoke=True).runs
    record = run_and_write(runs[-1].spec, tmp_path)
    assert (record.status, record.error) == ("done", None)
    assert sum(record.rank_history[-1].ranks.values()) == 48
