"""A YAML file to a study: shared settings are filled in, and every fault is one line that names where it stands."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from peft_vit.config.augmentation import Augmentation
from peft_vit.config.lr_sweep import at_rates, check_rates
from peft_vit.config.methods import METHOD_KINDS
from peft_vit.config.study import NO_EFFECT_ON_PROBES, PROBE_READS, StudyConfig
from peft_vit.config.training import TrainingConfig
from peft_vit.config.yaml_loader import KeyPath, Lines, dotted, read_mapping
from peft_vit.errors import UserError
from peft_vit.settings import AS_WRITTEN

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


def load_study(file: str | Path) -> StudyConfig:
    """Read and check one configuration file.

    Raises:
        UserError: with file, line, field and remedy, for anything that is not a valid study.
    """
    file = Path(file)
    data, lines = read_mapping(file)
    _check_probes(data, lines, file)
    filled = _fill_training(data, lines, file)
    check_rates(filled, lines, file)
    at_first = at_rates(filled, first=True)
    study = study_from_mapping(at_first, file=file, lines=lines)  # names faults where they stand, once
    expanded = at_rates(filled, first=False)
    return study if expanded == filled else study_from_mapping(expanded, file=file)


def study_from_mapping(data: dict[str, Any], *, file: Path, lines: Lines | None = None) -> StudyConfig:
    """Check a mapping of the shape of a configuration file; `file` is only named in errors."""
    try:
        # Through JSON, so that strict checking still turns lists into tuples.
        return StudyConfig.model_validate_json(json.dumps(data, default=str), context=AS_WRITTEN)
    except ValidationError as error:
        raise _one_line(error, lines or {}, file) from None
    except ValueError as error:
        raise UserError(str(error), file=file) from None


def _fill_training(data: dict[str, Any], lines: Lines, file: Path) -> dict[str, Any]:
    """Put the study's `training:` under each experiment's own."""
    shared, experiments = data.get("training", {}), data.get("experiments")
    if not isinstance(shared, dict):
        problem = f"expected a mapping of settings, got {reprlib.repr(shared)}"
        raise UserError(problem, file=f"{file}:{lines['training',]}", field="training")
    filled = {key: value for key, value in data.items() if key != "training"}
    if isinstance(experiments, list):
        listed = filled["experiments"] = [_with_training(one, shared) for one in experiments]
        trained = [one.get("training") for one in listed if isinstance(one, dict)]
        if shared.get("probe_l2") is not None and not any(isinstance(t, dict) and "probe_l2" in t for t in trained):
            where = f"{file}:{lines['training', 'probe_l2']}"
            problem = "has no effect, as no experiment fits a probe; remove it"
            raise UserError(problem, file=where, field="training.probe_l2")
    return filled


def _with_training(experiment: Any, shared: dict[str, Any]) -> Any:
    own = experiment.get("training", {}) if isinstance(experiment, dict) else None
    if not isinstance(own, dict):
        return experiment  # of the wrong shape: validation names it
    if _is_probe(experiment):
        shared = {key: value for key, value in shared.items() if key in PROBE_READS}
        if isinstance(listed := shared.get("augmentation"), list):  # what probes do not see is the other experiments'
            shared["augmentation"] = [one for one in listed if _is_flip(one)]
    else:
        if {"epochs", "steps"} & own.keys():  # a length of one's own replaces the study's, however either is said
            shared = {key: value for key, value in shared.items() if key not in ("epochs", "steps")}
        if {**shared, **own}.get("head_start") != "probe":  # the strength of the penalty is for those that fit one
            shared = {key: value for key, value in shared.items() if key != "probe_l2"}
    return {**experiment, "training": {**shared, **own}}


def _is_probe(experiment: dict[str, Any]) -> bool:
    method = experiment.get("method")
    return isinstance(method, str) and method in METHOD_KINDS and METHOD_KINDS[method].trains == "head"


def _is_flip(entry: Any) -> bool:
    return entry == "flip" or (isinstance(entry, dict) and "flip" in entry)


def _is_other(entry: Any) -> bool:
    """Tell whether an entry of `augmentation` is one that probes do not see; a misspelled one is named elsewhere."""
    names = [entry] if isinstance(entry, str) else entry
    return (
        not _is_flip(entry)
        and isinstance(names, list | dict)
        and any(one in Augmentation.model_fields for one in names)
    )


def _check_probes(data: dict[str, Any], lines: Lines, file: Path) -> None:
    """Refuse settings of training that no experiment reads: a probe's own, and the study's where all are probes."""
    experiments = data.get("experiments")
    listed = [one for one in experiments if isinstance(one, dict)] if isinstance(experiments, list) else []
    probes = [_is_probe(one) for one in listed]
    places: list[tuple[KeyPath, Any]] = [
        (("experiments", place, "training"), one.get("training")) for place, one in enumerate(listed) if probes[place]
    ]
    if probes and all(probes):
        places.append((("training",), data.get("training")))
    for path, training in places:
        for key, value in training.items() if isinstance(training, dict) else ():
            unread, problem = None, "has no effect on a linear probe, which is fitted to convergence; remove it"
            if key in TrainingConfig.model_fields and key not in PROBE_READS:
                unread = (*path, key)
            elif key == "augmentation" and isinstance(value, list):
                others = (place for place, one in enumerate(value) if _is_other(one))
                unread = next(((*path, key, place) for place in others), None)
                problem = NO_EFFECT_ON_PROBES
            if unread is not None:
                where = f"{file}:{lines[unread]}" if unread in lines else file
                raise UserError(problem, file=where, field=dotted(unread))


def _message(error: ErrorDetails, path: KeyPath) -> str:
    kind = error["type"]
    if kind == "extra_forbidden" and path == ("data", "flips"):
        return "is said by training.augmentation: [] for none, [flip] (the default), or [flip: {direction: both}]"
    if kind == "extra_forbidden":
        return "unknown key here; remove it or correct its spelling"
    if kind == "missing":
        return "is missing; add it"
    if kind == "string_too_short":
        return "is empty; fill it in"
    if kind == "value_error":
        return error["msg"].removeprefix("Value error, ")
    if kind == "string_pattern_mismatch" and path[-1:] == ("name",):
        message = "use lower-case letters, digits, '-' and '_', at most 64"
    else:
        message = f"{error['msg'][0].lower()}{error['msg'][1:]}".replace("an object", "a mapping")
        message = message.replace("valid array", "list")
    return f"{message}, got {reprlib.repr(error['input'])}"


def _one_line(error: ValidationError, lines: Lines, file: Path) -> UserError:
    """Return the first fault with its line, and how many more there are.

    Args:
        error: of what a file said.
        lines: where its keys stand.
        file: named in the error.
    """
    details = error.errors(include_url=False)
    echoes = {one["loc"][:n] for one in details for n in range(len(one["loc"]))}
    faults: dict[KeyPath, ErrorDetails] = {}
    for one in details:
        path = _as_written(one["loc"], lines)
        # A list whose items have faults is also too short for pydantic, which counts only the sound ones.
        if one["type"] != "too_short" or path not in echoes:
            faults.setdefault(path, one)
    # An unknown key first: a misspelled one is also reported as missing, which misleads.
    path, first = min(faults.items(), key=lambda item: item[1]["type"] != "extra_forbidden")
    line = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
    message = _message(first, path)
    more = len(faults) - 1
    if more:
        message += f" ({more} more fault{'s' if more > 1 else ''} in this file)"
    return UserError(message, file=f"{file}:{line}" if line else str(file), field=dotted(path))


def _as_written(path: KeyPath, lines: Lines) -> KeyPath:
    """Return where a setting stands in the file; one of the study's shared `training` was copied to the experiments."""
    shared: KeyPath = ("training", *path[3:])
    return shared if path[2:3] == ("training",) and path not in lines and shared in lines else path
