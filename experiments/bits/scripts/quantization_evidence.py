"""What the studies of quantization say: records to tables in results/, and from those docs/quantization.md.

    .venv/bin/python -m experiments.bits.scripts.quantization_evidence [RESULTS_DIR ...]

Every results directory that is named is condensed into results/<study>.csv, one row a run; rows that are there stay,
unless the same experiment and seed was run anew. Then everything between the marks of the document is made anew from
these files and from benchmarks/results; the same files give the same text. The tests are those that the
configurations' headers announced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

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
    interval,
    mean_and_spread,
    measured_with,
    name_of,
    of,
    or_one,
    p,
    percent,
    run,
    study_tables,
    table,
)
from peft_vit.base.statistics import Verdict, holm, noninferiority, wilcoxon
from peft_vit.core.records import RunRecord

FOLDER = Path(__file__).resolve().parents[1]
RESULTS, DOCUMENT = FOLDER / "results", FOLDER / "docs" / "quantization.md"
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
    rows = [
        *_accuracy_rows(runs),
        *_size_rows(runs, "4 bits are 8x smaller", "nf4", 4),
        *_size_rows(runs, "8 bits are 4x smaller", "int8", 8),
    ]
    titles = ("claim", "comparison", "estimate [95 %]", "n", "p (Holm)", "verdict")
    return table(rows, {title: itemgetter(place) for place, title in enumerate(titles)}, left=2)


def _accuracy_rows(runs: pd.DataFrame) -> list[tuple[str, ...]]:
    pairs = [(of(runs, sentence.candidate), of(runs, sentence.reference)) for sentence in SENTENCES]
    differences = [(candidate - reference).dropna().to_numpy() for candidate, reference in pairs]  # aligned by seed
    decided = verdicts([weighed(one.claim, values) for one, values in zip(SENTENCES, differences, strict=True)])
    rows: list[tuple[str, ...]] = []
    for sentence, pair, values, (verdict, value) in zip(SENTENCES, pairs, differences, decided, strict=True):
        difference = compared(*pair).difference
        rows.append(
            (
                f'"{sentence.text}"',
                f"`{sentence.candidate}` − `{sentence.reference}`",
                "–" if difference is None else f"{interval(difference)} points",
                str(len(values)),
                p(value) if len(values) > 1 else "–",
                verdict,
            )
        )
    return rows


_NEARLY = 0.98  # of a claimed ratio, and the claim counts as met


def _size_rows(runs: pd.DataFrame, text: str, name: str, bits: int) -> list[tuple[str, ...]]:
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
    found = dict.fromkeys(floats, Comparison())
    found |= corrected({name: compared(of(runs, name), of(runs, floats["_sgd" in name])) for name in tested})
    columns: dict[str, Cell] = {
        "test accuracy, mean (sd), %": lambda part: mean_and_spread(accuracy_by_seed(runs, part)),
        "minus float [95 %]": lambda part: interval(found[name_of(part)].difference),
        "p, differs (Holm)": lambda part: p(found[name_of(part)].differs),
        f"p, not inferior by {MARGIN:g} (Holm)": lambda part: p(found[name_of(part)].not_inferior),
        "relative error, %": _mean("relative_error", 100),
        "update over error": _mean("adapter_to_error_ratio"),
        "bits a weight, layers": _mean("layers_bits"),
        "whole model": _mean("model_bits"),
        "model, MB": _mean("model_bytes", 1e-6),
        "file, MB": _mean("file_bytes", 1e-6),
        "peak of the process, MB": _mean("peak_memory_bytes", 1e-6, 0),
    }
    order = sorted(runs.experiment.unique(), key=lambda name: (name not in floats, -of(runs, name).mean()))
    return by_experiment(runs, order, columns, first="setting")


def _mean(column: str, factor: float = 1.0, decimals: int = 2) -> Cell:
    """Return a cell with the mean of a column, as far as the runs have it."""

    def cell(part: pd.DataFrame) -> str:
        values = part[column].dropna() if column in part else pd.Series(dtype=float)
        return f"{factor * values.mean():.{decimals}f}" if len(values) else "–"

    return cell


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
    columns: dict[str, Cell] = {
        "validation accuracy, mean (sd), %": lambda part: mean_and_spread(percent(part.validation_accuracy.dropna())),
        "update over error in the end": _mean("adapter_to_error_ratio"),
    }
    choice = chosen(runs)
    edge = " The best rate is the last that was tried: add the next half decade." if choice.at_the_edge else ""
    said = (
        f"Chosen: SGD's learning rate {choice.learning_rate:g}, `balance_target` "
        f"{choice.scale_target:g} by gradient scale and {choice.pace_target:g} by pace.{edge}"
    )
    return by_experiment(runs, runs.experiment.unique(), columns, said=said)


def adaptive_bits(runs: pd.DataFrame) -> str:
    """Return bits chosen by layer against the same bits everywhere at the same bytes, corrected over all of them."""
    int2, int4 = of(runs, "uniform_int2"), of(runs, "uniform_int4")
    references = {"bytes": int4, "3_5_bits": 0.75 * int2 + 0.25 * int4}  # the latter at 3.5 stored bits a weight
    versus = {
        name: compared(of(runs, name), line.dropna())
        for name in runs.experiment.unique()
        for end, line in references.items()
        if name.endswith(end) and not name.startswith("uniform_")
    }
    found = dict.fromkeys(runs.experiment.unique(), Comparison()) | corrected(versus)
    columns: dict[str, Cell] = {
        "test accuracy, mean (sd), %": lambda part: mean_and_spread(accuracy_by_seed(runs, part)),
        "minus uniform at its bytes [95 %]": lambda part: interval(found[name_of(part)].difference),
        "p, differs (Holm)": lambda part: p(found[name_of(part)].differs),
        "bits a weight, layers": _mean("layers_bits"),
        "layers, MB": _mean("layers_bytes", 1e-6),
        "adapter values": lambda part: f"{part.adapter_parameters.mean():,.0f}",
        "relative error, %": _mean("relative_error", 100),
    }
    order = sorted(runs.experiment.unique(), key=lambda name: (name in versus, -of(runs, name).mean()))
    return by_experiment(runs, order, columns, first="setting")


class Few(NamedTuple):
    """A registered comparison of few bits."""

    candidate: str
    reference: str
    claim: Literal["loses less than a point", "is better"]


FEW_BITS = (
    Few("int3_gptq", "int4", "loses less than a point"),
    Few("adalora_nf4", "nf4", "loses less than a point"),
    Few("joint", "int4", "loses less than a point"),
    Few("int2_gptq", "int2", "is better"),
    Few("int2_gptq_r12", "int2", "is better"),
)


FEW_BITS_AGAIN = (Few("nf3_48_gptq", "int4", "loses less than a point"),)


def few_bits(runs: pd.DataFrame, claims: Sequence[Few] = FEW_BITS, level: float = ALPHA) -> str:
    """Return the registered comparisons of few bits, and below them the settings."""
    pairs = [compared(of(runs, one.candidate), of(runs, one.reference)) for one in claims]
    tests = [_ahead(runs, one) for one in claims]
    rows = list(zip(claims, pairs, tests, holm(tests), strict=True))
    compared_columns: dict[str, Callable[[tuple[Few, Comparison, float, float]], str]] = {
        "claim": lambda row: f"`{row[0].candidate}` {row[0].claim}, against `{row[0].reference}`",
        "points [95 %]": lambda row: interval(row[1].difference),
        "p": lambda row: p(row[2]),
        "p (Holm)": lambda row: p(row[3]),
        "verdict": lambda row: "supported" if row[3] <= level else "not shown",
    }
    columns: dict[str, Cell] = {
        "test accuracy, mean (sd), %": lambda part: mean_and_spread(accuracy_by_seed(runs, part)),
        "bits a weight, layers": _mean("layers_bits"),
        "relative error, %": _mean("relative_error", 100),
        "adapter values": lambda part: f"{part.adapter_parameters.mean():,.0f}",
        "runs that stayed at the probe": lambda part: str((part.adapter_to_error_ratio == 0).sum()),
        "file with adapters, MB": lambda part: f"{(part.file_bytes + 4 * part.adapter_parameters).mean() / 1e6:.2f}",
        "merged, MB": _mean("model_bytes", 1e-6),
    }
    order = sorted(runs.experiment.unique(), key=lambda name: -of(runs, name).mean())
    return f"{table(rows, compared_columns)}\n\n{by_experiment(runs, order, columns, first='setting')}"


def _ahead(runs: pd.DataFrame, one: Few) -> float:
    """Return the p-value of a registered claim: one-sided exact Wilcoxon of the differences beyond its margin."""
    differences = (of(runs, one.candidate) - of(runs, one.reference)).dropna().to_numpy()
    if not len(differences):
        return 1.0
    found = wilcoxon(differences + (MARGIN if one.claim == "loses less than a point" else 0.0))
    return or_one(found.p_value) / 2 if found.direction == 1 else 1.0


def qa_lora() -> str:
    """Return time and memory of a training step by side, and stored bits, from the benchmark's JSON."""
    found = benchmark("qa_lora")
    own = {(row["precision"], row["side"]): (row["peak_bytes"] - row["start_bytes"]) / 1e6 for row in found["memory"]}
    times = {(precision, row["side"]): row for precision in ("fp32", "bf16") for row in found[precision]}

    def cell(precision: str, text: Callable[[tuple[str, str]], str]) -> Callable[[str], str]:
        return lambda side: text((precision, side)) if (precision, side) in times else "–"

    columns: dict[str, Callable[[str], str]] = {"a training step of": str}
    for precision in ("fp32", "bf16"):
        columns |= {
            f"{precision}, ms": cell(precision, lambda key: _time(times[key])),
            f"{precision}, over the floor": cell(precision, lambda key: f"{times[key]['ratio']:.3f}"),
            f"{precision}, peak MB": cell(precision, lambda key: f"{own[key]:.0f}"),
        }
    bits = [f"{one['type']} {_groups(one)} {one['bits_per_weight']:.3f}" for one in found["stored_bits"]]
    return (
        f"{table([row['side'] for row in found['fp32']], columns)}\n\n"
        f"Stored bits a weight of the frozen linear layers: {', '.join(bits)}.\n\n"
        f"Peak: resident memory beyond what the process held before the steps. {measured_with(found)}"
    )


def deployment() -> str:
    """Return size, agreement and latency of exported models by format, from the benchmark's JSON."""
    found = benchmark("deployment")
    whole = found["files"][0]["bytes"]
    latency = {(row["batch"], row["side"]): row for row in found["latency"]}

    def time(file: dict[str, Any], batch: int) -> str:
        row = latency[batch, file["side"]]
        return f"{_time(row)} ({row['ratio']:.2f})"

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "file": itemgetter("side"),
        "MB": lambda file: f"{file['bytes'] / 1e6:.1f}",
        "of float32": lambda file: f"{file['bytes'] / whole:.3f}",
        "equal predictions, %": lambda file: f"{100 * file['same_predictions']:.2f}" if "images" in file else "–",
        "logits, relative error": lambda file: f"{file['logit_error']:.1e}" if "images" in file else "–",
        **{
            f"batch {batch}, ms (over the faster float32)": partial(time, batch=batch)
            for batch in sorted({row["batch"] for row in found["latency"]})
        },
    }
    return (
        f"{table(found['files'], columns)}\n\nAgreement with the model in PyTorch on {found['files'][0]['images']} "
        f"random images; onnxruntime {found['machine']['onnxruntime']}. {measured_with(found)}"
    )


def _time(row: dict[str, float]) -> str:
    return f"{1e3 * row['median_s']:.0f}"


def _groups(one: dict[str, Any]) -> str:
    groups = "one scale a row" if one["group_size"] is None else f"in groups of {one['group_size']}"
    return f"{groups} with offset" if one["offset"] else groups


BENCHMARK_TABLES: dict[str, Callable[[], str]] = {"qa_lora": qa_lora, "deployment": deployment}
TABLES: dict[str, Callable[[pd.DataFrame], str]] = {
    "quantization_pilot": pilot,
    "quantization_ablation": ablation,
    "adaptive_bits": adaptive_bits,
    "low_bits": few_bits,
    "low_bits_again": partial(few_bits, claims=FEW_BITS_AGAIN, level=ALPHA / 2),
}


def tables() -> dict[str, str]:
    """Return the tables of every study and benchmark whose results are there."""
    decided = study_tables({"quantization_ablation": sentences}, RESULTS).values()
    return (
        study_tables(TABLES, RESULTS)
        | dict(zip(["sentences"], decided, strict=False))
        | benchmark_tables(BENCHMARK_TABLES)
    )


if __name__ == "__main__":
    run(__doc__, partial(condense, columns=columns, kept=RESULTS), tables, DOCUMENT)
