"""The documents' tables of AdaLoRA's studies: they are those of the files, and say what was planted."""

import numpy as np
from scipy import stats

from experiments.ranks.scripts import allocation_evidence as evidence
from experiments.scripts.evidence import filled
from experiments.scripts.made_up_runs import runs


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
