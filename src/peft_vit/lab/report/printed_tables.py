"""What commands print: a recommendation with its configuration, studies side by side, exported models' times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft_vit.base.errors import UserError, os_fault
from peft_vit.base.files import write_atomically
from peft_vit.base.statistics import Verdict
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.base.statistics.estimates import ALPHA, Estimate, describe_test, join_notes
from peft_vit.core.records import BenchRow
from peft_vit.deploy.page.document import Column, Paragraph, Raw, Table, interval_columns, own_interval_columns, table
from peft_vit.deploy.page.formatting import (
    better_above,
    better_question,
    count,
    counted,
    fixed,
    joined,
    megabytes,
    points_interval,
    scaled,
    score_interval,
    score_of,
)
from peft_vit.deploy.page.printed import print_blocks, print_with_rows
from peft_vit.lab.analysis.across import Across
from peft_vit.lab.analysis.comparison import Cost, MethodResult
from peft_vit.lab.analysis.recommendation import Recommendation, needed_pairs
from peft_vit.runs.records.study_yaml import study_yaml

# Costs, and how they are written: "16.2 MB storage".
_COSTS: dict[Cost, tuple[str, Callable[[float], str]]] = {
    "stored_bytes": ("storage", megabytes),
    "parameters": ("trainable parameters", count),
    "seconds_per_step": ("step time", lambda seconds: f"{seconds:.3g} s"),
    "latency_s": ("latency", lambda seconds: f"{1000 * seconds:.3g} ms"),
}


def _costs(rows: Sequence[MethodResult]) -> list[Column]:
    """Return the columns of the costs that were recorded."""
    return [
        Column(title, partial(MethodResult.cost, cost=cost), show)
        for cost, (title, show) in _COSTS.items()
        if any(row.cost(cost) is not None for row in rows)
    ]


def _compared(
    heading: str, question: str, answer: Callable[[Estimate], str], estimate: str | Callable[[Any], Any] = "estimate"
) -> list[Column]:
    """Return the columns of what an estimate is, rests on and says."""
    return [
        Column(heading, estimate, lambda of: points_interval(of.interval), ""),
        Column("pairs", estimate, lambda of: str(len(of.by_seed)), ""),
        Column("test", estimate, describe_test, ""),
        Column(question, estimate, answer, _values),
    ]


def _values(estimate: Estimate | None) -> dict[str, Raw]:
    """Return what a file for other programs has of a difference: shares, of an error of the numbers' deviation."""
    if estimate is None:
        return {}
    return {
        **own_interval_columns("difference", estimate.interval),
        "reference": estimate.reference,
        "p_holm": estimate.adjusted_p,
        "verdict": estimate.verdict,
        "note": estimate.note,
    }


def _verdict(estimate: Estimate) -> str:
    return join_notes(estimate.verdict, estimate.note)


# --- recommend --------------------------------------------------------------------------------------------------------


def print_recommendation(advice: Recommendation, output: Path | None) -> None:
    """Print what is recommended and why; write its configuration to a file, or print it below the text.

    Raises:
        UserError: if the file can't be written, or is there and says something else.
    """
    print_blocks(recommendation_blocks(advice))
    if advice.chosen is None:
        return
    runs = advice.chosen.runs
    comments = [f"{advice.chosen.name} of study {advice.study.label}, made again from its records."]
    comments += [advice.study.disclaimer] if advice.study.disclaimer else []
    seeds = [run.seed for run in runs]
    configuration = study_yaml(runs[0].record.spec, seeds, suffix="-recommended", comments=comments)
    if output is None:
        print_blocks([Paragraph("The configuration to train it:\n")])
        print(configuration, end="")
        return
    content = configuration.encode()
    with os_fault("can't be written", output, remedy="choose another file", field="--output"):
        if output.exists() and output.read_bytes() != content:
            raise UserError("exists and holds something else; move it away or choose another file", file=output)
        write_atomically(output, content)
    print_blocks([Paragraph(f"Its configuration: {output}\nNext: peft-vit plan {output}")])


def recommendation_blocks(advice: Recommendation) -> Iterator[Paragraph | Table]:
    """Yield what is recommended and why, or what the data does not decide."""
    study, best = advice.study, advice.best
    words, margin = study.scores.metric.words, study.scores.hundredths(advice.margin)
    yield from map(Paragraph, study.notices)
    yield from (Paragraph(f"Left out: {name} {reason}.") for name, reason in advice.left_out.items())
    validated = score_of(study.scores, advice.best_validation)
    limits = joined(
        f"at most {show(advice.limits[c])} {title}" for c, (title, show) in _COSTS.items() if c in advice.limits
    )
    yield Paragraph(
        f"Study {study.label}. Best by validation: {best.name}, mean validation {words} {validated} "
        f"({counted(len(best.runs), 'seed')}).\n"
        f"Asked: the smallest by {_COSTS[advice.measure][0]} that loses less than {margin} of test {words} against it. "
        f"Limits: {limits or 'none'}."
    )
    yield Paragraph(_answer(advice, words, margin))
    yield table(
        "recommendation",
        "Smallest first",
        advice.rows,
        [
            Column("experiment", "name"),
            *_costs(advice.rows),
            *_compared(
                f"against {best.name} ({study.scores.unit})",
                f"loses less than {margin}?",
                partial(_verdict_or_pairs, advice),
            ),
            Column("within the limits?", lambda row: "yes" if row.name in advice.within_limits else "no"),
        ],
        f"Test {words}, pairs by seed; negative is a loss. {better_above(study.scores)}The one-sided non-inferiority t "
        "test decides at 5 %, Holm-corrected over the candidates, and so does that of a larger loss, whose p is not "
        "shown; the t intervals hold for all candidates at once. 'Would do': 80 % power, if mean and spread stayed.",
    )


def _answer(advice: Recommendation, words: str, margin: str) -> str:
    best, chosen = advice.best, advice.chosen
    if chosen is not None and (estimate := chosen.estimate) is not None:
        return (
            f"Recommended: {chosen.name}. Test {words} against {best.name}: {points_interval(estimate.interval)} "
            f"{advice.study.scores.unit}, {counted(len(estimate.by_seed), 'pair')}; that it loses {margin} or more is "
            f"rejected with p = {estimate.adjusted_p:.2g} (Holm over {estimate.family} candidates)."
        )
    if chosen is not None:
        return f"Recommended: {best.name}, the best itself: nothing within the limits is smaller by more than 1 %."
    if not advice.within_limits:
        return "Nothing is within the limits, so nothing is recommended."
    return (
        f"Not decided: no candidate is shown to lose less than {margin}, so nothing smaller is recommended. It may "
        f"still be good enough. The safe choice is {best.name}"
        f"{'' if best.name in advice.within_limits else ', which is outside the limits'}."
    )


def _verdict_or_pairs(advice: Recommendation, estimate: Estimate) -> str:
    """Return the verdict, or if there is none, the number of pairs that would do."""
    needed = None
    if estimate.verdict == Verdict.NOT_DECIDED and not advice.study.untested:
        needed = needed_pairs(list(estimate.by_seed.values()), advice.margin, ALPHA / estimate.family)
    return join_notes(_verdict(estimate), "" if needed is None else f"n = {needed} would do")


# --- compare ----------------------------------------------------------------------------------------------------------


def print_comparison(across: Across, output: Path | None) -> None:
    """Print the tables; write their unrounded values to a .csv or .json file if one is named.

    Raises:
        UserError: for another ending, or if the file can't be written.
    """
    blocks = list(_blocks(across))
    rows = [row for block in blocks if isinstance(block, Table) for row in block.data]
    print_with_rows(blocks, rows, output)


def _blocks(across: Across) -> Iterator[Paragraph | Table]:
    """Yield what was compared, by study and pooled, and what was not pooled and why."""
    for label, study in across.studies.items():
        yield from (Paragraph(f"Study {label}: {notice}") for notice in study.notices)
    if across.alone:
        alone = joined(f"{name} (in {study})" for name, study in across.alone.items())
        yield Paragraph(f"In one study only, so not compared: {alone}.")
    scores = next(study.scores for study in across.studies.values() if study.runs)
    reference = across.reference
    words, factor, better = scores.metric.words, scores.factor, better_question(scores)
    yield table(
        "by_study",
        "By study",
        across.rows,
        [
            Column("experiment", "name", data="experiment"),
            "study",
            Column(
                f"test {words}",
                "test_accuracy",
                partial(score_interval, scores),
                lambda value: interval_columns(f"test_{scores.metric.name}", scaled(value, factor)),
            ),
            Column("n", lambda row: len(row.runs)),
            *_compared(f"against {reference} ({scores.unit})", better, _verdict),
            *_costs(across.rows),
        ],
        "95 % t intervals: what other seeds would change. Pairs share seed, weights, images and split; the exact "
        "Wilcoxon signed-rank test decides at 5 %, Holm-corrected over a study's experiments.",
    )
    if reference is None:
        yield Paragraph("No experiment is the reference of every study; name one with --reference.")
        return
    yield table(
        "pooled",
        f"Over studies: test {words} against {reference} ({scores.unit})",
        [pooled for pooled in across.pooled if pooled.by_seed],
        [
            Column("experiment", "name", data="experiment"),
            Column("studies", "studies", lambda labels: str(len(labels)), lambda labels: {"study": "; ".join(labels)}),
            Column("ahead in", lambda pooled: f"{pooled.ahead} of {len(pooled.studies)}"),
            *_compared("mean over studies", better, _verdict, lambda pooled: pooled),
        ],
        "Each study's mean counts the same. 95 % intervals: what other seeds would change in these studies; none of "
        "them speaks of another data set or backbone. The stratified t test decides at 5 %, Holm-corrected over this "
        "table.",
    )
    mismatches = grouped((item, pooled) for pooled in across.pooled for item in pooled.differing.items())
    for (kind, reason), estimates in mismatches.items():
        allowed = kind in across.allowed
        consequence = f"Pooled although {kind} differ, as asked" if allowed else f"Not pooled: {kind} differ"
        yield Paragraph(f"{consequence}: {reason}. Experiments: {joined(pooled.name for pooled in estimates)}.")
    if any(not pooled.by_seed for pooled in across.pooled):
        yield Paragraph("To pool all the same, name what differs: --allow-mismatch.")


def bench_table(rows: Sequence[BenchRow], repeats: int) -> Table:
    """Return a row a model, batch size and number of threads."""
    over = joined(dict.fromkeys(row.over for row in rows))
    runtimes = joined(sorted({row.runtime for row in rows}))
    return table(
        "bench",
        f"Calls on {rows[0].processor}; {runtimes}",
        rows,
        [
            "file",
            "format",
            Column("size", "bytes", megabytes),
            "threads",
            "batch",
            Column("median ms", lambda row: fixed(1000 * row.median_s)),
            Column("quartiles", lambda row: f"{fixed(1000 * row.low_s)} to {fixed(1000 * row.high_s)}"),
            Column("over float32", "ratio", lambda ratio: fixed(ratio, 3)),
            Column("images/s", "images_per_s", lambda rate: fixed(rate, 1)),
        ],
        f"Each model in {repeats} process{'' if repeats == 1 else 'es'} of its own, {rows[0].calls} calls in all. "
        f"Ratios are of medians, over the fastest float32 model at the same batch size and threads: {over}.",
    )
