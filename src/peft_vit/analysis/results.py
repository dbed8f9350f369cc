"""All studies of a results directory, and by name what in it does not count as evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_vit.analysis.studies import Plan, Study, grouped, make_study
from peft_vit.errors import UserError
from peft_vit.records import Contents, Problem, RunRecord, read_contents
from peft_vit.records.progress import run_of

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
    groups = grouped((_key(record), record) for record in records)
    known = [(folder, folder.file) for folder in contents.studies]
    folders = grouped(((file.configuration.name, file.smoke), folder) for folder, file in known if file is not None)
    keys = sorted({*groups, *folders})
    for folder, file in known:
        for key in keys:
            if file is None and key[0] == folder.name:  # an earlier version made it, or its study.json is damaged
                folders.setdefault(key, []).append(folder)
    root = Path(directory).absolute().name
    of_file = {file: _key(record) for file, record in contents.records}
    concerned = [(problem, _concerned(problem, keys, of_file, root)) for problem in problems]
    studies = []
    for key in keys:
        left_out = tuple(
            (*run_of(problem.run[1]), problem.message)
            for problem in problems
            if problem.left_out and problem.run is not None and (problem.run[0] or root) == key[0]
        )
        of_files = _in_words([problem for problem, own in concerned if key in own])
        plan = Plan(tuple(folders.get(key, ())), left_out)
        studies.append(make_study(*key, groups.get(key, ()), plan, of_files))
    return Results(directory, tuple(studies), problems)


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


def _key(record: RunRecord) -> _Key:
    return record.spec.study, record.spec.smoke


def _once(contents: Contents) -> tuple[list[RunRecord], list[Problem]]:
    """Return the records that count, and what is to be said of runs that stand twice."""
    copies = grouped(((r.spec.run_id, r.spec.smoke), (file, r)) for file, r in contents.records)
    records, problems = [], []
    for (run, _), own in copies.items():
        files = [file for file, _ in own]
        if len(own) == 1 or len({record.model_dump_json() for _, record in own}) == 1:
            records.append(own[0][1])
            same = f"is the same record of {run!r} as {files[0]}; it counts once"
            problems += [Problem(file, same, left_out=False) for file in files[1:]]
            continue
        for file in files:
            others = ", ".join(other for other in files if other != file)
            reason = f"holds the run {run!r} twice, and otherwise than {others}; move away what is not the result"
            problems.append(Problem(file, reason))
    return records, problems


def _concerned(problem: Problem, keys: Sequence[_Key], of_file: dict[str, _Key], root: str) -> set[_Key]:
    """Return the studies that a problem is told in: its own by its place, or where that says nothing, all."""
    if of_file.get(problem.file) in keys:
        return {of_file[problem.file]}
    parts = {root, *Path(problem.file).parts}
    return {key for key in keys if key[0] in parts} or set(keys)


def _in_words(problems: Sequence[Problem]) -> list[str]:
    """Return each distinct problem once, with its files."""
    files = grouped(((not problem.left_out, problem.message), problem.file) for problem in problems)
    return [
        f"{'Note' if is_note else 'Left out'}: {', '.join(names)}: {message}."
        for (is_note, message), names in sorted(files.items(), key=lambda item: item[0][0])
    ]
