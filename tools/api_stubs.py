"""Writes the signatures of ``aimv2.api`` for type checkers, from the options classes of the commands.

    python tools/api_stubs.py [--check]

``--check`` exits with 1 where the file is not what this would write.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from aimv2.commands.parse import doc_of, options_class, plain_hints, signature_of
from aimv2.commands.table import COMMANDS, function_name

FILE = Path(__file__).resolve().parents[1] / "src/aimv2/api/__init__.pyi"
HEAD = """# Written by tools/api_stubs.py.
from typing import Any, Literal

from aimv2.data.text.models import load_model as load_model
from aimv2.data.text.models import save_pretrained as save_pretrained

"""
ACCEPTED = {
    "IntList": "int | str | list[int]",
    "SeedList": "int | str | list[int]",
    "BaselineList": "str | list[str] | None",
}
ACCEPTED |= {
    "RateList": "float | str | list[float]",
    "FloatList": "float | str | list[float]",
    "UntrainedOnly": "str | list[str] | None",
}


def written(hint: object, field_type: str) -> str:
    """A type as a stub has it; lists in the forms that are accepted."""
    if field_type in ACCEPTED:
        return ACCEPTED[field_type]
    text = inspect.formatannotation(hint).replace("typing.", "").replace("NoneType", "None")
    text = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)
    return re.sub(r"^Union\[(.*)\]$", lambda found: found[1].replace(", ", " | "), text)


def stub() -> str:
    """The whole file."""
    lines = [HEAD]
    for name in COMMANDS:
        kind = options_class(name)
        types: dict[str, str] = {}
        for base in reversed(kind.__mro__[:-1]):
            types |= inspect.get_annotations(base)
        hints = plain_hints(name)
        parameters = (
            f"{key}: {written(hints[key], types[key])}"
            + ("" if one.default is inspect.Parameter.empty else f" = {one.default!r}")
            for key, one in signature_of(name).parameters.items()
        )
        about = doc_of(name).split("\n\n")[0].replace("\n", "\n    ")
        lines.append(f'def {function_name(name)}({", ".join(parameters)}) -> dict[str, Any]:\n    """{about}"""\n')
    return "\n".join(lines)


def main() -> int:
    if "--check" not in sys.argv:
        FILE.write_text(stub())
        return 0
    if FILE.read_text() != stub():
        print("src/aimv2/api/__init__.pyi is not up to date: python tools/api_stubs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
