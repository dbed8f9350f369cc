"""Every table of a report computed again from record.json files, with NumPy and SciPy and nothing of the package.

`RECOMPUTED` maps a table's slug, as a pattern, to a function from the records to the expected cells: a list of rows,
each a dict by column. To cover a new table, write one and add it. What is not recomputed here stands in `NOT_COVERED`,
with where it is tested instead; a numeric column that is in neither fails the test.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import recomputed_layers as layers
import recomputed_methods as methods
from recomputed_methods import Ledger, Row

KEYS = ("cost", "experiment", "reference", "measure", "matrix", "site", "layer", "seed", "step")
RECOMPUTED: dict[str, Callable[[Ledger, str], list[Row]]] = {
    "accuracy": methods.accuracy,
    "against_.*": methods.against,
    "all_pairs": methods.all_pairs,
    "allocation": layers.allocation,
    "allocation_against_fixed": layers.allocation_against_fixed,
    "allocation_course": layers.allocation_course,
    "bits_by_layer": layers.bits_by_layer,
    "calibration": methods.calibration,
    "calibration_against_.*": methods.calibration_against,
    "convergence": methods.convergence,
    "cost": methods.cost,
    "importance_across_seeds": layers.importance_across_seeds,
    "importance_by_block": layers.importance_by_block,
    "importance_by_matrix": layers.importance_by_matrix,
    "importance_course": layers.importance_course,
    "importance_over_time": layers.importance_over_time,
    "not_done": methods.not_done,
    "pareto_fronts": methods.pareto_fronts,
    "quality": methods.of_metrics("balanced_accuracy", "auroc"),
    "quantization": layers.quantization,
    "quantization_against_float": layers.quantization_against_float,
    "quantization_balance": layers.quantization_balance,
    "quantization_cost": layers.quantization_cost,
    "rank_by_matrix": layers.rank_by_matrix,
    "size": layers.size,
    "size_parts": layers.size_parts,
}

# A table, or "table: column", and where its numbers are tested instead.
NOT_COVERED = {
    "findings": "every measure by hand in tests/unit/analysis",
    "verdicts": "counts of findings, see there",
    "without_data": "no numbers",
    "agreement": "recomputed in tests/unit/report/test_report_examples.py",
    "examples": "recomputed in tests/unit/report/test_report_examples.py",
    "allocation_against_controls": "planted controls in tests/unit/analysis",
    "importance_across_studies": "two studies in tests/unit/analysis",
    **{
        f"all_pairs: {c}_{end}": "against SciPy and pingouin in tests/oracle"
        for c in ("cohens_d", "improvement")
        for end in ("low", "high")
    },
}


def recomputation_of(slug: str) -> Callable[[Ledger, str], list[Row]] | None:
    """Return the function for a table; the longest pattern that fits it."""
    fitting = [pattern for pattern in RECOMPUTED if re.fullmatch(pattern, slug)]
    return RECOMPUTED[max(fitting, key=len)] if fitting else None
