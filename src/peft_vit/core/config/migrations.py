"""What records and study.json files of earlier versions say, in today's words; what no longer exists is refused.

A setting that went is in `GONE`, a choice of one that stayed in `GONE_CHOICES`. A file in which such a setting has
the value at which it did nothing, or one of kept results, is read without it; any other is refused in one line that
names the version.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from peft_vit.base.errors import UserError
from peft_vit.core.config import AUGMENTATION_OF_FLIPS

LAST_VERSION_WITH_ALL = "0.2.0"


@dataclass(frozen=True)
class Gone:
    """A setting of an experiment that this version does not have.

    Attributes:
        default: the value at which it did nothing.
        digested_after: the field behind which it stood in what `RunSpec.digest` hashes, so that digests of runs from
            before stay; None: digests left it out at its default.
        kept: values that did something, and that kept results have. Such a run can be read and compared, and is none
            that this version would make: the digest in its record is another than its specification has.
    """

    default: Any
    digested_after: str | None = None
    kept: tuple[Any, ...] = ()


GONE: dict[tuple[str, ...], Gone] = {  # by its place below an experiment
    ("adalora", "prune"): Gone("physical", digested_after="lambda_gain", kept=("reversible",)),
    ("training", "activation_storage"): Gone("exact"),
    ("qa_lora", "start"): Gone("zero"),
    ("qa_lora", "loftq_iterations"): Gone(1),
    ("qa_lora", "use_double_quant"): Gone(False),
}
GONE_CHOICES: dict[tuple[str, ...], frozenset[str]] = {  # likewise, the values that went, single or in a list
    ("lora", "ranks", "rule"): frozenset({"eva", "spt", "gora"}),
    ("adalora", "importance_metric"): frozenset({"singular_value", "relative_magnitude"}),
    ("qa_lora", "quantization_type"): frozenset({"nf3"}),
    ("qa_lora", "adaptive_bits", "types"): frozenset({"nf3"}),
}
# Keys of a study's configuration on which no result depends: dropped.
GONE_OF_STUDIES: tuple[str, ...] = ("hypotheses",)
_SIZES = ("image_size", "train_images", "shots_per_class", "validation_images", "test_images")


def migrated(content: Any) -> Any:
    """Return a run's specification, or a study's configuration, as this version says it.

    What is not of the form that any version had is returned as it is: reading it names the fault.

    Args:
        content: plain values.

    Raises:
        UserError: with the field, if it asks for what this version does not have.
    """
    if not isinstance(content, dict):
        return content
    content = copy.deepcopy({key: value for key, value in content.items() if key not in GONE_OF_STUDIES})
    experiments = [content.get("experiment"), *_list(content.get("experiments"))]
    for experiment in experiments:
        for (*sections, setting), gone in GONE.items():
            section = _section(experiment, *sections)
            if setting in section and (value := section.pop(setting)) not in (gone.default, *gone.kept):
                raise _refusal(value, "experiment", *sections, setting)
        for (*sections, setting), choices in GONE_CHOICES.items():
            value = _section(experiment, *sections).get(setting)
            for choice in _list(value) or [value]:
                if isinstance(choice, str) and choice in choices:
                    raise _refusal(choice, "experiment", *sections, setting)
    flips = _section(content, "data").get("flips")
    if isinstance(flips, str) and flips in AUGMENTATION_OF_FLIPS:
        del content["data"]["flips"]
        for training in (_section(experiment, "training") for experiment in experiments):
            training.setdefault("augmentation", [change.model_dump() for change in AUGMENTATION_OF_FLIPS[flips]])
    return content


def migrated_study(study: Any) -> Any:
    """Return the content of a study.json likewise."""
    if not isinstance(study, dict):
        return study
    study = dict(study)
    if "configuration" in study:
        study["configuration"] = migrated(study["configuration"])
    if isinstance(limited := study.pop("limited", None), dict):
        data, requested = (_section(study, "configuration", "data"), _section(limited, "asked", "data"))
        if any(data.get(size) != requested.get(size) for size in _SIZES):
            raise UserError(
                "the study was made on smaller or fewer images than it asked for, which this version no longer "
                f"does; peft-vit {LAST_VERSION_WITH_ALL} continues with it",
                field="limited",
            )
    return study


def with_digested(experiment: dict[str, Any]) -> dict[str, Any]:
    """Add to an experiment the settings that went and that digests contain, where they stood, at their defaults."""
    for (*sections, setting), gone in GONE.items():
        section = _section(experiment, *sections)
        if gone.digested_after in section:
            keys = list(section)
            section[setting] = gone.default
            for key in keys[keys.index(gone.digested_after) + 1 :]:
                section[key] = section.pop(key)  # to the end, behind it
    return experiment


def _section(values: Any, *names: str) -> dict[str, Any]:
    """Return the mapping that is below these names; an empty one where none does."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else []


def _refusal(value: Any, *path: str) -> UserError:
    reason = f"{value} is something that this version no longer has"
    return UserError(f"{reason}; peft-vit {LAST_VERSION_WITH_ALL} reads it", field=".".join(path))
