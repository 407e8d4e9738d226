"""AIMV2: multimodal autoregressive pre-training of vision encoders.

Public names are imported on first use, so that ``import aimv2`` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from aimv2.data.stream.transforms import image_transform as image_transform
    from aimv2.data.text.models import load_model as load_model
    from aimv2.data.text.models import save_pretrained as save_pretrained
    from aimv2.interop.backbone import Aimv2Backbone as Aimv2Backbone
    from aimv2.interop.backbone_config import Aimv2BackboneConfig as Aimv2BackboneConfig
    from aimv2.models.aimv2 import AIMv2 as AIMv2
    from aimv2.models.create import create_model as create_model
    from aimv2.models.decoder import MultimodalDecoder as MultimodalDecoder
    from aimv2.models.encoder import VisionEncoder as VisionEncoder
    from aimv2.models.lit import LiT as LiT
    from aimv2.models.matmul import fast_matmul as fast_matmul
    from aimv2.models.sizes import list_models as list_models

    fast_products = fast_matmul

_MODULES = {
    "AIMv2": "aimv2.models.aimv2",
    "Aimv2Backbone": "aimv2.interop.backbone",
    "Aimv2BackboneConfig": "aimv2.interop.backbone_config",
    "LiT": "aimv2.models.lit",
    "MultimodalDecoder": "aimv2.models.decoder",
    "VisionEncoder": "aimv2.models.encoder",
    "create_model": "aimv2.models.create",
    "fast_matmul": "aimv2.models.matmul",
    "image_transform": "aimv2.data.stream.transforms",
    "list_models": "aimv2.models.sizes",
    "load_model": "aimv2.data.text.models",
    "save_pretrained": "aimv2.data.text.models",
}

_ALIASES = {"fast_products": "fast_matmul"}  # earlier names

__all__ = sorted([*_MODULES, *_ALIASES, "__version__"])
importlib.import_module("aimv2.interop.registration").watch()


def __getattr__(name: str) -> Any:
    current = _ALIASES.get(name, name)
    if current in _MODULES:
        return getattr(importlib.import_module(_MODULES[current]), current)
    raise AttributeError(f"module 'aimv2' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
