"""What a tuning of the tiny model comes to: a choice as a race would hand it over, from runs that were really done."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
from PIL import Image
from small_methods import EXPERIMENTS
from written_runs import plan_of, run_and_write, tiny_study

from peft_vit.analysis import read_results
from peft_vit.analysis.stopping import sequential_results
from peft_vit.data import images_file, inspect_images
from peft_vit.records import write_study_file
from peft_vit.studies.scheduler import study_file
from peft_vit.tasks.classification import ACCURACY
from peft_vit.tuning.result import Candidate, Choice, ProbeResult, RateResult
from peft_vit.tuning.tune_request import TuneRequest

FOLDS = 2
MODEL = "tiny_pool"
assert MODEL in tiny_models.TINY_FAMILIES  # which registers it


def write_images(folder: Path) -> None:
    """Write 48 images of three classes; of each fourth no model can tell the class."""
    rng = np.random.default_rng(0)
    for label, colour in enumerate(((200, 60, 60), (60, 200, 60), (60, 60, 200))):
        (folder / f"class_{label}").mkdir(parents=True)
        for number in range(16):
            pixels = rng.normal(colour if number % 4 else 128, 70, (20, 30, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class_{label}" / f"{number:02}.png")


def choice_of(images: Path, folder: Path, chosen: str, reference: str = "lora", **asked: Any) -> Choice:
    """Do the runs of two looks on folds, and the final ones."""
    seen = inspect_images(images)
    holdout = folder / "images.json"
    folder.mkdir(parents=True, exist_ok=True)
    holdout.write_text(json.dumps(images_file(seen)))
    data = {"dataset": "image-folder", "path": str(images), "images_file": str(holdout), "image_size": 32}
    studies = folder / "studies"
    pair = list({chosen: 1, reference: 1})
    stopping = {"control": reference, "asked": "non-inferiority", "margin": 20.0, "looks": [2, 4]}
    race = {"seeds": [0, 1, 2, 3], "data": data | {"validation_images": 6, "folds": FOLDS}, "stopping": stopping}
    on_folds = _done("race", pair, [0, 1], race, studies)
    everything = {"seeds": [0], "data": data | {"validation_images": 0}}  # nothing is chosen any more
    final = _done("final", pair, [0], everything, studies, probe_l2=0.01)
    (study,) = read_results(studies / "race").studies
    (course,) = sequential_results(study)
    names = {chosen: 1, reference: 1, "full": 1}
    return Choice(
        request=TuneRequest(images=images, output=folder, **{"margin": 20.0, "models": (MODEL,), **asked}),
        seen=seen,
        images_file=holdout,
        metric=ACCURACY,
        model=MODEL,
        image_size=32,
        probes=(
            ProbeResult(MODEL, 32, 0.7, 0.001, True, "the best within the time"),
            ProbeResult(MODEL, 64, None, None, False, "takes too long"),
        ),
        rates=(RateResult("lora", 1e-2, (0.8, 0.9), 24, True), RateResult("lora", 1e-3, (0.7,), 8, False)),
        candidates=tuple(
            Candidate(
                name,
                {"name": name, **EXPERIMENTS[name]},
                100_000 * place,
                score=0.8,
                pairs=2 if name == chosen else 0,
                course=course if name == chosen != reference else None,
                left_out="its file would be too large" if name == "full" else "",
            )
            for place, name in enumerate(names, start=1)
        ),
        chosen=chosen,
        reference=reference,
        shown=False,
        why="the smallest that is not decided against.",
        more_time="30 more minutes would buy 6 more folds.",
        folds_dir=studies / "race",
        fold_runs={chosen: tuple(on_folds[chosen])},
        final_runs={name: runs[0] for name, runs in final.items()},
        stages=(("look", 1.0), ("race", 70.0), ("final", 30.0)),
    )


def _done(
    study: str,
    names: list[str],
    seeds: list[int],
    settings: Mapping[str, Any],
    results: Path,
    probe_l2: float | None = None,
) -> dict[str, list[Path]]:
    """Do the runs of some of a study's seeds."""
    fitted = {} if probe_l2 is None else {"probe_l2": probe_l2}
    training = {"steps": 8, "batch_size": 8, "learning_rate": 1e-2}
    mapping = tiny_study(
        name=study,
        backbone={"model": MODEL, "weights": "random"},
        measures={"logits": True},
        experiments=[
            {"name": name, **EXPERIMENTS[name], "training": fitted if name == "linear" else training} for name in names
        ],
        **settings,
    )
    found: dict[str, list[Path]] = {}
    plan = plan_of(mapping, results)
    content = study_file(plan.study, (), smoke=False, data_sha256=plan.data_sha256)
    write_study_file(results / study, content)
    for planned in plan.runs:
        if planned.spec.seed in seeds:
            record = run_and_write(planned.spec, results)
            assert record.status == "done", record.traceback
            found.setdefault(planned.spec.experiment.name, []).append(results / planned.spec.run_id)
    return found
