"""Tables of a report computed again from record.json files, with NumPy and SciPy and nothing of the package.

`RECOMPUTED` maps a table's slug, as a pattern, to a function from the records to the expected cells: a list of rows,
each a dict by column. To cover a new table, write one and add it. What is not recomputed here stands in `NOT_COVERED`,
with where it is tested instead; a numeric column that is in neither fails the test.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

KEYS = ("cost", "experiment", "reference", "measure", "matrix", "site", "layer", "seed", "step")
Record = dict[str, Any]
Row = dict[str, Any]


class Ledger:
    """Records by experiment and seed, as plain JSON."""

    def __init__(self, folder: Path) -> None:
        self.failed: list[Record] = []
        self.runs: dict[str, dict[int, Record]] = {}
        for file in folder.rglob("record.json"):
            record = json.loads(file.read_text())
            spec = record["spec"]
            if record["status"] == "done":
                self.runs.setdefault(spec["experiment"]["name"], {})[spec["seed"]] = record
            else:
                self.failed.append(record)

    def over_seeds(self, name: str, value: Callable[[Record], float]) -> list[float]:
        return [value(self.runs[name][seed]) for seed in sorted(self.runs[name])]

    def with_section(self, *sections: str) -> list[str]:
        some = {name: next(iter(by_seed.values())) for name, by_seed in self.runs.items()}
        return [n for n, r in some.items() if any(r["spec"]["experiment"].get(s) is not None for s in sections)]


def interval(name: str, values: list[float], n: str | None = "n") -> Row:
    """Student's t interval of a mean, as columns."""
    data = np.array(values)
    half = stats.t.ppf(0.975, len(data) - 1) * data.std(ddof=1) / math.sqrt(len(data))
    row: Row = {name: data.mean(), f"{name}_low": data.mean() - half, f"{name}_high": data.mean() + half}
    return row | ({} if n is None else {n: len(data)})


def wilcoxon_p(differences: list[float]) -> float:
    """Exact two-sided p by trying every sign; zeros are ranked and then left out, as Pratt does."""
    data = np.round(np.array(differences), 12)
    ranks = stats.rankdata(np.abs(data))
    ranks = ranks[data != 0]
    observed = abs((ranks * np.sign(data[data != 0])).sum())
    sums = [abs((ranks * np.array(signs)).sum()) for signs in product((1, -1), repeat=len(ranks))]
    return float(np.mean([value >= observed - 1e-9 for value in sums]))


def holm(ps: list[float]) -> list[float]:
    order = np.argsort(ps, kind="stable")
    adjusted, largest = [0.0] * len(ps), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = largest
    return adjusted


def compared(rows: list[tuple[Row, list[int], list[float]]], n: str = "n", name: str = "difference") -> list[Row]:
    """Paired differences as one family: each row's keys, its seeds and the differences in their order."""
    ps = [wilcoxon_p(values) for _, _, values in rows]
    needed = math.ceil(1 - math.log2(0.05 / len(rows)))  # smallest n with 2 / 2^n <= 5 % / family
    return [
        key
        | interval(name, values, n)
        | {f"seed_{seed}": value for seed, value in zip(seeds, values, strict=True)}
        | {"p_value": p, "p_holm": adjusted, "needed_n": needed}
        for (key, seeds, values), p, adjusted in zip(rows, ps, holm(ps), strict=True)
    ]


def on_test(record: Record) -> float:
    return record["test"]["accuracy"]


def differences(led: Ledger, name: str, reference: str, of: Callable[[Record], float]) -> tuple[list[int], list[float]]:
    seeds = sorted(led.runs[name].keys() & led.runs[reference].keys())
    return seeds, [of(led.runs[name][seed]) - of(led.runs[reference][seed]) for seed in seeds]


# --- accuracy, cost and what is compared ------------------------------------------------------------------------------


def accuracy(led: Ledger, _: str) -> list[Row]:
    return [
        {
            "experiment": name,
            **interval("test_accuracy", led.over_seeds(name, on_test)),
            "validation_accuracy": np.mean(led.over_seeds(name, lambda r: r["validation"]["accuracy"])),
            "above_majority": np.mean(led.over_seeds(name, lambda r: on_test(r) - r["majority_accuracy"]["test"])),
            **{f"seed_{seed}": on_test(record) for seed, record in led.runs[name].items()},
        }
        for name in led.runs
    ]


def against(led: Ledger, slug: str) -> list[Row]:
    reference = slug.removeprefix("against_")
    others = [name for name in led.runs if name != reference]
    return compared([({"experiment": n}, *differences(led, n, reference, on_test)) for n in others])


def of_test(measure: str) -> Callable[[Record], float]:
    return lambda record: record["test"][measure]


def calibration_against(led: Ledger, slug: str) -> list[Row]:
    reference = slug.removeprefix("calibration_against_")
    rows = []
    for measure in ("nll", "ece"):
        rows += compared(
            [
                ({"experiment": n, "measure": measure}, *differences(led, n, reference, of_test(measure)))
                for n in led.runs
                if n != reference
            ]
        )
    return rows


def all_pairs(led: Ledger, _: str) -> list[Row]:
    names = sorted(led.runs)
    pairs: list[tuple[Row, list[int], list[float]]] = []
    for one, other in combinations(names, 2):
        seeds, values = differences(led, one, other, on_test)
        pairs.append(({"experiment": one, "reference": other}, seeds, values))
    family = compared(pairs, "difference_n")
    family = [{key: value for key, value in row.items() if not key.startswith("seed_")} for row in family]
    return [*family, *(mirrored(row) for row in family)]


def mirrored(row: Row) -> Row:
    """The same pair the other way round, since the test does not know which side a table starts from."""
    turned = dict(row) | {"experiment": row["reference"], "reference": row["experiment"]}
    return turned | {
        "difference": -row["difference"],
        "difference_low": -row["difference_high"],
        "difference_high": -row["difference_low"],
    }


def mean_of(led: Ledger, name: str, *path: str) -> float:
    def value(record: Record) -> float:
        for part in path:
            record = record[part]
        return record  # type: ignore[return-value]

    return float(np.mean(led.over_seeds(name, value)))


def cost(led: Ledger, _: str) -> list[Row]:
    return [
        {
            "experiment": n,
            "final_parameters": mean_of(led, n, "parameters", "final"),
            "n": len(led.runs[n]),
            "peak_parameters": mean_of(led, n, "parameters", "peak"),
            "adapter_parameters": mean_of(led, n, "parameters", "final") - mean_of(led, n, "parameters", "head"),
            "frozen_bytes": mean_of(led, n, "bytes", "frozen_bytes"),
            "adapter_file_bytes": mean_of(led, n, "bytes", "adapter_file_bytes"),
            "seconds_per_step": mean_of(led, n, "seconds_per_step"),
            "own_memory_bytes": mean_of(led, n, "own_memory_bytes"),
        }
        for n in led.runs
    ]


def of_metrics(*measures: str) -> Callable[[Ledger, str], list[Row]]:
    def rows(led: Ledger, _: str) -> list[Row]:
        return [
            {"experiment": n}
            | {
                key: value
                for m in measures
                for key, value in interval(m, led.over_seeds(n, of_test(m)), f"{m}_n").items()
            }
            for n in led.runs
        ]

    return rows


def calibration(led: Ledger, slug: str) -> list[Row]:
    """Without predictions in the records, which the planted ones lack, there is nothing but NLL and ECE."""
    nothing = {f"{measure}_n": 0 for measure in ("adaptive_ece", "brier", "overconfidence")}
    seeds = [{"seeds_without_predictions": " ".join(map(str, sorted(led.runs[n])))} for n in led.runs]
    return [row | nothing | without for row, without in zip(of_metrics("nll", "ece")(led, slug), seeds, strict=True)]


def not_done(led: Ledger, _: str) -> list[Row]:
    return [
        {"experiment": r["spec"]["experiment"]["name"], "seed": r["spec"]["seed"], "reason": r["error"]}
        for r in led.failed
    ]


# --- ranks and bits ---------------------------------------------------------------------------------------------------


def scored(led: Ledger) -> list[str]:
    return led.with_section("adalora")


def ranks_at(record: Record, at: int = -1) -> np.ndarray:
    return np.array([record["rank_history"][at]["ranks"].get(site["name"], 0) for site in record["sites"]])


def rank_by_matrix(led: Ledger, _: str) -> list[Row]:
    rows = []
    for name in scored(led):
        runs = [led.runs[name][seed] for seed in sorted(led.runs[name])]
        kinds = np.array([site["matrix"] for site in runs[0]["sites"]])
        rows += [
            {
                "experiment": name,
                "matrix": kind,
                **interval("mean_rank", [ranks_at(r)[kinds == kind].mean() for r in runs]),
            }
            for kind in dict.fromkeys(kinds)
        ]
    return rows


def allocation_against_fixed(led: Ledger, _: str) -> list[Row]:
    family = []
    for name in sorted(scored(led), key=lambda n: (n.startswith("qa_"), n)):
        found = {}
        for seed, record in led.runs[name].items():
            line = sorted(
                (math.log(led.runs[n][seed]["parameters"]["final"]), on_test(led.runs[n][seed]))
                for n in led.with_section("lora")
                if seed in led.runs[n]
            )
            x, y = zip(*line, strict=True)
            found[seed] = on_test(record) - np.interp(math.log(record["parameters"]["final"]), x, y)
        seeds = sorted(found)
        family.append(({"experiment": name}, seeds, [found[seed] for seed in seeds]))
    return compared(family)


# --- quantization -----------------------------------------------------------------------------------------------------


def settings(record: Record) -> Row:
    section = record["spec"]["experiment"]["qa_lora"]
    grouped = {"group_size": section["group_size"]} if section["use_group_quantization"] else {}
    return {"gradient_scaling_factor": section["gradient_scaling_factor"], **grouped}


def low_bit(led: Ledger) -> list[str]:
    return led.with_section("qa_lora")


def quantization(led: Ledger, _: str) -> list[Row]:
    rows = []
    for name in low_bit(led):
        first = next(iter(led.runs[name].values()))
        errors = {
            m: np.mean([r["quantization"]["relative_error"][m] for r in led.runs[name].values()])
            for m in first["quantization"]["relative_error"]
        }
        rows.append(
            {
                "experiment": name,
                **interval("test_accuracy", led.over_seeds(name, on_test)),
                "difference_to_float": np.mean(differences(led, name, "lora_r8", on_test)[1]),
                "mean_relative_error": np.mean(list(errors.values())),
                "worst_relative_error": max(errors.values()),
                "worst_module": max(errors, key=lambda m: errors[m]),
                **settings(first),
                "bits_per_weight": mean_of(led, name, "quantization", "bits_per_weight"),
                "quantized_bytes": mean_of(led, name, "quantization", "quantized_bytes"),
                "frozen_bytes": mean_of(led, name, "bytes", "frozen_bytes"),
                "float_backbone_bytes": 4 * mean_of(led, name, "parameters", "backbone_total"),
            }
        )
    return rows


def quantization_cost(led: Ledger, _: str) -> list[Row]:
    def stored(name: str) -> float:
        return mean_of(led, name, "bytes", "frozen_bytes") + mean_of(led, name, "bytes", "adapter_file_bytes")

    return [
        {
            "experiment": n,
            "bits_per_weight": mean_of(led, n, "quantization", "bits_per_weight"),
            "same_machine": 1,
            "stored_bytes": stored(n),
            "float_stored_bytes": stored("lora_r8"),
            "own_memory_bytes": mean_of(led, n, "own_memory_bytes"),
            "float_own_memory_bytes": mean_of(led, "lora_r8", "own_memory_bytes"),
            "seconds_per_step": mean_of(led, n, "seconds_per_step"),
            "float_seconds_per_step": mean_of(led, "lora_r8", "seconds_per_step"),
        }
        for n in low_bit(led)
    ]


def quantization_against_float(led: Ledger, _: str) -> list[Row]:
    measures: dict[str, Callable[[Record], float]] = {"accuracy": on_test, "nll": lambda r: r["test"]["nll"]}
    rows = []
    for measure, of in measures.items():
        family = [({"experiment": n, "measure": measure}, *differences(led, n, "lora_r8", of)) for n in low_bit(led)]
        for row in compared(family):
            first = next(iter(led.runs[row["experiment"]].values()))
            bits = first["spec"]["experiment"]["qa_lora"]["quantization_bits"]
            rows.append(row | settings(first) | {"bits": bits})
    return rows


RECOMPUTED: dict[str, Callable[[Ledger, str], list[Row]]] = {
    "accuracy": accuracy,
    "against_.*": against,
    "all_pairs": all_pairs,
    "allocation_against_fixed": allocation_against_fixed,
    "calibration": calibration,
    "calibration_against_.*": calibration_against,
    "cost": cost,
    "not_done": not_done,
    "quality": of_metrics("balanced_accuracy", "auroc"),
    "quantization": quantization,
    "quantization_against_float": quantization_against_float,
    "quantization_cost": quantization_cost,
    "rank_by_matrix": rank_by_matrix,
}

# A table, or "table: column", and where its numbers are tested instead.
NOT_COVERED = {
    "findings": "every measure by hand in tests/unit/analysis",
    "verdicts": "counts of findings, see there",
    "without_data": "no numbers",
    "agreement": "recomputed in tests/unit/report/test_report_examples.py",
    "examples": "recomputed in tests/unit/report/test_report_examples.py",
    "allocation": "planted truth in tests/unit/analysis, columns in test_report_numbers.py",
    "allocation_course": "overlap and churn by hand in tests/unit/analysis/test_effectiveness.py",
    "convergence": "by hand and by linregress in tests/unit/analysis/test_convergence.py, columns as above",
    "pareto_fronts": "fronts by brute force in tests/unit/analysis/test_pareto.py, columns as above",
    "quantization_against_float: late_deviation": "see convergence",
    "quantization_against_float: roughness": "see convergence",
    "allocation_against_controls": "planted controls in tests/unit/analysis",
    "importance_across_seeds": "Kendall's W against SciPy in tests/unit/analysis",
    "importance_across_studies": "two studies in tests/unit/analysis",
    "bits_by_layer": "planted truth in tests/unit/analysis",
    "importance_by_block": "planted truth in tests/unit/analysis",
    "importance_by_matrix": "planted truth in tests/unit/analysis",
    "importance_course": "planted truth in tests/unit/analysis/test_importance.py",
    "importance_over_time": "planted truth in tests/unit/analysis",
    "quantization_balance": "planted truth in tests/unit/analysis",
    "size": "planted truth in tests/unit/analysis",
    "size_parts": "planted truth in tests/unit/analysis",
    **{
        f"all_pairs: {column}": "by hand in tests/unit/analysis/test_pairs.py, against pingouin in tests/oracle"
        for of in ("cohens_d", "improvement")
        for column in (of, f"{of}_low", f"{of}_high", f"{of}_n")
    },
    "all_pairs: hedges_g": "as Cohen's d",
}


def recomputation_of(slug: str) -> Callable[[Ledger, str], list[Row]] | None:
    """Return the function for a table; the longest pattern that fits it."""
    fitting = [pattern for pattern in RECOMPUTED if re.fullmatch(pattern, slug)]
    return RECOMPUTED[max(fitting, key=len)] if fitting else None
