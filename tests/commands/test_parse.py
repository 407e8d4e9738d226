"""Options of commands: the one road from a mapping, its types, ranges and lists, on the command line, in chains and in Python."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from aimv2 import api
from aimv2.cli import main
from aimv2.cli.dispatch import read_words
from aimv2.commands.parse import doc_of, help_texts, option_fields, options_class, read
from aimv2.commands.table import COMMANDS, function_name
from aimv2.errors import UsageError
from aimv2.pipeline.read import read_chain

SIGNATURES = Path(__file__).parents[1] / "api_signatures.txt"
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"k": "0"}, "--k", "invalid"),
    ({"k": "best"}, "--k", "invalid"),
    ({"k": []}, "--k", "invalid"),
    ({"weights": "distanc"}, "--weights", "unknown"),
    ({"pool": "none"}, "--pool", "unknown"),
    ({"temperature": 0}, "--temperature", "invalid"),
    ({"batch_size": 0}, "--batch-size", "invalid"),
    ({"batch_size": "many"}, "--batch-size", "invalid"),
    ({"train_limit": -1}, "--train-limit", "invalid"),
    ({"baselines": "random,pixel"}, "--baselines", "unknown"),
    ({"precision": "fp16"}, "--precision", "unknown"),
]


@pytest.mark.parametrize(("given", "option", "code"), WRONG, ids=str)
def test_three_roads_say_the_same(
    given: dict[str, Any], option: str, code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as error:
        api.knn("M", data="D", **given)
    assert (error.value.option, error.value.code) == (option, code)
    ((key, value),) = given.items()
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    assert main(["knn", "M", "--data", "D", f"--{key}={text}"]) == 2
    assert capsys.readouterr().err == f"error: {error.value}\n"
    chain = {
        "out": str(tmp_path / "o"),
        "stages": {"a": {"verb": "knn", "model": "M", "options": {"data": "D", **given}}},
    }
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(chain))
    with pytest.raises(UsageError) as of_chain:
        api.run(str(tmp_path / "chain.yaml"))
    assert str(of_chain.value).endswith(str(error.value))
    assert (of_chain.value.option, of_chain.value.code) == (option, code)


@pytest.mark.parametrize("value", ["1,5", "1, 5", [1, 5], (1, 5), "[1, 5]"], ids=str)
def test_forms_of_a_list(value: Any) -> None:
    assert read("knn", {"model": "M", "k": value}).k == (1, 5)


def test_forms_of_other_values() -> None:
    options = read(
        "knn", {"model": Path("runs/a"), "k": 5, "layers": [3, -1], "batch_size": "8", "image_size": "native"}
    )
    assert (options.model, options.k, options.layers) == ("runs/a", (5,), "3,-1")
    assert (options.batch_size, options.image_size, options.baselines) == (8, "native", ())
    assert read("probe", {"model": "M", "rates": 1e-3, "baselines": ["random"]}).rates == (1e-3,)
    assert read("retrieve", {"model": "M", "candidates": None}).candidates is None


def test_what_is_missing_or_unknown() -> None:
    with pytest.raises(UsageError) as error:
        read("knn", {"data": "D"})
    assert (error.value.option, error.value.code) == ("MODEL", "missing")
    with pytest.raises(UsageError, match=r"unknown option '--layer'; did you mean '--layers'\?") as error:
        read("knn", {"model": "M", "layer": "last"})
    assert error.value.code == "unknown"
    with pytest.raises(TypeError, match="layer"):
        api.knn("M", layer="last")


def test_signatures_are_those_on_record() -> None:
    """Parameters, their order and defaults are part of the interface: a new option is a new line here, at the end."""
    written = []
    for name in sorted(api.__all__):
        parameters = inspect.signature(getattr(api, name)).parameters
        shown = (k if p.default is p.empty else f"{k}={p.default!r}" for k, p in parameters.items())
        written.append(f"{name}({', '.join(shown)})\n")
    assert "".join(written) == SIGNATURES.read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_text_and_every_text_an_option(name: str) -> None:
    texts = help_texts(name)
    assert set(texts) == set(option_fields(name))
    assert all(texts.values())
    assert options_class(name).__doc__.split()[0] in doc_of(name)
    assert getattr(api, function_name(name)).__doc__ == doc_of(name)


def test_no_command_imports_torch_before_it_runs() -> None:
    modules = ", ".join(f"aimv2.commands.{function_name(name)}" for name in COMMANDS)
    code = f"import sys, {modules}, aimv2.api, aimv2.cli; print([n for n in ('torch', 'jsonargparse') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_one_of_several_and_a_mapping() -> None:
    assert read("caption", {"model": "M", "images": "a.png"}).images == ["a.png"]
    assert read("compare", {"results": "r"}).results == ["r"]
    with pytest.raises(UsageError, match=r"--seed .*a single value expected"):
        read("knn", {"model": "M", "seed": {"a": 1}})
    with pytest.raises(UsageError) as error:
        read("caption", {"model": "M", "images": 3})
    assert error.value.option == "IMAGES" and str(error.value).startswith("IMAGES ")


def test_a_chain_runs_what_it_has_checked(tmp_path: Path) -> None:
    """Lists of text options reach the stage's process as text with commas."""
    options = {"data": "D", "baselines": ["random", "pixels"], "layers": [0, -1], "k": [1, 5]}
    stages = {
        "a": {"verb": "knn", "model": "M", "options": options},
        "b": {"verb": "caption", "model": "M", "images": "photos"},
    }
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump({"out": str(tmp_path / "o"), "stages": stages}))
    first, second = read_chain(str(path)).jobs
    assert {"--baselines=random,pixels", "--layers=0,-1", "--k=1,5"} <= set(first.command)
    assert second.command == ["caption", "M", "photos"]
    given = read("knn", read_words("knn", first.command[1:]))
    assert (given.baselines, given.layers, given.k) == (("random", "pixels"), "0,-1", (1, 5))


def test_a_range_shows_the_number_that_was_given() -> None:
    with pytest.raises(UsageError, match="--seed -12345678: at least 0"):
        read("knn", {"model": "M", "seed": -12345678})
