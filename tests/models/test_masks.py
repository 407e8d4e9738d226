"""Masks, drawn: rows ask, columns answer, x = may attend."""

import torch
from torch import Tensor

from aimv2.models.masks import cached_mask, causal_mask, prefix_mask


def drawing(mask: Tensor) -> list[str]:
    assert mask.dtype == torch.bool
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


def test_causal() -> None:
    assert drawing(causal_mask(5)) == [
        "x....",
        "xx...",
        "xxx..",
        "xxxx.",
        "xxxxx",
    ]


def test_prefix_one_sample_each() -> None:
    one, three, all_ = prefix_mask(torch.tensor([1, 3, 5]), 5)
    assert drawing(one) == drawing(causal_mask(5))  # all see the first position anyway
    assert drawing(three) == [
        "xxx..",
        "xxx..",
        "xxx..",
        "xxxx.",
        "xxxxx",
    ]
    assert drawing(all_) == ["xxxxx"] * 5


def test_cached() -> None:
    assert drawing(cached_mask(3, 2)) == [
        "xxxx.",
        "xxxxx",
    ]
    assert drawing(cached_mask(0, 5)) == drawing(causal_mask(5))
    assert drawing(cached_mask(4, 1)) == ["xxxxx"]


def test_true_means_may_attend() -> None:
    """The polarity that scaled_dot_product_attention reads: a position that may see only itself returns its value."""
    value = torch.arange(5.0).view(1, 1, 5, 1)
    zero = torch.zeros(1, 1, 5, 1)
    out = torch.nn.functional.scaled_dot_product_attention(zero, zero, value, attn_mask=causal_mask(5))
    torch.testing.assert_close(out.flatten(), torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0]))
