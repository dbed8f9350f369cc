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
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

KEYS = ("experiment", "reference", "measure", "seed")
Record = dict[str, Any]
Row = dict[str, Any]


def of(path: str) -> Callable[[Record], Any]:
    """Return what reads a value of a record, as in test.accuracy."""

    def read(record: Any) -> Any:
        for part in path.split("."):
            record = record[part]
        return record

    return read


on_test = of("test.accuracy")


class Ledger:
    """Records by experiment and seed, as plain JSON."""

    def __init__(self, folder: Path) -> None:
        self.failed: list[Record] = []
        self.runs: dict[str, dict[int, Record]] = {}
        for file in folder.rglob("record.json"):
            record = json.loads(file.read_text())
            if record["status"] == "done":
                self.runs.setdefault(of("spec.experiment.name")(record), {})[of("spec.seed")(record)] = record
            else:
                self.failed.append(record)

    def first(self, name: str) -> Record:
        return next(iter(self.runs[name].values()))

    def over_seeds(self, name: str, value: Callable[[Record], float]) -> list[float]:
        return [value(self.runs[name][seed]) for seed in sorted(self.runs[name])]

    def mean(self, name: str, path: str) -> float:
        return float(np.mean(self.over_seeds(name, of(path))))

    def with_section(self, section: str) -> list[str]:
        return [name for name in self.runs if self.first(name)["spec"]["experiment"].get(section) is not None]

    def differences(self, name: str, reference: str, value: Callable[[Record], float]) -> tuple[list[int], list[float]]:
        seeds = sorted(self.runs[name].keys() & self.runs[reference].keys())
        return seeds, [value(self.runs[name][seed]) - value(self.runs[reference][seed]) for seed in seeds]

    def family(self, names: list[str], reference: str, value: Callable[[Record], float], **keys: Any) -> list[Row]:
        rows = [({"experiment": name, **keys}, *self.differences(name, reference, value)) for name in names]
        return compared(rows)


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


# --- accuracy, cost and what is compared ------------------------------------------------------------------------------


def accuracy(led: Ledger, _: str) -> list[Row]:
    return [
        {
            "experiment": name,
            **interval("test_accuracy", led.over_seeds(name, on_test)),
            "validation_accuracy": led.mean(name, "validation.accuracy"),
            "above_majority": np.mean(led.over_seeds(name, lambda r: on_test(r) - r["majority_accuracy"]["test"])),
            **{f"seed_{seed}": on_test(record) for seed, record in led.runs[name].items()},
        }
        for name in led.runs
    ]


def against(led: Ledger, slug: str) -> list[Row]:
    reference = slug.removeprefix("against_")
    return led.family([name for name in led.runs if name != reference], reference, on_test)


COST = {
    "final_parameters": "parameters.final",
    "peak_parameters": "parameters.peak",
    "frozen_bytes": "bytes.frozen_bytes",
    "adapter_file_bytes": "bytes.adapter_file_bytes",
    "seconds_per_step": "seconds_per_step",
    "own_memory_bytes": "own_memory_bytes",
}


def cost(led: Ledger, _: str) -> list[Row]:
    rows = []
    for name, runs in led.runs.items():
        means = {column: led.mean(name, path) for column, path in COST.items()}
        adapters = means["final_parameters"] - led.mean(name, "parameters.head")
        rows.append({"experiment": name, "n": len(runs), "adapter_parameters": adapters, **means})
    return rows


def not_done(led: Ledger, _: str) -> list[Row]:
    specs = [(record["spec"], record["error"]) for record in led.failed]
    return [{"experiment": spec["experiment"]["name"], "seed": spec["seed"], "reason": why} for spec, why in specs]


# --- ranks and bits ---------------------------------------------------------------------------------------------------


def allocation_against_fixed(led: Ledger, _: str) -> list[Row]:
    family = []
    for name in sorted(led.with_section("adalora"), key=lambda n: (n.startswith("qa_"), n)):
        by_seed = {}
        for seed, record in led.runs[name].items():
            fixed = [led.runs[n][seed] for n in led.with_section("lora") if seed in led.runs[n]]
            x, y = zip(*sorted((math.log(r["parameters"]["final"]), on_test(r)) for r in fixed), strict=True)
            by_seed[seed] = on_test(record) - np.interp(math.log(record["parameters"]["final"]), x, y)
        family.append(({"experiment": name}, sorted(by_seed), [by_seed[seed] for seed in sorted(by_seed)]))
    return compared(family)


# --- quantization -----------------------------------------------------------------------------------------------------


def settings(record: Record) -> Row:
    section = record["spec"]["experiment"]["qa_lora"]
    grouped = {"group_size": section["group_size"]} if section["use_group_quantization"] else {}
    return {"gradient_scaling_factor": section["gradient_scaling_factor"], **grouped}


def quantization(led: Ledger, _: str) -> list[Row]:
    rows = []
    for name in led.with_section("qa_lora"):
        each = [record["quantization"]["relative_error"] for record in led.runs[name].values()]
        errors = {module: np.mean([error[module] for error in each]) for module in each[0]}
        rows.append(
            {
                "experiment": name,
                **interval("test_accuracy", led.over_seeds(name, on_test)),
                "difference_to_float": np.mean(led.differences(name, "lora_r8", on_test)[1]),
                "mean_relative_error": np.mean(list(errors.values())),
                "worst_relative_error": max(errors.values()),
                "worst_module": max(errors, key=lambda m: errors[m]),
                **settings(led.first(name)),
                "bits_per_weight": led.mean(name, "quantization.bits_per_weight"),
                "quantized_bytes": led.mean(name, "quantization.quantized_bytes"),
                "frozen_bytes": led.mean(name, "bytes.frozen_bytes"),
                "float_backbone_bytes": 4 * led.mean(name, "parameters.backbone_total"),
            }
        )
    return rows


def quantization_against_float(led: Ledger, _: str) -> list[Row]:
    rows = []
    for measure in ("accuracy", "nll"):
        for row in led.family(led.with_section("qa_lora"), "lora_r8", of(f"test.{measure}"), measure=measure):
            first = led.first(row["experiment"])
            bits = first["spec"]["experiment"]["qa_lora"]["quantization_bits"]
            rows.append(row | settings(first) | {"bits": bits})
    return rows


RECOMPUTED: dict[str, Callable[[Ledger, str], list[Row]]] = {
    "accuracy": accuracy,
    "against_.*": against,
    "allocation_against_fixed": allocation_against_fixed,
    "cost": cost,
    "not_done": not_done,
    "quantization": quantization,
    "quantization_against_float": quantization_against_float,
}

# Where the numbers of a table, or of "table: column", are tested instead.
_ELSEWHERE = {
    "planted truth in tests/unit/analysis": "bits_by_layer quantization_balance size",
    "planted truth in tests/unit/analysis/test_findings_values.py": "findings",
    "by linregress in tests/unit/analysis/test_convergence.py, columns there too": "convergence",
}
NOT_COVERED = {table: where for where, tables in _ELSEWHERE.items() for table in tables.split()}
NOT_COVERED |= dict.fromkeys(
    ("quantization_against_float: late_deviation", "quantization_against_float: roughness"), "see convergence"
)


def recomputation_of(slug: str) -> Callable[[Ledger, str], list[Row]] | None:
    """Return the function for a table; the longest pattern that fits it."""
    fitting = [pattern for pattern in RECOMPUTED if re.fullmatch(pattern, slug)]
    return RECOMPUTED[max(fitting, key=len)] if fitting else None
