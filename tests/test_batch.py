"""Which patches and tokens are scored follows from lengths alone, and regrouping pairs loses nothing."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aimv2.batch import (
    PATCH_BUCKET,
    ROW_BUCKET,
    TEXT_BUCKET,
    Batch,
    captions_of,
    join_batches,
    make_batch,
    round_up,
    scored,
    split_batch,
)

PATCHES = 9


def pairs(captions: list[list[int]], prefix: list[int], patches: int = PATCHES) -> Batch:
    count = len(captions)
    images = torch.arange(count * 3 * 6 * 6).remainder(256).to(torch.uint8).view(count, 3, 6, 6)
    return make_batch(images, captions, prefix, patches, [f"key-{i}" for i in range(count)], ["broken: cut"])


def same(left: Batch, right: Batch) -> None:
    for name, value in vars(left).items():
        other = getattr(right, name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype and torch.equal(value, other), name
        else:
            assert value == other, name


def test_scored_rows_by_hand() -> None:
    # I = 5; prefix 1 leaves patches 1..4 to predict, from positions 0..3; prefix 4 leaves patch 4, from position 3
    assert scored(torch.tensor([1, 4, 3]), 5).flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 12, 13]


def test_batch_by_hand() -> None:
    batch = pairs([[5, 0, 2], [], [2]], [8, 7, 8])
    assert len(batch) == 3 and batch.text.shape == (3, TEXT_BUCKET)
    assert batch.text[0, :4].tolist() == [5, 0, 2, 0] and batch.text_len.tolist() == [3, 0, 1]
    assert batch.token_rows.tolist() == [0, 1, 2, 2 * TEXT_BUCKET] + [3 * TEXT_BUCKET] * (ROW_BUCKET - 4)
    assert batch.patch_rows.tolist() == [7, 15, 16, 25] + [0] * (PATCH_BUCKET - 4)
    assert (batch.token_count.item(), batch.patch_count.item()) == (4, 4)
    assert batch.keys == ["key-0", "key-1", "key-2"] and batch.bad == ["broken: cut"]


def test_scored_rows_among_kept_positions_by_hand() -> None:
    # I = 9; prefix 3 scores positions 2..7; of the kept 0, 2, 5, 8 these are 2 and 5, at rows 1 and 2, and predict 3 and 6
    kept = torch.tensor([[0, 2, 5, 8], [1, 3, 4, 7]])
    images = torch.zeros(2, 3, 6, 6, dtype=torch.uint8)
    batch = make_batch(images, [[1], [2]], [3, 8], PATCHES, kept=kept)
    assert batch.target_rows is not None and int(batch.patch_count) == 3
    assert batch.patch_rows[:3].tolist() == [1, 2, 7] and batch.target_rows[:3].tolist() == [3, 6, 17]
    same(join_batches(split_batch(batch, 2, PATCHES), PATCHES), batch)


@pytest.mark.parametrize("stored", [False, True])
def test_rows_of_several_images_or_none_are_split_and_joined(stored: bool) -> None:
    count = [2, 0, 1, 3, 0, 1]
    held = torch.arange(7 * 4 * 5).view(7, 4, 5).float()
    what = {"features": held} if stored else {"images": held.unsqueeze(1).expand(7, 3, 4, 5).to(torch.uint8)}
    batch = make_batch(what.get("images"), [[1]] * 6, None, PATCHES, image_count=count, features=what.get("features"))
    parts = split_batch(batch, 3, PATCHES)
    images = [part.features if stored else part.images for part in parts]
    assert [len(image) for image in images] == [2, 4, 1] and images[1].flatten()[0] == held.to(images[1].dtype)[2, 0, 0]
    assert [part.image_count.tolist() for part in parts] == [[2, 0], [1, 3], [0, 1]]
    same(join_batches(parts, PATCHES), batch)
    with pytest.raises(AssertionError, match="as many images"):
        make_batch(held, [[1]] * 6, None, PATCHES, image_count=[1] * 6)


def test_buckets() -> None:
    assert [round_up(n, 16) for n in (0, 1, 16, 17)] == [16, 16, 16, 32]
    batch = pairs([[1] * 17, [1] * 20], [1, 1], patches=81)
    assert batch.text.shape == (2, 32) and len(batch.token_rows) == 64 and len(batch.patch_rows) == 256


def test_no_caption_at_all_still_has_a_shape() -> None:
    batch = pairs([[], []], [1, 2])
    assert batch.text.shape == (2, TEXT_BUCKET) and batch.token_count.item() == 0
    assert (batch.token_rows == 2 * TEXT_BUCKET).all()


@pytest.mark.parametrize("prefix", [0, PATCHES])
def test_prefix_outside_its_range_is_refused(prefix: int) -> None:
    with pytest.raises(AssertionError, match="prefix"):
        pairs([[1]], [prefix])


def test_to_moves_every_tensor_and_nothing_else() -> None:
    batch = pairs([[1, 2]], [3])
    moved = batch.to("meta")
    tensors = {name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 9 and all(getattr(moved, name).device.type == "meta" for name in tensors)
    assert moved.keys == batch.keys and moved.bad == batch.bad and batch.images.device.type == "cpu"


@st.composite
def drawn(draw: st.DrawFn) -> Batch:
    count = draw(st.sampled_from([2, 4, 6]))
    captions = draw(st.lists(st.lists(st.integers(0, 9), max_size=20), min_size=count, max_size=count))
    prefix = draw(st.lists(st.integers(1, PATCHES - 1), min_size=count, max_size=count))
    return pairs(captions, prefix)


@settings(max_examples=40, deadline=None)
@given(drawn(), st.booleans())
def test_split_then_join_is_the_same_batch(batch: Batch, halves: bool) -> None:
    parts = split_batch(batch, 2 if halves else len(batch), PATCHES)
    assert sum(int(part.token_count) for part in parts) == int(batch.token_count)
    assert sum(int(part.patch_count) for part in parts) == int(batch.patch_count)
    same(join_batches(parts, PATCHES), batch)


@settings(max_examples=40, deadline=None)
@given(drawn())
def test_rows_point_at_real_tokens_and_predictable_patches(batch: Batch) -> None:
    rows = batch.token_rows[: batch.token_count]
    assert batch.text.flatten()[rows].tolist() == [token for caption in captions_of(batch) for token in caption]
    assert captions_of(batch) == [row[:n].tolist() for row, n in zip(batch.text, batch.text_len.tolist())]
    scored = batch.patch_rows[: batch.patch_count].tolist()
    wanted = {(b, i) for b, m in enumerate(batch.prefix_len.tolist()) for i in range(m, PATCHES)}
    assert {divmod(row + 1, PATCHES) for row in scored} == wanted and len(scored) == len(wanted)


@st.composite
def every_kind(draw: st.DrawFn) -> list[Batch]:
    """Parts of a batch as workers give them: captions of other lengths, kept positions, a stored teacher, or neither."""
    count, seed = draw(st.sampled_from([1, 2, 4])), draw(st.integers(0, 99))
    parts, kept, teacher = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.booleans())
    rng, found = torch.Generator().manual_seed(seed), []
    for _ in range(parts):
        captions = draw(st.lists(st.lists(st.integers(0, 9), max_size=70), min_size=count, max_size=count))
        prefix = draw(st.lists(st.integers(1, PATCHES - 1), min_size=count, max_size=count))
        rows = torch.stack([torch.randperm(PATCHES, generator=rng)[:4].sort().values for _ in range(count)])
        features = (
            torch.randint(-9, 9, (count, PATCHES, 2), generator=rng).to(torch.int8),
            torch.rand(count, PATCHES, generator=rng),
        )
        found.append(
            make_batch(
                torch.randint(0, 256, (count, 3, 6, 6), generator=rng, dtype=torch.uint8), captions, prefix, PATCHES,
                [f"key-{seed}-{i}" for i in range(count)], [f"bad-{len(found)}"], labels=list(range(count)),
                kept=rows if kept else None, teacher=features if teacher else None, sources=[len(found)] * count,
            )
        )  # fmt: skip
    return found


def collated_anew(batches: list[Batch], own: slice, bad: list[str]) -> Batch:
    """What :func:`make_batch` makes of some of the pairs of several batches: caption by caption, the slow way."""

    def of(name: str) -> torch.Tensor | None:
        values = [getattr(batch, name) for batch in batches]
        return None if values[0] is None else torch.cat(values)[own]

    captions = [caption for batch in batches for caption in captions_of(batch)][own]
    teacher = (of("teacher"), of("teacher_scale")) if batches[0].teacher is not None else None
    return make_batch(
        of("images"), captions, of("prefix_len"), PATCHES, [key for batch in batches for key in batch.keys][own], bad,
        labels=of("labels"), kept=of("kept"), teacher=teacher,
        sources=[source for batch in batches for source in batch.sources][own],
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(every_kind(), st.booleans())
def test_joined_and_split_batches_are_those_collated_anew(parts: list[Batch], single: bool) -> None:
    """One copy and shifted rows give bit for bit what rebuilding every caption gave."""
    joined = join_batches(parts, PATCHES)
    bad = [name for part in parts for name in part.bad]
    same(joined, collated_anew(parts, slice(None), bad))
    size = 1 if single or len(joined) % 2 else len(joined) // 2
    for number, part in enumerate(split_batch(joined, len(joined) // size, PATCHES)):
        same(part, collated_anew(parts, slice(number * size, (number + 1) * size), [] if number else bad))
        assert part.text.is_contiguous()


def test_nothing_is_collated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining and splitting look at no caption."""
    parts = [pairs([[1, 2], [3]], [1, 2]), pairs([[4] * 40, []], [3, 8])]
    for name in ("make_batch", "captions_of"):
        monkeypatch.setattr(f"aimv2.batch.{name}", None)
    assert len(split_batch(join_batches(parts, PATCHES), 2, PATCHES)) == 2


def test_what_is_pinned_is_not_pinned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training thread copies nothing but what no stream has pinned."""
    batch, done = pairs([[1, 2], [3]], [1, 2]), list[torch.Tensor]()

    def pin(value: torch.Tensor) -> torch.Tensor:
        done.append(value)
        return value

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", lambda value, *_, **__: value)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda value: any(value is one for one in done))
    batch.to("cuda:0")
    assert len(done) == 9
    batch.to("cuda:0")
    assert len(done) == 9
    pinned = batch.pin_memory()
    assert len(done) == 18 and pinned.keys == batch.keys
    from torch.utils.data._utils.pin_memory import pin_memory

    assert isinstance(pin_memory(batch, "cuda"), Batch) and len(done) == 27


def test_one_part_is_the_batch_itself() -> None:
    batch = pairs([[1], [2]], [1, 1])
    assert split_batch(batch, 1, PATCHES)[0] is batch and join_batches([batch], PATCHES) is batch
    with pytest.raises(AssertionError, match="3 parts"):
        split_batch(batch, 3, PATCHES)


def test_undecodable_samples_are_reported_once_after_a_split() -> None:
    batch = replace(pairs([[1], [2]], [1, 1]), bad=["a", "b"])
    assert [part.bad for part in split_batch(batch, 2, PATCHES)] == [["a", "b"], []]


def test_a_batch_without_a_prefix_scores_no_patch() -> None:
    def plain(captions: list[list[int]]) -> Batch:
        return make_batch(torch.zeros(len(captions), 4, 8), captions, None, 0)

    captions = [[5, 6, 1], [7, 1], [8, 9, 2, 1], [1]]
    whole = plain(captions)
    assert whole.prefix_len is None and int(whole.patch_count) == 0 and not whole.patch_rows.any()
    for part, own in zip(split_batch(whole, 2, 16), (captions[:2], captions[2:]), strict=True):
        same(part, plain(own))
    same(join_batches([plain(captions[:1]), plain(captions[1:])], 16), whole)
