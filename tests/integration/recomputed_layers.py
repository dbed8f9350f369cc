"""Tables of scores, ranks and bits computed again from record.json files: see `recomputed_tables`."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

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


def scores(record: Record, at: int = -1) -> np.ndarray:
    """Scores in the order of the record's sites."""
    return np.array([record["importance_history"][at]["scores"][site["name"]] for site in record["sites"]])


def matrices(record: Record) -> np.ndarray:
    return np.array([site["matrix"] for site in record["sites"]])


def scored(led: Ledger) -> list[str]:
    return led.with_section("adalora")


def importance_by_matrix(led: Ledger, _: str) -> list[Row]:
    rows = []
    for name in scored(led):
        runs = [led.runs[name][seed] for seed in sorted(led.runs[name])]
        kinds = matrices(runs[0])
        mlp = np.isin(kinds, ["fc1", "fc2"])
        logs = [math.log2(scores(r)[~mlp].mean() / scores(r)[mlp].mean()) for r in runs]
        rhos = [stats.spearmanr(scores(a), scores(b)).statistic for a, b in combinations(runs, 2)]
        for kind in dict.fromkeys(kinds):
            relative = [scores(r)[kinds == kind].mean() / scores(r).mean() for r in runs]
            rows.append(
                {
                    "experiment": name,
                    "matrix": kind,
                    **interval("relative_score", relative),
                    "log2_attention_over_mlp": np.mean(logs),
                    "agreement_between_seeds": np.mean(rhos),
                }
            )
    return rows


def importance_by_block(led: Ledger, _: str) -> list[Row]:
    rows = []
    for name in scored(led):
        runs = list(led.runs[name].values())
        for i, site in enumerate(runs[0]["sites"]):
            rows.append(
                {
                    "experiment": name,
                    "site": site["name"],
                    "block": site["block"],
                    "mean_score": np.mean([scores(r)[i] for r in runs]),
                    "mean_relative_score": np.mean([scores(r)[i] / scores(r).mean() for r in runs]),
                }
            )
    return rows


def importance_over_time(led: Ledger, _: str) -> list[Row]:
    return [
        {
            "experiment": name,
            "step": entry["step"],
            "rho_with_final": np.mean(
                [stats.spearmanr(scores(r, i), scores(r)).statistic for r in led.runs[name].values()]
            ),
        }
        for name in scored(led)
        for i, entry in enumerate(next(iter(led.runs[name].values()))["importance_history"])
    ]


def importance_course(led: Ledger, _: str) -> list[Row]:
    rows = []
    for name in scored(led):
        runs = list(led.runs[name].values())
        kinds = matrices(runs[0])
        for i, entry in enumerate(runs[0]["importance_history"]):
            rows += [
                {
                    "experiment": name,
                    "step": entry["step"],
                    "matrix": kind,
                    "mean_relative_score": np.mean(
                        [scores(r, i)[kinds == kind].mean() / scores(r, i).mean() for r in runs]
                    ),
                }
                for kind in dict.fromkeys(kinds)
            ]
    return rows


def kendalls_w(columns: np.ndarray) -> float:
    """Of m orderings of n things, (m, n), with the correction for ties."""
    m, n = columns.shape
    ranks = np.apply_along_axis(stats.rankdata, 1, columns)
    s = ((ranks.sum(axis=0) - m * (n + 1) / 2) ** 2).sum()
    ties = sum((c**3 - c) for row in ranks for c in np.unique(row, return_counts=True)[1])
    return float(12 * s / (m**2 * (n**3 - n) - m * ties))


def importance_across_seeds(led: Ledger, _: str) -> list[Row]:
    rows = []
    for name in scored(led):
        runs = list(led.runs[name].values())
        blocks, kinds = np.array([site["block"] for site in runs[0]["sites"]]), matrices(runs[0])
        means = [
            np.array([[scores(r)[of == one].mean() for one in dict.fromkeys(of)] for r in runs])
            for of in (blocks, kinds)
        ]
        rows.append(
            {
                "experiment": name,
                "seeds": len(runs),
                "sites": len(blocks),
                "kendalls_w": kendalls_w(np.array([scores(r) for r in runs])),
                "kendalls_w_blocks": kendalls_w(np.round(means[0], 9)),
                "kendalls_w_matrices": kendalls_w(np.round(means[1], 9)),
            }
        )
    return rows


def ranks_at(record: Record, at: int = -1) -> np.ndarray:
    return np.array([record["rank_history"][at]["ranks"].get(site["name"], 0) for site in record["sites"]])


def rank_by_matrix(led: Ledger, _: str) -> list[Row]:
    rows = []
    for name in scored(led):
        runs = [led.runs[name][seed] for seed in sorted(led.runs[name])]
        kinds = matrices(runs[0])
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


def parts(record: Record) -> dict[str, float]:
    size = record["quantization"]["size"]
    layers = size["layers"].values()
    return {p: sum(layer[f"{p}_bytes"] for layer in layers) for p in ("codes", "scales", "offsets")} | size[
        "float_bytes"
    ]


def size(led: Ledger, _: str) -> list[Row]:
    rows = []
    for name in low_bit(led):
        first = next(iter(led.runs[name].values()))
        model = first["quantization"]["size"]
        bits = mean_of(led, name, "quantization", "bits_per_weight")
        whole = 8 * (sum(parts(first).values()) + model["merging_bytes"]) / model["weights"]
        rows.append(
            {
                "experiment": name,
                "claimed_vs_fp32": 32 / first["spec"]["experiment"]["qa_lora"]["quantization_bits"],
                "layers_bits_per_weight": bits,
                "layers_vs_fp32": 32 / bits,
                "layers_vs_fp16": 16 / bits,
                "model_bits_per_weight": whole,
                "model_vs_fp32": 32 / whole,
                "model_vs_fp16": 16 / whole,
                "live_bytes": model["live_bytes"],
                "file_bytes": model["file_bytes"],
                "own_memory_bytes": mean_of(led, name, "own_memory_bytes"),
            }
        )
    return rows


def size_parts(led: Ledger, _: str) -> list[Row]:
    return [
        {
            "experiment": n,
            **parts(r),
            "total_bytes": sum(parts(r).values()),
            "weights": r["quantization"]["size"]["weights"],
        }
        for n in low_bit(led)
        for r in [next(iter(led.runs[n].values()))]
    ]


def bits_by_layer(led: Ledger, _: str) -> list[Row]:
    return [
        {
            "experiment": n,
            "layer": layer,
            "bits_per_weight": bits,
            "relative_error": np.mean([r["quantization"]["relative_error"][layer] for r in led.runs[n].values()]),
        }
        for n in low_bit(led)
        for layer, bits in next(iter(led.runs[n].values()))["bits_history"][-1]["bits_per_weight"].items()
    ]


def quantization_balance(led: Ledger, _: str) -> list[Row]:
    return [
        {
            "experiment": n,
            "measure": measure,
            "step": row["step"],
            "n": len(led.runs[n]),
            "mean": np.mean([r["quantization"]["balance"][i][measure] for r in led.runs[n].values()]),
        }
        for n in low_bit(led)
        for i, row in enumerate(next(iter(led.runs[n].values()))["quantization"]["balance"])
        for measure in row
        if measure != "step"
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
