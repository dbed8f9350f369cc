"""From records to findings, as plain values; nothing here draws, formats or imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from peft_vit.base.errors import UserError
from peft_vit.base.statistics.estimates import Estimate
from peft_vit.lab.analysis.comparison import (
    AllPairs,
    Front,
    MethodResult,
    Pair,
    all_pairs,
    compare_all,
    compare_with_references,
    fronts,
    method_results,
)
from peft_vit.lab.analysis.evidence import Evidence
from peft_vit.lab.analysis.findings import Finding, find
from peft_vit.lab.analysis.layers import Allocation, ImportancePattern, importance_patterns, study_agreements
from peft_vit.lab.analysis.quantization import QuantizationImpact
from peft_vit.lab.analysis.reliability import Calibration, calibration
from peft_vit.lab.analysis.studies import Results, Run, Study, load_studies, read_results


@dataclass(frozen=True)
class Analysis:
    """Everything that was computed for one study."""

    study: Study
    methods: tuple[MethodResult, ...]
    comparisons: tuple[Estimate, ...]
    pairs: AllPairs
    fronts: tuple[Front, ...]
    calibration: tuple[Calibration, ...]
    importance: tuple[ImportancePattern, ...]
    allocation: tuple[Allocation, ...]
    quantization: tuple[QuantizationImpact, ...]
    findings: tuple[Finding, ...]


def analyze(study: Study) -> Analysis:
    """Compute all tables and findings of one study; findings and some tables are of one class an image alone."""
    methods = method_results(study)
    patterns = importance_patterns(study)
    if not study.scores.metric.counts_images:
        compared = compare_with_references(study)
        return Analysis(study, methods, compared, AllPairs((), (), 0), (), (), patterns, (), (), ())
    evidence = Evidence(study)
    return Analysis(
        study=study,
        methods=methods,
        comparisons=compare_with_references(study),
        pairs=all_pairs(study),
        fronts=fronts(study, methods),
        calibration=calibration(study),
        importance=patterns,
        allocation=tuple(evidence.allocation.values()),
        quantization=tuple(evidence.quantization.values()),
        findings=find(evidence),
    )
