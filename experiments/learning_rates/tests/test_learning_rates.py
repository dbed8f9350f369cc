"""The page's tables of learning rates are those of the files, and say what was planted."""

import numpy as np
from scipy import stats

from experiments.learning_rates.scripts import learning_rates as evidence
from experiments.scripts.evidence import filled
from experiments.scripts.made_up_runs import runs


def test_the_document_holds_the_tables_of_the_files() -> None:
    text = evidence.DOCUMENT.read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in text for name in evidence.TABLES)
    assert filled(text, evidence.tables()) == text


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
