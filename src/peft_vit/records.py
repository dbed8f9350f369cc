"""RunSpec is what was asked, RunRecord is what happened. Plain values, read and written without torch.

A results directory holds one study per folder::

    DIR/<study>/<experiment>/seed_<k>/record.json          this file's RunRecord
    DIR/<study>/<experiment>/seed_<k>/adapter.safetensors  what was trained: adapter and head

Units stand in the names: ``_s`` seconds, ``_bytes`` bytes, ``_steps`` optimiser steps. A step is counted from 1;
the history entry of step 0 is the state before training.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from peft_vit.config import (
    BackboneConfig,
    BudgetUnit,
    DataConfig,
    Device,
    ExperimentConfig,
    Precision,
    QuantizationType,
    SiteMatrix,
)
from peft_vit.errors import UserError

SCHEMA_VERSION: Literal[1] = 1
RECORD_FILE = "record.json"
ADAPTER_FILE = "adapter.safetensors"
# What is left in float: matrices are those that no setting quantized, other are tokens and layer scales.
FloatPart = Literal["patch embedding", "position embedding", "norms", "biases", "matrices", "head", "other"]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class RunSpec(_Value):
    """One run, fixed before it starts: an experiment's configuration and a seed."""

    study: str
    seed: int
    experiment: ExperimentConfig
    backbone: BackboneConfig
    data: DataConfig
    device: Device
    precision: Precision
    threads: int
    smoke: bool = False

    @property
    def run_id(self) -> str:
        """Return ``study/experiment/seed_k``, which is also the run's folder below the results directory."""
        return f"{self.study}/{self.experiment.name}/seed_{self.seed}"

    def digest(self) -> str:
        """Return the SHA-256 of everything that the run depends on."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Metrics(_Value):
    """Quality of predictions on one split; see `evaluation.metrics` for the definitions."""

    n: int
    accuracy: float
    balanced_accuracy: float
    auroc: float | None  # binary problems with both classes present
    nll: float  # nats, mean
    ece: float  # 15 equal-width bins


class SiteInfo(_Value):
    """One weight matrix (or one slice of a fused one, or a fused one) that carries an adapter."""

    name: str  # blocks.3.attn.query
    block: int
    matrix: SiteMatrix
    in_features: int
    out_features: int


class StepRow(_Value):
    """One optimiser step."""

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


class RankEntry(_Value):
    """Ranks from this step on."""

    step: int
    budget: int | None  # allowed at this step, in the unit; None: fixed ranks
    ranks: dict[str, int]  # by site
    unit: BudgetUnit = "ranks"  # of budget and cost
    cost: int | None = None  # what the ranks cost in the unit; None in older records, whose unit is ranks
    gave_way: dict[str, int] = {}  # by site, triplets that grew at the decision before and went all the same

    @property
    def spent(self) -> int:
        """Return what the ranks cost, in the budget's unit."""
        return sum(self.ranks.values()) if self.cost is None else self.cost


class ImportanceEntry(_Value):
    """Scores at a step at which ranks were decided; the mean per triplet of each site."""

    step: int
    scores: dict[str, float]  # by site


class ProbeEntry(_Value):
    """A step in which temporary triplets scored the sites without rank; they are no parameters and counted as none."""

    step: int
    sites: list[str]  # that had no rank, and got their scores so
    values: int  # numbers that the temporary triplets of all sites held during the step


class BitsEntry(_Value):
    """Stored bits per weight from this step on, by adapted module (scales and offsets included)."""

    step: int
    bits_per_weight: dict[str, float]


class FisherCheck(_Value):
    """Minibatch against per-sample empirical Fisher of the sites, on training images at the chosen weights."""

    images: int
    minibatch: dict[str, float]  # by site, mean per triplet
    per_sample: dict[str, float]
    rho: float | None  # Spearman's, over the sites; None if one of both is constant


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


class ParameterCounts(_Value):
    """Trainable parameters, head included; counted on the live model."""

    initial: int
    final: int
    peak: int
    head: int
    backbone_total: int  # of the float model, head excluded


class ByteCounts(_Value):
    """Bytes of live tensor storages, and of the saved file."""

    frozen_bytes: int
    trainable_bytes: int
    optimizer_bytes: int
    adapter_file_bytes: int


class Provenance(_Value):
    """What a reader needs to repeat the run, and to see that runs were paired."""

    packages: dict[str, str]
    python: str
    platform: str
    processor: str
    cpu_count: int
    device: str
    threads: int
    git_hash: str | None
    git_dirty: bool | None
    weights_name: str
    weights_sha256: str | None  # None: random weights
    random_weights: bool
    data_sha256: str
    split_sha256: str
    head_init_sha256: str
    data_order_sha256: str
    start_sha256: str | None = None  # of the PEFT adapter that training went on from


class RunRecord(_Value):
    """What happened in one run. Outcomes never go back into the configuration."""

    schema_version: Literal[1] = SCHEMA_VERSION
    spec: RunSpec
    spec_digest: str
    status: Literal["done", "failed"]
    error: str | None = None  # one line, for failed runs
    traceback: str | None = None
    started_at: str  # ISO 8601, UTC
    seconds: float
    warnings: list[str] = []  # settings that had no effect, said loudly
    # Everything below is None for a run that failed.
    provenance: Provenance | None = None
    class_names: list[str] = []
    split_sizes: dict[str, int] = {}  # train, validation, test
    sites: list[SiteInfo] = []
    steps: list[StepRow] = []
    evaluations: list[Evaluation] = []
    rank_history: list[RankEntry] = []
    importance_history: list[ImportanceEntry] = []
    probe_history: list[ProbeEntry] = []
    fisher_check: FisherCheck | None = None  # with importance_metric: fisher
    bits_history: list[BitsEntry] = []
    bit_allocation: BitAllocation | None = None  # with adaptive_bits
    quantization: QuantizationSummary | None = None
    parameters: ParameterCounts | None = None
    bytes: ByteCounts | None = None
    seconds_per_step: float | None = None  # median
    overhead_s: dict[str, float] = {}  # seconds spent by purpose, e.g. "allocation", "evaluation"
    peak_memory_bytes: int | None = None  # resident memory of the process, largest during the run
    chosen_step: int | None = None
    majority_accuracy: dict[str, float] = {}  # share of the most frequent class: validation, test
    validation: Metrics | None = None  # at the chosen step
    test: Metrics | None = None  # read once, at the chosen step
    adapter_sha256: str | None = None


def history_rows(
    sites: Sequence[SiteInfo], ranks: Sequence[RankEntry], importance: Sequence[ImportanceEntry],
    probes: Sequence[ProbeEntry],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return ranks and scores as a tidy table: one row a step and site, plain values, in the sites' order.

    Steps are those at which ranks or scores were recorded. `rank` and `budget` hold from that step on; a site that an
    entry leaves out has rank 0. `score` is None where there is none: at step 0, and with fixed ranks. `probed` tells
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
        rows += [
            {
                "step": step, "site": site.name, "block": site.block, "matrix": site.matrix,
                "in_features": site.in_features, "out_features": site.out_features,
                "score": scores.get(step, {}).get(site.name),
                "probed": (step, site.name) in probed,
                "rank": None if present is None else present.ranks.get(site.name, 0),
                "budget": None if present is None else present.budget,
                "budget_unit": None if present is None or present.budget is None else present.unit,
            }
            for site in sites
            if site.name in named
        ]  # fmt: skip
    return rows


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def run_folder(results_dir: Path, spec: RunSpec) -> Path:
    """Return the folder that holds a run's files."""
    return results_dir / spec.run_id


def write_record(results_dir: Path, record: RunRecord) -> Path:
    """Write a run's record and return its path."""
    file = run_folder(results_dir, record.spec) / RECORD_FILE
    write_atomically(file, (record.model_dump_json(indent=1) + "\n").encode())
    return file


def read_record(file: Path) -> RunRecord:
    """Read one record.

    Raises:
        UserError: if the file is not a record of this schema; names the file and the field.
    """
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"expected {SCHEMA_VERSION}, got {version!r}; move it away and run the study again",
                file=file, field="schema_version",
            )  # fmt: skip
        return RunRecord.model_validate(_tuples(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{first['msg']}; move it away and run the study again", file=file, field=field) from None
    except (OSError, ValueError) as error:
        problem = f"is not a readable record ({error}); move it away and run the study again"
        raise UserError(problem, file=file) from None


_RENAMED = {"initial_rank_budget": "initial_budget"}  # settings whose names in older records were others


def _tuples(data: Any) -> Any:
    """Turn lists below `spec` into tuples, since the configuration's models are strict, and old names into new ones."""
    if isinstance(data, dict) and isinstance(data.get("spec"), dict):
        return {**data, "spec": _deep_tuples(data["spec"])}
    return data


def _deep_tuples(data: Any) -> Any:
    if isinstance(data, dict):
        return {_RENAMED.get(key, key): _deep_tuples(value) for key, value in data.items()}
    if isinstance(data, list):
        return tuple(_deep_tuples(value) for value in data)
    return data


def read_records(results_dir: Path) -> Iterator[RunRecord]:
    """Yield every record below a directory, in the order of their paths.

    Raises:
        UserError: if the directory does not exist or holds no record.
    """
    is_folder = os.path.isdir(results_dir)  # unlike Path.is_dir, also False for an impossible name
    files = sorted(results_dir.rglob(RECORD_FILE)) if is_folder else []
    if not files:
        problem = "holds no record.json" if is_folder else "does not exist"
        raise UserError(f"{problem}; run a study first, e.g. `peft-vit run CONFIG`", file=results_dir)
    for file in files:
        yield read_record(file)
