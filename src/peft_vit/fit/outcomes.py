"""What runs came to on images that they were not trained on: a frame by recipe, fold and image, and who fills it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from peft_vit.base.errors import UserError
from peft_vit.base.files import folder_below
from peft_vit.base.statistics import TemperaturePrior
from peft_vit.base.statistics.odds import FoldMeans, means_of_images
from peft_vit.core.config import study_from_mapping
from peft_vit.core.records import Calibrated, Decision, RunRecord
from peft_vit.core.tasks import (
    CLASSIFICATION,
    OF_FOLDS,
    TASKS,
    DecidingMetric,
    Labels,
    Scores,
    Task,
    meaning_fields,
    metric_of,
    rows_of,
    thresholds_of,
)
from peft_vit.core.tasks.calibration import calibrate
from peft_vit.fit.recipe import Recipe
from peft_vit.runs.costs.time_limit import FOLDS, Limit
from peft_vit.runs.executors import ExecutorName, Notice, RunEnded, RunRetried, StudyEvent, open_executor
from peft_vit.runs.records.progress import study_lock
from peft_vit.runs.records.storage import RECORD_FILE, read_record, run_folder
from peft_vit.runs.scheduling.deadline import Deadline
from peft_vit.runs.scheduling.plan import Plan, plan_study
from peft_vit.runs.scheduling.profiling import measure_step
from peft_vit.runs.scheduling.scheduler import drive


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to, on images that it was not trained on: of its fold, or the test images.

    Attributes:
        images: their positions in the data set, (n,).
        labels: of them, n.
        logits: what it says of them, (n, K), as the task has them that it learned.
        seconds: that the run took.
        folder: of its files.
        learned: its task, with what of it follows from its training images.
    """

    images: NDArray[np.int64]
    labels: Labels
    logits: NDArray[np.float64]
    seconds: float
    folder: Path
    learned: Task = CLASSIFICATION

    @classmethod
    def of(cls, record: RunRecord, folder: Path) -> Self:
        """Read it off the record of a run that is done, with its logits."""
        predictions = record.predictions
        assert predictions is not None
        assert predictions.logits is not None
        images, logits = np.asarray(predictions.images, np.int64), np.asarray(predictions.logits, np.float64)
        task = TASKS[record.spec.task].restored(record.decision)
        return cls(images, rows_of(predictions.labels), logits, record.seconds, folder, task)

    @property
    def right(self) -> NDArray[np.bool_]:
        """Return where it is right, (n,)."""
        return self.learned.right(self.logits, self.labels)

    def predictions(self, calibration: Calibrated | Decision) -> tuple[Labels, tuple[float, ...]]:
        """Return what is predicted of the images, and from which probabilities on, as metrics take it."""
        decision = meaning_fields(calibration)["decision"]
        return self.learned.predicted(self.logits, decision), thresholds_of(decision)


def pooled(outcomes: Iterable[Outcome], task: Task) -> tuple[NDArray[np.float64], Labels, NDArray[np.int64]]:
    """Return logits (N, K) as a task has them, labels (N,) and positions (N,) of several runs' images together."""
    runs = list(outcomes)
    logits = np.concatenate([np.asarray(task.aligned(own.logits, own.learned), np.float64) for own in runs])
    return logits, np.concatenate([own.labels for own in runs]), np.concatenate([own.images for own in runs])


def meaning_on(outcomes: Iterable[Outcome], task: Task, prior: TemperaturePrior | None = None) -> Calibrated | Decision:
    """Return what outputs of a task mean, as it was learned, from what like models said of images on folds.

    Args:
        outcomes: of these models.
        task: with what of it follows from training images.
        prior: of the temperature of a softmax; None: the images decide alone.
    """
    logits, labels, images = pooled(outcomes, task)
    return task.decide(logits, labels, OF_FOLDS, images) or calibrate(logits, labels, images.tolist(), prior)


def covered_on_folds(outcomes: Sequence[Outcome], task: Task) -> dict[float, float]:
    """Return by coverage how often sets or intervals hold the truth on images of folds; empty of one class an image.

    Those of a fold are made by what models said of images outside of it, so that no image chose its own. Folds count by
    their images.
    """
    if not outcomes:
        return {}
    logits, labels, images = pooled(outcomes, task)
    by_fold = []
    for own in outcomes:
        others = ~np.isin(images, own.images)
        decision = task.decide(logits[others], labels[others], OF_FOLDS, images[others])
        by_fold.append({} if decision is None else task.covered(decision, pooled([own], task)[0], own.labels)[0])
    sizes = [len(own.images) for own in outcomes]
    everywhere = (c for c in by_fold[0] if all(c in held for held in by_fold))
    return {c: float(np.average([held[c] for held in by_fold], weights=sizes)) for c in everywhere}


_NLL_WEIGHT = 0.02  # of a nat, in shares: it tells apart what has as many images right


@dataclass
class FoldResults:
    """What recipes came to on folds, by recipe and seed: seed s tests fold s % FOLDS of repetition s // FOLDS.

    Recipes that are rounded after training have rows of their own.
    """

    scores: Scores
    rows: dict[Recipe, dict[int, Outcome]] = field(default_factory=dict)

    def seeds(self, recipe: Recipe) -> list[int]:
        """Return the seeds of which a recipe has an outcome, rising."""
        return sorted(self.rows.get(recipe, {}))

    def missing(self, recipe: Recipe, seeds: Sequence[int]) -> list[int]:
        """Return those of some seeds of which it has none."""
        return [seed for seed in seeds if seed not in self.rows.get(recipe, {})]

    def pooled(self, recipe: Recipe, seeds: Sequence[int]) -> tuple[NDArray[np.float64], Labels, NDArray[np.int64]]:
        """Return logits, labels and positions of the images of some folds, see `pooled`."""
        return pooled([self.rows[recipe][seed] for seed in seeds], self.scores.task)

    def by_image(self, recipe: Recipe, seeds: Sequence[int]) -> NDArray[np.float64]:
        """Return what images of some folds bring to the score, (N,), seed after seed, see `Scores.by_image`."""
        return self.scores.by_image(*self.pooled(recipe, seeds))

    def value(self, recipe: Recipe, seeds: Sequence[int]) -> float | None:
        """Return what recipes are ranked by on some folds: the score, less a little for their NLL; None: not done."""
        if not seeds or self.missing(recipe, seeds):
            return None
        logits, labels, _ = self.pooled(recipe, seeds)
        measured = self.scores.task.measure(logits, labels)
        return self.scores.of(measured) - _NLL_WEIGHT * measured.nll

    def paired(self, recipe: Recipe, other: Recipe) -> tuple[float, float] | None:
        """Return by how much a recipe is better than another on the folds that both have, and the standard error.

        Images weigh as they do in the metric, and one that several repetitions predict is one. The error is that of
        `value`, NLL included: of recipes that have the same images right it is the NLL's, not 0.
        """
        seeds = [seed for seed in self.seeds(recipe) if seed in self.rows.get(other, {})]
        own, others = self.value(recipe, seeds), self.value(other, seeds)
        if own is None or others is None:
            return None
        differs = np.subtract(*(self.by_image(one, seeds) for one in (recipe, other)))
        (logits, labels, images), (of_other, *_) = (self.pooled(one, seeds) for one in (recipe, other))
        counted = self.scores.image_weights(labels)
        weights = np.ones(len(labels)) if counted is None else counted
        apart = weights / weights.sum() * (differs - np.average(differs, weights=weights))
        losses = (self.scores.task.losses(*map(torch.from_numpy, (z, labels))).numpy() for z in (logits, of_other))
        nats = np.subtract(*losses)  # (N,)
        apart -= _NLL_WEIGHT * (nats - nats.mean()) / len(nats)
        by_image = np.bincount(np.unique(images, return_inverse=True)[1], apart)
        return own - others, float(np.linalg.norm(by_image))

    def means(self, recipes: Sequence[Recipe]) -> FoldMeans:
        """Return what is known of the deciding metric of C recipes, each of which has a fold."""
        known = {seed: outcome for recipe in recipes for seed, outcome in self.rows[recipe].items()}
        positions = np.unique(np.concatenate([outcome.images for outcome in known.values()]))  # (N,)
        repetitions = sorted({seed // FOLDS for seed in known})
        brought = np.full((len(recipes), len(repetitions), len(positions)), np.nan)  # (C, R, N): of accuracy 1 or 0
        folds = np.full((len(repetitions), len(positions)), -1, dtype=np.int64)  # (R, N)
        metric = self.scores.metric
        classes = np.zeros(len(positions), dtype=np.int64) if metric.equal_classes else None
        for seed, outcome in known.items():
            at = np.searchsorted(positions, outcome.images)
            folds[repetitions.index(seed // FOLDS), at] = seed % FOLDS
            if classes is not None:
                classes[at] = outcome.labels
        for place, own in enumerate(folds):  # folds that nobody has done
            left = [fold for fold in range(FOLDS) if fold not in own]
            folds[place, own < 0] = left[0] if left else 0
        for number, recipe in enumerate(recipes):
            for row, repetition in enumerate(repetitions):  # all of one together: of few images a metric may be nothing
                if seeds := [seed for seed in self.seeds(recipe) if seed // FOLDS == repetition]:
                    images = np.concatenate([self.rows[recipe][seed].images for seed in seeds])
                    brought[number, row, np.searchsorted(positions, images)] = self.by_image(recipe, seeds)
        return means_of_images(brought, folds, classes, counts=metric.counts_images)


class EveryRunFailedError(UserError):
    """No run of a study has come to its end, and some have failed."""


Only = tuple[Sequence[str], Sequence[int]]
Outcomes = dict[tuple[str, int], Outcome]  # by name of the experiment, and seed


# Does the runs of a study that are not done, as far as there is time, of some names and seeds or all; returns all that
# are done.
Runner = Callable[[Mapping[str, Any], Limit, Only | None], Outcomes]


def finished_runs(plan: Plan, results_dir: Path) -> Iterator[tuple[RunRecord, Path]]:
    """Yield the record and the folder of each run of a plan that is done."""
    for run in plan.runs:
        folder = run_folder(results_dir, run.spec)
        if (folder / RECORD_FILE).exists() and (record := read_record(folder / RECORD_FILE)).status == "done":
            yield record, folder


@dataclass(frozen=True)
class StudyRunner:
    """Does runs in processes of this machine, or on a cluster.

    Attributes:
        results_dir: studies lie below it.
        metric: of what is shown.
        executor: which one.
        tell: gets what ended and what failed, a line each.
    """

    results_dir: Path
    metric: DecidingMetric
    executor: ExecutorName
    tell: Callable[[str], None]

    def __call__(self, mapping: Mapping[str, Any], limit: Limit, only: Only | None = None) -> Outcomes:
        """Do a study's runs, and return what came of all that are done.

        Args:
            mapping: of the shape of a configuration file.
            limit: when what runs is stopped.
            only: names and seeds that are done now; None: all.

        Raises:
            UserError: for what planning refuses.
            EveryRunFailedError: if nothing is done, and something failed.
            KeyboardInterrupt: after Ctrl-C.
        """
        file = self.results_dir / str(mapping["name"])
        study = study_from_mapping(dict(mapping), file=file)
        with study_lock(folder_below(self.results_dir, study.name)) as lock:
            measure = partial(measure_step, log=self.tell)
            whole = plan_study(study, self.results_dir, file=None, part=True, measure_step=measure)
            names = [one.name for one in whole.study.experiments if only is None or one.name in only[0]]
            seeds = [seed for seed in whole.study.seeds if only is None or seed in only[1]]
            plan, failed = whole.only(names, seeds, by_seed=True), {}
            if plan.runs:
                make_executor = partial(open_executor, self.executor, plan, self.results_dir)
                deadline = Deadline(plan, self.results_dir, limit, self.executor)
                failed = drive(plan, lock, make_executor, self._say, deadline=deadline)
        done = {
            (record.spec.experiment.name, record.spec.seed): Outcome.of(record, folder)
            for record, folder in finished_runs(whole, self.results_dir)
        }
        if failed and not done:
            problem = f"every run failed: {next(iter(failed.values()))}; the same command tries again"
            raise EveryRunFailedError(problem, file=file)
        return done

    def _say(self, event: StudyEvent) -> None:
        if isinstance(event, Notice):
            self.tell(f"  {event.text}")
        elif isinstance(event, RunRetried):
            self.tell(f"  {event.record.spec.run_id}: {event.record.error}; tried again")
        elif isinstance(event, RunEnded):
            name, record = event.run.spec.name, event.record
            if record.status == "failed" or record.test is None:
                self.tell(f"  {name} failed: {record.error}")
            else:
                value = self.metric.text(self.metric.of(record.test))
                self.tell(f"  {name}: {record.seconds:.0f} s{f', {value}' if record.spec.data.folds else ''}")


# --- trainings without a fold each, where labels are too few to set some aside ----------------------------------------


class ByFolds(NamedTuple):
    """What is known of a run's model by trainings like it, each tested on images that it did not see.

    Attributes:
        record: of the run, with what its outputs mean.
        value: of the metric that decides; larger is better.
        upper: the end of its 95 % interval.
        of_probe: likewise, of the regression that these trainings started from, on the same images; None: of none.
    """

    record: RunRecord
    value: float
    upper: float
    of_probe: float | None


def known_by_folds(record: RunRecord, plan: Plan, results_dir: Path) -> ByFolds:
    """Return what the finished runs of a study on folds tell of a run's model, see `fold_study`.

    Args:
        record: of the run.
        plan: of the study.
        results_dir: the study lies below it.

    Raises:
        UserError: if none of them has finished.
    """
    task, metric = TASKS[record.spec.task].restored(record.decision), metric_of(record.spec)
    finished = list(finished_runs(plan, results_dir))
    if not finished:
        raise UserError("every training on folds failed; the same command tries again", file=results_dir)
    outcomes = [Outcome.of(own, folder) for own, folder in finished]
    labels = np.concatenate([outcome.labels for outcome in outcomes])
    known = with_meaning(record, meaning_on(outcomes, task, OF_FOLDS), outcomes, task)
    score = metric.interval(labels, *_by_others(task, outcomes))
    upper = score.high if metric.sign > 0 else score.low
    upper = score.estimate if upper is None else upper
    of_probe = None
    probes = [own.probe_test for own, _ in finished if own.probe_test is not None]
    if len(probes) == len(finished):
        each = [(rows_of(probe.predicted), probe.thresholds) for probe in probes]
        of_probe = metric.sign * metric.interval(labels, *_joined(each)).estimate
    return ByFolds(known, metric.sign * score.estimate, metric.sign * upper, of_probe)


def with_meaning(
    record: RunRecord,
    meaning: Calibrated | Decision,
    outcomes: Sequence[Outcome],
    task: Task,
    logits: NDArray[np.float32] | None = None,
) -> RunRecord:
    """Return a run's record with what its outputs mean, and what that comes to on its test images.

    Args:
        record: of the run.
        meaning: of its outputs.
        outcomes: of like runs on folds, by which that is known.
        task: as the run learned it.
        logits: (N, K) of its test images in another form of the model, such as with rounded weights; None: its own.
    """
    tested, found = record.predictions, meaning_fields(meaning)
    assert tested is not None
    own, labels = np.asarray(tested.logits, np.float32), rows_of(tested.labels)
    is_own = logits is None or np.array_equal(own, logits)
    logits, decision = own if logits is None else logits, found["decision"]
    if decision is not None or not is_own:
        images = np.asarray(tested.images)
        again = task.predictions(logits, labels, images, keep_logits=True, decision=decision)
        found["predictions"] = again.model_copy(update={"files": tested.files})
        found["test"] = task.measure(logits, labels, decision)
    # Of another form nobody has counted which images are unlike those of training.
    flagged = record.tested_calibration.unlike if is_own and record.tested_calibration else None
    held = task.tested(meaning, logits, labels, flagged)
    found["tested_calibration"] = held.model_copy(update={"covered_on_folds": covered_on_folds(outcomes, task)})
    return record.model_copy(update=found)


def _by_others(task: Task, outcomes: Sequence[Outcome]) -> tuple[Labels, Labels]:
    """Return what is predicted of all images, and from which probabilities on, with what other folds say that it means.

    Thresholds that an image has chosen would make it look better than a new one.
    """
    each = []
    for own in outcomes:
        others = [other for other in outcomes if other is not own] or [own]
        logits, labels, _ = pooled(others, task)
        meaning = task.decide(logits, labels, OF_FOLDS)
        each.append((task.predicted(pooled([own], task)[0], meaning), thresholds_of(meaning)))
    return _joined(each)


def _joined(each: Sequence[tuple[Labels, tuple[float, ...]]]) -> tuple[Labels, Labels]:
    thresholds = [np.broadcast_to(least or 0.5, predicted.shape) for predicted, least in each]
    return np.concatenate([predicted for predicted, _ in each]), np.concatenate(thresholds)
