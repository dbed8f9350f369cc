"""Kinds of files that only a study's folder has: what was planned, its lock, attempts and checkpoints of runs."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mutations
from kinds_of_files import Nasty, Target, is_one_line
from sound_files import SoundFiles

from peft_vit.analysis import read_results
from peft_vit.config import load_study
from peft_vit.errors import UserError
from peft_vit.records import STUDY_FILE, checkpoint_folders
from peft_vit.records.progress import LOCK_FILE, PROGRESS_FILE, find_studies, status_lines, study_lock, study_status
from peft_vit.runs.execute import run_one
from peft_vit.studies.plan import plan_study
from peft_vit.studies.scheduler import StudyStore
from peft_vit.training import Checkpoints
from peft_vit.training.checkpoint import STATE_FILE, TENSORS_FILE, read_checkpoint


def studies(sound: SoundFiles, nasty: Nasty) -> list[Target]:
    """study.json, the lock's file and a run's progress.json, as `status`, `report` and `run` read them."""
    copy = sound.out / "results"

    def prepare(results: Path) -> None:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(results, copy)

    def status(results: Path) -> None:
        for folder in find_studies(results):
            for line in status_lines(study_status(folder)):
                assert is_one_line(line), line

    def status_while_locked(results: Path) -> None:
        with (results / "tiny" / LOCK_FILE).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            status(results)

    def summary() -> None:
        for study in read_results(sound.interrupted).studies:
            assert len(study.unfinished) == 1

    def go_on() -> None:
        file = sound.inputs / "tiny.yaml"
        plan_study(load_study(file), sound.results, file=file)

    def begin() -> None:
        prepare(sound.interrupted)
        with study_lock(copy / "tiny") as lock:
            for line in StudyStore(lock, ("adaptive/seed_0",)).notices:
                assert is_one_line(line), line

    def ways(results: Path) -> tuple[tuple[Callable[[], None], tuple[object, ...]], ...]:
        return (
            (partial(status, results), ("status", results)),
            (partial(status_while_locked, results), ("status", results)),
        )

    run = (go_on, ("run", sound.inputs / "tiny.yaml", "--output", copy))
    report = (summary, ("report", sound.interrupted, "--output", sound.out / "report"))
    resume = (begin, ("run", sound.inputs / "interrupted.yaml", "--output", copy))
    opened = [
        (sound.results, STUDY_FILE, (*ways(sound.results), run)),
        (sound.results, LOCK_FILE, (*ways(sound.results), run)),
        (sound.interrupted, f"adaptive/seed_0/{PROGRESS_FILE}", (*ways(sound.interrupted), report, resume)),
    ]
    spoil = (mutations.of_json(nasty.texts), nasty.of_bytes())
    return [
        Target(results / "tiny" / name, spoil, read, command, prepare=partial(prepare, results), places=True)
        for results, name, all_ways in opened
        for read, command in all_ways
    ]


def checkpoints(sound: SoundFiles, nasty: Nasty) -> list[Target]:
    """The newest checkpoint of an interrupted run, with hashes that vouch for the change."""
    (planned,) = plan_study(
        load_study(sound.inputs / "interrupted.yaml"), sound.interrupted, file=sound.inputs / "interrupted.yaml"
    ).runs
    run = sound.interrupted / planned.spec.run_id
    folders = checkpoint_folders(run)
    newest = folders[max(folders)]
    copy = sound.out / "interrupted"

    def prepare() -> None:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(sound.interrupted, copy)

    def go_on() -> None:
        prepare()
        finished = run_one(planned.spec, checkpoints=Checkpoints(copy / planned.spec.run_id, 3600))
        if finished.record.status == "failed":  # as the command says it, in one line that names the checkpoint
            raise UserError(finished.record.error or "")

    def believed(name: str) -> Callable[[bytes], dict[Path, bytes]]:
        def change(content: bytes) -> dict[Path, bytes]:
            tensors = content if name == TENSORS_FILE else (newest / TENSORS_FILE).read_bytes()
            try:
                saved = json.loads((newest / STATE_FILE).read_bytes() if name == TENSORS_FILE else content)
                saved = {key: value for key, value in saved.items() if key != "sha256"}
                saved["tensors_sha256"] = hashlib.sha256(tensors).hexdigest()
                digest = hashlib.sha256(json.dumps(saved).encode()).hexdigest()
            except (ValueError, AttributeError, RecursionError):  # no JSON, or no mapping, any more
                return {}
            return {newest / STATE_FILE: json.dumps({"sha256": digest, **saved}).encode()}

        return change

    command = ("run", sound.inputs / "interrupted.yaml", "--output", copy)
    names = (copy / planned.spec.run_id,)
    targets = []
    for name, way in (
        (STATE_FILE, mutations.of_json(nasty.texts)),
        (TENSORS_FILE, mutations.of_safetensors(nasty.texts)),
    ):
        for opened in (lambda: read_checkpoint(newest), go_on):
            spoil = (way, nasty.of_bytes())
            targets.append(Target(newest / name, spoil, opened, command, believed(name), names, prepare=prepare))
        targets.append(Target(newest / name, (nasty.of_bytes(),), go_on, command, names=names, prepare=prepare))
    return targets
