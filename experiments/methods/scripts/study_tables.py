"""The tables of docs/studies.md about the project's own studies, as Markdown, out of analyses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import pandas as pd

from experiments.hypotheses.conclusions import Conclusion, MarkedFinding, conclude, estimate_of
from experiments.hypotheses.registry import mark_of
from experiments.scripts.evidence import table
from peft_vit.base.statistics import Interval
from peft_vit.base.statistics.estimates import recorded_mean
from peft_vit.deploy.page.document import Paragraph
from peft_vit.deploy.page.files import escaped
from peft_vit.deploy.page.formatting import count, fixed, joined, percent, percent_interval, points_interval
from peft_vit.lab.analysis import Analysis, Estimate, Finding, MethodResult
from peft_vit.lab.analysis.recommendation import recommend
from peft_vit.lab.report.printed_tables import recommendation_blocks

REFERENCE = "lora_r8"
MARGIN = 0.01  # a share: the margin of the study's hypotheses
MAIN = "study_elpv"  # which the main table tells of first
DESCRIPTIVE = "study_elpv_published"  # three splits: nothing is tested
SHORT = {
    MAIN: "ELPV",
    "study_digits": "digits",
    "study_fashion": "Fashion-MNIST",
    DESCRIPTIVE: "ELPV, published protocol",
}
TITLES = {
    "linear_probe": "linear probe",
    "full_finetuning": "full fine-tuning",
    "lora_r1": "LoRA r=1",
    "lora_r8": "LoRA r=8",
    "peft_adalora": "AdaLoRA by the PEFT library",
    "adalora_best": "AdaLoRA (magnitudes, early)",
    "adalora_published": "AdaLoRA as published",
    "qa_lora_int8": "QA-LoRA int8",
    "qa_lora_int4": "QA-LoRA int4",
    "qa_lora_nf4": "QA-LoRA nf4",
    "qa_adalora_nf4": "AdaLoRA on nf4",
    "joint_ranks_and_bits": "ranks and bits chosen together",
}
KINDS = {MAIN: "solar cells", "study_digits": "digits", "study_fashion": "clothing"}
SHOWN = ("linear_probe", "full_finetuning", "lora_r8", "adalora_best", "qa_lora_nf4")
_MEMORY_OF = {  # sides of benchmarks/memory.py
    "linear_probe": "head alone",
    "full_finetuning": "full fine-tuning",
    "lora_r8": "peft-vit LoRA r=8",
    "adalora_best": "peft-vit AdaLoRA 12 -> 8",
    "qa_lora_nf4": "peft-vit QA-LoRA nf4",
}
PUBLISHED = (
    ("SVM on image features", "82.4", "arXiv 1807.02894"),
    ("CNN", "88.4", "arXiv 1807.02894"),
    ("ResNet-152, oversampling", "90.1", "PMC12391306"),
)
_NOT_OURS = ("lora_r1", "peft_adalora")
_NOT_WORSE = "as-accurate-as-lora-r8"
_MORE_ACCURATE = "more-accurate-than-lora-r8"
_OWN = (
    _NOT_WORSE,
    _MORE_ACCURATE,
    "adalora-over-peft",
    "strategy-over-published",
    "eight-bits-lose-nothing-tuned",
    "four-bits-as-accurate-as-eight",
    "adaptive-ranks-help-on-four-bits",
    "joint-choice-keeps-accuracy",
)
_MORE_TIME = 1.25  # times what LoRA r=8 takes; times of runs side by side differ by a fifth anyway


def study_blocks(
    analyses: Mapping[str, Analysis], over_all: Sequence[MarkedFinding], pilots: Mapping[str, pd.DataFrame]
) -> dict[str, str]:
    """Return each generated part of the documents by the name of its marks.

    Args:
        analyses: by the study's name, those that results/ holds.
        over_all: what they say together about the hypotheses that are about several.
        pilots: the runs that chose learning rates, by the pilot's name.
    """
    found: dict[str, str] = {}
    few_labels = {name: one for name, one in analyses.items() if name != DESCRIPTIVE}
    for name, analysis in few_labels.items():
        words = [*in_words(analysis), price(analysis)]
        found |= {
            f"{name}_table": f"{main_table(analysis)}\n\n{_listed(words)}\n\n{caption(analysis)}",
            f"{name}_notices": notices(analysis),
            f"{name}_recommended": recommended(analysis),
            f"{name}_costs": cost_table(analysis),
            f"{name}_verdicts": finding_table(analysis.findings),
            f"{name}_undecided": undecided(analysis),
        }
    if few_labels:
        found["study_verdicts"] = verdicts(few_labels, over_all)
        found["study_cost"] = costs(analyses, pilots)
    if (published := analyses.get(DESCRIPTIVE)) is not None:
        found[f"{DESCRIPTIVE}_table"] = f"{published_table(published)}\n\n{caption(published)}"
    return found


def five_methods(analyses: Mapping[str, Analysis], memory: Sequence[Mapping[str, Any]]) -> str:
    """Return one row for each of five methods: accuracy on each kind of images, what it stores and what training takes.

    Args:
        analyses: by the study's name.
        memory: rows of benchmarks/results/memory.json.
    """
    by_kind = {title: {m.experiment.name: m for m in analyses[study].methods} for study, title in KINDS.items()}
    beyond = {row["side"]: row["beyond_imports_bytes"] for row in memory}
    columns: dict[str, Callable[[str], str]] = {"method": titled}
    for title, of in by_kind.items():
        columns[f"{title}, %"] = lambda name, of=of: _with_half_width(of[name].test_accuracy)
    columns["to store, MB"] = lambda name: fixed(by_kind[KINDS[MAIN]][name].stored_bytes / 1e6, 1)
    columns["to train, MB"] = lambda name: _or_dash(
        beyond.get(f"ViT-B/16: {_MEMORY_OF[name]}"), lambda size: f"{size / 1e6:,.0f}"
    )
    return table(SHOWN, columns)


def _with_half_width(interval: Interval) -> str:
    assert interval.high is not None
    return f"{fixed(100 * interval.estimate, 1)} ± {fixed(100 * (interval.high - interval.estimate), 1)}"


def main_table(analysis: Analysis) -> str:
    """Return one row a method: accuracy, difference to LoRA r=8, what is decided, what it takes."""
    against = {one.name: one for one in analysis.comparisons if one.reference == REFERENCE}
    not_worse = {finding.subject: finding for finding in _of(analysis, _NOT_WORSE)}
    registered = _registered_otherwise(analysis, against)
    columns: dict[str, Callable[[MethodResult], str]] = {
        "method": _title,
        "test accuracy [95 %]": lambda method: percent_interval(method.test_accuracy),
        "minus LoRA r=8, points [95 %]": _unless_reference(lambda name: points_interval(against[name].interval)),
        f"better or worse? (Holm over {len(against)})": _unless_reference(
            lambda name: _differs(against[name].verdict) + registered.get(name, "")
        ),
        f"non-inferior by a point? (Holm over {len(not_worse)})": lambda method: (
            _WITHIN[finding.verdict]
            if (finding := not_worse.get(f"{method.experiment.name} against {REFERENCE}"))
            else "–"
        ),
        "trainable parameters": lambda method: count(method.final_parameters),
        "to store, MB": lambda method: fixed(method.stored_bytes / 1e6, 1),
    }
    return table(in_order(analysis), columns)


def _title(method: MethodResult) -> str:
    return titled(method.experiment.name)


def _unless_reference(cell: Callable[[str], str]) -> Callable[[MethodResult], str]:
    return lambda method: "–" if method.experiment.name == REFERENCE else cell(method.experiment.name)


_WITHIN = {"supported": "yes", "refuted": "**no, worse**", "not decided": "not decided", "no data": "no data"}


def _differs(verdict: str) -> str:
    return {"supported": "better", "refuted": "**worse**", "not decided": "not decided"}[verdict]


def _registered_otherwise(analysis: Analysis, against: Mapping[str, Estimate]) -> dict[str, str]:
    """Return, by method, what a registered hypothesis about it decides in its family, where the column says otherwise.

    The test is the same, Wilcoxon's on the same pairs; Holm's correction is over the hypotheses of the family.
    """
    beaten = _reference_beats(analysis)
    more_accurate = _of(analysis, _MORE_ACCURATE)
    opposite = {"supported": "refuted", "refuted": "supported", "not decided": "not decided"}
    said = {one.subject.partition(" against ")[2]: (opposite[one.verdict], len(beaten)) for one in beaten}
    said |= {one.subject.partition(" against ")[0]: (one.verdict, len(more_accurate)) for one in more_accurate}
    return {
        name: f"; as a registered hypothesis (Holm over {size}): {_differs(verdict)}"
        for name, (verdict, size) in said.items()
        if verdict != against[name].verdict
    }


def _reference_beats(analysis: Analysis) -> list[Finding]:
    """Return the registered hypotheses that LoRA r=8 is more accurate than the methods without adapters: one family."""
    return [*_of(analysis, "lora-beats-linear"), *_of(analysis, "lora-beats-full")]


def in_words(analysis: Analysis) -> list[str]:
    """Return what the table decides, losses first."""
    against = [one for one in analysis.comparisons if one.reference == REFERENCE]
    worse = [titled(one.name) for one in against if one.verdict == "refuted"]
    better = [titled(one.name) for one in against if one.verdict == "supported"]
    not_worse = _of(analysis, _NOT_WORSE)
    within, beyond, open_ = (
        [_compared(finding)[0] for finding in not_worse if finding.verdict == verdict]
        for verdict in ("supported", "refuted", "not decided")
    )
    return [
        f"Less accurate than LoRA r=8 (Holm over {len(against)}): {joined(worse) or 'none is shown to be'}. "
        f"More accurate: {joined(better) or 'none is shown to be'}.",
        *_beaten_in_words(analysis),
        f"Shown to lose less than a point (Holm over {len(not_worse)}): {joined(within) or 'none'}. "
        + (f"Shown to lose more: {joined(beyond)}. " if beyond else "")
        + f"Not decided: {joined(open_) or 'none'}.",
        f"Methods of this project that lose: {'; '.join(losses(analysis)) or 'none is shown'}.",
        *_lower_means(analysis),
    ]


def _listed(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _beaten_in_words(analysis: Analysis) -> list[str]:
    """Return what the registered hypotheses about LoRA r=8 and the methods without adapters came to."""
    told = [
        f"than {_compared(finding)[1]}: {finding.verdict}, {points_interval(finding.interval)} points"
        for finding in _reference_beats(analysis)
    ]
    if not told:
        return []
    return [
        f"Registered hypotheses with a family of their own (Holm over {len(told)}): LoRA r=8 is more accurate "
        f"{'; '.join(told)}."
    ]


def _lower_means(analysis: Analysis) -> list[str]:
    """Return which adapters have a lower mean than a method without, decided or not."""
    told = []
    plain = [method for method in in_order(analysis) if method.experiment.method in ("linear", "full")]
    for other in plain:
        below = [
            titled(method.experiment.name)
            for method in in_order(analysis)
            if method not in plain and method.test_accuracy.estimate < other.test_accuracy.estimate
        ]
        if below:
            told.append(f"than {titled(other.experiment.name)}: {joined(below)}")
    return [f"A lower mean, decided or not, {'; '.join(told)}."] if told else []


def _latency_s(method: MethodResult) -> float | None:
    """Return the mean latency of a forward pass of one image; None if no run measured it."""
    return recorded_mean(run.record.latency_s.get(1) for run in method.runs)


def price(analysis: Analysis) -> str:
    """Return which methods took clearly more time than LoRA r=8 to train and to predict."""
    methods = [method for method in in_order(analysis) if method.experiment.name != REFERENCE]
    (reference,) = (method for method in analysis.methods if method.experiment.name == REFERENCE)
    parts = []
    for what, unit, factor, digits, value in (
        ("one image", "ms", 1e3, 0, _latency_s),
        ("a training step", "s", 1, 2, lambda method: method.cost("seconds_per_step")),
    ):
        limit = value(reference)
        if limit is None:
            continue
        more = [
            f"{titled(method.experiment.name)} ({fixed(factor * value(method), digits)})"
            for method in methods
            if value(method) is not None and value(method) > _MORE_TIME * limit
        ]
        parts.append(f"{what} ({fixed(factor * limit, digits)} {unit}): {joined(more) or 'none'}")
    return f"Slower than LoRA r=8 by more than a quarter, in means: {'; '.join(parts)}."


def losses(analysis: Analysis) -> list[str]:
    """Return the pairs in which the study's own hypotheses were refuted, with the difference, each pair once."""
    found: dict[str, str] = {}
    for finding in analysis.findings:
        if finding.verdict == "refuted" and finding.sentence.id in _OWN:
            method, other = _compared(finding)
            if method not in map(titled, _NOT_OURS):
                found[finding.subject] = f"{method} against {other} {points_interval(finding.interval)} points"
    return list(found.values())


def titled(experiment: str) -> str:
    """Return what the documents call an experiment."""
    return TITLES.get(experiment, experiment)


def _compared(finding: Finding) -> tuple[str, str]:
    """Return what a finding about a pair compares with what, as the documents call them."""
    name, _, other = finding.subject.partition(" against ")
    return titled(name), titled(other)


def cost_table(analysis: Analysis) -> str:
    """Return one row a method: learning rate, every seed, and what training took."""
    columns: dict[str, Callable[[MethodResult], str]] = {
        "method": _title,
        "learning rate": lambda method: _or_dash(method.experiment.training.learning_rate, lambda rate: f"{rate:g}"),
        "test accuracy by seed, %": _by_seed,
        "validation, %": lambda method: fixed(100 * method.validation_accuracy.estimate, 1),
        "s a step": lambda method: _or_dash(method.cost("seconds_per_step"), lambda value: fixed(value, 2)),
        "one image, ms": lambda method: _or_dash(_latency_s(method), lambda value: fixed(1e3 * value, 1)),
    }
    return table(in_order(analysis), columns)


def _by_seed(method: MethodResult) -> str:
    return joined(fixed(100 * value, 1) for value in method.by_seed.values())


def _or_dash(value: float | None, written: Callable[[float], str]) -> str:
    return "–" if value is None else written(value)


def verdicts(analyses: Mapping[str, Analysis], over_all: Sequence[MarkedFinding]) -> str:
    """Return one row a hypothesis, one column a data set; what all say together, and what none says, stand below."""
    concluded = {name: {c.sentence.id: c for c in conclude(one.findings)} for name, one in analyses.items()}
    together = [finding for finding in over_all if finding.verdict != "no data"]
    sentences = {name: escaped(one.sentence.text) for name, one in next(iter(concluded.values())).items()}
    told = [name for name in sentences if any(found[name].verdict != "no data" for found in concluded.values())]
    over_several = {finding.sentence.id for finding in together}
    silent = [sentence for name, sentence in sentences.items() if name not in {*told, *over_several}]
    columns: dict[str, Callable[[str], str]] = {"hypothesis": sentences.__getitem__}
    columns |= {SHORT[study]: lambda name, found=found: _said(found[name]) for study, found in concluded.items()}
    parts = [
        table(told, columns, left=len(columns)),
        *(["Over several data sets:\n\n" + finding_table(together)] if together else []),
        f"Without data in these studies, or not testable by any:\n\n{_listed(silent)}",
    ]
    return "\n\n".join(parts)


def _said(conclusion: Conclusion) -> str:
    if conclusion.verdict == "no data":
        return "–"
    if len(conclusion.findings) == 1:
        return f"{_verdict(conclusion)}: {escaped(estimate_of(conclusion.findings[0]))}"
    if conclusion.sentence.test == "described":
        return f"{conclusion.counts}{'' if mark_of(conclusion) == 'registered' else ' (exploratory)'}"
    verdict, counts = _verdict(conclusion), conclusion.counts
    return counts if counts.startswith(f"{verdict} in ") and "," not in counts else f"{verdict}: {counts}"


def finding_table(findings: Sequence[Finding]) -> str:
    """Return one row a finding with data, with the test and what it said."""
    columns: dict[str, Callable[[Finding], str]] = {
        "hypothesis": lambda one: one.sentence.id,
        "experiment or pair": lambda one: one.subject,
        "verdict": _verdict,
        "estimate [95 %]": estimate_of,
        "n": lambda one: str(len(one.by_seed)),
        "test": _tested,
    }
    escaping = {title: lambda one, cell=cell: escaped(cell(one)) for title, cell in columns.items()}
    return table([one for one in findings if one.verdict != "no data"], escaping, left=len(columns))


def _verdict(one: MarkedFinding | Conclusion) -> str:
    verdict = "described" if one.sentence.test == "described" else one.verdict
    mark = mark_of(one) if isinstance(one, Conclusion) else one.mark
    return verdict if mark == "registered" else f"{verdict} (exploratory)"


def _tested(finding: Finding) -> str:
    said = finding.outcome if finding.test == "none" else f"{finding.test}: {finding.outcome}"
    said = "not tested" if finding.sentence.test == "described" else said
    return f"{said} ({finding.note})" if finding.note else said


def undecided(analysis: Analysis) -> str:
    """Return the tested hypotheses that the runs could not decide, with what they know of each experiment or pair."""
    found: dict[str, list[Finding]] = {}
    for finding in analysis.findings:
        if finding.verdict == "not decided" and finding.sentence.test != "described":
            found.setdefault(finding.sentence.text, []).append(finding)
    lines = []
    for sentence, findings in found.items():
        lines.append(f"- {escaped(sentence)}:")
        lines += [escaped(f"    - {one.subject} {estimate_of(one)}") for one in findings]
    return "\n".join(lines) or "Nothing: every hypothesis with data was decided."


def costs(analyses: Mapping[str, Analysis], pilots: Mapping[str, pd.DataFrame]) -> str:
    """Return what all runs took, by study; of pilots what their tables hold."""
    rows = [_cost_of(SHORT[name], analysis) for name, analysis in analyses.items()]
    for name, runs in pilots.items():
        commits = sorted({str(commit)[:7] for commit in runs.commit.dropna()})
        rows.append(
            {
                "study": f"{SHORT[name.removesuffix('_pilot')]}, pilot",
                "runs": str(len(runs)),
                "failed": str((runs.status != "done").sum()),
                "core hours": fixed(runs.seconds.sum() / 3600, 1),
                "machine": "–",
                "commit": joined(commits),
            }
        )
    return table(rows, {title: itemgetter(title) for title in rows[0]})


def _cost_of(name: str, analysis: Analysis) -> dict[str, str]:
    runs, failed = analysis.study.runs, analysis.study.failed
    seconds = sum(run.record.seconds * run.provenance.threads for run in runs)
    machines = sorted({f"{run.provenance.processor}, {run.provenance.cpu_count} processors" for run in runs})
    commits = sorted({(run.provenance.git_hash or "unknown")[:7] for run in runs})
    dirty = any(run.provenance.git_dirty for run in runs)
    return {
        "study": name,
        "runs": str(len(runs) + len(failed)),
        "failed": str(len(failed)),
        "core hours": fixed(seconds / 3600, 1),
        "machine": escaped("; ".join(machines)),
        "commit": joined(commits) + (", with local changes" if dirty else ""),
    }


def published_table(analysis: Analysis) -> str:
    """Return the methods of the published protocol beside what was published; described, nothing is tested."""
    titles = ("method", "test accuracy, %", "by split, %", "source")
    rows = [
        (
            _title(method),
            f"{fixed(100 * method.test_accuracy.estimate, 1)}, mean of {len(method.by_seed)} splits",
            _by_seed(method),
            "this study",
        )
        for method in in_order(analysis)
    ]
    rows += [(what, accuracy, "–", source) for what, accuracy, source in PUBLISHED]
    return table(rows, {title: itemgetter(place) for place, title in enumerate(titles)}, left=len(titles))


def pilot_table(pilot: pd.DataFrame, means: pd.DataFrame, chosen: Mapping[str, float]) -> str:
    """Return mean validation accuracy by method and rate, the chosen one in bold.

    Args:
        pilot: one row a run.
        means: mean validation accuracy and loss by method and rate.
        chosen: rate by method.
    """
    accuracy = means.set_index(["method", "learning_rate"]).validation_accuracy

    def cell(method: str, rate: float) -> str:
        text = fixed(100 * accuracy[method, rate], 1) if (method, rate) in accuracy.index else "–"
        return f"**{text}**" if rate == chosen[method] else text

    columns: dict[str, Callable[[str], str]] = {"method": titled}
    columns |= {f"{rate:g}": partial(cell, rate=rate) for rate in sorted(means.learning_rate.unique())}
    ends = means.groupby("method").learning_rate.agg(["min", "max"])
    at_an_end = [titled(method) for method, rate in chosen.items() if rate in set(ends.loc[method])]
    failed = int((pilot.status != "done").sum())
    note = (
        f"Mean validation accuracy in %, seeds {joined(str(seed) for seed in sorted(pilot.seed.unique()))}; bold: the "
        f"chosen rate. {len(pilot)} runs, {failed or 'none'} failed. Best at an end of the grid: "
        f"{joined(at_an_end) or 'none'}."
    )
    return f"{table(dict.fromkeys(means.method), columns)}\n\n{note}"


def caption(analysis: Analysis) -> str:
    """Return what the runs have in common."""
    study = analysis.study
    run = study.runs[0]
    data = run.record.spec.data
    majority = sorted({run.record.majority_accuracy["test"] for run in study.runs})
    share = percent(majority[0]) if len(majority) == 1 else f"{percent(majority[0])} to {percent(majority[-1])}"
    above = sum(method.runs_above_majority for method in analysis.methods)
    sizes = joined(f"{size:,} {name}" for name, size in run.record.split_sizes.items())
    states = joined(f"{n} {state}" for state, n in study.counts().items() if n)
    return (
        f"Runs: {states}; seeds {joined(str(seed) for seed in study.seeds)}; {escaped(data.dataset)} at "
        f"{data.image_size} px, {sizes} images. The majority class has {share} of the test images; {above} of "
        f"{len(study.runs)} runs are above it."
    )


def notices(analysis: Analysis) -> str:
    """Return what a report says above all numbers: what failed, is missing, or differs between runs."""
    return "\n".join(f"- {escaped(notice)}" for notice in analysis.study.notices) or "- Nothing failed or is missing."


def recommended(analysis: Analysis) -> str:
    """Return what `peft-vit recommend` says without limits: the smallest that is shown to lose less than a point."""
    found = recommend(analysis.study, {}, margin=MARGIN)
    told = [block for block in recommendation_blocks(found) if isinstance(block, Paragraph)]
    return "\n\n".join(escaped(block.text) for block in told if block.text not in analysis.study.notices)


def in_order(analysis: Analysis) -> Sequence[MethodResult]:
    """Return the methods in the order of the configuration, which is that of TITLES."""
    places = {name: place for place, name in enumerate(TITLES)}
    return sorted(analysis.methods, key=lambda method: places.get(method.experiment.name, len(places)))


def _of(analysis: Analysis, hypothesis: str) -> list[Finding]:
    return [one for one in analysis.findings if one.sentence.id == hypothesis and one.verdict != "no data"]
