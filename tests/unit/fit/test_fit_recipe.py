"""What may become the model: names, bytes that are reckoned, experiments that follow."""

import json
from dataclasses import replace

import pytest

from peft_vit.core.adapters import packed_weights
from peft_vit.core.adapters.footprint import model_size, storage_bytes
from peft_vit.core.backbones import Architecture, describe
from peft_vit.core.backbones.catalog import create_model
from peft_vit.core.config import BackboneConfig, ExperimentConfig
from peft_vit.core.methods import METHODS, PrepareContext
from peft_vit.deploy.export import round_weights
from peft_vit.fit.recipe import GRAPH_BYTES, ROUNDED, Recipe, lora, rate_of

CLASSES, STEPS = 5, 48
SHAPE = describe(BackboneConfig(model="test_vit", weights="random"), 32)
LORA = lora("test_vit", 32, STEPS)
QA_LORA = replace(LORA, method="qa_lora", rate=rate_of("qa_lora", LORA.rate), bits="nf4", when="training")
ADALORA = replace(LORA, method="adalora")


def configured(recipe: Recipe) -> ExperimentConfig:
    training = {"batch_size": 8, "metric": "accuracy"}
    if not recipe.is_probe:
        training |= {"learning_rate": recipe.rate, "steps": recipe.steps}
    sections = recipe.sections(SHAPE)
    values = {"name": recipe.name, "method": recipe.method, "training": training, **sections}
    return ExperimentConfig.model_validate_json(json.dumps(values))


def test_every_recipe_is_an_experiment_of_its_own_name() -> None:
    recipes = [Recipe("test_vit", 32), LORA, replace(LORA, rank=2), replace(LORA, rate=3e-4), QA_LORA, ADALORA]
    names = [configured(recipe).name for recipe in recipes]
    assert names[:4] == ["linear", "lora_r8_0-001_48", "lora_r2_0-001_48", "lora_r8_0-0003_48"]
    assert len(set(names)) == len(names)
    assert LORA.rounded("int4").trained == LORA
    assert LORA.rounded("int4").name == LORA.name  # nothing is trained for it
    packings = [configured(replace(QA_LORA, bits=bits)).qa_lora for bits in ("nf4", "int2")]
    assert [(own.quantization_type, own.rounding) for own in packings] == [("nf4", "nearest"), ("int2", "gptq")]
    assert LORA.rounded("nf4").title == "LoRA, 4 bits (nf4), 32 px"
    assert {QA_LORA.plain, replace(ADALORA, rank=2).plain, LORA.rounded("nf4").plain} == {LORA}
    assert replace(LORA, rank=2).title == "LoRA of rank 2, 32 px"


def test_studies_of_models_on_the_hub_have_plain_names() -> None:
    place = Recipe("Some/Model-With.Capitals", 224).place
    assert place.startswith("some-model-with-capitals-")
    assert place.endswith("-224")
    assert place != Recipe("some/model-with.capitals", 224).place


@pytest.mark.parametrize("bits", [None, *ROUNDED])
def test_bytes_are_those_of_the_model_whose_weights_are_rounded(bits: str | None) -> None:
    model = create_model(Architecture("timm", "test_vit"), 32, CLASSES)
    recipe = LORA if bits is None else LORA.rounded(bits)
    rounded = model if bits is None else round_weights(model, bits)
    codes = sum(weight.nbytes for weight in packed_weights(rounded).values())
    in_float = storage_bytes(rounded.state_dict().values())
    assert recipe.file_bytes(SHAPE, CLASSES, 0) == pytest.approx(
        in_float + codes + GRAPH_BYTES * len(SHAPE.sites), rel=0.01
    )


def test_features_of_training_images_take_a_byte_each_of_at_most_2000_images() -> None:
    width = next(iter(SHAPE.sites)).in_features
    sizes = [LORA.file_bytes(SHAPE, CLASSES, images) for images in (19, 300, 2000, 9000)]
    assert [size - sizes[0] for size in sizes] == [0, 300 * width, 2000 * width, 2000 * width]


def test_bytes_of_qa_lora_are_those_of_the_packed_model() -> None:
    experiment = configured(QA_LORA)
    model = create_model(Architecture("timm", "test_vit"), 32, CLASSES)
    METHODS["qa_lora"].prepare(model, experiment, PrepareContext(STEPS, 0))
    expected = QA_LORA.file_bytes(SHAPE, CLASSES, 0) - GRAPH_BYTES * len(SHAPE.sites)
    assert expected == pytest.approx(model_size(model).live_bytes, rel=0.01)


def test_other_methods_have_rates_that_go_with_those_of_lora() -> None:
    assert rate_of("lora", 1e-3) == 1e-3
    assert rate_of("qa_lora", 1e-3) == 2e-3  # as `train` has it
