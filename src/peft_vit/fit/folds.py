"""What recipes have done on folds: their runs, the same with rounded weights, and how they compare.

Seed s tests on fold s % 5 of repetition s // 5. Every run is kept, so that a later call, or one after a kill, finds it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from peft_vit.base.files import make_folder, read_bytes, write_whole
from peft_vit.base.statistics import Interval
from peft_vit.base.statistics.more_labels import gain_of_twice
from peft_vit.base.statistics.odds import FoldMeans, means_of_images
from peft_vit.core.config import LABEL_SMOOTHING, QuantizationType
from peft_vit.core.tasks import expected_gain
from peft_vit.deploy.page.formatting import joined
from peft_vit.fit.context import TuningContext
from peft_vit.fit.costs import LENGTHS, Costs
from peft_vit.fit.limits import within_memory
from peft_vit.fit.outcomes import EveryRunFailedError, Outcome, pooled
from peft_vit.fit.recipe import Recipe, shared_training
from peft_vit.runs.costs.time_limit import ENOUGH_STEPS, FEWEST_FOLDS, FOLDS, Limit, Pace

_NLL_WEIGHT = 0.02  # of a nat, in shares: it tells apart what has as many images right
_FASTEST = 0.5  # of the planned time: what takes less may have been lucky
_USUAL_SD = 0.01  # of what more steps gain, around `expected_gain`
RoundRun = Callable[[Path, Sequence[QuantizationType]], Mapping[QuantizationType, NDArray[np.float32]]]


@dataclass
class Folds:
    """Runs of recipes on folds, as far as they are done."""

    costs: Costs  # what they take
    round_run: RoundRun  # gives logits of a run's test images with rounded weights
    outcomes: dict[Recipe, dict[int, Outcome]] = field(default_factory=dict)  # by recipe and seed, rounded ones too
    pace: Pace = field(default_factory=Pace)  # of this call's runs with steps
    failed: set[Recipe] = field(default_factory=set)  # in this call, every run

    @property
    def context(self) -> TuningContext:
        """Return what all stages know."""
        return self.costs.context

    def recall(self) -> None:
        """Read what earlier calls have done."""
        earlier = [Recipe(**own) for own in self.context.state.file.recipes if own["model"] in self.context.backbones]
        for place in dict.fromkeys(recipe.place for recipe in earlier):
            alike = [recipe for recipe in earlier if recipe.place == place]
            self._take(alike, range(FOLDS * 2), self.context.state.limit, only=((), ()))
            for recipe in alike:
                for seed, outcome in self.outcomes[recipe].items():
                    self._add_rounded(recipe, seed, outcome, self._kept(outcome.folder))

    def run(self, recipes: Sequence[Recipe], seeds: Sequence[int], limit: Limit) -> None:
        """Do what is missing of some recipes' runs, all of a seed before the next, as far as there is time."""
        going = [recipe for recipe in recipes if recipe not in self.failed]
        for place in dict.fromkeys(recipe.place for recipe in going):
            alike = [recipe for recipe in going if recipe.place == place]
            for recipe in alike:
                self.context.state.remember(recipe)
            before = {recipe: set(self.seeds(recipe)) for recipe in alike}
            self._take(alike, seeds, limit)
            for recipe in alike:
                for seed in set(self.seeds(recipe)) - before[recipe]:
                    if not recipe.is_probe:
                        self.pace.add(self.outcomes[recipe][seed].seconds, self.costs.run_s(recipe))

    def _take(self, recipes: Sequence[Recipe], seeds: Sequence[int], limit: Limit, only: Any = None) -> None:
        context, first = self.context, recipes[0]
        experiments = [self.experiment(recipe) for recipe in recipes]
        study = context.study(f"folds-{first.place}", first.model, first.image_size, seeds, experiments)
        try:
            done = context.runner(study, limit, only)
        except EveryRunFailedError as error:
            if first.is_probe:  # without it there is no answer
                raise
            context.state.tell(f"  {joined([one.title for one in recipes])}, left out: {error.message}")
            self.failed.update(recipes)
            done = {}
        for recipe in recipes:
            outcomes = {seed: done[recipe.name, seed] for seed in seeds if (recipe.name, seed) in done}
            self.outcomes.setdefault(recipe, {}).update(outcomes)

    def experiment(self, recipe: Recipe) -> dict[str, Any]:
        """Return what trains a recipe, as a configuration holds it.

        Nothing validates: the rate rises and falls over all steps, to a peak of twice the plateau of `train`. In the
        mean it is as high, and as many steps learn as much.
        """
        context = self.context
        training = shared_training(context.batch_size, context.flips, context.metric)
        if not recipe.is_probe:
            training |= {"learning_rate": recipe.rate, "head_start": "probe", "steps": recipe.steps}
            training |= {"label_smoothing": LABEL_SMOOTHING} if context.scores.task.smooths else {}
        sections = recipe.sections(self.costs.shape(recipe), context.request.max_adapter_bytes)
        experiment = {"name": recipe.name, "method": recipe.method, "training": training, **sections}
        if not recipe.is_probe:
            training |= within_memory(context, recipe.model, recipe.image_size, experiment)
        return experiment

    def seeds(self, recipe: Recipe) -> list[int]:
        """Return the seeds of which a recipe has an outcome, rising."""
        return sorted(self.outcomes.get(recipe, {}))

    def missing(self, recipe: Recipe, seeds: Sequence[int]) -> list[int]:
        """Return those of some seeds of which it has none."""
        return [seed for seed in seeds if seed not in self.outcomes.get(recipe, {})]

    def seconds(self, recipe: Recipe, seeds: Sequence[int]) -> float:
        """Return what its missing runs will take: as those that are done, or as planned, at this call's pace."""
        missing, done = len(self.missing(recipe, seeds)), self.outcomes.get(recipe, {})
        if not missing:
            return 0.0
        taken = [outcome.seconds for outcome in done.values()]
        planned = self.costs.run_s(recipe) * (1.0 if recipe.is_probe else self.pace.factor)
        return self.costs.machine.process_s + missing * (statistics.median(taken) if taken else planned)

    def ending_s(self, recipe: Recipe, longer: float = 1.0) -> float:
        """Return what the last training and the output will take, at this call's pace."""
        return self.costs.ending_s(recipe, longer, max(_FASTEST, self.pace.factor))

    def ends_in_time(self, recipe: Recipe, longer: float = 1.0) -> bool:
        """Tell whether a recipe's last training is done, or fits what is left, with the output and a tenth more."""
        left_s = self.context.state.limit.left_s + self.context.state.over_s
        return longer <= self.longest_done(recipe) or self.ending_s(recipe, longer) <= left_s

    def last(self, recipe: Recipe, longer: float) -> Recipe:
        """Return what the last training trains, so many times longer than on folds."""
        return replace(recipe.trained, steps=self.costs.last_steps(recipe, longer))

    def longest_done(self, recipe: Recipe, most: float = LENGTHS[0]) -> float:
        """Return how many times longer than on folds a last training was that is done, at most; 0: none is."""
        done = self.context.state.file.decided
        return next((own for own in LENGTHS if own <= most and self.last(recipe, own).done_as in done), 0.0)

    def round(self, recipe: Recipe, bits: Sequence[QuantizationType], limit: Limit) -> None:
        """Predict with weights that are rounded after training, of all runs of a float recipe, while there is time."""
        for seed, outcome in sorted(self.outcomes.get(recipe, {}).items()):
            if not any(self.missing(recipe.rounded(one), [seed]) for one in bits):
                continue
            if limit.left_s < self.costs.rounding_s(recipe, bits) and seed >= FEWEST_FOLDS:
                return
            self._add_rounded(recipe, seed, outcome, self.rounded_logits(outcome.folder, bits))

    def _add_rounded(self, recipe: Recipe, seed: int, outcome: Outcome, by_type: Mapping[Any, Any]) -> None:
        for bits, logits in by_type.items():
            own = self.outcomes.setdefault(recipe.rounded(bits), {})
            own[seed] = replace(outcome, logits=np.asarray(logits, dtype=np.float64))

    def rounded_logits(self, folder: Path, bits: Sequence[QuantizationType]) -> dict[QuantizationType, Any]:
        """Return what a run's model says of its test images with rounded weights; each is computed once, and kept."""
        logits = self._kept(folder)
        if missing := [one for one in bits if one not in logits]:
            logits |= {one: np.ascontiguousarray(values) for one, values in self.round_run(folder, missing).items()}
            if folder.is_dir():
                make_folder(self._place(folder).parent)
                write_whole(self._place(folder), save(logits))
        return {one: logits[one] for one in bits}

    def _place(self, folder: Path) -> Path:
        return self.context.request.output / "rounded_after" / f"{'-'.join(folder.parts[-3:])}.safetensors"

    def _kept(self, folder: Path) -> dict[QuantizationType, Any]:
        with suppress(OSError, ValueError, SafetensorError):  # none, or damaged: they are computed again
            return dict(load(read_bytes(self._place(folder), None)))
        return {}

    def value(self, recipe: Recipe, seeds: Sequence[int]) -> float | None:
        """Return what recipes are ranked by on some folds: the metric, less a little for their NLL; None: not done."""
        done = self.outcomes.get(recipe, {})
        if not seeds or any(seed not in done for seed in seeds):
            return None
        scores = self.context.scores
        logits, labels, _ = pooled([done[seed] for seed in seeds], scores.task)
        measured = scores.task.measure(logits, labels)
        return scores.of(measured) - _NLL_WEIGHT * measured.nll

    def difference(self, recipe: Recipe, other: Recipe) -> tuple[float, float] | None:
        """Return by how much a recipe is better than another on the folds that both have, and the standard error.

        Images weigh as they do in the metric, and one that several repetitions predict is one. The error is that of
        `value`, NLL included: of recipes that have the same images right it is the NLL's, not 0.
        """
        seeds = [seed for seed in self.seeds(recipe) if seed in self.outcomes.get(other, {})]
        own, others = self.value(recipe, seeds), self.value(other, seeds)
        if own is None or others is None:
            return None
        differs = np.subtract(*(self._by_image(one, seeds) for one in (recipe, other)))
        scores = self.context.scores
        runs = ([self.outcomes[one][seed] for seed in seeds] for one in (recipe, other))
        (logits, labels, images), (of_other, *_) = (pooled(own, scores.task) for own in runs)
        counted = scores.image_weights(labels)
        weights = np.ones(len(labels)) if counted is None else counted
        apart = weights / weights.sum() * (differs - np.average(differs, weights=weights))
        losses = (scores.task.losses(*map(torch.from_numpy, (z, labels))).numpy() for z in (logits, of_other))
        nats = np.subtract(*losses)  # (N,)
        apart -= _NLL_WEIGHT * (nats - nats.mean()) / len(nats)
        by_image = np.bincount(np.unique(images, return_inverse=True)[1], apart)
        return own - others, float(np.linalg.norm(by_image))

    def clearly_better(self, recipe: Recipe, other: Recipe, errors: float = 1.0) -> bool:
        """Tell whether a recipe is better than another by more than so many standard errors, on the same folds."""
        difference, error = self.difference(recipe, other) or (0.0, 0.0)
        return difference > errors * error

    def gains_by_steps(self, recipe: Recipe) -> bool:
        """Tell whether more steps gain: as folds show with twice of them, else as half of them or none let expect."""
        own = recipe.plain
        twice, half = self.difference(replace(own, steps=2 * own.steps), own), self.difference(own, own.half)
        if twice is not None:
            return twice[0] > 0
        if half is None:  # there was no time for it: few steps as a rule are too few
            return 0 < own.steps < ENOUGH_STEPS
        difference, error = half
        usual = expected_gain(own.steps) - expected_gain(own.half.steps)
        return difference * _USUAL_SD**2 + usual * error**2 > 0  # the mean of a normal prior and what was seen

    def gain_of_steps(self, recipe: Recipe) -> Interval | None:
        """Return what twice the steps would bring, a share; None: half of them were not tried on the same folds."""
        trained = recipe.trained
        done, scores = self.outcomes[trained], self.context.scores
        seeds = [seed for seed in self.outcomes.get(trained.half, {}) if seed in done]
        if trained.is_probe or not seeds:
            return None
        labels = np.concatenate([done[seed].labels for seed in seeds])
        of_half, of_all = (scores.best - self._by_image(own, seeds) for own in (trained.half, trained))
        return gain_of_twice(of_half, of_all, scores.image_weights(labels), share=1.0)

    def _by_image(self, recipe: Recipe, seeds: Sequence[int]) -> NDArray[np.float64]:
        """Return what images of some folds bring to the score, seed after seed, see `Scores.by_image`."""
        scores = self.context.scores
        return scores.by_image(*pooled([self.outcomes[recipe][seed] for seed in seeds], scores.task))

    def measured(self, recipes: Sequence[Recipe]) -> FoldMeans:
        """Return what is known of the deciding metric of C recipes, each of which has a fold."""
        known = {seed: outcome for recipe in recipes for seed, outcome in self.outcomes[recipe].items()}
        positions = np.unique(np.concatenate([outcome.images for outcome in known.values()]))  # (N,)
        repetitions = sorted({seed // FOLDS for seed in known})
        brought = np.full((len(recipes), len(repetitions), len(positions)), np.nan)  # (C, R, N): of accuracy 1 or 0
        folds = np.full((len(repetitions), len(positions)), -1, dtype=np.int64)  # (R, N)
        metric = self.context.metric
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
                    images = np.concatenate([self.outcomes[recipe][seed].images for seed in seeds])
                    brought[number, row, np.searchsorted(positions, images)] = self._by_image(recipe, seeds)
        return means_of_images(brought, folds, classes, counts=metric.counts_images)
