"""Images of their own size: areas are drawn as the paper says, strips hold the patches, packing changes nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from aimv2.batch import Batch, make_batch
from aimv2.config.schema import ObjectiveConfig
from aimv2.data.stream.native import area_probabilities, draw_area, fit_area, make_native_batch, pack, to_strip
from aimv2.models.create import create_model
from aimv2.models.positions import patchify, pixel_patches
from aimv2.objectives.pretrain import PretrainObjective

PATCH = 4
GRIDS = {16: [(4, 4), (2, 7), (5, 3)], 8: [(2, 4), (1, 7)], 32: [(6, 5), (4, 8)]}


def image(rows: int, columns: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (3, rows * PATCH, columns * PATCH), dtype=np.uint8))


def of_area(area: int) -> Batch:
    grids = GRIDS[area]
    return make_native_batch(
        [image(*grid, area + i) for i, grid in enumerate(grids)],
        [[3 + i, 5, 4][: 3 - i] for i in range(len(grids))],
        [1 + (i * 3) % (h * w - 1) for i, (h, w) in enumerate(grids)],
        PATCH,
        area,
        [f"{area}-{i}" for i in range(len(grids))],
    )


def test_areas_are_the_paper_s() -> None:
    shares = area_probabilities(7, 12)
    assert list(shares) == [128, 256, 512, 1024, 2048, 4096] and sum(shares.values()) == pytest.approx(1)
    rng = np.random.default_rng(0)
    n = rng.normal(size=400_000)
    n = n[abs(n) <= 1] * 2.5 + 9.5  # a normal truncated to [-1, 1], mapped to [7, 12]
    drawn = Counter(2 ** np.clip(np.round(n), 7, 12).astype(int))
    for area, share in shares.items():
        assert share == pytest.approx(drawn[area] / len(n), abs=4e-3)
    assert area_probabilities(8, 8) == {256: 1.0}


def test_mini_batches_of_the_budget_have_the_paper_s_areas() -> None:
    shares, rng, budget = area_probabilities(3, 6), np.random.default_rng(1), 64
    waiting, batches = Counter[int](), Counter[int]()
    for _ in range(60_000):
        area = draw_area(rng, shares)
        waiting[area] += 1
        if waiting[area] * area == budget:
            batches[area] += 1
            waiting[area] = 0
    for area, share in shares.items():
        assert batches[area] / batches.total() == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize(("width", "height", "area"), [(500, 375, 128), (64, 64, 256), (30, 900, 64), (10, 10, 7)])
def test_an_image_fills_its_area_at_its_own_shape(width: int, height: int, area: int) -> None:
    columns, rows = fit_area(width, height, area)
    assert 1 <= columns * rows <= area
    assert (columns + 1) * (rows + 1) > area  # nothing larger in both sides fits
    if area > 60 and max(width, height) / min(width, height) < 2:
        assert columns / rows == pytest.approx(width / height, rel=0.15)


def test_a_strip_holds_the_patches_in_order() -> None:
    whole = image(2, 3, 0)
    strip = to_strip(whole, PATCH)
    assert strip.shape == (3, PATCH, 6 * PATCH)
    for patches in (patchify, pixel_patches):
        assert torch.equal(patches(strip[None], PATCH), patches(whole[None], PATCH))


def test_rows_by_hand() -> None:
    batch = make_native_batch([image(1, 3, 0), image(2, 2, 1)], [[7], [8, 9]], [1, 2], PATCH, 4)
    assert batch.image_len is not None and batch.image_len.tolist() == [3, 4]
    assert batch.places is not None and batch.places.tolist() == [
        [[0, 0], [0, 1], [0, 2], [0, 0]],
        [[0, 0], [0, 1], [1, 0], [1, 1]],
    ]
    # prefix 1 of 3 patches scores positions 0, 1; prefix 2 of 4 scores 1, 2 of the second image
    assert batch.patch_rows[:4].tolist() == [0, 1, 5, 6]
    packed = pack([batch])
    assert packed.patch_rows[:4].tolist() == [0, 1, 4, 5]
    assert int(packed.patch_count) == int(batch.patch_count) == 4
    assert packed.layout is not None and packed.layout.image_groups == ((2, 4),) and packed.layout.groups == ((2, 6),)
    assert packed.layout.image_slots.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert packed.layout.slots[:10].tolist() == [0, 1, 2, 6, 7, 8, 9, 3, 10, 11]
    assert set(packed.layout.slots[10:].tolist()) == {12}


def losses_and_gradients(
    model: nn.Module, objective: PretrainObjective, batches: list[Batch]
) -> dict[str, torch.Tensor]:
    """Summed losses and their gradients over the batches."""
    model.zero_grad()
    found: dict[str, torch.Tensor] = {}
    for batch in batches:
        terms = objective(model, batch)
        sum((total for total, _ in terms.values()), torch.zeros(())).backward()
        for name, (total, count) in terms.items():
            found[name] = found.get(name, torch.zeros(())) + total.detach()
            found[f"{name} count"] = found.get(f"{name} count", torch.zeros(())) + count
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, **grads}


@pytest.mark.parametrize("form", ["joint", "separate", "image", "text", "bidirectional"])
def test_packed_equals_areas_equals_one_at_a_time(form: str) -> None:
    objective = PretrainObjective(
        ObjectiveConfig(
            targets={"image": "image", "text": "text", "bidirectional": "text"}.get(form, "both"),  # type: ignore[arg-type]
            attention="bidirectional" if form == "bidirectional" else "prefix",
        )
    )
    shape = {"decoder_vocab_size": 20, "decoder_separate": form == "separate"}
    shape |= {"decoder_pixels": bool(objective.weights["pixel"]), "decoder_text": bool(objective.weights["text"])}
    model = create_model("aimv2-tiny-patch4-native", decoder=True, seed=0, depth=2, **shape)
    areas = [of_area(area) for area in GRIDS]
    packed = pack(areas)
    assert len(packed) == 7 and packed.images.shape == (1, 3, PATCH, PATCH * (16 + 14 + 15 + 8 + 7 + 30 + 32))
    alone = [
        make_native_batch([image(*grid, area + i)], [[3 + i, 5, 4][: 3 - i]], [1 + (i * 3) % (h * w - 1)], PATCH, h * w)
        for area, grids in GRIDS.items()
        for i, grid in enumerate(grids)
        for h, w in [grid]
    ]
    wanted = losses_and_gradients(model, objective, alone)
    for found in (losses_and_gradients(model, objective, areas), losses_and_gradients(model, objective, [packed])):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_strip_is_seen_like_the_image_itself() -> None:
    model = create_model("aimv2-tiny-patch4-native", seed=0, depth=2, min_patches=4).eval()
    grids = GRIDS[16]
    images = [image(*grid, 16 + i) for i, grid in enumerate(grids)]
    with torch.no_grad():
        found = model.forward_batch(of_area(16), bidirectional=True)
        row = model.forward_batch(pack([of_area(16)]), bidirectional=True)[0]
        for number, one in enumerate(images):
            wanted = model(one[None])[0]
            torch.testing.assert_close(found[number, : len(wanted)], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row, torch.cat([model(one[None])[0] for one in images]), rtol=1e-4, atol=1e-5)


def test_a_square_strip_equals_the_fixed_grid() -> None:
    """The same pairs as strips of one area and as [B, 3, H, W]: a native model gives the same losses."""
    model = create_model(
        "aimv2-tiny-patch4-native", decoder=True, seed=0, depth=2, decoder_vocab_size=20, min_patches=4
    )
    images = [image(4, 4, i) for i in range(3)]
    captions, prefix = [[3, 4], [5], [6, 7, 8]], [2, 9, 15]
    objective = PretrainObjective(ObjectiveConfig())
    plain = objective(model, make_batch(torch.stack(images), captions, prefix, 16))
    strips = objective(model, make_native_batch(images, captions, prefix, PATCH, 16))
    for name in ("text", "pixel"):
        torch.testing.assert_close(strips[name][0], plain[name][0])
