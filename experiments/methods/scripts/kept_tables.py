"""Every table of the reports on the kept studies, kept in results/tables.tar.xz, so that a changed digit is seen.

python -m experiments.methods.scripts.kept_tables     writes them anew
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

from experiments.methods.scripts.study_evidence import RESULTS, unpacked
from peft_vit.lab.analysis import analyze, load_studies
from peft_vit.lab.report.build import study_documents
from peft_vit.runs.records.run_rows import as_csv

KEPT = RESULTS / "tables.tar.xz"
STUDIES = ("study_elpv", "study_digits", "study_fashion", "study_elpv_published", "elpv_published")


def tables_of(study: str) -> dict[str, str]:
    """Return table -> CSV of the report on one kept study."""
    with unpacked(study) as folder:
        documents = study_documents([analyze(read) for read in load_studies(folder)])
        return {f"{doc.slug}_{table.slug}": as_csv(table.data) for doc in documents for table in doc.tables()}


def kept_tables() -> dict[str, dict[str, str]]:
    """Return study -> table -> CSV as it was kept."""
    kept: dict[str, dict[str, str]] = {study: {} for study in STUDIES}
    with tarfile.open(KEPT) as archive:
        for member in archive:
            study, _, name = member.name.removesuffix(".csv").partition("/")
            content = archive.extractfile(member)
            assert content is not None
            kept[study][name] = content.read().decode()
    return kept


def _members() -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for study in STUDIES:
        for name, text in sorted(tables_of(study).items()):
            info, content = tarfile.TarInfo(f"{study}/{name}.csv"), text.encode()
            info.size = len(content)
            yield info, content


if __name__ == "__main__":
    with tarfile.open(KEPT, "w:xz") as archive:
        for info, content in _members():
            archive.addfile(info, io.BytesIO(content))
