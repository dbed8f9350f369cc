"""What one model makes of several labels, or of numbers: measures of each, what goes together, errors, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from peft_vit.core.records import RunRecord
from peft_vit.core.tasks import TASKS, rows_of, thresholds_of
from peft_vit.core.tasks.metric import Floats, Labels
from peft_vit.deploy.page.class_blocks import Pictures, draw_matrix, gallery
from peft_vit.deploy.page.document import Block, Column, Drawing, Gallery, Raw, Table, table
from peft_vit.deploy.page.figure import DASHED, LINE_COLORS, MUTED, Canvas, draw, quiet_grid
from peft_vit.deploy.page.formatting import count, or_dash, percent, plain
from peft_vit.deploy.page.quality import ImagesTest
from peft_vit.deploy.presentation import PRESENTED, Counts, Errors, LabelledOutputs

_PANELS = 4  # numbers that are drawn
_FIFTHS, _IN_A_FIFTH = 5, 5  # parts of the range of predictions, and images in one at least
MOST_TOGETHER, _NUMBERED = 30, 12  # labels of a map that can be read, and up to which its cells hold numbers


def short(value: object) -> str:
    """Return a number in three digits, or a text."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def output_blocks(record: RunRecord | ImagesTest) -> Iterator[Block]:
    """Yield measures of each output, and what a task's outputs have beside them."""
    presentation, outputs = PRESENTED[record.task], _labelled_outputs(record)
    labels, predicted, names, _ = outputs
    errors = presentation.errors(outputs)
    if errors is not None:
        yield _scatter(names, labels, predicted)
    rows = presentation.measures(outputs)
    columns = [Column(name, name, short) for name in rows[0]]
    yield table("outputs", "Each of them", rows, columns, f"On {count(len(labels))} test images. {presentation.note}")
    together = presentation.cooccurrence(outputs)
    if together is not None and 1 < len(names) <= MOST_TOGETHER:
        yield _together(names, *together)
    if errors is not None:
        yield _residuals(names, predicted, errors)
        yield from _by_size(names, predicted, errors)
    yield _measures(record, labels, predicted)
    yield from coverage_table(record, short)


def _labelled_outputs(record: RunRecord | ImagesTest) -> LabelledOutputs:
    assert record.predictions is not None
    labels, predicted = map(rows_of, (record.predictions.labels, record.predictions.predicted))
    return LabelledOutputs(labels, predicted, [plain(name) for name in record.class_names], record.decision)


def coverage_table(record: RunRecord | ImagesTest, show_size: Callable[[float], str]) -> Iterator[Table]:
    """Yield how often sets or intervals hold the truth on test images, where that was measured."""
    tested = record.tested_calibration
    if tested is None or not tested.covered:
        return
    title, held, size, note = PRESENTED[record.task].promise
    folds = tested.covered_on_folds
    rows = [
        {"asked": c, "held": share, "folds": folds.get(c), "size": tested.set_size[c]}
        for c, share in tested.covered.items()
    ]
    columns = [
        Column("Coverage asked", "asked", percent),
        Column(held, "held", percent),
        *([Column("On folds", "folds", percent)] if folds else []),
        Column(size, "size", show_size),
    ]
    yield table("coverage", title, rows, columns, note)


def _measures(record: RunRecord | ImagesTest, labels: Labels, predicted: Labels) -> Table:
    assert record.test is not None
    measures = []
    for name, value in record.test.more.items():
        metric = TASKS[record.task].metrics.get(name)
        words, bounds = name.replace("_", " "), None
        if metric is not None:
            interval = metric.interval(labels, predicted, thresholds_of(record.decision))
            words, bounds = metric.words, f"{or_dash(interval.low, short)} to {or_dash(interval.high, short)}"
        measures.append({"measure": words, "value": value, "bounds": bounds})
    return table(
        "measures",
        "All measures",
        measures,
        [Column("Measure", "measure"), Column("Value", "value", short), Column("95 % interval", "bounds")],
        "Intervals say what other test images would change (bootstrap).",
    )


# --- numbers ----------------------------------------------------------------------------------------------------------


def _panels(
    slug: str,
    title: str,
    caption: str,
    height_in: float,
    names: Sequence[str],
    columns: Mapping[str, Floats],
    draw_under: Callable[[Axes, int], None],
) -> Drawing:
    """Draw the second of some columns (N, K) over the first, a panel a number, over what is drawn under its points."""
    (x_label, x), (y_label, y), *_ = columns.items()

    def paint(canvas: Canvas) -> None:
        drawn = list(names[:_PANELS])
        panels = canvas.figure.subplots(1, len(drawn), squeeze=False)[0]
        for k, (axes, name) in enumerate(zip(panels, drawn, strict=True)):
            color = LINE_COLORS[k % len(LINE_COLORS)]
            canvas.series(name, color, "o")
            draw_under(axes, k)
            texts = [f"{x_label} {a:.3g}, {y_label} {b:.3g}" for a, b in zip(x[:, k], y[:, k], strict=True)]
            style: dict[str, Any] = {"color": color, "ls": "", "marker": "o", "ms": 3, "alpha": 0.9, "zorder": 2}
            canvas.plot(name, axes, x[:, k], y[:, k], texts, **style)
            axes.set_xlabel(f"{x_label} {name}")
            axes.set_ylabel(y_label)
            quiet_grid(axes)

    data: list[dict[str, Raw]] = [
        {"number": name} | {column: float(values[row, k]) for column, values in columns.items()}
        for k, name in enumerate(names)
        for row in range(len(x))
    ]
    return draw(slug, title, caption, height_in, paint, data)


def _scatter(names: Sequence[str], labels: Floats, predicted: Floats) -> Drawing:
    """Draw what is predicted over what is true, (N, K) each."""

    def diagonal(axes: Axes, k: int) -> None:
        x, y = labels[:, k], predicted[:, k]
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axes.plot(ends, ends, color=MUTED, lw=0.9, ls=DASHED, zorder=1)

    caption = "Test images. On the dashed line what is predicted is true."
    columns = {"true": labels, "predicted": predicted}
    return _panels("scatter", "Predicted against true", caption, 3.4, names, columns, diagonal)


def _residuals(names: Sequence[str], predicted: Floats, errors: Errors) -> Drawing:
    """Draw errors over what is predicted, (N, K) each, and the ends of intervals."""

    def ends(axes: Axes, k: int) -> None:
        axes.axhline(0, color=MUTED, lw=0.9, ls=DASHED, zorder=1)
        if errors.reach is not None:
            order = np.argsort(predicted[:, k])
            for sign in (-1, 1):
                reach = sign * errors.reach[order, k]
                axes.plot(predicted[order, k], reach, color=MUTED, lw=1.1, zorder=1)

    columns = {"predicted": predicted, "error": errors.sizes}
    caption = "Predicted less true, by what is predicted. Below the dashed line it says too little."
    if errors.reach is not None:
        columns["reach"] = errors.reach
        caption += f" Between the two lines lies what an interval of {percent(errors.coverage)} holds."
    return _panels("residuals", "Errors by size", caption, 3.0, names, columns, ends)


def _by_size(names: Sequence[str], predicted: Floats, errors: Errors) -> Iterator[Table]:
    """Yield errors by fifths of what is predicted, as far as there are images."""
    parts = min(_FIFTHS, len(predicted) // _IN_A_FIFTH)
    if parts < 2:
        return
    rows: list[dict[str, Any]] = []
    for k, name in enumerate(names):
        for part in np.array_split(np.argsort(predicted[:, k], kind="stable"), parts):
            answers, missed = predicted[part, k], errors.sizes[part, k]
            row = {"Number": name, "Predicted": f"{answers.min():.3g} to {answers.max():.3g}", "Images": len(part)}
            row |= {"Mean error": float(missed.mean()), "Mean absolute error": float(np.abs(missed).mean())}
            if errors.reach is not None:
                row["Intervals that hold"] = percent((np.abs(missed) <= errors.reach[part, k]).mean())
            rows.append(row)
    columns = [Column(name, name, short) for name in rows[0] if len(names) > 1 or name != "Number"]
    note = "Test images in parts of equal size, by what is predicted. An error is that less what is true."
    yield table("errors_by_size", "Errors by what is predicted", rows, columns, note)


# --- several labels ---------------------------------------------------------------------------------------------------


def _together(names: Sequence[str], true: Counts, predicted: Counts) -> Drawing:
    """Draw on how many images two labels are together, (K, K) each: in truth, and as predicted."""
    size, panels = len(names), {"true": true, "predicted": predicted}

    def paint(canvas: Canvas) -> None:
        parts = canvas.figure.subplots(2, 1) if canvas.narrow else canvas.figure.subplots(1, 2)
        for axes, (title, counts) in zip(parts, panels.items(), strict=True):
            totals = np.diag(counts)

            def describe(row: int, column: int, counts: Counts = counts) -> str:
                images = counts[row, row]
                if row == column:
                    return f"{names[row]}: {images} images"
                return f"{names[row]} and {names[column]}\n{counts[row, column]} of {images} with {names[row]}"

            off_diagonal = ~np.eye(size, dtype=bool) & (counts > 0)
            draw_matrix(canvas, axes, counts, totals, off_diagonal, names, describe, numbered=_NUMBERED)
            axes.set_title(title)

    data: list[dict[str, Raw]] = [
        {"label": names[row], "with": names[column], "true": int(true[row, column]), "predicted": int(images)}
        for (row, column), images in np.ndenumerate(predicted)
    ]
    caption = (
        "Test images that have both labels, in truth and as predicted. Color: the share of the images with "
        "the label at the left that have the one below, too, from few (dark) to all (bright)."
    )
    height = min(5.0, 1.6 + 0.24 * size)
    return draw("together", "Labels that go together", caption, height, paint, data, 2 * height)


# --- pictures ---------------------------------------------------------------------------------------------------------


def shown_blocks(record: RunRecord | ImagesTest, pictures: Pictures | None) -> Iterator[Block]:
    """Yield the test images that a task shows: as pictures, or as a table where there are none."""
    predictions = record.predictions
    assert predictions is not None
    files = predictions.files or [f"image {position}" for position in predictions.images]
    for shown in PRESENTED[record.task].image_selections(_labelled_outputs(record)):
        groups = [
            (title, [(predictions.images[place], (plain(files[place]), *lines)) for place, lines in images])
            for title, images in shown.groups
        ]
        block = gallery(shown.slug, shown.title, shown.rule, groups, pictures)
        if isinstance(block, Gallery):
            yield block
            continue
        rows = [
            {"Of": title, "Image": file, "What": "; ".join(lines)}
            for title, images in groups
            for _, (file, *lines) in images
        ]
        columns = [name for name in rows[0] if name != "Of" or len(groups) > 1]
        yield table(shown.slug, shown.title, rows, columns, f"{shown.rule}{block}")
