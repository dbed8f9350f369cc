"""Runs that change their ranks kill themselves around each decision; resumed, their ranks equal undisturbed ones.

    .venv/bin/python tests/torture/killed_allocations.py                      as `make torture` does
    .venv/bin/python tests/torture/killed_allocations.py --only growing --steps 5 9 --dry

The steps are: the end of warm-up, with the first decision, and the ones before and after it; each further decision;
the last decision, and the first step of the final phase with the ones before and after it. At each of them one process
dies by SIGKILL when the ranks have changed but no checkpoint knows it, and one as soon as the checkpoint stands. Each
is forked after torch was imported, and so is the one that goes on: nothing but the checkpoint leads from one to the
other. It has passed if the second one begins at the step after the newest checkpoint, and ends with the ranks,
metrics, histories, adapter and optimiser of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
from commands import fork
from tiny_studies import METHODS, STEPS, newest_step, with_adalora, write_study

from peft_vit.core.records import RankEntry, RunSpec

KINDS: dict[str, dict[str, Any]] = {
    "physical": {"method": "adalora", **with_adalora(parametrization="svd")},
    "growing": {
        "method": "adalora",
        **with_adalora(
            total_rank_budget=18, budget_schedule="constant", parametrization="product", importance_metric="fisher"
        ),
    },
    "qa_adalora": {"method": "qa_adalora", **METHODS["qa_adalora"]},
}
MOMENTS = ("before its checkpoint", "after its checkpoint")


def attempt(spec: RunSpec, folder: Path, kill_at: tuple[int, str] | None = None) -> tuple[int, dict[str, Any]]:
    """Carry a run out in a process of its own; return its code, its first step and what it came to, or an error."""
    result, log = folder / "result.json", folder / "log.txt"
    result.unlink(missing_ok=True)
    code = fork(lambda: _run(spec, folder / "run", kill_at, result), log).finish()
    return code, json.loads(result.read_text()) if code == 0 else {"error": log.read_text()[-3000:]}


def _run(spec: RunSpec, folder: Path, kill_at: tuple[int, str] | None, result: Path) -> None:
    from peft_vit.core.training import AllocationHook, CheckpointKeeper, Checkpoints
    from peft_vit.runs.execute import run_one
    from peft_vit.runs.records.run_rows import outcome_digest

    if kill_at is not None:
        step, moment = kill_at
        if moment == MOMENTS[0]:
            _die_after(AllocationHook, "after_step", lambda _hook, _model, _optimizer, now: now == step)
        else:
            _die_after(CheckpointKeeper, "keep", lambda _keeper, now, _state: now == step)
    steps: list[int] = []
    finished = run_one(
        spec, on_progress=lambda progress: steps.append(progress.step), checkpoints=Checkpoints(folder, 0)
    )
    record = finished.record
    if record.status != "done":
        raise RuntimeError(f"{record.error}\n{record.traceback}")
    assert finished.adapter is not None
    end = {
        "ranks": [entry.model_dump(mode="json") for entry in record.rank_history],
        "optimizer": record.optimizer_sha256,
        "adapter": hashlib.sha256(finished.adapter).hexdigest(),
        "digest": outcome_digest(record),
    }
    result.write_text(json.dumps({"first": steps[0] if steps else None, "end": end}))


def _die_after(owner: type, method: str, condition: Callable[..., bool]) -> None:
    """Make this process kill itself when a call of a method has returned, if the condition holds of its arguments."""
    call = getattr(owner, method)

    def deadly(*arguments: Any) -> Any:
        result = call(*arguments)
        if condition(*arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, method, deadly)


def steps_of(ranks: list[RankEntry], kind: str) -> list[int]:
    """Return the steps at which to kill: around the first decision and the last, and at each.

    Raises:
        RuntimeError: if the ranks never moved, so that nothing would be shown.
    """
    section = KINDS[kind]["adalora"]
    decisions = [entry.step for entry in ranks if entry.step > 0]
    warm, final = section["warmup_steps"], STEPS - section["final_steps"]
    if decisions[0] != warm or decisions[-1] != final or len({str(entry.ranks) for entry in ranks}) < 2:
        raise RuntimeError(f"{kind}: the ranks were decided at {decisions} and ended as {ranks[-1].ranks}")
    return sorted({warm - 1, warm, warm + 1, *decisions, final - 1, final, final + 1, final + 2})


def torture(folder: Path, options: argparse.Namespace, tally: harness.Tally) -> None:
    """Kill and resume each kind of allocation at each step and moment."""
    from peft_vit.core.config import load_study
    from peft_vit.runs.scheduling.plan import plan_study

    for kind in options.only:
        file = write_study(folder / kind, {kind: KINDS[kind]}, (options.seed,))
        spec = plan_study(load_study(file), file.parent / "out", file=file).runs[0].spec
        code, undisturbed = attempt(spec, file.parent / "undisturbed")
        if code:
            raise RuntimeError(f"the undisturbed run ended with {code}: {undisturbed['error']}")
        ranks = [RankEntry.model_validate(entry) for entry in undisturbed["end"]["ranks"]]
        for step in options.steps or steps_of(ranks, kind):
            for moment in MOMENTS:
                place = file.parent / f"{step}-{moment.split()[0]}"
                fault = _trial(spec, place, (step, moment), undisturbed["end"])
                tally.add(kind, f"{kind}, seed {options.seed}, killed at step {step} {moment}", fault)
                shutil.rmtree(place)


def _trial(spec: RunSpec, folder: Path, kill_at: tuple[int, str], expected: dict[str, Any]) -> str | None:
    step, moment = kill_at
    code, _ = attempt(spec, folder, kill_at)
    if code != -signal.SIGKILL:
        return f"it was not killed, but ended with {code}"
    left = newest_step(folder / "run")
    if left != (step - 1 if moment == MOMENTS[0] else step):
        return f"its newest checkpoint is of step {left}"
    code, result = attempt(spec, folder)
    if code:
        return f"the run ended with {code}: {result['error']}"
    if result["first"] != (left + 1 if left < STEPS else None):
        return f"it went on with step {result['first']} from a checkpoint of step {left}"
    different = [field for field in expected if result["end"][field] != expected[field]]
    return f"{different} differ" if different else None


if __name__ == "__main__":
    options = {
        "--only": {"nargs": "+", "default": list(KINDS), "choices": KINDS, "help": "these kinds of allocation"},
        "--steps": {"nargs": "+", "type": int, "help": "instead of all that matter"},
    }
    harness.main("AdaLoRA killed around each decision: identical ranks", __doc__, torture, options, seed=0)
