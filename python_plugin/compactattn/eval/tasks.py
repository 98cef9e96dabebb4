"""Long prompts with exact answers, made from a seed: needles, tracking, counting, and where the question stands.

The kinds are RULER's (arXiv 2404.06654) less its two data sets, with texts of our own; nothing made here is RULER.
One context may carry several questions, each a tail of its own behind the same ids: a prefix is then computed once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from random import Random

from . import words
from .codec import Codec


@dataclass(frozen=True)
class Question:
    """What follows a context: ``tail`` ends where the model is to go on with ``answer``."""

    tail: tuple[int, ...]
    answer: tuple[int, ...]
    # Each is to occur in what the model says.
    references: tuple[str, ...]


@dataclass(frozen=True)
class Context:
    """A prompt's beginning and its questions; with the longest of those it fills the length asked for exactly."""

    task: str
    ids: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Asked:
    """A question in words: ``text``, the beginning of its answer, the answer."""

    text: str
    prefix: str
    answers: tuple[str, ...]


@dataclass
class Draft:
    """A context in words. ``needles`` are strewn in their order, ``pinned`` stand at their share of the depth."""

    intro: str
    filler: Iterator[str]
    needles: list[str]
    # Asked of the filler that was used, which some answers depend on.
    ask: Callable[[list[str]], list[Asked]]
    pinned: tuple[tuple[float, str], ...] = ()


def make(task: str, codec: Codec, length: int, seed: str, questions: int = 1) -> Context:
    """The context of a seed, ``length`` tokens with its longest question and answer.

    Raises KeyError for an unknown task, ValueError where the needles alone are longer.
    """
    rng = Random(f"{task}:{length}:{seed}")
    return fitted(task, TASKS[task](rng, questions), codec, rng, lambda parts: length - max(parts))


def fitted(task: str, draft: Draft, codec: Codec, rng: Random, room: Callable[[list[int]], int]) -> Context:
    """``draft`` in tokens; ``room`` says how many the context may have, given the tokens of each question."""
    # Only the answers to counting depend on the filler, and they are as long whatever they are, within a token or two.
    trial = [] if draft.needles or draft.pinned else [text for text, _ in zip(draft.filler, range(4096), strict=False)]
    asked = [_question(one, codec) for one in draft.ask(trial)]
    start = codec.start + codec.encode(draft.intro)
    needles = [codec.encode(text) for text in draft.needles]
    pinned = [codec.encode(text) for _, text in draft.pinned]
    left = room([len(one.tail) + len(one.answer) for one in asked])
    left -= len(start) + sum(map(len, chain(needles, pinned)))
    if left < 0:
        raise ValueError(f"{task}: {-left} tokens too many before any haystack")
    filler, used = _fill(chain(trial, draft.filler), codec, left)
    if trial:
        asked = [_question(one, codec) for one in draft.ask(used)]
    slots = sorted(rng.randrange(len(filler) + 1) for _ in needles)
    placed = [*zip(slots, needles, strict=True)]
    placed += [(round(depth * len(filler)), ids) for (depth, _), ids in zip(draft.pinned, pinned, strict=True)]
    return Context(task, start + _woven(filler, placed), tuple(asked))


def _question(asked: Asked, codec: Codec) -> Question:
    tail = codec.encode(f"\n\n{asked.text}" if asked.text else "") + codec.encode(codec.frame[1] + asked.prefix)
    return Question(tail, codec.encode(" " + ", ".join(asked.answers)), asked.answers)


def _fill(filler: Iterator[str], codec: Codec, room: int) -> tuple[list[tuple[int, ...]], list[str]]:
    """Exactly ``room`` tokens of filler, the last piece cut; and the whole pieces as text."""
    pieces, used = [], []
    while room > 0:
        text = next(filler)
        ids = codec.encode(text)
        if len(ids) <= room:
            used.append(text)
        pieces.append(ids[:room])
        room -= len(ids)
    return pieces, used


def _woven(filler: list[tuple[int, ...]], placed: list[tuple[int, tuple[int, ...]]]) -> tuple[int, ...]:
    at: dict[int, list[int]] = {}
    for slot, ids in placed:
        at.setdefault(slot, []).extend(ids)
    out: list[int] = []
    for slot, piece in enumerate([*filler, ()]):
        out += at.get(slot, [])
        out += piece
    return tuple(out)


def _noise(rng: Random) -> Iterator[str]:
    while True:
        yield from rng.sample(words.NOISE, len(words.NOISE))


def _essay(rng: Random) -> Iterator[str]:
    sentences = words.essay()
    at = rng.randrange(len(sentences))
    while True:
        yield sentences[at % len(sentences)]
        at += 1


def _code(key: str, value: str) -> str:
    return f" The access code of {key} is {value}."


def _ask_code(key: str, value: str) -> Asked:
    return Asked(f"What is the access code of {key}?", f"The access code of {key} is", (value,))


_READ = "Read the text and remember what it says of access codes.\n\n"


def _needles(
    haystack: Callable[[Random], Iterator[str]], keys: int, value: Callable[[Random], str] = words.number
) -> Callable[[Random, int], Draft]:
    """``keys`` needles, or as many as there are questions if those are more; questions ask for different ones."""

    def draft(rng: Random, questions: int) -> Draft:
        codes = {key: value(rng) for key in words.names(rng, max(keys, questions))}
        asked = [_ask_code(key, codes[key]) for key in rng.sample(list(codes), questions)]
        return Draft(_READ, haystack(rng), [_code(*pair) for pair in codes.items()], lambda _: asked)

    return draft


def _among_needles(key: Callable[[Random], str], value: Callable[[Random], str]) -> Callable[[Random, int], Draft]:
    """The haystack is needles too, with other keys."""

    def draft(rng: Random, questions: int) -> Draft:
        codes = {key(rng): value(rng) for _ in range(questions)}

        def others() -> Iterator[str]:
            while True:
                other = key(rng)
                if other not in codes:
                    yield _code(other, value(rng))

        asked = [_ask_code(*pair) for pair in codes.items()]
        return Draft(_READ, others(), [_code(*pair) for pair in codes.items()], lambda _: asked)

    return draft


def _multivalue(rng: Random, questions: int) -> Draft:
    keys = words.names(rng, questions)
    said = [(key, words.number(rng)) for key in keys for _ in range(4)]
    rng.shuffle(said)
    asked = []
    for key in keys:
        values = tuple(value for other, value in said if other == key)
        asked.append(Asked(f"What are the four access codes of {key}?", f"The access codes of {key} are", values))
    return Draft(_READ, _essay(rng), [f" One access code of {key} is {value}." for key, value in said], lambda _: asked)


def _multiquery(rng: Random, questions: int) -> Draft:
    codes = {key: words.number(rng) for key in words.names(rng, max(8, questions + 3))}
    asked = []
    for _ in range(questions):
        keys = rng.sample(list(codes), 4)
        listed = f"{', '.join(keys[:3])} and {keys[3]}"
        text, prefix = f"What are the access codes of {listed}?", f"The access codes of {listed} are"
        asked.append(Asked(text, prefix, tuple(codes[key] for key in keys)))
    return Draft(_READ, _essay(rng), [_code(*pair) for pair in codes.items()], lambda _: asked)


def _tracking(rng: Random, questions: int) -> Draft:
    """One chain of five variables for each question: a number, then four times the one before."""
    names, chains, asked = iter(words.variables(rng, 5 * questions)), [], []
    for _ in range(questions):
        chain_of, value = [next(names) for _ in range(5)], str(rng.randrange(10_000, 100_000))
        links = zip(chain_of[1:], chain_of, strict=False)
        chains.append([f" Let {chain_of[0]} be {value}.", *(f" Let {new} be the same as {old}." for new, old in links)])
        text = f"Which variables are {value}, directly or through others?"
        asked.append(Asked(text, f"The variables that are {value} are", tuple(chain_of)))
    # Chains are mixed, each in its own order.
    order = rng.sample([i for i, one in enumerate(chains) for _ in one], 5 * questions)
    links_of = [iter(one) for one in chains]
    intro = "Read the text and keep track of the variables.\n\n"
    return Draft(intro, _noise(rng), [next(links_of[i]) for i in order], lambda _: asked)


def _two_hop(rng: Random, questions: int) -> Draft:
    """An alias stands somewhere, the alias' code somewhere else, before or after it."""
    pairs = max(4, questions)
    names = words.names(rng, 2 * pairs)
    aliases = dict(zip(names[:pairs], names[pairs:], strict=True))
    codes = {alias: words.number(rng) for alias in aliases.values()}
    needles = [f" {key} is also called {alias}." for key, alias in aliases.items()]
    needles += [_code(*pair) for pair in codes.items()]
    rng.shuffle(needles)
    asked = []
    for key in rng.sample(list(aliases), questions):
        text = f"{key} is also called by another name. What is the access code of that name?"
        asked.append(Asked(text, f"The access code of {key}, under its other name, is", (codes[aliases[key]],)))
    return Draft(_READ, _essay(rng), needles, lambda _: asked)


def _question_at(depth: float | None) -> Callable[[Random, int], Draft]:
    """The question stands before the text (None) or in it: prefill must carry it to what is said elsewhere."""

    def draft(rng: Random, questions: int) -> Draft:
        if questions != 1:
            raise ValueError(f"{questions} questions, but this context holds its own one")
        codes = {key: words.number(rng) for key in words.names(rng, 4)}
        key = rng.choice(list(codes))
        put = f"Answer this question when the text has ended: what is the access code of {key}?"
        intro = _READ if depth is not None else f"{put}\n\n"
        pinned = () if depth is None else ((depth, f"\n\n{put}\n\n"),)
        asked = [Asked("", "The access code asked for is", (codes[key],))]
        return Draft(intro, _essay(rng), [_code(*pair) for pair in codes.items()], lambda _: asked, pinned)

    return draft


def _common_words(rng: Random, questions: int) -> Draft:
    """Ten words occur thirty times each, all others once in each pass over some thousands of them."""
    _one_question(questions)
    pool = rng.sample(words.vocabulary(), len(words.vocabulary()))
    common, rare = pool[:10], pool[10:]
    needles = [f" {word}" for word in common for _ in range(30)]
    rng.shuffle(needles)

    def others() -> Iterator[str]:
        while True:
            yield from (f" {word}" for word in rng.sample(rare, len(rare)))

    asked = [Asked("Which ten words are the most common?", "The ten most common words are", tuple(sorted(common)))]
    return Draft("Here is a list of words; some of them are common.\n\n", others(), needles, lambda _: asked)


def _frequent_words(rng: Random, questions: int) -> Draft:
    """Made-up words with Zipf's frequencies, exponent 2; which three lead is counted in the text itself."""
    _one_question(questions)
    coded = words.coded_words(rng, 500)
    weights = [rank**-2.0 for rank in range(1, 501)]

    def drawn() -> Iterator[str]:
        while True:
            yield from (f" {word}" for word in rng.choices(coded, weights, k=64))

    def ask(used: list[str]) -> list[Asked]:
        ranked = Counter(used).most_common(4)
        if len(ranked) < 4 or ranked[2][1] == ranked[3][1]:
            raise ValueError(f"frequent-words: no third place in {len(used)} words")
        leaders = tuple(word.strip() for word, _ in ranked[:3])
        return [Asked("Which three words are the most frequent?", "The three most frequent words are", leaders)]

    return Draft("Here is a text in code.\n\n", drawn(), [], ask)


def _one_question(questions: int) -> None:
    if questions != 1:
        raise ValueError(f"{questions} questions, but there is one to ask of this context")


TASKS: dict[str, Callable[[Random, int], Draft]] = {
    "single-noise": _needles(_noise, 1),
    "single-essay": _needles(_essay, 1),
    "single-uuid": _needles(_essay, 1, words.uuid),
    "multikey-essay": _needles(_essay, 4),
    "multikey-needles": _among_needles(words.name, words.number),
    "multikey-uuid": _among_needles(words.uuid, words.uuid),
    "multivalue": _multivalue,
    "multiquery": _multiquery,
    "tracking": _tracking,
    "common-words": _common_words,
    "frequent-words": _frequent_words,
    "question-first": _question_at(None),
    "question-middle": _question_at(0.5),
    "two-hop": _two_hop,
}
# Of whose contexts several questions can be asked without making them another task: the keys are many anyway.
SEVERAL = ("multikey-essay", "multikey-needles", "multikey-uuid", "multiquery", "two-hop")
