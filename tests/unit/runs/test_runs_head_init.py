"""A probe is a run like others; training that starts from one never returns less on validation."""

import numpy as np
import pytest
from done_runs import do_one as do
from done_runs import restored, with_data, with_settings

from peft_vit.core.adapters import current_ranks
from peft_vit.core.config import PROBE_L2
from peft_vit.core.training.images import HoldoutImages
from peft_vit.core.training.metrics import predict
from peft_vit.data import load_data
from peft_vit.deploy.restore import restore_run
from peft_vit.runs import execute as run_module
from peft_vit.runs.records.storage import run_folder

pytestmark = pytest.mark.part("runner")
DESTROYS = {"head_start": "probe", "learning_rate": 1.0, "clip_norm": None, "schedule": "constant"}


@pytest.mark.parametrize("method", ["linear", "qa_linear"])
def test_a_probe_is_a_run(study, tmp_path, monkeypatch, method) -> None:
    opened = []
    open_split = HoldoutImages.open
    monkeypatch.setattr(HoldoutImages, "open", lambda self: opened.append(self) or open_split(self))
    monkeypatch.setattr(run_module, "train", lambda *arguments, **named: pytest.fail("a probe takes no step"))
    record = do(study(method), tmp_path)
    assert len(opened) == 1
    monkeypatch.undo()

    fit = record.head_fit
    assert fit.l2 == tuple(sorted(PROBE_L2, reverse=True))
    assert fit.gradient_norm < 1e-5
    assert fit.images == 2 * record.split_sizes["train"] == 48  # with the protocol's horizontal flip
    assert [row.step for row in record.steps] == list(range(1, len(PROBE_L2) + 1))
    assert {row.learning_rate for row in record.steps} == {0.0}
    losses = [row.loss for row in record.steps]
    assert losses == sorted(losses, reverse=True)  # the weaker the penalty, the better the fit
    assert [evaluation.metrics for evaluation in record.evaluations] == list(fit.validation)
    assert record.chosen_step == 1 + fit.l2.index(fit.chosen_l2)
    assert record.validation == fit.chosen
    best = max(fit.validation, key=lambda metrics: (metrics.accuracy, -metrics.nll))
    assert record.validation == best
    assert {"features", "probe"} <= record.overhead_s.keys()
    assert record.parameters.final == record.parameters.peak == record.parameters.head == 10 * 65
    assert record.bytes.optimizer_bytes == 0
    assert (record.quantization is None) == (method == "linear")
    model = restored(record, tmp_path).model
    assert not any(current_ranks(model).values())
    if method == "qa_linear":
        assert record.bytes.frozen_bytes < do(study("linear"), tmp_path / "plain").bytes.frozen_bytes / 2


# --- training that starts from a probe --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora", "adalora", "qa_lora"])
def test_the_start_is_the_probe_and_the_result_is_never_below_it(study, tmp_path, method) -> None:
    record = do(study(method, **DESTROYS), tmp_path)
    start, *rest = record.evaluations
    assert (start.step, start.epoch, start.deployable) == (0, 0, True)
    assert start.metrics.accuracy == record.head_fit.chosen.accuracy
    assert start.metrics.nll < record.head_fit.chosen.nll  # by its temperature, which moves no prediction
    assert record.steps[0].loss > np.log(10) / 4 > start.metrics.nll / 4  # its logits are divided after it
    assert [evaluation.step for evaluation in rest] == [3, 6]
    assert (
        max(evaluation.metrics.accuracy for evaluation in rest) < start.metrics.accuracy
    )  # or the test would show nothing
    assert record.chosen_step == 0
    assert record.validation == start.metrics
    assert record.probe_test.predicted == record.predictions.predicted
    assert record.probe_test.metrics == record.test
    run = restored(record, tmp_path)
    model, images = run.model, load_data(record.spec.data, record.spec.seed).validation
    batches = images.ordered_batches(32, run.backbone.mean, run.backbone.std)
    logits, labels = predict(model, batches, precision="fp32")
    assert (logits.argmax(1) == labels).mean() == pytest.approx(start.metrics.accuracy)
    if method == "adalora":
        assert set(current_ranks(model).values()) == {0}
        assert record.parameters.final == record.parameters.head


def test_in_bf16_the_start_counts_as_many_images_as_its_probe(study, tmp_path) -> None:
    """A model in bf16 rounds the logits of the head with a temperature otherwise than the probe's, and ties fall."""
    config = with_data(study("lora", **DESTROYS), validation_images=600)
    record = do(config.model_copy(update={"precision": "bf16"}), tmp_path)
    probe, start = record.head_fit.chosen, record.evaluations[0].metrics
    assert (start.accuracy, start.balanced_accuracy) == (probe.accuracy, probe.balanced_accuracy)
    assert (record.chosen_step, record.validation) == (0, start)
    run = restore_run(run_folder(tmp_path, record.spec))
    batches = load_data(record.spec.data, 0).validation.ordered_batches(8, run.backbone.mean, run.backbone.std)
    logits, labels = predict(run.model, batches, precision="bf16")
    assert (logits.argmax(1) == labels).mean() != probe.accuracy  # or the test would show nothing


@pytest.mark.slow
def test_the_probe_of_float_weights_is_the_run_s_of_method_linear(study, tmp_path) -> None:
    linear, lora = do(study("linear"), tmp_path / "a"), do(study("lora", **DESTROYS), tmp_path / "b")
    assert linear.head_fit == lora.head_fit
    assert linear.predictions.predicted == lora.predictions.predicted
    packed, qa_lora = do(study("qa_linear"), tmp_path / "c"), do(study("qa_lora", **DESTROYS), tmp_path / "d")
    assert packed.head_fit == qa_lora.head_fit != linear.head_fit


def test_training_that_gains_is_taken(study, tmp_path) -> None:
    record = do(study("full", head_start="probe", epochs=8, learning_rate=1e-3), tmp_path)
    assert record.chosen_step > 0
    assert record.probe_test.predicted == do(study("linear"), tmp_path / "probe").predictions.predicted
    assert record.probe_test.predicted != record.predictions.predicted
    assert record.validation.accuracy >= record.head_fit.chosen.accuracy
    plain = do(study("full", epochs=8, learning_rate=1e-3), tmp_path / "plain")
    assert (plain.head_fit, plain.evaluations[0].step) == (None, 3)


def test_weights_that_are_still_to_be_packed_are_not_offered(study, tmp_path) -> None:
    """A head fitted to float weights, under a schedule that packs them only later, would be deployed on others."""
    fading = {"quantization_schedule": "linear", "quantization_end_step": 5}
    record = do(with_settings(study("qa_lora", **DESTROYS), "qa_lora", **fading), tmp_path)
    assert [(evaluation.step, evaluation.deployable) for evaluation in record.evaluations] == [
        (0, False),
        (3, False),
        (6, True),
    ]
    assert record.chosen_step == 6
    restored(record, tmp_path)
