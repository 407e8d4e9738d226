"""Makes transformers know the AIMV2 backbone as soon as its auto classes are used, and imports nothing before."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from typing import Any


def register_config(auto: Any) -> None:
    """The configuration for AutoConfig, and so for the ``backbone_config`` of every head."""
    config = importlib.import_module("aimv2.interop.backbone_config").Aimv2BackboneConfig
    auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def register_model(auto: Any) -> None:
    """The model for AutoBackbone, whose ``from_pretrained`` looks up local folders on the hub: ours it opens itself."""
    module = importlib.import_module("aimv2.interop.backbone")
    auto.AutoBackbone.register(module.Aimv2BackboneConfig, module.Aimv2Backbone, exist_ok=True)
    plain = auto.AutoBackbone.from_pretrained.__func__

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if module.is_backbone(pretrained_model_name_or_path):
            return module.Aimv2Backbone.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return plain(cls, pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained.__doc__ = plain.__doc__
    auto.AutoBackbone.from_pretrained = classmethod(from_pretrained)


WATCHED = {
    "transformers.models.auto.configuration_auto": register_config,
    "transformers.models.auto.modeling_auto": register_model,
}


def registered(name: str, auto: Any) -> None:
    """Register with a module; a transformers without what the backbone needs goes on without it."""
    with suppress(ImportError):
        WATCHED[name](auto)


class AfterImport:
    """Finds the watched modules as the other finders do, and registers once they are executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in WATCHED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            plain = spec.loader.exec_module

            def execute(module: Any) -> None:
                plain(module)
                registered(name, module)

            setattr(spec.loader, "exec_module", execute)  # noqa: B010
        return spec


def watch() -> None:
    """Register now what is imported already, the rest when it is."""
    for name in WATCHED:
        if name in sys.modules:
            registered(name, sys.modules[name])
    if not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())
