"""Batches: normalised values and their order, and a test split that opens once.

Each image has draws of its own, which follow from seed, epoch and image alone; batches are mixed at last.
"""

import copy
import pickle

import numpy as np
import pytest
import torch
from timm.data import mixup as timm_mixup
from torchvision.transforms import v2

from peft_vit.base.errors import UserError
from peft_vit.base.seeding import numpy_generator, torch_generator
from peft_vit.core.config import Augmentation
from peft_vit.core.tasks import CLASSIFICATION, MULTILABEL, REGRESSION
from peft_vit.core.training.images import HoldoutImages, LabelledImages, check_augmentation, mixed

pytestmark = pytest.mark.part("runner")
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
IMAGES = {
    "flip": {"direction": "both"},
    "rotate90": {},
    "random_resized_crop": {"scale": (0.2, 0.8)},
    "color_jitter": {"hue": 0.2},
    "rand_augment": {"num_ops": 3, "magnitude": 20},
}
GREY = {**IMAGES, "color_jitter": {"saturation": 0.0}}


def made(*names, **settings) -> tuple[Augmentation, ...]:
    return tuple(Augmentation(**{name: settings.get(name, {})}) for name in names)


def images_of(n=12, channels=3, size=16, start=0) -> LabelledImages:
    """Make smooth images, of which any change is seen."""
    rng = np.random.default_rng(start)
    steps = np.linspace(0, 1, size)
    corners = rng.uniform(20, 230, (4, n, 1, 1, channels))
    x, y = steps[None, None, :, None], steps[None, :, None, None]
    smooth = corners[0] * (1 - x) * (1 - y) + corners[1] * x * (1 - y) + corners[2] * (1 - x) * y + corners[3] * x * y
    return LabelledImages(smooth.astype(np.uint8), np.arange(n, dtype=np.int64))


def shown(images, augmentation, mean=(0.0,) * 3, std=(1.0,) * 3, **settings) -> dict[int, np.ndarray]:
    """Return each image as training shows it, (3, S, S), by its label."""
    batches = images.shuffled_batches(
        **{"batch_size": 5, "seed": 0, "epoch": 1, **settings}, mean=mean, std=std, augmentation=augmentation
    )
    return {
        label: image.numpy() for batch, labels in batches for image, label in zip(batch, labels.tolist(), strict=True)
    }


def equal(first, second) -> list[bool]:
    return [np.array_equal(first[label], second[label]) for label in sorted(first)]


def gathered(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("channels", [1, 3])
def test_ordered_batches_are_normalised_as_by_torchvision(channels) -> None:
    images = images_of(21, channels)
    batches = list(images.ordered_batches(8, MEAN, STD))
    assert [len(labels) for _, labels in batches] == [8, 8, 5]
    got, labels = gathered(batches)
    assert (got.dtype, labels.dtype, got.shape) == (torch.float32, torch.int64, (21, 3, 16, 16))
    assert batches[0][0].is_contiguous()
    assert labels.tolist() == list(range(21))
    coloured = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)  # (N, 3, S, S)
    expected = v2.functional.normalize(coloured / 255, list(MEAN), list(STD))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_shuffled_batches_visit_every_image_once_in_the_stated_order() -> None:
    images = images_of(21)
    got, labels = gathered(images.shuffled_batches(8, MEAN, STD, augmentation=(), seed=0, epoch=1))
    stated = torch.randperm(21, generator=torch_generator(0, "data_order", 1))
    assert labels.tolist() == images.order(0, 1).tolist() == stated.tolist()
    assert sorted(labels.tolist()) == list(range(21))
    ordered, _ = gathered(images.ordered_batches(8, MEAN, STD))
    assert torch.equal(got, ordered[labels])
    orders = {(seed, epoch): tuple(images.order(seed, epoch)) for seed in (0, 1) for epoch in (1, 2)}
    assert len(set(orders.values())) == 4


def holdout() -> HoldoutImages:
    return HoldoutImages(images_of(3), np.array([1, 0, 2, 0]))


def test_holdout_opens_once_and_tells_size_and_class_counts_before_and_after() -> None:
    test = holdout()
    test.class_counts()[:] = 0  # a copy: nothing is changed
    assert (len(test), test.class_counts().tolist()) == (3, [1, 0, 2, 0])
    assert len(test.open()) == 3
    assert (len(test), test.class_counts().tolist()) == (3, [1, 0, 2, 0])
    with pytest.raises(RuntimeError, match="opened before"):
        test.open()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_holdout_cannot_be_copied(duplicate) -> None:
    with pytest.raises(TypeError, match="cannot be copied"):
        duplicate(holdout())


# --- augmentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", IMAGES)
def test_each_changes_images_and_each_image_in_its_own_way(name, channels) -> None:
    """All images are the same one here, so what differs comes from the draws."""
    images = LabelledImages(np.repeat(images_of(1, channels).pixels, 24, 0), np.arange(24))
    settings = (IMAGES if channels == 3 else GREY)[name]
    augmented = shown(images, made(name, **{name: settings}))
    plain = shown(images, ())
    assert sum(equal(augmented, plain)) < 15  # a quarter of the turns and flips leave an image as it is
    assert len({image.tobytes() for image in augmented.values()}) >= {"flip": 4, "rotate90": 4}.get(name, 12)
    assert all(image.shape == (3, 16, 16) and image.min() >= 0 and image.max() <= 1 for image in augmented.values())
    if channels == 1:
        assert all(np.array_equal(image[0], image[2]) for image in augmented.values())


@pytest.mark.parametrize("name", IMAGES)
def test_draws_follow_from_seed_epoch_and_image_alone(name) -> None:
    images, augmentation = images_of(24), made(name, **{name: IMAGES[name]})
    reference = shown(images, augmentation)
    torch.manual_seed(3)
    np.random.seed(3)
    state = torch.get_rng_state()
    assert all(equal(shown(images, augmentation, batch_size=7), reference))
    assert torch.equal(torch.get_rng_state(), state)  # torch's generator was lent, and given back
    part = shown(images, augmentation, skip=2)
    assert len(part) == 14
    assert all(np.array_equal(image, reference[label]) for label, image in part.items())
    assert not all(equal(shown(images, augmentation, seed=1), reference))
    assert not all(equal(shown(images, augmentation, epoch=2), reference))


def test_adding_one_leaves_the_draws_of_the_others_as_they_are() -> None:
    images = images_of(24)
    turned = shown(images, made("rotate90"))
    both = shown(images, made("flip", "rotate90"))
    two_ways = shown(images, made("flip", flip={"direction": "both"}), batch_size=7)
    coin, second = (torch.rand((24, 2), generator=torch_generator(0, "augmentation", 1)) < 0.5).T
    turns = torch.randint(4, (24,), generator=torch_generator(0, "rotate90", 1))
    plain = shown(images, ())
    for label in range(24):
        flipped = plain[label][..., ::-1] if coin[label] else plain[label]
        assert np.array_equal(both[label], np.rot90(flipped, int(turns[label]), (1, 2)))
        assert np.array_equal(turned[label], np.rot90(plain[label], int(turns[label]), (1, 2)))
        assert np.array_equal(two_ways[label], flipped[:, ::-1] if second[label] else flipped)
    assert {0, 1, 2, 3} == set(turns.tolist())


@pytest.mark.parametrize("name", ["random_resized_crop", "color_jitter", "rand_augment"])
def test_torchvision_does_the_same_to_one_image(name) -> None:
    images = images_of(10)
    settings = IMAGES[name]
    transform = {
        "random_resized_crop": lambda: v2.RandomResizedCrop(
            (16, 16), scale=settings["scale"], interpolation=v2.InterpolationMode.BICUBIC, antialias=True
        ),
        "color_jitter": lambda: v2.ColorJitter(0.4, 0.4, 0.4, settings["hue"]),
        "rand_augment": lambda: v2.RandAugment(num_ops=3, magnitude=20),
    }[name]()
    augmented = shown(images, made(name, **{name: settings}))
    seeds = torch.randint(2**63 - 1, (10,), generator=torch_generator(0, name, 1))
    with torch.random.fork_rng(devices=[]):
        for label in range(10):
            torch.manual_seed(int(seeds[label]))
            expected = transform(torch.from_numpy(images.pixels[label]).permute(2, 0, 1))  # (S, S, C) -> (C, S, S)
            assert np.array_equal(augmented[label], (expected.float() / 255).numpy())


def test_colour_of_grey_images_is_refused_with_what_to_write() -> None:
    with pytest.raises(UserError, match=r"augmentation\[1\]\.color_jitter: saturation and hue have no effect on grey"):
        check_augmentation(made("flip", "color_jitter"), channels=1)
    check_augmentation(made("color_jitter", color_jitter={"saturation": 0}), channels=1)
    check_augmentation(made("color_jitter"), channels=3)


class FromOurs:
    """NumPy's global functions, as timm calls them, drawing from one of our generators."""

    def __init__(self, generator) -> None:
        self.generator, self.asked = generator, 0

    def rand(self) -> float:
        self.asked += 1
        return 0.0 if self.asked == 1 else self.generator.random()  # whether to mix at all is no draw of ours

    def beta(self, a, b) -> float:
        return self.generator.beta(a, b)

    def randint(self, low, high, size=None):
        return self.generator.integers(low, high, size=size)


@pytest.mark.parametrize("names", [("mixup",), ("cutmix",), ("mixup", "cutmix")])
def test_batches_are_mixed_as_by_timm(names, monkeypatch) -> None:
    alphas = {"mixup": 0.3, "cutmix": 0.8}
    augmentation = made("flip", *names, **{name: {"alpha": alphas[name]} for name in names})
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    seen = set()
    for step in range(1, 30):
        images = torch.randn(6, 3, 32, 32, generator=generator)
        augmented, targets = mixed(images, labels, augmentation, task=CLASSIFICATION, width=5, seed=3, step=step)
        theirs = timm_mixup.Mixup(
            mixup_alpha=alphas["mixup"] if "mixup" in names else 0.0,
            cutmix_alpha=alphas["cutmix"] if "cutmix" in names else 0.0,
            label_smoothing=0.0,
            num_classes=5,
        )
        ours = FromOurs(numpy_generator(3, "mixing", step))
        with monkeypatch.context() as patch:
            patch.setattr(timm_mixup.np, "random", ours)
            expected, shares = theirs(images.clone(), labels)
        torch.testing.assert_close(augmented, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(targets, shares, rtol=0, atol=1e-6)
        unchanged = (augmented == images).flatten(1).float().mean(1)
        seen.add("mixup" if unchanged.max() < 0.01 else "cutmix")
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert seen == set(names)


def test_without_mixing_a_batch_stays_as_it_is() -> None:
    images, labels = torch.randn(5, 3, 8, 8), torch.arange(5)
    assert mixed(images, labels, made("flip"), task=CLASSIFICATION, width=5, seed=0, step=1) == (images, labels)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_labels_of_two_images_are_shares_of_both_and_unknown_where_one_is(name) -> None:
    """A rectangle or a blend of a cat and a dog shows a part of each; nobody knows what the unknown half adds."""
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 16, 16)
    rows = [[1, 0, np.nan], [0, 1, 1], [1, np.nan, 0], [0, 0, 1]]
    labels = torch.tensor(rows, dtype=torch.float64)
    made_of, targets = mixed(images, labels, made(name), task=MULTILABEL, width=3, seed=1, step=1)
    own = 1 - made_of[0].mean().item() / 3  # the last image is 3, the first one 0
    assert 0.05 < own < 0.95
    expected = [[own, 0, np.nan], [1 - own, np.nan, own], [own, np.nan, 1 - own], [1 - own, 0, np.nan]]
    np.testing.assert_allclose(targets.numpy(), expected, atol=1e-6)
    outputs = torch.tensor([[0.5, -1.0, 2.0]] * 4, dtype=torch.float64)
    p, y = outputs.sigmoid().numpy(), np.array(expected)
    entropy = -np.nansum(y * np.log(p) + (1 - y) * np.log(1 - p)) / 4
    assert MULTILABEL.loss(outputs, targets, None).item() == pytest.approx(entropy, abs=1e-6)


def test_a_mixed_number_is_the_mixed_standardized_one() -> None:
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 16, 16)
    numbers = np.array([[10.0, 1.0], [20.0, 5.0], [70.0, 2.0], [40.0, 9.0]])
    task = REGRESSION.fitted(numbers)
    made_of, targets = mixed(images, torch.tensor(numbers), made("mixup"), task=task, width=2, seed=1, step=1)
    own = 1 - made_of[0].mean().item() / 3
    standardized = (numbers - numbers.mean(0)) / numbers.std(0)
    expected = torch.tensor(own * standardized + (1 - own) * standardized[::-1])
    assert task.losses(expected, targets).abs().max() < 1e-10
    assert task.losses(torch.tensor(standardized), targets).min() > 1e-3
