"""One number for all weights of a model."""

import hashlib
from pathlib import Path

import torch
from torch import nn


def weights_hash(model: nn.Module, more: str = "") -> str:
    """SHA-256 over names, types, shapes and every byte of the parameters and buffers, and ``more``: 64 hex digits."""
    digest = hashlib.sha256(more.encode())
    for name, value in sorted(model.state_dict().items()):
        whole = value.detach().cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file: 64 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
