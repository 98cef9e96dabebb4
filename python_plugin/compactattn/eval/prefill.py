"""One context through one method: chunked prefill, teacher-forced answers, greedy answers where those miss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch  # type: ignore[import-not-found, unused-ignore]
import transformers  # type: ignore[import-not-found, unused-ignore]

from .. import _hf_engine as engine
from .. import hf
from ..errors import DeviceError, InvalidArgument
from ..settings import Settings
from .methods import Method, put_in_force
from .model import Subject
from .report import DENSE, OWN
from .tasks import Context, Question


class Refused(Exception):
    """A method that this backend, or this device, does not serve."""


# What takes a method's row away, and not the study.
NO_ROW = (Refused, InvalidArgument, DeviceError)


@dataclass(frozen=True)
class Outcome:
    """What one question came to."""

    # OWN or DENSE.
    final: str
    # Share of the references that the greedy answer contains.
    recall: float
    # Whether the greedy answer is the expected one, token by token.
    exact: bool
    # -log p of the expected answer, nats per token.
    nll: float
    # Mean KL(dense || this) over the answer's positions, nats; and the share of them whose likeliest token differs.
    kl: float
    flips: float


@dataclass
class Work:
    """What a prefill has read. Pairs are (query, key) of one head under the causal mask."""

    # Of sparse chunks with their past blocks; of everything else; past blocks read and past blocks there are.
    past_pairs: float = 0.0
    other_pairs: float = 0.0
    selected: float = 0.0
    candidates: float = 0.0

    @property
    def density(self) -> float | None:
        """Share of past blocks that sparse chunks read; None if no chunk was sparse."""
        return self.selected / self.candidates if self.candidates else None

    @property
    def executed(self) -> float:
        """Share of the prompt's causal pairs that were computed: chunks that are dense by rule and open regions too."""
        read = self.other_pairs + self.past_pairs * (1.0 if self.density is None else self.density)
        return read / (self.other_pairs + self.past_pairs)

    def plus(self, other: Work, share: float) -> Work:
        """Both, but only a share of the other."""
        return Work(*(mine + share * its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Result:
    """One context under one method: outcomes per question, and what a prompt of it has read on average."""

    outcomes: list[list[Outcome]]
    work: Work
    # Logits at each question's answer, ``[answer, vocabulary]`` f32: what others are compared with if this is dense.
    logits: list[Any] = field(repr=False)


@torch.no_grad()  # type: ignore[misc, unused-ignore]
def run(
    subject: Subject, context: Context, method: Method, limits: Limits, reference: list[Any] | None = None
) -> Result:
    """Prefills the context once and each question's end behind it; ``reference``: the dense logits, None = own.

    Raises Refused if transformers' attention had to stand in anywhere for a reason other than the settings' own.
    """
    if method.missing:
        raise Refused(method.missing)
    put_in_force(method.settings, limits.dense_below)
    prefill = _Prefill(subject, method, limits)
    shared = len(context.ids) // limits.chunk * limits.chunk
    prefill.extend(context.ids[:shared])
    prompt = prefill.take_work()
    ends = [context.ids[shared:] + question.tail for question in context.questions]
    asked = list(zip(ends, context.questions, strict=True))
    logits: list[Any] = []
    outcomes: list[list[Outcome]] = []
    for rest, question in asked:
        logits.append(prefill.answered(rest, question, shared))
        dense = logits[-1] if reference is None else reference[len(outcomes)]
        outcomes.append([prefill.outcome(OWN, question, logits[-1], dense)])
    work = prompt.plus(prefill.take_work(), 1 / max(1, len(asked)))
    if limits.dense_final and method.settings.selector != "dense":
        # From here on the library itself is dense; the shared prefix stays as the method has made it.
        put_in_force(Settings.of("dense"), limits.dense_below)
        for i, (rest, question) in enumerate(asked):
            found = prefill.answered(rest, question, shared)
            outcomes[i].append(prefill.outcome(DENSE, question, found, (reference or logits)[i]))
        prefill.take_work()
    return Result(outcomes, work, logits)


def density(subject: Subject, context: Context, method: Method, limits: Limits) -> float:
    """The share of past blocks that the method reads of the context, its questions left out; 1 if all was dense."""
    put_in_force(method.settings, limits.dense_below)
    prefill = _Prefill(subject, method, limits)
    with torch.no_grad():
        prefill.extend(context.ids)
    found = prefill.take_work().density
    return 1.0 if found is None else found


@dataclass(frozen=True)
class Limits:
    """What all methods share."""

    # Tokens of a prefill chunk.
    chunk: int
    # Prompts are dense while they hold fewer tokens.
    dense_below: int
    # Greedy tokens beyond the expected answer's length.
    slack: int = 4
    # Whether questions are also asked with their own chunks dense.
    dense_final: bool = True


class _Prefill:
    def __init__(self, subject: Subject, method: Method, limits: Limits) -> None:
        self._model, self._codec = subject.model, subject.codec
        self._method, self._limits = method, limits
        self._cache = transformers.DynamicCache(config=self._model.config)
        self._work, self._counted = Work(), hf.report().stats
        ends = self._model.generation_config.eos_token_id
        self._ends = set(ends) if isinstance(ends, list) else {ends}

    def extend(self, ids: tuple[int, ...]) -> Any:
        """Runs ``ids`` behind the cache, cut at multiples of the chunk; the last logits ``[1, 1, vocabulary]``."""
        logits, chunk = None, self._limits.chunk
        while ids:
            past = self._length()
            count = min(len(ids), chunk - past % chunk)
            logits = self._forward(ids[:count], "compactattn", 1)
            self._count(past, count)
            ids = ids[count:]
        return logits

    def answered(self, rest: tuple[int, ...], question: Question, shared: int) -> Any:
        """The logits at the expected answer behind ``shared`` tokens and ``rest``, ``[answer, vocabulary]`` f32."""
        self._crop(shared)
        first, expected = self.extend(rest), question.answer[:-1]
        if not expected:
            return first[0].float()
        return torch.cat([first, self._forward(expected, "sdpa", len(expected))], 1)[0].float()

    def outcome(self, final: str, question: Question, logits: Any, dense: Any) -> Outcome:
        """Compares with the expected answer and with dense attention; goes on greedily from the first miss."""
        expected = torch.tensor(question.answer, device=logits.device)
        log_p, log_dense = logits.log_softmax(-1), dense.log_softmax(-1)
        best = logits.argmax(-1)
        wrong = (best != expected).nonzero()
        kl = (log_dense.exp() * (log_dense - log_p)).sum(-1).mean()
        nll = -log_p.gather(1, expected[:, None]).mean()
        flips = (best != dense.argmax(-1)).float().mean()
        numbers = [float(x) for x in torch.stack([nll, kl, flips])]
        if not len(wrong):
            return Outcome(final, 1.0, True, *numbers)
        return Outcome(final, self._recall(question, int(wrong[0]), int(best[wrong[0]])), False, *numbers)

    def take_work(self) -> Work:
        """What was read since the last call. Raises Refused if it was not the method that did it."""
        report = hf.report()
        reasons = set(report.engine) - {engine.DECODE, engine.SHORT, engine.SLIDING}
        if reasons:
            raise Refused("; ".join(sorted(reasons)))
        stats, before = report.stats, self._counted
        self._work.selected = stats.selected - before.selected
        self._work.candidates = stats.candidates - before.candidates
        work, self._work, self._counted = self._work, Work(), stats
        return work

    def _forward(self, ids: tuple[int, ...], attention: str, keep: int) -> Any:
        if self._model.config._attn_implementation != attention:
            self._model.set_attn_implementation(attention)
        given = torch.tensor([ids], device=self._model.device)
        return self._model(given, past_key_values=self._cache, logits_to_keep=keep).logits

    def _count(self, past: int, count: int) -> None:
        settings = self._method.settings
        sparse = count > settings.dense_max_q_len and past + count >= self._limits.dense_below
        inside = count * (count + 1) / 2
        if sparse and settings.selector != "dense":
            # The open region begins with the chunk's own partial block.
            blocks = past // settings.block_size * settings.block_size
            self._work.past_pairs += count * blocks
            inside += count * (past - blocks)
        else:
            inside += count * past
        self._work.other_pairs += inside

    def _recall(self, question: Question, position: int, token: int) -> float:
        """Greedy decoding from the first position where it leaves the expected answer."""
        said = list(question.answer[:position])
        prompt = self._length() - (len(question.answer) - 1)
        self._crop(prompt + position)
        while token not in self._ends and len(said) < len(question.answer) + self._limits.slack:
            said.append(token)
            token = int(self._forward((token,), "sdpa", 1)[0, -1].argmax())
        text = self._codec.decode(said).lower()
        return sum(one.lower() in text for one in question.references) / len(question.references)

    def _crop(self, length: int) -> None:
        # Newer caches take only what is to go.
        if surplus := self._length() - length:
            self._cache.crop(-surplus)

    def _length(self) -> int:
        return int(self._cache.get_seq_length())
