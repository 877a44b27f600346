"""Times two or more pieces of work in turns, so that machine drift affects all of them equally."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch

Work = Callable[[], object]  # work that returns a float has timed itself, in seconds


class Comparison(NamedTuple):
    """Medians over the repeats of ours, theirs and their ratio, and the range of the ratios."""

    ours: float
    theirs: float
    ratio: float
    ratio_low: float
    ratio_high: float
    repeats: int


def interleaved(
    sides: Mapping[str, Work],
    repeats: int,
    *,
    warmups: int = 1,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each side at each repeat, in turns (A B A B ...). The first `warmups` rounds are discarded.

    synchronize: waits until the device is idle; called before each reading of the clock. Garbage collection runs before
    each side, not during it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    collects = gc.isenabled()
    try:
        for turn in range(warmups + repeats):
            for name, work in sides.items():
                gc.collect()
                gc.disable()
                synchronize()
                start = clock()
                result = work()
                synchronize()
                spent = result if isinstance(result, float) else clock() - start
                if turn >= warmups:
                    seconds[name].append(spent)
    finally:
        if collects:
            gc.enable()
    return seconds


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits for the device; on the CPU it does nothing."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def rates(seconds: Sequence[float], items: int) -> list[float]:
    """Items per second at each repeat."""
    return [items / spent for spent in seconds]


def milliseconds(seconds: Sequence[float], steps: int) -> list[float]:
    """Milliseconds per step at each repeat."""
    return [1000 * spent / steps for spent in seconds]


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Ours over theirs, repeat by repeat: both sides of a ratio were measured one right after the other."""
    ratios = [numerator / denominator for numerator, denominator in zip(ours, theirs, strict=True)]
    return Comparison(median(ours), median(theirs), median(ratios), min(ratios), max(ratios), len(ratios))
