"""Sentences that were computed: each is a claim written before the data, its estimate, and a verdict.

A verdict is "supported" or "refuted" only if the primary test (see `analysis.comparison`) decides after
correction over its family of claims. Otherwise it is "not decided", with the reason. Nothing is worded after
the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from peft_vit.analysis.allocation import Allocation
from peft_vit.analysis.comparison import (
    Comparison,
    MethodResult,
    compare,
    compare_values,
    correct,
    references,
)
from peft_vit.analysis.importance import ImportancePattern
from peft_vit.analysis.quantization import QuantizationImpact
from peft_vit.analysis.studies import Study
from peft_vit.statistics import Interval, Verdict

Unit = Literal["share", "log2 ratio", "ranks", "rho"]


@dataclass(frozen=True)
class Insight:
    """One claim about this data.

    Attributes:
        claim: the sentence, worded so that a positive estimate speaks for it.
        measure: what the estimate is.
        unit: of the estimate and the interval.
        estimate: None if nothing could be computed.
        interval: 95 % t interval over seeds, None if there is none.
        n: what was counted, e.g. pairs of runs.
        n_of: what n counts.
        test: name of the test, or "none".
        outcome: what it said, or why it says nothing.
        verdict: supported, refuted or not decided.
        note: what restricts it.
    """

    claim: str
    measure: str
    unit: Unit
    estimate: float | None
    interval: Interval | None
    n: int
    n_of: str
    test: str
    outcome: str
    verdict: Verdict
    note: str = ""


def insights(
    study: Study,
    methods: Sequence[MethodResult],
    patterns: Sequence[ImportancePattern],
    allocated: Sequence[Allocation],
    quantized: Sequence[QuantizationImpact],
) -> tuple[Insight, ...]:
    """Return every claim that this study's records let us compute."""
    return (
        *_above_majority(methods),
        *_references_and_full(study),
        *_adaptive_ranks(allocated),
        *_fewer_bits(quantized),
        *_attention_over_mlp(patterns),
        *_query_lead(allocated),
        *_stable_importance(patterns),
    )


def outcome(comparison: Comparison) -> str:
    """Return what the primary test says after correction, or why it says nothing."""
    significance = comparison.significance
    if significance is None:
        return "no pairs"
    if not significance.decidable or comparison.adjusted_p is None:
        return significance.sentence()
    return f"p = {comparison.adjusted_p:.3g} (Holm)"


def _insight(comparison: Comparison, claim: str, measure: str, unit: Unit) -> Insight:
    interval = comparison.difference
    return Insight(
        claim=claim,
        measure=measure,
        unit=unit,
        estimate=None if interval is None else interval.estimate,
        interval=interval,
        n=0 if interval is None else interval.n,
        n_of="pairs" if unit == "share" else "seeds",
        test="none" if comparison.significance is None else comparison.significance.test,
        outcome=outcome(comparison),
        verdict=comparison.verdict,
        note=comparison.note,
    )


def _above_majority(methods: Sequence[MethodResult]) -> tuple[Insight, ...]:
    """Return a count: it is about these runs, so no test generalises it."""
    if not methods:
        return ()
    above = sum(method.runs_above_majority for method in methods)
    total = sum(len(method.seeds) for method in methods)
    lowest = min(method.above_majority.estimate for method in methods)
    return (
        Insight(
            claim=f"Every finished run ({total}) is more accurate than always naming the most frequent class",
            measure=f"{above} of {total} runs are; smallest mean margin of an experiment",
            unit="share",
            estimate=lowest,
            interval=None,
            n=total,
            n_of="runs",
            test="none",
            outcome="counted over these runs, not generalised to others",
            verdict="supported" if above == total else "refuted",
        ),
    )


def _references_and_full(study: Study) -> tuple[Insight, ...]:
    """Return LoRA against the linear probe and against full fine-tuning, as one family."""
    lora = [name for name in references(study) if any(e.name == name for e in study.fixed_rank_loras())]
    others = study.with_method("linear", "full")
    if not lora:
        return ()
    family = correct([compare(study.of(lora[0]), study.of(e.name), lora[0], e.name) for e in others])
    return tuple(
        _insight(c, f"{c.name} is more accurate than {c.reference}", "difference in test accuracy", "share")
        for c in family
    )


def _adaptive_ranks(allocated: Sequence[Allocation]) -> tuple[Insight, ...]:
    return tuple(
        _insight(
            a.against_fixed,
            f"{a.experiment.name} is more accurate than fixed-rank LoRA with as many trainable parameters",
            "difference in test accuracy to the line through the fixed LoRA runs",
            "share",
        )
        for a in allocated
    )


def _fewer_bits(quantized: Sequence[QuantizationImpact]) -> tuple[Insight, ...]:
    return tuple(
        _insight(
            q.against_unquantized,
            f"{q.experiment.name} is more accurate than {q.against_unquantized.reference}",
            "difference in test accuracy to the same LoRA on float weights",
            "share",
        )
        for q in quantized
    )


def _attention_over_mlp(patterns: Sequence[ImportancePattern]) -> tuple[Insight, ...]:
    return _above_zero(
        [(p.experiment.name, p.attention_over_mlp, p.seeds) for p in patterns],
        "attention sites score higher than MLP sites",
        "log2 of the ratio of mean final scores (1 means twice as high)",
        "log2 ratio",
    )


def _query_lead(allocated: Sequence[Allocation]) -> tuple[Insight, ...]:
    return _above_zero(
        [(a.experiment.name, a.query_lead, [run.seed for run in a.runs]) for a in allocated],
        "query sites get more rank than the other sites",
        "mean final rank of query sites minus that of all others",
        "ranks",
    )


def _above_zero(
    measured: Sequence[tuple[str, Sequence[float], Sequence[int]]], claim: str, measure: str, unit: Unit
) -> tuple[Insight, ...]:
    """Return one claim for each experiment (name, values, their seeds) that has values, as one family of tests."""
    family = correct(
        [
            compare_values({s: (v, 0.0) for s, v in zip(seeds, values, strict=True)}, name=name, reference="zero")
            for name, values, seeds in measured
            if values
        ]
    )
    return tuple(_insight(c, f"{c.name}: {claim}", measure, unit) for c in family)


def _stable_importance(patterns: Sequence[ImportancePattern]) -> tuple[Insight, ...]:
    return tuple(
        Insight(
            claim=f"{p.experiment.name}: seeds agree on which sites matter",
            measure="mean Spearman's rho of the final scores over pairs of seeds",
            unit="rho",
            estimate=p.agreement_between_seeds,
            interval=None,
            n=p.pairs_of_seeds,
            n_of="pairs",
            test="none",
            outcome="described only: neither the sites of a network nor pairs of seeds are independent",
            verdict="not decided",
        )
        for p in patterns
        if p.agreement_between_seeds is not None
    )
