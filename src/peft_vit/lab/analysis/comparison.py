"""Is A better than B: values over runs, a question asked of them, and what the tests of a family say.

The primary test, named here before any data: the exact two-sided Wilcoxon signed-rank test over seeds at 5 %, with
Holm's correction over all comparisons against the same reference. The t interval beside it describes, it does not
decide. "Not decided" means that these runs can't tell, never that there is no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from peft_vit.base.statistics import Interval, mean_interval
from peft_vit.base.statistics.estimates import Estimate, Question, compare_values, decide, join_notes
from peft_vit.core.config import ExperimentConfig, LoraConfig
from peft_vit.lab.analysis.studies import Run, Study

SAME_SIZE = 0.01  # share of the smaller one by which sizes may differ and still count as equal


# --- estimates --------------------------------------------------------------------------------------------------------


Value = Callable[[Run], float | None]  # what is compared
_BETTER = Question()


def accuracy_on_test(run: Run) -> float:
    """Return what methods are compared on unless something else is named."""
    return run.score


def compare(
    runs: Sequence[Run], reference_runs: Sequence[Run], name: str, reference: str, value: Value = accuracy_on_test
) -> Estimate:
    """Return differences of two experiments, pairing runs by seed; nothing is tested yet.

    A pair counts only if both runs used the same backbone weights and the same images in the same split. Pairs in which
    a run's value is None are left out and counted in the note.
    """
    partner = {run.seed: run for run in reference_runs}
    pairs = [(run, partner[run.seed]) for run in runs if run.seed in partner]
    paired = [(a, b) for a, b in pairs if same_problem(a) == same_problem(b)]
    values = {a.seed: (value(a), value(b)) for a, b in paired}
    by_seed = {seed: (left, right) for seed, (left, right) in values.items() if left is not None and right is not None}
    notes = []
    if refused := len(pairs) - len(paired):
        notes.append(f"{refused} pair(s) refused: other weights, images or splits")
    if unknown := len(paired) - len(by_seed):
        notes.append(f"{unknown} pair(s) left out: not recorded, or no finite number, in one of both runs")
    trained = [(a, b) for a, b in paired if a.seed in by_seed and not (a.experiment.is_probe or b.experiment.is_probe)]
    if any(_initial_state(a) != _initial_state(b) for a, b in trained):
        notes.append("pairs differ in the initial head or in the order of images")
    return compare_values(by_seed, name=name, reference=reference, note=join_notes(*notes))


def _initial_state(run: Run) -> tuple[str | None, str | None]:
    """Return what runs of one seed begin with alike, unless they are probes."""
    return run.provenance.head_init_sha256, run.provenance.data_order_sha256


# --- which runs make a pair, and what is compared with what -----------------------------------------------------------


def same_problem(run: Run) -> tuple[object, ...]:
    """Return what must be equal for two runs to be a pair: backbone, weights, images and split."""
    return *same_source(run), run.provenance.split_sha256


def same_source(run: Run) -> tuple[object, ...]:
    """Return backbone, weights and data set: what is equal for runs that may have drawn other images of it."""
    return run.record.spec.backbone.model, run.provenance.weights_sha256, run.provenance.data_sha256


def references(study: Study) -> tuple[str, ...]:
    """Return the experiments to compare with: the linear probe, and the LoRA of largest rank up to 8.

    Without any such LoRA the smallest one; without LoRA only the linear probe; without either none.
    """
    linear = [e.name for e in study.with_method("linear")]
    loras = study.fixed_rank_loras()
    up_to_8 = [e for e in loras if (e.need(LoraConfig).rank or 0) <= 8]
    return (*linear[:1], *(e.name for e in (up_to_8[-1:] or loras[:1])))


def compare_all(
    study: Study, reference: str, names: Collection[str] | None = None, question: Question = _BETTER
) -> tuple[Estimate, ...]:
    """Compare experiments with a reference, paired by seed and decided as one family of tests.

    Args:
        study: with finished runs of the reference.
        reference: what others are compared with.
        names: experiments with finished runs, of which one without a pair counts in the family, too; None: all others,
            of which it does not.
        question: what is asked of the differences.
    """
    others = names
    if others is None:
        others = [e.name for e in study.experiments if e.name != reference and study.runs_of(e.name)]
    pairs = [compare(study.runs_of(name), study.runs_of(reference), name, reference) for name in others]
    family = [replace(pair, question=question) for pair in pairs]
    return decide(family, study.untested, size=0 if names is None else len(names))


def compare_with_references(study: Study) -> tuple[Estimate, ...]:
    """Compare every experiment with each of the study's references: a family for each of them."""
    return tuple(estimate for reference in references(study) for estimate in compare_all(study, reference))


# --- every experiment by itself ---------------------------------------------------------------------------------------

Cost = Literal["stored_bytes", "parameters", "seconds_per_step", "latency_s"]


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One experiment of a study over its runs; accuracies, or what else decides, are shares."""

    study: str  # its label
    experiment: ExperimentConfig
    runs: tuple[Run, ...]
    by_seed: dict[int, float]  # test accuracy
    test_accuracy: Interval
    validation_accuracy: Interval | None  # None where runs had no validation images
    above_majority: Interval
    runs_above_majority: int
    final_parameters: float  # mean over runs
    stored_bytes: float  # likewise
    costs: tuple[Mapping[Cost, float | None], ...]  # by run; None: not recorded
    estimate: Estimate | None = None  # against another experiment of the study; None: not compared

    @property
    def name(self) -> str:
        """Return the experiment's name."""
        return self.experiment.name

    def cost(self, cost: Cost, over: Callable[[Sequence[float]], float] = fmean) -> float | None:
        """Return the mean of a cost over runs, or what else is to be made of it; None if a run lacks it."""
        recorded = [value for costs in self.costs if (value := costs[cost]) is not None]
        return over(recorded) if len(recorded) == len(self.costs) else None


def method_results(study: Study) -> tuple[MethodResult, ...]:
    """Return one row for each experiment with a finished run.

    Latency is that of the smallest batch size that all runs of the study have that have any.
    """
    batches = [set(run.record.latency_s) for run in study.runs if run.record.latency_s]
    batch = min(set.intersection(*batches), default=0) if batches else 0
    results = []
    for experiment in study.experiments:
        runs = study.runs_of(experiment.name)
        if not runs:
            continue
        margins = [run.score - run.record.majority_accuracy.get("test", 0.0) for run in runs]
        validated = [run.scores.of(run.validation) for run in runs if run.validation is not None]
        costs: list[dict[Cost, float | None]] = [
            {
                "stored_bytes": run.bytes.stored_bytes,
                "parameters": run.parameters.final,
                "seconds_per_step": run.record.seconds_per_step or None,  # 0 is that of a clock that was set back
                "latency_s": run.record.latency_s.get(batch),
            }
            for run in runs
        ]
        results.append(
            MethodResult(
                study=study.label,
                experiment=experiment,
                runs=runs,
                by_seed={run.seed: run.score for run in runs},
                test_accuracy=mean_interval([run.score for run in runs]),
                validation_accuracy=mean_interval(validated) if len(validated) == len(runs) else None,
                above_majority=mean_interval(margins),
                runs_above_majority=sum(margin > 0 for margin in margins),
                final_parameters=fmean(run.parameters.final for run in runs),
                stored_bytes=fmean(run.bytes.stored_bytes for run in runs),
                costs=tuple(costs),
            )
        )
    return tuple(results)


def validation_means(methods: Iterable[MethodResult]) -> dict[str, float]:
    """Return experiment -> mean validation accuracy, of those that have validation images."""
    return {m.name: m.validation_accuracy.estimate for m in methods if m.validation_accuracy is not None}
