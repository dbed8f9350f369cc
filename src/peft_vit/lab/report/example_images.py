"""Test images on which the best experiment and a baseline agree and differ: counts, a table, and pictures at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

from peft_vit.core.config import licence_of
from peft_vit.core.records import RunRecord
from peft_vit.deploy.page.class_blocks import pictures_of
from peft_vit.deploy.page.document import Block, Gallery, Paragraph, Picture, Table
from peft_vit.deploy.page.formatting import count, joined, percent, plain
from peft_vit.deploy.page.tables import Column, table
from peft_vit.lab.analysis import Analysis
from peft_vit.lab.analysis.image_examples import GROUPS, Group, ImageExamples, PredictedImage, image_examples
from peft_vit.lab.report.summary import best_on_validation

# From a run's record and positions in its data set to PNG files; raises UserError if the images are not at hand.
Thumbnails = Callable[[RunRecord, Sequence[int]], list[bytes]]


def example_blocks(analysis: Analysis, thumbnails: Thumbnails | None) -> tuple[Block, ...]:
    """Return what is to be shown of single test images; a sentence where that is nothing."""
    best = best_on_validation(analysis.methods)
    if best is None:
        return ()
    examples = image_examples(analysis.study, best.experiment.name)
    if isinstance(examples, str):
        return (Paragraph(f"No examples of test images for {plain(best.experiment.name)}: {examples}."),)
    spec = examples.run.record.spec
    gallery = _gallery(examples, thumbnails, licence_of(spec.data.dataset, smoke=spec.smoke))
    return (_counts_table(examples), gallery, _images_table(examples))


def _titles(examples: ImageExamples) -> dict[Group, str]:
    names: dict[Group, str] = {"only the best right": examples.best, "only the baseline right": examples.baseline}
    return {g: f"Only {plain(names[g])} right" if g in names else g.capitalize() for g in GROUPS}


def _counts_table(examples: ImageExamples) -> Table:
    """Return how many test images each of both gets right, by seed."""
    best, baseline = plain(examples.best), plain(examples.baseline)
    left_out = f" Left out: {joined(examples.left_out)}." if examples.left_out else ""
    return table(
        "agreement",
        f"Test images that {best} and {baseline} get right",
        [
            {
                "best": examples.best,
                "baseline": examples.baseline,
                "seed": seed,
                **counts,
                "images": sum(counts.values()),
            }
            for seed, counts in examples.counts.items()
        ],
        [
            Column("", "best"),
            Column("", "baseline"),
            Column("Seed", "seed"),
            *(Column(title, group, count, group.replace(" ", "_")) for group, title in _titles(examples).items()),
            Column("Images", "images", count),
        ],
        f"{best} is the best on validation, {baseline} the baseline: the linear probe, or without one the "
        "LoRA of smallest rank. Both runs of a row share the seed and the images. The middle two columns are what "
        f"McNemar's test would take; no test is made here.{left_out}",
    )


def _images_table(examples: ImageExamples) -> Table:
    """Return the images that are shown; the file has every test image of that seed."""
    class_of = partial(_class, examples.run.record.class_names)
    return table(
        "examples",
        f"Predictions of these images, seed {examples.seeds[0]}",
        [image for group in GROUPS for image in examples.shown(group)],
        [
            Column("Group", "group"),
            Column("Image", "position"),
            Column("Truth", "label", class_of),
            Column(plain(examples.best), lambda image: f"{class_of(image.best)}, {percent(image.best_probability)}"),
            Column(
                plain(examples.baseline),
                lambda image: f"{class_of(image.baseline)}, {percent(image.baseline_probability)}",
            ),
        ],
        "Image: its position in the data set, counted from 0. Percent: the probability that the model gave to "
        "what it predicted, not calibrated. The CSV file holds every test image of this seed.",
        data=({"position": image.position, "group": image.group} | asdict(image) for image in examples.images),
        folded=True,
    )


def _class(names: Sequence[str], number: int) -> str:
    return plain(names[number]) if 0 <= number < len(names) else f"class {number}"


def _gallery(examples: ImageExamples, thumbnails: Thumbnails | None, terms: str) -> Block:
    shown = {group: examples.shown(group) for group in GROUPS}
    positions = [image.position for images in shown.values() for image in images]
    rule = (
        f"Seed {examples.seeds[0]}, the first. Of each group the images on which the probabilities of both "
        "predictions lie farthest apart, the lower position among equals; so they are not typical."
    )
    made = pictures_of(positions, None if thumbnails is None else partial(thumbnails, examples.run.record))
    if isinstance(made, str):
        return Paragraph(f"{rule} No pictures: {made or 'none were asked for'}.")
    pictures = dict(zip(positions, made, strict=True))
    names, counts, titles = examples.run.record.class_names, examples.counts[examples.seeds[0]], _titles(examples)

    def picture(image: PredictedImage) -> Picture:
        lines = (
            f"image {image.position}: {_class(names, image.label)}",
            f"best: {_class(names, image.best)}, {percent(image.best_probability)}",
            f"baseline: {_class(names, image.baseline)}, {percent(image.baseline_probability)}",
        )
        return Picture(pictures[image.position], lines)

    return Gallery(
        slug="pictures",
        title=f"Images, and what {plain(examples.best)} (best) and {plain(examples.baseline)} (baseline) made of them",
        caption=f"{rule} Licence of the images: {terms}. They are shown, scaled down, to look at a model's "
        "errors, which is research; if you pass this page on, you pass them on.",
        groups=tuple(
            (f"{titles[group]}: {counts[group]:,} of {len(examples.images):,} images", tuple(map(picture, images)))
            for group, images in shown.items()
        ),
    )
