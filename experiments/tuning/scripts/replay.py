"""What the project's studies would have taken had their comparisons stopped: kept results again, in the order of seeds.

    .venv/bin/python -m experiments.tuning.scripts.replay

Differences to LoRA r=8 go through looks as `stopping/until_decided.py` would have done them; runs count until a
comparison stops, those of the control as long as one is open. Verdicts stand beside those of the same questions asked
once, after all seeds. Of the study of learning rates those experiments are taken that ran all twenty seeds. The table
goes to docs/stopping.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.methods.scripts.study_evidence import kept_studies, unpacked
from experiments.methods.scripts.study_tables import DESCRIPTIVE, SHORT
from experiments.scripts.evidence import EXPERIMENTS, run, table
from experiments.stopping.comparisons import paired
from experiments.stopping.sequential import Asked, SequentialResult, StoppingRule, follow
from experiments.stopping.spending import Spending
from peft_vit.base.errors import UserError
from peft_vit.lab.analysis import load_studies

DOCUMENT = EXPERIMENTS / "tuning" / "docs" / "stopping.md"
RATES = "learning_rates_fresh_seeds"
MARGIN = 0.01
LOOKS = {10: (4, 6, 8, 10), 20: (5, 10, 15, 20)}  # by the number of seeds
ASKED: tuple[Asked, ...] = ("superiority", "non-inferiority", "both")
FORMS: tuple[Spending, ...] = ("obrien-fleming", "pocock")

Differences = Mapping[str, Sequence[float]]  # by experiment, in the order of the seeds


@dataclass(frozen=True)
class Replay:
    """One study under one rule; `fixed` are the courses of the same questions asked once, at the end."""

    study: str
    asked: str
    form: str
    fixed: tuple[SequentialResult, ...]
    looked: tuple[SequentialResult, ...]
    seeds: int

    @property
    def share(self) -> float:
        """Return the share of runs that are done, the control's included."""
        taken = [course.looks[-1].pairs for course in self.looked]
        return (sum(taken) + max(taken)) / (self.seeds * (len(taken) + 1))

    def verdicts(self, word: str) -> int:
        """Return how many answers of the fixed design have this verdict."""
        return sum(verdict == word for course in self.fixed for verdict in answers(course))

    def changed(self, before: str, now: str) -> int:
        """Return how many answers have another verdict than in the fixed design."""
        pairs = zip(self.fixed, self.looked, strict=True)
        return sum(
            (old, new) == (before, now)
            for one, other in pairs
            for old, new in zip(answers(one), answers(other), strict=True)
        )

    @property
    def lost(self) -> int:
        """Return how many answers are not given any more."""
        return self.changed("supported", "not decided") + self.changed("refuted", "not decided")

    @property
    def gained(self) -> int:
        """Return how many answers are given that the fixed design does not give."""
        return self.changed("not decided", "supported") + self.changed("not decided", "refuted")

    @property
    def reversed(self) -> int:
        """Return how many answers are the opposite."""
        return self.changed("supported", "refuted") + self.changed("refuted", "supported")


def answers(course: SequentialResult) -> list[str]:
    """Return the verdicts on what was asked."""
    return [verdict for verdict in (course.noninferiority, course.superiority) if verdict is not None]


def replays(study: str, differences: Differences) -> Iterator[Replay]:
    """Yield a study under every rule."""
    (seeds,) = {len(values) for values in differences.values()}
    for asked in ASKED:
        fixed = follow(differences, StoppingRule(asked, MARGIN, (seeds,)))
        for form in FORMS:
            looked = follow(differences, StoppingRule(asked, MARGIN, LOOKS[seeds], form=form))
            yield Replay(study, asked, form, fixed, looked, seeds)


def of_records(name: str) -> Differences:
    """Return the differences of a study whose records are kept."""
    with unpacked(name) as folder:
        (study,) = load_studies(folder)
    (planned,) = study.plan.folders
    assert planned.file is not None
    configuration, control = planned.file.configuration, "lora_r8"
    others = [one.name for one in configuration.experiments if one.name != control]
    return {name: list(paired(study, configuration.seeds, name, control).values()) for name in others}


def of_rates() -> Differences:
    """Return the differences of the experiments that ran all seeds of the study of learning rates."""
    rows = pd.read_csv(EXPERIMENTS / "learning_rates" / "results" / f"{RATES}.csv")
    accuracy = rows.pivot(index="seed", columns="experiment", values="test_accuracy").dropna(axis="columns")
    control = accuracy.pop("lora_r8_lr_1e3")
    return {str(name): [round(one, 12) for one in accuracy[name] - control] for name in accuracy}


def table_of(found: Sequence[Replay]) -> str:
    """Return one row a study and rule as Markdown."""
    columns: dict[str, Callable[[Replay], str]] = {
        "study": lambda one: f"{one.study}, {len(one.fixed) + 1} x {one.seeds}",
        "asked": lambda one: one.asked,
        "bounds": lambda one: one.form,
        "after all seeds: yes / no / open": lambda one: " / ".join(
            str(one.verdicts(word)) for word in ("supported", "refuted", "not decided")
        ),
        "lost": lambda one: str(one.lost),
        "gained": lambda one: str(one.gained),
        "reversed": lambda one: str(one.reversed),
        "runs": lambda one: f"{100 * one.share:.0f} %",
    }
    return table(found, columns, left=3)


def tables() -> dict[str, str]:
    """Return the table of all kept studies by the name of its marks."""
    found = {SHORT[name]: of_records(name) for name in kept_studies() if name != DESCRIPTIVE}
    found["learning rates"] = of_rates()
    return {"stopping-replay": table_of([one for study in found for one in replays(study, found[study])])}


def keep(results_dir: Path) -> None:
    """Refuse records: those of the studies are kept by study_evidence.py."""
    raise UserError("takes no records; study_evidence.py keeps those of the studies", file=results_dir)


if __name__ == "__main__":
    run(__doc__, keep, tables, DOCUMENT)
