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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal, get_args

import numpy as np
import scipy
from numpy.typing import ArrayLike

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import Verdict, mean_interval
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.base.statistics.estimates import ALPHA, Estimate, Question, decide
from peft_vit.base.statistics.intervals import mean_and_error
from peft_vit.core.records import BenchRow
from peft_vit.lab.analysis.comparison import SAME_SIZE, MethodResult, compare, method_results
from peft_vit.lab.analysis.studies import Run, Study

Measure = Literal["bytes", "params", "latency"]
Option = Literal["--max-bytes", "--max-params", "--max-step-time", "--max-latency"]
# What was asked, in bytes, parameters and seconds. Bytes and parameters are counted, so the largest run has to keep
# them, whatever ranks a seed has led to. Times are measured, so the mean over seeds has to.
Limits = Mapping[Option, float]
LIMITS: tuple[Option, ...] = get_args(Option)


def smallest_latency_batch(runs: Sequence[Run]) -> int | None:
    """Return the smallest batch size whose latency every run has recorded that has recorded any; None if none has."""
    recorded = [set(run.record.latency_s) for run in runs if run.record.latency_s]
    return min(set.intersection(*recorded), default=None) if recorded else None


@dataclass(frozen=True)
class ExportedLatency:
    """What a file of `peft-vit bench` says of a study, at the smallest batch size that it has for every model."""

    file: Path
    batch: int
    processor: str
    rows: dict[str, tuple[BenchRow, ...]]  # experiment -> the fastest model of each of its runs that was timed

    def of(self, runs: Sequence[Run]) -> float | None:
        """Return the mean over an experiment's runs, in seconds; None if none of them was timed."""
        rows = self.rows.get(runs[0].experiment.name, ())
        return fmean(row.median_s for row in rows) if rows else None


def exported_latency(study: Study, rows: Sequence[BenchRow], file: Path) -> ExportedLatency:
    """Take from a file of times what its models' cards say is of this study's finished runs.

    Of several models of one run, in other formats or with other numbers of threads, the fastest counts: it is what one
    would take.

    Args:
        study: whose runs they are.
        rows: what the file holds.
        file: for messages.

    Raises:
        UserError: if it names no finished run of the study, its models share no batch size, or they were timed on
            several processors.
    """
    finished = {run.record.spec.run_id: run.experiment.name for run in study.runs}
    of_run = grouped((row.run, row) for row in rows if row.run in finished)
    if not of_run:
        names = sorted({row.run for row in rows if row.run is not None})
        said = f"its models are of {', '.join(names[:3])}{', ...' if names[3:] else ''}" if names else "it names no run"
        raise UserError(f"holds no model of a finished run of {study.label}: {said}", file=file, field="--bench")
    if len(processors := sorted({row.processor for own in of_run.values() for row in own})) > 1:
        raise UserError(f"was timed on several processors ({', '.join(processors)})", file=file, field="--bench")
    batches = set.intersection(*({row.batch for row in own} for own in of_run.values()))
    if not batches:
        raise UserError("has no batch size at which every run was timed", file=file, field="--bench")
    batch = min(batches)
    fastest = grouped(
        (experiment, min((row for row in of_run[run] if row.batch == batch), key=lambda row: row.median_s))
        for run, experiment in finished.items()
        if run in of_run
    )
    return ExportedLatency(file, batch, processors[0], {name: tuple(own) for name, own in fastest.items()})


_TIMED: tuple[Option, ...] = ("--max-step-time", "--max-latency")

Outcome = Literal["smaller", "best", "not decided", "nothing within"]


@dataclass(frozen=True)
class Violation:
    """A limit beside what an experiment costs in its unit (bytes, parameters, seconds); None: not recorded."""

    option: Option
    limit: float
    value: float | None


@dataclass(frozen=True, kw_only=True)
class Rated(MethodResult):
    """An experiment, what its finished runs cost, and which limits it keeps.

    Times are None if a run lacks one; latency is that of the smallest common batch size, or of exported models.
    """

    beside: tuple[Violation, ...]  # every limit that was given

    @property
    def violations(self) -> tuple[Violation, ...]:
        """Return the limits that it does not keep, or of which nothing was recorded."""
        return tuple(limit for limit in self.beside if limit.value is None or limit.value > limit.limit)

    def size(self, measure: Measure) -> float | None:
        """Return what experiments are ordered by."""
        return {"bytes": self.stored_bytes, "params": self.final_parameters, "latency": self.latency_s}[measure]


@dataclass(frozen=True)
class Candidate:
    """A smaller experiment within the limits, compared with the best on test."""

    rated: Rated
    # test accuracy, candidate minus best: does it lose less than the margin? The interval holds for all candidates at
    # once
    estimate: Estimate
    # pairs at which it would be shown with 80 % power if mean and spread stayed; None: none is known
    needed_n: int | None = None

    @property
    def shown(self) -> bool:
        """Return whether it is shown to lose less than the margin."""
        return self.estimate.verdict == Verdict.SUPPORTED


@dataclass(frozen=True)
class Recommendation:
    """What one study recommends."""

    study: Study
    # smaller: a candidate was shown not to lose the margin; best: nothing within the limits is smaller than the best
    # itself by more than one percent; not decided: no candidate was shown; nothing within: none keeps the limits
    outcome: Outcome
    best: Rated  # by validation
    chosen: Rated | None  # what is recommended; None if nothing is
    candidates: tuple[Candidate, ...]  # what was tested, smallest first
    # candidates not larger than the smallest that was shown by more than one percent, shown, too, but with no higher
    # validation accuracy than the chosen one
    as_small: tuple[Rated, ...]
    outside: tuple[Rated, ...]  # experiments that do not keep the limits
    # experiments within the limits that are not smaller than the best, which keeps them too, by more than one percent
    larger: tuple[Rated, ...]
    left_out: dict[str, str]  # experiment -> why nothing can be said of it
    # limits, measure, margin: what was asked; the margin as a share
    limits: Limits
    measure: Measure
    margin: float
    exported: ExportedLatency | None = None  # where latency comes from; None: from the records

    @property
    def confidence(self) -> float:
        """Return the nominal coverage of a candidate's interval."""
        return 1 - 2 * _level(len(self.candidates))


def recommend(
    study: Study, limits: Limits, *, margin: float, measure: Measure = "bytes", exported: ExportedLatency | None = None
) -> Recommendation:
    """Return the smallest experiment within the limits that is shown not to lose the margin against the best.

    Args:
        study: one study's runs.
        limits: what the configuration may cost.
        margin: largest loss on the test images that does not matter, a share above 0; see `Scores`.
        measure: what "smallest" means; of sizes within one percent the higher validation accuracy decides.
        exported: latency of exported models, to be taken instead of what the records say.

    Raises:
        UserError: if no run is finished, if one has no validation images, which choose the best, if times are asked for
            that are not comparable or not recorded, or if no experiment has one configuration.
    """
    if not study.runs:
        raise UserError("has no finished run, so there is nothing to recommend", file=study.label)
    if any(run.validation is None for run in study.runs):
        problem = "has runs without validation images, which choose what the others are compared with"
        raise UserError(f"{problem}; run it with data.validation_images", file=study.label)
    _require_times(study, limits, measure, exported)
    results = {result.name: result for result in method_results(study)}
    left_out: dict[str, str] = {}
    rated: list[Rated] = []
    for name in (experiment.name for experiment in study.experiments):
        if name not in results:
            left_out[name] = "has no finished run"
        elif len({run.configuration() for run in results[name].runs}) > 1:
            left_out[name] = "was configured differently from seed to seed"
        elif (own := _rate(results[name], limits, smallest_latency_batch(study.runs), exported)).size(measure) is None:
            untimed = "recorded latency" if exported is None else "exported model that was timed"
            left_out[name] = f"has {'runs without a' if exported is None else 'no'} {untimed}"
        else:
            rated.append(own)
    if not rated:
        problem = "; ".join(f"{name} {reason}" for name, reason in left_out.items())
        raise UserError(f"leaves no experiment to recommend: {problem}", file=study.label)
    rated.sort(key=lambda own: (own.size(measure), own.final_parameters, own.name))
    best = min(rated, key=_validation_error)  # of equal ones the smallest, which comes first
    within = [own for own in rated if not own.violations]
    smaller = [own for own in within if best.violations or not _no_larger(best, own, measure)]
    candidates = _tested(study, smaller, best, margin)
    shown = [candidate.rated for candidate in candidates if candidate.shown]
    smallest = [own for own in shown if _no_larger(own, shown[0], measure)]
    smallest.sort(key=_validation_error)
    outcome: Outcome = "smaller"
    if not smallest:
        outcome = "nothing within" if not within else "not decided" if candidates else "best"
    return Recommendation(
        study=study,
        outcome=outcome,
        best=best,
        chosen=smallest[0] if smallest else best if outcome == "best" else None,
        candidates=candidates,
        as_small=tuple(smallest[1:]),
        outside=tuple(own for own in rated if own.violations),
        larger=tuple(own for own in within if own not in smaller and own is not best),
        left_out=left_out,
        limits=limits,
        measure=measure,
        margin=margin,
        exported=exported,
    )


def _no_larger(rated: Rated, than: Rated, measure: Measure) -> bool:
    return (rated.size(measure) or 0.0) <= (1 + SAME_SIZE) * (than.size(measure) or 0.0)


def _validation_error(rated: Rated) -> float:
    assert rated.validation_accuracy is not None
    return -rated.validation_accuracy.estimate


def _rate(result: MethodResult, limits: Limits, latency_batch: int | None, exported: ExportedLatency | None) -> Rated:
    runs = result.runs
    seconds = _mean_time([run.record.seconds_per_step for run in runs])
    latency = _mean_time([run.record.latency_s.get(latency_batch or 0) for run in runs])
    if exported is not None:
        latency = exported.of(runs)
    bound: dict[Option, float | None] = {
        "--max-bytes": max(run.bytes.frozen_bytes + run.bytes.adapter_file_bytes for run in runs),
        "--max-params": max(run.parameters.final for run in runs),
        "--max-step-time": seconds,
        "--max-latency": latency,
    }
    beside = tuple(Violation(option, limit, bound[option]) for option, limit in limits.items())
    return Rated(**vars(result) | {"seconds_per_step": seconds, "latency_s": latency}, beside=beside)


def _mean_time(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value]
    return fmean(known) if len(known) == len(values) else None


def _require_times(study: Study, limits: Limits, measure: Measure, exported: ExportedLatency | None) -> None:
    of_times: list[str] = [option for option in _TIMED if option in limits]
    of_times += ["--smallest latency"] if measure == "latency" else []
    of_latency = [option for option in of_times if option != "--max-step-time"]
    if exported is not None:  # timed on one machine
        if not of_latency:
            problem = "has no effect without --max-latency or --smallest latency"
            raise UserError(problem, field="--bench")
        of_times = [option for option in of_times if option == "--max-step-time"]
    machines = {run.hardware for run in study.runs}
    if of_times and len(machines) > 1:
        problem = f"its runs were timed on {len(machines)} machines ({'; '.join(sorted(machines))}), so times do not "
        raise UserError(f"{problem}compare; ask without {' and '.join(of_times)}", file=study.label)
    if of_latency and exported is None and smallest_latency_batch(study.runs) is None:
        problem = f"its records hold no latency; ask without {' and '.join(of_latency)}, or measure it"
        raise UserError(problem, file=study.label)


def _tested(study: Study, smaller: Sequence[Rated], best: Rated, margin: float) -> tuple[Candidate, ...]:
    question, level = Question("noninferiority", margin), _level(len(smaller))
    compared = [replace(compare(own.runs, best.runs, own.name, best.name), question=question) for own in smaller]
    candidates = []
    for rated, estimate in zip(smaller, decide(compared, study.untested, size=len(smaller)), strict=True):
        values = list(estimate.by_seed.values())
        interval = mean_interval(values, 1 - 2 * level) if values else None
        needed = None if study.untested else needed_pairs(values, margin, level)
        candidates.append(Candidate(rated, replace(estimate, interval=interval), needed))
    return tuple(candidates)


def _level(candidates: int) -> float:
    return ALPHA / max(1, candidates)


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
    effect = (mean + margin) / (error * math.sqrt(data.size))
    if effect <= 0:
        return None
    n = np.arange(2, 1000 + 1)
    reached = scipy.stats.nct.sf(scipy.stats.t.isf(level, n - 1), n - 1, effect * np.sqrt(n)) >= 0.8
    return int(n[np.argmax(reached)]) if reached.any() else None


def smallest_that_exists(recommendation: Recommendation) -> list[tuple[Violation, Rated]]:
    """Return, for each limit that was given, the experiment that comes nearest to it, with what it costs."""
    nearest = []
    for place in range(len(recommendation.limits)):
        beside = [(rated.beside[place], rated) for rated in recommendation.outside]
        known = [(limit.value, rated.name, limit, rated) for limit, rated in beside if limit.value is not None]
        if known:
            nearest.append(min(known, key=lambda entry: entry[:2])[2:])
    return nearest
