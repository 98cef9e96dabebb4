"""Faults 17 and 18 (docs/reliability.md): an engine's hook has changed, the slot is taken. No engine: stand-ins.

Each must end in an error that names the hook or slot, what was wanted, what came and the version; nothing of the
engine's registry changes; without COMPACTATTN_MODE, or in mode dense, it is a warning and the engine goes on.
"""

from __future__ import annotations

import importlib
import logging
import sys
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from compactattn import _hf_register
from compactattn.serving import hooks
from compactattn.serving.hooks import HookError

REGISTRY = "vllm.v1.attention.backends.registry"
ATTENTION = "sglang.srt.layers.attention"


class Vllm:
    """The modules of vLLM that the plugin touches."""

    def __init__(self, patch: pytest.MonkeyPatch, *, on_cpu: bool = False) -> None:
        self.taken = taken = {}  # type: dict[Any, str]

        class Slots(Enum):
            FLASH_ATTN = "engine.FlashAttention"
            CPU_ATTN = "engine.Cpu"
            CUSTOM = None

            def get_path(self, include_classname: bool = True) -> str:
                return str(taken.get(self, self.value))

            def is_overridden(self) -> bool:
                return self in taken

            def clear_override(self) -> None:
                taken.pop(self, None)

        def register_backend(backend: Any, class_path: str | None = None, is_mamba: bool = False) -> None:
            taken[backend] = str(class_path)

        self.slots = Slots
        self.platforms = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: on_cpu))
        self.registry = SimpleNamespace(AttentionBackendEnum=Slots, register_backend=register_backend)
        modules(patch, {"vllm.platforms": self.platforms, REGISTRY: self.registry})


class Sglang:
    """The modules of SGLang that the plugin touches."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.backends: dict[str, Any] = {"fa3": object()}
        self.choices = ["fa3"]

        def register_attention_backend(name: str) -> Any:
            return lambda made: self.backends.setdefault(name, made)

        self.registry = SimpleNamespace(
            ATTENTION_BACKENDS=self.backends, register_attention_backend=register_attention_backend
        )
        self.args = SimpleNamespace(add_attention_backend_choices=lambda choices: self.choices.extend(choices))
        modules(patch, {f"{ATTENTION}.attention_registry": self.registry, "sglang.srt.server_args": self.args})


def modules(patch: pytest.MonkeyPatch, given: dict[str, Any]) -> None:
    """Puts stand-ins, and packages above them, where imports look; no engine that is installed is seen."""
    for path, module in given.items():
        parts = path.split(".")
        for end in range(1, len(parts)):
            package = ModuleType(".".join(parts[:end]))
            package.__path__ = []
            patch.setitem(sys.modules, package.__name__, package)
        patch.setitem(sys.modules, path, module)
    patch.setattr(hooks, "installed", lambda name: "9.9.9")


def ends_in(register: Any, patch: pytest.MonkeyPatch, log: Any, engine: str, named: str) -> None:
    """A HookError where the mode asks for us, else a warning with the same words, and the engine goes on."""
    patch.setenv("COMPACTATTN_MODE", "compactattn")
    with pytest.raises(HookError) as caught:
        register()
    text = str(caught.value)
    for word in ("compactattn 9.9.9", f"{engine} 9.9.9", named):
        assert word in text, (word, text)
    patch.delenv("COMPACTATTN_MODE")
    log.clear()
    with log.at_level(logging.WARNING):
        register()
    assert [record.getMessage() for record in log.records] == [text]


def without(name: str) -> Any:
    return lambda engine: delattr(engine.registry, name)


def slots_of(**members: Any) -> Any:
    return lambda engine: setattr(engine.registry, "AttentionBackendEnum", Enum("AttentionBackendEnum", members))


def lands_elsewhere(engine: Any) -> None:
    def register_backend(backend: Any, class_path: str) -> None:
        engine.taken[backend] = f"wrapped.{class_path}"

    engine.registry.register_backend = register_backend


VLLM_FAULTS = {
    "register_backend is gone": (without("register_backend"), "wanted the name register_backend, got none"),
    "the enum is gone": (without("AttentionBackendEnum"), "wanted the name AttentionBackendEnum, got none"),
    "the slot is gone": (slots_of(FLASH_ATTN="engine.FlashAttention"), "wanted the name CUSTOM, got none"),
    "a slot says nothing of its holder": (slots_of(CUSTOM=1), "wanted the name is_overridden, got none"),
    "register_backend takes more": (
        lambda engine: setattr(engine.registry, "register_backend", lambda a, b, *, layer: None),
        "register_backend: wanted arguments (2 positional), got (a, b, *, layer)",
    ),
    "register_backend is none to call": (
        lambda engine: setattr(engine.registry, "register_backend", "registry"),
        "wanted a callable, got str",
    ),
    "register_backend puts something else": (lands_elsewhere, "got wrapped.compactattn"),
    "the platform does not say": (
        lambda engine: setattr(engine.platforms, "current_platform", object()),
        "wanted the name is_cpu, got none",
    ),
    "the module has moved": (lambda engine: sys.modules.pop(REGISTRY), f"hook {REGISTRY}: wanted a module"),
}


@pytest.mark.parametrize("name", VLLM_FAULTS)
def test_a_changed_hook_of_vllm_is_named_and_nothing_is_put(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from compactattn.vllm import plugin

    engine, (fault, named) = Vllm(monkeypatch), VLLM_FAULTS[name]
    fault(engine)
    ends_in(plugin.register, monkeypatch, caplog, "vllm", named)
    assert engine.taken == {}


@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("holder", ["other.Backend", "compactattn.vllm_plugin.OlderBackend"])
def test_a_slot_of_vllm_that_is_held_stays_its_holders(
    on_cpu: bool, holder: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from compactattn.vllm import plugin

    engine = Vllm(monkeypatch, on_cpu=on_cpu)
    slot = engine.slots.CPU_ATTN if on_cpu else engine.slots.CUSTOM
    engine.taken[slot] = holder
    monkeypatch.setenv("COMPACTATTN_MODE", "compactattn")
    with pytest.raises(HookError, match=rf"{slot.name} is taken by {holder}.*VLLM_PLUGINS"):
        plugin.register()
    for mode in ("", "dense"):
        monkeypatch.setenv("COMPACTATTN_MODE", mode)
        plugin.register()
    assert engine.taken == {slot: holder}
    assert caplog.text.count("is taken by") == (0 if on_cpu else 2)


@pytest.mark.parametrize("name", ["register_backend takes more", "the slot is gone"])
def test_in_mode_dense_a_changed_vllm_serves_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from compactattn.vllm import plugin

    engine = Vllm(monkeypatch)
    VLLM_FAULTS[name][0](engine)
    monkeypatch.setenv("COMPACTATTN_MODE", "dense")
    plugin.register()
    assert engine.taken == {}


def vllm_classes(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    """The classes that the backend stands on, some of their methods changed or, with None, gone."""
    own: dict[str, Any] = {
        "forward": lambda self, layer, query, key, value, kv_cache, attn_metadata, output, scale=None: None,
        "build": lambda self, common_prefix_len, common_attn_metadata, fast_build=False: None,
        "build_for_cudagraph_capture": lambda self, common_attn_metadata: None,
        "update_block_table": lambda self, metadata, blk_table, slot_mapping: None,
        "__init__": lambda self, kv_cache_spec, layer_names, vllm_config, device: None,
        "get_cudagraph_support": classmethod(lambda cls, vllm_config, kv_cache_spec: None),
        "get_name": staticmethod(lambda: "FLASH_ATTN"),
        "get_impl_cls": staticmethod(lambda: None),
        "get_builder_cls": staticmethod(lambda: None),
        "get_supported_kernel_block_sizes": staticmethod(lambda: [16]),
        "validate_configuration": classmethod(lambda cls, **asked: []),
    }
    body = {name: hook for name, hook in (own | changes).items() if hook is not None}
    names = ("FlashAttentionBackend", "FlashAttentionImpl", "FlashAttentionMetadataBuilder")
    module = SimpleNamespace(**{name: type(name, (), dict(body)) for name in names})
    modules(patch, {"vllm.v1.attention.backends.flash_attn": module})
    patch.delitem(sys.modules, "compactattn.vllm.backend", raising=False)


def test_the_backend_stands_on_classes_as_they_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_classes(monkeypatch)
    backend = importlib.import_module("compactattn.vllm.backend")
    monkeypatch.delitem(sys.modules, backend.__name__)
    assert backend.CompactAttentionBackend.get_name() == "CUSTOM"


@pytest.mark.parametrize(
    "changes",
    [
        {"forward": None},
        {"forward": lambda self, query, metadata: None},
        {"build": None},
        {"build": lambda self, metadata: None},
        {"build_for_cudagraph_capture": None},
        {"update_block_table": lambda self, metadata: None},
        {"__init__": lambda self, vllm_config: None},
        {"get_cudagraph_support": None},
        {"validate_configuration": None},
    ],
    ids=lambda changes: "-".join(f"{name}-{'gone' if hook is None else 'other'}" for name, hook in changes.items()),
)
def test_a_method_of_vllm_that_changed_stops_the_engine(changes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_classes(monkeypatch, **changes)
    (name,) = changes
    with pytest.raises(HookError, match=rf"vllm 9\.9\.9 .*FlashAttention\w+\.{name}: wanted .*, got "):
        importlib.import_module("compactattn.vllm.backend")
    assert "compactattn.vllm.backend" not in sys.modules


SGLANG_FAULTS = {
    "the registry is gone": (without("ATTENTION_BACKENDS"), "wanted the name ATTENTION_BACKENDS, got none"),
    "the registry is no dict": (
        lambda engine: setattr(engine.registry, "ATTENTION_BACKENDS", ["fa3"]),
        "wanted a dict of factories by name, got list",
    ),
    "the decorator is gone": (without("register_attention_backend"), "wanted the name register_attention_backend"),
    "the decorator takes more": (
        lambda engine: setattr(engine.registry, "register_attention_backend", lambda name, factory: None),
        "register_attention_backend: wanted arguments (1 positional), got (name, factory)",
    ),
    "the choices are gone": (
        lambda engine: delattr(engine.args, "add_attention_backend_choices"),
        "wanted the name add_attention_backend_choices, got none",
    ),
    "the decorator puts nothing": (
        lambda engine: setattr(engine.registry, "register_attention_backend", lambda name: lambda made: made),
        "wanted our factory at compactattn, got NoneType",
    ),
    "the module has moved": (
        lambda engine: sys.modules.pop("sglang.srt.server_args"),
        "hook sglang.srt.server_args: wanted a module",
    ),
}


@pytest.mark.parametrize("name", SGLANG_FAULTS)
def test_a_changed_hook_of_sglang_is_named_and_nothing_is_put(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from compactattn.sglang import plugin

    engine, (fault, named) = Sglang(monkeypatch), SGLANG_FAULTS[name]
    fault(engine)
    ends_in(plugin.register, monkeypatch, caplog, "sglang", named)
    assert (list(engine.backends), engine.choices) == (["fa3"], ["fa3"])


def test_a_factory_without_its_choice_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from compactattn.sglang import plugin

    def refuses(choices: list[str]) -> None:
        raise RuntimeError("closed")

    engine = Sglang(monkeypatch)
    engine.args.add_attention_backend_choices = refuses
    with pytest.raises(RuntimeError, match="closed"):
        plugin.register()
    assert list(engine.backends) == ["fa3"]


def test_a_name_of_sglang_that_is_held_stays_its_holders(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from compactattn.sglang import plugin

    def other(runner: Any) -> None: ...

    engine = Sglang(monkeypatch)
    engine.backends["compactattn"] = other
    ends_in(plugin.register, monkeypatch, caplog, "sglang", f"[compactattn] is taken by {__name__}.test_a_name")
    assert engine.backends["compactattn"] is other
    assert engine.choices == ["fa3"]


def test_sglang_is_told_once_however_often_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    from compactattn.sglang import plugin

    engine = Sglang(monkeypatch)
    plugin.register()
    plugin.register()
    assert engine.backends["compactattn"] is plugin.create
    assert engine.choices == ["fa3", "compactattn"]


def test_a_method_of_sglang_that_changed_stops_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for body in ({}, {"init_forward_metadata": lambda self, batch: None, "forward_extend": lambda self, q: None}):
        base = type("FlashAttentionBackend", (), body)
        module = SimpleNamespace(FlashAttentionBackend=base)
        modules(monkeypatch, {f"{ATTENTION}.flashattention_backend": module})
        monkeypatch.delitem(sys.modules, "compactattn.sglang.backend", raising=False)
        wanted = "forward_extend" if body else "init_forward_metadata"
        with pytest.raises(HookError, match=rf"FlashAttentionBackend\.{wanted}: wanted "):
            importlib.import_module("compactattn.sglang.backend")


def registry(**held: Any) -> Any:
    """A registry as transformers has them: a mapping over what its class was told."""

    class Interface(dict):  # type: ignore[type-arg]
        told: dict[str, Any] = dict(held)

        def __init__(self) -> None:
            super().__init__(self.told)

        @classmethod
        def register(cls, key: str, value: Any) -> None:
            cls.told[key] = value

    return Interface


def ours() -> None: ...


def test_transformers_names_are_taken_however_often() -> None:
    functions, masks = registry(), registry()
    for _ in range(2):
        _hf_register.offer([(functions, "ours", ours), (masks, "ours", ours)])
    assert functions.told == masks.told == {"ours": ours}


@pytest.mark.parametrize("fault", ["held", "gone", "signature", "no mapping"])
def test_a_changed_or_held_registry_of_transformers_is_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def other() -> None: ...

    monkeypatch.setattr(hooks, "installed", lambda name: "9.9.9")
    functions, masks = registry(), registry(**({"ours": other} if fault == "held" else {}))
    before = dict(masks.told)
    if fault == "gone":
        masks.register = None
    if fault == "signature":
        masks.register = classmethod(lambda cls, key, *, function: None)
    if fault == "no mapping":
        masks = type("Interface", (), {"register": masks.register, "told": masks.told})
    with pytest.raises(HookError, match=r"transformers 9\.9\.9.*Interface"):
        _hf_register.offer([(functions, "ours", ours), (masks, "ours", ours)])
    assert (functions.told, masks.told) == ({}, before)
