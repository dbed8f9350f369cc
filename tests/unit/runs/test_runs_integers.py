"""Runs whose frozen products are in int8: they learn, come back from their files, and merge; others are refused."""

import numpy as np
import pytest
import torch
from done_runs import do_one, restored, with_settings

from peft_vit.adapters import adapted_modules
from peft_vit.deployment import merge
from peft_vit.errors import UserError
from peft_vit.quantization import integers
from peft_vit.studies.plan import plan_study

pytestmark = pytest.mark.part("runner")


@pytest.mark.parametrize("method", ["linear", "lora", "adalora", "qa_lora", "qa_adalora"])
def test_a_run_in_int8_learns_and_is_restored_and_merged(study, tmp_path, method) -> None:
    config = study(method)
    in_float = do_one(config, tmp_path / "float")
    record = do_one(with_settings(config, "training", compute="int8"), tmp_path / "int8")
    assert in_float.provenance.integer_bits is None
    assert record.provenance.integer_bits in (7, 8)
    assert record.spec.digest() != in_float.spec.digest()
    if method != "linear":  # whose steps are fits
        losses, of_float = ([step.loss for step in made.steps] for made in (record, in_float))
        assert losses != of_float
        assert losses == pytest.approx(of_float, rel=0.05)
    run = restored(record, tmp_path / "int8")  # which predicts what the record holds
    assert all(module.multiplies_integers for _, module in adapted_modules(run.model))
    merged = merge(run.model, run.card).model
    assert not any(module.multiplies_integers for _, module in adapted_modules(merged))
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, exact = run.model(images), merged(images)
    assert 0 < (logits - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("method", ["full", "peft_lora"])
def test_without_frozen_layers_of_ours_int8_is_refused(study, method) -> None:
    config = study(method)
    experiment = config.experiments[0].model_dump(exclude_unset=True)
    experiment["training"]["compute"] = "int8"
    with pytest.raises(ValueError, match=f"int8 has no effect with method: {method}, since "):
        type(config.experiments[0]).model_validate(experiment)


def test_a_device_without_integer_products_is_refused_by_the_plan(study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(integers, "_works", lambda device: False)
    config = with_settings(study("lora"), "training", compute="int8")
    with pytest.raises(UserError, match="cpu multiplies no 8-bit integers; use float") as caught:
        plan_study(config, tmp_path, file=tmp_path / "tiny.yaml")
    assert caught.value.field == "experiments[0].training.compute"


def test_int8_and_float_share_no_features(study, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path / "cache"))
    config = study("linear")
    in_float = do_one(config, tmp_path / "float")
    in_int8 = do_one(with_settings(config, "training", compute="int8"), tmp_path / "int8")
    assert not np.array_equal(in_float.predictions.probability, in_int8.predictions.probability)
