"""Runs on Ray: on one node, on two and after one of them is lost the results are those of this process."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from at_work import at_work, events_of, left_by_killed_driver, of
from ray.cluster_utils import Cluster
from ray_clusters import small_cluster
from small_methods import EXPERIMENTS
from written_runs import planned, tiny_study

from peft_vit.base.errors import UserError
from peft_vit.core.config import StudyConfig, study_from_mapping
from peft_vit.runs.execute import run_one
from peft_vit.runs.executors import RunEnded, RunInterrupted, RunProgress, RunRetried, RunStarted, open_executor
from peft_vit.runs.executors.ray_cluster import Need, RayExecutor
from peft_vit.runs.records.progress import study_lock
from peft_vit.runs.records.run_rows import outcome_digest
from peft_vit.runs.records.scan import read_records
from peft_vit.runs.scheduling.scheduler import drive

pytestmark = [pytest.mark.part("runner"), pytest.mark.slow]


def study(**epochs: int) -> StudyConfig:
    """Make a study of some experiments, each with its number of epochs, which are of three steps."""
    training = {"batch_size": 8, "learning_rate": 3e-3}
    mapping = tiny_study(
        execution={"checkpoint_every_s": 0},
        data={"dataset": "digits", "image_size": 32, "train_images": 24, "validation_images": 20, "test_images": 30},
        experiments=[
            {"name": name, "training": {"epochs": number, **training}, **EXPERIMENTS[name]}
            for name, number in epochs.items()
        ],
    )
    return study_from_mapping(mapping, file=Path("tiny.yaml"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start a cluster of one node with one core."""
    with small_cluster() as made:
        yield made


def kinds_of(events: list, name: str) -> list[type]:
    return [type(event) for event in of(events, object, name)]


def test_one_node_and_a_stop(cluster: Cluster, cache: str, tmp_path: Path) -> None:
    plan = planned(study(adaptive=2, full=100_000, lora=2), tmp_path)
    expected = outcome_digest(run_one(plan.runs[0].spec).record)
    with study_lock(tmp_path / "tiny"):
        with at_work(open_executor("ray", plan, tmp_path, ray_address=cluster.address), *plan.runs) as executor:
            events = events_of(executor, lambda e: of(e, RunProgress, "full"))
            worker = psutil.Process(int(of(events, RunStarted, "full")[0].worker.split()[1]))
            assert worker.nice() < 15  # which is Ray's own choice
            executor.stop()
            events += events_of(executor, lambda e: of(e, RunInterrupted))
            assert executor.next_event(0.5) is None
        step = events[-1].step
        assert step > 0
        assert (tmp_path / "tiny" / "full" / "seed_0" / f"checkpoint-{step}").is_dir()
    assert kinds_of(events, "adaptive") == [RunStarted, *8 * [RunProgress], RunEnded]
    assert set(kinds_of(events, "full")[1:-1]) == {RunProgress}
    assert not kinds_of(events, "lora")  # what had not started was forgotten
    assert outcome_digest(of(events, RunEnded)[0].record) == expected
    assert of(events, RunEnded)[0].adapter
    assert [event.progress.step for event in of(events, RunProgress, "adaptive")] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert not ray.is_initialized()


def test_two_nodes_of_which_one_is_lost(cluster, cache, tmp_path, capfd) -> None:
    second = cluster.add_node(num_cpus=1)
    plan = planned(study(full=120, lora=120, adaptive=2), tmp_path)  # the two are under way for seconds
    expected = {run.spec.run_id: outcome_digest(run_one(run.spec).record) for run in plan.runs}
    told: list = []
    there: dict[str, str] = {}  # run by the node that it started on

    def lose_the_second_node(event: object) -> None:
        told.append(event)
        if isinstance(event, RunStarted):
            there[event.worker.split()[-1]] = event.run.spec.run_id
        on_second = there.get(second.node_id[:12])
        # A step is told before its checkpoint is written.
        past_a_checkpoint = isinstance(event, RunProgress) and event.progress.step > 3
        if past_a_checkpoint and event.run.spec.run_id == on_second and second in cluster.worker_nodes:
            cluster.remove_node(second, allow_graceful=False)

    with study_lock(tmp_path / "tiny") as lock:
        drive(
            plan, lock, lambda: open_executor("ray", plan, tmp_path, ray_address=cluster.address), lose_the_second_node
        )
    assert "raylet" not in "".join(capfd.readouterr())  # of which Ray itself would print pages
    assert len(there) == 2
    (retried,) = of(told, RunRetried)
    assert retried.run.spec.run_id == there[second.node_id[:12]]
    assert retried.record.failure == "killed"
    assert "node" in retried.record.error
    again = told.index(retried)
    steps = [event.progress.step for event in of(told[again:], RunProgress, retried.run.spec.experiment.name)]
    assert steps[0] > 1  # it went on from a checkpoint
    assert sorted(event.run.spec.experiment.name for event in of(told, RunEnded)) == ["adaptive", "full", "lora"]
    assert sorted(record.attempts for record in read_records(tmp_path)) == [1, 1, 2]
    assert {record.spec.run_id: outcome_digest(record) for record in read_records(tmp_path)} == expected


def test_what_no_node_has_is_refused_before_any_run(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^execution: a run asks for 1 CPU, 3 GPUs; the biggest node"):
        RayExecutor(cluster.address, Need(1, gpus=3), tmp_path, 30)
    assert not ray.is_initialized()


@pytest.mark.parametrize("own", [False, True], ids=["a cluster that was there", "its own cluster"])
def test_a_killed_driver_leaves_no_process_behind(cluster: Cluster, cache: str, tmp_path: Path, own: bool) -> None:
    """Helpers of Ray among them, which look for their node now and then."""
    make = (
        "from ray_clusters import patient_ray; from peft_vit.runs.executors.ray_cluster import Need, RayExecutor\n"
        f"    address = {('local' if own else cluster.address)!r}\n"
        "    with patient_ray(): executor = RayExecutor(address, Need(1), folder, 30)"
    )
    started, left = left_by_killed_driver(tmp_path, make)
    assert (started > 1) == own
    assert left == []
