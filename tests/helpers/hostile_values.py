"""Values that no run saves, put into its files."""

from collections.abc import Callable
from typing import Any


def changed(state: Any, place: tuple, change: Callable[[Any, Any], None]) -> Any:
    """A copy in which `change` was applied to the container of this place."""
    key, *rest = place
    state = state.copy()
    if rest:
        state[key] = changed(state[key], tuple(rest), change)
    else:
        change(state, key)
    return state


def put(held: dict | list, key: Any, value: Any) -> None:
    held[key] = value
