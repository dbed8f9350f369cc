"""What a report says of layers, allocation, bits and methods: sentences, each with what decides it.

Each is worded so that a positive value of its measure speaks for it. Selections look at what an experiment is, never at
its results; where several experiments or pairs fit, each is one test.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from peft_vit.base.statistics.estimates import Kind, Question
from peft_vit.lab.analysis import evidence
from peft_vit.lab.analysis.convergence import late_loss_deviation, roughness
from peft_vit.lab.analysis.evidence import Group, Measure, difference

Unit = Literal["share", "log2 ratio", "ranks", "rho", "index", "factor", "nats", "s", "bytes"]


@dataclass(frozen=True)
class Sentence:
    """A sentence, and what decides it."""

    id: str
    text: str
    test: Kind  # see `Question`
    of: Group  # the experiments that it is about; where several fit, or several pairs, each is one test
    measure: Measure
    unit: Unit  # of the values and of the margin
    source: str  # who states it
    refuted_by: str | None = None  # in words; None: nothing is tested
    reason: str = ""  # why it is only described
    margin: float | None = None  # None counts as 0
    expected: float | None = None  # the value that an equivalence names; None counts as 0
    family: str = ""  # tests of one family in one study are corrected together; empty: those of this sentence

    @property
    def question(self) -> Question:
        """Return what is asked of the values."""
        return Question(self.test, self.margin or 0.0, self.expected or 0.0)


_ADAPTIVE, _QUANTIZED = ("adalora", "qa_adalora"), ("qa_lora", "qa_adalora")
_CONTROLS = {"adalora.importance_metric": ("random", "uniform")}
_BY_SCORES = Group(_ADAPTIVE, unless=_CONTROLS)
_ON_FLOAT_WEIGHTS = Group(("adalora", "peft_adalora"), unless=_CONTROLS)
_WITH_MAPS = Group((*_ADAPTIVE, "peft_adalora"))
_EIGHT_BITS = Group(_QUANTIZED, {"qa_lora.quantization_bits": 8})
_FOUR_BITS = Group(_QUANTIZED, {"qa_lora.quantization_bits": 4})

_STRATEGY = "adalora.allocation_strategy"
_SCHEDULE = "qa_lora.quantization_schedule"
_WARM_UP = "qa_lora.quantization_warmup_steps"
_IN_GROUPS = "qa_lora.use_group_quantization"
_SCALING = {"qa_lora.gradient_scaling_factor": 1.0, "qa_lora.gradient_scaling": "constant"}

_against_proportional = partial(
    difference,
    against=Group(where={_STRATEGY: "proportional"}),
    same_but=(_STRATEGY, "adalora.top_k", "adalora.threshold_tau"),
    value=evidence.rank_gini,
)


SENTENCES = (
    Sentence(
        "attention-over-mlp",
        "Attention sites score higher than MLP sites, in the mean per triplet",
        "superiority",
        _BY_SCORES,
        evidence.attention_over_mlp,
        "log2 ratio",
        refuted_by="MLP sites score higher",
        source='texts about PEFT ("attention matters more than MLP")',
    ),
    Sentence(
        "query-most-rank",
        "Query sites get the most rank of all matrix types",
        "superiority",
        _BY_SCORES,
        evidence.query_over_each,
        "ranks",
        refuted_by="another type has more rank in the mean",
        source='texts about PEFT ("query gets the most rank")',
    ),
    Sentence(
        "query-more-than-mean",
        "Query sites get more rank than the mean of all other sites",
        "superiority",
        _BY_SCORES,
        evidence.query_over_mean,
        "ranks",
        refuted_by="query sites have less rank than the mean of the others",
        source="texts about PEFT, the weaker form of query-most-rank",
    ),
    Sentence(
        "removing-mlp-costs",
        "Leaving the MLP adapters out costs more than one point of validation accuracy",
        "superiority",
        Group(("lora", "adalora", "qa_lora", "qa_adalora")),
        evidence.cost_of_removing_mlp,
        "share",
        margin=0.01,
        refuted_by="it costs less than one point",
        source='texts about PEFT ("MLP adapters matter too")',
    ),
    Sentence(
        "importance-predicts-harm",
        "The more important a site is scored, the more the loss rises when its adapter is left out",
        "superiority",
        _BY_SCORES,
        evidence.against_harm,
        "rho",
        refuted_by="a negative rank correlation over the sites with rank",
        source="what every importance score takes for granted",
    ),
    Sentence(
        "seeds-agree",
        "Seeds agree on which sites matter, with a rank correlation above 0.5",
        "superiority",
        _BY_SCORES,
        evidence.between_seeds,
        "rho",
        margin=0.5,
        refuted_by="a rank correlation below 0.5",
        source='texts about PEFT ("importance patterns are stable")',
    ),
    Sentence(
        "spread-gini",
        "How concentrated the final ranks are (Gini's coefficient, 0 for equal ranks)",
        "described",
        _WITH_MAPS,
        evidence.spread_gini,
        "index",
        reason="a description of each strategy, not a claim; the two sentences below compare strategies",
        source="this project",
    ),
    Sentence(
        "spread-entropy",
        "How even the final ranks are (entropy over its largest value, 1 for equal ranks)",
        "described",
        _WITH_MAPS,
        evidence.spread_entropy,
        "index",
        reason="a description of each strategy, not a claim; the two sentences below compare strategies",
        source="this project",
    ),
    Sentence(
        "top-k-concentrates",
        "top_k concentrates rank on fewer sites than proportional does",
        "superiority",
        Group(_ADAPTIVE, {_STRATEGY: "top_k"}),
        _against_proportional,
        "index",
        family="strategies-concentrate",
        refuted_by="proportional concentrates it more",
        source="texts about adaptive ranks",
    ),
    Sentence(
        "threshold-concentrates",
        "threshold concentrates rank on fewer sites than proportional does",
        "superiority",
        Group(_ADAPTIVE, {_STRATEGY: "threshold"}),
        _against_proportional,
        "index",
        family="strategies-concentrate",
        refuted_by="proportional concentrates it more",
        source="texts about adaptive ranks",
    ),
    Sentence(
        "adaptive-at-least-fixed",
        "Adaptive ranks are at least as accurate as fixed LoRA with as many trainable parameters, within one point",
        "noninferiority",
        _ON_FLOAT_WEIGHTS,
        evidence.at_equal_parameters,
        "share",
        margin=0.01,
        refuted_by="they are less accurate by more than one point",
        source='texts about PEFT ("adaptive is at least as good as fixed")',
    ),
    Sentence(
        "adaptive-beats-fixed",
        "Adaptive ranks are more accurate than fixed LoRA with as many trainable parameters",
        "superiority",
        _ON_FLOAT_WEIGHTS,
        evidence.at_equal_parameters,
        "share",
        refuted_by="they are less accurate",
        source='texts about PEFT ("adaptive beats fixed")',
    ),
    Sentence(
        "fixed-needs-fewer",
        "Fixed LoRA needs fewer trainable parameters than adaptive ranks for the same accuracy",
        "described",
        _ON_FLOAT_WEIGHTS,
        evidence.parameters_at_equal_accuracy,
        "log2 ratio",
        reason="where accuracy hardly rises with rank, the parameters at which fixed LoRA first reaches an accuracy "
        "are read off noise, and a test of them errs too often; the sign is tested by adaptive-beats-fixed, whose "
        "refutation says that fixed LoRA needs fewer wherever accuracy rises with parameters",
        source="the reverse of what texts about adaptive ranks state",
    ),
    Sentence(
        "scoring-under-10-percent",
        "Scoring sites costs under 10 % of the time of training steps",
        "superiority",
        Group(_ADAPTIVE),
        partial(evidence.overhead_below, parts={"scoring"}),
        "share",
        family="overhead",
        refuted_by="it costs more",
        source='texts about adaptive ranks ("overhead under 10 %")',
    ),
    Sentence(
        "reallocation-under-10-percent",
        "Reallocating ranks costs under 10 % of the time of training steps",
        "superiority",
        Group(_ADAPTIVE),
        partial(evidence.overhead_below, parts={"reallocation"}),
        "share",
        family="overhead",
        refuted_by="it costs more",
        source='texts about adaptive ranks ("overhead under 10 %")',
    ),
    Sentence(
        "overhead-under-10-percent",
        "Scoring and reallocating together cost under 10 % of the time of training steps",
        "superiority",
        Group(_ADAPTIVE),
        partial(evidence.overhead_below, parts={"scoring", "reallocation"}),
        "share",
        family="overhead",
        refuted_by="they cost more",
        source='texts about adaptive ranks ("overhead under 10 %")',
    ),
    Sentence(
        "eight-bits-lose-nothing",
        "8-bit weights are as accurate as float weights, within one point",
        "equivalence",
        _EIGHT_BITS,
        evidence.against_float,
        "share",
        margin=0.01,
        refuted_by="a difference of more than one point",
        source='texts about quantization ("8 bits lose nothing")',
    ),
    Sentence(
        "four-bits-lose-one-to-two",
        "4-bit weights lose one to two points of accuracy against float weights",
        "equivalence",
        _FOUR_BITS,
        evidence.against_float,
        "share",
        expected=-0.015,
        margin=0.005,
        refuted_by="a loss of less than one point, or of more than two",
        source='texts about quantization ("4 bits lose one to two points")',
    ),
    Sentence(
        "fewer-bits-more-accurate",
        "Quantized weights are more accurate than the same adapters on float weights",
        "superiority",
        Group(_QUANTIZED),
        evidence.against_float,
        "share",
        refuted_by="they are less accurate, which is the usual expectation",
        source="texts about quantization as regularization",
    ),
    Sentence(
        "schedule-steadies",
        "A gradual schedule makes convergence steadier than quantizing from the start (late deviation of the loss)",
        "superiority",
        Group(_QUANTIZED, {_SCHEDULE: ("linear", "cosine")}),
        partial(
            difference,
            against=Group(where={_SCHEDULE: "constant"}),
            same_but=(_SCHEDULE, _WARM_UP, "qa_lora.quantization_end_step"),
            value=late_loss_deviation,
            lower_is_better=True,
        ),
        "nats",
        refuted_by="it makes convergence less steady",
        source='texts about quantization schedules ("schedules change convergence stability")',
    ),
    Sentence(
        "cosine-is-smoother",
        "A cosine schedule gives a smoother course of the loss than a linear one",
        "superiority",
        Group(_QUANTIZED, {_SCHEDULE: "cosine"}),
        partial(
            difference,
            against=Group(where={_SCHEDULE: "linear"}),
            same_but=(_SCHEDULE,),
            value=roughness,
            lower_is_better=True,
        ),
        "nats",
        refuted_by="the linear one is smoother",
        source='texts about quantization schedules ("cosine is smoother")',
    ),
    Sentence(
        "eight-bits-layers-quarter",
        "8-bit layers take a quarter of the bytes of float32 ones (at least 98 % of the factor 4), scales included",
        "counted",
        _EIGHT_BITS,
        evidence.layers_factor,
        "factor",
        margin=3.92,
        refuted_by="a smaller factor",
        source='texts about quantization ("8 bits are 4x smaller")',
    ),
    Sentence(
        "eight-bits-model-quarter",
        "A model with 8-bit layers takes a quarter of the bytes of a float32 one (at least 98 % of the factor 4)",
        "counted",
        _EIGHT_BITS,
        evidence.model_factor,
        "factor",
        margin=3.92,
        refuted_by="a smaller factor",
        source='texts about quantization ("8 bits are 4x smaller")',
    ),
    Sentence(
        "four-bits-layers-eighth",
        "4-bit layers take an eighth of the bytes of float32 ones (at least 98 % of the factor 8), scales included",
        "counted",
        _FOUR_BITS,
        evidence.layers_factor,
        "factor",
        margin=7.84,
        refuted_by="a smaller factor",
        source='texts about quantization ("4 bits are 8x smaller")',
    ),
    Sentence(
        "four-bits-model-eighth",
        "A model with 4-bit layers takes an eighth of the bytes of a float32 one (at least 98 % of the factor 8)",
        "counted",
        _FOUR_BITS,
        evidence.model_factor,
        "factor",
        margin=7.84,
        refuted_by="a smaller factor",
        source='texts about quantization ("4 bits are 8x smaller")',
    ),
    Sentence(
        "groups-help",
        "Quantizing in groups is more accurate than one scale a row",
        "superiority",
        Group(_QUANTIZED, {_IN_GROUPS: True}),
        partial(
            difference,
            against=Group(where={_IN_GROUPS: False}),
            same_but=(_IN_GROUPS, "qa_lora.group_size", "qa_lora.quantization_offset"),
        ),
        "share",
        refuted_by="it is less accurate",
        source='texts about quantization ("groups help")',
    ),
    Sentence(
        "gradient-scaling-helps",
        "Scaling the adapters' gradients makes quantized training more accurate",
        "superiority",
        Group(_QUANTIZED),
        partial(difference, against=Group(where=_SCALING), same_but=tuple(_SCALING)),
        "share",
        refuted_by="it makes it less accurate",
        source='texts about quantization-aware adapters ("gradient scaling is crucial")',
    ),
    Sentence(
        "warm-up-helps",
        "Warming up on float weights before quantization begins makes training more accurate",
        "superiority",
        Group(_QUANTIZED, unless={_WARM_UP: 0}),
        partial(difference, against=Group(where={_WARM_UP: 0}), same_but=(_WARM_UP,)),
        "share",
        refuted_by="it makes it less accurate",
        source='texts about quantization schedules ("warm-up helps")',
    ),
    Sentence(
        "above-majority",
        "Every run is more accurate than always naming the most frequent class",
        "counted",
        Group(),
        evidence.above_majority,
        "share",
        margin=0.0,
        refuted_by="a run that is not",
        source="this project",
    ),
    Sentence(
        "lora-beats-linear",
        "Fixed LoRA is more accurate than a linear probe",
        "superiority",
        Group(reference_lora=True),
        partial(difference, against=Group(("linear",))),
        "share",
        family="lora-against-others",
        refuted_by="the linear probe is more accurate",
        source="texts about PEFT",
    ),
    Sentence(
        "lora-beats-full",
        "Fixed LoRA is more accurate than full fine-tuning",
        "superiority",
        Group(reference_lora=True),
        partial(difference, against=Group(("full",))),
        "share",
        family="lora-against-others",
        refuted_by="full fine-tuning is more accurate",
        source="texts about PEFT with few labels",
    ),
)
