"""Material for haystacks that needs no download: plain sentences, CPython's own manual, names, words and codes."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from random import Random

# A haystack that says nothing: a few sentences over and over.
NOISE = (
    " The lamps are lit at dusk.",
    " A cart rolls past the mill.",
    " Rain falls on the slate roofs.",
    " The ferry waits for its last passenger.",
    " Somebody sweeps the yard and hums.",
)
# fmt: off
_SYLLABLES = (
    "ba", "be", "bi", "bo", "da", "de", "do", "fa", "fi", "ga", "go", "ka", "ke",
    "ki", "la", "le", "lo", "lu", "ma", "mi", "mo", "na", "ne", "no", "pa", "pe",
    "po", "ra", "re", "ro", "sa", "se", "so", "ta", "te", "to", "va", "ve", "zo",
)
# fmt: on


@cache
def essay() -> tuple[str, ...]:
    """Sentences of the Python manual's topics (``pydoc_data.topics``), in order; our stand-in for essays."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    # Rules of tables and grammars are no prose.
    text = re.sub(r"[=*\-+~^|]{4,}", " ", text)
    return tuple(f" {part.strip()}" for part in re.split(r"(?<=[.!?:])\s+", text) if len(part.strip()) > 3)


@cache
def essay_name() -> str:
    """The stand-in's label, with a mark of its text, which differs between Python versions."""
    return f"pydoc-{hashlib.sha256(''.join(essay()).encode()).hexdigest()[:8]}"


@cache
def vocabulary() -> tuple[str, ...]:
    """Words of the essay's text, of five letters and more, sorted."""
    found = re.findall(r"\b[a-z]{5,12}\b", "".join(essay()))
    return tuple(sorted(set(found)))


def name(rng: Random) -> str:
    """A made-up name of three syllables: 59,319 there are."""
    return "".join(rng.choice(_SYLLABLES) for _ in range(3)).capitalize()


def names(rng: Random, count: int) -> list[str]:
    """``count`` different names."""
    return _distinct(rng, count, name)


def number(rng: Random) -> str:
    """Seven digits, the first not 0."""
    return str(rng.randrange(1_000_000, 10_000_000))


def uuid(rng: Random) -> str:
    """Hexadecimal digits as a UUID writes them."""
    digits = f"{rng.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def variables(rng: Random, count: int) -> list[str]:
    """``count`` different names of five capital letters."""
    return _distinct(rng, count, lambda r: "".join(r.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(5)))


def coded_words(rng: Random, count: int) -> list[str]:
    """``count`` different words of six random letters."""
    return _distinct(rng, count, lambda r: "".join(r.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(6)))


def _distinct(rng: Random, count: int, draw: object) -> list[str]:
    # A dictionary keeps the order of drawing.
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng)] = None  # type: ignore[operator]
    return list(found)
