"""A study of one run on somebody's own folder of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from peft_vit.config import SECTIONS, Method, StudyConfig, TrainingConfig, WeightsSource, study_from_mapping
from peft_vit.data import open_index
from peft_vit.errors import UserError
from peft_vit.training import steps_per_epoch

# Others 1e-3; where the quickstart's baselines learn. PEFT's AdaLoRA needs about ten times LoRA's rate.
_LEARNING_RATE = {"linear": 3e-3, "full": 5e-5, "peft_adalora": 1e-2}
_SECTION: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8},
    "peft_lora": {"rank": 8},
    "qa_lora": {
        "quantization_bits": 4, "quantization_type": "nf4", "quantization_schedule": "constant",
        "gradient_scaling_factor": 1.0, "use_group_quantization": True, "rank": 8,
    },
}  # fmt: skip


@dataclass(frozen=True)
class OwnImages:
    """What `peft-vit train` or `import` was asked for; `weights` is a source of weights or the path of a file."""

    folder: Path
    method: str
    shots: int | None
    model: str
    weights: str
    image_size: int
    epochs: int
    learning_rate: float | None
    seed: int
    threads: int
    start: Path | None = None  # of method lora: a PEFT adapter to go on from


def study_of(asked: OwnImages) -> StudyConfig:
    """Return the study: a fifth of the images validates, a fifth tests (or the folder's own test split).

    Raises:
        UserError: if the folder can't be read or holds too few images.
    """
    data: dict[str, Any] = {
        "dataset": "image-folder", "path": str(asked.folder), "image_size": asked.image_size,
        "validation_images": 2, "test_images": 2,
    }  # fmt: skip
    index = open_index(_study(asked, data, {"name": "check", "method": "linear"}).data)
    images, classes = len(index.labels), len(index.class_names)
    fifth = max(classes, images // 5)
    tested = fifth if index.official_test is None else int(index.official_test.sum())
    data |= {"validation_images": fifth, "test_images": fifth if index.official_test is None else None}
    if asked.shots is not None:
        data["shots_per_class"] = asked.shots
    train_images = images - fifth - tested if asked.shots is None else asked.shots * classes
    batch_size = TrainingConfig.model_fields["batch_size"].default
    steps = asked.epochs * steps_per_epoch(max(train_images, 1), batch_size)
    experiment: dict[str, Any] = {"name": asked.method, "method": asked.method}
    if asked.start is not None:
        experiment |= {"name": "imported", "lora": {"start": str(asked.start)}}
    else:
        sections = SECTIONS.get(cast(Method, asked.method), ())
        experiment |= {section: _section(section, asked.method, steps) for section in sections}
    return _study(asked, data, experiment)


def _study(asked: OwnImages, data: dict[str, Any], experiment: dict[str, Any]) -> StudyConfig:
    named = set(get_args(WeightsSource)) - {"file"}
    source = {"weights": asked.weights} if asked.weights in named else {"weights": "file", "file": asked.weights}
    rate = _LEARNING_RATE.get(asked.method, 1e-3) if asked.learning_rate is None else asked.learning_rate
    mapping = {
        "name": "own-images", "seeds": [asked.seed], "threads": asked.threads, "precision": "auto",
        "backbone": {"model": asked.model, **source}, "data": data,
        "experiments": [{**experiment, "training": {"epochs": asked.epochs, "learning_rate": rate}}],
    }  # fmt: skip
    return study_from_mapping(mapping, file=asked.folder)


def _section(section: str, method: str, steps: int) -> dict[str, Any]:
    if section in ("adalora", "peft_adalora"):
        return _adaptive(section, steps)
    if method == "qa_adalora":  # adalora decides the ranks
        return {name: value for name, value in _SECTION[section].items() if name != "rank"}
    return _SECTION[section]


def _adaptive(section: str, steps: int) -> dict[str, Any]:
    """Return mean rank 4 on the 72 sites of a 12-block model, or PEFT's 12 -> 8.

    Ours is what docs/adaptive_ranks.md found to keep up with LoRA at its learning rate: decided in the first sixth of
    the steps, by magnitude. PEFT's moves ranks in the middle of the run.
    """
    if steps < 8:
        raise UserError(f"{steps} steps are too few to move ranks; raise it", field="--epochs")
    if section == "peft_adalora":
        return {"update_frequency": max(1, steps // 8), "warmup_steps": max(1, steps // 4)}
    twelfth = max(1, steps // 12)
    return {
        "total_rank_budget": 288, "allocation_strategy": "global", "importance_metric": "magnitude",
        "update_frequency": twelfth, "warmup_steps": twelfth, "final_steps": steps - 2 * twelfth,
    }  # fmt: skip
