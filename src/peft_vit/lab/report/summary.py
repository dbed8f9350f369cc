"""The first page of a study's report: what was asked, what came out, how sure that is, and what it does not show."""

from __future__ import annotations

from collections.abc import Sequence

from peft_vit.base.errors import CONTROL_CHARACTER
from peft_vit.base.statistics import minimum_n_wilcoxon, proportion_interval
from peft_vit.base.statistics.descriptive import grouped
from peft_vit.base.statistics.estimates import ALPHA
from peft_vit.core.config import METHOD_KINDS, StudyConfig
from peft_vit.core.records import RunSpec
from peft_vit.core.tasks import Scores
from peft_vit.deploy.page.document import Block, Card, Paragraph, RunDetails, table
from peft_vit.deploy.page.formatting import (
    bounds_in_percent,
    count,
    counted,
    fixed,
    joined,
    megabytes,
    percent,
    plain,
    points_interval,
    score_interval,
    score_of,
)
from peft_vit.deploy.page.provenance import _distinct, caveats, run_provenance, settings
from peft_vit.lab.analysis import Analysis, Estimate, MethodResult, Study
from peft_vit.lab.analysis.comparison import validation_means
from peft_vit.lab.analysis.studies import seeds_in_words, why_unfinished
from peft_vit.runs.records.progress import RunStatus


def facts(study: Study) -> tuple[tuple[str, str], ...]:
    """Return what was asked, key and value."""
    records = [*(run.record for run in study.runs), *study.failed]
    specs: Sequence[RunSpec | StudyConfig] = [record.spec for record in records] or study.plan.configurations
    seeds = sorted({*study.seeds, *(run.seed for run in study.unfinished)})
    counts = study.counts()
    states = " + ".join(f"{n} {state}" for state, n in counts.items() if n or state in ("done", "failed"))
    what = "planned" if study.plan.configurations else "expected, every experiment with every seed that occurs,"
    rows = {
        **settings(specs, [run.record for run in study.runs], smoke=study.smoke),
        "Experiments": f"{len(study.experiments)}: {joined(e.name for e in study.experiments)}",
        "Seeds": f"{len(seeds)}: {joined(map(str, seeds))}",
        "Runs": f"{sum(counts.values())} {what} = {states}",
        "Precision": _distinct(f"{spec.precision}, {spec.threads} threads" for spec in specs),
    }
    return tuple((key, value) for key, value in rows.items() if value)


def best_on_validation(methods: Sequence[MethodResult]) -> MethodResult | None:
    """Return the experiment with the highest mean validation accuracy; the first in order among equals.

    None if there is no experiment, or one without validation images.
    """
    means = validation_means(methods)
    return max(methods, key=lambda m: means[m.name]) if methods and len(means) == len(methods) else None


def cards(methods: Sequence[MethodResult]) -> tuple[Card, ...]:
    """Return one card a method: its best experiment, chosen on validation."""
    cards = []
    for method in METHOD_KINDS:
        best = best_on_validation([m for m in methods if m.experiment.method == method])
        if best is None:
            continue
        scores, seconds = best.runs[0].scores, best.cost("seconds_per_step")
        each = joined(score_of(scores, value).removesuffix(" %") for value in best.by_seed.values())
        facts = (
            f"{counted(len(best.runs), 'seed')}: {each}{' %' if scores.metric.is_share else ''}",
            f"{count(best.final_parameters)} trainable parameters",
            f"{megabytes(best.stored_bytes)} to store",
            *([] if seconds is None else [f"{fixed(seconds, 2)} s a step"]),
        )
        reached = score_of(scores, best.test_accuracy.estimate)
        cards.append(Card(best.experiment.kind.title, best.name, reached, facts))
    return tuple(cards)


def came_out(analysis: Analysis) -> tuple[str, ...]:
    """Return computed sentences: the best on validation and its differences, the claims that were decided."""
    methods = analysis.methods
    if not methods:
        return ("No run is done yet, so there is no result.",)
    best = best_on_validation(methods)
    scores = analysis.study.scores
    if best is None or best.validation_accuracy is None:
        sentences = [
            "There is no best experiment, since without validation images only test images could choose it, "
            "and they must not."
        ]
    else:
        name = best.name
        sentences = [
            f"Best on validation: {name}, with {score_of(scores, best.validation_accuracy.estimate)} there and "
            f"{score_interval(scores, best.test_accuracy)} on test ({counted(len(best.runs), 'seed')}; in brackets "
            "the 95 % interval over seeds).",
            *(
                f"{name} minus {c.reference} on test: {points_interval(c.interval)} {scores.unit} "
                f"({counted(c.interval.n, 'pair')}): {_decided(c, scores)}."
                for c in analysis.comparisons
                if c.name == name and c.interval is not None
            ),
        ]
    if scores.metric.counts_images:
        above, total = sum(m.runs_above_majority for m in methods), sum(len(m.runs) for m in methods)
        sentences.append(
            f"{above} of {total} finished runs are more accurate than always naming the most frequent class."
        )
    return tuple(sentences)


def _decided(comparison: Estimate, scores: Scores) -> str:
    significance = comparison.significance
    if comparison.verdict != "not decided":
        words = ("less accurate", "more accurate") if scores.metric.counts_images else ("worse", "better")
        return f"{words[comparison.verdict == 'supported']} (p = {comparison.adjusted_p:.3g} after Holm's correction)"
    return "not decided" if significance is None or significance.decidable else significance.sentence()


def how_sure(analysis: Analysis) -> tuple[str, ...]:
    """Return how much of this is decided, and what limits it."""
    study = analysis.study
    if not study.runs:
        return ()
    if study.untested:
        decided = f"Nothing is decided: {study.untested}."
    else:
        tested = [c for c in analysis.findings if c.test != "none"]
        decided = (
            f"{sum(c.verdict != 'not decided' for c in tested)} of {len(tested)} tested findings are decided by these "
            f"runs ({counted(len(study.seeds), 'seed')}). A single comparison can be decided from "
            f"n = {minimum_n_wilcoxon(ALPHA)} seeds on, several at once need more."
        )
    if not study.scores.metric.counts_images:
        return (decided,)
    best = best_on_validation(analysis.methods)
    test = (study.runs[0] if best is None else study.runs_of(best.name)[0]).test
    image = proportion_interval(round(test.accuracy * test.n), test.n)
    alone = (
        f"with {test.n:,} of them one run's {percent(test.accuracy)} has a 95 % interval of "
        f"{bounds_in_percent(image)} % (Wilson). All methods share "
    )
    if not study.images_tested_by_seed:
        images = f"On top comes the choice of test images: {alone}these images, so this matters less for differences."
        return (decided, images)
    return (
        decided,
        (
            f"Each seed has its own test images, so intervals over seeds include that choice; {alone}a seed's images, "
            "so this matters less for differences."
        ),
        "An image that one seed is tested on may have been trained on or validated with another: choosing the "
        "best on mean validation accuracy has then seen some test images, through other seeds' models.",
    )


def not_shown(study: Study) -> tuple[str, ...]:
    """Return what a reader might wrongly take away."""
    if not study.runs:
        return ()
    records = [run.record for run in study.runs]
    if study.images_tested_by_seed:  # splits overlap, so they spread less than new samples: Nadeau & Bengio 2003
        images = (
            "Images beyond this data set: intervals over seeds cover which of its images are trained and tested on, "
            "but such splits overlap, so for new images they are too narrow."
        )
    else:
        drawn = any(record.spec.data.train_subset == "per_seed" for record in records)
        trained, tested = ("training images, ", "test ") if drawn else ("", "")
        values = f"{trained}initial values and orders"
        images = f"Other images: intervals over seeds describe other {values} on the same {tested}images."
    return (
        "Other data sets, other backbones, longer training: everything here comes from the one setting above.",
        "Tuned methods: each experiment ran with the one learning rate and schedule of its "
        "configuration. A method that comes out behind may only be badly tuned.",
        images,
        "Harm: an importance score is what a method decided with. No module was removed to see what that costs.",
        "Speed in general: seconds and memory are those of one machine, named under provenance.",
        *caveats(records),
    )


def progress(study: Study) -> tuple[Block, ...]:
    """Return what was planned and is not done: which runs, why, and how to continue; nothing if all are."""
    place = {experiment.name: index for index, experiment in enumerate(study.experiments)}
    runs = [*(RunStatus(r.spec.name, "failed", note=why_unfinished(r)) for r in study.failed), *study.unfinished]
    if not runs:
        return ()
    runs.sort(key=lambda run: (place.get(run.experiment, len(place)), run.experiment, run.seed))
    states = {run.state for run in runs}
    sentences = []
    if states & {"failed", "pending", "skipped", "missing"}:
        sentences.append(
            "To continue: peft-vit run CONFIG --output DIR, with this study's configuration file and the "
            "directory that holds its folder. It does what is not done, and tries again what has failed."
        )
    if "left out" in states:
        sentences.append(
            "For runs that are left out, first do what the notice above says; what was moved away runs again."
        )
    groups = grouped(((run.experiment, run.state, run.note), run.seed) for run in runs)
    not_done = table(
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
        f"{len(runs)} of {sum(study.counts().values())} runs. They are in no number of this report; tracebacks of "
        "failed runs are under Provenance.",
        data=(
            {"experiment": run.experiment, "seed": run.seed, "state": run.state, "reason": plain(run.note)}
            for run in runs
        ),
    )
    return not_done, Paragraph(" ".join([*sentences, "peft-vit status DIR says how far it is."]))


def run_details(study: Study) -> tuple[RunDetails, ...]:
    """Return the provenance of every run, finished or failed."""
    details = [run_provenance(run.record) for run in study.runs]
    for record in study.failed:
        rows = (
            ("error", plain(record.error or "")),
            ("kind", record.failure or "unknown"),
            ("attempts", str(record.attempts)),
            ("started", record.started_at),
            ("specification", record.spec_digest),
        )
        title = f"{record.spec.experiment.name}, seed {record.spec.seed}: failed"
        # Nothing of a traceback acts on a page or a terminal.
        lines = (record.traceback or "").expandtabs(4).split("\n")
        traceback = "\n".join(CONTROL_CHARACTER.sub(" ", line) for line in lines).strip()
        details.append(RunDetails(title, rows, traceback))
    return tuple(details)
