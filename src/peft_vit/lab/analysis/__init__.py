"""From records to findings, as plain values; nothing here draws, formats or imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from peft_vit.base.statistics.estimates import Estimate
from peft_vit.lab.analysis.comparison import MethodResult, compare_with_references, method_results
from peft_vit.lab.analysis.findings import Finding, find
from peft_vit.lab.analysis.layers import Allocation, ImportancePattern, allocations, importance_patterns
from peft_vit.lab.analysis.quantization import QuantizationImpact, quantization_impacts
from peft_vit.lab.analysis.studies import Results, Run, Study, load_studies, read_results


@dataclass(frozen=True)
class Analysis:
    """Everything that was computed for one study."""

    study: Study
    methods: tuple[MethodResult, ...]
    comparisons: tuple[Estimate, ...]
    importance: tuple[ImportancePattern, ...]
    allocation: tuple[Allocation, ...]
    quantization: tuple[QuantizationImpact, ...]
    findings: tuple[Finding, ...]


def analyze(study: Study) -> Analysis:
    """Compute all tables and findings of one study; findings and some tables are of one class an image alone."""
    methods, comparisons, importance = method_results(study), compare_with_references(study), importance_patterns(study)
    if not study.scores.metric.counts_images:
        return Analysis(study, methods, comparisons, importance, (), (), ())
    allocation, quantization = allocations(study), quantization_impacts(study)
    findings = find(study, importance, allocation, quantization)
    return Analysis(study, methods, comparisons, importance, allocation, quantization, findings)
