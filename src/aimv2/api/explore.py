"""Looking at a model in the browser: explore. Heavy imports happen inside."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aimv2.errors import UsageError

if TYPE_CHECKING:
    from aimv2.features.pixels import Stats


def explore(
    model: str,
    images: str | None = None,
    other: str | None = None,
    limit: int = 200,
    host: str = "127.0.0.1",
    port: int = 8421,
    open: bool = False,
    upload_mb: float = 10.0,
    device: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Look at a model in the browser: features, similar patches, attention, captions, next patches, search by text.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a decoder adds captions, painting and search,
            a LiT pair search; of a vision model of transformers or timm:NAME its features
        images: a folder of images, a text file with a path a line, shards, or a folder that embed wrote (pool attention for a
            pair, none for others: its pictures are then not encoded anew); null: captioned scenes, drawn on the spot
        other: a second model, shown beside the first
        limit: images of the folder, the first; 0: all
        host: address to listen at; any but the default lets other machines in
        port: to listen at; 0: a free one
        open: the page in the browser of this machine
        upload_mb: largest picture that the page may send, MB
        device: cpu, cuda, ...; null: cuda where there is one
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """
    import importlib.util

    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise UsageError(f"explore needs the package {missing[0]}: pip install 'aimv2[ui]'")
    if limit < 0:
        raise UsageError(f"--limit {limit}: 0 (all) or more expected")
    if not 0 < upload_mb <= 1000:
        raise UsageError(f"--upload-mb {upload_mb}: above 0 and up to 1000 expected")
    from aimv2.api.features import usual_device
    from aimv2.explorer.server import listen, serve, url_of
    from aimv2.features.pixels import read_stats

    with contextlib.closing(listen(host, port)) as listening:  # a busy port is said before a model is read
        url = url_of(host, listening)
        stats = read_stats(image_mean, image_std)
        answers = prepare(model, images, other, limit, upload_mb, usual_device(device), stats)
        serve(answers, host, listening, open)
    return {"url": url, "model": model, "other": other, "images": images}


def prepare(
    model: str,
    images: str | None,
    other: str | None,
    limit: int,
    upload_mb: float,
    device: str,
    stats: Stats | None = None,
) -> Any:
    """Models and pictures, opened; see :func:`explore`.

    Returns:
        :class:`aimv2.explorer.answers.Answers`.
    """
    from aimv2.explorer.album import Album
    from aimv2.explorer.answers import Answers
    from aimv2.explorer.foreign import ForeignEncoder
    from aimv2.explorer.search import Search
    from aimv2.explorer.stored import Stored
    from aimv2.explorer.study import Study, open_shown
    from aimv2.features.embed import ABOUT
    from aimv2.features.frozen import refuse_stats

    folder = Path(images).expanduser() if images is not None else None
    stored = Stored(folder) if folder is not None and (folder / ABOUT).is_file() else None
    shown = [open_shown(source, device, stats) for source in (model, other) if source is not None]
    if not any(isinstance(one.encoder, ForeignEncoder) for one in shown):
        refuse_stats(model, stats)
    size = max(32, min(224, max(one.encoder.config.image_size or 224 for one in shown)))
    album = Album(images if stored is None else stored.source, limit, size)
    if stored is not None:
        stored.number(album)
    study = Study(shown, album, stored)
    return Answers(study, Search(study, stored), round(upload_mb * 1e6), stored)
