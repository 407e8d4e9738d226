"""Prints what keeps the package a house that a stranger finds their way in: sizes, imports, names.

    python tools/house.py [--check]

Lines of each folder against its budget, what the training loop and ``aimv2 pretrain`` import at module level, circles of files, imports
that run up the road of a pair, and public class names that occur twice. ``--check`` exits with 1 where a limit is exceeded. Imports
under ``TYPE_CHECKING`` never count; those inside functions count for the direction only.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"
PACKAGE = "aimv2"
# the road of a pair, in order: a folder imports those before it; in lines, docstrings included
BUDGETS = {
    ".": 700, "config": 560, "models": 2_200, "interop": 2_000, "data": 5_300, "features": 1_600, "vlm": 800, "detect": 900,
    "objectives": 400, "tasks": 900, "train": 2_250, "plan": 1_100, "evals": 3_950, "report": 2_500, "doctor": 730, "explorer": 1_200,
    "commands": 1_300, "api": 60, "pipeline": 720, "cli": 420,
}  # fmt: skip
# limits: as it stands
CLOSURES = {"train/loop.py": ("aimv2.train.loop", 8_500), "aimv2 pretrain": ("aimv2.train.launch", 10_000)}
LINES, CIRCLES, TWICE, UP = 57_000, 0, 0, 0
FILE_LINES = 500
# arrows that run up, each inside a function: a task's final evaluation, a run's closing report, the command that runs chains
NAMED = {("tasks", "evals"), ("train", "report"), ("commands", "pipeline")}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((SOURCE / PACKAGE).rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from top_level(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from top_level(getattr(node, part, []))


def imported(tree: ast.Module, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports at module level."""
    found = set()
    for node in top_level(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= one_import(node, known)
    return found


def arrows_up(known: dict[str, Path], trees: dict[str, ast.Module]) -> list[str]:
    """Imports of a folder that comes later on the road, or of the command line from below it; wherever they stand."""
    order, found = list(BUDGETS), []
    for name, tree in trees.items():
        hidden = {id(inner) for node in ast.walk(tree) if is_type_checking(node) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if id(node) in hidden or not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            here = folder_of(name, known)
            for other in one_import(node, known):
                there = folder_of(other, known)
                up = order.index(there) > order.index(here) and name not in (PACKAGE, f"{PACKAGE}.__main__")
                if up and (here, there) not in NAMED:
                    found.append(f"{name} -> {other}")
    return sorted(set(found))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def folder_of(name: str, known: dict[str, Path]) -> str:
    """The folder of a module; "." for those of the package itself."""
    parts = known[name].relative_to(SOURCE / PACKAGE).parts
    return parts[0] if len(parts) > 1 else "."


def one_import(node: ast.Import | ast.ImportFrom, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
    found = {name for name in names if name in known}
    return {
        name for name in found if not any(other.startswith(f"{name}.") for other in found)
    }  # the module, not its package


def closure(start: str, graph: dict[str, set[str]]) -> set[str]:
    """A module, and everything that it reaches."""
    waiting, visited = [start], set[str]()
    while waiting:
        name = waiting.pop()
        if name not in visited:
            visited.add(name)
            waiting += graph[name]
    return visited


def with_packages(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same graph, where each module imports the packages above it too, as Python does."""
    above = {name: {other for other in graph if name.startswith(f"{other}.")} for name in graph}
    return {name: others | above[name] for name, others in graph.items()}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Groups of files that import each other in a circle at module level."""
    reach = {name: closure(name, graph) - {name} for name in graph}
    groups: list[set[str]] = []
    for name in graph:
        group = {name} | {other for other in reach[name] if name in reach[other]}
        if len(group) > 1 and group not in groups:
            groups.append(group)
    return groups


def main() -> int:
    known = modules()
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in known.items()}
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in known.items()}
    graph = {name: imported(tree, known) - {name} for name, tree in trees.items()}
    folders = Counter[str]()
    for name in known:
        folders[folder_of(name, known)] += lines[name]
    for folder, budget in BUDGETS.items():
        print(f"{folder:12} {folders[folder]:7,} of {budget:6,}{'  over' * (folders[folder] > budget)}")
    total = sum(lines.values())
    print(f"{'src':12} {total:7,} of 26,500")
    wrong = []
    for title, (start, limit) in CLOSURES.items():
        files = closure(start, with_packages(graph))
        count = sum(lines[name] for name in files)
        print(f"{title} imports {len(files)} files, {count:,} lines (at most {limit:,})")
        wrong += [f"{title}: {count:,} lines, {limit:,} allowed"] * (count > limit)
    found = circles(graph)
    print(f"{len(found)} circles of files", *(", ".join(sorted(group)) for group in found), sep="\n  ")
    classes = Counter(
        node.name
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name[0] != "_"
    )
    twice = {name: count for name, count in classes.items() if count > 1}
    print(
        f"{len(twice)} public class names used more than once:",
        ", ".join(f"{n} ({c})" for n, c in sorted(twice.items())),
    )
    up = arrows_up(known, trees)
    print(f"{len(up)} imports run up", *up, sep="\n  ")
    wrong += [f"{len(up)} imports run up, {UP} allowed"] * (len(up) > UP)
    wrong += [f"src: {total:,} lines, {LINES:,} allowed"] * (total > LINES)
    wrong += [f"{len(found)} circles of files, {CIRCLES} allowed"] * (len(found) > CIRCLES)
    wrong += [f"{len(twice)} class names used more than once, {TWICE} allowed"] * (len(twice) > TWICE)
    long = {name: count for name, count in lines.items() if count > FILE_LINES}
    wrong += [f"{name}: {count} lines, {FILE_LINES} allowed" for name, count in long.items()]
    for line in wrong:
        print(line, file=sys.stderr)
    return bool(wrong and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
