"""Pixel preprocessing of transformers and timm models: by their image processor or by the user's mean and std."""

from __future__ import annotations

import inspect
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aimv2.errors import UsageError
from aimv2.interop.model_folder import CONFIG, MOST
from aimv2.interop.plain import open_plain
from aimv2.interop.shapes import PROCESSORS, processor_file, read_image_processor
from aimv2.models.sizes import IMAGENET_MEAN, IMAGENET_STD

OPTIONS = "--image-mean", "--image-std"
EDGES = ("height", "shortest_edge", "longest_edge")
SIDE = 224  # pixels, where neither the model nor its processor has a size
TRIED = 16  # pixels a side of the image that checks a processor

# settings of a processor that decide its output
KEYS = (
    *("do_rescale", "rescale_factor", "rescale_offset", "do_normalize", "image_mean", "image_std", "include_top"),
    *("do_flip_channel_order", "size", "do_center_crop", "crop_size"),
)

# arguments of a forward pass in transformers, by words
INPUTS = {
    "input_ids": "token ids of a text",
    "input_values": "a waveform or a spectrogram",
    "input_features": "a spectrogram",
    "pixel_values_videos": "videos",
}
NAFLEX = "patches of images at their own size, as NaFlex has them"
INPUTS |= dict.fromkeys(("spatial_shapes", "pixel_position_ids", "grid_thw", "image_grid_thw"), NAFLEX)
CHANNELS, FRAMES = ("num_channels", "in_channels"), ("num_frames", "frames_per_clip")  # keys of configurations


class Stats(NamedTuple):
    """Mean and standard deviation by channel (red, green, blue) of pixels scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Pixels:
    """uint8 [B, 3, H, W] -> float: ``((x * scale - offset) - mean) / std``, channels reversed first where ``bgr``.

    Attributes:
        scale: 1/255 for most.
        offset: 1 for the few that want -1..1 without a mean.
        stats: None: not normalised.
        bgr: blue, green, red instead of red, green, blue.
        origin: the file, or ``options``.
    """

    scale: float = 1 / 255
    offset: float = 0.0
    stats: Stats | None = None
    bgr: bool = False
    origin: str = ""

    def __call__(self, images: Tensor) -> Tensor:
        x = (images.flip(-3) if self.bgr else images).float() / (1 / self.scale) - self.offset
        if self.stats is None:
            return x
        mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in self.stats)
        return (x - mean) / std

    def __str__(self) -> str:
        """The arithmetic; ``origin`` is left out."""
        stats = "none" if self.stats is None else " ".join(",".join(f"{v:.6g}" for v in part) for part in self.stats)
        return f"{'bgr' if self.bgr else 'rgb'} * {self.scale:.8g} - {self.offset:g}; {stats}"


class Processing(NamedTuple):
    """Preprocessing of an image for a model.

    Attributes:
        pixels: the arithmetic.
        side: pixels a side of its output.
        processor: of transformers; None where the folder has none, or it can't be loaded here.
    """

    pixels: Pixels
    side: int
    processor: Any


def read_stats(mean: Any, std: Any, options: tuple[str, str] = OPTIONS, most: float = 1.0) -> Stats | None:
    """Parses mean and std: ``"0.5,0.5,0.5"``, a list, or one number for all channels; None: neither.

    ``most``: what none is above; finite for those of pixels in 0..1.

    Raises:
        UsageError: one without the other, not one or three numbers, a std of 0 or less.
    """
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        there, absent = options if std is None else options[::-1]
        raise UsageError(f"{there} without {absent}: give both", code="missing")
    found = []
    for option, given in zip(options, (mean, std)):
        words = given if isinstance(given, list | tuple) else str(given).split(",")
        try:
            values = tuple(float(word) for word in words)
        except ValueError:
            values = ()
        is_std = option == options[1]
        right = len(values) in (1, 3) and bool(np.isfinite(values).all()) and max(values) <= most
        if not right or (is_std and min(values) <= 0):
            above, scaled = " above 0" * is_std, ", of pixels in 0 to 1," * (most < math.inf)
            raise UsageError(f"{option} {given}: one number{above} or three (red, green, blue){scaled} expected")
        found.append(values * (3 // len(values)))
    return Stats(*found)


def refuse_other_inputs(source: str, model: Any, forward: Callable[..., Any]) -> None:
    """
    Raises:
        UsageError: a model for anything but RGB images of one size; says what it takes.
    """
    names = {
        name: value.default is value.empty
        for name, value in inspect.signature(forward).parameters.items()
        if value.kind is value.POSITIONAL_OR_KEYWORD
    }
    configs = (model.config, getattr(model.config, "vision_config", None))
    channels, frames = (
        next((n for config in configs for key in keys if isinstance(n := getattr(config, key, None), int)), None)
        for keys in (CHANNELS, FRAMES)
    )
    always = {"pixel_values", "input_ids", *(name for name, words in INPUTS.items() if words is NAFLEX)}
    needed = [name for name, needs in names.items() if needs or name in always]
    if needed != ["pixel_values"]:
        wanted = " and ".join(needed or list(names)[:1] or ["no images"])
    elif frames is not None:
        wanted = f"videos of {frames} frames"
    elif channels not in (None, 3):
        wanted = f"images of {channels} channel{'s' * (channels != 1)}"
    else:
        return
    words = next((f" ({words})" for name, words in INPUTS.items() if name in wanted.split()), "")
    raise UsageError(
        f"MODEL {source}: {type(model).__name__} takes {wanted}{words}; an encoder of RGB images of one size (pixel_values) "
        "is expected",
        code="unsupported",
    )


def read_processor(
    source: str, folder: Path, stats: Stats | None, side: int | None, options: tuple[str, str] = OPTIONS
) -> Processing:
    """Reads a folder's image processor.

    Args:
        source: for messages.
        folder: of the model.
        stats: the user's mean and std of pixels in 0..1, in place of the processor's scale, mean and std; its order of the
            channels is kept.
        side: of the images by the model's configuration, where the processor's file has none.
        options: of mean and std, for messages.

    Raises:
        UsageError: no processor and no mean and std; one that does more than resize, crop, scale, reverse channels and normalise.
    """
    file, either = processor_file(folder), f"give {' and '.join(options)} (red, green, blue, of pixels in 0 to 1)"
    if file is None:
        if stats is None:
            raise UsageError(
                f"MODEL {source}: no {PROCESSORS[1]} beside the weights to say how images are normalised; add it, or {either}"
            )
        return Processing(Pixels(stats=stats, origin="options"), side or SIDE, None)
    stored, processor = read_image_processor(folder), _open(folder)
    size = _size(stored, file)
    if processor is not None:
        stored = {**stored, **{key: getattr(processor, key) for key in KEYS if hasattr(processor, key)}}
    elif "auto_map" in stored and stats is None:
        raise UsageError(f"MODEL {source}: its image processor is custom code, which is not run; {either}")
    size = size or side or _size(stored, file) or SIDE
    bgr = bool(stored.get("do_flip_channel_order"))
    if stats is not None:
        return Processing(Pixels(stats=stats, bgr=bgr, origin="options"), size, processor)
    scaled = stored.get("do_rescale", True)
    scale = stored.get("rescale_factor", 1 / 255) if scaled else 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise UsageError(f"{file}: rescale_factor {scale!r}: a number above 0 expected")
    times = bool(stored.get("do_normalize", processor is None)), bool(stored.get("include_top"))
    mean, std = stored.get("image_mean"), stored.get("image_std")
    if any(times) and (mean is None or std is None):
        raise UsageError(f"MODEL {source}: {file.name} normalises images and names no mean and std; {either}")
    if any(times):  # the second time, of EfficientNet's, by the std only
        given = read_stats(
            mean, std, (f"{file}: image_mean", f"{file}: image_std"), MOST if abs(255 * scale - 1) < 0.01 else math.inf
        )
        assert given is not None
        stats = Stats(given.mean if times[0] else (0.0,) * 3, tuple(value ** sum(times) for value in given.std))
    offset = 1.0 if scaled and stored.get("rescale_offset", stored.get("offset")) else 0.0
    pixels = Pixels(float(scale), offset, stats, bgr, file.name)
    if processor is not None and (why := _differs(processor, pixels)):
        raise UsageError(
            f"MODEL {source}: its {type(processor).__name__} {why}; one that resizes, crops, scales and normalises RGB images "
            f"expected, or {either}"
        )
    return Processing(pixels, size, processor)


def former_pixels(folder: Path) -> Pixels:
    """Preprocessing of versions before 0.2: the file's mean and std, else ImageNet's, of pixels over 255."""
    stored = read_image_processor(folder)
    mean, std = stored.get("image_mean") or IMAGENET_MEAN, stored.get("image_std") or IMAGENET_STD
    return Pixels(stats=read_stats(mean, std, most=math.inf), origin="an earlier version")


def _open(folder: Path) -> Any:
    """The processor, with the defaults of its class; None where it needs torchvision, or is unknown."""
    try:
        with quiet(), TemporaryDirectory() as clean:  # its settings in the one form that transformers reads
            (Path(clean) / PROCESSORS[1]).write_text(json.dumps(read_image_processor(folder)))
            shutil.copy(folder / CONFIG, clean)
            return open_plain("AutoImageProcessor", clean, backend="pil")
    except Exception:  # then only the file is used
        return None


def _size(stored: dict[str, Any], file: Path) -> int | None:
    """Pixels a side: of the crop, else of the resized image.

    Raises:
        UsageError: not a size.
    """
    size = stored.get("crop_size") if stored.get("do_center_crop", True) else None
    size = size or stored.get("size")
    found = size
    if size is not None and not isinstance(size, int | list | tuple | str):
        found = next((value for key in EDGES if (value := dict(size).get(key))), None)
    if isinstance(found, list | tuple):
        found = max(found, default=None)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int) or found < 1):
        raise UsageError(f"{file}: size {size!r}: pixels a side expected")
    return found


def _differs(processor: Any, pixels: Pixels) -> str:
    """How the output of the processor differs from :class:`Pixels` for an image of the right size; "" where it does not."""
    image = np.random.default_rng(0).integers(0, 256, (TRIED, TRIED, 3), dtype=np.uint8)
    try:
        made = processor(
            Image.fromarray(image), do_resize=False, do_center_crop=False, do_pad=False, return_tensors="pt"
        )
        values = made["pixel_values"]
    except Exception as error:
        return f"can't be tried: {' '.join(str(error).split())[:120]}"
    wanted = pixels(torch.from_numpy(image).permute(2, 0, 1)[None])
    if isinstance(values, Tensor) and values.ndim == 3:
        return "gives patches of images at their own size (NaFlex)"
    if not isinstance(values, Tensor) or values.shape != wanted.shape:
        return (
            f"gives pixels of {list(values.shape) if hasattr(values, 'shape') else type(values).__name__} for one image"
        )
    return (
        ""
        if torch.allclose(values.float(), wanted, atol=1e-3)
        else "does more than scale, reverse channels and normalise"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without progress bars and reports: errors are reported in one line."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def about(pixels: Pixels | None) -> dict[str, Any]:
    """Its entry in a result; {} for a model that normalises by itself."""
    if pixels is None:
        return {}
    stats: Sequence[Any] = pixels.stats or (None, None)
    return {
        "pixels": {
            "scale": pixels.scale,
            "offset": pixels.offset,
            "mean": stats[0],
            "std": stats[1],
            "channels": "bgr" if pixels.bgr else "rgb",
            "from": pixels.origin,
        }
    }
