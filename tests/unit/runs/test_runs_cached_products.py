"""The choice of a product is kept for this machine, and what a study multiplies is what it was begun with."""

from pathlib import Path

import pytest
import torch
from done_runs import do_one, with_settings

from peft_vit.base.errors import UserError
from peft_vit.core.adapters.matmuls import MatmulTimes
from peft_vit.core.config import StudyConfig, load_study
from peft_vit.core.quantization.integers import Int8Matmul
from peft_vit.runs.execute import run_one
from peft_vit.runs.records.storage import write_study_file
from peft_vit.runs.scheduling.plan import plan_study
from peft_vit.runs.scheduling.scheduler import study_file
from peft_vit.runs.this_machine import matmuls

pytestmark = pytest.mark.part("runner")

CPU = torch.device("cpu")
MEASURED = matmuls.choose_product  # before a fixture of all tests replaces it
EIGHT, SEVEN = Int8Matmul("int_mm", 8), Int8Matmul("qlinear", 7)
FAST, SLOWER, SLOW = (MatmulTimes(EIGHT, seconds, 0.01) for seconds in (0.004, 0.02, 3.0))


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch):
    """Say what this machine's products take, by the bits that are asked for."""

    def say(choice: MatmulTimes, seven: MatmulTimes | None = None) -> None:
        monkeypatch.setattr(
            matmuls, "choose_product", lambda device, precision, bits=None: (seven or choice) if bits == 7 else choice
        )

    return say


def test_a_choice_is_kept_by_precision_and_bits_and_measured_again_if_its_file_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path))
    asked = []

    def measured(device: torch.device, dtype: torch.dtype, bits: int | None) -> MatmulTimes:
        asked.append((dtype, bits))
        return FAST

    monkeypatch.setattr(matmuls, "time_matmuls", measured)

    def choose(*given: object) -> MatmulTimes:
        MEASURED.cache_clear()  # as another process would
        return MEASURED(CPU, *given)

    assert choose("fp32") == choose("fp32") == FAST
    assert asked == [(torch.float32, None)]
    choose("bf16")
    choose("fp32", 7)
    assert asked == [(torch.float32, None), (torch.bfloat16, None), (torch.float32, 7)]
    for file in (tmp_path / "matmul_times").iterdir():
        file.write_text("{}")
    assert choose("fp32") == FAST
    assert len(asked) == 4
    assert "measured again" in caplog.text
    monkeypatch.setattr(matmuls, "instruction_limits", lambda: ["AVX2", "AVX2"])
    choose("fp32")
    assert len(asked) == 5
    MEASURED.cache_clear()


@pytest.fixture
def begin(found):
    """Leave the file of a study that another machine has begun."""

    def write(config: StudyConfig, folder: Path) -> None:
        found(FAST)
        plan = plan_study(with_settings(config, "training", compute="float", integer_bits=None), folder, file=None)
        training = config.experiments[0].training
        begun = with_settings(plan.study, "training", compute=training.compute, integer_bits=training.integer_bits)
        write_study_file(folder / config.name, study_file(begun, (), smoke=False, data_sha256=plan.data_sha256))

    return write


def computes(plan) -> list[tuple[str, int | None]]:
    return [(own.training.compute, own.training.integer_bits) for own in plan.study.experiments]


def test_auto_is_decided_when_a_study_begins_and_stays(study, tmp_path, found) -> None:
    config = with_settings(study("lora"), "training", compute="auto")
    found(FAST)
    plan = plan_study(config, tmp_path, file=None)
    assert computes(plan) == [("int8", 8)]
    assert plan.compute_note == (
        "compute: auto is int8: products take 4.0 ms in 8-bit integers (torch._int_mm), 10 in float"
    )
    found(SLOWER)
    assert computes(plan_study(config, tmp_path, file=None)) == [("float", None)]


def test_a_study_goes_on_with_the_numbers_that_it_was_begun_with(study, tmp_path, found, begin) -> None:
    auto = with_settings(study("lora"), "training", compute="auto")
    for compute, bits in (("float", None), ("int8", 8), ("int8", 7), ("int8", None)):  # None: by an earlier version
        folder = tmp_path / f"{compute}{bits}"
        begin(with_settings(auto, "training", compute=compute, integer_bits=bits), folder)
        found(MatmulTimes(SEVEN, 0.006, 0.01) if bits == 7 else FAST)
        plan = plan_study(auto, folder, file=None)
        assert computes(plan) == [(compute, bits)]
        assert plan.compute_note is None


def test_a_machine_without_a_fast_product_of_these_numbers_is_refused(study, tmp_path, found, begin) -> None:
    auto = with_settings(study("lora"), "training", compute="auto")
    found(SLOW)
    assert computes(plan_study(auto, tmp_path / "new", file=None)) == [("float", None)]
    begin(with_settings(auto, "training", compute="int8", integer_bits=8), tmp_path)
    found(SLOW)
    with pytest.raises(UserError, match=r"too slow here: .*; continue where the study was begun, or") as caught:
        plan_study(auto, tmp_path, file=None)
    assert caught.value.field == "training.compute"
    begin(with_settings(auto, "training", compute="int8", integer_bits=7), tmp_path / "seven")
    found(SLOW, seven=MatmulTimes(SEVEN, 0.006, 0.01))
    assert computes(plan_study(auto, tmp_path / "seven", file=None)) == [("int8", 7)]


def test_who_asks_for_int8_where_float_is_faster_is_told_both_times(study, tmp_path, found) -> None:
    found(SLOWER)
    plan = plan_study(with_settings(study("lora"), "training", compute="int8"), tmp_path, file=None)
    assert computes(plan) == [("int8", 8)]
    told = "training.compute: int8 is slower than float here: products take 20 ms in 8-bit integers (torch._int_mm), "
    assert told + "10 in float" in plan.notices


def test_a_run_says_so_too_where_its_node_is_not_the_one_that_planned(study, tmp_path, found) -> None:
    config = with_settings(study("lora"), "training", compute="int8")
    found(FAST)
    (planned,) = plan_study(config, tmp_path, file=None).runs
    found(SLOW)
    record = run_one(planned.spec).record
    assert record.status == "failed"
    assert "int8 is too slow here" in record.error
    found(FAST)
    assert do_one(config, tmp_path).provenance.product == "int_mm"


def test_runs_of_a_study_share_their_weights(study, tmp_path, monkeypatch) -> None:
    do_one(study("lora"), tmp_path)
    more = study("lora", seeds=(0, 1))
    assert [run.done for run in plan_study(more, tmp_path, file=None).runs] == [True, False]
    monkeypatch.setattr("peft_vit.runs.scheduling.plan.check_weights", lambda backbone: "of a file that was replaced")
    with pytest.raises(UserError, match=r"record\.json: was made with other weights under the same path"):
        plan_study(more, tmp_path, file=None)


def test_a_file_has_auto_without_saying_so(study, tmp_path, found) -> None:
    found(FAST)
    file = tmp_path / "study.yaml"
    file.write_text(
        """
name: small
seeds: [0]
threads: 1
backbone: {model: vit_small_patch14_dinov2, weights: random}
data: {dataset: digits, image_size: 28, validation_images: 20, test_images: 30, train_images: 40}
training: {steps: 8, learning_rate: 1e-3}
experiments:
  - {name: lora, method: lora, lora: {rank: 2}}
  - {name: everything, method: full}
"""
    )
    config = load_study(file)
    assert [own.training.compute for own in config.experiments] == ["auto", "auto"]
    assert computes(plan_study(config, tmp_path, file=file)) == [("int8", 8), ("float", None)]
