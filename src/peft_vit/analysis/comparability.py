"""What must be equal before numbers of several studies are pooled, and what differs, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, Literal, get_args

from peft_vit.analysis.studies import Run
from peft_vit.errors import UserError

PoolKind = Literal["configurations", "precision", "versions", "splits", "weights", "timings"]
POOL_KINDS: tuple[PoolKind, ...] = get_args(PoolKind)

RunsOf = Mapping[str, Sequence[Run]]  # by the label of the study
_MOST_NAMED = 4  # differences in one line


@dataclass(frozen=True)
class Refusal:
    """Something that was not pooled."""

    kind: PoolKind  # what differs, as `--allow-mismatch` names it
    experiments: tuple[str, ...]  # of which nothing was pooled for that reason
    studies: tuple[str, ...]  # in which they would have been
    reason: str  # what differs, in words


def parse_pool(text: str, option: str) -> frozenset[PoolKind]:
    """Return what may be pooled although it differs, from ``versions,timings``.

    Raises:
        UserError: for a name that is none of POOL_KINDS; names the option.
    """
    asked = [part.strip() for part in text.split(",")] if text else []
    unknown = [name for name in asked if name not in POOL_KINDS]
    if unknown:
        problem = f"{unknown[0]!r} is none of {', '.join(POOL_KINDS)}; name what may be pooled, with commas between"
        raise UserError(problem, field=option)
    return frozenset(kind for kind in POOL_KINDS if kind in asked)


def hardware(run: Run) -> str:
    """Return what a run's times depend on, in words."""
    made = run.provenance
    return f"{made.device} on {made.processor}, {made.cpu_count} processors, {made.threads} threads"


def difference(kind: PoolKind, runs_of: RunsOf) -> str | None:
    """Return what differs between the runs of several studies, in words; None if nothing of the kind does.

    Data sets and backbones may differ, since that is what studies are compared over. Splits differ if two studies
    take the same images and divide them otherwise: then test images of one may have trained the other. Seeds of one
    study may divide them otherwise (`train_subset` or `test_split: per_seed`), so what is compared are the seeds that
    both have.
    """
    found = list(_DIFFERENCES[kind](runs_of))
    return _few(found) if found else None


def _few(texts: Sequence[str]) -> str:
    more = f"; {len(texts) - _MOST_NAMED} more" if len(texts) > _MOST_NAMED else ""
    return "; ".join(texts[:_MOST_NAMED]) + more


def _among(runs_of: RunsOf, value: Callable[[Run], str], name: str = "") -> Iterator[str]:
    """Yield in one text the values and the studies that have them, below a name, if they are not all the same."""
    studies_with: dict[str, list[str]] = {}
    for label, runs in runs_of.items():
        for text in sorted({value(run) for run in runs}):
            studies_with.setdefault(text, []).append(label)
    if len(studies_with) > 1:
        each = [f"{text} in {' and '.join(labels)}" for text, labels in sorted(studies_with.items())]
        yield name + _few(each)


def _versions(runs_of: RunsOf) -> Iterator[str]:
    for name in sorted({name for runs in runs_of.values() for run in runs for name in run.provenance.packages}):
        yield from _among(runs_of, partial(_version, name), f"{name} ")


def _version(name: str, run: Run) -> str:
    return run.provenance.packages.get(name, "not there")


def _weights(runs_of: RunsOf) -> Iterator[str]:
    kinds = [*_among(runs_of, lambda run: f"{'random' if run.provenance.random_weights else 'pretrained'} weights")]
    if kinds:
        yield from kinds
        return
    for model in sorted({run.record.spec.backbone.model for runs in runs_of.values() for run in runs}):
        same = {
            label: [run for run in runs if run.record.spec.backbone.model == model] for label, runs in runs_of.items()
        }
        yield from _among(same, lambda run: (run.provenance.weights_sha256 or "random")[:12], f"{model} ")


def _splits(runs_of: RunsOf) -> Iterator[str]:
    for images in sorted({run.provenance.data_sha256 for runs in runs_of.values() for run in runs}):
        splits: dict[str, dict[int, str]] = {}
        for label, runs in runs_of.items():
            own = {run.seed: run.provenance.split_sha256 for run in runs if run.provenance.data_sha256 == images}
            if own:
                splits[label] = own
        for first, second in combinations(splits, 2):
            if not _same_splits(splits[first], splits[second]):
                yield f"{first} and {second} divide the same images otherwise"


def _same_splits(first: Mapping[int, str], second: Mapping[int, str]) -> bool:
    shared = first.keys() & second.keys()
    if shared:
        return all(first[seed] == second[seed] for seed in shared)
    return set(first.values()) == set(second.values())


def _configurations(runs_of: RunsOf) -> Iterator[str]:
    by_name: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for label, runs in runs_of.items():
        for run in runs:
            plain = run.experiment.model_dump(mode="json")
            # Not the flips: which ones leave a label right is the images' matter, as their split is.
            training = plain["training"]
            training["augmentation"] = [one for one in training["augmentation"] if "flip" not in one]
            known = by_name.setdefault(run.experiment.name, {}).setdefault(label, [])
            if plain not in known:
                known.append(plain)
    for name, by_study in sorted(by_name.items()):
        flat = {label: [dict(_flat(plain, "")) for plain in plains] for label, plains in by_study.items()}
        for field in sorted({field for plains in flat.values() for plain in plains for field in plain}):
            values = {label: sorted({str(p.get(field)) for p in plains}) for label, plains in flat.items()}
            if len({value for own in values.values() for value in own}) > 1:
                each = ", ".join(f"{' and '.join(own)} in {label}" for label, own in values.items())
                yield f"{name}.{field}: {each}"


def _flat(plain: Any, path: str) -> Iterable[tuple[str, Any]]:
    if isinstance(plain, dict):
        for key, value in plain.items():
            yield from _flat(value, f"{path}.{key}" if path else key)
    else:
        yield path, plain


_DIFFERENCES: dict[PoolKind, Callable[[RunsOf], Iterator[str]]] = {
    "configurations": _configurations,
    "precision": lambda runs_of: _among(runs_of, lambda run: run.record.spec.precision),
    "versions": _versions,
    "splits": _splits,
    "weights": _weights,
    "timings": lambda runs_of: _among(runs_of, hardware),
}
