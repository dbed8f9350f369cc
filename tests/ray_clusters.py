"""Clusters of Ray on this machine that wait for a busy one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from at_work import PATIENCE_S
from ray._private import services
from ray.cluster_utils import Cluster


@contextmanager
def patient_ray() -> Iterator[None]:
    """Make Ray wait longer for its own processes than by default, since others may take the cores."""
    get_node = services.get_node

    def get_node_at_last(address: str, node: str) -> dict:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return get_node(address, node)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "get_node", get_node_at_last)
        patch.setenv("RAY_agent_register_timeout_ms", str(1000 * PATIENCE_S))
        patch.setenv("RAY_worker_register_timeout_seconds", str(PATIENCE_S))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # no token in this user's home
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@contextmanager
def small_cluster() -> Iterator[Cluster]:
    """Start a cluster whose only node has one core, as far as Ray knows; nodes may be added."""
    with patient_ray():
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            yield made
        finally:
            made.shutdown()
