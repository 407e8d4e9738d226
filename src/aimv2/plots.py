"""How every plot of this package is drawn."""

from __future__ import annotations

from contextlib import AbstractContextManager


def own_style() -> AbstractContextManager[None]:
    """Matplotlib's defaults within a block: a matplotlibrc of the working folder could run LaTeX."""
    from matplotlib import style

    return style.context("default")
