"""What is drawn at a visit to a sample: prefix, kept positions, crop, caption; each from the generator of that visit."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from aimv2.data.stream.transforms import Box


def sample_rng(seed: int, key: str, worker: int, index: int) -> np.random.Generator:
    """The random generator of one visit to one sample."""
    digest = hashlib.blake2b(f"{seed}|{key}|{worker}|{index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def draw_prefix(rng: np.random.Generator, patches: int) -> int:
    """M ~ Uniform{1..I-1} (AIMV2, Figure 1)."""
    return int(rng.integers(1, patches)) if patches > 1 else 1


def draw_kept(rng: np.random.Generator, patches: int, fraction: float) -> np.ndarray:
    """The image positions that the decoder reads: int64 [K], ascending."""
    return np.sort(rng.choice(patches, kept_patches(patches, fraction), replace=False))


def kept_patches(patches: int, fraction: float) -> int:
    """K, the number of patches that the decoder reads, at least 2."""
    return max(round(fraction * patches), min(2, patches))


def native_crop_box(rng: np.random.Generator, width: int, height: int, scale: float) -> Box:
    """Random crop of the image's own aspect ratio, area fraction uniform in [scale, 1]."""
    side = math.sqrt(rng.uniform(scale, 1.0))
    w, h = side * width, side * height
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return left, top, left + w, top + h


def draw_caption(
    rng: np.random.Generator, captions: dict[str, list[str]], weights: dict[str, float] | None
) -> str | None:
    """Sample a caption: a field by weight, then one of its captions; any caption with equal probability without weights."""
    if weights is None:
        every = [caption for field in captions.values() for caption in field]
        return every[int(rng.integers(len(every)))] if every else None
    fields = [field for field in captions if captions[field] and weights.get(field, 0) > 0]
    if not fields:
        return None
    given = np.array([weights[field] for field in fields])
    chosen = captions[fields[int(rng.choice(len(fields), p=given / given.sum()))]]
    return chosen[int(rng.integers(len(chosen)))]
