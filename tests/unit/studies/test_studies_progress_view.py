"""What a person sees of two runs at a time that really happen, one of them failing, one stopped."""

import io
import re
import time
from dataclasses import replace

import pytest
from at_work import at_work, events_of, of
from rich.console import Console

from peft_vit.studies import display
from peft_vit.studies.display import Watch
from peft_vit.studies.executors import Notice, RunEnded, RunInterrupted, RunProgress, RunRetried, RunStarted
from peft_vit.studies.executors.local import LocalExecutor
from peft_vit.studies.plan import Plan, plan_study
from peft_vit.training import Progress

pytestmark = pytest.mark.part("runner")


@pytest.fixture(scope="module")
def happened(_session_cache, method_sections, tmp_path_factory):
    """Return a plan of adaptive ranks, low bits and a run that diverges, and all that two workers told of it."""
    from peft_vit.config import study_from_mapping

    folder = tmp_path_factory.mktemp("watched")
    training = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3}
    diverging = {**training, "learning_rate": 1e30, "optimizer": "sgd", "clip_norm": None}
    mapping = {
        "name": "tiny",
        "seeds": [0],
        "threads": 1,
        "device": "cpu",
        "precision": "fp32",
        "execution": {"workers": 2},
        "backbone": {"model": "test_vit", "weights": "random"},
        "data": {"dataset": "digits", "image_size": 32, "train_images": 24, "validation_images": 20, "test_images": 30},
        "experiments": [
            {"name": "adaptive", "method": "adalora", "training": training, **method_sections["adalora"]},
            {"name": "quantized", "method": "qa_lora", "training": training, **method_sections["qa_lora"]},
            {"name": "diverging", "method": "full", "training": diverging},
        ],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_VIT_CACHE", _session_cache)
        plan = plan_study(study_from_mapping(mapping, file=folder / "tiny.yaml"), folder, file=folder / "tiny.yaml")
        with at_work(LocalExecutor(2, 1, folder, oversubscribe=True), *plan.runs) as executor:
            events = events_of(executor, lambda events: len(of(events, RunEnded)) == 3)
    assert sorted(event.record.status for event in events if isinstance(event, RunEnded)) == ["done", "done", "failed"]
    return plan, events


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None, legacy_windows=False)


def shown(plan: Plan, events) -> list[str]:
    """Return the lines that a watch prints where the output is no terminal."""
    plain = console(terminal=False)
    with Watch(plan, console=plain) as watch:
        for event in events:
            watch.on_event(event)
    return plain.file.getvalue().splitlines()


def test_plain_lines_say_what_a_terminal_shows(happened, monkeypatch) -> None:
    monkeypatch.setattr(display, "_PLAIN_EVERY_S", 0.0)
    plan, events = happened
    lines = shown(plan, events)
    started = [line for line in lines if "started on process" in line]
    assert len(started) == 3
    steps = [line for line in lines if "tiny/adaptive/seed_0: step" in line]
    assert len(steps) == sum(isinstance(e, RunProgress) and e.run.spec.experiment.name == "adaptive" for e in events)
    last = [e.progress for e in events if isinstance(e, RunProgress) and e.run.spec.experiment.name == "adaptive"][-1]
    wanted = (
        f"step 6/6, loss {last.loss:.3f}, validation {last.validation_accuracy:.1%}, mean rank {last.mean_rank:.1f}; "
    )
    assert wanted in steps[-1]
    bits = [line for line in lines if "tiny/quantized/seed_0: step" in line]
    assert all("mean rank 2.0, mean bits 6.0; " in line for line in bits)
    end = r"\[\d/3\] tiny/quantized/seed_0: validation \d+\.\d%, loss \d\.\d+, \d+ s, \d+ MB(; about .* left)?"
    assert any(re.fullmatch(end, line) for line in lines)
    assert re.search(r"\[\d/3\] tiny/diverging/seed_0: FAILED, DivergedError: ", str(lines))
    assert "[3/3] " in [line for line in lines if line.startswith("[")][-1]


def test_plain_lines_are_few(happened) -> None:
    plan, events = happened
    assert not [line for line in shown(plan, events) if ": step " in line]  # one each 30 s


def test_a_terminal_shows_all_that_runs_at_a_moment(happened) -> None:
    plan, events = happened
    terminal = console(terminal=True)
    with Watch(plan, console=terminal) as watch:
        before = console(terminal=False)
        before.print(watch._view())
        assert re.fullmatch(r"0 of 3 runs ended, about .* left\n", before.file.getvalue())
        for event in events:
            watch.on_event(event)
            if isinstance(event, RunProgress) and event.progress.step == 5:
                break
        view = console(terminal=False)
        view.print(watch._view())
    running = {e.run.spec.experiment.name for e in events[: events.index(event)] if isinstance(e, RunStarted)}
    running -= {e.run.spec.experiment.name for e in events[: events.index(event)] if isinstance(e, RunEnded)}
    header, *rows, total = view.file.getvalue().splitlines()
    assert header.split() == ["run", "step", "left", "loss", "validation", "rank", "bits"]
    assert {row.split("/")[0] for row in rows} == running
    (row,) = [row for row in rows if row.startswith(event.run.spec.experiment.name)]
    cells = row.split()
    assert cells[:2] == [f"{event.run.spec.experiment.name}/seed_0", "5/6"]
    assert f"{event.progress.loss:.3f}" in cells
    assert f"{event.progress.validation_accuracy:.1%}" in cells
    assert f"{event.progress.mean_rank:.1f}" in cells
    assert re.fullmatch(r"\d of 3 runs ended, about .* left", total)
    assert "seed_0" in terminal.file.getvalue()  # the table was drawn at least once


def test_a_terminal_that_can_do_nothing_gets_lines(happened, monkeypatch) -> None:
    monkeypatch.setattr(display, "_PLAIN_EVERY_S", 0.0)
    plan, events = happened
    dumb = Console(file=io.StringIO(), force_terminal=True, width=120, _environ={"TERM": "dumb"})
    with Watch(plan, console=dumb) as watch:
        for event in events:
            watch.on_event(event)
    assert "\x1b[" not in dumb.file.getvalue().replace("\x1b[0m", "")
    assert "mean bits 6.0" in dumb.file.getvalue()


def test_retries_stops_and_notices_are_said(happened) -> None:
    plan, events = happened
    failed = next(event.record for event in events if isinstance(event, RunEnded) and event.record.status == "failed")
    first = plan.runs[0]
    lines = shown(
        plan,
        [
            Notice("its progress.json can't be read"),
            RunStarted(first, "a node"),
            RunRetried(first, failed.model_copy(update={"error": "the worker was killed"})),
            RunStarted(first, "another"),
            RunInterrupted(first, 4),
        ],
    )
    assert lines == [
        "its progress.json can't be read",
        "[0/3] tiny/adaptive/seed_0: started on a node",
        "[0/3] tiny/adaptive/seed_0: the worker was killed; it is tried again",
        "[0/3] tiny/adaptive/seed_0: started on another",
        "[0/3] tiny/adaptive/seed_0: stopped after step 4",
    ]


def test_what_is_left_follows_from_the_run_itself(happened, monkeypatch) -> None:
    """A run that goes on at step 100 and makes 10 steps in 20 s has 90 steps and 180 s left; before, half of it all."""
    plan, _ = happened
    clock = [1000.0]
    monkeypatch.setattr(display, "_PLAIN_EVERY_S", 15.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    run = replace(plan.runs[0], total_steps=200, estimate=replace(plan.runs[0].estimate, seconds=50.0))
    plain = console(terminal=False)
    with Watch(plan, console=plain) as watch:
        watch.on_event(RunStarted(run, "here"))
        clock[0] += 90.0  # its process starts
        watch.on_event(RunProgress(run, Progress(100, 200, 0.5, None)))
        clock[0] += 20.0
        watch.on_event(RunProgress(run, Progress(110, 200, 0.4, 0.75)))
    assert plain.file.getvalue().splitlines()[-2:] == [
        "[0/3] tiny/adaptive/seed_0: step 100/200, loss 0.500; 25 s left",
        "[0/3] tiny/adaptive/seed_0: step 110/200, loss 0.400, validation 75.0%; 3.0 min left",
    ]
