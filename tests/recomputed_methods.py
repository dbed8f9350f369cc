"""Tables of experiments computed again from record.json files: see `recomputed_tables`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import combinations, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

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
    for row, (_keys, seeds, values) in zip(family, pairs, strict=True):
        for seed in seeds:
            del row[f"seed_{seed}"]
        row["improvement"] = np.mean([(v > 1e-12) + 0.5 * (abs(v) <= 1e-12) for v in values])
        row["improvement_n"] = len(values)
        told = np.round(values, 12)  # as they stand in the other tables: equal differences are equal
        if np.std(told) > 0:
            row["cohens_d"] = np.mean(told) / np.std(told, ddof=1)
            freedom = len(told) - 1  # Hedges' correction of the small-sample bias
            if freedom > 1:
                correction = math.gamma(freedom / 2) / math.sqrt(freedom / 2) / math.gamma((freedom - 1) / 2)
                row["hedges_g"] = correction * row["cohens_d"]
    return [*family, *(mirrored(row) for row in family)]


def mirrored(row: Row) -> Row:
    """The same pair the other way round, since the test does not know which side a table starts from."""
    turned = dict(row) | {"experiment": row["reference"], "reference": row["experiment"]}
    turned |= {
        "difference": -row["difference"],
        "difference_low": -row["difference_high"],
        "difference_high": -row["difference_low"],
        "improvement": 1 - row["improvement"],
    }
    return turned | {key: -row[key] for key in ("cohens_d", "hedges_g") if key in row}


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


def on_front(costs: list[float], values: list[float]) -> list[bool]:
    pairs = list(zip(costs, values, strict=True))
    return [not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in pairs) for cost, value in pairs]


def pareto_fronts(led: Ledger, _: str) -> list[Row]:
    rows = []
    names = list(led.runs)
    stored = {
        n: mean_of(led, n, "bytes", "frozen_bytes") + mean_of(led, n, "bytes", "adapter_file_bytes") for n in names
    }
    test = {n: mean_of(led, n, "test", "accuracy") for n in names}
    validation = {n: mean_of(led, n, "validation", "accuracy") for n in names}
    for name, costs in (
        ("final_parameters", {n: mean_of(led, n, "parameters", "final") for n in names}),
        ("stored_bytes", stored),
        ("seconds_per_step", {n: mean_of(led, n, "seconds_per_step") for n in names}),
    ):
        fronts = [on_front([costs[n] for n in names], [v[n] for n in names]) for v in (validation, test)]
        members = sorted((n for n, is_on in zip(names, fronts[0], strict=True) if is_on), key=lambda n: (costs[n], n))
        leads = {
            row["experiment"]: {key: value for key, value in row.items() if not key.startswith("seed_")}
            for row in compared(
                [({"experiment": dear}, *differences(led, dear, cheap, on_test)) for cheap, dear in pairwise(members)],
                "lead_n",
                "lead",
            )
        }
        rows += [
            {
                "cost": name,
                "experiment": n,
                "value": costs[n],
                "validation_accuracy": validation[n],
                **interval("test_accuracy", led.over_seeds(n, on_test), "test_accuracy_n"),
                "on_front": fronts[0][i],
                "on_test_front": fronts[1][i],
                **leads.get(n, {"lead_n": 0}),
            }
            for i, n in enumerate(names)
        ]
    return rows


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


def late_deviation(record: Record) -> float:
    losses = np.array([row["loss"] for row in record["steps"]])
    m = math.ceil(len(losses) / 3)
    t = np.arange(m)
    residuals = losses[-m:] - np.polyval(np.polyfit(t, losses[-m:], 1), t)
    return math.sqrt((residuals**2).sum() / (m - 2))


def roughness(record: Record) -> float:
    losses = np.array([row["loss"] for row in record["steps"]])
    second = (losses[:-2] + losses[2:]) / 2 - losses[1:-1]
    return math.sqrt(2 / 3 * (second**2).sum() / len(second))


def convergence(led: Ledger, _: str) -> list[Row]:
    def settled(record: Record) -> float:
        found = [(e["step"], e["metrics"]["nll"]) for e in record["evaluations"]]
        near = [abs(nll - found[-1][1]) <= 0.02 for _, nll in found]
        return next(step for i, (step, _) in enumerate(found) if all(near[i:]))

    return [
        {
            "experiment": n,
            "steps": 48,
            "n": len(led.runs[n]),
            **interval("late_deviation", led.over_seeds(n, late_deviation), "late_deviation_n"),
            **interval("roughness", led.over_seeds(n, roughness), "roughness_n"),
            **interval("settled_step", led.over_seeds(n, settled), "settled_step_n"),
        }
        for n in led.runs
    ]


def not_done(led: Ledger, _: str) -> list[Row]:
    return [
        {"experiment": r["spec"]["experiment"]["name"], "seed": r["spec"]["seed"], "reason": r["error"]}
        for r in led.failed
    ]
