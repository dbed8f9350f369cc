"""Where few ranks should go: what the screening of rules chose, and what the studies that follow say.

    .venv/bin/python -m experiments.ranks.scripts.frontier length [DIR ...]
    .venv/bin/python -m experiments.ranks.scripts.frontier task [DIR ...]
    .venv/bin/python -m experiments.ranks.scripts.frontier screen [DIR ...]
    .venv/bin/python -m experiments.ranks.scripts.frontier more
    .venv/bin/python -m experiments.ranks.scripts.frontier study [results/frontier_screening.csv]
    .venv/bin/python -m experiments.ranks.scripts.frontier figure [DIR ...]

`length` keeps the runs of frontier_length_* in results/frontier_length.csv, and prints which length and batch their
rule takes; `task` those of frontier_task_* and frontier_rates_* in results/frontier_task.csv, and whether ELPV is a
task after all, and at which rates. `screen` keeps the runs of frontier_screening_* in results/frontier_screening.csv,
one row a run without its test accuracy, and prints what the rule of screening.yaml says of them. `more` prints the
rounds that the rule asks for besides, `study` writes the configurations of the studies once it has all.
`figure` keeps the studies' runs in results/frontier.csv, draws docs/images/frontier.svg, and prints the numbers beside
it. What is printed goes where marks in docs/adaptive_ranks.md ask for it. Without a DIR the same comes from
the files that are there.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.methods.scripts.study_evidence import chosen_rates, method_of, pilot_row, rate_means
from experiments.methods.scripts.study_figures import write_figure
from experiments.methods.scripts.study_tables import pilot_table
from experiments.ranks.scripts import frontier_configs as configs
from experiments.ranks.scripts.frontier_configs import CONTROLS, SCREENED, TASKS, Asked, Picks
from experiments.ranks.scripts.frontier_figure import (
    ASKED_AFTER,
    LEAST_ROOM,
    NOTE,
    Sentence,
    asked_after,
    caption,
    drawing,
    in_words,
    not_shown,
    sentence_table,
    sentences,
    text_alternative,
)
from experiments.scripts import evidence
from experiments.scripts.evidence import table, with_runs
from peft_vit import cli
from peft_vit.base.errors import UserError
from peft_vit.base.files import write_atomically
from peft_vit.core.config import MATRICES
from peft_vit.core.records import RunRecord

SCORING = ("eva", "gradient", "spt", "gora", "stable_rank", "para", "over_untrained")
SCREENING_SEEDS = (220, 221, 224, 225)  # the first two screen; all of them choose a rate among the best two
RESULTS, DOCS = configs.FOLDER / "results", configs.FOLDER / "docs"
SCREENING_ROWS, ROWS = RESULTS / "frontier_screening.csv", RESULTS / "frontier.csv"
DOCUMENT, FIGURE = DOCS / "adaptive_ranks.md", DOCS / "images" / "frontier.svg"
_OF_SCREENING = re.compile(rf"frontier_screening_({'|'.join(SCREENED)})(?:_\d+)?")
LENGTH_ROWS = RESULTS / "frontier_length.csv"
_PILOTED = {task: TASKS[task].title for task in ("elpv", *SCREENED)}
_OF_LENGTH = re.compile(rf"frontier_length_({'|'.join(_PILOTED)})")
TASK_ROWS = RESULTS / "frontier_task.csv"
_OF_TASK = re.compile(r"frontier_(task_elpv_\d+|rates_elpv)(?:_\d)?")
_RATES = "rates_elpv"  # of these runs the task of those that choose rates of few ranks
_OF_STUDY = re.compile(rf"frontier_({'|'.join(TASKS)})(?:_(?:\d+|{configs.EVEN_DEPTHS}))?")
_OF_SITES = re.compile(r"(.+)_(\d+)")  # eva_9, not lora_r8


# --- records to rows --------------------------------------------------------------------------------------------------


def keep(folder: Path, file: Path, of: re.Pattern[str], row: Callable[[RunRecord], dict[str, object]]) -> None:
    """Put the runs below a directory into a file of results/.

    Raises:
        UserError: as `with_runs`, or if a seed has other images than it has in the file.
    """
    text = with_runs(folder, file, of, row)
    kept = _with_task(pd.read_csv(io.StringIO(text)), of)
    if "split" in kept and kept.groupby(["task", "seed"]).split.nunique().max() > 1:
        raise UserError("runs of one seed have other images than runs of that seed that are kept", file=folder)
    write_atomically(file, text.encode())


def study_row(record: RunRecord) -> dict[str, object]:
    """Return what is kept of a run of the studies."""
    return evidence.row_of(record, _adapter_values)


def _adapter_values(record: RunRecord) -> dict[str, object]:
    """Return what the ranks of the end have in trained values, in a run that returned the probe, too, and the peak."""
    assert record.parameters is not None
    values = record.parameters.final - record.parameters.head
    if record.rank_history:
        values_of_a_rank = {one.name: one.in_features + one.out_features for one in record.sites}
        values = sum(rank * values_of_a_rank[name] for name, rank in record.rank_history[-1].ranks.items())
    return {
        "adapter_values": values,
        "peak_values": record.parameters.peak - record.parameters.head,
        "chosen_step": record.chosen_step,
    }


def read(file: Path, of: re.Pattern[str]) -> pd.DataFrame:
    """Return the rows of a file, and beside each its task and its method, which of the screening is without the rate.

    Raises:
        UserError: if there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise UserError("is not there yet; name the directory of the runs", file=file)
    try:
        runs = pd.read_csv(file)
    except ValueError:
        runs = pd.DataFrame()
    if not {*evidence.KEY} <= {*runs} or runs.study.astype(str).map(of.fullmatch).isna().any():
        studies = of.pattern.partition("(")[0]
        raise UserError(f"expected a table of runs of {studies}*; let this script write it", file=file)
    return _with_task(runs, of)


def _with_task(runs: pd.DataFrame, of: re.Pattern[str]) -> pd.DataFrame:
    task = runs.study.str.extract(of, expand=True)[0]
    runs = runs.assign(task=task, method=runs.experiment.map(method_of))
    return runs.drop_duplicates(["task", "experiment", "seed"], keep="last")  # two files of a screening may ask for it


# --- how long a run is ------------------------------------------------------------------------------------------------


def lengths(runs: pd.DataFrame) -> pd.DataFrame:
    """Return mean validation accuracy in percent at the better rate: a row a length, a column a task and method.

    Rows are in the order of the images that a run trains on, and of equal ones of the steps.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for task in _PILOTED:
        for row in rate_means(runs[runs.task == task]).itertuples():
            method, _, length = str(row.method).rpartition("_")
            best = found.setdefault((task, method), {})
            best[length] = max(best.get(length, 0.0), 100 * float(row.validation_accuracy))  # type: ignore[arg-type]
    by = pd.DataFrame(found)
    return by.loc[sorted(by.index, key=lambda one: (_images(one), int(one.partition("x")[0])))]


def _images(length: str) -> int:
    steps, batch = length.split("x")
    return int(steps) * int(batch)


def chosen_length(by: pd.DataFrame) -> str:
    """Return the length that trains on the fewest images among those within half a point of the best mean."""
    means = by.mean(axis=1).round(6)
    return str(means.index[means >= means.max() - 0.5][0])


def length_text(runs: pd.DataFrame) -> str:
    """Return what each length and batch reaches on validation, and which goes on."""
    by = lengths(runs)
    columns: dict[str, Callable[[str], str]] = {"steps x batch": str}
    for task, method in by:
        title = {"lora_r8": "LoRA r=8", "random_9": "9 ranks at random sites"}[method]
        columns[f"{_PILOTED[task]}, {title}"] = lambda length, of=(task, method): f"{by[of][length]:.1f}"
    columns["mean"] = lambda length: f"{by.loc[length].mean():.2f}"
    parts = [table(list(by.index), columns), "Validation accuracy in percent at the better of two rates."]
    for task in dict.fromkeys(task for task, _ in by):
        probe = runs[(runs.task == task) & (runs.method == "linear_probe")].validation_accuracy.mean()
        gain = by[task, "lora_r8"][chosen_length(by)] - 100 * probe
        parts.append(f"{_PILOTED[task]}: LoRA r=8 is {gain:+.1f} points above the linear probe.")
    return "\n\n".join([*parts, f"Chosen: {chosen_length(by)}.", evidence.origin(runs)])


# --- whether larger images make ELPV a task ---------------------------------------------------------------------------


def rooms(runs: pd.DataFrame) -> pd.DataFrame:
    """Return what LoRA r=8 gains on the probe on validation, a row a setting at its better rate, the cheapest first.

    Columns: pixels, length (steps x batch), rate, accuracy and probe in percent, gain in points, seconds of a run.
    """
    found = []
    for task, part in runs[runs.task != _RATES].groupby("task"):
        probe = 100 * part[part.method == "linear_probe"].validation_accuracy.mean()
        means = rate_means(part).set_index(["method", "learning_rate"]).validation_accuracy
        for method, rate in chosen_rates(part).items():
            accuracy = 100 * float(means[method, rate])
            found.append(
                {
                    "pixels": int(str(task).rpartition("_")[2]),
                    "length": method.rpartition("_")[2],
                    "rate": rate,
                    "accuracy": accuracy,
                    "probe": probe,
                    "gain": round(accuracy - probe, 3),
                    "seconds": part[(part.method == method) & (part.learning_rate == rate)].seconds.mean(),
                }
            )
    return pd.DataFrame(found).sort_values("seconds", ignore_index=True)


def task_text(runs: pd.DataFrame) -> str:
    """Return what LoRA gains by images and length, and which setting takes ELPV's place in the screening."""
    by = rooms(runs)
    columns: dict[str, Callable[[dict], str]] = {
        "pixels": lambda row: str(row["pixels"]),
        "steps x batch": lambda row: row["length"],
        "rate": lambda row: f"{row['rate']:g}",
        "LoRA r=8, %": lambda row: f"{row['accuracy']:.2f}",
        "linear probe, %": lambda row: f"{row['probe']:.2f}",
        "gain, points": lambda row: f"{row['gain']:+.2f}",
        "seconds a run": lambda row: f"{row['seconds']:.0f}",
    }
    enough = by[by.gain >= LEAST_ROOM]
    planned = {_OF_TASK.fullmatch(path.stem)[1] for path in configs.CONFIGS.glob("frontier_task_*.yaml")}
    of_rates = runs[runs.task == _RATES]
    if len(enough):
        first = f"{enough.pixels.iloc[0]} pixels, {enough.length.iloc[0]}"
    elif lacking := sorted(planned - {*runs.task}):
        first = f"none so far, {', '.join(lacking)} is not run yet"
    else:
        first = "none, so ELPV decides nothing about ranks"
    verdict = f"At least {LEAST_ROOM:g} points: {first}."
    parts = [table(by.to_dict("records"), columns, left=0), "Validation accuracy, mean of two seeds.", verdict]
    if not of_rates.empty:
        parts += [
            "Nine ranks there, by learning rate:",
            pilot_table(of_rates, rate_means(of_rates), chosen_rates(of_rates)),
        ]
    return "\n\n".join((*parts, evidence.origin(runs)))


# --- the screening's rule ---------------------------------------------------------------------------------------------


def _first(runs: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each task with the runs of the seeds that screen."""
    for task in SCREENED:
        part = runs[(runs.task == task) & runs.seed.isin(SCREENING_SEEDS[:2])]
        if not part.learning_rate.dropna().empty:
            yield task, part


def gains(runs: pd.DataFrame, chosen: Mapping[tuple[str, str], float] | None = None) -> pd.DataFrame:
    """Return points of validation accuracy above `random`: a row a rule, a column a task and budget, each at its rate.

    Rows are in the order of the configurations; a failed run counts as the majority class.

    Args:
        runs: of the screening.
        chosen: rates by task and method, with all their seeds; None: the best rates of the seeds that screen.
    """
    found: dict[tuple[str, int], dict[str, float]] = {}
    for task, part in _first(runs):
        of_task = part if chosen is None else runs[(runs.task == task) & runs.seed.isin(SCREENING_SEEDS)]
        means = rate_means(of_task).set_index(["method", "learning_rate"]).validation_accuracy
        best = chosen_rates(part)
        for method in dict.fromkeys(part.method):
            said = _OF_SITES.fullmatch(method)
            if said is not None and int(said[2]) in configs.SCREENED_BUDGETS:
                rate = best[method] if chosen is None else chosen[task, method]
                found.setdefault((task, int(said[2])), {})[said[1]] = 100 * means[method, rate]
    accuracy = pd.DataFrame(found).reindex([*SCORING, *CONTROLS, *MATRICES])
    return accuracy - accuracy.loc["random"]


def ranked(by: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """Return some rules, the one with the best mean gain first."""
    means = by.loc[list(names)].mean(axis=1).round(6)  # equal shares of whole images stay equal
    return list(means.sort_values(ascending=False, kind="stable").index)


def rates(runs: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Return the rate of each task and method: the best of the list; where the best two have all seeds, of these."""
    found: dict[tuple[str, str], float] = {}
    for task, part in _first(runs):
        best, second = _best_two(part)
        of_task = runs[(runs.task == task) & runs.seed.isin(SCREENING_SEEDS)]
        of_two = of_task[
            (of_task.learning_rate == of_task.method.map(best)) | (of_task.learning_rate == of_task.method.map(second))
        ]
        whole = of_two.groupby("method").filter(lambda one: len(one) == 2 * len(SCREENING_SEEDS))
        found |= {(task, name): rate for name, rate in (best | chosen_rates(whole)).items()}
    return found


def _best_two(part: pd.DataFrame) -> tuple[dict[str, float], dict[str, float]]:
    """Return the best rate of each method of a task by the seeds that screen, and the second best."""
    best = chosen_rates(part)
    return best, chosen_rates(part[part.learning_rate != part.method.map(best)])


def missing(runs: pd.DataFrame) -> dict[str, list[tuple[str, int]]]:
    """Return by task what was planned, or begun at a further rate, and is not there: experiment and seed."""
    found = {}
    for task in SCREENED:
        done = runs[runs.task == task]
        planned = configs.screened_names(task)
        begun = done.experiment[done.study != f"frontier_screening_{task}"]
        there = set(zip(done.experiment, done.seed, strict=True))
        wanted = {(name, seed): None for name in (*planned, *begun) for seed in SCREENING_SEEDS[:2]}
        found[task] = [one for one in wanted if one not in there]
    return found


def ends(runs: pd.DataFrame) -> list[Asked]:
    """Return the next half decade of every method whose best rate is an end of those that were tried."""
    found = []
    for task, part in _first(runs):
        tried = part.groupby("method").learning_rate.agg(["min", "max"])
        for method, rate in chosen_rates(part).items():
            if rate == tried["max"][method] or rate == tried["min"][method]:
                found.append(Asked(task, method, next_rate(rate, up=rate == tried["max"][method]), SCREENING_SEEDS[:2]))
    return found


def next_rate(rate: float, *, up: bool) -> float:
    """Return the next rate of the list 1e-3, 3e-3, 1e-2, ... above or below one of it."""
    digit, exponent = f"{rate:.0e}".split("e")
    step = int(exponent) + (up if digit == "3" else up - 1)
    return float(f"{1 if digit == '3' else 3}e{step}")


def goes_on(runs: pd.DataFrame) -> tuple[tuple[str, ...], str]:
    """Return the three rules that score with the best means, the best one first, and the best kind of matrix."""
    by = gains(runs)
    return tuple(ranked(by, SCORING)[:3]), ranked(by, MATRICES)[0]


def again(runs: pd.DataFrame) -> list[Asked]:
    """Return what goes on, as far as it is not there: its best two rates with further seeds, rates at other budgets.

    Those are 288 ranks, and for what was asked later as many trained values as nine ranks have, for the controls of
    the sentences, and nine ranks spread over many depths.
    """
    rules, kind = goes_on(runs)
    on = (*rules, *CONTROLS, kind)
    later = [*(f"{who}_{configs.VALUES}" for who in configs.SENTENCES), f"{configs.EVEN_DEPTHS}_{configs.SEQUENCE[0]}"]
    names = [*(f"{rule}_{budget}" for budget in configs.SCREENED_BUDGETS for rule in on), *later]
    there = set(zip(runs.task, runs.method, runs.learning_rate, runs.seed, strict=True))
    found = []
    for task, part in _first(runs):
        wanted = [
            Asked(task, name, rate, SCREENING_SEEDS[2:])
            for two in _best_two(part)
            for name, rate in two.items()
            if name in ("lora_r8", *names)
        ]
        many = configs.RATE_BUDGETS[max(configs.BUDGETS)]  # 8 a site that gets some, so rates are chosen anew
        tried = sorted(part[part.study == f"frontier_screening_{task}"].learning_rate.dropna().unique())
        anew = [*(f"{rule}_{many}" for rule in on), *later]
        wanted += [Asked(task, name, float(rate), SCREENING_SEEDS[:2]) for name in anew for rate in tried]
        found += [one for one in wanted if any((task, one.method, one.rate, seed) not in there for seed in one.seeds)]
    return found


def picks(runs: pd.DataFrame) -> Picks:
    """Return what goes on to the studies.

    Raises:
        UserError: if the rule asks for runs that are not there.
    """
    lacking = [run for found in missing(runs).values() for run in found]
    asked = {"of the screening": lacking, "beyond an end": ends(runs), "of further seeds": again(runs)}
    for what, found in asked.items():
        if found:
            raise UserError(
                f"{len(found)} runs or rates {what} are missing, so the rule can't choose yet; "
                "`frontier.py screen` names them, `frontier.py more` the rounds that come after",
                file=SCREENING_ROWS,
            )
    rules, kind = goes_on(runs)
    chosen = rates(runs)
    by = gains(runs[runs.method.str.rpartition("_")[0].isin(["random", *rules])], chosen)
    return Picks(tuple(ranked(by, rules)[:2]), kind, chosen)


# --- tables of the screening ------------------------------------------------------------------------------------------


def screening_text(runs: pd.DataFrame) -> str:
    """Return what there is of the screening, what it chose, and what the rule asks for besides."""
    by, chosen, (rules, kind) = gains(runs), rates(runs), goes_on(runs)
    on = (*rules, kind, *CONTROLS)
    by_all_seeds = gains(runs, chosen) if not again(runs) else None

    def cell(name: str, of: tuple[str, int]) -> str:
        rate = chosen.get((of[0], f"{name}_{of[1]}"))
        return "–" if rate is None or pd.isna(by[of][name]) else f"{by[of][name]:+.1f} ({rate:g})"

    columns: dict[str, Callable[[str], str]] = {"rule or control": lambda name: f"`{name}`"}
    columns["mean"] = lambda name: f"{by.loc[name].mean():+.2f}"
    if by_all_seeds is not None:
        of_all = by_all_seeds.mean(axis=1)
        columns[f"mean, {len(SCREENING_SEEDS)} seeds"] = lambda name: f"{of_all[name]:+.2f}" if name in on else "–"
    columns |= {f"{TASKS[of[0]].title}, {of[1]} ranks": partial(cell, of=of) for of in by}
    columns["goes on"] = lambda name: "yes" if name in on else ""
    told = [name for group in (SCORING, CONTROLS, MATRICES) for name in ranked(by, group)]
    note = (
        "Points of validation accuracy above `random`, seeds 220 and 221, at the best learning rate by these, and in "
        "brackets the rate that goes on: of what has four seeds the best by all of them. By the mean of all four seeds "
        "two rules become studies. In the tables by rate bold is the best one by the first two seeds."
    )
    parts = [_what_there_is(runs), table(told, columns), note]
    for task, part in _first(runs):
        parts.append(f"{TASKS[task].title}. {_lora_above_probe(part)}")
        parts.append(pilot_table(part, rate_means(part), chosen_rates(part)))
    parts.append(f"Best at an end, so the next half decade is due: {_listed(ends(runs))}.")
    parts.append(f"Of what goes on further seeds or rates are due: {_listed(again(runs))}.")
    return "\n\n".join(parts)


def _what_there_is(runs: pd.DataFrame) -> str:
    lines = []
    for task, absent in missing(runs).items():
        done = runs[runs.task == task]
        failed = (done.status != "done").sum()
        few = ", ".join(f"{name} seed {seed}" for name, seed in absent[:3])
        so = f", such as {few}: what follows may change" if absent else ""
        lines.append(f"- {TASKS[task].title}: {len(done)} runs, {failed} of them failed; {len(absent)} missing{so}.")
    return "\n".join(lines)


def _lora_above_probe(part: pd.DataFrame) -> str:
    best = rate_means(part.fillna({"learning_rate": 0.0})).groupby("method").validation_accuracy.max()
    gain = 100 * (best.get("lora_r8", float("nan")) - best.get("linear_probe", float("nan")))
    return f"On validation LoRA r=8 is {gain:+.1f} points above the linear probe."


def _listed(asked: Sequence[Asked]) -> str:
    found: dict[str, list[str]] = {}
    for one in asked:
        found.setdefault(f"{one.task} `{one.method}`", []).append(f"{one.rate:g}")
    return "; ".join(f"{name} {' and '.join(tried)}" for name, tried in found.items()) or "none"


# --- commands ---------------------------------------------------------------------------------------------------------


def further_runs(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rounds that the rule asks for next, as screening.yaml holds them: rates beyond ends, then seeds.

    Raises:
        UserError: if runs that were planned before are missing.
    """
    if absent := [run for found in missing(runs).values() for run in found]:
        raise UserError(f"{len(absent)} runs that were planned are missing; finish them first", file=SCREENING_ROWS)
    numbers = runs.study.str.extract(r"_(\d+)$")[0].fillna("1").astype(int).groupby(runs.task).max()
    return configs.further_runs(ends(runs) or again(runs), numbers.to_dict())


def write_studies(chosen: Picks, folder: Path, found: Sequence[Sentence] = ()) -> None:
    """Write the studies' configurations: by task one a budget, one of what they lie between, two asked later.

    Args:
        chosen: by the screening.
        folder: that they go to.
        found: what the studies say so far; after a budget that is not shown the next ones only describe.
    """
    for task in SCREENED:
        configs.write(folder, *configs.references(task, chosen))
        configs.write(folder, *configs.equal_values(task, chosen))
        configs.write(folder, *configs.even_depths(task, chosen))
        for budget in configs.SEQUENCE:
            tested = not_shown(found, task, before=budget) is None
            configs.write(folder, *configs.study(task, budget, chosen, tested=tested))


def blocks(found: Sequence[Sentence], runs: pd.DataFrame) -> dict[str, str]:
    """Return the figure and the numbers of the studies by the name of their marks."""
    image = f"![{text_alternative(found, runs)}](images/{FIGURE.name})"
    made = {"frontier": "\n\n".join((image, caption(found, runs), in_words(found, runs), sentence_table(found), NOTE))}
    for name, suffix in ASKED_AFTER.items():
        if later := asked_after(runs, suffix):
            made[name] = sentence_table(later)
    return made


def tell(made: dict[str, str]) -> None:
    """Print generated parts, and put them into the document where its marks ask for them."""
    print("\n\n".join(made.values()))
    text = DOCUMENT.read_text(encoding="utf-8")
    if (new := evidence.filled(text, made)) != text:
        write_atomically(DOCUMENT, new.encode())
        print(DOCUMENT)


def main(arguments: list[str] | None = None) -> None:
    """Do what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["length", "task", "screen", "more", "study", "figure"])
    parser.add_argument("paths", nargs="*", type=Path, help="directories of runs; of study: the screening's rows")
    parser.add_argument("--output", type=Path, help="where configurations go that are written; default: the project's")
    asked = parser.parse_args(arguments)
    most = {"more": 0, "study": 1}.get(asked.what, len(asked.paths))
    if len(asked.paths) > most:
        parser.error(f"{asked.what} takes {most or 'no'} path")
    if asked.output and asked.what != "study":
        parser.error(f"--output has no effect with {asked.what}")
    output = asked.output or configs.CONFIGS
    with cli.user_errors():
        if asked.what == "study":
            chosen = picks(read(asked.paths[0] if asked.paths else SCREENING_ROWS, _OF_SCREENING))
            write_studies(chosen, output, sentences(read(ROWS, _OF_STUDY)) if ROWS.is_file() else [])
        elif asked.what == "length":
            for folder in asked.paths:
                keep(folder, LENGTH_ROWS, _OF_LENGTH, pilot_row)
            tell({"frontier_length": length_text(read(LENGTH_ROWS, _OF_LENGTH))})
        elif asked.what == "task":
            for folder in asked.paths:
                keep(folder, TASK_ROWS, _OF_TASK, pilot_row)
            tell({"frontier_task": task_text(read(TASK_ROWS, _OF_TASK))})
        elif asked.what == "figure":
            for folder in asked.paths:
                keep(folder, ROWS, _OF_STUDY, study_row)
            runs = read(ROWS, _OF_STUDY)
            found = sentences(runs)
            write_figure(FIGURE, drawing(runs, found))
            tell(blocks(found, runs))
        else:
            for folder in asked.paths:
                keep(folder, SCREENING_ROWS, _OF_SCREENING, pilot_row)
            runs = read(SCREENING_ROWS, _OF_SCREENING)
            if asked.what == "more":
                for one in further_runs(runs):
                    print(one)
            else:
                tell({"frontier_screening": screening_text(runs)})


if __name__ == "__main__":
    main()
