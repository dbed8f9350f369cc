"""Float runs, packed after training: the codes are the quantizer's, files say what the model in memory says."""

import json

import numpy as np
import pytest
import torch
from done_runs import do_one
from torch.nn.functional import mse_loss

from peft_vit.core.adapters import packed_weights
from peft_vit.core.backbones import capturing_inputs
from peft_vit.core.backbones.catalog import describe
from peft_vit.core.config import IMAGES_ROUNDED_BY, StudyConfig
from peft_vit.core.methods.quantized import file_bytes, packing_of
from peft_vit.core.quantization import QuantizationFormat, quantize, quantize_with_compensation
from peft_vit.core.tasks import CLASSIFICATION
from peft_vit.core.training.metrics import predict
from peft_vit.deploy import load_low_bit, merge, open_exported
from peft_vit.deploy.export import export_run_to_file, images_rounded_by, logits_by_type, round_weights
from peft_vit.deploy.restore import restore_run
from peft_vit.runs.measures.held_out import PRIOR
from peft_vit.runs.records.storage import run_folder

pytestmark = pytest.mark.part("runner")
NF4 = QuantizationFormat("nf4", 32, False, torch.float16)
INT2 = QuantizationFormat("int2", 32, True, torch.float16)


def logits_on(model, images, card):
    batches = images.ordered_batches(32, card.mean, card.std)
    return predict(model, batches, precision="fp32")[0]


@pytest.mark.parametrize("method", ["linear", "full", "adalora", "peft_lora"])
def test_the_file_holds_the_merged_weights_in_the_quantizers_codes(study, tmp_path, method) -> None:
    record = do_one(study(method), tmp_path)
    run_dir, file = run_folder(tmp_path, record.spec), tmp_path / "model.safetensors"
    done = export_run_to_file(run_dir, file, "safetensors", bits="nf4", rounding="nearest")
    run = restore_run(run_dir)
    merged = merge(run.model, run.card).model
    floats = merged.state_dict()
    written, card = load_low_bit(file)
    packed = packed_weights(written)
    assert len(packed) == 4 * len(run.backbone.backbone.blocks)  # of each block qkv, proj, fc1 and fc2
    for name, weight in packed.items():
        expected = quantize(floats[f"{name}.weight"], NF4)
        assert weight.format == NF4
        assert all(torch.equal(part, expected.tensors()[kind]) for kind, part in weight.tensors().items())
    rest = written.state_dict()
    assert floats.keys() - rest.keys() == {f"{name}.weight" for name in packed}
    assert all(torch.equal(tensor, floats[name]) for name, tensor in rest.items())

    shape = describe(record.spec.backbone, record.spec.data.image_size)
    stored = sum(tensor.nbytes for tensor in rest.values()) + sum(weight.nbytes for weight in packed.values())
    values = sum(tensor.numel() for tensor in floats.values())
    assert file_bytes(shape.sites, values, packing_of(shape.sites, "nf4")) == stored == record.bytes.in_4_bits_bytes
    assert done.source.float_bytes == sum(tensor.nbytes for tensor in floats.values())

    data = run.load_data()
    in_memory = round_weights(merged, "nf4")
    validated = logits_on(in_memory, data.validation, card)
    near = PRIOR._replace(median=record.calibrated.temperature)
    assert card.calibrated == CLASSIFICATION.meaning(validated, data.validation.labels, near)  # of the packed model
    right = (validated.argmax(1) == data.validation.labels).mean()
    assert (done.comparison.images, done.comparison.exported) == (20, pytest.approx(right))
    assert done.comparison.trained == pytest.approx(record.validation.accuracy)
    batch = next(data.validation.ordered_batches(20, card.mean, card.std))[0].numpy()
    np.testing.assert_allclose(open_exported(file).logits(batch), validated, rtol=0, atol=1e-5)


def test_one_restored_run_gives_the_logits_of_many_types(study, tmp_path) -> None:
    record = do_one(study("lora"), tmp_path)
    run_dir = run_folder(tmp_path, record.spec)
    logits = logits_by_type(run_dir, ("int8", "nf4", "int2"))
    run = restore_run(run_dir)
    merged, tested = merge(run.model, run.card).model, run.load_data().test.open()
    exact = logits_on(merged, tested, run.card)
    errors = [float(np.abs(values - exact).max()) for values in logits.values()]
    assert errors == sorted(errors)
    assert 0 < errors[0] < 0.1 * errors[2]
    nearest = {type: logits_on(round_weights(merged, type), tested, run.card) for type in logits}
    assert [np.array_equal(nearest[type], logits[type]) for type in logits] == [True, False, False]  # gptq up to 4 bits
    for type in ("nf4", "int2"):
        np.testing.assert_array_equal(logits_by_type(run_dir, [type], "nearest")[type], nearest[type])


def test_4_bits_are_rounded_by_fewer_images_than_2_and_8_to_nearest() -> None:
    counts = [images_rounded_by(type) for type in ("int8", "nf4", "int4", "int3", "int2")]
    assert counts == [0, 32, 32, IMAGES_ROUNDED_BY, IMAGES_ROUNDED_BY]


@pytest.mark.parametrize("validated", [20, 0])
def test_what_is_unlike_is_told_by_features_of_the_rounded_model(study, tmp_path, validated) -> None:
    content = json.loads(study("lora").model_dump_json())
    content["measures"] |= {"features": True}
    content["data"] |= {"validation_images": validated}
    record = do_one(StudyConfig.model_validate_json(json.dumps(content)), tmp_path)
    run_dir, file = run_folder(tmp_path, record.spec), tmp_path / "model.safetensors"
    run = restore_run(run_dir)
    export_run_to_file(run_dir, file, "safetensors", bits="int2")
    opened, data = open_exported(file), run.load_data()

    def distances(images) -> np.ndarray:
        batches = images.ordered_batches(20, run.card.mean, run.card.std)
        return np.concatenate([opened.with_distances(batch.numpy())[1] for batch, _ in batches])

    assert opened.card.unlike.images == 24 + validated
    assert distances(data.train).max() < 0.03  # each is its own neighbour, but for codes of eight bits
    assert (distances(data.test.open()) > opened.card.unlike.threshold).mean() < 0.3
    assert opened.card.unlike.threshold != pytest.approx(run.card.unlike.threshold, rel=1e-3)


def test_gptq_rounds_by_the_inputs_that_packed_layers_make(study, tmp_path) -> None:
    """Against the quantizer, fed with inputs of the first layer as floats, and of a later one behind packed layers."""
    record = do_one(study("full"), tmp_path)
    run = restore_run(run_folder(tmp_path, record.spec))
    merged, data = merge(run.model, run.card).model, run.load_data()
    images = next(data.train.ordered_batches(24, run.card.mean, run.card.std))[0]
    nearest, gptq = round_weights(merged, "int2"), round_weights(merged, "int2", images)
    seen, layers = {}, ("blocks.0.attn.qkv", "blocks.0.mlp.fc2")
    with capturing_inputs({name: gptq.get_submodule(name) for name in layers}, seen.__setitem__), torch.no_grad():
        gptq(images)
    for name, inputs in seen.items():
        x = inputs.flatten(0, -2).double()  # (N, in)
        weight = merged.get_submodule(name).weight
        expected = quantize_with_compensation(weight, INT2, 2 * x.T @ x)
        codes = packed_weights(gptq)[name].codes
        assert (codes == expected.codes).float().mean() > 0.99  # sums in float32 may round otherwise
        assert (codes != quantize(weight, INT2).codes).float().mean() > 0.01
        losses = [
            float(mse_loss(inputs @ packed_weights(model)[name].dequantize().T, inputs @ weight.T))
            for model in (gptq, nearest)
        ]
        assert losses[0] < 0.8 * losses[1]
