"""Tables of images: a CSV or Parquet file with columns path, label and perhaps split."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft_vit.base.errors import UserError, foreign_fault, os_fault
from peft_vit.base.extras import require_extra
from peft_vit.base.files import LARGEST_BYTES, read_bytes
from peft_vit.data.files import decode_text

TABLES = (".csv", ".tsv", ".parquet")
INCOMPLETE = "expected a path and a label, one value a column"
_ROWS_AT_ONCE, _LEAST_BYTES = 256, 10  # of a Parquet file; what a row counts beside its texts
_OTHER_NAMES = {  # of columns
    "path": ("filename", "file_name", "filepath", "file", "image"),
    "label": ("class", "category"),
}


def table_rows(path: Path, group: str | None = None, *, every: bool = False) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a table and where each stands, nothing as ""; of every column, or of those that are read."""
    with os_fault("can't be read", path, field="data.path"):
        content = read_bytes(path)
    if path.suffix.lower() == ".parquet":
        require_extra("parquet", packages=("pyarrow",), file=path)
        from pyarrow import parquet

        with foreign_fault("is not a readable Parquet file", path):
            table = parquet.ParquetFile(io.BytesIO(content))
            places = _places(table.schema_arrow.names, path, group, every)
            number = unpacked = 0
            for batch in table.iter_batches(_ROWS_AT_ONCE):  # of a small file there may be any number
                columns = [batch.column(place).to_pylist() for place in places.values()]
                for values in zip(*columns, strict=True):
                    texts = dict(zip(places, map(_text, values), strict=True))
                    number, unpacked = number + 1, unpacked + _LEAST_BYTES + sum(map(len, texts.values()))
                    if unpacked > LARGEST_BYTES:
                        raise ValueError(f"more than {LARGEST_BYTES} bytes, unpacked")
                    yield f"{path}: row {number}", texts
        return
    places, rows = _csv_rows([*io.StringIO(decode_text(content, path), newline="")], path, group, every)[1:]
    for line, row in rows:
        if row:
            yield f"{path}:{line}", {name: row[place].strip() for name, place in places.items()}


def _csv_rows(
    lines: Sequence[str], path: Path, group: str | None = None, every: bool = False
) -> tuple[str, dict[str, int], Iterator[tuple[int, list[str]]]]:
    """Return what divides cells, the places of columns, and the rows with the number of their last line."""
    first = "".join(lines[:1]).lower()
    names = {sign: {name.strip(' "\r\n') for name in first.split(sign)} for sign in ",;\t"}
    delimiter = max(names, key=lambda sign: (names[sign] >= {"path", "label"}, first.count(sign)))
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    header = next(_sound_rows(reader, path), (1, []))[1]
    return delimiter, _places(header, f"{path}:1", group, every), _sound_rows(reader, path, len(header))


def _sound_rows(reader: Any, path: Path, cells: int | None = None) -> Iterator[tuple[int, list[str]]]:
    try:
        for row in reader:
            if row and cells not in (None, len(row)):
                raise UserError(INCOMPLETE, file=f"{path}:{reader.line_num}")
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"is not a valid CSV ({error})", file=f"{path}:{reader.line_num}") from None


def relabelled(path: Path, is_meant: Callable[[str], bool], label: str) -> bytes:
    """Return the content of a CSV with another label in the rows whose path is meant; all else stays as it was."""
    content = read_bytes(path)
    lines = [*io.StringIO(decode_text(content, path), newline="")]
    delimiter, places, rows = _csv_rows(lines, path)
    start = 1
    for end, row in rows:
        if row and is_meant(row[places["path"]].strip()):
            row[places["label"]] = label
            text, line = io.StringIO(), lines[end - 1]
            csv.writer(text, delimiter=delimiter, lineterminator=line[len(line.rstrip("\r\n")) :]).writerow(row)
            lines[start:end] = [text.getvalue(), *[""] * (end - start - 1)]
        start = end
    mark = codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""
    return mark + "".join(lines).encode()


def _text(value: Any) -> str:
    """Return a Parquet cell as a CSV has it."""
    if isinstance(value, list | tuple):
        return "|".join(map(_text, value))
    return "" if value is None or value != value else str(value).strip()  # noqa: PLR0124


def _places(header: Sequence[str], file: str | Path, group: str | None, every: bool) -> dict[str, int]:
    """Return where the columns stand that are read, whatever the capitals and the spaces around their names.

    These are path, split, that of groups, and label, or without this one all others but comment.
    """
    names = [name.strip() for name in header]
    lower = [name.lower() for name in names]
    known = {name: name for name in ("path", "label", "split", "comment")}
    for column, others in _OTHER_NAMES.items():
        if column not in lower:
            known |= {name: column for name in others if name in lower}
    columns = [known.get(name.lower(), name) for name in names]
    beside = {"path", "split", group}
    labels = {"label"} if "label" in columns else {*columns} - {"", "comment"} - beside
    read = [name for name in columns if name and (every or name in labels | beside)]
    if "path" not in read or not labels or len(set(read)) < len(read):
        message = f"has the columns {', '.join(header)}; expected path, label and perhaps split"
        raise UserError(message, file=file)
    return {name: columns.index(name) for name in ("path", *read)}
