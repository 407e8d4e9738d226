"""Results beside the paper's tables: compare. Heavy imports happen inside."""

from __future__ import annotations

from typing import Any


def compare(
    results: list[str], dataset: str | None = None, format: str = "text", plot: str | None = None
) -> dict[str, Any]:
    """Put results beside one another and beside the paper's figures of the same data sets.

    Args:
        results: result files or folders with a result.json, of the measuring verbs or of CLIP_benchmark
        dataset: only results on this data set, by its registered name or the paper's
        format: text, markdown or json
        plot: file of a plot: PNG, PDF or SVG
    """
    from aimv2.evals.compare import compare_results

    return compare_results(results, dataset, format, plot)
