"""A batch of contexts through one method: chunked prefill, their questions behind it, teacher-forced and greedy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found, unused-ignore]

from .._stats import Stats
from ..errors import DeviceError, InvalidArgument
from ..settings import Settings
from . import scores
from .decode import ends_of, greedy
from .engine import Probe, Refused
from .methods import Method
from .model import Subject
from .pool import PAGE, Sequence, Step
from .report import DENSE, OWN
from .tasks import Context, Question

# What takes a method's row away, and not the study; RuntimeError is torch's, for want of memory say.
NO_ROW = (Refused, InvalidArgument, DeviceError, RuntimeError)
# Of these, what comes again with every run: memory that ran out, say, is another run's to find.
FOR_GOOD = (Refused, InvalidArgument)


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
    """What prefills have read. Pairs are (query, key) of one head under the causal mask; all fields add up."""

    # Of sparse chunks with their past blocks, and how many of these were read; of everything else.
    past_pairs: float = 0.0
    read_pairs: float = 0.0
    other_pairs: float = 0.0

    @property
    def density(self) -> float | None:
        """Share of the pairs with past blocks that sparse chunks read; None if no chunk was sparse."""
        # Of pairs, not of what selection had to choose from: there a question of 30 tokens counts as a span of 1,024.
        return self.read_pairs / self.past_pairs if self.past_pairs else None

    @property
    def executed(self) -> float:
        """Share of the prompts' causal pairs that were computed: chunks that are dense by rule and open regions too."""
        return (self.other_pairs + self.read_pairs) / (self.other_pairs + self.past_pairs)

    def read(self, before: Stats, after: Stats) -> None:
        """Of the past pairs the share that selection kept between the two, all if it was not asked."""
        candidates = after.candidates - before.candidates
        share = (after.selected - before.selected) / candidates if candidates else 1.0
        self.read_pairs = share * self.past_pairs

    def plus(self, other: Work, share: float) -> Work:
        """Both, but only a share of the other."""
        return Work(*(mine + share * its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Result:
    """A batch under one method: outcomes ``[context][question][final]``, and what its prompts have read."""

    outcomes: list[list[list[Outcome]]]
    work: Work
    # Logits at the answers of all questions, ``[positions, vocabulary]``: what others are compared with if this is
    # dense. In the model's dtype.
    logits: Any = field(repr=False)


@dataclass(frozen=True)
class Limits:
    """What all methods share."""

    # Tokens of a prefill chunk.
    chunk: int
    # Prompts are dense while they hold fewer tokens.
    dense_below: int
    # Greedy tokens beyond the expected answer's length.
    slack: int = 4
    # Whether questions are also asked with their own chunk dense.
    dense_final: bool = True


def run(
    subject: Subject, contexts: list[Context], method: Method, limits: Limits, reference: Any | None = None
) -> Result:
    """Prefills the contexts together, then all their questions; ``reference``: dense attention's logits, None = own.

    Raises Refused for what the model or the device does not serve.
    """
    if method.missing:
        raise Refused(method.missing)
    prefill = Prefill(subject, contexts, method.settings, limits)
    prompts = prefill.contexts()
    finals = [OWN] if not limits.dense_final or method.settings.selector == "dense" else [OWN, DENSE]
    logits = [prefill.questions(final) for final in finals]
    work = prompts.plus(prefill.question_work, 1 / len(prefill.asked[OWN]) * len(contexts))
    against = logits[0] if reference is None else reference
    found = [prefill.outcomes(final, own, against) for final, own in zip(finals, logits, strict=True)]
    recalls = prefill.recalls(dict(zip(finals, found, strict=True)))
    by_question = [
        [_outcome(final, scores_of[i], recalls[final][i]) for final, scores_of in zip(finals, found, strict=True)]
        for i in range(len(found[0]))
    ]
    it = iter(by_question)
    return Result([[next(it) for _ in context.questions] for context in contexts], work, logits[0])


def work_of(contexts: list[Context], settings: Settings, limits: Limits) -> Work:
    """The pairs of the contexts' prefill; how many were read is for the caller to say."""
    work = Work()
    for size in (len(context.ids) for context in contexts):
        for first in range(0, size, limits.chunk):
            _count(work, settings, first, min(limits.chunk, size - first))
    return work


def _outcome(final: str, found: scores.Scores, recall: float) -> Outcome:
    return Outcome(final, recall, found.miss is None, found.nll, found.kl, found.flips)


@dataclass
class _Asked:
    """A question of the batch: its sequence, the pages that are its own, the prompt's length once it has been put."""

    question: Question
    sequence: Sequence
    own: Any
    prompt: int = 0


class Prefill:
    """A batch in the pool: its contexts, and each question behind its context, once a final chunk's kind."""

    def __init__(self, subject: Subject, contexts: list[Context], settings: Settings, limits: Limits) -> None:
        self._engine, self._codec, self._limits = subject.engine, subject.codec, limits
        self._batch, self._dense = contexts, Settings.of("dense")
        self._settings = settings.replace(dense_below_kv_len=limits.dense_below)
        room = _Room(contexts, limits)
        self._engine.reserve(room.tokens)
        self._sequences = [Sequence(self._engine.pool.take(len(one.ids))) for one in contexts]
        self._room, self.question_work = room, Work()
        self.asked: dict[str, list[_Asked]] = {}

    def contexts(self, probe: Callable[[int], Probe | None] = lambda _: None) -> Work:
        """Prefills the contexts, cut at multiples of the chunk; what that has read, of all of them.

        ``probe`` is asked for each chunk by its first token.
        """
        chunk, work = self._limits.chunk, Work()
        ids = [np.array(one.ids) for one in self._batch]
        for first in range(0, max(map(len, ids)), chunk):
            pieces = [(one, its[first : first + chunk]) for one, its in zip(self._sequences, ids, strict=True)]
            self._step([piece for piece in pieces if len(piece[1])], self._settings, work, probe(first))
        return work

    def questions(self, final: str) -> Any:
        """The logits at every expected answer, one question after the other; the questions' own chunks as told."""
        asked = self._fork(final)
        settings, work = (self._dense, None) if final == DENSE else (self._settings, self.question_work)
        first = self._step([(one.sequence, one.question.tail) for one in asked], settings, work)
        for one in asked:
            one.prompt = one.sequence.length
        longer = [one for one in asked if len(one.question.answer) > 1]
        if not longer:
            return first
        rest = self._step([(one.sequence, one.question.answer[:-1]) for one in longer], self._dense, every=True)
        return _interleaved(first, rest, [len(one.question.answer) for one in asked])

    def outcomes(self, final: str, logits: Any, dense: Any) -> list[scores.Scores]:
        """How each expected answer fares."""
        return scores.score(logits, dense, [one.question.answer for one in self.asked[final]])

    def recalls(self, found: dict[str, list[scores.Scores]]) -> dict[str, list[float]]:
        """The share of the references in each greedy answer, which goes on from the first miss; 1 without one."""
        pairs = [pair for final, its in found.items() for pair in zip(self.asked[final], its, strict=True)]
        said = self._said(pairs) if any(one.miss for _, one in pairs) else [()] * len(pairs)
        shares = [
            1.0 if one.miss is None else self._share(asked.question, text)
            for (asked, one), text in zip(pairs, said, strict=True)
        ]
        it = iter(shares)
        return {final: [next(it) for _ in its] for final, its in found.items()}

    def _said(self, pairs: list[tuple[_Asked, scores.Scores]]) -> list[tuple[int, ...]]:
        """Greedy answers; those without a miss are decoded along, and nobody looks."""
        sequences, tokens, steps = [], [], []
        for asked, found in pairs:
            position, token = found.miss or (0, asked.question.answer[0])
            asked.sequence.length = asked.prompt + position
            # One that is done begins afresh in its own pages, where it costs next to nothing.
            sequences.append(asked.sequence if found.miss else Sequence(asked.own))
            tokens.append(token)
            most = len(asked.question.answer) + self._limits.slack
            steps.append(most - position - 1 if found.miss else 0)
        more = greedy(self._engine, sequences, tokens, steps)
        ends, said = ends_of(self._engine.model), list[tuple[int, ...]]()
        for (asked, found), token, behind, count in zip(pairs, tokens, more, steps, strict=True):
            whole = (*(asked.question.answer[: found.miss[0]] if found.miss else ()), token, *behind[:count])
            stop = next((i for i, one in enumerate(whole) if one in ends), len(whole))
            said.append(whole[:stop])
        return said

    def _share(self, question: Question, said: tuple[int, ...]) -> float:
        text = self._codec.decode(list(said)).lower()
        return sum(one.lower() in text for one in question.references) / len(question.references)

    def _fork(self, final: str) -> list[_Asked]:
        pool, made = self._engine.pool, list[_Asked]()
        copies: tuple[list[int], list[int]] = ([], [])
        for context, sequence in zip(self._batch, self._sequences, strict=True):
            for question in context.questions:
                fresh = pool.take(sequence.length % PAGE + self._room.behind)
                if sequence.length % PAGE:
                    copies[0].append(int(sequence.pages[sequence.length // PAGE]))
                    copies[1].append(int(fresh[0]))
                made.append(_Asked(question, sequence.fork(fresh), fresh))
        pool.copy(*copies)
        self.asked[final] = made
        return made

    def _step(
        self,
        requests: list[tuple[Sequence, Any]],
        settings: Settings,
        work: Work | None = None,
        probe: Probe | None = None,
        *,
        every: bool = False,
    ) -> Any:
        step = Step.of(requests, self._engine.device, every)
        if work is None:
            return self._engine.run(step, settings, probe)
        before = self._engine.stats(settings)
        logits = self._engine.run(step, settings, probe)
        fresh = Work()
        for length, count in step.spans:
            _count(fresh, settings, length - count, count)
        # Step by step: chunks of one step are of about one size, those of several are not.
        fresh.read(before, self._engine.stats(settings))
        vars(work).update(vars(work.plus(fresh, 1.0)))
        return logits


class _Room:
    """How much of the pool a batch wants, in tokens."""

    def __init__(self, contexts: list[Context], limits: Limits) -> None:
        questions = [question for context in contexts for question in context.questions]
        tail = max(len(question.tail) for question in questions)
        answer = max(len(question.answer) for question in questions)
        # A greedy answer begins within the expected one; two more, as decoding counts on.
        self.behind = tail + 2 * answer + limits.slack + 2
        pages = sum(-(-len(context.ids) // PAGE) for context in contexts)
        pages += (1 + limits.dense_final) * len(questions) * -(-(self.behind + PAGE) // PAGE)
        self.tokens = pages * PAGE


def _count(work: Work, settings: Settings, past: int, count: int) -> None:
    sparse = count > settings.dense_max_q_len and past + count >= settings.dense_below_kv_len
    inside = count * (count + 1) / 2
    if sparse and settings.selector != "dense":
        # The open region begins with the chunk's own partial block.
        blocks = past // settings.block_size * settings.block_size
        work.past_pairs += count * blocks
        inside += count * (past - blocks)
    else:
        inside += count * past
    work.other_pairs += inside


def _interleaved(first: Any, rest: Any, answers: list[int]) -> Any:
    """``first [questions, vocabulary]`` before each question's own part of ``rest``."""
    parts, at = [], 0
    for i, count in enumerate(answers):
        parts += [first[i : i + 1], rest[at : at + count - 1]]
        at += count - 1
    return torch.cat(parts)
