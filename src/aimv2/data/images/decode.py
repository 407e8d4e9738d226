"""Images as people have them, to RGB: orientation, colour modes, depth, limits.

Training decodes millions of ordinary RGB JPEGs, so for those nothing is copied or converted: open, limit,
draft, load. Everything odd (rotation, alpha, 16 bits, CMYK, palettes) takes a branch of its own afterwards.
"""

import io
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin

from aimv2.io import POINTER, is_pointer, read_file

MAX_PIXELS = 178_956_970  # twice Pillow's own warning limit: about 13,400 x 13,400
Image.init()
FORMATS = tuple(  # not every build of Pillow has all; multi-picture JPEGs (MPO) open as JPEG
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM") if name in Image.OPEN
)
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # stored as they are, byte for byte

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# bytes of a text in a PNG: an XMP block above Pillow's 1 MB is no reason to lose the image
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20
# Pillow warns at half of MAX_PIXELS; the limit here is our own and is an error, so its warning is noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(ValueError):
    """An image that cannot be used; the message is the reason in words."""


class StoredImage(NamedTuple):
    """An image as it goes into a shard: extension without dot, encoded bytes, size in upright pixels."""

    extension: str
    data: bytes
    width: int
    height: int


def decode_image(data: bytes | Path, max_pixels: int = MAX_PIXELS, draft_size: int | None = None) -> Image.Image:
    """Decode to an upright RGB image.

    Args:
        data: Encoded bytes, or the file that holds them.
        max_pixels: Refused above this, by the header, before any pixel is decoded.
        draft_size: JPEGs may come out scaled down by 2, 4 or 8 (in the DCT, which is several times faster)
            as long as the shorter side stays at least this many pixels.

    Returns:
        Mode RGB, EXIF orientation applied, first frame of an animation, alpha composited on white.

    Raises:
        ImageError: unreadable, truncated or too large.
    """
    image = _open(data, max_pixels)
    if draft_size is not None:
        _draft(image, draft_size)
    return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image that Pillow opened, as :func:`decode_image` gives it: loaded, RGB, turned by its EXIF orientation.

    Raises:
        ImageError: as `decode_image`.
    """
    _load(image)
    return _upright(to_rgb(image), _orientation(image))


def header_size(data: bytes | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """``(width, height)`` by the header, as it is stored.

    Raises:
        ImageError: no image by its header, or too large.
    """
    return _open(data, max_pixels).size


def image_size(data: bytes | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """``(width, height)`` of the upright image, after proving that all of it decodes.

    Raises:
        ImageError: as `decode_image`.
    """
    image = _open(data, max_pixels)
    return _proven_size(image)


def store_image(
    data: bytes, max_side: int | None = None, max_pixels: int = MAX_PIXELS, quality: int = 95
) -> StoredImage:
    """The bytes that a shard should hold: the original ones where every reader can use them, else encoded again.

    JPEG, PNG and WebP stay untouched unless animated, 16-bit, CMYK or above ``max_side``. What is encoded
    again becomes PNG if it was PNG or GIF (drawings), else JPEG at ``quality``.

    Args:
        data: Encoded bytes.
        max_side: Longest side in pixels; larger images shrink to it.

    Raises:
        ImageError: as `decode_image`.
    """
    image = _open(data, max_pixels)
    source_format = image.format or ""
    longest = max(image.size)
    shrink = max_side is not None and longest > max_side
    animated = source_format != "MPO" and _is_animated(image)
    plain = image.mode in ("RGB", "L", "1", "P", "RGBA", "LA")
    if source_format in KEPT and plain and not animated and not shrink:
        width, height = _proven_size(image)
        return StoredImage(KEPT[source_format], data, width, height)

    draft_size = None
    if shrink and max_side is not None:
        # Twice the wanted size leaves the filter enough to work on; DCT scaling by itself is a box filter.
        draft_size = math.ceil(2 * min(image.size) * max_side / longest)
    rgb = decode_image(data, max_pixels, draft_size)
    if max_side is not None and max(rgb.size) > max_side:
        scale = max_side / max(rgb.size)
        size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
        rgb = rgb.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    out = io.BytesIO()
    rgb.info = {}  # no EXIF, no colour profile of another mode: pixels are upright RGB now
    extension, kind = ("png", "PNG") if source_format in ("PNG", "GIF") else ("jpg", "JPEG")
    try:
        rgb.save(out, kind, quality=quality)
    except (OSError, ValueError) as error:  # a side above 65,500 pixels, for one
        raise ImageError(f"{rgb.width} x {rgb.height} cannot be stored as {kind}: {error}") from error
    return StoredImage(extension, out.getvalue(), *rgb.size)


def is_encoded(data: bytes) -> bool:
    """Whether bytes begin like an image of a known format."""
    try:
        Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        return data[4:8] == b"ftyp"  # HEIC, whether or not it can be read
    except Exception:  # a header of its format, and broken
        return True
    return True


def _open(data: bytes | Path, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header only, and refuse by it."""
    try:
        raw = read_file(data) if isinstance(data, Path) else data
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not raw:
        raise ImageError("empty file")
    if raw[4:8] == b"ftyp" and raw[8:12] in HEIF_BRANDS:
        _register_heif()
    try:
        image = Image.open(io.BytesIO(raw), formats=[*FORMATS, "HEIF"] if "HEIF" in Image.OPEN else FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"more than {max_pixels:,} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(POINTER if is_pointer(raw) else "not an image of a known format") from error
    except Exception as error:  # a broken header makes Pillow's plugins raise nearly anything
        raise ImageError(_reason(error, "header")) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} is more than {max_pixels:,} pixels")
    return image


def _register_heif() -> None:
    """Lets Pillow read HEIC; its plugin turns images upright itself.

    Raises:
        ImageError: the package for it is not installed.
    """
    try:
        import pillow_heif
    except ImportError:
        raise ImageError("a HEIC image; pip install 'aimv2[heic]' to read it") from None
    if "HEIF" not in Image.OPEN:
        pillow_heif.register_heif_opener()


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception as error:  # counting the frames of a broken GIF or WebP reads all of it
        raise ImageError(_reason(error, "data")) from error


def _draft(image: Image.Image, side: int) -> None:
    try:
        image.draft(None, (side, side))
    except Exception as error:
        raise ImageError(_reason(error, "header")) from error


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # a broken body makes Pillow's decoders raise nearly anything
        raise ImageError(_reason(error, "data")) from error


def _reason(error: Exception, part: str) -> str:
    words = str(error) or type(error).__name__
    return f"truncated ({words})" if "truncated" in words.lower() else f"broken {part} ({words})"


def _proven_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Decode everything, cheaply: at 1/8 scale every byte of a JPEG is still read."""
    width, height = image.size
    _draft(image, 1)
    _load(image)
    return (height, width) if _orientation(image) >= 5 else (width, height)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8 of a loaded image; a broken EXIF block counts as upright."""
    info = image.info
    if image.format == "JPEG" and "exif" not in info and "xmp" not in info:
        return 1
    try:
        turn = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # any of many parse errors, in data that does not matter otherwise
        return 1
    return turn if turn in _TURNS else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation == 1:
        return image
    turned = image.transpose(_TURNS[orientation])
    turned.info = {}  # whoever reads its orientation next finds it upright
    return turned


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode to RGB."""
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    try:
        if mode.startswith("I") or mode == "F":
            return _eight_bits(image).convert("RGB")
        if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            white = Image.new("RGB", image.size, (255, 255, 255))
            white.paste(rgba, mask=rgba.getchannel("A"))
            return white
        return image.convert("RGB")
    except Exception as error:  # a palette or a profile that lies makes Pillow raise nearly anything
        raise ImageError(f"colour mode {mode} cannot be converted to RGB: {error}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep gray to 8 bits by the format's full range, not by clipping (which is what Pillow's convert does).

    ``I;16*`` is 0..65535. ``I`` and ``F`` state no range: taken as 0..1 (F), 0..255 or 0..65535 by the
    largest value, and stretched from smallest to largest where none fits.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        values = np.nan_to_num(values)
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        values = values / 257
    elif low >= 0 and image.mode == "F" and high <= 1:
        values = values * 255
    elif low >= 0 and high <= 255:
        pass
    elif low >= 0 and image.mode == "I" and high <= 65535:
        values = values / 257
    else:
        values = (values - low) * (255 / max(high - low, 1e-12))
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
