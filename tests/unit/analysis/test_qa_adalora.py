"""Adaptive ranks on low-bit weights stand among the adaptive runs and among the quantized ones."""

import planted
import pytest

from peft_vit.analysis import analyze
from peft_vit.config import ExperimentConfig
from peft_vit.records import RunRecord
from peft_vit.report.sections import study_documents

pytestmark = pytest.mark.part("analyzer")


def both() -> list[RunRecord]:
    """Return the ranks of an AdaLoRA run and the bits of a QA-LoRA run in one record, two seeds."""
    known = planted.experiments()
    adaptive, quantized = known["adalora_top_k_fisher"], known["qa_lora_4bit_nf4_constant"]
    section = quantized.qa_lora.model_copy(update={"rank": None})
    one = ExperimentConfig(
        name="both", method="qa_adalora", training=adaptive.training, adalora=adaptive.adalora, qa_lora=section
    )
    records = []
    for seed in (0, 1):
        base, bits = planted.record(adaptive, seed, 0.8), planted.record(quantized, seed, 0.8)
        spec = base.spec.model_copy(update={"experiment": one})
        taken = {"spec": spec, "quantization": bits.quantization, "bits_history": bits.bits_history}
        records.append(base.model_copy(update=taken))
    return records


def test_it_is_analyzed_by_rank_and_by_bits_and_reported_under_its_own_name() -> None:
    study = planted.study_of([*planted.quickstart(), *both()])
    assert study.experiments[-1].name == "both"
    found = analyze(study)
    assert "both" in [one.experiment.name for one in found.allocation]
    assert "both" in [one.experiment.name for one in found.quantization]
    (document,) = study_documents([found])
    assert {card.method: card.experiment for card in document.cards}["AdaLoRA + QA-LoRA"] == "both"
