"""The configuration of a run: what it may say (schema), where its values come from (load), types of options (types)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aimv2.config.schema import Config as Config


def __getattr__(name: str) -> Any:
    if name == "Config":  # not at import: `aimv2 --help` needs the types only
        from aimv2.config.schema import Config

        return Config
    raise AttributeError(f"module 'aimv2.config' has no attribute {name!r}")
