"""Splits images at random: stratified by class, and never a group over two parts."""

import itertools
import warnings
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

MOST_FOLDS = 20  # that a share is made of: its unit is 1/20 if no smaller number of folds gives it exactly
ATTEMPTS, GROUPS = 10, 20_000  # most starts, and most groups in all starts together
LACKING = 1e12  # cost of a class that a part lacks, larger than any sum of deviations
NO_GAIN = -1e-6  # a cost that is this close to 0 is rounding
CANDIDATES = 200  # groups of each part that are tried for a swap


def divide(labels: np.ndarray, groups: np.ndarray | None, shares: Sequence[float], seed: int) -> np.ndarray:
    """The part of each image, (N,) int64: an index into `shares`, which sum to 1; parts with a share of 0 stay empty.

    labels: (N,) class numbers; groups: (N,) group numbers, or None if each image is its own group. A part gets the
    rounded share of each class. With groups it comes as close as the best of several starts from scikit-learn's folds.
    A class of as many groups as there are parts, or more, is in all of them; one of fewer is in the first ones.
    """
    content = _content(labels, np.arange(len(labels)) if groups is None else groups)
    holders = np.bincount(content.indices, minlength=content.shape[1])  # groups that hold each class
    targets = round_shares(np.bincount(labels), shares, holders)
    if groups is None:
        part, order = np.empty(len(labels), np.int64), np.random.default_rng(seed).permutation(len(labels))
        by_class = order[np.argsort(labels[order], kind="stable")]
        part[by_class] = np.concatenate([np.repeat(np.arange(len(shares)), column) for column in targets.T])
        return part
    first, exact = np.unique(groups, return_index=True)[1], np.outer(shares, np.bincount(labels))
    best, least = None, (np.inf, np.inf)
    for attempt in range(max(1, min(ATTEMPTS, GROUPS // len(first)))):
        start = _stratified_folds(labels, groups, shares, (seed * ATTEMPTS + attempt) % 2**32)
        part = _improve(content, start[first], targets)
        found = _per_part(content, part, len(shares))
        cost = int(((found == 0) & (targets > 0)).sum()), float(np.abs(found - exact).max())
        if cost < least:
            best, least = part[groups], cost
        if cost <= (0, 1):
            break
    return best


def round_shares(counts: np.ndarray, shares: Sequence[float], holders: np.ndarray) -> np.ndarray:
    """Images of each class for each part, (P, C): the shares of counts (C,), rounded up or down.

    The rounding errors of a part cancel out over the classes. holders: (C,) groups with the class; a class gets at
    least one image in as many parts, the first ones first.
    """
    exact = np.outer(shares, counts)
    targets = np.floor(exact + 1e-9).astype(np.int64)
    owed = np.zeros(len(shares))  # images that the rounding has taken from a part so far
    for label, left in enumerate(counts - targets.sum(axis=0)):
        rest = exact[:, label] - targets[:, label]
        owed += rest
        up = np.argsort(np.where(rest > 1e-9, -owed, np.inf), kind="stable")[:left]
        targets[up, label] += 1
        owed[up] -= 1
        for part in np.flatnonzero(np.array(shares) > 0)[: holders[label]]:
            if targets[part, label] == 0:
                targets[targets[:, label].argmax(), label] -= 1
                targets[part, label] += 1
    return targets


def _content(labels: np.ndarray, groups: np.ndarray) -> csr_array:
    """Images of each class in each group, (G, C)."""
    content = csr_array((np.ones(len(labels)), (groups, labels)))
    content.sum_duplicates()
    return content


def _per_part(content: csr_array, part: np.ndarray, parts: int) -> np.ndarray:
    """The sums of the rows (G, C) in each part, (P, C)."""
    members = csr_array((np.ones(len(part)), (part, np.arange(len(part)))), shape=(parts, len(part)))
    return (members @ content).toarray()


def _stratified_folds(labels: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """The part of each image, from scikit-learn's folds: the last share is held out, then the others are divided."""
    if len(shares) == 1 or not len(labels):
        return np.zeros(len(labels), np.int64)
    *others, last = shares
    if np.allclose(others, last):
        return _folds(labels, groups, len(shares), seed)
    share = last / sum(shares)
    number = next((n for n in range(2, MOST_FOLDS) if share * n > 0.5 and _is_whole(share * n)), MOST_FOLDS)
    held_out = _folds(labels, groups, number, seed) < round(share * number)
    part = np.full(len(labels), len(others))
    part[~held_out] = _stratified_folds(labels[~held_out], groups[~held_out], others, seed)
    return part


def _is_whole(number: float) -> bool:
    return abs(number - round(number)) < 1e-6


def _folds(labels: np.ndarray, groups: np.ndarray, number: int, seed: int) -> np.ndarray:
    """The fold of each image by StratifiedGroupKFold; fewer folds than `number` if all classes are smaller than it.

    Its seed only decides between groups of the same content, so the folds are numbered at random.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    fold, number = np.zeros(len(labels), np.int64), min(number, np.bincount(labels).max())
    if number < 2:
        return fold
    folds = StratifiedGroupKFold(number, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes with fewer images than folds, which this command reports
        parts = [members for _, members in folds.split(labels, labels, groups)]
    for position, number_of_part in enumerate(np.random.default_rng(seed).permutation(number)):
        fold[parts[number_of_part]] = position
    return fold


def _improve(content: csr_array, part: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Move single groups to other parts, and swap pairs, as long as the class counts come closer to the targets (P, C).

    content: (G, C) images; part: (G,). Cost: the squared deviations, and LACKING for each class that a part should hold
    and does not.
    """
    part, parts, own = part.copy(), len(targets), np.arange(len(part))
    squares, holds = content.power(2).sum(axis=1), content.astype(bool).astype(np.float64)
    for _ in range(len(part) + 1000):
        slope = 2 * (content @ (_per_part(content, part, parts) - targets).T)  # (G, P)
        holders = np.where(targets > 0, _per_part(holds, part, parts), np.inf)
        entering = squares[:, None] + slope - LACKING * (holds @ (holders == 0).astype(np.float64).T)
        leaving = squares[:, None] - slope + LACKING * (holds @ (holders == 1).astype(np.float64).T)
        cost = entering + leaving[own, part][:, None]
        cost[own, part] = 0
        group, to = np.unravel_index(cost.argmin(), cost.shape)
        if cost[group, to] < NO_GAIN:
            part[group] = to
        elif swap := _best_swap(content, part, cost):
            part[swap] = part[swap[::-1]]
        else:
            break
    return part


def _best_swap(content: csr_array, part: np.ndarray, cost: np.ndarray) -> list[int]:
    """Two groups of different parts that lower the cost most if they are swapped; [] if none do.

    cost: (G, P) of single moves. Only the CANDIDATES cheapest moves from one part to another are combined.
    """
    best, swap = NO_GAIN, []
    for first, second in itertools.combinations(range(cost.shape[1]), 2):
        moves, returns = (
            np.flatnonzero(part == start)[np.argsort(cost[part == start, end], kind="stable")[:CANDIDATES]]
            for start, end in ((first, second), (second, first))
        )
        shared = (content[moves] @ content[returns].T).toarray()
        both = cost[moves, second][:, None] + cost[returns, first] - 4 * shared
        if both.size and both.min() < best:
            row, column = np.unravel_index(both.argmin(), both.shape)
            best, swap = both.min(), [int(moves[row]), int(returns[column])]
    return swap
