"""Every struct, enum and constant here equals what a C compiler says about include/compactattn.h."""

from __future__ import annotations

import ctypes
import inspect
import re
import shutil
import subprocess
from enum import IntEnum
from pathlib import Path

import compactattn
import pytest
from compactattn import _abi, _abi_step, _library, errors

INCLUDE = Path(__file__).parents[2] / "include"
HEADER = INCLUDE / "compactattn.h"
OWN_BASES = (_abi.Versioned,)


def c_name(python_name: str) -> str:
    """ForwardArgs to forward_args."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", python_name).lower()


def members(kind: type) -> list[type]:
    found = {
        value
        for module in (_abi, _abi_step)
        for _, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, kind) and value.__module__.startswith("compactattn.") and value not in OWN_BASES
    }
    return sorted(found, key=lambda cls: cls.__name__)


STRUCTS = members(ctypes.Structure)
ENUMS = members(IntEnum)


def printed(expressions: list[str], folder: Path) -> list[int]:
    """Values of C constant expressions, by a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    lines = "".join(f'printf("%lld\\n", (long long)({e}));\n' for e in expressions)
    source = folder / "print.c"
    includes = "#include <stddef.h>\n#include <stdio.h>\n#include <compactattn.h>\n"
    source.write_text(f"{includes}int main(void) {{\n{lines}return 0;\n}}\n")
    program = folder / "print"
    subprocess.run([compiler, "-std=c11", f"-I{INCLUDE}", str(source), "-o", str(program)], check=True)
    return [int(x) for x in subprocess.check_output([str(program)]).split()]


def test_structs_have_the_headers_sizes_and_offsets(tmp_path: Path) -> None:
    wanted: list[tuple[str, int]] = []
    for struct in STRUCTS:
        name = f"compactattn_{c_name(struct.__name__)}"
        wanted.append((f"sizeof({name})", ctypes.sizeof(struct)))
        for field, *_ in struct._fields_:
            place = getattr(struct, field)
            wanted.append((f"offsetof({name}, {field})", place.offset))
            wanted.append((f"sizeof((({name} *)0)->{field})", place.size))
    said = printed([expression for expression, _ in wanted], tmp_path)
    differing = [(e, mine, c) for (e, mine), c in zip(wanted, said, strict=True) if mine != c]
    assert not differing, "(expression, Python, C)"


def test_structs_name_every_field_of_the_header() -> None:
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", HEADER.read_text(), flags=re.DOTALL)
    for struct in STRUCTS:
        name = f"compactattn_{c_name(struct.__name__)}"
        body = re.search(r"struct " + name + r"\s*\{(.*?)\}", text, re.DOTALL)
        assert body is not None, name
        fields = re.findall(r"(\w+)\s*(?:\[\w+\])?;", body.group(1))
        assert fields == [field for field, *_ in struct._fields_], name


def test_enums_have_the_headers_values(tmp_path: Path) -> None:
    prefix = {"DeviceKind": "DEVICE"}
    names = [
        (f"COMPACTATTN_{prefix.get(enum.__name__, c_name(enum.__name__).upper())}_{member.name}", member.value)
        for enum in ENUMS
        for member in enum
    ]
    names += [(f"COMPACTATTN_{name}", code) for code, name in errors._NAMES.items()]
    names.append(("COMPACTATTN_ABI_VERSION", _abi.ABI_VERSION))
    assert printed([name for name, _ in names], tmp_path) == [value for _, value in names]


def test_every_function_of_the_header_is_bound_with_its_parameters() -> None:
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", HEADER.read_text(), flags=re.DOTALL)
    declared = {
        name: 0 if parameters.strip() == "void" else parameters.count(",") + 1
        for name, parameters in re.findall(r"\b(compactattn_\w+)\(([^)]*)\)\s*;", text)
    }
    assert declared == {name: len(argtypes) for name, (_, argtypes) in _library._functions().items()}


def test_another_abi_is_refused_with_a_clear_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(compactattn.load_library()._name)
    monkeypatch.setattr(_abi, "ABI_VERSION", _abi.ABI_VERSION + 1)
    with pytest.raises(compactattn.LibraryError, match=r"E_ABI: library: wanted ABI .* reinstall") as caught:
        _library._open(path)
    assert (caught.value.status, caught.value.name) == (5, "E_ABI")


def test_a_missing_or_foreign_library_is_told_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(compactattn.LibraryError, match=r"nowhere\.so is missing"):
        _library._open(tmp_path / "nowhere.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(compactattn.LibraryError, match=r"E_IO: library: .*text\.so"):
        _library._open(tmp_path / "text.so")


def test_loading_another_library_later_is_refused() -> None:
    compactattn.load_library()
    with pytest.raises(compactattn.LibraryError, match="loaded already"):
        compactattn.load_library("/nowhere.so")
