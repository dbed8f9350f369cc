"""Pure functions on arrays: intervals, paired tests, equivalence, effect sizes, resampling, concentration, association.

docs/statistics.md says which test is primary, what each interval describes, and how often the intervals hold.
"""

from peft_vit.statistics.aggregates import (
    interquartile_mean,
    interquartile_mean_interval,
    paired_improvement,
    probability_of_improvement,
)
from peft_vit.statistics.association import Association, spearman
from peft_vit.statistics.bootstrap import bca_interval, resampling_indices, stratified_indices
from peft_vit.statistics.checked import shifted
from peft_vit.statistics.concentration import gini, normalized_entropy
from peft_vit.statistics.effect_size import EffectSize, effect_size, hedges_factor
from peft_vit.statistics.equivalence import beyond_margin, equivalence, equivalence_verdict, inferiority, noninferiority
from peft_vit.statistics.intervals import Interval, mean_interval, paired_difference, proportion_interval
from peft_vit.statistics.mixed import MixedEffect, mixed_effect
from peft_vit.statistics.permutation import random_signs, sign_flip
from peft_vit.statistics.significance import (
    Significance,
    Verdict,
    holm,
    minimum_n_wilcoxon,
    verdict,
    wilcoxon,
    wilcoxon_against_each,
)
from peft_vit.statistics.student import paired_t

__all__ = [
    "Association",
    "EffectSize",
    "Interval",
    "MixedEffect",
    "Significance",
    "Verdict",
    "bca_interval",
    "beyond_margin",
    "effect_size",
    "equivalence",
    "equivalence_verdict",
    "gini",
    "hedges_factor",
    "holm",
    "inferiority",
    "interquartile_mean",
    "interquartile_mean_interval",
    "mean_interval",
    "minimum_n_wilcoxon",
    "mixed_effect",
    "noninferiority",
    "normalized_entropy",
    "paired_difference",
    "paired_improvement",
    "paired_t",
    "probability_of_improvement",
    "proportion_interval",
    "random_signs",
    "resampling_indices",
    "shifted",
    "sign_flip",
    "spearman",
    "stratified_indices",
    "verdict",
    "wilcoxon",
    "wilcoxon_against_each",
]
