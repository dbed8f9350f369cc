"""What the studies of few ranks say: the declared comparisons by their looks, and accuracy against trained values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import frontier_configs as configs
import pandas as pd
from evidence import table
from frontier_configs import BUDGETS, SENTENCES, TASKS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from peft_vit.analysis.stopping import ENDS, repeated_interval, stopping_rule
from peft_vit.config import StudyConfig, load_study
from peft_vit.errors import UserError
from peft_vit.report.document import Drawing
from peft_vit.report.formatting import count, fixed, joined, percent, points_interval
from peft_vit.report.hover import MARKERS, HoverPoints
from peft_vit.report.scatter import short_count
from peft_vit.report.style import DASHED, LINE_COLORS, MUTED, PAPER, draw, quiet_grid
from peft_vit.statistics import Course, Interval, follow, mean_interval

_SHOWN = {"even": "even", "random": "random sites", "last_blocks": "last blocks"}  # beside the rule
_ENDS = {"linear_probe": "linear probe", "lora_r8": "LoRA r=8"}


@dataclass(frozen=True)
class Sentence:
    """ "At so many ranks the rule beats this control": what the looks say."""

    task: str
    budget: int
    rule: str
    control: str  # random, last_blocks, even
    values: float  # that the rule trains beside the head, mean over seeds
    accuracy: float  # of the rule, mean
    lead: Interval | None  # of the rule, a share, the repeated interval of the last look; None: not looked yet
    shown: bool
    state: str  # of the comparison


def sentences(runs: pd.DataFrame) -> list[Sentence]:
    """Return the registered sentences of every study that has runs, by task and budget.

    Args:
        runs: rows of the studies, with their task. Runs that failed leave a comparison open.

    Raises:
        UserError: if the configuration of a study is gone.
    """
    done = runs[runs.status == "done"]
    found = []
    for task in TASKS:
        for budget in BUDGETS:
            part = done[done.study == f"frontier_{task}_{budget}"]
            if not part.empty:
                found += _sentences(task, budget, part)
    return found


def _declared(task: str, budget: int) -> StudyConfig:
    return load_study(configs.CONFIGS / f"frontier_{task}_{budget}.yaml")


def _sentences(task: str, budget: int, runs: pd.DataFrame) -> Iterator[Sentence]:
    study = _declared(task, budget)
    stopping = study.stopping
    if stopping is None:
        raise UserError("has no section stopping, so nothing was declared", file=configs.CONFIGS / f"{study.name}.yaml")
    courses = _courses(study, runs)
    own = runs[runs.experiment == stopping.control]
    rule = stopping.control.removesuffix(f"_{budget}")
    for control in SENTENCES:
        course = courses[f"{control}_{budget}"]
        lead = _negative(repeated_interval(course.looks[-1], stopping)) if course.looks else None
        shown, state = course.superiority == "refuted", ENDS[course.stopped]
        values, accuracy = own.adapter_values.mean(), own.test_accuracy.mean()
        yield Sentence(task, budget, rule, control, values, accuracy, lead, shown, state)


def _courses(study: StudyConfig, runs: pd.DataFrame) -> Mapping[str, Course]:
    """Return the course of each comparison: experiment minus control, up to the first seed that lacks one of both."""
    stopping = study.stopping
    assert stopping is not None
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


def matters_up_to(found: Sequence[Sentence], task: str) -> int | None:
    """Return up to which budget, from the lowest on, all sentences of a task are shown; None: not at the lowest."""
    last = None
    for budget in BUDGETS:
        of_budget = [one.shown for one in found if (one.task, one.budget) == (task, budget)]
        if not of_budget or not all(of_budget):
            break
        last = budget
    return last


def in_words(found: Sequence[Sentence]) -> str:
    """Return for each task up to which budget it is shown that where ranks go matters."""
    lines = []
    for task in dict.fromkeys(one.task for one in found):
        last, rule = matters_up_to(found, task), next(one.rule for one in found if one.task == task)
        title = TASKS[task].title
        if last is None:
            lines.append(
                f"- {title}: that where ranks go matters is not shown at {BUDGETS[0]} of them, so nor at more."
            )
            continue
        values = next(one.values for one in found if (one.task, one.budget) == (task, last))
        budgets = f"{BUDGETS[0]}" if last == BUDGETS[0] else f"{BUDGETS[0]} to {last}"
        lines.append(
            f"- {title}: at {budgets} ranks (up to {count(round(values))} trained values) `{rule}` beats random sites, "
            "the last blocks and the same rank everywhere."
        )
    return "\n".join(lines)


def sentence_table(found: Sequence[Sentence]) -> str:
    """Return one row a task and budget: what the rule reaches, and by how much it leads each control."""
    rows = [one for one in found if one.control == next(iter(SENTENCES))]
    by_control = {(one.task, one.budget, one.control): one for one in found}

    def cell(row: Sentence, control: str) -> str:
        one = by_control[row.task, row.budget, control]
        if one.lead is None:
            return "not looked at yet"
        return f"{points_interval(one.lead)}, n = {one.lead.n}, {'shown' if one.shown else 'not shown'} ({one.state})"

    columns: dict[str, Callable[[Sentence], str]] = {
        "images": lambda one: TASKS[one.task].title,
        "ranks": lambda one: str(one.budget),
        "rule": lambda one: f"`{one.rule}`",
        "trained values": lambda one: count(round(one.values)),
        "test accuracy": lambda one: percent(one.accuracy),
    }
    columns |= {f"minus {what}, points": partial(cell, control=who) for who, what in SENTENCES.items()}
    note = (
        "Intervals hold over all looks and comparisons of a study (90 % and more). Means of comparisons that stopped "
        "early lie rather too far from zero. Trained values are beside the head."
    )
    return f"{table(rows, columns)}\n\n{note}"


def means(runs: pd.DataFrame, rule: Mapping[str, str]) -> list[dict[str, object]]:
    """Return a row for each point of the figure: mean test accuracy with Student's 95 % interval over its seeds.

    Args:
        runs: rows of the studies, with their task.
        rule: by task.
    """
    rows: list[dict[str, object]] = []
    done = runs[runs.status == "done"]
    for (task, experiment), part in done.groupby(["task", "experiment"], sort=False):
        name, _, budget = experiment.rpartition("_")
        which = experiment if experiment in _ENDS else name
        if which not in (*_ENDS, *_SHOWN, rule.get(task)):
            continue
        accuracy = mean_interval(part.test_accuracy)
        rows.append(
            {
                "task": task,
                "which": "rule" if which == rule.get(task) else which,
                "ranks": None if experiment in _ENDS else int(budget),
                "trained_values": float(part.adapter_values.mean()),
                "accuracy": accuracy.estimate,
                "low": accuracy.low,
                "high": accuracy.high,
                "seeds": accuracy.n,
            }
        )
    return rows


def drawing(runs: pd.DataFrame, found: Sequence[Sentence]) -> Drawing:
    """Draw accuracy against trained values, a panel a task: the rule, even, random, last blocks; probe and LoRA r=8.

    Raises:
        UserError: if no study has runs.
    """
    rule = {one.task: one.rule for one in found}
    if not rule:
        raise UserError("has no finished runs of a study at a budget, so there is nothing to draw")
    rows = means(runs, rule)
    names = {"rule": joined(sorted(set(rule.values()))), **_SHOWN}

    def paint(figure: Figure) -> HoverPoints:
        panels = figure.subplots(1, len(rule), squeeze=False, sharex=True)[0]
        for axes, task in zip(panels, rule, strict=True):
            of_task = [row for row in rows if row["task"] == task]
            for place, (which, name) in enumerate(names.items()):
                _line(axes, [row for row in of_task if row["which"] == which], place, name)
            for style, which in zip((DASHED, ":"), _ENDS, strict=True):
                for row in of_task:
                    if row["which"] == which:
                        axes.axhline(100 * row["accuracy"], color=MUTED, lw=1, ls=style, label=_ENDS[which])
            axes.set(xscale="log", xlabel="trained values", title=TASKS[task].title)
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
            axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
            axes.xaxis.set_minor_locator(NullLocator())
            quiet_grid(axes)
        panels[0].set_ylabel("test accuracy (%)")
        handles = dict(pair[::-1] for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
        return HoverPoints()

    return draw("frontier", "Accuracy against trained values", "", 3.0, paint, rows)


def _line(axes: Axes, rows: Sequence[dict[str, object]], place: int, name: str) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row["trained_values"])
    accuracy = [100 * row["accuracy"] for row in rows]
    half = [0.0 if row["high"] is None else 100 * (row["high"] - row["accuracy"]) for row in rows]
    look = {"fmt": f"{MARKERS[place]}-", "color": LINE_COLORS[place], "mec": PAPER, "mew": 0.5, "ms": 5}
    x = [row["trained_values"] * 1.04 ** (place - 1.5) for row in rows]  # beside one another: intervals are seen
    axes.errorbar(x, accuracy, yerr=half, lw=1.2, elinewidth=1.0, label=name, **look)


def text_alternative(found: Sequence[Sentence]) -> str:
    """Return what the figure shows, for those who don't see it."""
    said = []
    for task in dict.fromkeys(one.task for one in found):
        of_task = [one for one in found if one.task == task]
        first, last = of_task[0], of_task[-1]
        said.append(
            f"{TASKS[task].title}: {first.rule} has {fixed(100 * first.accuracy, 1)} % at {first.budget} ranks, "
            f"{fixed(100 * last.accuracy, 1)} % at {last.budget}"
        )
    return f"A panel a task, test accuracy against trained values. {'. '.join(said)}"
