"""The grid's configurations are those of its script; rates, runs, tables and verdicts follow the rules, as by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy
from torch import nn
from written_runs import run_and_write

from experiments.adapter_bytes.scripts import grid
from experiments.ranks.scripts.former_rules import ordered_ranks
from experiments.scripts import evidence, in_turn
from experiments.scripts.evidence import study_files
from peft_vit.base.errors import UserError
from peft_vit.core.allocation.starting_ranks import Adapters, choose_starting_ranks
from peft_vit.core.config import StartingRanksConfig, load_study
from peft_vit.runs.records.storage import run_folder
from peft_vit.runs.scheduling.plan import plan_study


def test_the_configurations_are_those_of_the_script() -> None:
    assert grid.configurations() == {file.name: file.read_text() for file in grid.CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("base", grid.BASES)
def test_every_cell_buys_ranks_fits_and_equals_no_other(base) -> None:
    places, seen = grid.sites(), set()
    for cell in grid.CELLS:
        config = StartingRanksConfig(**grid.ranks_of(cell, grid.BASES[base].pool, places))
        adapters = Adapters("lora", grid.BASES[base].pool, cell.bits)
        if cell.place == "even":
            ranks, _ = choose_starting_ranks(nn.Identity(), places, config, adapters)
        else:
            ranks = ordered_ranks(places, config, seed=0, adapters=adapters)
        # A value an input of a pool and a value an output, and below 16 bits two scales of two bytes.
        stored = sum(
            rank * (-(-(site.in_features // grid.BASES[base].pool + site.out_features) * cell.bits // 8))
            + (4 * rank if cell.bits < 16 else 0)
            for site, rank in zip(places, ranks.values(), strict=True)
        )
        assert 0.75 * 1000 * cell.kilobytes < stored <= 1000 * cell.kilobytes
        if cell.place == "last":
            assert {site.layer for site in places if ranks[site.name]} <= set(range(6, 12))
        seen.add((cell.bits, *ranks.values()))
    assert len(seen) == len(grid.CELLS)


def test_seeds_and_split_are_of_no_other_study_and_pilots_share_none() -> None:
    others = [load_study(file) for file in study_files() if file.parent != grid.CONFIGS]
    assert not set(grid.PILOT_SEEDS) & set(grid.SEEDS)
    assert not {*grid.PILOT_SEEDS, *grid.SEEDS} & {seed for study in others for seed in study.seeds}
    assert grid.SPLIT not in {study.data.split_seed for study in others}


def made_up(accuracies: dict[str, float], study: str, seeds: Sequence[int], images: int = 100) -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), []
    for name, accuracy in accuracies.items():
        for seed in seeds:
            right = rng.random(images) < accuracy
            row = {"study": study, "experiment": name, "seed": seed, "status": "done", "images": images}
            row |= {"validation_accuracy": accuracy, "learning_rate": 1e-3, "test_accuracy": right.mean()}
            row |= {"adapter_bytes": 1000.0 * int(name.partition("kb")[0]) if "kb" in name else None}
            rows.append({**row, "seconds": 20.0, "commit": "abc", **evidence.right(right, [True] * images)})
    return pd.DataFrame(rows)


ACCURACIES = {
    grid.PROBE: 0.5,
    grid.FULL: 0.9,
    "32kb_1bit_even": 0.895,
    "4kb_1bit_even": 0.6,
    "8kb_1bit_even": 0.88,
    "8kb_16bit_even": 0.7,
    "8kb_1bit_last": 0.75,
}
ONE_BIT, LAST, MOST, HALF = (
    "int4: at 8 kB one bit is better than 16",
    "int4: at 8 kB and one bit, ranks spread evenly are better than in the last blocks",
    "int4: 32 kB of one bit have 90 % of what LoRA r=8 gains over the probe",
    "int4: 4 kB of one bit have half of it",
)


def rows_of(seeds: int, images: int = 400) -> pd.DataFrame:
    parts = []
    for name in ("digits", "fashion"):
        parts.append(made_up(ACCURACIES, f"adapter_bytes_{name}_int4", grid.SEEDS[:seeds], images))
        pilot = {grid.PROBE: 0.5, f"{grid.FULL}_rate1": 0.9}
        parts.append(made_up(pilot, f"adapter_bytes_{name}_int4_pilot", grid.PILOT_SEEDS))
    return pd.concat(parts)


def test_a_contrast_is_the_t_interval_of_seeds_and_adds_the_images() -> None:
    rows = rows_of(10, 100)
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


def test_verdicts_follow_the_rows_and_wait_for_a_look() -> None:
    rows = rows_of(10)
    said = grid.answers(rows)
    assert {sentence: said[sentence].verdict for sentence in (ONE_BIT, LAST, HALF)} == {
        ONE_BIT: "shown",
        LAST: "shown",
        HALF: "the opposite is shown over seeds",  # a quarter
    }
    assert said[ONE_BIT].sets == ["digits", "fashion"]
    assert (said[ONE_BIT].seeds, said[MOST].seeds) == (6, 10)  # the first look was enough, or both were needed
    assert {answer.verdict for answer in said.values() if answer.base == "float"} == {"no look so far"}
    assert {answer.verdict for answer in grid.answers(rows_of(5)).values()} == {"no look so far"}
    gap = rows[rows.seed != grid.SEEDS[3]]
    assert {answer.verdict for answer in grid.answers(gap).values()} == {"no look so far"}
    assert f"| {ONE_BIT} | digits, Fashion-MNIST |" in grid.verdicts(rows)


def test_what_is_shown_over_seeds_alone_is_said_to_be_of_these_images() -> None:
    rows = rows_of(10)
    few = {}  # of 40 images one is always wrong with 16 bits: no seed differs, but another image may
    for name in ACCURACIES:
        right = np.ones((10, 40))
        right[np.arange(10), np.arange(10)] = 0  # seeds scatter alike
        if name == "8kb_16bit_even":
            right[:, 20:22] = 0
            right[:3, 22] = 0
        few[name] = right
    for study in ("adapter_bytes_digits_int4", "adapter_bytes_fashion_int4"):
        for name, right in few.items():
            for place, seed in enumerate(grid.SEEDS):
                at = (rows.study == study) & (rows.experiment == name) & (rows.seed == seed)
                rows.loc[at, ["right", "images"]] = [*evidence.right(right[place], [1] * 40).values()]
    assert grid.answers(rows)[ONE_BIT].verdict == "shown for these test images alone"


def test_the_lower_end_of_a_share_is_where_its_contrast_is_not_told_from_0() -> None:
    parts = [grid.right_images(rows_of(10), images, "int4") for images in ("digits", "fashion")]
    for with_images in (False, True):
        low = grid.lower_share(parts, "8kb_1bit_even", with_images=with_images)
        found = evidence.contrast(parts, grid.share("8kb_1bit_even", low))
        assert found.mean == pytest.approx(found.with_images if with_images else found.of_seeds)
    assert "| int4 | `8kb_1bit_even` | 9" in grid.shares(rows_of(10))


def pilot_rows(accuracies: dict[float, float]) -> pd.DataFrame:
    name, study = "8kb_1bit_even", "adapter_bytes_digits_int4_pilot"
    parts = [
        made_up({f"{name}_rate{grid.LADDER.index(rate)}": accuracy}, study, grid.PILOT_SEEDS).assign(learning_rate=rate)
        for rate, accuracy in accuracies.items()
    ]
    return pd.concat(parts)


def test_a_best_rate_at_an_end_widens_the_list_until_it_is_none() -> None:
    def asked(accuracies: dict[float, float]) -> tuple[tuple[float, ...], float | None]:
        return grid.rates_of("digits", "int4", "8kb_1bit_even", pilot_rows(accuracies))

    assert asked({1e-3: 0.5, 3e-3: 0.8}) == ((1e-3, 3e-3, 1e-2), None)
    assert asked({1e-3: 0.5, 3e-3: 0.8, 1e-2: 0.7}) == ((1e-3, 3e-3, 1e-2), 3e-3)
    assert asked({1e-3: 0.5, 3e-3: 0.8, 1e-2: 0.8}) == ((1e-3, 3e-3, 1e-2), 3e-3)  # of equal ones what is no end
    assert asked({1e-3: 0.5, 3e-3: 0.6, 1e-2: 0.8}) == ((1e-3, 3e-3, 1e-2, 3e-2), None)
    assert asked({1e-3: 0.9, 3e-3: 0.6, 1e-2: 0.8}) == ((3e-4, 1e-3, 3e-3, 1e-2), None)
    assert asked({3e-4: 0.8, 1e-3: 0.9, 3e-3: 0.6, 1e-2: 0.8}) == ((3e-4, 1e-3, 3e-3, 1e-2), 1e-3)
    with pytest.raises(UserError, match="at the end of LADDER"):
        asked({rate: rate for rate in grid.LADDER})


@pytest.mark.usefixtures("cache")
def test_run_goes_from_pilots_to_rows_and_tables_and_begins_again_where_it_stopped(tmp_path, monkeypatch) -> None:
    done = []

    def do(file: Path, folder: Path, seeds: Sequence[int]) -> None:
        study = load_study(file)
        plan = plan_study(study.model_copy(update={"seeds": tuple(seeds)}), folder, file=None)
        runs = [run for run in plan.runs if not run_folder(folder, run.spec).exists()]
        assert [run_and_write(run.spec, folder).status for run in runs] == ["done"] * len(runs)
        done.append((study.name, tuple(seeds), len(runs)))

    small = {
        "BACKBONE": {"model": "test_vit", "weights": "random"},
        "SIZE": 32,
        "TRAINING": {"head_start": "probe", "steps": 4, "batch_size": 8, "validate_every": 4},
        "DRAWN": {"shots_per_class": 2, "train_subset": "per_seed", "validation_images": 20, "test_images": 40},
        "SETS": {"digits": grid.SETS["digits"]},
        "BASES": {"float": grid.BASES["float"]},
        "CELLS": (grid.Cell(8, 1, "even"),),
        "hypotheses": lambda: {"more than the probe": ("float", grid.share("8kb_1bit_even", 0.0))},
        "PILOT_SEEDS": (1,),
        "SEEDS": (2, 3),
        "LOOKS": (2,),
        "CONFIGS": tmp_path / "configs",
        "ROWS": tmp_path / "results" / "rows.csv",
    }
    for name, value in small.items():
        monkeypatch.setattr(grid, name, value)
    monkeypatch.setattr(in_turn, "do", do)
    grid.run(tmp_path / "runs")
    assert done[0] == ("adapter_bytes_digits_float_pilot", (1,), 7)  # the probe, and both others at three rates
    assert done[-1] == ("adapter_bytes_digits_float", (2, 3), 6)
    count = len(done)
    grid.run(tmp_path / "runs")
    assert len(done) == count
    rows = pd.read_csv(grid.ROWS)
    studied = rows[rows.study == "adapter_bytes_digits_float"]
    assert studied.groupby("experiment").adapter_bytes.max()["8kb_1bit_even"] <= 8000
    for row in studied.itertuples():
        right = grid.right_images(rows, "digits", "float")[row.experiment].loc[row.seed]
        assert right.mean() == pytest.approx(row.test_accuracy)
    chosen = grid.chosen_rates("digits", "float", rows)
    assert dict(studied.groupby("experiment").learning_rate.max().dropna()) == chosen
    tables = dict(grid.tables())
    assert "| float32 | 8 kB | 1 | evenly |" in tables["adapter_bytes"]
    assert tables["adapter_bytes_rates"].count("**") == 4
    assert "| more than the probe |" in tables["adapter_bytes_verdicts"]
    assert f"{len(rows)} runs, 0 failed" in tables["adapter_bytes_costs"]
    assert {entry["name"] for entry in grid.drawing(rows).data} == {grid.FULL, "8kb_1bit_even"}


def test_the_document_says_what_results_hold() -> None:
    text = grid.DOCUMENT.read_text()
    assert evidence.filled(text, dict(grid.tables())) == text, "run experiments/adapter_bytes/scripts/grid.py"
