"""A recommendation in words, and the configuration to train it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from peft_vit.analysis.limits import SAME_SIZE, ExportedLatency, Measure, Option
from peft_vit.analysis.recommendation import Candidate, Rated, Recommendation, Violation, smallest_that_exists
from peft_vit.analysis.study_yaml import study_yaml
from peft_vit.config import METHOD_KINDS, RULE_OF_A_BUDGET
from peft_vit.errors import UserError, os_fault
from peft_vit.records import write_atomically
from peft_vit.report.document import Paragraph, Table
from peft_vit.report.formatting import (
    count,
    counted,
    fixed,
    joined,
    margin_in_points,
    megabytes,
    percent,
    points_interval,
)
from peft_vit.report.tables import Column, table
from peft_vit.report.terminal import print_blocks

_SUFFIX = "-recommended"
_CLEARLY = f"by more than {100 * SAME_SIZE:.0f} %"
_ORDER: dict[Measure, str] = {"bytes": "bytes to store", "params": "trainable parameters", "latency": "latency"}


def print_recommendation(found: Recommendation, output: Path | None) -> None:
    """Print what is recommended and why; write its configuration to a file, or print it below the text.

    Raises:
        UserError: if the file can't be written, or is there and says something else.
    """
    print_blocks(recommendation_blocks(found))
    configuration = recommended_yaml(found)
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
                raise UserError("is there and says something else; move it away or choose another file", file=output)
            write_atomically(output, content)
        print_blocks([Paragraph(f"Its configuration: {output}\nNext: peft-vit plan {output}")])


def recommendation_blocks(found: Recommendation) -> Iterator[Paragraph | Table]:
    """Yield what is recommended and why, or what the data does not decide."""
    yield from map(Paragraph, found.study.notices)
    yield from (Paragraph(f"Left out: {name} {reason}.") for name, reason in found.left_out.items())
    yield from map(Paragraph, _asked(found))
    yield from map(Paragraph, _answer(found))
    if (fewer := _fewer_ranks(found)) is not None:
        yield Paragraph(fewer)
    if found.candidates:
        yield _tested_table(found)
    for rated in found.outside:
        yield Paragraph(f"Outside the limits: {rated.name}: {_broken(rated)}.")
    if found.larger and found.outcome != "nothing within":
        names = joined(rated.name for rated in found.larger)
        yield Paragraph(f"Not smaller than {_whom(found)} {_CLEARLY}, so not tested: {names}.")


def _asked(found: Recommendation) -> Iterator[str]:
    best, study = found.best, found.study
    reference = "Best by validation" if study.stopping is None else "Control of its comparisons, which stop"
    cost = f"{megabytes(best.stored_bytes)} to store, {count(best.parameters)} trainable parameters"
    if best.seconds_per_step is not None:
        cost += f", {fixed(best.seconds_per_step)} s a step"
    if best.latency_s is not None:
        cost += f", {fixed(1000 * best.latency_s, 1)} ms latency"
    yield (
        f"Study {study.label}. {reference}: {best.name}, mean validation accuracy "
        f"{percent(best.validation_accuracy)} ({counted(len(best.seeds), 'seed')}); {cost}."
    )
    if uneven := [rated for rated in _others(found) if set(rated.seeds) != set(best.seeds)]:
        listed = joined(f"{rated.name} {_seeds(rated)}" for rated in uneven)
        yield f"Validation means are over different seeds than {_whom(found)}'s ({_seeds(best)}): {listed}."
    limits = joined(_limit(violation) for violation in best.beside) or "none"
    yield (
        f"Asked: the smallest by {_ORDER[found.measure]} that loses less than {margin_in_points(found.margin)} of test "
        f"accuracy against it. Limits: {limits}."
    )
    if found.exported is not None:
        yield _latency_source(found, found.exported)


def _seeds(rated: Rated) -> str:
    return f"seed{'' if len(rated.seeds) == 1 else 's'} {joined(map(str, rated.seeds))}"


def _others(found: Recommendation) -> tuple[Rated, ...]:
    """Return everything that was rated, but what the others are compared with."""
    return (*(candidate.rated for candidate in found.candidates), *found.outside, *found.larger)


def _whom(found: Recommendation) -> str:
    return "the best" if found.study.stopping is None else "the control"


def _latency_source(found: Recommendation, exported: ExportedLatency) -> str:
    timed = joined(
        f"{row.run} by {row.file} ({fixed(1000 * row.median_s, 1)} ms, {row.runtime}, threads: {row.threads})"
        for rows in exported.rows.values()
        for row in rows
    )
    names = [one.name for one in found.study.experiments if found.study.of(one.name) and one.name not in exported.rows]
    missing = f" Not timed there: {joined(names)}." if names else ""
    return (
        f"Latency is that of exported models in {exported.file}, batch {exported.batch}, on {exported.processor}; of "
        f"each run its fastest: {timed}.{missing}"
    )


def _answer(found: Recommendation) -> Iterator[str]:
    best, margin, family = found.best, margin_in_points(found.margin), len(found.candidates)
    if found.outcome == "nothing within":
        yield "Nothing is within the limits, so nothing is recommended."
        for violation, rated in smallest_that_exists(found):
            yield f"Nearest to {_limit(violation)}: {rated.name} with {_value(violation)}."
    elif found.outcome == "best":
        yield (
            f"Recommended: {best.name}, {_whom(found)} itself: nothing within the limits is smaller {_CLEARLY}, so no "
            "test was needed."
        )
    elif found.chosen is None:
        names = "the one candidate is not" if family == 1 else f"none of {family} candidates is"
        yield (
            f"Not decided: {names} shown to lose less than {margin}, so nothing smaller is recommended. That does "
            "not say that it is lost."
        )
        if best.violations:
            yield f"The safe choice would be {best.name}, which is outside the limits: {_broken(best)}."
        else:
            yield f"The safe choice is {best.name} itself, which keeps the limits."
    else:
        tested = found.comparison_of(found.chosen)
        assert tested is not None
        estimate = tested.estimate
        yield (
            f"Recommended: {found.chosen.name}. Test accuracy against {best.name}: "
            f"{points_interval(estimate.interval)} points, {counted(len(estimate.by_seed), 'pair')}; that it loses "
            f"{margin} or more is rejected with p = {estimate.adjusted_p:.2g} ({_family(found)})."
        )
        if found.as_small:
            names = joined(rated.name for rated in found.as_small)
            yield f"Shown, too, and not larger {_CLEARLY}, but with no higher validation accuracy: {names}."
        yield f"Against {best.name} it {'; '.join(dict.fromkeys(_savings(found, found.chosen)))}."


def _family(found: Recommendation) -> str:
    if found.study.stopping is not None:
        return "over all looks and comparisons"
    family = len(found.candidates)
    return f"Holm over {family} candidate{'' if family == 1 else 's'}"


def _savings(found: Recommendation, chosen: Rated) -> Iterator[str]:
    """Yield what the chosen one takes less or more of; times of several machines do not compare, and that is said."""
    machines = {run.hardware for run in (*found.best.runs, *chosen.runs)}
    for option, (name, words) in _COSTS.items():
        before, after = getattr(found.best, name), getattr(chosen, name)
        exported = option == "--max-latency-ms" and found.exported is not None  # all timed on one machine
        if before is None or after is None:
            continue
        if option in ("--max-seconds", "--max-latency-ms") and len(machines) > 1 and not exported:
            yield "was timed on other machines, so times do not compare"
        elif before == after:
            yield f"takes the same {words(before)}"
        else:
            share = f" ({fixed(100 * abs(before - after) / before, 0)} %)" if before else ""
            saved = f"saves {words(before - after)} of {words(before)}"
            yield (saved if after < before else f"takes {words(after - before)} more than {words(before)}") + share


def _fewer_ranks(found: Recommendation) -> str | None:
    """Return LoRA with fewer ranks than matrices, where nothing is recommended and only that fits the parameters.

    Not with a limit of bytes as well, since its base is in float.
    """
    limit = found.limits.get("--max-params")
    if limit is None or "--max-bytes" in found.limits or found.chosen is not None:
        return None
    adapted = [
        one for one in (found.best, *_others(found)) if METHOD_KINDS[one.runs[0].experiment.method].trains == "adapters"
    ]
    if not adapted or min(max(run.parameters.final for run in one.runs) for one in adapted) <= limit:
        return None
    run = adapted[0].runs[0]
    left = int(limit) - run.parameters.head
    of_a_rank = [site.in_features + site.out_features for site in run.record.sites]
    if not of_a_rank or not max(of_a_rank) <= left < sum(of_a_rank):  # a rank of any matrix, but not one of each
        return None
    return (
        "No adapter that was compared is as small. LoRA with fewer ranks than matrices can be: in a configuration "
        f"`lora: {{ranks: {{rule: {RULE_OF_A_BUDGET}, budget: {left}, unit: parameters}}}}`, or `peft-vit train IMAGES "
        f"--method lora --budget {4 * left // 100 / 10:g}kB`."
    )


def _tested_table(found: Recommendation) -> Table:
    def verdict(one: Candidate) -> str:
        return _verdict(one, found) + (f" ({one.estimate.note})" if one.estimate.note else "")

    return table(
        "recommendation",
        "Candidates, smallest first",
        found.candidates,
        [
            Column("experiment", "rated.name"),
            Column("to store", "rated.stored_bytes", megabytes),
            Column("parameters", "rated.parameters", count),
            Column("difference (points)", lambda one: points_interval(one.estimate.interval)),
            Column("n", lambda one: len(one.estimate.by_seed)),
            Column("p (Holm)", "estimate.adjusted_p", "{:.2g}".format),
            Column("loses less than asked?", verdict),
        ],
        f"Test accuracy, candidate minus {found.best.name}, n pairs by seed; negative is a loss. {_how_tested(found)}",
    )


def _how_tested(found: Recommendation) -> str:
    margin, interval = margin_in_points(found.margin), f"{100 * found.confidence:.4g} %"
    if found.study.stopping is not None:
        return (
            f"Looks at declared numbers of seeds asked for a loss below {margin}, at "
            f"{100 * found.study.stopping.level:g} % one-sided over all looks and comparisons; the repeated {interval} "
            "intervals hold over all looks."
        )
    return (
        f"One-sided non-inferiority t test against {margin} at 5 %, {_family(found)}. The {interval} t "
        "intervals hold for all candidates at once. 'Would do': 80 % power, if mean and spread stayed what they are."
    )


def _verdict(one: Candidate, found: Recommendation) -> str:
    if one.shown:
        return "shown"
    if found.study.untested and found.study.stopping is None:
        return "not decided"
    pairs, interval, test = len(one.estimate.by_seed), one.estimate.interval, one.estimate.significance
    if pairs < 2:
        return f"not decided: {counted(pairs, 'pair')}, the test needs 2 and more"
    if test is None or test.p_value is None:
        return "not decided: the differences have no spread, which the test needs"
    if interval is not None and interval.high is not None and interval.high < -found.margin:
        return "no, the whole interval lies below"
    if found.study.stopping is not None:
        return "not decided"
    if one.needed_n is None:
        return "not decided, and the estimate gives no n up to 1000 that would do"
    return f"not decided; n = {one.needed_n} would do"


def recommended_yaml(found: Recommendation) -> str | None:
    """Return the configuration of a study of what is recommended, on the seeds of its runs; None if nothing is."""
    chosen = found.chosen
    if chosen is None:
        return None
    best = "the best by validation" if found.study.stopping is None else "the control"
    why = f"{best}; nothing within the limits is smaller {_CLEARLY}"
    if found.outcome == "smaller":
        why = f"shown to lose less than {margin_in_points(found.margin)} of test accuracy against {found.best.name}"
    comments = [f"{chosen.name} of study {found.study.label}, made again from its records: {why}."]
    if found.study.smoke:
        comments.append("Smoke runs: random weights, synthetic images. They say nothing about a method.")
    return study_yaml(chosen.runs[0].record.spec, chosen.seeds, suffix=_SUFFIX, comments=comments)


def _bytes(value: float) -> str:
    return megabytes(value) if value >= 1e4 else f"{count(value)} bytes"


# What a limit is of: the field of a cost, and how it is written.
_COSTS: dict[Option, tuple[str, Callable[[float], str]]] = {
    "--max-bytes": ("stored_bytes", _bytes),
    "--max-params": ("parameters", lambda value: f"{count(value)} parameters"),
    "--max-seconds": ("seconds_per_step", lambda value: f"{value:.3g} s a step"),
    "--max-latency-ms": ("latency_s", lambda value: f"{1000 * value:.3g} ms latency"),
}


def _limit(violation: Violation) -> str:
    return f"at most {_COSTS[violation.option][1](violation.limit)}"


def _value(violation: Violation) -> str:
    return "not recorded" if violation.value is None else _COSTS[violation.option][1](violation.value)


def _broken(rated: Rated) -> str:
    return "; ".join(f"{_value(violation)}, asked {_limit(violation)}" for violation in rated.violations)
