"""Pictures in folders, and an import of them in this process, for tests of what people bring."""

import io
from pathlib import Path

from PIL import Image

from aimv2.data.shards.importing import import_data


def picture(number: int = 0, size: tuple[int, int] = (24, 16), format: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (number * 7 % 256, number * 31 % 256, 90)).save(out, format)
    return out.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def run(source: object, out: Path, **options: object) -> dict:
    return import_data(str(source), out, **{"workers": 1, "progress": False, **options})
