"""Where our training step's time goes, as one JSON object: shares by kind of work, and the matrix-product ceiling.

    python benchmarks/profile_step.py [--precision fp32|bf16]

The step is the one of train_step.py. The ceiling is a large product in the same precision, measured in the same process.
"""

import argparse
import json
import time
from collections import defaultdict

KINDS = (
    (
        "products",
        ("mkldnn_linear", "_linear_pointwise", "aten::mm", "aten::addmm", "mkl_linear", "aten::linear", "matmul"),
    ),
    ("attention products", ("aten::bmm",)),
    ("attention kernel", ("scaled_dot_product", "_flash_attention")),
    ("cross-entropy", ("log_softmax", "nll_loss")),
    ("optimizer", ("_fused_adamw",)),
    ("clipping", ("_foreach",)),
    ("gather and scatter", ("index", "embedding", "aten::cat", "aten::copy_")),
    ("compiled kernels", ("graph_", "CompiledFunction", "Torch-Compiled", "CompiledFxGraph")),
)


def kind_of(name: str) -> str:
    """The first kind that an operator's name fits."""
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=8, help="of a step")
    options = parser.parse_args()
    import torch
    from torch.profiler import ProfilerActivity, profile

    from aimv2.models.flops import peak_flops, step_flops
    from plain_step import SMALL
    from train_step import our_model, our_path

    run, batches = our_path(options.precision, options.pairs, "cpu")
    for batch in batches:
        run(batch)
    begin = time.perf_counter()
    for at in range(options.steps):
        run(batches[at % len(batches)])
    seconds = (time.perf_counter() - begin) / options.steps
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for at in range(options.steps):
            run(batches[at % len(batches)])
    shares: dict[str, float] = defaultdict(float)
    for event in record.key_averages():
        shares[kind_of(event.key)] += event.self_cpu_time_total
    total = sum(shares.values())
    tokens = sum(int(batch.token_count) for batch in batches) / len(batches)
    flops = step_flops(our_model(SMALL), options.pairs, SMALL.patches, tokens)
    ceiling = peak_flops(torch.device("cpu"), options.precision) or float("nan")
    result = {
        "precision": options.precision,
        "seconds_a_step": seconds,
        "gflop_a_step": flops / 1e9,
        "gflop_per_s": flops / seconds / 1e9,
        "ceiling_gflop_per_s": ceiling / 1e9,
        "share_of_ceiling": flops / seconds / ceiling,
        "share_of_time": {
            kind: round(value / total, 4) for kind, value in sorted(shares.items(), key=lambda kv: -kv[1])
        },
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
