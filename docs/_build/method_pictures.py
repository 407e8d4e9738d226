"""Pictures of the method, drawn from the functions that training runs: masks, scored positions, targets, schedules."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aimv2.batch import Batch, make_batch
from aimv2.config.schema import OptimConfig
from aimv2.data.scenes import draw_scene
from aimv2.models.create import create_model
from aimv2.models.masks import causal_mask, prefix_mask
from aimv2.models.positions import unpatchify
from aimv2.objectives.pretrain import pixel_targets, text_targets
from aimv2.train.schedule import learning_rate

PATCHES = 5
SEEN, HIDDEN, PREFIX, TEXT, INK = "#3f51b5", "#eceff1", "#c5cae9", "#ffe0b2", "#263238"
CELL, GAP = 26, 34
WORDS = ["a", "red", "ring", "[EOS]"]


def pictures() -> dict[str, str | bytes]:
    """Every picture by its file name."""
    return {
        "encoder-mask.svg": encoder_masks(),
        "decoder-mask.svg": decoder_mask(),
        "positions.svg": positions(),
        "targets.png": targets(),
        "schedules.svg": schedules(),
    }


def svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    """A picture on white, so that it reads on a dark page too."""
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' width='{width:g}' role='img'>"
    return "\n".join(
        [
            head,
            f"<title>{label}</title>",
            f"<rect width='{width:g}' height='{height:g}' fill='#fff'/>",
            *parts,
            "</svg>",
        ]
    )


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12) -> str:
    return f"<text x='{x:g}' y='{y:g}' text-anchor='{anchor}' fill='{INK}' font-family='sans-serif' font-size='{size}'>{words}</text>"


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' fill='{fill}' stroke='#fff'/>"


def matrix(mask: Tensor, x: float, y: float, names: Sequence[str], title: str) -> list[str]:
    """A mask: rows ask, columns answer, filled = may attend."""
    rows = mask.tolist()
    parts = [text(x + CELL * len(rows) / 2, y - 24, title)]
    for r, row in enumerate(rows):
        parts += [
            text(x - 6, y + CELL * (r + 0.65), names[r], "end"),
            text(x + CELL * (r + 0.5), y - 6, names[r], size=10),
        ]
        parts += [box(x + CELL * c, y + CELL * r, CELL, CELL, SEEN if may else HIDDEN) for c, may in enumerate(row)]
    return parts


def encoder_masks() -> str:
    """:func:`prefix_mask` of five patches at four prefix lengths; the whole length is what a frozen encoder uses."""
    lengths = [1, 2, 4, PATCHES]
    masks = prefix_mask(torch.tensor(lengths), PATCHES)
    names, step = [str(i + 1) for i in range(PATCHES)], CELL * PATCHES + GAP
    parts: list[str] = []
    for at, (length, mask) in enumerate(zip(lengths, masks)):
        title = f"prefix {length}" if length < PATCHES else "after training"
        parts += matrix(mask, 30 + at * step, 46, names, title)
    return svg(30 + step * len(lengths), 60 + CELL * PATCHES, parts, "attention masks of the encoder")


def decoder_mask() -> str:
    """:func:`causal_mask` over the image and then the caption."""
    names = [str(i + 1) for i in range(PATCHES)] + ["BOS", *WORDS[:-1]]
    side = CELL * len(names)
    return svg(
        side + 60, side + 60, matrix(causal_mask(len(names)), 46, 46, names, "decoder"), "attention mask of the decoder"
    )


def batch_of(image: np.ndarray, words: int, prefix: int, patch: int) -> Batch:
    """A batch of one pair, as training collates it; token ids are places in the caption."""
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    patches = (image.shape[0] // patch) * (image.shape[1] // patch)
    return make_batch(pixels, [list(range(words))], [prefix], patches)


def positions() -> str:
    """The prediction of each decoder position, from a batch: patches after the prefix, and every token."""
    prefix, width = 2, 74
    batch = batch_of(np.zeros((8, 8 * PATCHES, 3), np.uint8), len(WORDS), prefix, 8)
    scored = set(batch.patch_rows[: int(batch.patch_count)].tolist())
    tokens = text_targets(batch)[: int(batch.token_count)].tolist()
    inputs = [f"patch {i + 1}" for i in range(PATCHES)] + ["[BOS]", *WORDS[:-1]]
    outputs = [f"patch {i + 2}" if i in scored else "" for i in range(PATCHES)] + [WORDS[token] for token in tokens]
    parts = [text(8, 24, "predicts", "start"), text(8, 98, "sees", "start")]
    for at, (below, above) in enumerate(zip(inputs, outputs)):
        x = 70 + at * width
        fill = TEXT if at >= PATCHES else PREFIX if at < prefix else "#9fa8da"
        parts += [box(x, 78, width - 4, 30, fill), text(x + width / 2 - 2, 97, below)]
        if above:
            parts += [box(x, 6, width - 4, 28, HIDDEN), text(x + width / 2 - 2, 24, above)]
            parts.append(f"<path d='M{x + width / 2 - 2:g} 76 v-36 m-4 7 l4 -7 l4 7' stroke='{INK}' fill='none'/>")
    parts.append(text(70, 128, "light: the prefix; darker: patches after it; orange: the caption", "start"))
    return svg(74 + width * len(inputs), 138, parts, "what each position predicts")


def targets() -> bytes:
    """A scene with its prefix, and the pixel targets where they are predicted: three panels of one PNG."""
    side, patch, prefix = 128, 16, 20
    grid = side // patch
    image = draw_scene(np.random.default_rng(7), side).image
    encoder: Any = create_model("aimv2-tiny-patch8-32", seed=0, image_size=side, patch_size=patch)
    batch = batch_of(image, 1, prefix, patch)
    count = int(batch.patch_count)
    wanted = pixel_targets(encoder, batch)[:count]  # [S, P]
    canvas = torch.full((1, grid * grid, wanted.shape[1]), 2.0)
    canvas[0, batch.patch_rows[:count] + 1] = wanted
    normal = unpatchify(canvas, patch, grid, grid)[0].permute(1, 2, 0)
    shown = ((normal.clamp(-2, 2) + 2) / 4 * 255).byte().numpy()
    masked = (np.asarray(image) * 0.25 + 190).astype(np.uint8)
    for place in range(prefix):
        rows, columns = (slice(n * patch, (n + 1) * patch) for n in divmod(place, grid))
        masked[rows, columns] = image[rows, columns]
    panels = [np.kron(lined(panel, patch), np.ones((2, 2, 1), np.uint8)) for panel in (np.asarray(image), masked, shown)]
    blank = np.full((panels[0].shape[0], 16, 3), 255, np.uint8)
    out = io.BytesIO()
    Image.fromarray(np.concatenate([panels[0], blank, panels[1], blank, panels[2]], axis=1)).save(
        out, "PNG", optimize=True
    )
    return out.getvalue()


def lined(image: np.ndarray, patch: int) -> np.ndarray:
    """With the grid of patches on it."""
    image = image.copy()
    image[::patch] = image[:, ::patch] = 255
    return image


def schedules() -> str:
    """:func:`learning_rate` over a run of 1,000 steps, each schedule at the same peak."""
    width, height, steps = 520, 170, 1000
    colours = {"cosine": SEEN, "half-cosine": "#00897b", "constant": "#8d6e63", "cooldown": "#e65100"}
    parts = [f"<path d='M40 10 V{height} H{width + 40}' stroke='{INK}' fill='none'/>"]
    for at, (name, colour) in enumerate(colours.items()):
        config = OptimConfig(lr=1e-3, warmup=100, schedule=name)  # type: ignore[arg-type]
        rates = [learning_rate(step, steps, config) for step in range(0, steps, 5)]
        points = " ".join(
            f"{40 + width * i / len(rates):.1f},{height - (height - 20) * rate / 1e-3:.1f}"
            for i, rate in enumerate(rates)
        )
        parts += [f"<polyline points='{points}' stroke='{colour}' stroke-width='2' fill='none'/>"]
        parts += [box(width + 60, 14 + 22 * at, 14, 14, colour), text(width + 80, 26 + 22 * at, name, "start")]
    parts += [text(36, 24, "1e-3", "end", 10), text(width / 2 + 40, height + 16, "steps, 100 of them warm-up")]
    return svg(width + 160, height + 26, parts, "learning-rate schedules")
