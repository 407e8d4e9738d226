"""The parts of on_gpu.py: each a function that returns figures, with what was expected before anything was measured."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from plain_step import LARGE, TINY, Shape
from train_step import LONGEST, SHORTEST, our_model, our_path, plain_path
from turns import in_turns

ROOT = Path(__file__).resolve().parents[1]
TOKENS = (SHORTEST + LONGEST) / 2  # of a caption, on average
MODELS = {"L-336": "aimv2-large-patch14-336", "H-224": "aimv2-huge-patch14-224", "1B-224": "aimv2-1B-patch14-224"}
# B, H, N, d of training: encoders of 224, 336, 448 and 518 px
ATTENTION = {
    "224 px": (64, 8, 256, 128),
    "336 px": (32, 8, 576, 128),
    "448 px": (16, 8, 1024, 128),
    "518 px": (8, 8, 1369, 128),
}


@dataclass(frozen=True)
class Part:
    """What on_gpu.py may run.

    Attributes:
        run: of ``smoke``; figures by name, nested.
        about: what it measures.
        estimate, limit: seconds.
    """

    run: Callable[[bool], dict[str, Any]]
    about: str
    estimate: int
    limit: int


def device() -> str:
    """Where parts run."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def timed(run: Callable[[], object], most: float = 1.0) -> float:
    """Seconds of a run, the median over about ``most`` seconds, once warm."""
    from turns import wait_for_device

    run()
    wait_for_device()
    found, began = list[float](), time.perf_counter()
    while len(found) < 3 or time.perf_counter() - began < most:
        start = time.perf_counter()
        run()
        wait_for_device()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def matmul_peak(smoke: bool) -> float:
    """FLOP/s of the fastest of a few large bf16 products."""
    import torch

    best = 0.0
    for size in (256,) if smoke else (4096, 8192, 16384):
        a = torch.randn(size, size, dtype=torch.bfloat16, device=device())
        best = max(best, 2 * size**3 / timed(lambda a=a: a @ a, 0.1 if smoke else 0.6))
    return best


# ---- parts ----


def the_device(smoke: bool) -> dict[str, Any]:
    """The card, its versions, its products and its copies."""
    import torch

    size = 1 << (20 if smoke else 30)
    here = torch.empty(size, dtype=torch.uint8, device=device())
    other = torch.empty_like(here)
    pinned = torch.empty(size // 4, dtype=torch.uint8, pin_memory=device() == "cuda")
    figures: dict[str, Any] = {
        "expected": "A dense product reaches 70 to 85% of the vendor's figure.",
        "torch": torch.__version__,
    }
    if device() == "cuda":
        about = torch.cuda.get_device_properties(0)
        figures |= {"card": about.name, "memory_gb": about.total_memory / 1e9, "capability": f"{about.major}.{about.minor}",
                    "cuda": torch.version.cuda}  # fmt: skip
    else:
        figures |= {"card": "none: the CPU"}
    return figures | {
        "bf16_tflop_per_s": matmul_peak(smoke) / 1e12,
        "copy_gb_per_s": 2 * size / timed(lambda: other.copy_(here), 0.3) / 1e9,
        "from_host_gb_per_s": len(pinned)
        / timed(lambda: here[: len(pinned)].copy_(pinned, non_blocking=True), 0.3)
        / 1e9,
    }


def one_step(path: Callable[..., Any], pairs: int, shape: Shape, runs: int, **train: Any) -> dict[str, Any]:
    """Images a second and peak memory of a training step in bf16, in a process of its own."""
    seconds, memory, missing = in_turns({"step": (Given(path, train), ("bf16", pairs, device(), shape))}, 3, runs)
    if missing:
        return {"failed": missing["step"][:200]}
    return {"images_per_s": pairs / statistics.median(seconds["step"]), "peak_memory_gb": memory["step"]}


@dataclass(frozen=True)
class Given:
    """A path with more of its arguments."""

    path: Callable[..., Any]
    more: dict[str, Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.path(*arguments, **self.more)


def modes() -> dict[str, dict[str, Any]]:
    """Ways to run our step: sections ``train`` of the configuration."""
    from aimv2.config.schema import TrainConfig

    ways: dict[str, dict[str, Any]] = {"eager": {"compile": "off"}, "compiled": {"compile": "auto"}}
    for mode in ("selective", "full"):
        ways[f"compiled, checkpointing {mode}"] = {"compile": "auto", "checkpointing": mode}
    if "fp8" in TrainConfig.__annotations__:
        ways["compiled, fp8"] = {"compile": "auto", "fp8": True}
    return ways


def step(smoke: bool) -> dict[str, Any]:
    """L/14-224, ours beside the plain one."""
    import torch

    from aimv2.models.flops import step_flops

    shape, pairs, runs = (TINY, 2, 1) if smoke else (LARGE, pairs_that_fit(), 6)
    figures: dict[str, Any] = {
        "expected": "Compiled: at least 60% of the measured peak and 1.5 times the plain step.",
        "pairs": pairs,
    }
    figures["plain"] = one_step(plain_path, pairs, shape, runs)
    for name, train in modes().items():
        figures[name] = one_step(our_path, pairs, shape, runs, **train)
    peak = matmul_peak(smoke)
    with torch.device("meta"):
        flops = step_flops(our_model(shape, None), 1, shape.patches, TOKENS)
    for way in figures.values():
        if isinstance(way, dict) and "images_per_s" in way:
            way["fraction_of_peak"] = way["images_per_s"] * flops / peak
            if "images_per_s" in figures["plain"]:
                way["times_plain"] = way["images_per_s"] / figures["plain"]["images_per_s"]
    return figures


def pairs_that_fit() -> int:
    """Pairs of L/14-224 of which the plain step keeps all activations: about 0.4 GB each."""
    import torch

    free = torch.cuda.mem_get_info()[0] / 1e9
    return next((pairs for pairs in (128, 64, 32, 16) if 0.45 * pairs + 10 < free), 8)


def attention(smoke: bool) -> dict[str, Any]:
    """Forward and backward of prefix attention by each way, milliseconds."""
    import torch

    figures: dict[str, Any] = {"expected": "FlexAttention before the masked SDPA everywhere; two variable-length calls (bidirectional over "
                               "the prefix, causal after it) before it up to 576 positions."}  # fmt: skip
    for name, (batch, heads, length, width) in {"tiny": (2, 2, 16, 8)}.items() if smoke else ATTENTION.items():
        draw = torch.Generator().manual_seed(0)
        prefix = torch.randint(1, length, (batch,), generator=draw).to(device())
        data = [
            torch.randn(batch, heads, length, width, dtype=torch.bfloat16, device=device(), requires_grad=True)
            for _ in range(3)
        ]
        found = {}
        for way, make in ATTENTION_WAYS.items():
            try:
                run = make(prefix, length)
                out = run(*data)
                wanted = ATTENTION_WAYS["SDPA, boolean mask"](prefix, length)(*data)
                error = float((out.float() - wanted.float()).abs().max())
                found[way] = 1e3 * timed(lambda run=run, data=data: run(*data).sum().backward(), 0.05 if smoke else 0.3)
                if error > 0.05:
                    found[way] = f"wrong by {error:.3g}"
            except Exception as error:  # a way that this device or this torch lacks
                found[way] = (
                    f"none: {type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error) else ''}"
                )
        figures[f"{name}, {batch} x {heads} x {length} x {width}, ms"] = found
    return figures


def masked_sdpa(prefix: Any, length: int) -> Callable[..., Any]:
    """What the eager model does."""
    import torch.nn.functional as F

    from aimv2.models.masks import prefix_mask

    mask = prefix_mask(prefix, length)[:, None]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask)


def flex(prefix: Any, length: int) -> Callable[..., Any]:
    """What the compiled model does on CUDA."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    from aimv2.models.layers import prefix_attention_mask

    mask = prefix_attention_mask(prefix, length, True)
    run = torch.compile(flex_attention)
    return lambda q, k, v: run(q, k, v, block_mask=mask)


def two_calls(prefix: Any, length: int) -> Callable[..., Any]:
    """Rows before the prefix's end attend to it alone, rows after it are causal: two calls of a kernel that needs no mask."""
    import inspect

    import torch
    from torch.nn.attention.varlen import varlen_attn

    newer = "window_size" in inspect.signature(varlen_attn).parameters
    to_the_left: dict[str, Any] = {"window_size": (-1, 0)} if newer else {"is_causal": True}
    batch, place = len(prefix), torch.arange(length, device=prefix.device)
    start = torch.arange(batch, device=prefix.device) * length
    whole = torch.arange(batch + 1, device=prefix.device, dtype=torch.int32) * length
    split = torch.stack([start, start + prefix], 1).flatten().to(torch.int32)
    split = torch.cat([split, whole[-1:]])
    early = (place < prefix[:, None]).view(-1, 1, 1)

    def run(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))  # [B * N, H, d]
        causal: Any = varlen_attn(q, k, v, whole, whole, length, length, **to_the_left)
        both: Any = varlen_attn(q, k, v, split, split, length, length)
        return torch.where(early, both, causal).unflatten(0, (batch, length)).transpose(1, 2)

    return run


ATTENTION_WAYS = {"SDPA, boolean mask": masked_sdpa, "FlexAttention": flex, "two variable-length calls": two_calls}


def sizes(smoke: bool) -> dict[str, Any]:
    """Larger encoders with the paper's decoder, at the largest power of two of pairs that fits."""
    import torch

    from aimv2.models.flops import step_flops

    figures: dict[str, Any] = {"expected": "H and 1B above L in their part of the peak: wider products."}
    peak = matmul_peak(smoke)
    for name in ("tiny",) if smoke else MODELS:
        with torch.device("meta"):
            model = named_model(name, None)
        about = model.encoder.config
        shape = replace(TINY if smoke else LARGE, image=about.image_size, patch=about.patch_size)
        for pairs in (2,) if smoke else (256, 128, 64, 32, 16):
            found = one_step(our_path, pairs, shape, 1 if smoke else 4, make=partial(named_model, name))
            if "OutOfMemory" not in found.get("failed", ""):
                break
        if "images_per_s" in found:
            found["fraction_of_peak"] = found["images_per_s"] * step_flops(model, 1, about.patches, TOKENS) / peak
        figures[name] = {"pairs": pairs, **found}
    return figures


def named_model(name: str, seed: int | None = 0) -> Any:
    """A released shape with its decoder; ``tiny`` to try the program."""
    from aimv2.models.create import create_model

    if name == "tiny":
        return our_model(TINY, seed)
    return create_model(MODELS[name], decoder=True, seed=seed)


def command(*words: str, **environment: str) -> str:
    """The standard output of a command of this project."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, **environment}, cwd=ROOT
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:3])}: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def native(smoke: bool) -> dict[str, Any]:
    """Images of their own size: packed rows beside strips and padding."""
    words = (
        ["--rounds", "1", "--areas", "3", "4", "--budget", "32"] if smoke else ["--rounds", "5", "--budget", "16384"]
    )
    figures: dict[str, Any] = json.loads(command("benchmarks/native_train.py", *words, "--precision", "bf16"))["bf16"]
    return {"expected": "Packed rows at least as fast as compiled strips."} | figures


def infer(smoke: bool) -> dict[str, Any]:
    """Frozen L/14-224 in bf16 beside transformers and timm, images a second."""
    names = [
        "torch_bf16",
        "torch_compiled_bf16",
        "transformers_bf16",
        "transformers_compiled_bf16",
        "plain_bf16",
        "timm_bf16",
    ]
    if smoke:
        words = [
            "--rounds",
            "1",
            "--batch",
            "1",
            "--model",
            "aimv2-tiny-patch8-32",
            "--only",
            "torch_bf16,transformers_bf16",
        ]
    else:
        words = ["--rounds", "5", "--runs", "10", "--batch", "64", "--only", ",".join(names)]
    found = json.loads(command("benchmarks/infer.py", *words))
    expected = "Ours eager within 3% of transformers or before it; compiled 1.2 times the eager one."
    return {"expected": expected, **found["paths"], **{name: f"none: {why}" for name, why in found["missing"].items()}}


def kernels(smoke: bool) -> dict[str, Any]:
    """The kernels of a compiled step that take most time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    run, batches = our_path("bf16", *((2, device(), TINY) if smoke else (pairs_that_fit(), device(), LARGE)))
    for batch in batches:
        run(batch)
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device() == "cuda")]
    with profile(activities=kinds) as record:
        run(batches[0])
        if device() == "cuda":
            torch.cuda.synchronize()
    key = "self_device_time_total" if device() == "cuda" else "self_cpu_time_total"
    events = sorted(record.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    figures = {
        event.key[:80]: f"{100 * getattr(event, key) / total:.1f}%, {event.count} calls" for event in events[:15]
    }
    return {"expected": "Products before everything else; no copies of weights among the first ten.", **figures}


def scenes(smoke: bool) -> dict[str, Any]:
    """Captioned scenes: the losses after 200 steps, by precision."""
    from aimv2.config.schema import TrainConfig

    figures: dict[str, Any] = {"expected": "Losses within 1% of each other."}
    ways = {"fp32": ["fp32"], "bf16": ["bf16"]}
    if "fp8" in TrainConfig.__annotations__:
        ways["fp8"] = ["bf16", "--train.fp8", "true"]
    with tempfile.TemporaryDirectory() as folder:
        for name, words in ways.items():
            run = Path(folder) / name
            try:
                command("-m", "aimv2", "pretrain", *short_run(run, 4 if smoke else 200), "--train.precision", *words)
                lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                figures[name] = {key: value for key, value in lines[-1].items() if key.endswith("loss")}
            except (RuntimeError, OSError) as error:
                figures[name] = {"failed": str(error)[:300]}
    return figures


def short_run(run: Path, steps: int) -> list[str]:
    """Options of a run on captioned scenes."""
    data = run.parent / "scenes"
    if not data.is_dir():
        command("-m", "aimv2", "data", "shapes", str(data), "--count", "640")
    return [
        "--run", str(run), "--data.train", str(data), "--model.name", "aimv2-tiny-patch8-32", "--data.vocab_size", "300", "--train.steps",
        str(steps), "--train.batch_size", "64", "--train.compile", "off", "--train.log_every", str(min(steps, 20)), "--optim.warmup", "1",
        "--eval.samples", "64", "--eval.captions", "0", "--eval.probe", "false", "--log.report", "false",
    ]  # fmt: skip


def checkpoint(smoke: bool) -> dict[str, Any]:
    """A run that was saved on this device goes on on a CPU, and its model gives the same features there."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command("-m", "aimv2", "pretrain", *short_run(run, 6), "--train.stop_at", "4")
        features = "import sys, torch, aimv2; m = aimv2.load_model(sys.argv[1], device=sys.argv[2]); x = torch.linspace(-1, 1, 3 * 32 * 32)"
        features += "; print(float(m(x.view(1, 3, 32, 32).to(sys.argv[2])).double().abs().mean()))"
        here = float(command("-c", features, str(run), device()))
        there = float(command("-c", features, str(run), "cpu", CUDA_VISIBLE_DEVICES=""))
        command("-m", "aimv2", "pretrain", "--run", str(run), "--resume", CUDA_VISIBLE_DEVICES="")
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {
        "expected": "Features equal to 1e-3.",
        "mean_feature_here": here,
        "mean_feature_on_cpu": there,
        "steps_in_all": last["step"],
    }


def tests(smoke: bool) -> dict[str, Any]:
    """The tests of the models, with CUDA in sight."""
    words = ["tests/models/test_masks.py"] if smoke else ["tests/models"]
    out = command(
        "-m", "pytest", "-o", "addopts=-m 'not long and not engine'", "--no-header", "-p", "no:cacheprovider", *words
    )
    return {"expected": "None fails.", "pytest": out.strip().splitlines()[-1]}


PARTS = {
    "device": Part(the_device, "the card, its matmul peak in bf16 and its bandwidth", 15, 40),
    "step": Part(step, "the training step of L/14-224 beside the plain one", 100, 200),
    "attention": Part(attention, "prefix attention, forward and backward", 30, 60),
    "tests": Part(tests, "tests/models on this device", 40, 120),
    "checkpoint": Part(checkpoint, "a checkpoint of this device on a CPU", 40, 90),
    "infer": Part(infer, "frozen features of L/14-224", 60, 150),
    "sizes": Part(sizes, "L-336, H and 1B at their largest batch", 120, 240),
    "native": Part(native, "native images, packed", 60, 120),
    "kernels": Part(kernels, "the kernels of one step", 40, 90),
    "scenes": Part(scenes, "200 steps of captioned scenes", 60, 120),
}
