"""The vision encoder: patches in, features out (AIMV2, Table 1).

Legend: B images, h x w patch grid, I = h * w, p patch side, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.batch import Batch
from aimv2.models.layers import NORM_EPS, Block, Documents, dtype_of, prefix_attention_mask, prefix_spans
from aimv2.models.pool import AttentionPool
from aimv2.models.positions import patchify, resize_positions, sincos_at, sincos_positions
from aimv2.models.sizes import EncoderConfig, wrong_image_dtype


class PatchProjection(nn.Conv2d):
    """A convolution of stride p, computed as one matmul: [B, 3, H, W] -> [B, D, h, w], a view of [B, I, D]."""

    def forward(self, images: Tensor) -> Tensor:
        patch = self.kernel_size[0]
        x = F.linear(patchify(images, patch), self.weight.flatten(1), self.bias)
        return x.transpose(1, 2).unflatten(2, (images.shape[2] // patch, images.shape[3] // patch))


class PatchEmbed(nn.Module):
    """Patch projection, RMSNorm, position."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = PatchProjection(3, config.width, config.patch_size, config.patch_size)
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        if config.image_size is not None:
            self.position = nn.Parameter(torch.empty(1, config.patches, config.width))

    def forward(self, images: Tensor, places: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] -> [B, I, D]; ``places`` int64 [B, I, 2]: row and column of each patch, where images are strips."""
        x = self.proj(images).flatten(2).transpose(1, 2)
        x = self.norm(x.to(dtype_of(self)))  # under autocast the matmul is bf16, the residual stream is not
        grid = images.shape[2] // self.config.patch_size, images.shape[3] // self.config.patch_size
        if self.config.image_size is not None:
            return x + resize_positions(self.position, grid)
        if places is not None:
            return x + sincos_at(places, self.config.width).to(x.dtype)
        return x + sincos_positions(*grid, self.config.width, x.device).to(x.dtype)


def not_images(found: object, wanted: str = "a tensor [B, 3, H, W] is") -> TypeError:
    """The error for anything that is no tensor of images, and how to make one."""
    return TypeError(
        f"images: {wanted} expected, got {type(found).__module__}.{type(found).__qualname__}; aimv2.image_transform(model) makes "
        "tensors of PIL images, torch.from_numpy of arrays, torch.stack of a list of tensors"
    )


def _readable(images: Tensor) -> bool:
    """Whether images hold values that can be looked at: eager, not traced, nor of a subclass without values of its own."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    plain = type(images).__torch_dispatch__ is Tensor.__torch_dispatch__  # not so of fake and sharded tensors
    if not plain or images.is_meta or not images.numel() or torch._C._functorch.is_functorch_wrapped_tensor(images):
        return False
    if images.dtype == torch.uint8:
        return images.device.type == "cpu"
    return images.is_floating_point() and not (images.is_cuda and torch.cuda.is_current_stream_capturing())


class VisionEncoder(nn.Module):
    """ViT with RMSNorm, SwiGLU, no class token and no trunk bias; prefix or bidirectional attention.

    ``model(images)`` is the frozen encoder that downstream tasks use. uint8 images are normalised inside with the model's
    own mean and std; float images count as normalised already.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.hidden) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.head = AttentionPool(config.width, config.pool_heads) if config.pool_heads else None
        self.compiled = False  # set where the blocks are compiled: selects the form of the mask
        self.frozen = False  # set by the training step while only the decoder is trained: runs under no_grad
        self.looked = False  # at images whose check made an accelerator wait
        self.mean: Tensor
        self.std: Tensor
        for name in ("mean", "std"):
            self.register_buffer(name, torch.empty(1, 3, 1, 1, dtype=torch.float32), persistent=False)
        self.fill_constants()

    def fill_constants(self) -> None:
        """Write mean and std (buffers of a model built on the meta device are empty)."""
        for buffer, values in ((self.mean, self.config.mean), (self.std, self.config.std)):
            buffer.copy_(torch.tensor(values).view(1, 3, 1, 1))

    @torch.no_grad()
    def set_image_size(self, image_size: int) -> None:
        """Change the image size in place: learned positions are interpolated (bicubic, antialiased).

        A fixed-size model used at another size without training at it loses accuracy (AIMV2, Table 6).

        Raises:
            ValueError: a native model, or a size that is not a multiple of the patch size.
        """
        if self.config.image_size is None:
            raise ValueError(f"{self.config.name} is native: it takes images of any size as it is")
        config = replace(self.config, image_size=image_size)
        if image_size < config.patch_size or image_size % config.patch_size:
            raise ValueError(f"image_size must be a multiple of the patch size, {config.patch_size}, got {image_size}")
        side = image_size // config.patch_size
        resized = resize_positions(self.patch_embed.position, (side, side))
        self.patch_embed.position = nn.Parameter(resized, self.patch_embed.position.requires_grad)
        self.config = self.patch_embed.config = config

    def config_dict(self) -> dict[str, Any]:
        """The encoder's part of ``config.json``."""
        return asdict(self.config)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 0..255 -> float32 ``(x / 255 - mean) / std``; float images pass unchanged.

        In evaluation mode a warning, once a process, says that all pixels lie in 0..1; not under compilation, export or tracing.
        On an accelerator while gradients are recorded only the first images are looked at: it waits for the device.

        Raises:
            ValueError: another integer type, or in evaluation mode float images of magnitudes above 20.
        """
        waits = images.device.type != "cpu" and torch.is_grad_enabled()
        if not self.training and not (waits and self.looked) and _readable(images):
            self.looked = waits
            low, high = torch.stack(images.aminmax()).tolist()
            self.config.check_values(low, high, images.dtype == torch.uint8)
        if images.dtype == torch.uint8:
            return (images.float() / 255 - self.mean) / self.std
        if not images.is_floating_point():
            raise ValueError(wrong_image_dtype(images.dtype))
        return images

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        prefix_len: Tensor | None = None,
        layers: Sequence[int] | None = None,
        strips: Batch | None = None,
    ) -> Any:
        """Encode images.

        Args:
            images: uint8 or normalised float [B, 3, H, W]; or, without a prefix, a list of [3, H, W] of different sizes
                (packed without padding, equal to one at a time; native models).
            prefix_len: int64 [B], each in 1..I-1: prefix attention (training). None: bidirectional.
            layers: indices of blocks whose outputs are returned too (before the last norm; negative counts from the end).
            strips: the native training batch whose places and layout those of ``images`` are; see :meth:`forward_batch`.

        Returns:
            [B, I, D] after the last norm, or for a list a list of [I, D]; with ``layers`` a pair of that and a list of
            the same for each layer.

        Raises:
            TypeError: arrays or PIL images instead of tensors.
            ValueError: a layer out of range, images of the wrong size or range of values, a list with a prefix, a prefix of another
                type or shape.
        """
        if self.frozen and torch.is_grad_enabled():
            with torch.no_grad():
                return self.forward(images, prefix_len, layers, strips)
        depth = len(self.blocks)
        if isinstance(layers, int) or not all(hasattr(layer, "__index__") for layer in layers or ()):
            raise TypeError(f"layers: a list of whole numbers, such as [-1], is expected, got {layers!r}")
        if not all(-depth <= layer < depth for layer in layers or ()):
            raise ValueError(f"layers must be {-depth} to {depth - 1}, got {layers}")
        wanted = [layer % depth for layer in layers or ()]
        if not isinstance(images, Tensor):
            if prefix_len is not None:
                raise ValueError("prefix_len goes with one tensor [B, 3, H, W]; a list of images is bidirectional")
            return self._forward_list(images, wanted, layers is None)
        x = self.embed(images, None if strips is None else strips.places)
        layout = None if strips is None else strips.layout
        mask: Any = None
        if prefix_len is not None and layout is not None and layout.image_groups:
            mask = prefix_spans(layout.image_slots, layout.image_groups, prefix_len)
        elif prefix_len is not None:
            whole = isinstance(prefix_len, Tensor) and prefix_len.dtype in (torch.int64, torch.int32)
            if not whole or prefix_len.shape != x.shape[:1]:
                given = [getattr(prefix_len, key, "") for key in ("dtype", "shape")] if whole else [prefix_len]
                raise ValueError(
                    f"prefix_len must be int64 [{len(x)}], patches of each image, got {' '.join(map(str, given))}"
                )
            compiled = self.compiled and torch.is_grad_enabled()  # evaluation runs eager
            mask = prefix_attention_mask(prefix_len, x.shape[1], compiled)
        x, kept = self._trunk(x, mask, wanted)
        return x if layers is None else (x, kept)

    def forward_features(self, images: Tensor | Sequence[Tensor]) -> Any:
        """The same as calling the encoder: timm's name for features per patch after the last norm, [B, I, D]."""
        return self(images)

    def forward_batch(self, batch: Batch, bidirectional: bool = False) -> Tensor:
        """Features of a training batch, with prefix attention unless ``bidirectional``: [B, I, D]; a packed batch [1, N, D]."""
        if batch.places is None:
            return self(batch.images, None if bidirectional else batch.prefix_len)
        assert batch.image_len is not None and batch.prefix_len is not None
        prefix = batch.image_len if bidirectional else batch.prefix_len  # padding after an image is never attended to
        return self(batch.images, prefix, strips=batch)

    def embed(self, images: Tensor, places: Tensor | None = None) -> Tensor:
        """uint8 or normalised float [B, 3, H, W] -> [B, I, D], with positions; ``places``: see :meth:`PatchEmbed.forward`."""
        if places is None:
            self.config.check_pixels(tuple(images.shape))
        return self.patch_embed(self.normalize(images).to(dtype_of(self)), places)

    def _trunk(self, x: Tensor, mask: Any, wanted: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        kept: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            x = block(x, mask)
            if index in wanted:
                kept[index] = x
        return self.norm(x), [kept[index] for index in wanted]

    def _forward_list(self, images: Sequence[Tensor], wanted: Sequence[int], plain: bool) -> Any:
        """Images [3, H, W] of any sizes, packed in one row; see :meth:`forward`."""
        listed = isinstance(images, list | tuple)
        for one in images if listed else [images]:
            if not listed or not isinstance(one, Tensor):
                raise not_images(one, "a tensor [B, 3, H, W] or a list of tensors [3, H, W] is")
            if one.ndim != 3:
                raise ValueError(f"images of a list must be [3, H, W] each, got {list(one.shape)}")
        if not images:
            raise ValueError("images: at least one is expected, got an empty list")
        rows = [self.embed(image[None])[0] for image in images]
        lengths = tuple(len(row) for row in rows)
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=rows[0].device)
        x, kept = self._trunk(torch.cat(rows)[None], Documents(lengths, starts), wanted)
        out, *inner = (list(part[0].split(lengths)) for part in (x, *kept))
        return out if plain else (out, inner)

    def pooled(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """[B, 3, H, W], or a list of B images [3, H, W] -> [B, D] through the pooling head.

        Raises:
            ValueError: the model has none.
        """
        head, features = self._pooling_head(), self(images)
        if isinstance(features, Tensor):
            return head(features)
        return torch.cat([head(x[None]) for x in features])

    def _pooling_head(self) -> AttentionPool:
        if self.head is None:
            raise ValueError(f"{self.config.name} has no pooling head; pool='mean' gives the mean of the patches")
        return self.head

    def encode(
        self,
        images: Tensor | Sequence[Tensor],
        layers: Sequence[int] | None = None,
        pool: str | None = None,
        as_map: bool = False,
    ) -> Any:
        """Features per patch, pooled, or as a spatial map.

        Args:
            images: uint8 or normalised float [B, 3, H, W], or a list of [3, H, W] (native models: of any sizes).
            layers: blocks whose outputs are returned, each through the last norm; None: only the last.
            pool: ``none`` or None for all patches, ``mean`` of the patches, or ``attention``: the pooling head, where the
                model has one.
            as_map: [B, D, h, w] instead of [B, I, D]; without ``pool``.

        Returns:
            [B, I, D], [B, D] or [B, D, h, w], or for a list a list of one each (without the B); with ``layers`` a list
            of that.

        Raises:
            ValueError: an unknown pool, a pool and a map at once, no pooling head, images of the wrong size.
        """
        if pool not in (None, "none", "mean", "attention"):
            raise ValueError(f"pool: 'none', 'mean' or 'attention' expected, got {pool!r}")
        if as_map and pool not in (None, "none"):
            raise ValueError(f"as_map gives all patches; pool='{pool}' gives none of them: choose one")
        if pool == "attention":
            self._pooling_head()
        if layers is None:
            found = [self(images)]
        else:
            hidden = self(images, layers=layers)[1]
            found = [[self.norm(x) for x in one] if isinstance(one, list) else self.norm(one) for one in hidden]
        if isinstance(images, Tensor):
            out: list[Any] = [self._form(one, images, pool, as_map) for one in found]
        else:
            out = [[self._form(x[None], image, pool, as_map)[0] for x, image in zip(one, images)] for one in found]
        return out[0] if layers is None else out

    def _form(self, features: Tensor, images: Tensor, pool: str | None, as_map: bool) -> Tensor:
        if pool == "mean":
            return features.mean(dim=1)
        if pool == "attention":
            return self._pooling_head()(features)
        if as_map:
            patch = self.config.patch_size
            return features.transpose(1, 2).unflatten(2, (images.shape[-2] // patch, images.shape[-1] // patch))
        return features
