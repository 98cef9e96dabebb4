"""What an engine must offer before anything of ours is put into it: looked at first, and named where it is missing."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any

from .report import LOG
from .settings import MODE

# Versions whose code the plugins were run against, or read; others are tried, and what they lack is named.
KNOWN = {"vllm": "0.26 to 0.33", "sglang": "0.5.17 to 0.5.23", "transformers": "5.17 to 5.23"}


class HookError(RuntimeError):
    """An engine lacks what a plugin hooks into, or has it otherwise, or another plugin holds it."""


def attribute(engine: str, path: str) -> Any:
    """What ``module:name.name`` names in the engine; HookError for a module or a name that is not there."""
    module, _, names = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise changed(engine, module, "a module", str(error)) from error
    for name in filter(None, names.split(".")):
        if not hasattr(found, name):
            raise changed(engine, path, f"the name {name}", "none")
        found = getattr(found, name)
    return found


def callable_with(engine: str, path: str, hook: Any, positional: int | None, names: Sequence[str] = ()) -> None:
    """HookError unless ``hook`` takes that many positional arguments (None: any), and those names. Calls nothing."""
    if not callable(hook):
        raise changed(engine, path, "a callable", type(hook).__name__)
    if positional is None:
        return
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):
        # Of a builtin that does not say.
        return
    try:
        signature.bind(*[None] * positional, **dict.fromkeys(names))
    except TypeError as error:
        wanted = ", ".join([f"{positional} positional", *names])
        raise changed(engine, path, f"arguments ({wanted})", f"{signature}: {error}") from None


def methods(engine: str, base: type, wanted: Mapping[str, int | None]) -> None:
    """HookError unless the engine's class has the methods that ours override, taking that many arguments with self.

    One under another name would never be called: everything would be dense, and nothing would say so.
    """
    for name, positional in wanted.items():
        path = f"{base.__module__}:{base.__qualname__}.{name}"
        hook = getattr(base, name, None)
        if hook is None:
            raise changed(engine, path, f"the method {name}", "none")
        callable_with(engine, path, hook, positional)


def changed(engine: str, hook: str, wanted: str, got: str) -> HookError:
    """An error that names the hook, what was wanted and what came, the versions, and what helps."""
    return HookError(
        f"{_versions(engine)} (known: {KNOWN[engine]}): hook {hook}: wanted {wanted}, got {got}; "
        f"install a known {engine}, or set {MODE}=dense"
    )


def taken(engine: str, slot: str, holder: str, remedy: str) -> HookError:
    """An error that names the slot and who holds it."""
    return HookError(f"{_versions(engine)}: slot {slot} is taken by {holder}, so compactattn is not offered; {remedy}")


def refuse(error: HookError) -> None:
    """Raises where COMPACTATTN_MODE asked for us; else says it, and the engine goes on without."""
    if mode() not in ("", "dense"):
        raise error
    LOG.warning("%s", error)


def mode() -> str:
    """COMPACTATTN_MODE as it stands."""
    return os.environ.get(MODE, "").strip().lower()


def _versions(engine: str) -> str:
    # The library knows ours too, but registration does not load it.
    return f"compactattn {_version('compactattn')}: {engine} {_version(engine)}"


def _version(engine: str) -> str:
    for name in (engine, f"{engine}-cpu"):
        try:
            return installed(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"
