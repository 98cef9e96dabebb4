"""fp8 caches: e4m3 numbers and their scales, as NumPy, DLPack and ml_dtypes bring them."""

from __future__ import annotations

from typing import Any

import compactattn
import numpy as np
import pytest
from compactattn.errors import InvalidArgument

HEADS, KV_HEADS, DIM, PAGE, PAGES = 4, 2, 64, 16, 9
# One rounding of a key by its scale on either side, 90 keys, averages of numbers below 4.
TOLERANCE = 4 * 90 * 2**-23


def decoded() -> np.ndarray:
    """The number of each code, by the format's own words."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, (code & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    size[code & 127 == 127] = np.nan
    return np.where(code & 128, -size, size).astype(np.float32)


def step() -> tuple[Any, ...]:
    """Queries, codes of keys and values, table, lengths; slots that nobody owns are NaN."""
    rng = np.random.default_rng(7)
    q = rng.standard_normal((40, HEADS, DIM), dtype=np.float32)
    codes = rng.integers(0, 120, (2, PAGES, PAGE, KV_HEADS, DIM)) & 0x47 | rng.integers(0, 2, DIM) << 7
    codes = codes.astype(np.uint8)
    codes[:, 5, 10:] = 0x7F
    codes[:, 6:] = 0xFF
    return q, *codes, [[0, 2, 4, 1, 3, 5]], [90], [0, 40]


@pytest.mark.parametrize("count", [0, 1, KV_HEADS])
def test_codes_and_scales_are_the_numbers_they_stand_for(count: int) -> None:
    q, k, v, table, lens, starts = step()
    scales = [np.array([0.7, 1.9][:count], np.float32), np.array([0.3, 1.1][:count], np.float32)]
    given = {name: scale for name, scale in zip(("k_scale", "v_scale"), scales, strict=True) if count}
    got = compactattn.forward(q, compactattn.e4m3(k), compactattn.e4m3(v), table, lens, starts, **given)
    factors = [scale.reshape(-1, 1) if count else np.float32(1) for scale in scales]
    wide = [decoded()[codes] * factor for codes, factor in zip((k, v), factors, strict=True)]
    want = compactattn.forward(q, *wide, table, lens, starts)
    assert np.isfinite(want).all()
    assert np.abs(got - want).max() <= TOLERANCE * max(1, np.abs(want).max())


def test_a_dlpack_type_of_its_own_and_tagged_bytes_are_the_same() -> None:
    torch = pytest.importorskip("torch")
    q, k, v, *rest = step()
    plain = compactattn.forward(q, compactattn.e4m3(k), compactattn.e4m3(v), *rest)
    tagged = [compactattn.e4m3(torch.from_numpy(codes)) for codes in (k, v)]
    typed = [torch.from_numpy(codes).view(torch.float8_e4m3fn) for codes in (k, v)]
    for caches in (tagged, typed):
        assert (compactattn.forward(torch.from_numpy(q), *caches, *rest).numpy() == plain).all()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"k_cache": "bytes"}, "k_cache.dtype"),
        ({"v_cache": "wide"}, "batch.v.dtype"),
        ({"k_scale": np.ones(3, np.float32)}, "batch.k_scale"),
        ({"v_scale": np.array([np.nan], np.float32)}, "v_scale[0]"),
        ({"v_scale": np.ones(1)}, "v_scale.dtype"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(changes: dict[str, Any], text: str) -> None:
    q, k, v, *rest = step()
    caches = {"k_cache": compactattn.e4m3(k), "v_cache": compactattn.e4m3(v)}
    kinds = {"bytes": k, "wide": decoded()[v]}
    scales = {name: value for name, value in changes.items() if "scale" in name}
    caches |= {name: kinds[value] for name, value in changes.items() if "cache" in name}
    with pytest.raises(InvalidArgument, match=text.replace("[", r"\[").replace(".", r"\.")):
        compactattn.forward(q, *caches.values(), *rest, **scales)


def test_scales_are_for_e4m3_alone() -> None:
    q, k, v, *rest = step()
    wide = [decoded()[codes] for codes in (k, v)]
    with pytest.raises(InvalidArgument, match="k_scale"):
        compactattn.forward(q, *wide, *rest, k_scale=np.ones(1, np.float32))
