"""Adaptive ranks on quantized sites are scored before gradients are scaled, in the order that a study's methods set."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from peft_vit.core.config import ExperimentConfig
from peft_vit.core.methods import METHODS, PrepareContext
from peft_vit.core.training import AllocationHook, optimization_step

pytestmark = [
    pytest.mark.part("trainer"),
    pytest.mark.filterwarnings("ignore::peft_vit.base.errors.SilentNoEffectWarning"),
]
STEPS = 12
SCALED = {
    "constant": {"gradient_scaling_factor": 10.0},
    "adaptive": {"gradient_scaling": "adaptive", "gradient_scaling_factor": 3.0},
    "managed": {"balance_target": 5.0, "balance_by": "gradient_scale"},  # measured, and then set, every fourth step
}


def scores_and_moves(
    model, batch, fill_adapters, sections: dict[str, Any], gradient: str, **scaling
) -> tuple[list[dict[str, float]], list[float]]:
    """Return the scores of each step at unchanging weights, and the norms of the gradients that steps would follow."""
    late = {"warmup_steps": STEPS - 2, "final_steps": 1}
    adalora = sections["adalora"] | late | {"importance_gradient": gradient, "parametrization": "svd"}
    experiment = ExperimentConfig.model_validate(
        {"name": "both", "method": "qa_adalora", "adalora": adalora, "qa_lora": sections["qa_lora"] | scaling}
        | {"training": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3}}
    )
    hooks = METHODS[experiment.method].prepare(model, experiment, PrepareContext(total_steps=STEPS, seed=0))
    fill_adapters(model)
    (allocation,) = (hook for hook in hooks if isinstance(hook, AllocationHook))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
    scores, norms = [], []
    for step in range(1, STEPS - 2):  # before ranks change
        loss = F.cross_entropy(model(batch[0]), batch[1])
        norms.append(optimization_step(model, optimizer, loss, step, hooks=hooks).gradient_norm)
        scores.append(dict(allocation._scores))
    return scores, norms


@pytest.mark.parametrize("gradient", ["task", "task_and_penalty"])
@pytest.mark.parametrize("scaling", SCALED)
def test_scores_do_not_depend_on_a_factor_on_the_gradients(
    tiny_vit, batch, fill_adapters, method_sections, gradient, scaling
) -> None:
    sections = method_sections["qa_adalora"]
    sections = sections | {"qa_lora": sections["qa_lora"] | {"targets": ("query", "out", "fc1", "fc2")}}
    plain, plain_norms = scores_and_moves(tiny_vit(), batch, fill_adapters, sections, gradient)
    scaled, norms = scores_and_moves(tiny_vit(), batch, fill_adapters, sections, gradient, **SCALED[scaling])
    assert norms != pytest.approx(plain_norms, rel=1e-3)  # the factor acts
    assert min(plain[-1].values()) > 0
    for before, after in zip(plain, scaled, strict=True):
        assert after == before
