"""Visualise an encoder's features: maps per layer, PCA colours, similarity to a patch, attention.

Legend: B images, h x w patch grid, I = h * w, D width, H heads, d = D / H.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aimv2.errors import UsageError
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import EncoderConfig

LOW, HIGH = 2.0, 98.0  # percentiles mapped to the ends of the colour scale
LAST = "last"

Map = NDArray[np.float32]


class PatchEncoder(Protocol):
    """An encoder of patch features: a :class:`VisionEncoder`, or another model with the same interface."""

    @property
    def config(self) -> EncoderConfig: ...

    @property
    def blocks(self) -> Sized: ...

    @property
    def mean(self) -> Tensor: ...

    @property
    def encode(self) -> Any: ...


@torch.inference_mode()
def patch_maps(encoder: PatchEncoder, images: Tensor, layers: Sequence[int] | None = None) -> dict[str, Map]:
    """Features of every patch (bidirectional attention, after the last norm).

    Args:
        encoder: in evaluation mode.
        images: uint8 [B, 3, H, W], of the encoder's size; moved to its device.
        layers: indices of blocks, negative ones from the end; None: all.

    Returns:
        float32 [B, h, w, D] by the layer's name: its index, or ``last`` for the last block.

    Raises:
        UsageError: a layer out of range.
        ValueError: images of the wrong size.
    """
    depth = len(encoder.blocks)
    wanted = [check_layer(encoder, layer) for layer in (range(depth) if layers is None else layers)]
    grid = grid_of(encoder, images)
    found = encoder.encode(images.to(encoder.mean.device), layers=wanted)
    names = [LAST if layer == depth - 1 else str(layer) for layer in wanted]
    return {name: x.float().unflatten(1, grid).cpu().numpy() for name, x in zip(names, found)}


def pca_rgb(maps: Sequence[Map]) -> list[NDArray[np.uint8]]:
    """First three principal components of all patches as red, green and blue: similar colours mean similar features.

    All maps share one basis and one scale, so that their colours compare. Colours span the 2nd to the 98th percentile; the sign
    of a component makes its largest weight positive, so that the same features give the same colours.

    Args:
        maps: [h, w, D] each, with the same D; h and w may differ.

    Returns:
        uint8 [h, w, 3] each; a component without variance is 128.
    """
    rows = np.concatenate([one.reshape(-1, one.shape[-1]) for one in maps]).astype(np.float64)
    centred = rows - rows.mean(0)
    values, main = main_directions(centred)
    main = main * np.sign(main[np.abs(main).argmax(0), np.arange(main.shape[1])])
    scores = centred @ main
    low, high = np.percentile(scores, [LOW, HIGH], axis=0)
    span = high - low
    flat = values <= 1e-12 * max(float(np.square(rows).sum()), 1e-300)
    scaled = np.where(flat | (span <= 0), 128 / 255, (scores - low) / np.where(span > 0, span, 1))
    colours = np.full((len(rows), 3), 128, np.uint8)
    colours[:, : main.shape[1]] = np.rint(255 * scaled.clip(0, 1)).astype(np.uint8)
    ends = np.cumsum([one.shape[0] * one.shape[1] for one in maps])[:-1]
    return [part.reshape(*one.shape[:2], 3) for part, one in zip(np.split(colours, ends), maps)]


def main_directions(centred: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Top three (or fewer) eigenvalues [K] of the scatter matrix of rows [N, D] and unit eigenvectors [D, K], or zero vectors.

    The smaller of the scatter matrix [D, D] and the Gram matrix [N, N] is decomposed: their nonzero eigenvalues are equal.
    """
    from scipy.linalg import eigh

    rows, width = centred.shape
    scatter = centred @ centred.T if rows < width else centred.T @ centred
    values, vectors = eigh(scatter, subset_by_index=[max(0, len(scatter) - 3), len(scatter) - 1])
    values, vectors = values[::-1], vectors[:, ::-1]
    if rows < width:
        vectors = centred.T @ vectors
        lengths = np.linalg.norm(vectors, axis=0)
        vectors = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return values, vectors


def similarity(map: Map, patch: tuple[int, int], others: Sequence[Map]) -> list[Map]:
    """Cosine similarity of one patch to every patch of other maps.

    Args:
        map: [h, w, D], the map of the patch.
        patch: its row and column.
        others: [h', w', D] each; may include ``map``.

    Returns:
        float32 [h', w'] each, cosine -1..1; 0 where a patch's features are all zero.

    Raises:
        UsageError: a patch outside the map, maps of another width.
    """
    check_patch(patch, (map.shape[0], map.shape[1]))
    query = map[patch].astype(np.float64)
    out = []
    for other in others:
        if other.shape[-1] != len(query):
            raise UsageError(f"maps of one width expected, got {len(query)} and {other.shape[-1]}")
        norms = np.linalg.norm(other.astype(np.float64), axis=-1) * np.linalg.norm(query)
        dots = other.astype(np.float64) @ query
        cosine = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
        out.append(cosine.clip(-1, 1).astype(np.float32))
    return out


@torch.inference_mode()
def attention_maps(encoder: VisionEncoder, image: Tensor, layer: int, patch: tuple[int, int] | None) -> Map:
    """Attention ``softmax(q k / sqrt(d))`` of a patch in each head of a block (bidirectional).

    Args:
        encoder: in evaluation mode.
        image: uint8 [3, H, W], of the encoder's size; moved to its device.
        layer: index of the block, negative ones from the end.
        patch: row and column of the query; None: the mean over all queries.

    Returns:
        float32 [H, h, w]; each head sums to 1.

    Raises:
        UsageError: a layer or a patch out of range.
        ValueError: an image of the wrong size.
    """
    layer = check_layer(encoder, layer)
    grid = grid_of(encoder, image[None])
    if patch is not None:
        check_patch(patch, grid)
    weights = attention_weights(encoder, image, layer)
    chosen = weights.mean(1) if patch is None else weights[:, patch[0] * grid[1] + patch[1]]
    return chosen.unflatten(-1, grid).cpu().numpy()


def attention_weights(encoder: VisionEncoder, image: Tensor, layer: int) -> Tensor:
    """Attention weights of a block for one image uint8 [3, H, W]: fp32 [H, I, I], rows are queries.

    Computed from the block's input without a hook, so that it is thread-safe.
    """
    images = image[None].to(encoder.mean.device)
    if layer == 0:
        x = encoder.embed(images)
    else:
        x = encoder(images, layers=[layer - 1])[1][0]
    block = encoder.blocks[layer]
    q, k, _ = block.attn.split(block.attn.qkv(block.norm1(x)))  # type: ignore[union-attr, operator]
    return (q.float() * q.shape[-1] ** -0.5 @ k.float().transpose(-2, -1)).softmax(-1)[0]


def grid_of(encoder: PatchEncoder, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches of [B, 3, H, W].

    Raises:
        ValueError: images of the wrong size.
    """
    encoder.config.check_pixels(tuple(images.shape))
    patch = encoder.config.patch_size
    return images.shape[2] // patch, images.shape[3] // patch


def check_layer(encoder: PatchEncoder, layer: int) -> int:
    """Index of a block, from 0.

    Raises:
        UsageError: out of range.
    """
    depth = len(encoder.blocks)
    if not -depth <= layer < depth:
        raise UsageError(f"layer {layer}: {encoder.config.name} has layers {-depth} to {depth - 1}")
    return layer % depth


def check_patch(patch: tuple[int, int], grid: tuple[int, int]) -> None:
    """Raise UsageError for a patch outside a grid of (rows, columns)."""
    if not (0 <= patch[0] < grid[0] and 0 <= patch[1] < grid[1]):
        raise UsageError(f"patch {patch[0]},{patch[1]} lies outside the grid of {grid[0]} rows and {grid[1]} columns")
