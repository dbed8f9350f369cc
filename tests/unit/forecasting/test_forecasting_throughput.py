"""Times from a few measured steps: lines through two sizes, the slowest method; what fits; a real measurement."""

import itertools
import random

import pytest
import torch

from peft_vit.backbones import describe
from peft_vit.data import open_index
from peft_vit.forecasting.calibration import Costs
from peft_vit.forecasting.estimate import Line, Probe, Throughput, Workload, experiment_products
from peft_vit.forecasting.time_limit import fit, makespan
from peft_vit.studies import profiling
from peft_vit.studies.profiling import Speed, disturbance, machine_speed, measure_throughput

pytestmark = pytest.mark.part("runner")

STEADY = Speed(1000.0, 1.0)


def probe(start_s: float, step_products: float, step_s: float, image_products: int, image_s: float) -> Probe:
    costs = Costs(start_s=start_s, step_s=step_s, image_s=image_s, peak_memory_bytes=1, images=1)
    return Probe(step_products, image_products, costs)


def test_a_line_of_seconds() -> None:
    for points, x, seconds in (
        ([(40, 0.5), (16, 0.26)], 136, 0.1 + 1.36),  # 0.1 s, and 0.01 s each
        ([(40, 0.5)], 80, 1.0),
        ([(40, 0.5), (16, 0.6)], 80, 0.5),  # noise: it does not fall
        ([(40, 0.5), (16, 0.1)], 80, 1.0),  # nor begin below 0
        ([(40, 0.0), (16, 0.0)], 80, 0.0),
    ):
        assert Line.through(points).at(x) == pytest.approx(seconds)


def test_steps_lie_on_the_line_of_who_was_measured_at_two_sizes_as_far_above_it_as_the_slowest() -> None:
    lora = [probe(2.0, 40, 0.5, 5, 0.010), probe(2.0, 16, 0.26, 2, 0.004)]
    alone, both = (Throughput.measured(probes, 3.0) for probes in ({"lora": lora}, {
        "lora": lora, "qa_lora": [probe(4.0, 20, 0.6, 5, 0.010)]
    }))  # fmt: skip
    assert (alone.start_s, both.start_s, both.process_s) == (2.0, 4.0, 3.0)
    assert alone.step.at(136) == pytest.approx(0.1 + 1.36)
    assert both.step.at(136) == pytest.approx(2 * (0.1 + 1.36))  # qa_lora takes 0.6 where lora would take 0.3
    assert both.image.at(3) == pytest.approx(0.006)


def test_a_step_counts_its_passes_and_blocks_that_are_computed_again(study) -> None:
    shape = describe(study("lora").backbone, 32)
    throughput = Throughput.estimated(1e9)
    image_s = throughput.image_s(shape)
    assert image_s == pytest.approx(1.8 * shape.multiply_adds / 1e9)
    blocks = len(shape.values_by_block)
    for method, recomputed, passes in (("lora", 0, 2), ("full", 0, 3), ("lora", blocks, 3), ("lora", blocks // 2, 2.5)):
        assert throughput.step_s(shape, method, 8, recomputed) == pytest.approx(8 * passes * image_s)


def test_the_first_that_fits_is_taken() -> None:
    assert fit([3, 2, 1], float, 2.0) == 2
    assert fit([3, 2], float, 1.0) is None


def simulated(seconds: list[float], workers: int, busy: list[float]) -> float:
    """Move a clock from one end of a run to the next."""
    clock, waiting, running = 0.0, list(seconds), sorted(busy)
    while waiting or running:
        while waiting and len(running) < workers:
            running.append(clock + waiting.pop(0))
        running.sort()
        clock = running.pop(0)
    return clock


def test_the_makespan_is_that_of_a_simulation() -> None:
    draw = random.Random(0)
    for workers, count, occupied in itertools.product((1, 2, 3, 7), (0, 1, 2, 5, 20), (0, 1, 2)):
        seconds = [draw.choice((1.0, 2.5, 7.0, draw.random())) for _ in range(count)]
        busy = [draw.random() * 5 for _ in range(min(occupied, workers))]
        expected = simulated(seconds, workers, busy)
        assert makespan(seconds, workers, busy=busy) == pytest.approx(expected), (seconds, workers, busy)
    assert makespan([1.0, 1.0, 1.0, 3.0], 2) == 4.0  # a long run at the end


def measured(config, image_size: int, budget_s: float, told: list[str]) -> Throughput:
    shape = describe(config.backbone, image_size)
    workload = Workload(shape, image_size, 1, torch.device("cpu"), "fp32", 1, 24, 20, 30)
    return measure_throughput(config, open_index(config.data), workload, budget_s, told.append)


@pytest.mark.slow
def test_real_steps_are_measured_at_two_sizes(study, monkeypatch) -> None:
    monkeypatch.setattr(profiling, "machine_speed", lambda: STEADY)
    seen = {}
    monkeypatch.setattr(Throughput, "measured", lambda probes, _: seen.update(probes))
    config = study("lora", "full", epochs=20)
    config = config.model_copy(update={"data": config.data.model_copy(update={"image_size": 64})})
    told: list[str] = []
    measured(config, 64, 500.0, told)
    assert told == ["measuring steps of the study's methods, 500 s at most"]
    for experiment in config.experiments:
        shapes = [describe(config.backbone, size) for size in (64, 32)]
        assert [probe.image_products for probe in seen[experiment.name]] == [shape.multiply_adds for shape in shapes]
        products = [experiment_products(experiment, shape, 800) for shape in shapes]
        assert [probe.step_products for probe in seen[experiment.name]] == pytest.approx(products)


def test_no_time_to_measure_is_said(study) -> None:
    told: list[str] = []
    throughput = measured(study("lora"), 32, 0.0, told)
    assert throughput.step == throughput.image
    assert told[1:] == ["no experiment could be measured in this time; how fast matrices are multiplied has to do"]


def test_a_busy_machine_is_told_from_a_steady_one() -> None:
    threads = torch.get_num_threads()
    found = machine_speed()
    assert found.products_per_s > 0
    assert 0 < found.cpu_share < 1.1
    assert torch.get_num_threads() == threads  # as it was
    slower, busy = "its speed before and after differs by 21%", "other programs took 50% of a core"
    for before, after, reason in (
        (STEADY, STEADY, ""),
        (STEADY, Speed(810, 1.0), ""),
        (STEADY, Speed(790, 1.0), slower),
        (Speed(790, 1.0), STEADY, slower),
        (STEADY, Speed(1000, 0.86), ""),
        (Speed(1000, 0.5), STEADY, busy),
    ):
        assert (disturbance(before, after) or "").partition(",")[0] == reason
