"""Times of exported models as a table."""

from __future__ import annotations

from collections.abc import Sequence

from peft_vit.records import BenchRow
from peft_vit.report.document import Table
from peft_vit.report.formatting import fixed, joined, megabytes


def bench_table(rows: Sequence[BenchRow], repeats: int) -> Table:
    """Return a row a model, batch size and number of threads."""
    over = joined(dict.fromkeys(row.over for row in rows))
    runtimes = joined(sorted({row.runtime for row in rows}))
    return Table.of(
        "bench",
        f"Calls on {rows[0].processor}; {runtimes}",
        (
            {
                "file": row.file,
                "format": row.format,
                "size": megabytes(row.bytes),
                "threads": str(row.threads),
                "batch": str(row.batch),
                "median ms": fixed(1000 * row.median_s),
                "quartiles": f"{fixed(1000 * row.low_s)} to {fixed(1000 * row.high_s)}",
                "over float32": fixed(row.ratio, 3),
                "images/s": fixed(row.images_per_s, 1),
            }
            for row in rows
        ),
        f"Each model in {repeats} process{'' if repeats == 1 else 'es'} of its own, {rows[0].calls} calls in all. "
        f"Ratios are of medians, over the fastest float32 model at the same batch size and threads: {over}.",
    )
