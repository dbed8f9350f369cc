"""The figures of docs/studies.md and of "What we found": the report's, with the digest of what they show."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib.patches import Patch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from experiments.methods.scripts.bytes_figure import accuracy_against_bytes
from experiments.methods.scripts.main_figure import accuracy_and_bytes, for_both_pages
from experiments.methods.scripts.rank_maps import rank_maps
from experiments.methods.scripts.study_tables import DESCRIPTIVE, KINDS, MAIN, MARGIN, REFERENCE
from experiments.scripts.evidence import ROOT
from peft_vit.base.files import write_atomically
from peft_vit.deploy.page.document import Drawing
from peft_vit.deploy.page.figure import GRID, METHOD_COLORS, Canvas, draw
from peft_vit.lab.analysis import Analysis
from peft_vit.lab.report.figures import forests

_RANKED = ("adalora_best", "qa_adalora_nf4", "adalora_published")
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
IN_DOCS = ROOT / "docs" / "images" / "accuracy_by_bytes.svg"
DIGEST = "Data-SHA256"  # a text in the PNG file, a comment in the SVG file


def drawings(analyses: Mapping[str, Analysis]) -> Iterator[tuple[Path, Drawing]]:
    """Yield a file and a figure for each that the documents show.

    Args:
        analyses: by the study's name, those that results/ holds.
    """
    for name, analysis in analyses.items():
        if name == DESCRIPTIVE:
            continue
        if (drawing := forests(analysis).get(REFERENCE)) is not None:
            yield IMAGES / f"{name}_differences.png", _with_margin(drawing)
    if (elpv := analyses.get(MAIN)) is not None:
        yield IMAGES / f"{MAIN}_bytes.png", accuracy_against_bytes(elpv.methods)
        shown = [one.experiment.name for one in elpv.allocation if one.experiment.name in _RANKED]
        yield IMAGES / f"{MAIN}_ranks.png", rank_maps(elpv.study, shown)
    if analyses.keys() >= KINDS.keys():
        yield IN_DOCS, accuracy_and_bytes(analyses)


def _with_margin(drawing: Drawing) -> Drawing:
    """Return a figure of differences with a band around 0, within which one does not matter."""
    points = 100 * MARGIN

    def paint(canvas: Canvas) -> None:
        drawing.paint(canvas)
        (axes,), (legend,), band = canvas.figure.axes, canvas.figure.legends, {"color": GRID, "alpha": 0.6, "lw": 0}
        low, high = axes.get_xlim()
        axes.axvspan(-points, points, **band, zorder=0)
        axes.set_xlim(min(low, -points), max(high, points))
        legend.remove()
        entries = [*legend.legend_handles, Patch(**band, label=f"margin, {points:g} point")]
        canvas.legend(entries, (2, 4), handletextpad=0.4)

    rows = [row | {"margin": MARGIN} for row in drawing.data]
    return draw(drawing.slug, drawing.title, drawing.caption, drawing.height_in, paint, rows)


def digest(drawing: Drawing) -> str:
    """Return the SHA-256 of the numbers behind a figure and of the methods' colors in it.

    Numbers are rounded to ten digits, which every machine has in common.
    """
    rows = [{key: _rounded(value) for key, value in row.items()} for row in drawing.data]
    colors = sorted(color for color in METHOD_COLORS.values() if color in drawing.svg)
    return hashlib.sha256(json.dumps([colors, rows], sort_keys=True).encode()).hexdigest()


def _rounded(value: object) -> object:
    return float(f"{value:.10g}") if isinstance(value, float) else value


def recorded_digest(file: Path) -> str | None:
    """Return the digest that a figure's file was drawn with; None if it has none."""
    if file.suffix == ".svg":
        found = re.search(rf"<!-- {DIGEST}: (\w+) -->", file.read_text(encoding="utf-8"))
        return None if found is None else found[1]
    with Image.open(file, formats=("PNG",)) as image:  # noqa: TID251 - this format alone
        return dict(image.info).get(DIGEST)


def write_figures(analyses: Mapping[str, Analysis]) -> None:
    """Write every figure of the studies."""
    for file, drawing in drawings(analyses):
        write_figure(file, drawing)


def write_figure(file: Path, drawing: Drawing) -> None:
    """Write a figure as PNG or SVG, with its digest; one whose numbers and colors have not changed stays as it is."""
    own = digest(drawing)
    if file.exists() and recorded_digest(file) == own:
        return
    svg = file.suffix == ".svg"
    write_atomically(
        file, f"{for_both_pages(drawing.svg)}<!-- {DIGEST}: {own} -->\n".encode() if svg else _png(drawing, own)
    )
    print(file)


def _png(drawing: Drawing, own: str) -> bytes:
    info, content = PngInfo(), io.BytesIO()
    info.add_text(DIGEST, own)
    with Image.open(io.BytesIO(drawing.png), formats=("PNG",)) as image:  # noqa: TID251 - this format alone
        image.save(content, format="png", pnginfo=info, optimize=True)
    return content.getvalue()
