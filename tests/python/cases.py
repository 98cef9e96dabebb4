"""Random paged batches on a dirty pool, and float64 attention over them. Uses NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import compactattn
import numpy as np

LAYOUTS = ("nhd", "hnd", "interleaved")


@dataclass
class Case:
    """One step: requests of (q_len, kv_len) over shuffled pages; every slot no request owns is NaN."""

    lens: list[tuple[int, int]]
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "f32"
    layout: str = "nhd"
    seed: int = 0
    # Filled in: float64 values that the dtype holds exactly.
    q: Any = field(init=False)
    k: Any = field(init=False)
    v: Any = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        total_q = sum(q for q, _ in self.lens)
        self.seq_lens = np.array([kv for _, kv in self.lens], np.int32)
        self.cu_seqlens_q = np.cumsum([0, *(q for q, _ in self.lens)]).astype(np.int32)
        self.q = rounded(rng.standard_normal((total_q, self.num_q_heads, self.head_dim)), self.dtype)
        pages = -(-self.seq_lens // self.page_size)
        # More pages than are owned, in an order of their own; the tail of each row names a stranger's page.
        self.num_pages = int(pages.sum()) + 3
        order = rng.permutation(self.num_pages).astype(np.int32)
        self.block_table = np.full((len(self.lens), int(pages.max(initial=0)) + 2), order[-1], np.int32)
        self.k = np.full((self.num_pages, self.page_size, self.num_kv_heads, self.head_dim), np.nan)
        self.v = self.k.copy()
        for req, (_, kv_len) in enumerate(self.lens):
            mine, order = order[: pages[req]], order[pages[req] :]
            self.block_table[req, : len(mine)] = mine
            for pool in (self.k, self.v):
                tokens = rounded(rng.standard_normal((kv_len, self.num_kv_heads, self.head_dim)), self.dtype)
                for i, page in enumerate(mine):
                    part = tokens[i * self.page_size : (i + 1) * self.page_size]
                    pool[page, : len(part)] = part

    def inputs(self) -> tuple[Any, ...]:
        """Arguments of ``compactattn.forward``, with bf16 as tagged words and caches in the case's layout."""
        q, (k, v) = stored(self.q, self.dtype), self._caches()
        if self.dtype == "bf16":
            q, k, v = compactattn.bf16(q), compactattn.bf16(k), compactattn.bf16(v)
        return q, k, v, self.block_table, self.seq_lens, self.cu_seqlens_q

    def _caches(self) -> tuple[Any, Any]:
        k, v = stored(self.k, self.dtype), stored(self.v, self.dtype)
        if self.layout == "hnd":
            # [pages, heads, tokens, dim] in memory, seen as [pages, tokens, heads, dim].
            return tuple(np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3) for x in (k, v))
        if self.layout == "interleaved":
            # [pages, 2, tokens, heads, dim] in memory: K and V of a page are neighbours.
            both = np.stack([k, v], axis=1)
            return both[:, 0], both[:, 1]
        return k, v

    def tokens(self, req: int, pool: Any) -> Any:
        """The request's KV, ``[kv_len, num_kv_heads, head_dim]`` float64."""
        kv_len = self.seq_lens[req]
        pages = self.block_table[req, : -(-kv_len // self.page_size)]
        return pool[pages].reshape(-1, self.num_kv_heads, self.head_dim)[:kv_len]

    def reference(self, keep: Any = None) -> tuple[Any, Any]:
        """Float64 ``(out, lse)``; ``keep(req, q_head, kv token numbers) -> bool`` limits what is read."""
        out, lse = np.zeros_like(self.q), np.full((self.num_q_heads, len(self.q)), -np.inf)
        for req, (q_len, kv_len) in enumerate(self.lens):
            k, v, first = self.tokens(req, self.k), self.tokens(req, self.v), self.cu_seqlens_q[req]
            for head in range(self.num_q_heads):
                kv_head = head // (self.num_q_heads // self.num_kv_heads)
                logits = self.q[first : first + q_len, head] @ k[:, kv_head].T / np.sqrt(self.head_dim)
                seen = np.arange(kv_len) <= np.arange(q_len)[:, None] + kv_len - q_len
                if keep is not None:
                    seen &= keep(req, head, np.arange(kv_len))
                logits[~seen] = -np.inf
                rows = slice(first, first + q_len)
                out[rows, head], lse[head, rows] = softmax_times(logits, v[:, kv_head])
        return out, lse


def softmax_times(logits: Any, v: Any) -> tuple[Any, Any]:
    """Rows that see nothing give 0 and -inf."""
    top = np.max(logits, axis=1, initial=-1e300)
    weights = np.exp(logits - top[:, None])
    total = weights.sum(axis=1)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, top + np.log(total), -np.inf)
    return weights @ v / np.where(total > 0, total, 1)[:, None], lse


def rounded(x: Any, dtype: str) -> Any:
    """To the nearest number the dtype holds, as float64."""
    return loaded(stored(x, dtype), dtype)


def stored(x: Any, dtype: str) -> Any:
    """As the library reads it; bf16 as uint16 words, rounded to nearest even."""
    if dtype != "bf16":
        return x.astype({"f32": np.float32, "f16": np.float16}[dtype])
    bits = x.astype(np.float32).view(np.uint32)
    words = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), words)


def loaded(x: Any, dtype: str) -> Any:
    """Back to float64."""
    if dtype == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def tolerance(case: Case) -> float:
    """How far out may lie from float64, for |v| below 6 (standard normal draws).

    Logits are sums of head_dim products of magnitude ~1 divided by sqrt(head_dim), in f32: absolute error at most
    head_dim * eps32 * max|q||k| / 8, with products below 30: 64 * 6e-8 * 30 / 8 = 1.5e-5 relative in each weight.
    A weighted mean of |v| <= 6 moves by at most twice that times 6, 1.8e-4; storing out rounds by half an ulp of a
    number below 4 for f16 (2^-11 * 4 = 2e-3) and bf16 (2^-8 * 4 / 2 = 8e-3). P is kept in f32 on the CPU.
    """
    return {"f32": 2e-4, "f16": 2.2e-3, "bf16": 1.6e-2}[case.dtype]
