"""The parsers of both scripts, the final values of typed flags, and tests by name."""

import argparse

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import ROOT
from utils import arguments

PARSERS = {"_normal": normal.build_parser(), "_policy_gradient": policy_gradient.build_parser()}


def parse(script: str, *command_line: object) -> argparse.Namespace:
    parser = PARSERS[script]
    return arguments.for_fresh_start(parser, arguments.parse_given(parser, [str(word) for word in command_line]))


def given(script: str, *words: object) -> dict:
    return arguments.parse_given(PARSERS[script], [str(word) for word in words])


def declared() -> set[str]:
    return {action.dest for parser in PARSERS.values() for action in parser._actions if action.dest != "help"}


def is_test(file: str, function: str = "") -> bool:
    """Whether there is one test file of this name, and this function in it."""
    (path,) = (ROOT / "tests").rglob(file)
    return f"\ndef {function}(" in path.read_text() if function else True
