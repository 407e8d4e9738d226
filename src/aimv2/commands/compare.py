"""``aimv2 compare``: results and the paper's tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from aimv2.config.types import PathText

EXAMPLES = """\
aimv2 compare results/knn results/linear
aimv2 compare results --dataset cifar10 --format markdown --plot compared.png"""


@dataclass(kw_only=True)
class CompareOptions:
    """Compare results with one another and with the paper's figures on the same data sets.

    Args:
        results: result files or folders with a result.json, of the evaluation commands or of CLIP_benchmark
        dataset: only results on this data set, by its registered name or the paper's
        format: text, markdown or json
        plot: file of a plot: PNG, PDF or SVG
    """

    results: list[PathText]
    dataset: str | None = None
    format: Literal["text", "markdown", "json"] = "text"
    plot: PathText | None = None


def run(options: CompareOptions) -> dict[str, Any]:
    from aimv2.evals.compare import compare_results

    return compare_results(options.results, options.dataset, options.format, options.plot)


def render(result: dict[str, Any], console: Console) -> None:
    console.print(result["text"])
