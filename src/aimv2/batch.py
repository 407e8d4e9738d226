"""The batch of image-text pairs that the data pipeline hands to the model, and its collate functions.

Legend: B pairs, G images of them, I patches per image, K of them that the decoder reads, T padded caption length, R caption rows, S scored
patches, N patches of a packed row.

Scored patches and tokens are selected here, on the host, by length only: no boolean indexing later, hence no GPU sync, and no
rule by token id (unlike the released training code).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TEXT_BUCKET = 32  # T is rounded up to a multiple of this
ROW_BUCKET = 32  # so is R
PATCH_BUCKET = 128  # so is S


class PackedLayout(NamedTuple):
    """Attention slots of the rows of a packed batch; see :class:`aimv2.models.layers.Spans`.

    ``image_slots`` int64 [N] and ``image_groups`` cover only the images, ``slots`` int64 [N + R] and ``groups`` the images,
    each followed by its caption. Strips of one area have no ``image_groups``: only the decoder needs slots there, since
    captions follow the real patches.
    """

    image_slots: Tensor
    image_groups: tuple[tuple[int, int], ...]
    slots: Tensor
    groups: tuple[tuple[int, int], ...]

    def to(self, device: torch.device | str) -> PackedLayout:
        moved = (self.image_slots.to(device, non_blocking=True), self.slots.to(device, non_blocking=True))
        return PackedLayout(moved[0], self.image_groups, moved[1], self.groups)


@dataclass
class Batch:
    """B image-text pairs, ready for the device.

    Attributes:
        images: uint8 [G, 3, H, W] in 0..255, or float [G, 3, H, W], already normalised; G is B unless ``image_count`` says
            else. Native training: strips [B, 3, p, A * p], A patches side by side; packed: one strip [1, 3, p, N * p]. Of a
            batch of features [0, 3, 0, 0].
        text: int64 [B, T], right-padded with 0; end of text is the last real token of a caption.
        text_len: int64 [B], real tokens per caption, end of text included; 0 without a caption.
        prefix_len: int64 [B], patches with bidirectional attention, 1..I-1; None: no prefix, no patch is
            scored.
        token_rows: int64 [R], indices of the real tokens into the flat [B * T] text, caption by caption, of conversations those
            of the answers; padding holds B * T.
        patch_rows: int64 [S], indices of the scored image positions into the flat [B * I]; padding holds 0. Position i
            predicts patch i + 1, so a prefix of M scores positions M - 1 .. I - 2 (counted from 0). With ``kept`` the indices
            are into the flat [B * K].
        token_count: int64 [], real entries of ``token_rows``.
        patch_count: int64 [], real entries of ``patch_rows``.
        labels: int64 [B], classes; -1 without one.
        keys: sample keys.
        bad: samples that could not be used since the last batch: name and reason.
        kinds: of each of ``bad``, of conversations.
        kept: int64 [B, K], ascending image positions that the decoder reads; None: all.
        target_rows: int64 [S], with ``kept`` the patch that each scored row predicts, in the flat [B * I], padding 0; None: the
            one after ``patch_rows``.
        places: int64 [B, A, 2] or [1, N, 2], row and column of each patch (native training); None: a fixed grid.
        image_len: int64 [B], real patches of each image (native training).
        layout: slots of a packed row (native training); None: strips of one area, padded with zeros.
        teacher: int8 [B, I, E], stored teacher features for these crops; None: none are stored.
        teacher_scale: float16 [B, I], their scale.
        sources: index of each sample's source in the mixture; [] without a mixture.
        features: of a frozen encoder instead of images: [G, I, D]; of several layers [B, layers, I, D], or with ``image_len``
            [layers, sum of it, D]. None: the batch holds images.
        image_count: int64 [B], images of each row, which stand one after the other, row by row, in ``images`` or ``features``; of
            rows without a prefix, and 0 or more. None: one a row.
        sizes: of conversations, height and width of each image: within its ``images``, of tiles those of the original.
        positions: int64 [B, T] of conversations that share rows: the place of each token in its own; ``image_count`` still has an
            entry for each. None: one a row.
        long: conversations longer than the limit since the last batch.
        targets: boxes of the images (:class:`aimv2.data.stream.regions.RegionTargets`), moved and split with the rest; None: none.
    """

    images: Tensor
    text: Tensor
    text_len: Tensor
    prefix_len: Tensor | None
    token_rows: Tensor
    patch_rows: Tensor
    token_count: Tensor
    patch_count: Tensor
    labels: Tensor
    keys: list[str]
    bad: list[tuple[str, str]]
    kept: Tensor | None = None
    target_rows: Tensor | None = None
    places: Tensor | None = None
    image_len: Tensor | None = None
    layout: PackedLayout | None = None
    teacher: Tensor | None = None
    teacher_scale: Tensor | None = None
    sources: list[int] = field(default_factory=list)
    features: Tensor | None = None
    image_count: Tensor | None = None
    sizes: list[tuple[int, int]] = field(default_factory=list)
    positions: Tensor | None = None
    long: int = 0
    kinds: list[str] = field(default_factory=list)
    targets: Any = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; to an accelerator through pinned memory, so that the copy is asynchronous."""
        tensors = self._tensors()
        if str(device).startswith("cuda"):  # a stream's batches are pinned already, off the training thread
            tensors = {name: value if value.is_pinned() else value.pin_memory() for name, value in tensors.items()}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        targets = None if self.targets is None else self.targets.to(device)
        return replace(self, **moved, layout=self.layout.to(device) if self.layout else None, targets=targets)

    def pin_memory(self) -> Batch:
        """The same batch in pinned memory; PyTorch's DataLoader calls this in its pinning thread."""
        pinned: dict[str, Any] = {name: value.pin_memory() for name, value in self._tensors().items()}
        return replace(self, **pinned, targets=None if self.targets is None else self.targets.pin_memory())

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors by name, except those of the layout."""
        others = ("keys", "bad", "kinds", "layout", "sources", "sizes", "long", "targets")
        return {name: value for name, value in vars(self).items() if name not in others and value is not None}

    def real_tokens(self) -> Tensor:
        """``token_rows`` without padding."""
        return self.token_rows[: int(self.token_count)]

    def __len__(self) -> int:
        return len(self.text if self.positions is None else self.keys)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value`` and at least ``multiple``."""
    return max(1, -(-value // multiple)) * multiple


def scored(prefix_len: Tensor, patches: int, image_len: Tensor | None = None) -> Tensor:
    """Positions whose output predicts a patch outside the prefix.

    Args:
        prefix_len: int64 [B], each in 1..patches-1.
        patches: I, image positions.
        image_len: int64 [B], real patches of each; None: all are real.

    Returns:
        bool [B, I]: for sample b with prefix M the positions M - 1 .. I - 2.
    """
    import torch

    position = torch.arange(patches)
    last = patches if image_len is None else image_len[:, None]
    return (position >= prefix_len[:, None] - 1) & (position < last - 1)


def rows_and_targets(keep: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Indices of the scored outputs, and of the patches that they predict.

    Args:
        keep: result of :func:`scored`, bool [B, I].
        kept: int64 [B, K], positions that the decoder reads; None: all.

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
    """``rows`` int64 [n] padded with ``value`` to a multiple."""
    import torch

    padded = torch.full((round_up(len(rows), multiple),), value, dtype=torch.int64)
    padded[: len(rows)] = rows
    return padded


def _whole_numbers(name: str, values: Sequence[int] | Tensor) -> Tensor:
    """As int64. Raises ValueError for fractions, scores and masks, which would be cut off in silence."""
    import torch

    found = torch.as_tensor(values)
    if found.numel() and (found.is_floating_point() or found.dtype == torch.bool):
        raise ValueError(f"{name}: whole numbers (int64 [B]) expected, got {found.dtype} {list(found.shape)}")
    return found.to(torch.int64)


def _padded_text(
    captions: Sequence[Sequence[int]], width: int, answers: Sequence[Sequence[bool]] | None
) -> tuple[Tensor, Tensor]:
    """Texts as int64 [B, T], right-padded with 0, and the indices of their scored tokens; see :func:`make_batch`."""
    import torch

    text = torch.zeros(len(captions), width, dtype=torch.int64)
    chosen = torch.zeros(len(captions), width, dtype=torch.bool)
    for row, caption in enumerate(captions):
        text[row, : len(caption)] = torch.tensor(caption, dtype=torch.int64)
        chosen[row, : len(caption)] = True if answers is None else torch.tensor(answers[row], dtype=torch.bool)
    return text, chosen.flatten().nonzero().flatten()


def make_batch(
    images: Tensor | None,
    captions: Sequence[Sequence[int]],
    prefix_len: Sequence[int] | Tensor | None,
    patches: int,
    keys: Sequence[str] = (),
    bad: Sequence[tuple[str, str]] = (),
    text_width: int | None = None,
    labels: Sequence[int] | Tensor | None = None,
    kept: Tensor | None = None,
    image_len: Tensor | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
    sources: Sequence[int] = (),
    features: Tensor | None = None,
    image_count: Sequence[int] | Tensor | None = None,
    answers: Sequence[Sequence[bool]] | None = None,
    sizes: Sequence[tuple[int, int]] = (),
) -> Batch:
    """Collate images and tokenised captions, and index what is scored.

    Args:
        images: [G, 3, H, W]; None: ``features`` are given.
        captions: B lists of token ids, each ending with end of text; an empty list is no caption.
        prefix_len: B prefix lengths in 1..patches-1; None: no prefix.
        patches: I, patches per image.
        keys: B sample keys (for messages).
        bad: samples that could not be used.
        text_width: T; by default the longest caption rounded up to its bucket.
        labels: B classes; none by default.
        kept: int64 [B, K], see :class:`Batch`.
        image_len: int64 [B], real patches of each image; None: all I.
        teacher: int8 [B, I, E] and float16 [B, I], see :class:`Batch`.
        sources: B indices into the mixture; none by default.
        features: see :class:`Batch`.
        image_count: B numbers of images, see :class:`Batch`; None: one a row.
        answers: of each text, whether a token is of an answer and scored; None: all are.
        sizes: see :class:`Batch`.

    Raises:
        ValueError: prefix lengths or labels that are not whole numbers.
    """
    import torch

    counts = None if image_count is None else torch.as_tensor(image_count, dtype=torch.int64)
    held = images if features is None else features
    assert counts is None or (prefix_len is None and held is not None and int(counts.sum()) == len(held)), (
        "rows of several images: no prefix, and as many images as they say"
    )
    text_len = torch.tensor([len(caption) for caption in captions], dtype=torch.int64)
    prefix = None if prefix_len is None else _whole_numbers("prefix_len", prefix_len)
    assert prefix is None or patches < 2 or bool(((prefix >= 1) & (prefix < patches)).all()), (
        f"prefix outside 1..{patches - 1}"
    )
    width = text_width or round_up(int(text_len.max()), TEXT_BUCKET)
    text, real = _padded_text(captions, width, answers)
    rows, targets = torch.zeros(0, dtype=torch.int64), None
    if prefix is not None:
        rows, targets = rows_and_targets(scored(prefix, patches, image_len), kept)
    return Batch(
        images=torch.empty(0, 3, 0, 0, dtype=torch.uint8) if images is None else images,
        text=text,
        text_len=text_len,
        prefix_len=prefix,
        token_rows=pad_rows(real, ROW_BUCKET, text.numel()),
        patch_rows=pad_rows(rows, PATCH_BUCKET, 0),
        token_count=torch.tensor(len(real)),
        patch_count=torch.tensor(len(rows)),
        labels=_whole_numbers("labels", [-1] * len(captions) if labels is None else labels),
        keys=list(keys),
        bad=list(bad),
        kept=kept,
        target_rows=None if targets is None else pad_rows(targets, PATCH_BUCKET, 0),
        image_len=image_len,
        teacher=teacher[0] if teacher else None,
        teacher_scale=teacher[1] if teacher else None,
        sources=list(sources),
        features=features,
        image_count=counts,
        sizes=list(sizes),
    )


def captions_of(batch: Batch) -> list[list[int]]:
    """Token ids of each caption, without padding."""
    return [row[:length].tolist() for row, length in zip(batch.text, batch.text_len.tolist())]


def join_batches(batches: Sequence[Batch], patches: int) -> Batch:
    """Concatenate batches, in order (each dataloader worker of a rank gives a part of the rank's batch).

    Each tensor is copied once, and row indices are shifted by the number of preceding pairs; the result equals
    :func:`make_batch` of all pairs. On a machine with a GPU the copies are in pinned memory.

    Args:
        batches: batches with images of one size (not native training).
        patches: I.
    """
    import torch

    if len(batches) == 1:
        return batches[0]
    first, starts = batches[0], list(accumulate(map(len, batches), initial=0))
    text_len = _joined([batch.text_len for batch in batches])
    width = round_up(int(text_len.max()), TEXT_BUCKET)
    text = _empty((starts[-1], width), torch.int64).zero_()
    for start, batch in zip(starts, batches):
        text[start : start + len(batch), : batch.text.shape[1]] = batch.text
    tokens = [
        _restride(batch.real_tokens(), batch.text.shape[1], width, start) for start, batch in zip(starts, batches)
    ]
    places = patches if first.kept is None else first.kept.shape[1]
    rows = [batch.patch_rows[: int(batch.patch_count)] + start * places for start, batch in zip(starts, batches)]
    targets = None
    if first.target_rows is not None:
        shifted = [part.target_rows[: len(row)] + start * patches for start, row, part in zip(starts, rows, batches)]  # type: ignore[index]
        targets = pad_rows(torch.cat(shifted), PATCH_BUCKET, 0)

    def optional(name: str) -> Tensor | None:
        return None if getattr(first, name) is None else _joined([getattr(batch, name) for batch in batches])

    return Batch(
        images=_joined([batch.images for batch in batches]),
        text=text,
        text_len=text_len,
        prefix_len=optional("prefix_len"),
        token_rows=pad_rows(torch.cat(tokens), ROW_BUCKET, text.numel()),
        patch_rows=pad_rows(torch.cat(rows), PATCH_BUCKET, 0),
        token_count=torch.tensor(sum(map(len, tokens))),
        patch_count=torch.tensor(sum(map(len, rows))),
        labels=_joined([batch.labels for batch in batches]),
        keys=[key for batch in batches for key in batch.keys],
        bad=[bad for batch in batches for bad in batch.bad],
        kept=optional("kept"),
        target_rows=targets,
        teacher=optional("teacher"),
        teacher_scale=optional("teacher_scale"),
        sources=[source for batch in batches for source in batch.sources],
        features=optional("features"),
        image_count=optional("image_count"),
        sizes=[size for batch in batches for size in batch.sizes],
        targets=None if first.targets is None else first.targets.joined([batch.targets for batch in batches]),
    )


def split_batch(batch: Batch, parts: int, patches: int) -> list[Batch]:
    """Split into ``parts`` micro-batches of equal size, in order. ``len(batch)`` must be divisible by ``parts``.

    Tensors with one row per pair are views of the batch; token and patch rows are shifted. Each part equals
    :func:`make_batch` of its pairs.
    """
    import torch

    if parts == 1:
        return [batch]
    size, rest = divmod(len(batch), parts)
    assert rest == 0, f"{len(batch)} pairs in {parts} parts"
    wide, places = batch.text.shape[1], patches if batch.kept is None else batch.kept.shape[1]
    pairs = torch.arange(0, len(batch) + 1, size)
    # where the images of each part begin and end
    ends = pairs if batch.image_count is None else torch.cat((pairs[:1], batch.image_count.cumsum(0)))[pairs]
    every, scored_at = batch.real_tokens(), batch.patch_rows[: int(batch.patch_count)]
    token_ends = torch.searchsorted(every, pairs * wide).tolist()
    patch_ends = torch.searchsorted(scored_at, pairs * places).tolist()
    found = []
    for part, at in enumerate(range(0, len(batch), size)):
        own, held = slice(at, at + size), slice(int(ends[part]), int(ends[part + 1]))
        width = round_up(int(batch.text_len[own].max()), TEXT_BUCKET)
        tokens = _restride(every[token_ends[part] : token_ends[part + 1]], wide, width, -at)
        inside = slice(patch_ends[part], patch_ends[part + 1])
        targets = None
        if batch.target_rows is not None:
            targets = pad_rows(batch.target_rows[inside] - at * patches, PATCH_BUCKET, 0)
        found.append(
            Batch(
                images=batch.images[held],
                text=batch.text[own, :width].contiguous(),
                text_len=batch.text_len[own],
                prefix_len=None if batch.prefix_len is None else batch.prefix_len[own],
                token_rows=pad_rows(tokens, ROW_BUCKET, size * width),
                patch_rows=pad_rows(scored_at[inside] - at * places, PATCH_BUCKET, 0),
                token_count=torch.tensor(len(tokens)),
                patch_count=torch.tensor(inside.stop - inside.start),
                labels=batch.labels[own],
                keys=batch.keys[own],
                bad=batch.bad if at == 0 else [],
                kept=None if batch.kept is None else batch.kept[own],
                target_rows=targets,
                teacher=None if batch.teacher is None else batch.teacher[own],
                teacher_scale=None if batch.teacher_scale is None else batch.teacher_scale[own],
                sources=batch.sources[own],
                features=None if batch.features is None else batch.features[held],
                image_count=None if batch.image_count is None else batch.image_count[own],
                sizes=batch.sizes[held],
                targets=None if batch.targets is None else batch.targets.part(at, at + size),
            )
        )
    return found


def _restride(rows: Tensor, old: int, new: int, pairs: int) -> Tensor:
    """Indices into a flat [B * ``old``] as indices into a flat [B' * ``new``], shifted by ``pairs`` pairs."""
    return (rows // old + pairs) * new + rows % old


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    import torch

    return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenated rows, by one copy."""
    import torch

    out = _empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    return torch.cat(list(parts), out=out)
