"""Text to tokens and back, and a model's frame around a user's text; lengths are always counted in its tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

# What stands where the user's text would: in no tokenizer's template.
_SENTINEL = "\x02text\x02"
# For models without a template of their own.
PLAIN = ("", "\n")


class Codec:
    """A tokenizer, of transformers or of ``tokenizers``, and the chat frame ``(before, after)`` of one user's text.

    Pieces are encoded one by one and cached: a prompt is the concatenation of its pieces' ids, the same for every
    method.
    """

    def __init__(self, tokenizer: Any, frame: tuple[str, str] | None = None) -> None:
        self._tokenizer = tokenizer
        self.frame = frame or _frame_of(tokenizer)
        self.encode = cache(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Ids of ``text``, with no tokens added."""
        made = self._tokenizer.encode(text, add_special_tokens=False)
        return tuple(getattr(made, "ids", made))

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``."""
        text: str = self._tokenizer.decode(ids)
        return text

    @property
    def start(self) -> tuple[int, ...]:
        """What opens every prompt: the token of a sequence's begin, where the tokenizer adds one itself, and the frame.

        A template that writes the token out is not given a second one.
        """
        made = self._tokenizer.encode("")
        begin = tuple(getattr(made, "ids", made))[:1]
        frame = self.encode(self.frame[0])
        return frame if frame[:1] == begin else begin + frame


def _frame_of(tokenizer: Any) -> tuple[str, str]:
    if not getattr(tokenizer, "chat_template", None):
        return PLAIN
    turn = [{"role": "user", "content": _SENTINEL}]
    # Reasoning models would think first; templates that know no such switch ignore it.
    text: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    before, _, after = text.partition(_SENTINEL)
    return before, after
