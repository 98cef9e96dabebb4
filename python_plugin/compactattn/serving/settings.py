"""What an operator asked for: COMPACTATTN_MODE, a JSON file, the engine's --additional-config. No engine, no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..plan import Plan, PlanDesc
from ..settings import Settings
from .policy import Policy


@dataclass(frozen=True)
class Options:
    """One reading of all sources; the same in every process of an engine.

    The mode: COMPACTATTN_MODE, else ``mode`` of ``additional_config["compactattn"]``, else compactattn, as choosing
    the backend is the opt-in. Fields: the mode's preset, changed by the file (COMPACTATTN_CONFIG, else ``config``),
    changed by additional_config, of every layer unless the source names single ones. Names as in the README's table,
    and those of ``_OWN``.
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

    def of_layer(self, layer: int) -> Settings:
        """What the layer uses."""
        return self.layers.get(layer, self.settings)

    def unknown_layers(self, num_layers: int) -> str | None:
        """What to say of layers that are named here and that a model of so many has not; None = of none."""
        named = {*self.layers, *self.dense_layers}
        unknown = sorted(layer for layer in named if not -num_layers <= layer < num_layers)
        return f"options name layers {unknown}; the model has {num_layers}" if unknown else None

    def words(self, policy: Policy) -> str:
        """What is ours and by what, for the line at start; ``policy``: as the engine's adapter has it."""
        chosen = self.settings
        own = f" ({len(self.layers)} layers by settings of their own)" if self.layers else ""
        return (
            f"chunks of >= {policy.min_chunk_tokens} tokens over >= {policy.min_kv_tokens} KV tokens by "
            f"{chosen.selector}, keep {chosen.keep} {chosen.keep_value:g}{own}"
        )

    @classmethod
    def read(cls, additional: Mapping[str, Any] | None = None, env: Mapping[str, str] | None = None) -> Options:
        """ValueError, naming source and field, for anything unknown or out of its range."""
        env = os.environ if env is None else env
        asked = _table(ADDITIONAL, (additional or {}).get("compactattn") or {})
        mode = (env.get(MODE) or _text("mode", asked.get("mode", "compactattn"))).strip().lower()
        own = _checked({name: asked.pop(name) for name in _OWN & asked.keys()})
        settings = Settings.mode(mode)
        layers: dict[int, Settings] = {}
        if mode != "dense":
            path = env.get(FILE) or own.get("config")
            sources = [*([(path, _file(path))] if path else []), (ADDITIONAL, asked)]
            for source, fields in sources:
                settings = _apply(source, settings, layers, fields)
            if "min_kv_tokens" in own:
                settings = _lowered(own["min_kv_tokens"], settings, layers, _with_own_rule(sources))
        policy = Policy(
            min_chunk_tokens=own.get("min_chunk_tokens", MIN_CHUNK_TOKENS),
            min_kv_tokens=own.get("min_kv_tokens", settings.dense_below_kv_len),
        )
        dense, strict = tuple(own.get("dense_layers", ())), own.get("strict", False)
        return cls(mode, settings, policy, layers, dense, strict, own.get("counters_file"))


def _apply(source: str, settings: Settings, layers: dict[int, Settings], fields: dict[str, Any]) -> Settings:
    """The settings for all layers after one source; those of single layers go into ``layers``.

    Fields for all reach layers that an earlier source has named too; a layer's own come after them.
    """
    fields = dict(fields)
    single = _table("layers", fields.pop("layers", {}))
    settings = _changed(source, settings, fields)
    for layer, before in layers.items():
        layers[layer] = _changed(f"{source}: for layers.{layer}", before, fields)
    for number, own in single.items():
        layer, name = _layer(number), f"layers.{number}"
        layers[layer] = _changed(f"{source}: {name}", layers.get(layer, settings), _table(name, own))
    return settings


def _lowered(min_kv_tokens: int, settings: Settings, layers: dict[int, Settings], own_rule: set[int]) -> Settings:
    """The settings, and the layers without a rule of their own, dense only below what is asked to be served."""

    def lower(one: Settings) -> Settings:
        return one.replace(dense_below_kv_len=min(one.dense_below_kv_len, min_kv_tokens))

    layers.update({layer: lower(one) for layer, one in layers.items() if layer not in own_rule})
    return lower(settings)


def _with_own_rule(sources: list[tuple[str, dict[str, Any]]]) -> set[int]:
    """Layers for which a source itself says below how many KV tokens they are dense."""
    single = [item for _, fields in sources for item in fields.get("layers", {}).items()]
    return {_layer(number) for number, own in single if "dense_below_kv_len" in own}


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
    except TypeError:
        known = settings.__dataclass_fields__
        unknown = [name for name in changes if name not in known] or list(changes)
        raise ValueError(f"compactattn: {source}: unknown setting {', '.join(unknown)}") from None
    # Ranges and types are the library's to judge. The CPU offers all there is, so what it refuses nobody takes.
    try:
        refused = Plan.supports(PlanDesc(**_SMALL, settings=settings))
    except ValueError as error:
        refused = str(error)
    if refused:
        raise ValueError(f"compactattn: {source}: {refused}")
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


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"compactattn: {name}: wanted true or false, got {value!r}")
    return value


def _path(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"compactattn: {name}: wanted a path, got {value!r}")
    return value


def _numbers(name: str, value: Any) -> list[int]:
    if not isinstance(value, list | tuple) or not all(type(number) is int for number in value):
        raise ValueError(f"compactattn: {name}: wanted a list of layer numbers, got {value!r}")
    return list(value)


def _layer(number: Any) -> int:
    # The keys of a JSON object are strings.
    text = str(number)
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"compactattn: layers: wanted layer numbers >= 0, got {number!r}")
    return int(text)


def _checked(own: dict[str, Any]) -> dict[str, Any]:
    """The adapters' own options, each of its type."""
    return {name: _OWN_TYPES[name](name, value) for name, value in own.items()}


MODE, FILE, ADDITIONAL = "COMPACTATTN_MODE", "COMPACTATTN_CONFIG", "additional_config.compactattn"

# Below this a chunk has fewer query tiles than a GPU has processors; not measured yet.
MIN_CHUNK_TOKENS = 256

_OWN_TYPES: dict[str, Callable[[str, Any], Any]] = {
    "mode": _text,
    "config": _path,
    "min_chunk_tokens": _count,
    "min_kv_tokens": _count,
    "dense_layers": _numbers,
    "strict": _flag,
    "counters_file": _path,
}
_OWN = _OWN_TYPES.keys()
_KEEP_RULES = {"keep_threshold", "keep_mass", "keep_density"}
_OF_MEANS = {"flashprefill", "pooled_mass", "two_level"}
# A plan that any settings fit, if they are in range.
_SMALL: dict[str, Any] = {"num_q_heads": 2, "num_kv_heads": 1, "head_dim": 64, "page_size": 16, "dtype": "bf16"}
_SMALL |= {"max_num_reqs": 1, "max_total_q": 64, "max_kv_len": 128}
