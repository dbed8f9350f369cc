"""The confusion matrix: names of classes in any letters and of any length."""

import warnings

import numpy as np
import pytest
from matplotlib import font_manager

from peft_vit.base.statistics import proportion_interval
from peft_vit.deploy.page.class_blocks import class_blocks, confusion_figure, fonts_for, shorten
from peft_vit.deploy.page.document import Table
from peft_vit.deploy.page.quality import ClassResult, ModelQuality


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cracked", "cracked"),
        ("a" * 24, "a" * 24),
        ("a" * 40 + "b" * 40, "a" * 12 + "…" + "b" * 11),
        ("猫" * 30 + "b" * 3, "猫" * 6 + "…" + "猫" * 4 + "b" * 3),
    ],
)
def test_long_names_keep_their_beginning_and_their_end(name: str, expected: str) -> None:
    assert shorten(name) == expected


def test_letters_that_no_font_has_are_told_once_and_warn_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [font for font in manager.ttflist if font.name.startswith("DejaVu")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = confusion_figure(np.eye(2, dtype=np.int64), ["猫", "hond"])
    assert drawn is not None
    assert "No font on this machine has 猫: " in drawn.caption
    assert "猫" in drawn.svg  # a browser has a font for it
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where long names leave nothing of the axes
        drawn = confusion_figure(np.eye(3, dtype=np.int64), ["a" * 200, "$b^$", "c"])
    assert drawn is not None
    assert "Long names are shortened" in drawn.caption
    assert drawn.data[0]["class"] == "a" * 200


def test_an_installed_font_with_the_letters_is_taken() -> None:
    base = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    found = next(
        (font.name, chr(code))
        for font in font_manager.fontManager.ttflist
        if (font.style, font.weight) == ("normal", 400) and font.name.startswith("STIX")
        for code in font_manager.get_font(font.fname).get_charmap()
        if not base.get_char_index(code)
    )
    families, missing = fonts_for([found[1], "plain"])
    assert missing == ""
    assert families[0] == "DejaVu Sans"
    assert len(families) == 2


@pytest.mark.parametrize(
    ("classes", "slugs"),
    [
        (2, ["confusion", "classes"]),
        (12, ["confusion", "confused", "classes"]),
        (40, ["confusion", "confused", "classes_worst", "classes"]),
        (100, ["confused", "classes_worst", "classes"]),
    ],
)
def test_what_is_shown_of_classes_can_be_read(classes: int, slugs: list[str]) -> None:
    confusion = 9 * np.eye(classes, dtype=np.int64)
    confusion[0, 1] = 5
    confusion[:, 0] += 1
    hits, totals = np.diag(confusion).tolist(), confusion.sum(1).tolist()
    found = [
        ClassResult(f"class {place}", n, proportion_interval(hit, n), 1, 0.5)
        for place, (hit, n) in enumerate(zip(hits, totals, strict=True))
    ]
    whole = proportion_interval(sum(hits), sum(totals))
    blocks = list(class_blocks(ModelQuality(whole, whole, tuple(found), confusion, ())))
    assert [block.slug for block in blocks] == slugs
    tables = {block.slug: block for block in blocks if isinstance(block, Table)}
    assert tables["classes"].rows[0][0] == "class 0"  # lowest first
    assert len(tables["classes"].rows) == classes
    assert tables["classes"].folded == (classes > 20)
    if "confused" in tables:
        assert tables["confused"].rows[0] == ("class 0", "class 1", "5 of 15")
        assert len(tables["confused"].rows) == (12 if "confusion" in slugs else 1)  # one more than once
