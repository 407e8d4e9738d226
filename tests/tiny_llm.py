"""Tiny language models with a tokenizer trained on the spot, and images of every shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import aimv2
from aimv2.errors import UsageError
from aimv2.models.create import create_model

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] | trim + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip


def tokenizer(template: str | None = TEMPLATE) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["user: What is this? assistant: a small red square"] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
    made.chat_template = template
    return made


def language_model(folder: Path, kind: str = "llama", template: str | None = TEMPLATE, **more: Any) -> Path:
    """A causal language model of random weights of ``kind`` (a model_type), with a tokenizer, in a folder."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    words = tokenizer(template)
    torch.manual_seed(1)
    config = CONFIG_MAPPING[kind](**{"vocab_size": len(words), **SHAPE, **more})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def encoder(folder: Path, native: bool = False) -> Path:
    """An encoder of 32 px, or a native one, with patches of 8."""
    name = "aimv2-tiny-patch8-32"
    more: dict[str, Any] = {"image_size": None, "min_patches": 4} if native else {}
    model = create_model(name, seed=5, width=32, depth=2, heads=2, hidden=64, **more)
    with torch.no_grad():  # norms that are no identity
        model.norm.weight.mul_(torch.rand(32, generator=torch.Generator().manual_seed(0)) + 0.5)
    aimv2.save_pretrained(model.eval(), folder)
    return folder


def picture(width: int, height: int) -> Image.Image:
    pixels = torch.randint(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((width, height))


def inputs(processor: Any, *images: Image.Image, text: str = "What is this?") -> Any:
    """A conversation per image, as the processor makes it."""
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": one}, {"type": "text", "text": text}]}]
        for one in images
    ]
    return processor.apply_chat_template(
        talks,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def vlm(root: Path, **llm: Any) -> Path:
    """``eyes``, ``llm`` and, built of them, ``vlm``, in a folder; ``llm``: see :func:`language_model`."""
    from aimv2 import api

    api.vlm_build(encoder(root / "eyes"), language_model(root / "llm", **llm), root / "vlm")
    return root / "vlm"


def refused(command: Any, code: str, option: str, *words: Any, **options: Any) -> str:
    """The sentence of the UsageError that a function of ``aimv2.api`` ends in."""
    with pytest.raises(UsageError) as caught:
        command(*words, **options)
    assert (caught.value.code, caught.value.option) == (code, option), caught.value
    return str(caught.value)
