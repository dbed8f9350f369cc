"""What a report says of layers, allocation, bits and methods: sentences, each with what decides it.

Each is worded so that a positive value of its measure speaks for it. Selections look at what an experiment is, never at
its results; where several experiments or pairs fit, each is one test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from peft_vit.analysis.convergence import late_loss_deviation, roughness
from peft_vit.analysis.measures.accuracy import (
    above_majority,
    against_float,
    at_equal_parameters,
    difference,
    parameters_at_equal_accuracy,
)
from peft_vit.analysis.measures.costs import layers_factor, memory_factor, model_factor, overhead_below
from peft_vit.analysis.measures.evidence import Evidence, Group, Measured
from peft_vit.analysis.measures.ranks import query_over_each, query_over_mean, rank_entropy, rank_gini, rank_spread
from peft_vit.analysis.measures.scores import against_harm, attention_over_mlp, between_seeds, cost_of_removing_mlp
from peft_vit.config import AdaLoraConfig, ExperimentConfig, QaLoraConfig

Test = Literal["superiority", "noninferiority", "equivalence", "counted", "described"]
Unit = Literal["share", "log2 ratio", "ranks", "rho", "index", "factor", "nats", "s", "bytes"]


@dataclass(frozen=True)
class Sentence:
    """A sentence, and what decides it."""

    id: str
    text: str
    # superiority: the values lie above the margin; noninferiority: their mean above -margin; equivalence: it lies
    # within +-margin of `expected`; counted: every value of these runs lies above the margin; described: nothing
    test: Test
    measure: Callable[[Evidence], tuple[Measured, ...]]  # raises NoDataError
    unit: Unit  # of the values and of the margin
    source: str  # who states it
    refuted_by: str | None = None  # in words; None: nothing is tested
    reason: str = ""  # why it is only described
    margin: float | None = None  # None counts as 0
    expected: float | None = None  # the value that an equivalence names; None counts as 0
    family: str = ""  # tests of one family in one study are corrected together; empty: those of this sentence


def _adaptive(words: str, holds: Callable[[AdaLoraConfig], bool]) -> Group:
    def takes(experiment: ExperimentConfig) -> bool:
        settings = experiment.section(AdaLoraConfig)
        return settings is not None and holds(settings)

    return Group(words, takes)


def _quantized(words: str, holds: Callable[[QaLoraConfig], bool]) -> Group:
    """Return the experiments with adapters on quantized weights for whose settings something holds."""

    def takes(experiment: ExperimentConfig) -> bool:
        return experiment.method in ("qa_lora", "qa_adalora") and holds(experiment.need(QaLoraConfig))

    return Group(words, takes)


def _of_methods(*methods: str) -> Group:
    return Group(f"of method {' or '.join(methods)}", lambda experiment: experiment.method in methods)


_EVERY = Group("of any kind", lambda _: True)
_LINEAR, _FULL = _of_methods("linear"), _of_methods("full")
_ADAPTIVE = _of_methods("adalora", "qa_adalora")
_WITH_MAPS = _of_methods("adalora", "qa_adalora", "peft_adalora")
_WITH_ADAPTERS = _of_methods("lora", "adalora", "qa_lora", "qa_adalora")
_BY_SCORES = _adaptive(
    "of method adalora or qa_adalora, without adalora.importance_metric random or uniform",
    lambda settings: settings.importance_metric not in ("random", "uniform"),
)
_ON_FLOAT_WEIGHTS = Group(
    "of method adalora or peft_adalora, without adalora.importance_metric random or uniform",
    lambda one: one.method == "peft_adalora" or (one.method == "adalora" and _BY_SCORES.takes(one)),
)
_TOP_K = _adaptive(
    "of method adalora or qa_adalora, with adalora.allocation_strategy top_k",
    lambda settings: settings.allocation_strategy == "top_k",
)
_THRESHOLD = _adaptive(
    "of method adalora or qa_adalora, with adalora.allocation_strategy threshold",
    lambda settings: settings.allocation_strategy == "threshold",
)
_PROPORTIONAL = _adaptive(
    "with adalora.allocation_strategy proportional", lambda settings: settings.allocation_strategy == "proportional"
)
_STRATEGY = ("adalora.allocation_strategy", "adalora.top_k", "adalora.threshold_tau")
_QUANTIZED = _of_methods("qa_lora", "qa_adalora")
_EIGHT_BITS = _quantized(
    "of method qa_lora or qa_adalora, with qa_lora.quantization_bits 8",
    lambda settings: settings.quantization_bits == 8,
)
_FOUR_BITS = _quantized(
    "of method qa_lora or qa_adalora, with qa_lora.quantization_bits 4",
    lambda settings: settings.quantization_bits == 4,
)
_GRADUAL = _quantized(
    "of method qa_lora or qa_adalora, with qa_lora.quantization_schedule linear or cosine",
    lambda settings: settings.quantization_schedule in ("linear", "cosine"),
)
_FROM_THE_START = _quantized(
    "with qa_lora.quantization_schedule constant", lambda settings: settings.quantization_schedule == "constant"
)
_COSINE = _quantized(
    "of method qa_lora or qa_adalora, with qa_lora.quantization_schedule cosine",
    lambda settings: settings.quantization_schedule == "cosine",
)
_STRAIGHT = _quantized(
    "with qa_lora.quantization_schedule linear", lambda settings: settings.quantization_schedule == "linear"
)
_SCHEDULE = ("qa_lora.quantization_schedule",)
_WARM_UP = ("qa_lora.quantization_warmup_steps",)
_IN_GROUPS = _quantized(
    "of method qa_lora or qa_adalora, with qa_lora.use_group_quantization true",
    lambda settings: settings.use_group_quantization,
)
_BY_ROWS = _quantized("with qa_lora.use_group_quantization false", lambda settings: not settings.use_group_quantization)
_GROUPS = ("qa_lora.use_group_quantization", "qa_lora.group_size", "qa_lora.quantization_offset")
_UNSCALED = _quantized(
    "with qa_lora.gradient_scaling_factor 1.0, with qa_lora.gradient_scaling constant",
    lambda settings: settings.gradient_scaling_factor == 1 and settings.gradient_scaling == "constant",
)
_SCALING = ("qa_lora.gradient_scaling_factor", "qa_lora.gradient_scaling")
_WARMED_UP = _quantized(
    "of method qa_lora or qa_adalora, without qa_lora.quantization_warmup_steps 0",
    lambda settings: settings.quantization_warmup_steps != 0,
)
_NOT_WARMED_UP = _quantized(
    "with qa_lora.quantization_warmup_steps 0", lambda settings: settings.quantization_warmup_steps == 0
)


def _reference_lora_against(evidence: Evidence, other: Group) -> tuple[Measured, ...]:
    """Return how much more accurate the LoRA is that others are compared with."""
    reference = Group("the fixed-rank LoRA of largest rank up to 8", lambda one: one.name == evidence.reference_lora)
    return difference(evidence, reference, other)


SENTENCES = (
    Sentence(
        id="attention-over-mlp",
        text="Attention sites score higher than MLP sites, in the mean per triplet",
        test="superiority",
        measure=partial(attention_over_mlp, of=_BY_SCORES),
        unit="log2 ratio",
        refuted_by="MLP sites score higher",
        source='texts about PEFT ("attention matters more than MLP")',
    ),
    Sentence(
        id="query-most-rank",
        text="Query sites get the most rank of all matrix types",
        test="superiority",
        measure=partial(query_over_each, of=_BY_SCORES),
        unit="ranks",
        refuted_by="another type has more rank in the mean",
        source='texts about PEFT ("query gets the most rank")',
    ),
    Sentence(
        id="query-more-than-mean",
        text="Query sites get more rank than the mean of all other sites",
        test="superiority",
        measure=partial(query_over_mean, of=_BY_SCORES),
        unit="ranks",
        refuted_by="query sites have less rank than the mean of the others",
        source="texts about PEFT, the weaker form of query-most-rank",
    ),
    Sentence(
        id="removing-mlp-costs",
        text="Leaving the MLP adapters out costs more than one point of validation accuracy",
        test="superiority",
        measure=partial(cost_of_removing_mlp, of=_WITH_ADAPTERS),
        unit="share",
        margin=0.01,
        refuted_by="it costs less than one point",
        source='texts about PEFT ("MLP adapters matter too")',
    ),
    Sentence(
        id="importance-predicts-harm",
        text="The more important a site is scored, the more the loss rises when its adapter is left out",
        test="superiority",
        measure=partial(against_harm, of=_BY_SCORES),
        unit="rho",
        refuted_by="a negative rank correlation over the sites with rank",
        source="what every importance score takes for granted",
    ),
    Sentence(
        id="seeds-agree",
        text="Seeds agree on which sites matter, with a rank correlation above 0.5",
        test="superiority",
        measure=partial(between_seeds, of=_BY_SCORES),
        unit="rho",
        margin=0.5,
        refuted_by="a rank correlation below 0.5",
        source='texts about PEFT ("importance patterns are stable")',
    ),
    Sentence(
        id="spread-gini",
        text="How concentrated the final ranks are (Gini's coefficient, 0 for equal ranks)",
        test="described",
        measure=partial(rank_spread, of=_WITH_MAPS, index=rank_gini),
        unit="index",
        reason="a description of each strategy, not a claim; the two sentences below compare strategies",
        source="this project",
    ),
    Sentence(
        id="spread-entropy",
        text="How even the final ranks are (entropy over its largest value, 1 for equal ranks)",
        test="described",
        measure=partial(rank_spread, of=_WITH_MAPS, index=rank_entropy),
        unit="index",
        reason="a description of each strategy, not a claim; the two sentences below compare strategies",
        source="this project",
    ),
    Sentence(
        id="top-k-concentrates",
        text="top_k concentrates rank on fewer sites than proportional does",
        test="superiority",
        measure=partial(difference, of=_TOP_K, against=_PROPORTIONAL, same_but=_STRATEGY, value=rank_gini),
        unit="index",
        family="strategies-concentrate",
        refuted_by="proportional concentrates it more",
        source="texts about adaptive ranks",
    ),
    Sentence(
        id="threshold-concentrates",
        text="threshold concentrates rank on fewer sites than proportional does",
        test="superiority",
        measure=partial(difference, of=_THRESHOLD, against=_PROPORTIONAL, same_but=_STRATEGY, value=rank_gini),
        unit="index",
        family="strategies-concentrate",
        refuted_by="proportional concentrates it more",
        source="texts about adaptive ranks",
    ),
    Sentence(
        id="adaptive-at-least-fixed",
        text="Adaptive ranks are at least as accurate as fixed LoRA with as many trainable parameters, within one "
        "point",
        test="noninferiority",
        measure=partial(at_equal_parameters, of=_ON_FLOAT_WEIGHTS),
        unit="share",
        margin=0.01,
        refuted_by="they are less accurate by more than one point",
        source='texts about PEFT ("adaptive is at least as good as fixed")',
    ),
    Sentence(
        id="adaptive-beats-fixed",
        text="Adaptive ranks are more accurate than fixed LoRA with as many trainable parameters",
        test="superiority",
        measure=partial(at_equal_parameters, of=_ON_FLOAT_WEIGHTS),
        unit="share",
        refuted_by="they are less accurate",
        source='texts about PEFT ("adaptive beats fixed")',
    ),
    Sentence(
        id="fixed-needs-fewer",
        text="Fixed LoRA needs fewer trainable parameters than adaptive ranks for the same accuracy",
        test="described",
        measure=partial(parameters_at_equal_accuracy, of=_ON_FLOAT_WEIGHTS),
        unit="log2 ratio",
        reason="where accuracy hardly rises with rank, the parameters at which fixed LoRA first reaches an accuracy "
        "are read off noise, and a test of them errs too often; the sign is tested by adaptive-beats-fixed, whose "
        "refutation says that fixed LoRA needs fewer wherever accuracy rises with parameters",
        source="the reverse of what texts about adaptive ranks state",
    ),
    Sentence(
        id="scoring-under-10-percent",
        text="Scoring sites costs under 10 % of the time of training steps",
        test="superiority",
        measure=partial(overhead_below, of=_ADAPTIVE, parts={"scoring"}),
        unit="share",
        family="overhead",
        refuted_by="it costs more",
        source='texts about adaptive ranks ("overhead under 10 %")',
    ),
    Sentence(
        id="reallocation-under-10-percent",
        text="Reallocating ranks costs under 10 % of the time of training steps",
        test="superiority",
        measure=partial(overhead_below, of=_ADAPTIVE, parts={"reallocation"}),
        unit="share",
        family="overhead",
        refuted_by="it costs more",
        source='texts about adaptive ranks ("overhead under 10 %")',
    ),
    Sentence(
        id="overhead-under-10-percent",
        text="Scoring and reallocating together cost under 10 % of the time of training steps",
        test="superiority",
        measure=partial(overhead_below, of=_ADAPTIVE, parts={"scoring", "reallocation"}),
        unit="share",
        family="overhead",
        refuted_by="they cost more",
        source='texts about adaptive ranks ("overhead under 10 %")',
    ),
    Sentence(
        id="eight-bits-lose-nothing",
        text="8-bit weights are as accurate as float weights, within one point",
        test="equivalence",
        measure=partial(against_float, of=_EIGHT_BITS),
        unit="share",
        margin=0.01,
        refuted_by="a difference of more than one point",
        source='texts about quantization ("8 bits lose nothing")',
    ),
    Sentence(
        id="four-bits-lose-one-to-two",
        text="4-bit weights lose one to two points of accuracy against float weights",
        test="equivalence",
        measure=partial(against_float, of=_FOUR_BITS),
        unit="share",
        expected=-0.015,
        margin=0.005,
        refuted_by="a loss of less than one point, or of more than two",
        source='texts about quantization ("4 bits lose one to two points")',
    ),
    Sentence(
        id="fewer-bits-more-accurate",
        text="Quantized weights are more accurate than the same adapters on float weights",
        test="superiority",
        measure=partial(against_float, of=_QUANTIZED),
        unit="share",
        refuted_by="they are less accurate, which is the usual expectation",
        source="texts about quantization as regularization",
    ),
    Sentence(
        id="schedule-steadies",
        text="A gradual schedule makes convergence steadier than quantizing from the start (late deviation of the "
        "loss)",
        test="superiority",
        measure=partial(
            difference,
            of=_GRADUAL,
            against=_FROM_THE_START,
            same_but=(*_SCHEDULE, *_WARM_UP, "qa_lora.quantization_end_step"),
            value=late_loss_deviation,
            lower_is_better=True,
        ),
        unit="nats",
        refuted_by="it makes convergence less steady",
        source='texts about quantization schedules ("schedules change convergence stability")',
    ),
    Sentence(
        id="cosine-is-smoother",
        text="A cosine schedule gives a smoother course of the loss than a linear one",
        test="superiority",
        measure=partial(
            difference, of=_COSINE, against=_STRAIGHT, same_but=_SCHEDULE, value=roughness, lower_is_better=True
        ),
        unit="nats",
        refuted_by="the linear one is smoother",
        source='texts about quantization schedules ("cosine is smoother")',
    ),
    Sentence(
        id="eight-bits-layers-quarter",
        text="8-bit layers take a quarter of the bytes of float32 ones (at least 98 % of the factor 4), scales "
        "included",
        test="counted",
        measure=partial(memory_factor, of=_EIGHT_BITS, value=layers_factor),
        unit="factor",
        margin=3.92,
        refuted_by="a smaller factor",
        source='texts about quantization ("8 bits are 4x smaller")',
    ),
    Sentence(
        id="eight-bits-model-quarter",
        text="A model with 8-bit layers takes a quarter of the bytes of a float32 one (at least 98 % of the factor 4)",
        test="counted",
        measure=partial(memory_factor, of=_EIGHT_BITS, value=model_factor),
        unit="factor",
        margin=3.92,
        refuted_by="a smaller factor",
        source='texts about quantization ("8 bits are 4x smaller")',
    ),
    Sentence(
        id="four-bits-layers-eighth",
        text="4-bit layers take an eighth of the bytes of float32 ones (at least 98 % of the factor 8), scales "
        "included",
        test="counted",
        measure=partial(memory_factor, of=_FOUR_BITS, value=layers_factor),
        unit="factor",
        margin=7.84,
        refuted_by="a smaller factor",
        source='texts about quantization ("4 bits are 8x smaller")',
    ),
    Sentence(
        id="four-bits-model-eighth",
        text="A model with 4-bit layers takes an eighth of the bytes of a float32 one (at least 98 % of the factor 8)",
        test="counted",
        measure=partial(memory_factor, of=_FOUR_BITS, value=model_factor),
        unit="factor",
        margin=7.84,
        refuted_by="a smaller factor",
        source='texts about quantization ("4 bits are 8x smaller")',
    ),
    Sentence(
        id="groups-help",
        text="Quantizing in groups is more accurate than one scale a row",
        test="superiority",
        measure=partial(difference, of=_IN_GROUPS, against=_BY_ROWS, same_but=_GROUPS),
        unit="share",
        refuted_by="it is less accurate",
        source='texts about quantization ("groups help")',
    ),
    Sentence(
        id="gradient-scaling-helps",
        text="Scaling the adapters' gradients makes quantized training more accurate",
        test="superiority",
        measure=partial(difference, of=_QUANTIZED, against=_UNSCALED, same_but=_SCALING),
        unit="share",
        refuted_by="it makes it less accurate",
        source='texts about quantization-aware adapters ("gradient scaling is crucial")',
    ),
    Sentence(
        id="warm-up-helps",
        text="Warming up on float weights before quantization begins makes training more accurate",
        test="superiority",
        measure=partial(difference, of=_WARMED_UP, against=_NOT_WARMED_UP, same_but=_WARM_UP),
        unit="share",
        refuted_by="it makes it less accurate",
        source='texts about quantization schedules ("warm-up helps")',
    ),
    Sentence(
        id="above-majority",
        text="Every run is more accurate than always naming the most frequent class",
        test="counted",
        measure=partial(above_majority, of=_EVERY),
        unit="share",
        margin=0.0,
        refuted_by="a run that is not",
        source="this project",
    ),
    Sentence(
        id="lora-beats-linear",
        text="Fixed LoRA is more accurate than a linear probe",
        test="superiority",
        measure=partial(_reference_lora_against, other=_LINEAR),
        unit="share",
        family="lora-against-others",
        refuted_by="the linear probe is more accurate",
        source="texts about PEFT",
    ),
    Sentence(
        id="lora-beats-full",
        text="Fixed LoRA is more accurate than full fine-tuning",
        test="superiority",
        measure=partial(_reference_lora_against, other=_FULL),
        unit="share",
        family="lora-against-others",
        refuted_by="full fine-tuning is more accurate",
        source="texts about PEFT with few labels",
    ),
)
