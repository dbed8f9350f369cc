"""Folds: every image tested once a repetition, copies together, classes in proportion, new ones each time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from written_images import index_of

from peft_vit.base.errors import UserError
from peft_vit.base.statistics.drawing import assign_folds
from peft_vit.core.config import DataConfig
from peft_vit.data import load_data, make_splits

SETS = st.integers(5, 60).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 3), min_size=n, max_size=n), st.lists(st.integers(0, n), min_size=n, max_size=n)
    )
)


def config_of(**settings):
    return DataConfig(**{"dataset": "digits", "image_size": 14, "validation_images": 4, "folds": 5} | settings)


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
    config = config_of(folds=folds, validation_images=validated, split_seed=split_seed)
    tested = np.zeros(len(labels), dtype=int)
    hashes = set()
    for seed in range(repetition * folds, (repetition + 1) * folds):
        splits = make_splits(index, config, seed)
        again = make_splits(index, config, seed)
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
    kept = make_splits(index, config_of(folds=None, test_images=9, split_seed=3, validation_images=0), 0)
    folds = [make_splits(index, config_of(test_images=9, split_seed=3, validation_images=0), seed) for seed in range(5)]
    assert np.array_equal(np.sort(np.concatenate([fold.test for fold in folds])), folds[0].divided)
    assert np.array_equal(folds[0].divided, kept.train)
    assert not np.isin(index.groups[folds[0].divided], index.groups[kept.test]).any()


def test_repetitions_and_split_seeds_have_folds_of_their_own():
    index = index_of(np.arange(60) % 3)
    of_first = [make_splits(index, config_of(), seed).test.tolist() for seed in range(5)]
    of_second = [make_splits(index, config_of(), seed).test.tolist() for seed in range(5, 10)]
    of_other = [make_splits(index, config_of(split_seed=1), seed).test.tolist() for seed in range(5)]
    assert not any(test in of_first for test in (*of_second, *of_other))


def test_fewer_training_images_move_neither_test_nor_validation():
    index = index_of(np.arange(60) % 3)
    whole, part = (make_splits(index, config_of(train_images=n), 7) for n in (None, 20))
    assert np.array_equal(whole.test, part.test)
    assert np.array_equal(whole.validation, part.validation)
    assert len(part.train) == 20
    assert np.isin(part.train, whole.train).all()


def test_more_folds_than_different_images_are_refused():
    with pytest.raises(UserError, match=r"data\.folds: 9 .* are too many: 8 different images"):
        make_splits(index_of(np.arange(16) % 2, None, np.arange(16) // 2), config_of(folds=9, validation_images=2), 0)


def test_seeds_share_one_file_of_decoded_images(own_cache):
    config = DataConfig(dataset="digits", image_size=14, validation_images=100, folds=3)
    whole = load_data(DataConfig(dataset="digits", image_size=14, validation_images=100, test_images=599), 0)
    known = {int(p): pixels for p, pixels in zip(whole.train.positions, whole.train.pixels, strict=True)}
    before = set((own_cache / "pixels").iterdir())
    for seed in range(2):
        data = load_data(config, seed)
        images, labels = next(data.train.ordered_batches(len(data.train), [0, 0, 0], [1, 1, 1]))  # (N, 3, 14, 14)
        for i in range(0, len(data.train), 97):
            position = int(data.train.positions[i])
            if position in known:
                assert np.array_equal((images[i, 0].numpy() * 255).round(), known[position][:, :, 0])
        assert np.array_equal(labels.numpy(), data.train.labels)
        assert len(data.test) == 599
    assert len(set((own_cache / "pixels").iterdir()) - before) == 1
