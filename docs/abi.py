"""The C ABI's page, made of include/compactattn.h: abi.py HEADER > abi.md."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Item:
    """A function, struct or enum, what the header says of it, and its parts with what it says of them."""

    name: str
    code: str
    words: list[str]
    parts: list[tuple[str, str]] = field(default_factory=list)


def parse(header: str) -> dict[str, list[Item]]:
    """Functions, structs and enums, in the header's order."""
    found: dict[str, list[Item]] = {"functions": [], "structs": [], "enums": []}
    lines, words = iter(header.splitlines()), []
    for line in lines:
        body = line.strip()
        kind = re.match(r"(?:typedef )?(enum|struct) (compactattn_\w+)(?!.*[;*(])", body)
        if body.startswith("//"):
            words.append(body[2:].strip())
            continue
        if kind:
            item = Item(kind[2], kind[0], words)
            item.parts = _parts(lines)
            if item.parts:
                found[f"{kind[1]}s"].append(item)
        elif (name := re.match(r"[\w ]+[ *](compactattn_\w+)\(", body)) is not None:
            code = body
            while not code.endswith(";"):
                code += " " + next(lines).strip()
            found["functions"].append(Item(name[1], code, words))
        words = []
    return found


def _parts(lines: object) -> list[tuple[str, str]]:
    """Members up to the closing brace, each with its comment; preprocessor lines are for the compiler alone."""
    parts: list[tuple[str, str]] = []
    words: list[str] = []
    for line in lines:  # type: ignore[attr-defined]
        body = line.strip()
        if body.startswith("//"):
            words.append(body[2:].strip())
        elif body.startswith("}"):
            break
        elif body and body != "{" and not body.startswith(("#", ":")):
            parts.append((body.rstrip(",;"), " ".join(words)))
            words = []
    return parts


def page(found: dict[str, list[Item]]) -> str:
    """Markdown."""
    out = [INTRODUCTION]
    for title, items in found.items():
        out += [f"## {title.capitalize()}", ""]
        for item in items:
            out += [f"### {item.name}", "", *_paragraphs(item.words), ""]
            if item.parts:
                out += ["| | |", "|---|---|", *(f"| `{code}` | {_cell(words)} |" for code, words in item.parts), ""]
            else:
                out += ["```c", re.sub(r"\s+", " ", item.code), "```", ""]
    return "\n".join(out)


def _paragraphs(words: list[str]) -> list[str]:
    return ["" if not line else line.replace("<", "&lt;") for line in words]


def _cell(words: str) -> str:
    return words.replace("|", "\\|").replace("<", "&lt;")


INTRODUCTION = """# C ABI

Made of `include/compactattn.h`, which is the reference; `compactattn.hpp` wraps it in C++17.

Every function that can fail returns a `compactattn_status`; `compactattn_last_error` has the words. Structs start with
`struct_size`: they only grow at the end, and a missing tail means 0. Handles are numbers in a registry, never followed.
"""

if __name__ == "__main__":
    sys.stdout.write(page(parse(Path(sys.argv[1]).read_text(encoding="utf-8"))))
