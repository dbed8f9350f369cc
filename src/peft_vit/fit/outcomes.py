"""What runs came to on images that they were not trained on: a frame by recipe, fold and image, and who fills it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from peft_vit.base.errors import UserError
from peft_vit.base.files import folder_below
from peft_vit.base.statistics import TemperaturePrior, probabilities
from peft_vit.base.statistics.odds import FoldMeans, means_of_images
from peft_vit.core.config import study_from_mapping
from peft_vit.core.records import Calibrated, Decision, Predictions, RunRecord, RunSpec
from peft_vit.core.tasks import (
    CLASSIFICATION,
    OF_FOLDS,
    TASKS,
    Labels,
    Scores,
    Task,
    meaning_fields,
    rows_of,
    thresholds_of,
)
from peft_vit.data import ImageIndex
from peft_vit.fit.recipe import Recipe
from peft_vit.fit.request import Advanced
from peft_vit.runs.costs.time_limit import FOLDS, Limit
from peft_vit.runs.executors import Notice, RunEnded, RunProgress, RunRetried, StudyEvent, open_executor
from peft_vit.runs.records.progress import study_lock
from peft_vit.runs.records.storage import RECORD_FILE, read_record, run_folder
from peft_vit.runs.scheduling.deadline import Deadline
from peft_vit.runs.scheduling.display import plan_notes
from peft_vit.runs.scheduling.plan import plan_study
from peft_vit.runs.scheduling.profiling import measure_step
from peft_vit.runs.scheduling.scheduler import drive

if TYPE_CHECKING:
    from peft_vit.fit.fit import Fit


@dataclass(frozen=True)
class Outcome:
    """What a finished run came to, on images that it was not trained on: of its fold, or the test images.

    Attributes:
        images: their positions in the data set, (n,).
        labels: of them, n.
        logits: what it says of them, (n, K), as the task has them that it learned.
        seconds: that the run took.
        steps: that it trained.
        folder: of its files.
        learned: its task, with what of it follows from its training images.
    """

    images: NDArray[np.int64]
    labels: Labels
    logits: NDArray[np.float64]
    seconds: float
    folder: Path
    learned: Task = CLASSIFICATION
    steps: int = 0

    @classmethod
    def of(cls, record: RunRecord, folder: Path) -> Self:
        """Read it off the record of a run that is done, with its logits."""
        predictions = record.predictions
        assert predictions is not None
        assert predictions.logits is not None
        images, logits = np.asarray(predictions.images, np.int64), np.asarray(predictions.logits, np.float64)
        task = TASKS[record.spec.task].restored(record.decision)
        labels, steps = rows_of(predictions.labels), len(record.steps)
        return cls(images, labels, logits, record.seconds, folder, task, steps)

    def with_logits(self, logits: Any) -> Self:
        """Return what another form of the run's model came to on the same images."""
        return replace(self, logits=np.asarray(logits, dtype=np.float64))

    def predictions(self, calibration: Calibrated | Decision | None) -> tuple[Labels, tuple[float, ...]]:
        """Return what is predicted of the images, and from which probabilities on, as metrics take it."""
        decision = meaning_fields(calibration)["decision"]
        return self.learned.predicted(self.logits, decision), thresholds_of(decision)


Pooled = tuple[NDArray[np.float64], Labels, NDArray[np.int64]]  # logits (N, K), labels N, positions (N,)


def pooled(outcomes: Iterable[Outcome], task: Task) -> Pooled:
    """Return logits (N, K) as a task has them, labels (N,) and positions (N,) of several runs' images together."""
    parts = [(task.aligned(own.logits, own.learned), own.labels, own.images) for own in outcomes]
    logits, labels, images = map(np.concatenate, zip(*parts, strict=True))
    return logits, labels, images


def predictions_on(
    outcomes: Sequence[Outcome], task: Task, meaning: Calibrated | Decision | None, index: ImageIndex
) -> Predictions | None:
    """Return what models on folds predicted of images of an index, as a record has it; None: there are none.

    Where outputs are calibrated, with how probable they find the label.
    """
    if not outcomes:
        return None
    logits, labels, images = pooled(outcomes, task)
    fields = meaning_fields(meaning)
    made = task.predictions(logits, labels, images, decision=fields["decision"])
    more: dict[str, list[Any]] = {"files": [index.title(image) for image in images.tolist()]}
    if fields["calibrated"] is not None:
        p = probabilities(logits, fields["calibrated"].temperature)  # (N, K)
        more |= {"probability": p.max(1).tolist(), "label_probability": p[np.arange(len(p)), labels].tolist()}
    return made.model_copy(update=more)


def meaning_on(
    outcomes: Sequence[Outcome], task: Task, usual: TemperaturePrior | None = None
) -> Calibrated | Decision | None:
    """Return what outputs of a task mean, as it was learned, from what like models said of images on folds.

    Args:
        outcomes: of these models; none: what is usual is all that is known.
        task: with what of it follows from training images.
        usual: temperature; None: the one of any model.
    """
    if not outcomes:
        return None if usual is None else Calibrated(images=0, temperature=usual.median, coverages=(), thresholds=())
    logits, labels, images = pooled(outcomes, task)
    return task.meaning(logits, labels, usual or OF_FOLDS, images)


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

    def of(self, recipe: Recipe) -> list[Outcome]:
        """Return what a recipe came to, seed after seed."""
        return [self.rows[recipe][seed] for seed in self.seeds(recipe)]

    def add_forms(self, recipe: Recipe, seed: int, logits: Mapping[Any, Any]) -> None:
        """Add what a recipe's outcome is with its weights rounded, by number format."""
        for bits, own in logits.items():
            self.rows.setdefault(recipe.rounded(bits), {})[seed] = self.rows[recipe][seed].with_logits(own)

    def missing(self, recipe: Recipe, seeds: Sequence[int]) -> list[int]:
        """Return those of some seeds of which it has none."""
        return [seed for seed in seeds if seed not in self.rows.get(recipe, {})]

    def pooled(self, recipe: Recipe, seeds: Sequence[int]) -> Pooled:
        """Return logits, labels and positions of the images of some folds, see `pooled`."""
        return pooled([self.rows[recipe][seed] for seed in seeds], self.scores.task)

    def by_image(self, recipe: Recipe, seeds: Sequence[int]) -> NDArray[np.float64]:
        """Return what images of some folds bring to the score, (N,), seed after seed, see `Scores.by_image`."""
        return self.scores.by_image(*self.pooled(recipe, seeds))

    def score(self, recipe: Recipe, seeds: Sequence[int]) -> float:
        """Return the score on the images of some folds."""
        return self.scores.of(self.scores.task.measure(*self.pooled(recipe, seeds)[:2]))

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
        folds = np.full(brought.shape[1:], -1)  # (R, N)
        classes, metric = np.zeros(len(positions), dtype=np.int64), self.scores.metric
        for seed, outcome in known.items():
            at = np.searchsorted(positions, outcome.images)
            folds[repetitions.index(seed // FOLDS), at] = seed % FOLDS
            if metric.equal_classes:
                classes[at] = outcome.labels
        for own in folds:  # folds that nobody has done
            own[own < 0] = next((fold for fold in range(FOLDS) if fold not in own), 0)
        for number, recipe in enumerate(recipes):
            for row, repetition in enumerate(repetitions):  # all of one together: of few images a metric may be nothing
                if seeds := [seed for seed in self.seeds(recipe) if seed // FOLDS == repetition]:
                    *_, images = self.pooled(recipe, seeds)
                    brought[number, row, np.searchsorted(positions, images)] = self.by_image(recipe, seeds)
        return means_of_images(brought, folds, classes if metric.equal_classes else None, counts=metric.counts_images)


class EveryRunFailedError(UserError):
    """No run of a study has come to its end, and some have failed."""


Outcomes = dict[tuple[str, int], Outcome]  # by name of the experiment, and seed
# Does the runs of a study that are not done, as far as there is time, and returns all that are; None: it does none.
Runner = Callable[[Mapping[str, Any], Limit | None], Outcomes]


@dataclass(frozen=True)
class StudyRunner:
    """Does the runs of a fit's studies in processes of this machine, or on a cluster, and says how far they are."""

    fit: Fit

    def __call__(self, mapping: Mapping[str, Any], limit: Limit | None) -> Outcomes:
        """Do a study's runs, and return what came of all that are done.

        Args:
            mapping: of the shape of a configuration file.
            limit: when what runs is stopped; None: nothing is done, what is there is read.

        Raises:
            UserError: for what planning refuses.
            EveryRunFailedError: if nothing is done, and something failed.
            KeyboardInterrupt: after Ctrl-C.
        """
        fit, smoke, executor, name = self.fit, self.fit.request.smoke, self.fit.request.executor, str(mapping["name"])
        results_dir = fit.results_dir(name)
        file = results_dir / name
        study = study_from_mapping(dict(mapping), file=file)
        held = fit.lock if fit.lock is not None and fit.lock.folder == file else None
        failed, done = {}, Outcomes()
        with study_lock(folder_below(results_dir, name)) if held is None else nullcontext(held) as lock:
            measure = partial(measure_step, log=fit.emit)
            plan = plan_study(study, results_dir, file=None, smoke=smoke, part=True, measure_step=measure)
            plan = plan.only([one.name for one in plan.study.experiments], plan.study.seeds, by_seed=True)
            if limit is not None and plan.pending:
                for line in plan_notes(plan) if held is not None else ():
                    fit.emit(f"  {line}")
                if not smoke:
                    fit.images.keep_pixels(plan.study)
                make_executor = partial(open_executor, executor, plan, results_dir)
                deadline = Deadline(plan, results_dir, limit, executor, fit.at_once)
                failed = drive(plan, lock, make_executor, self._say, deadline=deadline)
        for run in plan.runs:
            record_file = run_folder(results_dir, run.spec) / RECORD_FILE
            if record_file.exists() and (record := read_record(record_file)).status == "done":
                done[run.spec.experiment.name, run.spec.seed] = Outcome.of(record, record_file.parent)
        if failed and not done:
            problem = f"every run failed: {next(iter(failed.values()))}; the same command tries again"
            raise EveryRunFailedError(problem, file=file)
        return done

    def _say(self, event: StudyEvent) -> None:
        fit = self.fit
        if isinstance(event, Notice):
            fit.emit(f"  {event.text}")
        elif isinstance(event, RunProgress):
            fit.emit(Advanced(f"{self._titled(event.run.spec)}, step", event.progress.step, event.progress.total_steps))
        elif isinstance(event, RunRetried):
            fit.emit(f"  {event.record.spec.run_id}: {event.record.error}; tried again")
        elif isinstance(event, RunEnded):
            name, record, metric = self._titled(event.run.spec), event.record, fit.images.metric
            if record.status == "failed" or record.test is None:
                fit.emit(f"  {name} failed: {record.error}")
            else:
                value = metric.text(metric.of(record.test))
                fit.emit(f"  {name}: {record.seconds:.0f} s{f', {value}' if record.spec.data.folds else ''}")

    def _titled(self, spec: RunSpec) -> str:
        """Return what a run is, for people."""
        fit, size = self.fit, spec.data.image_size
        of_folds = {fit.name_of(own): own for own in fit.file.recipes if spec.data.folds and own.image_size == size}
        if (recipe := of_folds.get(spec.experiment.name)) is None:
            return spec.name
        return f"{', '.join(filter(None, (recipe.title, recipe.settings)))}, fold {spec.seed % FOLDS + 1}"


def with_meaning(
    record: RunRecord, meaning: Calibrated | Decision | None, folds: Sequence[Outcome], outcome: Outcome
) -> RunRecord:
    """Return a run's record with what its outputs mean, and what that comes to on its test images.

    Args:
        record: of the run.
        meaning: of its outputs; None: it is what the run found.
        folds: what like runs came to, by which that is known.
        outcome: of the run, maybe of another form of its model, such as with rounded weights.
    """
    meaning, task = meaning or record.decision or record.calibrated, outcome.learned
    tested, found = record.predictions, meaning_fields(meaning)
    assert tested is not None
    logits, labels, decision = outcome.logits.astype(np.float32), rows_of(tested.labels), found["decision"]
    is_own = np.array_equal(np.asarray(tested.logits, np.float32), logits)
    if decision is not None or not is_own:
        images = np.asarray(tested.images)
        again = task.predictions(logits, labels, images, keep_logits=True, decision=decision)
        found["predictions"] = again.model_copy(update={"files": tested.files})
        found["test"] = task.measure(logits, labels, decision)
    if meaning is not None:
        # Of another form nobody has counted which images are unlike those of training.
        flagged = record.tested_calibration.unlike if is_own and record.tested_calibration else None
        held = task.tested(meaning, logits, labels, flagged)
        found["tested_calibration"] = held.model_copy(update={"covered_on_folds": covered_on_folds(folds, task)})
    return record.model_copy(update=found)
