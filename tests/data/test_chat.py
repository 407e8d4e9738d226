"""Chat templates of every make: the scored tokens are the answers and their end of turn, and prompts are as generation has them."""

from __future__ import annotations

from typing import Any

import pytest

from aimv2.data.text.chat import Chat, ChatError
from aimv2.data.text.conversations import Conversation, Turn
from aimv2.errors import UsageError
from aimv2.vlm.language import FLATTEN
from tiny_llm import TEMPLATE, tokenizer

END = "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, "red one<|im_end|>"),
    "default system": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful, assistant.<|im_end|>\n{% endif %}"
        + CHATML,
        "red one<|im_end|>",
    ),
    "llama 3": (
        "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
        "red one<|im_end|>",
    ),
    "vicuna": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }} {% elif m['role'] == 'user' %}USER: {{ m['content'] }} "
        "{% else %}ASSISTANT: {{ m['content'] }}<end>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        " red one<end>",
    ),
    "thinking": (  # an empty thought before the last answer only, in the answer's part
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "red one<|im_end|>",
    ),
    "plain": (TEMPLATE, "red one\n"),
    "no end": (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
        "red one",
    ),
}
TALK = Conversation(
    (
        Turn("user", "<image>\nWhat colour is it?"),
        Turn("assistant", "red one"),
        Turn("user", "And assistant, where?"),
        Turn("assistant", "user: left"),
    )
)


def made(template: str) -> Any:
    words = tokenizer(FLATTEN + template)
    words.add_special_tokens(
        {"additional_special_tokens": ["<image>", "<|im_start|>", END, "<|head|>", "<|/head|>"], "bos_token": "<s>"},
        replace_extra_special_tokens=False,
    )
    return words


def answers(words: Any, ids: list[int], scored: list[bool]) -> list[str]:
    """The text of each run of scored tokens."""
    runs: list[list[int]] = []
    for number, (one, mark) in enumerate(zip(ids, scored)):
        if mark:
            runs += [[]] if not number or not scored[number - 1] else []
            runs[-1].append(one)
    return [words.decode(run) for run in runs]


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_answers_and_their_ends_are_scored(name: str, system: bool) -> None:
    template, first = TEMPLATES[name]
    words = made(template)
    talk = Conversation((Turn("system", "Be brief."), *TALK.turns)) if system else TALK
    chat, messages = Chat(words), talk.messages()
    for _ in range(5):  # the first are compared with a whole rendering, the others rely on the frame
        ids, scored = chat.encode(talk)
        found = answers(words, ids, scored)
        last = first.replace("red one", "user: left")
        if name == "thinking":
            last = "<think>\n\n</think>\n\n" + last
        assert found == [first, last + "<end>" if name == "no end" else last]
    shown = words.apply_chat_template(messages, tokenize=False)
    assert words.decode(ids).removesuffix("<end>" if name == "no end" else "") == shown
    if name not in ("plain", "no end"):  # there the answer's first token would swallow the prompt's last space
        assert ids == words(shown, add_special_tokens=False)["input_ids"]
    start = len(messages) - 3
    prompt = words.apply_chat_template(messages[:start], add_generation_prompt=True, return_dict=False)
    assert ids[: scored.index(True)] == prompt


def test_a_turn_that_the_template_reads_is_rendered_whole() -> None:
    words = made(CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}"))
    chat = Chat(words)
    assert answers(words, *chat.encode(TALK)) == ["red one" + END, "user: left" + END]
    thought = Conversation((*TALK.turns[:3], Turn("assistant", "hm</think>left")))
    with pytest.raises(ChatError, match="answer 2"):
        chat.encode(thought)
    assert answers(words, *chat.encode(TALK)) == ["red one" + END, "user: left" + END]


# the system prompt stands in the last question, and answers are trimmed
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if messages[0]['role'] == 'system' and "
    "m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}{{ messages[0]['content'] }}\n\n{% endif %}"
    "{{ m['content'] }}[/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}<end>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("texts", [("A", "A"), ("It is red", "It is blue")])
def test_a_system_prompt_in_the_last_turn(texts: tuple[str, str]) -> None:
    words = made(MISTRAL)
    system, first, second = Turn("system", "Be brief."), Turn("user", "<image>\nWhat?"), Turn("user", "And?")
    talk = Conversation((system, first, Turn("assistant", texts[0]), second, Turn("assistant", texts[1])))
    chat = Chat(words)
    for _ in range(5):
        ids, scored = chat.encode(talk)
        assert answers(words, ids, scored) == [f" {text}<end>" for text in texts]
        assert words.decode(ids) == words.apply_chat_template(talk.messages(), tokenize=False)


@pytest.mark.parametrize(
    ("change", "given", "shown"),
    [
        (".strip('\n')", "\nyes\n", "yes"),
        (".lstrip('\n')", "\nyes\n", "yes\n"),
        (".replace('  ', ' ')", "a  b", None),
        (".split('[/THINK]')[-1]", "hm[/THINK]yes", None),
        (".replace('\n', ' ')", "a\nb", None),
    ],
)
def test_no_text_that_the_template_would_not_write(change: str, given: str, shown: str | None) -> None:
    words = made(CHATML.replace("m['content'] }}", f"m['content']{change} }}}}"))
    chat = Chat(words)
    for _ in range(5):
        chat.encode(Conversation((Turn("user", "What?"), Turn("assistant", "ok"))))
    talk = Conversation((Turn("user", "What?"), Turn("assistant", given)))
    if shown is None:  # a bad row
        with pytest.raises(ChatError, match="answer 1"):
            chat.encode(talk)
        return
    ids, scored = chat.encode(talk)
    assert words.decode(ids) == words.apply_chat_template(talk.messages(), tokenize=False)
    assert answers(words, ids, scored) == [("yes" if change.startswith(".strip") else shown) + END]


def test_few_rows_are_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first three, one in a thousand, and those that a template might read; an image at the end of a question is none of these."""
    chat, rendered = Chat(made(CHATML)), list[int]()
    render = chat.render
    monkeypatch.setattr(
        chat, "render", lambda messages, **more: (rendered.append(len(messages)), render(messages, **more))[1]
    )
    talk = Conversation((Turn("user", "What?\n<image>"), Turn("assistant", "a\n\n- red one [sic"), *TALK.turns[:2]))
    for _ in range(1_999):
        chat.encode(talk)
    assert rendered.count(4) <= 3 + 1 + 3 and len(rendered) < 12
    before = len(rendered)
    for odd in (" a", "a\n", "a  b", "<b>", "[/INST]"):
        chat.encode(Conversation((*talk.turns[:3], Turn("assistant", odd))))
    assert len(rendered) == before + 5


def test_a_template_that_refuses_is_named() -> None:
    chat = Chat(made("{{ raise_exception('no system here') if messages[0]['role'] == 'system' }}" + CHATML))
    with pytest.raises(ChatError, match="no system here"):
        chat.encode(Conversation((Turn("system", "Be brief."), *TALK.turns)))
    assert any(chat.encode(TALK)[1])


def test_tokens_that_the_tokenizer_adds_come_first() -> None:
    from tokenizers.processors import TemplateProcessing

    words = made(CHATML)
    words.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", words.bos_token_id)])
    ids, scored = Chat(words).encode(TALK)
    assert ids == words(words.apply_chat_template(TALK.messages(), tokenize=False))["input_ids"]
    assert ids[0] == words.bos_token_id
    assert not scored[0]


def test_a_tokenizer_without_a_library_is_refused() -> None:
    with pytest.raises(UsageError) as error:
        Chat(object())
    assert error.value.option == "init"
