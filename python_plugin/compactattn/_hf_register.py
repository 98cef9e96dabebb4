"""Functions into transformers' registries: all of them or none. Imports neither transformers nor torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .serving import hooks


def offer(entries: Sequence[tuple[Any, str, Callable[..., Any]]]) -> None:
    """Registers ``(registry class, name, function)``; HookError for a registry that changed or a name that is held.

    A function of the same module and name, as a reload makes it, takes the place of its older copy.
    """
    for registry, name, function in entries:
        path = registry.__name__
        hooks.callable_with("transformers", f"{path}.register", getattr(registry, "register", None), 2)
        held = _at(registry, name)
        if held is not None and _named(held) != _named(function):
            raise hooks.taken("transformers", f"{path}[{name}]", _named(held), "register that under another name")
    for registry, name, function in entries:
        registry.register(name, function)
        if _at(registry, name) is not function:
            wanted = f"{_named(function)} at {name}"
            raise hooks.changed("transformers", f"{registry.__name__}.register", wanted, "another or none")


def _at(registry: Any, name: str) -> Any:
    get = getattr(registry(), "get", None)
    if get is None:
        raise hooks.changed("transformers", registry.__name__, "a mapping by name", "none")
    return get(name)


def _named(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"
