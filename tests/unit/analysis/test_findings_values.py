"""What a study says of each sentence, on planted records beside values worked out by hand."""

import math

import planted
import pytest

from peft_vit.core.config import ExperimentConfig
from peft_vit.core.records import RunRecord
from peft_vit.lab.analysis import analyze
from peft_vit.lab.analysis.findings import Finding

pytestmark = pytest.mark.part("analyzer")

EXPERIMENTS = planted.experiments()
ADALORA, LORA = EXPERIMENTS["adalora_proportional_magnitude"], EXPERIMENTS["lora_r8"]
NF4, INT8 = EXPERIMENTS["qa_lora_4bit_nf4_constant"], EXPERIMENTS["qa_lora_8bit_int8_linear"]


def found(records: list[RunRecord]) -> dict[tuple[str, str], Finding]:
    return {(one.sentence.id, one.subject): one for one in analyze(planted.study_of(records)).findings}


def runs(experiment: ExperimentConfig, right: list[int], **changes: object) -> list[RunRecord]:
    """Return a run a seed with so many of 600 test images right."""
    return [planted.record(experiment, seed, n / 600, changes=changes) for seed, n in enumerate(right)]


def test_scores_of_layers() -> None:
    findings = found(runs(ADALORA, [480] * 7))
    attention = findings["attention-over-mlp", ADALORA.name]
    assert list(attention.by_seed.values()) == pytest.approx([2.0] * 7), "four times as high"
    assert (attention.verdict, attention.outcome) == ("supported", "p = 0.0156 (the only test of its family)")
    assert findings["seeds-agree", ADALORA.name].by_seed == pytest.approx({"0-1": 1.0, "2-3": 1.0, "4-5": 1.0})


def test_ranks_by_chance_say_nothing_of_scores() -> None:
    section = ADALORA.adalora.model_copy(update={"importance_metric": "random"})
    by_chance = ADALORA.model_copy(update={"name": "by_chance", "adalora": section})
    line = [*runs(EXPERIMENTS["lora_r1"], [450], **planted.counts(1000)), *runs(LORA, [480], **planted.counts(4000))]
    records = [*line, *(run for own in (ADALORA, by_chance) for run in runs(own, [470], **planted.counts(2000)))]
    assert {subject.partition(" against ")[0] for _, subject in found(records)} == {ADALORA.name}


def test_adaptive_ranks_against_the_line_through_fixed_ranks() -> None:
    half_way = planted.counts(round(2000 * math.sqrt(2)))  # between 2000 and 4000, in logarithms
    records = [
        *runs(EXPERIMENTS["lora_r2"], [460], **planted.counts(2000)),
        *runs(EXPERIMENTS["lora_r4"], [470], **planted.counts(4000)),
        *runs(ADALORA, [468], **half_way),
    ]
    subject = f"{ADALORA.name} against fixed LoRA at equal parameters"
    findings = found(records)
    for sentence in ("adaptive-at-least-fixed", "adaptive-beats-fixed"):
        assert findings[sentence, subject].by_seed == {0: pytest.approx(3 / 600, abs=1e-5)}
    other = records[-1].provenance.model_copy(update={"data_sha256": "f" * 64})
    assert ("adaptive-beats-fixed", subject) not in found(
        [*records[:-1], records[-1].model_copy(update={"provenance": other})]
    )


def test_bits_against_their_float_twin_and_what_they_save() -> None:
    lost = [9, 8, 10, 9, 9, 9]  # of 600 images: 1.5 points
    records = [
        *runs(LORA, [480] * 6),
        *runs(NF4, [480 - images for images in lost]),
        *runs(INT8, [480 + (-1) ** seed for seed in range(6)]),
    ]
    findings = found(records)
    four = findings["four-bits-lose-one-to-two", f"{NF4.name} against lora_r8"]
    assert list(four.by_seed.values()) == pytest.approx([-images / 600 for images in lost])
    assert four.verdict == findings["eight-bits-lose-nothing", f"{INT8.name} against lora_r8"].verdict == "supported"
    fewer = findings["fewer-bits-more-accurate", f"{NF4.name} against lora_r8"]
    assert (fewer.verdict, fewer.family) == ("not decided", 2)
    size = findings["four-bits-model-eighth", NF4.name]
    left, weights = planted.LEFT_IN_FLOAT + 3080, planted.BACKBONE_PARAMETERS + 770
    assert size.by_seed == pytest.approx(dict.fromkeys(range(6), 32 * weights / (8 * (21_233_664 * 5 / 8 + left))))
    assert (size.verdict, size.outcome[:25]) == ("refuted", "0 of 6 lie above 7.84; co")


def test_scaled_gradients_are_named_beside_what_bits_cost() -> None:
    section = NF4.qa_lora.model_copy(update={"gradient_scaling_factor": 2.0})
    scaled = NF4.model_copy(update={"name": "scaled", "qa_lora": section})
    findings = found([*runs(LORA, [480]), *runs(NF4, [480]), *runs(scaled, [480])])
    notes = {subject: one.note for (name, subject), one in findings.items() if name == "four-bits-lose-one-to-two"}
    assert "scales its adapters' gradients" in notes["scaled against lora_r8"]
    assert notes[f"{NF4.name} against lora_r8"] == ""


def test_lora_against_what_trains_less_and_more_is_one_family() -> None:
    records = [
        *runs(LORA, [480, 481, 482, 483, 484, 485, 486]),
        *runs(EXPERIMENTS["lora_r1"], [400] * 7),
        *runs(EXPERIMENTS["linear_probe"], [450] * 7),
        *runs(EXPERIMENTS["full_finetuning"], [500] * 7),
    ]
    verdicts = {key: (one.verdict, one.family) for key, one in found(records).items()}
    assert verdicts == {
        ("lora-beats-linear", "lora_r8 against linear_probe"): ("supported", 2),
        ("lora-beats-full", "lora_r8 against full_finetuning"): ("refuted", 2),
    }
