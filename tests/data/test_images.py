"""Images as people have them come out upright, RGB, 8 bits, or with a reason."""

import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from aimv2.data.images.decode import ImageError, decode_image, image_size, store_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def halves(width: int = 40, height: int = 24) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def photo(width: int = 320, height: int = 200) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def near(pixel: object, wanted: tuple[int, int, int], within: int = 6) -> bool:
    return bool(np.abs(np.array(pixel, int) - wanted).max() <= within)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_plain_formats(format: str) -> None:
    image = decode_image(encode(halves(), format, **({"quality": 95} if format in ("JPEG", "WEBP") else {})))
    assert image.mode == "RGB" and image.size == (40, 24)
    assert near(image.getpixel((4, 12)), RED, 12) and near(image.getpixel((36, 12)), BLUE, 12)


# The stored left half is red: each orientation says on which side it must end.
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"exif": exif.tobytes() if format == "TIFF" else exif}
    if format in ("JPEG", "WEBP"):
        options["quality"] = 95
    image = decode_image(encode(halves(), format, **options))
    if orientation >= 5:
        assert image.size == (24, 40)
        first, last = image.getpixel((12, 4)), image.getpixel((12, 36))
    else:
        assert image.size == (40, 24)
        first, last = image.getpixel((4, 12)), image.getpixel((36, 12))
    red_first = orientation in (1, 4, 5, 6)
    assert near(first, RED if red_first else BLUE, 12), orientation
    assert near(last, BLUE if red_first else RED, 12), orientation


def test_broken_exif_is_upright() -> None:
    assert decode_image(encode(halves(), "JPEG", exif=b"Exif\0\0garbage")).size == (40, 24)


def test_cmyk_jpeg_and_tiff() -> None:
    for format in ("JPEG", "TIFF"):
        image = decode_image(encode(halves().convert("CMYK"), format))
        assert near(image.getpixel((4, 12)), RED, 12), format


def test_cmyk_jpeg_is_stored_inverted_as_adobe_does() -> None:
    data = encode(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=95)
    assert b"Adobe" in data[:200]
    assert near(decode_image(data).getpixel((16, 16)), RED, 12)


def test_alpha_lies_on_white() -> None:
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 10, 20))
    for format in ("PNG", "WEBP"):
        out = decode_image(encode(image, format, **({"lossless": True} if format == "WEBP" else {})))
        assert near(out.getpixel((2, 10)), RED) and near(out.getpixel((18, 10)), WHITE), format
    half = decode_image(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG"))
    assert near(half.getpixel((0, 0)), (127, 127, 127), 2)
    gray = decode_image(encode(Image.new("LA", (4, 4), (0, 0)), "PNG"))
    assert gray.getpixel((0, 0)) == WHITE


def test_palette_with_transparency() -> None:
    image = Image.new("P", (10, 10), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 5, 10))
    out = decode_image(encode(image, "PNG", transparency=0))
    assert out.getpixel((2, 5)) == BLUE and out.getpixel((8, 5)) == WHITE
    opaque = decode_image(encode(image, "PNG"))
    assert opaque.getpixel((8, 5)) == RED


def test_rgb_with_one_transparent_colour() -> None:
    out = decode_image(encode(halves(), "PNG", transparency=BLUE))
    assert out.getpixel((4, 12)) == RED and out.getpixel((36, 12)) == WHITE


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.array([[0, 257, 0x8000, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        out = decode_image(encode(Image.fromarray(ramp), format))
        assert [out.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255], format
    deep = Image.fromarray(np.array([[0, 65535, 32896]], dtype=np.int32))
    assert [decode_image(encode(deep, "TIFF")).getpixel((x, 0))[0] for x in range(3)] == [0, 255, 128]


def test_floats() -> None:
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert [decode_image(encode(unit, "TIFF")).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    wide = Image.fromarray(np.array([[-1000.0, 0.0, 1000.0]], dtype=np.float32))
    assert [decode_image(encode(wide, "TIFF")).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_gray_and_one_bit() -> None:
    assert decode_image(encode(Image.new("L", (8, 8), 77), "PNG")).getpixel((0, 0)) == (77, 77, 77)
    assert decode_image(encode(Image.new("1", (8, 8), 1), "PNG")).getpixel((0, 0)) == WHITE


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    for format in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], format, save_all=True, append_images=frames[1:])
        assert near(decode_image(data).getpixel((8, 8)), RED), format
        stored = store_image(data)
        assert stored.data != data and not getattr(Image.open(io.BytesIO(stored.data)), "is_animated", False)


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_truncated(part: float, format: str) -> None:
    data = encode(photo(), format)
    with pytest.raises(ImageError):
        decode_image(data[: int(len(data) * part)])
    with pytest.raises(ImageError):
        image_size(data[: int(len(data) * part)])
    with pytest.raises(ImageError):
        store_image(data[: int(len(data) * part)])


def test_bomb_is_refused_by_its_header() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    # 60,000 x 60,000 in a few bytes: no data at all follows, so that decoding first would say "truncated".
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
    with pytest.raises(ImageError, match="pixels"):
        decode_image(bomb)
    with pytest.raises(ImageError, match="320 x 200 is more than 1,000 pixels"):
        decode_image(encode(photo(), "JPEG"), max_pixels=1000)


def test_not_an_image(tmp_path: Path) -> None:
    for data, reason in ((b"", "empty"), (b"<html>not found</html>", "not an image")):
        with pytest.raises(ImageError, match=reason):
            decode_image(data)
    with pytest.raises(ImageError, match="cannot be read"):
        decode_image(tmp_path / "absent.jpg")
    (tmp_path / "there.png").write_bytes(encode(halves(), "PNG"))
    assert decode_image(tmp_path / "there.png").size == (40, 24)


@given(draft=st.integers(1, 400), width=st.integers(8, 500), height=st.integers(8, 500))
@settings(max_examples=30, deadline=None)
def test_draft_keeps_the_shorter_side(draft: int, width: int, height: int) -> None:
    out = decode_image(encode(Image.new("RGB", (width, height), RED), "JPEG"), draft_size=draft)
    assert min(out.size) >= min(draft, width, height)
    assert out.width <= width and out.height <= height
    assert abs(out.width / out.height - width / height) <= 0.2 * width / height or min(out.size) < 12


def test_draft_makes_large_jpegs_small_and_leaves_others() -> None:
    assert decode_image(encode(photo(1600, 800), "JPEG"), draft_size=200).size == (400, 200)
    assert decode_image(encode(photo(), "PNG"), draft_size=20).size == (320, 200)


def test_ordinary_jpeg_is_not_copied() -> None:
    image = decode_image(encode(photo(), "JPEG"))
    assert type(image).__name__ == "JpegImageFile"


def test_store_keeps_bytes_that_need_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for image, format, extension in (
        (photo(), "JPEG", "jpg"),
        (photo(), "PNG", "png"),
        (photo(), "WEBP", "webp"),
    ):
        data = encode(image, format)
        assert store_image(data) == (extension, data, 320, 200)
    turned = encode(photo(), "JPEG", exif=exif)
    assert store_image(turned) == ("jpg", turned, 200, 320)
    assert image_size(turned) == (200, 320)


def test_store_encodes_what_readers_may_miss() -> None:
    deep = encode(Image.fromarray(np.full((9, 7), 65535, np.uint16)), "PNG")
    cmyk = encode(halves().convert("CMYK"), "JPEG")
    for data, extension in ((deep, "png"), (cmyk, "jpg"), (encode(halves(), "BMP"), "jpg")):
        stored = store_image(data)
        assert stored.extension == extension and stored.data != data
        assert Image.open(io.BytesIO(stored.data)).mode == "RGB"


def test_store_refuses_what_its_format_cannot_hold() -> None:
    with pytest.raises(ImageError, match="70000 x 2 cannot be stored as JPEG"):
        store_image(encode(Image.new("RGB", (70000, 2)), "BMP"))


def test_store_shrinks_by_max_side() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    stored = store_image(encode(photo(1600, 800), "JPEG", exif=exif), max_side=400)
    assert stored[2:] == (200, 400)
    again = Image.open(io.BytesIO(stored.data))
    assert again.size == (200, 400) and 0x0112 not in again.getexif()
    assert store_image(stored.data, max_side=400).data == stored.data


def heic(turn: int = 6) -> bytes:
    """A HEIC image of 64 x 32 pixels, its left half red, turned by its EXIF orientation."""
    pillow_heif = pytest.importorskip("pillow_heif", reason="the package that reads HEIC is not installed")
    pillow_heif.register_heif_opener()
    image, exif, out = Image.new("RGB", (64, 32), "blue"), Image.Exif(), io.BytesIO()
    image.paste("red", (0, 0, 32, 32))
    exif[0x0112] = turn
    image.save(out, "HEIF", quality=95, exif=exif.tobytes())
    return out.getvalue()


def test_heic_is_read_upright_where_its_package_is() -> None:
    image = decode_image(heic())
    assert image.size == (32, 64) and image.getpixel((16, 8))[0] > 200 and image.getpixel((16, 56))[2] > 200
    stored = store_image(heic())
    assert (stored.extension, stored.width, stored.height) == ("jpg", 32, 64)


def test_heic_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for brand in (b"heic", b"mif1", b"hevc"):
        with pytest.raises(ImageError, match=r"HEIC.*pip install 'aimv2\[heic\]'"):
            decode_image(b"\0\0\0\x18ftyp" + brand + b"\0" * 64)
