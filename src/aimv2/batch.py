"""The one thing that travels from data to model: a batch of image-text pairs.

Legend: B pairs, I patches an image, T padded caption length, R caption rows, S scored patches.

Which patches and tokens are scored is decided here, on the host, from lengths alone: no boolean indexing later, so
no wait for a GPU, and no rule by token id (unlike the released training code).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TEXT_BUCKET = 32  # T is rounded up to a multiple of this
ROW_BUCKET = 32  # so is R
PATCH_BUCKET = 128  # so is S


@dataclass
class Batch:
    """B image-text pairs, ready for the device.

    Attributes:
        images: uint8 [B, 3, H, W] in 0..255, or float [B, 3, H, W], already normalised.
        text: int64 [B, T], right-padded with 0; end of text is the last real token of a caption.
        text_len: int64 [B], real tokens a caption, end of text counted; 0 without a caption.
        prefix_len: int64 [B], patches that see each other, 1..I-1.
        token_rows: int64 [R], places in the flat [B * T] text of the real tokens, caption by caption; padding holds
            B * T.
        patch_rows: int64 [S], places in the flat [B * I] image positions whose output is scored; padding holds 0.
            Position i predicts patch i + 1, so a prefix of M scores positions M - 1 .. I - 2 (counted from 0).
        token_count: int64 [], real entries of ``token_rows``.
        patch_count: int64 [], real entries of ``patch_rows``.
        labels: int64 [B], classes; -1 without one.
        keys: the samples' names.
        bad: samples that could not be decoded since the last batch, with the reason.
    """

    images: Tensor
    text: Tensor
    text_len: Tensor
    prefix_len: Tensor
    token_rows: Tensor
    patch_rows: Tensor
    token_count: Tensor
    patch_count: Tensor
    labels: Tensor
    keys: list[str]
    bad: list[str]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; to an accelerator through pinned memory, so that nothing waits for the copy."""
        tensors = {name: value for name, value in vars(self).items() if name not in ("keys", "bad")}
        if str(device).startswith("cuda"):
            tensors = {name: value.pin_memory() for name, value in tensors.items()}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})

    def __len__(self) -> int:
        return self.images.shape[0]


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value`` and at least ``multiple``."""
    return max(1, -(-value // multiple)) * multiple


def scored_rows(prefix_len: Tensor, patches: int) -> Tensor:
    """Flat positions whose output predicts a patch outside the prefix.

    Args:
        prefix_len: int64 [B], each in 1..patches-1.
        patches: I, patches an image.

    Returns:
        int64 [sum(I - M)], indices into [B * I]: for sample b with prefix M the positions M - 1 .. I - 2.
    """
    import torch

    position = torch.arange(patches)
    keep = (position >= prefix_len[:, None] - 1) & (position < patches - 1)  # [B, I]
    return keep.flatten().nonzero().flatten()


def _pad(rows: Tensor, multiple: int, value: int) -> Tensor:
    import torch

    padded = torch.full((round_up(len(rows), multiple),), value, dtype=torch.int64)
    padded[: len(rows)] = rows
    return padded


def make_batch(
    images: Tensor,
    captions: Sequence[Sequence[int]],
    prefix_len: Sequence[int] | Tensor,
    patches: int,
    keys: Sequence[str] = (),
    bad: Sequence[str] = (),
    text_width: int | None = None,
    labels: Sequence[int] | Tensor | None = None,
) -> Batch:
    """Collates images and tokenised captions and lists what will be scored.

    Args:
        images: [B, 3, H, W].
        captions: B lists of token ids, each ending with end of text; an empty list is no caption.
        prefix_len: B prefix lengths in 1..patches-1.
        patches: I, patches an image.
        keys: B names (for messages).
        bad: undecodable samples met on the way.
        text_width: T; by default the longest caption rounded up to its bucket.
        labels: B classes; none by default.
    """
    import torch

    text_len = torch.tensor([len(caption) for caption in captions], dtype=torch.int64)
    prefix = torch.as_tensor(prefix_len, dtype=torch.int64)
    assert patches < 2 or bool(((prefix >= 1) & (prefix < patches)).all()), f"prefix outside 1..{patches - 1}"
    width = text_width or round_up(int(text_len.max()), TEXT_BUCKET)
    text = torch.zeros(len(captions), width, dtype=torch.int64)
    for row, caption in enumerate(captions):
        text[row, : len(caption)] = torch.tensor(caption, dtype=torch.int64)
    real = (torch.arange(width) < text_len[:, None]).flatten().nonzero().flatten()
    scored = scored_rows(prefix, patches)
    return Batch(
        images=images,
        text=text,
        text_len=text_len,
        prefix_len=prefix,
        token_rows=_pad(real, ROW_BUCKET, text.numel()),
        patch_rows=_pad(scored, PATCH_BUCKET, 0),
        token_count=torch.tensor(len(real)),
        patch_count=torch.tensor(len(scored)),
        labels=torch.as_tensor([-1] * len(captions) if labels is None else labels, dtype=torch.int64),
        keys=list(keys),
        bad=list(bad),
    )


def captions_of(batch: Batch) -> list[list[int]]:
    """The token ids of each caption, padding left out."""
    return [row[:length].tolist() for row, length in zip(batch.text, batch.text_len.tolist())]


def join_batches(batches: Sequence[Batch], patches: int) -> Batch:
    """One batch of all pairs, in order (each data worker of a rank gives a part of the rank's batch)."""
    import torch

    if len(batches) == 1:
        return batches[0]
    return make_batch(
        torch.cat([batch.images for batch in batches]),
        [caption for batch in batches for caption in captions_of(batch)],
        torch.cat([batch.prefix_len for batch in batches]),
        patches,
        [key for batch in batches for key in batch.keys],
        [bad for batch in batches for bad in batch.bad],
        labels=torch.cat([batch.labels for batch in batches]),
    )


def split_batch(batch: Batch, parts: int, patches: int) -> list[Batch]:
    """``parts`` micro-batches of equal size, in order. ``len(batch)`` must be divisible by ``parts``."""
    if parts == 1:
        return [batch]
    size, rest = divmod(len(batch), parts)
    assert rest == 0, f"{len(batch)} pairs in {parts} parts"
    captions = captions_of(batch)
    return [
        make_batch(
            batch.images[at : at + size],
            captions[at : at + size],
            batch.prefix_len[at : at + size],
            patches,
            batch.keys[at : at + size],
            batch.bad if at == 0 else (),
            labels=batch.labels[at : at + size],
        )
        for at in range(0, len(batch), size)
    ]
