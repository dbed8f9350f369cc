"""An earlier call of `train` or `tune`: what `--from` takes over, what changes on test images, and in their labels."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peft_vit.base.errors import UserError, checked
from peft_vit.base.files import read_bytes
from peft_vit.base.statistics.intervals import paired_proportions
from peft_vit.core.config import USUAL_TASK
from peft_vit.core.records import RunRecord
from peft_vit.core.tasks import TASKS
from peft_vit.data import ImagesFile
from peft_vit.deploy.page.formatting import percent, points_interval
from peft_vit.deploy.page.quality import TOO_FEW
from peft_vit.deploy.restore import finished_record
from peft_vit.fit.calls import REQUEST_FILE, RequestFile, TrainRun
from peft_vit.fit.fit import FitFile
from peft_vit.fit.intake import IMAGES_FILE, LabelledSet
from peft_vit.fit.request import TUNE_FILE, TrainRequest
from peft_vit.runs.records.storage import resolve_latest

_REMEDY = "leave --from out"


@dataclass(frozen=True)
class EarlierRun:
    """A call of `train` or `tune` that is done.

    Attributes:
        folder: of the call.
        asked: what it was asked for; of `tune` what would train its model.
        record: of the run that is its model.
        images: that it had.
    """

    folder: Path
    asked: TrainRequest
    record: RunRecord
    images: ImagesFile

    @classmethod
    def read(cls, place: Path) -> EarlierRun:
        """Read what lies in its folder.

        Raises:
            UserError: if that is not such a folder, or its run can't be started from.
        """
        folder = resolve_latest(place)
        tuned = FitFile.read(folder / TUNE_FILE)
        if not os.path.isfile(folder / IMAGES_FILE) or not (tuned or os.path.isfile(folder / REQUEST_FILE)):
            reason = "is not the folder of a call of `train` or `tune`, with its model and which images tested it"
            raise UserError(f"{reason}; name one, as peft-vit-runs/0001-lora", file=place, field="--from")
        if tuned is None:
            with checked(folder / REQUEST_FILE, _REMEDY):
                asked = RequestFile.model_validate_json(read_bytes(folder / REQUEST_FILE)).request
        elif tuned.decisions.delivered is None:
            raise UserError("is not done; give its command again to continue", file=place, field="--from")
        else:
            values = {name: tuned.asked.get(name) for name in ("images", "weights", "resize", "group")}
            values["adapter_bytes"] = tuned.asked["max-adapter-bytes"]
            asked = TrainRequest.model_validate({**values, "model": tuned.decisions.delivered[0].model})
        record, images = finished_record(folder), ImagesFile.read(folder / IMAGES_FILE)
        method, task = record.spec.experiment.method, record.spec.task
        faults = (
            (method not in ("lora", "linear"), f"was trained with {method}, and --from takes lora and linear"),
            (task != USUAL_TASK, f"learned {task}, and --from takes {USUAL_TASK}"),
            (asked.adapter_bytes is not None, "was trained with --adapter-bytes, which --from does not take"),
            (asked.group is not None, "was split with --group, which --from does not keep"),
            (asked.smoke, "was trained with --smoke"),
        )
        for is_so, reason in faults:
            if is_so:
                raise UserError(f"{reason}; {_REMEDY}", file=place, field="--from")
        return cls(folder, asked, record, images)

    def taken_over(self, request: TrainRequest) -> TrainRequest:
        """Return a request with this run's method, model and image size.

        Raises:
            UserError: if it asks for others, or its images are of another task or lack a class.
        """
        found, spec = request.found, self.record.spec
        if found.task is not TASKS[spec.task]:
            reason = f"learned {spec.task}, and these images have {found.task.name}; {_REMEDY}"
            raise UserError(reason, file=self.folder, field="--from")
        if missing := [name for name in self.record.class_names if name not in found.read()[0]]:
            reason = f"knows class '{missing[0]}', of which no image is here; add some, or {_REMEDY}"
            raise UserError(reason, file=self.folder, field="--from")
        own = {
            "method": spec.experiment.method,
            "model": self.asked.model,
            "weights": self.asked.weights,
            "image_size": spec.data.image_size,
            "resize": spec.data.resize or "squash",
            "head_blocks": spec.backbone.head_blocks,
        }
        for name, value in own.items():
            if (given := getattr(request, name)) not in (value, type(request).model_fields[name].default):
                reason = f"{given} is asked for, and {self.folder} has {value}; leave it out"
                raise UserError(reason, field=request.option(name).name)
        return request.model_copy(update=own)

    def change_to(self, run: TrainRun) -> str:
        """Say how often this model was right on images that tested it, and how often that of another call is."""
        later = run.record()
        assert later is not None
        before = _tested(self.record, self.images)
        after = _tested(later, ImagesFile.read(run.folder / IMAGES_FILE))
        both = [
            (*before[image], *of_now)
            for image, of_now in after.items()
            if image in before and of_now[1] in self.record.class_names
        ]
        pairs = [(earlier == label, said == label) for earlier, _, said, label in both]  # by the labels of now
        if not pairs:
            return f"No image that tested {self.folder} tests here, so what changed for its classes is not known."
        lost, gained = (pairs.count(change) for change in ((True, False), (False, True)))
        shares = (percent(sum(right) / len(pairs)) for right in zip(*pairs, strict=True))
        change = paired_proportions(gained, lost, len(pairs))
        unclear = TOO_FEW if change.may_be_zero else ""
        images = f"The {len(pairs):,} images that tested {self.folder.name}: {' right before, '.join(shares)} now"
        return f"{images}, {points_interval(change)} points (95 % interval){unclear}."


def corrected_since(images: LabelledSet, folders: Iterable[Path]) -> str:
    """Say how many test labels changed since the first call of some that is done, and what its model scores by both.

    Args:
        images: of now.
        folders: of the calls.

    Returns:
        A line; empty if none changed.
    """
    index, digests = images.index, images.content.digests
    now = {digests[index.title(i)]: index.label(i) for i in np.flatnonzero(~index.dev).tolist()}
    for folder in folders:
        with suppress(UserError):  # not done, or damaged
            record = finished_record(folder)
            if record.spec.smoke or TASKS[record.spec.task] is not images.task or images.task is not TASKS[USUAL_TASK]:
                continue
            tested = _tested(record, ImagesFile.read(folder / IMAGES_FILE))
            both = [(*tested[image], label) for image, label in now.items() if image in tested]
            if not (changed := sum(then != label for _, then, label in both)):
                return ""
            right = (percent(sum(said == labels[k] for said, *labels in both) / len(both)) for k in (0, 1))
            counted = f"{changed:,} test label{' was' if changed == 1 else 's were'} changed since {folder}"
            scores = " by the labels of then, ".join(right)
            return f"{counted}. Of {len(both):,} test images its model is right on {scores} by those of now."
    return ""


def _tested(record: RunRecord, images: ImagesFile) -> dict[str, tuple[str, str]]:
    """Return what a run said of its test images, and what they are, by their contents."""
    names, found = record.class_names, record.predictions
    assert found is not None
    of_classes = (np.asarray(column, np.int64) for column in (found.predicted, found.labels))
    rows = zip(found.files or (), *of_classes, strict=True)
    return {images.digests[file]: (names[said], names[label]) for file, said, label in rows}
