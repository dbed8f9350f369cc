"""What a tuning of the tiny model comes to: a choice as its stages hand it over, from runs that were really done."""

from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
from PIL import Image
from written_runs import plan_of, run_and_write, tiny_study

from peft_vit.base.files import write_whole
from peft_vit.base.statistics import Interval
from peft_vit.base.statistics.odds import ModelEstimate
from peft_vit.data import find_images
from peft_vit.deploy.export import logits_by_type
from peft_vit.fit.decide import Candidate, ModelDecision
from peft_vit.fit.intake import take_in
from peft_vit.fit.outcomes import Outcome, meaning_on
from peft_vit.fit.output import Tuning, what_more_buys
from peft_vit.fit.recipe import Recipe, lora
from peft_vit.fit.request import TuneRequest
from peft_vit.fit.sizes import SizeResult

FOLDS = 2
MODEL = "tiny_pool"
assert MODEL in tiny_models.TINY_FAMILIES  # which registers it
TRAINED = lora(MODEL, 32, 8, 1e-2)
ROUNDED = TRAINED.rounded("nf4")


def write_images(folder: Path) -> None:
    """Write 48 images of three classes; of each fourth no model can tell the class."""
    rng = np.random.default_rng(0)
    for label, colour in enumerate(((200, 60, 60), (60, 200, 60), (60, 60, 200))):
        (folder / f"class_{label}").mkdir(parents=True)
        for number in range(16):
            pixels = rng.normal(colour if number % 4 else 128, 70, (20, 30, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class_{label}" / f"{number:02}.png")


def choice_of(images: Path, folder: Path, **asked: Any) -> Tuning:
    """Do the runs of LoRA on folds, and the last one; its weights are rounded after training."""
    request = TuneRequest(images=images, output=folder, **{"models": (MODEL,), **asked})
    labelled = take_in(request, find_images(images), folder / "images.json")
    write_whole(labelled.file, labelled.written)
    data = labelled.data(32)
    on_folds = _done("folds-tiny_pool-32", list(range(FOLDS)), data | {"folds": FOLDS}, folder / "studies")
    (final,) = _done("final-tiny_pool-32", [0], data, folder / "studies", features=True)

    def odds(loss: float, chance: float) -> ModelEstimate:
        return ModelEstimate(
            Interval(0.72 - loss, 0.66 - loss, 0.78 - loss, 38, 0.95), loss, chance, 0.0001, shown=False
        )

    worth = odds(0.004, 0.12)
    taken = Candidate(ROUNDED, 100_000, FOLDS, worth, "")
    candidates = (
        taken,
        Candidate(lora(MODEL, 32, 4, 1e-2).rounded("nf4"), 100_000, 1, None, "1 of 5 folds: not clearly better"),
        Candidate(Recipe(MODEL, 32), 300_000, FOLDS, odds(0.1, 0.98), "larger, and not better"),
        Candidate(TRAINED, 300_000, FOLDS, odds(0.0, 0.0), "larger, and 0.4 points better"),
    )
    sizes = (SizeResult(MODEL, 32, 0.7, 8), SizeResult(MODEL, 64, None, 0, why="no time for it"))
    labels, steps = Interval(0.07, 0.0, 0.14, 38, 0.95), Interval(0.01, 0.0, 0.03, 38, 0.95)
    folds = tuple(map(_rounded, on_folds))
    return Tuning(
        request=request,
        images=labelled,
        sizes=sizes,
        recipe=ROUNDED,
        decision=ModelDecision(candidates, taken, worth, TRAINED),
        folds=folds,
        meaning=meaning_on(folds, final.learned),
        final=_rounded(final),
        before_rounding=final,
        longer=2.0,
        more=what_more_buys(labels, 0.284, steps, 2.0, sizes, [lora(MODEL, 32, 16)], 20.0),
        stage_seconds=(("look", 1.0), ("folds", 70.0), ("final", 130.0)),
    )


def right_of(outcome: Outcome) -> np.ndarray:
    """Return where it is right, (n,)."""
    return outcome.learned.right(outcome.logits, outcome.labels)


def _rounded(outcome: Outcome) -> Outcome:
    logits = logits_by_type(outcome.folder, ["nf4"])["nf4"]
    return Outcome(outcome.images, outcome.labels, logits.astype(np.float64), outcome.seconds, outcome.folder)


def _done(study: str, seeds: list[int], data: dict[str, Any], results: Path, **measures: bool) -> list[Outcome]:
    """Do the runs of LoRA in a study; nothing validates."""
    training = {"steps": 8, "batch_size": 8, "learning_rate": 1e-2, "head_start": "probe"}
    mapping = tiny_study(
        name=study,
        seeds=seeds,
        data={**data, "validation_images": 0},
        backbone={"model": MODEL, "weights": "random"},
        measures={"logits": True, **measures},
        experiments=[{"name": TRAINED.name, "method": "lora", "lora": {"rank": 8}, "training": training}],
    )
    outcomes = []
    for planned in plan_of(mapping, results).runs:
        record = run_and_write(planned.spec, results)
        assert record.status == "done", record.traceback
        outcomes.append(Outcome.of(record, results / planned.spec.run_id))
    return outcomes
