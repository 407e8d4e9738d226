"""The planner's memory against torch's own tracker over the sharded program, and against measured peaks of CPU runs.

    python benchmarks/plan_memory.py [--tracked NAME ...] [--measured NAME ...] [--markdown]

``tracked``: one rank of a fake world steps the real program on tensors without values, and torch's FSDPMemTracker counts the bytes
(:mod:`aimv2.plan.fake`); any size on any machine. ``measured``: real steps in a process of their own, whose most resident memory is
read from the kernel, less what it had before the model. Prints one JSON object, or with --markdown the tables of docs/plan.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from aimv2.config.schema import Config
from aimv2.models.layers import MATMUL_LENGTH
from aimv2.models.sizes import model_config
from aimv2.plan.layouts import layout_of_config
from aimv2.plan.memory import Program, Sizes, step_peak
from aimv2.tables import TextTable
from aimv2.train.defaults import unfilled

VOCABULARY, TOKENS = 32_000, 32


@dataclass(frozen=True)
class Case:
    """A run: model, ranks, pairs of a rank and micro-batch, and how it steps."""

    model: str
    ranks: int = 1
    pairs: int = 8
    precision: str = "bf16"
    accumulate: int = 1
    checkpointing: str = "off"
    parallel: tuple[int, int] = (1, -1)
    vocabulary: int = VOCABULARY

    def config(self) -> Config:
        config = Config()
        train = config.train
        train.batch_size, train.accumulate = self.pairs * self.ranks * self.accumulate, self.accumulate
        train.precision, train.compile = self.precision, "off"  # type: ignore[assignment]
        known = type(train.checkpointing) is bool
        train.checkpointing = self.checkpointing != "off" if known else self.checkpointing  # type: ignore[assignment]
        config.parallel.replicate, config.parallel.shard = self.parallel
        return config

    def planned(self, fused: bool) -> float:
        """Bytes at the peak, by the planner."""
        encoder, decoder = model_config(self.model, {"vocab_size": self.vocabulary})
        scored = encoder.patches - encoder.patches // 2
        sizes = Sizes(self.pairs, encoder.patches, TOKENS, TOKENS, scored)
        half = self.precision != "fp32"
        program = Program(half, False, 0 if fused else MATMUL_LENGTH[half], fused_norm=False)
        layout = layout_of_config(self.config(), self.ranks)
        return step_peak(unfilled(encoder, decoder), sizes, layout, program).total


L, H, B1, B3 = (f"aimv2-{size}-patch14-224" for size in ("large", "huge", "1B", "3B"))
TRACKED = {
    "L-8": Case(L, 8, 16),
    "H-8": Case(H, 8, 16),
    "1B-8": Case(B1, 8, 16),
    "3B-64": Case(B3, 64, 8),
    "3B-64-full": Case(B3, 64, 32, checkpointing="full"),
    "L-8-accumulate": Case(L, 8, 8, accumulate=2),
    "base-1": Case(
        "aimv2-base-patch14-224", 1, 16, "fp32"
    ),  # the tracker hooks weights, which one rank casts in half precision
    "tiny-4": Case("aimv2-tiny-patch14-112", 4, 8),
}
SMALL = "aimv2-small-patch14-224"
MEASURED = {
    "fp32": Case(SMALL, 1, 8, "fp32"),
    "bf16": Case(SMALL, 1, 8, "bf16"),
    "fp32-full": Case(SMALL, 1, 16, "fp32", checkpointing="full"),
    "fp32-accumulate": Case(SMALL, 1, 4, "fp32", accumulate=2),
    "base-fp32": Case("aimv2-base-patch14-224", 1, 4, "fp32"),
}


def track(case: Case) -> dict[str, Any]:
    """The tracker's figures of a case, in 1e9 bytes."""
    from aimv2.plan.fake import tracked_step

    began = time.perf_counter()
    shapes = model_config(case.model, {"vocab_size": case.vocabulary})
    found = tracked_step(case.config(), *shapes, case.ranks, TOKENS, fused=True)
    return {"parts": {key: value / 1e9 for key, value in found.items()}, "seconds": time.perf_counter() - began}


def measure(case: Case) -> float:
    """Bytes of resident memory that a step's peak adds to those of the process before its model. In a process of its own."""
    import torch

    from aimv2.distributed import World
    from aimv2.models.create import build
    from aimv2.models.matmul import fast_matmul
    from aimv2.plan.fake import blank_batch
    from aimv2.train.step import TrainStep

    fast_matmul()
    x = torch.randn(512, 512, requires_grad=True)
    torch.nn.functional.linear(x, x).sum().backward()  # the libraries are loaded
    config, shapes = case.config(), model_config(case.model, {"vocab_size": case.vocabulary})
    batch = blank_batch(shapes[0], case.pairs * case.accumulate, TOKENS)
    before = resident("VmRSS")
    step = TrainStep(build(*shapes, 0), config, World(0, 1, torch.device("cpu")), False)
    for number in range(2):
        step(batch, number)
    return resident("VmHWM") - before


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM the most so far."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def measured(name: str) -> float:
    """:func:`measure` in a process of its own, 1e9 bytes."""
    words = [sys.executable, __file__, "--one", name]
    env = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # what is freed goes back at once: what is held counts, not glibc's pools
    return float(subprocess.run(words, capture_output=True, text=True, check=True, env=env).stdout) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracked", nargs="*", choices=TRACKED, default=list(TRACKED))
    parser.add_argument("--measured", nargs="*", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--one", choices=MEASURED, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(measure(MEASURED[given.one]))
        return
    result: dict[str, Any] = {"tracked": {}, "measured": {}}
    for name in given.tracked:
        case = TRACKED[name]
        found = track(case)
        result["tracked"][name] = row(case, case.planned(fused=True) / 1e9, found["parts"]["total"]) | found
        print(name, result["tracked"][name], file=sys.stderr, flush=True)
    for name in given.measured:
        case = MEASURED[name]
        result["measured"][name] = row(case, case.planned(fused=False) / 1e9, measured(name))
        print(name, result["measured"][name], file=sys.stderr, flush=True)
    print("\n\n".join(map(table, filter(None, result.values()))) if given.markdown else json.dumps(result))


def row(case: Case, planned: float, found: float) -> dict[str, Any]:
    return {**vars(case), "planned_gb": planned, "found_gb": found, "ratio": planned / found}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown of one kind of rows."""
    heads = [
        "model",
        "ranks",
        "pairs at once",
        "precision",
        "micro-batches",
        "checkpointing",
        "planned, GB",
        "found, GB",
        "planned / found",
    ]
    cells = [
        [
            *(str(one[key]) for key in ("model", "ranks", "pairs", "precision", "accumulate", "checkpointing")),
            *(f"{one[key]:.2f}" for key in ("planned_gb", "found_gb", "ratio")),
        ]
        for one in rows.values()
    ]
    return TextTable(heads, cells, right=heads[1:3] + heads[6:]).to_markdown()


if __name__ == "__main__":
    main()
