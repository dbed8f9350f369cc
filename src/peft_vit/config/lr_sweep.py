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


def at_rates(study: dict[str, Any], *, first: bool) -> dict[str, Any]:
    """Return the study with an experiment a rate in the place of each with a list: `lora` becomes `lora_lr_1e-3`.

    With `first` it stays one, under its own name, at the first rate of its list.
    """
    experiments = []
    for experiment in _experiments(study):
        rates = _rates(experiment)
        if rates is None:
            experiments.append(experiment)
            continue
        for rate in rates[:1] if first else rates:
            at_rate = {**experiment, "training": {**experiment["training"], "learning_rate": rate}}
            if not first:
                at_rate["name"] = f"{experiment.get('name')}_lr_{_as_name(rate)}"
            experiments.append(at_rate)
    return {**study, "experiments": experiments} if experiments else study


def _as_name(rate: float) -> str:
    """Return 3e-4 for 0.0003 and 2_5e-4 for 0.00025: a name holds no full stop."""
    mantissa, exponent = f"{rate:.14e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace(".", "_")


def _rates(experiment: Any) -> list[Any] | None:
    training = experiment.get("training") if isinstance(experiment, dict) else None
    rates = training.get("learning_rate") if isinstance(training, dict) else None
    return rates if isinstance(rates, list) else None


def _experiments(study: dict[str, Any]) -> list[Any]:
    experiments = study.get("experiments")
    return experiments if isinstance(experiments, list) else []  # of the wrong shape: validation names it
