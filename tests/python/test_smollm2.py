"""SmolLM2-135M's own weights through transformers on the CPU: tests/gpu/check_hf.py's answers, with shorter prompts."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest

GGUF = os.environ.get("SMOLLM2_GGUF")
if not GGUF:
    pytest.skip("needs SMOLLM2_GGUF: make test-hf", allow_module_level=True)

sys.path.append(str(Path(__file__).parents[1] / "gpu"))

import check_hf  # noqa: E402

ASKED = argparse.Namespace(device="cpu", gguf=Path(GGUF), prompts=20)


def test_everything_kept_continues_20_prompts_as_sdpa() -> None:
    check_hf.smollm2(ASKED)


def test_a_fact_in_a_long_text_is_found() -> None:
    check_hf.needle(ASKED)
