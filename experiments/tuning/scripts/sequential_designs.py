"""How often comparisons that stop are wrong or right, and after how many seeds: 10,000 simulated studies a cell.

    .venv/bin/python -m experiments.tuning.scripts.sequential_designs designs 1 4 11   # comparisons; three minutes each
    .venv/bin/python -m experiments.tuning.scripts.sequential_designs folds            # a minute
    .venv/bin/python -m experiments.tuning.scripts.sequential_designs images           # some minutes
    .venv/bin/python -m experiments.tuning.scripts.sequential_designs adastop 1 4 11   # pip install adastop; minutes
    .venv/bin/python -m experiments.tuning.scripts.sequential_designs                  # the page alone

Each puts its rows into results/sequential_designs.csv and makes the tables anew. What is simulated is
`follow` of `stopping/sequential.py`, written for many studies at once; a test holds both to the same answers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from experiments.scripts.evidence import EXPERIMENTS, filled
from experiments.stopping.sequential import FUTILITY, StoppingRule, adjusted, normal_score, t_statistics
from experiments.stopping.spending import boundaries, repeated_p_values
from peft_vit.base.files import write_atomically

ROWS = EXPERIMENTS / "tuning" / "results" / "sequential_designs.csv"
DOCUMENT = EXPERIMENTS / "tuning" / "docs" / "stopping.md"
KEY = ["part", "data", "comparisons", "design", "truth"]
STUDIES, SEED, MARGIN = 10_000, 20261127, 0.01
POINT, EFFECT, IMAGES = 0.01, 0.005, 600
EASY, GAINS = (200, 300, 400, 500, 1000, 2000), {"nothing gained": 0.0, "0.5 % gained": 0.005, "5 % gained": 0.05}
FOLDS_RULE = StoppingRule("non-inferiority", MARGIN, (5, 10, 15), correlation=0.2 / 0.64)
LOOKS = (5, 10, 15, 20, 25, 30)
DESIGNS = {
    "fixed, Holm": StoppingRule("superiority", MARGIN, LOOKS[-1:]),
    "O'Brien-Fleming": StoppingRule("superiority", MARGIN, LOOKS),
    "Pocock": StoppingRule("superiority", MARGIN, LOOKS, form="pocock"),
}
REMEDY = "O'Brien-Fleming, smaller of t and Hall's"
ADASTOP, ADASTOP_STUDIES, PERMUTATIONS = "AdaStop", {1: 500, 4: 80, 11: 60}, 1000
TRUTHS = {"none better": 0.0, "half better": 0.5, "all better": 1.0}  # share of experiments that are better
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]

STANDARD: dict[str, Draw] = {  # mean 0, standard deviation 1
    "normal": lambda rng, shape: rng.normal(size=shape),
    "skewed": lambda rng, shape: 1 - rng.exponential(size=shape),
    "heavy tails": lambda rng, shape: rng.standard_t(3, size=shape) / np.sqrt(3),
}
RUNS = {"normal": "normal", "skewed runs": "skewed", "heavy-tailed runs": "heavy tails", "tied": "normal"}
DIFFERENCES = {
    "normal, a control each": ("normal", 1),
    "skewed downwards": ("skewed", 1),
    "skewed upwards": ("skewed", -1),
}
DATA = (*RUNS, *DIFFERENCES)


def runs(rng: np.random.Generator, data: str, shape: tuple[int, int, int], shift: np.ndarray) -> np.ndarray:
    """Return accuracies (studies, 1 + m, n), the control first, whose differences scatter by one point."""
    studies, comparisons, n = shape
    accuracy = 0.8 + POINT / np.sqrt(2) * STANDARD[RUNS[data]](rng, (studies, comparisons + 1, n))
    accuracy[:, 1:] += shift[:, None]
    return np.rint(accuracy * IMAGES) / IMAGES if data == "tied" else accuracy


def differences(rng: np.random.Generator, data: str, shape: tuple[int, int, int], shift: np.ndarray) -> np.ndarray:
    """Return differences (studies, m, n) with a standard deviation of one point, and means (m,)."""
    if data in RUNS:
        accuracy = runs(rng, data, shape, shift)
        return accuracy[:, 1:] - accuracy[:, :1]
    kind, sign = DIFFERENCES[data]
    return POINT * sign * STANDARD[kind](rng, shape) + shift[:, None]


def moments(data: np.ndarray, looks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, standard deviation and skewness at each look: (..., n) to (..., K) each; no spread is no number."""
    sums = [np.cumsum(data**power, axis=-1)[..., looks - 1] / looks for power in (1, 2, 3)]
    mean = sums[0]
    variance = np.maximum(sums[1] - mean**2, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.where(variance > 1e-20, np.sqrt(variance * looks / (looks - 1)), np.nan)
        skewness = (sums[2] - 3 * mean * sums[1] + 2 * mean**3) / variance**1.5
    return mean, spread, skewness


def halls(t: np.ndarray, skewness: np.ndarray, looks: np.ndarray) -> np.ndarray:
    """Return t, or Hall's transformation of it where that is smaller: it takes the sample's skewness into account.

    Source: Hall, JRSS B 54 (1992): ``t + a t^2 / 3 + a^2 t^3 / 27 + a / 6`` with ``a = skewness / sqrt(n)``.
    """
    a = skewness / np.sqrt(looks)
    return np.minimum(t, t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6)


def decide(data: np.ndarray, rule: StoppingRule, remedy: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Follow many studies at once: differences (S, m, n) to verdicts (S, m, q) of 1, 0, -1 and pairs used (S, m)."""
    looks = np.array(rule.looks)
    mean, spread, skewness = moments(data, looks)  # (S, m, K)
    known = spread if rule.images is None else np.nan_to_num(spread)
    t = t_statistics(mean, known * np.sqrt(1 / looks + rule.correlation), rule, looks)  # (2, S, m, q, K)
    skews = np.array([skewness, -skewness])[:, :, :, None]
    evidence = normal_score(halls(t, skews, looks) if remedy else t, looks)
    p_values = repeated_p_values(evidence, rule.fractions, rule.form)
    scores = normal_score(t, looks).max(axis=0)  # (S, m, q, K)
    seen = np.ones(p_values.shape[:-1])
    verdicts = np.zeros(seen.shape[1:], dtype=int)
    going, pairs = np.ones(verdicts.shape[:2], dtype=bool), np.full(verdicts.shape[:2], looks[-1])
    for k, n in enumerate(looks):
        seen = np.where(going[:, :, None], p_values[..., k], seen)
        above, below = adjusted(seen[0]), adjusted(seen[1, ..., ::-1])[..., ::-1]
        new = np.where(above <= rule.level, 1, np.where(below <= rule.level, -1, 0))
        verdicts = np.where(verdicts == 0, new, verdicts)
        decided = (verdicts != 0).all(axis=-1)
        stop = decided.copy()
        if n != looks[-1]:
            stop |= _power(scores[..., k], verdicts, rule, k) < FUTILITY
        pairs = np.where(going & stop, n, pairs)
        going &= ~stop
    return verdicts, pairs


def _power(scores: np.ndarray, verdicts: np.ndarray, rule: StoppingRule, k: int) -> np.ndarray:
    """Return the predictive power (S, m) of an answer, from normal statistics (S, m, q) of look k."""
    t = rule.fractions[k]
    open_ones = np.where(np.isnan(scores), np.inf, np.where(verdicts == 0, scores, -np.inf)).max(axis=-1)
    ahead = open_ones / np.sqrt(t) - boundaries(rule.fractions, rule.level, rule.form)[-1]
    return np.asarray(special.ndtr(ahead / np.sqrt((1 - t) / t)))


def measured(verdicts: np.ndarray, pairs: np.ndarray, better: np.ndarray) -> dict[str, float]:
    """Return rates of verdicts (S, m) in truth about (m,) experiments that are better or not."""
    supported = verdicts == 1
    return {
        "false_supported": float(supported[:, ~better].any(axis=1).mean()) if (~better).any() else np.nan,
        "false_refuted": float((verdicts == -1).any(axis=1).mean()),
        "power": float(supported[:, better].mean()) if better.any() else np.nan,
        "pairs": float(pairs.mean()),
    }


def cases(comparisons: int, truths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield truths and which of (m,) experiments are better; half of one are none."""
    for truth in truths:
        count = round(TRUTHS[truth] * comparisons)
        if truth != "half better" or 0 < count < comparisons:
            yield truth, np.arange(comparisons) < count


def designs(comparisons: int) -> Iterator[dict[str, Any]]:
    """Yield a row a cell of data, design and truth."""
    for i, data in enumerate(DATA):
        for truth, better in cases(comparisons, TRUTHS if data.startswith("normal") else ("none better", "all better")):
            rng = np.random.default_rng([SEED, comparisons, i, list(TRUTHS).index(truth)])
            drawn = differences(rng, data, (STUDIES, comparisons, LOOKS[-1]), EFFECT * better)
            for design, rule in (DESIGNS | {REMEDY: DESIGNS["O'Brien-Fleming"]}).items():
                found = [decide(part, rule, remedy=design == REMEDY) for part in np.split(drawn, STUDIES // 1000)]
                verdicts, pairs = (np.concatenate(part) for part in zip(*found, strict=True))
                cell = {"part": "designs", "data": data, "comparisons": comparisons, "design": design, "truth": truth}
                yield cell | {"studies": STUDIES} | measured(verdicts[..., 0], pairs, better)


def adastop(comparisons: int) -> Iterator[dict[str, Any]]:
    """Yield rows of AdaStop and, on the same runs, of the rule that is looked at as often."""
    for truth, better in cases(comparisons, ("none better", "all better")):
        rng = np.random.default_rng([SEED, comparisons, len(DATA), list(TRUTHS).index(truth)])
        accuracy = runs(rng, "normal", (ADASTOP_STUDIES[comparisons], comparisons, LOOKS[-1]), EFFECT * better)
        started = time.perf_counter()
        by_adastop = [one_by_adastop(study, seed) for seed, study in enumerate(accuracy)]
        verdicts, pairs = (np.array(values) for values in zip(*by_adastop, strict=True))
        print(f"  AdaStop, {comparisons}, {truth}: {time.perf_counter() - started:.0f} s", flush=True)
        ours, own_pairs = decide(accuracy[:, 1:] - accuracy[:, :1], DESIGNS["O'Brien-Fleming"])
        for design, found, used in ((ADASTOP, verdicts, pairs), ("O'Brien-Fleming", ours[..., 0], own_pairs)):
            cell = {"part": "adastop", "data": "normal", "comparisons": comparisons, "design": design, "truth": truth}
            yield cell | {"studies": len(accuracy)} | measured(found, used, better)


def one_by_adastop(accuracy: np.ndarray, seed: int) -> tuple[list[int], list[int]]:
    """Return verdicts and runs used of each experiment, by AdaStop with its level of 5 %: accuracies (1 + m, n)."""
    from adastop import MultipleAgentsComparator

    names = [str(i) for i in range(len(accuracy))]
    pairs = np.array([(0, i) for i in range(1, len(accuracy))])
    comparator = MultipleAgentsComparator(5, len(LOOKS), PERMUTATIONS, pairs, alpha=0.05, seed=seed)
    used = dict.fromkeys(map(str, pairs), LOOKS[-1])
    for n in LOOKS:
        comparator.partial_compare({name: accuracy[i, :n] for i, name in enumerate(names)}, verbose=False)
        for key, decision in comparator.decisions.items():
            if decision != "continue":
                used[key] = min(used[key], n)
        if comparator.is_finished:
            break
    meaning = {"smaller": 1, "larger": -1, "equal": 0}  # of the control, which is named first
    return [meaning[comparator.decisions[str(pair)]] for pair in pairs], list(used.values())


def folds_of_centroids(rng: np.random.Generator, studies: int, repetitions: int, better: float) -> np.ndarray:
    """Return differences (studies, 5 repetitions) of two learners' accuracies in repeated stratified 5-fold validation.

    200 samples of two normal classes with ten features; each learner is the nearest centroid on five features of its
    own, so without `better`, by which the second one's classes lie farther apart, neither is better on any data.
    """
    per_class, folds, features, apart = 100, 5, 5, 0.41
    distance = np.array([apart, apart * (1 + better)])
    means = np.array([-1, 1])[:, None, None, None] * distance[:, None]  # (2 classes, 1, 2 learners, 1)
    samples = rng.normal(size=(studies, 2, per_class, 2, features)) + means
    found = []
    for _ in range(repetitions):
        order = rng.permuted(np.broadcast_to(np.arange(per_class), (studies, 2, per_class)), axis=-1)
        mixed = np.take_along_axis(samples, order[..., None, None], axis=2)
        parts = mixed.reshape(studies, 2, folds, per_class // folds, 2, features)
        sums = parts.sum(axis=3)  # (S, 2 classes, folds, 2 learners, features)
        centroids = (sums.sum(axis=2, keepdims=True) - sums) / (per_class - per_class // folds)
        normal = centroids[:, 1] - centroids[:, 0]  # (S, folds, 2 learners, features)
        middle = (centroids[:, 1] + centroids[:, 0]) / 2
        score = (
            np.einsum("scfnlp,sflp->scfnl", parts, normal)
            - np.einsum("sflp,sflp->sfl", middle, normal)[:, None, :, None]
        )
        right = (score > 0) == np.array([False, True])[:, None, None, None]
        accuracy = right.mean(axis=(1, 3))  # (S, folds, 2 learners)
        found.append(accuracy[..., 1] - accuracy[..., 0])
    return np.concatenate(found, axis=1)


def folds() -> Iterator[dict[str, Any]]:
    """Yield rows of fixed and sequential tests on repeated folds, with and without the correction."""
    for j, (truth, better) in enumerate((("none better", 0.0), ("all better", 0.5))):
        rng = np.random.default_rng([SEED, j])
        drawn = np.concatenate([folds_of_centroids(rng, STUDIES // 10, 4, better) for _ in range(10)])
        for correlation, name in ((0.0, "t"), (0.25, "corrected t")):
            for looks in ((5,), (10,), (15,), (20,), (5, 10, 15, 20)):
                rule = StoppingRule("superiority", MARGIN, looks, correlation=correlation)
                verdicts, pairs = decide(drawn[:, None, : looks[-1]], rule)
                design = f"{name}, {'looks at' if len(looks) > 1 else 'fixed at'} {', '.join(map(str, looks))}"
                cell = {
                    "part": "folds",
                    "data": "nearest centroids",
                    "comparisons": 1,
                    "design": design,
                    "truth": truth,
                }
                yield cell | {"studies": STUDIES} | measured(verdicts[..., 0], pairs, np.array([better > 0]))


def folds_of_images(
    rng: np.random.Generator, shape: tuple[int, int], images: int, lost: float, gained: float, *, lasting: bool
) -> np.ndarray:
    """Return differences (studies, m, 15) of so many images in three repetitions of five folds.

    Shares of images are lost and gained: the same ones in every repetition, where it is lasting, or other ones.
    """

    share, room = gained / (1 - lost), np.full((*shape, 5), images // 5)
    marked = rng.binomial(images, lost, shape)
    others = rng.binomial(images - marked, share)
    found = []
    for _ in range(3):
        down = dealt(rng, marked, room) if lasting else rng.binomial(room, lost)  # (studies, m, 5)
        up = dealt(rng, others, room - down) if lasting else rng.binomial(room - down, share)
        found.append((up - down) / room)
    return np.concatenate(found, axis=-1)


def dealt(rng: np.random.Generator, marked: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Return how many of (...) marked images come into each fold, by lot: (..., 5), as they have room."""
    found, left = np.zeros_like(room), marked.copy()
    for fold in range(5):
        found[..., fold] = rng.hypergeometric(left, room[..., fold:].sum(axis=-1) - left, room[..., fold])
        left -= found[..., fold]
    return found


def easy_images() -> Iterator[dict[str, Any]]:
    """Yield rows of models that lose just the margin, by the folds' t test alone and with images counted."""
    kinds = (("lasting", True), ("changing", False))
    for count, images, (truth, gained), (kind, lasting) in product((1, 4), EASY, GAINS.items(), kinds):
        rng = np.random.default_rng([SEED, count, images, int(1000 * gained), lasting])
        drawn = [
            folds_of_images(rng, (1000, count), images, MARGIN + gained, gained, lasting=lasting)
            for _ in range(STUDIES // 1000)
        ]
        for design in ("corrected t", "with images"):
            asked = replace(FOLDS_RULE, images=images) if design == "with images" else FOLDS_RULE
            verdicts, pairs = (np.concatenate(part) for part in zip(*(decide(d, asked) for d in drawn), strict=True))
            cell = {"part": "images", "data": f"{images} images, {kind}", "comparisons": count, "design": design}
            none = np.zeros(count, dtype=bool)
            yield cell | {"truth": truth, "studies": STUDIES} | measured(verdicts[..., 0], pairs, none)


def three_errors(studies: int, rate: float = 0.05) -> float:
    """Return the rate above which chance is no explanation."""
    return rate + 3 * float(np.sqrt(rate * (1 - rate) / studies))


def tables(rows: pd.DataFrame) -> dict[str, str]:
    """Return the document's tables as Markdown, by their marks."""
    cells = rows.set_index(KEY).sort_index()
    return {
        "sequential-errors": _errors(cells),
        "sequential-power": _found(cells),
        "sequential-folds": _folds(cells),
        "sequential-images": _images(cells),
        "sequential-enough": _enough(),
        "sequential-adastop": _adastop(cells),
    }


def _rate(row: pd.Series, *names: str) -> str:
    """Return rates in percent, bold where one is larger than 5 % by more than three standard errors."""
    return " / ".join(
        f"**{100 * row[name]:.1f}**" if row[name] > three_errors(row["studies"]) else f"{100 * row[name]:.1f}"
        for name in names
    )


def _errors(cells: pd.DataFrame) -> str:
    lines = [f"| comparisons | design | {' | '.join(DATA)} |", f"| ---: | --- |{' ---: |' * len(DATA)}"]
    for count in sorted(cells.loc["designs"].index.unique("comparisons")):
        for design in (*DESIGNS, REMEDY):
            found = [cells.loc["designs", data, count, design, "none better"] for data in DATA]
            lines.append(f"| {count} | {design} | {' | '.join(_rate(row, 'false_supported') for row in found)} |")
    return "\n".join(lines)


def _found(cells: pd.DataFrame) -> str:
    shown = [data for data in DATA if data != "normal, a control each"]
    lines = [f"| comparisons | design | {' | '.join(shown)} |", f"| ---: | --- |{' ---: |' * len(shown)}"]
    for count in sorted(cells.loc["designs"].index.unique("comparisons")):
        for design in (*DESIGNS, REMEDY):
            parts = []
            for data in shown:
                none, better = (
                    cells.loc["designs", data, count, design, f"{truth} better"] for truth in ("none", "all")
                )
                parts.append(f"{100 * better['power']:.1f}, {better['pairs']:.0f} / {none['pairs']:.0f}")
            lines.append(f"| {count} | {design} | {' | '.join(parts)} |")
    return "\n".join(lines)


def _folds(cells: pd.DataFrame) -> str:
    lines = [
        "| test | falsely better | power | pairs, none better | pairs, one better |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    part = cells.loc["folds", "nearest centroids", 1]
    designs = [
        f"{name}, {looks}"
        for name in ("t", "corrected t")
        for looks in ("fixed at 5", "fixed at 10", "fixed at 15", "fixed at 20", "looks at 5, 10, 15, 20")
    ]
    for design in designs:
        none, better = part.loc[design, "none better"], part.loc[design, "all better"]
        lines.append(
            f"| {design} | {_rate(none, 'false_supported')} | {100 * better['power']:.1f} | "
            f"{none['pairs']:.1f} | {better['pairs']:.1f} |"
        )
    return "\n".join(lines)


def _images(cells: pd.DataFrame) -> str:
    lines = [
        "| images | gained | the same ones: t | with images | others each time: t | with images |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for images, truth in product(EASY, GAINS):
        found = [
            " / ".join(
                _rate(cells.loc["images", f"{images} images, {kind}", count, design, truth], "false_supported")
                for count in (1, 4)
            )
            for kind, design in product(("lasting", "changing"), ("corrected t", "with images"))
        ]
        lines.append(f"| {images:,} | {truth.removesuffix(' gained')} | {' | '.join(found)} |")
    return "\n".join(lines)


def enough_images(comparisons: int) -> list[int]:
    """Return how many images show at each look that equal models lose less than the margin: a chance it is not seen."""
    bounds = boundaries(FOLDS_RULE.fractions, FOLDS_RULE.level / comparisons, "obrien-fleming")
    return [int(np.ceil(np.log(special.ndtr(-bound)) / np.log1p(-MARGIN))) for bound in bounds]


def _enough() -> str:
    heads = [f"after {pairs} folds" for pairs in FOLDS_RULE.looks]
    lines = [f"| comparisons | {' | '.join(heads)} |", f"| ---: |{' ---: |' * len(heads)}"]
    lines += [f"| {count} | {' | '.join(map(str, enough_images(count)))} |" for count in (1, 2, 4, 8)]
    return "\n".join(lines)


def _adastop(cells: pd.DataFrame) -> str:
    lines = [
        "| comparisons | studies | design | false: better / worse | runs, none better | power | runs, all better |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    part = cells.loc["adastop", "normal"]
    for count in sorted(part.index.unique("comparisons")):
        for design in (ADASTOP, "O'Brien-Fleming"):
            none, better = part.loc[count, design, "none better"], part.loc[count, design, "all better"]
            lines.append(
                f"| {count} | {none['studies']:.0f} | {design} | {_rate(none, 'false_supported', 'false_refuted')} | "
                f"{none['pairs']:.1f} | {100 * better['power']:.1f} | {better['pairs']:.1f} |"
            )
    return "\n".join(lines)


def keep(made: list[dict[str, Any]]) -> None:
    """Put rows into the table; one that is there is replaced."""
    fresh = pd.DataFrame(made)
    parts = [pd.read_csv(ROWS), fresh] if ROWS.exists() else [fresh]
    merged = pd.concat(parts, ignore_index=True).drop_duplicates(KEY, keep="last").sort_values(KEY)
    write_atomically(ROWS, merged.to_csv(index=False, float_format="%.5g", lineterminator="\n").encode())


def main() -> None:
    """Simulate what is named, and make the tables anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("designs", "folds", "images", "adastop"))
    parser.add_argument("comparisons", nargs="*", type=int, help="numbers of experiments beside the control")
    asked = parser.parse_args()
    if asked.part in ("folds", "images"):
        keep(list({"folds": folds, "images": easy_images}[asked.part]()))
    elif asked.part:
        for count in asked.comparisons or (1, 4, 11):
            keep(list({"designs": designs, "adastop": adastop}[asked.part](count)))
    content = filled(DOCUMENT.read_text(encoding="utf-8"), tables(pd.read_csv(ROWS)))
    write_atomically(DOCUMENT, content.encode())
    print(DOCUMENT)


if __name__ == "__main__":
    main()
