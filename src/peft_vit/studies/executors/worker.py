"""One attempt at a run, inside a worker process, whatever started that process."""

from __future__ import annotations

import functools
import gc
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import IO

import torch

from peft_vit.backbones import Weights, read_weights
from peft_vit.backbones.tensor_file import TensorFile
from peft_vit.config import BackboneConfig
from peft_vit.runs.machine import loaded_git_state

# glibc returns freed memory to the system by default and pays for it with page faults in every step.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


@contextmanager
def environment(added: Mapping[str, str]) -> Iterator[None]:
    """Hand variables down to the processes that are started meanwhile, unless the user has set them."""
    new = {name: value for name, value in added.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


@functools.cache
def prepare_process() -> None:
    """Make a fresh process ready for runs; a second call does nothing."""
    torch.set_num_interop_threads(1)
    loaded_git_state()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    gc.freeze()  # what libraries hold, or each of a run's garbage collections would look at all of it


class WeightsOnce:
    """Reads a backbone's weights once from where they come from, and again from a nameless file of its own.

    A safetensors file is read where it is, see `TensorFile`.

    Not from memory: what a process kept of the run before would count as memory of the next one.
    """

    def __init__(self) -> None:
        self._config: BackboneConfig | None = None  # of what the file holds
        self._weights: Weights | None = None  # the same without tensors
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this object

    def __call__(self, config: BackboneConfig) -> Weights:
        """Return the weights of a configuration.

        Raises:
            UserError: see `read_weights`.
        """
        if self._weights is None or config != self._config:
            weights = read_weights(config)
            self._config = None
            if not isinstance(weights.tensors, TensorFile):  # which holds nothing in memory either
                self._file.seek(0)
                self._file.truncate()
                try:
                    torch.save(weights.tensors, self._file)
                except (OSError, RuntimeError):  # no room; they are read again
                    return weights
                weights = replace(weights, tensors={})  # the first run, too, gets what lies in memory as for others
            self._config, self._weights = config, weights
        if self._weights.tensors:
            return self._weights
        self._file.seek(0)
        tensors = torch.load(self._file, weights_only=True)  # noqa: TID251 - tensors alone
        return replace(self._weights, tensors=tensors)
