"""requirements.txt and the extras of pyproject.toml name every imported package; constraints.txt pins them."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

# Imported by the code, listed for development only.
OPTIONAL = {"tensorboard", "wandb", "onnx", "onnxruntime", "onnxscript", "pydicom", "medmnist"}
UNLISTED = {"trackio"}  # imported by the code, cannot be listed: it requires a Pillow older than that of this project
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CODE = ("_normal", "_policy_gradient", "benchmarks", "experiments", "figures", "utils")
NOT_THIRD_PARTY = {*CODE, "tests", "conftest", *sys.stdlib_module_names}


def by_name(lines: Iterable[str]) -> dict[str, Requirement]:
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def named_in(file: str) -> dict[str, Requirement]:
    """The requirements of a file, by name."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return by_name(filter(None, lines))


def extra(name: str) -> dict[str, Requirement]:
    """The requirements of an extra, by name, with those of the extras that it names."""
    found = by_name(PROJECT["optional-dependencies"][name])
    if own := found.pop(PROJECT["name"], None):
        for other in own.extras:
            found |= extra(other)
    return found


@cache
def installed() -> dict[str, list[str]]:
    """The distributions that bring each package."""
    return dict(packages_distributions())


def imported_by(folder: str) -> set[str]:
    """The distributions that the Python files of a folder import."""
    names: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.partition(".")[0])
    distributions = installed()
    return {canonicalize_name(distributions.get(name, [name])[0]) for name in names - NOT_THIRD_PARTY}


@pytest.mark.parametrize("folder", CODE)
def test_every_package_that_the_code_imports_is_named(folder):
    assert imported_by(folder) <= named_in("requirements.txt").keys() | OPTIONAL | UNLISTED


def test_every_package_that_the_tests_import_is_named():
    assert imported_by("tests") <= named_in("requirements.txt").keys() | extra("dev").keys()


def test_optional_packages_are_installed_for_development_only():
    named = {name for extra_name in ("trackers", "onnx", "dicom") for name in extra(extra_name)}
    assert named | {"medmnist"} == OPTIONAL  # medmnist brings much more than the names of classes
    assert extra("dev").keys() >= OPTIONAL
    assert not named_in("requirements.txt").keys() & OPTIONAL


def test_every_requirement_has_a_lower_bound():
    for requirement in named_in("requirements.txt").values():
        assert {bound.operator for bound in requirement.specifier} == {">="}, requirement


def test_every_requirement_is_pinned_within_its_bounds():
    pins = named_in("constraints.txt")
    for name, requirement in (named_in("requirements.txt") | extra("dev")).items():
        (pin,) = pins[name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), requirement


def test_constraints_pin_each_package_once_and_nothing_local():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines)
    names = [line.partition("==")[0] for line in lines]
    assert names == sorted(set(names))
    assert not [name for name in names if name.startswith(("nvidia", "cuda", "triton"))]
