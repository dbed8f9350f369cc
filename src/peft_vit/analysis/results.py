"""All studies of a results directory, and by name what in it does not count as evidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_vit.analysis.planned import Plan, run_of
from peft_vit.analysis.studies import Study, make_study
from peft_vit.errors import UserError
from peft_vit.records import Contents, Problem, RunRecord, StudyStatus, read_contents

_Key = tuple[str, bool]  # a study's name, and whether it is of smoke runs


@dataclass(frozen=True)
class Results:
    """What was read."""

    directory: Path  # from where
    studies: tuple[Study, ...]  # by name, smoke studies after real ones; what concerns one stands in its notices too
    problems: tuple[Problem, ...]  # what was left out, or stands there beside, by file

    @property
    def is_whole(self) -> bool:
        """Tell whether everything that may be a result counts."""
        return not any(problem.left_out for problem in self.problems)

    def lines(self) -> list[str]:
        """Return the problems as lines for the terminal: "left out: ..." or "note: ..."."""
        return [problem.line(self.directory) for problem in self.problems]


def read_results(directory: Path) -> Results:
    """Read what can be read below a directory, and group it by study.

    A run that stands twice is counted once if both records are the same, and not at all if they differ, since nothing
    says which of them is the evidence.

    Raises:
        UserError: if the directory does not exist, or if there is no record and no study in it that can be read.
    """
    contents = read_contents(directory)
    records, of_copies = _once(contents)
    problems = (*contents.problems, *of_copies)
    groups: dict[_Key, list[RunRecord]] = {}
    for record in records:
        groups.setdefault((record.spec.study, record.spec.smoke), []).append(record)
    folders: dict[_Key, list[StudyStatus]] = {}
    for folder in contents.studies:
        if folder.file is not None:
            folders.setdefault((folder.file.configuration.name, folder.file.smoke), []).append(folder)
    keys = sorted({*groups, *folders})
    for folder in contents.studies:  # of one that an earlier version made, or whose study.json is damaged
        if folder.file is None:
            for key in keys:
                if key[0] == folder.name:
                    folders.setdefault(key, []).append(folder)
    root = Path(directory).absolute().name
    own = {problem: _concerned(problem, keys, contents, root) for problem in problems}
    studies = tuple(
        make_study(
            *key,
            groups.get(key, ()),
            Plan(tuple(folders.get(key, ())), _left_out(key[0], problems, root)),
            _in_words([problem for problem in problems if key in own[problem]]),
        )
        for key in keys
    )
    return Results(directory, studies, problems)


def load_studies(directory: Path) -> tuple[Study, ...]:
    """Read all studies below a directory for those who need everything or nothing, such as an export.

    Raises:
        UserError: as in `read_results`, and if anything that may be a result can't be read or stands twice.
    """
    results = read_results(directory)
    for problem in results.problems:
        if problem.left_out:
            raise UserError(problem.message, file=directory / problem.file)
    return results.studies


def _once(contents: Contents) -> tuple[list[RunRecord], list[Problem]]:
    """Return the records that count, and what is to be said of runs that stand twice."""
    copies: dict[tuple[str, bool], list[tuple[str, RunRecord]]] = {}
    for file, record in contents.records:
        copies.setdefault((record.spec.run_id, record.spec.smoke), []).append((file, record))
    records, problems = [], []
    for (run, _), own in copies.items():
        files = [file for file, _ in own]
        if len({record.model_dump_json() for _, record in own} if len(own) > 1 else own) == 1:
            records.append(own[0][1])
            problems += [
                Problem(file, f"is the same record of {run!r} as {files[0]}; it counts once", left_out=False)
                for file in files[1:]
            ]
            continue
        for file in files:
            others = ", ".join(other for other in files if other != file)
            problem = f"holds the run {run!r} twice, and otherwise than {others}; move away what is not the result"
            problems.append(Problem(file, problem))
    return records, problems


def _concerned(problem: Problem, keys: Sequence[_Key], contents: Contents, root: str) -> set[_Key]:
    """Return the studies that a problem is told in: its own by its place, or where that says nothing, all."""
    of_file = {file: (record.spec.study, record.spec.smoke) for file, record in contents.records}
    if problem.file in of_file and of_file[problem.file] in keys:
        return {of_file[problem.file]}
    parts = {root, *Path(problem.file).parts}
    return {key for key in keys if key[0] in parts} or set(keys)


def _left_out(study: str, problems: Iterable[Problem], root: str) -> tuple[tuple[str, int, str], ...]:
    found = []
    for problem in problems:
        if problem.left_out and problem.run is not None and (problem.run[0] or root) == study:
            found.append((*run_of(problem.run[1]), problem.message))
    return tuple(found)


def _in_words(problems: Sequence[Problem]) -> list[str]:
    """Return each distinct problem once, with its files."""
    files: dict[tuple[bool, str], list[str]] = {}
    for problem in problems:
        files.setdefault((not problem.left_out, problem.message), []).append(problem.file)
    return [
        f"{'Note' if is_note else 'Left out'}: {', '.join(names)}: {message}."
        for (is_note, message), names in sorted(files.items(), key=lambda item: item[0][0])
    ]
