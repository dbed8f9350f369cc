"""What carries out the runs of a study: worker processes on this machine, or tasks on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from peft_vit.config import ExecutorName
from peft_vit.errors import UserError
from peft_vit.extras import require_extra
from peft_vit.studies.events import Executor

if TYPE_CHECKING:  # parts of this package need no torch
    from peft_vit.studies.plan import Plan, PlannedRun

__all__ = ["decode_images", "open_executor"]


def open_executor(
    name: ExecutorName, plan: Plan, results_dir: Path, *, oversubscribe: bool = False, ray_address: str | None = None
) -> Executor:
    """Make what carries out a plan's pending runs; their images are decoded here, so that workers find them.

    Args:
        name: which one.
        plan: says how many workers, and what a run needs.
        results_dir: checkpoints lie below it.
        oversubscribe: `local` may use more threads than there are cores.
        ray_address: see `RayExecutor`.

    Raises:
        UserError: if an image is broken, or what runs need is not there.
    """
    study, execution = plan.study, plan.study.execution
    executor: Executor
    if name == "ray":
        if oversubscribe:
            problem = "has no effect with --executor ray, where a node counts its cores itself; leave it out"
            raise UserError(problem, field="--oversubscribe")
        if study.device == "cuda" and execution.gpus == 0:
            problem = "a run on Ray sees the GPUs that it asks for, and this study asks for none; set it, to 1 for "
            raise UserError(f"{problem}example", field="execution.gpus")
        require_extra("ray", field="--executor ray")
        from peft_vit.studies.executors.ray_cluster import Need, RayExecutor

        need = Need(study.threads, execution.gpus, execution.memory_gb)
        executor = RayExecutor(ray_address, need, results_dir, checkpoint_every_s=execution.checkpoint_every_s)
    else:
        if ray_address is not None:
            raise UserError("has no effect with --executor local; add --executor ray", field="--ray-address")
        from peft_vit.studies.executors.local import LocalExecutor

        executor = LocalExecutor(
            execution.workers,
            study.threads,
            results_dir,
            checkpoint_every_s=execution.checkpoint_every_s,
            oversubscribe=oversubscribe,
        )
    try:
        decode_images(plan.pending)
    except BaseException:
        executor.close()
        raise
    return executor


def decode_images(runs: Iterable[PlannedRun]) -> None:
    """Bring every image that runs will need into the cache: a broken one should show before training, once.

    Raises:
        UserError: see `load_data`.
    """
    from peft_vit.data import load_data

    for data, seed, smoke in dict.fromkeys((run.spec.data, run.spec.seed, run.spec.smoke) for run in runs):
        load_data(data, seed, smoke=smoke)
