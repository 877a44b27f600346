"""Values that no run saves, and the places in a saved value to put them."""

from collections.abc import Callable, Iterator
from typing import Any

# What JSON and a checkpoint can hold.
VALUES = (None, True, -1, 2**62, 0.5, float("nan"), float("inf"), 1e308, "text", "", [], {}, [[[]]], {"a": {}})


def entries(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """The place of every entry, at any depth, of dictionaries and lists."""
    if place:
        yield place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from entries(item, (*place, key))


def changed(state: Any, place: tuple, change: Callable[[Any, Any], None]) -> Any:
    """A copy in which `change` was applied to the container of this place."""
    key, *rest = place
    state = state.copy()
    if rest:
        state[key] = changed(state[key], tuple(rest), change)
    else:
        change(state, key)
    return state


def put(container: dict | list, key: Any, value: Any) -> None:
    container[key] = value
