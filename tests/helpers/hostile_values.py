"""Changes of one entry in a nested state."""

from collections.abc import Callable, Iterator
from typing import Any


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
