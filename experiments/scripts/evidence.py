"""What the scripts that make evidence share: records to compact tables in results/, and those to a document's tables.

A study may be run over several evenings and machines: what is condensed joins the rows that its table already holds.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from scipy import stats

from benchmarks.marks import filled
from peft_vit import cli
from peft_vit.base.errors import UserError
from peft_vit.base.files import write_atomically
from peft_vit.base.statistics import Interval, holm, mean_interval, noninferiority, wilcoxon
from peft_vit.core.records import RunRecord
from peft_vit.runs.records.scan import read_records

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "experiments"
BENCHMARKS = ROOT / "benchmarks" / "results"
MARGIN = 1.0  # points of accuracy; stated in the configurations before the data
KEY = ("study", "experiment", "seed")  # what names a run; in some tables all are of one study, which is left out

Columns = Callable[[RunRecord], Mapping[str, object]]
Cell = Callable[[pd.DataFrame], str]  # of the runs of an experiment
Row = TypeVar("Row")


def row_of(record: RunRecord, columns: Columns) -> dict[str, object]:
    """Return what is kept of one run; `columns` adds what a study is about, to runs that did not fail."""
    experiment = record.spec.experiment
    row: dict[str, object] = {
        "study": record.spec.study,
        "experiment": experiment.name,
        "method": experiment.method,
        "seed": record.spec.seed,
        "status": record.status,
        "learning_rate": experiment.training.learning_rate,
    }
    if record.status != "done":
        return row
    assert record.validation is not None
    assert record.test is not None
    assert record.provenance is not None
    return row | {
        "validation_accuracy": record.validation.accuracy,
        "majority_accuracy": record.majority_accuracy["test"],
        "test_accuracy": record.test.accuracy,
        "test_nll": record.test.nll,
        **columns(record),
        "seconds": round(record.seconds, 1),
        "split": record.provenance.split_sha256[:12],
        "commit": record.provenance.git_hash[:12] if record.provenance.git_hash else None,
        "dirty": record.provenance.git_dirty,
    }


def with_runs(
    folder: Path,
    file: Path,
    studies: re.Pattern[str],
    row: Callable[[RunRecord], dict[str, object]],
    *,
    finished: bool = False,
) -> str:
    """Return a table's CSV text with the runs below a directory, one row a run; a run done anew replaces its old row.

    Args:
        folder: holds the records.
        file: the table, which need not be there.
        studies: the names of those whose runs may stand in it.
        row: what is kept of a run.
        finished: refuse a run that failed.

    Raises:
        UserError: if there are no runs, or some of a smoke, of another study, or unfinished where they have to be done.
    """
    records = list(read_records(folder))
    foreign = any(one.spec.smoke or not studies.fullmatch(one.spec.study) for one in records)
    if not records or foreign or (finished and any(one.status != "done" for one in records)):
        name, several, _ = studies.pattern.partition("(")
        said = f"{name}{'*' if several else ''}{', all of them done,' if finished else ','}"
        raise UserError(f"expected real runs of {said} and no others; name their directory", file=folder)
    present = file.read_text(encoding="utf-8") if file.exists() else None
    return merge(present, pd.DataFrame([row(record) for record in records]))


def condense(results_dir: Path, columns: Columns, kept: Path) -> None:
    """Put the runs below a directory into a folder's tables <study>.csv; a run done anew replaces its old row.

    Raises:
        UserError: if runs are of a smoke, or their data split is another than that of the rows that are there.
    """
    records = list(read_records(results_dir))
    if any(record.spec.smoke for record in records):
        raise UserError(
            "holds smoke runs, whose numbers mean nothing; name the directory of a real run", file=results_dir
        )
    rows = pd.DataFrame([row_of(record, columns) for record in records])
    for study, part in rows.groupby("study"):
        file = kept / f"{study}.csv"
        merged = merge(file.read_text(encoding="utf-8") if file.exists() else None, part)
        if pd.read_csv(io.StringIO(merged)).get("split", pd.Series()).nunique() > 1:
            raise UserError(
                f"its data split is not that of {file}, so seeds would pair unequal runs; "
                "move that file away, or run with its split",
                file=results_dir,
            )
        write_atomically(file, merged.encode())


def merge(present: str | None, rows: pd.DataFrame) -> str:
    """Return a table's CSV text with new rows in it, sorted by what names a run; old rows keep their digits."""
    counts_with_gaps_stay_whole = rows.convert_dtypes()
    fresh = _as_text(counts_with_gaps_stay_whole.to_csv(index=False, float_format="%.6g"))
    key = [column for column in KEY if column in rows]
    parts = [fresh] if present is None else [_as_text(present), fresh]
    merged = pd.concat(parts, ignore_index=True).drop_duplicates(key, keep="last")
    return merged.sort_values(key, key=lambda column: column.astype(int) if column.name == "seed" else column).to_csv(
        index=False, lineterminator="\n"
    )


def _as_text(content: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(content), dtype=str, keep_default_na=False)


def study_files() -> list[Path]:
    """Return the configurations of every study here."""
    return sorted(EXPERIMENTS.glob("**/configs/*.yaml"))


def percent(values: Iterable[float]) -> pd.Series:
    """Return shares as percent."""
    return 100 * pd.Series(list(values), dtype=float)


def accuracy_by_seed(runs: pd.DataFrame, part: pd.DataFrame) -> pd.Series:
    """Return test accuracy in percent by seed; a run that failed is worth the majority class, never left out."""
    part = part.sort_values("seed")
    accuracy = part.test_accuracy.fillna(runs.majority_accuracy.max())
    return pd.Series(percent(accuracy).to_numpy(), index=part.seed.to_numpy())


def of(runs: pd.DataFrame, experiment: str) -> pd.Series:
    """Return an experiment's test accuracy by seed."""
    return accuracy_by_seed(runs, runs[runs.experiment == experiment])


@dataclass(frozen=True)
class Comparison:
    """One experiment against a reference: difference in points, and the p-values of two tests.

    Attributes:
        difference: mean over the seeds that both have run, with its interval; None if they share no seed.
        not_inferior: p-value of "not worse by more than the margin".
        differs: p-value of Wilcoxon's test.
    """

    difference: Interval | None = None
    not_inferior: float | None = None
    differs: float | None = None


def compared(candidate: pd.Series, reference: pd.Series, margin: float = MARGIN) -> Comparison:
    """Return the paired comparison over the seeds that both have run."""
    shared = candidate.index.intersection(reference.index)
    if shared.empty:
        return Comparison()
    left, right = candidate[shared].to_numpy(), reference[shared].to_numpy()
    return Comparison(
        difference=mean_interval(left - right),
        not_inferior=noninferiority(left - right, margin).p_value,
        differs=wilcoxon(left - right).p_value,
    )


def corrected(found: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Return comparisons with their p-values corrected by Holm over all of them."""
    differs = holm([or_one(one.differs) for one in found.values()])
    not_inferior = holm([or_one(one.not_inferior) for one in found.values()])
    return {
        name: Comparison(one.difference, not_inferior[place], differs[place])
        for place, (name, one) in enumerate(found.items())
    }


def or_one(value: float | None) -> float:
    """Return a p-value that a correction can take: what can't be tested is never significant."""
    return 1.0 if value is None else value


def right(labels: Sequence[object], predicted: Sequence[object]) -> dict[str, object]:
    """Return what a row keeps of test images: which are right, as bits in hexadecimal, and how many there are."""
    equal = np.equal(labels, predicted)
    return {"right": np.packbits(equal).tobytes().hex(), "images": len(equal)}


def right_images(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return by experiment which test images are right: a row a seed, a column an image. A run that failed has none."""
    found = {}
    for name, part in rows.groupby("experiment"):
        count = int(part["images"].max()) if part["images"].notna().any() else 0
        right = [
            np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:count]
            if isinstance(text, str)
            else [0] * count
            for text in part.right
        ]
        found[str(name)] = pd.DataFrame(np.array(right, dtype=float), index=part.seed.to_numpy())
    return found


class Estimate(NamedTuple):
    """A mean difference in points, and half of its 95 % interval, over seeds and with images counted, too."""

    mean: float
    of_seeds: float
    with_images: float
    seeds: int

    @property
    def text(self) -> str:
        """Return mean and both halves."""
        return f"{self.mean:+.1f} ± {self.of_seeds:.1f}, ± {self.with_images:.1f}"

    @property
    def p(self) -> float:
        """Return the one-sided p-value of "above 0", with seeds and images counted: the wider of the two."""
        t = float(stats.t.ppf(0.975, self.seeds - 1))
        return float(stats.t.sf(self.mean * t / self.with_images, self.seeds - 1)) if self.with_images else 0.5


def contrast(parts: Sequence[Mapping[str, pd.DataFrame]], weights: Mapping[str, float]) -> Estimate | None:
    """Return the mean over sets of a weighted sum of accuracies, in points; None: not all of it is there.

    Over seeds it is a t interval of the sums of each seed. Images add the variance of a mean of as many images of a
    set, each with its mean over seeds.

    Args:
        parts: of each set, see `right_images`.
        weights: of experiments.
    """
    if not parts or any(name not in part for part in parts for name in weights):
        return None
    sums = [sum(weight * part[name] for name, weight in weights.items()) for part in parts]  # (seeds, images) each
    by_seed = pd.concat([100 * one.mean(axis=1) for one in sums], axis=1).dropna().mean(axis=1)  # (seeds,)
    if len(by_seed) < 2:
        return None
    t = float(stats.t.ppf(0.975, len(by_seed) - 1))
    of_seeds = t * float(by_seed.std(ddof=1)) / len(by_seed) ** 0.5
    of_images = sum(100**2 * float(one.mean(axis=0).var(ddof=1)) / one.shape[1] for one in sums) / len(sums) ** 2
    return Estimate(float(by_seed.mean()), of_seeds, float(np.hypot(of_seeds, 1.96 * of_images**0.5)), len(by_seed))


def table(rows: Iterable[Row], columns: Mapping[str, Callable[[Row], str]], left: int = 1) -> str:
    """Return a Markdown table: of each column its title, and its cell of a row; after the first `left`, numbers."""
    rule = ["---" if place < left else "---:" for place in range(len(columns))]
    lines = [list(columns), rule, *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_experiment(
    runs: pd.DataFrame, names: Iterable[str], columns: Mapping[str, Cell], *, first: str = "experiment", said: str = ""
) -> str:
    """Return a table of one row an experiment, made from its runs; below it what is `said`, and its origin."""
    parts = [runs[runs.experiment == name].sort_values("seed") for name in names]
    own = {first: lambda part: f"`{name_of(part)}`", "runs (failed)": counted}
    return "\n\n".join([table(parts, {**own, **columns}), *([said] if said else []), origin(runs)])


def name_of(part: pd.DataFrame) -> str:
    """Return the experiment whose runs these are."""
    return str(part.experiment.iloc[0])


def counted(part: pd.DataFrame) -> str:
    """Return how many runs there are, and how many of them failed."""
    return f"{len(part)} ({(part.status != 'done').sum()})"


def each(values: Iterable[float]) -> str:
    """Return every value."""
    return ", ".join(f"{value:.1f}" for value in values)


def mean_and_spread(values: pd.Series) -> str:
    """Return mean and standard deviation."""
    spread = f" ({values.std(ddof=1):.1f})" if len(values) > 1 else ""
    return f"{values.mean():.1f}{spread}"


def interval(difference: Interval | None) -> str:
    """Return a difference with its interval."""
    if difference is None:
        return "–"
    if difference.low is None:
        return f"{difference.estimate:+.2f}"
    return f"{difference.estimate:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def p(value: float | None) -> str:
    """Return a p-value; none where the data have no spread."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def origin(runs: pd.DataFrame) -> str:
    """Return one line on where a table's numbers come from, and how many seeds there are so far."""
    commits = ", ".join(sorted(set(runs.commit.dropna())))
    failed = int((runs.status != "done").sum())
    count = f"{len(runs)} runs, none failed"
    if failed:
        count = f"{len(runs)} runs, {failed} of them failed, counted as the majority class"
    minutes = runs.seconds.sum() / 60
    return f"{count}; {seeds(runs)}; {minutes:.0f} minutes of computing on one core each; made with commit {commits}."


def seeds(runs: pd.DataFrame) -> str:
    """Return which seeds there are, and how many an experiment has if that is not all of them."""
    found = sorted(set(runs.seed))
    each = runs.groupby("experiment").seed.nunique()
    text = f"seeds {', '.join(str(seed) for seed in found)}"
    if each.min() == len(found):
        return text
    if each.min() == each.max():
        return f"{text}, {each.min()} of them an experiment"
    return f"{text}, of which experiments have {each.min()} to {each.max()} so far"


def benchmark(name: str) -> dict[str, Any]:
    """Return what a benchmark measured."""
    content: dict[str, Any] = json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def measured_on(machine: dict[str, Any]) -> str:
    """Return on what a benchmark ran."""
    return (
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, torch {machine['torch']}, "
        f"PEFT {machine['peft']}, the same allocator settings for all sides."
    )


def measured_with(found: dict[str, Any]) -> str:
    """Return on what a benchmark ran, and with which model and images."""
    setting = found["setting"]
    batch = f", batches of {setting['batch']}" if "batch" in setting else ""
    return f"{setting['model']}, {setting['image_size']} px{batch}; {measured_on(found['machine'])}"


def study_tables(makers: Mapping[str, Callable[[pd.DataFrame], str]], kept: Path) -> dict[str, str]:
    """Return the table of every study whose rows a folder holds."""
    files = {study: kept / f"{study}.csv" for study in makers}
    return {study: make(pd.read_csv(files[study])) for study, make in makers.items() if files[study].exists()}


def benchmark_tables(makers: Mapping[str, Callable[[], str]]) -> dict[str, str]:
    """Return the table of every benchmark whose results are there."""
    return {name: make() for name, make in makers.items() if (BENCHMARKS / f"{name}.json").exists()}


def run(
    about: str | None, keep: Callable[[Path], None], tables: Callable[[], Mapping[str, str]], *documents: Path
) -> None:
    """Keep what the directories hold that the command names, then make the documents' tables anew."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results_dirs", nargs="*", type=Path, help="records to add to the tables in results/")
    asked = parser.parse_args()
    with cli.user_errors():
        for results_dir in asked.results_dirs:
            keep(results_dir)
        made = tables()
        for document in documents:
            write_atomically(document, filled(document.read_text(encoding="utf-8"), made).encode())
            print(document)
