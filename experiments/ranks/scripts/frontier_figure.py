"""What the studies of few ranks say: the declared comparisons by their looks, and accuracy against trained values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from experiments.ranks.scripts import frontier_configs as configs
from experiments.ranks.scripts.frontier_configs import BUDGETS, EVEN_DEPTHS, SENTENCES, SEQUENCE, TASKS, VALUES
from experiments.scripts.evidence import table
from experiments.stopping.comparisons import ENDS, StoppingConfig, repeated_interval, stopping_of, stopping_rule
from experiments.stopping.sequential import SequentialResult, follow
from peft_vit.base.errors import UserError
from peft_vit.base.statistics import Interval, mean_interval
from peft_vit.core.config import StudyConfig, load_study
from peft_vit.deploy.page.document import Drawing
from peft_vit.deploy.page.figure import DASHED, LINE_COLORS, MARKERS, MUTED, PAPER, Canvas, draw, quiet_grid
from peft_vit.deploy.page.formatting import count, fixed, joined, percent, points_interval

_SHOWN = {"even": "even", "random": "random sites", "last_blocks": "last blocks"}  # beside the rule
NOTE = (
    "Values are trained, beside the head. Accuracy is on test images, over the runs that there are. Probe: how many "
    "runs return the probe that they start from, since their last step is no better on validation. Lead: of the "
    "rule, in points, over the seeds that both have; bold where it is shown. Its intervals hold at 90 % over all "
    "looks, and where a study has several comparisons at more; those not tested are 95 % intervals by themselves. "
    "Means of comparisons that stopped early lie rather too far from zero."
)
_WIDEST = 1.0  # of a share: an early look's bound is wider than what can be
# Marks in the document, and what the studies' names end with. They are not drawn: their seeds have no probe.
ASKED_AFTER = {"frontier_values": str(VALUES), "frontier_depths": EVEN_DEPTHS}
LEAST_ROOM = 3.0  # points that LoRA r=8 has to lie above the probe
NOT_TESTED = "not tested"
_BASELINES = {"linear_probe": "linear probe", "lora_r8": "LoRA r=8"}


class Reached(NamedTuple):
    """What the runs of an experiment reach."""

    ranks: int | None  # None: its budget is in trained values
    runs: int
    values: float  # trained beside the head, mean
    accuracy: float  # on test images, mean
    returned: float  # the share of runs whose result is the probe they start from


@dataclass(frozen=True)
class Sentence:
    """ "At so many ranks the rule beats this control": what the looks say; declared for those of SENTENCES."""

    task: str
    budget: int  # of the rule
    rule: str
    control: str  # random, last_blocks, even, gradient, fc1, ...
    own: Reached  # by the rule
    other: Reached  # by the control
    lead: Interval | None  # of the rule, a share, the repeated interval of the last look; None: not looked yet
    shown: bool  # and so are those of the budgets that come before it
    state: str  # of the comparison


def sentences(runs: pd.DataFrame) -> list[Sentence]:
    """Return the registered sentences of every study that has runs, by task and budget.

    Args:
        runs: rows of the studies, with their task. Runs that failed leave a comparison open.

    Raises:
        UserError: if the configuration of a study is gone.
    """
    done = runs[runs.status == "done"]
    found: list[Sentence] = []
    for task in TASKS:
        reached = _has_room(runs, task)  # by the tests in their sequence
        of_task: list[Sentence] = []
        for budget in SEQUENCE:
            part = done[done.study == f"frontier_{task}_{budget}"]
            of_budget = list(_sentences(task, str(budget), part)) if not part.empty else []
            of_task += [replace(one, shown=one.shown and reached) for one in of_budget]
            declared = [one for one in of_budget if one.control in SENTENCES]
            reached = reached and bool(of_budget) and all(one.shown for one in declared)
        found += sorted(of_task, key=lambda one: one.budget)
    return found


def asked_after(runs: pd.DataFrame, suffix: str) -> list[Sentence]:
    """Return the sentences of the studies that were asked after those of nine ranks were read, by task.

    Args:
        runs: rows of the studies, with their task.
        suffix: of their names, one of ASKED_AFTER's.
    """
    done = runs[runs.status == "done"]
    by_task = {task: done[done.study == f"frontier_{task}_{suffix}"] for task in TASKS}
    return [
        replace(one, shown=one.shown and _has_room(runs, task))
        for task, part in by_task.items()
        if not part.empty
        for one in _sentences(task, suffix, part)
    ]


def _declared(task: str, suffix: str) -> StudyConfig:
    return load_study(configs.CONFIGS / f"frontier_{task}_{suffix}.yaml")


def _sentences(task: str, suffix: str, runs: pd.DataFrame) -> Iterator[Sentence]:
    study = _declared(task, suffix)
    stopping = stopping_of(study)
    own, *others = (one.name for one in study.experiments)
    courses = {} if stopping is None else _courses(study, stopping, runs)
    wide = runs.pivot(index="seed", columns="experiment", values="test_accuracy")
    for name in (one for one in others if one in wide):
        if stopping is None:
            differences = (wide[own] - wide[name]).dropna()
            lead, shown, state = mean_interval(differences) if len(differences) else None, False, NOT_TESTED
        else:
            course = courses[name]
            lead = _negative(repeated_interval(course.looks[-1], stopping.level)) if course.looks else None
            shown, state = course.superiority == "refuted", ENDS[course.stopped]
        (rule, _, ranks), (control, _, _) = own.rpartition("_"), name.rpartition("_")
        reached, beside = (_reached(runs[runs.experiment == one]) for one in (own, name))
        yield Sentence(task, int(ranks), rule, control, reached, beside, lead, shown, state)


def _reached(runs: pd.DataFrame) -> Reached:
    means = runs[["adapter_values", "test_accuracy"]].mean()
    budget = int(str(runs.experiment.iloc[0]).rpartition("_")[2])
    ranks = None if budget == VALUES else budget
    return Reached(ranks, len(runs), *means, returned=float((runs.chosen_step == 0).mean()))


def _courses(study: StudyConfig, stopping: StoppingConfig, runs: pd.DataFrame) -> Mapping[str, SequentialResult]:
    """Return the course of each comparison: experiment minus control, up to the first seed that lacks one of both."""
    wide = runs.pivot(index="seed", columns="experiment", values="test_accuracy").reindex(study.seeds)
    names = [one.name for one in study.experiments if one.name != stopping.control]
    wide = wide.reindex(columns=[stopping.control, *names])
    differences = wide[names].sub(wide[stopping.control], axis=0)
    in_order = {name: list(differences[name][differences[name].notna().cummin()]) for name in names}
    return {one.name: one for one in follow(in_order, stopping_rule(stopping, len(study.seeds)))}


def _negative(one: Interval) -> Interval:
    """Return the interval of the difference the other way round."""
    low, high = (None if end is None else -end for end in (one.high, one.low))
    return Interval(-one.estimate, low, high, one.n, one.confidence, one.reason)


def not_shown(found: Sequence[Sentence], task: str, *, before: int | None = None) -> int | None:
    """Return the first budget of the sequence with a comparison that ended without being shown; None: no such one."""
    for budget in SEQUENCE[: None if before is None else SEQUENCE.index(before)]:
        of_budget = [one for one in found if (one.task, one.budget) == (task, budget) and one.control in SENTENCES]
        if any(not one.shown and one.state != ENDS[None] for one in of_budget):
            return budget
    return None


def _between(runs: pd.DataFrame, task: str) -> pd.DataFrame:
    """Return the test accuracy of the linear probe and of LoRA r=8 by seed, of the seeds that both have."""
    part = runs[(runs.study == f"frontier_{task}") & (runs.status == "done")]
    wide = part.pivot(index="seed", columns="experiment", values="test_accuracy")
    return wide.reindex(columns=[*_BASELINES]).dropna()


def room(runs: pd.DataFrame, task: str) -> float:
    """Return by how many points LoRA r=8 lies above the linear probe, mean over the seeds that both have."""
    ends = _between(runs, task)
    return float(100 * (ends["lora_r8"] - ends["linear_probe"]).mean())


def _has_room(runs: pd.DataFrame, task: str) -> bool:
    return room(runs, task) >= LEAST_ROOM  # False where there are no such runs


def in_words(found: Sequence[Sentence], runs: pd.DataFrame) -> str:
    """Return for each task at which budgets it is shown that where ranks go matters, or that it decides nothing."""
    lines = []
    ends = {task: between for task in TASKS if len(between := _between(runs, task))}
    for task in [one for one in TASKS if one in ends or any(sentence.task == one for sentence in found)]:
        of_task = [one for one in found if one.task == task and one.control in SENTENCES]
        title = TASKS[task].title
        if task not in ends:
            lines.append(f"- {title}: open, as long as the linear probe and LoRA r=8 have no seed in common.")
            continue
        if (gain := room(runs, task)) < LEAST_ROOM:
            less = f"{gain:+.1f} points above the linear probe, less than {LEAST_ROOM:g}"
            lines.append(f"- {title} decides nothing: LoRA r=8 is {less}.")
            continue
        if not of_task:
            lines.append(f"- {title}: not asked yet.")
            continue
        rule = of_task[0].rule
        shown = [b for b in BUDGETS if any(one.budget == b and one.shown for one in of_task)]
        whole = [b for b in shown if all(one.shown for one in of_task if one.budget == b)]
        first = next((budget for budget in SEQUENCE if budget not in whole), None)
        then = "" if first is None else f"At {first} ranks {_where_it_ends(of_task, first, not_shown(found, task))}."
        if not whole:
            lines.append(f"- {title}: does it matter where ranks go? {then}")
            continue
        of_last = [one for one in of_task if one.budget == whole[-1]]
        others = sorted(round(one.other.values) for one in of_last)
        lines.append(
            f"- {title}: at {joined([str(one) for one in whole])} ranks `{rule}` beats random sites, the last blocks "
            f"and ranks spread evenly; it has {count(round(of_last[0].own.values))} values at {whole[-1]}, these have "
            f"{count(others[0])} to {count(others[-1])}. {then}".rstrip()
        )
    for task, between in ends.items():
        reached = ", ".join(f"{name} {percent(between[one].mean())}" for one, name in _BASELINES.items())
        lines.append(f"- What ranks lie between on {TASKS[task].title}, {len(between)} seeds: {reached}.")
    return "\n".join(lines)


class _Row(NamedTuple):
    task: str
    where: str
    reached: Reached
    lead: str  # of the rule over it


def _where_it_ends(of_task: Sequence[Sentence], budget: int, not_shown_at: int | None) -> str:
    if budget == not_shown_at:
        order = ", ".join(str(one) for one in SEQUENCE)
        return f"not all three are shown; what comes after in the order of the tests, {order}, is described only"
    return "it is open so far" if any(one.budget == budget for one in of_task) else "it is not asked yet"


def sentence_table(found: Sequence[Sentence]) -> str:
    """Return a row an experiment: what it reaches, and by how much the rule leads it."""
    rows: list[_Row] = []
    groups = groupby(found, key=lambda one: (one.task, one.budget))
    for of_budget in (list(group) for _, group in groups):
        first = of_budget[0]
        rows.append(_Row(first.task, first.rule, first.own, "–"))
        rows += [_Row(one.task, one.control, one.other, _lead(one)) for one in of_budget]
    columns: dict[str, Callable[[_Row], str]] = {
        "images, ranks": lambda row: f"{TASKS[row.task].title}, {row.reached.ranks or '–'}",
        "where": lambda row: row.where.replace("_", " "),
        "values": lambda row: count(round(row.reached.values)),
        "runs": lambda row: str(row.reached.runs),
        "accuracy, %": lambda row: fixed(100 * row.reached.accuracy, 1),
        "probe, %": lambda row: fixed(100 * row.reached.returned, 0),
        "lead over it": lambda row: row.lead,
    }
    return table(rows, columns, left=2)


def _lead(one: Sentence) -> str:
    if one.lead is None:
        return one.state
    lead = points_interval(one.lead)
    if one.lead.low is not None and one.lead.low < -_WIDEST:
        lead = f"{100 * one.lead.estimate:+.1f}, no bound yet"
    if one.state in (NOT_TESTED, ENDS[None]):
        return f"{lead}, {one.state}"
    return f"**{lead}**" if one.shown else lead


def means(runs: pd.DataFrame, rule: Mapping[str, str]) -> list[dict[str, object]]:
    """Return a row for each point of the figure: mean gain over the linear probe of the same seed, with its interval.

    Test accuracies differ by the images that a seed draws to train on, and budgets have other seeds; gains compare.
    Over the seeds that all points of a task and budget have, and the probe; Student's 95 % interval.

    Args:
        runs: rows of the studies, with their task.
        rule: by task.
    """
    rows: list[dict[str, object]] = []
    done = runs[(runs.status == "done") & ~runs.study.str.endswith(tuple(ASKED_AFTER.values()))].copy()
    done["which"] = [one if one in _BASELINES else one.rpartition("_")[0] for one in done.experiment]
    done = done[
        [which in (*_BASELINES, *_SHOWN, rule.get(task)) for which, task in zip(done.which, done.task, strict=True)]
    ]
    there = done.groupby(["study", "seed"]).experiment.transform("nunique")
    done = done[there == done.groupby("study").experiment.transform("nunique")]
    probe = done[done.which == "linear_probe"].set_index(["task", "seed"]).test_accuracy
    done["gain"] = done.test_accuracy - probe.reindex(pd.MultiIndex.from_frame(done[["task", "seed"]])).to_numpy()
    for (task, experiment), part in done.dropna(subset="gain").groupby(["task", "experiment"], sort=False):
        which, budget = part.which.iloc[0], experiment.rpartition("_")[2]
        gain = mean_interval(part.gain)
        rows.append(
            {
                "task": task,
                "which": "rule" if which == rule.get(task) else which,
                "ranks": None if experiment in _BASELINES else int(budget),
                "trained_values": float(part.adapter_values.mean()),
                "gain": gain.estimate,
                "low": gain.low,
                "high": gain.high,
                "seeds": gain.n,
            }
        )
    return rows


def drawing(runs: pd.DataFrame, found: Sequence[Sentence]) -> Drawing:
    """Draw what is gained over the probe by trained values, a panel a task: the rule, even, random, last blocks.

    Raises:
        UserError: if no study has runs.
    """
    rule = {one.task: one.rule for one in found}
    if not rule:
        raise UserError("has no finished runs of a study at a budget, so there is nothing to draw")
    rows = means(runs, rule)
    names = {"rule": joined(sorted(set(rule.values()))), **_SHOWN}

    def paint(canvas: Canvas) -> None:
        figure = canvas.figure
        panels = figure.subplots(1, len(rule), squeeze=False, sharex=True)[0]
        for axes, task in zip(panels, rule, strict=True):
            of_task = [row for row in rows if row["task"] == task]
            for place, (which, name) in enumerate(names.items()):
                _line(axes, [row for row in of_task if row["which"] == which], place, name)
            for style, which in zip((DASHED, ":"), _BASELINES, strict=True):
                for row in of_task:
                    if row["which"] == which:
                        axes.axhline(100 * row["gain"], color=MUTED, lw=1, ls=style, label=_BASELINES[which])
            axes.set(xscale="log", xlabel="trained values", title=TASKS[task].title)
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_locator(NullLocator())
            quiet_grid(axes)
        panels[0].set_ylabel("points above the linear probe")
        handles = dict(pair[::-1] for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)

    return draw("frontier", "Gain over the probe by trained values", "", 3.0, paint, rows)


def _line(axes: Axes, rows: Sequence[dict[str, object]], place: int, name: str) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row["trained_values"])
    gain = [100 * row["gain"] for row in rows]
    half = [0.0 if row["high"] is None else 100 * (row["high"] - row["gain"]) for row in rows]
    look = {"fmt": f"{MARKERS[place]}-", "color": LINE_COLORS[place], "mec": PAPER, "mew": 0.5, "ms": 5}
    x = [row["trained_values"] * 1.04 ** (place - 1.5) for row in rows]  # beside one another: intervals are seen
    axes.errorbar(x, gain, yerr=half, lw=1.2, elinewidth=1.0, label=name, **look)


def caption(found: Sequence[Sentence], runs: pd.DataFrame) -> str:
    """Return what the figure's points and bars are, and over how many seeds."""
    rows = [row for row in means(runs, {one.task: one.rule for one in found}) if row["ranks"] is not None]
    of_task = []
    for task in dict.fromkeys(row["task"] for row in rows):
        by_seeds: dict[object, dict[int, None]] = {}  # an ordered set each
        for row in sorted((row for row in rows if row["task"] == task), key=lambda row: row["ranks"]):
            by_seeds.setdefault(row["seeds"], {})[row["ranks"]] = None
        parts = [f"{n} seeds ({joined([str(one) for one in ranks])} ranks)" for n, ranks in by_seeds.items()]
        of_task.append(f"{TASKS[task].title} {', '.join(parts)}")
    return (
        "Points are gains over the probe of the same seed, bars their 95 % intervals (Student's t), over the seeds "
        f"that all four and the probe have: {'; '.join(of_task)}. The table has all runs. Studies asked later are not "
        "drawn: their seeds have no probe."
    )


def text_alternative(found: Sequence[Sentence], runs: pd.DataFrame) -> str:
    """Return what the figure shows at the first budget that was tested, for those who don't see it."""
    rows = means(runs, {one.task: one.rule for one in found})
    names = {"rule": found[0].rule, **_SHOWN, "lora_r8": _BASELINES["lora_r8"]}
    said = []
    for task in dict.fromkeys(one.task for one in found):
        of_task = [row for row in rows if row["task"] == task]
        if all(row["ranks"] is None for row in of_task):  # no seed has a probe
            continue
        budget = min((row["ranks"] for row in of_task if row["ranks"] is not None), key=SEQUENCE.index)
        gains = {row["which"]: 100 * row["gain"] for row in of_task if row["ranks"] in (budget, None)}
        parts = [f"{name} {fixed(gains[which], 1)}" for which, name in names.items() if which in gains]
        said.append(f"{TASKS[task].title}, {budget} ranks: {', '.join(parts)}")
    return f"A panel a task, points of test accuracy above the linear probe, by trained values. {'. '.join(said)}"
