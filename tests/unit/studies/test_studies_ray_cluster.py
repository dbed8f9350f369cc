"""What is refused before anything runs on Ray; no cluster is started here."""

import socket
from dataclasses import replace

import pytest
import ray
from written_runs import planned

from peft_vit.base.errors import UserError
from peft_vit.lab.request import RunRequest
from peft_vit.lab.run_studies import run_studies
from peft_vit.runs.executors import open_executor
from peft_vit.runs.executors.ray_cluster import Need, RayExecutor
from peft_vit.runs.executors.ray_task import Place

pytestmark = pytest.mark.part("runner")

SMALL = {"CPU": 2.0, "memory": 4e9, "node:10.0.0.1": 1.0}
GPU = {"CPU": 8.0, "GPU": 1.0, "memory": 16e9}


@pytest.mark.parametrize(
    ("need", "nodes", "biggest"),
    [
        (Need(2), [SMALL], None),
        (Need(8, 0.5, 16), [SMALL, GPU], None),
        (Need(3), [SMALL], "2 CPUs, 0 GPUs, 4.0 GB"),
        (Need(2, 2, 4.5), [SMALL, GPU, SMALL], "8 CPUs, 1 GPU, 16.0 GB"),
        (Need(4, 1, 4), [SMALL | {"CPU": 4.0}, SMALL | {"GPU": 1.0}], "4 CPUs, 0 GPUs, 4.0 GB"),  # two are not one
        (Need(1), [], "no node"),
    ],
)
def test_what_a_run_needs_has_to_be_on_one_node(need, nodes, biggest) -> None:
    refusal = need.refusal(nodes)
    assert (refusal is None) if biggest is None else refusal.endswith(biggest)


@pytest.mark.parametrize(
    ("need", "nodes", "room"),
    [(Need(1), [SMALL, GPU], 10), (Need(2, 0.5), [SMALL, GPU], 2), (Need(1, devices=4), [SMALL, SMALL, SMALL], 1)],
)
def test_how_many_runs_a_cluster_holds_at_a_time(need, nodes, room) -> None:
    assert need.room(nodes) == room
    assert need.room([]) == 1  # its nodes may come back


@pytest.mark.parametrize("named", ["", "by the environment", "ray://head:10001", "head", "127.0.0.1:port"])
def test_ray_is_not_asked_for_an_address_at_which_nobody_answers_or_of_another_kind(
    tmp_path, monkeypatch, named
) -> None:
    """It would try for minutes."""
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", free)
    address = {"": free, "by the environment": None}.get(named, named)
    reason = r"\(.*refused" if address in (free, None) else ".* correct the address to host:port"
    with pytest.raises(
        UserError, match=rf"^--ray-address: no connection to the Ray cluster {address or free} {reason}"
    ):
        RayExecutor(address, Need(1), tmp_path, 30)


REFUSED = [
    ("ray", {}, {}, r"executor ray: needs the package ray; run: pip install 'peft-vit\[ray\]'$"),
    ("ray", {}, {"device": "cuda"}, r"execution\.gpus: a run on Ray sees the GPUs that it asks for"),
    ("local", {"ray_address": "head:6379"}, {}, "ray-address: has no effect with --executor local"),
]


@pytest.mark.parametrize(("executor", "options", "settings", "words"), REFUSED)
def test_what_would_change_nothing_or_can_not_be_had_is_refused(
    study, tmp_path, without, executor, options, settings, words
) -> None:
    plan = planned(study("linear"), tmp_path)
    if "package" in words:
        without("ray")
    with pytest.raises(UserError, match=f"^(--)?{words}"):
        open_executor(executor, replace(plan, study=plan.study.model_copy(update=settings)), tmp_path, **options)
    with pytest.raises(UserError, match=r"^--workers: has no effect with --executor ray"):
        run_studies(RunRequest.of(configs=[], output=tmp_path, workers=2, executor="ray"))


def test_checkpoints_are_written_only_where_the_drivers_files_are_seen(tmp_path) -> None:
    lock = tmp_path / "lock"
    lock.write_bytes(b"driver 1")
    assert Place(str(tmp_path), lock, b"driver 1").is_seen()
    assert not Place(str(tmp_path), lock, b"driver 2").is_seen()  # a folder of the same name on another machine
    assert not Place(str(tmp_path), tmp_path / "none" / "lock", b"driver 1").is_seen()
    assert not Place(str(tmp_path), lock, None).is_seen()
