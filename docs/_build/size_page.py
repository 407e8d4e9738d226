"""The page of sizes, from the sizes table."""

from __future__ import annotations

from aimv2.interop.hub import RELEASED
from aimv2.models.sizes import SERIES, SIZES, encoder_flops, encoder_parameters, model_config


def pages() -> dict[str, str]:
    """``sizes.md``."""
    lines = [
        "# Sizes",
        "",
        "Generated from `src/aimv2/models/sizes.py`; `aimv2 models` prints the same counts. Large to 3B are the paper's "
        "Table 1, `base` is in the released code only, and the smaller ones are ours. GFLOPs are of one image, with two FLOPs "
        "per multiply-add; a native model at 256 patches. Any value can be overridden: `--model.width 192`, or "
        "`aimv2.create_model(NAME, width=192, heads=3)`.",
        "",
    ]
    for size, row in SIZES.items():
        decoder = row.decoder
        lines += [
            f"## {size}",
            "",
            "| | width | blocks | heads | head dim | SwiGLU hidden |",
            "|---|---|---|---|---|---|",
            f"| encoder | {row.width} | {row.depth} | {row.heads} | {row.width // row.heads} | {row.hidden} |",
            f"| decoder | {decoder.width} | {decoder.depth} | {decoder.heads} | {decoder.width // decoder.heads} "
            f"| {decoder.hidden} |",
            "",
            "| name | image | patch | patches | encoder parameters | GFLOPs per image | weights |",
            "|---|---|---|---|---|---|---|",
            *models(size),
            "",
        ]
    return {"sizes.md": "\n".join(lines)}


def models(size: str) -> list[str]:
    """A row a model of this size."""
    rows = []
    for name_of_size, patch, images in SERIES:
        for image in images if name_of_size == size else []:
            name = f"aimv2-{size}-patch{patch}-{image or 'native'}"
            encoder = model_config(name)[0]
            shown = f"{image} px" if image else f"any, {encoder.min_patches} to {encoder.max_patches} patches"
            patches = str(encoder.patches) if image else "-"
            gflop, weights = encoder_flops(encoder) / 1e9, "released" if name in RELEASED else "-"
            count = f"{encoder_parameters(encoder):,}"
            rows.append(f"| `{name}` | {shown} | {patch} px | {patches} | {count} | {gflop:,.3g} | {weights} |")
    return rows
