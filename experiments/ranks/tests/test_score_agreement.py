"""The table of scores over seeds and against worth is that of scipy's rank correlations."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest
import timm
from scipy import optimize, special, stats

from experiments.ranks.scripts import score_agreement
from experiments.scripts import evidence
from peft_vit.base.errors import UserError
from peft_vit.core.adapters import adapted_sites, without_updates
from peft_vit.core.config import MeasuresConfig, load_study
from peft_vit.core.records import AdapterRemoval, ImportanceEntry
from peft_vit.core.training.metrics import predict
from peft_vit.data import load_data
from peft_vit.deploy.restore import restore_run

CONFIGS = Path(__file__).parents[1] / "configs"
GONE = ("spt_probe", "spt_random", "gora_probe", "gora_random", "eva_probe")  # whose rows are kept
GONE += ("relative_magnitude_probe", "relative_magnitude_random")
SITES = [f"blocks.{block}.attn.query" for block in range(12)]


def planted_rows() -> pd.DataFrame:
    """Return runs of one task: `gradient` follows worth with the probe's head and is noise with a random one."""
    rng, rows = np.random.default_rng(5), []
    truth = rng.standard_normal(12)
    for seed in range(290, 300):
        worth = truth + 0.3 * rng.standard_normal(12)
        by_name = {
            "lora_r8": worth,
            "lora_r8_tempered": truth,
            "gradient_probe": truth + 0.3 * rng.standard_normal(12),
            "gradient_random": rng.standard_normal(12),
            "eva_probe": np.arange(12.0),
        }
        for name, values in by_name.items():
            rows.append(
                {"study": "score_agreement_digits", "experiment": name, "seed": seed, "status": "done"}
                | {"seconds": 5.0, "split": f"s{seed}", "commit": "abc", **dict(zip(SITES, values, strict=True))}
            )
    return pd.DataFrame(rows).sample(frac=1, random_state=1)


def cells(runs: pd.DataFrame) -> dict[tuple[str, str], list[str]]:
    lines = [line for line in score_agreement.score_table(runs).splitlines() if line.startswith("| digits")]
    split = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    return {(one[1], one[2]): one[3:] for one in split}


def test_rank_correlations_are_those_of_scipy() -> None:
    runs = planted_rows()
    found = cells(runs)
    wide = {name: part.set_index("seed")[SITES] for name, part in runs.groupby("experiment")}

    def rho(left: str, one: int, right: str, other: int) -> float:
        return stats.spearmanr(wide[left].loc[one], wide[right].loc[other]).statistic

    pairs = [(290 + 2 * pair, 291 + 2 * pair) for pair in range(5)]
    for name, row in (("lora_r8", ("worth", "probe")), ("gradient_random", ("gradient", "random"))):
        assert found[row][0].split()[0] == f"{np.mean([rho(name, a, name, b) for a, b in pairs]):+.2f}"
    probe, random = (
        np.array([rho(f"gradient_{head}", seed, "lora_r8", seed) for seed in range(290, 300)])
        for head in ("probe", "random")
    )
    assert found["gradient", "probe"][1].split()[0] == f"{probe.mean():+.2f}"
    assert found["gradient", "random"][1].split()[0] == f"{random.mean():+.2f}"
    low, high = stats.t.interval(0.95, 9, (probe - random).mean(), (probe - random).std(ddof=1) / np.sqrt(10))
    assert found["gradient", "probe"][2] == f"{(probe - random).mean():+.2f} [{low:+.2f}, {high:+.2f}]"
    assert found["gradient", "random"][2] == found["eva", "probe"][2] == "–"  # once, and never without two heads
    assert found["eva", "probe"][0].startswith("+1.00")
    assert found["worth, tempered", "probe"][0].startswith("+1.00")
    tempered = np.mean([rho("gradient_probe", seed, "lora_r8_tempered", seed) for seed in range(290, 300)])
    assert found["gradient", "probe"][3].split()[0] == f"{tempered:+.2f}"
    assert found["gradient", "probe"][4] != "–" == found["gradient", "random"][4]
    said = [
        f"digits, {name} {worth.mean():+.4f} ({100 * (worth > 0).mean():.0f} %)"
        for name, worth in (
            ("worth", wide["lora_r8"].to_numpy()),
            ("worth, tempered", wide["lora_r8_tempered"].to_numpy()),
        )
    ]
    assert f"where it is above 0: {'; '.join(said)}." in score_agreement.score_table(runs)
    assert "40 runs, none failed" in score_agreement.score_table(runs)  # a measure is no run


def test_a_run_without_an_update_says_nothing_about_worth() -> None:
    runs = planted_rows()
    runs.loc[(runs.experiment == "lora_r8") & (runs.seed == 290), SITES] = 0.0  # it chose its start
    left = runs[(runs.experiment != "lora_r8") | (runs.seed != 290)]
    assert cells(runs)["gradient", "probe"][1] == cells(left)["gradient", "probe"][1]


def test_records_become_a_row_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_agreement, "ROWS", tmp_path / "rows.csv")
    lora = planted.experiments()["lora_r8"]
    worth = AdapterRemoval(
        images=200,
        loss=0.5,
        accuracy=0.8,
        site_loss_rise=dict.fromkeys(SITES, 0.25),
        group_loss_rise={},
        group_accuracy={},
    )
    scores = [ImportanceEntry(step=step, scores=dict.fromkeys(SITES, 1.0 + step)) for step in (0, 10)]
    study = "score_agreement_digits"
    records = [
        planted.record(lora, 290, 0.7, study=study, changes={"removal": worth}),
        planted.record(
            lora.model_copy(update={"name": "spt_probe"}), 290, 0.7, study=study, changes={"importance_history": scores}
        ),
    ]
    asked: list[Path] = []

    def tempered(run_dir: Path) -> dict[str, float]:
        asked.append(run_dir)
        return dict.fromkeys(SITES, 0.5)

    monkeypatch.setattr(score_agreement, "tempered_worth", tempered)
    folder = planted.write(tmp_path / "a", records)
    score_agreement.keep(folder)
    assert asked == [folder / study / "lora_r8" / "seed_290"]
    rows = pd.read_csv(score_agreement.ROWS).set_index("experiment")
    assert (rows.loc["lora_r8", SITES] == 0.25).all()
    assert (rows.loc["lora_r8_tempered", SITES] == 0.5).all()
    assert (rows.loc["spt_probe", SITES] == 1.0).all()  # the first decision: every site has a score
    with pytest.raises(UserError, match=r"expected real runs of score_agreement_\*, all of them done"):
        score_agreement.keep(planted.write(tmp_path / "b", planted.quickstart()[:1]))


@pytest.mark.usefixtures("cache")
def test_tempered_worth_is_of_logits_at_the_temperature_with_the_least_loss(
    run_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = restore_run(run_of("lora"))
    spec = run.record.spec.model_copy(update={"measures": MeasuresConfig(removal_images=12)})
    asked = dataclasses.replace(run, record=run.record.model_copy(update={"spec": spec}))
    monkeypatch.setattr(score_agreement, "restore_run", lambda _: asked)
    model = copy.deepcopy(run.model)
    cfg = timm.get_pretrained_cfg("test_vit")
    images = list(load_data(spec.data, spec.seed).validation.ordered_batches(32, cfg.mean, cfg.std))

    def loss(temperature: float, left_out: Collection[str] = ()) -> float:
        with without_updates(model, left_out):
            logits, labels = predict(model, images, precision="fp32")
        scaled = logits.astype(np.float64) / temperature
        return float(np.mean(special.logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]))

    best = optimize.minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-7}).x
    assert abs(best - 1) > 0.05  # or it would not be told from the plain rise
    found = score_agreement.tempered_worth(Path("any"))
    assert len(found) == len(adapted_sites(model))
    for site, rise in found.items():
        assert rise == pytest.approx(loss(best, {site}) - loss(best), abs=2e-5)


def test_the_document_says_what_results_hold() -> None:
    text = score_agreement.DOCUMENT.read_text(encoding="utf-8")
    made = score_agreement.tables()
    assert "<!-- score_agreement -->" in text
    assert evidence.filled(text, made) == text, "run experiments/ranks/scripts/score_agreement.py"


def test_results_hold_the_runs_that_the_configurations_ask_for() -> None:
    kept = pd.read_csv(score_agreement.ROWS)
    assert not kept.empty
    for study, runs in kept.groupby("study"):
        asked = load_study(CONFIGS / f"{study}.yaml")
        names = [*(one.name for one in asked.experiments), score_agreement.TEMPERED, *GONE]
        expected = {(name, seed) for name in names for seed in asked.seeds}
        assert set(runs[["experiment", "seed"]].itertuples(index=False, name=None)) == expected, study
