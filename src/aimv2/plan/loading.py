"""What the loader needs: how many images a second a core of this machine decodes, crops and resizes, and how heavy they are."""

from __future__ import annotations

import io
import math
import time
from dataclasses import dataclass

import numpy as np
from PIL import Image

from aimv2.config.schema import Config
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.stream.samples import image_bytes
from aimv2.data.stream.transforms import crop_resize, random_crop_box, to_pixels
from aimv2.models.sizes import EncoderConfig

SAMPLES, SECONDS = 64, 1.0  # images that are decoded in turn, and for how long
WIDTH, HEIGHT = 500, 375  # of a generated photograph


@dataclass(frozen=True)
class Decoding:
    """A core's speed on a kind of images.

    Attributes:
        per_second: images a second of one process; of the transform only, without reading tars and making batches.
        bytes_a_pair: mean size of a sample, image and caption.
        of: what was decoded, in words.
    """

    per_second: float
    bytes_a_pair: float
    of: str


def make_photograph(rng: np.random.Generator) -> bytes:
    """A JPEG with detail at every scale (1/f noise) and a few edges, as photographs have."""
    canvas = np.full((HEIGHT, WIDTH, 3), 128.0)
    for octave in range(7):
        cells = 2**octave
        noise = rng.integers(0, 256, (3 * cells, 4 * cells, 3), dtype=np.uint8)
        layer = Image.fromarray(noise).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        canvas += (np.asarray(layer, dtype=np.float64) - 128) / 1.6**octave
    for _ in range(6):
        x, y = int(rng.integers(WIDTH)), int(rng.integers(HEIGHT))
        canvas[y : y + int(rng.integers(20, 150)), x : x + int(rng.integers(20, 150))] += rng.normal(0, 40, 3)
    out = io.BytesIO()
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def samples_of(config: Config) -> tuple[list[bytes], float, str]:
    """Images to decode, mean bytes of a pair, and what they are: the first of the training data, else generated ones."""
    from aimv2.train.prepare import first_samples

    if config.data.train is not None:
        found = first_samples(config, SAMPLES)
        images = [image_bytes(sample) for sample in found]
        weight = sum(sum(map(len, sample.values())) for sample in found) / len(found)
        return images, weight, f"the first {len(found)} samples of data.train"
    images = [make_photograph(np.random.default_rng(number)) for number in range(4)]
    weight = sum(map(len, images)) / len(images)
    return images, weight, f"generated {WIDTH} x {HEIGHT} JPEGs of {weight / 1e3:.0f} kB (data.train gives your own)"


def measure_decoding(config: Config, encoder: EncoderConfig) -> Decoding:
    """Decodes in this process for a second, as a data worker does."""
    images, weight, of = samples_of(config)
    size, data = encoder.image_size or 224, config.data
    draft = math.ceil(1.2 * size / math.sqrt(data.crop_scale))  # as the stream decodes
    rng, done, began = np.random.default_rng(0), 0, time.perf_counter()
    while True:
        for encoded in images:
            try:
                image = decode_image(encoded, data.max_pixels, draft)
            except ImageError:
                continue
            box = random_crop_box(rng, *image.size, data.crop_scale, data.crop_ratio)
            to_pixels(crop_resize(image, box, (size, size)))
            done += 1
        if time.perf_counter() - began > SECONDS or not done:
            break
    return Decoding(max(done, 1) / (time.perf_counter() - began), weight, of)
