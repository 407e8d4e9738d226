"""A picture of compared results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aimv2.evals.compare import Grid, title_of


def plot(grids: Sequence[Grid], file: Path) -> None:
    """A panel a data set and metric: a dot a figure with its interval, a colour a protocol; the paper's are hollow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from aimv2.plots import own_style

    with own_style():
        panels = [(grid, metric) for grid in grids for metric in dict.fromkeys(metric for _, metric in grid.columns)]
        sizes = [sum(cell.metric == metric for row in grid.rows for cell in row.values()) for grid, metric in panels]
        height = sum(0.22 * size + 1.3 for size in sizes)
        figure, all_axes = pyplot.subplots(
            len(panels), 1, figsize=(8, height), squeeze=False, height_ratios=[size + 4 for size in sizes]
        )
        for (grid, metric), axes in zip(panels, all_axes[:, 0]):
            cells = [cell for row in grid.rows for cell in row.values() if cell.metric == metric]
            protocols = list(dict.fromkeys(cell.protocol for cell in cells))
            for number, protocol in enumerate(protocols):
                colour, label = f"C{number % 10}", protocol
                for place, cell in enumerate(cells):
                    if cell.protocol == protocol:
                        low, high = cell.interval or (cell.value, cell.value)
                        spread = [[max(cell.value - low, 0)], [max(high - cell.value, 0)]]
                        face = "none" if cell.kind == "paper" else colour
                        axes.errorbar(cell.value, place, xerr=spread, fmt="o", color=colour, mfc=face, label=label)
                        label = "_"  # one entry a protocol
            axes.set_yticks(range(len(cells)), [cell.model for cell in cells], fontsize=7)
            axes.invert_yaxis()
            axes.set(xlabel=metric, title=title_of(grid.dataset))
            axes.legend(fontsize=7, title="hollow: the paper", title_fontsize=7)
            axes.grid(axis="x", alpha=0.3)
        figure.tight_layout()
        figure.savefig(file, dpi=120)
        pyplot.close(figure)
