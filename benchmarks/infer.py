"""Frozen features of L/14-224, a few images at once: ours beside transformers, a plain path and the exported files.

    python benchmarks/infer.py [--rounds 7] [--batch 4] [--only torch_fp32,transformers_fp32]

Every path lives in a process of its own and they take turns, a few at a time beside transformers in fp32; weights are random
and the same. ``part`` is the time as a part of what transformers takes eager in fp32 (below 1 is faster). The exported files
are written to a temporary folder first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from turns import in_turns

MODEL = "aimv2-large-patch14-224"
BASE = "transformers_fp32"
GROUP = 5  # paths in memory at once, beside BASE


def pixels(torch: Any, folder: str, batch: int, dtype: Any = None) -> Any:
    """Normalised images [batch, 3, side, side] of the side of the models in ``folder`` and its neighbours."""
    side = json.loads((Path(folder).parent / "transformers" / "config.json").read_text("utf-8"))["image_size"]
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(dtype or torch.float32)


def ours(folder: str, batch: int, precision: str, compiled: bool, device: str) -> tuple[Any, list[Any]]:
    """This package."""
    import torch

    import aimv2

    aimv2.fast_matmul(device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = aimv2.load_model(folder, device=device, dtype=dtype)
    if compiled:
        for block in model.blocks:
            block.compile(dynamic=False)
    return on_device(torch, model, pixels(torch, folder, batch, dtype), device)


def theirs(
    folder: str, batch: int, precision: str, compiled: bool, device: str, fast: bool = False
) -> tuple[Any, list[Any]]:
    """transformers; ``fast``: with the setting for products that ours runs with."""
    import torch
    from transformers import AutoModel

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if fast:
        import aimv2

        aimv2.fast_matmul(device)
    model = AutoModel.from_pretrained(folder, dtype=dtype).to(device).eval()
    if compiled:
        model = torch.compile(model)
    return on_device(
        torch, lambda x: model(pixel_values=x).last_hidden_state, pixels(torch, folder, batch, dtype), device
    )


def plain(folder: str, batch: int, precision: str, device: str) -> tuple[Any, list[Any]]:
    """What one writes first: separate projections, SDPA, convolution."""
    import torch
    from torch import nn

    import aimv2

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = aimv2.load_model(folder, device=device, dtype=dtype)

    def split(linear: Any, parts: int) -> list[Any]:
        return [weight.contiguous() for weight in linear.weight.detach().chunk(parts)]

    weights = [(block, split(block.attn.qkv, 3), split(block.mlp.gate_up, 2)) for block in model.blocks]
    embed, heads = model.patch_embed, model.config.heads

    def run(images: Any) -> Any:
        x = embed.norm(embed.proj(images).flatten(2).transpose(1, 2)) + embed.position
        for block, (q, k, v), (gate, up) in weights:
            y = block.norm1(x)
            q_, k_, v_ = (nn.functional.linear(y, w).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (q, k, v))
            y = nn.functional.scaled_dot_product_attention(q_, k_, v_).transpose(1, 2).flatten(2)
            x = x + block.attn.proj(y)
            y = block.norm2(x)
            linear = nn.functional.linear
            x = x + block.mlp.down(nn.functional.silu(linear(y, gate)) * linear(y, up))
        return model.norm(x)

    return on_device(torch, run, pixels(torch, folder, batch, dtype), device)


def timm_path(folder: str, batch: int, precision: str, device: str) -> tuple[Any, list[Any]]:
    """timm."""
    import timm
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).to(device, dtype).eval()
    return on_device(torch, model.forward_features, pixels(torch, folder, batch, dtype), device)


def on_device(torch: Any, model: Any, images: Any, device: str) -> tuple[Any, list[Any]]:
    """A run without gradients that waits for the device."""

    def run(x: Any) -> None:
        with torch.inference_mode():
            model(x)
        if device == "cuda":
            torch.cuda.synchronize()

    return run, [images.to(device)]


def onnx(folder: str, batch: int) -> tuple[Any, list[Any]]:
    """ONNX Runtime."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"))
    return (lambda x: session.run(None, {"pixel_values": x})), [pixels(torch, folder, batch).numpy()]


def openvino(folder: str, batch: int) -> tuple[Any, list[Any]]:
    """OpenVINO."""
    import torch

    from aimv2.interop.openvino import OpenVINOEncoder

    encoder = OpenVINOEncoder(folder)
    return (lambda x: encoder.run(x)), [pixels(torch, folder, batch).numpy()]


def write_models(out: Path, wanted: set[str], name: str) -> None:
    """The same random weights in every form that is wanted."""
    import torch

    from aimv2.interop.convert import convert
    from aimv2.models.create import create_model

    forms: dict[str, tuple[str, dict[str, Any]]] = {"ours": ("safetensors", {}), "transformers": ("transformers", {})}
    if any(path.startswith("timm") for path in wanted):
        forms["timm"] = ("timm", {})
    if "onnx_fp32" in wanted:
        forms["onnx"] = ("onnx", {})
    for precision in ("fp32", "bf16", "int8"):
        if f"openvino_{precision}" in wanted:
            more = {"pixels": [pixels(torch, str(out / "ours"), 4)]} if precision == "int8" else {}
            forms[f"openvino_{precision}"] = ("openvino", {"precision": precision, **more})
    for form, (to, options) in forms.items():
        model = create_model(name, seed=0).eval()
        try:
            convert(model, out / form, to, **options)
        except ValueError as error:
            print(f"{form}: {error}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds, at least 7 for a figure to quote")
    parser.add_argument("--runs", type=int, default=1, help="runs of a path in a round")
    parser.add_argument("--only", default="", help="paths to run, with commas; all by default")
    parser.add_argument("--model", default=MODEL, help="a size, with random weights")
    parser.add_argument("--batch", type=int, default=4, help="images at once")
    options = parser.parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        paths: dict[str, Any] = {}
        for precision in ("fp32", "bf16"):
            paths[f"transformers_{precision}"] = (
                theirs,
                (str(out / "transformers"), options.batch, precision, False, device),
            )
            if precision == "fp32":
                paths["transformers_fast_fp32"] = (
                    theirs,
                    (str(out / "transformers"), options.batch, precision, False, device, True),
                )
            paths[f"transformers_compiled_{precision}"] = (
                theirs,
                (str(out / "transformers"), options.batch, precision, True, device),
            )
            paths[f"timm_{precision}"] = (timm_path, (str(out / "timm"), options.batch, precision, device))
            paths[f"plain_{precision}"] = (plain, (str(out / "ours"), options.batch, precision, device))
            paths[f"torch_{precision}"] = (ours, (str(out / "ours"), options.batch, precision, False, device))
            paths[f"torch_compiled_{precision}"] = (ours, (str(out / "ours"), options.batch, precision, True, device))
        paths["onnx_fp32"] = (onnx, (str(out / "onnx"), options.batch))
        for precision in ("fp32", "bf16", "int8"):
            paths[f"openvino_{precision}"] = (openvino, (str(out / f"openvino_{precision}"), options.batch))
        wanted = set(options.only.split(",")) - {""} or set(paths)
        if unknown := wanted - set(paths):
            parser.error(f"--only {sorted(unknown)[0]}: one of {', '.join(paths)} expected")
        write_models(out, wanted, options.model)
        others = [name for name in paths if name in wanted and name != BASE]
        parts: dict[str, Any] = {}
        missing: dict[str, str] = {}
        for at in range(0, max(len(others), 1), GROUP):
            group = {name: paths[name] for name in (BASE, *others[at : at + GROUP])}
            seconds, memory, lacking = in_turns(group, options.rounds, options.runs)
            missing |= lacking
            for name, taken in seconds.items():
                parts[name] = {
                    "images_per_s": options.batch / statistics.median(taken),
                    "part": statistics.median(one / of for one, of in zip(taken, seconds[BASE])),
                    "peak_memory_gb": memory[name],
                }
    result: dict[str, Any] = {
        "model": options.model,
        "batch": options.batch,
        "device": device,
        "rounds": options.rounds,
    }
    result |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "paths": parts, "missing": missing}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
