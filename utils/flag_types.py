"""The numbers that flags take; a value of another kind or out of range raises an error that says what is expected."""

import argparse
import reprlib
from collections.abc import Callable
from typing import TypeVar

Number = TypeVar("Number", int, float)
_SHORT = reprlib.Repr()
_SHORT.maxstring = 80
SMALLEST, LARGEST = 1e-37, 1e37  # beyond these float32, in which all is computed, holds only 0 and infinity


def _number(kind: type[Number], is_allowed: Callable[[Number], bool], expected: str) -> Callable[[str], Number]:
    """A `type` for argparse: the number in a text, if it is allowed."""

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_allowed(value):
            raise argparse.ArgumentTypeError(f"{_SHORT.repr(text)}: expected {expected}")
        return value

    return parse


positive_int = _number(int, lambda value: value >= 1, "a whole number of at least 1")
natural = _number(int, lambda value: value >= 0, "a whole number of at least 0")
seed = _number(int, lambda value: 0 <= value < 2**64, "a whole number from 0 to 2^64 - 1, which torch takes as a seed")
positive_float = _number(
    float, lambda value: SMALLEST < value < LARGEST, f"a number above 0 (from {SMALLEST:g} to {LARGEST:g})"
)
non_negative_float = _number(
    float,
    lambda value: value == 0 or SMALLEST < value < LARGEST,
    f"a number of at least 0 (0, or from {SMALLEST:g} to {LARGEST:g})",
)
fraction = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
positive_fraction = _number(float, lambda value: SMALLEST < value <= 1, "a number above 0, at most 1")
rate_factor = _number(
    float, lambda value: SMALLEST < value <= 1, "a number above 0, at most 1, above which the learning rate would rise"
)
momentum = _number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1, at which no step is forgotten")
average_decay = _number(
    float, lambda value: 0 <= value < 1, "a number from 0 to below 1, at which the average never moves"
)
smoothing = _number(
    float, lambda value: 0 <= value < 1, "a number from 0 to below 1, at which every class is as right as any other"
)
pixel_mean = _number(
    float,
    lambda value: 0 <= value <= 1,
    "a number from 0 to 1, since white counts as 1; divide a mean of levels from 0 to 255 by 255",
)
pixel_std = _number(
    float,
    lambda value: 0.001 <= value <= 1,
    "a number from 0.001 to 1, since white counts as 1; divide a deviation of levels from 0 to 255 by 255",
)
mixing_alpha = _number(
    float,
    lambda value: value == 0 or 0.01 <= value <= 100,
    "0, for none, or a number from 0.01 to 100; usual are 0.2 for MixUp and 1 for CutMix",
)
seconds = _number(
    float, lambda value: 0.001 <= value <= 1e7, "a number of seconds from 0.001 to 1e7, which is 115 days"
)
