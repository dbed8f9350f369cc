"""A run on packed weights records how the adapters compare with the error, on training images alone."""

import pytest
from done_runs import do_one

from peft_vit.core.adapters import adapted_modules, load_trained
from peft_vit.core.backbones import load_backbone
from peft_vit.core.methods import METHODS, PrepareContext
from peft_vit.data import load_data
from peft_vit.runs.records.storage import ADAPTER_FILE, run_folder

pytestmark = pytest.mark.part("trainer")


@pytest.mark.parametrize("method", ["qa_lora", "qa_adalora"])
def test_the_balance_is_that_of_the_saved_weights_against_the_backbones_own(study, tmp_path, method) -> None:
    record = do_one(study(method), tmp_path)
    spec = record.spec
    backbone = load_backbone(spec.backbone, image_size=32, num_classes=10, seed=0)
    floats = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    hooks = METHODS[spec.experiment.method].prepare(
        backbone.model, spec.experiment, PrepareContext(total_steps=len(record.steps), seed=0)
    )
    load_trained(backbone.model, run_folder(tmp_path, spec) / ADAPTER_FILE)
    data = load_data(spec.data, 0)
    (batch,) = data.train.ordered_batches(24, backbone.mean, backbone.std)  # all of them; 32 if there are as many
    for _, module in adapted_modules(backbone.model):
        module.drop_float()
    expected = hooks[-1].validate_quantization_adaptation_balance(backbone.model, reference=floats, images=batch[0])
    (row,) = record.quantization.balance
    assert row == pytest.approx({**expected, "step": 6.0, "quantized_share": 1.0}, rel=1e-3)
    assert expected["error_removed_in_outputs"] != 0
    assert record.overhead_s["balance"] > 0
