"""Remove a node of a Ray cluster at random moments of studies, and see every run recorded exactly once, as undisturbed.

    .venv/bin/python tests/torture/ray_nodes.py --trials 10      as `make torture` does
    .venv/bin/python tests/torture/ray_nodes.py --trials 2 --seed 7 --dry

A cluster of two nodes with one core each does a study of four runs: two methods, two seeds. One node is killed with all
of its processes, Ray's own included; it counts as a trial if a run was under way on it then. It has passed if the
study ends without a failure on the node that is left, if one end of each run was told, and if the metrics,
histories, adapter bytes and optimiser hashes equal those of runs in a process without Ray. Then a new node is added.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import harness
from at_work import PATIENCE_S
from ray.cluster_utils import Cluster
from ray_clusters import small_cluster
from tiny_studies import METHODS, NAME, End, difference, ends_of, write_study
from written_runs import run_and_write

from peft_vit.core.config import load_study
from peft_vit.runs.executors import RunEnded, RunRetried, RunStarted, StudyEvent, open_executor
from peft_vit.runs.records.progress import study_lock
from peft_vit.runs.scheduling.plan import plan_study
from peft_vit.runs.scheduling.scheduler import drive

KIND = "one of two nodes, at a random moment, with a run under way on it"
SEEDS = (0, 1)
EXPERIMENTS = {name: METHODS[name] for name in ("lora", "adalora")}
EXECUTION = {"checkpoint_every_s": 0.05, "retries": 1}


class Seen:
    """What is told of a study, with the runs that are under way on a node at any moment."""

    def __init__(self) -> None:
        self.on: dict[str, str] = {}  # node by run
        self.retried = 0
        self.ended: Counter[str] = Counter()
        self.first = threading.Event()

    def __call__(self, event: StudyEvent) -> None:
        """Take in what happened."""
        if isinstance(event, RunStarted):
            self.on[event.run.spec.run_id] = event.worker.split()[-1]
            self.first.set()
        if isinstance(event, RunEnded | RunRetried):
            self.on.pop(event.run.spec.run_id, None)
            self.retried += isinstance(event, RunRetried)
            self.ended[event.run.spec.name] += isinstance(event, RunEnded)


def study(cluster: Cluster, file: Path, seen: Seen) -> float:
    """Do the study of a file beside it; return the seconds from the first start to the end."""
    plan = plan_study(load_study(file), file.parent, file=file)
    with study_lock(file.parent / NAME) as lock:
        began = time.monotonic()

        def on_event(event: StudyEvent) -> None:
            nonlocal began
            if not seen.first.is_set():
                began = time.monotonic()
            seen(event)

        executor = partial(open_executor, "ray", plan, file.parent, ray_address=cluster.address)
        failed = drive(plan, lock, executor, on_event)
    if failed:
        raise RuntimeError(str(failed))
    return time.monotonic() - began


def trial(cluster: Cluster, folder: Path, delay_s: float, expected: Mapping[str, End]) -> tuple[bool, str | None, bool]:
    """Do a study and remove a node some time after its first run has started.

    Returns:
        Whether a run was under way on that node, what is wrong with what came out, and whether a run was retried.
    """
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes(PATIENCE_S)
    file, seen = write_study(folder, EXPERIMENTS, SEEDS, **EXECUTION), Seen()
    met: list[str] = []

    def remove() -> None:
        seen.first.wait()
        time.sleep(delay_s)
        met.extend(run for run, node in dict(seen.on).items() if node == second.node_id[:12])
        cluster.remove_node(second, allow_graceful=False)

    removing = threading.Thread(target=remove, daemon=True)
    removing.start()
    try:
        study(cluster, file, seen)
        fault = difference(folder, expected)
        if set(seen.ended.values()) != {1}:
            fault = f"ends were told: {dict(seen.ended)}"
    except RuntimeError as error:
        fault = str(error)
    removing.join()
    return bool(met), fault, seen.retried > 0


def torture(folder: Path, options: argparse.Namespace, tally: harness.Tally) -> None:
    """Remove nodes until so many removals have met a run."""
    rng = random.Random(options.seed)
    with small_cluster() as cluster:
        os.environ["PEFT_VIT_CACHE"] = str(folder / "cache")
        alone = folder / "undisturbed"  # in this process, without Ray
        file = write_study(alone, EXPERIMENTS, SEEDS, **EXECUTION)
        for run in plan_study(load_study(file), alone, file=file).runs:
            run_and_write(run.spec, alone)
        expected = ends_of(alone)
        longest_s = study(cluster, write_study(folder / "alone", EXPERIMENTS, SEEDS, **EXECUTION), Seen())
        print(f"seed {options.seed}; alone, one node takes {longest_s:.0f} s", flush=True)
        for number in itertools.count():
            if tally.trials.total() >= options.trials:
                break
            delay_s = rng.uniform(0, longest_s / 2)
            met, fault, retried = trial(cluster, folder / str(number), delay_s, expected)
            if met or fault:
                outcome = f"removed after {delay_s:.1f} s, {'retried' if retried else 'not retried'}"
                tally.add(KIND, f"--seed {options.seed}, {number}: {outcome}", fault)


if __name__ == "__main__":
    options = {"--trials": {"type": int, "default": 10}}
    harness.main("Ray node removed mid-study: each run recorded exactly once", __doc__, torture, options)
