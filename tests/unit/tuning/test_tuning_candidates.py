"""What may race: bytes that are reckoned, training that follows, who is left out."""

import json
from typing import Any

import pytest

from peft_vit.backbones import Architecture, describe
from peft_vit.backbones.catalog import create_model
from peft_vit.config import BackboneConfig, ExperimentConfig, LoraConfig
from peft_vit.evaluation import model_size
from peft_vit.methods import METHODS, PrepareContext
from peft_vit.tasks.classification import ACCURACY
from peft_vit.tuning.candidates import KINDS, designs, training_of
from peft_vit.tuning.contest import contestants, reference_of
from peft_vit.tuning.rates import BestRate
from peft_vit.tuning.schedule import Schedule

CLASSES = 5
SHAPE = describe(BackboneConfig(model="test_vit", weights="random"), 32)
DESIGNS = designs(SHAPE, 48, CLASSES)
FOUND = {kind: BestRate(1e-3, 0.9, 0.3) for kind in KINDS}


def configured(name: str) -> ExperimentConfig:
    design = next(one for one in DESIGNS if one.name == name)
    settings = {"learning_rate": 1e-3, "steps": 48, "validate_every": 10, "batch_size": 8, "flips": "both"}
    training = training_of(design.kind, metric=ACCURACY, memory={}, **settings)
    return ExperimentConfig.model_validate_json(json.dumps(design.experiment(training)))


@pytest.mark.parametrize("name", ["probe_int2", "probe_nf4", "probe_int8", "lora_int2", "lora_nf4", "lora_int8"])
def test_bytes_are_those_of_the_packed_model(name: str) -> None:
    experiment = configured(name)
    model = create_model(Architecture("timm", "test_vit"), 32, CLASSES)
    METHODS[experiment.method].prepare(model, experiment, PrepareContext(48, 0))
    size = model_size(model)
    header = size.file_bytes - size.live_bytes  # names and shapes in the file
    reckoned = next(one.bytes for one in DESIGNS if one.name == name)
    assert reckoned == pytest.approx(size.file_bytes - header, rel=0.01)


def test_every_design_is_a_valid_experiment_and_they_come_smallest_first() -> None:
    for design in DESIGNS:
        configured(design.name)
    assert [one.bytes for one in DESIGNS] == sorted(one.bytes for one in DESIGNS)
    float_model = create_model(Architecture("timm", "test_vit"), 32, CLASSES)
    in_float = 4 * sum(one.numel() for one in float_model.parameters())
    assert next(one.bytes for one in DESIGNS if one.name == "probe") == pytest.approx(in_float, rel=0.001)


def test_one_design_has_fewer_ranks_than_matrices_where_the_screening_put_them() -> None:
    names = [one.name for one in DESIGNS]
    ranks = configured("lora_few_ranks").need(LoraConfig).ranks
    assert ranks is not None
    assert (ranks.rule, ranks.unit, ranks.budget) == ("stable_rank", "ranks", len(SHAPE.sites) // 2)
    assert names.index("probe") < names.index("lora_few_ranks") < names.index("lora_r2")  # what trains less goes first
    lora = METHODS["lora"]
    factor = lora.few_ranks_learning_rate / lora.learning_rate  # as `train` takes it
    assert {one.name: one.rate_factor for one in DESIGNS if one.rate_factor != 1} == {"lora_few_ranks": factor}
    assert factor == pytest.approx(3)


@pytest.mark.parametrize(
    ("more", "left_out"),
    [
        ({}, {"lora_nf4": "", "lora_int8": "", "adalora": "there is no time", "probe": "no smaller than the refer"}),
        ({"max_bytes": 400_000}, {"lora_int8": "takes 0.5 MB, more than the limit of 0.4 MB", "lora_int2": ""}),
        ({"found": {**FOUND, "lora_int2": BestRate(1e-3, 0.86, 0.3)}}, {"lora_int2": "4.0 points", "adalora_nf4": ""}),
        # 8 points on 80 images are no more than chance makes of equals
        ({"found": {**FOUND, "lora_int2": BestRate(1e-3, 0.82, 0.3)}, "validation_images": 80}, {"lora_int2": ""}),
        ({"found": {"lora": FOUND["lora"]}}, {"lora_nf4": "no learning rate", "probe_nf4": "", "lora_few_ranks": ""}),
    ],
)
def test_it_is_told_why_a_candidate_does_not_race(more: dict[str, Any], left_out: dict[str, str]) -> None:
    schedule = Schedule(KINDS, races=20, steps=48, validate_every=10, run_s=30.0)
    settings = {"found": FOUND, "max_bytes": None, "validation_images": 100_000} | more
    found, images = settings["found"], settings["validation_images"]
    candidates, reference = contestants(DESIGNS, found, schedule, 0.01, settings["max_bytes"], {}, images)
    assert reference == "lora_r8"
    said = {one.name: one.left_out for one in candidates}
    for name, why in left_out.items():
        assert said[name].startswith(why) if why else not said[name], name
    assert reference_of({**FOUND, "lora_nf4": BestRate(1e-3, 0.92, 0.3)}) == "lora"
    assert reference_of({"lora_int2": FOUND["lora_int2"], "lora_nf4": FOUND["lora_nf4"]}) == "lora_nf4"
