"""Whether longer training is better: the runs of length_elpv.yaml to results/, and from there to docs/findings.md.

    .venv/bin/python experiments/scripts/length.py [DIR]

DIR holds the runs; of each one row is kept, without its test accuracy, which chooses nothing. Without DIR only the
table is made anew. A run's best validation is partly luck, so the accuracy at its last step stands beside it.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import pandas as pd
from evidence import RESULTS, ROOT, filled, markdown, merge

from peft_vit import cli
from peft_vit.errors import UserError
from peft_vit.records import RunRecord, read_records, write_atomically

STUDY = "length_elpv"
ROWS, DOCUMENT = RESULTS / f"{STUDY}.csv", ROOT / "docs" / "findings.md"
TITLES = {"full": "full fine-tuning", "lora": "LoRA r=8", "qa_lora": "QA-LoRA r=8, nf4"}


def keep(folder: Path) -> None:
    """Put a row a run into results/.

    Raises:
        UserError: if a run is of another study, of a smoke, or did not end.
    """
    records = list(read_records(folder))
    if not records or any(r.spec.study != STUDY or r.spec.smoke or r.status != "done" for r in records):
        raise UserError(f"expected runs of {STUDY}, all of them done; run its configuration to the end", file=folder)
    write_atomically(ROWS, merge(None, pd.DataFrame([_row(record) for record in records])).encode())


def _row(record: RunRecord) -> dict[str, object]:
    assert record.validation is not None
    assert record.provenance is not None
    return {
        "experiment": record.spec.experiment.name,
        "method": record.spec.experiment.method,
        "learning_rate": record.spec.experiment.training.learning_rate,
        "steps": len(record.steps),
        "seed": record.spec.seed,
        "best": record.validation.accuracy,
        "last": record.evaluations[-1].metrics.accuracy,
        "chosen_step": record.chosen_step,
        "seconds": round(record.seconds, 1),
        "split": record.provenance.split_sha256[:12],
        "processor": record.provenance.processor,
        "commit": (record.provenance.git_hash or "")[:12],
    }


def table() -> str:
    """Return means over seeds by method, rate and length, and what the longest gains over the shortest of its seed."""
    rows = pd.read_csv(io.StringIO(ROWS.read_text(encoding="utf-8")))
    lengths = sorted(rows.steps.unique())
    first, last = lengths[0], lengths[-1]
    head = [*(f"{steps} steps" for steps in lengths), f"{last} minus {first} (sd)", f"seconds, {first} and {last}"]
    lines: list[tuple[str, ...]] = [("method", "rate", *head)]
    for method, title in TITLES.items():
        for rate, part in rows[rows.method == method].groupby("learning_rate"):
            cells = [
                f"{100 * one.best.mean():.1f} / {100 * one['last'].mean():.1f}"
                for steps in lengths
                for one in [part[part.steps == steps]]
            ]
            gains = [
                100 * (wide[last] - wide[first])
                for kind in ("best", "last")
                for wide in [part.pivot(index="seed", columns="steps", values=kind)]
            ]
            gain = " / ".join(f"{one.mean():+.1f} ({one.std():.1f})" for one in gains)
            seconds = part.groupby("steps").seconds.median()
            lines.append((title, f"{rate:g}", *cells, gain, f"{seconds[first]:.0f} and {seconds[last]:.0f}"))
    seeds = ", ".join(str(seed) for seed in sorted(rows.seed.unique()))
    note = (
        f"Mean validation accuracy in %: the best of a run's validations / the last one. {len(rows)} runs, "
        f"seeds {seeds}. Commit {', '.join(sorted(rows.commit.unique()))}."
    )
    return f"{markdown(lines, right=1)}\n\n{note}"


def main() -> None:
    """Keep the directory that the command names, then make the table anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="the runs to put into results/")
    asked = parser.parse_args()
    with cli.user_errors():
        if asked.folder is not None:
            keep(asked.folder)
        text = filled(DOCUMENT.read_text(encoding="utf-8"), {"length": table()})
        write_atomically(DOCUMENT, text.encode())
        print(DOCUMENT)


if __name__ == "__main__":
    main()
