"""What ``compactattn doctor`` tells of a Python environment: this package, the engines, what stands in their way.

Every question is asked so that a broken answer is an answer: engines are imported in processes of their own, with a
time limit, and nothing here raises, writes or waits for a GPU.
"""

from __future__ import annotations

from typing import Any

from . import collisions, engines, package


def report() -> dict[str, Any]:
    """The sections ``python``, ``engines`` and ``collisions``, each with values that JSON knows."""
    sections = (("python", package.facts), ("engines", engines.facts), ("collisions", collisions.facts))
    return {name: _answer(ask) for name, ask in sections}


def _answer(ask: Any) -> Any:
    # Whoever is asked is the one under suspicion: metadata, paths, files may all be broken in new ways.
    try:
        return ask()
    except Exception as error:
        return {"error": one_line(error)}


def one_line(error: BaseException) -> str:
    """An error's kind and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
