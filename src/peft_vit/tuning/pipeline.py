"""From images and limits to a choice, stage by stage; each is told, and each can be killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_vit.config import named_as_typed
from peft_vit.extras import require_extra
from peft_vit.records.progress import study_lock
from peft_vit.tasks import DecidingMetric
from peft_vit.tuning.limits import TimeExport, time_exported
from peft_vit.tuning.look import IMAGES_FILE, MakeRunner, context_of
from peft_vit.tuning.output import check_output, write_output
from peft_vit.tuning.result import Choice
from peft_vit.tuning.running import Runner, StudyRunner
from peft_vit.tuning.stages import (
    choose_backbone,
    choose_rates,
    finish,
    keep_memory,
    look_at_machine,
    more_time,
    prepare_race,
)
from peft_vit.tuning.state import State
from peft_vit.tuning.throughput import MeasureThroughput, measure_throughput
from peft_vit.tuning.tune_request import TuneRequest


def study_runner(state: State, metric: DecidingMetric) -> Runner:
    """Return what does runs as studies below the output."""
    return StudyRunner(state.studies, metric, state.request.executor, state.tell)


@dataclass(frozen=True)
class Environment:
    """How the outside world is asked; simulations have another one.

    Attributes:
        make_runner: does runs.
        measure: see `measure_throughput`.
        time_export: see `time_exported`.
        write_output: writes model, card and report.
        clock: in seconds.
    """

    make_runner: MakeRunner = study_runner
    measure: MeasureThroughput = measure_throughput
    time_export: TimeExport = time_exported
    write_output: Callable[[Choice, Path, Callable[[str], None]], Any] = write_output
    clock: Callable[[], float] = time.monotonic


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def tune(request: TuneRequest, tell: Callable[[str], None] = say, environment: Environment | None = None) -> Choice:
    """Find the smallest model that is shown to be good enough, within limits and time.

    Args:
        request: what is asked for.
        tell: told what is done and found, a line each.
        environment: other ones than worker processes and this machine's clock.

    Raises:
        UserError: for bad input, before anything is trained; see `inspect_images`, `limits`, `check_output` and
            `State.opened`. Also if another command works on the same output.
        KeyboardInterrupt: after Ctrl-C; the same request goes on.
    """
    require_extra("tune", "tune")
    check_output(request)
    with named_as_typed(TuneRequest), study_lock(request.output):
        return _tune(request, tell, environment or Environment())


@contextmanager
def _removed_if_refused(state: State, file: Path) -> Iterator[None]:
    """Take a file away again that was written before the tuning could begin, if it can't."""
    try:
        yield
    finally:
        if not state.begun:
            file.unlink(missing_ok=True)


def _tune(request: TuneRequest, tell: Callable[[str], None], environment: Environment) -> Choice:
    state = State.opened(request, tell, environment.clock)
    state.tell_what_stays()
    was_there = (request.output / IMAGES_FILE).exists()
    with state.stage("look"):
        context = context_of(state, environment.make_runner)
    with state.stage("machine"), nullcontext() if was_there else _removed_if_refused(state, context.images_file):
        machine, tried = look_at_machine(context, environment.measure, environment.time_export)
        tried, memories = keep_memory(context, tried)
        state.begin()
    with state.stage("probes"):
        backbone, probes = choose_backbone(context, machine, tried)
    memory = memories.get((backbone.model, backbone.image_size), {})
    with state.stage("rates"):
        found, rates = choose_rates(context, backbone, memory)
    with state.stage("race"):
        contest = prepare_race(context, backbone, found, memory)
        raced = contest.run()
        tell(f"  {'chosen' if raced.shown else 'NOT DECIDED'}: {raced.chosen}, {raced.why}")
        more = more_time(contest, machine, raced)
        if more is not None:
            tell(f"  {more}")
    with state.stage("final"):
        final = finish(contest, found, raced, memory)
    choice = Choice(
        request=request,
        seen=context.seen,
        images_file=context.images_file,
        metric=context.metric,
        model=backbone.model,
        image_size=backbone.image_size,
        probes=probes,
        rates=rates,
        candidates=raced.candidates,
        chosen=raced.chosen,
        reference=raced.reference,
        shown=raced.shown,
        why=raced.why,
        more_time=more,
        folds_dir=state.studies / "race",
        fold_runs={name: tuple(one.folder for one in contest.folds(name)) for name in final},
        final_runs=final,
        stages=tuple(state.file.seconds.items()),
    )
    with state.stage("output"):
        environment.write_output(choice, request.output, tell)
    return choice
