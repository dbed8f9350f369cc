"""What commands print: a recommendation with its configuration, studies side by side, exported models' times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path

from peft_vit.base.errors import UserError, os_fault
from peft_vit.base.files import write_atomically
from peft_vit.base.statistics import Interval
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.base.statistics.estimates import Estimate, together
from peft_vit.core.config import QaLoraConfig
from peft_vit.core.records import BenchRow
from peft_vit.deploy.page.document import Paragraph, Raw, Table
from peft_vit.deploy.page.formatting import (
    better_above,
    better_question,
    count,
    counted,
    fixed,
    joined,
    megabytes,
    number_interval,
    points_interval,
    scaled,
    score_interval,
    score_of,
)
from peft_vit.deploy.page.printed import print_blocks, print_with_rows
from peft_vit.deploy.page.tables import Column, table
from peft_vit.lab.analysis.across import Across, PoolKind
from peft_vit.lab.analysis.recommendation import (
    SAME_SIZE,
    Candidate,
    Measure,
    Option,
    Rated,
    Recommendation,
    Violation,
    smallest_that_exists,
)
from peft_vit.lab.analysis.studies import Study
from peft_vit.lab.report.columns import OTHER_SEEDS
from peft_vit.lab.report.layer_tables import study_agreement_table
from peft_vit.runs.records.study_yaml import study_yaml

_SUFFIX = "-recommended"
_CLEARLY = f"by more than {100 * SAME_SIZE:.0f} %"
_ROUNDED = (
    "Not in the study: float runs that `peft-vit export RUN --bits 4` rounds. At 4 and 3 bits that loses about as "
    "little as training on such weights, which saves memory while it trains."
)
_ORDER: dict[Measure, str] = {"bytes": "bytes to store", "params": "trainable parameters", "latency": "latency"}


def print_recommendation(advice: Recommendation, output: Path | None) -> None:
    """Print what is recommended and why; write its configuration to a file, or print it below the text.

    Raises:
        UserError: if the file can't be written, or is there and says something else.
    """
    print_blocks(recommendation_blocks(advice))
    configuration = recommended_yaml(advice)
    if configuration is None:
        if output is not None:
            print_blocks([Paragraph(f"{output} is not written: nothing is recommended.")])
    elif output is None:
        print_blocks([Paragraph("\nThe configuration to train it:\n")])
        print(configuration, end="")
    else:
        content = configuration.encode()
        with os_fault("can't be written", output, remedy="choose another file", field="--output"):
            if output.exists() and output.read_bytes() != content:
                raise UserError("exists and holds something else; move it away or choose another file", file=output)
            write_atomically(output, content)
        print_blocks([Paragraph(f"Its configuration: {output}\nNext: peft-vit plan {output}")])


def recommendation_blocks(advice: Recommendation) -> Iterator[Paragraph | Table]:
    """Yield what is recommended and why, or what the data does not decide."""
    yield from map(Paragraph, advice.study.notices)
    yield from (Paragraph(f"Left out: {name} {reason}.") for name, reason in advice.left_out.items())
    yield from map(Paragraph, _request(advice))
    yield from map(Paragraph, _answer(advice))
    if advice.candidates:
        yield _tested_table(advice)
    for rated in advice.outside:
        yield Paragraph(f"Outside the limits: {rated.name}: {_broken(rated)}.")
    if advice.larger and advice.outcome != "nothing within":
        names = joined(rated.name for rated in advice.larger)
        yield Paragraph(f"Not smaller than the best {_CLEARLY}, so not tested: {names}.")
    floats = [rated for rated in (advice.best, *_others(advice)) if rated.experiment.section(QaLoraConfig) is None]
    if advice.measure == "bytes" and floats:
        yield Paragraph(_ROUNDED)


def _request(advice: Recommendation) -> Iterator[str]:
    best, study, validated = advice.best, advice.study, advice.best.validation_accuracy
    assert validated is not None
    cost = f"{megabytes(best.stored_bytes)} to store, {count(best.final_parameters)} trainable parameters"
    if best.seconds_per_step is not None:
        cost += f", {fixed(best.seconds_per_step)} s a step"
    if best.latency_s is not None:
        cost += f", {fixed(1000 * best.latency_s, 1)} ms latency"
    yield (
        f"Study {study.label}. Best by validation: {best.name}, mean validation {_words(study)} "
        f"{score_of(study.scores, validated.estimate)} ({counted(len(best.by_seed), 'seed')}); {cost}."
    )
    if uneven := [rated for rated in _others(advice) if rated.by_seed.keys() != best.by_seed.keys()]:
        listed = joined(f"{rated.name} {_seeds(rated)}" for rated in uneven)
        yield f"Validation means are over different seeds than the best's ({_seeds(best)}): {listed}."
    limits = joined(_limit(violation) for violation in best.beside) or "none"
    yield (
        f"Asked: the smallest by {_ORDER[advice.measure]} that loses less than {_margin(advice)} of "
        f"test {_words(study)} against it. Limits: {limits}."
    )
    if (exported := advice.exported) is not None:
        timed = joined(
            f"{row.run} by {row.file} ({fixed(1000 * row.median_s, 1)} ms, {row.runtime}, threads: {row.threads})"
            for rows in exported.rows.values()
            for row in rows
        )
        names = [e.name for e in study.experiments if study.of(e.name) and e.name not in exported.rows]
        missing = f" Not timed there: {joined(names)}." if names else ""
        yield (
            f"Latency is that of exported models in {exported.file}, batch {exported.batch}, on {exported.processor}; "
            f"of each run its fastest: {timed}.{missing}"
        )


def _seeds(rated: Rated) -> str:
    return f"seed{'' if len(rated.by_seed) == 1 else 's'} {joined(map(str, rated.by_seed))}"


def _others(advice: Recommendation) -> tuple[Rated, ...]:
    """Return everything that was rated, but what the others are compared with."""
    return (*(candidate.rated for candidate in advice.candidates), *advice.outside, *advice.larger)


def _words(study: Study) -> str:
    return study.scores.metric.words


def _margin(advice: Recommendation) -> str:
    return advice.study.scores.hundredths(advice.margin)


def _answer(advice: Recommendation) -> Iterator[str]:
    best, margin, family = advice.best, _margin(advice), len(advice.candidates)
    if advice.outcome == "nothing within":
        yield "Nothing is within the limits, so nothing is recommended."
        for violation, rated in smallest_that_exists(advice):
            yield f"Nearest to {_limit(violation)}: {rated.name} with {_value(violation)}."
    elif advice.outcome == "best":
        yield (
            f"Recommended: {best.name}, the best itself: nothing within the limits is smaller {_CLEARLY}, so no "
            "test was needed."
        )
    elif advice.chosen is None:
        names = "the one candidate is not" if family == 1 else f"none of {family} candidates is"
        yield (
            f"Not decided: {names} shown to lose less than {margin}, so nothing smaller is recommended. It may "
            "still be good enough."
        )
        if best.violations:
            yield f"The safe choice would be {best.name}, which is outside the limits: {_broken(best)}."
        else:
            yield f"The safe choice is {best.name} itself, which keeps the limits."
    else:
        estimate = next(candidate.estimate for candidate in advice.candidates if candidate.rated is advice.chosen)
        yield (
            f"Recommended: {advice.chosen.name}. Test {_words(advice.study)} against {best.name}: "
            f"{points_interval(estimate.interval)} {advice.study.scores.unit}, "
            f"{counted(len(estimate.by_seed), 'pair')}; that it loses {margin} or more is rejected with "
            f"p = {estimate.adjusted_p:.2g} ({_family(advice)})."
        )
        if advice.as_small:
            names = joined(rated.name for rated in advice.as_small)
            yield f"Shown, too, and not larger {_CLEARLY}, but no better on validation images: {names}."
        yield f"Against {best.name} it {'; '.join(dict.fromkeys(_savings(advice, advice.chosen)))}."


def _family(advice: Recommendation) -> str:
    family = len(advice.candidates)
    return f"Holm over {family} candidate{'' if family == 1 else 's'}"


def _savings(advice: Recommendation, chosen: Rated) -> Iterator[str]:
    """Yield what the chosen one takes less or more of; times of several machines do not compare, and that is said."""
    machines = {run.hardware for run in (*advice.best.runs, *chosen.runs)}
    for option, (name, words) in _COSTS.items():
        before, after = getattr(advice.best, name), getattr(chosen, name)
        exported = option == "--max-latency" and advice.exported is not None  # all timed on one machine
        if before is None or after is None:
            continue
        if option in ("--max-step-time", "--max-latency") and len(machines) > 1 and not exported:
            yield "was timed on other machines, so times do not compare"
        elif before == after:
            yield f"takes the same {words(before)}"
        else:
            share = f" ({fixed(100 * abs(before - after) / before, 0)} %)" if before else ""
            saved = f"saves {words(before - after)} of {words(before)}"
            yield (saved if after < before else f"takes {words(after - before)} more than {words(before)}") + share


def _tested_table(advice: Recommendation) -> Table:
    margin, interval = _margin(advice), f"{100 * advice.confidence:.4g} %"
    method = (
        f"One-sided non-inferiority t test against {margin} at 5 %, {_family(advice)}. The {interval} t "
        "intervals hold for all candidates at once. 'Would do': 80 % power, if mean and spread stayed what they are."
    )
    return table(
        "recommendation",
        "Candidates, smallest first",
        advice.candidates,
        [
            Column("experiment", "rated.name"),
            Column("to store", "rated.stored_bytes", megabytes),
            Column("parameters", "rated.final_parameters", count),
            Column(
                f"difference ({advice.study.scores.unit})",
                lambda candidate: points_interval(candidate.estimate.interval),
            ),
            Column("n", lambda candidate: len(candidate.estimate.by_seed)),
            Column("p (Holm)", "estimate.adjusted_p", "{:.2g}".format),
            Column(
                "loses less than asked?",
                lambda c: _verdict(c, advice) + (f" ({c.estimate.note})" if c.estimate.note else ""),
            ),
        ],
        f"Test {_words(advice.study)}, candidate minus {advice.best.name}, n pairs by seed; negative is a loss. "
        f"{better_above(advice.study.scores)}{method}",
    )


def _verdict(candidate: Candidate, advice: Recommendation) -> str:
    if candidate.shown:
        return "shown"
    if advice.study.untested:
        return "not decided"
    pairs, interval, test = (
        len(candidate.estimate.by_seed),
        candidate.estimate.interval,
        candidate.estimate.significance,
    )
    if pairs < 2:
        return f"not decided: {counted(pairs, 'pair')}, the test needs 2 and more"
    if test is None or test.p_value is None:
        return "not decided: the differences have no spread, which the test needs"
    if interval is not None and interval.high is not None and interval.high < -advice.margin:
        return "no, the whole interval lies below"
    if candidate.needed_n is None:
        return "not decided, and the estimate gives no n up to 1000 that would do"
    return f"not decided; n = {candidate.needed_n} would do"


def recommended_yaml(advice: Recommendation) -> str | None:
    """Return the configuration of a study of what is recommended, on the seeds of its runs; None if nothing is."""
    chosen = advice.chosen
    if chosen is None:
        return None
    why = f"the best by validation; nothing within the limits is smaller {_CLEARLY}"
    if advice.outcome == "smaller":
        why = f"shown to lose less than {_margin(advice)} of test {_words(advice.study)} against {advice.best.name}"
    comments = [f"{chosen.name} of study {advice.study.label}, made again from its records: {why}."]
    if advice.study.smoke:
        comments.append("Smoke runs: random weights, synthetic images. They say nothing about a method.")
    return study_yaml(chosen.runs[0].record.spec, [*chosen.by_seed], suffix=_SUFFIX, comments=comments)


def _bytes(value: float) -> str:
    return megabytes(value) if value >= 1e4 else f"{count(value)} bytes"


# What a limit is of: the field of a cost, and how it is written.
_COSTS: dict[Option, tuple[str, Callable[[float], str]]] = {
    "--max-bytes": ("stored_bytes", _bytes),
    "--max-params": ("final_parameters", lambda value: f"{count(value)} parameters"),
    "--max-step-time": ("seconds_per_step", lambda value: f"{value:.3g} s a step"),
    "--max-latency": ("latency_s", lambda value: f"{1000 * value:.3g} ms latency"),
}


def _limit(violation: Violation) -> str:
    return f"at most {_COSTS[violation.option][1](violation.limit)}"


def _value(violation: Violation) -> str:
    return "not recorded" if violation.value is None else _COSTS[violation.option][1](violation.value)


def _broken(rated: Rated) -> str:
    return "; ".join(f"{_value(violation)}, asked {_limit(violation)}" for violation in rated.violations)


# What a difference of a kind keeps from being pooled; any other kind both.
_MEASURES: dict[PoolKind, str] = {"timings": "seconds", "splits": "accuracy", "weights": "accuracy"}


def print_comparison(across: Across, output: Path | None) -> None:
    """Print the tables; write their unrounded values to a .csv or .json file if one is named.

    Raises:
        UserError: for another ending, or if the file can't be written.
    """
    print_with_rows(_blocks(across), list(_rows(across)), output, _COLUMNS)


def _blocks(across: Across) -> Iterator[Paragraph | Table]:
    """Yield what was across, by study and pooled, and what was not pooled and why."""
    for label, study in across.studies.items():
        runs = len(study.runs)
        backbones = sorted({run.record.spec.backbone.model for run in study.runs})
        data = sorted({run.record.spec.data.title for run in study.runs})
        yield Paragraph(
            f"Study {label}: {joined(data) or 'no data'}, {joined(backbones) or 'no backbone'}, "
            f"{runs} finished run{'' if runs == 1 else 's'}."
        )
        yield from (Paragraph(f"  {notice}") for notice in study.notices)
    if across.alone:
        alone = joined(f"{name} (in {study})" for name, study in across.alone.items())
        yield Paragraph(f"In one study only, so not compared: {alone}.")
    better = better_question(across.scores)
    yield _by_study(across, better)
    if across.agreements:
        yield study_agreement_table(across.agreements)
    if across.reference is None:
        yield Paragraph(
            "No LoRA and no linear probe is the reference of every study, so there are no differences; name an "
            "experiment with --reference."
        )
        return
    if across.pooled:
        yield table(
            "pooled",
            f"Over studies: test {across.scores.metric.words} against {across.reference} ({across.scores.unit})",
            across.pooled,
            [
                *_POOLED,
                Column("mean over studies", "interval", partial(_with_reason, points_interval)),
                Column("ahead in", lambda row: f"{row.ahead} of {len(row.studies)}"),
                Column("p (Holm)", "estimate.adjusted_p", "{:.2g}".format),
                Column(better, "estimate", lambda of: f"{of.verdict}{f' ({of.note})' if of.note else ''}"),
            ],
            "Each study's mean counts the same. 95 % intervals: what other seeds would change in these studies; none "
            "of them speaks of another data set or backbone. The stratified t test decides at 5 %, Holm-corrected over "
            "this table.",
        )
    if across.times:
        yield table(
            "times",
            f"Over studies: seconds a step, as a multiple of {across.reference}'s",
            across.times,
            [*_POOLED, Column("geometric mean over studies", "interval", partial(_with_reason, number_interval))],
            "95 % t intervals of the logarithms; each study counts the same.",
        )
    for refusal in across.refusals:
        kind = refusal.kind
        yield Paragraph(
            f"Not pooled, {_MEASURES.get(kind, 'accuracy and seconds')}: {kind} {_differ(kind)}: {refusal.reason}. "
            f"Experiments: {joined(refusal.experiments)}; studies: {joined(refusal.studies)}. Pool all the same: "
            f"--allow-mismatch {kind}."
        )
    allowed = grouped((why, row.estimate.name) for row in (*across.pooled, *across.times) for why in row.allowed)
    for (kind, reason), names in allowed.items():
        listed = joined(dict.fromkeys(names))
        yield Paragraph(f"Pooled although {kind} {_differ(kind)}, as asked: {reason}. Experiments: {listed}.")


def _by_study(across: Across, better: str) -> Table:
    def tested(comparison: Estimate) -> str:
        significance, p = comparison.significance, comparison.adjusted_p
        verdict = comparison.verdict if significance is None else significance.sentence()
        if significance is not None and significance.decidable and p is not None:
            verdict = f"{comparison.verdict} (p = {p:.2g})"
        return verdict + (f" ({comparison.note})" if comparison.note else "")

    return table(
        "by_study",
        "By study",
        across.rows,
        [
            Column("experiment", "name"),
            "study",
            Column(
                f"test {across.scores.metric.words}",
                lambda row: score_interval(across.studies[row.study].scores, row.result.test_accuracy),
            ),
            Column("n", "result.test_accuracy.n"),
            Column(
                f"against {across.reference} ({across.scores.unit})",
                "comparison",
                lambda c: points_interval(c.interval),
                "",
            ),
            Column("pairs", "comparison", lambda c: str(len(c.by_seed)), ""),
            Column(better, "comparison", tested, ""),
            Column("to store", "result.stored_bytes", megabytes),
            Column("parameters", "result.final_parameters", count),
            Column("s a step", "result.seconds_per_step", fixed),
        ],
        f"95 % t intervals: {OTHER_SEEDS}. Pairs share seed, weights, images "
        "and split; the exact Wilcoxon signed-rank test decides at 5 %, Holm-corrected over a study's experiments.",
    )


def _with_reason(write: Callable[[Interval], str], interval: Interval) -> str:
    return write(interval) + (f" ({interval.reason})" if interval.reason else "")


_POOLED = [
    Column("experiment", "estimate.name"),
    Column("studies", lambda row: len(row.studies)),
    Column("pairs", "interval.n"),
]


def _differ(kind: PoolKind) -> str:
    return "differs" if kind == "precision" else "differ"


# Of a row for other programs; differences are shares, of an error of the numbers' standard deviation.
_COLUMNS = (
    *("row", "study", "experiment", "reference", "measure"),
    *("estimate", "low", "high", "n"),
    *("p_value", "p_holm", "verdict"),
    "note",
)


def _rows(across: Across) -> Iterator[dict[str, Raw]]:
    def row(kind: str, studies: Iterable[str], measure: str, of: Estimate, note: str = "") -> dict[str, Raw]:
        values = (None, None, None, 0) if of.interval is None else astuple(of.interval)[:4]
        p_value = None if of.significance is None else of.significance.p_value
        decided = (p_value, of.adjusted_p, of.verdict) if measure == difference else (None, None, None)
        notes = together((of.interval and of.interval.reason) or "", note)
        reference = None if kind == "accuracy" else across.reference
        cells = (kind, "; ".join(studies), of.name, reference, measure, *values, *decided, notes)
        return dict(zip(_COLUMNS, cells, strict=True))

    difference = f"test_{across.scores.metric.name}_difference"
    for shown in across.rows:
        scores = across.studies[shown.study].scores
        value = Estimate(name=shown.name, interval=scaled(shown.result.test_accuracy, scores.factor))
        yield row("accuracy", [shown.study], f"test_{scores.metric.name}", value)
        if shown.comparison is not None:
            yield row("difference", [shown.study], difference, shown.comparison, shown.comparison.note)
    for measure, rows in ((difference, across.pooled), ("seconds_per_step_ratio", across.times)):
        for pooled in rows:
            although = "; ".join(f"{kind} {_differ(kind)}: {why}" for kind, why in pooled.allowed)
            yield row("pooled", pooled.studies, measure, pooled.estimate, although)


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
