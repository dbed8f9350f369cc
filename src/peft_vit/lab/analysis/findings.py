"""Findings: sentences about layers, ranks, bits and methods, each with its numbers and what the test of them says.

A sentence is worded so that positive values speak for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft_vit.base.statistics import Verdict, mean_interval
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.base.statistics.estimates import Estimate, Kind, Question, decide, join_notes
from peft_vit.core.config import AdaLoraConfig, ExperimentConfig
from peft_vit.lab.analysis.comparison import compare, references
from peft_vit.lab.analysis.layers import Allocation, ImportancePattern
from peft_vit.lab.analysis.quantization import FLOAT32_BITS, QuantizationImpact, model_bytes
from peft_vit.lab.analysis.studies import Study


@dataclass(frozen=True)
class Sentence:
    """A sentence, and what decides it."""

    id: str
    text: str
    test: Kind  # see `Question`
    unit: str  # of the values and of the margin
    margin: float | None = None  # None counts as 0
    expected: float | None = None  # the value that an equivalence names; None counts as 0
    family: str = ""  # tests of one family in one study are corrected together; empty: those of this sentence

    @property
    def question(self) -> Question:
        """Return what is asked of the values."""
        return Question(self.test, self.margin or 0.0, self.expected or 0.0)


SENTENCES = (
    Sentence(
        "attention-over-mlp",
        "Attention sites score higher than MLP sites, in the mean per triplet",
        "superiority",
        "log2 ratio",
    ),
    Sentence(
        "seeds-agree",
        "Seeds agree on which sites matter, with a rank correlation above 0.5",
        "superiority",
        "rho",
        margin=0.5,
    ),
    Sentence(
        "adaptive-at-least-fixed",
        "Adaptive ranks are at least as accurate as fixed LoRA with as many trainable parameters, within one point",
        "noninferiority",
        "share",
        margin=0.01,
    ),
    Sentence(
        "adaptive-beats-fixed",
        "Adaptive ranks are more accurate than fixed LoRA with as many trainable parameters",
        "superiority",
        "share",
    ),
    Sentence(
        "eight-bits-lose-nothing",
        "8-bit weights are as accurate as float weights, within one point",
        "equivalence",
        "share",
        margin=0.01,
    ),
    Sentence(
        "four-bits-lose-one-to-two",
        "4-bit weights lose one to two points of accuracy against float weights",
        "equivalence",
        "share",
        margin=0.005,
        expected=-0.015,
    ),
    Sentence(
        "fewer-bits-more-accurate",
        "Quantized weights are more accurate than the same adapters on float weights",
        "superiority",
        "share",
    ),
    Sentence(
        "eight-bits-model-quarter",
        "A model with 8-bit layers takes a quarter of the bytes of a float32 one (at least 98 % of the factor 4)",
        "counted",
        "factor",
        margin=3.92,
    ),
    Sentence(
        "four-bits-model-eighth",
        "A model with 4-bit layers takes an eighth of the bytes of a float32 one (at least 98 % of the factor 8)",
        "counted",
        "factor",
        margin=7.84,
    ),
    Sentence(
        "lora-beats-linear",
        "Fixed LoRA is more accurate than a linear probe",
        "superiority",
        "share",
        family="lora-against-others",
    ),
    Sentence(
        "lora-beats-full",
        "Fixed LoRA is more accurate than full fine-tuning",
        "superiority",
        "share",
        family="lora-against-others",
    ),
)
_OF_BITS = {
    8: ("eight-bits-lose-nothing", "eight-bits-model-quarter"),
    4: ("four-bits-lose-one-to-two", "four-bits-model-eighth"),
}
_AGAINST = {"linear": "lora-beats-linear", "full": "lora-beats-full"}


@dataclass(frozen=True, kw_only=True)
class Finding(Estimate):
    """What one experiment, or one pair, says of a sentence."""

    sentence: Sentence
    outcome: str = ""  # what the test said, or why it says nothing

    @property
    def test(self) -> str:
        """Return the name of the test; "none" if nothing was tested."""
        if self.significance is None:
            return "none"
        margin = "" if not self.sentence.margin else f", margin {self.sentence.margin:g}"
        expected = "" if self.sentence.expected is None else f" about {self.sentence.expected:g}"
        return f"{self.significance.test}{margin}{expected}"


def find(
    study: Study,
    patterns: Sequence[ImportancePattern],
    allocation: Sequence[Allocation],
    quantization: Sequence[QuantizationImpact],
) -> tuple[Finding, ...]:
    """Return what a study says about every sentence that it has values for, in their order."""
    measured = grouped(_measured(study, patterns, allocation, quantization))
    untested = [
        (sentence, estimated(of.name, of.by_seed, reference=of.reference, n_of=of.n_of, note=of.note))
        for sentence in SENTENCES
        for of in measured.get(sentence.id, ())
        if of.by_seed
    ]
    return judge(untested, study.untested)


def _measured(
    study: Study,
    patterns: Sequence[ImportancePattern],
    allocation: Sequence[Allocation],
    quantization: Sequence[QuantizationImpact],
) -> Iterator[tuple[str, Estimate]]:
    """Yield a sentence's id and values."""
    for pattern in patterns:
        if pattern.experiment.section(AdaLoraConfig) is not None and not _by_chance(pattern.experiment):
            yield "attention-over-mlp", estimated(pattern.experiment.name, pattern.attention_over_mlp)
            yield "seeds-agree", estimated(pattern.experiment.name, pattern.between_seeds, n_of="pairs of seeds")
    for allocated in allocation:
        if allocated.experiment.method != "qa_adalora" and not _by_chance(allocated.experiment):
            yield "adaptive-at-least-fixed", allocated.against_fixed
            yield "adaptive-beats-fixed", allocated.against_fixed
    for impact in quantization:
        compared, settings = impact.against_unquantized, impact.settings
        if settings.gradient_scaling_factor != 1 or settings.gradient_scaling != "constant":
            note = "it also scales its adapters' gradients, which the float twin does not"
            compared = replace(compared, note=join_notes(compared.note, note))
        yield "fewer-bits-more-accurate", compared
        if settings.quantization_bits in _OF_BITS:
            loss, size = _OF_BITS[settings.quantization_bits]
            yield loss, compared
            models = {run.seed: model for run in impact.runs if (model := model_bytes([run])) is not None}
            factors = {seed: FLOAT32_BITS / model.bits_per_weight for seed, model in models.items()}
            yield size, estimated(impact.experiment.name, factors)
    loras = {experiment.name for experiment in study.fixed_rank_loras()}
    for lora in loras.intersection(references(study)):
        for other in study.with_method(*_AGAINST):
            yield _AGAINST[other.method], compare(study.runs_of(lora), study.runs_of(other.name), lora, other.name)


def _by_chance(experiment: ExperimentConfig) -> bool:
    """Return whether ranks are decided without scores that mean anything: a control."""
    section = experiment.section(AdaLoraConfig)
    return section is not None and section.importance_metric in ("random", "uniform")


def estimated(name: str, by_seed: Mapping[Any, float], **more: Any) -> Estimate:
    """Return an estimate of the mean of values."""
    interval = mean_interval(list(by_seed.values())) if by_seed else None
    return Estimate(name=name, by_seed=by_seed, interval=interval, **more)


def judge(measured: Sequence[tuple[Sentence, Estimate]], untested: str = "") -> tuple[Finding, ...]:
    """Return a finding for each estimate, which is not tested yet, corrected over those given that share a family.

    `untested` is why no test may decide, since the number of values followed from results; empty: tests do.
    """
    findings = [Finding(**vars(of) | {"question": sentence.question}, sentence=sentence) for sentence, of in measured]
    families = {} if untested else grouped((f.sentence.family or f.sentence.id, i) for i, f in enumerate(findings))
    for places in families.values():
        for place, decided in zip(places, decide([findings[place] for place in places]), strict=True):
            findings[place] = decided
    return tuple(_with_outcome(finding, untested) for finding in findings)


def _with_outcome(finding: Finding, untested: str) -> Finding:
    """Return a finding with what its test says, or what is counted."""
    test, question, values = finding.significance, finding.question, finding.by_seed.values()
    if question.kind == "counted":
        above = sum(value > question.margin for value in values)
        outcome = (
            f"{above} of {len(values)} lie above {question.margin:g}; "
            "counted over these runs, not generalized to others"
        )
        verdict = Verdict.SUPPORTED if above == len(values) else Verdict.REFUTED
        return replace(finding, outcome=outcome, verdict=verdict)
    if test is None:
        return replace(finding, outcome=untested)
    if not test.decidable:
        return replace(finding, outcome=test.sentence())
    over = f"Holm over {finding.family}" if finding.family > 1 else "the only test of its family"
    p_values = f"p = {finding.adjusted_p or 0:.3g}"
    if question.kind != "superiority":
        p_values += f" for it, {finding.opposite_p or 0:.3g} against it"
    return replace(finding, outcome=f"{p_values} ({over})")
