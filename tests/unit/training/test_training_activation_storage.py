"""Trainings whose activations are kept in 8 bits: the first loss is exact, later ones are near."""

import pytest
from prepared_methods import METHODS

from peft_vit.adapters import activation_storage, adapted_product
from peft_vit.config import TrainingConfig
from peft_vit.errors import UserError
from peft_vit.training import train

pytestmark = pytest.mark.part("trainer")


@pytest.mark.parametrize("method", ["lora", "growing", "qa_lora", "full"])
def test_a_training_in_8_bits(tiny_vit, data, runtime, method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapted_product, "_LEAST_VALUES", 1)
    losses, micro = {}, 4
    for storage in ("exact", "8bit"):
        model = tiny_vit()
        hooks = METHODS[method](model)
        config = TrainingConfig(
            epochs=4, batch_size=8, micro_batch_size=micro, learning_rate=1e-3, activation_storage=storage
        )
        result = train(model, data(), config, runtime, seed=4, hooks=hooks)
        losses[storage] = [row.loss for row in result.steps]
    assert losses["8bit"][0] == losses["exact"][0]
    assert losses["8bit"] != losses["exact"]
    assert losses["8bit"] == pytest.approx(losses["exact"], rel=0.02)


def test_no_effect_is_an_error(tiny_vit, data, runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_storage, "_OF_ATTENTION", set())  # as of a model without attention
    config = TrainingConfig(epochs=4, batch_size=8, learning_rate=1e-3, activation_storage="8bit")
    with pytest.raises(UserError, match=r"training\.activation_storage: 8bit has no effect on this model"):
        train(tiny_vit(), data(), config, runtime, seed=4)
