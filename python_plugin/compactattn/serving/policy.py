"""Which requests of a step are ours, and which models and machines we serve at all. No engine, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Policy:
    """A request of a step is ours if it is a chunk of a prompt, long enough, over enough KV."""

    # Query tokens of one request in one step.
    min_chunk_tokens: int
    # KV tokens of the request, this chunk included.
    min_kv_tokens: int

    def left_out(self, q_len: int, kv_len: int, prefilling: bool) -> str | None:
        """Why the engine keeps this request, or None if it is ours."""
        if not prefilling or q_len <= 1:
            return DECODE
        if q_len < self.min_chunk_tokens:
            return SHORT_CHUNK
        return SHORT_CONTEXT if kv_len < self.min_kv_tokens else None

    def most_of_ours(self, num_tokens: int) -> int:
        """How many requests of a step of so many query tokens can be ours; a part that is ours holds no others."""
        return max(1, num_tokens // max(2, self.min_chunk_tokens))


@dataclass(frozen=True)
class Part:
    """Neighbouring requests of a step with one owner."""

    ours: bool
    # Of requests, and of query tokens.
    reqs: slice
    tokens: slice
    max_q_len: int
    max_kv_len: int


@dataclass(frozen=True)
class Step:
    """What the engine knows of a step on the host: nothing here was read from a device."""

    # [num_reqs + 1], first query token of each request.
    starts: Sequence[int]
    # [num_reqs], chunk included; exact for prefill, an upper bound for decode.
    kv_lens: Sequence[int]
    # [num_reqs]; None = the engine does not say, and lengths decide.
    prefilling: Sequence[bool] | None = None

    @classmethod
    def of(cls, common: Any) -> Step:
        """From the engine's CommonAttentionMetadata, for which :func:`step_refusal` has found nothing."""
        num_reqs, prefilling = common.num_reqs, getattr(common, "is_prefilling", None)
        return cls(
            common.query_start_loc_cpu[: num_reqs + 1].tolist(),
            _host_lengths(common)[:num_reqs].tolist(),
            None if prefilling is None else prefilling[:num_reqs].tolist(),
        )

    def requests(self) -> Iterator[tuple[int, int, bool]]:
        """Query tokens, KV tokens, whether in its prompt: of each request."""
        for i, kv_len in enumerate(self.kv_lens):
            yield self.starts[i + 1] - self.starts[i], kv_len, self.prefilling is None or self.prefilling[i]


def reasons(policy: Policy, step: Step) -> list[str | None]:
    """Per request why the engine keeps it; None = ours."""
    return [policy.left_out(*request) for request in step.requests()]


def parts(step: Step, left_out: Sequence[str | None]) -> list[Part]:
    """The step as runs of one owner, in order; they cover every request once."""
    found = []
    for ours, run in groupby(range(len(left_out)), key=lambda i: left_out[i] is None):
        reqs = list(run)
        first, end = reqs[0], reqs[-1] + 1
        q_lens = [step.starts[i + 1] - step.starts[i] for i in reqs]
        tokens = slice(step.starts[first], step.starts[end])
        found.append(Part(ours, slice(first, end), tokens, max(q_lens), max(step.kv_lens[first:end])))
    return found


def step_refusal(common: Any, *, cascade: bool) -> str | None:
    """Why a whole step is the engine's, whatever its requests are; None = ask :func:`reasons`."""
    facts = {
        "cascade": cascade,
        "not causal": common.causal is not True,
        "encoder": getattr(common, "encoder_seq_lens", None) is not None,
        "multimodal prefix": getattr(common, "mm_req_doc_ranges", None) is not None,
        "reference sliding window": getattr(common, "rswa_prefix_lens", None) is not None,
        "context parallel": getattr(common, "dcp_local_seq_lens", None) is not None,
        "no lengths on the host": _host_lengths(common) is None,
    }
    return next((reason for reason, holds in facts.items() if holds), None)


def _host_lengths(common: Any) -> Any:
    # The public property of older engines copies from the device where its cache is empty; the cache never does.
    bound = getattr(common, "seq_lens_cpu_upper_bound", None)
    return bound if bound is not None else getattr(common, "_seq_lens_cpu", None)


def config_refusals(facts: dict[str, Any]) -> list[str]:
    """Why a model, machine or engine configuration is not served, each with what to do; [] = it is.

    ``facts``: what the engine's validation hook is given (absent = not asked), dtype and capability as :func:`plain`
    makes them; ``build``, what the library says of itself; and the names of ``_FLAGS`` that the hook is not told.
    """
    found = [text for name, text in _FLAGS.items() if facts.get(name)]
    for name, (allowed, text) in _CHOICES.items():
        value = facts.get(name)
        if value is not None and value not in allowed:
            found.append(text.format(value))
    found += _gpu_refusals(facts.get("device_capability"), facts.get("build"))
    block_size = facts.get("block_size")
    if block_size is not None and block_size % PAGE_SIZES[0]:
        found.append(f"block size {block_size}: wanted a multiple of {PAGE_SIZES[0]} (--block-size)")
    return found


def plain(facts: dict[str, Any]) -> dict[str, Any]:
    """The hook's arguments without torch's and the engine's types."""
    made = dict(facts)
    if made.get("dtype") is not None:
        made["dtype"] = str(made["dtype"]).removeprefix("torch.")
    if made.get("attn_type") is not None:
        made["attn_type"] = str(getattr(made["attn_type"], "value", made["attn_type"]))
    capability = made.get("device_capability")
    if capability is not None:
        made["device_capability"] = (int(capability[0]), int(capability[1]))
    return made


def _gpu_refusals(capability: tuple[int, int] | None, build: str | None) -> list[str]:
    """Of a GPU and of what the library says it was built for; None = not asked."""
    if build is not None and build.endswith("GPU kernels: none"):
        return ["this build of the library holds no GPU kernels: install it by COMPACTATTN_CUDA=require pip install ."]
    if capability is None:
        return []
    major, minor = capability
    arch = "sm_80" if major == 8 else {(9, 0): "sm_90a", (10, 0): "sm_100a", (12, 0): "sm_120a"}.get(capability)
    if arch is None:
        return [f"compute capability {major}.{minor}: there are kernels for 8.x, 9.0, 10.0 and 12.0"]
    return [] if build is None or arch in build else [f"this build of the library holds no kernels for {arch}"]


DECODE, SHORT_CHUNK, SHORT_CONTEXT = "decode", "short chunk", "short context"

PAGE_SIZES = (16, 32, 64, 128, 256)

_FLAGS = {
    "use_mla": "MLA: not offered",
    "has_sliding_window": "sliding window: not offered; give full attention alone to this backend "
    '(--attention-config \'{"backend_per_kind": {"full_attention": "CUSTOM"}}\')',
    "has_sink": "attention sinks: not offered",
    "softcap": "logits softcap: not offered",
    "alibi": "ALiBi: not offered",
    "use_mm_prefix": "bidirectional multimodal prefix: not offered",
    "use_non_causal": "non-causal attention: not offered",
    "use_kv_connector": "KV connector: KV after sparse layers is approximate and would be shared with engines that "
    "compute it densely; use mode dense",
    "context_parallel": "context parallelism: not offered",
    "use_rswa": "reference sliding window: not offered",
    "two_batch": "two-batch overlap: not offered, the workspace is for one stream",
    "needs_means": "selector or mean_correction that reads block means: not kept for vLLM's pages; "
    "choose sampled_exact, quoka, xattention or streaming",
}
_CHOICES: dict[str, tuple[tuple[Any, ...], str]] = {
    "kv_cache_dtype": (
        ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3"),
        "KV cache dtype {}: not offered; auto, fp8 or fp8_e4m3 (--kv-cache-dtype)",
    ),
    "attn_type": (("decoder",), "attention type {}: decoder only"),
    "head_size": ((64, 96, 128, 256), "head size {}: there are kernels for 64, 96, 128 and 256"),
    "dtype": (("bfloat16", "float16"), "dtype {}: bfloat16 or float16 on a GPU"),
}
