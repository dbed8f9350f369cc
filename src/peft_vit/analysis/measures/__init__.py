"""Measures by the names under which the hypothesis registry uses them."""

from __future__ import annotations

from peft_vit.analysis.measures.accuracy import ACCURACY_MEASURES
from peft_vit.analysis.measures.costs import COST_MEASURES
from peft_vit.analysis.measures.evidence import Evidence, Measure, Measured, NoDataError, Unit
from peft_vit.analysis.measures.importance import IMPORTANCE_MEASURES
from peft_vit.analysis.measures.ranks import RANK_MEASURES
from peft_vit.analysis.measures.several_studies import MEASURES_OF_SEVERAL_STUDIES

MEASURES: dict[str, Measure] = {
    **ACCURACY_MEASURES,
    **COST_MEASURES,
    **IMPORTANCE_MEASURES,
    **MEASURES_OF_SEVERAL_STUDIES,
    **RANK_MEASURES,
}
