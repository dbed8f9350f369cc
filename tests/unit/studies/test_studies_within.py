"""A study within some minutes: what is taken, how it goes on, what study.json says of it, and what is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from written_runs import run_and_write

from peft_vit.costs.cache import Costs, keep_costs
from peft_vit.costs.pace import MeasuredPace, Probe
from peft_vit.errors import UserError
from peft_vit.records.study_file import read_study_file
from peft_vit.studies import plan_study
from peft_vit.studies.lock import study_lock
from peft_vit.studies.scheduler import drive
from peft_vit.studies.status import study_status
from peft_vit.studies.study_file import study_file, write_study_file
from peft_vit.studies.time_limit import Limit
from peft_vit.studies.within import plan_within

pytestmark = pytest.mark.part("runner")

SEEDS = tuple(range(10))


def pace_of(step_s: float, fixed_s: float = 0.0, start_s: float = 0.0):
    """Make a measurement: seconds of a step of lora with 8 images of 17 tokens, of which some are there at any size."""

    def measure(study, index, workload, budget_s, tell) -> MeasuredPace:
        tell(f"measured in {budget_s:.0f} s")
        small_s = fixed_s + (step_s - fixed_s) * 5 / 17
        large, small = (
            Costs(start_s=start_s, step_s=one, image_s=1e-6, peak_memory_bytes=1, images=1) for one in (step_s, small_s)
        )
        return MeasuredPace({"lora": [Probe("lora", 17, 8, large), Probe("lora", 5, 8, small)]}, 0.0)

    return measure


def keep_three_seconds(kinds):
    """Keep that runs of these kinds take 3 s each."""
    three = Costs(start_s=3.0, step_s=1e-6, image_s=1e-6, peak_memory_bytes=1, images=1)
    for kind in kinds.values():
        keep_costs(kind, three)
    return dict.fromkeys(kinds, three)


def image_folder(folder):
    """Write two images of each of two classes."""
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (40, 40), 50 * number).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def _own_costs(cache, tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path_factory.mktemp("costs")))


def never(*_):
    pytest.fail("measured again")


@pytest.fixture
def config(study):
    """Return a study of lora (2 products a step), full (3), adalora (2) and linear (1) in 3 steps of 8 images each."""
    made = study("lora", "full", "adalora", "linear", seeds=SEEDS, epochs=10)  # 30 steps
    data = made.data.model_copy(update={"image_size": 64})
    return made.model_copy(update={"data": data})


@pytest.fixture
def within(tmp_path):
    """Plan within some minutes; return the plan and what was told."""

    def plan(config, minutes, measure, elapsed_s=0.0):
        told: list[str] = []
        limit = Limit(minutes, started=100.0, clock=lambda: 100.0 + elapsed_s)
        file = tmp_path / "tiny.yaml"
        planned, deadline = plan_within(config, tmp_path, limit, file=file, tell=told.append, measure=measure)
        return SimpleNamespace(plan=planned, deadline=deadline, told=told)

    return plan


def begin(plan, tmp_path) -> None:
    """Write what the driver would before its first run."""
    names = [f"{run.spec.experiment.name}/seed_{run.spec.seed}" for run in plan.runs]
    content = study_file(plan.study, names, smoke=False, data_sha256=plan.data_sha256, limited=plan.within.limited)
    (tmp_path / "tiny").mkdir()
    write_study_file(tmp_path / "tiny", content)


def taken(plan) -> list[tuple[str, int]]:
    return [(run.spec.experiment.name, run.spec.seed) for run in plan.runs]


def test_with_time_for_all_nothing_is_left_out(config, within) -> None:
    found = within(config, 60, pace_of(0.1))
    assert found.plan.study == config
    assert found.told == ["measured in 20 s"]
    assert len(found.plan.in_time.runs) == len(found.plan.runs) == 40
    assert taken(found.plan)[:5] == [("lora", 0), ("full", 0), ("adalora", 0), ("linear", 0), ("lora", 1)]
    assert found.plan.within.lines == ("60 minutes, 4 experiments x 10 of 10 seeds: all of the study.",)
    # 30 steps of 0.1 s, or a probe's fits, and what is evaluated in no time
    seconds = {run.spec.experiment.name: run.estimate.seconds for run in found.plan.runs}
    assert seconds == pytest.approx({"lora": 3.0, "full": 4.5, "adalora": 3.0, "linear": 3.0}, rel=0.01)
    assert {run.estimate.basis for run in found.plan.runs} == {"calibration"}


def test_experiments_give_way_to_seeds(config, within) -> None:
    """Of the 103 s that 1.8 minutes leave, 7 seeds of three experiments take 96 with 30 % more, of four 109."""
    found = within(config, 1.8, pace_of(0.1))
    assert found.plan.study == config
    assert taken(found.plan)[:4] == [("lora", 0), ("full", 0), ("adalora", 0), ("lora", 1)]
    assert len(found.plan.runs) == 30
    assert found.plan.within.limited.first == ("lora", "full", "adalora")
    assert found.plan.within.lines == (
        "1.8 minutes, 3 experiments x 9 of 10 seeds expected (lora, full, adalora), seed by seed.",
        "Left for a later call: 1 experiment (linear).",
        "7 seeds are enough for a verdict on each comparison with lora.",
    )


def test_images_get_smaller_before_a_verdict_is_given_up(config, within) -> None:
    """Two experiments take 6 x (3 + 4.5) x 1.3 = 58.5 s at 64 px and 10/17 of it at 48 px; there are 51 s."""
    found = within(config, 0.9, pace_of(0.1))
    assert found.plan.study.data == config.data.model_copy(update={"image_size": 48})
    assert found.plan.study.experiments == config.experiments
    assert {run.spec.data.image_size for run in found.plan.runs} == {48}
    lines = found.plan.within.lines
    assert lines[0] == "Smaller than its file asks for, so that it fits: image_size 48 in place of 64."
    assert lines[1].startswith("0.9 minutes, 2 experiments x 10 of 10 seeds expected (lora, full)")


def test_what_no_size_changes_takes_fewer_images(study, within) -> None:
    """All of a step is there at any size, so only fewer steps help: 24 training images become 128 at the least."""
    config = study("lora", "adalora", seeds=SEEDS, epochs=10)
    data = config.data.model_copy(update={"image_size": 64, "train_images": 1000})
    adaptive = config.experiments[1].adalora.model_copy(update={"update_frequency": 50, "warmup_steps": 100})
    experiments = (config.experiments[0], config.experiments[1].model_copy(update={"adalora": adaptive}))
    config = config.model_copy(update={"data": data, "experiments": experiments})
    # 1250 steps of 0.01 s: 2 x 6 x 12.5 s x 1.3 = 195 s; half of them 98 s
    found = within(config, 2, pace_of(0.01, fixed_s=0.01))
    assert (found.plan.study.data.image_size, found.plan.study.data.train_images) == (32, 500)
    assert found.plan.study.data.validation_images == config.data.validation_images  # 20 are few already
    assert found.plan.study.experiments[1].adalora.warmup_steps == round(100 * 630 / 1250)
    assert found.plan.within.lines[:2] == (
        "Smaller than its file asks for, so that it fits: image_size 32 in place of 64, "
        "train_images 500 in place of 1000.",
        "Schedules shrink with the number of steps.",
    )


def test_too_little_time_for_anything_is_one_line_with_what_would_do(config, within, tmp_path) -> None:
    with pytest.raises(UserError) as caught:
        within(config, 0.5, pace_of(10.0))
    # at 32 px 6 x (1 + 1.5) x 30 x 10 s x 5/17 x 1.3 on one worker
    least_s = 1.3 * 6 * 2.5 * 30 * 10 * 5 / 17
    minutes = int(str(caught.value).split(" take ")[1].split()[0])
    assert str(caught.value) == (
        f"{tmp_path / 'tiny.yaml'}: --minutes: 0.5 are too few for a verdict, even on the smallest images: two "
        f"experiments with 6 seeds each take {minutes} on this machine; give at least as many"
    )
    assert least_s / 60 < minutes < least_s / 60 + 2
    found = within(config, minutes, pace_of(10.0))  # what it says is enough
    assert len(found.plan.in_time.runs) >= 12


def test_a_study_that_can_decide_nothing_is_only_bounded(study, within) -> None:
    config = study("lora", "full", seeds=(0, 1, 2), epochs=10)
    found = within(config, 0.5, pace_of(1.0))  # 9 s and 13 s a run
    assert found.plan.study == config
    assert len(found.plan.runs) == 6
    assert "too few seeds or experiments for a verdict" in found.plan.within.lines[-1]
    assert len(found.plan.in_time.runs) < 6
    longer = within(config, 0.5, pace_of(100.0))
    assert longer.plan.within.lines[-1] == "No run may end in this time; what is begun goes on in a later call."


def test_a_begun_study_goes_on_with_its_sizes(config, within, tmp_path) -> None:
    first = within(config, 0.9, pace_of(0.1)).plan
    begin(first, tmp_path)
    again = within(config, 60, pace_of(0.1)).plan  # for which 64 px would fit by now
    assert again.study == first.study
    assert again.within.limited.asked == config
    assert [one.name for one in again.study.experiments] == [one.name for one in config.experiments]
    assert len(again.runs) == 40
    short = within(config, 0.2, pace_of(0.1)).plan  # for no verdict: the two that were begun
    assert short.within.limited.first == ("lora", "full")
    assert "in later ones" in short.within.lines[-1]


def test_experiments_that_were_begun_come_before_those_that_the_file_puts_first(config, within, tmp_path) -> None:
    begin(within(config, 0.9, pace_of(0.1)).plan, tmp_path)
    experiments = tuple(reversed(config.experiments))
    found = within(config.model_copy(update={"experiments": experiments}), 0.9, pace_of(0.1)).plan
    assert found.within.limited.first[:2] == ("full", "lora")


def test_another_configuration_of_a_smaller_study_is_refused(config, within, tmp_path) -> None:
    begin(within(config, 0.9, pace_of(0.1)).plan, tmp_path)
    for update in ({"image_size": 80}, {"train_images": 32}):
        changed = config.model_copy(update={"data": config.data.model_copy(update=update)})
        with pytest.raises(UserError, match="was begun with another configuration, see below") as caught:
            within(changed, 0.9, pace_of(0.1))
        (name,) = update
        assert f"+  {name}:" in caught.value.details
    more = config.model_copy(update={"seeds": (*SEEDS, 10)})
    assert len(within(more, 60, pace_of(0.1)).plan.runs) == 44


def test_other_images_of_a_smaller_study_are_refused_with_the_difference(config, within, tmp_path) -> None:
    """Not with what its sizes would mean on them."""
    begin(within(config, 0.9, pace_of(0.1)).plan, tmp_path)
    data = config.data.model_copy(update={"dataset": "image-folder", "path": str(image_folder(tmp_path / "own"))})
    with pytest.raises(UserError, match="was begun with another configuration, see below"):
        within(config.model_copy(update={"data": data}), 0.9, pace_of(0.1))


def test_kept_costs_serve_runs_that_go_alone_until_the_study_has_to_shrink(config, within) -> None:
    for run in plan_study(config, Path("/nowhere"), file=Path("tiny.yaml"), measure=keep_three_seconds).runs:
        assert run.estimate.basis == ("estimate" if run.spec.experiment.is_probe else "calibration")
    assert len(within(config, 60, never).plan.runs) == 40
    found = within(config, 0.5, pace_of(0.05))  # 6 x 2 x 3 s x 1.3 are too many
    assert found.plan.study.data.image_size < 64
    two = config.model_copy(update={"execution": config.execution.model_copy(update={"workers": 2})})
    assert within(two, 60, pace_of(0.1)).told == ["measured in 20 s"]  # they were measured alone


def test_without_minutes_a_smaller_study_is_refused_in_one_line(config, within, tmp_path) -> None:
    begin(within(config, 0.9, pace_of(0.1)).plan, tmp_path)
    with pytest.raises(UserError) as caught:
        plan_study(config, tmp_path, file=tmp_path / "tiny.yaml")
    assert str(caught.value) == (
        f"{tmp_path / 'tiny/study.json'}: limited: was begun smaller, for want of time (image_size 48 in place of 64); "
        "give --minutes to go on, or choose another --output"
    )


def test_a_study_of_full_size_goes_on_with_and_without_minutes(config, within, tmp_path) -> None:
    begin(within(config, 1.8, pace_of(0.1)).plan, tmp_path)
    assert len(plan_study(config, tmp_path, file=tmp_path / "tiny.yaml").runs) == 40
    found = within(config, 0.2, pace_of(0.1))  # too few for its size, which stays, as its experiments do
    assert found.plan.study == config
    assert found.plan.within.limited.first == ("lora", "full", "adalora")


def test_finished_runs_of_the_study_tell_the_pace_without_a_measurement(study, within, tmp_path) -> None:
    config = study("lora", "full", "linear", seeds=SEEDS)
    plan = within(config, 0.2, pace_of(0.1)).plan
    records = [run_and_write(run.spec, tmp_path) for run in plan.runs[:2]]
    again = within(config, 60, never).plan
    estimates = {run.spec.experiment.name: run.estimate for run in again.runs}
    assert {name: one.basis for name, one in estimates.items()} == {
        "lora": "records",
        "full": "records",
        "linear": "calibration",
    }
    assert estimates["lora"].seconds == records[0].seconds
    assert 0 < estimates["linear"].seconds < 10
    assert sum(run.done for run in again.runs) == 2


def test_time_that_is_spent_is_gone(config, within) -> None:
    assert within(config, 3, pace_of(0.1), elapsed_s=70).plan.within.limited.first == ("lora", "full", "adalora")
    assert len(within(config, 3, pace_of(0.1)).plan.runs) == 40


def test_what_the_study_file_says(config, within, tmp_path) -> None:
    plan = within(config, 0.9, pace_of(0.1)).plan

    def make_executor():
        raise UserError("no executor here")

    with study_lock(tmp_path / "tiny") as lock, pytest.raises(UserError, match="no executor here"):
        drive(plan, lock, make_executor, lambda told: None)
    assert read_study_file(tmp_path / "tiny") is None  # nothing was begun
    begin_folder = tmp_path / "tiny"
    content = study_file(plan.study, [], smoke=False, data_sha256=plan.data_sha256, limited=plan.within.limited)
    write_study_file(begin_folder, content)
    read = read_study_file(begin_folder)
    assert read == content
    assert read.smaller_than_asked
    assert (read.configuration.data.image_size, read.limited.asked.data.image_size) == (48, 64)
    assert read.limited.first == ("lora", "full")
    assert len(study_status(begin_folder).runs) == 40
