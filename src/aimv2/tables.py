"""What people read: figures on one scale, and tables as text within a width or as Markdown."""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

# names of figures that are fractions of what was right, found or used; a test holds them against the results of every command
FRACTIONS = re.compile(r"top[15]|[m_]iou|accuracy|exact_match|mfu|_to_text|_to_image|R@|delta1|chance|p_at_1|^A[PR]\b")


def percent(fraction: float) -> str:
    """``0.8529`` as ``85.3%``."""
    return f"{fraction:.1%}"


def figure(name: str, value: float, form: str = ".4f") -> str:
    """A figure as people read it: a fraction, by its name, in percent, CIDEr and BLEU a hundredfold, any other in ``form``."""
    if name.rpartition(".")[2].startswith(("cider", "bleu")):
        return f"{100 * value:.1f}"
    return percent(value) if FRACTIONS.search(name) else format(value, form)


@dataclass
class TextTable:
    """Cells of text.

    Attributes:
        heads: of the columns; () for none.
        rows: as many cells each.
        right: heads of the columns that are aligned to the right.
        widest: head -> most characters of its column; longer cells are folded.
        whole: heads of the columns whose cells are never folded.
        ratio: head -> its part of the width; without any, columns are as wide as their cells.
    """

    heads: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    right: Collection[str] = ()
    widest: Mapping[str, int] = field(default_factory=dict)
    whole: Collection[str] = ()
    ratio: Mapping[str, int] = field(default_factory=dict)

    def to_text(self, width: int = 80) -> str:
        """Lines of at most ``width`` characters, where the cells that are never folded allow it."""
        from rich.table import Table

        from aimv2.terminal import VisibleConsole

        table = Table(show_header=bool(self.heads), box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for head in self.heads:
            table.add_column(
                head,
                justify="right" if head in self.right else "left",
                overflow="fold",
                no_wrap=head in self.whole,
                max_width=self.widest.get(head),
                ratio=self.ratio.get(head),
            )
        for row in self.rows:
            table.add_row(*row)
        out = io.StringIO()
        console = VisibleConsole(file=out, width=width, color_system=None, highlight=False, markup=False, emoji=False)
        console.print(table)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def to_markdown(self) -> str:
        """The lines of a Markdown table."""
        marks = ["---:" if head in self.right else "---" for head in self.heads]
        rows = [self.heads, marks, *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
