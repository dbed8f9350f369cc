"""What a tuning came to: everything that is told of it, written from records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_vit.tasks import DecidingMetric
from peft_vit.tuning.tune_request import TuneRequest


@dataclass(frozen=True)
class ProbeResult:
    """A linear probe of a frozen backbone at an image size.

    Attributes:
        score: mean over the folds' test images; None: it was not tried, `why` says why.
        image_s: seconds of a forward pass for each of its images in a run.
        why: it was chosen or not.
        flips: of training images: none, horizontal or both.
    """

    model: str
    image_size: int
    score: float | None
    image_s: float | None
    chosen: bool
    why: str
    flips: str = "horizontal"


@dataclass(frozen=True)
class RateResult:
    """A learning rate of a kind of method, at the end of what it was given.

    Attributes:
        kind: of method, as in `candidates.KINDS`.
        scores: on validation images, one for each run, short ones first.
        steps: of all its runs together.
    """

    kind: str
    learning_rate: float
    scores: tuple[float, ...]
    steps: int
    chosen: bool


@dataclass(frozen=True)
class Candidate:
    """A model that races, or could not.

    Attributes:
        name: of its experiment in the race.
        experiment: as a configuration holds it.
        bytes: that its file is expected to have.
        score: mean over the test images of the folds that it has done; None: it has done none.
        pairs: folds that the reference has done, too.
        difference: mean over these, this one minus the reference, as a share; None: there are none.
        course: of its comparison with the reference (`statistics.sequential.SequentialResult`); None: there is none.
        left_out: why it did not race; empty: it did.
    """

    name: str
    experiment: Mapping[str, Any]
    bytes: int
    score: float | None = None
    pairs: int = 0
    difference: float | None = None
    course: Any = None
    left_out: str = ""


@dataclass(frozen=True)
class Choice:
    """The chosen model and what it was chosen by.

    Attributes:
        request: what was asked for.
        seen: what `data.inspect_images` saw of the images.
        images_file: which images are sealed, left out, or copies of one another.
        metric: what decides.
        model: of the backbone, its name.
        image_size: in pixels.
        probes: every model and size.
        rates: every learning rate.
        candidates: smallest first, the reference among them.
        chosen: name of a candidate.
        reference: likewise, with which all were compared; the same if nothing smaller is good enough.
        shown: the chosen one was shown not to lose the margin against the reference, or nothing smaller is left open;
            False: time ended before, and it is the best guess.
        why: it was chosen, a sentence.
        more_time: what more time would buy, a sentence with minutes; None: nothing.
        folds_dir: folder of the race's study, with records of all folds.
        fold_runs: folders of the runs on folds, of the chosen one and of the reference.
        final_runs: folders of the runs on all images that are not sealed, of both.
        stages: name and seconds of each stage, of all calls together.
    """

    request: TuneRequest
    seen: Any
    images_file: Path
    metric: DecidingMetric
    model: str
    image_size: int
    probes: tuple[ProbeResult, ...]
    rates: tuple[RateResult, ...]
    candidates: tuple[Candidate, ...]
    chosen: str
    reference: str
    shown: bool
    why: str
    more_time: str | None
    folds_dir: Path
    fold_runs: Mapping[str, tuple[Path, ...]]
    final_runs: Mapping[str, Path]
    stages: tuple[tuple[str, float], ...]

    def candidate(self, name: str) -> Candidate:
        """Return the candidate of a name."""
        return next(one for one in self.candidates if one.name == name)
