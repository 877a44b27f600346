"""Finds near-duplicates among a million hashes without comparing all pairs."""

from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

EDGES = 4_000_000  # held before they are merged into labels
LARGE = 256  # from this many hashes that share a band, they are compared in blocks
BLOCK = 1 << 16  # pairs compared at once, within the cache of a processor


def find_groups(hashes: np.ndarray, distance: int) -> list[np.ndarray]:
    """Groups of at least two rows of hashes (N, W), uint64, connected by steps of at most `distance` bits.

    A group holds the ascending positions of its rows; groups are sorted by their first rows.
    """
    unique, inverse = np.unique(hashes, axis=0, return_inverse=True)
    labels = _near_labels(unique, distance)[inverse.ravel()]
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return sorted((group for group in groups if len(group) > 1), key=lambda group: group[0])


def _near_labels(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Label of the connected component of each hash; hashes: (N, W), all different."""
    labels, first, second, held = np.arange(len(hashes)), [], [], 0
    if distance == 0:
        return labels
    for left, right in _candidates(hashes, distance):
        unconnected = labels[left] != labels[right]
        left, right = left[unconnected], right[unconnected]
        near = np.bitwise_count(hashes[left] ^ hashes[right]).sum(axis=1) <= distance
        first.append(left[near])
        second.append(right[near])
        held += near.sum()
        if held > EDGES:
            labels, first, second, held = _merge(labels, first, second), [], [], 0
    return _merge(labels, first, second)


def near_pairs(some: np.ndarray, others: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions in some (M, W) and in others (N, W) of all pairs of hashes that differ in at most `distance` bits.

    Compares all M x N pairs, in blocks.
    """
    rows = max(1, BLOCK // max(1, len(others)))
    words = np.ascontiguousarray(others.T)
    for start in range(0, len(some), rows):
        block = some[start : start + rows]
        bits = np.zeros((len(block), len(others)), np.uint16)
        for block_word, other_word in zip(block.T, words, strict=True):
            bits += np.bitwise_count(block_word[:, None] ^ other_word)
        left, right = np.nonzero(bits <= distance)
        yield start + left, right


def _candidates(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows that include all pairs which differ in at most `distance` bits.

    The bits are split into distance + 1 bands, so that two near hashes are equal in at least one band (pigeonhole
    principle). For each band, rows are sorted by it, and each row is paired with the following rows that share it.
    Where LARGE or more rows share a band, as hashes with few set bits share a band of zeros, all of them are compared
    and only near pairs are returned; the time grows with the square of their number.
    """
    width, bands = hashes.shape[1], distance + 1
    band_of_bit = np.arange(64 * width) % bands  # neighbouring bits, which are similar, go to different bands
    factors = np.random.default_rng(0).integers(2**63, size=width, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    for band in range(bands):
        mask = np.packbits(band_of_bit == band).view(np.uint64)
        # A 64-bit key of the band; two bands with one key only make a few needless candidates.
        keys = ((hashes & mask) * factors).sum(axis=1, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
        sizes = np.diff(np.r_[starts, len(keys)])
        for start, size in zip(starts[sizes >= LARGE], sizes[sizes >= LARGE], strict=True):
            rows = order[start : start + size]
            for left, right in near_pairs(hashes[rows], hashes[rows], distance):
                yield rows[left[left < right]], rows[right[left < right]]
        in_small = np.repeat(sizes < LARGE, sizes)
        order, keys = order[in_small], keys[in_small]
        position, step = np.arange(len(keys) - 1), 1
        while len(position):
            position = position[keys[position] == keys[position + step]]
            yield order[position], order[position + step]
            step += 1
            position = position[position + step < len(keys)]


def _merge(labels: np.ndarray, first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    """Labels (N,) of the components after edges between rows are added."""
    rows = labels[np.concatenate([labels[:0], *first])]
    columns = labels[np.concatenate([labels[:0], *second])]
    graph = coo_array((np.ones(len(rows), np.bool_), (rows, columns)), shape=(len(labels), len(labels)))
    return connected_components(graph, directed=False)[1][labels]
