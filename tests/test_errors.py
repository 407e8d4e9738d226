"""Every message of a user's mistake stays one printable line of bounded length, whatever the user's values are."""

from pathlib import Path

import pytest

from aimv2.cli.dispatch import main
from aimv2.errors import MOST, WORD, UsageError, first_line, shown

MESSAGES = (Path(__file__).parent / "messages.txt").read_text().splitlines()
VALUES = {
    "lines": "one\r\ntwo\n\n three",
    "long word": "x" * 10_000,
    "long text": "many words " * 1_000,
    "controls": "\x1b[31mred\x07\x00\u202e\u2028end",
    "not UTF-8": "caf\udce9",
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_all_messages_stay_one_line(value: str) -> None:
    for line in MESSAGES:
        template = line.split("] ", 1)[1]
        message = str(UsageError(template.replace("{}", value)))
        assert len(message) <= MOST and message.isprintable(), line
        message.encode()  # a terminal takes it
        begin, end = template.split("{}")[0].rstrip()[:300], template.split("{}")[-1].strip()[-300:]
        assert message.startswith(begin) and message.endswith(end), "what it is about and what to do are kept"


def test_short_messages_are_as_they_are() -> None:
    for line in MESSAGES:
        template = line.split("] ", 1)[1]
        assert shown(template) == template and len(template) <= MOST // 2, "bounds leave room for values"
    assert shown("/" + "p" * (WORD - 1)) == "/" + "p" * (WORD - 1)
    assert shown(f"a {'x' * 500}END b").split()[-2].endswith("END")


def test_others_words_are_one_line() -> None:
    assert first_line(OSError("bad \x1b[0m\nmore")) == "bad \\x1b[0m"
    assert len(first_line(ValueError("y" * 999))) <= 200 and first_line(ValueError()) == "ValueError"


def test_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """A value that reached the message through another way: an unknown command, a path."""
    for words in (["\x1b]0;x\x07" + "n" * 5000], ["data", "check", "no\nsuch" + "/y" * 3000]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.endswith("\n") and said[:-1].isprintable() and len(said) < MOST + 20
