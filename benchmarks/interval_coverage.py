"""How often each interval of `peft_vit.base.statistics` holds the truth at 3, 5 and 10 seeds, by simulation.

    python benchmarks/interval_coverage.py           simulate for two minutes, write the result, fill the document
    python benchmarks/interval_coverage.py --table   fill docs/explanation/statistics.md from the result that is there

Each cell is 4,000 studies with a known truth. The functions measured are those that reports use, called once a study.
A bootstrap that no report uses is measured for comparison, and is scipy's; the document's table is without it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from marks import filled
from scipy import stats

from peft_vit.base.statistics import mean_interval, mean_of_proportions, proportion_interval

ROOT = Path(__file__).resolve().parents[1]
RESULT, DOCUMENT = ROOT / "benchmarks" / "results" / "coverage.json", ROOT / "docs" / "explanation" / "statistics.md"
MARK = "coverage-table"
SIZES, SIMULATIONS, RESAMPLES, SEED, CONFIDENCE = (3, 5, 10), 4000, 999, 20261125, 0.95
IMAGES = 600
Ends = tuple[float | None, float | None]


@dataclass(frozen=True)
class Population:
    """What seeds are drawn from.

    Attributes:
        draw: random values of a shape.
        mean: their mean.
    """

    draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
    mean: float


def accuracies() -> Population:
    """Shares of 600 images: each seed's own accuracy scatters by 2 points around 82 %, its images by chance."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    counts = np.arange(IMAGES + 1)
    mass = stats.binom.pmf(counts[:, None], IMAGES, (0.82 + 0.02 * nodes).clip(0, 1)) @ (weights / weights.sum())

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.binomial(IMAGES, rng.normal(0.82, 0.02, shape).clip(0, 1)) / IMAGES

    return Population(draw, float(counts @ mass) / IMAGES)


def continuous(distribution: Any) -> Population:
    """Wrap a distribution of scipy with a mean."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.asarray(distribution.rvs(size=shape, random_state=rng))

    return Population(draw, float(distribution.mean()))


@cache
def populations() -> dict[str, Population]:
    """Return what seeds may look like."""
    return {
        "normal": continuous(stats.norm(0.8, 0.02)),
        "skewed (exponential)": continuous(stats.expon()),
        "accuracy of 600 images": accuracies(),
        "heavy tails (t, 3 degrees)": continuous(stats.t(3)),
    }


def mean_by_t(rng: np.random.Generator, population: Population, n: int) -> tuple[list[Ends], float]:
    found = [mean_interval(row) for row in population.draw(rng, (SIMULATIONS, n))]
    return [(interval.low, interval.high) for interval in found], population.mean


def bootstrap(samples: Sequence[np.ndarray], statistic: Callable[..., np.ndarray], method: str, rng: Any) -> Ends:
    """Return scipy's bootstrap interval of one study; no ends where its resamples have no spread."""
    ascending = tuple(np.sort(sample) for sample in samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of resamples without spread
        found = stats.bootstrap(ascending, statistic, n_resamples=RESAMPLES, method=method, rng=rng)
    low, high = map(float, found.confidence_interval)
    return (low, high) if low < high else (None, None)


def mean_by_bca(rng: np.random.Generator, population: Population, n: int) -> tuple[list[Ends], float]:
    rows = population.draw(rng, (SIMULATIONS, n))
    return [bootstrap((row,), np.mean, "BCa", rng) for row in rows], population.mean


Measured = Callable[[np.random.Generator, Population, int], tuple[list[Ends], float]]
INTERVALS: dict[
    str, tuple[int, Measured]
] = {  # with the stream of its random numbers: others were of intervals that went
    "mean (or paired difference), t": (0, mean_by_t),
    "mean, BCa bootstrap": (1, mean_by_bca),
}
SHARE = "share of right images in one run, Wilson"
SHARE_SIZES = (*SIZES, IMAGES)
BALANCED = "balanced accuracy"
CLASSES = {f"{n}×10": (n,) * 10 for n in (3, 10, 40)} | {"200+20": (200, 20)}  # images of each class
RIGHT = (0.6, 0.8, 0.9, 0.97)  # shares of each class


def coverage(ends: list[Ends], truth: float) -> dict[str, float]:
    """Return the shares of studies whose interval holds the truth, lies above or below it, or does not exist.

    The first three are shares of the studies that have an interval.
    """
    with_interval = np.array([pair for pair in ends if pair[0] is not None], dtype=np.float64).reshape(-1, 2)
    rounding = 1e-12 * max(1.0, abs(truth))  # an end that is the truth holds it
    above = float(np.mean(with_interval[:, 0] > truth + rounding))
    below = float(np.mean(with_interval[:, 1] < truth - rounding))
    return {
        "coverage": round(1 - above - below, 5),
        "above": round(above, 5),
        "below": round(below, 5),
        "without": round(1 - len(with_interval) / len(ends), 5),
    }


def of_shares() -> list[dict[str, Any]]:
    """Return the coverage of Wilson's interval for 82 % right images: exact, a sum over all outcomes."""
    rows = []
    for n in SHARE_SIZES:
        mass = stats.binom.pmf(np.arange(n + 1), n, 0.82)
        found = [proportion_interval(successes, n) for successes in range(n + 1)]
        above = float(mass @ [float(i.low is not None and i.low > 0.82) for i in found])
        below = float(mass @ [float(i.high is not None and i.high < 0.82) for i in found])
        rows.append(
            {
                "interval": SHARE,
                "population": "right or wrong",
                "n": n,
                "coverage": round(1 - above - below, 5),
                "above": round(above, 5),
                "below": round(below, 5),
                "without": 0.0,
            }
        )
    return rows


def of_classes() -> list[dict[str, Any]]:
    """Return the coverage of the interval of balanced accuracy, if models are as good on every class."""
    rows = []
    for stream, (name, images) in enumerate(CLASSES.items(), start=7):
        for place, share in enumerate(RIGHT):
            rng = np.random.default_rng([SEED, stream, place])
            found = [
                mean_of_proportions(hits, images) for hits in rng.binomial(images, share, (SIMULATIONS, len(images)))
            ]
            ends = coverage([(interval.low, interval.high) for interval in found], share)
            rows.append({"interval": BALANCED, "population": f"{share:.0%} right", "images": name, **ends})
    return rows


def simulate() -> list[dict[str, Any]]:
    """Return one row a cell."""
    rows = []
    for interval, (stream, measured) in INTERVALS.items():
        started = time.perf_counter()
        for j, (name, population) in enumerate(populations().items()):
            for n in SIZES:
                ends, truth = measured(np.random.default_rng([SEED, stream, j, n]), population, n)
                rows.append({"interval": interval, "population": name, "n": n, **coverage(ends, truth)})
        print(f"  {interval:50} {time.perf_counter() - started:5.1f} s", flush=True)
    return rows + of_shares() + of_classes()


def three_errors_below() -> float:
    """Return the coverage below which chance is no explanation."""
    return CONFIDENCE - 3 * float(np.sqrt(CONFIDENCE * (1 - CONFIDENCE) / SIMULATIONS))


def table(result: Mapping[str, Any]) -> str:
    """Return the result of what reports use as Markdown: one row for an interval and n, one column for a population."""
    of_seeds = [row for row in result["rows"] if row["interval"] not in (SHARE, BALANCED)]
    cells = {(row["interval"], row["population"], row["n"]): row for row in of_seeds}
    names = list(dict.fromkeys(row["population"] for row in of_seeds))
    lines = [f"| interval | n | {' | '.join(names)} |", f"| --- | ---: | {' | '.join('---:' for _ in names)} |"]
    for interval in dict.fromkeys(row["interval"] for row in of_seeds if "bootstrap" not in row["interval"]):
        for n in result["setting"]["sizes"]:
            lines.append(f"| {interval} | {n} | {' | '.join(_cell(cells[interval, name, n]) for name in names)} |")
    shares = ", ".join(f"n = {row['n']}: {_cell(row)}" for row in result["rows"] if row["interval"] == SHARE)
    of_classes: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        if row["interval"] == BALANCED:
            of_classes.setdefault(row["images"], {})[row["population"]] = _cell(row)
    shown = list(next(iter(of_classes.values())))
    balanced = [
        f"| {BALANCED}, images×classes | {' | '.join(shown)} |",
        f"| --- | {' | '.join('---:' for _ in shown)} |",
    ]
    balanced += [f"| {images} | {' | '.join(own.values())} |" for images, own in of_classes.items()]
    setting, machine = result["setting"], result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(
        [
            *lines,
            "",
            *balanced,
            "",
            f"Percent of {setting['simulations']:,} simulated studies in which a 95 % interval holds the truth; one "
            "standard error is 0.3 points. **Bold**: more than three standard errors below 95 %. In brackets, where "
            "there are any: percent of studies without an interval, which do not count. "
            f"{SHARE[0].upper()}{SHARE[1:]}, 82 % right, exactly: {shares}.",
            "",
            f"`benchmarks/interval_coverage.py`, seed {setting['seed']}, {result['date']}, {machine['processor']}, "
            f"Python {machine['python']}, {versions}.",
        ]
    )


def _cell(row: Mapping[str, Any]) -> str:
    text = f"{100 * row['coverage']:.1f}"
    if row["coverage"] < three_errors_below():
        text = f"**{text}**"
    return f"{text} ({100 * row['without']:.1f})" if row["without"] >= 0.0005 else text


def fill(document: Path, result: Mapping[str, Any]) -> None:
    """Put the table between the document's marks."""
    document.write_text(filled(document.read_text(encoding="utf-8"), {MARK: table(result)}), encoding="utf-8")
    print(document)


def main() -> None:
    """Simulate and write, or only fill the document."""
    parser = argparse.ArgumentParser(description="How often each interval holds the truth, by simulation.")
    parser.add_argument("--table", action="store_true", help="fill the document from the result that is there")
    if not parser.parse_args().table:
        from common import machine, write

        result = {
            "machine": machine(threads=1),
            "date": datetime.date.today().isoformat(),
            "versions": {name: importlib.metadata.version(name) for name in ("numpy", "scipy")},
            "setting": {
                "simulations": SIMULATIONS,
                "resamples": RESAMPLES,
                "seed": SEED,
                "confidence": CONFIDENCE,
                "sizes": SIZES,
                "images": IMAGES,
            },
            "rows": simulate(),
        }
        write("coverage", result)
    fill(DOCUMENT, json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
