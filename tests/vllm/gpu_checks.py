"""The backend in a real vLLM on a GPU: dense to the bit, keep-all to rounding, preemption, aborts, prefix hits.

    python tests/vllm/gpu_checks.py [--graphs] [--cpu] [--layers 4]      # exit code 1 if any check fails

``--graphs``: with the engine's defaults, torch.compile and CUDA graphs, else eagerly.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_engine import KEEP_ALL, Engines, Log, impls, replaced, scheduler, unmake

# Two bf16 kernels: probabilities and results rounded to 2^-9 of their size at most, in either, against a third party.
KERNEL_TOLERANCE = 4 * 2**-9


class Checks:
    """Runs checks, each guarded, and keeps what failed."""

    def __init__(self, engines: Engines) -> None:
        self.engines, self.log, self.failed = engines, Log(), []

    def run(self, name: str, check: Callable[[], str]) -> None:
        """Prints the check's own words, or where it failed."""
        start = time.perf_counter()
        try:
            print(f"ok    {name}: {check()} ({time.perf_counter() - start:.1f} s)", flush=True)
        except Exception:
            self.failed.append(name)
            print(f"FAIL  {name}\n{traceback.format_exc()[-2500:]}", flush=True)

    def tokens(self, count: int) -> int:
        """Lengths, shorter where a CPU tries the script."""
        return self.engines.tokens(count)

    def prompts(self) -> list[dict[str, list[int]]]:
        """200 short prompts, of lengths that mix."""
        lengths = random.Random(0)
        return [self.engines.prompt(i, lengths.randint(3, self.tokens(900))) for i in range(self.count)]

    @property
    def count(self) -> int:
        """Of prompts."""
        return 12 if self.engines.cpu else 200

    def long(self) -> list[dict[str, list[int]]]:
        """Prompts of several chunks beside short ones."""
        return [self.engines.prompt(900 + i, self.tokens(n)) for i, n in enumerate((24000, 9000, 700, 5000, 40, 12000))]


def generate(llm: Any, prompts: Any, tokens: int = 8, logprobs: int = 5) -> list[Any]:
    """Greedy, with log probabilities."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, logprobs=logprobs, ignore_eos=True, detokenize=False)
    return llm.generate(prompts, params, use_tqdm=False)


def answers(outputs: list[Any]) -> list[tuple[Any, Any]]:
    """Tokens and log probabilities, to be compared by equality."""
    steps = [[{t: p.logprob for t, p in step.items()} for step in out.outputs[0].logprobs] for out in outputs]
    return [(tuple(out.outputs[0].token_ids), step) for out, step in zip(outputs, steps, strict=True)]


def distance(a: list[Any], b: list[Any]) -> float:
    """Largest difference of a log probability that both have, of the first generated token."""
    found = 0.0
    for (_, one), (_, two) in zip(answers(a), answers(b), strict=True):
        common = one[0].keys() & two[0].keys()
        assert len(common) >= min(5, len(one[0])), f"only {len(common)} tokens in common"
        found = max([found, *(abs(one[0][token] - two[0][token]) for token in common)])
    return found


class Watch:
    """Wraps a layer's forward: keep-all against the engine's kernel, and what our part allocates or waits for."""

    def __init__(self) -> None:
        self.errors: list[Any] = []
        self.layers = self.allocated = 0

    def forward(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """In split steps the engine's kernel runs beside ours, over the whole step."""

        def watched(impl: Any, *args: Any, **kwargs: Any) -> Any:
            made = inner(impl, *args, **kwargs)
            metadata = args[5]
            if getattr(metadata, "compact_pieces", None) is not None:
                theirs = torch.zeros_like(made)
                impl.engine_step(*args[:6], theirs)
                rows = slice(0, metadata.num_actual_tokens)
                off, size = (made[rows] - theirs[rows]).float(), theirs[rows].float()
                self.errors.append((off.norm() / size.norm(), off.abs().max()))
                self.layers += 1
            return made

        return watched

    def attend(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Our part alone: nothing allocated on the device, nothing waited for (torch's own calls are watched)."""

        def watched(impl: Any, *args: Any) -> None:
            if not torch.cuda.is_available():
                return inner(impl, *args)
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            torch.cuda.set_sync_debug_mode("error")
            try:
                inner(impl, *args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            self.allocated += torch.cuda.memory_stats()["allocation.all.allocated"] - before
            return None

        return watched


def dense(checks: Checks) -> None:
    """Mode dense against the engine alone; gives nothing back, as the next engine needs the memory."""
    at = {"pool_tokens": 200_000, "max_model_len": checks.tokens(32768), "max_num_batched_tokens": checks.tokens(8192)}
    stock = checks.engines.make(None, **at)
    wanted = answers(generate(stock, checks.prompts()))
    checks.long_wanted = generate(stock, checks.long(), logprobs=20)
    # Each prompt by itself is cut otherwise: the engine's own rounding.
    scheduler(stock).kv_cache_manager.reset_prefix_cache()
    alone = [generate(stock, [prompt], logprobs=20)[0] for prompt in checks.long()]
    checks.noise = distance(checks.long_wanted, alone)
    scheduler(stock).kv_cache_manager.reset_prefix_cache()
    checks.hit_wanted = [generate(stock, wave, logprobs=20) for wave in waves(checks)]
    captured = graphs(stock)
    unmake(stock)
    del stock
    ours = checks.engines.make({"mode": "dense"}, **at)

    def identical() -> str:
        kinds = {type(impl).__name__ for impl in impls(ours)}
        got = answers(generate(ours, checks.prompts()))
        equal = sum(a == b for a, b in zip(wanted, got, strict=True))
        assert equal == len(wanted), f"{equal} of {len(wanted)} equal"
        assert kinds <= {"CompactAttentionImpl", "CompactCpuImpl"}, kinds
        return f"{equal} of {len(wanted)} prompts, {kinds}: tokens and log probabilities identical"

    def same_graphs() -> str:
        assert graphs(ours) == captured, f"{graphs(ours)}, the engine {captured}"
        return captured

    checks.run("mode dense", identical)
    checks.run("mode dense, graphs", same_graphs)
    unmake(ours)


def graphs(llm: Any) -> str:
    """What the engine has compiled and captured, in its own words."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    config = llm.llm_engine.vllm_config.compilation_config
    manager = getattr(runner, "cudagraph_manager", None)
    count = len(getattr(manager, "graphs", ()))
    return f"compilation {config.mode.name}, graphs {config.cudagraph_mode.name}, {count} of whole steps captured"


def waves(checks: Checks) -> list[Any]:
    """A long prompt, then two that begin with most of it."""
    first = checks.long()[0]["prompt_token_ids"]
    cut = len(first) * 3 // 4
    more = [checks.engines.prompt(990 + i, checks.tokens(n))["prompt_token_ids"] for i, n in enumerate((4000, 300))]
    return [[{"prompt_token_ids": first}], [{"prompt_token_ids": first[:cut] + tail} for tail in more]]


def keep_all(checks: Checks) -> None:
    """Everything kept, so that our kernels run over the long prompts and must give the engine's numbers."""
    from compactattn.vllm import counters
    from compactattn.vllm.split import SplitImpl

    at = {"pool_tokens": 200_000, "max_model_len": checks.tokens(32768), "max_num_batched_tokens": checks.tokens(8192)}
    asked = KEEP_ALL | {"min_chunk_tokens": checks.tokens(256), "min_kv_tokens": checks.tokens(1024), "strict": True}
    checks.log.lines.clear()
    ours = checks.engines.make(asked, **at)

    def starts() -> str:
        (line,) = [line for line in checks.log.lines if line.startswith("INFO")]
        assert all(impl._service is not None for impl in impls(ours))
        return line

    def kernels() -> str:
        watch, before = Watch(), counters()["split_steps"]
        with (
            replaced(SplitImpl, "forward", watch.forward(SplitImpl.forward)),
            replaced(SplitImpl, "_attend", watch.attend(SplitImpl._attend)),
        ):
            generate(ours, checks.long(), tokens=2)
        # Replayed graphs do not come by here: each split step must have, in all layers.
        split = counters()["split_steps"] - before
        assert watch.layers == split * len(impls(ours)) > 0, f"{watch.layers} layers of {split} steps"
        rms, largest = (max(float(pair[i]) for pair in watch.errors) for i in (0, 1))
        assert rms <= KERNEL_TOLERANCE, f"rms {rms:.2e}"
        assert watch.allocated == 0 or checks.engines.cpu, f"{watch.allocated} bytes allocated"
        apart = "" if checks.engines.cpu else "; allocated 0 bytes, waited for nothing"
        found = f"rms {rms:.2e} of {KERNEL_TOLERANCE:.2e}, largest {largest:.2e}"
        # On a CPU both are the library's (compactattn.vllm.cpu): test_engine.py compares with the engine's own there.
        other = "the library's dense attention" if checks.engines.cpu else "the engine's kernel"
        return f"{watch.layers} split layers against {other}: {found}{apart}"

    def logits() -> str:
        scheduler(ours).kv_cache_manager.reset_prefix_cache()
        before = counters()["our_tokens"]
        far = distance(generate(ours, checks.long(), logprobs=20), checks.long_wanted)
        served = counters()["our_tokens"] - before
        assert served > checks.tokens(30000), served
        assert far <= 2 * checks.noise + 1e-3, f"{far:.4f}, the engine from itself {checks.noise:.4f}"
        own = f"the engine from itself, cut otherwise, {checks.noise:.4f}"
        return f"log probabilities off by {far:.4f}; {own}; {served} tokens"

    def hits() -> str:
        scheduler(ours).kv_cache_manager.reset_prefix_cache()
        got = [generate(ours, wave, logprobs=20) for wave in waves(checks)]
        cached = [out.num_cached_tokens for out in got[1]]
        assert min(cached) > checks.tokens(12000), cached
        far = max(distance(a, b) for a, b in zip(got, checks.hit_wanted, strict=True))
        assert far <= 2 * checks.noise + 1e-3, f"{far:.4f}"
        return f"{cached} tokens cached, log probabilities off by {far:.4f}"

    def truth() -> str:
        found = counters()
        assert found["fallbacks"] == {}, found
        assert all(plan["refused"] == 0 for plan in found["plans"]), found
        return str(found)

    found = {
        "start": starts,
        "kernels": kernels,
        "logits": logits,
        "small steps": lambda: small_steps(checks, ours),
        "prefix hit": hits,
    }
    for name, check in (found | {"counters": truth}).items():
        checks.run(name, check)
    unmake(ours)


def small_steps(checks: Checks, ours: Any) -> str:
    """Steps small enough for captured pieces, between which attention runs; 512 tokens is the largest by default."""
    from compactattn.vllm import counters

    here, largest = scheduler(ours), checks.tokens(8192)
    here.kv_cache_manager.reset_prefix_cache()
    here.max_num_scheduled_tokens, before = checks.tokens(512), counters()["split_steps"]
    far = distance(generate(ours, checks.long(), logprobs=20), checks.long_wanted)
    here.max_num_scheduled_tokens, split = largest, counters()["split_steps"] - before
    assert split >= 50, split
    assert far <= 2 * checks.noise + 1e-3, f"{far:.4f}, the engine from itself {checks.noise:.4f}"
    return f"{graphs(ours)}; {split} split steps of 512 tokens, log probabilities off by {far:.4f}"


def under_load(checks: Checks) -> None:
    """A pool that four prompts nearly fill, so that their answers drive one another out; a third is aborted."""
    from vllm import SamplingParams

    # Four prompts fit whole, and no two of their answers.
    pool, share, answer = checks.tokens(20800), *((22, 64) if checks.engines.cpu else (24, 400))
    more = {"num_gpu_blocks_override": pool // 32, "block_size": 32} if checks.engines.cpu else {}
    asked = {"min_chunk_tokens": 64, "min_kv_tokens": checks.tokens(1024), "dense_below_kv_len": checks.tokens(1024)}
    ours = checks.engines.make(
        asked | {"keep_density": 0.3, "strict": True},
        pool_tokens=pool,
        max_model_len=checks.tokens(8192),
        max_num_batched_tokens=checks.tokens(2048),
        max_num_seqs=16,
        **more,
    )

    def survives() -> str:
        engine, rolls, preempted, done = ours.llm_engine, random.Random(1), [], {}
        params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True, detokenize=False)
        here = scheduler(ours)
        blocks = here.kv_cache_manager.block_pool
        free, preempt = blocks.get_num_free_blocks(), here._preempt_request
        here._preempt_request = lambda request, *rest: (preempted.append(request.request_id), preempt(request, *rest))
        for i in range(12):
            engine.add_request(str(i), checks.engines.prompt(700 + i, pool * share // 100), params)
        doomed, steps = [str(i) for i in range(1, 12, 3)], 0
        while engine.has_unfinished_requests():
            for out in engine.step():
                if out.finished:
                    done[out.request_id] = out
            steps += 1
            if doomed and rolls.random() < 0.02:
                engine.abort_request([doomed.pop()])
        whole = [out for out in done.values() if len(out.outputs[0].token_ids) == answer]
        assert len(whole) >= 8, sorted(done)
        left = blocks.get_num_free_blocks()
        assert left == free, f"{free} blocks free before, {left} after"
        assert preempted, f"nothing was preempted in {steps} steps"
        aborts = f"{len(preempted)} preemptions, {4 - len(doomed)} aborts"
        return f"{len(whole)} requests whole, {aborts}, {steps} steps, {left} blocks free again"

    checks.run("preemption and aborts", survives)
    unmake(ours)


def fallback(checks: Checks) -> None:
    """A cache that the selector's kernels do not read is the engine's: said once, counted for each layer."""
    from compactattn.vllm import counters

    before = dict(counters()["fallbacks"])
    checks.log.lines.clear()
    ours = checks.engines.make(
        {"selector": "xattention"}, pool_tokens=40_000, max_model_len=16384, kv_cache_dtype="fp8"
    )

    def said() -> str:
        generate(ours, [checks.engines.prompt(5, 9000)], tokens=2)
        warned = [line for line in checks.log.lines if line.startswith("WARN")]
        assert len(warned) == 1, checks.log.lines
        (reason,) = counters()["fallbacks"].keys() - before.keys()
        assert counters()["fallbacks"][reason] == len(impls(ours))
        return f"{warned[0]}; counted {len(impls(ours))}"

    checks.run("fallback", said)
    unmake(ours)


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", default="dense,keep_all,under_load,fallback")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(Engines(Path(folder), given.layers, cpu=given.cpu, graphs=given.graphs))
        parts = {part.__name__: part for part in (dense, keep_all, under_load, fallback)}
        for name in given.only.split(","):
            if name == "fallback" and given.cpu:
                continue
            try:
                parts[name](checks)
            except Exception:
                checks.failed.append(name)
                print(f"FAIL  {name}\n{traceback.format_exc()[-4000:]}", flush=True)
    print("failed: " + (", ".join(checks.failed) or "nothing"))
    return bool(checks.failed)


if __name__ == "__main__":
    sys.exit(main())
