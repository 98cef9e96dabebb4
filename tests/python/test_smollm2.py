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
import torch  # noqa: E402
import transformers  # noqa: E402

ASKED = argparse.Namespace(device="cpu", gguf=Path(GGUF), prompts=20)


def test_everything_kept_continues_20_prompts_as_sdpa() -> None:
    check_hf.smollm2(ASKED)


def test_a_fact_in_a_long_text_is_found() -> None:
    check_hf.needle(ASKED)


def test_the_checkpoint_that_is_written_is_the_model(tmp_path: Path) -> None:
    from compactattn.eval import codec, smollm2

    assert smollm2.main([str(ASKED.gguf), str(tmp_path)]) == 0 and smollm2.main([]) == 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    file = smollm2.File(ASKED.gguf)
    text = "Answer in 12 words: what is a page?"
    assert tokenizer(text).input_ids == file.tokenizer().encode(text).ids
    assert codec.Codec(tokenizer).frame == smollm2.FRAME
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, file.model(torch.float32, "cpu")(ids).logits)
