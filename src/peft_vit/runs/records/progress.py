"""What has become of a study's runs, and who works on them: all that its folder says beside results.

A run's record decides, and progress.json reports attempts after it. A progress.json that can't be read counts as not
there: the run continues from its checkpoints, or begins again.

The lock is the kernel's: a killed process holds none, and asking writes nothing, also where nothing can be written. So
it is no `filelock`, which is asked by taking it, and makes the file.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from peft_vit.base.console import quoted
from peft_vit.base.errors import UserError, printable
from peft_vit.base.files import checkpoint_folders, flags_here, folder_below, make_folder, read_bytes
from peft_vit.core.records import StudyFile
from peft_vit.runs.records.storage import ADAPTER_FILE, LATEST, RECORD_FILE, STUDY_FILE, read_study_file, resolve_latest

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

LOCK_FILE = "lock"
PROGRESS_FILE = "progress.json"
# What has become of a run, in the words of status and reports; a killed one is "pending" again. The last two are of
# reports, which count records: one that does not count, and a run that no study.json tells of.
RunState = Literal["done", "failed", "pending", "running", "skipped", "left out", "missing"]
STATES_OF_STATUS: tuple[RunState, ...] = ("done", "failed", "pending", "running", "skipped")
STATES_WITHOUT_RECORD: tuple[RunState, ...] = ("failed", "left out", "running", "pending", "skipped", "missing")
STATES_TO_COME: tuple[RunState, ...] = ("running", "pending", "skipped")  # the furthest first
_OWNER_BYTES = 1 << 16  # of a lock file are read
_LOCKED_BYTE = 1 << 30  # on Windows, far behind them: nobody else can read what is locked there
_FLAGS = flags_here("O_NONBLOCK", "O_NOFOLLOW")
_PATIENCE_S = 0.5  # `owner_of` holds a lock for an instant, which must not turn a study away
_Text = Annotated[str, AfterValidator(lambda text: " ".join(text.split())[:500])]


# --- who works on a study ---------------------------------------------------------------------------------------------


class Owner(BaseModel):
    """Who holds a lock, as it said itself; nothing is known of one that died while it wrote."""

    model_config = ConfigDict(frozen=True)

    pid: int | None = None
    host: _Text = "?"
    since: _Text = "?"
    command: _Text = "?"

    def __str__(self) -> str:
        if self.pid is None:
            return "an unknown process"
        return f"process {self.pid} on {self.host} since {self.since}: {self.command}"

    def began(self, at: str) -> bool:
        """Tell whether what was begun at that time is this owner's, and not of one that died."""
        try:
            return datetime.fromisoformat(at) >= datetime.fromisoformat(self.since)
        except (ValueError, TypeError):
            return True


@dataclass(frozen=True)
class StudyLock:
    """Proof that this process, and no other, may write to a study's folder."""

    folder: Path


def owner_of(folder: Path) -> Owner | None:
    """Return who works on a study at present; None if nobody does. Writes nothing."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | _FLAGS)
    except OSError:
        return None
    try:
        _lock(descriptor, shared=True)
        return None
    except BlockingIOError:
        return _owner_in(descriptor)
    except OSError:  # a file system without locks, on which nobody can hold one
        return None
    finally:
        os.close(descriptor)


def _owner_in(descriptor: int) -> Owner:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        return Owner.model_validate_json(os.read(descriptor, _OWNER_BYTES))
    except ValueError:
        return Owner()


def _lock(descriptor: int, *, shared: bool = False) -> None:
    """Lock an open file until it is closed; raises BlockingIOError if another descriptor has it."""
    if fcntl is not None:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return
    os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except PermissionError:
        raise BlockingIOError from None


@contextmanager
def study_lock(folder: Path) -> Iterator[StudyLock]:
    """Hold a study's lock; a folder that was made for it and holds nothing at the end goes away again.

    Args:
        folder: the study's; it and its parents are made if need be.

    Raises:
        UserError: if another process holds the lock, naming it, or if nothing can be written to the folder.
    """
    missing: list[Path] = []
    try:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        descriptor = _acquire(folder)
    except OSError as error:
        remove_empty(missing)
        reason = f"can't be written to ({error.strerror}); make it writable or choose another --output"
        raise UserError(reason, file=folder) from None
    try:
        with _folder_held(folder):
            yield StudyLock(folder)
    finally:
        if fcntl is None:  # Windows removes no open file, so that another one's stays as well
            os.close(descriptor)
        with suppress(PermissionError):
            (folder / LOCK_FILE).unlink(missing_ok=True)  # before others can hold it; they look for it again then
        remove_empty(missing)
        if fcntl is not None:
            os.close(descriptor)


@contextmanager
def _folder_held(folder: Path) -> Iterator[None]:
    """Lock the folder as well: somebody may remove the lock's file, and with it what keeps a second process away."""
    if fcntl is None:  # Windows doesn't remove it
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # NFS locks no folders
            try:
                _lock(descriptor)
            except BlockingIOError:
                raise _taken(folder, f"whose {LOCK_FILE} was removed") from None
        yield
    finally:
        os.close(descriptor)


def _acquire(folder: Path) -> int:
    """Return the descriptor of a study's lock file, locked and signed."""
    file = folder / LOCK_FILE
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            make_folder(folder)
            # Not inherited: a worker that outlives this process must not keep its lock.
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | _FLAGS, 0o644)
        except FileNotFoundError:  # the owner has just removed the folder that it made
            continue
        try:
            _lock(descriptor)
            with suppress(FileNotFoundError):  # it was just removed
                if fcntl is None or os.path.samestat(os.fstat(descriptor), os.stat(file, follow_symlinks=False)):
                    command = printable(quoted(Path(sys.argv[0]).name, *sys.argv[1:]))
                    since = datetime.now(UTC).isoformat(timespec="seconds")
                    owner = Owner(pid=os.getpid(), host=socket.gethostname(), since=since, command=command)
                    os.ftruncate(descriptor, 0)  # the file that others will find is this one
                    os.lseek(descriptor, 0, os.SEEK_SET)
                    os.write(descriptor, owner.model_dump_json().encode() + b"\n")
                    return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                owner = _owner_in(descriptor)
                os.close(descriptor)
                raise _taken(folder, str(owner)) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.02)


def _taken(folder: Path, by: str) -> UserError:
    return UserError(f"another command works on this study, {by}; wait for its end, or stop it", file=folder)


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, in their order, that hold nothing."""
    for folder in folders:
        with suppress(OSError):  # somebody else has put something there, or it was never made
            folder.rmdir()


# --- what has become of a run -----------------------------------------------------------------------------------------


class Attempt(BaseModel):
    """Content of progress.json: the latest attempt at a run. What came of it, a record may say better."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer version may say more

    number: int = Field(ge=1)  # starts so far, over all calls of the command
    state: Literal["running", "interrupted", "failed"]  # failed: for a reason that may pass; it is tried again
    started_at: str  # ISO 8601, UTC
    worker: str | None = None
    total_steps: int | None = None
    error: str | None = None  # of failed: one line


class End(BaseModel):
    """What a record says of its end. Of a thousand records, reading all of each takes too long for a look."""

    status: Literal["done", "failed"]
    seconds: float
    attempts: int = 1
    error: str | None = None


@dataclass(frozen=True)
class RunFiles:
    """What is known of a run.

    Attributes:
        attempt: the latest one, unless a record says how it ended.
        end: what the record says; None without one.
        has_adapter: without it no run is done, whatever its record says.
        fault: what in its folder does not count, though it is there.
    """

    attempt: Attempt | None
    end: End | None
    has_adapter: bool
    fault: str

    @property
    def is_done(self) -> bool:
        """Tell whether the run has its result."""
        return self.end is not None and self.end.status == "done" and self.has_adapter

    @property
    def failure(self) -> str | None:
        """Return why the run failed, if it is not tried again within a call."""
        if self.attempt is not None or self.end is None or self.end.status == "done":
            return None
        return self.end.error or "no error was recorded"

    @property
    def attempts(self) -> int:
        """Return how often the run was begun."""
        if self.attempt is not None:
            return self.attempt.number
        return 0 if self.end is None else self.end.attempts


@dataclass(frozen=True)
class RunStatus:
    """What has become of a planned run; `note` says why, or how far it is."""

    run: str
    state: RunState
    attempts: int = 0
    note: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """Return experiment and seed."""
        return run_of(self.run)

    @property
    def experiment(self) -> str:
        """Return the experiment's name."""
        return self.key[0]

    @property
    def seed(self) -> int:
        """Return the seed."""
        return self.key[1]


def run_of(run: str) -> tuple[str, int]:
    """Return experiment and seed of ``lora_r8/seed_0``."""
    experiment, _, seed = run.partition("/seed_")
    return experiment, int(seed)


def utc_now() -> str:
    """Return the time, for what begins."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read_run_files(study: Path, run: str) -> RunFiles:
    """Return what is known of a run.

    Args:
        study: its study's folder.
        run: its name within the study.

    Raises:
        UserError: if its record can't be read, or if a link leads out of the study's folder.
    """
    folder = folder_below(study, run)
    faults = []
    attempt = end = None
    try:  # before the record: of a run that ends meanwhile, both are there
        attempt = Attempt.model_validate_json(read_bytes(folder / PROGRESS_FILE))
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        faults.append(f"its {PROGRESS_FILE} can't be read and counts as not there")
    try:
        end = End.model_validate_json(read_bytes(folder / RECORD_FILE))
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        reason = "is not a readable record; move it away and run the study again"
        raise UserError(reason, file=folder / RECORD_FILE) from None
    if attempt is not None and end is not None and attempt.number <= end.attempts:
        attempt = None
    has_adapter = (folder / ADAPTER_FILE).exists()
    if attempt is None and end is not None and end.status == "done" and not has_adapter:
        faults.append(f"its record is here, its {ADAPTER_FILE} is not")
    return RunFiles(attempt, end, has_adapter, "; ".join(faults))


def run_status(study: Path, run: str, owner: Owner | None, *, skipped: bool) -> RunStatus:
    """Return the one state that a planned run is in.

    Args:
        study: its study's folder.
        run: its name within the study.
        owner: who works on the study; what an earlier one has started is under way no more.
        skipped: whether the call that was made last leaves the run out.
    """
    try:
        known = read_run_files(study, run)
    except UserError as error:
        return RunStatus(run, "pending", note=str(error))
    if known.is_done:
        return RunStatus(run, "done", known.attempts)
    if known.failure is not None:
        return RunStatus(run, "failed", known.attempts, known.failure)
    attempt, newest = known.attempt, max(checkpoint_folders(study / run), default=None)
    total = "" if attempt is None or attempt.total_steps is None else f" of {attempt.total_steps}"
    if attempt is not None and attempt.state == "running" and owner is not None and owner.began(attempt.started_at):
        reached = "" if newest is None else f", checkpoint at step {newest}{total}"
        return RunStatus(run, "running", known.attempts, f"{attempt.worker}, since {attempt.started_at}{reached}")
    goes_on = "" if newest is None else f"continues from step {newest}{total}"
    if skipped:
        return RunStatus(run, "skipped", known.attempts, goes_on)
    again = f"to be tried again after: {attempt.error}" if attempt is not None and attempt.state == "failed" else ""
    return RunStatus(run, "pending", known.attempts, "; ".join(filter(None, (known.fault, again, goes_on))))


# --- what has become of a study ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyStatus:
    """A study's folder: each planned run is in exactly one state.

    Attributes:
        folder: where it lies.
        file: what was planned; None if an earlier version made it, so that only those runs count that have records.
        runs: in the order of the plan.
        owner: who works on it at present.
    """

    folder: Path
    file: StudyFile | None
    runs: tuple[RunStatus, ...]
    owner: Owner | None

    @property
    def name(self) -> str:
        """Return the folder's name, which is the study's."""
        return Path(os.path.abspath(self.folder)).name


def require_directory(directory: Path) -> None:
    """Refuse what is not a directory of results."""
    if os.path.isdir(directory):  # unlike Path.is_dir, also False for an impossible name
        return
    if os.path.lexists(directory):
        raise UserError("is not a folder; give the one that --output named", file=directory)
    raise UserError("does not exist; run a study first, e.g. `peft-vit run STUDY.yaml`", file=directory)


def find_studies(directory: Path) -> list[Path]:
    """Return the folders of studies in a results directory, which may be a study's folder itself.

    Raises:
        UserError: if there is none.
    """
    directory = resolve_latest(directory)
    require_directory(directory)
    beside = [place for place in sorted(directory.iterdir()) if place.name != LATEST]
    for folders in ([directory], beside):
        if studies := [place for place in folders if (place / STUDY_FILE).exists() or any(_recorded(place))]:
            return studies
    raise UserError("holds no study; run one first, e.g. `peft-vit run STUDY.yaml`", file=directory)


def study_status(folder: Path) -> StudyStatus:
    """Read what has become of a study's runs, without disturbing who works on it.

    Raises:
        UserError: if its study.json is damaged.
    """
    owner = owner_of(folder)  # first: who ends meanwhile has left nothing under way
    file = read_study_file(folder)
    planned = sorted(_recorded(folder)) if file is None else file.runs
    skipped = set() if file is None else set(file.skipped)
    runs = tuple(run_status(folder, run, owner, skipped=run in skipped) for run in planned)
    return StudyStatus(folder, file, runs, owner)


def status_lines(status: StudyStatus) -> Iterator[str]:
    """Yield the sum of all states, and what there is to say of single runs, in lines that do nothing to a terminal."""
    counts = Counter(run.state for run in status.runs)
    total = " + ".join(f"{counts[state]} {state}" for state in STATES_OF_STATUS)
    yield printable(f"{status.name}: {len(status.runs)} planned = {total}")
    if status.owner is not None:
        yield printable(f"  worked on by {status.owner}")
    if status.file is None:
        yield "  made by an earlier version: its records are all that is known; `peft-vit run` continues with them"
    if foreign := sorted(set(_recorded(status.folder)) - {run.run for run in status.runs}):
        yield f"  {len(foreign)} records are of runs that the study does not have, such as {printable(foreign[0])}"
    for state in ("failed", "running", "pending", "skipped"):
        for run in status.runs:
            if run.state == state and run.note:
                again = f", attempt {run.attempts}" if run.attempts > 1 else ""
                yield printable(f"  {state:<8} {run.run}{again}: {run.note}")


def _recorded(folder: Path) -> Iterator[str]:
    """Yield the runs that have a record, planned or not."""
    for file in folder.glob(f"*/seed_*/{RECORD_FILE}"):
        yield file.parent.relative_to(folder).as_posix()
