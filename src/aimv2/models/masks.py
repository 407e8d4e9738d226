"""Boolean attention masks, pure functions of lengths. True = may attend; rows are queries, columns are keys."""

import torch
from torch import Tensor


def causal_mask(length: int, device: torch.device | str | None = None) -> Tensor:
    """Causal mask: each position attends to itself and earlier ones (decoder, AIMV2, Figure 1).

    Returns:
        bool [length, length].
    """
    position = torch.arange(length, device=device)
    return position[None, :] <= position[:, None]


def prefix_mask(prefix_len: Tensor, length: int) -> Tensor:
    """Prefix mask: causal, and every position attends to the first ``prefix_len`` ones (encoder, AIMV2, Figure 1).

    Args:
        prefix_len: int [B], each in 1..length.
        length: N.

    Returns:
        bool [B, N, N]: ``column <= row or column < prefix_len[b]``.

    Raises:
        ValueError: lengths that are not whole numbers.
    """
    if prefix_len.is_floating_point() or prefix_len.dtype == torch.bool:
        raise ValueError(f"prefix_len: int64 [B] expected, got {prefix_len.dtype} {list(prefix_len.shape)}")
    position = torch.arange(length, device=prefix_len.device)
    return causal_mask(length, prefix_len.device) | (position < prefix_len[:, None])[:, None, :]


def cached_mask(cached: int, new: int, device: torch.device | str | None = None) -> Tensor:
    """Causal mask of ``new`` positions that follow ``cached`` ones in a key-value cache.

    Returns:
        bool [new, cached + new].
    """
    return causal_mask(cached + new, device)[cached:]
