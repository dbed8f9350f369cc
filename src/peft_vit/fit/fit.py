"""A fit under way: what was asked, the images, what was decided, what runs came to, and the time. Stages take it alone.

It can be killed at any moment. The same request continues: what was decided and tried is in tune.json, what runs came
to in their studies.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

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
)
from peft_vit.core.config import (
    LABEL_SMOOTHING,
    BackboneConfig,
    Compute,
    Flips,
    QuantizationType,
    WeightsSource,
    named_backbone,
    study_from_mapping,
)
from peft_vit.deploy.measures.timing import time_random
from peft_vit.deploy.page.formatting import joined
from peft_vit.deploy.post_training import logits_by_type
from peft_vit.fit.costs import LENGTHS, FitCosts
from peft_vit.fit.events import Emit, Message, StageBegan
from peft_vit.fit.intake import LabelledSet
from peft_vit.fit.outcomes import EveryRunFailedError, FoldResults, Only, Outcome, Outcomes, StudyRunner
from peft_vit.fit.recipe import Recipe, shared_training
from peft_vit.fit.regressions import Regression, regress
from peft_vit.fit.request import TuneRequest
from peft_vit.runs.costs.estimate import Throughput, product_rates
from peft_vit.runs.costs.time_limit import FEWEST_FOLDS, FOLDS, Limit, Pace
from peft_vit.runs.records.storage import STUDIES_FOLDER
from peft_vit.runs.scheduling.plan import plan_study
from peft_vit.runs.scheduling.profiling import measure_step, measure_throughput
from peft_vit.runs.this_machine.machine import choose_precision, cpu_count, resolve_device

TUNE_FILE = "tune.json"
SHARES = {"look": 0.02, "machine": 0.03, "sizes": 0.15}  # of the time; all else trains, and writes the model
TITLES = {
    "look": "your images",
    "machine": "time of a step",
    "sizes": "image sizes",
    "search": "recipes of LoRA",
    "folds": "the best on folds",
    "final": "last training",
    "output": "model and page",
}
MEMORY_OPTION = "--memory-limit"
_OVER = 0.1  # of the minutes, by which they may be exceeded
_FASTEST = 0.5  # of the planned time: what takes less may have been lucky
_BATCH = 32
_Of = TypeVar("_Of")


@dataclass(frozen=True)
class Environment:
    """How the outside world is asked; simulations have another one.

    Attributes:
        make_runner: gives what does the runs of a study, see `StudyRunner`.
        measure: see `measure_throughput`.
        time_export: see `time_random`.
        regress: see `regressions.regress`.
        round_run: gives logits of a run's test images with rounded weights, see `logits_by_type`.
        write_output: writes model, card and page; None: see `output.write_output`.
        clock: in seconds.
    """

    make_runner: Callable[[Fit], Callable[[Mapping[str, Any], Limit, Only | None], Outcomes]] = lambda fit: StudyRunner(
        fit.studies, fit.images.metric, fit.request.executor, fit.tell
    )
    measure: Callable[..., Throughput] = measure_throughput
    time_export: Callable[..., float] = time_random
    regress: Callable[[Mapping[str, Any], Path, bool], Regression] = regress
    round_run: Callable[[Path, Sequence[QuantizationType]], Mapping[QuantizationType, NDArray[np.float32]]] = (
        logits_by_type
    )
    write_output: Callable[..., Any] | None = None
    clock: Callable[[], float] = time.monotonic


class Decisions(BaseModel):
    """What does not follow from records alone, each decided once.

    Attributes:
        weights: where a model's come from, by its name.
        compute: how frozen layers multiply, which all runs share.
        flips: how training images are flipped, which all runs share.
        throughput: what runs take on this machine.
        compared_images: by how many images sizes are compared.
        latency_s: of an exported image, by model and size.
        memory: settings of training within the limit, by model and size.
        sizes: score of a regression, by `Recipe.place`.
        more_labels: by what share of its error twice as many labels lower a regression's, by place; None: unknown.
        tested_images: that a model is read on, by place.
        trained: names of what was trained for the last time, with its place.
    """

    model_config = ConfigDict(extra="forbid")

    weights: dict[str, str | None] = {}
    compute: Compute | None = None
    flips: Flips | None = None
    throughput: Throughput | None = None
    compared_images: int | None = None
    latency_s: dict[str, float] = {}
    memory: dict[str, dict[str, Any]] = {}
    sizes: dict[str, float] = {}
    more_labels: dict[str, Interval | None] = {}
    tested_images: dict[str, int] = {}
    trained: list[str] = []


class FitFile(BaseModel):
    """Content of tune.json.

    Attributes:
        asked: by option, which may not change.
        decisions: see there.
        recipes: all that were tried.
        seconds: of each stage, of all calls together.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[3] = 3
    asked: dict[str, Any]
    decisions: Decisions = Decisions()
    recipes: list[Recipe] = []
    seconds: dict[str, float] = {}


@dataclass
class Fit:
    """What all stages share.

    Attributes:
        request: what was asked for.
        emit: gets what happens, see `events`.
        limit: the time of this call.
        file: what is kept.
        environment: see there.
        begun: nothing stands in the way any more; before, nothing is kept, so that another limit can be asked for.
        pace: of this call's runs with steps.
        failed: recipes of which every run failed in this call.
    """

    request: TuneRequest
    emit: Emit
    limit: Limit
    file: FitFile
    environment: Environment = Environment()
    begun: bool = False
    pace: Pace = field(default_factory=Pace)
    failed: set[Recipe] = field(default_factory=set)

    @classmethod
    def opened(cls, request: TuneRequest, emit: Emit, environment: Environment | None = None) -> Fit:
        """Begin, or continue with what the output holds.

        Raises:
            UserError: if it was begun with something else asked for, with the difference; or if it can't be read.
        """
        environment = environment or Environment()
        limit = Limit(request.minutes, environment.clock(), environment.clock)
        place = request.output / TUNE_FILE
        kept = _read(place)
        if request.threads is None:
            threads = cpu_count() if kept is None else kept.asked.get("threads")
            request = request.model_copy(update={"threads": threads})
        asked = json.loads(json.dumps(request.kept()))
        if kept is None:
            return cls(request, emit, limit, FitFile(asked=asked), environment)
        for option, value in asked.items():
            if kept.asked.get(option) != value:
                raise UserError(
                    f"was begun with {_said(kept.asked.get(option))}, and {_said(value)} is asked for now; set it "
                    "back, or choose another --output",
                    file=place,
                    field=f"--{option}" if option != "images" else "IMAGES",
                )
        return cls(request, emit, limit, kept, environment, begun=True)

    # --- what is decided, and the time ---

    @property
    def decisions(self) -> Decisions:
        """Return what was decided."""
        return self.file.decisions

    @property
    def studies(self) -> Path:
        """Return the results directory of all studies."""
        return self.request.output / STUDIES_FOLDER

    def tell(self, text: str) -> None:
        """Say something."""
        self.emit(Message(text))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say that a stage begins, and count its seconds, however it ends."""
        self.emit(StageBegan(TITLES[name], self.limit.left_s))
        started, seconds = self.limit.clock(), self.file.seconds
        try:
            yield
        finally:
            seconds[name] = seconds.get(name, 0.0) + self.limit.clock() - started
            self.save()

    def share_s(self, stage: str) -> float:
        """Return the seconds that a stage before training has of a call's time."""
        return 60 * self.request.minutes * SHARES[stage]

    @property
    def training_s(self) -> float:
        """Return the seconds of a call that training has, with the output."""
        return 60 * self.request.minutes * (1 - sum(SHARES.values()))

    @property
    def over_s(self) -> float:
        """Return the seconds by which a call may exceed its minutes."""
        return 60 * self.request.minutes * _OVER

    def until(self, reserved_s: float) -> Limit:
        """Return this call's limit, so many seconds earlier."""
        return Limit(self.limit.minutes - reserved_s / 60, self.limit.started, self.limit.clock)

    def once(self, table: dict[str, _Of], key: str, decide: Callable[[], _Of]) -> _Of:
        """Return what stands in a table of `decisions`, or decide it now and keep it."""
        if key not in table:
            table[key] = decide()
            self.save()
        return table[key]

    def save(self) -> None:
        """Write tune.json, once nothing stands in the way."""
        if self.begun:
            write_whole(self.request.output / TUNE_FILE, (self.file.model_dump_json(indent=1) + "\n").encode())

    # --- images, models and what runs share ---

    images: LabelledSet = field(init=False)
    costs: FitCosts = field(init=False)
    frame: FoldResults = field(init=False)

    def begin(self, images: LabelledSet) -> None:
        """Take in the images that everything is fitted to."""
        self.images, self.frame = images, FoldResults(images.scores)
        self._run = self.environment.make_runner(self)

    @property
    def train_images(self) -> int:
        """Return how many images are trained on in a fold, about."""
        return self.images.num_dev - self.test_images

    @property
    def test_images(self) -> int:
        """Return how many images a fold tests, about."""
        return self.images.num_dev // FOLDS

    @property
    def batch_size(self) -> int:
        """Return the images of a step."""
        return min(_BATCH, max(1, self.train_images))

    @property
    def flips(self) -> Flips:
        """Return how training images are flipped: as regressions have chosen, left-right until then."""
        return self.decisions.flips or "horizontal"

    @cached_property
    def backbones(self) -> dict[str, BackboneConfig]:
        """Return the models that can be loaded, by name; others are reported.

        Raises:
            UserError: if none can be loaded, with the reason of the last.
        """
        found: dict[str, BackboneConfig] = {}
        fault: UserError | None = None
        for name in dict.fromkeys(self.request.models):
            try:
                backbone = named_backbone(name, self._weights(name))
                check_weights(backbone)
            except UserError as error:
                fault = error
                self.tell(f"  {name} can't be loaded: {error.message}")
            else:
                found[name] = backbone
        if not found:
            assert fault is not None
            own = self.request.weights not in (None, *get_args(WeightsSource))
            raise fault.about("--weights") if own else fault
        return found

    def _weights(self, model: str) -> str | None:
        backbone = named_backbone(model, self.request.weights)
        if self.request.weights is not None or backbone.library != "timm":
            return self.request.weights

        def source() -> str:
            found, line = default_weights_source(backbone.model)
            if line:
                self.tell(f"  {line}")
            return found

        return self.once(self.decisions.weights, model, source)

    @cached_property
    def compute(self) -> Compute:
        """Return how frozen layers multiply in all runs, decided once."""
        request, decisions = self.request, self.decisions
        if request.compute == "float" or decisions.compute is not None:
            return decisions.compute or "float"
        device = resolve_device(request.device)
        precision = choose_precision(request.precision, None, device).chosen
        name, backbone = next(iter(self.backbones.items()))
        shape = self.shape(name, 8 * size_step_of(architecture_of(backbone)))
        rates = product_rates(request.compute, shape, device, precision, request.threads or cpu_count())
        best = next(iter(rates))
        if best == "int8" and "float" in rates:
            gain = rates["int8"] / rates["float"]
            self.tell(f"  frozen layers multiply 8-bit integers, which is {gain:.1f} times as fast here")
        decisions.compute = best
        self.save()
        return best

    def shape(self, model: str, image_size: int) -> BackboneShape:
        """Return a backbone's shape."""
        return describe(self.backbones[model], image_size)

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
        request = self.request
        return {
            "name": name,
            "seeds": list(seeds),
            "threads": request.threads or cpu_count(),
            "precision": request.precision,
            "device": request.device,
            "backbone": self.backbones[recipe.model].model_dump(exclude_unset=True),
            "data": {
                **self.images.data(recipe.image_size),
                "path": str(self.images.inspection.path.absolute()),  # also for calls from another directory
                "folds": FOLDS,
                "validation_images": 0,
                "split_seed": request.seed,
                **({} if request.task is None else {"task": request.task}),
                **data,
            },
            "experiments": [{**one, "training": {**one["training"], "compute": self.compute}} for one in experiments],
            "measures": {"logits": True},
        }

    def experiment(self, recipe: Recipe) -> dict[str, Any]:
        """Return what trains a recipe, as a configuration holds it.

        Nothing validates: the rate rises and falls over all steps, to a peak of twice the plateau of `train`. On
        average it is as high, and as many steps learn as much.

        Raises:
            UserError: naming `--memory-limit`, if it does not train within that.
        """
        training = shared_training(self.batch_size, self.flips, self.images.metric)
        if not recipe.is_probe:
            training |= {"learning_rate": recipe.rate, "head_start": "probe", "steps": recipe.steps}
            training |= {"label_smoothing": LABEL_SMOOTHING} if self.images.scores.task.smooths else {}
        sections = recipe.sections(self.shape(recipe.model, recipe.image_size), self.request.max_adapter_bytes)
        experiment = {"name": recipe.name, "method": recipe.method, "training": training, **sections}
        if not recipe.is_probe and self.request.memory_limit is not None:
            training |= self._within_memory(recipe, experiment)
        return experiment

    def _within_memory(self, recipe: Recipe, experiment: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of training that keep within the limit of memory, measured on float LoRA, the most."""
        limit = {"memory_limit": self.request.memory_limit}
        limited = {**experiment, "training": {**experiment["training"], **limit}}

        def decide() -> dict[str, Any]:
            study = study_from_mapping(self.study("memory", recipe, [0], [limited]), file=self.request.images)
            measure = partial(measure_step, log=lambda text: self.tell(f"  {text}"))
            plan = plan_study(study, self.studies, file=None, measure_step=measure)
            for line in plan.memory:
                self.tell(f"  {line}")
            settings = {"activation_checkpointing", "recomputed_blocks", "micro_batch_size"}
            training = plan.study.experiments[0].training
            return {**limit, **training.model_dump(include=settings, exclude_none=True)}

        try:
            return self.once(self.decisions.memory, recipe.place, decide)
        except UserError as error:
            if error.field is None or not error.field.endswith("memory_limit"):
                raise
            raise UserError(error.message, field=MEMORY_OPTION) from None

    # --- runs on folds ---

    def load_earlier(self) -> None:
        """Read what earlier calls have done."""
        earlier = [recipe for recipe in self.file.recipes if recipe.model in self.backbones]
        for place in dict.fromkeys(recipe.place for recipe in earlier):
            alike = [recipe for recipe in earlier if recipe.place == place]
            self._take(alike, range(FOLDS * 2), self.limit, only=((), ()))
            for recipe in alike:
                for seed, outcome in self.frame.rows[recipe].items():
                    self._add_rounded(recipe, seed, outcome, self._kept_logits(outcome.folder))

    def run(self, recipes: Sequence[Recipe], seeds: Sequence[int], limit: Limit) -> None:
        """Do what is missing of some recipes' runs, all of a seed before the next, as far as there is time."""
        going = [recipe for recipe in recipes if recipe not in self.failed]
        for place in dict.fromkeys(recipe.place for recipe in going):
            alike = [recipe for recipe in going if recipe.place == place]
            if new := [recipe for recipe in alike if recipe not in self.file.recipes]:
                self.file.recipes += new
                self.save()
            done = {recipe: set(self.frame.seeds(recipe)) for recipe in alike}
            self._take(alike, seeds, limit)
            for recipe in alike:
                for seed in set(self.frame.seeds(recipe)) - done[recipe]:
                    if not recipe.is_probe:
                        self.pace.add(self.frame.rows[recipe][seed].seconds, self.costs.run_s(recipe))

    def _take(self, recipes: Sequence[Recipe], seeds: Sequence[int], limit: Limit, only: Only | None = None) -> None:
        first = recipes[0]
        try:
            done = self._run(
                self.study(f"folds-{first.place}", first, seeds, [*map(self.experiment, recipes)]), limit, only
            )
        except EveryRunFailedError as error:
            if first.is_probe:  # without it there is no answer
                raise
            self.tell(f"  {joined([one.title for one in recipes])}, left out: {error.message}")
            self.failed.update(recipes)
            done = {}
        for recipe in recipes:
            outcomes = {seed: done[recipe.name, seed] for seed in seeds if (recipe.name, seed) in done}
            self.frame.rows.setdefault(recipe, {}).update(outcomes)

    def run_alone(self, study: Mapping[str, Any], limit: Limit) -> Outcome:
        """Do the only run of a study, and return what it came to."""
        (outcome,) = self._run(study, limit, None).values()
        return outcome

    def seconds(self, recipe: Recipe, seeds: Sequence[int]) -> float:
        """Return what its missing runs will take: as those that are done, or as planned, at this call's pace."""
        missing, done = len(self.frame.missing(recipe, seeds)), self.frame.rows.get(recipe, {})
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
        left_s = self.limit.left_s + self.over_s
        return longer <= self.longest_done(recipe) or self.ending_s(recipe, longer) <= left_s

    def final_recipe(self, recipe: Recipe, longer: float) -> Recipe:
        """Return what the last training trains, so many times longer than on folds."""
        return replace(recipe.trained, steps=self.costs.last_steps(recipe, longer))

    def longest_done(self, recipe: Recipe, most: float = LENGTHS[0]) -> float:
        """Return how many times longer than on folds a last training was that is done, at most; 0: none is."""
        done = self.decisions.trained
        options = (longer for longer in LENGTHS if longer <= most)
        return next((longer for longer in options if self.final_recipe(recipe, longer).done_as in done), 0.0)

    def quantize(self, recipe: Recipe, bits: Sequence[QuantizationType], limit: Limit) -> None:
        """Predict with weights that are rounded after training, of all runs of a float recipe, while there is time."""
        for seed, outcome in sorted(self.frame.rows.get(recipe, {}).items()):
            if not any(self.frame.missing(recipe.rounded(one), [seed]) for one in bits):
                continue
            if limit.left_s < self.costs.rounding_s(recipe, bits) and seed >= FEWEST_FOLDS:
                return
            self._add_rounded(recipe, seed, outcome, self.rounded_logits(outcome.folder, bits))

    def _add_rounded(self, recipe: Recipe, seed: int, outcome: Outcome, by_type: Mapping[Any, Any]) -> None:
        for bits, logits in by_type.items():
            own = self.frame.rows.setdefault(recipe.rounded(bits), {})
            own[seed] = replace(outcome, logits=np.asarray(logits, dtype=np.float64))

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
        return self.request.output / "rounded_after" / f"{'-'.join(folder.parts[-3:])}.safetensors"

    def _kept_logits(self, folder: Path) -> dict[QuantizationType, Any]:
        with suppress(OSError, ValueError, SafetensorError):  # none, or damaged: they are computed again
            return dict(load(read_bytes(self._logits_file(folder), None)))
        return {}


def _read(place: Path) -> FitFile | None:
    try:
        with checked(place, "move it away, or choose another --output"):
            return FitFile.model_validate_json(read_bytes(place))
    except FileNotFoundError:
        return None


def _said(value: Any) -> str:
    return " ".join(map(str, value if isinstance(value, list) else [value])) if value not in (None, []) else "none"
