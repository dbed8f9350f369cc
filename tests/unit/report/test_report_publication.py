"""Figures for a paper: fonts inside, sizes as stated, hostile names as text; and what every figure says of itself."""

import io
import re
import struct
from xml.etree import ElementTree

import matplotlib
import numpy as np
import planted
import pypdf
import pytest
from matplotlib.lines import Line2D
from matplotlib.text import Text

from peft_vit.core.records import RunRecord
from peft_vit.deploy.page.document import Drawing
from peft_vit.deploy.page.figure import WIDTHS_IN, Canvas, draw, publication_files, publication_style
from peft_vit.deploy.page.files import captions
from peft_vit.lab.analysis import Analysis, analyze
from peft_vit.lab.report.build import study_documents

HOSTILE = "</script><script>alert(1)</script>\"' <!-- --> \u2028\u200f $x^2$ & ]]>"


@pytest.fixture(scope="module")
def hostile() -> Drawing:
    def paint(canvas: Canvas) -> None:
        axes = canvas.figure.add_subplot()
        canvas.series(HOSTILE, "#0072b2", "o")
        canvas.plot(HOSTILE, axes, [1, 2, 3], [1, 3, 2], ["one", "two", HOSTILE], marker="o", label=HOSTILE)
        axes.set_xlabel("share (%)")
        axes.legend()

    return draw("hostile", HOSTILE, HOSTILE, 2.5, paint, [{"name": HOSTILE, "value": 0.1}])


@pytest.fixture(scope="module")
def files(hostile: Drawing) -> dict[str, bytes]:
    return dict(publication_files(hostile))


@pytest.fixture(scope="module")
def analysis(few: list[RunRecord]) -> Analysis:
    return analyze(planted.study_of(few))


@pytest.fixture(scope="module")
def drawings(analysis: Analysis) -> tuple[Drawing, ...]:
    return study_documents([analysis])[0].drawings()


@pytest.mark.parametrize(("columns", "width_in"), [("one", 3.5), ("two", 7.2)])
def test_files_have_the_stated_size_and_bring_their_fonts(
    files: dict[str, bytes], columns: str, width_in: float
) -> None:
    pdf, svg, png = (files[f"_{columns}_column.{ending}"] for ending in ("pdf", "svg", "png"))
    (page,) = pypdf.PdfReader(io.BytesIO(pdf)).pages
    assert [float(page.mediabox.width), float(page.mediabox.height)] == pytest.approx([72 * width_in, 72 * 2.5])
    tree = ElementTree.fromstring(svg)
    assert tree.get("width") == f"{72 * width_in:g}pt"
    assert struct.unpack(">II", png[16:24])[0] == round(300 * width_in)
    tags = {element.tag.split("}")[1] for element in tree.iter()}
    assert "path" in tags
    assert not {"text", "script", "image"} & tags  # outlines need no font
    fonts = [font.get_object() for font in page["/Resources"]["/Font"].values()]
    assert fonts
    for font in fonts:
        assert font["/Subtype"] != "/Type3"
        inner = font["/DescendantFonts"][0].get_object() if "/DescendantFonts" in font else font
        program = inner["/FontDescriptor"].get_object()["/FontFile2"].get_object().get_data()
        assert program[:4] in {b"\x00\x01\x00\x00", b"true"}, "a TrueType font program"


def test_hostile_names_are_text_in_the_svg_of_the_page_and_in_captions(
    hostile: Drawing, drawings: tuple[Drawing, ...]
) -> None:
    tree = ElementTree.fromstring(hostile.svg)
    assert any(HOSTILE in "".join(element.itertext()) for element in tree.iter("{http://www.w3.org/2000/svg}text"))
    assert not list(tree.iter("{http://www.w3.org/2000/svg}script"))
    document = type("Document", (), {"slug": "s", "label": HOSTILE, "notices": (HOSTILE,)})()
    document.drawings = lambda: (hostile, *drawings)
    text = captions([document])
    assert text.count("\n### s_") == len(drawings) + 1
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_text_in_every_figure_has_at_least_six_and_a_half_points(drawings: tuple[Drawing, ...]) -> None:
    assert len(drawings) == 6
    for drawing in drawings:
        for columns, width in WIDTHS_IN.items():
            with matplotlib.rc_context(publication_style(columns)):
                canvas = Canvas(width, drawing.height_in)
                drawing.paint(canvas)
                texts = canvas.figure.findobj(lambda a: isinstance(a, Text) and bool(a.get_text()))
            assert len(texts) > 3
            assert min(text.get_fontsize() for text in texts) >= 6.5, drawing.slug


def test_every_point_lies_inside_its_figure_and_where_its_marker_is(drawings: tuple[Drawing, ...]) -> None:
    for drawing in drawings:
        assert drawing.data
        size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing.svg)
        assert size is not None
        for point in drawing.points:
            assert -1 <= point.x_pt <= float(size[1]) + 1, drawing.slug
            assert -1 <= point.y_pt <= float(size[2]) + 1, drawing.slug
        assert {point.series for point in drawing.points} == set(range(len(drawing.series)))
    # The SVG's own coordinates are the second opinion: one `use` element a marker.
    drawing = next(d for d in drawings if d.slug == "accuracy_by_method")
    used = {(float(x), float(y)) for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', drawing.svg)}
    for point in drawing.points:
        assert min(np.hypot(x - point.x_pt, y - point.y_pt) for x, y in used) < 0.1, point


def test_a_legend_entry_goes_with_its_series() -> None:
    canvas = Canvas(3, 3)
    axes = canvas.figure.add_subplot()
    canvas.series("a", "#000000")
    axes.plot([1], [1], label="a")
    axes.plot([2], [2], label="b")
    canvas.figure.legend(handles=[Line2D([], [], label="a")])
    axes.legend()
    canvas.finish()
    claimed = [text.get_gid() for text in canvas.figure.findobj(Text) if text.get_text() in {"a", "b"}]
    assert sum(gid is not None for gid in claimed) == 2
    assert len(claimed) == 3
