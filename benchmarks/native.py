"""Images of mixed sizes in one call: packed without padding beside padding to the largest, as one JSON object.

    python benchmarks/native.py [--rounds 7] [--model aimv2-base-patch14-native]

Both see the same images, 112 to 1,024 patches each, in turns. The padded path pads tokens with zeros to the longest image and
masks them, as one does without packing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from turns import in_turns

GRIDS = ((8, 14), (16, 16), (12, 20), (32, 32), (10, 30), (9, 13), (16, 24), (11, 11))  # rows x columns of patches


def images(torch: Any, patch: int) -> list[Any]:
    """Normalised images of the grids."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(3, rows * patch, columns * patch, generator=draw) for rows, columns in GRIDS]


def packed(name: str, precision: str) -> tuple[Any, list[Any]]:
    """This package: a list in, a list out."""
    torch, model, half = prepare(name, precision)

    def run(batch: list[Any]) -> None:
        with torch.inference_mode(), half:
            model(batch)

    return run, [images(torch, model.config.patch_size)]


def padded(name: str, precision: str) -> tuple[Any, list[Any]]:
    """Every image's tokens padded to the longest, padding masked."""
    torch, model, half = prepare(name, precision)
    longest = max(rows * columns for rows, columns in GRIDS)

    def run(batch: list[Any]) -> None:
        with torch.inference_mode(), half:
            rows = [model.patch_embed(image[None])[0] for image in batch]
            x = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
            real = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]  # [B, N]
            for block in model.blocks:
                x = block(x, real[:, None, None, :])
            model.norm(x)

    return run, [images(torch, model.config.patch_size)]


def prepare(name: str, precision: str) -> tuple[Any, Any, Any]:
    """torch, the model with random weights, and the precision's context."""
    import contextlib

    import torch

    from aimv2.models.create import create_model
    from aimv2.models.matmul import fast_matmul

    fast_matmul(torch.device("cpu"))
    half = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    return torch, create_model(name, seed=0).eval(), half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, at least 7 for a figure to quote")
    parser.add_argument("--model", default="aimv2-base-patch14-native")
    options = parser.parse_args()
    tokens, longest = sum(r * c for r, c in GRIDS), max(r * c for r, c in GRIDS)
    result: dict[str, Any] = {"model": options.model, "images": len(GRIDS), "patches": tokens}
    result |= {"patches_padded": longest * len(GRIDS), "share_of_padding": 1 - tokens / (longest * len(GRIDS))}
    for precision in ("fp32", "bf16"):
        paths: dict[str, Any] = {name: (path, (options.model, precision)) for name, path in PATHS.items()}
        seconds, memory, _ = in_turns(paths, options.rounds, 1)
        result[precision] = {
            "images_per_s": len(GRIDS) / statistics.median(seconds["packed"]),
            "padded_images_per_s": len(GRIDS) / statistics.median(seconds["padded"]),
            "ratio": statistics.median(p / o for p, o in zip(seconds["padded"], seconds["packed"])),
            "peak_memory_gb": memory["packed"],
            "padded_peak_memory_gb": memory["padded"],
        }
    print(json.dumps(result, indent=1))


PATHS = {"padded": padded, "packed": packed}

if __name__ == "__main__":
    main()
