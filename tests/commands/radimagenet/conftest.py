"""Fixtures for the tests of RadImageNet's preparation: a source and an output folder."""

from pathlib import Path

import pytest

from tests.helpers.radimagenet import write_source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "given")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"
