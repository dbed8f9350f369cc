"""The coverage in statistics.md is what benchmarks/results/coverage.json holds, and that can be simulated anew."""

import json
import re
from pathlib import Path

import interval_coverage as benchmark
import numpy as np
import pytest
from marks import filled

ROOT = Path(__file__).parents[2]

RESULT = json.loads(benchmark.RESULT.read_text())
DOCUMENT = benchmark.DOCUMENT.read_text(encoding="utf-8")
ROWS = {(row["interval"], row["population"], row["n"]): row for row in RESULT["rows"]}


def shares(interval: str, n: int) -> dict[str, float]:
    found = {
        population: row["coverage"] for (name, population, size), row in ROWS.items() if (name, size) == (interval, n)
    }
    assert found.keys() == benchmark.populations().keys()
    return found


def test_the_document_holds_the_result_which_has_every_interval_at_every_size_often_enough() -> None:
    assert filled(DOCUMENT, {benchmark.MARK: benchmark.table(RESULT)}) == DOCUMENT
    assert RESULT["setting"]["simulations"] >= 4000
    assert all(shares(interval, n) for interval in benchmark.INTERVALS for n in (3, 5, 10))


@pytest.mark.parametrize("interval", ["mean (or paired difference), t", "probability of improvement of pairs, Wilson"])
def test_the_result_can_be_simulated_anew(interval: str) -> None:
    stream, measured = benchmark.INTERVALS[interval]
    for j, (name, population) in enumerate(benchmark.populations().items()):
        rng = np.random.default_rng([RESULT["setting"]["seed"], stream, j, 3])
        again = benchmark.coverage(*measured(rng, population, 3))
        assert again["coverage"] == pytest.approx(ROWS[interval, name, 3]["coverage"], abs=0.001)


def test_what_the_document_says_of_it_is_so() -> None:
    skewed = "skewed (exponential)"
    for n in (3, 5, 10):
        by_t = shares("mean (or paired difference), t", n)
        assert 0.87 < by_t.pop(skewed) < 0.91
        assert min(by_t.values()) > benchmark.three_errors_below()
    assert 0.65 < min(shares("mean, BCa bootstrap", 3).values()) < max(shares("mean, BCa bootstrap", 3).values()) < 0.75
    assert (
        0.85 < min(shares("mean, BCa bootstrap", 10).values()) < max(shares("mean, BCa bootstrap", 10).values()) < 0.92
    )
    assert shares("effect size d, noncentral t", 10)["heavy tails (t, 3 degrees)"] < 0.90
    apart = [row["without"] for key, row in ROWS.items() if key[0].endswith("improvement, bootstrap") and key[2] == 3]
    assert min(apart) > 0.2
    assert ROWS[benchmark.SHARE, "right or wrong", 600]["coverage"] == pytest.approx(0.95, abs=0.005)


@pytest.mark.parametrize(
    "name", ["normal", "skewed (exponential)", "accuracy of 600 images", "heavy tails (t, 3 degrees)"]
)
def test_the_truths_are_those_of_the_populations(name: str) -> None:
    population = benchmark.populations()[name]
    draws = np.sort(population.draw(np.random.default_rng(0), (2, 200_000)), axis=1)
    error = 5 * population.deviation / np.sqrt(200_000)
    assert draws.mean() == pytest.approx(population.mean, abs=error)
    difference = population.draw(np.random.default_rng(1), (200_000,)) + population.shift
    difference -= population.draw(np.random.default_rng(2), (200_000,))
    wins = np.mean(difference > 1e-12) + np.mean(np.abs(difference) <= 1e-12) / 2
    assert wins == pytest.approx(population.improvement, abs=5 * 0.5 / np.sqrt(200_000))


def test_every_function_in_the_document_exists() -> None:
    from peft_vit import statistics

    named = set(re.findall(r"^\| `(\w+)`(?:, `(\w+)`)?", DOCUMENT, re.MULTILINE))
    names = {name for pair in named for name in pair if name} | {"equivalence_verdict"}
    assert len(names) >= 9
    assert names <= set(vars(statistics))
