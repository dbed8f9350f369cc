"""What a report says of layers, allocation, bits and methods: sentences, each with what decides it.

Each is worded so that a positive value of its measure speaks for it. Selections look at what an experiment is, never at
its results; where several experiments or pairs fit, each is one test.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from peft_vit.analysis import measures
from peft_vit.analysis.comparison import Kind, Question
from peft_vit.analysis.convergence import late_loss_deviation, roughness
from peft_vit.analysis.measures import Group, Measure, difference

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
    value=measures.rank_gini,
)


SENTENCES = (
    Sentence(
        id="attention-over-mlp",
        text="Attention sites score higher than MLP sites, in the mean per triplet",
        test="superiority",
        of=_BY_SCORES,
        measure=measures.attention_over_mlp,
        unit="log2 ratio",
        refuted_by="MLP sites score higher",
        source='texts about PEFT ("attention matters more than MLP")',
    ),
    Sentence(
        id="query-most-rank",
        text="Query sites get the most rank of all matrix types",
        test="superiority",
        of=_BY_SCORES,
        measure=measures.query_over_each,
        unit="ranks",
        refuted_by="another type has more rank in the mean",
        source='texts about PEFT ("query gets the most rank")',
    ),
    Sentence(
        id="query-more-than-mean",
        text="Query sites get more rank than the mean of all other sites",
        test="superiority",
        of=_BY_SCORES,
        measure=measures.query_over_mean,
        unit="ranks",
        refuted_by="query sites have less rank than the mean of the others",
        source="texts about PEFT, the weaker form of query-most-rank",
    ),
    Sentence(
        id="removing-mlp-costs",
        text="Leaving the MLP adapters out costs more than one point of validation accuracy",
        test="superiority",
        of=Group(("lora", "adalora", "qa_lora", "qa_adalora")),
        measure=measures.cost_of_removing_mlp,
        unit="share",
        margin=0.01,
        refuted_by="it costs less than one point",
        source='texts about PEFT ("MLP adapters matter too")',
    ),
    Sentence(
        id="importance-predicts-harm",
        text="The more important a site is scored, the more the loss rises when its adapter is left out",
        test="superiority",
        of=_BY_SCORES,
        measure=measures.against_harm,
        unit="rho",
        refuted_by="a negative rank correlation over the sites with rank",
        source="what every importance score takes for granted",
    ),
    Sentence(
        id="seeds-agree",
        text="Seeds agree on which sites matter, with a rank correlation above 0.5",
        test="superiority",
        of=_BY_SCORES,
        measure=measures.between_seeds,
        unit="rho",
        margin=0.5,
        refuted_by="a rank correlation below 0.5",
        source='texts about PEFT ("importance patterns are stable")',
    ),
    Sentence(
        id="spread-gini",
        text="How concentrated the final ranks are (Gini's coefficient, 0 for equal ranks)",
        test="described",
        of=_WITH_MAPS,
        measure=measures.spread_gini,
        unit="index",
        reason="a description of each strategy, not a claim; the two sentences below compare strategies",
        source="this project",
    ),
    Sentence(
        id="spread-entropy",
        text="How even the final ranks are (entropy over its largest value, 1 for equal ranks)",
        test="described",
        of=_WITH_MAPS,
        measure=measures.spread_entropy,
        unit="index",
        reason="a description of each strategy, not a claim; the two sentences below compare strategies",
        source="this project",
    ),
    Sentence(
        id="top-k-concentrates",
        text="top_k concentrates rank on fewer sites than proportional does",
        test="superiority",
        of=Group(_ADAPTIVE, {_STRATEGY: "top_k"}),
        measure=_against_proportional,
        unit="index",
        family="strategies-concentrate",
        refuted_by="proportional concentrates it more",
        source="texts about adaptive ranks",
    ),
    Sentence(
        id="threshold-concentrates",
        text="threshold concentrates rank on fewer sites than proportional does",
        test="superiority",
        of=Group(_ADAPTIVE, {_STRATEGY: "threshold"}),
        measure=_against_proportional,
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
        of=_ON_FLOAT_WEIGHTS,
        measure=measures.at_equal_parameters,
        unit="share",
        margin=0.01,
        refuted_by="they are less accurate by more than one point",
        source='texts about PEFT ("adaptive is at least as good as fixed")',
    ),
    Sentence(
        id="adaptive-beats-fixed",
        text="Adaptive ranks are more accurate than fixed LoRA with as many trainable parameters",
        test="superiority",
        of=_ON_FLOAT_WEIGHTS,
        measure=measures.at_equal_parameters,
        unit="share",
        refuted_by="they are less accurate",
        source='texts about PEFT ("adaptive beats fixed")',
    ),
    Sentence(
        id="fixed-needs-fewer",
        text="Fixed LoRA needs fewer trainable parameters than adaptive ranks for the same accuracy",
        test="described",
        of=_ON_FLOAT_WEIGHTS,
        measure=measures.parameters_at_equal_accuracy,
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
        of=Group(_ADAPTIVE),
        measure=partial(measures.overhead_below, parts={"scoring"}),
        unit="share",
        family="overhead",
        refuted_by="it costs more",
        source='texts about adaptive ranks ("overhead under 10 %")',
    ),
    Sentence(
        id="reallocation-under-10-percent",
        text="Reallocating ranks costs under 10 % of the time of training steps",
        test="superiority",
        of=Group(_ADAPTIVE),
        measure=partial(measures.overhead_below, parts={"reallocation"}),
        unit="share",
        family="overhead",
        refuted_by="it costs more",
        source='texts about adaptive ranks ("overhead under 10 %")',
    ),
    Sentence(
        id="overhead-under-10-percent",
        text="Scoring and reallocating together cost under 10 % of the time of training steps",
        test="superiority",
        of=Group(_ADAPTIVE),
        measure=partial(measures.overhead_below, parts={"scoring", "reallocation"}),
        unit="share",
        family="overhead",
        refuted_by="they cost more",
        source='texts about adaptive ranks ("overhead under 10 %")',
    ),
    Sentence(
        id="eight-bits-lose-nothing",
        text="8-bit weights are as accurate as float weights, within one point",
        test="equivalence",
        of=_EIGHT_BITS,
        measure=measures.against_float,
        unit="share",
        margin=0.01,
        refuted_by="a difference of more than one point",
        source='texts about quantization ("8 bits lose nothing")',
    ),
    Sentence(
        id="four-bits-lose-one-to-two",
        text="4-bit weights lose one to two points of accuracy against float weights",
        test="equivalence",
        of=_FOUR_BITS,
        measure=measures.against_float,
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
        of=Group(_QUANTIZED),
        measure=measures.against_float,
        unit="share",
        refuted_by="they are less accurate, which is the usual expectation",
        source="texts about quantization as regularization",
    ),
    Sentence(
        id="schedule-steadies",
        text="A gradual schedule makes convergence steadier than quantizing from the start (late deviation of the "
        "loss)",
        test="superiority",
        of=Group(_QUANTIZED, {_SCHEDULE: ("linear", "cosine")}),
        measure=partial(
            difference,
            against=Group(where={_SCHEDULE: "constant"}),
            same_but=(_SCHEDULE, _WARM_UP, "qa_lora.quantization_end_step"),
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
        of=Group(_QUANTIZED, {_SCHEDULE: "cosine"}),
        measure=partial(
            difference,
            against=Group(where={_SCHEDULE: "linear"}),
            same_but=(_SCHEDULE,),
            value=roughness,
            lower_is_better=True,
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
        of=_EIGHT_BITS,
        measure=measures.layers_factor,
        unit="factor",
        margin=3.92,
        refuted_by="a smaller factor",
        source='texts about quantization ("8 bits are 4x smaller")',
    ),
    Sentence(
        id="eight-bits-model-quarter",
        text="A model with 8-bit layers takes a quarter of the bytes of a float32 one (at least 98 % of the factor 4)",
        test="counted",
        of=_EIGHT_BITS,
        measure=measures.model_factor,
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
        of=_FOUR_BITS,
        measure=measures.layers_factor,
        unit="factor",
        margin=7.84,
        refuted_by="a smaller factor",
        source='texts about quantization ("4 bits are 8x smaller")',
    ),
    Sentence(
        id="four-bits-model-eighth",
        text="A model with 4-bit layers takes an eighth of the bytes of a float32 one (at least 98 % of the factor 8)",
        test="counted",
        of=_FOUR_BITS,
        measure=measures.model_factor,
        unit="factor",
        margin=7.84,
        refuted_by="a smaller factor",
        source='texts about quantization ("4 bits are 8x smaller")',
    ),
    Sentence(
        id="groups-help",
        text="Quantizing in groups is more accurate than one scale a row",
        test="superiority",
        of=Group(_QUANTIZED, {_IN_GROUPS: True}),
        measure=partial(
            difference,
            against=Group(where={_IN_GROUPS: False}),
            same_but=(_IN_GROUPS, "qa_lora.group_size", "qa_lora.quantization_offset"),
        ),
        unit="share",
        refuted_by="it is less accurate",
        source='texts about quantization ("groups help")',
    ),
    Sentence(
        id="gradient-scaling-helps",
        text="Scaling the adapters' gradients makes quantized training more accurate",
        test="superiority",
        of=Group(_QUANTIZED),
        measure=partial(difference, against=Group(where=_SCALING), same_but=tuple(_SCALING)),
        unit="share",
        refuted_by="it makes it less accurate",
        source='texts about quantization-aware adapters ("gradient scaling is crucial")',
    ),
    Sentence(
        id="warm-up-helps",
        text="Warming up on float weights before quantization begins makes training more accurate",
        test="superiority",
        of=Group(_QUANTIZED, unless={_WARM_UP: 0}),
        measure=partial(difference, against=Group(where={_WARM_UP: 0}), same_but=(_WARM_UP,)),
        unit="share",
        refuted_by="it makes it less accurate",
        source='texts about quantization schedules ("warm-up helps")',
    ),
    Sentence(
        id="above-majority",
        text="Every run is more accurate than always naming the most frequent class",
        test="counted",
        of=Group(),
        measure=measures.above_majority,
        unit="share",
        margin=0.0,
        refuted_by="a run that is not",
        source="this project",
    ),
    Sentence(
        id="lora-beats-linear",
        text="Fixed LoRA is more accurate than a linear probe",
        test="superiority",
        of=Group(reference_lora=True),
        measure=partial(difference, against=Group(("linear",))),
        unit="share",
        family="lora-against-others",
        refuted_by="the linear probe is more accurate",
        source="texts about PEFT",
    ),
    Sentence(
        id="lora-beats-full",
        text="Fixed LoRA is more accurate than full fine-tuning",
        test="superiority",
        of=Group(reference_lora=True),
        measure=partial(difference, against=Group(("full",))),
        unit="share",
        family="lora-against-others",
        refuted_by="full fine-tuning is more accurate",
        source="texts about PEFT with few labels",
    ),
)
