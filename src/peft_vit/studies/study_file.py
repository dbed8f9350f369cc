"""How study.json is written, and how later calls are held beside what it says."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from peft_vit.config import StudyConfig
from peft_vit.errors import UserError
from peft_vit.records import RECORD_FILE, read_record, write_whole
from peft_vit.records.study_file import STUDY_FILE, StudyFile

_FREE = {"description", "execution"}  # no result depends on them


def study_file(study: StudyConfig, asked: Collection[str], *, smoke: bool, data_sha256: str) -> StudyFile:
    """Return what study.json will say; `asked` are the names of the runs that the command does not leave out."""
    runs = tuple(f"{experiment.name}/seed_{seed}" for experiment in study.experiments for seed in study.seeds)
    skipped = tuple(run for run in runs if run not in asked)
    return StudyFile(smoke=smoke, data_sha256=data_sha256, runs=runs, skipped=skipped, configuration=study)


def write_study_file(folder: Path, content: StudyFile) -> None:
    """Replace study.json.

    Raises:
        UserError: if there is no room for it.
    """
    write_whole(folder / STUDY_FILE, (content.model_dump_json(indent=1) + "\n").encode())


def go_on(folder: Path, before: StudyFile | None, asked: StudyFile, *, source: Path, part: bool = False) -> StudyFile:
    """Return what study.json will say after a command asked for `asked`; seeds and experiments may be added.

    Args:
        folder: the study's.
        before: what study.json says; None: the study is new.
        asked: by the command.
        source: the configuration file, named in the difference.
        part: experiments and seeds that `asked` does not name stay, instead of counting as removed.

    Raises:
        UserError: with the difference, if the folder holds another study or one that was configured otherwise.
    """
    if before is None:
        return asked
    file, remedy = folder / STUDY_FILE, "choose another --output"
    if before.smoke != asked.smoke:
        kinds = {True: "a smoke study", False: "a real study"}
        problem = f"belongs to {kinds[before.smoke]}, not to {kinds[asked.smoke]}; {remedy}"
        raise UserError(problem, file=file, field="smoke")
    old, new = _comparable(before.configuration, asked.configuration, part)
    if old != new:
        raise UserError(
            f"was begun with another configuration, see below; set it back, name the study otherwise, or {remedy}",
            file=file,
            field="configuration",
            details=difference(old, new, str(file), str(source)),
        )
    if before.data_sha256 != asked.data_sha256:
        raise UserError(f"was begun with other images under the same path; {remedy}", file=file, field="data_sha256")
    runs = tuple(dict.fromkeys((*asked.runs, *before.runs)))
    left_out = {*before.runs, *asked.skipped} - ({*asked.runs} - {*asked.skipped})
    together: dict[str, Any] = {}
    if part:
        earlier, now = before.configuration, asked.configuration
        experiments = {experiment.name: experiment for experiment in (*earlier.experiments, *now.experiments)}
        together["experiments"] = tuple(experiments.values())
        together["seeds"] = tuple(dict.fromkeys((*earlier.seeds, *now.seeds)))
    return asked.model_copy(
        update={
            "runs": runs,
            "skipped": tuple(run for run in runs if run in left_out),
            "configuration": asked.configuration.model_copy(update=together),
            "seeds_added": _seeds_added(folder, before, asked.configuration),
        }
    )


def _seeds_added(folder: Path, before: StudyFile, asked: StudyConfig) -> tuple[int, ...]:
    """Return the seeds whose number may follow from results: those that are new where a run is done, and earlier ones.

    A smoke study has no results.
    """
    new = tuple(seed for seed in asked.seeds if seed not in before.configuration.seeds)
    if new and not before.smoke:
        recorded = (file for run in before.runs if (file := folder / run / RECORD_FILE).exists())
        if any(read_record(file).status == "done" for file in recorded):
            return tuple(dict.fromkeys((*before.seeds_added, *new)))
    return before.seeds_added


def _comparable(before: StudyConfig, asked: StudyConfig, part: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return both as plain values, without what may change: experiments by name, and only what both could have."""
    old, new = (study.model_dump(mode="json", exclude=_FREE, exclude_none=True) for study in (before, asked))
    named = [{experiment["name"]: experiment for experiment in study["experiments"]} for study in (old, new)]
    both = named[0].keys() & named[1].keys()
    looked = asked.stopping  # of what was declared: experiments share its level, looks are in the order of the seeds
    for study, experiments, kept in (
        (old, named[0], both if part else named[0]),
        (new, named[1], both if looked is None else named[1]),
    ):
        study["experiments"] = {name: one for name, one in experiments.items() if name in kept}
        if not study["experiments"]:
            del study["experiments"]
    if looked is None:
        new["seeds"] = sorted(set(new["seeds"]) & set(old["seeds"]))
        old["seeds"] = new["seeds"] if part else sorted(old["seeds"])
    return old, new


def difference(old: dict[str, Any], new: dict[str, Any], old_name: str, new_name: str) -> str:
    """Return a unified difference of two mappings as YAML: what changed, below the keys that it stands under."""
    before, after = (yaml.safe_dump(one, sort_keys=False, allow_unicode=True).splitlines() for one in (old, new))
    whole = max(len(before), len(after))
    header, other, _, *lines = difflib.unified_diff(before, after, old_name, new_name, lineterm="", n=whole)
    kept = []
    depth = 0  # a line that is less deep has one of the kept lines below it
    for line in reversed(lines):
        indent = len(line) - len(line[1:].lstrip()) + line[1:].lstrip().startswith("- ")
        if line[0] != " " or indent < depth:
            kept.append(line)
            depth = indent
    return "\n".join([header, other, *reversed(kept)])
