"""A list of learning rates in a file stands for an experiment a rate. Nothing outside `config` knows of such lists."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from peft_vit.config.yaml_loader import Lines, dotted
from peft_vit.errors import UserError

_LARGEST = 1e6


def check_rates(study: dict[str, Any], lines: Lines, file: Path) -> None:
    """Refuse lists that hold anything but learning rates that differ, in a study with `training` filled in."""
    for place, experiment in enumerate(_experiments(study)):
        rates = _rates(experiment)
        if rates is None:
            continue
        sound = all(type(rate) in (int, float) and 0 < rate <= _LARGEST for rate in rates)
        if not (sound and rates and len(set(rates)) == len(rates)):
            own = ("experiments", place, "training", "learning_rate")
            path = own if own in lines else own[2:]
            problem = f"expected a number above 0, or a list of some that differ, got {reprlib.repr(rates)}"
            raise UserError(problem, file=f"{file}:{lines[path]}", field=dotted(path))


def at_first_rates(study: dict[str, Any]) -> dict[str, Any]:
    """Return the study as it stands in the file, with the first rate in the place of each list."""
    return _replaced(
        study, [_with_rate(one, rates[0]) if (rates := _rates(one)) else one for one in _experiments(study)]
    )


def at_each_rate(study: dict[str, Any]) -> dict[str, Any]:
    """Return the study with an experiment a rate in the place of each with a list: `lora` becomes `lora_lr_1e-3`."""
    return _replaced(study, [at_rate for one in _experiments(study) for at_rate in _at_each(one)])


def _at_each(experiment: Any) -> list[Any]:
    rates = _rates(experiment)
    if rates is None:
        return [experiment]
    return [{**_with_rate(experiment, rate), "name": f"{experiment.get('name')}_lr_{_as_name(rate)}"} for rate in rates]


def _as_name(rate: float) -> str:
    """Return 3e-4 for 0.0003 and 2_5e-4 for 0.00025: a name holds no full stop."""
    mantissa, exponent = f"{rate:.14e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace(".", "_")


def _rates(experiment: Any) -> list[Any] | None:
    training = experiment.get("training") if isinstance(experiment, dict) else None
    rates = training.get("learning_rate") if isinstance(training, dict) else None
    return rates if isinstance(rates, list) else None


def _with_rate(experiment: dict[str, Any], rate: float) -> dict[str, Any]:
    return {**experiment, "training": {**experiment["training"], "learning_rate": rate}}


def _experiments(study: dict[str, Any]) -> list[Any]:
    experiments = study.get("experiments")
    return experiments if isinstance(experiments, list) else []  # of the wrong shape: validation names it


def _replaced(study: dict[str, Any], experiments: list[Any]) -> dict[str, Any]:
    return {**study, "experiments": experiments} if experiments else study
