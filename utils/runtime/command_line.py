"""The parser of every command: one-sentence errors that suggest the closest names, and paths with ~."""

import argparse
import difflib
import itertools
import os
import reprlib
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils.runtime.errors import UserError


def expanded(text: str) -> str:
    """The path with ~ expanded, the `type` of flags for files and folders: shells do not expand --flag=~/folder."""
    return os.path.expanduser(text)


def expanded_path(text: str) -> Path:
    """As `expanded`, but a Path."""
    return Path(expanded(text))


def absolute(text: str) -> str:
    """As `expanded`, but absolute."""
    return os.path.abspath(expanded(text))


def closest(word: str, names: Iterable[str], prefix: str = "") -> str:
    """ "did you mean a, b?" with up to three names that begin with `word` or resemble it; "" if there are none.

    prefix: put before each name, but not compared.
    """
    names = sorted(set(names))
    near = [name for name in names if len(word) > 2 and name.startswith(word)]
    near = near or difflib.get_close_matches(word, names, n=3)
    return f"did you mean {', '.join(prefix + name for name in near[:3])}?" if near else ""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserErrors, so that only one of several processes prints them."""

    def __init__(self, description: str | None = None, *, show_defaults: bool = False, **settings: Any) -> None:
        formatter = argparse.ArgumentDefaultsHelpFormatter if show_defaults else argparse.HelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **settings)
        self._words: list[str] = []

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As in argparse, but unknown words are an error here, so that subcommands suggest their own flags."""
        self._words = list(sys.argv[1:] if args is None else args)
        parsed, unknown = super().parse_known_args(self._words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(map(_shortened, unknown))}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{self._suggestions()} (--help lists all flags)", agreed=True)

    def _suggestions(self) -> str:
        """The closest flags for unknown ones among the words: a required flag may only be misspelt."""
        words = itertools.takewhile(lambda word: word != "--", self._words)
        if self._subparsers is not None:  # flags after a subcommand belong to its own parser
            words = itertools.takewhile(lambda word: word.startswith("-"), words)
        known = self._option_string_actions
        flags = [word.split("=")[0] for word in words if word.startswith("-") and len(word) > 2]
        misspelt = dict.fromkeys(flag for flag in flags if flag not in known and flag[:2] not in known)
        names = [name[2:] for name in known if name.startswith("--")]
        hints = ((flag, closest(flag.lstrip("-").lower(), names, "--")) for flag in misspelt)
        return "".join(f"; {_shortened(flag)}: {hint}" for flag, hint in hints if hint)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            if not isinstance(error.__context__, argparse.ArgumentTypeError):  # argparse would name the Python function
                kind = typing.get_type_hints(action.type).get("return", action.type)
                expected = {int: "a whole number", float: "a number"}.get(kind, "another value")
                error.message = f"{reprlib.repr(arg_string)}: expected {expected}"
            raise

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            hint = closest(str(value), map(str, action.choices))
            error.message += f"; {hint}" if hint else ""
            raise


def _shortened(word: str) -> str:
    return word if len(word) <= 200 else f"{word[:200]}..."
