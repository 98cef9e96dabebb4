"""The README's five lines for torch, run as written, and against dense attention in fp64; for a GPU machine."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

README = Path(__file__).resolve().parents[2] / "README.md"


def snippet() -> str:
    """The README's Python block that imports torch."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (found,) = [block for block in blocks if "import torch" in block]
    return found


def main() -> int:
    """Runs it, sparse as written and then dense; prints the errors."""
    names: dict[str, torch.Tensor] = {}
    exec(snippet(), names)
    q, k, v, out = (names[name] for name in ("q", "k", "v", "out"))
    keys, values = (x.reshape(-1, *x.shape[2:]).double() for x in (k, v))
    past, group = len(keys) - len(q), q.shape[1] // k.shape[2]
    sees = torch.arange(len(keys), device="cuda") <= past + torch.arange(len(q), device="cuda")[:, None]
    worst = {}
    dense = names["compactattn"].forward(q, k, v, names["table"], names["lens"], names["cu"], settings="dense")
    for name, got in (("as written", out), ("dense", dense)):
        squares = [0.0, 0.0]
        for head in range(q.shape[1]):
            logits = (q[:, head].double() @ keys[:, head // group].T) * q.shape[2] ** -0.5
            want = logits.masked_fill(~sees, -torch.inf).softmax(-1) @ values[:, head // group]
            squares[0] += (got[:, head].double() - want).square().sum().item()
            squares[1] += want.square().sum().item()
        worst[name] = (squares[0] / squares[1]) ** 0.5
    print({name: f"{error:.2e}" for name, error in worst.items()}, names["compactattn"].stats())
    # bf16 rounds P and out by 2^-9 of themselves, rms 2^-9 / sqrt(3) each: 1.6e-3 together; 4e-3 as in check_attend.py.
    return 0 if worst["dense"] < 4e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
