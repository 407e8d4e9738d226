"""Every command, option, key, file and test that the documentation names is there, by the real parsers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_commands import FENCE, PAGES, ROOT, Command, check, commands, words_of

from aimv2.commands.parse import option_fields, spelled
from aimv2.commands.table import COMMANDS
from aimv2.config.schema import config_class, known_keys
from aimv2.errors import UsageError

EVERY = [command for page in PAGES for command in commands(page)]
FILES = (".csv", ".json", ".pt", ".safetensors", ".txt", ".yaml")  # train.csv is no key
KEYS = {key for command in COMMANDS.values() for key in known_keys(config_class(command.task))}
SECTIONS = {key.split(".")[0] for key in known_keys() if "." in key}


def spans(page: Path) -> list[str]:
    """What stands in backquotes within sentences."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("\n", page.read_text()))]


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_command_parses(page: Path) -> None:
    for command in (one for one in EVERY if one.page == page):
        for words in words_of(command.text):
            try:
                check(words, command.inline)
            except (UsageError, AssertionError, SystemExit) as error:
                pytest.fail(f"{named(page)}: {command.text}\n{error}")


def test_commands_are_found_in_every_form() -> None:
    by_page = {named(page): [c for c in EVERY if c.page == page] for page in PAGES}
    assert sum(not c.inline for c in by_page["README.md"]) > 20, "fenced"
    assert sum(not c.inline for c in by_page["docs/stages.md"]) > 20, "indented, continued lines too"
    assert any(
        "--data.features features" in c.text and "--train.steps 20" in c.text and c.text.startswith("aimv2 pretrain")
        for c in by_page["docs/stages.md"]
    )
    assert any(c.inline and c.text.startswith("python benchmarks/") for c in by_page["docs/performance.md"])
    assert any("torchrun" in c.text and "--rdzv-backend" in c.text for c in by_page["docs/tutorials/many-gpus.md"])


@pytest.mark.parametrize(
    "text",
    [
        "aimv2 pretrane --run RUN",
        "aimv2 pretrain --optim.rl 1e-3",
        "aimv2 pretrain --train.steps many",
        "aimv2 embed MODEL PHOTOS OUT --pools mean",
        "aimv2 embed MODEL PHOTOS",
        "aimv2 knn MODEL --batch-size few",
        "python benchmarks/train_step.py --circles 3",
        "torchrun --nproc-per-nose 2 -m aimv2 -- pretrain",
        "torchrun --nproc-per-node 2 -m aimv2 -- pretrain --runn RUN",
        "make demonstration",
    ],
)
def test_a_wrong_command_would_be_found(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((UsageError, AssertionError, SystemExit)):
        for words in words_of(text):
            check(words)


def test_shorthand_means_each_of_its_verbs() -> None:
    assert words_of("aimv2 knn | data check MODEL --data D  # both") == [
        ["aimv2", "knn", "MODEL", "--data", "D"],
        ["aimv2", "data", "check", "MODEL", "--data", "D"],
    ]
    assert words_of("aimv2 linear RUN ... ; aimv2 compare RESULT...") == [
        ["aimv2", "linear", "RUN"],
        ["aimv2", "compare", "RESULT"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_options_and_keys_in_sentences_exist(page: Path) -> None:
    options = {
        "--config",
        "--dry-run",
        "--print-config",
        "--help",
        "--help-all",
        "--json",
        "--debug",
        *(f"--{k}" for k in KEYS),
    }
    for name in COMMANDS:
        if name != "pretrain":
            options |= {spelled(name, key) for key in option_fields(name)}
    options = {option.replace("_", "-") for option in options}
    given_to_benchmarks = set(
        re.findall(r"--[a-z-]+", " ".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py")))
    )
    for span in spans(page):
        for option in re.findall(r"^(--[a-z][\w.-]*)", span):
            if not option.startswith("--section"):
                assert option.replace("_", "-") in options | given_to_benchmarks, f"{named(page)}: {span}"
        if match := re.match(rf"((?:{'|'.join(sorted(SECTIONS))})\.[a-z_]+)(?:$|[ =])", span):
            assert match[1] in KEYS or match[1].endswith(FILES), f"{named(page)}: {span}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_and_tests_that_pages_name_exist(page: Path) -> None:
    text = page.read_text()
    for path, _, test in re.findall(r"\b((?:tests|recipes|benchmarks|src)/[\w./-]+\.(py|yaml|json))(?:::(\w+))?", text):
        assert (ROOT / path).is_file(), f"{named(page)} names {path}"
        assert not test or f"def {test}(" in (ROOT / path).read_text(), f"{named(page)} names {path}::{test}"


def test_every_verb_is_shown_somewhere() -> None:
    shown = {" ".join(words[1:3]) for command in EVERY for words in words_of(command.text) if words[0] == "aimv2"}
    shown |= {command.text.removeprefix("aimv2 ").split(" ")[0] for command in EVERY if isinstance(command, Command)}
    missing = [name for name in COMMANDS if not any(one == name or one.split(" ")[0] == name for one in shown)]
    assert not missing
