"""``aimv2 embed``: features on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from aimv2.config.types import PathText
from aimv2.errors import UsageError

EXAMPLES = """\
aimv2 embed aimv2-large-patch14-224 photos features/photos
aimv2 embed runs/mine shards/mine features/mine --pool none --format parquet"""


@dataclass(kw_only=True)
class EmbedOptions:
    """Write features of many images, in files of equal parts; under torchrun several processes share the work.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP
        images: a folder of images (or of tars, all of them), a text file with one path per line, shards, or one image
        out: folder for the features: features-PPPPP.npy with keys-PPPPP.txt (a key per line, written as in a JSON string),
            or features-PPPPP.parquet; rejected.jsonl lists what could not be read; an interrupted command continues there
        pool: mean of the patches, attention (models with a pooling head), or none: every patch
        layers: last; or blocks, counted from 0 or from the end, with commas: 5,11,-1
        format: npy (float arrays and lists of keys) or parquet (a column key and a column per layer)
        shard_size: images per file; null: 1000, or for pool none as many as make about 512 MB
        image_root: a folder outside the list's own, below which a list of paths may name images
        batch_size: images per forward pass
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the matmuls: fp32 (stored as float32) or bf16 (stored as float16)
    """

    model: PathText
    images: PathText
    out: PathText
    pool: Literal["mean", "attention", "none"] = "mean"
    layers: str = "last"
    format: Literal["npy", "parquet"] = "npy"
    shard_size: int | None = None
    batch_size: int = 16
    device: str | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    image_root: PathText | None = None


def run(options: EmbedOptions) -> dict[str, Any]:
    from aimv2.data.images.names import image_root_of
    from aimv2.data.text.models import load_model
    from aimv2.distributed import default_device
    from aimv2.features.embed import Wanted, embed_images

    try:
        chosen = () if options.layers == "last" else tuple(int(layer) for layer in options.layers.split(","))
    except ValueError:
        raise UsageError(f"--layers {options.layers}: last, or block numbers with commas, expected") from None
    loaded = load_model(options.model, device=default_device(options.device))
    wanted = Wanted(options.pool, chosen, options.format, options.shard_size, options.batch_size, options.precision)
    root = image_root_of(options.image_root)
    return embed_images(options.model, loaded, options.images, options.out, wanted, root)
