"""The registry: a method's line is all that configuration, `train`, plans and reports know of it."""

from __future__ import annotations

import pkgutil
from dataclasses import replace

import pytest

from peft_vit.core import methods
from peft_vit.core.config import METHOD_KINDS, SECTIONS, AdaLoraConfig, ExperimentConfig
from peft_vit.core.methods import METHODS, shorten

TRAINING = {"epochs": 1, "learning_rate": 1e-3}
ADALORA = {
    "total_rank_budget": 24,
    "allocation_strategy": "global",
    "importance_metric": "sensitivity",
    "update_frequency": 10,
    "warmup_steps": 100,
    "final_steps": 200,
}


def experiment(method: str, **sections: dict[str, object]) -> ExperimentConfig:
    return ExperimentConfig.model_validate({"name": "a", "method": method, "training": TRAINING, **sections})


def test_names_titles_and_colors_are_each_methods_own() -> None:
    assert all(name == kind.name for name, kind in METHOD_KINDS.items())
    for values in ({kind.title for kind in METHOD_KINDS.values()}, {kind.color for kind in METHOD_KINDS.values()}):
        assert len(values) == len(METHOD_KINDS)


def test_every_kind_has_its_method_and_every_module_a_kind() -> None:
    assert list(METHODS) == list(METHOD_KINDS)
    modules = {module.name for module in pkgutil.iter_modules(methods.__path__)} - {"method"}
    assert modules == {kind.module or kind.name for kind in METHOD_KINDS.values()}


def test_an_experiment_has_a_field_for_every_section() -> None:
    assert set(SECTIONS) < set(ExperimentConfig.model_fields)
    assert {name: kind for method in METHOD_KINDS.values() for name, kind in method.settings.items()} == SECTIONS


def test_a_method_of_ones_own_is_a_line_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHOD_KINDS, "lora", replace(METHOD_KINDS["lora"], trains="head"))
    assert experiment("lora", lora={"rank": 4}).is_probe


@pytest.mark.parametrize(
    ("given", "steps", "every", "expected"),
    [
        (400, 40, None, (10, 1, 20)),
        (400, 40, 3, (10, 3, 20)),
        (10**9, 8, None, (1, 1, 0)),  # beside endless steps every phase is as short as it can be
    ],
)
def test_shorter_schedules_keep_their_shares(given: int, steps: int, every: int | None, expected: tuple) -> None:
    options = {} if every is None else {"every": every}
    settings = shorten(experiment("adalora", adalora=ADALORA), given, steps, **options).need(AdaLoraConfig)
    assert (settings.warmup_steps, settings.update_frequency, settings.final_steps) == expected
