"""Load the models and images that the explorer serves."""

from __future__ import annotations

from pathlib import Path

from aimv2.explorer.album import Album
from aimv2.explorer.answers import Answers
from aimv2.explorer.foreign import ForeignEncoder
from aimv2.explorer.search import Search
from aimv2.explorer.stored import Stored
from aimv2.explorer.study import Study, open_shown
from aimv2.features.embed import ABOUT
from aimv2.features.frozen import refuse_stats
from aimv2.features.pixels import Stats


def prepare(
    model: str,
    images: str | None,
    other: str | None,
    limit: int,
    upload_mb: float,
    device: str,
    stats: Stats | None = None,
    image_root: Path | None = None,
) -> Answers:
    """Load models and images; the arguments are the options of ``aimv2 explore``."""
    folder = Path(images).expanduser() if images is not None else None
    stored = Stored(folder) if folder is not None and (folder / ABOUT).is_file() else None
    shown = [open_shown(source, device, stats) for source in (model, other) if source is not None]
    if not any(isinstance(one.encoder, ForeignEncoder) for one in shown):
        refuse_stats(model, stats)
    size = max(32, min(224, max(one.encoder.config.image_size or 224 for one in shown)))
    if stored is not None:
        images, image_root = stored.source, stored.image_root
    album = Album(images, limit, size, image_root)
    if stored is not None:
        stored.number(album)
    study = Study(shown, album, stored)
    return Answers(study, Search(study, stored), round(upload_mb * 1e6), stored)
