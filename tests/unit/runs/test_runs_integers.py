"""Runs that train in int8: they learn, and what is measured is the float model they deliver; others are refused."""

import math

import pytest
import torch
from done_runs import do_one, restored, with_settings
from written_runs import planned

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import use_int8_matmul
from peft_vit.core.adapters.matmuls import MatmulTimes
from peft_vit.core.config import MeasuresConfig
from peft_vit.deploy import merge
from peft_vit.deploy.page.provenance import caveats
from peft_vit.runs.this_machine import matmuls

pytestmark = pytest.mark.part("runner")


@pytest.mark.parametrize("method", ["linear", "lora", "adalora", "qa_lora", "qa_adalora"])
def test_a_run_in_int8_learns_and_its_numbers_are_of_the_model_that_is_delivered(study, tmp_path, method) -> None:
    config = study(method)
    config = config.model_copy(update={"measures": MeasuresConfig(features=True, logits=True)})
    in_float = do_one(config, tmp_path / "float")
    record = do_one(with_settings(config, "training", compute="int8"), tmp_path / "int8")
    assert in_float.provenance.integer_bits is None
    assert record.provenance.integer_bits in (7, 8)
    assert record.provenance.product in ("int_mm", "qlinear")
    assert not record.is_measured_in_integers
    assert record.spec.digest() != in_float.spec.digest()
    if method != "linear":  # whose steps are fits
        losses, of_float = ([step.loss for step in made.steps] for made in (record, in_float))
        assert losses != of_float
        assert losses == pytest.approx(of_float, rel=0.05)
    run = restored(record, tmp_path / "int8")  # which predicts what the record holds
    merged = merge(run.model, run.card).model.eval()
    test = run.load_data().test.open()
    images, labels = next(test.ordered_batches(len(test), run.backbone.mean, run.backbone.std))
    with torch.no_grad():
        exact = merged(images)
    got = torch.tensor(record.predictions.logits)
    torch.testing.assert_close(got, exact, rtol=2e-3, atol=2e-3 * float(exact.abs().max()))  # kept as float16
    use_int8_matmul(run.model)
    with torch.no_grad():
        in_integers = run.model(images)
    assert (got - exact).norm() < 0.1 * (in_integers - exact).norm()  # the forward pass of training is another
    assert record.test.accuracy == float((exact.argmax(1) == labels).double().mean())


def test_an_older_record_is_told_to_be_of_the_int8_forward_pass(study, tmp_path) -> None:
    record = do_one(with_settings(study("lora"), "training", compute="int8"), tmp_path)
    older = record.model_copy(update={"provenance": record.provenance.model_copy(update={"product": None})})
    assert not any("int8" in line for line in caveats([record]))
    assert any("int8 forward pass" in line for line in caveats([record, older]))


def test_a_device_without_integer_products_is_refused_by_the_plan(study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        matmuls, "choose_product", lambda device, precision, bits=None: MatmulTimes(None, math.inf, 1.0)
    )
    config = with_settings(study("lora"), "training", compute="int8")
    with pytest.raises(UserError, match="cpu multiplies no such 8-bit integers exactly; use float") as caught:
        planned(config, tmp_path)
    assert caught.value.field == "training.compute"
