"""Paged KV of many sequences: who owns which pages, prefixes that are shared, and one step's packed requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found, unused-ignore]

# Tokens a page.
PAGE = 64


@dataclass
class Sequence:
    """A sequence in the pool: the pages of its block table, and how many tokens of KV it has."""

    pages: Any
    length: int = 0

    def fork(self, fresh: Any) -> Sequence:
        """The same tokens, going on in pages of its own: whole pages stay shared, the last one is ``fresh[0]``'s.

        What the last page holds is for the caller to copy (see :meth:`Pool.copy`).
        """
        return Sequence(np.concatenate([self.pages[: self.length // PAGE], fresh]), self.length)

    def slots(self, first: int, count: int) -> Any:
        """Where tokens ``first..first + count`` lie, counted in tokens of the pool."""
        at = np.arange(first, first + count)
        return self.pages[at // PAGE] * PAGE + at % PAGE


class Pool:
    """The KV of all layers, ``[2, layers, pages, PAGE, num_kv_heads, head_dim]``: pages handed out in order."""

    def __init__(self, config: Any, device: Any, dtype: Any, pages: int) -> None:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # Never read before written: what lies there at first would make any result useless.
        shape = (2, config.num_hidden_layers, pages, PAGE, heads, dim)
        self.kv = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self._used = 0

    @property
    def pages(self) -> int:
        """How many there are."""
        return int(self.kv.shape[2])

    def reset(self) -> None:
        """Takes all pages back."""
        self._used = 0

    def take(self, tokens: int) -> Any:
        """Pages for so many tokens."""
        count = -(-tokens // PAGE)
        if self._used + count > self.pages:
            raise ValueError(f"{self._used + count} pages wanted of {self.pages}")
        self._used += count
        return np.arange(self._used - count, self._used)

    def copy(self, sources: list[int], targets: list[int]) -> None:
        """Copies pages, in every layer."""
        if sources:
            at = torch.tensor([sources, targets], device=self.kv.device)
            self.kv[:, :, at[1]] = self.kv[:, :, at[0]]


@dataclass(frozen=True)
class Step:
    """New tokens of several sequences, packed; all tensors on the model's device.

    ``ids``, ``positions [1, total_q]``, ``slots [total_q]`` int64; ``table [num_reqs, width]``, ``seq_lens``,
    ``cu_seqlens_q`` int32, as the library takes them; ``rows``: of the packed tokens, those whose logits are wanted.
    """

    ids: Any
    positions: Any
    slots: Any
    table: Any
    seq_lens: Any
    cu_seqlens_q: Any
    rows: Any
    # (KV tokens, new ones) of each request, on the host.
    spans: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, requests: list[tuple[Sequence, Any]], device: Any, every: bool = False) -> Step:
        """``(sequence, its new ids)``; logits of the last token of each, or of ``every`` token.

        The sequences have the new tokens behind this call.
        """
        firsts = [sequence.length for sequence, _ in requests]
        counts = [len(ids) for _, ids in requests]
        slots = [sequence.slots(first, n) for (sequence, _), first, n in zip(requests, firsts, counts, strict=True)]
        for (sequence, _), count in zip(requests, counts, strict=True):
            sequence.length += count
        ends = np.cumsum([0, *counts])
        lengths = [sequence.length for sequence, _ in requests]
        # Room for all that the sequences may come to, rounded up: steps of one size have tables of one size.
        width = rounded(max(len(sequence.pages) for sequence, _ in requests))
        table = np.zeros((len(requests), width), np.int32)
        for row, (sequence, _) in zip(table, requests, strict=True):
            row[: len(sequence.pages)] = sequence.pages
        positions = np.concatenate([np.arange(n - m, n) for n, m in zip(lengths, counts, strict=True)])
        ids = np.concatenate([np.asarray(ids, np.int64) for _, ids in requests])

        def there(values: Any) -> Any:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)

        return cls(
            ids=there(ids)[None],
            positions=there(positions)[None],
            slots=there(np.concatenate(slots)),
            table=there(table),
            seq_lens=there(np.array(lengths, np.int32)),
            cu_seqlens_q=there(ends.astype(np.int32)),
            rows=there(np.arange(ends[-1]) if every else ends[1:] - 1),
            spans=tuple(zip(lengths, counts, strict=True)),
        )


def rounded(count: int) -> int:
    """The next power of two."""
    return 1 << max(count - 1, 0).bit_length()
