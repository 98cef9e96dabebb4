"""Tests run against the installed package, or against a source tree and a library of one's own.

pytest tests/python                                                             # after pip install .
PYTHONPATH=python_plugin pytest tests/python --library target/release/libcompactattn.so
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
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


@pytest.fixture
def bench_modules() -> Iterator[None]:
    """tests/bench's modules have short names, for it is a program: they are seen by the tests that ask for them."""
    bench = str(Path(__file__).parents[1] / "bench")
    sys.path.insert(0, bench)
    before = set(sys.modules)
    yield
    sys.path.remove(bench)
    for name in set(sys.modules) - before:
        if bench in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
