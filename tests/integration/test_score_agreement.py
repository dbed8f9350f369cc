"""The table of scores over seeds and against worth is that of scipy's rank correlations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest
import score_agreement
from scipy import stats

from peft_vit.errors import UserError
from peft_vit.records import AdapterRemoval, ImportanceEntry

SITES = [f"blocks.{block}.attn.query" for block in range(12)]


def planted_rows() -> pd.DataFrame:
    """Return runs of one task: `gradient` follows worth with the probe's head and is noise with a random one."""
    rng, rows = np.random.default_rng(5), []
    truth = rng.standard_normal(12)
    for seed in range(290, 300):
        worth = truth + 0.3 * rng.standard_normal(12)
        by_name = {
            "lora_r8": worth,
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
    for name, row in (("lora_r8", ("worth itself", "probe")), ("gradient_random", ("gradient", "random"))):
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
    score_agreement.keep(planted.write(tmp_path / "a", records))
    rows = pd.read_csv(score_agreement.ROWS).set_index("experiment")
    assert (rows.loc["lora_r8", SITES] == 0.25).all()
    assert (rows.loc["spt_probe", SITES] == 1.0).all()  # the first decision: every site has a score
    with pytest.raises(UserError, match=r"expected real runs of score_agreement_\*, all of them done"):
        score_agreement.keep(planted.write(tmp_path / "b", planted.quickstart()[:1]))
