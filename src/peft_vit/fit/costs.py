"""What everything takes on this machine, in seconds, and so how many steps a run has.

A run on a fold starts, fits the head that it starts from, takes its steps, and passes its test images once. Features of
the frozen backbone are computed once for all runs of a size. What is delivered comes first: as many steps as fit if the
last training has twice as many as a fold's, and the folds are no more than it takes to know it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from peft_vit.base.console import duration
from peft_vit.base.errors import UserError
from peft_vit.core.backbones import BackboneShape
from peft_vit.core.config import IMAGES_ROUNDED_BY, QuantizationType, study_from_mapping
from peft_vit.core.methods.quantized import usual_rounding
from peft_vit.core.training import FLIP_AXES
from peft_vit.data import open_index
from peft_vit.deploy.post_training import images_rounded_by
from peft_vit.fit.recipe import ROUNDED, Recipe, lora, shared_training
from peft_vit.fit.regressions import images_to_compare
from peft_vit.runs.costs.estimate import Throughput
from peft_vit.runs.costs.time_limit import ENOUGH_STEPS, FEWEST_FOLDS, FOLDS, first_that_fits, images_to_test
from peft_vit.runs.measures.held_out import MAX_REFERENCE_IMAGES
from peft_vit.runs.scheduling.plan import decide_precision, splits_of, workload_of

if TYPE_CHECKING:
    from peft_vit.fit.fit import Fit

LEAST_STEPS, MOST_STEPS, _STEPS_APART = 24, 192, 8  # more only where they are shown to gain
LONGEST, SHORTEST = 2.0, 0.5  # times the steps on folds, of the last training
LENGTHS = (4.0, 3.0, LONGEST, 1.5, 1.0, 0.75, SHORTEST)  # above 2: few were planned since the machine was busy
_LONGER = (LONGEST, 1.0)
_PROCESSES, _MOST_RUNS = 5, 42  # worker processes that the least takes; runs of everything that is tried
_FITS = 9 * (FOLDS + 1)  # of a regression: strengths of the penalty, on folds inside of its training images
_FIT_S = 4e-8  # of one, for each of its values: images x features x classes
_PACK_S = 1.5  # to restore a run's model, and to round its weights once, to nearest
_GPTQ_S, _GPTQ_PASSES = 2.5e-7, 3.5  # of GPTQ: seconds a value of the backbone, and passes of the images that it takes
_FORMS, _COMPARED = 3, 128  # of the model that are written, and images on which each is compared
_TIMINGS, _CALLS = 3, 23  # processes of each form that is timed, and calls in each


@dataclass(frozen=True)
class FitCosts:
    """Seconds of what a tuning does, by what was measured on this machine."""

    fit: Fit
    machine: Throughput

    def shape(self, recipe: Recipe) -> BackboneShape:
        """Return the shape of a recipe's backbone."""
        return self.fit.shape(recipe.model, recipe.image_size)

    def bytes_of(self, recipe: Recipe) -> int:
        """Return the bytes of a recipe's file, as expected."""
        return recipe.file_bytes(self.shape(recipe), self.fit.images.num_outputs, self.fit.images.num_dev)

    def allowed_bits(self, recipe: Recipe) -> list[QuantizationType]:
        """Return the formats within the limit of bytes to which a recipe is rounded; 2 bits only if no others are."""
        most = self.fit.request.max_bytes
        fitting = [bits for bits in ROUNDED if most is None or self.bytes_of(recipe.rounded(bits)) <= most]
        return [bits for bits in fitting if bits != "int2"] or fitting

    def longest_form(self, recipe: Recipe) -> Recipe:
        """Return a recipe rounded as it may have to be, in the way that takes the longest."""
        return recipe.rounded((self.allowed_bits(recipe) or ["nf4"])[-1])

    def image_s(self, recipe: Recipe) -> float:
        """Return the seconds of a forward pass for each of its images."""
        return self.machine.image_s(self.shape(recipe))

    def fits_s(self, recipe: Recipe, images: int) -> float:
        """Return the seconds of a regression on the features of so many images, its penalty chosen among them."""
        width = next(iter(self.shape(recipe).sites)).in_features
        values = len(FLIP_AXES[self.fit.flips]) * images * width * self.fit.images.num_outputs
        return _FITS * _FIT_S * values

    def compared_images(self, recipe: Recipe) -> int:
        """Return by how many images sizes are compared, decided once, so that an eighth of their time fits them."""
        fit = self.fit
        if (decided := fit.decisions.compared_images) is None:
            fitting = fit.share_s("sizes") / 8 / self.fits_s(recipe, 1)
            decided = images_to_compare(fit.images.num_dev, fit.images.rarest, fitting)
            fit.decisions.compared_images = decided
            fit.save()
        return decided

    def regression_s(self, recipe: Recipe) -> float:
        """Return the seconds of a size's regression, with the features of all images: the best one's are needed."""
        images = self.fit.images.num_dev
        features_s = len(FLIP_AXES[self.fit.flips]) * images * self.image_s(recipe)
        return self.machine.start_s + features_s + self.fits_s(recipe, self.compared_images(recipe))

    def run_s(self, recipe: Recipe) -> float:
        """Return the seconds of a run on a fold, without a process's start and features that others share."""
        train, test = self.fit.train_images, self.fit.test_images
        begun = self.machine.start_s + self.fits_s(recipe, train) + self._begun_s(recipe)
        return begun + recipe.steps * self._step_s(recipe) + (0 if recipe.is_probe else test * self.image_s(recipe))

    def _begun_s(self, recipe: Recipe) -> float:
        """Return the seconds to round the weights on which a recipe trains; 0 where these are floats."""
        bits = recipe.trained.bits
        nearest = bits is None or usual_rounding(bits) == "nearest"
        return 0.0 if bits is None else self._packed_s(recipe, 0 if nearest else IMAGES_ROUNDED_BY)

    def _packed_s(self, recipe: Recipe, images: int) -> float:
        """Return the seconds to round a recipe's weights once, by GPTQ on so many images; 0: to nearest."""
        shape = self.shape(recipe)
        passes = _GPTQ_PASSES if shape.in_turn else len(shape.modules) / 2  # else each begins with the image
        return _PACK_S + (_GPTQ_S * shape.parameters + passes * images * self.image_s(recipe) if images else 0.0)

    def rounding_s(self, recipe: Recipe, forms: Sequence[QuantizationType], images: int | None = None) -> float:
        """Return the seconds of a run's predictions with weights rounded to some formats; None: of a fold's images."""
        seen = self.fit.test_images if images is None else images
        packed_s = sum(self._packed_s(recipe, images_rounded_by(bits)) for bits in forms)
        return self.machine.start_s / 2 + packed_s + 2 * len(forms) * seen * self.image_s(recipe)

    def ending_s(self, recipe: Recipe, longer: float = 1.0, pace: float = 1.0) -> float:
        """Return the seconds of the last training, so many times longer than on folds, and of the output, at a pace.

        Without the test, which comes on top. The output writes the model in some forms, compares each with the run's
        model, and times them beside float32; where none is as fast as was asked for, activations in 8 bits are measured
        on folds.
        """
        images, machine, image_s = self.fit.images.num_dev, self.machine, self.image_s(recipe)
        begun = machine.process_s + machine.start_s + self.fits_s(recipe, images)
        begun += self._begun_s(recipe)
        known = min(MAX_REFERENCE_IMAGES, images)
        trained = begun + self.last_steps(recipe, longer) * self._step_s(recipe) + known * image_s
        rounded = 0.0
        if recipe.bits is not None and recipe.when == "after":  # for its predictions, and for its files
            again_s = self._packed_s(recipe, images_rounded_by(recipe.bits))
            rounded = self.rounding_s(recipe, [recipe.bits], known) + again_s
        forms, folds = (_FORMS, 0) if self.fit.request.max_latency is None else (_FORMS + 1, FOLDS)
        written = forms * (2 * machine.start_s + 2 * min(images, _COMPARED) * image_s)
        measured = folds * (2 * machine.start_s + 2 * self.fit.test_images * image_s)
        timed = _TIMINGS * (forms + 1) * (machine.process_s + _CALLS * image_s)
        return pace * trained + max(1.0, pace) * (rounded + written + measured + timed)

    def test_image_s(self, recipe: Recipe) -> float:
        """Return the seconds of a test image: of the probe and the model, and of it rounded, and as it was."""
        rounded = recipe.bits is not None and recipe.when == "after"
        return (4 if rounded else 2) * self.image_s(recipe)

    def tested_images(self, recipe: Recipe) -> int:
        """Return of how many test images a model is read; nothing is chosen by it."""
        minutes = self.fit.request.minutes
        return images_to_test(self.fit.images.num_test, self.test_image_s(recipe), minutes)

    def test_line(self, recipe: Recipe, images: int) -> str:
        """Return how long a test of so many images takes."""
        every, about = self.fit.images.num_test, duration(images * self.test_image_s(recipe))
        of = f"{images:,} images" if images == every else f"{images:,} of {every:,} images, drawn at random,"
        return f"  testing {of} takes about {about}, on top of the minutes"

    def last_steps(self, recipe: Recipe, longer: float = 1.0) -> int:
        """Return the steps of the last training: as many more as there are more images, and as it is longer."""
        return round(longer * recipe.steps * self.fit.images.num_dev / self.fit.train_images)

    def most_steps(self, model: str, image_size: int) -> tuple[int, float]:
        """Return the most steps of LoRA on a fold that fit what trains, and times as many of the last; 0: too few do.

        Five folds, where these leave enough steps; else three, and up to as many; without a longer last training, and
        half of the steps by which that is decided, where there is no time for it.
        """
        whole_s, options = self.fit.training_s, range(MOST_STEPS, LEAST_STEPS - 1, -_STEPS_APART)
        few, least_s = [steps for steps in options if steps <= ENOUGH_STEPS], partial(self.least_s, model, image_size)
        most = first_that_fits(options, partial(least_s, FOLDS, LONGEST), whole_s) or 0
        if most >= ENOUGH_STEPS:
            return most, LONGEST
        fewer = ((first_that_fits(few, partial(least_s, FEWEST_FOLDS, longer), whole_s), longer) for longer in _LONGER)
        return next(((steps, longer) for steps, longer in fewer if steps), (0, 1.0))

    def least_s(self, model: str, image_size: int, folds: int, longer: float, steps: int) -> float:
        """Return the seconds of the least that is to be trained: what is delivered, and what that is known by.

        So many folds of the probe and of LoRA, also with rounded weights; half of the steps on two folds, and the last
        training so many times longer.
        """
        probe, recipe = Recipe(model, image_size), lora(model, image_size, steps)
        fold_s = self.run_s(probe) + self.run_s(recipe) + self.rounding_s(recipe, self.allowed_bits(recipe))
        halved_s = 2 * self.run_s(recipe.half) if longer > 1 else 0.0
        ending_s = self.ending_s(self.longest_form(recipe), longer)
        return folds * fold_s + halved_s + _PROCESSES * self.machine.process_s + ending_s

    def forecast(self, probes: Sequence[Recipe], spent_s: float) -> tuple[dict[str, float], Recipe]:
        """Return the seconds of everything but the test, by what it is, and what may be delivered.

        Args:
            probes: regressions at all sizes.
            spent_s: of this call already.
        """
        fit, sizes_s, trained = self.fit, 0.0, list[Recipe]()
        for probe in sorted(probes, key=self.image_s):
            if sizes_s and sizes_s + self.regression_s(probe) > fit.share_s("sizes"):
                break
            sizes_s += self.regression_s(probe)
            if steps := self.most_steps(probe.model, probe.image_size)[0]:
                trained.append(lora(probe.model, probe.image_size, steps))
        recipe = trained[-1] if trained else min(probes, key=self.image_s)
        ending_s = self.ending_s(recipe, LONGEST if trained else 1.0)
        left_s = max(0.0, 60 * fit.request.minutes - spent_s - sizes_s - ending_s)
        folds_s = min(left_s, (_MOST_RUNS if trained else FOLDS) * self.run_s(recipe))
        parts = {"images and machine": spent_s, "image sizes": sizes_s, "training on folds": folds_s}
        return {**parts, "last training and files": ending_s}, recipe

    def refuse_little_time(self, smallest: Recipe) -> None:
        """Refuse minutes in which not even the regression on the smallest images is done.

        Raises:
            UserError: with the least that would do.
        """
        minutes = self.fit.request.minutes
        # A regression on the folds, and its file.
        least_s = self.regression_s(smallest) + FEWEST_FOLDS * self.run_s(smallest) + self.ending_s(smallest)
        if least_s > 60 * minutes:
            enough = max(math.ceil(least_s / 60), math.floor(minutes) + 1)
            problem = f"{minutes:g} are too few for a single model on this machine, even of the smallest images"
            raise UserError(f"{problem}; give at least {enough}", field="--minutes")

    def _step_s(self, recipe: Recipe) -> float:
        shape, batch_size = self.shape(recipe), self.fit.batch_size
        return 0.0 if recipe.is_probe else self.machine.step_s(shape, recipe.method, batch_size)


_LEAST_S = 20.0  # of measuring
_SHORTEST_S = 5e-5  # of a forward pass; less: the machine was too busy to measure it


def throughput_of(fit: Fit, recipe: Recipe) -> Throughput:
    """Return what runs take here, measured by a few steps of a recipe at the first call, and tell it."""
    machine = fit.decisions.throughput
    if machine is None:
        training = shared_training(fit.batch_size, fit.flips, fit.images.metric)
        training |= {"learning_rate": recipe.rate, "steps": recipe.steps}
        sections = recipe.sections(fit.shape(recipe.model, recipe.image_size))
        experiment = {"name": recipe.name, "method": recipe.method, "training": training, **sections}
        study = study_from_mapping(fit.study("machine", recipe, [0], [experiment]), file=Path("machine"))
        study = study.model_copy(update={"precision": decide_precision(study, None).chosen})
        index = open_index(study.data)
        workload = workload_of(study, index, splits_of(index, study)[study.seeds[0]])
        budget_s = max(_LEAST_S, fit.share_s("machine"))
        machine = fit.environment.measure(study, index, workload, budget_s, lambda text: fit.tell(f"  {text}"))
        fit.decisions.throughput = machine
        fit.save()
    shape, pixels = fit.shape(recipe.model, recipe.image_size), recipe.image_size
    image_s, step_s = machine.image_s(shape), machine.step_s(shape, recipe.method, fit.batch_size)
    image = f"{1000 * image_s:.1f} ms" if image_s >= _SHORTEST_S else "not measured"
    fit.tell(f"  at {pixels} px a forward pass: {image} an image; a step of {fit.batch_size} images: {step_s:.2f} s")
    return machine
