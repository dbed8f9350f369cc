"""The smallest configuration that is shown to lose no more than a margin against the best, or that nothing is shown.

The best is the experiment with the highest mean validation accuracy, whatever it costs. Candidates are the experiments
within the limits, and smaller than it where it keeps them itself; sizes are not test results, so ordering by them
chooses nothing on test. Sizes within one percent are equal: nobody gives up accuracy for a hundred values. Each
candidate's test accuracy is compared with the best's, paired by seed, by the one-sided non-inferiority t test
(Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15 (1987)). The margin is the caller's and has to be
stated before looking.

**Error rate.** The recommendation is the smallest candidate whose null hypothesis "it loses the margin or more" falls.
Going up from the smallest and stopping at the first success would test each candidate that may come at full level:
with m inferior ones it recommends one of them up to m times too often. It is not a fixed-sequence procedure, which
would have to stop at the first *failure* (Maurer, Hothorn & Lehmacher, in Vollmar (ed.), Biometrie in der chemisch-
pharmazeutischen Industrie 6 (1995)), and from the large end down that costs power wherever accuracy does not fall with
size. Holm's correction over all candidates (Scandinavian Journal of Statistics 6 (1979)) holds the probability to
reject any true null at 5 %, however the tests depend on each other, and so also that of recommending a configuration
that loses the margin or more, whichever of those that fell is taken: of equal sizes the best by validation.

**What selection biases.** Validation images are not test images, but both are read of the same trained models: an
experiment whose seeds turned out well is likelier to be the best on validation, and then its test accuracy is a
little too high. That makes differences to it too low: candidates fail more often, not less. The claim is about the
experiment that validation chose; if another one is better in truth, nothing is claimed about the loss against that.
Where each seed draws its own test split, an image that one seed is tested on may be in another's validation split, so
the choice has seen some test images through other seeds' models; the claim is about splits of this data set.
The recommended experiment's own estimate is too favourable, since it was needed to pass; the intervals are
simultaneous (Bonferroni), so that theirs cover all candidates at once and any choice among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import scipy
from numpy.typing import ArrayLike

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import Verdict, mean_interval
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.base.statistics.estimates import ALPHA, Question
from peft_vit.base.statistics.intervals import mean_and_error
from peft_vit.core.records import BenchRow
from peft_vit.lab.analysis.comparison import (
    SAME_SIZE,
    Cost,
    MethodResult,
    compare_all,
    method_results,
    validation_means,
)
from peft_vit.lab.analysis.studies import Study

MEASURES: dict[str, Cost] = {  # as options name them
    "bytes": "stored_bytes",
    "params": "parameters",
    "step_time": "seconds_per_step",
    "latency": "latency_s",
}
# Bytes and parameters are counted, so the largest run has to keep a limit, whatever ranks a seed has led to. Times are
# measured, so the mean over seeds has to.
_TIMES: tuple[Cost, ...] = ("seconds_per_step", "latency_s")


@dataclass(frozen=True)
class Recommendation:
    """What one study recommends."""

    study: Study
    # what may be recommended, smallest first; compared are the candidates: does test accuracy, minus that of the best,
    # lose less than the margin? The intervals hold for all of them at once
    rows: tuple[MethodResult, ...]
    best: MethodResult  # by validation
    best_validation: float  # mean over its seeds, a share
    within_limits: tuple[str, ...]  # experiments, smallest first
    # the candidate that was shown not to lose the margin; without any candidate the best itself, if it keeps the limits
    chosen: MethodResult | None
    left_out: dict[str, str]  # experiment -> why nothing can be said of it
    limits: Mapping[Cost, float]  # what a configuration may cost
    measure: Cost  # what "smallest" means
    margin: float  # largest loss that does not matter, a share


def recommend(
    study: Study,
    limits: Mapping[Cost, float],
    *,
    margin: float,
    measure: Cost = "stored_bytes",
    exported: Mapping[str, float] | None = None,
) -> Recommendation:
    """Return the smallest experiment within the limits that is shown not to lose the margin against the best.

    Args:
        study: one study's runs.
        limits: what the configuration may cost.
        margin: largest loss on the test images that does not matter, a share above 0; see `Scores`.
        measure: what "smallest" means; of sizes within one percent the higher validation accuracy decides.
        exported: latency of exported models by experiment, to be taken instead of what the records say.

    Raises:
        UserError: if no run is finished, if one has no validation images, which choose the best, if times are asked for
            that are not comparable or not recorded, or if no experiment has one configuration.
    """
    if not study.runs:
        raise UserError("has no finished run, so there is nothing to recommend", file=study.label)
    rows = {row.name: row for row in method_results(study)}
    validation = validation_means(rows.values())
    if len(validation) < len(rows):
        problem = "has runs without validation images, which choose what the others are compared with"
        raise UserError(f"{problem}; run it with data.validation_images", file=study.label)
    _require_times(study, {*limits, measure}, exported is not None)
    if exported is not None:
        for name, row in rows.items():
            rows[name] = replace(row, costs=tuple({**costs, "latency_s": exported.get(name)} for costs in row.costs))
    sizes, left_out = dict[str, float](), dict[str, str]()
    for name in (experiment.name for experiment in study.experiments):
        if name not in rows:
            left_out[name] = "has no finished run"
        elif len({run.configuration() for run in study.runs_of(name)}) > 1:
            left_out[name] = "was configured differently from seed to seed"
        elif (size := rows[name].cost(measure)) is None:
            left_out[name] = "has a run without latency"
        else:
            sizes[name] = size
    if not sizes:
        problem = "; ".join(f"{name} {reason}" for name, reason in left_out.items())
        raise UserError(f"leaves no experiment to recommend: {problem}", file=study.label)

    def exceeds(name: str, other: str) -> bool:
        return sizes[name] > (1 + SAME_SIZE) * sizes[other]

    names = sorted(sizes, key=lambda name: (sizes[name], rows[name].cost("parameters"), name))
    best = max(names, key=lambda name: validation[name])  # of equal ones the smallest, which comes first
    within = tuple(name for name in names if all(_keeps(rows[name], cost, limit) for cost, limit in limits.items()))
    candidates = [name for name in within if best not in within or exceeds(best, name)]
    family = compare_all(study, best, candidates, Question("noninferiority", margin))
    shown = [estimate.name for estimate in family if estimate.verdict == Verdict.SUPPORTED]
    if not candidates and best in within:
        shown = [best]
    smallest = [name for name in shown if not exceeds(name, shown[0])]
    chosen = max(smallest, key=lambda name: validation[name], default=None)
    ordered = {name: rows[name] for name in names}
    for estimate in family:  # intervals hold for all candidates (Bonferroni), one-sided as the test
        values = list(estimate.by_seed.values())
        interval = mean_interval(values, 1 - 2 * ALPHA / len(family)) if values else None
        ordered[estimate.name] = replace(rows[estimate.name], estimate=replace(estimate, interval=interval))
    return Recommendation(
        study=study,
        rows=tuple(ordered.values()),
        best=ordered[best],
        best_validation=validation[best],
        within_limits=within,
        chosen=None if chosen is None else ordered[chosen],
        left_out=left_out,
        limits=limits,
        measure=measure,
        margin=margin,
    )


def _keeps(row: MethodResult, cost: Cost, limit: float) -> bool:
    value = row.cost(cost, fmean if cost in _TIMES else max)
    return value is not None and value <= limit


def _require_times(study: Study, costs: set[Cost], exported: bool) -> None:
    times = costs.intersection(_TIMES)
    if exported and "latency_s" not in times:
        raise UserError("has no effect without --max-latency or --smallest latency", field="--bench")
    if exported:  # timed on one machine
        times.remove("latency_s")
    if times and len({run.hardware for run in study.runs}) > 1:
        raise UserError("its runs were timed on several machines, so times do not compare", file=study.label)
    if "latency_s" in times and not any(run.record.latency_s for run in study.runs):
        raise UserError("its records hold no latency; ask without it, or measure it", file=study.label)


def exported_latency(study: Study, rows: Sequence[BenchRow], file: Path) -> dict[str, float]:
    """Take from a file of times what its models' cards say is of this study's finished runs, at the smallest batch.

    Of several models of one run, in other formats or with other numbers of threads, the fastest counts: it is what one
    would take.

    Args:
        study: whose runs they are.
        rows: what the file holds.
        file: for messages.

    Returns:
        Seconds by experiment, the mean over those of its runs that were timed.

    Raises:
        UserError: if it names no finished run of the study, its models share no batch size, or they were timed on
            several processors.
    """
    experiments = {run.record.spec.run_id: run.experiment.name for run in study.runs}
    timed = grouped((row.run, row) for row in rows if row.run is not None and row.run in experiments)
    batches = [{row.batch for row in of_run} for of_run in timed.values()]
    common = set[int]().union(*batches).intersection(*batches)
    if not common or len({row.processor for of_run in timed.values() for row in of_run}) > 1:
        problem = f"holds no times of finished runs of {study.label}, at one batch size on one processor"
        raise UserError(problem, file=file, field="--bench")
    fastest = grouped(
        (experiments[run], min(row.median_s for row in of_run if row.batch == min(common)))
        for run, of_run in timed.items()
    )
    return {name: fmean(seconds) for name, seconds in fastest.items()}


def needed_pairs(differences: ArrayLike, margin: float, level: float) -> int | None:
    """Return the smallest n at which the one-sided test succeeds with 80 % power, if mean and spread stay as they are.

    The power of the one-sided t test, by the noncentral t distribution: ``P(T > t_{n-1, 1-level})`` with noncentrality
    ``(mean + margin) sqrt(n) / s``. It is as uncertain as the mean and s of a few seeds are. Source: Johnson & Welch,
    Biometrika 31 (1940); Julious, Statistics in Medicine 23 (2004), 6.

    Returns:
        n; None where no n would do (the mean lies at the margin or below), none up to 1000 does, or nothing is known
        of the spread.
    """
    data = np.asarray(differences, dtype=np.float64)
    if data.size < 2 or np.ptp(data) == 0:
        return None
    mean, error = mean_and_error(data)
    n = np.arange(2, 1000 + 1)
    noncentrality = (mean + margin) / error * np.sqrt(n / data.size)
    reached = scipy.stats.nct.sf(scipy.stats.t.isf(level, n - 1), n - 1, noncentrality) >= 0.8
    return int(n[np.argmax(reached)]) if reached.any() else None
