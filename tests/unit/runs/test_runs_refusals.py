"""What a run would fail on is refused by the plan in one line, at the setting that is to be changed."""

import importlib.util
from typing import Any

import pytest
from done_runs import with_adaptive_bits, with_settings
from written_runs import planned

from peft_vit.base.errors import UserError
from peft_vit.core.config import ExperimentConfig, StartingRanksConfig, StudyConfig

pytestmark = pytest.mark.part("configuration")
BITS = "qa_lora.adaptive_bits"
PEFT_ADALORA = {"initial_rank": 4, "target_rank": 2, "warmup_steps": 1, "update_frequency": 2, "final_steps": 2}


def with_method(config: StudyConfig, method: str, **settings: Any) -> StudyConfig:
    """Return the study with one experiment of another method."""
    (experiment,) = config.experiments
    content = {"name": "one", "method": method, "training": experiment.training, method: settings}
    return config.model_copy(update={"experiments": (ExperimentConfig.model_validate(content),)})


def rule(config: StudyConfig, **settings: Any) -> StudyConfig:
    return with_settings(config, "lora", rank=None, ranks=StartingRanksConfig(**settings))


def peft_adalora(config: StudyConfig, **settings: Any) -> StudyConfig:
    return with_method(config, "peft_adalora", **PEFT_ADALORA | settings)


GPTQ = {"rounding": "gptq", "calibration_images": 25}
AVERAGE = {"total_byte_budget": None, "average_bits": 3.0, "ranks": False}
FORMER_RULE = {"rule": "gradient", "budget": 9, "calibration_images": 24}
REFUSED = [  # the study's method, what makes it one to be refused, its settings, the field, what is said
    ("qa_lora", with_settings, ("qa_lora",), GPTQ, "qa_lora.calibration_images", "24"),
    ("adaptive_bits", with_adaptive_bits, (), {"total_byte_budget": 1000}, f"{BITS}.total_byte_budget", "1000"),
    ("adaptive_bits", with_adaptive_bits, (), AVERAGE, f"{BITS}.average_bits", "at least 4 "),
    ("adaptive_bits", with_adaptive_bits, (), {"calibration_images": 25}, f"{BITS}.calibration_images", "24"),
    ("lora", rule, (), FORMER_RULE, "lora.ranks.rule", "stable_rank"),
    ("lora", rule, (), {"rule": "even", "budget": 36 * 64}, "lora.ranks.budget", ""),
]
OF_PEFT = [
    ("lora", with_method, ("peft_lora",), {"rank": 65}, "peft_lora.rank", "blocks.0.attn.qkv"),
    ("lora", peft_adalora, (), {"initial_rank": 65}, "peft_adalora.initial_rank", "at most 64"),
    ("lora", peft_adalora, (), {"final_steps": 5}, "peft_adalora.warmup_steps", "6 steps"),
    ("lora", peft_adalora, (), {"update_frequency": 4}, "peft_adalora.update_frequency", "multiple of 4"),
    *(
        ("lora", with_method, ("peft",), *case)
        for case in (
            ({"type": "dorra"}, "peft.type", "did you mean 'dora'?"),
            ({"type": "prefix_tuning"}, "peft.type", "PEFT has no tuner"),
            ({"type": "lora", "lora_alhpa": 4}, "peft.lora_alhpa", "'lora_alpha'?"),
            ({"type": "dora", "use_dora": True}, "peft.use_dora", "remove it"),
            ({"type": "lora", "modules_to_save": ["head"]}, "peft.modules_to_save", "remove it"),
            ({"type": "oft", "r": 8, "oft_block_size": 4}, "peft", "PEFT refuses it"),
            ({"type": "adalora"}, "peft.type", "peft_adalora"),
        )
    ),
]
without_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the PEFT library")


@pytest.mark.parametrize(
    ("method", "make", "arguments", "settings", "field", "stated"),
    [*REFUSED, *(pytest.param(*case, marks=without_peft) for case in OF_PEFT)],
)
def test_the_plan_refuses_it_at_its_field(study, tmp_path, method, make, arguments, settings, field, stated) -> None:
    config = make(study(method), *arguments, **settings)
    with pytest.raises(UserError) as caught:
        planned(config, tmp_path)
    assert caught.value.field == f"experiments[0].{field}"
    assert stated in caught.value.message
    assert len(str(caught.value).splitlines()) == 1
