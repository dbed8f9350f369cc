"""What the studies of AdaLoRA say: records to compact tables in results/, and from those the tables of a document.

    .venv/bin/python -m experiments.ranks.scripts.allocation_evidence [RESULTS_DIR ...]

Every results directory that is named is condensed into results/<study>.csv, one row a run; rows that are there stay,
unless the same experiment and seed was run anew. Then everything between the marks of docs/adaptive_ranks.md
is made anew from these files and from benchmarks/results; the same files give the same text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.scripts.concentration import gini
from experiments.scripts.evidence import (
    MARGIN,
    Cell,
    Comparison,
    accuracy_by_seed,
    benchmark,
    benchmark_tables,
    by_experiment,
    compared,
    condense,
    corrected,
    each,
    interval,
    mean_and_spread,
    measured_on,
    measured_with,
    name_of,
    of,
    p,
    percent,
    run,
    study_tables,
    table,
)
from peft_vit.core.records import RunRecord

FOLDER = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = FOLDER / "results", FOLDER / "docs" / "adaptive_ranks.md"
ALLOCATION = ("allocation", "scoring", "reallocation", "penalty")  # older records and PEFT's AdaLoRA have the first


def columns(record: RunRecord) -> dict[str, object]:
    """Return what these studies are about: the ranks in the end, and what it took to decide them."""
    assert record.parameters is not None
    ranks = list(record.rank_history[-1].ranks.values()) if record.rank_history else []
    return {
        "adapter_parameters": record.parameters.final - record.parameters.head,
        "sites": len(ranks),
        "sites_without_rank": ranks.count(0),
        "gini_of_ranks": gini(ranks) if ranks else None,
        "allocation_s": round(sum(record.overhead_s.get(part, 0.0) for part in ALLOCATION), 2),
    }


def pilot(runs: pd.DataFrame) -> str:
    """Return validation accuracy by experiment; the test split plays no part here."""
    runs = runs.assign(validation_accuracy=runs.validation_accuracy.fillna(runs.majority_accuracy.max()))
    order = runs.groupby("experiment").validation_accuracy.mean().sort_values(ascending=False, kind="stable")
    columns: dict[str, Cell] = {
        "validation accuracy, mean (sd), %": lambda part: mean_and_spread(percent(part.validation_accuracy)),
        "each seed": lambda part: each(percent(part.validation_accuracy)),
    }
    return by_experiment(runs, order.index, columns)


def ablation(runs: pd.DataFrame) -> str:
    """Return every metric and strategy against the same rank everywhere, corrected over the sixteen."""
    reference, controls = "lora_r4", ("uniform", "random")
    versus = {
        name: compared(of(runs, name), of(runs, reference)) for name in runs.experiment.unique() if name != reference
    }
    tested = [name for name in versus if name not in controls]
    found = {reference: Comparison()}
    found |= {name: Comparison(versus[name].difference) for name in controls}
    found |= corrected({name: versus[name] for name in tested})
    columns: dict[str, Cell] = {
        "test accuracy, mean (sd), %": lambda part: mean_and_spread(accuracy_by_seed(runs, part)),
        f"minus `{reference}` [95 %]": lambda part: interval(found[name_of(part)].difference),
        "p, differs (Holm)": lambda part: p(found[name_of(part)].differs),
        f"p, not inferior by {MARGIN:g} (Holm)": lambda part: p(found[name_of(part)].not_inferior),
        "values trained": lambda part: f"{part.adapter_parameters.mean():,.0f}",
        "sites at rank 0": lambda part: f"{part.sites_without_rank.mean():.1f}",
        "Gini of ranks": lambda part: f"{part.gini_of_ranks.mean():.2f}",
    }
    order = [reference, *controls, *sorted(tested, key=lambda name: -of(runs, name).mean())]
    return by_experiment(runs, order, columns, first="allocation", said=_spread(runs, tested))


def _spread(runs: pd.DataFrame, tested: list[str]) -> str:
    means = {name: of(runs, name).mean() for name in tested}
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    within = pd.Series([of(runs, name).std(ddof=1) for name in tested]).mean()  # of those with more than one seed
    return (
        f"From the best, `{best}`, to the worst, `{worst}`: {means[best] - means[worst]:.1f} points between means of "
        f"{runs.seed.nunique()} seeds; the standard deviation over the seeds of one allocation is {within:.1f} points."
    )


def step_time() -> str:
    """Return the ratios of `make bench` beside the floor, from its JSON."""
    found = benchmark("step_time")
    titles = {"lora_fp32": "LoRA r=8, fp32", "lora_bf16": "LoRA r=8, bf16", "adalora_whole_run": "whole run, fp32"}
    rows = [
        {"title": title, "own": own, **row}
        for key, title in titles.items()
        for own in [next((row["median_s"] for row in found[key] if "our attention" in row["side"]), None)]
        for row in found[key]
    ]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "a step of": lambda row: f"{row['title']}: {row['side']}",
        "median, ms": lambda row: f"{1e3 * row['median_s']:.0f}",
        "over the floor": lambda row: f"{row['ratio']:.2f}",
        "over it with our attention": lambda row: f"{row['median_s'] / row['own']:.2f}" if row["own"] else "",
    }
    adaptive = next(row for row in found["adalora_whole_run"] if "over_fixed" in row)
    by_rank = ", ".join(
        f"{row['side'].removeprefix('mean rank ')}: {1e3 * row['median_s']:.0f}" for row in found["by_rank"]
    )
    merged = next(row for row in found["merged_inference"] if row["side"].startswith("merged"))
    return (
        f"{table(rows, columns)}\n\n- AdaLoRA over fixed ranks of the same mean: {adaptive['over_fixed']:.3f}.\n"
        f"- Milliseconds a step by mean rank: {by_rank}.\n"
        f"- Merged model over the plain one, inference: {merged['ratio']:.3f}.\n\n"
        f"{measured_with(found)}"
    )


def memory() -> str:
    """Return the peak of training by side, from the benchmark's JSON."""
    found = benchmark("memory")
    by_side: dict[str, dict[str, int]] = {}
    for row in found["rows"]:
        by_side.setdefault(row["side"], {})[row["precision"]] = row["training_bytes"]
    by_side = {side: peaks for side, peaks in by_side.items() if "bf16" in peaks}  # the small model's
    columns: dict[str, Callable[[str], str]] = {
        "peak of training beyond the loaded model": str,
        "fp32, MB": lambda side: f"{by_side[side]['fp32'] / 1e6:.0f}",
        "bf16, MB": lambda side: f"{by_side[side]['bf16'] / 1e6:.0f}",
    }
    return f"{table(by_side, columns)}\n\nEach side in a process of its own; {measured_on(found['machine'])}"


BENCHMARK_TABLES: dict[str, Callable[[], str]] = {"step_time": step_time, "memory": memory}
TABLES: dict[str, Callable[[pd.DataFrame], str]] = {"allocation_pilot": pilot, "allocation_ablation": ablation}


def tables() -> dict[str, str]:
    """Return the tables of every study and benchmark whose results are there."""
    return study_tables(TABLES, RESULTS) | benchmark_tables(BENCHMARK_TABLES)


if __name__ == "__main__":
    run(__doc__, partial(condense, columns=columns, kept=RESULTS), tables, DOCUMENT)
