"""Pure functions on arrays: intervals, paired tests, concentration, association."""

from peft_vit.statistics.association import Association, spearman
from peft_vit.statistics.concentration import gini, normalized_entropy
from peft_vit.statistics.intervals import Interval, mean_interval, paired_difference, proportion_interval
from peft_vit.statistics.significance import (
    Significance,
    Verdict,
    holm,
    minimum_n_wilcoxon,
    noninferiority,
    paired_t,
    verdict,
    wilcoxon,
)

__all__ = [
    "Association",
    "Interval",
    "Significance",
    "Verdict",
    "gini",
    "holm",
    "mean_interval",
    "minimum_n_wilcoxon",
    "noninferiority",
    "normalized_entropy",
    "paired_difference",
    "paired_t",
    "proportion_interval",
    "spearman",
    "verdict",
    "wilcoxon",
]
