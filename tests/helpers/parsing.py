"""The parsers of both scripts, and their final values from typed flags."""

import argparse

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from utils import arguments

PARSERS = {"_normal": normal.build_parser(), "_policy_gradient": policy_gradient.build_parser()}


def parse(script: str, *command_line: object) -> argparse.Namespace:
    parser = PARSERS[script]
    return arguments.for_fresh_start(parser, arguments.parse_given(parser, [str(word) for word in command_line]))


def given(script: str, *words: object) -> dict:
    return arguments.parse_given(PARSERS[script], [str(word) for word in words])


def declared() -> set[str]:
    return {action.dest for parser in PARSERS.values() for action in parser._actions if action.dest != "help"}
