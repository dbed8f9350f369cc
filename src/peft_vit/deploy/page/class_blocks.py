"""What one model makes of the classes: the confusion matrix, accuracy by class, and its images as pictures."""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from numpy.typing import NDArray
from rich.cells import cell_len, set_cell_size

from peft_vit.base.errors import UserError
from peft_vit.core.tasks.metric import Flags
from peft_vit.data.index import ImagesFile
from peft_vit.deploy.page.document import (
    Block,
    Column,
    Drawing,
    Gallery,
    Paragraph,
    Picture,
    Raw,
    Table,
    own_interval_columns,
    table,
)
from peft_vit.deploy.page.figure import GRID, METHOD_COLORS, SEQUENTIAL, STYLE, Canvas, draw
from peft_vit.deploy.page.formatting import count, counted, percent, percent_interval, plain
from peft_vit.deploy.page.quality import PREDICTED, TOGETHER, ClassResult, ModelQuality, PredictedImage
from peft_vit.deploy.presentation import Counts, Explanation

# From positions of images in their data set to PNG files; raises UserError if the images are not at hand.
Pictures = Callable[[Sequence[int]], list[bytes]]
Maps = Callable[[Sequence[int]], Sequence[Explanation]]  # likewise, to where the model looked
SHOWN_MISTAKES = 36
_MISTAKES = (
    "mistakes",
    "The most confident mistakes",
    "mistakes",
    "Sorted by the probability that the model gave to its answer. These are test images: correcting labels "
    "of the mistakes alone makes the test too easy. peft-vit review shows test images at random.",
    SHOWN_MISTAKES,
)
_DOUBTED = (
    "doubted",
    "Labels to check",
    "labels that are less probable than another class",
    f"{PREDICTED} To keep or correct them: peft-vit review IMAGES --page.",
    12,
)
_GROUPS, _OF_A_GROUP = 6, 4  # of copies
SHOWN_RIGHT, SHOWN_WRONG = 8, 6
MOST_MAPS, _MAP_PX = 64, 128  # of right images, since each takes up to half a second
_PAIRS, _FEW_CLASSES = 12, 8  # rows; up to so many classes the matrix says all
_WORST, _UNFOLDED = 10, 20  # classes
MOST_CLASSES = 40  # of a confusion matrix that can be read
_ON_BRIGHT, _ON_DARK = "#000000", "#fefefe"  # the same in every theme, as the cells are
_BRIGHT = 0.435  # share from which black on a cell contrasts more than white does
_NUMBERED = 20  # classes up to which cells hold their numbers
_FEWEST, _CORNER, _EDGE = 4, 0.6, 0.9  # maps, and the share of them that is too many
_CHANCE = 0.01  # of all maps on the edge, which of few patches is most, if any patch were as likely
_LABEL_COLUMNS = 24  # of a class's name beside an axis


def shorten(name: str) -> str:
    """Return a name's beginning and end, if it takes more columns; a wide letter, as in Chinese, takes two."""
    if cell_len(name) <= _LABEL_COLUMNS:
        return name
    begin = set_cell_size(name, _LABEL_COLUMNS // 2).rstrip()
    end = set_cell_size(name[::-1], _LABEL_COLUMNS // 2 - 1).rstrip()[::-1]
    return f"{begin}…{end}"


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


def draw_matrix(
    canvas: Canvas,
    axes: Axes,
    counts: Counts,
    totals: Counts,
    shown: Flags,
    names: Sequence[str],
    describe: Callable[[int, int], str],
    *,
    numbered: int = _NUMBERED,
) -> None:
    """Draw counts of pairs, (K, K), as cells, colored by their shares of their row's total.

    Args:
        canvas: of the figure.
        axes: to draw on.
        counts: what cells hold.
        totals: of rows, (K,).
        shown: which cells have one; an empty cell stays empty.
        names: of rows and columns.
        describe: returns the text of a cell, by its row and column.
        numbered: names up to which cells hold their numbers.
    """
    size, labels = len(names), [shorten(name) for name in names]
    text: dict[str, Any] = {"fontfamily": fonts_for(labels)[0], "parse_math": False}
    shares = np.divide(counts, totals[:, None], out=np.zeros(counts.shape), where=totals[:, None] > 0)
    colored = np.ma.array(shares, mask=~shown)
    mesh = axes.pcolormesh(colored, cmap=SEQUENTIAL, norm=Normalize(0, 1), edgecolors=GRID, linewidth=0.6)
    canvas.series("images", METHOD_COLORS["lora"])
    canvas.add("images", mesh, [describe(*pair) for pair in np.ndindex(size, size)])
    if size <= numbered:
        for row, column in np.argwhere(shown).tolist():
            color = _ON_BRIGHT if shares[row, column] > _BRIGHT else _ON_DARK
            axes.text(column + 0.5, row + 0.5, str(counts[row, column]), ha="center", va="center", color=color)
    axes.set_ylim(size, 0)
    axes.set_aspect("equal")
    axes.set_xticks(np.arange(size) + 0.5, labels, rotation=45, ha="right", rotation_mode="anchor", **text)
    axes.set_yticks(np.arange(size) + 0.5, labels, **text)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def confusion_figure(confusion: Counts, names: Sequence[str]) -> Drawing | None:
    """Draw what images of each class were predicted as; None for more classes than can be read.

    Args:
        confusion: (classes, classes) images, by true and predicted class.
        names: of the classes.
    """
    size = len(names)
    if size > MOST_CLASSES:
        return None
    totals = confusion.sum(1)

    def paint(canvas: Canvas) -> None:
        axes = canvas.figure.add_subplot()

        def describe(row: int, column: int) -> str:
            return f"{names[row]}, predicted as {names[column]}\n{confusion[row, column]} of {totals[row]}"

        draw_matrix(canvas, axes, confusion, totals, confusion > 0, names, describe)  # so that mistakes are seen
        axes.set_xlabel("predicted as")
        axes.set_ylabel("true class")

    data: list[dict[str, Raw]] = [
        {"class": names[row], "taken_for": names[column], "images": int(images)}
        for (row, column), images in np.ndenumerate(confusion)
    ]
    caption = (
        f"{counted(int(confusion.sum()), 'test image')}. Color: the share of a class's images, from few (dark) to all "
        "(bright). The diagonal is what is right."
    )
    labels = [shorten(name) for name in names]
    if labels != list(names):
        caption += " Long names are shortened; the table below has them whole."
    if missing := fonts_for(labels)[1]:
        caption += f" {no_font(missing)}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # said once, in the caption
        return draw("confusion", "Confusion matrix", caption, min(7.0, 1.8 + 0.26 * size), paint, data)


def no_font(letters: str) -> str:
    """Return what to say of letters that no installed font has."""
    return (
        f"No font on this machine has {letters}: picture files of the figure show boxes for them, and tables have "
        "the names. Install a font with these letters, such as Noto."
    )


# --- tables ---


def class_blocks(quality: ModelQuality) -> Iterator[Block]:
    """Yield what is predicted as what, and how much of each class is found."""
    figure = confusion_figure(quality.confusion, [result.name for result in quality.classes])
    if figure is not None:
        yield figure
    pairs, title = quality.confusions, "Most frequent confusions"
    shown = pairs[:_PAIRS]
    if figure is None:
        shown, title = [pair for pair in pairs if pair.images > 1], "Confusions that happened more than once"
    if pairs and len(quality.classes) > _FEW_CLASSES:
        yield table(
            "confused",
            title,
            shown,
            [
                Column("Class", "truth", data="class"),
                Column("Predicted", "taken_for"),
                Column("Images", lambda pair: f"{pair.images} of {pair.of}"),
                Column("", "images"),
            ],
            f"{len(shown)} of {len(pairs)} pairs of classes that are confused at all.",
            folded=len(shown) > _UNFOLDED,
        )
    recalls = [(result.recall.estimate, k) for k, result in enumerate(quality.classes) if result.recall is not None]
    tested = [quality.classes[k] for _, k in sorted(recalls)]
    if len(tested) > _UNFOLDED:
        yield _class_table(f"The {_WORST} classes that are found least often", "classes_worst", tested[:_WORST])
    yield _class_table("Accuracy by class, lowest first", "classes", tested, folded=len(tested) > _UNFOLDED)


def _class_table(title: str, slug: str, classes: Sequence[ClassResult], *, folded: bool = False) -> Table:
    return table(
        slug,
        title,
        classes,
        [
            Column("Class", "name", data="class"),
            Column("Test images", "images", count),
            Column("Recall", "recall", percent_interval, partial(own_interval_columns, "found")),
            Column("Predicted", "predicted", count),
            Column("Precision", "precision", percent),
        ],
        "Recall: share of the class's test images that it recognises, with Wilson's 95 % interval. "
        "Precision: share of these predictions that are right.",
        folded=folded,
    )


# --- pictures ---


def example_gallery(quality: ModelQuality, pictures: Pictures | None) -> Gallery | None:
    """Return a strip of test images, right ones and wrong ones; None if there are no pictures."""
    groups = []
    for right, most in ((True, SHOWN_RIGHT), (False, SHOWN_WRONG)):
        shown = quality.sample_images(right, most)
        made = pictures_of([image.position for image in shown], pictures)
        if isinstance(made, str):
            return None
        every = sum(image.right == right for image in quality.images)
        group = tuple(
            Picture(png, _said(image), right, f"{image.truth}, predicted as {image.predicted}")
            for png, image in zip(made, shown, strict=True)
        )
        groups += [(f"{'Right' if right else 'Wrong'}: {len(shown)} of {every}", group)] if shown else []
    caption = "Random test images of each class. Percent: how sure the model was of its answer."
    return Gallery("examples", "", caption, tuple(groups), small=True)


def map_blocks(quality: ModelQuality, maps: Maps | None) -> tuple[tuple[Block, ...], list[str]]:
    """Return where the model looked in the images of `example_gallery`, and a warning of each class with a shortcut.

    Nothing where there are no maps.
    """
    right, wrong = quality.sample_images(True, MOST_MAPS), quality.sample_images(False, SHOWN_WRONG)
    try:
        found = [] if maps is None else maps([image.position for image in (*right, *wrong)])
    except UserError:  # the model or the images are not here
        found = []
    if not found:
        return (), []
    by_position = {image.position: one for image, one in zip((*right, *wrong), found, strict=True)}
    groups = [
        (title, tuple(Picture(_png(by_position[image.position]), _said(image), image.right) for image in images))
        for title, images in (("Right", quality.sample_images(True, SHOWN_RIGHT)), ("Wrong", wrong))
        if images
    ]
    by = "by its attention and one backward pass (arXiv 2103.15679)"
    caption = f"The images above as the model gets them. Clear is what its answer rests on, {by}."
    by_class: dict[str, list[Any]] = defaultdict(list)
    for image in right:
        by_class[image.truth].append(by_position[image.position].weights)
    warned = [
        f"It may know {name} by a shortcut: {place} in most of {len(weights)} test images. See where it looked."
        for name, weights in by_class.items()
        if (place := shortcut(weights))
    ]
    return (Gallery("maps", "Where it looked", caption, tuple(groups), small=True),), warned


def shortcut(maps: Sequence[NDArray[np.floating[Any]]]) -> str:
    """Return where the largest value of too many maps, (side, side) each, lies: in a corner, on the edge; "": nowhere.

    A corner is a quarter of the side wide and high, and the edge one cell wide; maps of 2 or 3 cells have none.
    """
    if len(maps) < _FEWEST or (side := len(maps[0])) < 4:
        return ""
    width = round(side / 4)
    rows, columns = np.array([divmod(int(one.argmax()), side) for one in maps]).T  # (N,) each
    for vertical, in_rows in (("upper", rows < width), ("lower", rows >= side - width)):
        for horizontal, in_columns in (("left", columns < width), ("right", columns >= side - width)):
            if (in_rows & in_columns).mean() >= _CORNER:
                return f"it looks at the {vertical} {horizontal} corner"
    on_edge = np.isin(rows, (0, side - 1)) | np.isin(columns, (0, side - 1))
    is_chance = (4 * (side - 1) / side**2) ** len(maps) > _CHANCE
    return "it looks at the edge" if on_edge.mean() >= _EDGE and not is_chance else ""


def _png(explanation: Explanation) -> bytes:
    made = io.BytesIO()
    explanation.picture.resize((_MAP_PX, _MAP_PX)).save(made, "PNG")
    return made.getvalue()


def mistakes_block(images: Sequence[PredictedImage], pictures: Pictures | None, *, tested: bool = True) -> Block:
    """Return what models were wrong about: with pictures, or as a table where there are none.

    Args:
        images: mistakes on test images, or labels that are doubted; the first are shown.
        pictures: of them.
        tested: whether they are test images.
    """
    slug, title, what, rule, most = _MISTAKES if tested else _DOUBTED
    shown = images[:most]
    group = f"{count(len(shown))} of {count(len(images))} {what}"
    lines = [
        (
            image.position,
            (image.file, f"label {image.truth}", f"predicted as {image.predicted}, {percent(image.probability)}"),
            f"{image.truth}, predicted as {image.predicted}" if tested else "",
        )
        for image in shown
    ]
    block = gallery(slug, title, rule, [(group, lines)], pictures)
    if isinstance(block, Gallery):
        return block
    return table(
        slug,
        title,
        shown,
        [
            Column("Image", "file", data="image"),
            Column("Label", "truth", data="class"),
            Column("Predicted", "predicted", data="taken_for"),
            Column("Probability", "probability", percent),
        ],
        f"{group}. {rule}{block}",
    )


def copies_block(content: ImagesFile, pictures: Pictures | None) -> Block:
    """Return groups of images that are not split, of a file that has some: with pictures, or a line."""
    place = {name: position for position, name in enumerate(content.digests)}
    shown = [[name for name in names[:_OF_A_GROUP] if name in place] for names in content.copies[:_GROUPS]]
    groups = [
        (f"Group {k}", [(place[name], (plain(name),)) for name in names]) for k, names in enumerate(shown, start=1)
    ]
    first, every = content.copies[0], len(content.copies)
    size = f"{count(every)} group{'s' * (every > 1)}, {count(sum(map(len, content.copies)))} images in all"
    text = f"{size}, such as {plain(' and '.join(first[:2]))}. {TOGETHER}"
    block = gallery("copies", "Near copies", text, groups, pictures)
    return block if isinstance(block, Gallery) else Paragraph(text)


def gallery(
    slug: str, title: str, rule: str, groups: Iterable[tuple[str, Sequence[tuple[Any, ...]]]], pictures: Pictures | None
) -> Gallery | str:
    """Return groups of images by their positions, or a sentence on why there are none.

    After its position each image has the lines below it, and the key of its picture, if it has one.
    """
    groups = list(groups)
    made = pictures_of([image[0] for _, images in groups for image in images], pictures)
    if isinstance(made, str):
        return made and f" No pictures: {made}."
    pngs = iter(made)
    parts = (
        (heading, tuple(Picture(next(pngs), lines, None, *key) for _, lines, *key in images))
        for heading, images in groups
    )
    caption = f"{rule} The page holds these pictures: share it only if you may share them."
    return Gallery(slug, title, caption, tuple(parts))


def _said(image: PredictedImage) -> tuple[str, ...]:
    answer = f"{'✓' if image.right else '✗'}\u00a0{image.predicted}"
    return (answer, percent(image.probability), *([] if image.right else [f"is {image.truth}"]))


def pictures_of(positions: Sequence[int], pictures: Pictures | None) -> list[bytes] | str:
    """Return pictures, or why there are none: "" if none were asked for."""
    if pictures is None:
        return ""
    try:
        return pictures(positions)
    except UserError as error:
        return plain(str(error))
