"""Everything that a results directory holds: what can be read, and by name what can't."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from peft_vit.base.errors import UserError
from peft_vit.core.records import RUN_NAME, RunRecord
from peft_vit.runs.records.progress import StudyStatus, owner_of, require_directory, study_status
from peft_vit.runs.records.storage import RECORD_FILE, STUDY_FILE, read_record, resolve_latest


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
        if len(parts) < 3 or parts[-1] != RECORD_FILE or not re.fullmatch(RUN_NAME, "/".join(parts[-3:-1])):
            return None
        return parts[-4] if len(parts) > 3 else "", "/".join(parts[-3:-1])

    def line(self, directory: Path) -> str:
        """Return it as a line for the terminal, which does nothing to it."""
        what = "left out: " if self.left_out else "note: "
        return what + str(UserError(self.message, file=directory / self.file))


@dataclass(frozen=True)
class Contents:
    """A results directory: records with their files in the order of these, studies, and what is wrong."""

    directory: Path
    records: tuple[tuple[str, RunRecord], ...]
    studies: tuple[StudyStatus, ...]
    problems: tuple[Problem, ...]


def read_contents(directory: Path) -> Contents:
    """Read every record and study.json below a directory; what can't be read becomes a problem.

    Raises:
        UserError: if the directory does not exist, or if no record and no study.json in it can be read.
    """
    directory = resolve_latest(directory)
    files, folders, problems = _walk(directory)
    studies, records = [], []
    for folder in folders:
        place = directory / folder
        try:
            studies.append(study_status(place))
        except UserError as error:
            problems.append(_problem(error, directory, PurePosixPath(folder, STUDY_FILE).as_posix()))
            studies.append(StudyStatus(place, None, (), owner_of(place)))
    for file in files:
        try:
            records.append((file, read_record(directory / file)))
        except UserError as error:
            problems.append(_problem(error, directory, file))
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


def _problem(error: UserError, directory: Path, file: str) -> Problem:
    line = (error.file or "").partition(str(directory / file))[2]  # behind the name, if one is known
    return Problem(file + line, f"{error.field}: {error.message}" if error.field else error.message)


def _nothing(directory: Path, problems: list[Problem]) -> UserError:
    left_out = [problem for problem in problems if problem.left_out]
    if not left_out:
        return UserError("holds no record.json; run a study first, e.g. `peft-vit run STUDY.yaml`", file=directory)
    first, *others = left_out
    more = f"; {len(others)} more, see below, and nothing in {directory} can be read" if others else ""
    details = "\n".join(problem.line(directory) for problem in others)
    return UserError(first.message + more, file=directory / first.file, details=details)


def _walk(directory: Path) -> tuple[list[str], list[str], list[Problem]]:
    """Find records and folders of studies, in the order of paths, and what can't be looked into.

    Links to folders are not followed, as they may lead anywhere; of one that stays in the directory nothing is missed.

    Raises:
        UserError: if the directory does not exist.
    """
    require_directory(directory)
    records: list[str] = []
    studies: list[str] = []
    problems: list[Problem] = []
    root = os.path.realpath(directory)

    def unreadable(error: OSError) -> None:
        place = Path(os.path.relpath(error.filename, directory)).as_posix()
        problems.append(Problem(place, f"can't be read ({error.strerror}); make it readable"))

    for place, folders, files in os.walk(directory, onerror=unreadable):
        here = PurePosixPath(Path(place).relative_to(directory).as_posix())
        folders.sort()
        records += [str(here / name) for name in (*folders, *files) if name == RECORD_FILE]
        if STUDY_FILE in files:
            studies.append(str(here))
        for name in folders:
            link = os.path.join(place, name)
            if os.path.islink(link) and not Path(os.path.realpath(link)).is_relative_to(root):
                reason = "is a link to a folder, which is not followed; put the folder itself here if it is a result"
                problems.append(Problem(str(here / name), reason, left_out=False))
    records.sort(key=lambda file: PurePosixPath(file).parts)
    return records, studies, problems
