"""Random splits: shares of each class, whole groups, and the same split whatever the order."""

import numpy as np
import pytest

from utils.prepare.splitting import divide, round_shares

SHARES = [0.8, 0.1, 0.1]


def counts(part: np.ndarray, labels: np.ndarray, parts: int) -> np.ndarray:
    """Images by part and class."""
    found = np.zeros((parts, labels.max() + 1), np.int64)
    np.add.at(found, (part, labels), 1)
    return found


def made_up(seed: int, classes: int = 6, groups: int = 250, mixed: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Labels and groups of 1 to 8 images; classes of different sizes; some images differ from their group's class."""
    random = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), random.integers(1, 9, groups))
    weights = np.arange(1, classes + 1) / sum(range(1, classes + 1))
    label = random.choice(classes, groups, p=weights)[group]
    other = random.random(len(label)) < mixed
    label[other] = random.integers(0, classes, other.sum())
    return label, group


def test_shares_are_rounded_so_that_errors_cancel_out():
    targets = round_shares(np.array([10, 15, 25, 5]), SHARES, np.array([10, 15, 25, 5]))
    assert targets.tolist() == [[8, 12, 20, 3], [1, 2, 2, 1], [1, 1, 3, 1]]
    assert targets.sum(axis=1).tolist() == [43, 6, 6]  # of 55 images: 44, 5.5 and 5.5; each class of 5 is in each part


def test_a_class_of_few_groups_is_in_the_first_parts():
    targets = round_shares(np.array([1, 2, 3, 40]), SHARES, np.array([1, 2, 3, 1]))
    assert targets.tolist() == [[1, 1, 1, 32], [0, 1, 1, 4], [0, 0, 1, 4]]


@pytest.mark.parametrize("shares", [SHARES, [0.75, 0.25], [0.2] * 5, [0.3, 0.3, 0.3, 0.1]])
def test_without_groups_each_class_is_within_one_image_of_its_share(shares):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [1000, 333, 57, 12]))
    found = counts(divide(labels, None, shares, 0), labels, len(shares))
    assert np.abs(found - np.outer(shares, [1000, 333, 57, 12])).max() < 1
    assert np.abs(found.sum(axis=1) - np.array(shares) * 1402).max() < 2


@pytest.mark.parametrize(("shares", "seed"), [(SHARES, 0), (SHARES, 1), ([0.85, 0.15], 0), ([0.225] * 4 + [0.1], 0)])
def test_groups_stay_whole_and_each_class_is_within_one_image_of_its_share(shares, seed):
    labels, groups = made_up(seed)
    part = divide(labels, groups, shares, seed)
    parts_of = {group: set(part[groups == group].tolist()) for group in np.unique(groups)}
    assert all(len(parts) == 1 for parts in parts_of.values())
    found = counts(part, labels, len(shares))
    assert np.abs(found - np.outer(shares, np.bincount(labels))).max() <= 1


def test_whole_groups_come_as_close_as_they_can():
    """20 patients of 5 images of one class: a tenth of 100 images is two of them."""
    labels, groups = np.repeat([0, 1], 100), np.repeat(np.arange(40), 5)
    assert counts(divide(labels, groups, SHARES, 0), labels, 3).tolist() == [[80, 80], [10, 10], [10, 10]]


def test_a_rare_class_with_large_groups_is_in_every_part_that_needs_it():
    labels = np.concatenate([np.repeat(0, 300), np.repeat(1, 90)])
    groups = np.concatenate([np.repeat(np.arange(100), 3), np.repeat([100, 101, 102], 30)])  # three patients
    assert counts(divide(labels, groups, SHARES, 0), labels, 3)[:, 1].tolist() == [30, 30, 30]


def test_the_seed_decides():
    labels, groups = made_up(0, classes=3, groups=60)
    for given in (None, groups):
        first, again, other = (divide(labels, given, SHARES, seed) for seed in (3, 3, 4))
        assert (first == again).all()
        assert (first != other).any()
