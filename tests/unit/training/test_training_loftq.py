"""`start: loftq`: adapters begin closer to the float weights than zeros do, and the merge stays exact."""

import pytest
import torch
from qa_lora_settings import config, scheduled

from peft_vit import QALoRATrainer
from peft_vit.adapters import adapted_modules, attach_adapters, merge_into_offsets, site_adapters
from peft_vit.backbones import Backbone
from peft_vit.errors import UserError

pytestmark = [pytest.mark.part("trainer"), pytest.mark.filterwarnings("ignore::peft_vit.errors.SilentNoEffectWarning")]


@pytest.mark.part("quantization")
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_adapters_start_at_the_error_and_merge_exactly(tiny_vit, batch, rounding) -> None:
    plain, model, zero = tiny_vit(), tiny_vit(), tiny_vit()
    images = batch[0] if rounding == "gptq" else None
    settings = {"rank": 2, "rounding": rounding, "scale_precision": "fp32"}
    trainer = QALoRATrainer(model, config(**settings, start="loftq", loftq_iterations=2), 8, images=images)
    other = QALoRATrainer(zero, config(**settings), 8, images=images)
    assert all(bool(one.lora_B.any()) for one in site_adapters(model).values())
    zeros = dict(adapted_modules(zero))
    if rounding == "nearest":  # GPTQ has another aim than the weights' own error
        for name, module in adapted_modules(model):
            weight = plain.get_submodule(name).weight
            assert (weight - module.merged_weight()).norm() < (weight - zeros[name].merged_weight()).norm()
    assert trainer.features_depend_on()["updates"] == dict.fromkeys(site_adapters(model), 2)
    assert not other.features_depend_on().get("updates")
    with torch.no_grad():
        before = model.eval()(batch[0])
        assert max(merge_into_offsets(model).values()) < 1e-6
        torch.testing.assert_close(model(batch[0]), before, atol=1e-4, rtol=1e-4)


@pytest.mark.part("configuration")
def test_what_has_no_effect_is_refused(tiny_vit) -> None:
    with pytest.raises(ValueError, match="loftq_iterations has no effect with start: zero; remove it"):
        config(loftq_iterations=2)
    with pytest.raises(ValueError, match="set quantization_schedule: constant"):
        scheduled(start="loftq")
    with pytest.raises(ValueError, match="loftq_iterations above 1 brings next to nothing on integers with offsets"):
        config(start="loftq", loftq_iterations=2, quantization_type="int4")
    model = tiny_vit()
    sites = Backbone(model).sites
    with pytest.raises(UserError, match=r"qa_lora\.start: no adapter has a rank"):
        QALoRATrainer(tiny_vit(), config(start="loftq"), 8, ranks=dict.fromkeys((one.name for one in sites), 0))
    attach_adapters(model, sites, 2, scale=2.0, seed=0, pool=16)
    with pytest.raises(UserError, match=r"qa_lora\.start: the model carries adapters, whose start stays"):
        QALoRATrainer(model, config(start="loftq"), 8)
