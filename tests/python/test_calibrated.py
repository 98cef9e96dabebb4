"""A file as ``compactattn calibrate`` writes it, committed with the records, read by every adapter alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from compactattn import Settings
from compactattn.serving.settings import Options

FILE = Path(__file__).parents[1] / "bench/record/cpu/2026-11-23-calibrated.json"
LAYERS = (2, 14, 26)


def test_a_calibrated_file_says_the_same_to_the_library_and_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    written = json.loads(FILE.read_text(encoding="utf-8"))
    monkeypatch.setenv("COMPACTATTN_MODE", "compactattn")
    monkeypatch.setenv("COMPACTATTN_CONFIG", str(FILE))
    options = Options.read()
    assert sorted(options.layers) == list(LAYERS)
    for layer in LAYERS:
        settings, own = Settings.from_env(layer), written["layers"][str(layer)]
        assert (settings.selector, settings.keep) == ("sampled_exact", "mass")
        assert settings.keep_value == own["keep_mass"] != Settings.mode("compactattn").keep_value
        assert settings.block_size == own["block_size"] == 64
        assert options.layers[layer].to_c().keep_value == settings.to_c().keep_value
        assert options.layers[layer].replace(keep_value=settings.keep_value) == settings
    assert Settings.from_env(0).keep_value == written["keep_mass"]
