"""Pure functions on arrays: intervals, paired tests, equivalence, association.

docs/explanation/statistics.md says which test is primary, what each interval describes, and how often the intervals
hold. They say `scipy.stats.…` in full, since scipy loads a part, 12 to 60 MB of them, when it is first asked for.
"""

from peft_vit.base.statistics.conformal import (
    ErrorScale,
    TemperaturePrior,
    class_scores,
    conformal_quantile,
    error_scale,
    fit_temperature,
    prediction_sets,
    probabilities,
    recall_threshold,
    row_weights,
)
from peft_vit.base.statistics.descriptive import spearman
from peft_vit.base.statistics.intervals import (
    Interval,
    bootstrap_interval,
    difference_interval,
    mean_interval,
    mean_of_proportions,
    paired_proportions,
    proportion_interval,
    rule_of_three,
    shifted,
)
from peft_vit.base.statistics.neighbours import Neighbours
from peft_vit.base.statistics.significance import (
    Significance,
    Verdict,
    beyond_margin,
    equivalence,
    equivalence_verdict,
    holm,
    inferiority,
    minimum_n_wilcoxon,
    noninferiority,
    stratified_mean,
    verdict,
    wilcoxon,
)
