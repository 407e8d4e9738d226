"""The picture of a section: rows, what stands below, tokens on their tints."""

from __future__ import annotations

import numpy as np

from aimv2.report.blocks import Section, Shot, Strip, Table, Tinted
from aimv2.report.sheet import GAP, LINE, TINT, draw_sheet

RED = np.full((8, 8, 3), (200, 0, 0), np.uint8)
WIDE = np.full((4, 8, 3), (0, 0, 200), np.uint8)
WHITE = 255


def section(*strips: Strip) -> Section:
    return Section("name", "Title", blocks=[Table(("a",), [("b",)]), *strips])


def test_a_section_without_pictures_has_none() -> None:
    assert draw_sheet(section()) is None


def test_pictures_stand_in_a_grid_with_words_below() -> None:
    bare = draw_sheet(section(Strip("", [Shot(RED), Shot(WIDE)])), side=32)
    assert bare is not None and bare.shape == (32 + 2 * GAP, 2 * 32 + 3 * GAP, 3)
    assert (bare[GAP : GAP + 32, GAP : GAP + 32] == RED[0, 0]).all()
    assert (bare[GAP : GAP + 16, 2 * GAP + 32 : 2 * GAP + 64] == WIDE[0, 0]).all()
    assert (bare[GAP + 16 :, 2 * GAP + 32 :] == WHITE).all()  # a wide picture is half as high
    words = draw_sheet(section(Strip("", [Shot(RED, "red"), Shot(WIDE)])), side=32)
    assert words is not None and words.shape[0] == bare.shape[0] + LINE
    written = words[GAP + 32 : GAP + 32 + LINE]
    assert (written[:, : GAP + 32] < 200).any() and (written[:, GAP + 33 :] == WHITE).all()


def test_a_word_that_is_too_long_stays_below_its_picture() -> None:
    sheet = draw_sheet(section(Strip("", [Shot(RED, "a very long word indeed"), Shot(RED)])), side=32)
    assert sheet is not None
    assert (sheet[GAP + 32 :, GAP + 32 :] == WHITE).all()


def test_tokens_stand_beside_one_picture_and_below_several() -> None:
    tokens = [Tinted("sheep", "2.1", 1.0), Tinted("grass", "0.0", 0.0)]
    beside = draw_sheet(section(Strip("", [Shot(RED)], tokens)), side=64)
    below = draw_sheet(section(Strip("", [Shot(RED), Shot(RED)], tokens)), side=64)
    assert beside is not None and below is not None
    tinted = (beside == TINT).all(-1)
    assert tinted[: GAP + 64, 64 + GAP :].sum() > 100 and not tinted[:, : 64 + GAP].any()
    assert beside.shape[0] < below.shape[0]
    tinted = (below == TINT).all(-1)
    assert tinted[GAP + 64 :].sum() > 100 and not tinted[: GAP + 64].any()


def test_many_tokens_break_into_lines() -> None:
    few, many = ([Tinted(f"word {at}", "1.0", 0.5) for at in range(count)] for count in (2, 60))
    short, long = (draw_sheet(section(Strip("", [Shot(RED)], tokens)), side=64) for tokens in (few, many))
    assert short is not None and long is not None
    assert long.shape[1] == short.shape[1] and long.shape[0] > short.shape[0]
    assert (long[:, -GAP:] == WHITE).all()
