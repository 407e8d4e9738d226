"""How lmms-eval finds our class (the entry-point group ``lmms_eval.models``): ``lmms_eval --model aimv2_vlm``."""

from __future__ import annotations

from typing import Any

NAME = "aimv2_vlm"


def manifest() -> Any:
    """What the entry point gives lmms-eval; the class is imported when a model of this name is opened."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, simple_class_path="aimv2.evals.vlm.lmms.Aimv2Vlm")
