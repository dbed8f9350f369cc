"""Opens what the library `datasets` of Hugging Face reads: a name on its hub, a local folder, or a Parquet file.

Only image folders, Parquet and Arrow files are read by it: other kinds of files hold no images with labels, and some
are parsed by code that may do more than that. From the hub nothing is asked once a set is in the library's cache, so
that a study goes on with the images it began with.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

import huggingface_hub

from peft_vit.data.files import refuse_outside
from peft_vit.errors import UserError
from peft_vit.extras import require_extra
from peft_vit.packages import ask_hub, cache_dir, check_download

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

_HUB_NAME = re.compile(r"\w[\w.\-]*(/\w[\w.\-]*)?")
_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk leaves


def open_splits(path: str, subset: str | None) -> dict[str, Dataset]:
    """Return the splits of a set by name, memory-mapped; nothing is decoded.

    Args:
        path: an existing folder or Parquet file, or else a name on the hub.
        subset: which of the configurations of the set, for those that have several.

    Raises:
        UserError: if the library is missing or too old, nothing is there, it can't be had from the hub, or it is of a
            kind that is not read.
    """
    require_extra("hf", "hf", field="data.dataset")
    place = Path(os.path.expanduser(path))
    with _quiet():
        try:
            if os.path.exists(place):  # unlike Path.exists, also False for an impossible name
                return _local(Path(os.path.abspath(place)), subset)
            if not _HUB_NAME.fullmatch(path):
                raise UserError("does not exist, and is no name on the hub; correct it", file=path, field="data.path")
            return _from_hub(path, subset)
        except UserError:
            raise
        except Exception as error:  # a foreign set can fail in any way; the user needs one line
            field = "data.hub_subset" if "config" in str(error).lower() else "data.path"
            problem = f"can't be read by the library datasets ({reason(error)})"
            raise UserError(problem, file=_damaged(place) or path, field=field) from None


def reason(error: BaseException) -> str:
    """Return what went wrong, on one line; the library names it in the cause of its own error."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"


def _damaged(place: Path) -> Path | None:
    """Return the first Parquet file at or below a place that can't be read; the library's errors name none."""
    from pyarrow.parquet import ParquetFile

    for file in [place] if place.suffix == ".parquet" else sorted(place.rglob("*.parquet")):
        try:
            for _ in ParquetFile(file).iter_batches():
                pass
        except Exception:  # of whatever kind, the library's own error is told
            return file
    return None


def roots(path: str) -> tuple[Path, ...]:
    """Return the folders that files of a set may lie in: its own, and those that the library unpacks or loads to."""
    import datasets

    library = (_cache(), datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    return tuple(Path(os.path.realpath(root)) for root in (os.path.expanduser(path), *library))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's notes and bars off the terminal; bars of downloads, which are the hub client's, stay."""
    import datasets
    from tqdm import tqdm

    tqdm.set_lock(RLock())  # its own one is between processes, and is warned of when a command ends
    level, bars = datasets.logging.get_verbosity(), datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors are raised too
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _cache() -> Path:
    return cache_dir() / "datasets"


def _local(place: Path, subset: str | None) -> dict[str, Dataset]:
    import datasets

    saved = any((place / name).is_file() for name in _SAVED)
    if subset is not None and (saved or not place.is_dir()):
        raise UserError("has no effect here: this is one set; remove it", field="data.hub_subset")
    if saved:
        loaded = datasets.load_from_disk(str(place))
        return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    if place.is_dir():
        builder = datasets.load_dataset_builder(str(place), subset, cache_dir=str(_cache()))
        for files in (builder.config.data_files or {}).values():
            for file in files:
                refuse_outside(Path(file), Path(os.path.realpath(place)))
    elif place.is_file() and place.suffix == ".parquet":
        builder = datasets.load_dataset_builder("parquet", data_files={"train": str(place)}, cache_dir=str(_cache()))
    else:
        raise UserError("expected a folder, a .parquet file or a name on the hub", file=place, field="data.path")
    return _prepared(builder, str(place))


def _prepared(builder: DatasetBuilder, path: str) -> dict[str, Dataset]:
    from datasets.packaged_modules.arrow.arrow import Arrow
    from datasets.packaged_modules.cache.cache import Cache
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    from datasets.packaged_modules.parquet.parquet import Parquet

    if not isinstance(builder, (ImageFolder, Parquet, Arrow, Cache)):
        kind = type(builder).__module__.rpartition(".")[2]
        problem = f"is a set of the kind {kind}; only image folders, Parquet and Arrow files are read"
        raise UserError(problem, file=path, field="data.path")
    builder.download_and_prepare()
    return dict(builder.as_dataset())


def _from_hub(name: str, subset: str | None) -> dict[str, Dataset]:
    """Return a set of the hub, from the library's cache if it is there."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    try:
        builder = Cache(
            dataset_name=name.rpartition("/")[2], config_name=subset, repo_id=name, version="auto", hash="auto"
        )
        return _prepared(builder, name)
    except Exception as error:  # is not there, or only a part of it
        if "multiple" in str(error):
            raise
    check_download(f"the data set {name} of the hub")
    try:
        url = f"{huggingface_hub.constants.ENDPOINT}/api/datasets/{name}"
        ask_hub(url)
        builder = datasets.load_dataset_builder(name, subset)
    except ValueError:  # its configurations, by name
        raise
    except Exception as error:  # the client's errors differ by version; each means that there is no set
        raise UserError(
            f"neither exists here, nor can it be had from the hub ({reason(error)}); correct the path or name; without "
            f"a network name a local folder, made elsewhere by: hf download {name} --repo-type dataset --local-dir "
            "FOLDER",
            file=name,
            field="data.path",
        ) from None
    return _prepared(builder, name)
