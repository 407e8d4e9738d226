"""Features on disk: embed. Heavy imports happen inside."""

from __future__ import annotations

from typing import Any

from aimv2.api.models import load_model
from aimv2.errors import UsageError


def embed(
    model: str,
    images: str,
    out: str,
    pool: str = "mean",
    layers: str = "last",
    format: str = "npy",
    shard_size: int | None = None,
    batch_size: int = 16,
    device: str | None = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Features of many images, in files of equal parts; under torchrun several processes share the work.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP
        images: a folder of images (or of tars, all of them), a text file with a path a line, shards, or one image
        out: folder of the features: features-PPPPP.npy with keys-PPPPP.txt (a key a line, written as in a JSON string),
            or features-PPPPP.parquet; rejected.jsonl names what could not be read; interrupted and started again it goes on
        pool: mean of the patches, attention (models with a pooling head), or none: every patch
        layers: last; or blocks, counted from 0 or from the end, with commas: 5,11,-1
        format: npy (float arrays and lists of keys) or parquet (a column key and a column a layer)
        shard_size: images a file; null: 1000, or for pool none as many as make about 512 MB
        batch_size: images at once
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the products: fp32 (stored as float32) or bf16 (stored as float16)
    """
    from aimv2.features.embed import Wanted, embed_images

    try:
        chosen = () if layers == "last" else tuple(int(layer) for layer in str(layers).split(","))
    except ValueError:
        raise UsageError(f"--layers {layers}: last, or block numbers with commas, expected") from None
    loaded = load_model(model, device=usual_device(device))
    wanted = Wanted(pool, chosen, format, shard_size, batch_size, precision)
    return embed_images(model, loaded, images, out, wanted)


def usual_device(given: str | int | None = None) -> str:
    """The device that a user named, or this process's GPU where there is one, else cpu.

    Raises:
        UsageError: a device that torch does not have here.
    """
    import os

    import torch

    from aimv2.interop.load import usable_device

    if given is None and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return str(usable_device(given))
