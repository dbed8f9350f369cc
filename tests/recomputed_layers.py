"""Tables of ranks and bits computed again from record.json files: see `recomputed_tables`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from recomputed_methods import (
    Ledger,
    Record,
    Row,
    compared,
    differences,
    interval,
    late_deviation,
    mean_of,
    on_test,
    roughness,
)
from scipy import stats


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


def moved(before: np.ndarray, after: np.ndarray) -> int:
    change = after - before
    return int(min(change[change > 0].sum(), -change[change < 0].sum()))


def allocation(led: Ledger, _: str) -> list[Row]:
    rows = []
    for name in scored(led):
        for seed, record in led.runs[name].items():
            final, history = ranks_at(record), record["rank_history"]
            shares = final[final > 0] / final.sum()
            apart = np.abs(final[:, None] - final[None, :]).sum()
            rows.append(
                {
                    "experiment": name,
                    "seed": seed,
                    "budget": history[-1]["budget"],
                    "spent": final.sum(),
                    "used": final.sum(),
                    "sites": len(final),
                    "sites_without_rank": (final == 0).sum(),
                    "gini": apart / (2 * len(final) ** 2 * final.mean()),
                    "evenness": -(shares * np.log(shares)).sum() / math.log(len(final)),
                    "updates": len(history) - 1,
                    "moved": " ".join(
                        str(moved(ranks_at(record, i), ranks_at(record, i + 1))) for i in range(len(history) - 1)
                    ),
                }
            )
    return rows


def allocation_course(led: Ledger, _: str) -> list[Row]:
    rows = []
    for name in scored(led):
        for seed, record in led.runs[name].items():
            history, final = record["rank_history"], ranks_at(record)
            shares = [ranks_at(record, i) / ranks_at(record, i).sum() for i in range(len(history))]
            overlaps = [float(np.minimum(share, shares[-1]).sum()) for share in shares]
            settled = next(e["step"] for i, e in enumerate(history) if all(o >= 0.9 for o in overlaps[i:]))
            for i, entry in enumerate(history):
                row = {
                    "experiment": name,
                    "seed": seed,
                    "step": entry["step"],
                    "overlap_with_final": overlaps[i],
                    "settled_step": settled,
                }
                if i:
                    row["moved"] = moved(ranks_at(record, i - 1), ranks_at(record, i))
                    row["churn"] = row["moved"] / ranks_at(record, i).sum()
                    row["rho_with_final"] = stats.spearmanr(ranks_at(record, i), final).statistic
                rows.append(row)
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
    measures: dict[str, Callable[[Record], float]] = {
        "accuracy": on_test,
        "nll": lambda r: r["test"]["nll"],
        "late_deviation": late_deviation,
        "roughness": roughness,
    }
    rows = []
    for measure, of in measures.items():
        family = [({"experiment": n, "measure": measure}, *differences(led, n, "lora_r8", of)) for n in low_bit(led)]
        for row in compared(family):
            first = next(iter(led.runs[row["experiment"]].values()))
            bits = first["spec"]["experiment"]["qa_lora"]["quantization_bits"]
            rows.append(row | settings(first) | {"bits": bits})
    return rows
