"""From records to findings, as plain values; nothing here draws, formats or imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from peft_vit.analysis.allocation import Allocation, RunAllocation, allocations
from peft_vit.analysis.comparison import Comparison, MethodResult, compare_all, method_results, references
from peft_vit.analysis.fisher import FisherAgreement, fisher_agreements
from peft_vit.analysis.importance import ImportancePattern, importance_patterns
from peft_vit.analysis.insights import Insight, insights
from peft_vit.analysis.quantization import QuantizationImpact, quantization_impacts
from peft_vit.analysis.results import Results, load_results, load_studies
from peft_vit.analysis.studies import Run, Study, group_by_study

__all__ = [
    "Allocation",
    "Analysis",
    "Comparison",
    "FisherAgreement",
    "ImportancePattern",
    "Insight",
    "MethodResult",
    "QuantizationImpact",
    "Results",
    "Run",
    "RunAllocation",
    "Study",
    "analyze",
    "compare_all",
    "group_by_study",
    "load_results",
    "load_studies",
    "method_results",
]


@dataclass(frozen=True)
class Analysis:
    """Everything that was computed for one study."""

    study: Study
    methods: tuple[MethodResult, ...]
    comparisons: tuple[Comparison, ...]
    importance: tuple[ImportancePattern, ...]
    fisher: tuple[FisherAgreement, ...]
    allocation: tuple[Allocation, ...]
    quantization: tuple[QuantizationImpact, ...]
    insights: tuple[Insight, ...]


def analyze(study: Study) -> Analysis:
    """Compute all tables and claims of one study."""
    methods = method_results(study)
    patterns = importance_patterns(study)
    allocated = allocations(study)
    quantized = quantization_impacts(study)
    return Analysis(
        study=study,
        methods=methods,
        comparisons=tuple(c for reference in references(study) for c in compare_all(study, reference)),
        importance=patterns,
        fisher=fisher_agreements(study),
        allocation=allocated,
        quantization=quantized,
        insights=insights(study, methods, patterns, allocated, quantized),
    )
