import planted
import pytest

from peft_vit.core.records import RunRecord


@pytest.fixture(scope="session")
def few() -> list[RunRecord]:
    """Return a small study with every method, two seeds."""
    names = {"linear_probe", "lora_r1", "lora_r8", "adalora_top_k_fisher", "qa_lora_4bit_nf4_constant"}
    return [record for record in planted.quickstart() if record.spec.experiment.name in names]
