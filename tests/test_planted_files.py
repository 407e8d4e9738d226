"""Files that somebody else wrote for us: each wrong one is a line, a counted sample, or nothing, and never a traceback."""

import ast
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from rich.console import Group
from rich.table import Table
from rich.text import Text

import aimv2
from aimv2.config.load import read_recipe
from aimv2.data.images.box_folders import open_yolo
from aimv2.data.images.box_rows import load_json
from aimv2.data.images.boxes import stated_classes
from aimv2.data.images.sources import SourceOptions
from aimv2.data.images.table_rows import saved_splits
from aimv2.data.images.text_tables import read_json_lines
from aimv2.data.shards.format import json_of, label_of
from aimv2.data.text.captions import read_captions
from aimv2.errors import UsageError
from aimv2.evals.detection.truth import load_coco
from aimv2.evals.result import read_result
from aimv2.evals.templates import read_lines
from aimv2.features.store import read_object
from aimv2.interop.hub import indexed_files
from aimv2.interop.model_folder import build_empty, read_best
from aimv2.interop.shapes import read_json
from aimv2.io import parse_yaml, say
from aimv2.pipeline.read import read_chain
from aimv2.pipeline.state import read_record
from aimv2.progress import open_bar
from aimv2.tables import TextTable
from aimv2.terminal import VisibleConsole
from aimv2.train.launch import read_summary
from aimv2.train.log import read_metrics
from aimv2.train.plain_state import read_state

DEEP, DIGITS, BYTES = b'{"a":' * 100_000, b'{"a": ' + b"9" * 5_000 + b"}", b'{"a": "\xff\xfe"}'
LEVELS = "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
BOMB = "a0: &a0 [x, x]\n" + LEVELS
MERGED = "a0: &a0 {x: 1}\n" + LEVELS.replace("[", "{<<: [").replace("]", "]}")
REFUSED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "config.json": ("config.json", lambda file: build_empty(file.parent, False)),
    "preprocessor": ("preprocessor_config.json", read_json),
    "index of weights": ("model.safetensors.index.json", lambda file: indexed_files(file.parent)),
    "annotations": ("instances.json", load_json),
    "truth": ("instances.json", lambda file: load_coco(file, "--data")),
    "result": ("result.json", read_result),
    "templates": ("templates.json", lambda file: read_lines(file, "--templates", "x")),
    "captions": ("captions.json", lambda file: list(read_captions(str(file)))),
    "features": ("about.json", lambda file: read_object(file, "--cache")),
    "record of a stage": ("record.json", read_record),
    "recipe": ("recipe.yaml", read_recipe),
    "chain": ("chain.yaml", lambda file: read_chain(str(file))),
    "YOLO": ("data.yaml", lambda file: open_yolo(file, SourceOptions())),
}


@pytest.mark.parametrize("content", [DEEP, DIGITS, BYTES], ids=["deep", "digits", "bytes"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_file_that_no_reader_can_take_is_one_line(tmp_path: Path, kind: str, content: bytes) -> None:
    name, read = REFUSED[kind]
    if name.endswith(".yaml"):
        content = content.replace(b'{"a":' * 100_000, b"[" * 2_000)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as error:
        read(tmp_path / name)
    assert error.value.code in ("unreadable", "invalid", "mismatch", "missing", "unsupported")
    assert len(str(error.value)) < 1300


@pytest.mark.parametrize("content", [DEEP, DIGITS, BYTES], ids=["deep", "digits", "bytes"])
def test_what_may_be_absent_is_absent_where_it_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("summary.json", "metrics.jsonl", "checkpoints/best.json", "aimv2.json"):
        (tmp_path / name).write_bytes(content + b"\n")
    assert read_summary(tmp_path) is None
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == []
    assert read_best(tmp_path) == {}
    assert stated_classes([tmp_path / "a.tar"]) == {}
    assert json_of({"json": content}) == {}
    (tmp_path / "rank-0.json").write_bytes(content)
    with pytest.raises((ValueError, OSError)):
        read_state(tmp_path / "rank-0")
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(ValueError):
        saved_splits(tmp_path)


def test_one_hostile_line_costs_itself(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join((b'{"a": 1}', b"[" * 100_000, DIGITS, b'{"a": 2}')))
    assert [value for _, value in read_json_lines(tmp_path / "rows.jsonl")] == [{"a": 1}, None, None, {"a": 2}]


@pytest.mark.parametrize(
    "text", [BOMB, MERGED, "a: &a [*a]", "[" * 100_000, "n: " + "9" * 5_000, "d: 2020-13-45", "a: !!int x"]
)
def test_yaml_of_others_is_read_within_limits(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


def test_yaml_with_aliases_is_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}] * 2,
    }
    assert json.dumps(parse_yaml("")) == "null"


@pytest.mark.parametrize("label", ["²", "9" * 5_000, str(2**70), "-1", "٣"])
def test_a_label_that_is_no_class_is_none(label: str) -> None:
    assert label_of({"cls": label.encode()}) == -1
    assert label_of({"cls": b"000017"}) == 17


def test_escapes_are_shown_and_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    say("dog\x1b[2J\x07\x9b, \udc80 and Ärger\tof\ntwo lines")
    assert capsys.readouterr().err == "dog\\x1b[2J\\x07\\x9b, \\udc80 and Ärger\tof\ntwo lines\n"
    assert "\x1b" not in str(UsageError("DATA \x1b]0;title\x07: no such folder"))


ESCAPE = "\x1b]0;title\x07a\x1b[2J\x9b"


def test_escapes_in_tables_and_bars_are_shown() -> None:
    out = io.StringIO()
    console = VisibleConsole(file=out, width=200, force_terminal=True, color_system="truecolor", highlight=False)
    table = Table("name")
    table.add_row(ESCAPE)
    table.add_row(Text(ESCAPE, style="red"))
    for one in (ESCAPE, Text(ESCAPE), Group(Text(ESCAPE), ESCAPE), table):
        console.print(one, markup=False)
    with open_bar(console, 3) as bar:
        bar.update(bar.task_ids[0], description=f"{ESCAPE} [/]")
        bar.refresh()
    printed = out.getvalue()
    assert printed.count("\\x1b[2J\\x9b") >= 8
    assert not re.search("\x07|\x9b|\x1b\\]|\x1b\\[2J", printed)
    assert "\x1b[31m" in printed  # its own colours
    assert TextTable(["name"], [[ESCAPE]]).to_text().splitlines()[1].startswith("\\x1b]0;title\\x07a\\x1b[2J\\x9b")


def test_nothing_prints_by_another_console() -> None:
    """A plain ``print`` of names, or rich's own console, would send what is in them."""
    source = Path(aimv2.__file__).parent
    found = []
    for file in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in ("print", "Console", "rich.print", "sys.stderr.write", "sys.stdout.write"):
                found.append(str(file.relative_to(source)))
    # help, versions and JSON, whose escapes are written out; recipes of the package; the address of the server; `say` itself
    assert set(found) == {"cli/dispatch.py", "commands/recipes.py", "explorer/server.py", "io.py"}


def test_files_of_others_are_parsed_in_one_place() -> None:
    """A plain ``json.loads`` has no limit of depth or digits, a YAML loader none of aliases."""
    source = Path(aimv2.__file__).parent
    plain = ("json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.full_load", "yaml.unsafe_load")
    found = set()
    for file in source.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in plain:
                again = isinstance(node.args[0], ast.Call) and ast.unparse(node.args[0].func) == "json.dumps"
                found |= set() if again else {str(file.relative_to(source))}
    # its own worker, its own run, a library's own text, a file of the package
    own = {"explorer/decoder.py", "doctor/selftest.py", "data/text/tokenizer.py", "evals/compare.py"}
    assert found == own | {"io.py"}


@pytest.mark.parametrize("kind", ["entities", "external", "deep"])
def test_xml_of_others(tmp_path: Path, kind: str) -> None:
    """expat itself limits entities and opens no other file; as Flickr30k's annotations are read."""
    levels = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    (tmp_path / "secret").write_text("nobody's business")
    text = {
        "entities": f'<!DOCTYPE x [<!ENTITY a0 "{"x" * 100}">{levels}]><annotation>&a11;</annotation>',
        "external": f'<!DOCTYPE x [<!ENTITY e SYSTEM "file://{tmp_path}/secret">]><annotation>&e;</annotation>',
        "deep": "<a>" * 100_000 + "</a>" * 100_000,
    }[kind]
    (tmp_path / "a.xml").write_text(text)
    try:
        root = ElementTree.parse(tmp_path / "a.xml").getroot()
    except ElementTree.ParseError:
        return
    assert kind == "deep"
    assert root.tag == "a"
