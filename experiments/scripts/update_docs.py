"""Put a study's numbers into the documents: everything between the marks is generated, nothing is typed by hand.

    .venv/bin/python -m experiments.scripts.update_docs experiments/outputs/quickstart

The same records give the same text, so running it twice changes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from experiments.scripts.evidence import ROOT, filled, table
from peft_vit import cli
from peft_vit.base.errors import UserError
from peft_vit.base.files import write_atomically
from peft_vit.deploy.page.files import escaped
from peft_vit.deploy.page.formatting import count, fixed, joined, megabytes, percent
from peft_vit.lab.analysis import Analysis, MethodResult, Run, analyze, load_studies

DOCUMENTS = (ROOT / "experiments" / "docs" / "task_8_3_implementation.md",)
MARK = "quickstart-table"
COLUMNS: dict[str, Callable[[MethodResult], str]] = {
    "experiment": lambda method: f"`{method.experiment.name}`",
    "test accuracy, each seed (%)": lambda method: joined(fixed(100 * value, 1) for value in method.by_seed.values()),
    "mean (%)": lambda method: fixed(100 * method.test_accuracy.estimate, 1),
    "trainable parameters": lambda method: count(method.final_parameters),
    "to store": lambda method: megabytes(method.stored_bytes),
    "seconds a step": lambda method: "–" if (s := method.cost("seconds_per_step")) is None else fixed(s, 2),
}


def method_table(analysis: Analysis) -> str:
    """Return one row a method as Markdown, and below it what the numbers are."""
    return f"{table(analysis.methods, COLUMNS, left=2)}\n\n{_caption(analysis)}"


def _caption(analysis: Analysis) -> str:
    """Return where the numbers come from, and what they can't tell."""
    study = analysis.study
    run: Run = study.runs[0]
    spec, origin = run.record.spec, run.provenance
    majority = run.record.majority_accuracy.get("test")
    above = sum(method.runs_above_majority for method in analysis.methods)
    decided = sum(comparison.verdict != "not decided" for comparison in analysis.comparisons)
    commits = sorted({(r.provenance.git_hash or "unknown")[:12] for r in study.runs})
    dirty = any(r.provenance.git_dirty for r in study.runs)
    sentences = [
        *(f"**{escaped(notice)}**" for notice in study.notices),
        f"Study `{study.name}`: {escaped(spec.data.dataset)} at {spec.data.image_size} px, "
        f"{joined(f'{size:,} {name}' for name, size in run.record.split_sizes.items())} images, "
        f"seeds {joined(str(seed) for seed in study.seeds)}, {spec.precision}.",
        f"The majority class has {'an unknown share' if majority is None else percent(majority)} of the test images; "
        f"{above} of {len(study.runs)} runs are above it.",
        f"{decided} of {len(analysis.comparisons)} paired differences are decided by these seeds.",
        "Trainable parameters at the end of the run, head included; to store: frozen weights and adapter file, "
        "MB are 10⁶ bytes.",
        f"Measured on {escaped(origin.processor)}, {origin.cpu_count} processors, {origin.threads} threads, "
        f"commit {joined(commits)}{' with local changes' if dirty else ''}.",
    ]
    return " ".join(sentences)


def fill(document: Path, content: str) -> bool:
    """Put the table between a document's marks; return whether that changed it.

    Raises:
        UserError: if the document can't be read, or does not hold the marks once and in order.
    """
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", file=document) from None
    begin, end = f"<!-- {MARK} -->", f"<!-- /{MARK} -->"
    if not (text.count(begin) == text.count(end) == 1 and text.index(begin) < text.index(end)):
        raise UserError(f"expected {begin} and below it {end}, each once; put them back", file=document)
    new = filled(text, {MARK: content})
    if new != text:
        write_atomically(document, new.encode())
    return new != text


def main(arguments: list[str] | None = None) -> None:
    """Render the table of the one study in a results directory into every document."""
    parser = argparse.ArgumentParser(description="Put a study's numbers between the marks in the documents.")
    parser.add_argument("results_dir", type=Path, help="a directory that holds the records of one study")
    parser.add_argument("documents", type=Path, nargs="*", default=DOCUMENTS, help="default: the project's own")
    asked = parser.parse_args(arguments)
    with cli.user_errors():
        studies = load_studies(asked.results_dir)
        if len(studies) != 1 or not studies[0].runs:
            found = joined(study.label for study in studies)
            raise UserError(f"expected one study with a finished run, found {found}", file=asked.results_dir)
        content = method_table(analyze(studies[0]))
        for document in asked.documents:
            print(f"{document}: {'updated' if fill(document, content) else 'unchanged'}")


if __name__ == "__main__":
    main()
