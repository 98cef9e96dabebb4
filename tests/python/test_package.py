"""What an import costs and drags in, what the public surface promises, how the code is kept."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import compactattn
import pytest

PACKAGE = Path(compactattn.__file__).parent
FILE_LINES, FUNCTION_LINES = 250, 45


def in_fresh_python(code: str) -> dict[str, object]:
    lines = subprocess.check_output([sys.executable, "-c", code], text=True)
    result: dict[str, object] = json.loads(lines)
    return result


def test_an_import_is_quick_and_brings_nothing_along() -> None:
    code = f"""
import sys, time, json
sys.path.insert(0, {str(PACKAGE.parent)!r})
begin = time.process_time()
import compactattn
seconds = time.process_time() - begin
maps = open("/proc/self/maps").read()
print(json.dumps({{
    "seconds": seconds,
    "modules": [m for m in ("torch", "numpy", "ml_dtypes") if m in sys.modules],
    "libraries": [x for x in ("libcuda", "libcompactattn") if x in maps],
}}))
"""
    runs = [in_fresh_python(code) for _ in range(3)]
    assert runs[0]["modules"] == [] and runs[0]["libraries"] == []
    # Processor time, the least of three: the machine may be busy, the package may not.
    assert min(float(str(run["seconds"])) for run in runs) < 0.1


def test_a_call_needs_no_numpy(library: str | None) -> None:
    code = f"""
import sys, json
sys.path.insert(0, {str(PACKAGE.parent)!r})
sys.modules["numpy"] = sys.modules["torch"] = None
import compactattn as ca
from compactattn._abi import Dtype
ca.load_library({library!r})
q, k, v = ca.Array((4, 2, 64), Dtype.F32), ca.Array((2, 16, 1, 64), Dtype.F32), ca.Array((2, 16, 1, 64), Dtype.F32)
out, lse = ca.forward(q, k, v, [[1, 0]], [20], [0, 4], return_lse=True)
print(json.dumps({{"out": out.tolist()[0][0][:2], "lse": lse.tolist()[1]}}))
"""
    result = in_fresh_python(code)
    # Zero logits: lse is the logarithm of the tokens seen, 17 to 20.
    assert result["out"] == [0.0, 0.0]
    assert result["lse"] == pytest.approx([2.833213, 2.890372, 2.944439, 2.995732], abs=1e-6)


def test_everything_public_is_documented_and_exists() -> None:
    for name in compactattn.__all__:
        assert getattr(compactattn, name).__doc__, name


def test_versions_agree() -> None:
    cargo = Path(__file__).parents[2] / "Cargo.toml"
    version = next(line.split('"')[1] for line in cargo.read_text().splitlines() if line.startswith("version"))
    assert compactattn.version() == version
    assert f"compactattn {version};" in compactattn.build_info()


def test_files_and_functions_are_short() -> None:
    for path in PACKAGE.glob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= FILE_LINES, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < FUNCTION_LINES, f"{path.name}: {node.name}"


def test_the_environment_is_not_read_here() -> None:
    for path in PACKAGE.glob("*.py"):
        assert "os.environ" not in path.read_text() and "getenv" not in path.read_text(), path.name


def test_the_tool_runs_as_a_module(library: str | None) -> None:
    if library is not None:
        pytest.skip("a source tree has no installed tool")
    ran = subprocess.run(
        [sys.executable, "-m", "compactattn", "--version"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0 and compactattn.version() in ran.stdout
