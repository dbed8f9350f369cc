"""Pages that scripts write are current and whole: commands, configuration keys, backbones, coverage, the notebook."""

from __future__ import annotations

import inspect
import json
import re

import backbones
import interval_coverage as benchmark
import numpy as np
import pandas as pd
import pytest
import reference_pages
import site_hooks
import typer
from marks import filled

from peft_vit.cli import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", reference_pages.MADE)
def test_the_page_is_current(name: str) -> None:
    made = reference_pages.MADE[name]()
    written = (reference_pages.PAGES / name).read_text(encoding="utf-8")
    assert written == made, "run: .venv/bin/python docs/scripts/reference_pages.py"


def test_every_option_of_every_command_stands_there() -> None:
    sections = re.split(r"^### (.+)\n", reference_pages.commands(), flags=re.MULTILINE)[1:]
    told = dict(zip(sections[::2], sections[1::2], strict=True))
    assert told.keys() == COMMANDS.keys()
    for name, command in COMMANDS.items():
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {o for o in options - {"--help"} if o.startswith("--")} <= set(re.findall(r"`(--[a-z-]+)`", told[name]))


def test_a_command_that_may_exit_with_1_says_when() -> None:
    for command in COMMANDS.values():
        if "typer.Exit(1)" in inspect.getsource(command.callback):
            assert re.search(r"Exit codes:.* 1 ", " ".join(command.help.split())), command.name
        assert command.help.count("codes:") == command.help.count("\n\nExit codes:"), "a paragraph of its own"


def test_every_key_and_option_has_a_meaning() -> None:
    for page in (reference_pages.commands(), reference_pages.configuration()):
        rows = re.findall(r"^\| (`.+) \| (.+) \| (.+) \| (.*) \|$", page, flags=re.MULTILINE)
        assert len(rows) > 80
        assert [row for row in rows if len(row[3].strip()) < 3] == []


# --- backbones ---


def test_the_page_says_what_results_hold() -> None:
    rows, text = pd.read_csv(backbones.ROWS), backbones.DOCUMENT.read_text(encoding="utf-8")
    assert filled(text, backbones.tables(rows)) == text, "run benchmarks/backbones.py"
    rows.loc[0, "onnx_error"] = 1.0
    assert filled(text, backbones.tables(rows)) != text


# --- the notebook ---


def test_cells_become_markdown() -> None:
    html = '<table border="1" class="dataframe"><tr><td>7</td></tr></table>'
    outputs = [
        {"text": ["one\n", "\x1b[1mtwo\x1b[0m\n"]},
        {"data": {"text/plain": ["three"]}},
        {"data": {"text/plain": "a table", "text/html": [html]}},
        {"data": {"text/plain": "a report", "text/html": ["<iframe srcdoc='<table>'></iframe>"]}},
        {"data": {"text/plain": "a figure", "image/png": "AAAA\n"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "Text."]},
        {"cell_type": "code", "source": ["f()"], "outputs": outputs},
        {"cell_type": "code", "source": ["x = 1"], "outputs": []},
    ]
    assert site_hooks.page(cells, "some.ipynb").split("\n\n") == [
        "# Title",
        "Text.",
        "[This page as a notebook](some.ipynb)",
        "```python\nf()\n```",
        "```text\none\ntwo\nthree\n```",
        "<div><table><tr><td>7</td></tr></table></div>",
        "```text\na report\n```",
        '<img alt="output" src="data:image/png;base64,AAAA">',
        "```python\nx = 1\n```\n",
    ]


# --- coverage of intervals, which can be simulated again ---


RESULT = json.loads(benchmark.RESULT.read_text())
DOCUMENT = benchmark.DOCUMENT.read_text(encoding="utf-8")
ROWS = {(row["interval"], row["population"], row.get("n", row.get("images"))): row for row in RESULT["rows"]}


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


def test_the_result_can_be_simulated_anew() -> None:
    interval = "mean (or paired difference), t"
    stream, measured = benchmark.INTERVALS[interval]
    for j, (name, population) in enumerate(benchmark.populations().items()):
        rng = np.random.default_rng([RESULT["setting"]["seed"], stream, j, 3])
        again = benchmark.coverage(*measured(rng, population, 3))
        assert again["coverage"] == pytest.approx(ROWS[interval, name, 3]["coverage"], abs=0.001)


@pytest.mark.parametrize(
    "name", ["normal", "skewed (exponential)", "accuracy of 600 images", "heavy tails (t, 3 degrees)"]
)
def test_the_truths_are_those_of_the_populations(name: str) -> None:
    population = benchmark.populations()[name]
    draws = population.draw(np.random.default_rng(0), (400_000,))
    assert draws.mean() == pytest.approx(population.mean, abs=5 * draws.std() / np.sqrt(draws.size))
