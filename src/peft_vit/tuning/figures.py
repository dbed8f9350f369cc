"""What a tuning draws, with the looks of reports."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from peft_vit.report.document import Drawing, Raw
from peft_vit.report.figure import METHOD_COLORS, PAPER, SEQUENTIAL, STYLE, Canvas, draw
from peft_vit.report.formatting import counted, percent
from peft_vit.report.lines import Line, draw_reliability
from peft_vit.tuning.sealed import CalibrationResult

MOST_CLASSES = 40  # of a confusion matrix that can be read
_ON_BRIGHT, _ON_DARK = "#000000", "#fefefe"  # the same in every theme, as the cells are
_BRIGHT = 0.435  # share from which black on a cell contrasts more than white does
_NUMBERED = 20  # classes up to which cells hold their numbers
_LABEL_COLUMNS = 24  # of a class's name beside an axis


def shortened(name: str, columns: int = _LABEL_COLUMNS) -> str:
    """Return a name's beginning and end, if it takes more columns; a wide letter, as in Chinese, takes two."""
    if _columns(name) <= columns:
        return name
    begin, end = name[: columns // 2], name[1 - columns // 2 :]
    while _columns(begin) > columns // 2:
        begin = begin[:-1]
    while _columns(end) > columns // 2 - 1:
        end = end[1:]
    return f"{begin}…{end}"


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def fonts_for(texts: Iterable[str]) -> tuple[list[str], str]:
    """Return families of installed fonts that have the letters of some texts, and the letters that none has."""
    families = list(STYLE["font.sans-serif"])
    missing = _without_glyph(font_manager.findfont(families[0]), set("".join(texts)))
    others = [
        font
        for font in font_manager.fontManager.ttflist
        if (font.style, font.weight) == ("normal", 400) and not font.name.startswith("Last Resort")  # has boxes alone
    ]
    while missing:
        left = {font.name: _without_glyph(font.fname, missing) for font in others}
        best = min(left, key=lambda name: (len(left[name]), name), default="")
        if not best or left[best] == missing:
            break
        families.append(best)
        missing = left[best]
    return families, "".join(sorted(missing))


def _without_glyph(font_file: str, letters: set[str]) -> set[str]:
    font = font_manager.get_font(font_file)
    return {letter for letter in letters if not font.get_char_index(ord(letter))}


def confusion_figure(confusion: NDArray[np.int64], names: Sequence[str]) -> Drawing | None:
    """Draw what images of each class were taken for; None for more classes than can be read.

    Args:
        confusion: (classes, classes) images, by true and predicted class.
        names: of the classes.
    """
    size = len(names)
    if size > MOST_CLASSES:
        return None
    totals = confusion.sum(1, keepdims=True)
    labels = [shortened(name) for name in names]
    families, missing = fonts_for(labels)
    text: dict[str, Any] = {"fontfamily": families, "parse_math": False}
    shares = np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)

    def paint(canvas: Canvas) -> None:
        axes = canvas.figure.add_subplot()
        canvas.series("images", METHOD_COLORS["lora"])
        mesh = axes.pcolormesh(shares, cmap=SEQUENTIAL, norm=Normalize(0, 1), edgecolors=PAPER, linewidth=0.4)
        texts = [
            f"{names[row]}, taken for {names[column]}\n{confusion[row, column]} of {totals[row, 0]}"
            for row in range(size)
            for column in range(size)
        ]
        canvas.add("images", mesh, texts)
        if size <= _NUMBERED:
            for row, column in np.ndindex(*confusion.shape):
                color = _ON_BRIGHT if shares[row, column] > _BRIGHT else _ON_DARK
                axes.text(column + 0.5, row + 0.5, str(confusion[row, column]), ha="center", va="center", color=color)
        axes.set_ylim(size, 0)
        axes.set_aspect("equal")
        axes.set_xticks(np.arange(size) + 0.5, labels, rotation=45, ha="right", rotation_mode="anchor", **text)
        axes.set_yticks(np.arange(size) + 0.5, labels, **text)
        axes.set_xlabel("taken for")
        axes.set_ylabel("true class")
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)

    data: list[dict[str, Raw]] = [
        {"class": names[row], "taken_for": names[column], "images": int(confusion[row, column])}
        for row in range(size)
        for column in range(size)
    ]
    caption = (
        f"{counted(int(confusion.sum()), 'sealed image')}. Color: the share of a class's images, from 0 (dark) to all "
        "(bright). The diagonal is what is right."
    )
    if labels != list(names):
        caption += " Long names are shortened; the table above has them whole, in the same order."
    if missing:
        caption += f" {no_font(missing)}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # said once, in the caption
        return draw("confusion", "What was taken for what", caption, min(7.0, 2.2 + 0.3 * size), paint, data)


def no_font(letters: str) -> str:
    """Return what to say of letters that no installed font has."""
    return (
        f"No font on this machine has {letters}: picture files of the figure show boxes for them, and tables have the "
        "names; an installed font with these letters, as of Noto, mends it."
    )


def calibration_figure(sealed: CalibrationResult, folds: CalibrationResult, temperature: float) -> Drawing:
    """Draw how often the model is right over how sure it is, on folds and on sealed images."""
    bins = {
        "folds, as trained": folds.bins[0],
        "folds, calibrated": folds.bins[1],
        "sealed, calibrated": sealed.bins[1],
    }
    caption = (
        "Predictions in bins of equal counts by their confidence; the fewer images, the more a bin moves by chance. On "
        "the dashed line confidence and accuracy agree; below it the model is too sure of itself. Calibrated: "
        f"logits divided by {temperature:.2f}, the temperature with the least "
        "negative log-likelihood on folds. The expected calibration error on sealed images is "
        f"{percent(sealed.ece[1])}, and {percent(sealed.ece[0])} without."
    )
    return draw_reliability([Line(name, found) for name, found in bins.items()], caption, "images")
