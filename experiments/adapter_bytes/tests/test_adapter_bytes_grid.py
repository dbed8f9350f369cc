"""The grid's configurations are those that its script writes; tables and figure come from records, as by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy
from written_runs import run_and_write

from experiments.adapter_bytes.scripts import grid
from experiments.scripts import evidence
from experiments.scripts.evidence import study_files
from peft_vit.config import load_study
from peft_vit.errors import UserError
from peft_vit.records import read_records
from peft_vit.studies.plan import plan_study


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return grid.configurations()


def test_the_configurations_are_those_of_the_script(written) -> None:
    assert written == {file.name: file.read_text() for file in grid.CONFIGS.glob("*.yaml")}


def test_every_cell_that_buys_a_rank_is_there_and_fits(written) -> None:
    places = grid.sites()
    for base in grid.BASES:
        found = dict(grid.cells(base, places))
        even = {(cell.kilobytes, cell.bits) for cell in found if cell.place == "even"}
        # The smallest matrix has 384 inputs, of which an update of int4 weights sees 12, and 384 outputs.
        cheapest = {
            bits: (384 // grid.BASES[base].pool + 384) * bits / 8 + (4 if bits < 16 else 0) for bits in grid.BITS
        }
        assert even == {(kb, bits) for kb in grid.KILOBYTES for bits in grid.BITS if cheapest[bits] <= 1000 * kb}
        assert {ranks["budget"] for cell, ranks in found.items() if cell.kilobytes == 8} == {8000}


def test_pilots_and_studies_share_no_seed_with_each_other_or_with_other_studies() -> None:
    own = {file: set(load_study(file).seeds) for file in grid.CONFIGS.glob("*.yaml")}
    pilots = set().union(*(seeds for file, seeds in own.items() if "pilot" in file.stem))
    studies = set().union(*(seeds for file, seeds in own.items() if "pilot" not in file.stem))
    others = set().union(*(load_study(file).seeds for file in study_files() if file.parent != grid.CONFIGS))
    assert not pilots & studies
    assert not (pilots | studies) & others


def made_up(accuracies: dict[str, float], study: str, seeds: tuple[int, ...], images: int = 100) -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), []
    for name, accuracy in accuracies.items():
        for seed in seeds:
            right = rng.random(images) < accuracy
            row = {"study": study, "experiment": name, "seed": seed, "status": "done", "images": images}
            row |= {"validation_accuracy": accuracy, "learning_rate": 1e-3, "test_accuracy": right.mean()}
            row |= {"adapter_bytes": 1000.0 * int(name.partition("kb")[0]) if "kb" in name else None}
            rows.append({**row, "right": np.packbits(right).tobytes().hex()})
    return pd.DataFrame(rows)


CELLS = {
    grid.PROBE: 0.5,
    grid.FULL: 0.9,
    "32kb_1bit_even": 0.89,
    "2kb_1bit_even": 0.6,
    "8kb_1bit_even": 0.88,
    "8kb_16bit_even": 0.7,
    "8kb_1bit_last": 0.75,
}


@pytest.fixture
def rows() -> pd.DataFrame:
    parts = []
    for images in ("digits", "fashion"):
        parts.append(made_up(CELLS, f"adapter_bytes_{images}_int4", grid.STUDY_SEEDS))
        pilot = {grid.PROBE: 0.5, f"{grid.FULL}_rate1": 0.9}
        parts.append(made_up(pilot, f"adapter_bytes_{images}_int4_pilot", grid.PILOT_SEEDS))
    return pd.concat(parts)


def test_a_contrast_is_the_t_interval_of_seeds_and_adds_the_images(rows) -> None:
    right = grid.right_images(rows, "digits", "int4")
    estimate = evidence.contrast([right], {grid.FULL: 1.0, grid.PROBE: -1.0})
    own = rows[rows.study == "adapter_bytes_digits_int4"].pivot(index="seed", columns="experiment")["test_accuracy"]
    differences = 100 * (own[grid.FULL] - own[grid.PROBE])
    low, high = scipy.stats.ttest_1samp(differences, 0).confidence_interval()
    assert (estimate.mean, estimate.of_seeds) == pytest.approx((differences.mean(), (high - low) / 2))
    by_image = (right[grid.FULL] - right[grid.PROBE]).mean(axis=0)
    of_images = 1.96 * 100 * scipy.stats.sem(by_image)
    assert estimate.with_images == pytest.approx(np.hypot(estimate.of_seeds, of_images))
    assert evidence.contrast([right], {"no such cell": 1.0}) is None


def test_verdicts_follow_the_rows(rows) -> None:
    said = dict(line.strip("| ").split(" | ", 1) for line in grid.verdicts(rows).splitlines()[2:])
    verdict = {sentence: rest.rpartition("| ")[2] for sentence, rest in said.items()}
    assert verdict["int4: at 8 kB one bit is better than 16"] == "shown"
    assert verdict["int4: 2 kB of one bit have half of it"] == "not shown"
    assert verdict["float32: at 8 kB one bit is better than 16"] == "no data"
    assert "digits, Fashion-MNIST" in said["int4: at 8 kB one bit is better than 16"]


def test_a_best_rate_at_an_end_asks_for_a_wider_list() -> None:
    study = "adapter_bytes_digits_int4_pilot"
    parts = [
        made_up({f"8kb_1bit_even_rate{place}": accuracy}, study, (720, 721)).assign(learning_rate=rate)
        for place, (rate, accuracy) in enumerate(zip(grid.RATES, (0.5, 0.7, 0.8, 0.6), strict=True))
    ]
    assert grid.chosen_rates(pd.concat(parts), "digits", "int4") == {"8kb_1bit_even": 3e-3}
    parts[3]["validation_accuracy"] = 0.9
    with pytest.raises(UserError, match="at an end"):
        grid.chosen_rates(pd.concat(parts), "digits", "int4")


@pytest.mark.usefixtures("cache")
def test_tables_and_figure_come_from_smoke_runs(tmp_path) -> None:
    file = grid.CONFIGS / "adapter_bytes_digits_int4.yaml"
    study, wanted = load_study(file), (grid.PROBE, grid.FULL, "8kb_1bit_even")
    chosen = tuple(experiment for experiment in study.experiments if experiment.name in wanted)
    plan = plan_study(study.model_copy(update={"experiments": chosen}), tmp_path, file=None, smoke=True)
    for run in plan.runs:
        run_and_write(run.spec, tmp_path)
    rows = pd.DataFrame([grid.row_of(record) for record in read_records(tmp_path)])
    rows = pd.concat([rows, rows.assign(seed=rows.seed + 1)])  # a smoke has one seed
    assert set(rows.experiment) == set(wanted)
    for row in rows.itertuples():
        right = grid.right_images(rows, "digits", "int4")[row.experiment].loc[row.seed]
        assert right.mean() == pytest.approx(row.test_accuracy)
    assert "| int4 | 8 kB | 1 | evenly |" in grid.cell_table(rows)
    assert {entry["name"] for entry in grid.drawing(rows).data} == set(wanted) - {grid.PROBE}
