"""Times of runs from a few measured steps: lines through two sizes, ratios of methods; and a real measurement."""

from dataclasses import replace

import pytest
import torch

from peft_vit.backbones import describe
from peft_vit.costs.cache import Costs
from peft_vit.costs.estimate import Workload
from peft_vit.costs.pace import MeasuredPace as Pace
from peft_vit.costs.pace import Probe, ReckonedPace
from peft_vit.data import open_index
from peft_vit.studies import profiling
from peft_vit.studies.profiling import Speed, disturbance, machine_speed, measure_pace

pytestmark = pytest.mark.part("runner")

STEADY = Speed(1000.0, 1.0)


def costs(start_s: float, step_s: float, image_s: float) -> Costs:
    return Costs(start_s=start_s, step_s=step_s, image_s=image_s, peak_memory_bytes=1, images=1)


def workload(config, image_size: int = 32, train: int = 24) -> Workload:
    return Workload(describe(config.backbone, image_size), image_size, 1, torch.device("cpu"), "fp32", 1, train, 20, 30)


LARGE, SMALL = 5, 2  # tokens; batches of 8 images
PROBES = {
    "lora": [Probe("lora", LARGE, 8, costs(2.0, 0.5, 0.010)), Probe("lora", SMALL, 8, costs(2.0, 0.26, 0.004))],
    "qa_lora": [Probe("qa_lora", LARGE, 4, costs(4.0, 0.6, 0.010))],
}


def test_steps_of_other_sizes_lie_on_the_line_through_two(study) -> None:
    experiment = study("lora").experiments[0]  # batches of 8
    pace = Pace(PROBES, 3.0)
    # 40 tokens a batch take 0.5 s, 16 take 0.26 s: 0.1 s, and 0.01 s a token
    assert pace.step_s(experiment, LARGE) == pytest.approx(0.5)
    assert pace.step_s(experiment, 17) == pytest.approx(0.1 + 8 * 17 * 0.01)
    assert pace.image_s(3) == pytest.approx(0.006)
    assert pace.image_s(LARGE) == pytest.approx(0.010)


def test_one_size_is_spread_as_two_of_another_experiment(study) -> None:
    """In batches of 4 images lora would take 0.1 + 20 x 0.01 = 0.3 s: qa_lora takes twice as long at any size."""
    experiment = study("qa_lora").experiments[0]
    assert Pace(PROBES, 3.0).step_s(experiment, LARGE) == pytest.approx(2 * 0.5)
    assert Pace(PROBES, 3.0).start_s(experiment) == 4.0


def test_what_was_not_measured_is_reckoned_from_what_it_multiplies(study) -> None:
    full, linear = study("full", "linear").experiments
    pace = Pace(PROBES, 3.0)
    assert pace.step_s(full, LARGE) == pytest.approx(0.5 * 3 / 2)
    assert pace.step_s(linear, LARGE) == pytest.approx(0.5 / 2)
    assert pace.start_s(full) == 2.0  # the median of 2, 2 and 4


def test_noise_makes_no_step_shorter_than_none(study) -> None:
    """A small size that took longer than the large one, or so little that the line would begin below 0."""
    experiment = study("lora").experiments[0]
    for small_s, of_ten, of_one in ((0.6, 0.5, 0.5), (0.1, 1.0, 0.1)):
        probes = {"lora": [PROBES["lora"][0], Probe("lora", SMALL, 8, costs(2.0, small_s, 0.02))]}
        pace = Pace(probes, 0.0)
        assert (pace.step_s(experiment, 10), pace.step_s(experiment, 1)) == pytest.approx((of_ten, of_one))


@pytest.mark.slow
def test_real_steps_are_measured_at_two_sizes(study, monkeypatch) -> None:
    monkeypatch.setattr(profiling, "machine_speed", lambda: STEADY)
    config = study("lora", "full", epochs=20)
    config = config.model_copy(update={"data": config.data.model_copy(update={"image_size": 64})})
    told: list[str] = []
    pace = measure_pace(config, open_index(config.data), workload(config, 64), 500.0, told.append)
    assert told == ["measuring steps of the study's methods, 500 s at most"]
    assert {name: [probe.tokens for probe in probes] for name, probes in pace.probes.items()} == {
        "lora": [17, 5],
        "full": [17, 5],
    }
    assert pace.process_s > 0
    (large, _) = pace.probes["lora"]
    assert pace.step_s(config.experiments[0], large.tokens) == pytest.approx(large.costs.step_s)


def test_no_time_to_measure_is_said(study, monkeypatch) -> None:
    config = study("lora")
    told: list[str] = []
    speeds = iter((STEADY, replace(STEADY, products_per_s=700.0)))
    monkeypatch.setattr(profiling, "machine_speed", lambda: next(speeds))
    pace = measure_pace(config, open_index(config.data), workload(config), 0.0, told.append)
    assert isinstance(pace, ReckonedPace)
    assert told[1:] == [
        "the machine was busy (its speed before and after differs by 30%, more than 20%), so these times may be long; "
        "what finished runs take corrects them",
        "no experiment could be measured in this time; how fast matrices are multiplied has to do",
    ]


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (STEADY, STEADY, None),
        (STEADY, Speed(810, 1.0), None),
        (STEADY, Speed(790, 1.0), "its speed before and after differs by 21%, more than 20%"),
        (Speed(790, 1.0), STEADY, "its speed before and after differs by 21%, more than 20%"),
        (STEADY, Speed(1000, 0.86), None),
        (Speed(1000, 0.5), STEADY, "other programs took 50% of a core, more than 15%"),
    ],
)
def test_a_busy_machine_is_told_from_a_steady_one(before, after, reason) -> None:
    assert disturbance(before, after) == reason


def test_the_speed_is_measured_and_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    found = machine_speed()
    assert found.products_per_s > 0
    assert 0 < found.cpu_share < 1.1
    assert torch.get_num_threads() == threads
