"""Tests run against the installed package, or against a source tree and a library of one's own.

pytest tests/python                                                             # after pip install .
PYTHONPATH=python_plugin pytest tests/python --library target/release/libcompactattn.so
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# The reference and the case generator lie beside the tests.
sys.path.insert(0, str(Path(__file__).parent))

import compactattn


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--library", help="the native library, instead of the package's own")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--library"):
        compactattn.load_library(Path(config.getoption("--library")).absolute())


@pytest.fixture
def library(request: pytest.FixtureRequest) -> str | None:
    """For tests that start an interpreter of their own."""
    path = request.config.getoption("--library")
    return str(Path(path).absolute()) if path else None
