"""The screening of rules for few ranks chooses as its head says, and the studies that it writes can be run and told."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import planted
import pytest
import scipy

from experiments.methods.scripts import study_figures
from experiments.ranks.scripts import frontier, frontier_configs, frontier_figure
from experiments.ranks.scripts.former_rules import ordered_ranks
from experiments.scripts.evidence import EXPERIMENTS, filled, study_files
from experiments.stopping.comparisons import stopping_of
from peft_vit.base.errors import UserError
from peft_vit.base.statistics import Interval
from peft_vit.core.allocation import choose_starting_ranks
from peft_vit.core.backbones import describe
from peft_vit.core.config import FORMER_RULES, MATRICES, BackboneConfig, StartingRanksConfig, load_study
from peft_vit.core.methods import METHODS
from peft_vit.deploy.page.formatting import fixed, points_interval
from peft_vit.runs.scheduling.plan import plan_study

CONFIGS = frontier_configs.CONFIGS
RATES = (1e-3, 3e-3, 1e-2)
# Above `random`, in validation images of 300; what is not named has none more.
LEADS = {"stable_rank": 9, "eva": 7, "gradient": 5, "spt": 3, "gora": 1, "value": 4, "fc1": 2, "last_blocks": 6}
BEST = {"eva_9": 2, "stable_rank_36": 0}  # places in RATES, where it is not the middle one


def row(task: str, name: str, rate: float | None, seed: int, images: int, nll: float = 0.5, **changes: object) -> dict:
    """Return a row as results/ holds it: six digits."""
    shown = f"{rate:.14e}".split("e") if rate else None
    experiment = f"{name}_lr_{float(shown[0]):g}e{int(shown[1])}" if shown else name
    return {
        "study": f"frontier_screening_{task}",
        "experiment": experiment,
        "method": name,
        "learning_rate": rate,
        "seed": seed,
        "status": "done",
        "validation_accuracy": float(f"{images / 300:.6g}"),
        "validation_nll": nll,
        "majority_accuracy": 0.1,
        "seconds": 10.0,
        "split": f"{task}{seed}",
        "commit": "abc",
        "dirty": False,
    } | changes


def whole() -> list[dict]:
    """Return the rows of a screening that is done: 224 runs a task."""
    rows = []
    for task in frontier_configs.SCREENED:
        for experiment in frontier_configs.screening(task, 1)["experiments"]:
            name = experiment["name"]
            lead = LEADS.get(name.rpartition("_")[0], 0)
            for rate in (None,) if experiment["method"] == "linear" else RATES:
                off = 0 if rate is None else 20 * abs(RATES.index(rate) - BEST.get(name, 1))
                rows += [row(task, name, rate, seed, 200 + lead - off + 3 * (seed - 220)) for seed in (220, 221)]
    return rows


def followed(rows: list[dict]) -> list[dict]:
    """Return the rows with all further runs that the rule asks for; rates stay as they were, at 288 the middle one."""

    def beyond(name: str, rate: float) -> list[dict]:
        made = [row(task, name, rate, seed, 100) for task in frontier_configs.SCREENED for seed in (220, 221)]
        return [one | {"study": f"{one['study']}_2"} for one in made]

    rows = [*rows, *beyond("eva_9", 3e-2), *beyond("stable_rank_36", 3e-4)]
    for below in (beyond("random_16128", 3e-4), []):  # what is new has further seeds once it has its best two rates
        rows += [
            row(one["task"], one["method"], one["rate"], seed, 150 - 5 * abs(RATES.index(one["rate"]) - best))
            for one in asked_again(rows)
            for best in [int(one["method"] != "random_16128")]
            for seed in one["seeds"]
        ]
        rows += below
    return rows


def asked_again(rows: list[dict]) -> list[dict]:
    runs = frame(rows)
    return [one._asdict() for one in frontier.again(runs)]


def frame(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(rows).assign(task=[one["study"].split("_")[2] for one in rows])


@pytest.fixture
def rows() -> list[dict]:
    return whole()


def test_gains_and_rates_are_those_of_independent_arithmetic(rows: list[dict]) -> None:
    rng = np.random.default_rng(4)
    for one in rows:
        one["validation_accuracy"] = float(f"{rng.integers(100, 290) / 300:.6g}")
        one["validation_nll"] = rng.random()
    rows[7] |= {
        "status": "failed",
        "validation_accuracy": np.nan,
        "validation_nll": np.nan,
        "majority_accuracy": np.nan,
    }
    expected, chosen = {}, {}
    by: dict[tuple, list] = {}
    for one in rows:
        if one["learning_rate"] is not None:
            correct = 30 if one["status"] == "failed" else round(300 * one["validation_accuracy"])
            nll = np.inf if one["status"] == "failed" else one["validation_nll"]
            by.setdefault((one["study"][19:], one["method"], one["learning_rate"]), []).append((correct, nll))
    for (task, method, rate), runs in by.items():
        mean = (sum(correct for correct, _ in runs), -sum(nll for _, nll in runs))
        if (task, method) not in expected or mean > expected[task, method]:
            expected[task, method], chosen[task, method] = mean, rate
    runs = frame(rows)
    assert frontier.rates(runs) == chosen
    gains = frontier.gains(runs)
    for (task, method), (correct, _) in expected.items():
        if method != "lora_r8":
            rule, _, budget = method.rpartition("_")
            points = (correct - expected[task, f"random_{budget}"][0]) / 6
            assert gains[task, int(budget)][rule] == pytest.approx(points, abs=1e-3)
    means = gains.mean(axis=1)
    rules, kind = frontier.goes_on(runs)
    assert list(rules) == sorted(frontier.SCORING, key=lambda rule: -means[rule])[:3]
    assert kind == max(MATRICES, key=lambda name: means[name])


def test_of_equal_rates_the_lower_loss_decides_though_thirds_are_rounded(rows: list[dict]) -> None:
    for one in rows:
        if one["method"] == "gora_9":  # 256 + 256 images and 257 + 255: equal, but not as six digits add up
            equal = {1e-3: (100, 100), 3e-3: (256, 256), 1e-2: (257, 255)}[one["learning_rate"]]
            one["validation_accuracy"] = float(f"{equal[one['seed'] - 220] / 300:.6g}")
            one["validation_nll"] = {1e-3: 0.1, 3e-3: 0.6, 1e-2: 0.5}[one["learning_rate"]]
    assert frontier.rates(frame(rows))["digits", "gora_9"] == 1e-2


def test_a_screening_that_is_not_whole_says_so_and_what_it_asks_for(rows: list[dict]) -> None:
    runs = frame(rows)
    assert frontier.missing(runs) == {"digits": [], "fashion": []}
    assert {(one.method, one.rate) for one in frontier.ends(runs)} == {("eva_9", 3e-2), ("stable_rank_36", 3e-4)}
    text = frontier.screening_text(runs)
    assert "- Fashion-MNIST: 224 runs, 0 of them failed; 0 missing." in text
    best = "| `stable_rank` | +3.00 | +3.0 (0.003) | +3.0 (0.001) | +3.0 (0.003) | +3.0 (0.001) | yes |"
    assert best in text
    assert "| `gora` | +0.33 | +0.3 (0.003) | +0.3 (0.003) | +0.3 (0.003) | +0.3 (0.003) |  |" in text
    assert "digits `stable_rank_36` 0.001 and 0.003;" in text
    half = frontier.screening_text(frame(rows[:224]))
    assert "- Fashion-MNIST: 0 runs, 0 of them failed; 224 missing, such as linear_probe seed 220" in half
    assert "| `stable_rank` | +3.00 | +3.0 (0.003) | +3.0 (0.001) | yes |" in half
    part = frame([one for one in rows if (one["study"][19:], one["method"]) != ("fashion", "spt_36")])
    assert len(frontier.missing(part)["fashion"]) == 6
    assert "6 missing, such as spt_36_lr_1e-3 seed 220" in frontier.screening_text(part)
    assert "| `spt` | +1.00 | +1.0 (0.003) | +1.0 (0.003) | +1.0 (0.003) | – |  |" in frontier.screening_text(part)
    with pytest.raises(UserError, match="6 runs or rates of the screening are missing"):
        frontier.picks(part)
    with pytest.raises(UserError, match="4 runs or rates beyond an end are missing"):
        frontier.picks(runs)


@pytest.mark.parametrize(
    ("rate", "up", "following"),
    [(1e-3, True, 3e-3), (3e-3, True, 1e-2), (1e-2, True, 3e-2), (1e-3, False, 3e-4), (3e-3, False, 1e-3)],
)
def test_half_decades(rate: float, up: bool, following: float) -> None:
    assert frontier.next_rate(rate, up=up) == following


def test_what_goes_on_has_its_rate_chosen_again_with_four_seeds(rows: list[dict]) -> None:
    again = asked_again(rows)
    on = {"stable_rank", "eva", "gradient", "value", "even", "random", "first_blocks", "last_blocks", "query_value"}
    later = {"random_16128", "last_blocks_16128", "even_16128", "even_depths_9"}
    first = {f"{rule}_{k}" for rule in on for k in (9, 36, 288)} | {"lora_r8"} | later
    assert {one["method"] for one in again} == first
    anew = [one for one in again if one["method"] in later or one["method"].endswith("_288")]
    assert {one["seeds"] for one in anew} == {(220, 221)}
    assert {one["seeds"] for one in again if one not in anew} == {(224, 225)}
    assert [one["rate"] for one in anew if (one["task"], one["method"]) == ("digits", "even_16128")] == list(RATES)
    assert [one["rate"] for one in again if (one["task"], one["method"]) == ("digits", "gradient_288")] == list(RATES)
    assert [one["rate"] for one in again if (one["task"], one["method"]) == ("digits", "eva_9")] == [1e-2, 3e-3]
    all_of_them = followed(rows)
    for one in all_of_them:  # the second best leads with the further seeds
        if one["method"] == "even_9" and one["seed"] > 221:
            one["validation_accuracy"] = 0.99 if one["learning_rate"] == 1e-3 else 0.5
    before, after = frontier.rates(frame(rows)), frontier.picks(frame(all_of_them)).rates
    changed = {key for key in before if before[key] != after[key]}
    assert frontier.goes_on(frame(all_of_them))[0] == ("stable_rank", "eva", "gradient")
    assert frontier.picks(frame(all_of_them)).rules == (
        "stable_rank",
        "gradient",
    )  # gradient has no lead with the further seeds
    assert changed == {("digits", "even_9"), ("fashion", "even_9")}
    assert after["digits", "even_9"] == 1e-3
    half = [one for one in all_of_them if one["seed"] != 225]
    assert {key: frontier.rates(frame(half))[key] for key in before} == before


def test_further_runs_are_rounds_of_the_table(rows: list[dict]) -> None:
    first = frontier.further_runs(frame(rows))
    assert [(one["task"], one["round"], one["seeds"]) for one in first] == [
        (task, 2, [220, 221]) for task in frontier_configs.SCREENED
    ]
    assert all(one["rates"] == {"eva_9": [3e-2], "stable_rank_36": [3e-4]} for one in first)
    done = followed(rows)[: len(rows) + 8]
    rounds = {(one["task"], one["round"]): one for one in frontier.further_runs(frame(done))}
    many, again = rounds["fashion", 4], rounds["fashion", 3]
    assert many["seeds"] == [220, 221]
    assert {name.rpartition("_")[2] for name in many["rates"]} == {"288", "16128", "9"}
    assert sum(map(len, many["rates"].values())) == 3 * (9 + 4)
    assert again["seeds"] == [224, 225]
    assert sum(map(len, again["rates"].values())) == 2 * 19
    with pytest.raises(UserError, match="1 runs that were planned are missing"):
        frontier.further_runs(frame(done[:-1]))


ROUNDS = [(task, number) for task in frontier_configs.SCREENED for number in frontier_configs.rounds(task)]


@pytest.mark.parametrize(("task", "number"), ROUNDS)
def test_a_round_is_the_configuration_that_was_run(task: str, number: int, tmp_path: Path) -> None:
    asked, study = frontier_configs.rounds(task)[number], frontier_configs.screening(task, number)
    assert frontier_configs.digest(study) == asked["digest"]
    assert frontier_configs.digest(study | {"seeds": [9]}) != asked["digest"]
    file = tmp_path / "round.yaml"
    file.write_text(frontier_configs.screening_text(task, number))
    if "made_with" not in asked:
        read = load_study(file)
        assert read.name == f"frontier_screening_{task}_{number}"
        assert f"# Cost:    {len(read.experiments) * len(read.seeds)} runs of 160 steps" in file.read_text()
    ran = pd.read_csv(frontier.SCREENING_ROWS)
    assert {*ran.seed[ran.study == study["name"]]} == set(asked["seeds"])


def test_rounds_of_rules_that_are_gone_are_those_that_say_with_which_commit() -> None:
    gone = {"eva", "spt", "gora", "para", "over_untrained"}
    for task, number in ROUNDS:
        rules = {one["name"].rpartition("_")[0] for one in frontier_configs.screening(task, number)["experiments"]}
        assert bool(rules & gone) == ("made_with" in frontier_configs.rounds(task)[number])


def test_the_length_is_the_cheapest_within_half_a_point() -> None:
    images = {  # of 300, at the better rate of LoRA r=8 and of random sites
        "80x16": (240, 210),
        "160x16": (245, 216),
        "160x32": (246, 216),
        "320x16": (247, 216),
    }
    rows = [
        row("digits", f"{name}_{length}", rate, seed, best - (10 if rate == 1e-3 else 0) + (1 if seed == 226 else -1))
        | {"study": f"frontier_length_{task}"}
        for task in ("digits", "elpv")
        for length, both in images.items()
        for name, best in zip(("lora_r8", "random_9"), both, strict=True)
        for rate in (1e-3, 3e-3)
        for seed in (226, 227)
    ]
    rows += [row("x", "linear_probe", None, 226, 220) | {"study": "frontier_length_digits"}]
    runs = frame(rows)
    by = frontier.lengths(runs)
    assert list(by.index) == list(images)
    assert list(by["elpv", "lora_r8"]) == pytest.approx([both[0] / 3 for both in images.values()], abs=1e-3)
    assert frontier.chosen_length(by) == "160x16"
    text = frontier.length_text(runs)
    assert "| 320x16 | 82.3 | 72.0 | 82.3 | 72.0 | 77.17 |" in text
    assert "digits: LoRA r=8 is +8.3 points above the linear probe." in text
    assert "Chosen: 160x16." in text


def test_elpv_is_a_task_where_lora_gains_three_points_at_the_least_cost() -> None:
    correct = {("84", "160x16"): 256, ("84", "320x32"): 263, ("112", "160x16"): 264, ("112", "320x32"): 270}
    seconds = {"84": 1.0, "112": 2.5}
    rows = [
        row("x", f"lora_r8_{length}", rate, seed, best - (4 if rate == 1e-3 else 0) + (1 if seed == 226 else -1))
        | {"study": f"frontier_task_elpv_{pixels}", "seconds": int(length[:3]) * seconds[pixels]}
        for (pixels, length), best in correct.items()
        for rate in (3e-4, 1e-3)
        for seed in (226, 227)
    ]
    rows += [
        row("x", "linear_probe", None, seed, 255) | {"study": f"frontier_task_elpv_{pixels}"}
        for pixels in seconds
        for seed in (226, 227)
    ]
    runs = frontier._with_task(pd.DataFrame(rows), frontier._OF_TASK)
    by = frontier.rooms(runs)
    assert list(zip(by.pixels, by.length, strict=True)) == [
        (84, "160x16"), (84, "320x32"), (112, "160x16"), (112, "320x32")
    ]  # fmt: skip
    assert list(by.gain) == pytest.approx([1 / 3, 8 / 3, 3, 5], abs=1e-3)
    assert set(by.rate) == {3e-4}
    assert "At least 3 points: 112 pixels, 160x16." in frontier.task_text(runs)
    text = frontier.task_text(runs[runs.task == "task_elpv_84"])
    assert "At least 3 points: none so far, task_elpv_112 is not run yet." in text
    less = runs.assign(validation_accuracy=runs.validation_accuracy.clip(upper=263 / 300))
    assert "At least 3 points: none, so ELPV decides nothing about ranks." in frontier.task_text(less)
    assert "| 84 | 320x32 | 0.0003 | 87.67 | 85.00 | +2.67 | 320 |" in text
    assert "Nine ranks" not in text
    few = [
        row("x", "even_9", rate, seed, 260 + (rate == 1e-3)) | {"study": f"frontier_rates_elpv{suffix}"}
        for rate, suffix in zip(RATES, ("", "", "_2"), strict=True)
        for seed in (220, 221)
    ]
    text = frontier.task_text(frontier._with_task(pd.DataFrame([*rows, *few]), frontier._OF_TASK))
    assert "| even_9 | **87.0** | 86.7 | 86.7 |" in text
    assert "At least 3 points: 112 pixels, 160x16." in text
    assert "Best at an end of the grid: even_9." in text


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the configurations of the studies."""
    folder = tmp_path_factory.mktemp("studies")
    frontier.write_studies(frontier.picks(frame(followed(whole()))), folder)
    return folder


GO_ON = ["stable_rank", "gradient", "even", "random", "first_blocks", "last_blocks", "query_value", "value"]


@pytest.mark.parametrize(
    ("task", "budget"), [*(("fashion", budget) for budget in frontier_configs.BUDGETS), ("digits", 18)]
)
def test_a_study_loads_and_asks_for_what_was_chosen(studies: Path, task: str, budget: int) -> None:
    study = load_study(studies / f"frontier_{task}_{budget}.yaml")
    assert [one.name for one in study.experiments] == [f"{name}_{budget}" for name in GO_ON]
    stopping = stopping_of(study)
    assert (stopping.control, stopping.looks) == (f"stable_rank_{budget}", (5, 10, 15, 20, 25, 30))
    assert study.seeds == tuple(range(250, 280))
    assert {(one.training.total_steps(100), one.training.head_start) for one in study.experiments} == {(160, "probe")}
    assert {one.name: one.training.learning_rate for one in study.experiments} == {
        f"{name}_{budget}": RATES[BEST.get(f"{name}_{frontier_configs.RATE_BUDGETS[budget]}", 1)] for name in GO_ON
    }
    data, images = study.data, {"digits": (120, None, 400), "fashion": (None, 4, 1000)}
    assert (data.train_images, data.shots_per_class, data.test_images) == images[task]
    shape = describe(study.backbone, data.image_size)
    for one in study.experiments:  # the budget fits the sites, and the rule the images
        if one.adalora or one.lora.ranks.rule not in FORMER_RULES:
            METHODS[one.method].check(one, shape, 160, data.train_images or 10 * data.shots_per_class)
        spent = one.adalora.total_rank_budget if one.adalora else one.lora.ranks.budget
        assert spent == budget


def test_controls_of_equal_values_train_as_many_as_the_nine_ranks(studies: Path) -> None:
    study = load_study(studies / "frontier_fashion_16128.yaml")
    assert [one.name for one in study.experiments] == [
        "stable_rank_9",
        "random_16128",
        "last_blocks_16128",
        "even_16128",
    ]
    assert (stopping_of(study).control, study.seeds) == ("stable_rank_9", tuple(range(320, 350)))
    assert [one.training.learning_rate for one in study.experiments] == [3e-3, 1e-3, 3e-3, 3e-3]
    sites = list(describe(study.backbone, study.data.image_size).sites)
    for one in study.experiments[1:]:
        rule = one.lora.ranks
        if rule.rule == "even":
            ranks, _ = choose_starting_ranks(None, sites, rule)
        else:
            ranks = ordered_ranks(sites, rule, seed=320)
        values = sum(ranks[site.name] * (site.in_features + site.out_features) for site in sites)
        assert frontier_configs.VALUES - 768 < values <= frontier_configs.VALUES  # no further rank fits


def test_an_even_spread_over_depths_is_the_rule_even_with_seeds_of_its_own(studies: Path) -> None:
    study = load_study(studies / "frontier_digits_even_depths.yaml")
    assert [one.name for one in study.experiments] == ["stable_rank_9", "even_depths_9"]
    assert (stopping_of(study).control, study.seeds) == ("stable_rank_9", tuple(range(350, 380)))
    even = study.experiments[1].lora.ranks
    assert (even.rule, even.budget, even.unit) == ("even", 9, "ranks")
    sites = list(describe(study.backbone, study.data.image_size).sites)
    ranks, _ = choose_starting_ranks(None, sites, even)
    chosen = [site for site in sites if ranks[site.name]]
    assert (len(chosen), len({site.kind for site in chosen}), len({site.layer for site in chosen})) == (9, 6, 9)


def test_a_study_says_before_its_data_what_it_claims(studies: Path) -> None:
    assert len(list(studies.iterdir())) == 2 * (6 + 3)
    text = (studies / "frontier_digits_9.yaml").read_text()
    head = text.partition("\n\n")[0].splitlines()
    assert all(line.startswith("# ") for line in head)
    said = " ".join(" ".join(line[2:] for line in head).split())
    for what, control in (("random sites", "random"), ("the last blocks", "last_blocks")):
        assert f'"at 9 ranks, stable_rank beats {what}" ({control}_9)' in said
    assert max(len(line) for line in text.splitlines() if "Command" not in line) <= 120
    ends = load_study(studies / "frontier_fashion.yaml")
    assert [one.name for one in ends.experiments] == ["linear_probe", "lora_r8"]
    assert set(ends.seeds) == set(frontier_configs.STUDY_SEEDS)


def test_seeds_are_of_no_other_study() -> None:
    files = [file for file in study_files() if not re.match("frontier_(?!length|task|rates)", file.name)]
    lists = [re.search(r"^seeds: \[([\d, ]+)\]", file.read_text(), re.MULTILINE) for file in files]
    others = {int(seed) for one in lists for seed in one[1].split(",")}
    others |= {seed for task, number in ROUNDS for seed in frontier_configs.rounds(task)[number]["seeds"]}
    assert set(frontier.SCREENING_SEEDS[:2]) < others
    of_studies = [*frontier_configs.STUDY_SEEDS, *frontier_configs.VALUES_SEEDS, *frontier_configs.DEPTHS_SEEDS]
    assert not (others | set(frontier.SCREENING_SEEDS)) & set(of_studies)
    assert len(of_studies) == len(set(of_studies))


def test_on_elpv_setting_and_rate_are_those_that_validation_chose() -> None:
    rows = frontier.read(frontier.TASK_ROWS, frontier._OF_TASK)
    room = frontier.rooms(rows).query("gain >= 3").iloc[0]
    tried = rows[(rows.task == "task_elpv_112") & (rows.method == f"lora_r8_{room.length}")].learning_rate
    assert tried.min() < room.rate < tried.max()
    study = load_study(CONFIGS / "frontier_elpv.yaml")
    lora = study.experiments[1].training
    assert (study.data.image_size, f"{lora.total_steps(512)}x{lora.batch_size}", lora.learning_rate) == (
        room.pixels,
        room.length,
        room.rate,
    )
    assert set(study.seeds) <= set(frontier_configs.STUDY_SEEDS)
    assert frontier_configs.TASKS["elpv"].images in (CONFIGS / "frontier_elpv.yaml").read_text()


@pytest.mark.usefixtures("cache")
def test_a_study_plans(studies: Path, tmp_path: Path) -> None:
    file = studies / "frontier_digits_even_depths.yaml"
    assert len(plan_study(load_study(file), tmp_path, file=file, smoke=True).runs) == 2


def test_sites_in_an_order_get_their_ranks_until_the_budget_is_spent() -> None:
    sites = describe(BackboneConfig(model="vit_small_patch14_dinov2", weights="random"), 56).sites
    drawn = []
    for rule in ("random", "first_blocks", "last_blocks"):
        config = StartingRanksConfig(rule=rule, budget=15, site_rank=2)
        ranks = ordered_ranks(sites, config, seed=1)
        assert sorted(ranks.values()) == [0] * 64 + [1] + [2] * 7
        assert ranks == ordered_ranks(sites, config, seed=1)
        drawn.append({site.layer for site in sites if ranks[site.name]})
        assert (ranks == ordered_ranks(sites, config, seed=2)) == (rule != "random")
    assert drawn[1:] == [{0, 1}, {10, 11}]


# --- records and the studies' results ---------------------------------------------------------------------------------


def planted_record(study: str, name: str, seed: int, accuracy: float, **changes: Any) -> planted.RunRecord:
    experiment = planted.experiments()["lora_r8"].model_copy(update={"name": name})
    split = {"split_sha256": f"{seed:064x}"}
    return planted.record(experiment, seed, accuracy, study=study, provenance_changes=split, changes=changes)


def test_runs_of_a_screening_are_kept_without_a_look_at_the_test_images(tmp_path: Path) -> None:
    study, file = "frontier_screening_digits", tmp_path / "rows.csv"
    records = [planted_record(study, "gradient_9_lr_1e-3", seed, 0.7 + seed / 1000, test=None) for seed in (220, 221)]
    keep = [file, frontier._OF_SCREENING, frontier.pilot_row]
    frontier.keep(planted.write(tmp_path / "a", records), *keep)
    further = [planted_record(f"{study}_2", "gradient_9_lr_1e-3", 222, 0.75, test=None)]
    frontier.keep(planted.write(tmp_path / "b", further), *keep)
    runs = frontier.read(file, frontier._OF_SCREENING)
    assert not [column for column in runs if "test" in column]
    assert list(runs[["task", "method", "seed"]].itertuples(index=False, name=None)) == [
        ("digits", "gradient_9", 220),
        ("digits", "gradient_9", 221),
        ("digits", "gradient_9", 222),
    ]
    assert list(runs.validation_accuracy) == [one.validation.accuracy for one in [*records, *further]]
    with pytest.raises(UserError, match=r"expected real runs of frontier_screening_\*, and no others"):
        frontier.keep(planted.write(tmp_path / "c", planted.quickstart()[:1]), *keep)
    other = planted_record(study, "spt_9_lr_1e-3", 220, 0.7, provenance=planted.provenance(220))
    with pytest.raises(UserError, match="other images"):
        frontier.keep(planted.write(tmp_path / "d", [other]), *keep)


POINTS = {"stable_rank": 85.0, "random": 80.0, "last_blocks": 81.0, "even": 82.0}  # from 18 ranks on random is as good


def results() -> pd.DataFrame:
    """Return runs of two tasks at three budgets, with the ends that one of them lies between."""
    rng, rows = np.random.default_rng(8), []

    def add(study: str, experiment: str, seed: int, points: float, values: int, status: str = "done") -> None:
        accuracy = (points + rng.normal(0, 0.4)) / 100
        rows.append(
            {"study": study, "experiment": experiment, "seed": seed, "status": status, "test_accuracy": accuracy}
            | {"adapter_values": values, "task": study.split("_")[1], "chosen_step": 160 * (seed % 5 > 0)}
        )

    for budget in (4, 9, 18):
        for name, points in POINTS.items():
            level = POINTS["stable_rank"] if (name, budget) == ("random", 18) else points
            for seed in range(250, 260):
                add(f"frontier_digits_{budget}", f"{name}_{budget}", seed, level, 900 * budget + seed)
    for name, points in POINTS.items():
        for seed in range(250, 254):
            add("frontier_fashion_4", f"{name}_4", seed, points, 3600)
    add("frontier_fashion_4", "even_4", 254, 0.0, 0, "failed")
    for seed in range(250, 260):
        for task in ("digits", "fashion"):
            add(f"frontier_{task}", "linear_probe", seed, 75, 0)
            add(f"frontier_{task}", "lora_r8", seed, 90, 600_000)
    return pd.DataFrame(rows)


@pytest.fixture
def told(studies: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[pd.DataFrame, list[frontier_figure.Sentence]]:
    monkeypatch.setattr(frontier_configs, "CONFIGS", studies)
    runs = results()
    return runs, frontier_figure.sentences(runs)


def test_sentences_are_told_by_the_declared_looks(told) -> None:
    runs, found = told
    shown = {(one.task, one.budget, one.control): one.shown for one in found}
    assert shown == {
        (task, budget, control): task == "digits" and (budget, control) != (18, "random")
        for task, budgets in (("fashion", (4,)), ("digits", (4, 9, 18)))
        for budget in budgets
        for control in ("random", "last_blocks", "even")
    }
    for one in found:
        if one.task == "fashion":
            assert (one.lead, one.state) == (None, "open")
            continue
        part = runs[runs.study == f"frontier_digits_{one.budget}"]
        wide = part.pivot(index="seed", columns="experiment", values="test_accuracy")
        lead = wide[f"stable_rank_{one.budget}"] - wide[f"{one.control}_{one.budget}"]
        assert one.lead.estimate == pytest.approx(lead.head(one.lead.n).mean())
        assert one.lead.n in (5, 10)
        assert one.lead.low < one.lead.estimate < one.lead.high
        assert (one.lead.low > 0) == one.shown
        assert one.own.accuracy == pytest.approx(wide[f"stable_rank_{one.budget}"].mean())
    text = frontier_figure.in_words(found, runs)
    assert "digits: at 4, 9 ranks `stable_rank` beats random sites" in text
    values = [round(one.other.values) for one in found if (one.task, one.budget) == ("digits", 9)]
    had = f"it has 8,354 values at 9, these have {min(values):,} to {max(values):,}. At 18 ranks it is open so far."
    assert f"ranks spread evenly; {had}" in text
    assert "Fashion-MNIST: does it matter where ranks go? At 9 ranks it is not asked yet." in text
    few = runs.assign(test_accuracy=runs.test_accuracy.mask(runs.experiment == "lora_r8", 0.77))
    assert "Fashion-MNIST decides nothing: LoRA r=8 is +2.0 points" in frontier_figure.in_words(found, few)
    without_room = frontier_figure.sentences(few)
    assert len(without_room) == len(found)
    assert not any(one.shown for one in without_room)
    references = runs[runs.experiment.isin(["linear_probe", "lora_r8"])]
    without = runs.drop(references.index[references.task == "fashion"])
    assert "Fashion-MNIST: open, as long as the linear probe" in frontier_figure.in_words(found, without)
    assert "Fashion-MNIST" not in frontier_figure.text_alternative(found, without)
    third = references[references.task == "digits"].assign(study="frontier_elpv", task="elpv")
    assert "ELPV: not asked yet." in frontier_figure.in_words(found, pd.concat([runs, third]))
    lower = third.assign(test_accuracy=third.test_accuracy.mask(third.experiment == "lora_r8", 0.76))
    beside = frontier_figure.in_words(found, pd.concat([runs, lower]))
    gain = 100 * (0.76 - lower[lower.experiment == "linear_probe"].test_accuracy.mean())
    assert f"ELPV decides nothing: LoRA r=8 is {gain:+.1f} points above the linear probe, less than 3." in beside
    assert "What ranks lie between on ELPV, 10 seeds: linear probe 75." in beside
    lines = frontier_figure.sentence_table(found).splitlines()
    names = ("stable rank", "even", "random", "last blocks")
    assert [line.split(" | ")[:2] for line in lines[2:18]] == [
        *([f"| digits, {budget}", name] for budget in (4, 9, 18) for name in names),
        *(["| Fashion-MNIST, 4", name] for name in names),
    ]
    assert lines[6].startswith("| digits, 9 | stable rank | 8,354 | 10 | ")
    assert lines[6].endswith(" | 20 | – |")  # of ten runs two have returned the probe
    assert all(line.endswith("]** |") for line in lines[7:10])
    assert lines[17].endswith("| open |")
    early = [replace(one, lead=Interval(0.02, -4.1, 4.14, 5, 0.9)) for one in found[:3]]
    assert "| **+2.0, no bound yet** |" in frontier_figure.sentence_table(early)
    ended = [replace(one, shown=False, state="stopped as futile") for one in found[:1]]
    assert frontier_figure.sentence_table(ended).endswith("] |")


def test_what_stands_beside_the_sentences_does_not_end_their_sequence(told) -> None:
    _, found = told
    beside = [replace(one, control="fc1", shown=False, state="at the last look") for one in found if one.budget == 9]
    assert frontier_figure.not_shown([*found, *beside], "digits") is None


def test_a_budget_is_shown_only_if_those_before_it_are_and_what_comes_after_describes(
    told, tmp_path: Path, studies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, found = told
    assert frontier_figure.not_shown(found, "digits") is None
    found = [replace(one, state="at the last look") if (one.budget, one.shown) == (18, False) else one for one in found]
    assert frontier_figure.not_shown(found, "digits") == 18
    assert frontier_figure.not_shown(found, "digits", before=18) is None
    assert frontier_figure.not_shown(found, "fashion") is None  # its comparisons are open
    level = runs.assign(
        test_accuracy=runs.test_accuracy.mask((runs.experiment == "stable_rank_9") & (runs.task == "digits"), 0.82)
    )
    after = frontier_figure.sentences(level)
    assert not any(one.shown for one in after if one.task == "digits" and one.budget in (4, 18))
    monkeypatch.setattr(frontier_configs, "CONFIGS", CONFIGS)
    frontier.write_studies(frontier.picks(frame(followed(whole()))), tmp_path, found)
    described = {file.stem for file in tmp_path.iterdir() if load_study(file).stopping is None}
    assert described == {
        "frontier_digits",
        "frontier_fashion",
        *(f"frontier_digits_{budget}" for budget in (36, 72, 288)),
    }
    for budget in (4, 9, 18):  # as they were declared
        name = f"frontier_digits_{budget}.yaml"
        assert (tmp_path / name).read_text() == (studies / name).read_text()
    assert load_study(tmp_path / "frontier_digits_36.yaml").seeds == tuple(range(250, 255))
    monkeypatch.setattr(frontier_configs, "CONFIGS", tmp_path)
    more = [
        {"study": "frontier_digits_36", "experiment": f"{name}_36", "seed": seed, "status": "done", "task": "digits"}
        | {"test_accuracy": (points + seed % 3) / 100, "adapter_values": 30_000, "chosen_step": 160}
        for name, points in POINTS.items()
        for seed in range(250, 255)
    ]
    both = frontier_figure.sentences(pd.concat([runs, pd.DataFrame(more)]))
    of_budget = [one for one in both if one.budget == 36 and one.control in frontier_configs.SENTENCES]
    assert [one.state for one in of_budget] == ["not tested"] * 3
    assert [one.shown for one in of_budget] == [False] * 3
    leads = {one.control: one.lead.estimate for one in of_budget}
    assert leads == pytest.approx({"random": 0.05, "last_blocks": 0.04, "even": 0.03})


@pytest.mark.parametrize(
    ("suffix", "mark", "points"),
    [
        ("16128", "frontier_values", {"random_16128": 80, "last_blocks_16128": 81, "even_16128": 86}),
        ("even_depths", "frontier_depths", {"even_depths_9": 80}),
    ],
)
def test_what_was_asked_later_is_told_beside_and_stays_out_of_the_figure(told, suffix, mark, points) -> None:
    runs, found = told
    more = [
        {"study": f"frontier_digits_{suffix}", "experiment": name, "seed": seed, "status": "done", "task": "digits"}
        | {
            "test_accuracy": (level + seed % 3 / 10 + seed % 2 * place / 10) / 100,
            "adapter_values": 16_128,
            "chosen_step": 0,
        }
        for place, (name, level) in enumerate({"stable_rank_9": 85, **points}.items())
        for seed in range(320, 350)
    ]
    if suffix == "even_depths":
        more = [one | {"seed": one["seed"] + 30} for one in more]
    both = pd.concat([runs, pd.DataFrame(more)])
    later = frontier_figure.asked_after(both, suffix)
    assert [(one.control, one.shown, one.budget) for one in later] == [
        (name.rpartition("_")[0], level < 85, 9) for name, level in points.items()
    ]
    wide = pd.DataFrame(more).pivot(index="seed", columns="experiment", values="test_accuracy")
    for one, name in zip(later, points, strict=True):
        assert one.lead.estimate == pytest.approx((wide["stable_rank_9"] - wide[name]).head(one.lead.n).mean())
    assert frontier_figure.sentences(both) == found
    rule = {"digits": "stable_rank", "fashion": "stable_rank"}
    assert frontier_figure.means(both, rule) == frontier_figure.means(runs, rule)
    blocks = frontier.blocks(found, both)
    assert "| digits, 9 | stable rank | 16,128 | 30 | 85.1 | 100 | – |" in blocks[mark]
    assert blocks["frontier"] == frontier.blocks(found, runs)["frontier"]


def test_points_of_a_budget_are_over_the_same_seeds(told) -> None:
    runs, found = told
    part = runs[(runs.experiment != "even_9") | (runs.seed < 255)]  # its comparison was decided early
    rows = frontier_figure.means(part, {"digits": "stable_rank", "fashion": "stable_rank"})
    of_nine = [row for row in rows if (row["task"], row["ranks"]) == ("digits", 9)]
    assert {row["seeds"] for row in of_nine} == {5}
    assert {row["seeds"] for row in rows if (row["task"], row["ranks"]) == ("digits", 4)} == {10}
    said = "digits 10 seeds (4, 18 ranks), 5 seeds (9 ranks); Fashion-MNIST"
    assert said in frontier_figure.caption(found, part)


def test_the_figure_shows_means_with_intervals_and_has_words_beside_it(told, tmp_path: Path) -> None:
    runs, found = told
    figure = frontier_figure.drawing(runs, found)
    by = {(row["task"], row["which"], row["ranks"]): row for row in figure.data}
    assert set(by) == {
        *(("digits", which, budget) for which in ("rule", "even", "random", "last_blocks") for budget in (4, 9, 18)),
        *(("fashion", which, 4) for which in ("rule", "even", "random", "last_blocks")),
        *((task, end, None) for task in ("digits", "fashion") for end in ("linear_probe", "lora_r8")),
    }
    done = runs[(runs.task == "fashion") & (runs.status == "done")]
    wide = done.pivot(index="seed", columns="experiment", values="test_accuracy")
    gain = (wide["even_4"] - wide["linear_probe"]).dropna()
    low, high = scipy.stats.t.interval(0.95, len(gain) - 1, gain.mean(), gain.sem())
    row = by["fashion", "even", 4]
    assert (row["low"], row["gain"], row["high"]) == pytest.approx((low, gain.mean(), high))
    assert by["digits", "linear_probe", None]["gain"] == 0
    assert row["trained_values"] == 3600
    for name in (
        "stable_rank",
        "even",
        "random sites",
        "last blocks",
        "linear probe",
        "LoRA r=8",
        "digits",
        "Fashion-MNIST",
    ):
        assert f">{name}</text>" in figure.svg
    study_figures.write_figure(tmp_path / "frontier.svg", figure)
    assert study_figures.recorded_digest(tmp_path / "frontier.svg") == study_figures.digest(figure)
    (block,) = frontier.blocks(found, runs).values()
    told_of = {
        (task, which): f"{100 * by[task, which, ranks]['gain']:.1f}"
        for task, which, ranks in by
        if (task, ranks) in (("digits", 9), ("fashion", 4)) or which == "lora_r8"
    }
    alternative = block.partition("](../images/frontier.svg)")[0]
    for task, words in (("digits", "digits, 9 ranks: "), ("fashion", "Fashion-MNIST, 4 ranks: ")):
        names = {"rule": "stable_rank", "even": "even", "random": "random sites", "last_blocks": "last blocks"}
        numbers = [f"{name} {told_of[task, which]}" for which, name in {**names, "lora_r8": "LoRA r=8"}.items()]
        assert words + ", ".join(numbers) in alternative


def test_commands(told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- frontier -->\n<!-- /frontier -->\n")
    for name, value in {"DOCUMENT": page, "ROWS": tmp_path / "rows.csv", "FIGURE": tmp_path / "f.svg"}.items():
        monkeypatch.setattr(frontier, name, value)
    with pytest.raises(SystemExit) as ended:
        frontier.main(["figure"])
    assert ended.value.code == 2
    assert "rows.csv: is not there yet" in capsys.readouterr().err
    told[0].drop(columns="task").to_csv(frontier.ROWS, index=False)
    frontier.main(["figure"])
    assert "| digits, 9 |" in page.read_text()
    assert (tmp_path / "f.svg").exists()
    page.with_suffix(".csv").write_text("study,experiment,seed\nanother,a,1\n")
    with pytest.raises(SystemExit):
        frontier.main(["study", str(page.with_suffix(".csv"))])
    assert "page.csv: expected a table of runs of frontier_screening_*" in capsys.readouterr().err
    for arguments in (["more", "x"], ["study", "x", "y"], ["screen", "--output", "x"]):
        with pytest.raises(SystemExit) as ended:
            frontier.main(arguments)
        assert ended.value.code == 2


def test_equal_values_are_those_that_the_nine_ranks_trained() -> None:
    runs = frontier.read(frontier.ROWS, frontier._OF_STUDY)
    nine = runs[runs.experiment == "stable_rank_9"]
    assert set(nine.adapter_values) == {frontier_configs.VALUES}


def test_the_document_holds_what_the_files_say() -> None:
    text = frontier.DOCUMENT.read_text(encoding="utf-8")
    made = {"frontier_length": frontier.length_text(frontier.read(frontier.LENGTH_ROWS, frontier._OF_LENGTH))}
    made["frontier_task"] = frontier.task_text(frontier.read(frontier.TASK_ROWS, frontier._OF_TASK))
    if frontier.SCREENING_ROWS.exists():
        made["frontier_screening"] = frontier.screening_text(
            frontier.read(frontier.SCREENING_ROWS, frontier._OF_SCREENING)
        )
    runs = frontier.read(frontier.ROWS, frontier._OF_STUDY)
    found = frontier_figure.sentences(runs)
    made |= frontier.blocks(found, runs)
    assert all(f"<!-- {name} -->" in text for name in made)
    assert filled(text, made) == text
    drawn = study_figures.digest(frontier_figure.drawing(runs, found))
    assert study_figures.recorded_digest(frontier.FIGURE) == drawn


def test_the_page_in_plain_words_repeats_the_leads_of_the_table() -> None:
    runs = frontier.read(frontier.ROWS, frontier._OF_STUDY)
    page = (EXPERIMENTS / "docs" / "index.md").read_text(encoding="utf-8")
    first = page[page.index("| nine ranks by stable rank, minus") :].split("\n\n")[0].splitlines()
    titles, lines = [cell.strip() for cell in first[0].split("|")[2:-1]], first[2:]
    of = {
        "random sites": "random",
        "the last blocks": "last_blocks",
        "an even spread, three blocks (twelve at as many values)": "even",
        "an even spread, seven blocks": frontier_configs.EVEN_DEPTHS,
        "fc1 alone": "fc1",
    }
    for line in lines:
        control, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        for title, cell in zip(titles, cells, strict=True):
            task, values = title.split(", ")
            told = (
                frontier_figure.asked_after(runs, str(frontier_configs.VALUES))
                if values == "as many values"
                else [one for one in frontier_figure.sentences(runs) if one.budget == 9]
                + frontier_figure.asked_after(runs, frontier_configs.EVEN_DEPTHS)
            )
            found = [one for one in told if (one.task, one.control) == (_task(task), of[control])]
            said = [points_interval(one.lead) + ("" if one.shown else ", not shown") for one in found if one.lead]
            assert cell == (said[0] if said else "–"), (control, title)
    assert len(lines) == len(of)


def _task(title: str) -> str:
    return next(name for name, task in frontier_configs.TASKS.items() if task.title == title)


def test_pages_say_what_the_files_hold() -> None:
    runs = frontier.read(frontier.ROWS, frontier._OF_STUDY)
    index, page = (
        " ".join(file.read_text(encoding="utf-8").split())
        for file in (EXPERIMENTS / "docs" / "index.md", frontier.DOCUMENT)
    )
    wide = {
        (task, study): runs[runs.study.isin([f"frontier_{task}", f"frontier_{task}_{study}"])].pivot(
            index="seed", columns="experiment", values="test_accuracy"
        )
        for task in frontier_configs.SCREENED
        for study in ("9", "16128")
    }
    gains, reached = {}, {}
    for task in frontier_configs.SCREENED:
        nine = wide[task, "9"]
        reached[task] = [fixed(100 * nine[one].mean(), 1) for one in ("stable_rank_9", "lora_r8", "linear_probe")]
        values = wide[task, "16128"]
        gains[task, "even"] = _points((values.even_16128 - values.last_blocks_16128).dropna())
    even, even_too = gains["digits", "even"].replace(" ", " points ", 1), gains["fashion", "even"]
    assert all(f"{even} on digits (ten seeds) and {even_too} on Fashion-MNIST" in text for text in (index, page))
    (own, most, least), (own_too, most_too, least_too) = reached["digits"], reached["fashion"]
    assert f"reach {own} %, LoRA r=8 with 576 ranks {most}, the probe {least}" in index
    assert f"it is {own_too}, {most_too} and {least_too}." in index
    assert f"{own} % on digits (LoRA r=8 with 576 ranks {most}, the probe {least})" in page
    assert f"and {own_too} % on Fashion-MNIST ({most_too} and {least_too})" in page


def _points(differences: pd.Series) -> str:
    low, high = scipy.stats.t.interval(0.95, len(differences) - 1, differences.mean(), differences.sem())
    return points_interval(Interval(differences.mean(), low, high, len(differences), 0.95))
