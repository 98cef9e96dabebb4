"""One attention module of a decoder layer, prefilled chunk by chunk: projections, RoPE, cache write, attention, output.

What differs between systems is the cache and the attention; the rest is the same torch code for all. Dense systems are
here, CompactAttention's methods in methods.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from shapes import Shape
from tensor_parallel import Group
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# Where everything is; tests put it on the CPU.
DEVICE = "cuda"
# Width of the hidden state: Llama-3.1-8B's, also for a tensor-parallel half of its heads.
HIDDEN = 4096
ROPE_THETA = 500_000.0
PAGE_SIZE = 16
# Of a chunk's way through the module, in order.
PARTS = ("project", "write", "op", "output", "reduce")


class Attention(ABC):
    """Owns the cache of one prefill; `write`, then `attend`, get what a chunk has after RoPE."""

    name: str
    # Tokens a page; 0 = contiguous.
    page_size: int
    # It reads everything.
    dense: bool = True

    @abstractmethod
    def start(self, shape: Shape) -> None:
        """Empties the cache; everything that a server does once, and not per chunk."""

    @abstractmethod
    def write(self, k: torch.Tensor, v: torch.Tensor, past: int) -> None:
        """Appends a chunk, `[batch, chunk, num_kv_heads, d]`, to `past` tokens of each request."""

    @abstractmethod
    def attend(self, q: torch.Tensor, past: int) -> torch.Tensor:
        """Attention of `q [batch, chunk, num_q_heads, d]` with all that selects; returns q's shape."""

    def keeping_all(self) -> Attention:
        """The same code, with nothing left out: what its answer is checked by."""
        return self


class Module:
    """The layer's weights, of a rank its heads' alone, and the hidden states that all systems and ranks see."""

    def __init__(self, shape: Shape, seed: int, group: Group | None = None) -> None:
        self.shape, self.group = shape, group or Group()
        rng = torch.Generator(DEVICE).manual_seed(seed + self.group.rank)
        q_width, kv_width = shape.num_q_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=rng, device=DEVICE, dtype=torch.bfloat16)

        self.w_qkv = draw(q_width + 2 * kv_width, HIDDEN) * HIDDEN**-0.5
        self.w_out = draw(HIDDEN, q_width) * q_width**-0.5
        rng.manual_seed(seed - 1)
        # Two chunks' worth in turn: no system can profit from inputs that are still in the cache.
        self.hidden = [draw(shape.batch, shape.chunk, HIDDEN) for _ in range(2)]
        half = torch.arange(0, shape.head_dim, 2, device=DEVICE, dtype=torch.float32) / shape.head_dim
        angles = torch.arange(shape.context, device=DEVICE, dtype=torch.float32)[:, None] * ROPE_THETA**-half
        self.cos, self.sin = angles.cos().repeat(1, 2).bfloat16(), angles.sin().repeat(1, 2).bfloat16()

    def forward(self, attention: Attention, past: int, mark: Callable[[], None]) -> torch.Tensor:
        """One chunk through the module; `mark` is called before it and after each of PARTS."""
        shape = self.shape
        mark()
        q, k, v = self.project(self.hidden[past // shape.chunk % 2], past)
        mark()
        attention.write(k, v, past)
        mark()
        out = attention.attend(q, past)
        mark()
        out = out.reshape(shape.batch, shape.chunk, -1) @ self.w_out.T
        mark()
        self.group.sum(out)
        mark()
        return out

    def project(self, hidden: torch.Tensor, past: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of a chunk, RoPE applied."""
        shape, heads = self.shape, (self.shape.num_q_heads, self.shape.num_kv_heads, self.shape.num_kv_heads)
        parts = (hidden @ self.w_qkv.T).split([n * shape.head_dim for n in heads], dim=-1)
        q, k, v = (x.unflatten(-1, (n, shape.head_dim)) for x, n in zip(parts, heads, strict=True))
        at = slice(past, past + shape.chunk)
        cos, sin = self.cos[at, None], self.sin[at, None]
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Fa2WithCopies(Attention):
    """FlashAttention 2 as chunked prefill in transformers calls it: the whole cache copied in every chunk, twice."""

    name, page_size = "fa2-copies", 0

    def start(self, shape: Shape) -> None:
        """No keys, no values."""
        size = (shape.batch, shape.num_kv_heads, 0, shape.head_dim)
        self.k, self.v = (torch.empty(size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))

    def write(self, k: torch.Tensor, v: torch.Tensor, past: int) -> None:
        """Concatenates, and copies once more into the kernel's own layout, tokens first."""
        self.k = torch.cat((self.k, k.transpose(1, 2)), dim=2)
        self.v = torch.cat((self.v, v.transpose(1, 2)), dim=2)
        self.keys, self.values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (self.k, self.v))

    def attend(self, q: torch.Tensor, past: int) -> torch.Tensor:
        """Its kernel in torch has no bottom-right mask: the chunk sees all of itself, a little more work."""
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = scaled_dot_product_attention(
                q.transpose(1, 2), self.keys, self.values, enable_gqa=True, is_causal=past == 0
            )
        return out.transpose(1, 2)


class Paged(Attention):
    """A shuffled pool of pages that each chunk is written into, as in a server."""

    page_size = PAGE_SIZE

    def start(self, shape: Shape) -> None:
        """NaN wherever nothing was written yet."""
        self.shape = shape
        width = -(-shape.context // PAGE_SIZE)
        if getattr(self, "width", None) != (shape, width):
            self.width = (shape, width)
            order = torch.randperm(shape.batch * width, generator=torch.Generator().manual_seed(3)).to(DEVICE)
            self.block_table = order.view(shape.batch, width).int()
            tokens = torch.arange(shape.context, device=DEVICE)
            self.slots = self.block_table[:, tokens // PAGE_SIZE].long() * PAGE_SIZE + tokens % PAGE_SIZE
            size = (shape.batch * width, PAGE_SIZE, shape.num_kv_heads, shape.head_dim)
            self.k, self.v = (torch.empty(size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
            self.seq_lens = torch.zeros(shape.batch, device=DEVICE, dtype=torch.int32)
            self.cu_seqlens_q = torch.arange(shape.batch + 1, device=DEVICE, dtype=torch.int32) * shape.chunk
        self.k.fill_(float("nan"))
        self.v.fill_(float("nan"))
        self.seq_lens.zero_()

    def write(self, k: torch.Tensor, v: torch.Tensor, past: int) -> None:
        """Puts a chunk where the block table says."""
        slots = self.slots[:, past : past + self.shape.chunk].reshape(-1)
        self.k.flatten(0, 1)[slots] = k.flatten(0, 1)
        self.v.flatten(0, 1)[slots] = v.flatten(0, 1)
        self.seq_lens.fill_(past + self.shape.chunk)


class VllmFa3(Paged):
    """vLLM's FlashAttention 3, in place."""

    name = "vllm-fa3"

    def attend(self, q: torch.Tensor, past: int) -> torch.Tensor:
        """Dense."""
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

        out = flash_attn_varlen_func(
            q=q.flatten(0, 1),
            k=self.k,
            v=self.v,
            cu_seqlens_q=self.cu_seqlens_q,
            seqused_k=self.seq_lens,
            max_seqlen_q=self.shape.chunk,
            max_seqlen_k=past + self.shape.chunk,
            softmax_scale=self.shape.head_dim**-0.5,
            causal=True,
            fa_version=3,
            block_table=self.block_table,
        )
        return out.view_as(q)
