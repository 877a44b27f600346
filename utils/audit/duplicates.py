"""Finds near copies among a million images without comparing all pairs."""

from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

# Measured by benchmarks/near_duplicates.py; see benchmarks/NEAR_COPIES.md.
RECALL = (
    "Measured at 0.98 on 598 real images: at least 99 % of the copies are found after saving as JPEG (quality 50 or "
    "more), resizing (half to 5/4 of the size), or a change of brightness, contrast or gamma by a fifth; 90 % with "
    "strong noise or another window, 55 % with text in a corner, 7 % cropped by 2 %, none mirrored. Neighbouring "
    "slices may count as near copies."
)

TABLES = 32  # random keys of each descriptor
HIT = 0.99  # wanted probability that two descriptors that correlate exactly as required share a key
EDGES = 4_000_000  # held before they are merged into labels
ROWS = 4096  # descriptors whose keys are computed at once
BLOCK = 1 << 14  # pairs compared at once
ROUNDING = 1e-9


def equal_groups(rows: np.ndarray) -> list[np.ndarray]:
    """Groups of at least two equal rows of an array (N, W), sorted as by `near_groups`."""
    return _groups(unique_rows(rows)[1])


def near_groups(descriptors: np.ndarray, correlation: float) -> list[np.ndarray]:
    """Groups of at least two descriptors (N, D), int8, connected by pairs that correlate by at least `correlation`.

    A group holds the ascending positions of its descriptors; groups are sorted by their first descriptors. A pair that
    correlates exactly as required is found with probability HIT, a closer one almost surely.
    """
    first, inverse = unique_rows(descriptors)
    return _groups(_near_labels(descriptors[first], correlation)[inverse])


def unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position of the first row of each set of equal rows, (U,), and the number of the set of each row, (N,)."""
    rows = np.ascontiguousarray(rows)
    whole = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).ravel()
    return np.unique(whole, return_index=True, return_inverse=True)[1:]


def near_pairs(some: np.ndarray, others: np.ndarray, correlation: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions in some (M, D) and in others (N, D) of all pairs that correlate by at least `correlation`.

    Compares all M x N pairs, in blocks.
    """
    rows = max(1, BLOCK // max(1, len(others)))
    columns, norms = others.T.astype(np.float32), _norms(others)
    for start in range(0, len(some), rows):
        block = some[start : start + rows]
        products = block.astype(np.float32) @ columns  # exact: sums of integers below 2^24
        left, right = np.nonzero(products >= (correlation - ROUNDING) * (_norms(block)[:, None] * norms))
        yield start + left, right


def correlations(descriptors: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlation of each descriptor (N, D) with another (D,)."""
    return descriptors.astype(np.float64) @ other / (_norms(descriptors) * _norms(other[None]))


def _groups(labels: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return sorted((group for group in groups if len(group) > 1), key=lambda group: group[0])


def _near_labels(descriptors: np.ndarray, correlation: float) -> np.ndarray:
    """Label of the connected component of each descriptor; descriptors: (N, D), all different."""
    labels, norms = np.arange(len(descriptors)), _norms(descriptors)
    if len(labels) < 2:
        return labels
    for keys in _random_keys(descriptors, correlation):
        first, second, held = [], [], 0
        for left, right in _with_equal_keys(keys, labels):
            unconnected = labels[left] != labels[right]
            left, right = left[unconnected], right[unconnected]
            products = np.einsum("nd,nd->n", descriptors[left], descriptors[right], dtype=np.float32)
            near = products >= (correlation - ROUNDING) * (norms[left] * norms[right])
            first.append(left[near])
            second.append(right[near])
            held += near.sum()
            if held > EDGES:
                labels, first, second, held = _merge(labels, first, second), [], [], 0
        labels = _merge(labels, first, second)
    return labels


def _random_keys(descriptors: np.ndarray, correlation: float) -> np.ndarray:
    """TABLES keys of each descriptor, (TABLES, N), uint64: the signs of its projections on random directions.

    Two descriptors at an angle a have a sign in common with probability 1 - a / pi (Charikar, Similarity estimation
    techniques from rounding algorithms, 2002). A key has as many signs as HIT allows.
    """
    share_one_key = 1 - (1 - HIT) ** (1 / TABLES)
    share_one_sign = 1 - np.arccos(min(correlation, 0.999)) / np.pi
    signs = min(64, int(np.log(share_one_key) / np.log(share_one_sign)))
    directions = np.random.default_rng(0).choice(np.float32([-1, 1]), (descriptors.shape[1], TABLES * signs))
    keys = np.empty((TABLES, len(descriptors)), np.uint64)
    for start in range(0, len(descriptors), ROWS):
        positive = descriptors[start : start + ROWS].astype(np.float32) @ directions >= 0
        positive = np.pad(positive.reshape(-1, TABLES, signs), ((0, 0), (0, 0), (0, 64 - signs)))
        keys[:, start : start + ROWS] = np.packbits(positive, axis=2).view(np.uint64)[:, :, 0].T
    return keys


def _with_equal_keys(keys: np.ndarray, labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of pairs with equal keys, at most BLOCK at once; none of keys whose rows all have one label.

    The time grows with the square of the number of rows that share a key.
    """
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1]])
    sorted_labels = labels[order]
    has_several = np.minimum.reduceat(sorted_labels, starts) < np.maximum.reduceat(sorted_labels, starts)
    order = order[np.repeat(has_several, np.diff(np.r_[starts, len(keys)]))]
    keys = keys[order]
    position, step = np.arange(len(keys) - 1), 1
    while len(position):
        position = position[keys[position] == keys[position + step]]
        for start in range(0, len(position), BLOCK):
            some = position[start : start + BLOCK]
            yield order[some], order[some + step]
        step += 1
        position = position[position + step < len(keys)]


def _norms(descriptors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nd,nd->n", descriptors, descriptors, dtype=np.float64))


def _merge(labels: np.ndarray, first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    """Labels (N,) of the components after edges between rows are added."""
    rows = labels[np.concatenate([labels[:0], *first])]
    columns = labels[np.concatenate([labels[:0], *second])]
    graph = coo_array((np.ones(len(rows), np.bool_), (rows, columns)), shape=(len(labels), len(labels)))
    return connected_components(graph, directed=False)[1][labels]
