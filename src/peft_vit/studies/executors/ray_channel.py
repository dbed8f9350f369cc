"""Between the tasks of a Ray cluster and their driver. Its process needs no torch, and so starts at once."""

from __future__ import annotations

import asyncio


class Channel:
    """Carries what tasks tell to the driver, beside whom it lives, and to them whether to stop."""

    def __init__(self) -> None:
        self._bundles: list[tuple[int, str]] = []
        self._arrived = asyncio.Event()
        self._stopping = False

    async def tell(self, number: int, bundle: str) -> bool:
        """Take what an attempt tells, which is not opened here; return whether it should stop."""
        self._bundles.append((number, bundle))
        self._arrived.set()
        return self._stopping

    async def take(self, wait_s: float, stopping: bool) -> list[tuple[int, str]]:
        """Return what was told since the last call, once there is something or the time is over."""
        self._stopping = stopping
        if not self._bundles:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), wait_s)
            except TimeoutError:
                return []
        bundles, self._bundles = self._bundles, []
        return bundles
