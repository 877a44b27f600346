"""Two or more pieces of work timed in turns, so that a drift of the machine hits all of them alike."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch

Work = Callable[[], object]  # what gives a float has timed itself, in seconds


class Comparison(NamedTuple):
    """Medians over the repeats of ours, of theirs and of their ratio, and the range of the ratios."""

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
    """Seconds of each side at each repeat, in turns (A B A B ...); the first `warmups` rounds are thrown away.

    synchronize: waits until the device is idle; called before each reading of the clock. No rubbish is collected in
    between, but before each side.
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
                own = work()
                synchronize()
                spent = own if isinstance(own, float) else clock() - start
                if turn >= warmups:
                    seconds[name].append(spent)
    finally:
        if collects:
            gc.enable()
    return seconds


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits for the device; nothing on the CPU, where all work is done when a call returns."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def rates(seconds: Sequence[float], items: int) -> list[float]:
    """Items a second at each repeat."""
    return [items / spent for spent in seconds]


def milliseconds(seconds: Sequence[float], steps: int) -> list[float]:
    """Milliseconds a step at each repeat of so many steps."""
    return [1000 * spent / steps for spent in seconds]


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Ours over theirs, repeat by repeat: both sides of a ratio were measured one right after the other."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return Comparison(median(ours), median(theirs), median(ratios), min(ratios), max(ratios), len(ratios))
