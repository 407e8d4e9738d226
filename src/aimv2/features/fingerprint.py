"""Fingerprints: everything that decides the values of stored features, and hashes of weights.

A fingerprint is a JSON object with one key an input, so that a mismatch can be named. It is separate from the ``weights_sha256``
that results and runs record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aimv2.io import open_file

VERSION = 2  # of what a fingerprint covers; older stores have no such key
PLACE = ("_name_or_path", "transformers_version")  # of a transformers config: where it came from


def weights_hash(model: nn.Module, more: str = "", without: str | None = None) -> str:
    """SHA-256 over names, types, shapes and every byte of the parameters and buffers, and ``more``: 64 hex digits.

    ``without``: leaves out the names that begin so.
    """
    digest = hashlib.sha256(more.encode())
    for name, value in sorted(model.state_dict().items()):
        if without is not None and name.startswith(without):
            continue
        whole = value.detach().cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file: 64 hex digits."""
    with open_file(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def architecture(model: nn.Module) -> dict[str, Any]:
    """What decides a model's outputs besides its weights: heads, eps, patch size, mean, std, ranges, ...

    Of an AIMV2 or a transformers model its configuration without its name and place; of any other model a hash over the class
    and the plain attributes of every submodule.
    """
    config: Any = getattr(model, "config", None)
    found: dict[str, Any] = {"class": type(model).__name__}
    if is_dataclass(config) and not isinstance(config, type):
        found |= {key: value for key, value in asdict(config).items() if key != "name"}
        found["eps"] = sorted({module.eps for module in model.modules() if isinstance(module, nn.RMSNorm)})
    elif hasattr(config, "to_dict"):
        found |= {key: value for key, value in config.to_dict().items() if key not in PLACE}
    else:
        found["modules"] = hashlib.sha256("\n".join(map(_attributes, model.named_modules())).encode()).hexdigest()
    return found


def _attributes(named: tuple[str, nn.Module]) -> str:
    """A submodule in one line."""
    name, module = named
    plain = {
        key: value
        for key, value in sorted(vars(module).items())
        if not key.startswith("_")
        and key != "training"
        and all(isinstance(one, str | int | float) for one in (value if isinstance(value, tuple) else (value,)))
    }
    return f"{name} {type(module).__name__} {plain}"


def model_fingerprint(weights: str, shape: Mapping[str, Any], precision: str, pixels: Any = None) -> dict[str, Any]:
    """The model's keys of a fingerprint.

    Args:
        weights: hash of the weights.
        shape: see :func:`architecture`.
        precision: of the matmuls.
        pixels: the :class:`aimv2.features.pixels.Pixels` of a model that does not normalise by itself.
    """
    found = {
        "weights_sha256": weights,
        "architecture": dict(shape),
        "pixels": str(pixels or ""),
        "precision": precision,
    }
    return json.loads(json.dumps(found, default=str))  # as it reads back


def fingerprint(
    model: Mapping[str, Any], view: Mapping[str, Any], layers: Sequence[Any], pool: str, images: Mapping[str, Any]
) -> dict[str, Any]:
    """The fingerprint of stored features.

    Args:
        model: see :func:`model_fingerprint`.
        view: size, crop and flip of each image.
        layers: whose outputs are stored; () is the last one.
        pool: over the patches, or ``none``.
        images: which images they are, and ``contents_sha256``, the identity of what they hold.
    """
    assert "contents_sha256" in images
    found = {"fingerprint": VERSION, **model, "view": dict(view), "layers": list(layers), "pool": pool, **images}
    return json.loads(json.dumps(found))
