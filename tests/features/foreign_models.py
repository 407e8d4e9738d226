"""Small models of transformers in folders, and images for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from runs import IMAGENET, write_processor

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
VERBS = ("knn --k 1", "linear", "fewshot --shots 1", "probe", "segment", "depth")
IMAGES = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def save(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    write_processor(folder)
    return folder


def vit(folder: Path, head: bool = False) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(**SHAPE, intermediate_size=48)
    return save(folder, ViTForImageClassification(config) if head else ViTModel(config))


def rewrite(folder: Path, change: Any) -> None:
    """Changes the weights file: ``change`` gets every (key, tensor) and gives another pair, or None to drop it."""
    file = folder / "model.safetensors"
    kept = [change(key, value) for key, value in load_file(file).items()]
    save_file(dict(pair for pair in kept if pair is not None), file, {"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stored, **values}))


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    return (images / 255 - mean) / std


def two_colours(root: Path) -> Path:
    """``train`` and ``test`` of two classes."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number, name in enumerate(("red", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8)
                pixels[..., 2 * number] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root
