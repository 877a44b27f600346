"""The parser of every command: errors are one sentence, with the closest names for what is misspelt; paths take ~."""

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

EXPECTED = {int: "a whole number", float: "a number"}


def expanded(text: str) -> str:
    """The type of flags that name a file or folder; a shell leaves the ~ of --flag=~/folder to the program."""
    return os.path.expanduser(text)


def expanded_path(text: str) -> Path:
    """As `expanded`, a Path."""
    return Path(expanded(text))


def absolute(text: str) -> str:
    """As `expanded`, and the same file from any folder."""
    return os.path.abspath(expanded(text))


def closest(word: str, names: Iterable[str], prefix: str = "") -> str:
    """Up to three names that are near a misspelt one or begin with it: "did you mean a, b?"; empty without any.

    prefix: of each name, not compared.
    """
    names = sorted(set(names))
    near = [name for name in names if len(word) > 2 and name.startswith(word)]
    near = near or difflib.get_close_matches(word, names, n=3)
    return f"did you mean {', '.join(prefix + name for name in near[:3])}?" if near else ""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, so that one process speaks for all."""

    def __init__(self, description: str | None = None, *, show_defaults: bool = False, **settings: Any) -> None:
        formatter = argparse.ArgumentDefaultsHelpFormatter if show_defaults else argparse.HelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False, **settings)
        self._words: list[str] = []

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse, but nothing unknown is allowed; the parser of a subcommand can name its own flags here."""
        self._words = list(sys.argv[1:] if args is None else args)
        parsed, unknown = super().parse_known_args(self._words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(map(_shortened, unknown))}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{self._suggestions()} (--help lists all flags)", agreed=True)

    def _suggestions(self) -> str:
        """The closest flag for each unknown one among the words; a missing one may be there, misspelt."""
        words = itertools.takewhile(lambda word: word != "--", self._words)
        if self._subparsers is not None:  # the flags of a subcommand are not this parser's
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
            if not isinstance(error.__context__, argparse.ArgumentTypeError):  # argparse names the Python function
                error.message = f"{reprlib.repr(arg_string)}: expected {_kind(action.type)}"
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


def _kind(of: Any) -> str:
    """What a flag's type makes of a text, in words."""
    made = of if isinstance(of, type) else typing.get_type_hints(of).get("return")
    return EXPECTED.get(made, "another value")
