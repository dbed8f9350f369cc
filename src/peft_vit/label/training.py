"""A call of `train` or `tune` on the labels, in a process that continues when the page's server ends.

What it says goes to a file in the user's cache, one for each labels.csv. The process holds a lock on it: so a server
that was started again shows the same call, and two servers don't start two.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from typing import Any

from peft_vit.base.console import quoted
from peft_vit.base.errors import UserError, os_fault, printable
from peft_vit.base.files import make_folder
from peft_vit.label.labels import LabelStore, fcntl
from peft_vit.runs.this_machine.cache import cache_file

_COMMAND = [sys.executable, "-X", "utf8", "-m", "peft_vit.cli"]
_FEWEST = 2  # classes, and labels for training of each, as `train` needs them
_LINES = 12


class Training:
    """The call on a folder's labels.

    Args:
        store: the labels.
    """

    def __init__(self, store: LabelStore) -> None:
        self._store = store
        self._file = cache_file("trainings", {"labels": str(store.file.resolve())}, "log")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: str) -> None:
        """Start `train` or `tune`; its output is numbered folders in ./peft-vit-runs.

        Raises:
            UserError: if one is running, too few images are labelled, or its output can't be written.
        """
        self._store.refresh()
        if self.is_running:
            raise UserError("one is running; wait for its end", field=command)
        if missing := self.missing():
            raise UserError(missing, field=command)
        call = [command, str(self._store.file), "--output", os.path.abspath("peft-vit-runs")]
        with os_fault("can't be written", self._file, remedy=f"run peft-vit {quoted(*call)}"):
            make_folder(self._file.parent)
            with self._file.open("ab") as said_in:
                if fcntl is not None:
                    fcntl.flock(said_in, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process inherits it
                said_in.truncate(0)
                said_in.write(f"peft-vit {quoted(*call)}\n".encode())
                said_in.flush()
                self._process = subprocess.Popen(
                    [*_COMMAND, *call],
                    stdin=subprocess.DEVNULL,
                    stdout=said_in,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C ends the server alone, on Windows by the flag
                    creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                )

    def missing(self) -> str:
        """Return what too few images are labelled of to start, or ""."""
        classes, of_train = self._store.classes, self._store.num_labels["train"]
        rare = min(classes, key=of_train.__getitem__, default="")
        if self._store.task != "classification" or (len(classes) >= _FEWEST and of_train[rare] >= _FEWEST):
            return ""
        needed = "needs 2 classes, and of each 2 images that are not for the test"
        return f"{needed}; {rare or 'a class'} has {of_train[rare]}: label more"

    @property
    def is_running(self) -> bool:
        """Return whether it is at work, also where an earlier server has started it."""
        if self._process is not None:
            return self._process.poll() is None
        if fcntl is None or not self._file.exists():
            return False
        with self._file.open("rb") as said_in, suppress(OSError):
            fcntl.flock(said_in, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        return True

    def state(self) -> dict[str, Any]:
        """Return whether it is running, and its last lines, of which one names the model's page, as JSON."""
        running, said = self.is_running, ""
        with suppress(FileNotFoundError):
            said = self._file.read_text("utf-8", "replace")
        lines = [*map(printable, said.splitlines())]
        if said and not running and "\nModel: " not in said:
            lines.append(
                "It ended without a model. The buttons train on the labels so far; if none came since, it continues."
            )
        return {"running": running, "lines": lines[-_LINES:]}
