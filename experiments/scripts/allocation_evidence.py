"""What the studies of AdaLoRA say: records to compact tables in results/, and from those the tables of a document.

    .venv/bin/python experiments/scripts/allocation_evidence.py [RESULTS_DIR ...]

Every results directory that is named is condensed to results/<study>.csv, one row a run. Then everything between the
marks of docs/adaptive_ranks.md is made anew from these files and from benchmarks/results; the same files give the same
text.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from peft_vit.records import RunRecord, read_records, write_atomically
from peft_vit.statistics import Interval, gini, holm, mean_interval, noninferiority, paired_difference, wilcoxon

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"
BENCHMARKS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "adaptive_ranks.md"
MARGIN = 1.0  # points of accuracy; stated in the configurations before the data


def row_of(record: RunRecord) -> dict[str, object]:
    """Return what is kept of one run."""
    experiment = record.spec.experiment
    row: dict[str, object] = {
        "study": record.spec.study,
        "experiment": experiment.name,
        "method": experiment.method,
        "seed": record.spec.seed,
        "status": record.status,
        "learning_rate": experiment.training.learning_rate,
    }
    if record.status != "done":
        return row
    assert record.validation is not None
    assert record.test is not None
    assert record.parameters is not None
    ranks = list(record.rank_history[-1].ranks.values()) if record.rank_history else []
    return row | {
        "validation_accuracy": record.validation.accuracy,
        "majority_accuracy": record.majority_accuracy["test"],
        "test_accuracy": record.test.accuracy,
        "test_nll": record.test.nll,
        "adapter_parameters": record.parameters.final - record.parameters.head,
        "sites": len(ranks),
        "sites_without_rank": ranks.count(0),
        "gini_of_ranks": gini(ranks) if ranks else None,
        "seconds": round(record.seconds, 1),
        "allocation_s": round(record.overhead_s.get("allocation", 0.0), 2),
        "split": record.provenance.split_sha256[:12] if record.provenance else None,
        "commit": record.provenance.git_hash[:12] if record.provenance and record.provenance.git_hash else None,
        "dirty": record.provenance.git_dirty if record.provenance else None,
    }


def condense(results_dir: Path) -> None:
    """Write one compact table for each study below a directory."""
    rows = pd.DataFrame([row_of(record) for record in read_records(results_dir)])
    for study, part in rows.groupby("study"):
        text = part.sort_values(["experiment", "seed"]).to_csv(index=False, float_format="%.6g", lineterminator="\n")
        write_atomically(RESULTS / f"{study}.csv", text.encode())


def percent(values: Iterable[float]) -> pd.Series:
    """Return shares as percent."""
    return 100 * pd.Series(list(values), dtype=float)


def accuracy_by_seed(runs: pd.DataFrame, part: pd.DataFrame) -> pd.Series:
    """Return test accuracy in percent by seed; a run that failed is worth the majority class, never left out."""
    part = part.sort_values("seed")
    accuracy = part.test_accuracy.fillna(runs.majority_accuracy.max())
    return pd.Series(percent(accuracy).to_numpy(), index=part.seed.to_numpy())


def of(runs: pd.DataFrame, experiment: str) -> pd.Series:
    """Return an experiment's test accuracy by seed."""
    return accuracy_by_seed(runs, runs[runs.experiment == experiment])


@dataclass(frozen=True)
class Comparison:
    """One allocation against a reference: difference in points, and the p-values of two tests."""

    difference: Interval
    not_inferior: float | None  # by more than MARGIN
    differs: float | None


def compared(candidate: pd.Series, reference: pd.Series) -> Comparison:
    """Return the paired comparison over the seeds that both have run."""
    seeds = candidate.index.intersection(reference.index)
    left, right = candidate[seeds].to_numpy(), reference[seeds].to_numpy()
    return Comparison(
        paired_difference(left, right), noninferiority(left - right, MARGIN).p_value, wilcoxon(left - right).p_value
    )


def markdown(rows: list[tuple[str, ...]], right: int) -> str:
    """Return a Markdown table of which all but the first `right` columns are aligned to the right."""
    head, *body = rows
    rule = tuple("---" if place < right else "---:" for place in range(len(head)))
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def counted(part: pd.DataFrame) -> str:
    """Return how many runs there are, and how many of them failed."""
    return f"{len(part)} ({(part.status != 'done').sum()})"


def mean_and_spread(values: pd.Series) -> str:
    """Return mean and standard deviation."""
    spread = f" ({values.std(ddof=1):.1f})" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


def interval(difference: Interval) -> str:
    """Return a difference with its interval."""
    if difference.low is None:
        return f"{difference.estimate:+.2f}"
    return f"{difference.estimate:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def p(value: float | None) -> str:
    """Return a p-value; none where the data have no spread."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def origin(runs: pd.DataFrame) -> str:
    """Return one line on where a table's numbers come from."""
    commits = ", ".join(sorted(set(runs.commit.dropna())))
    failed = int((runs.status != "done").sum())
    count = f"{len(runs)} runs, none failed"
    if failed:
        count = f"{len(runs)} runs, {failed} of them failed, counted as the majority class"
    minutes = runs.seconds.sum() / 60
    return f"{count}; {minutes:.0f} minutes of computing on one core each; made with commit {commits}."


def pilot(runs: pd.DataFrame) -> str:
    """Return validation accuracy by experiment; the test split plays no part here."""
    rows: list[tuple[str, ...]] = [("experiment", "runs (failed)", "validation accuracy, mean (sd), %", "each seed")]
    runs = runs.assign(validation_accuracy=runs.validation_accuracy.fillna(runs.majority_accuracy.max()))
    order = runs.groupby("experiment").validation_accuracy.mean().sort_values(ascending=False, kind="stable")
    for name in order.index:
        part = runs[runs.experiment == name].sort_values("seed")
        values = percent(part.validation_accuracy)
        each = ", ".join(f"{value:.1f}" for value in values)
        rows.append((f"`{name}`", counted(part), mean_and_spread(values), each))
    return f"{markdown(rows, 1)}\n\n{origin(runs)}"


def learning_rates(runs: pd.DataFrame) -> str:
    """Return accuracy by learning rate, and the comparisons that were announced."""
    rates = sorted(runs.learning_rate.unique())
    families = list(dict.fromkeys(name.rsplit("_lr_", 1)[0] for name in runs.experiment.unique()))
    lora = {rate: _series(runs, "lora_r8", rate) for rate in rates}
    rows: list[tuple[str, ...]] = [
        (
            "method",
            "learning rate",
            "runs (failed)",
            "test accuracy, mean (sd), %",
            "worst seed",
            "minus LoRA r=8 at the same rate [95 %]",
            f"p, not inferior by {MARGIN:g}",
        )
    ]
    for family in families:
        for rate in rates:
            part, values = _part(runs, family, rate), _series(runs, family, rate)
            if part.empty:
                continue
            versus = compared(values, lora[rate]) if family != "lora_r8" and not lora[rate].empty else None
            rows.append(
                (
                    f"`{family}`", f"{rate:g}", counted(part), mean_and_spread(values), f"{values.min():.1f}",
                    interval(versus.difference) if versus else "–", p(versus.not_inferior) if versus else "–",
                )
            )  # fmt: skip
    return f"{markdown(rows, 1)}\n\n{_across(runs, families, rates)}\n\n{origin(runs)}"


def _part(runs: pd.DataFrame, family: str, rate: float) -> pd.DataFrame:
    family_of = runs.experiment.str.rsplit("_lr_", n=1).str[0]
    return runs[(family_of == family) & (runs.learning_rate == rate)]


def _series(runs: pd.DataFrame, family: str, rate: float) -> pd.Series:
    return accuracy_by_seed(runs, _part(runs, family, rate))


def _across(runs: pd.DataFrame, families: list[str], rates: list[float]) -> str:
    """Return what each method loses between its best and its worst rate, and ours against PEFT's best."""
    lines = []
    means = {f: {r: _series(runs, f, r).mean() for r in rates if not _series(runs, f, r).empty} for f in families}
    for family, by_rate in means.items():
        if len(by_rate) > 2:
            lost = max(by_rate.values()) - min(by_rate.values())
            lines.append(f"- `{family}` loses {lost:.1f} points between its best and its worst rate.")
    peft = means.get("peft_adalora", {})
    if peft:
        best = max(peft, key=lambda rate: peft[rate])
        lora_rate = 1e-3
        versus = compared(_series(runs, "adalora", lora_rate), _series(runs, "peft_adalora", best))
        lines.append(
            f"- `adalora` at {lora_rate:g} minus `peft_adalora` at its best rate, {best:g}: "
            f'{interval(versus.difference)}; p for "not inferior by {MARGIN:g} point": {p(versus.not_inferior)}.'
        )
    return "\n".join(lines)


def ablation(runs: pd.DataFrame) -> str:
    """Return every metric and strategy against the same rank everywhere, corrected over the sixteen."""
    reference = of(runs, "lora_r4")
    controls = ["lora_r4", "uniform", "random"]
    tested = [name for name in runs.experiment.unique() if name not in controls]
    found = {name: compared(of(runs, name), reference) for name in [*tested, *controls[1:]]}
    corrected = dict(zip(tested, holm([_or_one(found[name].differs) for name in tested]), strict=True))
    not_worse = dict(zip(tested, holm([_or_one(found[name].not_inferior) for name in tested]), strict=True))
    order = [*controls, *sorted(tested, key=lambda name: -of(runs, name).mean())]
    rows: list[tuple[str, ...]] = [
        (
            "allocation",
            "runs (failed)",
            "test accuracy, mean (sd), %",
            "minus `lora_r4` [95 %]",
            "p, differs (Holm)",
            f"p, not inferior by {MARGIN:g} (Holm)",
            "values trained",
            "sites at rank 0",
            "Gini of ranks",
        )
    ]
    for name in order:
        part = runs[runs.experiment == name]
        rows.append(
            (
                f"`{name}`", counted(part), mean_and_spread(of(runs, name)),
                interval(found[name].difference) if name in found else "–",
                p(corrected[name]) if name in corrected else "–", p(not_worse[name]) if name in not_worse else "–",
                f"{part.adapter_parameters.mean():,.0f}", f"{part.sites_without_rank.mean():.1f}",
                f"{part.gini_of_ranks.mean():.2f}",
            )
        )  # fmt: skip
    return f"{markdown(rows, 1)}\n\n{_spread(runs, tested)}\n\n{origin(runs)}"


def _or_one(value: float | None) -> float:
    return 1.0 if value is None else value


def _spread(runs: pd.DataFrame, tested: list[str]) -> str:
    means = {name: of(runs, name).mean() for name in tested}
    best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    within = mean_interval([of(runs, name).std(ddof=1) for name in tested]).estimate
    return (
        f"From the best, `{best}`, to the worst, `{worst}`: {means[best] - means[worst]:.1f} points between means of "
        f"{runs.seed.nunique()} seeds; the standard deviation over the seeds of one allocation is {within:.1f} points."
    )


def _benchmark(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def _measured_on(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, torch {machine['torch']}, "
        f"PEFT {machine['peft']}, the same allocator settings for all sides."
    )


def step_time() -> str:
    """Return the ratios of `make bench` beside the floor, from its JSON."""
    found = _benchmark("step_time")
    rows: list[tuple[str, ...]] = [("a step of", "median, ms", "over the floor", "over it with our attention")]
    titles = {"lora_fp32": "LoRA r=8, fp32", "lora_bf16": "LoRA r=8, bf16", "adalora_whole_run": "whole run, fp32"}
    for key, title in titles.items():
        own = next((row["median_s"] for row in found[key] if "our attention" in row["side"]), None)
        rows += [
            (
                f"{title}: {row['side']}", f"{1e3 * row['median_s']:.0f}", f"{row['ratio']:.2f}",
                f"{row['median_s'] / own:.2f}" if own else "",
            )
            for row in found[key]
        ]  # fmt: skip
    adaptive = next(row for row in found["adalora_whole_run"] if "over_fixed" in row)
    by_rank = ", ".join(
        f"{row['side'].removeprefix('mean rank ')}: {1e3 * row['median_s']:.0f}" for row in found["by_rank"]
    )
    merged = next(row for row in found["merged_inference"] if row["side"].startswith("merged"))
    size, batch = found["setting"]["image_size"], found["setting"]["batch"]
    return (
        f"{markdown(rows, 1)}\n\n- AdaLoRA over fixed ranks of the same mean: {adaptive['over_fixed']:.3f}.\n"
        f"- Milliseconds a step by mean rank: {by_rank}.\n"
        f"- Merged model over the plain one, inference: {merged['ratio']:.3f}.\n\n"
        f"{found['setting']['model']}, {size} px, batches of {batch}; {_measured_on(found['machine'])}"
    )


def memory() -> str:
    """Return the peak of training by side, from the benchmark's JSON."""
    found = _benchmark("memory")
    rows: list[tuple[str, ...]] = [("peak of training beyond the loaded model", "fp32, MB", "bf16, MB")]
    by_side: dict[str, dict[str, int]] = {}
    for row in found["rows"]:
        by_side.setdefault(row["side"], {})[row["precision"]] = row["training_bytes"]
    rows += [(side, f"{of['fp32'] / 1e6:.0f}", f"{of['bf16'] / 1e6:.0f}") for side, of in by_side.items()]
    return f"{markdown(rows, 1)}\n\nEach side in a process of its own; {_measured_on(found['machine'])}"


BENCHMARK_TABLES: dict[str, Callable[[], str]] = {"step_time": step_time, "memory": memory}
TABLES: dict[str, Callable[[pd.DataFrame], str]] = {
    "allocation_pilot": pilot,
    "learning_rates": learning_rates,
    "allocation_ablation": ablation,
}


def with_tables(text: str) -> str:
    """Return the document with the tables of every study that results/ holds."""
    found = {
        study: make(pd.read_csv(RESULTS / f"{study}.csv"))
        for study, make in TABLES.items()
        if (RESULTS / f"{study}.csv").exists()
    }
    found |= {name: make() for name, make in BENCHMARK_TABLES.items() if (BENCHMARKS / f"{name}.json").exists()}
    for name, content in found.items():
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        block = f"<!-- {name} -->\n\n{content}\n\n<!-- /{name} -->"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def main() -> None:
    """Condense what is named, then make the document's tables anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results_dirs", nargs="*", type=Path)
    for results_dir in parser.parse_args().results_dirs:
        condense(results_dir)
    write_atomically(DOCUMENT, with_tables(DOCUMENT.read_text(encoding="utf-8")).encode())
    print(DOCUMENT)


if __name__ == "__main__":
    main()
