"""Where two experiments are right and wrong on the same test images: counts of all, and a few to look at.

The counts are those of McNemar's table; nothing is tested with them, since seeds share test images
and the comparison over seeds is elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from peft_vit.base.statistics.descriptive import grouped
from peft_vit.lab.analysis.studies import Run, Study, seeds_in_words

Group = Literal["both right", "only the best right", "only the baseline right", "both wrong"]
GROUPS: tuple[Group, ...] = get_args(Group)
MOST_SHOWN = 6  # images of a group


@dataclass(frozen=True)
class PredictedImage:
    """One test image of one seed, and what both made of it; `position` is that in the data set."""

    position: int
    label: int
    best: int
    best_probability: float
    baseline: int
    baseline_probability: float

    @property
    def group(self) -> Group:
        """Return which of both is right."""
        right = (self.best == self.label, self.baseline == self.label)
        return {(True, True): GROUPS[0], (True, False): GROUPS[1], (False, True): GROUPS[2]}.get(right, GROUPS[3])


@dataclass(frozen=True)
class ImageExamples:
    """The best experiment beside a baseline, image by image."""

    best: str  # name, chosen on validation
    baseline: str  # name
    # those that both have predictions of, on the same images; the first is the one that is shown
    seeds: tuple[int, ...]
    left_out: tuple[str, ...]  # seeds that both have finished, and why they are no part of this
    images: tuple[PredictedImage, ...]  # of the first seed, in the order of the test split
    counts: dict[int, dict[Group, int]]  # images in each group, by seed
    run: Run  # the run of the best with the first seed, which says which images these are

    def shown(self, group: Group) -> tuple[PredictedImage, ...]:
        """Return up to MOST_SHOWN images of a group, the lower position first among equals.

        First come those on which the probabilities that both gave to what they predicted lie farthest apart. The rule
        is fixed, so that nobody picks the images that suit a method.
        """
        own = [image for image in self.images if image.group == group]
        own.sort(key=lambda image: (-abs(image.best_probability - image.baseline_probability), image.position))
        return tuple(own[:MOST_SHOWN])


def image_examples(study: Study, best: str) -> ImageExamples | str:
    """Return the experiment that validation chose beside a baseline; as text why not, where that is impossible."""
    # The linear probe, or else the smallest LoRA; never the best itself.
    candidates = [*study.with_method("linear"), *study.fixed_rank_loras()]
    baseline = next((e.name for e in candidates if e.name != best), None)
    if baseline is None:
        return "no linear probe and no LoRA has finished beside it that it could be set against"
    by_seed = {run.seed: run for run in study.of(baseline)}
    beside = [(run, _beside(run, by_seed[run.seed])) for run in study.of(best) if run.seed in by_seed]
    problems = grouped((outcome, run.seed) for run, outcome in beside if isinstance(outcome, str))
    left_out = [f"{seeds_in_words(seeds)}: {reason}" for reason, seeds in problems.items()]
    usable = [(run, images) for run, images in beside if not isinstance(images, str)]
    if not usable:
        return "; ".join(left_out) or f"no seed has finished both for it and for {baseline}"
    counts = {
        run.seed: {group: sum(image.group == group for image in images) for group in GROUPS} for run, images in usable
    }
    first, images = usable[0]
    return ImageExamples(best, baseline, tuple(counts), tuple(left_out), images, counts, first)


def _beside(run: Run, other: Run) -> tuple[PredictedImage, ...] | str:
    """Return what two runs predict of each image, or why it can't be told."""
    own, its = run.record.predictions, other.record.predictions
    if own is None or its is None:
        return "the records do not hold predictions"
    if (own.images, own.labels) != (its.images, its.labels):
        return "the two runs were tested on different images"
    if not own.images:
        return "the predictions are not one for each image"
    columns = (own.images, own.labels, own.predicted, own.probability, its.predicted, its.probability)
    return tuple(PredictedImage(*row) for row in zip(*columns, strict=True))
