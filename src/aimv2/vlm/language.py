"""A causal language model of ``transformers`` with its tokenizer and chat template, checked before an encoder goes under it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aimv2.errors import UsageError, first_line
from aimv2.features.foreign import open_transformers
from aimv2.features.pixels import quiet
from aimv2.interop import load
from aimv2.interop.plain import open_plain
from aimv2.interop.rendering import render
from aimv2.interop.shapes import read_json
from aimv2.io import read_file

IMAGE_TOKEN = "<image>"
WANTED = "a folder or hub id of a causal language model of transformers (Llama, Qwen, SmolLM, OLMo, ...) is expected"
TEXT = "What is this?"
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXT}]}]
# before a template of texts: parts of a message become one text, with IMAGE_TOKEN and a line break for an image
FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is iterable and message['content'] is not string and message['content'] is not mapping -%}
{%- set joined = namespace(text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set joined.text = joined.text + '<image>\\n' -%}
{%- elif part['type'] == 'text' -%}{%- set joined.text = joined.text + part['text'] -%}{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=joined.text)] -%}
{%- else -%}{%- set flat.messages = flat.messages + [message] -%}{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}{{- '' }}"""


@dataclass
class Language:
    """A language model that knows :data:`IMAGE_TOKEN`.

    Attributes:
        given: the user's argument.
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: of transformers, with the image token and a chat template that takes images.
        added: whether the image token is new to it.
    """

    given: str
    model: Any
    tokenizer: Any
    added: bool

    @property
    def image_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))

    @property
    def context(self) -> int | None:
        """Most positions of a sequence; None where its config states none."""
        return getattr(self.model.config, "max_position_embeddings", None)


@contextmanager
def named(option: str) -> Iterator[None]:
    """Errors on MODEL, raised by the loaders, as errors on the argument ``option``."""
    try:
        yield
    except UsageError as error:
        text = str(error).replace("MODEL", option, 1)
        raise UsageError(text, option=option, code=error.code) from None


def is_vlm(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a vision-language model of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return config.get("model_type") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and "vision_config" in config


def open_language(source: str, template: str | None, dtype: str) -> Language:
    """Opens LLM: complete weights from safetensors files, no code of the folder, an image token and a chat template.

    Args:
        source: folder or hub id.
        template: file of a chat template (Jinja); None: the tokenizer's own.
        dtype: of the weights; auto: as stored.

    Raises:
        UsageError: no causal language model, incomplete weights, no tokenizer, no chat template.
    """
    with named("LLM"):
        at = load.locate(source)
        config = read_json(at.folder / "config.json")
    refuse_others(source, config)
    with named("LLM"):
        model, missing = open_transformers(source, at.folder, "cpu", "AutoModelForCausalLM")
    if missing:
        name, why = next(iter(missing.items()))
        more = f"its weights lack {name}{why}" + f" and {len(missing) - 1} more" * (len(missing) > 1)
        raise UsageError(f"LLM {source}: {more}; the whole model is expected", code="mismatch")
    refuse_not_causal(source, model)
    tokenizer = open_tokenizer(source, at.folder)
    tokenizer.chat_template = FLATTEN + read_template(source, tokenizer, template)
    language = Language(source, model.to(load.float_type(None if dtype == "auto" else dtype)), tokenizer, False)
    language.added = add_image_token(language)
    check_template(language, template)
    return language


def refuse_others(source: str, config: dict[str, Any]) -> None:
    """Raise UsageError for a folder that is no language model of transformers, by its ``config.json``."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    kind = str(config.get("model_type", ""))
    if not config:
        raise UsageError(f"LLM {source}: no config.json; {WANTED}", code="not-found")
    if kind.startswith("aimv2") or config.get("format") == "aimv2":
        raise UsageError(f"LLM {source}: an AIMV2, which is what ENCODER takes; {WANTED}", code="mismatch")
    if is_vlm(config):
        raise UsageError(f"LLM {source}: a vision-language model already ('{kind}'); {WANTED}", code="mismatch")
    if kind not in KNOWN:
        why = "whose code, which the folder has, is never run" if "auto_map" in config else "which is none"
        raise UsageError(f"LLM {source}: model_type '{kind}', {why}; {WANTED}", code="mismatch")


@torch.no_grad()
def refuse_not_causal(source: str, model: Any) -> None:
    """Raise UsageError where logits depend on later tokens, or the head is not a plain matmul at the end."""
    ids = probe_ids(model)
    changed = ids.clone()
    changed[:, -1] = 0
    try:
        first, second = (model(input_ids=one).logits[:, :-1].float() for one in (ids, changed))
        head = model.get_output_embeddings()
    except Exception as error:  # of a model for other input
        why = f"it can't be run on token ids ({first_line(error)})"
        raise UsageError(f"LLM {source}: {why}; {WANTED}", code="mismatch") from None
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().amax())):
        raise UsageError(f"LLM {source}: its logits depend on later tokens; {WANTED}", code="mismatch")
    if head is None or getattr(head, "bias", None) is not None:
        what = "no output head of its own" if head is None else "an output head with a bias"
        raise UsageError(f"LLM {source}: {what}, which the vision-language classes can't hold", code="unsupported")


def probe_ids(model: Any) -> Tensor:
    """int64 [1, 8] token ids to try a model on."""
    return torch.arange(1, 9)[None] % model.get_input_embeddings().num_embeddings


def open_tokenizer(source: str, folder: Path) -> Any:
    """The tokenizer, padding on the left, as generation in batches needs it."""
    try:
        with quiet():
            tokenizer = open_plain("AutoTokenizer", folder)
    except Exception as error:  # of the file system, of a configuration, code that would have to run
        why = f"its tokenizer can't be opened ({first_line(error)})"
        raise UsageError(f"LLM {source}: {why}", code="unreadable") from None
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_template(source: str, tokenizer: Any, template: str | None) -> str:
    """The chat template of ``--chat-template``, else the tokenizer's (of several the one named default).

    Raises:
        UsageError: there is none, or the file can't be read.
    """
    if template is not None:
        try:
            return read_file(Path(template).expanduser()).decode()
        except (OSError, UnicodeDecodeError) as error:
            why = f"can't be read ({first_line(error)})"
            raise UsageError(f"--chat-template {template}: {why}", code="unreadable") from None
    found = tokenizer.chat_template
    found = found.get("default") if isinstance(found, dict) else found
    if not found:
        raise UsageError(
            f"LLM {source}: its tokenizer has no chat template; --chat-template FILE gives one, a Jinja file such as the "
            "chat_template.jinja of the same model's chat version",
            code="missing",
        )
    return str(found)


@torch.no_grad()
def add_image_token(language: Language) -> bool:
    """Ensures one token for :data:`IMAGE_TOKEN`; its rows in both embeddings become the means of the known tokens' rows."""
    model, tokenizer = language.model, language.tokenizer
    known = len(tokenizer)
    if IMAGE_TOKEN in tokenizer.get_vocab():
        return False
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:  # others have rows to spare
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        table.weight[language.image_id] = table.weight[:known].float().mean(0).to(table.weight.dtype)
    return True


def check_template(language: Language, template: str | None) -> None:
    """Raise UsageError where a question on an image is not rendered with one image token and its text."""
    option = f"LLM {language.given}: its chat template" if template is None else f"--chat-template {template}: it"
    try:
        shown = render(language.tokenizer, QUESTION, prompt=True)
    except Exception as error:  # of Jinja, or raised by the template
        raise UsageError(f"{option} can't be rendered ({first_line(error)})", code="unreadable") from None
    if shown.count(IMAGE_TOKEN) != 1 or TEXT not in shown:
        why = f"does not show the content of a user's message once: {shown[:200]!r}"
        raise UsageError(f"{option} {why}; give another with --chat-template FILE", code="mismatch")
