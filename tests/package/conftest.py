"""The files of `make dist`, unpacked where a test wants to look inside."""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = next(
    line.split('"')[1] for line in (ROOT / "Cargo.toml").read_text().splitlines() if line.startswith("version")
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--dist", help="the folder that `make dist` has filled", default=str(ROOT / "build" / "dist"))


@pytest.fixture(scope="session")
def dist(request: pytest.FixtureRequest) -> Path:
    folder = Path(request.config.getoption("--dist"))
    assert (folder / "SHA256SUMS").is_file(), f"{folder} is empty: make dist"
    return folder


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def unpacked_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="session")
def c_package(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (found,) = dist.glob("*-linux-*.tar.gz")
    folder = tmp_path_factory.mktemp("c")
    with tarfile.open(found) as archive:
        archive.extractall(folder, filter="data")
    return folder / found.name.removesuffix(".tar.gz")


@pytest.fixture(scope="session")
def sdist(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(dist / f"compactattn-{VERSION}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"compactattn-{VERSION}"


def readelf(flag: str, file: Path) -> str:
    """What readelf says of a file."""
    return subprocess.check_output(["readelf", "-W", flag, str(file)], text=True)
