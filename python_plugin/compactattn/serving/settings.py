"""What an operator asked for: COMPACTATTN_MODE, a JSON file, the engine's --additional-config. No engine, no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..settings import Settings
from .policy import Policy


@dataclass(frozen=True)
class Options:
    """One reading of all sources; the same in every process of an engine.

    The mode: COMPACTATTN_MODE, else ``mode`` of ``additional_config["compactattn"]``, else compactattn, as choosing
    the backend is the opt-in. Fields: the mode's preset, changed by the file (COMPACTATTN_CONFIG, else ``config``),
    changed by additional_config. Names as in the README's table, and those of ``_OWN``.
    """

    mode: str
    settings: Settings
    policy: Policy
    # Layer number to what it uses instead.
    layers: Mapping[int, Settings] = field(default_factory=dict)
    # Layers that stay the engine's; negative numbers count from the last.
    dense_layers: tuple[int, ...] = ()
    # A fallback is an error.
    strict: bool = False
    # Where counters are written while serving; {pid} is replaced.
    counters_file: str | None = None

    @property
    def is_dense(self) -> bool:
        """Whether every step is the engine's."""
        return self.mode == "dense"

    @property
    def needs_means(self) -> bool:
        """Whether any layer's selection reads block means."""
        every = (self.settings, *self.layers.values())
        return any(one.selector in _OF_MEANS or one.mean_correction for one in every)

    def keeps_dense(self, layer: int, num_layers: int) -> bool:
        """Whether the layer is named in ``dense_layers``."""
        return any(layer == (named if named >= 0 else num_layers + named) for named in self.dense_layers)

    @classmethod
    def read(cls, additional: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None) -> Options:
        """ValueError, naming source and field, for anything unknown or out of its range."""
        env = os.environ if env is None else env
        asked = _table(ADDITIONAL, (additional or {}).get("compactattn") or {})
        mode = (env.get(MODE) or _text("mode", asked.get("mode", "compactattn"))).strip().lower()
        settings = Settings.mode(mode)
        own = {name: asked.pop(name) for name in _OWN & asked.keys()}
        layers: dict[int, Settings] = {}
        if mode != "dense":
            path = env.get(FILE) or own.get("config")
            sources = [(path, _file(path))] if path else []
            for source, fields in [*sources, (ADDITIONAL, asked)]:
                settings = _apply(source, settings, layers, fields)
        policy = Policy(
            min_chunk_tokens=_count("min_chunk_tokens", own.get("min_chunk_tokens", MIN_CHUNK_TOKENS)),
            min_kv_tokens=_count("min_kv_tokens", own.get("min_kv_tokens", settings.dense_below_kv_len)),
        )
        return cls(
            mode,
            settings,
            policy,
            layers,
            tuple(_layer(number) for number in own.get("dense_layers", ())),
            own.get("strict", False) is True,
            own.get("counters_file"),
        )


def _apply(source: str, settings: Settings, layers: dict[int, Settings], fields: dict[str, Any]) -> Settings:
    """The settings for all layers after one source; those of single layers go into ``layers``."""
    fields = dict(fields)
    single = _table("layers", fields.pop("layers", {}))
    settings = _changed(source, settings, fields)
    for number, own in single.items():
        layers[_layer(number)] = _changed(source, settings, _table(f"layers.{number}", own))
    return settings


def _changed(source: str, settings: Settings, fields: dict[str, Any]) -> Settings:
    changes = dict(fields)
    # A selector brings its own published constants, which the other fields then change.
    if "selector" in changes:
        settings = Settings.of(changes.pop("selector"))
    rules = [name for name in changes if name in _KEEP_RULES]
    if len(rules) > 1:
        raise ValueError(f"compactattn: {source}: keep: wanted one rule, got {', '.join(rules)}")
    for name in rules:
        changes |= {"keep": name.removeprefix("keep_"), "keep_value": changes.pop(name)}
    try:
        settings = settings.replace(**changes)
        # The library judges types and ranges when it makes a plan; types that C cannot hold are found here.
        settings.to_c()
    except TypeError:
        known = settings.__dataclass_fields__
        unknown = [name for name in changes if name not in known] or list(changes)
        raise ValueError(f"compactattn: {source}: unknown setting {', '.join(unknown)}") from None
    return settings


def _file(path: str) -> dict[str, Any]:
    try:
        return _table(path, json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"compactattn: {path}: wanted a readable JSON file, got {error}") from error


def _table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"compactattn: {name}: wanted an object, got {value!r}")
    return dict(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"compactattn: {name}: wanted a string, got {value!r}")
    return value


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"compactattn: {name}: wanted a whole number >= 0, got {value!r}")
    return value


def _layer(number: Any) -> int:
    try:
        return int(number)
    except (TypeError, ValueError):
        raise ValueError(f"compactattn: wanted a layer number, got {number!r}") from None


MODE, FILE, ADDITIONAL = "COMPACTATTN_MODE", "COMPACTATTN_CONFIG", "additional_config.compactattn"

# Below this a chunk has fewer query tiles than a GPU has processors; not measured yet.
MIN_CHUNK_TOKENS = 256

_OWN = {"mode", "config", "min_chunk_tokens", "min_kv_tokens", "dense_layers", "strict", "counters_file"}
_KEEP_RULES = {"keep_threshold", "keep_mass", "keep_density"}
_OF_MEANS = {"flashprefill", "pooled_mass", "two_level"}
