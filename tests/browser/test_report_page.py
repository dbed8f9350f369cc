"""The page in a browser, from disk: figures draw and answer, nothing leaves, nothing foreign runs."""

import csv
import io
from dataclasses import fields
from pathlib import Path

import numpy as np
import planted
import pytest
from chromium import axe_violations, fits_the_screen, needs_chromium

from peft_vit.core.records import RunRecord
from peft_vit.deploy.page.document import SECTION_TITLES, Drawing, StudyDocument, Table
from peft_vit.deploy.page.figure import Canvas, draw
from peft_vit.deploy.page.files import write_html
from peft_vit.lab.report import ReportFiles, build_report

pytestmark = [pytest.mark.slow, needs_chromium]

KEPT = ("linear_probe", "lora_r1", "lora_r8", "adalora_top_k_fisher", "qa_lora_4bit_nf4_constant")
HOSTILE = "</script><script>alert(1)</script>\"'<!--\u2028\u200f<img src=x onerror=alert(2)> $x^2$ &lt;"


@pytest.fixture(scope="module")
def records() -> list[RunRecord]:
    return [record for record in planted.quickstart() if record.spec.experiment.name in KEPT]


@pytest.fixture(scope="module")
def built(records: list[RunRecord], tmp_path_factory: pytest.TempPathFactory) -> ReportFiles:
    folder = tmp_path_factory.mktemp("page")
    return build_report(planted.write(folder / "results", records), folder / "report")


@pytest.fixture
def page(open_page, built: ReportFiles):
    return open_page(built.html)


def values(records: list[RunRecord], name: str) -> dict[int, float]:
    return {r.spec.seed: r.test.accuracy for r in records if r.spec.experiment.name == name and r.test}


def series(page, figure: str, name: str) -> str:
    """Return the index that a figure gave to a series, by the name on its button."""
    button = page.locator(f"#quickstart-{figure} button[data-series]").filter(has_text=name)
    assert button.count() == 1
    return button.get_attribute("data-series")


def bring_into_view(page, part) -> None:
    """Scroll, and let the page see it: a tooltip goes when its figure moves."""
    part.scroll_into_view_if_needed()
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def tips_over(page, parts: str) -> list[list[str]]:
    """Return the lines of the tooltip over the middle of each of some SVG elements."""
    tips = []
    for part in page.locator(parts).all():
        bring_into_view(page, part)
        box = part.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        tip = page.locator(".tip")
        tips.append(tip.locator("*").all_inner_texts() if tip.is_visible() else [])
    return tips


def test_every_figure_draws(page, built: ReportFiles) -> None:
    drawn = page.locator("figure svg")
    assert drawn.count() == len(list((built.markdown.parent / "figures").glob("*.svg")))
    for svg in drawn.all():
        box = svg.bounding_box()
        assert box["width"] > 300
        assert box["height"] > 100
        shapes = svg.evaluate("s => [...s.querySelectorAll('path, use')].filter(e => e.getBBox().width > 0).length")
        assert shapes > 10
    names = page.locator("figure svg[role=img]").evaluate_all("all => all.map((one) => one.getAttribute('aria-label'))")
    assert names == page.locator("figure h3").all_text_contents()
    assert page.locator("figure:has(svg) figcaption").count() == len(names) > 5


def test_pointing_at_a_value_names_experiment_seed_and_value(page, records: list[RunRecord]) -> None:
    reference = values(records, "linear_probe")
    for figure, name in (
        ("accuracy_by_method", "lora_r8"),
        ("accuracy_by_method", "adalora_top_k_fisher"),
        ("differences_to_linear_probe", "lora_r8"),
    ):
        tips = tips_over(page, f'#quickstart-{figure} [data-series="{series(page, figure, name)}"] use')
        own = values(records, name)
        for seed, accuracy in own.items():
            text = f"seed {seed}: {100 * accuracy:.1f} %"
            if "differences" in figure:
                text = f"seed {seed}: {100 * (accuracy - reference[seed]):+.1f} points"
            assert any(tip[:2] == [name, text] for tip in tips), tips
        mean = f"mean, n = 2 seeds: {100 * np.mean(list(own.values())):.1f} %"
        assert "differences" in figure or any(tip and tip[1].startswith(mean) for tip in tips)


def test_pointing_at_a_cell_names_the_rank_of_its_site(page, records: list[RunRecord]) -> None:
    (tip,) = tips_over(page, '#quickstart-rank_maps [data-gid="series0-0"] path >> nth=8')  # second row, third column
    runs = [r for r in records if r.spec.experiment.name == "adalora_top_k_fisher"]
    last = np.mean([r.rank_history[-1].ranks["blocks.1.attn.value"] for r in runs])
    assert tip == ["adalora_top_k_fisher", "block 1, value", f"rank {last:.2f}"]


def test_a_button_switches_its_series_and_only_that(page) -> None:
    figure = "#quickstart-differences_to_linear_probe"
    number, other = (
        series(page, "differences_to_linear_probe", "lora_r8"),
        series(page, "differences_to_linear_probe", "lora_r1"),
    )
    button = page.locator(f'{figure} button[data-series="{number}"]')
    parts, others = page.locator(f'{figure} [data-series="{number}"] use'), f'{figure} svg [data-series="{other}"] use'
    assert parts.count() > 2, "one a pair, and the mean"
    button.focus()
    page.keyboard.press("Space")
    assert button.get_attribute("aria-pressed") == "false"
    assert "line-through" in button.evaluate("b => getComputedStyle(b).textDecorationLine"), "not by color alone"
    assert all(not part.is_visible() for part in parts.all())
    assert page.locator(others).first.is_visible()
    assert all(tip[:1] != ["lora_r8"] for tip in tips_over(page, others))
    button.click()
    assert all(part.is_visible() for part in parts.all())
    pressed = page.locator(f"{figure} button[data-series]")
    for state in ("false", "true"):
        page.locator(f"{figure} button.all").click()
        assert {b.get_attribute("aria-pressed") for b in pressed.all()} == {state}


def test_arrow_keys_go_from_value_to_value(page, records: list[RunRecord]) -> None:
    page.locator("#quickstart-accuracy_by_method .drawing").focus()
    first = values(records, "linear_probe")[0]
    page.keyboard.press("ArrowRight")
    assert page.locator(".tip").inner_text().split("\n") == ["linear_probe", f"seed 0: {100 * first:.1f} %"]
    page.keyboard.press("ArrowRight")
    assert page.locator(".tip").inner_text().split("\n")[1].startswith("seed 1: ")
    page.keyboard.press("Escape")
    assert not page.locator(".tip").is_visible()


def test_a_finger_shows_a_value_too(open_page, built: ReportFiles) -> None:
    page = open_page(built.html, has_touch=True, viewport={"width": 360, "height": 700})
    part = page.locator('#quickstart-accuracy_by_method [data-series="1"] use').last
    bring_into_view(page, part)
    box = part.bounding_box()
    page.touchscreen.tap(box["x"] + 2, box["y"] + 2)
    tip = page.locator(".tip")
    assert tip.is_visible()
    inside = tip.bounding_box()
    assert inside["x"] >= 0
    assert inside["x"] + inside["width"] <= 360


def test_the_data_of_every_figure_is_saved_as_the_file_beside_the_report(page, built: ReportFiles) -> None:
    on_disk = {file.name: file for file in (built.markdown.parent / "figures").glob("*.csv")}
    buttons = page.locator("button.csv")
    assert buttons.count() == len(on_disk)
    for button in buttons.all():
        with page.expect_download() as download:
            button.click()
        name = download.value.suggested_filename
        assert Path(download.value.path()).read_bytes() == on_disk.pop(name).read_bytes()
    assert on_disk == {}


@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 720)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_screen_says_first_what_came_out_and_axe_finds_nothing(
    open_page, built: ReportFiles, width: int, height: int, scheme: str
) -> None:
    page = open_page(built.html, viewport={"width": width, "height": height}, color_scheme=scheme)
    assert fits_the_screen(page)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 18, 22)"
    assert dark == (scheme == "dark")
    assert page.get_by_text("Best on validation:").bounding_box()["y"] < height - 20
    assert width < 1280 or axe_violations(page) == []


def test_what_is_looked_up_is_folded_and_stands_open_on_paper(open_page, built: ReportFiles) -> None:
    page = open_page(built.html)
    folds, main = page.locator(".fold"), page.locator("#quickstart > .wide, #quickstart section > .wide").first
    assert folds.count() > 3
    assert main.is_visible()
    assert not any(table.is_visible() for table in page.locator(".fold .wide").all())
    page.get_by_text("How steadily the loss came down").click()
    assert page.locator(".fold[open] .wide").count() == 1
    assert len(page.pdf(format="A4")) > 50_000
    assert page.locator(".fold[open]").count() == folds.count()
    page.emulate_media(media="print")
    assert page.locator("figure svg").first.is_visible()
    assert not page.locator(".controls").first.is_visible()
    still = open_page(built.html, java_script_enabled=False)
    still.emulate_media(media="print")
    assert all(table.bounding_box()["height"] > 10 for table in still.locator(".fold table").all())
    still.emulate_media(media="screen")
    assert all(svg.bounding_box()["height"] > 100 for svg in still.locator("figure svg").all())
    assert not any(button.is_visible() for button in still.locator("figure button").all()), "none pretends"


def hostile_document() -> StudyDocument:
    """Return a document whose every text is hostile."""

    def paint(canvas: Canvas) -> None:
        axes = canvas.figure.add_subplot()
        canvas.series(HOSTILE, "#0072b2", "o")
        canvas.series("harmless", "#d55e00", "s")
        for y, name in ((1, HOSTILE), (2, "harmless")):
            canvas.plot(name, axes, [1, 2], [y, y], [f"{HOSTILE} {i}" for i in range(2)], marker="o", ls="", label=name)
        axes.set_title(HOSTILE)
        axes.legend()

    rows = ({"experiment": HOSTILE, "value": 0.1}, {"experiment": "a,b", "value": None})
    drawing: Drawing = draw("figure", HOSTILE, HOSTILE, 3.0, paint, rows)
    table = Table("table", HOSTILE, (HOSTILE,), ((HOSTILE,),), HOSTILE, rows)
    texts = {
        "label": HOSTILE,
        "slug": "study",
        "alerts": (HOSTILE,),
        "warnings": (HOSTILE,),
        "facts": ((HOSTILE, HOSTILE),),
    }
    sections = dict.fromkeys(SECTION_TITLES, ()) | {SECTION_TITLES[0]: (drawing, table)}
    empty = {each.name: () for each in fields(StudyDocument)}
    return StudyDocument(**{**empty, **texts, "came_out": (HOSTILE,), "not_shown": (HOSTILE,), "sections": sections})


def test_hostile_names_are_shown_and_run_nothing(open_page, tmp_path: Path) -> None:
    file = tmp_path / "hostile.html"
    file.write_text(write_html([hostile_document()]), encoding="utf-8")
    page = open_page(file)
    assert page.locator("img").count() == 0
    assert page.locator("script:not([type])").count() == 1
    figure = page.locator("#study-figure")
    assert HOSTILE in (figure.locator("svg").text_content() or "")
    assert HOSTILE in (figure.locator("button").first.text_content() or "")
    (tip, *_) = tips_over(page, '#study-figure svg [data-series="0"] use')
    assert tip[0].startswith("</script><script>alert(1)")
    with page.expect_download() as download:
        figure.locator("button.csv").click()
    rows = list(csv.reader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"), newline="")))
    assert rows == [["experiment", "value"], [HOSTILE, "0.1"], ["a,b", ""]]
    page.wait_for_timeout(50)


def test_an_inline_script_of_others_would_not_run(open_page, built: ReportFiles, tmp_path: Path, seen) -> None:
    """The page's policy names our script by its hash: even text that broke out of its place would not run."""
    text = built.html.read_text(encoding="utf-8")
    file = tmp_path / "injected.html"
    file.write_text(text.replace("</main>", "<script>document.title = 'broken in'</script></main>"), encoding="utf-8")
    page = open_page(file)
    assert page.title() != "broken in"
    assert page.locator("html.live").count() == 1, "ours ran"
    assert len(seen.errors) == 1
    assert "Content Security Policy" in seen.errors[0]
    seen.errors.clear()
