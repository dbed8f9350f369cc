"""Files of a results directory: written whole or not at all, read again."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter
from pydantic_core import from_json, to_json

from peft_vit.base.errors import UserError, checked, named, os_fault
from peft_vit.base.files import folder_below, read_bytes, write_whole
from peft_vit.core.records import BenchRow, RunRecord, RunSpec, StudyFile

STUDY_FILE = "study.json"
RECORD_FILE = "record.json"
ADAPTER_FILE = "adapter.safetensors"
FEATURES_FILE = "features.safetensors"
HTML_FILE = "report.html"
DELIVERED_FILE = "model.txt"  # in a folder of `peft-vit train`: where its model lies, if not in its one run's folder
FOLDS_STUDY = "folds"  # begins names of studies there: trainings like its run without a fold of the images each
MODEL_FOLDER, STUDIES_FOLDER = "model", "studies"  # in the output of `peft-vit tune`
_Content = TypeVar("_Content")
LATEST = "latest"  # beside the folders of `peft-vit train`: a link to that of the last call that finished


def run_folder(results_dir: Path, spec: RunSpec) -> Path:
    """Return the folder that holds a run's files.

    Raises:
        UserError: if a link is in its way, which would lead out of the results directory.
    """
    return folder_below(results_dir, spec.run_id)


def resolve_latest(path: Path) -> Path:
    """Return a path, or where it leads if it is a `latest` that stands as a file for a link."""
    return _folder_named_in(path) if path.name == LATEST and os.path.isfile(path) else path


def _folder_named_in(file: Path) -> Path:
    """Return the folder beside a file that its one line says."""
    with named(file), os_fault("can't be read", file):
        return folder_below(file.parent, read_bytes(file, 1 << 10).decode(errors="replace").strip())


def link_latest(folder: Path) -> None:
    """Let `latest` beside a folder lead to it: a relative link, or where there are none a file that says its name."""
    place = folder.parent / LATEST
    # Where that can't be written any more, or is somebody's own folder, it stays as it is.
    with suppress(OSError), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{LATEST}-") as temporary:
        link = Path(temporary, LATEST)
        if os.name != "nt":  # where no link to a folder can be replaced
            with suppress(OSError):
                link.symlink_to(folder.name)
        if not link.is_symlink():
            link.write_text(f"{folder.name}\n", "utf-8")
        link.replace(place)


def single_run(path: Path) -> Path:
    """Return the folder of a run: the path itself, or that of the one run in it, as `peft-vit train` makes it.

    Where a call of `train` has made two, a file says which of them is its model. In an output of `tune` it is `model`.
    """
    path = resolve_latest(path)
    if os.path.isfile(path / DELIVERED_FILE):
        delivered = _folder_named_in(path / DELIVERED_FILE)
        if os.path.isfile(delivered / RECORD_FILE):
            return delivered
    if os.path.isfile(path / MODEL_FOLDER / RECORD_FILE):
        return path / MODEL_FOLDER
    study = None if os.path.isfile(path / RECORD_FILE) else read_study_file(path)
    return path if study is None or len(study.runs) != 1 else folder_below(path, study.runs[0])


def tuned_model(path: Path) -> Path | None:
    """Return the file of the model in an output of `peft-vit tune`, or in the folder `model` there; None: none."""
    folder = path if path.name == MODEL_FOLDER else path / MODEL_FOLDER
    files = (folder / f"model{ending}" for ending in (".onnx", ".xml") if os.path.isfile(folder / RECORD_FILE))
    return next((file for file in files if os.path.isfile(file)), None)


def write_record(results_dir: Path, record: RunRecord) -> Path:
    """Write a run's record and return its path."""
    file = run_folder(results_dir, record.spec) / RECORD_FILE
    _write(file, record)
    return file


def write_result(results_dir: Path, record: RunRecord, adapter: bytes | None, features: bytes | None = None) -> None:
    """Write what came out of a run: the record last, so that none of a finished run stands without its files.

    Args:
        results_dir: the run's folder lies below it.
        record: what happened.
        adapter: content of the adapter file; None if the run failed.
        features: content of the file of training features; None: there is none.
    """
    for name, content in ((FEATURES_FILE, features), (ADAPTER_FILE, adapter)):
        if content is not None:
            write_whole(run_folder(results_dir, record.spec) / name, content)
    write_record(results_dir, record)


def read_record(file: Path) -> RunRecord:
    """Read one record.

    Raises:
        UserError: if the file is not a record of this schema; names the file and the field.
    """
    return _read(file, RunRecord, "record", "move it away and run the study again")


def read_study_file(folder: Path) -> StudyFile | None:
    """Return what a study's folder says that it holds; None in one that an earlier version made.

    Raises:
        UserError: with file and field, if the file can't be read or was changed by hand.
    """
    file = folder / STUDY_FILE
    if not os.path.lexists(file):
        return None
    return _read(
        file, StudyFile, "study file", "move it away and give the command of the study again, which makes it again"
    )


def write_study_file(folder: Path, content: StudyFile) -> None:
    """Replace study.json.

    Raises:
        UserError: if there is no room for it.
    """
    _write(folder / STUDY_FILE, content)


def read_bench(file: Path) -> tuple[BenchRow, ...]:
    """Return the rows of a .json file that `peft-vit bench` has written.

    Raises:
        UserError: if it can't be read, or is not such a file; names the file and the field.
    """
    remedy = "expected what `peft-vit bench MODEL... --output FILE.json` writes"
    return _read(file, tuple[BenchRow, ...], "table", remedy)


def _read(file: Path, kind: type[_Content], what: str, remedy: str) -> _Content:
    """Return the content of a JSON file; what is wrong with it or with its values is reported in one line."""
    try:
        with checked(file, remedy), named(file):
            return TypeAdapter(kind).validate_json(to_json(from_json(read_bytes(file))))
    except (OSError, ValueError) as error:
        raise UserError(f"is not a readable {what} ({error}); {remedy}", file=file) from None


def _write(file: Path, content: BaseModel) -> None:
    write_whole(file, (content.model_dump_json(indent=1) + "\n").encode())
