"""A finished run against its plan: parameters, speed and memory, planned from the run's own configuration and measured by its log."""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

from safetensors import safe_open

from aimv2.config.load import parse
from aimv2.config.schema import Config
from aimv2.data.text.tokenizer import load_tokenizer
from aimv2.errors import UsageError
from aimv2.interop.model_folder import WEIGHTS, checkpoints
from aimv2.io import regular
from aimv2.models.flops import step_flops
from aimv2.models.layers import MATMUL_LENGTH
from aimv2.plan.layouts import layout_of_config
from aimv2.plan.make import Assumed, check_planned, count, sizes_of
from aimv2.plan.memory import Program, step_peak
from aimv2.tasks.pretrain import shapes
from aimv2.train import prepare
from aimv2.train.checkpoint import read_about
from aimv2.train.defaults import unfilled
from aimv2.train.launch import read_summary
from aimv2.train.log import read_metrics

NEAR = 0.15  # of what was measured, that a plan may differ
BASE = "import aimv2.train.trial, aimv2.data.stream.samples; print(open('/proc/self/status').read())"


def check_run(folder: str, assumed: Assumed) -> dict[str, Any]:
    """Planned and measured figures of a run, and their ratios.

    Args:
        folder: the run's.
        assumed: what the plan's speed rests on; the peak is the one that the run computed its MFU with.

    Raises:
        UsageError: no finished run, a task that is not planned, a log without figures.
    """
    run = Path(folder).expanduser()
    if not prepare.holds_run(run):
        raise UsageError(
            f"--check {folder}: no run there ({prepare.CONFIG} expected)", option="--check", code="not-found"
        )
    summary = read_summary(run)
    if summary is None or not checkpoints(run):
        raise UsageError(
            f"--check {folder}: the run is not finished (no summary.json); go on with: aimv2 pretrain --run {shlex.quote(folder)} --resume",
            option="--check",
            code="missing",
        )
    config = parse(prepare.stored_values(run), stored=True)
    check_planned(config, of_card=False)
    log = [line for line in read_metrics(run / "metrics.jsonl")[0] if "pairs_per_s" in line]
    if not log:
        raise UsageError(f"--check {folder}: metrics.jsonl has no line of training", option="--check", code="missing")
    step, newest = checkpoints(run)[-1]
    ranks = int(read_about(newest)["layout"][0])
    home = prepare.known_tokenizer(run)
    tokens = load_tokenizer(home).vocab_size if home is not None else 1
    encoder, decoder = shapes(config, tokens)
    model = unfilled(encoder, decoder)
    lines = log[1:] or log  # the first has the libraries' first calls in it
    rate = median(float(line["pairs_per_s"]) for line in lines)
    caption = max(
        mean(float(line["tokens_per_s"]) / float(line["pairs_per_s"]) for line in lines) - encoder.patches, 0.0
    )
    flops = step_flops(model, 1.0, encoder.patches, caption)
    reached = median(float(line.get("mfu") or math.nan) for line in lines)
    on_gpu = "CUDA" in str(summary.get("machine"))
    base = 0.0 if on_gpu else resident_base()
    peak = max(float(line["memory_gb"]) for line in log)
    memory = planned_memory(config, model, encoder, ranks, caption, on_gpu) / 1e9
    planned: dict[str, Any] = {
        "parameters": count(model),
        "pairs_per_s": rate * assumed.mfu / reached,
        "memory_gb": base + memory,
    }
    measured = {"parameters": weights_in(newest / "model" / WEIGHTS), "pairs_per_s": rate, "memory_gb": peak}
    ratios = {key: planned[key] / measured[key] for key in planned}
    return {
        "checked": str(run),
        "model": encoder.name,
        "step": step,
        "ranks": ranks,
        "device": "GPU" if on_gpu else "CPU",
        "planned": planned,
        "measured": measured,
        "ratios": ratios,
        "near": {key: abs(ratio - 1) <= (0 if key == "parameters" else NEAR) for key, ratio in ratios.items()},
        "mfu": reached,
        "mfu_assumed": assumed.mfu,
        "tokens_a_pair": caption,
        "flops_a_pair": flops,
        "process_gb": base,
    }


def planned_memory(config: Config, model: Any, encoder: Any, ranks: int, caption: float, on_gpu: bool) -> float:
    """Bytes at the peak of a step of the run; a CPU keeps scores of short sequences and the inputs of norms twice."""
    train, half = config.train, config.train.precision != "fp32"
    compiled = train.compile != "off"
    length = 0 if on_gpu else math.inf if compiled else MATMUL_LENGTH[half]
    sizes = sizes_of(config, encoder, caption, train.batch_size // ranks // train.accumulate)
    program = Program(half, compiled, length, fused_norm=on_gpu)
    return step_peak(model, sizes, layout_of_config(config, ranks), program, bool(train.ema)).total


def weights_in(file: Path) -> int:
    """Parameters in a file of weights, by its header."""
    with safe_open(regular(file), "pt") as stored:
        return sum(math.prod(stored.get_slice(key).get_shape()) for key in stored.keys())  # noqa: SIM118


def resident_base() -> float:
    """1e9 bytes of resident memory that a training process has before its model: a process of its own is looked at."""
    found = subprocess.run([sys.executable, "-c", BASE], capture_output=True, text=True, check=False)
    lines = [line for line in found.stdout.splitlines() if line.startswith("VmHWM")]
    return int(lines[0].split()[1]) * 1024 / 1e9 if lines else 0.0
