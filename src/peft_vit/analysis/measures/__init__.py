"""Measures by the names under which the hypothesis registry uses them."""

from __future__ import annotations

from peft_vit.analysis.measures import accuracy, costs, ranks, scores, several_studies
from peft_vit.analysis.measures.evidence import (
    Evidence,
    Measure,
    Measured,
    NoDataError,
    OfParameters,
    Subjects,
    Unit,
    each_run,
)

_NO_SCORES = "without positive scores of attention and of MLP sites"
_NO_ORDER = "whose scores or losses are all equal, not finite, or of too few sites"
_NO_PARTS = "whose records do not tell scoring from reallocation (older version)"

MEASURES: dict[str, Measure] = {
    "above_majority": Measure(
        OfParameters, "share", each_run(accuracy.above_majority, "without a recorded majority class")
    ),
    "accuracy_against_float": Measure(OfParameters, "share", accuracy.against_float),
    "accuracy_at_equal_parameters": Measure(OfParameters, "share", accuracy.at_equal_parameters),
    "attention_over_mlp": Measure(OfParameters, "log2 ratio", each_run(scores.attention_over_mlp, _NO_SCORES)),
    "difference": Measure(accuracy.DifferenceParameters, accuracy.unit_of_difference, accuracy.difference),
    "gain_where_importance_varies": Measure(
        OfParameters, "share", of_studies=several_studies.gain_where_importance_varies
    ),
    "importance_against_harm": Measure(OfParameters, "rho", each_run(scores.against_harm, _NO_ORDER)),
    "importance_between_data_sets": Measure(
        OfParameters, "rho", of_studies=several_studies.importance_between_data_sets
    ),
    "importance_between_seeds": Measure(OfParameters, "rho", scores.between_seeds),
    "memory_factor": Measure(
        costs.MemoryParameters, "factor", each_run(costs.memory_factor, "whose records lack the model's size")
    ),
    "overhead_below": Measure(costs.OverheadParameters, "share", each_run(costs.overhead_below, _NO_PARTS)),
    "parameters_at_equal_accuracy": Measure(OfParameters, "log2 ratio", accuracy.parameters_at_equal_accuracy),
    "rank_lead": Measure(ranks.RankLeadParameters, "ranks", ranks.rank_lead),
    "rank_spread": Measure(
        ranks.RankSpreadParameters, "index", each_run(ranks.rank_spread, "without ranks on two sites")
    ),
    "removal_cost": Measure(
        scores.RemovalParameters, "share", each_run(scores.removal_cost, "without a site in that group")
    ),
}
