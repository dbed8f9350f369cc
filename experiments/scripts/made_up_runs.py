"""Made-up rows of AdaLoRA's studies."""

import pandas as pd


def runs(accuracies: dict[str, list[float]], rates: dict[str, float] | None = None) -> pd.DataFrame:
    """Return a row a run, of experiments by their accuracies at each seed, and by their learning rates."""
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
