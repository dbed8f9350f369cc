"""A probe is a run like others; training that starts from one never returns less on validation."""

import done_runs
import numpy as np
import pytest
import torch
from done_runs import with_settings

from peft_vit.adapters import current_ranks
from peft_vit.config import PROBE_L2
from peft_vit.data import SealedImages, load_data
from peft_vit.evaluation import predict
from peft_vit.records import run_folder
from peft_vit.runs import execute as run_module
from peft_vit.runs.restore import restore_run

pytestmark = pytest.mark.part("runner")
DESTROYS = {"head_start": "probe", "learning_rate": 1.0, "clip_norm": None, "schedule": "constant"}


def do(config, folder):
    (record,) = done_runs.do(config, folder)
    return record


def restored_logits(record, folder, split):
    run = restore_run(run_folder(folder, record.spec))
    images = load_data(record.spec.data, record.spec.seed)
    images = images.test.open() if split == "test" else getattr(images, split)
    mean, std = run.backbone.mean, run.backbone.std
    logits, _ = predict(run.model, images.ordered_batches(32, mean, std), device=torch.device("cpu"), precision="fp32")
    return logits, run.model


def assert_restored_as_tested(record, folder):
    """Check that the saved file predicts what the record holds; return the restored model."""
    logits, model = restored_logits(record, folder, "test")
    np.testing.assert_array_equal(logits.argmax(1), record.predictions.predicted)
    probability = torch.from_numpy(logits).softmax(1).max(1).values.numpy()
    np.testing.assert_allclose(probability, record.predictions.probability, rtol=0, atol=1e-5)
    return model


@pytest.mark.parametrize("method", ["linear", "qa_linear"])
def test_a_probe_is_a_run(study, tmp_path, monkeypatch, method) -> None:
    opened = []
    open_split = SealedImages.open
    monkeypatch.setattr(SealedImages, "open", lambda self: opened.append(self) or open_split(self))
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
    assert [one.metrics for one in record.evaluations] == list(fit.validation)
    assert record.chosen_step == 1 + fit.l2.index(fit.chosen_l2)
    assert record.validation == fit.chosen
    best = max(fit.validation, key=lambda one: (one.accuracy, -one.nll))
    assert record.validation == best
    assert {"features", "probe"} <= record.overhead_s.keys()
    assert record.parameters.final == record.parameters.peak == record.parameters.head == 10 * 65
    assert record.bytes.optimizer_bytes == 0
    assert (record.quantization is None) == (method == "linear")
    model = assert_restored_as_tested(record, tmp_path)
    assert not any(current_ranks(model).values())
    if method == "qa_linear":
        assert record.bytes.frozen_bytes < do(study("linear"), tmp_path / "plain").bytes.frozen_bytes / 2


def test_a_probe_repeats_to_the_bit_and_its_seed_is_its_split_alone(study, tmp_path) -> None:
    first, again = do(study("linear"), tmp_path / "a"), do(study("linear"), tmp_path / "b")
    assert first.adapter_sha256 == again.adapter_sha256
    assert first.predictions == again.predictions


def test_flips_of_the_protocol_are_fitted_too(study, tmp_path) -> None:
    config = study("linear", augmentation=[{"flip": {"direction": "both"}}])
    assert do(config, tmp_path).head_fit.images == 4 * 24


# --- training that starts from a probe --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora", "adalora", "qa_lora"])
def test_the_start_is_the_probe_and_the_result_is_never_below_it(study, tmp_path, method) -> None:
    record = do(study(method, **DESTROYS), tmp_path)
    start, *rest = record.evaluations
    assert (start.step, start.epoch, start.deployable) == (0, 0, True)
    assert start.metrics.accuracy == record.head_fit.chosen.accuracy
    assert start.metrics.nll < record.head_fit.chosen.nll  # by its temperature, which moves no prediction
    assert record.steps[0].loss > np.log(10) / 4 > start.metrics.nll / 4  # softened after its validation
    assert [one.step for one in rest] == [3, 6]
    assert max(one.metrics.accuracy for one in rest) < start.metrics.accuracy  # or the test would show nothing
    assert record.chosen_step == 0
    assert record.validation == start.metrics
    model = assert_restored_as_tested(record, tmp_path)
    logits, _ = restored_logits(record, tmp_path, "validation")
    labels = load_data(record.spec.data, record.spec.seed).validation.labels
    assert (logits.argmax(1) == labels).mean() == pytest.approx(start.metrics.accuracy)
    if method == "adalora":
        assert set(current_ranks(model).values()) == {0}
        assert record.parameters.final == record.parameters.head


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
    assert record.validation.accuracy >= record.head_fit.chosen.accuracy
    plain = do(study("full", epochs=8, learning_rate=1e-3), tmp_path / "plain")
    assert (plain.head_fit, plain.evaluations[0].step) == (None, 3)


def test_weights_that_are_still_to_be_packed_are_not_offered(study, tmp_path) -> None:
    """A head fitted to float weights, under a schedule that packs them only later, would be deployed on others."""
    fading = {"quantization_schedule": "linear", "quantization_end_step": 5}
    record = do(with_settings(study("qa_lora", **DESTROYS), "qa_lora", **fading), tmp_path)
    assert [(one.step, one.deployable) for one in record.evaluations] == [(0, False), (3, False), (6, True)]
    assert record.chosen_step == 6
    assert_restored_as_tested(record, tmp_path)
