"""One style for all commands: a sentence for each error, the closest name for what is misspelt, ~ in every path."""

import argparse
import importlib
import os

import pytest

from _normal import train as normal
from experiments import run as experiments_run
from utils import arguments, plots
from utils.runtime.command_line import Parser, absolute, expanded, expanded_path
from utils.runtime.errors import UserError

COMMANDS = [
    "_normal.train", "_policy_gradient.train", "_policy_gradient.gallery", "utils.predict", "utils.export",
    "utils.audit.__main__", "utils.report", "utils.plots", "utils.phantoms.__main__", "utils.radimagenet.__main__",
    "utils.weight_averaging", "utils.prepare.__main__", "utils.medmnist", "utils.probe", "experiments.run",
    "experiments.analyse", "experiments.learning_signal", "experiments.build_mini_rin", "benchmarks.run",
    "benchmarks.curves", "benchmarks.profiles", "benchmarks.soak",
]  # fmt: skip
# Flags that take any text but name no file or folder of the user's.
OTHER_TEXTS = {"model", "policy_model", "weights", "device", "data_name", "license", "flags", "rows", "settings"}
OTHER_TEXTS |= {"image", "label", "group", "group_column", "split", "suffix", "window", "name"}  # of tables
OTHER_TEXTS |= {"arms", "against", "scripts", "opt", "backend", "lr_scheduler", "lr_warmup_method", "auto_augment"}


class Caught(Exception):
    """Carries the parser that a command has made."""


@pytest.fixture
def parsers_of(monkeypatch):
    """parsers_of(command): its parser, or those of its subcommands."""

    def stop(parser, *_, **__):
        raise Caught(parser)

    def parsers(command: str) -> list[Parser]:
        with monkeypatch.context() as patched, pytest.raises(Caught) as caught:
            patched.setattr(Parser, "parse_args", stop)
            importlib.import_module(command).main()
        parser = caught.value.args[0]
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        return list(groups[0].choices.values()) if groups else [parser]

    return parsers


def takes_any_text(action: argparse.Action) -> bool:
    return action.nargs != 0 and action.choices is None and action.dest != "help"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_for_a_file_or_folder_expands_the_home_folder(command, parsers_of, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for parser in parsers_of(command):
        for action in filter(takes_any_text, parser._actions):
            if action.dest not in OTHER_TEXTS and (command, action.dest) != ("_policy_gradient.gallery", "classes"):
                kinds = (expanded, expanded_path, absolute)
                assert action.type in kinds or makes_a_number(action.type), (command, action.dest)
                if action.type in kinds:
                    assert os.fspath(action.type("~/run")) == "/home/me/run"


def makes_a_number(kind: object) -> bool:
    return kind in (int, float) or getattr(kind, "__module__", "") == "utils.flags"


def test_a_path_after_an_equals_sign_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    names = ("data-path", "cache-dir", "exclude", "output-dir", "resume", "finetune")
    given = arguments.parse_given(normal.build_parser(), [f"--{name}=~/x" for name in names])
    assert given == {name.replace("-", "_"): "/home/me/x" for name in names}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_flag_gets_the_closest_one(command, parsers_of):
    for parser in parsers_of(command):
        flag = next(name for name in reversed(parser._option_string_actions) if name.startswith("--"))
        with pytest.raises(UserError, match=rf"; {flag}x: did you mean .*{flag}[,?]") as caught:
            parser.parse_args([f"{flag}x=1"])
        assert "\n" not in str(caught.value)
        assert caught.value.agreed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--modell", "x"), r"arguments: --modell x; --modell: did you mean --model, --model-ema\? \(--help lists all"),
        (("--epoch=3", "--lr", "0"), r"at least|above 0.*; --epoch: did you mean --epochs\?"),
        (("-epochs", "3"), r"-epochs: did you mean --epochs\?"),
        (("--Weight_Decay", "1"), r"--Weight_Decay: did you mean --weight-decay"),
        (("--opt", "sdg"), r"invalid choice: 'sdg' \(choose from .*\); did you mean sgd\?"),
        (("--zzz",), r"unrecognized arguments: --zzz \(--help lists"),
        (("-b4", "--lr", "x"), r"argument --lr: 'x': expected a number above 0"),
        (("--mean", "a"), r"argument --mean: 'a': expected a number"),
        (("--epochs", "9" * 5000), r"argument --epochs: '9+\.\.\.9+': expected a whole number"),
    ],
)
def test_misspelt_flags_and_values_are_named_with_the_closest_ones(words, expected):
    with pytest.raises(UserError, match=expected) as caught:
        normal.build_parser().parse_args(list(words))
    assert len(str(caught.value)) < 400


def test_a_required_flag_that_is_misspelt_is_recognised():
    with pytest.raises(UserError, match=r"required: --data-path; --data-pth: did you mean --data-path\?"):
        experiments_run.main(["plan.py", "--data-pth", "x"])


def test_the_flags_of_a_subcommand_are_not_taken_for_misspelt_ones():
    with pytest.raises(UserError, match=r"invalid choice: 'curvs' .*; did you mean curves\? \(--help"):
        plots.main(["curvs", "--output", "x"])


@pytest.mark.parametrize("command", COMMANDS)
def test_no_message_contains_the_name_of_a_function(command, parsers_of):
    for parser in parsers_of(command):
        for action in parser._actions:
            if makes_a_number(action.type):
                with pytest.raises(argparse.ArgumentError, match=r"abc'?: expected (a |0 for none)"):
                    parser._get_value(action, "abc")
