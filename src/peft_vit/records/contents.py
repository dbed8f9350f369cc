"""Everything that a results directory holds: what can be read, and by name what can't."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from peft_vit.errors import UserError
from peft_vit.records.files import RECORD_FILE, REGISTRATION_FILE, read_record
from peft_vit.records.owner import Owner, owner_of
from peft_vit.records.progress import PROGRESS_FILE, RunStatus, run_status
from peft_vit.records.study_file import RUN_NAME, STUDY_FILE, StudyFile, read_study_file
from peft_vit.records.values import RunRecord

HTML_FILE = "report.html"
MARKDOWN_FILE = "analysis_summary.md"

_TABLES = {".json", ".jsonl", ".csv", ".parquet"}  # what results of others are kept in
_EARLIER = {"ledger.jsonl", "runs.parquet"}  # of version 0.2.0, which records say as well
_OWN = {RECORD_FILE, REGISTRATION_FILE, PROGRESS_FILE, STUDY_FILE} | _EARLIER
_OUTPUTS = {HTML_FILE, MARKDOWN_FILE}  # in a folder beside them lies what was written from records, not a source
_BELOW_OUTPUTS = {"tables", "figures"}
_CHECKPOINT = re.compile(r"\.?checkpoint-.*")
_RUN_FOLDER = re.compile(RUN_NAME)
_NAMED = 20  # files of others that are named; a data set beside the results may have thousands

_Content = TypeVar("_Content")


@dataclass(frozen=True)
class Problem:
    """What a reader of a results directory has to know of a file in it."""

    file: str  # relative to the directory, with "/"; a line of it stands after a colon
    message: str  # the field, what is wrong, what to do
    left_out: bool = True  # whether something that may be a result does not count because of it

    @property
    def run(self) -> tuple[str, str] | None:
        """Return the study and the run that the file's place stands for, if it is a record's."""
        parts = PurePosixPath(self.file).parts
        if len(parts) < 3 or parts[-1] != RECORD_FILE or not _RUN_FOLDER.fullmatch("/".join(parts[-3:-1])):
            return None
        return parts[-4] if len(parts) > 3 else "", "/".join(parts[-3:-1])

    def line(self, directory: Path) -> str:
        """Return it as a line for the terminal, which does nothing to it."""
        what = "left out: " if self.left_out else "note: "
        return what + str(UserError(self.message, file=directory / self.file))


@dataclass(frozen=True)
class StudyFolder:
    """A study's folder, apart from its records."""

    name: str
    file: StudyFile | None  # what was planned; None if it can't be known
    unfinished: tuple[RunStatus, ...]  # those of the planned runs that have no record
    owner: Owner | None  # who works on the study at present


@dataclass(frozen=True)
class Contents:
    """A results directory: records with their files in the order of these, studies, and what is wrong or foreign."""

    directory: Path
    records: tuple[tuple[str, RunRecord], ...]
    studies: tuple[StudyFolder, ...]
    problems: tuple[Problem, ...]


def read_contents(directory: Path) -> Contents:
    """Read every record and study.json below a directory; what can't be read becomes a problem.

    Raises:
        UserError: if the directory does not exist, or if no record and no study.json in it can be read.
    """
    files, folders, problems = _walk(directory)
    studies, records = [], []
    for folder in folders:
        place = directory / folder
        owner = owner_of(place)  # first: who ends meanwhile has left nothing under way
        study_file = PurePosixPath(folder, STUDY_FILE).as_posix()
        content = _attempt(partial(read_study_file, place), directory, study_file, problems)
        unfinished = []
        if content is not None:
            for run in content.runs:
                if not (place / run / RECORD_FILE).exists():
                    unfinished.append(run_status(place, run, owner, skipped=run in content.skipped))
        studies.append(StudyFolder(Path(os.path.abspath(place)).name, content, tuple(unfinished), owner))
    for file in files:
        record = _attempt(partial(read_record, directory / file), directory, file, problems)
        if record is not None:
            records.append((file, record))
    if not records and not any(study.file is not None for study in studies):
        raise _nothing(directory, problems)
    return Contents(directory, tuple(records), tuple(studies), tuple(problems))


def read_records(directory: Path) -> Iterator[RunRecord]:
    """Yield every record below a directory, in the order of their paths, for those who need all or none.

    Raises:
        UserError: if the directory does not exist or holds no record; at the first one that can't be read.
    """
    files, _, _ = _walk(directory)
    if not files:
        raise _nothing(directory, [])
    for file in files:
        yield read_record(directory / file)


def _nothing(directory: Path, problems: list[Problem]) -> UserError:
    left_out = [problem for problem in problems if problem.left_out]
    if not left_out:
        return UserError("holds no record.json; run a study first, e.g. `peft-vit run CONFIG`", file=directory)
    first, *others = left_out
    more = f"; {len(others)} more, see below, and nothing in {directory} can be read" if others else ""
    details = "\n".join(problem.line(directory) for problem in others)
    return UserError(first.message + more, file=directory / first.file, details=details)


def _attempt(read: Callable[[], _Content], directory: Path, file: str, problems: list[Problem]) -> _Content | None:
    try:
        return read()
    except UserError as error:
        named = error.file or ""
        line = named.removeprefix(str(directory / file)) if named.startswith(str(directory / file)) else ""
        problems.append(Problem(file + line, f"{error.field}: {error.message}" if error.field else error.message))
        return None


def _walk(directory: Path) -> tuple[list[str], list[str], list[Problem]]:
    """Find records and folders of studies, in the order of paths, and what is wrong or foreign.

    Links to folders are not followed, as they may lead anywhere.

    Raises:
        UserError: if the directory does not exist.
    """
    if not os.path.isdir(directory):  # unlike Path.is_dir, also False for an impossible name
        if os.path.lexists(directory):
            raise UserError("is no directory; give the one that holds the records", file=directory)
        raise UserError("does not exist; run a study first, e.g. `peft-vit run CONFIG`", file=directory)
    records: list[str] = []
    studies: list[str] = []
    problems: list[Problem] = []
    foreign: list[str] = []

    def unreadable(error: OSError) -> None:
        place = os.path.relpath(error.filename, directory)
        problems.append(Problem(Path(place).as_posix(), f"can't be read ({error.strerror}); make it readable"))

    for place, folders, files in os.walk(directory, onerror=unreadable):
        here = Path(place).relative_to(directory)
        records += [(here / name).as_posix() for name in (*folders, *files) if name == RECORD_FILE]
        if STUDY_FILE in files:
            studies.append(here.as_posix())
        for name in sorted(folders):
            if os.path.islink(os.path.join(place, name)):
                problem = "is a link to a folder, which is not followed; put the folder itself here if it is a result"
                problems.append(Problem((here / name).as_posix(), problem, left_out=False))
        outputs = _OUTPUTS & set(files)
        if not outputs and _CHECKPOINT.fullmatch(here.name) is None:
            foreign += [
                (here / name).as_posix()
                for name in files
                if not name.startswith(".") and Path(name).suffix.lower() in _TABLES and name not in _OWN
            ]
        folders[:] = sorted(
            name for name in folders if not (outputs and name in _BELOW_OUTPUTS) and not _CHECKPOINT.fullmatch(name)
        )
    records.sort(key=lambda file: Path(file).parts)
    foreign.sort()
    problem = "is no file of a study, and was not read; if it holds results, no number here has anything of them"
    problems += [Problem(file, problem, left_out=False) for file in foreign[:_NAMED]]
    if len(foreign) > _NAMED:
        place = PurePosixPath(foreign[_NAMED]).parent.as_posix()
        problem = f"{len(foreign) - _NAMED} more files, here and after it, are of no study"
        problems.append(Problem(place, problem, left_out=False))
    return records, studies, problems
