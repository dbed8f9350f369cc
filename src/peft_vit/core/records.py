"""What is kept of a run: RunSpec is what was asked, RunRecord what happened; and StudyFile, what a study planned.

Units are in the names: ``_s`` seconds, ``_bytes`` bytes, ``_steps`` optimiser steps. A step is counted from 1;
the history entry of step 0 is the state before training.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from peft_vit.base.errors import UserError
from peft_vit.core.config import (
    SEEDS,
    USUAL_TASK,
    BackboneConfig,
    BudgetUnit,
    DataConfig,
    Device,
    ExperimentConfig,
    Kind,
    MeasuresConfig,
    Name,
    Precision,
    QuantizationType,
    StudyConfig,
    TaskName,
)

# Experiment and seed, which is also the run's folder below the study's: nothing that leads out of it.
RUN_NAME = r"[a-z0-9][a-z0-9_\-]{0,63}/seed_[0-9]{1,10}"
# What is left in float: matrices are those that no setting quantized, other are tokens and layer scales.
Role = Literal["attention", "mlp", "other"]  # of a matrix in its block
FloatPart = Literal["patch embedding", "position embedding", "norms", "biases", "matrices", "head", "other"]
Failure = Literal["killed", "out_of_memory", "diverged", "error", "io", "disk_full"]

FEWEST_HELD_OUT = 20  # images, of which 95 % are at least one less than all

_Share = Annotated[float, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_Seconds = Annotated[FiniteFloat, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]
_Number = Annotated[int, Field(ge=1)]
# Of each image: the number of its class; or of several labels or numbers a row, None where one is not known.
_Answers = list[_Count] | list[list[FiniteFloat | None]]
_RunName = Annotated[str, StringConstraints(pattern=f"^{RUN_NAME}$")]


# Left out of the file where there is none: older records, and digests of outcomes, have no such field.
_UNLESS_GIVEN: Any = Field(default=None, exclude_if=lambda value: value is None)
_UNLESS_ANY: Any = Field(default={}, exclude_if=lambda values: not values)
_IF_MEASURED: Any = Field(default=math.nan, exclude_if=lambda value: value is not None and math.isnan(value))


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class _Finite(_Value):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class RunSpec(_Value):
    """One run, fixed before it starts: an experiment's configuration and a seed."""

    study: Name  # these two and the experiment's name are the run's folder
    seed: int = Field(ge=0, lt=SEEDS.stop)
    experiment: ExperimentConfig
    backbone: BackboneConfig
    data: DataConfig
    device: Device
    precision: Precision
    threads: int
    smoke: bool = False
    measures: MeasuresConfig = MeasuresConfig()

    @property
    def task(self) -> TaskName:
        """Return what is learned; a plan has written down what it found."""
        return self.data.task or USUAL_TASK

    @property
    def multiplies_integers(self) -> bool:
        """Return whether frozen layers multiply 8-bit integers in training."""
        return self.experiment.training.compute == "int8"

    @property
    def name(self) -> str:
        """Return ``experiment/seed_k``, which is also the run's folder below its study's."""
        return f"{self.experiment.name}/seed_{self.seed}"

    @property
    def run_id(self) -> str:
        """Return ``study/experiment/seed_k``, which is also the run's folder below the results directory."""
        return f"{self.study}/{self.name}"

    def digest(self) -> str:
        """Return the SHA-256 of everything that the run depends on.

        What has its default is left out, so that settings that come later change no digest.
        """
        content = self.model_dump(mode="json", exclude_defaults=True)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class StudyFile(BaseModel):
    """Content of study.json.

    `runs` are all that were ever planned, `skipped` those among them that the last command left out. A smoke study's
    configuration is the compressed one. `seeds_added`: seeds that a command added when results were there, so that
    their number may follow from these.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    smoke: bool
    data_sha256: str
    runs: tuple[_RunName, ...]
    skipped: tuple[_RunName, ...] = ()
    configuration: StudyConfig
    seeds_added: tuple[int, ...] = ()


class Metrics(_Value):
    """Quality of predictions on one split; see `evaluation.metrics` for the definitions."""

    model_config = ConfigDict(allow_inf_nan=False)

    n: int = Field(ge=1)
    accuracy: _Share = _IF_MEASURED  # these: of one class an image, left out else
    balanced_accuracy: _Share = _IF_MEASURED
    auroc: _Share | None = _IF_MEASURED  # of two classes, both present
    nll: float  # nats, mean; of numbers half of the mean squared error, in standard deviations of training's
    ece: float = _IF_MEASURED  # 15 equal-width bins
    more: dict[str, float] = _UNLESS_ANY  # of other tasks, by name

    def value(self, name: str) -> float:
        """Return a measure by its name."""
        return self.more[name] if name in self.more else float(getattr(self, name))


class SiteInfo(_Value):
    """One weight matrix (or one slice of a fused one, or a fused one) that carries an adapter."""

    name: str  # blocks.3.attn.query
    block: int
    matrix: Kind
    role: Role
    in_features: int
    out_features: int


class StepRow(_Value):
    """One optimiser step; of a probe the fit at one strength, whose learning rate is 0: no step was taken at one."""

    step: int
    loss: float  # task loss, without penalties
    learning_rate: float
    gradient_norm: float  # before clipping
    seconds: float
    penalties: dict[str, float] = {}  # by name, already weighted
    quantized_share: float | None = None  # 0: float weights, 1: quantized weights only


class Evaluation(_Value):
    """Validation after an epoch. Only deployable states (budget met, weights fully quantized) may be chosen."""

    step: int
    epoch: int
    deployable: bool
    metrics: Metrics


class HeadFit(_Value):
    """A linear probe: how the head was fitted to features of the frozen backbone, see `training.linear_probe`."""

    l2: tuple[float, ...]  # strengths that were tried
    validation: tuple[Metrics, ...]  # of each; none without validation images
    chosen_l2: float
    gradient_norm: float  # of the penalized loss at the chosen fit: how far it has converged
    images: int  # rows that were fitted, flips included

    @property
    def chosen(self) -> Metrics | None:
        """Return what the chosen strength reached on validation; None without validation images."""
        return self.validation[self.l2.index(self.chosen_l2)] if self.validation else None


class ProbeTest(_Value):
    """What the probe that training started from predicts of the test images, which are those of `predictions`."""

    metrics: Metrics
    predicted: _Answers
    thresholds: tuple[_Share, ...] = Field(default=(), exclude_if=lambda kept: not kept)  # of labels, see `Decision`


class RankEntry(_Value):
    """Ranks from this step on."""

    step: int
    budget: int | None  # allowed at this step, in the unit; None: fixed ranks
    ranks: dict[str, int]  # by site
    unit: BudgetUnit = "ranks"  # of budget and cost
    cost: int | None = None  # what the ranks cost in the unit; None in older records, whose unit is ranks
    gave_way: dict[str, int] = {}  # of older records: by site, triplets that grew one decision before they went

    @property
    def spent(self) -> int:
        """Return what the ranks cost, in the budget's unit."""
        return sum(self.ranks.values()) if self.cost is None else self.cost


class ImportanceEntry(_Value):
    """Scores at a step at which ranks were decided; the mean per triplet of each site."""

    step: int
    scores: dict[str, float]  # by site


class ProbeEntry(_Value):
    """A step in which temporary triplets scored the sites without rank; they are not parameters and counted as none."""

    step: int
    sites: list[str]  # that had no rank, and got their scores so
    values: int  # numbers that the temporary triplets of all sites held during the step


class BitsEntry(_Value):
    """Stored bits per weight from this step on, by adapted module (scales and offsets included)."""

    step: int
    bits_per_weight: dict[str, float]


class BitAllocation(_Value):
    """Number formats, and on request ranks, that were chosen before training under a budget of bytes."""

    images: int  # calibration images, of the training split
    budget_bytes: int
    spent_bytes: int  # codes, scales and offsets; with ranks also the adapters
    types: dict[str, QuantizationType]  # by module
    ranks: dict[str, int] | None  # by site; None: not chosen here
    losses: dict[str, dict[str, float]]  # by module and type, predicted rise of the loss, nats
    predicted_rise: float  # of the chosen types, nats
    predicted_gain: float  # of the chosen ranks, nats
    gap: float  # by how much a better choice could be better at most, nats; about 0 unless the search was stopped


class LayerSize(_Value):
    """A quantized weight matrix as it is kept."""

    weights: int
    codes_bytes: int
    scales_bytes: int
    offsets_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Return what codes, scales and offsets take together."""
        return self.codes_bytes + self.scales_bytes + self.offsets_bytes


class ModelSize(_Value):
    """The low-bit model, counted on the live one; adapters left out, since merging moves them into the offsets."""

    weights: int  # values of the float model, head included
    layers: dict[str, LayerSize]  # what is quantized, by module
    float_bytes: dict[FloatPart, int]  # what is left in float
    merging_bytes: int  # of offsets that merging will give to layers that have none
    live_bytes: int  # distinct storages of the layers and what is left in float
    file_bytes: int  # the same, written as safetensors


class QuantizationSummary(_Value):
    """What quantization did to the frozen weights, at the end of the run."""

    relative_error: dict[str, float]  # ||W - Wq|| / ||W|| by module
    bits_per_weight: float  # over the quantized layers, scales and offsets included
    quantized_bytes: int
    balance: list[dict[str, float]]  # rows with "step" and the measures of the balance check
    size: ModelSize | None = None  # None in older records


class Registration(_Value):
    """The sentences that stood written down before the run began; a verdict on them is registered, not exploratory."""

    sha256: str  # of the registry file
    hypotheses: dict[str, str]  # id -> SHA-256 of what the registry says under it


class AdapterRemoval(_Value):
    """What the chosen weights lose on validation images if the update of one site, or of a group of them, is left out.

    The head stays. Differences are without minus with: a positive loss rise is harm.
    """

    images: int
    loss: float  # with every update; nats, mean
    accuracy: _Share
    site_loss_rise: dict[str, float]  # by site that has rank, nats
    group_loss_rise: dict[str, float]  # attention, mlp, all; groups without a site are left out
    group_accuracy: dict[str, float]  # by the same groups: the accuracy that is left


class Predictions(_Value):
    """What was predicted of each test image, in the split's order; from the one reading of test."""

    images: list[_Count]  # positions in the data set
    labels: _Answers
    predicted: _Answers  # of several labels the probability of each
    probability: list[_Share]  # of the predicted class; empty where there is not one
    # Names of somebody's own files, relative to their folder; left out for published sets, and in older records.
    files: list[str] | None = _UNLESS_GIVEN
    label_probability: list[_Share] | None = _UNLESS_GIVEN  # of folds: low where the label may be wrong
    # (images, classes); with measures.logits. Left out where they were not asked for: outcomes have digests.
    logits: list[list[FiniteFloat]] | None = _UNLESS_GIVEN

    @model_validator(mode="after")
    def _one_of_each_an_image(self) -> Self:
        rows = any(isinstance(label, list) for label in self.labels)
        columns = (self.images, self.labels, self.predicted, self.images if rows else self.probability)
        if len(set(map(len, columns))) > 1:
            raise ValueError("images, labels, predicted and probability differ in length")
        if self.files is not None and len(self.files) != len(self.images):
            raise ValueError("files: expected a name for each image")
        if self.logits is not None and (len(self.logits) != len(self.images) or len(set(map(len, self.logits))) > 1):
            raise ValueError("logits: expected a row for each image, and as many columns in each")
        return self


class Calibrated(_Finite):
    """How far a model can be believed: a temperature, and thresholds of prediction sets.

    Found on images of which the models that predicted them were not trained; see `tasks.classification`.
    """

    images: int = Field(ge=0)  # 0: it is the usual temperature
    temperature: _Positive  # probabilities are softmax(logits / temperature)
    coverages: tuple[_Share, ...]  # rising
    thresholds: tuple[_Share, ...]  # of each coverage: a class with 1 - p up to it is in the set

    @model_validator(mode="after")
    def _one_a_coverage(self) -> Self:
        if len(self.coverages) != len(self.thresholds) or list(self.coverages) != sorted(set(self.coverages)):
            raise ValueError("expected rising coverages and a threshold for each")
        return self

    def threshold(self, coverage: float) -> float:
        """Return the threshold of the least stored coverage that is not below one.

        Raises:
            UserError: if there is none, or all are above it.
        """
        if not self.coverages:
            raise UserError(
                f"the model was calibrated on {self.images} images, too few for any; leave it out", field="coverage"
            )
        lowest, highest = self.coverages[0], self.coverages[-1]
        if not lowest - 1e-9 <= coverage <= highest + 1e-9:  # also NaN
            raise UserError(
                f"expected a share of images from {lowest:g} to {highest:g}, for which the model has thresholds; got "
                f"{coverage:g}",
                field="coverage",
            )
        return next(t for stored, t in zip(self.coverages, self.thresholds, strict=True) if stored >= coverage - 1e-9)


class Decision(_Finite):
    """What the outputs of a model of several labels, or of numbers, mean; found on images that were not trained on.

    Of labels: the probability of each is 1 / (1 + exp(-output / temperature)), and one is reported from its threshold
    on. Those from `set_thresholds` on hold, on average, a share `coverage` of an image's labels. Of numbers: each is
    center + spread * output, and `half_widths` times its scale on both sides hold the true one in such a share of
    images.
    """

    images: _Count  # that it was found on; 0: none validated
    temperature: _Positive = 1.0
    thresholds: tuple[_Share, ...] = ()  # by label
    center: tuple[float, ...] = ()  # by number
    spread: tuple[_Positive, ...] = ()
    coverages: tuple[_Share, ...] = ()  # rising
    set_thresholds: tuple[_Share, ...] = ()  # by coverage
    half_widths: tuple[tuple[float, ...], ...] = ()  # by coverage and number, in the number's scale
    scale_at: tuple[tuple[float, ...], ...] = ()  # by number: predictions, rising, see `statistics.ErrorScale`
    scale: tuple[tuple[float, ...], ...] = ()  # by number: how large errors are there as a rule, in the number's unit

    @model_validator(mode="after")
    def _one_a_coverage(self) -> Self:
        stored = self.set_thresholds or self.half_widths
        if len(self.coverages) != len(stored) or list(self.coverages) != sorted(set(self.coverages)):
            raise ValueError("expected rising coverages, and thresholds or half widths for each")
        return self

    def threshold(self, coverage: float) -> tuple[float, ...]:
        """Return the half widths of the least stored coverage that is not below one, or the threshold of its sets.

        Raises:
            UserError: if there is none.
        """
        stored = next((k for k, known in enumerate(self.coverages) if known >= coverage - 1e-9), None)
        if stored is None:
            ends = f"{self.coverages[0]:g} to {self.coverages[-1]:g}" if self.coverages else "none: leave it out"
            raise UserError(f"the model has thresholds of these shares: {ends}", field="coverage")
        return (self.set_thresholds[stored],) if self.set_thresholds else self.half_widths[stored]


class Unlike(_Finite):
    """When an image is unlike all that a model was trained on; see `statistics.Neighbours`."""

    images: int = Field(ge=FEWEST_HELD_OUT)  # held out, of which 95 % are not farther than the threshold
    threshold: Annotated[float, Field(ge=0)]  # of the distance to the nearest training image: above it, it is


class TestedCalibration(_Value):
    """What came of calibrated probabilities, prediction sets and the flag "unlike your images" on test images."""

    nll: FiniteFloat  # nats, mean
    probability: list[_Share]  # calibrated, of the predicted class of each image, as in `predictions`
    # By coverage that was asked for: share of images whose set holds the true class, and mean number of classes in a
    # set; of labels the mean share of an image's labels; of numbers the share of intervals, and their mean width.
    covered: dict[float, _Share] = {}
    set_size: dict[float, Annotated[float, Field(ge=0)]] = {}
    # `covered` on images of folds, each by what the other folds say; empty where there are none.
    covered_on_folds: dict[float, _Share] = _UNLESS_ANY
    unlike: _Count | None = None  # images that were flagged: false alarms; None: there is no threshold


class ParameterCounts(_Value):
    """Trainable parameters, head included; counted on the live model."""

    initial: _Count
    final: _Count
    peak: _Count
    head: _Count
    backbone_total: _Count  # of the float model, head excluded


class ByteCounts(_Value):
    """Bytes of live tensor storages, and of the saved file."""

    frozen_bytes: _Count
    trainable_bytes: _Count
    optimizer_bytes: _Count
    adapter_file_bytes: _Count  # without packed weights, which count as frozen
    in_4_bits_bytes: _Count | None = _UNLESS_GIVEN  # of the file of a float model that is rounded to 4 bits

    @property
    def stored_bytes(self) -> int:
        """Return what a trained model takes to keep: everything frozen, and the adapter file."""
        return self.frozen_bytes + self.adapter_file_bytes


class Provenance(_Value):
    """What a reader needs to repeat the run, and to see that runs were paired."""

    packages: dict[str, str]
    python: str
    platform: str
    processor: str
    cpu_count: int
    device: str
    threads: int  # of each process
    git_hash: str | None
    git_dirty: bool | None
    weights_name: str
    weights_sha256: str | None  # None: random weights
    config_sha256: str | None = None  # of the files that say what a model of transformers is built from, if it has some
    random_weights: bool
    data_sha256: str
    split_sha256: str
    head_init_sha256: str
    data_order_sha256: str
    start_sha256: str | None = None  # of the PEFT adapter that training went on from
    weights_licence: str | None = None  # None in older records
    integer_bits: Literal[7, 8] | None = None  # of weights with `compute: int8`; 7 where products of 8 are not exact
    # What multiplied them. Then training alone does so, and what is measured is measured in float; None in older
    # records, whose measures are those of the forward pass in integers.
    product: Literal["int_mm", "qlinear"] | None = _UNLESS_GIVEN
    devices: int = Field(default=1, exclude_if=lambda devices: devices == 1)  # processes that trained together
    nodes: int = Field(default=1, exclude_if=lambda nodes: nodes == 1)  # machines that they ran on


class RunRecord(_Value):
    """What happened in one run. Outcomes never go back into the configuration."""

    schema_version: Literal[1] = 1
    spec: RunSpec
    spec_digest: str
    status: Literal["done", "failed"]
    error: str | None = None  # one line, for failed runs
    failure: Failure | None = None  # the kind of error; None in older records
    traceback: str | None = None
    started_at: str  # of the first attempt, ISO 8601, UTC
    seconds: _Seconds  # of all attempts, as far as a checkpoint or this attempt has counted them
    attempts: int = 1  # starts that it took
    warnings: list[str] = []  # of settings without effect, weights too small for float16, checkpoints
    # Everything below is None for a run that failed.
    provenance: Provenance | None = None
    class_names: list[str] = []
    split_sizes: dict[str, int] = {}  # train, validation, test
    class_counts: dict[str, list[int]] = _UNLESS_ANY  # images of each class, by split; absent in older records
    # Why, by the names of files that an inspection of the images left out; absent where it left out none.
    left_out: dict[str, str] = _UNLESS_ANY
    sites: list[SiteInfo] = []
    steps: list[StepRow] = []
    evaluations: list[Evaluation] = []
    head_fit: HeadFit | None = None  # of a probe, and of training that starts from one
    probe_test: ProbeTest | None = None  # of training that starts from a probe; None in older records
    rank_history: list[RankEntry] = []
    importance_history: list[ImportanceEntry] = []
    probe_history: list[ProbeEntry] = []
    fisher_check: dict[str, Any] | None = None  # in older records
    bits_history: list[BitsEntry] = []
    bit_allocation: BitAllocation | None = None  # with adaptive_bits
    quantization: QuantizationSummary | None = None
    parameters: ParameterCounts | None = None
    bytes: ByteCounts | None = None
    seconds_per_step: _Seconds | None = None  # median
    # Seconds spent by purpose, e.g. "scoring", "reallocation", "evaluation"; none counts twice. In older records, and
    # with the PEFT library's AdaLoRA, "allocation" holds scoring and reallocation, in older ones the penalty too.
    overhead_s: dict[str, _Seconds] = {}
    # Resident memory of the process, largest during the run: what a run needs room for. It depends on what the process
    # did before, so methods are compared by what the run added to it. None of this in older records.
    peak_memory_bytes: _Count | None = None
    own_memory_bytes: _Count | None = None
    chosen_step: int | None = None
    majority_accuracy: dict[str, _Share] = {}  # share of the most frequent class: validation if there is some, test
    validation: Metrics | None = None  # at the chosen step; None without validation images
    test: Metrics | None = None  # read once, at the chosen step
    predictions: Predictions | None = None  # None in older records
    # From validation images, which training has not fitted; None without these, and in older records.
    calibrated: Calibrated | None = _UNLESS_GIVEN
    decision: Decision | None = _UNLESS_GIVEN  # of other tasks
    unlike: Unlike | None = _UNLESS_GIVEN  # with measures.features
    features_sha256: str | None = _UNLESS_GIVEN  # of FEATURES_FILE
    tested_calibration: TestedCalibration | None = _UNLESS_GIVEN
    on_folds: Predictions | None = _UNLESS_GIVEN  # of `train`: by like trainings, of images that each left out
    removal: AdapterRemoval | None = None  # with measures.removal_images
    latency_s: dict[int, _Seconds] = {}  # of a forward pass, median, by batch size; with measures.latency_batches
    registration: Registration | None = None  # of kept studies; None in newer records
    adapter_sha256: str | None = None
    optimizer_sha256: str | None = None  # of its state after the last step; None in older records

    @property
    def task(self) -> TaskName:
        """Return what was learned."""
        return self.spec.task

    @property
    def is_measured_in_integers(self) -> bool:
        """Return whether test and validation went through products of integers, as they did in older records.

        What is delivered computes in float.
        """
        return self.spec.multiplies_integers and self.provenance is not None and self.provenance.product is None

    @field_validator("steps", "evaluations", "rank_history", "importance_history", "bits_history")
    @classmethod
    def _in_order(cls, rows: list[Any], info: ValidationInfo) -> list[Any]:
        for before, row in pairwise(rows):
            if before.step >= row.step if info.field_name in ("steps", "evaluations") else before == row:
                raise ValueError(f"step {row.step} occurs twice or out of order")
        if info.field_name == "rank_history" and len(units := sorted({entry.unit for entry in rows})) > 1:
            raise ValueError(f"budgets in different units ({', '.join(units)})")
        return rows


class BenchRow(_Finite):
    """What `peft-vit bench` measured of one model at one batch size with so many threads.

    Times are those of a call on the whole batch.
    """

    file: str  # as it was named; a folder, perhaps
    format: str  # onnx, openvino, safetensors or peft
    bytes: _Number  # of all its files
    run: str | None  # study/experiment/seed_k, as its card says; None of what was made for comparison
    threads: _Number
    batch: _Number
    calls: _Number  # that were timed, in all processes
    median_s: _Positive
    low_s: _Positive  # first and third quartile of the calls
    high_s: _Positive
    processor_s: Annotated[float, Field(ge=0)]  # median of what all threads worked; 0 if the clock is too coarse
    ratio: _Positive  # of medians, over the fastest float32 model at this batch size with these threads
    over: str  # that model's file
    images_per_s: _Positive
    processor: str
    runtime: str  # with its version


def history_rows(
    sites: Sequence[SiteInfo],
    ranks: Sequence[RankEntry],
    importance: Sequence[ImportanceEntry],
    probes: Sequence[ProbeEntry],
) -> list[dict[str, Any]]:
    """Return ranks and scores as a tidy table: one row a step and site, plain values, in the sites' order.

    Steps are those at which ranks or scores were recorded. `rank` and `budget` hold from that step on; a site that an
    entry leaves out has rank 0. `score` is None where there is none: at step 0, and with fixed ranks. `probed` says
    whether it came from a probe at this step, not from the site's own triplets.
    """
    entries = {entry.step: entry for entry in ranks}
    scores = {entry.step: entry.scores for entry in importance}
    probed = {(entry.step, name) for entry in probes for name in entry.sites}
    named = {name for entry in ranks for name in entry.ranks}
    rows: list[dict[str, Any]] = []
    present: RankEntry | None = None
    for step in sorted({*entries, *scores}):
        present = entries.get(step, present)
        budget = None if present is None else present.budget
        rows += [
            {
                "step": step,
                "site": site.name,
                "block": site.block,
                "matrix": site.matrix,
                "in_features": site.in_features,
                "out_features": site.out_features,
                "score": scores.get(step, {}).get(site.name),
                "probed": (step, site.name) in probed,
                "rank": None if present is None else present.ranks.get(site.name, 0),
                "budget": budget,
                "budget_unit": None if present is None or budget is None else present.unit,
            }
            for site in sites
            if site.name in named
        ]
    return rows
