"""The search for near copies among the descriptors of images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.audit.duplicates import correlations, equal_groups, near_groups, near_pairs


def quantised(vectors: np.ndarray) -> np.ndarray:
    return np.round(vectors * (127 / np.abs(vectors).max())).astype(np.int8)


def cosines(descriptors: np.ndarray) -> np.ndarray:
    """Correlations of all pairs (N, N), in 64 bits."""
    unit = descriptors / np.linalg.norm(descriptors.astype(float), axis=1, keepdims=True)
    return unit @ unit.T


def components(linked: np.ndarray) -> set[frozenset[int]]:
    """Groups of at least two, from a table of all pairs (N, N)."""
    sets = [{index} for index in range(len(linked))]
    for left, right in np.argwhere(linked).tolist():
        if sets[left] is not sets[right]:
            sets[right] |= sets[left]
            for index in sets[left]:
                sets[index] = sets[right]
    return {frozenset(group) for group in sets if len(group) > 1}


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.9, 0.95, 0.98]), st.integers(0, 60), st.sampled_from([8, 1 << 14]))
def test_the_search_finds_what_comparing_all_pairs_finds(seed, correlation, count, block):
    """For equal and slightly noisy copies of three different images, and of one that is similar to the first."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(3, 400))
    centres = np.concatenate([centres, centres[:1] + rng.normal(size=400)])  # correlates by 0.71 with the first
    noise = rng.normal(scale=0.03, size=(count, 400)) * rng.integers(2, size=(count, 1))
    descriptors = quantised(centres[rng.integers(4, size=count)] + noise) if count else np.zeros((0, 400), np.int8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.audit.duplicates.BLOCK", block)
        groups = near_groups(descriptors, correlation)
        pairs = list(near_pairs(descriptors, descriptors, correlation))
    linked = cosines(descriptors) >= correlation
    assert {frozenset(group.tolist()) for group in groups} == components(linked)
    assert [group[0] for group in groups] == sorted(group.min() for group in groups)
    found = np.concatenate([np.stack(pair, axis=1) for pair in pairs] or [np.zeros((0, 2), int)])
    assert found.tolist() == np.argwhere(linked).tolist()


@pytest.mark.parametrize("required", [0.8, 0.9, 0.98, 0.99])
def test_nearly_all_pairs_at_the_required_correlation_are_found(required):
    rng = np.random.default_rng(0)
    first, noise = rng.normal(size=(2, 1000, 400))
    noise -= (noise * first).sum(1, keepdims=True) / (first**2).sum(1, keepdims=True) * first
    noise *= np.linalg.norm(first, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    target = required + 0.0005
    first, second = quantised(np.stack([first, target * first + np.sqrt(1 - target**2) * noise]))
    pairs = [correlations(one[None], other)[0] for one, other in zip(first, second, strict=True)]
    reach = np.array(pairs) >= required  # not all, because of the rounding
    groups = near_groups(np.concatenate([first, second]), required)
    assert all(len(group) == 2 and group[1] == group[0] + 1000 and reach[group[0]] for group in groups)
    assert reach.sum() > 500
    assert len(groups) >= 0.98 * reach.sum()  # expected: HIT, 99 %


def test_a_chain_is_one_group_although_few_edges_are_held_at_a_time(monkeypatch):
    """32 descriptors on an arc, each 0.1 radians from the next; two steps are too far."""
    monkeypatch.setattr("utils.audit.duplicates.EDGES", 3)
    plane = np.linalg.qr(np.random.default_rng(0).normal(size=(400, 2)))[0].T
    angles = 0.1 * np.arange(32)
    chain = quantised(np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane)
    linked = cosines(chain) >= 0.99
    assert linked.sum() == 32 + 2 * 31
    assert [group.tolist() for group in near_groups(chain, 0.99)] == [list(range(32))]
    assert near_groups(chain, 1) == []
    assert correlations(chain, chain[0])[:3] == pytest.approx(np.cos(angles[:3]), abs=1e-3)


def test_equal_rows_are_groups():
    rows = np.array([[1, 2], [3, 4], [1, 2], [5, 6], [3, 4], [1, 2]], np.uint64)
    assert [group.tolist() for group in equal_groups(rows)] == [[0, 2, 5], [1, 4]]
    descriptors = rows.astype(np.int8)
    assert [group.tolist() for group in near_groups(descriptors, 1)] == [[0, 2, 5], [1, 4]]
    assert equal_groups(rows[:0]) == near_groups(descriptors[:0], 0.9) == []
