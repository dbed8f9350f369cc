"""How a study gets smaller: image size first, then images, while it keeps its methods, its classes and its splits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from peft_vit.backbones import describe
from peft_vit.config import DataConfig, StudyConfig
from peft_vit.costs.proxy_run import LEAST_BETWEEN_DECISIONS
from peft_vit.data import ImageIndex, Splits
from peft_vit.methods import check, shorten
from peft_vit.studies.plan import splits_of

_FEWEST_PATCHES = 2  # a side
_SMALLEST_IMAGE = 14  # pixels a side; DataConfig accepts nothing below
_FEWEST = {"train": 128, "validation": 100, "test": 200}  # below, accuracy is told in steps of more than 0.5 %
_FEWEST_A_CLASS = 4


@dataclass(frozen=True)
class Sizes:
    """Pixels a side, and images of each split."""

    image_size: int
    train: int
    validation: int
    test: int

    @classmethod
    def of(cls, data: DataConfig, splits: Splits) -> Sizes:
        """Return the sizes of a study, of which the configuration may leave some to the data set."""
        return cls(data.image_size, len(splits.train), len(splits.validation), len(splits.test))


def smaller_sizes(full: Sizes, patch_size: int, classes: int) -> Iterator[Sizes]:
    """Yield the sizes that a study is tried at, from its own down: patches first, then halves of its images.

    Args:
        full: of the study.
        patch_size: of the backbone, in pixels.
        classes: of the data set.
    """
    smallest = smallest_image(full.image_size, patch_size)
    for image_size in range(full.image_size, smallest - 1, -patch_size):
        yield replace(full, image_size=image_size)
    sizes = replace(full, image_size=smallest)
    while True:
        fewer = {
            split: min(getattr(full, split), max(getattr(sizes, split) // 2, fewest, _FEWEST_A_CLASS * classes))
            for split, fewest in _FEWEST.items()
        }
        if sizes == (sizes := replace(sizes, **fewer)):
            return
        yield sizes


def smallest_image(image_size: int, patch_size: int) -> int:
    """Return the smallest image size that is tried, in pixels: two patches a side, or the study's own."""
    patches = max(_FEWEST_PATCHES, -(-_SMALLEST_IMAGE // patch_size))
    return min(image_size, patches * patch_size)


def with_sizes(data: DataConfig, full: Sizes, sizes: Sizes, classes: int) -> DataConfig:
    """Return the configuration of the same images, smaller and fewer; what stays the same is said as before."""
    update: dict[str, int] = {"image_size": sizes.image_size}
    if sizes.train != full.train:
        if data.shots_per_class is None:
            update["train_images"] = sizes.train
        else:
            update["shots_per_class"] = max(1, sizes.train // classes)
    if sizes.validation != full.validation:
        update["validation_images"] = sizes.validation
    if sizes.test != full.test and data.folds is None:  # a fold is tested on as a whole
        update["test_images"] = sizes.test
    return data.model_copy(update=update)


def smaller_study(study: StudyConfig, data: DataConfig, index: ImageIndex) -> StudyConfig:
    """Return a study on smaller or fewer images; with fewer training images schedules shrink as the steps do.

    Args:
        study: as its file says.
        data: of the smaller one.
        index: the data set.

    Raises:
        UserError: if a class would get no image, or a schedule does not fit so few steps.
    """
    if data == study.data:
        return study
    smaller = study.model_copy(update={"data": data})
    full, train = (len(splits_of(index, one)[study.seeds[0]].train) for one in (study, smaller))
    shape = describe(study.backbone, data.image_size)
    experiments = []
    for experiment in study.experiments:
        before, after = (experiment.total_steps(images) for images in (full, train))
        shorter = experiment if before == after else shorten(experiment, before, after, every=LEAST_BETWEEN_DECISIONS)
        check(shorter, shape, after, train)
        experiments.append(shorter)
    return smaller.model_copy(update={"experiments": tuple(experiments)})
