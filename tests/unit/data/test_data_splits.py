"""Splits and folds: disjoint, exact, stratified, copies together, and moved by nothing but what they follow from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from written_images import index_of

from peft_vit.base.errors import UserError
from peft_vit.base.seeding import numpy_generator
from peft_vit.base.statistics.drawing import assign_folds, stratified_sample
from peft_vit.core.config import DataConfig
from peft_vit.data import class_gaps, load_data, make_splits
from peft_vit.data.splits import Splits


def config(**settings):
    defaults = {"dataset": "digits", "image_size": 14, "validation_images": 10, "test_images": 10}
    return DataConfig(**(defaults | settings))


TOY = index_of(np.arange(100) % 2, strata=np.arange(100) % 4)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1)
)
def test_draw_has_exact_counts_within_one_of_the_proportional_share(sizes, share, seed):
    strata = np.repeat(np.arange(len(sizes)), sizes)
    count = round(share * len(strata))
    drawn = stratified_sample(np.arange(len(strata)), strata, count, np.random.default_rng(seed))
    assert len(drawn) == len(set(drawn.tolist())) == count
    assert drawn.dtype == np.int64
    assert np.all(np.diff(drawn) > 0)
    got = np.bincount(strata[drawn], minlength=len(sizes))
    assert np.all(np.abs(got - count * np.array(sizes) / len(strata)) < 1)


def test_draw_by_hand():
    # 7 of 6 + 3 + 1: shares 4.2, 2.1, 0.7; floors 4, 2, 0; the last image goes to the remainder 0.7.
    strata = np.repeat([0, 1, 2], [6, 3, 1])
    drawn = stratified_sample(np.arange(10), strata, 7, np.random.default_rng(0))
    assert np.bincount(strata[drawn]).tolist() == [4, 2, 1]


def test_ties_and_members_are_drawn_by_lot():
    strata = np.repeat(np.arange(10), 5)
    counts = np.zeros(50)
    for seed in range(400):
        counts[stratified_sample(np.arange(50), strata, 5, np.random.default_rng(seed))] += 1
    # Each of the 50 has probability 0.1: 40 +- 6 in 400; five standard deviations.
    assert np.all(np.abs(counts - 40) < 30)


@given(
    sizes=st.lists(st.integers(20, 40), min_size=3, max_size=3),
    official=st.booleans(),
    train_subset=st.sampled_from(["fixed", "per_seed"]),
    test_split=st.sampled_from(["fixed", "per_seed"]),
    split_seed=st.integers(0, 100),
    seed=st.integers(0, 100),
)
def test_splits_are_disjoint_and_of_the_size_asked_for(sizes, official, train_subset, test_split, split_seed, seed):
    labels = np.repeat(np.arange(3), sizes)
    official_test = np.arange(len(labels)) % 3 == 2 if official else None
    requested = config(
        train_images=20,
        validation_images=9,
        test_images=7,
        split_seed=split_seed,
        train_subset=train_subset,
        test_split=test_split,
    )
    splits = make_splits(index_of(labels, official_test=official_test), requested, seed)
    parts = splits.parts
    assert [len(part) for part in parts] == [20, 9, 7]
    assert len(np.unique(np.concatenate(parts))) == 36
    assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts)
    if official_test is not None:
        assert official_test[splits.test].all()
        assert not official_test[np.concatenate(parts[:2])].any()


def same(a, b):
    return np.array_equal(a, b)


ALL = {"train", "validation", "test"}
TRAIN_PER_SEED, TEST_PER_SEED = {"train_subset": "per_seed"}, {"test_split": "per_seed"}


@pytest.mark.parametrize(
    ("settings", "change", "moved"),
    [
        ({}, {"seed": 1}, set()),
        ({}, {"split_seed": 1}, ALL),
        ({}, {"validation_images": 11}, {"train", "validation"}),
        ({}, {"train_images": 40}, {"train"}),
        (TRAIN_PER_SEED, {"seed": 1}, {"train"}),
        ({"shots_per_class": 8, "train_images": None}, {"seed": 1}, set()),
        ({"shots_per_class": 8, "train_images": None, **TRAIN_PER_SEED}, {"seed": 1}, {"train"}),
        (TEST_PER_SEED, {}, set()),
        (TEST_PER_SEED, {"seed": 1}, ALL),
        (TEST_PER_SEED, {"split_seed": 1}, ALL),
        (TEST_PER_SEED, {"train_images": 40}, {"train"}),
        ({"train_images": None, **TEST_PER_SEED}, {"seed": 1}, ALL),
    ],
)
def test_what_moves_a_split(settings, change, moved):
    first, other = (
        make_splits(
            TOY, config(**{key: value for key, value in requested.items() if key != "seed"}), requested.get("seed", 0)
        )
        for requested in ({"train_images": 20, **settings}, {"train_images": 20, **settings, **change})
    )
    assert {part for part in ALL if not same(getattr(first, part), getattr(other, part))} == moved
    assert (first.sha256 == other.sha256) == (not moved)
    if "train_images" in change:
        assert set(first.train) < set(other.train)  # a learning curve adds images, it does not swap them


def test_a_seeds_splits_come_from_the_generator_of_seed_and_split_seed():
    splits = make_splits(TOY, config(test_split="per_seed", split_seed=5), 3)
    rng, everything = numpy_generator(3, "split", 5), np.arange(100)
    test = stratified_sample(everything, TOY.strata, 10, rng)
    assert same(splits.test, test)
    assert same(splits.validation, stratified_sample(np.setdiff1d(everything, test), TOY.strata, 10, rng))
    fixed = make_splits(TOY, config(split_seed=5), 3)
    assert same(fixed.test, stratified_sample(everything, TOY.strata, 10, numpy_generator(5, "split")))


def test_the_official_test_is_used_whole_or_a_seed_draws_out_of_it_and_the_rest_is_trained_on():
    index = index_of(np.arange(100) % 2, official_test=np.arange(100) >= 70)
    assert make_splits(index, config(test_images=None), 0).test.tolist() == list(range(70, 100))
    first, other = (make_splits(index, config(test_split="per_seed"), seed) for seed in (0, 1))
    assert not same(first.test, other.test)
    for splits in (first, other):
        assert splits.test.min() >= 70
        assert sorted([*splits.train, *splits.validation]) == list(range(70))


@pytest.mark.parametrize("test_images", [None, 30])
def test_a_seed_cannot_draw_from_an_official_test_split_that_is_taken_whole(test_images):
    index = index_of(np.arange(100) % 2, official_test=np.arange(100) >= 70)
    with pytest.raises(UserError, match=r"^data\.test_split: .*all 30 .* toy; set data\.test_images below 30, or say"):
        make_splits(index, config(test_images=test_images, test_split="per_seed"), 0)
    make_splits(index, config(test_images=29, test_split="per_seed"), 0)


SCARCE = index_of([0] * 60 + [1] * 39 + [2])


@pytest.mark.parametrize(
    ("index", "settings", "message"),
    [
        (SCARCE, {"train_images": 20}, r"data\.train_images: class 'class2' gets none of the 20 .*\(1 of the 80"),
        (SCARCE, {"shots_per_class": 2}, r"data\.shots_per_class: 2 .* are too many: 1 images of class 'class2'"),
        (TOY, {"test_images": None}, r"data\.test_images: is missing; toy has no test split of its own"),
        (TOY, {"test_images": 101}, r"data\.test_images: 101 .* are too many: 100 "),
        (TOY, {"test_images": 100}, r"data\.validation_images: 10 .* are too many: 0 different"),
        (TOY, {"validation_images": 90}, r"data\.train_images: 2 .* are too many: 0 of 100"),
        (TOY, {"train_images": 81}, r"data\.train_images: 81 .* are too many: 80 of 100"),
        (TOY, {"train_subset": "per_seed"}, r"data\.train_subset: per_seed has no effect, all 80 images"),
        (TOY, {"train_subset": "per_seed", "train_images": 80}, r"data\.train_subset: per_seed has no effect"),
    ],
)
def test_sizes_that_cannot_be_had(index, settings, message):
    with pytest.raises(UserError, match=message):
        make_splits(index, config(**settings), 0)


def test_shots_are_exact_for_each_class_and_splits_stratified_within():
    plain = make_splits(TOY, config(train_images=20, validation_images=12, test_images=8), 0)
    for part in plain.parts:
        assert np.bincount(TOY.strata[part]).tolist() == [len(part) // 4] * 4
    labels = np.repeat([0, 1], [80, 40])
    index = index_of(labels, strata=2 * labels + np.arange(120) % 2)
    splits = make_splits(index, config(shots_per_class=8), 0)
    assert np.bincount(index.strata[splits.train]).tolist() == [4, 4, 4, 4]
    parts = [splits.train, splits.validation, splits.test]
    assert len(np.unique(np.concatenate(parts))) == 16 + 10 + 10


def test_classes_without_image_are_named_for_each_split():
    index = index_of([0, 1, 2, 3, 4, 5] * 3)
    rows = {"train": np.arange(6), "validation": np.array([6, 7, 8, 9, 11]), "test": np.array([13])}
    assert class_gaps(index, Splits(**rows, sha256="")) == [
        "Images: no validation image is of class 'class4'; balanced validation accuracy is the mean over 5 of 6 "
        "classes",
        "Images: no test image is of classes 'class0', 'class2', 'class3' and 2 more; balanced test accuracy is the "
        "mean over 1 of 6 classes",
    ]
    assert class_gaps(index, Splits(np.arange(6), np.arange(6, 12), np.arange(12, 18), "")) == []


# --- folds ----------------------------------------------------------------------------------------------------------

SETS = st.integers(5, 60).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 3), min_size=n, max_size=n), st.lists(st.integers(0, n), min_size=n, max_size=n)
    )
)


def of_folds(**settings):
    return config(**{"validation_images": 4, "test_images": None, "folds": 5} | settings)


@given(drawn=SETS, folds=st.integers(2, 5), seed=st.integers(0, 2**32 - 1))
def test_groups_stay_whole_and_folds_are_as_equal_as_they_allow(drawn, folds, seed):
    strata, groups = map(np.array, drawn)
    fold_of = assign_folds(strata, groups, folds, np.random.default_rng(seed))
    assert fold_of.shape == strata.shape
    assert fold_of.dtype == np.int64
    assert np.all((fold_of >= 0) & (fold_of < folds))
    for group in np.unique(groups):
        assert len(set(fold_of[groups == group])) == 1
    # Dealing to the fold with the fewest leaves no two of them further apart than the largest thing that was dealt.
    first = np.unique(groups, return_index=True)[1]
    sizes = np.bincount(np.unique(groups, return_inverse=True)[1])
    for stratum in np.unique(strata[first]):
        here = strata[first] == stratum
        dealt = np.bincount(fold_of[first[here]], weights=sizes[here], minlength=folds)
        assert np.ptp(dealt) <= sizes[here].max()


@given(
    strata=st.lists(st.integers(0, 4), min_size=5, max_size=80), folds=st.integers(2, 5), seed=st.integers(0, 2**32 - 1)
)
def test_without_copies_folds_differ_by_one_image_at_most_as_a_whole_and_in_each_stratum(strata, folds, seed):
    strata = np.array(strata)
    fold_of = assign_folds(strata, np.arange(len(strata)), folds, np.random.default_rng(seed))
    assert np.ptp(np.bincount(fold_of, minlength=folds)) <= 1
    for stratum in np.unique(strata):
        assert np.ptp(np.bincount(fold_of[strata == stratum], minlength=folds)) <= 1


def test_each_image_is_as_likely_in_each_fold_and_beside_each_other_one():
    strata, groups = np.arange(12) % 2, np.arange(12)
    together = np.zeros((12, 12))
    for seed in range(600):
        fold_of = assign_folds(strata, groups, 3, np.random.default_rng(seed))
        together += fold_of[:, None] == fold_of[None]
    # 2 of each stratum in a fold: another one of the own stratum is there with 1/5, one of the other with 2/6.
    same = strata[:, None] == strata[None]
    np.fill_diagonal(same, False)
    assert np.all(np.abs(together[same] - 120) < 5 * np.sqrt(600 * 0.2 * 0.8))
    assert np.all(np.abs(together[strata[:, None] != strata[None]] - 200) < 5 * np.sqrt(600 / 3 * 2 / 3))


@given(
    sizes=st.lists(st.integers(30, 40), min_size=2, max_size=3),
    folds=st.integers(2, 5),
    copied=st.booleans(),
    official=st.booleans(),
    validated=st.sampled_from([0, 4]),
    split_seed=st.integers(0, 50),
    repetition=st.integers(0, 50),
)
def test_a_repetition_tests_every_image_outside_the_holdout_once(
    sizes, folds, copied, official, validated, split_seed, repetition
):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    groups = np.arange(len(labels)) // (2 if copied else 1)
    holdout = groups % 4 == 3 if official else np.zeros(len(labels), dtype=bool)
    index = index_of(labels, None, groups, holdout if official else None)
    requested = of_folds(folds=folds, validation_images=validated, split_seed=split_seed)
    tested = np.zeros(len(labels), dtype=int)
    hashes = set()
    for seed in range(repetition * folds, (repetition + 1) * folds):
        splits = make_splits(index, requested, seed)
        again = make_splits(index, requested, seed)
        assert again.sha256 == splits.sha256
        hashes.add(splits.sha256)
        tested[splits.test] += 1
        parts = [splits.train, splits.validation, splits.test]
        assert len(splits.validation) == validated
        assert not holdout[np.concatenate(parts)].any()
        for a in range(3):
            for b in range(a):
                assert not np.isin(groups[parts[a]], groups[parts[b]]).any()
        if not copied:
            assert sum(map(len, parts)) == np.count_nonzero(~holdout)
        assert np.array_equal(splits.divided, np.flatnonzero(~holdout))
    assert np.array_equal(tested, (~holdout).astype(int))
    assert len(hashes) == folds


def test_images_that_are_kept_for_the_test_are_in_no_fold_and_the_same_as_without_folds():
    index = index_of(np.arange(64) % 3, None, np.arange(64) // 2)
    kept = make_splits(index, of_folds(folds=None, test_images=9, split_seed=3, validation_images=0), 0)
    folds = [make_splits(index, of_folds(test_images=9, split_seed=3, validation_images=0), seed) for seed in range(5)]
    assert np.array_equal(np.sort(np.concatenate([fold.test for fold in folds])), folds[0].divided)
    assert np.array_equal(folds[0].divided, kept.train)
    assert not np.isin(index.groups[folds[0].divided], index.groups[kept.test]).any()


def test_repetitions_and_split_seeds_have_folds_of_their_own():
    index = index_of(np.arange(60) % 3)
    of_first = [make_splits(index, of_folds(), seed).test.tolist() for seed in range(5)]
    of_second = [make_splits(index, of_folds(), seed).test.tolist() for seed in range(5, 10)]
    of_other = [make_splits(index, of_folds(split_seed=1), seed).test.tolist() for seed in range(5)]
    assert not any(test in of_first for test in (*of_second, *of_other))


def test_more_folds_than_different_images_are_refused():
    with pytest.raises(UserError, match=r"data\.folds: 9 .* are too many: 8 different images"):
        make_splits(index_of(np.arange(16) % 2, None, np.arange(16) // 2), of_folds(folds=9, validation_images=2), 0)


def test_seeds_share_one_file_of_decoded_images(own_cache):
    whole = load_data(config(validation_images=100, test_images=599), 0)
    known = {int(p): pixels for p, pixels in zip(whole.train.positions, whole.train.pixels, strict=True)}
    before = set((own_cache / "pixels").iterdir())
    for seed in range(2):
        data = load_data(of_folds(validation_images=100, folds=3), seed)
        images, labels = next(data.train.ordered_batches(len(data.train), [0, 0, 0], [1, 1, 1]))  # (N, 3, 14, 14)
        for i in range(0, len(data.train), 97):
            position = int(data.train.positions[i])
            if position in known:
                assert np.array_equal((images[i, 0].numpy() * 255).round(), known[position][:, :, 0])
        assert np.array_equal(labels.numpy(), data.train.labels)
        assert len(data.test) == 599
    assert len(set((own_cache / "pixels").iterdir()) - before) == 1
