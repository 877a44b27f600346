"""Which of a million hashes differ in a few bits only, found without comparing all pairs."""

from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

EDGES = 4_000_000  # that are held before they are merged into labels
LARGE = 256  # hashes that share a band, from which on they are compared in blocks
BLOCK = 1 << 16  # pairs that are compared at once, within a processor's cache


def find_groups(hashes: np.ndarray, distance: int) -> list[np.ndarray]:
    """Groups of two and more rows of hashes (N, W) uint64 that chains of steps of at most `distance` bits connect.

    Each group is its rows' positions in ascending order; groups come in the order of their first rows.
    """
    unique, inverse = np.unique(hashes, axis=0, return_inverse=True)
    labels = _near_labels(unique, distance)[inverse.ravel()]
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    return sorted((group for group in groups if len(group) > 1), key=lambda group: group[0])


def _near_labels(hashes: np.ndarray, distance: int) -> np.ndarray:
    """The connected component of each of the hashes (N, W), all different."""
    labels, first, second, held = np.arange(len(hashes)), [], [], 0
    if distance == 0:
        return labels
    for one, other in _candidates(hashes, distance):
        apart = labels[one] != labels[other]
        one, other = one[apart], other[apart]
        near = np.bitwise_count(hashes[one] ^ hashes[other]).sum(axis=1) <= distance
        first.append(one[near])
        second.append(other[near])
        held += near.sum()
        if held > EDGES:
            labels, first, second, held = _merge(labels, first, second), [], [], 0
    return _merge(labels, first, second)


def near_pairs(some: np.ndarray, others: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions in some (M, W) and in others (N, W) of all pairs of hashes that differ in at most `distance` bits.

    All M x N pairs are compared, in blocks.
    """
    rows = max(1, BLOCK // max(1, len(others)))
    words = np.ascontiguousarray(others.T)
    for start in range(0, len(some), rows):
        block = some[start : start + rows]
        bits = np.zeros((len(block), len(others)), np.uint16)
        for word, of_others in zip(block.T, words, strict=True):
            bits += np.bitwise_count(word[:, None] ^ of_others)
        one, other = np.nonzero(bits <= distance)
        yield start + one, other


def _candidates(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows among which are all that differ in at most `distance` bits.

    The bits are dealt out to distance + 1 bands; of two hashes that near, one band at least is equal (the pigeonhole
    principle). For each band the rows are sorted by it, and each is paired with those that follow it and share it;
    where LARGE and more share it, as hashes of few set bits do one that is all 0, only near pairs are given. Those
    are found by comparing all, so that the time grows as the square of the hashes that share a band.
    """
    width, bands = hashes.shape[1], distance + 1
    dealt = np.arange(64 * width) % bands  # neighbouring bits, which are alike, to different bands
    factors = np.random.default_rng(0).integers(2**63, size=width, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    for band in range(bands):
        mask = np.packbits(dealt == band).view(np.uint64)
        # 64 bits for the band's: that two different bands may share them makes a few needless candidates.
        keys = ((hashes & mask) * factors).sum(axis=1, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
        sizes = np.diff(np.r_[starts, len(keys)])
        for start, size in zip(starts[sizes >= LARGE], sizes[sizes >= LARGE], strict=True):
            rows = order[start : start + size]
            for one, other in near_pairs(hashes[rows], hashes[rows], distance):
                yield rows[one[one < other]], rows[other[one < other]]
        few = np.repeat(sizes < LARGE, sizes)
        order, keys = order[few], keys[few]
        here, step = np.arange(len(keys) - 1), 1
        while len(here):
            here = here[keys[here] == keys[here + step]]
            yield order[here], order[here + step]
            step += 1
            here = here[here + step < len(keys)]


def _merge(labels: np.ndarray, first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    """Labels (N,) of the components once edges between rows are added."""
    ends = [np.concatenate([labels[:0], *one_end]) for one_end in (first, second)]
    pairs = labels[ends[0]], labels[ends[1]]
    graph = coo_array((np.ones(len(pairs[0]), np.bool_), pairs), shape=(len(labels), len(labels)))
    return connected_components(graph, directed=False)[1][labels]
