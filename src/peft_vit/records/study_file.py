"""The study as it was begun: its configuration, its images and its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, StringConstraints

from peft_vit.config import StudyConfig
from peft_vit.errors import checked, named
from peft_vit.records.migrations import migrated_study
from peft_vit.safe_io import read_bytes

STUDY_FILE = "study.json"
# Experiment and seed, which is also the run's folder below the study's: nothing that leads out of it.
RUN_NAME = r"[a-z0-9][a-z0-9_\-]{0,63}/seed_[0-9]{1,10}"
RunName = Annotated[str, StringConstraints(pattern=f"^{RUN_NAME}$")]


class StudyFile(BaseModel):
    """Content of study.json.

    `runs` are all that were ever planned, `skipped` those among them that the last command left out. A smoke study's
    configuration is the compressed one. `seeds_added`: seeds that a command added when results were there, so that
    their number may follow from these.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    smoke: bool
    data_sha256: str
    runs: tuple[RunName, ...]
    skipped: tuple[RunName, ...] = ()
    configuration: StudyConfig
    seeds_added: tuple[int, ...] = ()


def read_study_file(folder: Path) -> StudyFile | None:
    """Return what a study's folder says that it holds; None in one that an earlier version made.

    Raises:
        UserError: with file and field, if the file can't be read or was changed by hand.
    """
    file = folder / STUDY_FILE
    remedy = "move it away and give the command of the study again, which makes it anew"
    try:
        with checked(file, remedy), named(file):
            return StudyFile.model_validate_json(migrated_study(read_bytes(file)))
    except FileNotFoundError:
        return None
