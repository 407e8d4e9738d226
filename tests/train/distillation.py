"""Runs of distillation for tests, and a teacher of another origin."""

import json

import pytest
import torch

from runs import metrics, train

EXACT = ("step", "loss", "text_loss", "pixel_loss", "feature_loss", "grad_norm", "val_text_loss", "val_pixel_loss")
EXACT += ("val_feature_loss",)


def exact(run):
    return [{key: line[key] for key in EXACT if key in line} for line in metrics(run)]


def distil(data, run, teacher, **more):
    return train(data, run, objective__name="distill", objective__teacher=str(teacher), **more)


def dino_model(folder):
    """A DINOv2-like model of ``transformers`` with a class token and registers: 4 x 4 patches at 56 px."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    config = transformers.Dinov2WithRegistersConfig(**shape, num_register_tokens=3, mlp_ratio=2)
    transformers.Dinov2WithRegistersModel(config).save_pretrained(folder)
    seen = {"crop_size": {"height": 56, "width": 56}, "image_mean": [0.2, 0.3, 0.4], "image_std": [0.5, 0.6, 0.7]}
    (folder / "preprocessor_config.json").write_text(json.dumps(seen))
    return folder
