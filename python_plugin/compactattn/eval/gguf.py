"""GGUF, version 3, as far as SmolLM2's file goes: its header, and tensors of f32, q8_0 and q4_1."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]


@dataclass(frozen=True)
class Tensor:
    """A tensor's place: ``shape`` with rows first, ``start`` in bytes of the file."""

    shape: tuple[int, ...]
    kind: int
    start: int


class Gguf:
    """One file: ``fields`` by key (numbers, texts, lists of either), ``tensors`` by name."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for another format, version or kind of field."""
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._at = 0
        magic, version, tensors, fields = self._take("<4sIQQ")
        if magic != b"GGUF" or version != 3:
            raise ValueError(f"{path}: wanted GGUF version 3, got {magic!r} {version}")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            key = self._text()
            self.fields[key] = self._value(self._take("<I")[0])
        found = [self._tensor() for _ in range(tensors)]
        align = self.fields.get("general.alignment", 32)
        start = -(-self._at // align) * align
        self.tensors = {name: Tensor(shape, kind, start + offset) for name, shape, kind, offset in found}

    def values(self, name: str) -> Any:
        """A tensor in f32, ``[rows, ..]``; ValueError for a kind that is not read here."""
        tensor = self.tensors[name]
        if tensor.kind not in _BLOCKS:
            raise ValueError(f"{name}: wanted a kind of {list(_BLOCKS)}, got {tensor.kind}")
        tokens, size, widen = _BLOCKS[tensor.kind]
        blocks = 1
        for extent in tensor.shape:
            blocks *= extent
        blocks //= tokens
        raw = torch.frombuffer(self._bytes, dtype=torch.uint8, count=blocks * size, offset=tensor.start)
        return widen(raw.view(blocks, size)).reshape(tensor.shape)

    def _take(self, layout: str) -> tuple[Any, ...]:
        found = struct.unpack_from(layout, self._bytes, self._at)
        self._at += struct.calcsize(layout)
        return found

    def _text(self) -> str:
        (count,) = self._take("<Q")
        self._at += count
        return self._bytes[self._at - count : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind == _LIST:
            of, count = self._take("<IQ")
            return [self._text() for _ in range(count)] if of == _TEXT else list(self._take(f"<{count}{_LETTERS[of]}"))
        if kind not in _LETTERS:
            raise ValueError(f"a field of kind {kind}")
        return self._take(f"<{_LETTERS[kind]}")[0]

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        (dims,) = self._take("<I")
        # The file counts from the innermost.
        shape = self._take(f"<{dims}Q")[::-1]
        kind, offset = self._take("<IQ")
        return name, shape, kind, offset


def _f32(raw: Any) -> Any:
    return raw.view(torch.float32).clone()


def _q8_0(raw: Any) -> Any:
    """32 bytes behind their scale."""
    scale = raw[:, :2].contiguous().view(torch.float16).float()
    return scale * raw[:, 2:].view(torch.int8).float()


def _q4_1(raw: Any) -> Any:
    """32 half-bytes behind scale and least value; the low halves come first."""
    scale, least = raw[:, :4].contiguous().view(torch.float16).float().split(1, 1)
    halves = torch.cat([raw[:, 4:] & 15, raw[:, 4:] >> 4], 1)
    return scale * halves.float() + least


# By number of kind: values and bytes of a block, and how it is widened.
_BLOCKS = {0: (1, 4, _f32), 3: (32, 20, _q4_1), 8: (32, 34, _q8_0)}
_TEXT, _LIST = 8, 9
_LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
