"""The configuration file of a study of one experiment, made again from what a run's record says was asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from peft_vit.core.config import PROBE_READS, StudyConfig
from peft_vit.core.records import RunSpec

_LONGEST_NAME = 64
# What a run takes from its study as it stands: backbone, data, device and the like.
SHARED = tuple(name for name in StudyConfig.model_fields if name in RunSpec.model_fields)
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_\-]*")  # no number in any version of YAML; PyYAML itself quotes true and null


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.2 might take for a number: PyYAML, which writes 1.1, leaves 1e3 bare."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if _PLAIN.fullmatch(value) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def study_yaml(spec: RunSpec, seeds: Sequence[int], *, suffix: str, comments: Sequence[str] = ()) -> str:
    """Return YAML from which `config.load_study` makes a study of the run's experiment, with equal settings.

    Settings of a method's section that equal their default are left out: where they have no effect, a file that gives
    them is refused. The others, of training, data and backbone, are spelled out.

    Args:
        spec: what was asked of one of the experiment's runs.
        seeds: of the new study.
        suffix: ends its name, so that it is not mistaken for the old study continuing.
        comments: lines for the top of the file, without ``#``.
    """
    experiment = spec.experiment
    sections = {
        name: section.model_dump(mode="json", exclude_defaults=True)
        for name in experiment.kind.settings
        if (section := getattr(experiment, name)) is not None
    }
    content: dict[str, Any] = {
        "name": f"{spec.study[: _LONGEST_NAME - len(suffix)]}{suffix}",
        "seeds": list(seeds),
        **{name: value for name in SHARED if (value := _plain(spec, name)) is not None},
        "training": experiment.training.model_dump(
            mode="json",  # null has a meaning here: no clipping
            include=set(PROBE_READS) if experiment.is_probe else None,  # a file that gave a probe more is refused
        ),
        "experiments": [{"name": experiment.name, "method": experiment.method, **sections}],
    }
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)
    return "".join(f"# {line}\n" for line in comments) + text


def _plain(spec: RunSpec, name: str) -> Any:
    """Return a part of the study as plain values; None if it asks for nothing, so that it is left out."""
    value = getattr(spec, name)
    if not isinstance(value, BaseModel):
        return value
    is_default = value == StudyConfig.model_fields[name].default
    return None if is_default else value.model_dump(mode="json", exclude_none=True)
