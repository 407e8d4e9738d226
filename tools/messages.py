"""Writes every message that a user's mistake can bring up into one file, so that a change of wording is seen in one place.

    python tools/messages.py [--check]

A line a message: the file, its kind (``code``) and the text, with {} for what is filled in. ``--check`` exits with 1 where the file
is not what this would write.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "messages.txt"
KINDS = ("UsageError", "RankError", "wrong")


def template(node: ast.expr) -> str:
    """The text of a message; {} for an expression in it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "{}"


def messages(path: Path) -> Iterator[str]:
    """The messages of a file, in its order."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS and node.args:
            text = template(node.args[-1] if node.func.id == "wrong" else node.args[0])
            code = next((template(word.value) for word in node.keywords if word.arg == "code"), "invalid")
            if text.strip("{} "):
                yield f"{path.relative_to(ROOT / 'src/aimv2')} [{code}] {' '.join(text.split())}"


def main() -> int:
    text = "".join(f"{line}\n" for path in sorted((ROOT / "src").rglob("*.py")) for line in sorted(messages(path)))
    if "--check" not in sys.argv:
        FILE.write_text(text, encoding="utf-8")
    elif FILE.read_text(encoding="utf-8") != text:
        print(
            "tests/messages.txt is not up to date: python tools/messages.py, and look at the difference",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
