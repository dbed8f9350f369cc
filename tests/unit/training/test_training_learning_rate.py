"""The learning rate goes up, stays, and comes down in time for the end or when validation gains nothing more."""

from itertools import accumulate
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prepared_methods import DeployableFrom

from peft_vit.core.adapters import attach_adapters
from peft_vit.core.backbones import find_sites
from peft_vit.core.config import TrainingConfig
from peft_vit.core.records import Metrics
from peft_vit.core.tasks import CLASSIFICATION
from peft_vit.core.training import loop, train
from peft_vit.core.training.loop import TrainingState
from peft_vit.core.training.optimization import WarmupStableDecay, build_scheduler, one_cycle

pytestmark = pytest.mark.part("runner")


def test_up_in_a_line_over_its_share_then_one_then_down_in_a_line() -> None:
    course = WarmupStableDecay(100)
    factors = [course(step) for step in range(101)]
    assert factors[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert factors[9:80] == [1.0] * 71
    assert factors[80:] == pytest.approx(np.arange(20, -1, -1) / 21)  # a fifth of the run
    assert WarmupStableDecay(10_000)(19) == 1.0 > WarmupStableDecay(10_000)(18)
    course = WarmupStableDecay(100, 0.4)
    assert [course(step) for step in range(41)] == pytest.approx([*np.arange(1, 41) / 40, 1])
    assert [WarmupStableDecay(100, 0.0)(step) for step in (0, 1, 79)] == [1.0, 1.0, 1.0]
    assert WarmupStableDecay(10_000, 0.01).warmup_steps == 100


def test_the_way_down_may_begin_at_any_step_and_begins_once() -> None:
    course = WarmupStableDecay(100)
    assert course.bring_down(40) == 50  # a quarter of the steps before it
    assert [course(step) for step in (39, 45, 49, 50, 60)] == pytest.approx([1, 5 / 11, 1 / 11, 0, 0])
    assert course.bring_down(44) == 50
    late = WarmupStableDecay(100)
    assert late.bring_down(80) == late.bring_down(90) == 100
    assert late(80) == pytest.approx(20 / 21)
    assert WarmupStableDecay(100).bring_down(79) == 99
    assert WarmupStableDecay(1)(0) == 0.5
    assert WarmupStableDecay(3).bring_down(1) == 2


@pytest.mark.parametrize("share", [None, 0.0, 0.1, 0.3, 0.5, 0.95])
@pytest.mark.parametrize("steps", [12, 40])
def test_one_cycle_warms_up_over_its_share_of_the_steps(share, steps) -> None:
    """As torch has it, and by the formula: cosines from 1/25 to 1 and from 1 to 1/250,000."""
    training = TrainingConfig(steps=steps, learning_rate=2.0, warmup_share=share)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 2.0)
    scheduler, _ = build_scheduler(optimizer, training, steps)
    top = (0.3 if share is None else share) * steps - 1  # step of the peak, counted from 0
    for step in range(steps):
        if step <= top:
            start, end, part = 1 / 25, 1.0, step / top
        else:
            start, end, part = 1.0, 1 / 25 / 1e4, (step - top) / (steps - 1 - top)
        expected = end + (start - end) / 2 * (1 + np.cos(np.pi * part))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * expected, rel=1e-6)
        optimizer.step()
        scheduler.step()


def config(**settings) -> TrainingConfig:
    default = {"steps": 40, "validate_every": 2, "patience": 2, "batch_size": 8, "learning_rate": 1e-3}
    return TrainingConfig(**{**default, **settings})


@pytest.fixture
def trained(tiny_vit, data, runtime, monkeypatch):
    """Train with planted validation accuracies: rising up to a step, then one less."""

    def make(best: int, *hooks, **settings):
        validate, now = TrainingState.validate, [0]

        def watched(state: TrainingState) -> None:
            now[0] = state.steps
            validate(state)

        def planted(*_) -> Metrics:
            accuracy = min(now[0], best - 1 if now[0] > best else best) / 100
            return Metrics(n=1, accuracy=accuracy, balanced_accuracy=accuracy, auroc=None, nll=1.0, ece=0.0)

        monkeypatch.setattr(TrainingState, "validate", watched)
        monkeypatch.setattr(type(CLASSIFICATION), "measure", planted)
        model = tiny_vit()
        attach_adapters(model, find_sites(model), 1, scale=1.0, seed=0)
        return train(model, data(), config(**settings), runtime, seed=0, hooks=hooks)

    return make


def rates(result) -> list[float]:
    return [row.learning_rate / 1e-3 for row in result.steps]


def test_patience_with_a_constant_rate_ends_at_once(trained) -> None:
    result = trained(6, schedule="constant")
    assert [evaluation.step for evaluation in result.evaluations] == [2, 4, 6, 8, 10]  # 8 and 10 bring no gain
    assert (len(result.steps), result.chosen.step) == (10, 6)
    assert rates(result) == pytest.approx([1.0] * 10)


def test_patience_brings_the_rate_down(trained) -> None:
    result = trained(14, schedule="warmup_stable_decay")
    # 16 and 18 bring no gain; the way down takes a quarter of 18 steps, and the last step is validated.
    assert [evaluation.step for evaluation in result.evaluations] == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]
    assert rates(result)[3:18] == pytest.approx([1.0] * 15)
    assert rates(result)[19:] == pytest.approx([3 / 5, 2 / 5, 1 / 5])
    assert result.chosen.step == 14


def test_without_a_reason_to_end_it_comes_down_in_time(trained) -> None:
    result = trained(99, schedule="warmup_stable_decay")
    assert len(result.steps) == 40
    assert rates(result)[:5] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1])
    assert rates(result)[32:] == pytest.approx(np.arange(8, 0, -1) / 9)
    assert result.chosen.step == 40


def test_validations_of_what_can_t_be_chosen_do_not_count(trained) -> None:
    result = trained(2, DeployableFrom(13), schedule="constant")
    assert [evaluation.deployable for evaluation in result.evaluations] == [False] * 6 + [True] * 3
    assert (len(result.steps), result.chosen.step) == (18, 14)


@pytest.mark.parametrize(
    ("settings", "steps", "validated"),
    [
        ({"steps": 7, "validate_every": 3}, 7, [3, 6, 7]),
        ({"steps": 6, "validate_every": None}, 6, [3, 6]),
        ({"steps": 2, "validate_every": 5}, 2, [2]),
        ({"steps": None, "epochs": 2, "validate_every": 4}, 6, [4, 6]),
    ],
)
def test_steps_and_validations_are_those_asked_for(trained, settings, steps, validated) -> None:
    settings = {"patience": None, "schedule": "constant", **settings}
    result = trained(99, **settings)
    assert len(result.steps) == steps == config(**settings).total_steps(18)
    assert (
        [evaluation.step for evaluation in result.evaluations] == validated == config(**settings).validation_steps(18)
    )


@pytest.mark.parametrize("schedule", ["one_cycle", "warmup_stable_decay"])
@pytest.mark.parametrize(("seconds", "steps"), [(None, 40), (100, 40), (60, 30)])
def test_steps_that_become_slower_are_fewer(trained, monkeypatch, schedule, seconds, steps) -> None:
    moments = accumulate([1] * 32 + [3] * 48)  # two a step: sixteen steps of a second, then three seconds each
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    result = trained(99, patience=None, schedule=schedule, seconds=seconds)
    assert len(result.steps) == steps
    assert [evaluation.step for evaluation in result.evaluations] == [*range(2, steps + 1, 2)]
    assert rates(result)[-1] < 0.2 < max(rates(result)[:25])


def test_steps_that_become_faster_are_as_many_as_were_planned(trained, monkeypatch) -> None:
    moments = accumulate([3] * 16 + [1] * 64)  # eight steps of three seconds each, which leave time for twelve more
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(moments)))
    result = trained(99, patience=None, schedule="one_cycle", seconds=60)
    assert len(result.steps) == 40
    assert rates(result)[15] < 0.2 < rates(result)[16] > rates(result)[-1]


def test_a_shorter_cycle_continues_as_if_it_had_always_been_short() -> None:
    config = TrainingConfig(learning_rate=3e-3, steps=100)
    short, cut = (torch.optim.AdamW([torch.zeros(1, requires_grad=True)]) for _ in range(2))
    of_short, of_cut = one_cycle(short, config, 40), one_cycle(cut, config, 100)
    for done in range(1, 40):
        for optimizer, scheduler in ((short, of_short), (cut, of_cut)):
            optimizer.step()
            scheduler.step()
        if done == 7:
            of_cut = one_cycle(cut, config, 40, done)
        assert (short.param_groups[0]["lr"] == cut.param_groups[0]["lr"]) == (done >= 7)
