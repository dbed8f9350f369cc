"""The page of `peft-vit label`, in Chromium: a whole labelling by keys and on walls, in light and dark."""

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chromium import axe_violations, context_of, fits_the_screen, needs_chromium
from label_sessions import session_of, write_digits

from peft_vit.data.sources.folders import find_images
from peft_vit.label.corrections import Checking, Corrections, Doubt
from peft_vit.label.images import ImageFolder
from peft_vit.label.labels import LabelStore, Row
from peft_vit.label.session import Session, Shown

pytest.importorskip("uvicorn")
pytest.importorskip("playwright")
from label_page import Person

from peft_vit.label.server import LabelServer, listen

pytestmark = [pytest.mark.slow, needs_chromium, pytest.mark.usefixtures("cache")]
HOSTILE = "'<img src=x onerror=alert(1)>'"


@contextmanager
def serving(session: Session | Checking) -> Iterator[LabelServer]:
    """Serve a session, which fits meanwhile."""
    server, stop = LabelServer(session, listen()), threading.Event()
    threading.Thread(target=server.serve, daemon=True).start()
    if isinstance(session, Session):
        threading.Thread(target=session.work, args=(stop,), daemon=True).start()
    yield server
    stop.set()


@contextmanager
def opened(browser: Any, server: LabelServer, **options: Any) -> Iterator[Any]:
    """Open the page; afterwards it has asked nobody else, nothing was refused, and no script has failed."""
    faults: list[str] = []
    context = context_of(browser, **options)
    page = context.new_page()
    ours = (f"http://127.0.0.1:{server.port}/", "data:")
    page.on("request", lambda request: None if request.url.startswith(ours) else faults.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: (faults.append(dialog.message), dialog.dismiss()))
    page.on("console", lambda message: faults.append(message.text) if "Security" in message.text else None)
    page.goto(server.address)
    page.locator("#question", has_text=re.compile(".")).wait_for()
    assert "key" not in page.url
    yield page
    context.close()
    assert faults == []


def tap(page: Any, key: str) -> None:
    """Press a key once the image is seen: before, none answers."""
    page.locator("#main:not([aria-busy=true])").wait_for()
    page.keyboard.press(key)


def press(page: Any, key: str, then: int) -> None:
    """Press a key, after which so many images are labelled."""
    tap(page, key)
    page.locator("#counted", has_text=re.compile(f"^{then} of")).wait_for(timeout=20_000)


def look(page: Any, picture: Path) -> None:
    """Look at a view in light and dark, wide and on a phone: it fits, and axe finds nothing."""
    page.reload()
    page.locator("#question", has_text=re.compile(".")).wait_for()
    for scheme, width in (("light", 1200), ("dark", 390)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 844})
        page.screenshot(path=f"{picture}_{scheme}.png")
        assert fits_the_screen(page)
        assert axe_violations(page) == []


def test_a_folder_is_labelled_by_keys_and_on_walls(browser, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("peft_vit.label.order.FEWEST_OF_CLASS", 3)
    images, pictures, seen = tmp_path / "images", tmp_path / "pictures", []
    images.mkdir()
    truth = write_digits(images, 120, classes=4)
    session = session_of(images, order="herding")
    with (
        serving(session) as server,
        opened(browser, server) as page,
        opened(browser, server, bypass_csp=True) as viewer,
    ):
        person = Person(page, truth, None)
        monkeypatch.setattr(person, "look", lambda kind: (seen.append(kind), look(viewer, pictures / kind)))
        person.answer_until(120)
        look(viewer, pictures / "done")
        assert page.inner_text("#question") == "All images are labelled."
        assert "Right on" in page.inner_text("#accuracy")
    assert {*seen} == {"image", "proposed", "wall"}
    assert person.by_hand < 95  # keys and clicks
    found = find_images(images / "labels.csv")  # as `train` does
    assert found.classes == truth
    assert 12 < len(found.tested) < 36


def test_back_skip_comment_unsure_and_hostile_names(browser, tmp_path) -> None:
    session = session_of(tmp_path, digits=12)
    with serving(session) as server, opened(browser, server) as page, opened(browser, server) as other:
        first = page.inner_text("#question")
        tap(page, "Escape")  # out of the field, in which one types the first class
        tap(page, "s")
        page.locator("#question", has_not_text=first).wait_for()
        second = page.inner_text("#question")
        tap(page, "Escape")
        tap(page, "c")
        page.keyboard.type(HOSTILE)
        tap(page, "Escape")
        tap(page, "u")
        page.locator("#question", has_not_text=second).wait_for()
        tap(page, "Escape")
        tap(page, "z")
        page.locator("#question", has_text=second).wait_for()
        assert page.input_value("#comment") == HOSTILE
        assert "U keeps it" in page.inner_text("#note")
        page.keyboard.type("a/b")
        tap(page, "Enter")
        page.locator("#fault", has_text="expected 1 to 80 letters").wait_for()
        page.fill("#new", "b &lt;b&gt;")
        press(page, "Enter", 1)
        other.locator("#counted", has_text=re.compile("^1 of")).wait_for()  # without being asked
        assert "b &lt;b&gt;" in other.inner_text("#classes")
        tap(page, "Escape")
        tap(page, "z")  # which keeps it
        page.locator("#take", has_text="keeps b &lt;b&gt;").wait_for()
        assert page.inner_text("#skip") == "S label it later"
        press(page, "1", 1)
        page.locator("#question", has_not_text=second).wait_for()
    row = LabelStore(tmp_path).rows[second]
    assert (row.labels, row.comment) == (("b &lt;b&gt;",), HOSTILE)


def test_a_state_from_before_an_answer_is_not_shown_after_it(browser, tmp_path) -> None:
    held = []
    with serving(session_of(tmp_path, digits=12)) as server, opened(browser, server) as page:
        first = page.inner_text("#question")
        page.route("**/state", lambda route: held.append((route, route.fetch())))
        page.locator("#counted").wait_for()
        while not held:
            page.wait_for_timeout(100)
        page.keyboard.type("a")
        press(page, "Enter", 1)
        page.locator("#question", has_not_text=first).wait_for()
        second = page.inner_text("#question")
        route, response = held[0]
        route.fulfill(response=response)
        page.wait_for_timeout(300)
        assert page.inner_text("#question") == second


def test_enter_takes_a_wall_whatever_is_open(browser, tmp_path, monkeypatch) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    session = session_of(tmp_path, digits=30)
    session.images.is_sound(session.images.number["broken.png"], 64)
    free = [i for i, name in enumerate(session.images.names) if not session.images.is_test(i) and name != "broken.png"]
    session.record(free[:2], ["a"])
    session._offered = Shown(tuple(free[2:8]), is_wall=True, proposed="a")
    monkeypatch.setattr(session, "fit", lambda: None)
    with serving(session) as server, opened(browser, server) as page:
        page.click("#missing summary")
        assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
        press(page, "Enter", 8)


@pytest.mark.parametrize(
    ("task", "typed", "kept"),
    [("multilabel", ["red", "blue", None], ("red", "blue")), ("regression", ["1.5", "2", "-3"], ("-3",))],
)
def test_several_labels_and_numbers(task, typed, kept, browser, tmp_path) -> None:
    with serving(session_of(tmp_path, digits=12, task=task)) as server, opened(browser, server) as page:
        for done, text in enumerate(typed):
            name = page.inner_text("#question")
            if text is None:
                tap(page, "1")
                tap(page, "2")
            else:
                page.fill("#new", text)
            press(page, "Enter", done + 1)
    assert LabelStore(tmp_path, task).rows[name].labels == kept
    assert find_images(tmp_path / "labels.csv").task.name == task


def test_a_button_trains_and_the_page_says_what_it_says(browser, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    truth = write_digits(images, 12, classes=2)
    wait = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.05)\n"
    lines = f"print('epoch 1', flush=True)\n{wait}print('Model: <b>m</b>\\nPage: m/report.html')"
    monkeypatch.setattr("peft_vit.label.training._COMMAND", [sys.executable, "-c", lines])
    session = session_of(images)
    with (
        serving(session) as server,
        opened(browser, server) as page,
        opened(browser, server, bypass_csp=True) as viewer,
    ):
        page.click("#train")
        page.locator("#fault", has_text="needs 2 classes").wait_for()
        rows = {name: Row((label,), "train") for name, label in list(truth.items())[:10]}
        LabelStore(images).change(rows, {})
        page.locator("#counted", has_text=re.compile("^10 of")).wait_for()
        assert "'digit 0', 'digit 1'" in page.inner_text("#untested")
        look(viewer, tmp_path / "pictures" / "untested")
        page.click("#tests")
        page.locator("#untested", has_text="come first").wait_for()
        assert page.is_hidden("#tests")
        page.click("#tune")
        page.locator("#said", has_text="epoch 1").wait_for()
        assert page.is_disabled("#train")
        look(viewer, tmp_path / "pictures" / "training")
        (tmp_path / "go").touch()
        page.locator("#said", has_text="Page: m/report.html").wait_for()
        assert "<b>m</b>" in page.inner_text("#said")
        page.locator("#train:enabled").wait_for()


def test_doubted_labels_are_kept_or_corrected_by_a_key_and_undone(browser, tmp_path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name, label in write_digits(images, 12, classes=2).items():
        digit = label.removeprefix("digit ")
        (images / digit).mkdir(exist_ok=True)
        (images / name).rename(images / digit / name)
    of_0, of_1 = (sorted(file.name for file in (images / str(k)).iterdir()) for k in range(2))
    doubts = [
        Doubt(f"0/{of_0[0]}", "0", is_test=False, believed="1", sure=0.97),
        Doubt(f"1/{of_1[0]}", "1", is_test=False, believed="0", sure=0.6),
        Doubt(f"0/{of_0[1]}", "0", is_test=True),
    ]
    folder, train = ImageFolder(images), f"peft-vit train {images}"
    checking = Checking(Corrections(find_images(images)), folder, doubts, ["0", "1"], train)

    def then(page: Any, to_check: int) -> None:
        page.locator("#counted", has_text=re.compile(f"^{to_check} to check")).wait_for(timeout=20_000)

    with (
        serving(checking) as server,
        opened(browser, server) as page,
        opened(browser, server, bypass_csp=True) as viewer,
    ):
        look(viewer, tmp_path / "pictures" / "check")
        assert "'1' (97%)" in page.inner_text("#note")
        tap(page, "1")  # the class of that name
        then(page, 2)
        assert not (images / "0" / of_0[0]).exists()
        assert (images / "1" / of_0[0]).exists()
        tap(page, "z")
        then(page, 3)
        assert (images / "0" / of_0[0]).exists()
        tap(page, "1")  # the class of that name
        then(page, 2)
        tap(page, "Enter")
        then(page, 1)
        assert (images / "1" / of_1[0]).exists()
        assert "no model was asked" in page.inner_text("#note")
        tap(page, "Enter")
        then(page, 0)
        assert page.inner_text("#question") == "All of these labels are checked."
        assert "Checked: 1. Wrong before: 0; now: 0." in page.inner_text("#about")
