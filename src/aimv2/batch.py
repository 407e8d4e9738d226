"""The one thing that travels from data to model: a batch of image-text pairs.

Legend: B pairs, I patches an image, K of them that the decoder sees, T padded caption length, R caption rows, S scored
patches, N patches of a packed row.

Which patches and tokens are scored is decided here, on the host, from lengths alone: no boolean indexing later, so
no wait for a GPU, and no rule by token id (unlike the released training code).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TEXT_BUCKET = 32  # T is rounded up to a multiple of this
ROW_BUCKET = 32  # so is R
PATCH_BUCKET = 128  # so is S


class Layout(NamedTuple):
    """Where the rows of a packed batch lie for attention; see :class:`aimv2.models.layers.Spans`.

    ``image_slots`` int64 [N] and ``image_groups`` are of the images alone, ``slots`` int64 [N + R] and ``groups`` of the
    images, each followed by its caption. Strips of one area have no ``image_groups``: only the decoder, whose captions
    follow the real patches, needs to know.
    """

    image_slots: Tensor
    image_groups: tuple[tuple[int, int], ...]
    slots: Tensor
    groups: tuple[tuple[int, int], ...]

    def to(self, device: torch.device | str) -> Layout:
        moved = (self.image_slots.to(device, non_blocking=True), self.slots.to(device, non_blocking=True))
        return Layout(moved[0], self.image_groups, moved[1], self.groups)


@dataclass
class Batch:
    """B image-text pairs, ready for the device.

    Attributes:
        images: uint8 [B, 3, H, W] in 0..255, or float [B, 3, H, W], already normalised. Native training: strips
            [B, 3, p, A * p], A patches side by side; packed: one strip [1, 3, p, N * p].
        text: int64 [B, T], right-padded with 0; end of text is the last real token of a caption.
        text_len: int64 [B], real tokens a caption, end of text counted; 0 without a caption.
        prefix_len: int64 [B], patches that see each other, 1..I-1.
        token_rows: int64 [R], places in the flat [B * T] text of the real tokens, caption by caption; padding holds
            B * T.
        patch_rows: int64 [S], places in the flat [B * I] image positions whose output is scored; padding holds 0.
            Position i predicts patch i + 1, so a prefix of M scores positions M - 1 .. I - 2 (counted from 0). Where the
            decoder sees some positions alone, in the flat [B * K] of those.
        token_count: int64 [], real entries of ``token_rows``.
        patch_count: int64 [], real entries of ``patch_rows``.
        labels: int64 [B], classes; -1 without one.
        keys: the samples' names.
        bad: samples that could not be decoded since the last batch, with the reason.
        kept: int64 [B, K], ascending image positions that the decoder sees; None: all.
        target_rows: int64 [S], with ``kept`` the patch that each scored row predicts, in the flat [B * I], padding 0; None: the
            one after ``patch_rows``.
        places: int64 [B, A, 2] or [1, N, 2], row and column of each patch (native training); None: a fixed grid.
        image_len: int64 [B], real patches of each image (native training).
        layout: of a packed row (native training); None: strips of one area, padded with zeros.
        teacher: int8 [B, I, E], stored features of a teacher for these crops; None: none are stored.
        teacher_scale: float16 [B, I], their unit.
        sources: places of the samples' sources in the mixture; [] where there is none.
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
    kept: Tensor | None = None
    target_rows: Tensor | None = None
    places: Tensor | None = None
    image_len: Tensor | None = None
    layout: Layout | None = None
    teacher: Tensor | None = None
    teacher_scale: Tensor | None = None
    sources: list[int] = field(default_factory=list)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; to an accelerator through pinned memory, so that nothing waits for the copy."""
        parts = {name: value for name, value in vars(self).items() if name not in ("keys", "bad", "layout", "sources")}
        tensors = {name: value for name, value in parts.items() if value is not None}
        if str(device).startswith("cuda"):
            tensors = {name: value.pin_memory() for name, value in tensors.items()}
        moved = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved, layout=self.layout.to(device) if self.layout else None)

    def __len__(self) -> int:
        return len(self.text)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value`` and at least ``multiple``."""
    return max(1, -(-value // multiple)) * multiple


def scored(prefix_len: Tensor, patches: int, image_len: Tensor | None = None) -> Tensor:
    """Positions whose output predicts a patch outside the prefix.

    Args:
        prefix_len: int64 [B], each in 1..patches-1.
        patches: I, places for patches an image.
        image_len: int64 [B], real patches of each; None: all are real.

    Returns:
        bool [B, I]: for sample b with prefix M the positions M - 1 .. I - 2.
    """
    import torch

    position = torch.arange(patches)
    last = patches if image_len is None else image_len[:, None]
    return (position >= prefix_len[:, None] - 1) & (position < last - 1)


def scored_rows(prefix_len: Tensor, patches: int) -> Tensor:
    """:func:`scored` as int64 [sum(I - M)], indices into [B * I]."""
    return scored(prefix_len, patches).flatten().nonzero().flatten()


def rows_and_targets(keep: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Where the outputs lie that are scored, and the patches that they predict.

    Args:
        keep: of :func:`scored`, bool [B, I].
        kept: int64 [B, K], positions that the decoder sees; None: all.

    Returns:
        int64 [S] into the flat [B * I] or with ``kept`` [B * K], and with ``kept`` int64 [S] into the flat [B * I].
    """
    import torch

    if kept is None:
        return keep.flatten().nonzero().flatten(), None
    place = kept + torch.arange(len(keep))[:, None] * keep.shape[1]  # [B, K]
    chosen = keep.gather(1, kept)
    return chosen.flatten().nonzero().flatten(), place[chosen] + 1


def pad_rows(rows: Tensor, multiple: int, value: int) -> Tensor:
    """``rows`` int64 [n] filled with ``value`` up to a multiple."""
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
    kept: Tensor | None = None,
    image_len: Tensor | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
    sources: Sequence[int] = (),
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
        kept: int64 [B, K], see :class:`Batch`.
        image_len: int64 [B], real patches of each image; None: all I.
        teacher: int8 [B, I, E] and float16 [B, I], see :class:`Batch`.
        sources: B places in the mixture; none by default.
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
    rows, targets = rows_and_targets(scored(prefix, patches, image_len), kept)
    return Batch(
        images=images,
        text=text,
        text_len=text_len,
        prefix_len=prefix,
        token_rows=pad_rows(real, ROW_BUCKET, text.numel()),
        patch_rows=pad_rows(rows, PATCH_BUCKET, 0),
        token_count=torch.tensor(len(real)),
        patch_count=torch.tensor(len(rows)),
        labels=torch.as_tensor([-1] * len(captions) if labels is None else labels, dtype=torch.int64),
        keys=list(keys),
        bad=list(bad),
        kept=kept,
        target_rows=None if targets is None else pad_rows(targets, PATCH_BUCKET, 0),
        image_len=image_len,
        teacher=teacher[0] if teacher else None,
        teacher_scale=teacher[1] if teacher else None,
        sources=list(sources),
    )


def taught(batch: Batch) -> tuple[Tensor, Tensor] | None:
    """Features of a teacher and their unit, where the batch brings them."""
    if batch.teacher is None or batch.teacher_scale is None:
        return None
    return batch.teacher, batch.teacher_scale


def captions_of(batch: Batch) -> list[list[int]]:
    """The token ids of each caption, padding left out."""
    return [row[:length].tolist() for row, length in zip(batch.text, batch.text_len.tolist())]


def join_batches(batches: Sequence[Batch], patches: int) -> Batch:
    """One batch of all pairs, in order (each data worker of a rank gives a part of the rank's batch)."""
    import torch

    if len(batches) == 1:
        return batches[0]
    stored = [pair for batch in batches if (pair := taught(batch)) is not None]
    return make_batch(
        torch.cat([batch.images for batch in batches]),
        [caption for batch in batches for caption in captions_of(batch)],
        torch.cat([batch.prefix_len for batch in batches]),
        patches,
        [key for batch in batches for key in batch.keys],
        [bad for batch in batches for bad in batch.bad],
        labels=torch.cat([batch.labels for batch in batches]),
        kept=None
        if batches[0].kept is None
        else torch.cat([batch.kept for batch in batches if batch.kept is not None]),
        teacher=(torch.cat([one for one, _ in stored]), torch.cat([unit for _, unit in stored])) if stored else None,
        sources=[source for batch in batches for source in batch.sources],
    )


def split_batch(batch: Batch, parts: int, patches: int) -> list[Batch]:
    """``parts`` micro-batches of equal size, in order. ``len(batch)`` must be divisible by ``parts``."""
    if parts == 1:
        return [batch]
    size, rest = divmod(len(batch), parts)
    assert rest == 0, f"{len(batch)} pairs in {parts} parts"
    captions, stored = captions_of(batch), taught(batch)
    return [
        make_batch(
            batch.images[at : at + size],
            captions[at : at + size],
            batch.prefix_len[at : at + size],
            patches,
            batch.keys[at : at + size],
            batch.bad if at == 0 else (),
            labels=batch.labels[at : at + size],
            kept=None if batch.kept is None else batch.kept[at : at + size],
            teacher=None if stored is None else (stored[0][at : at + size], stored[1][at : at + size]),
            sources=batch.sources[at : at + size],
        )
        for at in range(0, len(batch), size)
    ]
