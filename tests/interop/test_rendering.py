"""Chat templates and settings of others: what computes without end, or is larger than it can be, is one line."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from aimv2.cli.dispatch import main
from aimv2.interop.plain import check_files
from aimv2.interop.rendering import TemplateError, limited, render
from tiny_llm import TEMPLATE, tokenizer

TALK = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
ENDLESS = {
    "a range": "{% for i in range(1000000000000) %}{% endfor %}",
    "a power": "{% for i in range(10**12) %}{% endfor %}",
    "a large power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "loops within loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a filter that loops": "{{ lipsum(n=100000000) }}",
    "a number that grows": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a macro of itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "too long": "x" * 3_000_000,
}
LARGE = {
    "a repeated text": "{{ 'a' * 9999999999 }}",
    "folded by the compiler": "{% if false %}{{ 'a' * 9999999999 }}{% endif %}{{ 'b' * 8888888888 }}",
    "a width": "{{ 'a' | center(9999999999) }}",
    "a format": "{{ '%9999999999d' % 1 }}",
    "a text that doubles": "{% set n = namespace(x='a' * 99999) %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a replacement": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
}


@pytest.fixture(scope="module")
def words() -> Any:
    return tokenizer(TEMPLATE)


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_does_not_end(words: Any, kind: str) -> None:
    with pytest.raises((TemplateError, OverflowError, RecursionError)):
        render(words, TALK, ENDLESS[kind])
    assert render(words, TALK) == words.apply_chat_template(TALK, tokenize=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is limited on Linux")
@pytest.mark.parametrize("kind", LARGE)
def test_a_template_that_takes_all_memory(words: Any, kind: str) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(MemoryError):
        render(words, TALK, LARGE[kind])
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytearray(1 << 20)) == 1 << 20


def test_plain_templates_are_as_before(words: Any) -> None:
    template = "{% for m in messages %}{{ ' ' * 2 }}{{ m.role ~ ': ' ~ m.content * loop.index0 }}\n{% endfor %}"
    with pytest.raises(TemplateError, match="multiplies"):
        render(words, TALK, template)
    template = template.replace(" * loop.index0", " * 2")
    many = TALK * 500
    assert render(words, many, template, True) == words.apply_chat_template(
        many, chat_template=template, tokenize=False, add_generation_prompt=True
    )


def test_templates_by_name() -> None:
    words = tokenizer(TEMPLATE)
    several = {"default": TEMPLATE, "power": "{{ 9 ** 9 ** 9 ** 9 }}"}
    plain = render(words, TALK)
    assert render(words, TALK, several) == plain
    words.chat_template = several
    assert render(words, TALK) == plain
    with pytest.raises(TemplateError, match="powers"):
        render(words, TALK, "power")


def test_a_pattern_that_backtracks_without_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<end>": 0, "a": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "a.txt").write_text("a" * 60 + "b")
    assert main(["data", "import", str(tmp_path / "images"), str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["data", "check", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer.json")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: a library ended on its input: Onig: ")


@pytest.mark.parametrize("lines", range(1, 30))
def test_everything_is_as_before_whenever_it_ends(lines: int) -> None:
    def trace(*_: object) -> None:
        return None

    def work() -> int:
        return sum(one for one in range(20))

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        try:
            assert limited(work, lines) == 190
        except TemplateError as error:
            assert f"within {lines} lines" in str(error)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert limited(work) == 190


@pytest.mark.parametrize(
    "about",
    [
        {"size": {"height": 10**9, "width": 10**9}},
        {"size": 10**9},
        {"crop_size": {"shortest_edge": 10**6}},
        {"image_processor": {"size": {"max_height": 224, "max_width": 10**6}}},
        {"image_grid_pinpoints": [[448, 10**7]]},
        {"size": {"shortest_edge": 3136, "longest_edge": 10**12}},
    ],
)
def test_an_image_processor_of_any_size(tmp_path: Path, about: dict[str, Any]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="pixels at most expected"):
        check_files(tmp_path)


def test_files_of_known_sizes_pass_and_others_do_not(tmp_path: Path) -> None:
    about = {
        "size": {"shortest_edge": 3136, "longest_edge": 12845056},  # numbers of pixels, of Qwen's
        "crop_size": {"height": 448, "width": 448},
        "image_grid_pinpoints": [[672, 672], [336, 1008]],
        "max_pixels": 12845056,
        "do_resize": True,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(about))
    check_files(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 30)  # takes no room
    with pytest.raises(OSError, match="1,073,741,824 bytes"):
        check_files(tmp_path)


def test_a_pipe_among_further_templates(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    os.mkfifo(tmp_path / "additional_chat_templates" / "tools.jinja")
    with pytest.raises(OSError, match="no regular file"):
        check_files(tmp_path)
