"""Tables of a report computed again from record.json files, with NumPy and SciPy and nothing of the package.

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
    "calibration": methods.calibration,
    "calibration_against_.*": methods.calibration_against,
    "convergence": methods.convergence,
    "cost": methods.cost,
    "not_done": methods.not_done,
    "pareto_fronts": methods.pareto_fronts,
    "quality": methods.of_metrics("balanced_accuracy", "auroc"),
    "quantization": layers.quantization,
    "quantization_against_float": layers.quantization_against_float,
    "quantization_cost": layers.quantization_cost,
    "rank_by_matrix": layers.rank_by_matrix,
}

# A table, or "table: column", and where its numbers are tested instead.
NOT_COVERED = {
    "findings": "every measure by hand in tests/unit/analysis",
    "verdicts": "counts of findings, see there",
    "without_data": "no numbers",
    "agreement": "recomputed in tests/unit/report/test_report_examples.py",
    "examples": "recomputed in tests/unit/report/test_report_examples.py",
    "allocation_against_controls": "planted controls in tests/unit/analysis",
    "importance_across_seeds": "Kendall's W against SciPy in tests/unit/analysis",
    "importance_across_studies": "two studies in tests/unit/analysis",
    "bits_by_layer": "planted truth in tests/unit/analysis/test_layers.py",
    "importance_by_block": "planted truth in tests/unit/analysis/test_layers.py",
    "importance_by_matrix": "planted truth in tests/unit/analysis/test_layers.py",
    "importance_course": "planted truth in tests/unit/analysis/test_stability.py",
    "importance_over_time": "planted truth in tests/unit/analysis/test_layers.py",
    "quantization_balance": "planted truth in tests/unit/analysis/test_layers.py",
    "size": "planted truth in tests/unit/analysis/test_layers.py",
    "size_parts": "planted truth in tests/unit/analysis/test_layers.py",
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
