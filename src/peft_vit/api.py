"""From Python: tune, train, read what studies came to; results show themselves in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from peft_vit.errors import UserError
from peft_vit.settings import named_as_parameters

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from peft_vit.deployment import Classifier, Prediction
    from peft_vit.records import RunRecord
    from peft_vit.report.result_tables import ResultTables
    from peft_vit.tuning.output import OutputFiles
    from peft_vit.tuning.result import Choice

    Images: TypeAlias = str | Path | NDArray[np.uint8] | Iterable[str | Path | NDArray[np.uint8]]

_HEIGHT = 700  # of a report in a notebook, in pixels


@dataclass(frozen=True)
class Report:
    """A page that needs nothing else; in a notebook it shows itself."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def _repr_html_(self) -> str:
        page = escape(self.path.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" title="Report" width="100%" height="{_HEIGHT}" style="border: 0"></iframe>'


@dataclass(frozen=True)
class Tuned:
    """What a tuning came to.

    Attributes:
        choice: the chosen model and what it was chosen by.
        files: where everything lies.
    """

    choice: Choice
    files: OutputFiles

    @cached_property
    def model(self) -> Classifier:
        """The model, opened from its file."""
        from peft_vit.deployment import open_exported

        return open_exported(self.files.model)

    @property
    def report(self) -> Report:
        """The page."""
        return Report(self.files.report)

    def predict(self, images: Images, coverage: float | None = None) -> list[Prediction]:
        """Return a class and its probability for each image, and with a coverage its set of classes.

        Args:
            images: a path of an image or of a folder of them, an array (H, W, 3) uint8, or several of these.
            coverage: how often the true class is to be in an image's set.

        Raises:
            UserError: if an image can't be read, or the model has no sets of that coverage.
        """
        return _predict(self.model, images, coverage)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


@dataclass(frozen=True)
class Trained:
    """A run that is done.

    Attributes:
        folder: of the call, which other functions and commands take; the run's record and adapter lie below it.
        record: what happened.
    """

    folder: Path
    record: RunRecord

    @cached_property
    def model(self) -> Classifier:
        """The model as it was trained, in PyTorch."""
        from peft_vit.runs.restore import open_model

        return open_model(self.folder)

    @cached_property
    def report(self) -> Report:
        """The page, which is written when it is first asked for."""
        from peft_vit.data import thumbnails_of
        from peft_vit.report import build_report

        page = build_report(self.folder, self.folder / "report", thumbnails=thumbnails_of).html
        assert page is not None
        return Report(page)

    def predict(self, images: Images, coverage: float | None = None) -> list[Prediction]:
        """Return a class and its probability for each image; see `Tuned.predict`."""
        return _predict(self.model, images, coverage)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def tune(
    images: str | Path,
    *,
    output: str | Path = "peft-vit-tune",
    tell: Callable[[str], None] | None = None,
    **settings: Any,
) -> Tuned:
    """Find the best model for a folder of images that the minutes can buy, within limits, and write it down.

    The same call goes on where an earlier one was ended; with more minutes it tries more.

    Args:
        images: a folder of images per class.
        output: everything goes below it.
        tell: is told what is done, a line each; None: it is printed.
        settings: other options of `peft-vit tune`, with `_` for `-`: margin, max_bytes (also as in "20MB"),
            max_latency_s (also as in "50ms"), memory_limit, minutes, models and image_sizes (one or several), ...

    Raises:
        UserError: for bad input, in one line, before anything is trained.
    """
    from peft_vit.extras import require_extra

    require_extra("tune", "tune")
    from peft_vit.tuning import pipeline
    from peft_vit.tuning.output import output_files_in
    from peft_vit.tuning.tune_request import TuneRequest

    with named_as_parameters(TuneRequest):
        request = TuneRequest.of(images=images, output=output, **settings)
        choice = pipeline.tune(request, tell or pipeline.say)
    return Tuned(choice, output_files_in(request.output))


def train(
    images: str | Path, method: str = "lora", *, output: str | Path = "peft-vit-runs", **settings: Any
) -> Trained:
    """Fine-tune on a folder of images with one method; a fifth of them validates, a fifth tests.

    Each call makes a folder of its own, such as peft-vit-runs/0003-lora-r4. The same call again, on the same images,
    returns what is there, or goes on where it was interrupted.

    Args:
        images: a folder of images per class.
        method: as `peft-vit train --method` takes it: linear, lora, adalora, ...
        output: where the folder goes.
        settings: other options of `peft-vit train`, with `_` for `-`: minutes, model, rank, seed, ...; `start` stands
            for --init-adapter.

    Raises:
        UserError: for bad input, in one line, or if the run fails.
    """
    from peft_vit.studies.commands import train_on_own_images
    from peft_vit.studies.request import TrainRequest

    with named_as_parameters(TrainRequest):
        request = TrainRequest.of(images=images, method=method, output=output, **settings)
        run = train_on_own_images(request)
    record = run.record()
    assert record is not None
    if record.status == "failed":
        raise UserError(record.error or "failed", file=run.folder)
    return Trained(run.folder, record)


def load_results(directory: str | Path) -> ResultTables:
    """Read what studies came to, as tables of pandas: `runs`, `ranks`, `comparisons`.

    It computes what a report holds, and writes nothing.

    Args:
        directory: that holds records, at any depth: the output of a study, of `train`, or several of them.

    Raises:
        UserError: if pandas is not installed; if the directory holds no result that can be read.
    """
    from peft_vit.extras import require_extra

    require_extra("report", "load_results", packages=("pandas",))
    from peft_vit.report.result_tables import read_tables

    return read_tables(Path(directory))


def _predict(model: Classifier, images: Images, coverage: float | None) -> list[Prediction]:
    import numpy as np

    from peft_vit.deployment import check_coverage, predict_images

    if coverage is not None:
        check_coverage(model.card, coverage)
    several = [images] if isinstance(images, str | Path | np.ndarray) else images
    return predict_images(model, [Path(image) if isinstance(image, str) else image for image in several], coverage)
