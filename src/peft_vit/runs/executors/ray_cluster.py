"""Runs as tasks of a Ray cluster. Attempts that a lost node takes along are reported; the driver repeats them.

Ray itself repeats nothing (`max_retries=0`): one place decides about attempts and counts them, whatever carries them
out, and no attempt continues unseen beside its repetition.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import ray
from ray._private import services, worker
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from peft_vit.base.errors import UserError
from peft_vit.core.records import Failure
from peft_vit.core.training import Checkpoints, LostProcessError, Progress
from peft_vit.runs.executors import Event, Executor, RunStarted, failed_attempt
from peft_vit.runs.executors.local import SURROUNDINGS, environment, event_of
from peft_vit.runs.executors.ray_task import Channel, Place, carry_out, carry_out_together
from peft_vit.runs.planned import Plan, PlannedRun
from peft_vit.runs.records.progress import LOCK_FILE
from peft_vit.runs.records.storage import run_folder
from peft_vit.runs.this_machine.machine import cpu_count

_REASON_CHARACTERS = 400
_ANSWER_S = 5.0
_LISTEN_S = 0.2  # how long the driver's question waits for something to be told
# Ray gives its workers a niceness of 15. Beside other work they would get a hundredth of a core, and runs are planned
# at the pace of the driver.
_PRIORITY = {"RAY_worker_niceness": "0"}
_HANDED_DOWN = ("PEFT_VIT_CACHE", *_PRIORITY)
_LOOK_S = 2.0  # how often the driver looks for a node on which what waits could run
# What Ray's helpers take to notice that a cluster of our own is gone; by default a minute.
_OWN_CLUSTER = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_gcs_rpc_server_reconnect_timeout_s": "10"}


@dataclass(frozen=True)
class Need:
    """What a run asks of the one node that it runs on; of several processes each, wherever there is room.

    Attributes:
        cpus: of a process.
        gpus: of a process.
        memory_gb: of a process.
        devices: processes of a run.
    """

    cpus: int
    gpus: float = 0.0
    memory_gb: float | None = None
    devices: int = 1

    @property
    def resources(self) -> dict[str, float]:
        """Return what is asked for, by the names that Ray has for it."""
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": int(1e9 * (self.memory_gb or 0))}

    def refusal(self, nodes: list[dict[str, float]]) -> str | None:
        """Return why no node can ever hold a run; None if one can.

        Args:
            nodes: each node's resources, as Ray names them.
        """
        wanted = self.resources
        needed = _in_words({name: amount for name, amount in wanted.items() if amount})
        if not nodes:
            return f"a run asks for {needed}, and the cluster has no node"

        def lacks(node: dict[str, float]) -> int:
            return sum(node.get(name, 0.0) < amount for name, amount in wanted.items())

        biggest = min(nodes, key=lambda node: (lacks(node), -node.get("CPU", 0), -node.get("memory", 0)))
        if not lacks(biggest):
            if (room := self._processes(nodes)) >= self.devices:
                return None
            return f"a run asks for {self.devices} times {needed}, for which the cluster has room {room} times"
        there = _in_words({name: biggest.get(name, 0) for name in wanted})
        return f"a run asks for {needed}; the biggest node of the cluster ({len(nodes)} in all) has {there}"

    def room(self, nodes: list[dict[str, float]]) -> int:
        """Return how many runs such nodes hold at a time, at least one."""
        return max(1, self._processes(nodes) // self.devices)

    def _processes(self, nodes: list[dict[str, float]]) -> int:
        wanted = [(name, amount) for name, amount in self.resources.items() if amount]
        return sum(min(int(node.get(name, 0.0) // amount) for name, amount in wanted) for node in nodes)


def _in_words(resources: dict[str, float]) -> str:
    return ", ".join(
        f"{amount / 1e9:.1f} GB" if name == "memory" else f"{amount:g} {name}{'' if amount == 1 else 's'}"
        for name, amount in resources.items()
    )


@dataclass
class _Task:
    """A task as the driver sees it."""

    run: PlannedRun
    task: ray.ObjectRef
    since: float  # time.monotonic() of its submission, later of its start
    started: bool = False


class RayExecutor:
    """Tasks on a Ray cluster, as many at a time as its resources allow.

    A task writes checkpoints if it sees the study's folder of the driver, as the content of the study's lock shows;
    otherwise none are written, and an attempt that is lost starts from the beginning.

    Args:
        address: host:port of a cluster that this machine belongs to; "local": one of this machine alone, which ends
            with the executor; None: what RAY_ADDRESS says, else one that runs here already, else a local one.
        need: what a run asks for.
        results_dir: a run's folder with its checkpoints lies below it.
        checkpoint_every_s: see `Checkpoints`.

    Raises:
        UserError: if no cluster answers, or none of its nodes has what a run asks for.
    """

    def __init__(self, address: str | None, need: Need, results_dir: Path, checkpoint_every_s: float) -> None:
        self._connection = ExitStack()
        self._connection.enter_context(connected(address))
        self._need = need
        self._results_dir = Path(os.path.abspath(results_dir))
        self._checkpoint_every_s = checkpoint_every_s
        self._attempts: dict[int, _Task] = {}
        self._submitted = 0
        self._events: deque[Event] = deque()
        self._stopping = False
        self._looked = time.monotonic()
        if refusal := need.refusal(_nodes()):
            self._connection.close()
            raise UserError(
                f"{refusal}; lower threads, execution.gpus or execution.memory_gb, or add a node", field="execution"
            )
        beside_driver = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        channel = ray.remote(Channel).options(num_cpus=0, max_restarts=-1, scheduling_strategy=beside_driver)
        self._channel: Any = channel.remote()  # of a type that Ray makes up
        self._answer: ray.ObjectRef | None = None
        variables = {name: os.environ[name] for name in _HANDED_DOWN if name in os.environ}
        options = {"max_retries": 0, "runtime_env": {"env_vars": SURROUNDINGS | _PRIORITY | variables}}
        self._task: Any = ray.remote(carry_out).options(
            num_cpus=need.cpus, num_gpus=need.gpus, memory=need.resources["memory"], **options
        )
        self._together: Any = ray.remote(carry_out_together).options(num_cpus=0, **options)  # it only waits

    def submit(self, run: PlannedRun) -> None:
        """Take an attempt on, to be started when a node has room for it."""
        self._submitted += 1
        checkpoints = Checkpoints(run_folder(self._results_dir, run.spec), self._checkpoint_every_s)
        lock = self._results_dir / run.spec.study / LOCK_FILE
        place = Place(os.getcwd(), lock, lock.read_bytes() if lock.exists() else None)
        attempt = (self._channel, self._submitted, run.spec, checkpoints, place)
        if self._need.devices > 1 and not run.spec.experiment.is_probe:
            task = self._together.remote(self._need.resources, self._need.devices, *attempt)
        else:
            task = self._task.remote(*attempt)
        self._attempts[self._submitted] = _Task(run, task, time.monotonic())

    def next_event(self, timeout_s: float) -> Event | None:
        """Return what happened next; None if nothing did within the time."""
        deadline = time.monotonic() + timeout_s
        while not self._events:
            left_s = deadline - time.monotonic()
            if left_s < 0:
                return None
            self._answer = self._answer or self._channel.take.remote(_LISTEN_S, self._stopping)
            tasks = {attempt.task: number for number, attempt in self._attempts.items()}
            ready, _ = ray.wait([self._answer, *tasks], num_returns=1, timeout=min(left_s, _LOOK_S))
            if self._answer in ready:
                self._listen()
            ended, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=0) if tasks else ([], [])
            if ended:
                self._listen()  # what a task has told before its end may still be under way
                self._answer = self._channel.take.remote(0, self._stopping)
                self._listen()
            for task in ended:
                self._end(self._attempts.pop(tasks[task]))
            if time.monotonic() - self._looked > _LOOK_S:
                self._looked = time.monotonic()
                waiting = [number for number, attempt in self._attempts.items() if not attempt.started]
                # What waits for a node that the cluster does not have any more is given up.
                if waiting and (refusal := self._need.refusal(_nodes())):
                    for number in waiting:
                        attempt = self._attempts.pop(number)
                        ray.cancel(attempt.task)
                        reason = f"{refusal}; the same command continues when the cluster has one"
                        self._lose(attempt, reason, "killed")
        return self._events.popleft()

    def stop(self) -> None:
        """Forget what has not started; let what runs write a checkpoint and report `RunInterrupted`."""
        self._stopping = True
        for number, attempt in list(self._attempts.items()):
            if not attempt.started:
                ray.cancel(self._attempts.pop(number).task)

    def close(self) -> None:
        """End at once, whatever runs; leave no process behind."""
        if ray.is_initialized():
            with suppress(RayError):  # what is left of a cluster that breaks down
                for attempt in self._attempts.values():
                    ray.cancel(attempt.task, force=True)
                ray.kill(self._channel)
            self._connection.close()
        self._attempts.clear()

    def _listen(self) -> None:
        """Take in the answer; what belongs to an attempt that is over is dropped."""
        if self._answer is None:
            return
        answer, self._answer = self._answer, None
        try:
            bundles = ray.get(answer)
        except RayError:  # the channel has died, and Ray starts it again
            return
        for number, bundle in bundles:
            attempt = self._attempts.get(number)
            if attempt is None:
                continue
            for message in json.loads(bundle):
                if isinstance(message, dict):
                    self._events.append(event_of(attempt.run, Progress(**message)))
                else:  # by whom it is done
                    attempt.started, attempt.since = True, time.monotonic()
                    self._events.append(RunStarted(attempt.run, message))

    def _end(self, attempt: _Task) -> None:
        try:
            result = ray.get(attempt.task)
        except RayTaskError as error:
            if isinstance(error.cause, LostProcessError):
                self._lose(attempt, str(error.cause), "killed")
                return
            self._lose(attempt, f"the task failed outside of the run: {error.cause!r}", "error", str(error))
        except OutOfMemoryError as error:
            self._lose(attempt, f"Ray ended the task, since its node was out of memory: {error}", "out_of_memory")
        except RayError as error:  # a dead worker, node or object
            self._lose(attempt, f"the worker process was lost, or its node: {error}", "killed")
        else:
            self._events.append(event_of(attempt.run, result))

    def _lose(self, attempt: _Task, reason: str, failure: Failure, traceback: str | None = None) -> None:
        reason = textwrap.shorten(reason, _REASON_CHARACTERS)
        self._events.append(failed_attempt(attempt.run, reason, time.monotonic() - attempt.since, failure, traceback))


def open_executor(plan: Plan, results_dir: Path, ray_address: str | None) -> Executor:
    """Return an executor for a plan's runs.

    Raises:
        UserError: as `RayExecutor`, and if runs want a GPU and ask for none.
    """
    study, execution = plan.study, plan.study.execution
    if study.device == "cuda" and execution.gpus == 0:
        reason = "a run on Ray sees the GPUs that it asks for, and this study asks for none; set it, to 1 for example"
        raise UserError(reason, field="execution.gpus")
    need = Need(study.threads, execution.gpus, execution.memory_gb, execution.devices)
    return RayExecutor(ray_address, need, results_dir, execution.checkpoint_every_s)


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Belong to a cluster, see `RayExecutor`; a connection that is there stays as it is.

    Raises:
        UserError: if no cluster answers.
    """
    if ray.is_initialized():
        yield
        return
    cluster = _find_cluster(address or os.environ.get("RAY_ADDRESS"))
    options: dict[str, Any] = {"address": cluster, "log_to_driver": False, "logging_level": "ERROR"}
    if cluster is None:
        options |= {"address": "local", "num_cpus": cpu_count(), "include_dashboard": False}
    listen, handler = worker.listen_error_messages, signal.getsignal(signal.SIGTERM)
    try:
        # A thread of Ray's would print pages about whatever befalls a node: what a run suffers is told anyway.
        worker.listen_error_messages = lambda *_: None
        with environment({} if cluster else _OWN_CLUSTER):
            ray.init(**options)
    except Exception as error:  # of many types; each means that there is no connection
        where = cluster or "of this machine alone"
        raise _no_cluster(where, f"{type(error).__name__}: {error}") from None
    finally:
        worker.listen_error_messages = listen
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # which Ray's start makes its own affair
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def runs_at_once(cpus: int, devices: int) -> Iterator[Callable[[], int]]:
    """Yield a function that returns how many runs a cluster has room for, see `runs.executors.runs_at_once`."""
    with connected(None):
        yield lambda: Need(cpus, devices=devices).room(_nodes())


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _find_cluster(named: str | None) -> str | None:
    """Return host:port of the cluster to join; None for "local", and if nobody has named one and none runs here.

    Where nobody answers, Ray itself would try for minutes.
    """
    if named is not None and named.startswith("ray://"):
        raise _no_cluster(named, "an address of Ray's client; this command has to run on a machine of the cluster")
    try:
        cluster = services.canonicalize_bootstrap_address(cast(str, named))  # it takes None too
        if cluster is None:
            return None
        parts = urlsplit(f"//{cluster}")
        socket.create_connection((parts.hostname, parts.port), timeout=_ANSWER_S).close()
        return cluster
    except (OSError, ValueError) as error:  # a ConnectionError too is an OSError
        if named is None:
            return None
        raise _no_cluster(named, getattr(error, "strerror", None) or str(error)) from None


def _no_cluster(address: str, reason: str) -> UserError:
    reason = textwrap.shorten(reason, _REASON_CHARACTERS)
    message = f"no connection to the Ray cluster {address} ({reason}); start it, or correct the address to host:port"
    return UserError(message, field="--ray-address")
