"""Frozen encoders of any origin with one interface: images in, patch features out.

Legend: B images, N patches, D width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from aimv2.data.stream.transforms import VIEW, crop_resize, native_size, resized_crop, to_pixels
from aimv2.errors import UsageError
from aimv2.features.fingerprint import architecture, file_hash, model_fingerprint, weights_hash
from aimv2.features.pixels import OPTIONS, Pixels, Stats
from aimv2.models.create import build
from aimv2.models.encoder import VisionEncoder
from aimv2.models.positions import pixel_patches
from aimv2.models.sizes import IMAGENET_MEAN, IMAGENET_STD, EncoderConfig

LAST, AVERAGE = "last", "avg6"
CROP = (
    0.875  # fraction of the shorter side that the test view keeps of an image larger than the input (the released code)
)
NATIVE_SIZE = 224  # of a native model, by default
NATIVE = "native"  # as an image size: each image at its own
ROW = 32_768  # patches of images of different sizes in one forward pass
PRECISIONS = ("fp32", "bf16")  # that users choose from
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class FeatureFunction(Protocol):
    """uint8 images [B, 3, H, W] and names of layers -> one tensor [B, N, D] a layer.

    At native: a list of uint8 [3, H, W] -> one list of [N, D] a layer.
    """

    def __call__(self, images: Any, layers: Sequence[str]) -> list[Any]: ...


class PatchRange(NamedTuple):
    """Input range of a native model: images of ``low`` to ``high`` patches of ``patch`` pixels a side."""

    patch: int
    low: int
    high: int


@dataclass(frozen=True)
class Frozen:
    """A frozen encoder.

    Attributes:
        name: as the user gave it.
        kind: ours, transformers, timm, openvino, random or pixels.
        image_size: pixels a side of its input; ``native``: each image at its own size.
        width: D.
        depth: blocks; 0 where their outputs are not available.
        sha256: of its weights, and of the pixel preprocessing of a model of another origin.
        run: see :class:`FeatureFunction`.
        module: the weights, to be hashed again; None where there are none.
        device: where it runs.
        precision: of the matmuls, fp32, bf16 or fp16 (norms, softmax and the result stay fp32).
        range: input sizes at native; None: squares.
        file: that holds the weights, to be hashed again; None where ``module`` does.
        pixels: preprocessing of a model of another origin; None: the model normalises by itself.
        architecture: see :func:`aimv2.features.fingerprint.architecture`.
    """

    name: str
    kind: str
    image_size: int | str
    width: int
    depth: int
    sha256: str
    run: FeatureFunction
    module: nn.Module | None
    device: torch.device
    precision: str = "fp32"
    range: PatchRange | None = None
    file: Path | None = None
    pixels: Pixels | None = None
    architecture: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def weights_sha256(self) -> str:
        """``sha256``; of raw pixels, which have no weights, their patch and the images that they are of."""
        sizes = f"-{self.range.low}-{self.range.high}" if self.range else ""
        return self.sha256 or f"pixels-{math.isqrt(self.width // 3)}{sizes}"

    def fingerprint(self) -> dict[str, Any]:
        """Its keys of a fingerprint of features."""
        return model_fingerprint(self.weights_sha256, self.architecture, self.precision, self.pixels)

    def view(self, flip: bool = False) -> dict[str, Any]:
        """What :meth:`see` does to an image, for a fingerprint."""
        sizes = self.range._asdict() if self.range else {"crop": CROP, "resize": VIEW}
        return {"image_size": self.image_size, **sizes, "flip": flip}

    @property
    def head(self) -> nn.Module | None:
        """Its attention pooling of patch features, [B, N, D] -> [B, D]; None where it has none."""
        from aimv2.features.foreign import LeftOut

        found = getattr(self.module, "head", None) if self.kind != "timm" else None
        return None if isinstance(found, LeftOut) else found

    @property
    def side(self) -> int:
        """Pixels a side of its square input."""
        assert isinstance(self.image_size, int), "at native there are no squares"
        return self.image_size

    @torch.inference_mode()
    def __call__(self, images: Tensor, layers: Sequence[str] = (LAST,)) -> list[Tensor]:
        """Features of uint8 images [B, 3, H, W], one [B, N, D] a layer, on ``device``.

        ``last`` is the output after the last norm, ``avg6`` the mean of the last six blocks' outputs before it, ``i``
        the output of block i through the last norm.
        """
        with self._as_measured():
            found = self.run(images.to(self.device, non_blocking=True), layers)
        return [x.float() for x in found]

    @torch.inference_mode()
    def each(self, images: Sequence[Tensor], layers: Sequence[str] = (LAST,)) -> list[list[Tensor]]:
        """Features at native of uint8 images [3, H, W] of any sizes: for each layer one [I, D] an image, on ``device``.

        Images are packed in rows without padding and attend only to themselves: equal to one at a time.
        """
        assert self.range is not None
        found: list[list[Tensor]] = [[] for _ in layers]
        for row in packed_rows(images, self.range.patch):
            with self._as_measured():
                parts = self.run([image.to(self.device, non_blocking=True) for image in row], layers)
            for kept, part in zip(found, parts):
                kept += [x.float() for x in part]
        return found

    @contextlib.contextmanager
    def _as_measured(self) -> Iterator[None]:
        """Eager, in the precision of the matmuls."""
        half = HALF.get(self.precision)
        matmuls = torch.autocast(self.device.type, half) if half else contextlib.nullcontext()
        with torch.compiler.set_stance("force_eager"), matmuls:
            yield

    def see(self, image: Image.Image) -> np.ndarray:
        """The test view of an upright RGB image, uint8 [3, H, W]: the centred square, 0.875 of it where the image is larger than
        the input: every pixel as the released evaluation code gives it, and for images that are not larger as the image
        processors of the released models do.

        At native the whole image, resized to the nearest whole number of patches a side and, at its own aspect ratio, into the
        model's range, as in training and in :func:`aimv2.image_transform`. (The released code does not resize it, and its
        convolution drops what does not fill a patch.)
        """
        if self.range is not None:
            return to_pixels(crop_resize(image, (0, 0, *image.size), native_size(*image.size, *self.range)))
        if min(image.size) > self.side:
            return to_pixels(resized_crop(image, self.side, math.ceil(self.side / CROP), round))
        return to_pixels(resized_crop(image, self.side))

    def layer_names(self, layers: str) -> list[str]:
        """``last``, ``avg6``, block numbers with commas (negative ones from the end), or ``all``.

        Raises:
            UsageError: a layer that the encoder does not have.
        """
        if layers == "all":
            if not self.depth:
                raise UsageError(
                    f"--layers all: {self.name} ({self.kind}) gives only its last features", code="unsupported"
                )
            return [*map(str, range(self.depth - 1)), LAST]
        names = []
        for word in str(layers).split(","):
            if word == LAST or (word == AVERAGE and self.depth >= 6):
                names.append(word)
            elif word.lstrip("-").isdigit() and -self.depth <= int(word) < self.depth:
                names.append(str(int(word) % self.depth))
            else:
                blocks = f" or a block, {-self.depth} to {self.depth - 1}," if self.depth else ""
                raise UsageError(
                    f"--layers {word}: last, all, avg6 (six blocks or more){blocks} expected for {self.name}"
                )
        return names

    def unchanged(self) -> bool:
        """Whether the weights are still what they were when the encoder was opened."""
        if self.file is not None:
            return file_hash(self.file) == self.sha256
        return self.module is None or weights_hash(self.module, str(self.pixels or "")) == self.sha256


def packed_rows(images: Sequence[Tensor], patch: int, most: int = ROW) -> Iterator[list[Tensor]]:
    """Groups images [3, H, W] in order, each group of at most ``most`` patches but at least one image."""
    row: list[Tensor] = []
    total = 0
    for image in images:
        count = (image.shape[1] // patch) * (image.shape[2] // patch)
        if row and total + count > most:
            yield row
            row, total = [], 0
        row.append(image)
        total += count
    if row:
        yield row


def open_frozen(
    source: str,
    device: str | torch.device = "cpu",
    image_size: int | str | None = None,
    precision: str = "fp32",
    stats: Stats | None = None,
    options: tuple[str, str] = OPTIONS,
) -> Frozen:
    """Opens an encoder.

    Args:
        source: anything of ours or released (:func:`aimv2.load_model`), a folder or hub id of a ``transformers`` vision
            model, ``timm:NAME`` where timm imports, or a folder that ``aimv2 convert --to openvino`` wrote.
        device: where it runs.
        image_size: pixels a side; the learned positions of a model of another size are interpolated. ``native``: each image
            at its own size (native models, 224 by default).
        precision: of the matmuls: fp32 or bf16.
        stats: mean and std of a model of ``transformers`` or timm; None: those of its image processor.
        options: that gave them, for messages.

    Raises:
        UsageError: nothing that can be loaded, weights that would be random, unknown normalisation of images, features that
            differ from pass to pass, an unknown precision, a size that the model does not take.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision}: fp32 or bf16 expected")
    frozen = _open(source, torch.device(device), image_size, stats, options)
    if image_size is not None and image_size != frozen.image_size:  # a model of another origin
        raise UsageError(f"--image-size {image_size}: {source} ({frozen.kind}) takes only {frozen.image_size} px")
    if isinstance(image_size, int) and isinstance(frozen.module, VisionEncoder):
        try:
            frozen.module.config.check_pixels((1, 3, image_size, image_size))
        except ValueError as error:
            raise UsageError(f"--image-size {image_size}: {error}") from None
    return replace(frozen, precision=precision)


def _open(
    source: str, device: torch.device, image_size: int | str | None, stats: Stats | None, options: tuple[str, str]
) -> Frozen:
    from aimv2.features.foreign import is_foreign, timm_frozen, transformers_frozen
    from aimv2.interop import load, openvino
    from aimv2.interop.shapes import read_json
    from aimv2.models.lit import LiT

    folder = Path(source).expanduser()
    if source.startswith("timm:"):
        return timm_frozen(source, device, stats)
    if (folder / openvino.FILE).is_file():
        refuse_stats(source, stats, options)
        return _openvino(source, folder)
    at = load.locate(source)
    if is_foreign(at.folder):
        return transformers_frozen(source, at.folder, device, stats, options)
    refuse_stats(source, stats, options)
    try:
        model = load.load_model(at, device=device)
    except UsageError as error:
        known = read_json(at.folder / "config.json").get("architecture")  # timm's key
        if error.code != "unsupported" or known is None:
            raise
        raise UsageError(
            f"MODEL {source}: a model of timm ({known}) and no AIMV2; give timm:local-dir:{at.folder} where timm is installed",
            code="unsupported",
        ) from None
    encoder = model.image if isinstance(model, LiT) else model
    assert isinstance(encoder, VisionEncoder)
    return of_encoder(source, encoder, image_size)


def refuse_stats(source: str, stats: Stats | None, options: tuple[str, str] = OPTIONS) -> None:
    """Raises UsageError where a mean and std are given for a model that has its own."""
    if stats is not None:
        raise UsageError(
            f"{' and '.join(options)}: {source} is an AIMV2, which normalises by the mean and std of its own "
            "config.json; leave them out"
        )


def of_encoder(name: str, encoder: VisionEncoder, image_size: int | str | None = None, kind: str = "ours") -> Frozen:
    """A VisionEncoder that is in memory; it is put into evaluation mode."""
    check_size(name, encoder.eval().config, image_size)
    if isinstance(image_size, int) and encoder.config.image_size not in (None, image_size):
        encoder.set_image_size(image_size)
    config = encoder.config
    size = config.image_size or image_size or default_side(config)
    fits = PatchRange(config.patch_size, config.min_patches, config.max_patches) if size == NATIVE else None

    def run(images: Any, layers: Sequence[str]) -> list[Any]:
        last_six = range(config.depth - 6, config.depth) if AVERAGE in layers else ()
        wanted = sorted({*last_six, *(int(name) for name in layers if name not in (LAST, AVERAGE))})
        last, kept = encoder(images, layers=wanted)

        def pick(last: Tensor, kept: Sequence[Tensor]) -> list[Tensor]:
            blocks, found = dict(zip(wanted, kept)), {LAST: last}
            if AVERAGE in layers:
                found[AVERAGE] = torch.stack([blocks[i] for i in last_six]).mean(0)
            return [found[name] if name in found else encoder.norm(blocks[int(name)]) for name in layers]

        if isinstance(images, Tensor):
            return pick(last, kept)
        each = [pick(last[at], [block[at] for block in kept]) for at in range(len(images))]
        return [list(layer) for layer in zip(*each)]

    digest = weights_hash(encoder)
    return Frozen(
        name, kind, size, config.width, config.depth, digest, run, encoder, encoder.mean.device,
        range=fits, architecture=architecture(encoder),
    )  # fmt: skip


def default_side(config: EncoderConfig) -> int:
    """Pixels a side of the square input of a native model: 224, or the nearest in its range."""
    fewest, most = math.isqrt(config.min_patches - 1) + 1, math.isqrt(config.max_patches)
    return config.patch_size * min(max(NATIVE_SIZE // config.patch_size, fewest), most)


def check_size(name: str, config: EncoderConfig, image_size: int | str | None) -> None:
    """
    Raises:
        UsageError: an image size that is no size, or that the model does not take.
    """
    if image_size is None:
        return
    if not (image_size == NATIVE or (isinstance(image_size, int) and image_size > 0)):
        raise UsageError(
            f"--image-size {image_size}: pixels a side, or {NATIVE} (each image at its own size), expected"
        )
    if config.image_size is not None and image_size == NATIVE:
        raise UsageError(
            f"--image-size {NATIVE}: {name} has a fixed grid and takes only {config.image_size} px; leave the option out, or "
            "give a native model",
            code="conflict",
        )
    if config.image_size is not None and isinstance(image_size, int) and image_size % config.patch_size:
        raise UsageError(
            f"--image-size {image_size}: {name} has patches of {config.patch_size} px; a multiple of that is expected"
        )


def random_twin(frozen: Frozen, seed: int = 0) -> Frozen:
    """The same encoder with random weights: a baseline for architecture and probe.

    Raises:
        UsageError: not one of ours.
    """
    if not isinstance(frozen.module, VisionEncoder):
        raise UsageError(f"--baselines random: {frozen.name} ({frozen.kind}) is not an AIMV2", code="unsupported")
    encoder = build(frozen.module.config, None, seed).to(frozen.device)
    assert isinstance(encoder, VisionEncoder)
    twin = of_encoder(f"random {frozen.module.config.name} (seed {seed})", encoder, frozen.image_size, "random")
    return replace(twin, precision=frozen.precision)


def raw_pixels(frozen: Frozen) -> Frozen:
    """The patches' own pixels, normalised, as features: [B, N, 3 * p * p] on the grid of ``frozen``."""
    patch = getattr(getattr(frozen.module, "config", None), "patch_size", None) or frozen.side // 8
    mean, std = (torch.tensor(v, device=frozen.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    def run(images: Any, layers: Sequence[str]) -> list[Any]:
        if not isinstance(images, Tensor):
            found = [pixel_patches((image[None].float() / 255 - mean) / std, patch)[0] for image in images]
            return [found] * len(layers)
        return [pixel_patches((images.float() / 255 - mean) / std, patch)] * len(layers)

    return replace(
        frozen,
        name="raw pixels",
        kind="pixels",
        width=3 * patch * patch,
        depth=0,
        sha256="",
        run=run,
        module=None,
        precision="fp32",
        file=None,
        pixels=None,
        architecture={"patch": patch, "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    )


def _openvino(source: str, folder: Path) -> Frozen:
    """A folder that ``aimv2 convert --to openvino`` wrote, int8 included; on the CPU."""
    from aimv2.interop.openvino import FILE, OpenVINOEncoder

    encoder = OpenVINOEncoder(folder)
    if encoder.about["image_size"] is None:
        raise UsageError(f"MODEL {source}: a native model in OpenVINO; measure the model that it was made from")
    size = encoder.about["image_size"]
    width = encoder(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[-1]
    file = (folder / FILE).with_suffix(".bin").resolve()
    digest = file_hash(file)

    def run(images: Tensor, layers: Sequence[str]) -> list[Tensor]:
        return [encoder(images)] * len(layers)

    shape = {**encoder.about, "graph_sha256": file_hash(folder / FILE)}
    return Frozen(
        source, "openvino", size, width, 0, digest, run, None, torch.device("cpu"), file=file, architecture=shape
    )
