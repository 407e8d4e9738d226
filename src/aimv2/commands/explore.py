"""``aimv2 explore``: a model in the browser."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Annotated, Any

from aimv2.config.types import Bounds, Count, PathText
from aimv2.errors import need
from aimv2.evals.options import ModelOptions

EXAMPLES = """\
aimv2 explore aimv2-large-patch14-224 --images photos --open
aimv2 explore runs/mine --images photos --other aimv2-large-patch14-224"""
FIRST = "images other limit port open device"


@dataclass(kw_only=True)
class ExploreOptions(ModelOptions):
    """Explore a model in the browser: features, similar patches, attention, captions, next patches, search by text, questions.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a decoder adds captions, painting and search,
            a LiT pair search; a VLM of `aimv2 vlm build` or `aimv2 vlm train` answers questions; of a vision model of
            transformers or timm:NAME its features
        images: a folder of images, a text file with one path per line, shards, or a folder that embed wrote (pool attention for
            a pair, none for others: its pictures are then not encoded again); null: captioned scenes, drawn on the spot
        other: a second model, shown next to the first
        limit: images of the folder, the first; 0: all
        image_root: a folder outside the list's own, below which a list of paths may name images
        host: address to listen on; any but the default lets other machines in
        port: port to listen on; 0: a free one
        open: open the page in the browser
        upload_mb: largest picture that the page may send, MB
    """

    ORDER = "model images other limit host port open upload_mb device image_mean image_std image_root"
    images: PathText | None = None
    other: PathText | None = None
    limit: Count = 200
    image_root: PathText | None = None
    host: str = "127.0.0.1"
    port: int = 8421
    open: bool = False
    upload_mb: Annotated[float, Bounds(0, 1000, above=True)] = 10.0


def run(options: ExploreOptions) -> dict[str, Any]:
    for package in ("starlette", "uvicorn"):
        need(package, "ui", "explore")
    from aimv2.data.images.names import image_root_of
    from aimv2.explorer.prepare import prepare
    from aimv2.explorer.server import listen, serve, url_of

    model, images, other = options.model, options.images, options.other
    root = image_root_of(options.image_root)
    with contextlib.closing(
        listen(options.host, options.port)
    ) as listening:  # a busy port is reported before a model is read
        url = url_of(options.host, listening)
        answers = prepare(model, images, other, options.limit, options.upload_mb, options.where, options.stats, root)
        serve(answers, options.host, listening, options.open)
    return {"url": url, "model": model, "other": other, "images": images}
