"""What everything takes on this machine, in seconds, and so how many steps a training has.

A run on a fold starts, fits the head that it starts from, takes its steps, and passes its test images once. Features of
the frozen backbone are computed once for all runs of a size. How fast the machine is follows from large matrix
products, corrected by what features, and then runs, have taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from peft_vit.base.console import duration
from peft_vit.core.adapters.footprint import available_memory_bytes
from peft_vit.core.backbones import BackboneShape
from peft_vit.core.config import IMAGES_ROUNDED_BY, QuantizationType, bytes_of
from peft_vit.core.methods.quantized import usual_rounding
from peft_vit.core.training import FLIP_AXES
from peft_vit.deploy.export import images_rounded_by
from peft_vit.fit.recipe import ROUNDED, Recipe
from peft_vit.runs.costs.estimate import Throughput, activation_values
from peft_vit.runs.costs.time_limit import (
    FEWEST_FOLDS,
    FOLDS,
    Pace,
    first_that_fits,
    images_to_test,
    makespan,
    validate_every,
)
from peft_vit.runs.measures.held_out import MAX_REFERENCE_IMAGES

if TYPE_CHECKING:
    from peft_vit.fit.fit import Fit

LEAST_STEPS, MOST_STEPS, _STEPS_APART = 24, 192, 8  # on folds; more only where they are shown to gain
MOST_LAST_STEPS = 768  # of the first model
SIZES_SHARE = 0.15  # of the minutes
LONG_S = 240.0  # of a first training; a linear probe, which takes a minute to be trained and written, comes before it
_FEWEST, _FEW = 300, 1500  # images by which sizes can be compared; up to which folds are worth their fits
_FOLD_STEPS = 0.8  # of those of the last training, at most: as many epochs
_FITS = 9 * (FOLDS + 1)  # of a regression: strengths of the penalty, on folds inside of its training images
_LEAST_FIT_S, _FIT_S = 0.02, 4e-8  # of one, and for each of its values: images x features x classes
_PACK_S = 1.5  # to restore a run's model, and to round its weights once, to nearest
_GPTQ_S, _GPTQ_PASSES = 2.5e-7, 3.5  # of GPTQ: seconds a value of the backbone, and passes of the images that it takes
_LATE, _TUNE_LATE = 1.1, 1.5  # times what steps were planned to take, after which a last training has fewer
_COMPARED = 128  # images on which a written form is compared
_FORMS, _TIMINGS, _CALLS = 3, 3, 23  # with a limit of latency: forms, processes of each that is timed, calls in each
_FASTEST = 0.5  # of the planned time: what takes less may have been lucky
_MEMORY_SHARE = 0.5  # of what is free, for what a step keeps


def images_to_compare(images: int, rarest: float, fitting: float) -> int:
    """Return by how many of some images sizes are compared, if regressions on so many are worth their time.

    There are three images of the rarest class among them, or its folds could not be made.
    """
    return min(images, max(_FEWEST, min(_FEW, int(fitting)), math.ceil(3 * images / max(1, rarest))))


@dataclass(frozen=True)
class FitCosts:
    """Seconds of what a fit does here."""

    fit: Fit
    machine: Throughput

    def shape(self, recipe: Recipe) -> BackboneShape:
        """Return the shape of a recipe's backbone."""
        return self.fit.shape(recipe.model, recipe.image_size)

    def bytes_of(self, recipe: Recipe) -> int:
        """Return the bytes of a recipe's file, as expected."""
        return recipe.file_bytes(self.shape(recipe), self.fit.images.num_outputs, self.fit.images.num_dev)

    def allowed_bits(self, recipe: Recipe, more_bytes: int = 0) -> list[QuantizationType]:
        """Return the formats within the limit of bytes to which a recipe is rounded; 2 bits only if no others are."""
        most = self.fit.request.max_bytes
        fitting = [bits for bits in ROUNDED if most is None or self.bytes_of(recipe.rounded(bits)) + more_bytes <= most]
        return [bits for bits in fitting if bits != "int2"] or fitting

    def longest_form(self, recipe: Recipe) -> Recipe:
        """Return a recipe rounded as it may have to be, in the way that takes the longest."""
        return recipe.rounded((self.allowed_bits(recipe) or ["nf4"])[-1])

    # --- images ---

    def image_s(self, recipe: Recipe) -> float:
        """Return the seconds of a forward pass for each of its images."""
        return self.image_pace(recipe) * self.machine.image_s(self.shape(recipe))

    def image_pace(self, recipe: Recipe) -> float:
        """Return how many times longer an image takes than was reckoned: at a recipe's size, or at all sizes."""
        paces = self.fit.image_paces
        together = Pace(*(sum(getattr(pace, name) for pace in paces.values()) for name in ("taken_s", "planned_s")))
        return paces.get(recipe.place, together).factor

    @property
    def _ways(self) -> int:
        return len(FLIP_AXES[self.fit.flips])

    def fits_s(self, recipe: Recipe, images: int, ways: int | None = None) -> float:
        """Return the seconds of a regression on the features of so many images, its penalty chosen among them.

        Args:
            recipe: at its size.
            images: whose features are there.
            ways: in which each is flipped; None: as training shows them.
        """
        # Four times as many inputs take twice as long, as measured.
        inputs = self.shape(recipe).head_inputs / math.sqrt(self.fit.backbone(recipe.model).head_blocks)
        values = (ways or self._ways) * images * inputs * self.fit.images.num_outputs
        return self.fit.fit_pace.factor * _FITS * (_LEAST_FIT_S + _FIT_S * values)

    def compared_images(self, recipes: Sequence[Recipe]) -> int:
        """Return by how many images sizes are compared, decided once, so that most of them fit their time.

        Args:
            recipes: regressions at all sizes.
        """
        fit = self.fit
        if (decided := fit.decisions.compared_images) is None:
            whole_s = sum(self.image_s(one) + self.fits_s(one, 1, ways=1) - self.fits_s(one, 0) for one in recipes)
            fitting = SIZES_SHARE * 60 * fit.request.minutes / whole_s
            decided = images_to_compare(fit.images.num_dev, fit.images.rarest, fitting)
            fit.decisions.compared_images = decided
            fit.save()
        return decided

    def features_s(self, recipe: Recipe) -> float:
        """Return the seconds of the features of all images that are trained on, as training shows them."""
        if self.fit.flips == "none" and self.fit.decisions.compared_images == self.fit.images.num_dev:
            return 0.0  # the comparison of sizes has computed them
        return self._ways * self.trained_images(recipe) * self.image_s(recipe)

    def trained_images(self, recipe: Recipe) -> int:
        """Return how many images a recipe is trained on: as many as a third of the minutes takes the features of."""
        fitting = 60 * self.fit.request.minutes / 3 / (self._ways * self.image_s(recipe))
        return min(self.fit.num_train, max(int(fitting), 2 * self.fit.images.num_outputs))

    # --- runs ---

    def step_s(self, recipe: Recipe) -> float:
        """Return the seconds of a step; 0 of a probe."""
        shape, pace = self.shape(recipe), self.image_pace(recipe)
        if recipe.is_probe:
            return 0.0
        return pace * self.machine.step_s(shape, recipe.method, self.fit.batch_size, self._recomputed(shape))

    def run_s(self, recipe: Recipe) -> float:
        """Return the seconds of a run on a fold, without a process's start and features that others share."""
        begun = self.machine.start_s + self.fits_s(recipe, self.fit.fold_train_images) + self._begun_s(recipe)
        return begun + recipe.steps * self.step_s(recipe) + self.fit.fold_test_images * self.image_s(recipe)

    def _begun_s(self, recipe: Recipe) -> float:
        """Return the seconds to round the weights on which a recipe trains; 0 where these are floats."""
        bits = recipe.trained.bits
        if bits is None:
            return 0.0
        return self._packed_s(recipe, IMAGES_ROUNDED_BY if usual_rounding(bits) == "gptq" else 0)

    def _packed_s(self, recipe: Recipe, images: int) -> float:
        """Return the seconds to round a recipe's weights once, by GPTQ on so many images; 0: to nearest."""
        shape = self.shape(recipe)
        passes = _GPTQ_PASSES if shape.in_turn else len(shape.modules) / 2  # else each begins with the image
        return _PACK_S + (_GPTQ_S * shape.parameters + passes * images * self.image_s(recipe) if images else 0.0)

    def rounding_s(self, recipe: Recipe, forms: Sequence[QuantizationType], images: int | None = None) -> float:
        """Return the seconds of a run's predictions with weights rounded to some formats; None: of a fold's images."""
        tested = self.fit.fold_test_images if images is None else images
        packed_s = sum(self._packed_s(recipe, images_rounded_by(bits)) for bits in forms)
        return self.machine.start_s / 2 + packed_s + 2 * len(forms) * tested * self.image_s(recipe)

    def last_steps(self, recipe: Recipe, longer: float = 1.0) -> int:
        """Return the steps of the last training: as many more as there are more images, and as it is longer."""
        given = self.fit.request.steps_for(self.fit.num_train)
        if recipe.is_probe or given is not None:
            return 0 if recipe.is_probe else given or 0
        return round(longer * recipe.steps * self.fit.num_train / self.fit.fold_train_images)

    def last_s(self, recipe: Recipe, steps: int) -> float:
        """Return the seconds of a last training of so many steps, without its test."""
        fit, image_s = self.fit, self.image_s(recipe)
        begun_s = self.machine.process_s + self.machine.start_s + self.fits_s(recipe, self.trained_images(recipe))
        validations = 2 + steps // validate_every(fit.num_validation, fit.request.batch_size)
        images = min(MAX_REFERENCE_IMAGES, fit.num_train) + validations * fit.num_validation
        return begun_s + self._begun_s(recipe) + steps * self.step_s(recipe) + images * image_s

    def most_steps_s(self, recipe: Recipe, steps: int, is_first: bool) -> float:
        """Return the seconds that so many steps of a last training may take, before it has fewer.

        A little more than planned; of the first training all that it has of the minutes, as passes of images may be
        fast where steps are not.
        """
        fit, request = self.fit, self.fit.request
        late_s = (_LATE if request.main_study else _TUNE_LATE) * fit.pace.factor * steps * self.step_s(recipe)
        if not is_first:
            return late_s
        share = self._share_without_folds if fit.num_validation or request.from_run is not None else request.last_share
        return max(late_s, share * fit.limit.left_s - self._first_s(recipe, 0))

    @property
    def _share_without_folds(self) -> float:
        """Return the share of the minutes after image sizes that a first model has where no folds follow."""
        request = self.fit.request
        return request.last_share + request.folds_share if request.from_run is None else 1.0

    def _first_s(self, recipe: Recipe, steps: int) -> float:
        """Return the seconds of a first model of so many steps, with its features and files."""
        return self.features_s(recipe) + self.last_s(recipe, steps) + self.output_s(self.longest_form(recipe))

    def written_s(self, recipe: Recipe) -> float:
        """Return the seconds of the files of a tuning's model, without other work beside it.

        It is written in one form and compared with the run's model. Where a limit of latency was asked for, several
        forms are written and timed.
        """
        if self.fit.request.main_study:
            return 0.0
        machine, images, image_s, rounded = self.machine, self.fit.images.num_dev, self.image_s(recipe), 0.0
        if bits := recipe.rounded_to:  # for its predictions, and for its files
            again_s = self._packed_s(recipe, images_rounded_by(bits))
            rounded = self.rounding_s(recipe, [bits], min(MAX_REFERENCE_IMAGES, images)) + again_s
        forms, processes = (1, 1) if self.fit.request.max_latency is None else (_FORMS, _TIMINGS * (_FORMS + 1))
        written = forms * (2 * machine.start_s + 2 * min(images, _COMPARED) * image_s)
        return rounded + written + processes * (machine.process_s + _CALLS * image_s)

    def output_s(self, recipe: Recipe) -> float:
        """Return the same at the pace of this call's earlier ones, or else of its runs."""
        pace = self.fit.output_pace if self.fit.output_pace.planned_s else self.fit.pace
        return max(1.0, pace.factor) * self.written_s(recipe)

    def ending_s(self, recipe: Recipe, longer: float = 1.0) -> float:
        """Return the seconds of the last training, so many times longer than on folds, and of the output.

        At this call's pace, and without the test, which comes on top.
        """
        pace = max(_FASTEST, self.fit.pace.factor)
        return pace * self.last_s(recipe, self.last_steps(recipe, longer)) + self.output_s(recipe)

    def lengths(self, recipe: Recipe, left_s: float) -> tuple[int, float]:
        """Return the steps of a first model at a recipe's size that fit: on a fold, and times as many in the last one.

        By shares of the seconds that are left; 0: none do.

        Where folds leave no time for `LEAST_STEPS` on three of them, or on two, all of it goes to the last training.
        """
        fit, request = self.fit, self.fit.request
        given = request.steps_for(fit.num_train)

        def fitting(share: float) -> int:
            options = range(MOST_LAST_STEPS, LEAST_STEPS - 1, -_STEPS_APART)
            return given or first_that_fits(options, partial(self._first_s, recipe), share * left_s) or 0

        def folds_s(steps: int, folds: int) -> float:
            return makespan(folds * [self.run_s(replace(recipe, steps=steps))], fit.at_once)

        least = min(given or 1, LEAST_STEPS)  # schedules and moving ranks need some
        each = fit.fold_train_images / fit.num_train  # as many epochs
        last, fits = fitting(request.last_share), None
        if last and not fit.num_validation and request.from_run is None:
            most = min(max(least, round(last * min(each, _FOLD_STEPS))), MOST_STEPS)
            options = [most] if given else range(most, LEAST_STEPS - 1, -_STEPS_APART)
            limit_s = request.folds_share * left_s - self.machine.process_s
            fits = first_that_fits(options, partial(folds_s, folds=FEWEST_FOLDS), limit_s) or first_that_fits(
                options, partial(folds_s, folds=FEWEST_FOLDS - 1), limit_s
            )
        if not fits:
            last = fitting(self._share_without_folds)
        steps = fits or (max(least, round(last * each)) if last else 0)
        return steps, last / steps * each if steps else 1.0

    def least_minutes(self, recipe: Recipe) -> int:
        """Return the minutes, about, in which a recipe is trained for as few steps as are worth it."""
        least_s = self._first_s(recipe, LEAST_STEPS) / ((1 - SIZES_SHARE) * self._share_without_folds)
        looked_s = self.fit.file.seconds.get("look", 0.0)
        return max(math.ceil(self.fit.request.minutes) + 1, math.ceil((looked_s + least_s) / 60))

    def fits_memory(self, recipe: Recipe) -> bool:
        """Tell whether a step of a recipe fits half of the memory that is free."""
        request, shape = self.fit.request, self.shape(recipe)
        at_once = request.training_settings.get("micro_batch_size") or (
            1 if request.memory_limit else self.fit.batch_size
        )
        room = float(available_memory_bytes())
        if request.memory_limit is not None:
            room = min(room, bytes_of(request.memory_limit))
        return 4 * at_once * activation_values(shape, self._recomputed(shape)) <= _MEMORY_SHARE * room

    def _recomputed(self, shape: BackboneShape) -> int:
        blocks = len(shape.values_by_block)
        if self.fit.request.memory_limit is not None:  # at most
            return blocks - 1
        return blocks if self.fit.request.training_settings.get("activation_checkpointing") == "blocks" else 0

    # --- the test ---

    def _test_image_s(self, recipe: Recipe) -> float:
        """Return the seconds of a test image: of the probe and the model, and of it rounded, and as it was."""
        return (4 if recipe.rounded_to else 2) * self.image_s(recipe)

    def tested_images(self, recipe: Recipe) -> int:
        """Return of how many test images a model is read; nothing is chosen by it."""
        request, every = self.fit.request, self.fit.images.num_test
        if request.test_images is not None or request.smoke:
            return every
        return images_to_test(every, self._test_image_s(recipe), request.minutes)

    def test_line(self, recipe: Recipe, images: int) -> str:
        """Return how long a test of so many images takes."""
        every, about = self.fit.images.num_test, duration(images * self._test_image_s(recipe))
        of = f"{images:,} images" if images == every else f"{images:,} of {every:,} images, drawn at random,"
        return f"  testing {of} takes about {about}, on top of the minutes"
