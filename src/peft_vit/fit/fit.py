"""A fit under way: what was asked, the images, what was decided, what runs came to, and the time. Stages take it alone.

It can be killed at any moment. The same request continues: what was decided and tried is in a file of its folder, what
runs came to in their studies.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from peft_vit.base.errors import UserError, checked
from peft_vit.base.files import make_folder, read_bytes, write_whole
from peft_vit.base.statistics import Interval
from peft_vit.core.backbones import (
    BackboneShape,
    architecture_of,
    check_weights,
    default_weights_source,
    describe,
    size_step_of,
    supports_head_blocks,
)
from peft_vit.core.config import (
    AUGMENTATION_OF_FLIPS,
    LABEL_SMOOTHING,
    LIGHT_AUGMENTATION,
    METHOD_KINDS,
    USUAL_TASK,
    Augment,
    BackboneConfig,
    Compute,
    Flips,
    HeadBlocks,
    QuantizationType,
    Resize,
    WeightsSource,
    named_backbone,
    study_from_mapping,
)
from peft_vit.core.tasks import TASKS
from peft_vit.deploy.export import logits_by_type
from peft_vit.deploy.measures.timing import time_random
from peft_vit.deploy.page.formatting import joined
from peft_vit.fit.costs import FitCosts
from peft_vit.fit.intake import LabelledSet
from peft_vit.fit.outcomes import EveryRunFailedError, FoldResults, Outcomes, Runner, StudyRunner
from peft_vit.fit.recipe import Recipe
from peft_vit.fit.request import Emit, FitRequest, StageBegan
from peft_vit.runs.costs.estimate import Throughput, product_throughputs
from peft_vit.runs.costs.time_limit import FEWEST_FOLDS, FOLDS, Limit, Pace, makespan, validate_every
from peft_vit.runs.executors import runs_at_once
from peft_vit.runs.records.progress import StudyLock
from peft_vit.runs.records.storage import STUDIES_FOLDER
from peft_vit.runs.scheduling.plan import plan_study
from peft_vit.runs.scheduling.profiling import measure_step
from peft_vit.runs.this_machine.machine import choose_precision, cpu_count, resolve_device

if TYPE_CHECKING:
    from peft_vit.fit.sizes import Regression

TITLES = {
    "look": "your images",
    "sizes": "image sizes",
    "probe": "a linear probe",
    "first": "a first model",
    "folds": "how good it is",
    "search": "other recipes",
    "final": "last training",
    "output": "model and page",
}
MEMORY_OPTION = "--memory-limit"
FEWEST_VALIDATION, _MOST_VALIDATION = 200, 500  # images; fewer tell too little: folds of all of them tell more
# Steps without a gain: a few hundred validation images scatter by some points from one validation to the next, so 50
# steps end before LoRA has learned what it can (seen in a pilot on Fashion-MNIST).
_PATIENCE_STEPS = 150
_OVER = 0.1  # of the minutes, by which they may be exceeded
_Of = TypeVar("_Of")


@dataclass(frozen=True)
class Environment:
    """How the outside world is asked; simulations have another one.

    Attributes:
        make_runner: gives what does the runs of a study, see `StudyRunner`.
        time_export: see `time_random`.
        regress: None: see `sizes.regress`.
        round_run: gives logits of a run's test images with rounded weights, see `logits_by_type`.
        write_output: writes model, card and page of a tuning; None: see `output.write_output`.
        throughput: of the machine; None: it follows from large products.
        clock: in seconds.
    """

    make_runner: Callable[[Fit], Runner] = StudyRunner
    time_export: Callable[..., float] = time_random
    regress: Callable[[Mapping[str, Any], Path, bool], Regression] | None = None
    round_run: Callable[[Path, Sequence[QuantizationType]], Mapping[QuantizationType, NDArray[np.float32]]] = (
        logits_by_type
    )
    write_output: Callable[..., Any] | None = None
    throughput: Throughput | None = None
    clock: Callable[[], float] = time.monotonic


class Decisions(BaseModel):
    """What does not follow from records alone, each decided once.

    Attributes:
        weights: where a model's come from, by its name.
        compute: how frozen layers multiply, which all runs share.
        flips: how training images are flipped, which all runs share.
        head_blocks: of how many of the last blocks heads read the class tokens, likewise; None: of the last alone.
        resize: how images become square, likewise; None: it was not decided, they are squashed.
        compared_images: by how many images sizes are compared.
        latency_s: of an exported image, by model and size.
        memory: settings of training within the limit, by model and size.
        sizes: score of a regression, by `Recipe.place`.
        more_labels: by what share of its error twice as many labels lower a regression's, by place; None: unknown.
        tested_images: that a model is read on, by place.
        trained_images: that the last training has, by place, where not all fit.
        last_s: that the steps of a last training may take, by experiment.
        first: the recipe that is trained first, and how many times longer than on folds.
        trained: what was trained for the last time, and how many times longer than on folds.
        delivered: likewise, what was written.
    """

    model_config = ConfigDict(extra="forbid")

    weights: dict[str, str | None] = {}
    compute: Compute | None = None
    flips: Flips | None = None
    head_blocks: HeadBlocks | None = None
    resize: Resize | None = None
    compared_images: int | None = None
    latency_s: dict[str, float] = {}
    memory: dict[str, dict[str, Any]] = {}
    sizes: dict[str, float] = {}
    more_labels: dict[str, Interval | None] = {}
    tested_images: dict[str, int] = {}
    trained_images: dict[str, int] = {}
    last_s: dict[str, float] = {}
    first: tuple[Recipe, float] | None = None
    trained: list[tuple[Recipe, float]] = []
    delivered: tuple[Recipe, float] | None = None


class FitFile(BaseModel):
    """Content of tune.json, or of fit.json in a call of `train`.

    Attributes:
        asked: by option, which may not change.
        threads: of all runs.
        decisions: see there.
        recipes: all that were tried.
        seconds: of each stage, of all calls together.
        finished: the most minutes of a call of `tune` that came to its end.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[4] = 4
    asked: dict[str, Any] = {}
    threads: int = 1
    decisions: Decisions = Decisions()
    recipes: list[Recipe] = []
    seconds: dict[str, float] = {}
    finished: float = 0.0

    @classmethod
    def read(cls, place: Path) -> FitFile | None:
        """Read it; None: there is none.

        Raises:
            UserError: if it can't be read.
        """
        try:
            with checked(place, "move it away, or choose another --output"):
                return cls.model_validate_json(read_bytes(place))
        except FileNotFoundError:
            return None


class Fit:
    """What all stages share.

    Attributes:
        request: what was asked for.
        emit: gets what happens, see `events`.
        environment: see there.
        limit: the time of this call, from when it was started; now, if nobody says when.
        folder: of everything that is written; the output, until it is known.
        lock: on the folder, of a call of `train`.
        file: what is kept.
        begun: nothing stands in the way any more; before, nothing is kept, so that another limit can be asked for.
        pace: of this call's runs with steps.
        image_paces: of this call's passes of images, by `Recipe.place`.
        fit_pace: of this call's fits of regressions.
        output_pace: of this call's models and pages that were written.
        failed: recipes of which every run failed in this call.
        opened: what is closed at the end of the call.
        images: that everything is fitted to, once they were looked at.
        frame: what recipes came to on folds of these.
        carry_out: does the runs of a study.
    """

    images: LabelledSet
    frame: FoldResults
    carry_out: Runner

    def __init__(
        self, request: FitRequest, emit: Emit, environment: Environment | None = None, started: float | None = None
    ) -> None:
        self.request, self.emit, self.environment = request, emit, environment or Environment()
        clock = self.environment.clock
        self.limit = Limit(request.minutes, clock() if started is None else started, clock)
        self.folder = request.output
        self.lock: StudyLock | None = None
        self.file, self.begun = FitFile(threads=request.threads or cpu_count()), False
        self.pace, self.fit_pace, self.output_pace = Pace(), Pace(), Pace()
        self.image_paces = dict[str, Pace]()
        self.failed = set[Recipe]()
        self.opened = ExitStack()
        self._counted_until = self.limit.started

    def enter(self, folder: Path, lock: StudyLock | None = None) -> None:
        """Begin in a folder, or continue with what it holds.

        Raises:
            UserError: if it was begun with something else asked for, with the difference; or if it can't be read.
        """
        self.folder, self.lock, asked = folder, lock, self.request.unchangeable
        kept = FitFile.read(self.file_path)
        if kept is None:
            self.file.asked = dict(asked)
            return
        begun_with = {**kept.asked, "threads": kept.threads}
        for option, value in asked.items():
            if (before := begun_with.get(option)) != value:
                reason = f"was begun with {_said(before)}, and {_said(value)} is asked for now; set it back, or choose"
                field = "IMAGES" if option == "images" else f"--{option}"
                raise UserError(f"{reason} another --output", file=self.file_path, field=field)
        self.file, self.begun = kept, True

    # --- what is decided, and the time ---

    @property
    def file_path(self) -> Path:
        """Return where it is kept."""
        return self.folder / self.request.fit_file

    @property
    def decisions(self) -> Decisions:
        """Return what was decided."""
        return self.file.decisions

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say that a stage begins, and count the seconds since the last one, or the call, however it ends."""
        self.emit(StageBegan(TITLES[name], self.limit.left_s))
        started, seconds = self._counted_until, self.file.seconds
        try:
            yield
        finally:
            self._counted_until = self.limit.clock()
            seconds[name] = seconds.get(name, 0.0) + self._counted_until - started
            self.save()

    @property
    def over_s(self) -> float:
        """Return the seconds by which a call may exceed its minutes."""
        return 60 * self.request.minutes * _OVER

    def until(self, reserved_s: float) -> Limit:
        """Return this call's limit, so many seconds earlier."""
        return replace(self.limit, minutes=self.limit.minutes - reserved_s / 60)

    def once(self, table: dict[str, _Of], key: str, decide: Callable[[], _Of]) -> _Of:
        """Return what stands in a table of `decisions`, or decide it now and keep it."""
        if key not in table:
            table[key] = decide()
            self.save()
        return table[key]

    def save(self) -> None:
        """Write the file, once nothing stands in the way."""
        if self.begun:
            write_whole(self.file_path, (self.file.model_dump_json(indent=1) + "\n").encode())

    # --- images, models and what runs share ---

    def begin(self, images: LabelledSet) -> None:
        """Take in the images that everything is fitted to."""
        self.images, self.frame = images, FoldResults(images.scores)
        self.carry_out = self.environment.make_runner(self)

    @cached_property
    def num_validation(self) -> int:
        """Return how many images validate the last training; 0: folds of all of them tell how good it is."""
        request, images = self.request, self.images
        if not request.validates or (request.group is not None and not request.smoke):
            return 0
        fifth = max(len(images.index.class_names), min(images.num_dev // 5, _MOST_VALIDATION))
        return fifth if fifth >= FEWEST_VALIDATION or request.shots is not None or request.smoke else 0

    @cached_property
    def num_train(self) -> int:
        """Return how many images the last training trains on."""
        if self.request.shots is not None:
            return self.request.shots * len(self.images.index.class_names)
        return max(1, self.images.num_dev - self.num_validation)

    @property
    def fold_test_images(self) -> int:
        """Return how many images a fold tests, about."""
        return max(1, self.images.num_dev // FOLDS)

    @property
    def fold_train_images(self) -> int:
        """Return how many images are trained on in a fold, about."""
        return max(1, min(self.num_train, self.images.num_dev - self.fold_test_images))

    @property
    def batch_size(self) -> int:
        """Return the images of a step."""
        return min(self.request.batch_size, self.fold_train_images)

    @property
    def flips(self) -> Flips:
        """Return how training images are flipped: as regressions have chosen, left-right until then."""
        return "none" if self.request.augment == "none" else self.decisions.flips or "horizontal"

    @property
    def usual_augment(self) -> Augment:
        """Return how training images are changed where nobody says how."""
        return "light" if self.images.task.smooths else "flip"

    @cached_property
    def backbones(self) -> dict[str, BackboneConfig]:
        """Return the models that can be loaded, by name; others are reported.

        Raises:
            UserError: if none can be loaded, with the reason of the last.
        """
        found, names = dict[str, BackboneConfig](), list(dict.fromkeys(self.request.models))
        for name in names:
            try:
                backbone, weights = named_backbone(name, self.request.weights), self.request.weights
                if weights is None and backbone.library == "timm":
                    decide = partial(self._default_weights, backbone.model)
                    weights = self.once(self.decisions.weights, name, decide)
                backbone = named_backbone(name, weights)
                check_weights(backbone)
                found[name] = backbone
            except UserError as error:
                if name == names[-1] and not found:
                    own = self.request.weights not in (None, *get_args(WeightsSource))
                    raise error.about("--weights") if own else error from None
                self.emit(f"  {name} can't be loaded: {error.message}")
        return found

    def _default_weights(self, model: str) -> str:
        source, line = default_weights_source(model)
        if line:
            self.emit(f"  {line}")
        return source

    @cached_property
    def _rates(self) -> dict[Compute, float]:
        """Return multiply-adds per second by the ways to multiply in frozen layers, the chosen one first."""
        request, (name, backbone) = self.request, next(iter(self.backbones.items()))
        device = resolve_device(request.device)
        precision = choose_precision(request.precision, None, device).chosen
        may = METHOD_KINDS[request.method].without_integers is None
        asked = request.compute if may and not (request.smoke and request.compute == "auto") else "float"
        shape = self.shape(name, 8 * size_step_of(architecture_of(backbone)))
        return product_throughputs(self.decisions.compute or asked, shape, device, precision, self.file.threads)

    @property
    def compute(self) -> Compute:
        """Return how frozen layers multiply in all runs, decided once."""
        if self.decisions.compute is None and self.request.compute != "float":
            self.decisions.compute = next(iter(self._rates))
            if self.decisions.compute == "int8" and "float" in self._rates:
                gain = self._rates["int8"] / self._rates["float"]
                self.emit(f"  frozen layers multiply 8-bit integers, which is {gain:.1f} times as fast here")
            self.save()
        return self.decisions.compute or "float"

    @cached_property
    def costs(self) -> FitCosts:
        """Return what everything takes here, from what large products take; runs correct it as they end."""
        return FitCosts(self, self.environment.throughput or Throughput.estimated(self._rates[self.compute]))

    def backbone(self, model: str) -> BackboneConfig:
        """Return a model's configuration, whose head reads as many blocks as was decided, if it can."""
        backbone, given = self.backbones[model], self.request.head_blocks
        blocks = given or self.decisions.head_blocks or 1
        if blocks == 1 or (given is None and not supports_head_blocks(architecture_of(backbone))):
            return backbone
        return backbone.model_copy(update={"head_blocks": blocks})

    def shape(self, model: str, image_size: int) -> BackboneShape:
        """Return a backbone's shape."""
        return describe(self.backbone(model), image_size)

    # --- studies ---

    @cached_property
    def studies(self) -> Path:
        """Return the results directory of all studies but the main one of a call of `train`."""
        return self.folder if self.request.main_study else self.folder / STUDIES_FOLDER

    def results_dir(self, study: str) -> Path:
        """Return the results directory of a study."""
        return self.folder.parent if self.request.main_study and study == self.folder.name else self.studies

    def name_of(self, recipe: Recipe) -> str:
        """Return the name of the experiment that trains a recipe."""
        request = self.request
        return request.experiment or recipe.name if recipe.method == request.method else recipe.name

    def study(
        self, name: str, recipe: Recipe, seeds: Sequence[int], experiments: Sequence[Mapping[str, Any]], **data: Any
    ) -> dict[str, Any]:
        """Return a study on the folds: seed s tests on fold s % 5 of repetition s // 5. Nothing validates.

        Args:
            name: of the study.
            recipe: says model and size.
            seeds: of its runs.
            experiments: as a configuration holds them.
            data: beside what all have; `folds: null` trains on all that is not for the test, which tests.
        """
        request, images = self.request, self.images
        own = {**images.data(recipe.image_size), "folds": FOLDS, "validation_images": 0}
        own |= {"resize": request.resize or self.decisions.resize, "split_seed": request.split_seed}
        if request.task is not None or images.task is not TASKS[USUAL_TASK]:  # also of made-up images
            own["task"] = images.task.name
        if request.shots is not None:
            own |= {"shots_per_class": request.shots, "train_subset": "per_seed"}
        if request.smoke or (request.test_images is not None and images.inspection.holdout is not None):
            own["test_images"] = request.test_images or images.num_test  # of made-up images, or of the own test split
        return {
            "name": name,
            "seeds": list(seeds),
            "threads": self.file.threads,
            "precision": request.precision,
            "device": request.device,
            **({"execution": {"devices": request.devices}} if request.devices > 1 else {}),
            "backbone": self.backbone(recipe.model).model_dump(exclude_unset=True),
            "data": own | data,
            "experiments": list(experiments),
            "measures": {"logits": True},
        }

    def training(self, flips: Flips | None = None) -> dict[str, Any]:
        """Return what every section `training` says, a probe's too."""
        metric = self.images.metric
        changes = AUGMENTATION_OF_FLIPS[flips or self.flips]
        return {
            "batch_size": self.request.batch_size,
            "augmentation": [change.model_dump(mode="json") for change in changes],
            "metric": metric.name,
            "class_weights": self.request.class_weights or ("balanced" if metric.equal_classes else "none"),
            "compute": self.compute,
        }

    def experiment(self, recipe: Recipe, *, last: bool = False) -> dict[str, Any]:
        """Return what trains a recipe, as a configuration holds it.

        Where nothing validates, the rate rises and falls over all steps, to a peak of twice the plateau that it has
        where training ends when validation stops improving. On average it is as high, and as many steps learn as much.

        Args:
            recipe: of it.
            last: it is trained for the last time, and images may validate it.

        Raises:
            UserError: naming `--memory-limit`, if it does not train within that.
        """
        request, training = self.request, self.training()
        if not recipe.is_probe:
            training |= {"learning_rate": recipe.rate, "steps": recipe.steps}
            training["head_start"] = "probe" if request.init_adapter is None else "random"  # an adapter brings its head
            if (request.augment or recipe.augment or self.usual_augment) == "light":
                training["augmentation"] += [change.model_dump(mode="json") for change in LIGHT_AUGMENTATION]
            training |= {"label_smoothing": LABEL_SMOOTHING} if self.images.task.smooths else {}
            training |= request.training_settings
            if "epochs" in training:
                del training["steps"]
            if last and self.num_validation:
                training["keep"] = "last"
                if "epochs" not in training:
                    every = min(validate_every(self.num_validation, request.batch_size), recipe.steps)
                    training |= {"validate_every": every, "patience": max(5, -(-_PATIENCE_STEPS // every))}
                    training["schedule"] = "warmup_stable_decay"
                    training["learning_rate"] = recipe.rate / 2 if request.learning_rate is None else recipe.rate
        if request.start is not None and not recipe.is_probe:
            sections: dict[str, Any] = {"lora": {"start": str(request.start)}}
        else:
            sections = recipe.sections(self.shape(recipe.model, recipe.image_size), **request.adapter_options)
        experiment = {"name": self.name_of(recipe), "method": recipe.method, "training": training, **sections}
        if not recipe.is_probe and request.memory_limit is not None and not request.smoke:
            training |= self._within_memory(recipe, experiment)
        return experiment

    def _within_memory(self, recipe: Recipe, experiment: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of training that keep within the limit of memory, measured on this method."""

        def decide() -> dict[str, Any]:
            limited = {**experiment, "training": experiment["training"] | {"memory_limit": self.request.memory_limit}}
            study = study_from_mapping(self.study("memory", recipe, [0], [limited]), file=self.request.images)
            measure = partial(measure_step, log=lambda text: self.emit(f"  {text}"))
            plan = plan_study(study, self.studies, file=None, measure_step=measure)
            for line in plan.memory:
                self.emit(f"  {line}")
            settings = {"memory_limit", "activation_checkpointing", "recomputed_blocks", "micro_batch_size"}
            return plan.study.experiments[0].training.model_dump(include=settings, exclude_none=True)

        try:
            return self.once(self.decisions.memory, recipe.place, decide)
        except UserError as error:
            if error.field is None or not error.field.endswith("memory_limit"):
                raise
            raise UserError(error.message, field=MEMORY_OPTION) from None

    # --- runs on folds ---

    def load_earlier(self) -> None:
        """Read what earlier calls have done."""
        recipes = [recipe for recipe in self.file.recipes if recipe.model in self.backbones]
        self.run(recipes, range(FOLDS * 2), None)
        for recipe in recipes:
            for seed, outcome in self.frame.rows[recipe].items():
                self.frame.add_forms(recipe, seed, self._kept_logits(outcome.folder))

    def run(self, recipes: Sequence[Recipe], seeds: Sequence[int], limit: Limit | None) -> None:
        """Do what is missing of some recipes' runs, all of a seed before the next, as far as there is time.

        Args:
            recipes: of which some may have failed before: they are left out.
            seeds: of the runs.
            limit: None: nothing is done, what is there is read.
        """
        going = [recipe for recipe in recipes if recipe not in self.failed]
        for place in dict.fromkeys(recipe.place for recipe in going):
            alike = [recipe for recipe in going if recipe.place == place]
            first, done = alike[0], Outcomes()
            if new := [recipe for recipe in alike if recipe not in self.file.recipes]:
                self.file.recipes += new
                self.save()
            study = self.study(f"folds-{place}", first, seeds, [*map(self.experiment, alike)])
            try:
                done = self.carry_out(study, limit)
            except EveryRunFailedError as error:
                if first.is_probe and not self.request.main_study:  # without it there is no answer
                    raise
                self.emit(f"  {joined([one.title for one in alike])}, left out: {error.message}")
                self.failed.update(alike)
            for recipe in alike:
                name, known = self.name_of(recipe), self.frame.rows.setdefault(recipe, {})
                for seed in (seed for seed in seeds if (name, seed) in done):
                    outcome = done[name, seed]
                    if limit is not None and seed not in known and not recipe.is_probe:
                        self.pace.add(outcome.seconds, self.costs.run_s(recipe))
                    known[seed] = outcome

    @cached_property
    def _runs_at_once(self) -> Callable[[], int]:
        places = runs_at_once(self.request.executor, self.file.threads, self.request.devices)
        return self.opened.enter_context(places)

    @property
    def at_once(self) -> int:
        """Return how many runs go at a time where they are carried out."""
        return self._runs_at_once()

    def seconds(self, recipe: Recipe, seeds: Sequence[int]) -> float:
        """Return what its missing runs will take: as those that are done, or as planned, at this call's pace."""
        missing, done = len(self.frame.missing(recipe, seeds)), self.frame.rows.get(recipe, {})
        if not missing:
            return 0.0
        taken = [outcome.seconds for outcome in done.values()]
        planned = self.costs.run_s(recipe) * (1.0 if recipe.is_probe else self.pace.factor)
        each_s = statistics.median(taken) if taken else planned
        return self.costs.machine.process_s + makespan(missing * [each_s], self.at_once)

    def ends_in_time(self, recipe: Recipe, longer: float = 1.0) -> bool:
        """Tell whether a recipe's last training is done, or fits what is left, with the output and a tenth more."""
        left_s = self.limit.left_s + self.over_s
        return longer <= self.longest_done(recipe) or self.costs.ending_s(recipe, longer) <= left_s

    def longest_done(self, recipe: Recipe) -> float:
        """Return how many times longer than on folds the longest last training was that is done; 0: none is."""
        return max((longer for own, longer in self.decisions.trained if own == recipe.trained), default=0.0)

    def quantize(self, recipe: Recipe, bits: Sequence[QuantizationType], limit: Limit) -> None:
        """Predict with weights that are rounded after training, of all runs of a float recipe, while there is time."""
        for seed, outcome in sorted(self.frame.rows.get(recipe, {}).items()):
            if not any(self.frame.missing(recipe.rounded(one), [seed]) for one in bits):
                continue
            if limit.left_s < self.costs.rounding_s(recipe, bits) and seed >= FEWEST_FOLDS:
                return
            self.frame.add_forms(recipe, seed, self.rounded_logits(outcome.folder, bits))

    def rounded_logits(self, folder: Path, bits: Sequence[QuantizationType]) -> dict[QuantizationType, Any]:
        """Return what a run's model says of its test images with rounded weights; each is computed once, and kept."""
        logits = self._kept_logits(folder)
        if missing := [one for one in bits if one not in logits]:
            computed = self.environment.round_run(folder, missing)
            logits |= {one: np.ascontiguousarray(values) for one, values in computed.items()}
            if folder.is_dir():
                make_folder(self._logits_file(folder).parent)
                write_whole(self._logits_file(folder), save(logits))
        return {one: logits[one] for one in bits}

    def _logits_file(self, folder: Path) -> Path:
        return self.folder / "rounded_after" / f"{'-'.join(folder.parts[-3:])}.safetensors"

    def _kept_logits(self, folder: Path) -> dict[QuantizationType, Any]:
        with suppress(OSError, ValueError, SafetensorError):  # none, or damaged: they are computed again
            return dict(load(read_bytes(self._logits_file(folder), None)))
        return {}


def _said(value: Any) -> str:
    return " ".join(map(str, value if isinstance(value, list) else [value])) if value not in (None, []) else "none"
