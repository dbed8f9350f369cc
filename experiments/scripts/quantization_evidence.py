"""What the studies of quantization say: records to compact tables in results/, and from those docs/quantization.md.

    .venv/bin/python experiments/scripts/quantization_evidence.py [RESULTS_DIR ...]

Every results directory that is named is condensed into results/<study>.csv, one row a run; rows that are there stay,
unless the same experiment and seed was run anew. Then everything between the marks of the document is made anew from
these files and from benchmarks/results; the same files give the same text. The tests are those that the
configurations' headers announced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from evidence import (
    MARGIN,
    ROOT,
    benchmark,
    benchmark_tables,
    compared,
    counted,
    filled,
    interval,
    markdown,
    mean_and_spread,
    measured_on,
    of,
    or_one,
    origin,
    p,
    percent,
    run,
    study_tables,
)

from peft_vit.records import RunRecord
from peft_vit.statistics import Verdict, holm, noninferiority

DOCUMENT = ROOT / "docs" / "quantization.md"
ALPHA = 0.05
FLOAT32_BITS = 32


def columns(record: RunRecord) -> dict[str, object]:
    """Return what these studies are about: error, balance and size."""
    assert record.parameters is not None
    row: dict[str, object] = {
        "adapter_parameters": record.parameters.final - record.parameters.head,
        "peak_memory_bytes": record.peak_memory_bytes,
    }
    summary = record.quantization
    if summary is None:
        return row
    row |= {
        "relative_error": float(np.mean(list(summary.relative_error.values()))),
        "adapter_to_error_ratio": summary.balance[-1]["adapter_to_error_ratio"],
        "layers_bits": summary.bits_per_weight,
        "layers_bytes": summary.quantized_bytes,
    }
    size = summary.size
    if size is None:
        return row
    stored = size.live_bytes + size.merging_bytes
    return row | {"model_bits": 8 * stored / size.weights, "model_bytes": stored, "file_bytes": size.file_bytes}


Claim = Literal["loses nothing", "loses one to two", "helps"]


@dataclass(frozen=True)
class Sentence:
    """A common sentence, and the difference between two experiments that it is about."""

    text: str
    candidate: str
    reference: str
    claim: Claim


SENTENCES = (
    Sentence("8 bits lose nothing", "int8", "lora_r8", "loses nothing"),
    *(
        Sentence("4 bits lose one to two points", name, "lora_r8", "loses one to two")
        for name in ("nf4", "int4", "fp4")
    ),
    Sentence("groups help", "nf4", "nf4_no_groups", "helps"),
    Sentence("smaller groups help", "nf4_group_16", "nf4", "helps"),
    Sentence("smaller groups help", "nf4", "nf4_group_48", "helps"),
    Sentence("gradient scaling helps (AdamW)", "nf4_scaling_2", "nf4", "helps"),
    Sentence("gradient scaling helps (AdamW, by error)", "nf4_scaling_adaptive", "nf4", "helps"),
    Sentence("gradient scaling helps (SGD)", "nf4_sgd_scaling_2", "nf4_sgd", "helps"),
    Sentence("gradient scaling helps (SGD, by error)", "nf4_sgd_scaling_adaptive", "nf4_sgd", "helps"),
    Sentence("warm-up helps", "nf4_linear_warmup", "nf4_linear", "helps"),
    Sentence("cosine helps", "nf4_cosine", "nf4", "helps"),
    Sentence("cosine helps", "nf4_cosine", "nf4_linear", "helps"),
    Sentence("holding the balance helps (gradient scale, SGD)", "nf4_sgd_balance", "nf4_sgd", "helps"),
    Sentence("holding the balance helps (pace)", "nf4_linear_balance", "nf4_linear", "helps"),
)


class Evidence(NamedTuple):
    """P-values for and against a sentence."""

    supports: float
    refutes: float


def above(differences: np.ndarray, bound: float) -> float:
    """Return the p-value of "the mean difference lies above the bound", one-sided paired t; 1 without a pair."""
    return 1.0 if len(differences) == 0 else or_one(noninferiority(differences - bound - MARGIN, MARGIN).p_value)


def below(differences: np.ndarray, bound: float) -> float:
    """Return the p-value of "the mean difference lies below the bound", one-sided paired t."""
    return above(-differences, -bound)


def weighed(claim: Claim, differences: np.ndarray) -> Evidence:
    """Return the p-values for and against a claim about a mean difference d in points.

    A claim that d lies between two bounds takes both tests, so its p-value is the larger; that it lies outside takes
    one of two, so twice the smaller.
    """
    if claim == "loses nothing":
        return Evidence(above(differences, -MARGIN), below(differences, -MARGIN))
    if claim == "helps":
        return Evidence(above(differences, 0.0), below(differences, MARGIN))
    less, more = above(differences, -1.0), below(differences, -2.0)
    inside = max(above(differences, -2.0), below(differences, -1.0))
    return Evidence(inside, min(1.0, 2 * min(less, more)))


def verdicts(found: list[Evidence]) -> list[tuple[Verdict, float]]:
    """Return each verdict with the p-value behind it, corrected by Holm over all tests for and against."""
    corrected = holm([value for evidence in found for value in evidence])
    decided: list[tuple[Verdict, float]] = []
    for supports, refutes in zip(corrected[::2], corrected[1::2], strict=True):
        if supports <= ALPHA:
            decided.append(("supported", supports))
        elif refutes <= ALPHA:
            decided.append(("refuted", refutes))
        else:
            decided.append(("not decided", min(supports, refutes)))
    return decided


def sentences(runs: pd.DataFrame) -> str:
    """Return each common sentence with its estimate and its verdict."""
    rows: list[tuple[str, ...]] = [
        ("sentence", "comparison", "estimate [95 %]", "n", "p (Holm)", "verdict"),
        *_accuracy_rows(runs),
        *_size_row(runs, "4 bits are 8x smaller", "nf4", 4),
        *_size_row(runs, "8 bits are 4x smaller", "int8", 8),
    ]
    return markdown(rows, 2)


def _accuracy_rows(runs: pd.DataFrame) -> list[tuple[str, ...]]:
    pairs = [(of(runs, sentence.candidate), of(runs, sentence.reference)) for sentence in SENTENCES]
    found = []
    for sentence, (candidate, reference) in zip(SENTENCES, pairs, strict=True):
        differences = (candidate - reference).dropna().to_numpy()  # aligned by seed
        found.append((weighed(sentence.claim, differences), len(differences)))
    rows: list[tuple[str, ...]] = []
    decided = verdicts([evidence for evidence, _ in found])
    for sentence, pair, (_, n), (verdict, value) in zip(SENTENCES, pairs, found, decided, strict=True):
        difference = compared(*pair).difference
        estimate = "–" if difference is None else f"{interval(difference)} points"
        rows.append(
            (
                f'"{sentence.text}"',
                f"`{sentence.candidate}` − `{sentence.reference}`",
                estimate,
                str(n),
                p(value) if n > 1 else "–",
                verdict,
            )
        )
    return rows


_NEARLY = 0.98  # of a claimed ratio, and the claim counts as met


def _size_row(runs: pd.DataFrame, text: str, name: str, bits: int) -> list[tuple[str, ...]]:
    """Return what was counted against float32, for the quantized layers and for the whole model."""
    part, claimed = runs[runs.experiment == name], FLOAT32_BITS / bits
    rows: list[tuple[str, ...]] = []
    for what, column in (("quantized layers", "layers_bits"), ("whole model", "model_bits")):
        stored = part[column].dropna() if column in part else pd.Series(dtype=float)
        verdict: Verdict = "not decided"
        estimate = "–"
        if len(stored):
            ratio = FLOAT32_BITS / stored.mean()
            verdict = "supported" if ratio >= _NEARLY * claimed else "refuted"
            estimate = f"{ratio:.2f}x: {stored.mean():.2f} bits a weight"
        rows.append((f'"{text}"', f"`{name}`, {what}, against fp32", estimate, str(len(stored)), "counted", verdict))
    return rows


def ablation(runs: pd.DataFrame) -> str:
    """Return every quantized setting against float LoRA of equal rank and optimizer, corrected over all of them."""
    floats = ("lora_r8", "lora_r8_sgd")
    tested = [name for name in runs.experiment.unique() if name not in floats]
    found = {name: compared(of(runs, name), of(runs, floats["_sgd" in name])) for name in tested}
    differs = dict(zip(tested, holm([or_one(found[name].differs) for name in tested]), strict=True))
    not_worse = dict(zip(tested, holm([or_one(found[name].not_inferior) for name in tested]), strict=True))
    rows: list[tuple[str, ...]] = [
        (
            "setting",
            "runs (failed)",
            "test accuracy, mean (sd), %",
            "minus float [95 %]",
            "p, differs (Holm)",
            f"p, not inferior by {MARGIN:g} (Holm)",
            "relative error, %",
            "update over error",
            "bits a weight, layers",
            "whole model",
            "model, MB",
            "file, MB",
            "peak of the process, MB",
        )
    ]
    for name in sorted(runs.experiment.unique(), key=lambda name: (name not in floats, -of(runs, name).mean())):
        part = runs[runs.experiment == name]
        rows.append(
            (
                f"`{name}`",
                counted(part),
                mean_and_spread(of(runs, name)),
                interval(found[name].difference) if name in found else "–",
                p(differs[name]) if name in found else "–",
                p(not_worse[name]) if name in found else "–",
                _mean(part, "relative_error", 100),
                _mean(part, "adapter_to_error_ratio"),
                _mean(part, "layers_bits"),
                _mean(part, "model_bits"),
                _mean(part, "model_bytes", 1e-6),
                _mean(part, "file_bytes", 1e-6),
                _mean(part, "peak_memory_bytes", 1e-6, 0),
            )
        )
    return f"{markdown(rows, 1)}\n\n{origin(runs)}"


def _mean(part: pd.DataFrame, column: str, factor: float = 1.0, decimals: int = 2) -> str:
    values = part[column].dropna() if column in part else pd.Series(dtype=float)
    return f"{factor * values.mean():.{decimals}f}" if len(values) else "–"


class Choice(NamedTuple):
    """What the pilot's rules chose for the ablation."""

    learning_rate: float
    scale_target: float
    pace_target: float
    at_the_edge: bool  # the best rate is the lowest or highest that was tried


def chosen(runs: pd.DataFrame) -> Choice:
    """Return what the pilot's rules say: see the header of its configuration."""
    sgd = runs[runs.experiment.str.startswith("nf4_sgd_lr_")]
    accuracy = sgd.validation_accuracy.fillna(0.0).groupby(sgd.learning_rate).mean()  # a failed run is no candidate
    best = float(accuracy[accuracy == accuracy.max()].index.min())
    return Choice(
        best,
        _twice(sgd[sgd.learning_rate == best]),
        _twice(runs[runs.experiment == "nf4_linear"]),
        best in (accuracy.index.min(), accuracy.index.max()),
    )


def _twice(part: pd.DataFrame) -> float:
    return float(f"{2 * part.adapter_to_error_ratio.mean():.1g}")


def pilot(runs: pd.DataFrame) -> str:
    """Return validation accuracy and balance by experiment, and what follows; the test split plays no part here."""
    rows: list[tuple[str, ...]] = [
        ("experiment", "runs (failed)", "validation accuracy, mean (sd), %", "update over error in the end")
    ]
    for name in runs.experiment.unique():
        part = runs[runs.experiment == name]
        accuracy = mean_and_spread(percent(part.validation_accuracy.dropna()))
        rows.append((f"`{name}`", counted(part), accuracy, _mean(part, "adapter_to_error_ratio")))
    choice = chosen(runs)
    edge = " The best rate is the last that was tried: add the next half decade." if choice.at_the_edge else ""
    return (
        f"{markdown(rows, 1)}\n\nChosen: SGD's learning rate {choice.learning_rate:g}, `balance_target` "
        f"{choice.scale_target:g} by gradient scale and {choice.pace_target:g} by pace.{edge}\n\n{origin(runs)}"
    )


def adaptive_bits(runs: pd.DataFrame) -> str:
    """Return bits chosen by layer against the same bits everywhere at the same bytes, corrected over all of them."""
    int2, int4 = of(runs, "uniform_int2"), of(runs, "uniform_int4")
    references = {"bytes": int4, "3_5_bits": 0.75 * int2 + 0.25 * int4}  # the latter at 3.5 stored bits a weight
    tested = [name for name in runs.experiment.unique() if not name.startswith("uniform_")]
    found = {
        name: compared(of(runs, name), next(line for end, line in references.items() if name.endswith(end)).dropna())
        for name in tested
    }
    corrected = dict(zip(tested, holm([or_one(found[name].differs) for name in tested]), strict=True))
    rows: list[tuple[str, ...]] = [
        (
            "setting",
            "runs (failed)",
            "test accuracy, mean (sd), %",
            "minus uniform at its bytes [95 %]",
            "p, differs (Holm)",
            "bits a weight, layers",
            "layers, MB",
            "adapter values",
            "relative error, %",
        )
    ]
    for name in sorted(runs.experiment.unique(), key=lambda name: (name in found, -of(runs, name).mean())):
        part = runs[runs.experiment == name]
        rows.append(
            (
                f"`{name}`",
                counted(part),
                mean_and_spread(of(runs, name)),
                interval(found[name].difference) if name in found else "–",
                p(corrected[name]) if name in found else "–",
                _mean(part, "layers_bits"),
                _mean(part, "layers_bytes", 1e-6),
                f"{part.adapter_parameters.mean():,.0f}",
                _mean(part, "relative_error", 100),
            )
        )
    return f"{markdown(rows, 1)}\n\n{origin(runs)}"


def qa_lora() -> str:
    """Return time and memory of a training step by side, and stored bits, from the benchmark's JSON."""
    found = benchmark("qa_lora")
    own = {(row["precision"], row["side"]): (row["peak_bytes"] - row["start_bytes"]) / 1e6 for row in found["memory"]}
    rows: list[tuple[str, ...]] = [
        ("a training step of", "fp32, ms", "over the floor", "peak, MB", "bf16, ms", "over the floor", "peak, MB")
    ]
    bf16 = {row["side"]: row for row in found["bf16"]}
    for row in found["fp32"]:
        side = row["side"]
        cells = [_time(row), f"{row['ratio']:.3f}", f"{own['fp32', side]:.0f}"]
        cells += (
            [_time(bf16[side]), f"{bf16[side]['ratio']:.3f}", f"{own['bf16', side]:.0f}"] if side in bf16 else 3 * ["–"]
        )
        rows.append((side, *cells))
    bits = [f"{one['type']} {_groups(one)} {one['bits_per_weight']:.3f}" for one in found["stored_bits"]]
    return (
        f"{markdown(rows, 1)}\n\nStored bits a weight of the frozen linear layers: {', '.join(bits)}.\n\n"
        f"Peak: resident memory beyond what the process held before the steps. {_setting(found)}"
    )


def deployment() -> str:
    """Return size, agreement and latency of exported models by format, from the benchmark's JSON."""
    found = benchmark("deployment")
    whole = found["files"][0]["bytes"]
    latency = {(row["batch"], row["side"]): row for row in found["latency"]}
    batches = sorted({row["batch"] for row in found["latency"]})
    rows: list[tuple[str, ...]] = [
        (
            "file",
            "MB",
            "of float32",
            "equal predictions, %",
            "logits, relative error",
            *(f"batch {batch}, ms (over float32)" for batch in batches),
        )
    ]
    for one in found["files"]:
        times = [latency[batch, one["format"]] for batch in batches]
        rows.append(
            (
                one["format"],
                f"{one['bytes'] / 1e6:.1f}",
                f"{one['bytes'] / whole:.3f}",
                f"{100 * one['same_predictions']:.2f}",
                f"{one['logit_error']:.1e}",
                *(f"{_time(row)} ({row['ratio']:.2f})" for row in times),
            )
        )
    return (
        f"{markdown(rows, 1)}\n\nAgreement with the model in PyTorch on {found['files'][0]['images']} random images; "
        f"onnxruntime {found['machine']['onnxruntime']}. {_setting(found)}"
    )


def _time(row: dict[str, float]) -> str:
    return f"{1e3 * row['median_s']:.0f}"


def _groups(one: dict[str, Any]) -> str:
    groups = "one scale a row" if one["group_size"] is None else f"in groups of {one['group_size']}"
    return f"{groups} with offset" if one["offset"] else groups


def _setting(found: dict[str, Any]) -> str:
    setting = found["setting"]
    batch = f", batches of {setting['batch']}" if "batch" in setting else ""
    return f"{setting['model']}, {setting['image_size']} px{batch}; {measured_on(found['machine'])}"


BENCHMARK_TABLES: dict[str, Callable[[], str]] = {"qa_lora": qa_lora, "deployment": deployment}
TABLES: dict[str, Callable[[pd.DataFrame], str]] = {
    "quantization_pilot": pilot,
    "quantization_ablation": ablation,
    "adaptive_bits": adaptive_bits,
}


def with_tables(text: str) -> str:
    """Return the document with the tables of every study and benchmark whose results are there."""
    tables = study_tables(TABLES)
    if "quantization_ablation" in tables:
        tables |= {"sentences": study_tables({"quantization_ablation": sentences})["quantization_ablation"]}
    return filled(text, tables | benchmark_tables(BENCHMARK_TABLES))


if __name__ == "__main__":
    run(__doc__, DOCUMENT, columns, with_tables)
