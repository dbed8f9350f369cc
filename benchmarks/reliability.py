"""What it costs that nothing gets lost: on a training step, by checkpoint, and when a study of 1,000 runs is looked at.

    make bench      or      python benchmarks/reliability.py [--steps 96] [--image-size 112] [--threads 2] [--runs 1000]

Side by side: two runs of ViT-S/14 in the package's own `run_one`, batches of 32, make one step each in turn, in two
threads of one process. One is bare; the other tells each step to a driver in another process, waits until the driver
has written and shown it, asks whether to stop, and writes a checkpoint every 30 s of its own time. Its progress and
the result are written by that driver too. A run that does not wait for its driver, as real ones, pays less.
"""

from __future__ import annotations

from common import machine, parser, with_tuned_allocator, write

with_tuned_allocator()

import io  # noqa: E402 - torch must be loaded under the tuned allocator
import multiprocessing  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from multiprocessing.connection import Connection  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from peft_vit.base.files import checkpoint_folders  # noqa: E402
from peft_vit.core.config import StudyConfig, study_from_mapping  # noqa: E402
from peft_vit.core.records import Evaluation, Metrics, RunRecord, StepRow  # noqa: E402
from peft_vit.core.training import Checkpoints, Progress  # noqa: E402
from peft_vit.runs.execute import Finished, run_one  # noqa: E402
from peft_vit.runs.executors import Event, RunEnded, RunProgress, RunStarted  # noqa: E402
from peft_vit.runs.records.progress import study_lock  # noqa: E402
from peft_vit.runs.records.scan import read_records  # noqa: E402
from peft_vit.runs.records.storage import run_folder  # noqa: E402
from peft_vit.runs.records.storage import write_record as write_run  # noqa: E402
from peft_vit.runs.scheduling.display import StudyProgress  # noqa: E402
from peft_vit.runs.scheduling.plan import Plan, PlannedRun, plan_study  # noqa: E402
from peft_vit.runs.scheduling.scheduler import drive  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fake_study import FakeExecutor, fake_config, fake_drive, fake_plan  # noqa: E402

MODEL, BATCH, EVERY_S = "vit_small_patch14_dinov2", 32, 30.0
LOADING = 2  # first steps of a side that are not counted
MOST_STEPS = 48  # of an epoch: as many batches of digits as there are
STARTED = "started"
SITES = 72
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 8}},
    "adalora": {
        "adalora": {
            "total_rank_budget": 8 * SITES,
            "initial_budget": 12 * SITES,
            "allocation_strategy": "global",
            "importance_metric": "sensitivity",
            "warmup_steps": 2,
            "update_frequency": 4,
        }
    },
    "full": {},
}


def study(method: str, size: int, steps: int, threads: int) -> StudyConfig:
    """Return one run of a method, of at least so many steps. Random weights: they change no timing."""
    epochs = -(-steps // MOST_STEPS)
    mapping = {
        "name": "reliability",
        "seeds": [0],
        "threads": threads,
        "device": "cpu",
        "precision": "fp32",
        "backbone": {"model": MODEL, "weights": "random"},
        "data": {
            "dataset": "digits",
            "image_size": size,
            "train_images": -(-steps // epochs) * BATCH,
            "validation_images": 20,
            "test_images": 20,
            "train_subset": "fixed",
        },
        "experiments": [
            {
                "name": method,
                "method": method,
                **METHODS[method],
                "training": {"epochs": epochs, "batch_size": BATCH, "learning_rate": 1e-4},
            }
        ],
    }
    return study_from_mapping(mapping, file=Path("reliability.yaml"))


def planned(config: StudyConfig, folder: Path) -> Plan:
    """Plan it in a folder."""
    return plan_study(config, folder, file=folder / "reliability.yaml")


# --- a step with and without ------------------------------------------------------------------------------------------


class Turns:
    """Lets two threads go on in turn, and adds up what each of them takes."""

    def __init__(self) -> None:
        self._may_go = [threading.Semaphore(1), threading.Semaphore(0)]
        self._since = [0.0, 0.0]
        self.seconds: list[list[float]] = [[], []]

    def begin(self, side: int) -> None:
        """Wait for the first turn; what came before is not counted."""
        self._may_go[side].acquire()
        self._since[side] = time.perf_counter()

    def over(self, side: int) -> None:
        """End a turn, and wait for the next one."""
        self.seconds[side].append(time.perf_counter() - self._since[side])
        self._may_go[1 - side].release()
        self.begin(side)

    def leave(self, side: int) -> None:
        """End the last turn."""
        self._may_go[1 - side].release()


class Stopwatch:
    """Adds up the seconds of calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        try:
            return call()
        finally:
            self.seconds += time.perf_counter() - started


class OtherEnd:
    """Stands for an executor: its only worker is the process at the other end of a pipe, which waits for answers."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._run: PlannedRun | None = None
        self._owes_answer = False

    def submit(self, run: PlannedRun) -> None:
        self._run = run
        self._pipe.send(None)  # the driver is ready

    def next_event(self, timeout_s: float) -> Event | None:
        if self._owes_answer:  # the driver is through with what it was told last
            self._pipe.send(None)
            self._owes_answer = False
        if not self._pipe.poll(timeout_s):
            return None
        message, run = self._pipe.recv(), self._run
        assert run is not None
        self._owes_answer = True
        if isinstance(message, Progress):
            return RunProgress(run, message)
        if isinstance(message, Finished):
            return RunEnded(run, message.record, message.adapter, message.features)
        return RunStarted(run, "the benchmark")

    def stop(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        if self._owes_answer:
            self._pipe.send(None)


def drive_other_end(pipe: Connection, config: StudyConfig, folder: Path) -> None:
    """Be the driver: progress, results, and plain lines for a person."""
    plan = planned(config, folder)
    with study_lock(folder / config.name) as lock, StudyProgress(plan, console=Console(file=io.StringIO())) as watch:
        drive(plan, lock, lambda: OtherEnd(pipe), watch.on_event)


def bare_side(plan: Plan, turns: Turns) -> None:
    """Do the run as `run_one` does it for nobody."""
    first = True

    def turn() -> bool:
        nonlocal first
        turns.begin(0) if first else turns.over(0)
        first = False
        return False

    check(run_one(plan.runs[0].spec, should_stop=turn).record)
    turns.leave(0)


def kept_side(plan: Plan, turns: Turns, pipe: Connection, folder: Path, parts: dict[str, Any]) -> None:
    """Do the run as a worker does it for a driver; `parts` gets the seconds that are spent for that."""
    told, asked, once = Stopwatch(), Stopwatch(), Stopwatch()
    first = True

    def say(message: object) -> None:
        pipe.send(message)
        pipe.recv()

    def turn() -> bool:
        nonlocal first
        asked(pipe.poll)
        turns.begin(1) if first else turns.over(1)
        first = False
        return False

    once(lambda: say(STARTED))
    # Half of the time that passes is the other side's.
    checkpoints = Checkpoints(run_folder(folder, plan.runs[0].spec), 2 * EVERY_S)
    finished = run_one(
        plan.runs[0].spec,
        on_progress=lambda progress: told(lambda: say(progress)),
        should_stop=turn,
        checkpoints=checkpoints,
    )
    check(finished.record)
    turns.leave(1)
    once(lambda: say(finished))
    parts |= {
        "told_s": told.seconds,
        "asked_s": asked.seconds,
        "checkpoints_s": finished.record.overhead_s["checkpoints"],
        "progress_and_result_s": once.seconds,
    }


def check(record: RunRecord) -> None:
    """See that a run went well."""
    if record.status != "done":
        raise SystemExit(record.traceback)


def overhead(method: str, size: int, steps: int, threads: int) -> dict[str, Any]:
    """Compare a run of a method that is kept with one that is not, step by step."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = study(method, size, steps, threads)
        plan, turns, parts = planned(config, folder), Turns(), dict[str, Any]()
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        driver = context.Process(target=drive_other_end, args=(theirs, config, folder))
        driver.start()
        theirs.close()
        ours.recv()  # its process has started
        bare = threading.Thread(target=bare_side, args=(plan, turns), daemon=True)
        kept = threading.Thread(target=kept_side, args=(plan, turns, ours, folder, parts), daemon=True)
        for thread in (bare, kept):
            thread.start()
        for thread in (bare, kept):
            thread.join()
        driver.join()
        if driver.exitcode != 0 or not parts:
            raise SystemExit("one of the sides failed")
    return summed_up(method, size, *(values[LOADING:] for values in turns.seconds), parts=parts, steps=steps)


def summed_up(
    method: str, size: int, bare: list[float], kept: list[float], *, parts: dict[str, Any], steps: int
) -> dict[str, Any]:
    """Print and return the ratios of both sides, and the share of what was timed by itself."""
    added_s = sum(parts.values())
    row = {
        "method": method,
        "image_size": size,
        "steps": steps,
        "bare_step_s": round(statistics.median(bare), 5),
        "kept_step_s": round(statistics.median(kept), 5),
        "ratio_of_medians": round(statistics.median(kept) / statistics.median(bare), 5),
        "ratio_of_sums": round(sum(kept) / sum(bare), 5),
        "added_share": round(added_s / (statistics.mean(bare) * steps), 6),
        **{name: round(value, 5) for name, value in parts.items()},
    }
    print(
        f"{method}, {size} px, {steps} steps in turn: {row['bare_step_s']:.3f} s bare, ratio of medians "
        f"{row['ratio_of_medians']:.4f}, of sums {row['ratio_of_sums']:.4f}; what is added, timed by itself: "
        f"{added_s:.3f} s, {row['added_share']:.3%}",
        flush=True,
    )
    return row


def checkpoint(method: str, size: int, threads: int, number: int) -> dict[str, Any]:
    """Time checkpoints of a method: a run of a few steps writes one after each."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        spec = planned(study(method, size, number, threads), folder).runs[0].spec
        record = run_one(spec, checkpoints=Checkpoints(run_folder(folder, spec), 0)).record
        check(record)
        newest = checkpoint_folders(run_folder(folder, spec))[number]
        size_bytes = sum(file.stat().st_size for file in newest.iterdir())
    seconds = record.overhead_s["checkpoints"] / number
    print(f"{method}: {1e3 * seconds:.1f} ms a checkpoint of {size_bytes / 1e6:.1f} MB, mean of {number}", flush=True)
    return {
        "method": method,
        "mean_ms": round(1e3 * seconds, 2),
        "bytes": size_bytes,
        "n": number,
        "share_of_30_s": round(seconds / EVERY_S, 6),
    }


# --- a study of many runs ---------------------------------------------------------------------------------------------


def full_record(record: RunRecord, steps: int = 48, epochs: int = 3) -> RunRecord:
    """Return a record as long as one of the quickstart's fixed ranks."""
    metrics = Metrics(n=400, accuracy=0.8125, balanced_accuracy=0.75, auroc=0.875, nll=0.4375, ece=0.0625)
    return record.model_copy(
        update={
            "steps": [
                StepRow(step=step, loss=1 / (step + 2), learning_rate=1e-3 / 3, gradient_norm=2 / 3, seconds=4 / 7)
                for step in range(1, steps + 1)
            ],
            "evaluations": [
                Evaluation(step=steps * epoch // epochs, epoch=epoch, deployable=True, metrics=metrics)
                for epoch in range(1, epochs + 1)
            ],
            "validation": metrics,
            "test": metrics,
            "seconds_per_step": 4 / 7,
        }
    )


def many_runs(runs: int, repeats: int) -> dict[str, Any]:
    """Time `peft-vit status` as a whole command, on a study of which a tenth has failed."""
    experiments = [f"experiment_{number}" for number in range(runs // 10)]
    config = fake_config(experiments=experiments, seeds=range(10))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        outcomes = {f"{name}/seed_9": ["error"] for name in experiments}
        started = time.perf_counter()
        outcome = fake_drive(config, folder, FakeExecutor(outcomes=outcomes, steps=0))
        writing_s = time.perf_counter() - started
        assert len(outcome) == len(experiments)
        records = list(read_records(folder))
        for record in records:
            write_run(folder, full_record(record) if record.status == "done" else record)
        assert len(fake_plan(config, folder).pending) == len(experiments)
        record_bytes = (run_folder(folder, records[0].spec) / "record.json").stat().st_size
        status_s = [command("status", folder, expected=f"{runs} planned") for _ in range(repeats)]
    row = {
        "runs": runs,
        "failed": len(experiments),
        "record_bytes": record_bytes,
        "n": repeats,
        "status_s": round(statistics.median(status_s), 3),
        "status_most_s": round(max(status_s), 3),
        "writing_ms_per_run": round(1e3 * writing_s / runs, 3),
    }
    print(
        f"{runs} runs: status {row['status_s']:.2f} s (at most {row['status_most_s']:.2f}), "
        f"{row['writing_ms_per_run']} ms to write one",
        flush=True,
    )
    return row


def command(name: str, folder: Path, *, expected: str) -> float:
    """Return the seconds of a whole command, the start of its process included."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "peft_vit.cli", name, str(folder)], capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - started
    assert expected in done.stdout, done.stdout
    return seconds


def main() -> None:
    counts = {"steps": 96, "runs": 1000, "repeats": 5, "checkpoints": 12}
    options = parser(__doc__, image_size=112, threads=2, **counts).parse_args()
    torch.set_num_threads(options.threads)
    size, threads = options.image_size, options.threads
    write(
        "reliability",
        {
            "machine": machine(threads),
            "setting": {"model": MODEL, "image_size": size, "batch": BATCH, "checkpoint_every_s": EVERY_S},
            "many_runs": many_runs(options.runs, options.repeats),
            "checkpoints": [checkpoint(method, size, threads, options.checkpoints) for method in METHODS],
            "overhead": [overhead(method, size, options.steps, threads) for method in ("lora", "adalora")],
        },
    )


if __name__ == "__main__":
    main()
