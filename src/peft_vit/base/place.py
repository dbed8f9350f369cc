"""Which of several processes one is, known before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessPlace:
    """The place of a process among those of a call or of a run.

    Attributes:
        rank: of all, from 0.
        count: of all.
        local_rank: of those on its machine, which is also the number of its GPU.
        local_count: of those on its machine.
        host: where they meet.
        port: of torch's TCPStore there.
    """

    rank: int
    count: int
    local_rank: int
    local_count: int
    host: str
    port: int
