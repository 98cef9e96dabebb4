"""Teaches SmolLM2 longer prompts in a minute or two of one GPU: RoPE base 1e5 -> 1e6, LoRA on q, k, v, o.

    python -m compactattn.eval.finetune --out adapter.safetensors --seconds 80

Sequences are contexts of :mod:`compactattn.eval.tasks` with many questions each, of seeds that no study uses; the loss
is on the answers alone. It ends when time is up, and writes the adapter then, and every ten seconds before.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]

from . import lora, model
from .codec import Codec
from .model import Subject
from .tasks import TASKS, fitted

# Task, questions a sequence, weight.
MIX = (
    ("multikey-essay", 32, 6),
    ("multikey-needles", 24, 3),
    ("multikey-uuid", 6, 1),
    ("multiquery", 6, 2),
    ("multivalue", 6, 2),
    ("tracking", 6, 3),
    ("two-hop", 12, 3),
    ("question-first", 1, 1),
    ("question-middle", 1, 1),
    ("frequent-words", 1, 1),
    ("common-words", 1, 1),
)


@dataclass(frozen=True)
class Stage:
    """Until a share of the time is over: so long are the sequences, and so many are one step."""

    until: float
    length: int
    batch: int


STAGES = (Stage(0.12, 4096, 4), Stage(0.35, 8192, 2), Stage(0.60, 16384, 1), Stage(1.0, 32768, 1))


@dataclass(frozen=True)
class Recipe:
    """How it is trained."""

    seconds: float
    stages: tuple[Stage, ...] = STAGES
    rank: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 10
    seed: int = 0
    # Steps at most; 0 = as time allows.
    steps: int = 0


def main(arguments: list[str] | None = None) -> int:
    """0 if the adapter was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the adapter, safetensors")
    parser.add_argument("--model", type=Path, help="SmolLM2's GGUF or a checkpoint folder (default: as eval)")
    parser.add_argument("--seconds", type=float, default=80.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16", choices=list(model.DTYPES))
    parser.add_argument("--rope-theta", type=float, default=1e6)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    subject = model.load(asked.model or model.cached_smollm2(), asked.device, asked.dtype)
    longest = max(stage.length for stage in STAGES)
    config = {
        "max_position_embeddings": longest,
        "rope_parameters": {"rope_type": "default", "rope_theta": asked.rope_theta},
    }
    rebase(subject.model, config)
    train(subject, Recipe(asked.seconds, seed=asked.seed), asked.out, config)
    print(f"{asked.out}: {asked.out.stat().st_size} bytes", file=sys.stderr)
    return 0


def rebase(subject: Any, config: dict[str, Any]) -> None:
    """Changes a Llama's configuration, and what was computed from it."""
    subject.config.update(config)
    inner = subject.model
    with torch.device(subject.device):
        inner.rotary_emb = type(inner.rotary_emb)(subject.config)


def train(subject: Subject, recipe: Recipe, out: Path, config: dict[str, Any]) -> list[float]:
    """Trains adapters for ``recipe.seconds`` and writes them to ``out``; losses by step."""
    net = subject.model
    torch.manual_seed(recipe.seed)
    net.set_attn_implementation("sdpa")
    parameters = lora.adapt(net, recipe.rank)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    data = _sequences(subject.codec, recipe)
    start = saved = time.monotonic()
    losses: list[Any] = []
    tokens = 0
    while (share := (time.monotonic() - start) / recipe.seconds) < 1 and not 0 < recipe.steps <= len(losses):
        stage = next(stage for stage in recipe.stages if share < stage.until)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _rate(len(losses), recipe.warmup_steps, share)
        loss = _loss(net, [data.send(stage.length) for _ in range(stage.batch)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        tokens += stage.length * stage.batch
        if len(losses) % 5 == 0:
            # Reading the losses waits for the GPU, so that the clock is the work's and not the queue's.
            recent = float(torch.stack(losses[-5:]).mean())
            seconds = time.monotonic() - start
            rate = f"{tokens / seconds:.0f} tokens/s"
            print(f"step {len(losses)} {stage.length} loss {recent:.4f} {seconds:.1f} s {rate}", flush=True)
        if time.monotonic() - saved > 10:
            saved = time.monotonic()
            _save(net, out, recipe, config, len(losses), tokens)
    _save(net, out, recipe, config, len(losses), tokens)
    return [float(loss) for loss in losses]


def _save(net: Any, out: Path, recipe: Recipe, config: dict[str, Any], steps: int, tokens: int) -> None:
    made: dict[str, Any] = {"steps": steps, "tokens": tokens, "rank": recipe.rank, "seed": recipe.seed}
    made |= {"learning_rate": recipe.learning_rate, "seconds": recipe.seconds, "torch": torch.__version__}
    lora.save(net, out, config=config, made=made)


def _rate(step: int, warmup: int, share: float) -> float:
    """Linear up over the first steps, linear down over the last half of the time."""
    return min(1.0, (step + 1) / warmup, 2.05 * (1 - share))


def _loss(net: Any, sequences: list[tuple[list[int], list[int]]]) -> Any:
    """Mean -log p of the answers' tokens; logits are made where there is one only."""
    ids = torch.tensor([ids for ids, _ in sequences], device=net.device)
    hidden = net.model(ids, use_cache=False).last_hidden_state
    rows = [i for i, (_, answers) in enumerate(sequences) for _ in answers]
    columns = [at for _, answers in sequences for at in answers]
    logits = net.lm_head(hidden[rows, [at - 1 for at in columns]])
    return torch.nn.functional.cross_entropy(logits.float(), ids[rows, columns])


def _sequences(codec: Codec, recipe: Recipe) -> Any:
    """A generator that is sent lengths and gives (ids, positions of the answers' tokens)."""
    made = _endless(codec, recipe.seed)
    next(made)
    return made


def _endless(codec: Codec, seed: int) -> Generator[Any, int, None]:
    rng = Random(f"finetune:{seed}")
    tasks, weights = [(task, questions) for task, questions, _ in MIX], [weight for *_, weight in MIX]
    made: Any = None
    while True:
        length = yield made
        task, questions = rng.choices(tasks, weights)[0]
        made = sequence(task, codec, length, rng, questions)


def sequence(task: str, codec: Codec, length: int, rng: Random, questions: int) -> tuple[list[int], list[int]]:
    """``length`` ids of a context and all its questions, each a turn of its own; where the answers' tokens stand."""
    close = codec.encode("." + codec.frame[1].partition("\n")[0])
    again = close + codec.encode(codec.frame[0])
    between = max(len(close), len(again))
    draft = TASKS[task](rng, questions)
    context = fitted(task, draft, codec, rng, lambda parts: length - sum(parts) - between * len(parts))
    ids = list(context.ids)
    answers: list[int] = []
    for i, question in enumerate(context.questions):
        ids += [*(again if i else ()), *question.tail]
        answers += range(len(ids), len(ids) + len(question.answer))
        ids += question.answer
    # The answer's end is learnt too, once.
    answers += range(len(ids), len(ids) + len(close))
    ids += close
    ids += [ids[-1]] * (length - len(ids))
    answers = [at for at in answers if at < length]
    return ids[:length], answers


if __name__ == "__main__":
    sys.exit(main())
