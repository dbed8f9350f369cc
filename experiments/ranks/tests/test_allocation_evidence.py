"""The documents' tables of AdaLoRA's studies: they are those of the files, and say what was planted."""

import numpy as np
import pandas as pd
from scipy import stats

from experiments.ranks.scripts import allocation_evidence as evidence
from experiments.scripts.evidence import filled


def runs(accuracies: dict[str, list[float]], rates: dict[str, float] | None = None) -> pd.DataFrame:
    fixed = {
        "study": "s",
        "method": "adalora",
        "status": "done",
        "majority_accuracy": 0.687,
        "adapter_parameters": 1000,
        "sites": 4,
        "sites_without_rank": 1,
        "gini_of_ranks": 0.25,
        "seconds": 30.0,
        "commit": "abc",
        "dirty": False,
    }
    rows = [
        fixed
        | {"experiment": name, "seed": seed, "learning_rate": (rates or {}).get(name, 1e-3)}
        | {"validation_accuracy": value, "test_accuracy": value}
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_the_document_holds_the_tables_of_the_files() -> None:
    text = evidence.DOCUMENT.read_text(encoding="utf-8")
    assert filled(text, evidence.tables()) == text


def test_the_ablation_is_compared_with_the_same_rank_everywhere_and_corrected() -> None:
    rng = np.random.default_rng(0)
    base = 0.80 + 0.01 * rng.standard_normal(10)
    better, same = base + 0.03 + 0.002 * rng.standard_normal(10), base + 0.002 * rng.standard_normal(10)
    accuracies = {"lora_r4": base, "uniform": same, "random": same, "good": better, "equal": same}
    table = evidence.ablation(runs({name: list(values) for name, values in accuracies.items()}))
    good = next(line for line in table.splitlines() if line.startswith("| `good`"))
    equal = next(line for line in table.splitlines() if line.startswith("| `equal`"))
    p_value = stats.wilcoxon(better - base).pvalue
    assert f"| {min(1.0, 2 * p_value):.3f} |" in good  # Holm over two allocations
    assert f"{100 * (better - base).mean():+.2f} [" in good
    assert "<0.001" in equal  # not inferior by a point
    controls = [line for line in table.splitlines() if line.startswith(("| `uniform`", "| `random`"))]
    assert all(line.count("| – |") for line in controls)  # no tests: they are not of the family


def test_learning_rates_are_compared_at_the_same_rate_and_losses_are_named() -> None:
    names = {
        f"{family}_lr_{text}": rate
        for family in ("lora_r8", "adalora")
        for text, rate in (("3e4", 3e-4), ("1e3", 1e-3), ("3e3", 3e-3))
    }
    level = {"lora_r8": {3e-4: 0.80, 1e-3: 0.82, 3e-3: 0.70}, "adalora": {3e-4: 0.81, 1e-3: 0.82, 3e-3: 0.79}}
    noise = 0.004 * np.random.default_rng(1).standard_normal((len(names), 10))
    accuracies = {
        name: list(level[name.rsplit("_lr_", 1)[0]][rate] + noise[place])
        for place, (name, rate) in enumerate(names.items())
    }
    table = evidence.learning_rates(runs(accuracies, names))
    lines = [line for line in table.splitlines() if line.startswith("| `adalora`")]
    lora, ours = (np.array(accuracies[f"{family}_lr_3e3"]) for family in ("lora_r8", "adalora"))
    expected = stats.ttest_1samp(100 * (ours - lora), -1.0, alternative="greater").pvalue
    assert expected < 0.001
    assert lines[2].rstrip().endswith("| <0.001 |")
    means = {name: 100 * np.mean(values) for name, values in accuracies.items()}
    lost = max(means[f"lora_r8_lr_{r}"] for r in ("3e4", "1e3", "3e3")) - means["lora_r8_lr_3e3"]
    assert f"`lora_r8` loses {lost:.1f} points" in table


def test_failed_runs_count_as_the_majority_class_and_are_named() -> None:
    rates = {"lora_r8_lr_1e3": 1e-3, "adalora_lr_1e3": 1e-3}
    data = runs({"lora_r8_lr_1e3": [0.8] * 4, "adalora_lr_1e3": [0.81, 0.82, 0.831, 0.84]}, rates)
    failed = (data.experiment == "adalora_lr_1e3") & (data.seed == 3)
    data.loc[failed, ["status", "test_accuracy", "validation_accuracy", "majority_accuracy", "commit"]] = [
        "failed",
        np.nan,
        np.nan,
        np.nan,
        None,
    ]
    row = next(line for line in evidence.learning_rates(data).splitlines() if line.startswith("| `adalora`"))
    values = np.array([81.0, 82.0, 83.1, 68.7])
    assert "| 4 (1) |" in row
    assert f"| {values.mean():.1f} ({values.std(ddof=1):.1f}) | 68.7 | {values.mean() - 80:+.2f} [" in row
    assert "1 of them failed" in evidence.learning_rates(data)
    assert "| `adalora_lr_1e3` | 4 (1) |" in evidence.pilot(data)


def test_a_study_that_is_not_complete_makes_a_table_and_says_how_far_it_is() -> None:
    data = runs({"lora_r4": [0.8, 0.81, 0.83], "uniform": [0.8], "random": [0.8], "good": [0.84, 0.82], "new": [0.8]})
    data.loc[data.experiment == "new", "seed"] = 7
    table = evidence.ablation(data)
    assert "seeds 0, 1, 2, 7, of which experiments have 1 to 3 so far" in table
    good, new = (
        next(line for line in table.splitlines() if line.startswith(f"| `{name}`")) for name in ("good", "new")
    )
    assert "| 2 (0) |" in good
    assert f"| {100 * (0.04 + 0.01) / 2:+.2f} [" in good
    assert "| 1 (0) | 80.0 | – | 1.000 |" in new  # it shares no seed with the reference: nothing to compare
