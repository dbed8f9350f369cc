"""The first stage: what is in the folder, which images are sealed, and what decides."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from peft_vit.data import images_file, inspect_images
from peft_vit.errors import UserError
from peft_vit.records import write_whole
from peft_vit.safe_io import read_bytes
from peft_vit.tasks import DecidingMetric
from peft_vit.tuning.context import TuningContext
from peft_vit.tuning.running import Runner
from peft_vit.tuning.state import State

IMAGES_FILE = "images.json"
_SURE_S = 3.0  # of decoding, until it is known how long it takes
MakeRunner = Callable[[State, DecidingMetric], Runner]


def context_of(state: State, make_runner: MakeRunner) -> TuningContext:
    """Look at the images, seal some of them, and return what all other stages stand on.

    Raises:
        UserError: see `inspect_images`; if the folder has other images than when the output was begun; and if
            images.json is there already and holds something else.
    """
    seen = inspect_images(state.request.images, on_progress=_telling_if_slow(state))
    for line in seen.lines():
        state.tell(f"  {line}")
    content = json.dumps(images_file(seen, state.request.seed), indent=1) + "\n"
    place = state.request.output / IMAGES_FILE
    if state.begun:
        _refuse_others(state.request.images, place, content)
    if state.begun or not place.exists():
        write_whole(place, content.encode())
    elif read_bytes(place) != content.encode():  # equal: a call was killed before its output was begun
        raise UserError("is there already, and of no tuning; move it away, or choose another --output", file=place)
    found = json.loads(content)
    sealed, left_out = set(found["sealed"]), set(found["left_out"])
    used = np.array([name not in sealed and name not in left_out for name in seen.names], dtype=bool)
    counts = np.bincount(seen.labels[used], minlength=len(seen.class_names))
    own = "the folder's own test split" if seen.holdout is not None else "a fifth of each class"
    state.tell(f"  sealed until the end: {len(sealed):,} images, {own}; all choices rest on the other {counts.sum():,}")
    different = len(np.unique(seen.groups[used]))
    runner = make_runner(state, seen.metric)
    return TuningContext(state, runner, seen, place, tuple(counts.tolist()), seen.metric, different, len(sealed))


def _telling_if_slow(state: State) -> Callable[[int, int], None]:
    """Return what tells once, soon after the beginning, that to look at so many images takes more than its share.

    Raises:
        UserError: if it takes all the time that there is.
    """
    started, told = state.clock(), False

    def on_progress(done: int, count: int) -> None:
        nonlocal told
        spent_s = state.clock() - started
        whole_s = spent_s * count / done
        if told or spent_s < _SURE_S or whole_s <= state.share_s("look"):
            return
        told = True
        about = f"to look at {count:,} images takes about {whole_s / 60:.1f} minutes"
        if whole_s > 60 * state.request.minutes:
            raise UserError(f"{about} here; give more than {math.ceil(whole_s / 60)}", field="--minutes")
        state.tell(f"  {about}, more than its share; less is trained")

    return on_progress


def _refuse_others(images: Path, place: Path, content: str) -> None:
    """Refuse to go on with other images than those that the output was begun with."""
    try:
        before, now = json.loads(read_bytes(place)), json.loads(content)
    except (OSError, ValueError) as error:
        raise UserError(f"can't be read ({error}); choose another --output", file=place) from None
    changed = [name for name in now if name != "left_out" and before.get(name) != now[name]]
    if changed:
        what = "a file was changed, added or removed" if "sha256" in changed else f"{', '.join(changed)} differ"
        message = f"holds other images than when {place.parent} was begun: {what}; put them back, or choose another"
        raise UserError(f"{message} --output", file=images)
