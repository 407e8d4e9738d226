"""The encoder in JAX and MLX: one pure function of parameters and pixels, in the API that the two libraries share.

Legend: B images, h x w patch grid, I = h * w, p patch side, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from aimv2.errors import UsageError, need
from aimv2.models.encoder import VisionEncoder
from aimv2.models.layers import NORM_EPS
from aimv2.models.positions import sincos_positions
from aimv2.models.sizes import EncoderConfig, wrong_image_dtype

BACKENDS = ("torch", "jax", "mlx")
Params = dict[str, Any]


def rms_norm(xp: ModuleType, x: Any, weight: Any) -> Any:
    """[..., D] -> [..., D]."""
    return x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + NORM_EPS) * weight


def attention(xp: ModuleType, x: Any, qkv: Any, proj: Any, heads: int) -> Any:
    """Bidirectional attention [B, I, D] -> [B, I, D]."""
    batch, length, width = x.shape
    parts = xp.transpose(xp.reshape(x @ qkv.T, (batch, length, 3, heads, width // heads)), (2, 0, 3, 1, 4))
    q, k, v = parts[0], parts[1], parts[2]
    scores = (q * (width // heads) ** -0.5) @ xp.transpose(k, (0, 1, 3, 2))
    weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    weights = weights / xp.sum(weights, axis=-1, keepdims=True)
    return xp.reshape(xp.transpose(weights @ v, (0, 2, 1, 3)), (batch, length, width)) @ proj.T


def swiglu(xp: ModuleType, x: Any, gate_up: Any, down: Any) -> Any:
    """[B, I, D] -> [B, I, D]."""
    both = x @ gate_up.T
    gate, up = both[..., : down.shape[1]], both[..., down.shape[1] :]
    return (gate / (1 + xp.exp(-gate)) * up) @ down.T


def encode(xp: ModuleType, config: EncoderConfig, params: Params, images: Any) -> Any:
    """Normalised pixels [B, 3, H, W] -> features [B, I, D] after the last norm.

    Args:
        xp: jax.numpy or mlx.core.
        config: the encoder's shape.
        params: arrays by the names of the torch model's parameters.
        images: float32.
    """
    patch, (batch, _, height, width) = config.patch_size, images.shape
    h, w = height // patch, width // patch
    x = xp.reshape(images[:, :, : h * patch, : w * patch], (batch, 3, h, patch, w, patch))
    x = xp.reshape(xp.transpose(x, (0, 2, 4, 1, 3, 5)), (batch, h * w, 3 * patch * patch))
    kernel = params["patch_embed.proj.weight"]
    x = x @ xp.reshape(kernel, (kernel.shape[0], -1)).T + params["patch_embed.proj.bias"]
    x = rms_norm(xp, x, params["patch_embed.norm.weight"])
    fixed = config.image_size is not None
    x = x + (params["patch_embed.position"] if fixed else xp.array(sincos_positions(h, w, config.width).numpy()))
    for i in range(config.depth):
        p = partial(lambda i, key: params[f"blocks.{i}.{key}.weight"], i)
        x = x + attention(xp, rms_norm(xp, x, p("norm1")), p("attn.qkv"), p("attn.proj"), config.heads)
        x = x + swiglu(xp, rms_norm(xp, x, p("norm2")), p("mlp.gate_up"), p("mlp.down"))
    return rms_norm(xp, x, params["norm.weight"])


class ArrayEncoder:
    """An encoder in another array library.

    Attributes:
        config: the encoder's shape.
        params: arrays by the names of the torch model's parameters.
        apply: the pure function (params, normalised float [B, 3, H, W]) -> [B, I, D], ready for ``jit``.
    """

    def __init__(self, xp: ModuleType, config: EncoderConfig, params: Params) -> None:
        self.xp, self.config, self.params = xp, config, params
        self.apply: Callable[[Params, Any], Any] = partial(encode, xp, config)

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which takes no module: its name, and NumPy's arrays."""
        return _of_module, (
            self.xp.__name__,
            self.config,
            {key: np.asarray(value) for key, value in self.params.items()},
        )

    def normalize(self, images: np.ndarray) -> Any:
        """uint8 0..255 -> float32 ``(x / 255 - mean) / std``; float images pass unchanged."""
        images = np.asarray(images)
        if images.dtype != np.uint8:
            if not np.issubdtype(images.dtype, np.floating) and not str(images.dtype).startswith("bfloat"):
                raise ValueError(wrong_image_dtype(images.dtype))
            return self.xp.array(images)
        mean, std = (np.asarray(value, np.float32).reshape(1, 3, 1, 1) for value in (self.config.mean, self.config.std))
        return self.xp.array((images.astype(np.float32) / 255 - mean) / std)

    def __call__(self, images: Any) -> Any:
        """uint8 or normalised float [B, 3, H, W] -> [B, I, D].

        Raises:
            ValueError: integers other than uint8, floats of magnitudes above 20, or an unsupported image shape.
        """
        self.config.check_pixels(tuple(images.shape))
        if len(images) and (str(images.dtype) == "uint8" or "float" in str(images.dtype)):
            self.config.check_values(float(images.min()), float(images.max()), str(images.dtype) == "uint8")
        return self.apply(self.params, self.normalize(images))


def _of_module(name: str, config: EncoderConfig, params: Params) -> ArrayEncoder:
    """An :class:`ArrayEncoder` that was pickled."""
    xp = import_module(name)
    return ArrayEncoder(xp, config, {key: xp.array(value) for key, value in params.items()})


def to_arrays(encoder: Any, backend: str) -> ArrayEncoder:
    """Convert a torch encoder to another array library, in fp32.

    Args:
        encoder: VisionEncoder; a pooling head is left out.
        backend: ``jax`` or ``mlx``.

    Raises:
        UsageError: another kind of model; the extra is not installed.
    """
    if not isinstance(encoder, VisionEncoder):
        raise UsageError(f"backend={backend!r}: an image encoder is expected, got {type(encoder).__name__}")
    need(backend, backend, f"backend={backend!r}")
    if backend == "jax":
        import jax.numpy as xp
    else:
        import mlx.core as xp  # type: ignore[no-redef]
    state = encoder.state_dict().items()
    params = {key: xp.array(value.float().numpy()) for key, value in state if not key.startswith("head.")}
    return ArrayEncoder(xp, encoder.config, params)
