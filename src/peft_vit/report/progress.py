"""What was planned of a study and is not done: which runs, why, and how to go on."""

from __future__ import annotations

from peft_vit.analysis import Study
from peft_vit.analysis.planned import STATES, UnfinishedRun, seeds_in_words
from peft_vit.analysis.studies import why_unfinished
from peft_vit.config import ExperimentConfig
from peft_vit.report.document import Block, Paragraph, Table
from peft_vit.report.formatting import joined, plain
from peft_vit.report.style import METHOD_TITLES
from peft_vit.report.tables import Column, table

_SHOWN_SETTINGS = 4


def progress(study: Study) -> tuple[Block, ...]:
    """Return what is to be said of runs that are not done; nothing if all are."""
    runs = _not_done(study)
    if not runs:
        return ()
    planned = () if study.runs else (_planned_table(study, runs),)
    return (*planned, _not_done_table(study, runs), Paragraph(_how_to_go_on(study, runs)))


def runs_fact(study: Study) -> str:
    """Return the number of runs, and into which states it adds up."""
    counts = study.counts()
    parts = [f"{n} {state}" for state, n in counts.items() if n or state in ("done", "failed")]
    what = "planned" if study.plan.is_known else "expected, every experiment with every seed that occurs,"
    return f"{sum(counts.values())} {what} = {' + '.join(parts)}"


def _not_done(study: Study) -> list[UnfinishedRun]:
    """Return every run that is not done, failed ones included, in the study's order."""
    place = {experiment.name: index for index, experiment in enumerate(study.experiments)}
    failed = [
        UnfinishedRun(record.spec.experiment.name, record.spec.seed, "failed", why_unfinished(record))
        for record in study.failed
    ]
    # Where comparisons stop, what is skipped is not needed, or not yet.
    left = [run for run in study.unfinished if run.state != "skipped" or study.stopping is None]
    runs = [*failed, *left]
    return sorted(runs, key=lambda run: (place.get(run.experiment, len(place)), run.experiment, run.seed))


def _planned_table(study: Study, runs: list[UnfinishedRun]) -> Table:
    """Return one row an experiment: its settings and what has become of its runs."""

    def own(experiment: ExperimentConfig) -> list[UnfinishedRun]:
        return [run for run in runs if run.experiment == experiment.name]

    def counts(experiment: ExperimentConfig) -> dict[str, int]:
        return {"done": 0} | {state: sum(run.state == state for run in own(experiment)) for state in STATES}

    return table(
        "planned",
        "What was planned",
        study.experiments,
        [
            Column("Experiment", "name", plain, "experiment"),
            Column("Method", lambda e: METHOD_TITLES[e.method]),
            Column("", "method"),
            Column("Settings", lambda e: plain(_settings(e))),
            Column("Seeds", lambda e: seeds_in_words([run.seed for run in own(e)]).split(" ", 1)[-1]),
            Column(
                "Runs",
                counts,
                lambda of: joined(f"{n} {state}" for state, n in of.items() if n),
                lambda of: {state.replace(" ", "_"): n for state, n in of.items()},
            ),
        ],
        "Settings that are not at their defaults; all of them stand in the configuration and in study.json.",
    )


def _settings(experiment: ExperimentConfig) -> str:
    """Return what an experiment's own section sets, training apart."""
    found = []
    for name in experiment.kind.settings:
        section = getattr(experiment, name)
        if section is not None:
            found += [f"{key} {value}" for key, value in section.model_dump(exclude_defaults=True).items()]
    more = f", and {len(found) - _SHOWN_SETTINGS} more" if len(found) > _SHOWN_SETTINGS else ""
    return joined(found[:_SHOWN_SETTINGS]) + more or "defaults"


def _not_done_table(study: Study, runs: list[UnfinishedRun]) -> Table:
    """Return one row for runs of an experiment that are in one state for one reason."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for run in runs:
        groups.setdefault((run.experiment, run.state, run.note), []).append(run.seed)
    return table(
        "not_done",
        "Runs that are not done",
        [
            {
                "Experiment": plain(experiment),
                "Seeds": seeds_in_words(seeds).split(" ", 1)[-1],
                "State": state,
                "Why, or how far": plain(note) or "–",
            }
            for (experiment, state, note), seeds in groups.items()
        ],
        None,
        f"{len(runs)} of {sum(study.counts().values())} runs. No number in this report has anything of them; "
        "tracebacks of failed runs stand under Provenance.",
        data=(
            {"experiment": run.experiment, "seed": run.seed, "state": run.state, "reason": plain(run.note)}
            for run in runs
        ),
    )


def _how_to_go_on(study: Study, runs: list[UnfinishedRun]) -> str:
    states = {run.state for run in runs}
    looks = "" if study.stopping is None else " --until-decided"
    sentences = []
    if states & {"failed", "pending", "skipped", "missing"}:
        sentences.append(
            f"To go on: peft-vit run CONFIG --output DIR{looks}, with this study's configuration file and the "
            "directory that holds its folder; it does what is not done, and tries again what has failed."
        )
    if "left out" in states:
        sentences.append(
            "For runs that are left out, first do what the notice above says; what was moved away runs again."
        )
    return " ".join([*sentences, "peft-vit status DIR says how far it is."])
