"""Every command as a function of the same options: ``aimv2.api.knn("RUN", data="shards")``.

A function's parameters, their order and their defaults are those of its options class in :mod:`aimv2.commands`; values are
converted and checked as on the command line. ``__init__.pyi`` holds the signatures for type checkers (tools/api_stubs.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aimv2.commands.parse import doc_of, execute, signature_of
from aimv2.commands.table import COMMANDS, function_name

WEIGHTS = ("load_model", "save_pretrained")  # not commands
__all__ = sorted([*map(function_name, COMMANDS), *WEIGHTS])


def make_function(name: str) -> Callable[..., dict[str, Any]]:
    """A command's function."""
    signature = signature_of(name)

    def call(*args: Any, **options: Any) -> dict[str, Any]:
        return execute(name, signature.bind(*args, **options).arguments)

    call.__name__ = call.__qualname__ = function_name(name)
    call.__doc__ = doc_of(name)
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def __getattr__(name: str) -> Any:
    if name in WEIGHTS:
        from aimv2.data.text import models

        return getattr(models, name)
    if (command := next((one for one in COMMANDS if function_name(one) == name), None)) is not None:
        globals()[name] = made = make_function(command)
        return made
    raise AttributeError(f"module 'aimv2.api' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
