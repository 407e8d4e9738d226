"""What the twin of benchmarks/vlm_twin.py needs and no command makes: a small language model, a contrastive encoder, raw patches.

Legend: B pairs, T tokens, D width.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import aimv2
from aimv2.data.shards.format import find_shards, read_samples, write_manifest, write_shard
from aimv2.data.text.tokenizer import train_tokenizer
from aimv2.models.create import build
from aimv2.models.encoder import VisionEncoder
from aimv2.models.init import init_weights
from aimv2.models.lit import TextConfig, TextEncoder
from aimv2.models.sizes import EncoderConfig, model_config
from aimv2.objectives.contrastive import softmax_loss
from aimv2.progress import progress_bar
from aimv2.train.optim import parameter_groups

SIDE, PATCH = 32, 8  # of every eye, pixels
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Q: ' + message['content'] | trim + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'A: ' }}{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
LLM = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
CONTEXT = 512


def samples_of(data: Path) -> Iterator[dict[str, bytes]]:
    """Training samples of shards."""
    for tar in find_shards(data, "train"):
        yield from (parts for _, parts in read_samples(tar))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[], Tensor],
    steps: int,
    peak: float,
    title: str,
) -> float:
    """Steps with a rate that rises over a twentieth of them and falls to 0 on a cosine; the mean loss of their last tenth."""
    losses = []
    with progress_bar(f"{title}, steps", steps) as advance:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = (
                    peak * min((step + 1) / max(steps // 20, 1), 1.0) * (0.5 + 0.5 * np.cos(np.pi * step / steps))
                )
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
            advance(1)
    return float(torch.stack(losses[-max(steps // 10, 1) :]).mean())


def texts_of(data: Path) -> list[str]:
    """Captions, and questions with their answers where there are some, as the language model reads them, without images."""
    found = []
    for parts in samples_of(data):
        about = json.loads(parts.get("json", b"{}"))
        captions = (
            [parts["txt"].decode()] if "txt" in parts else [one for key in about["captions"].values() for one in key]
        )
        found += [f"{caption}<end>" for caption in captions]
        if about.get("questions"):
            turns = [(one["question"], one["answer"]) for one in about["questions"]]
            found.append("".join(f"Q: {question}\nA: {answer}<end>" for question, answer in turns))
    return found


def language_model(
    data: Path, out: Path, steps: int, seed: int, batch: int = 32, length: int = 128, vocabulary: int = 512
) -> float:
    """A small Llama, trained on the texts of scenes alone, with its tokenizer and chat template, in a folder.

    Args:
        data: shards with captions, of scenes with questions too.
        out: folder.
        steps: of ``batch`` rows of ``length`` tokens each, texts one after the other.
        seed: of weights and order.
        batch, length: see above.
        vocabulary: most tokens.

    Returns:
        the loss of the last tenth of the steps, nats a token.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = texts_of(data)
    order = np.random.default_rng(seed)
    order.shuffle(texts)
    words = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(texts, vocabulary), eos_token="<end>", pad_token="<pad>"
    )
    words.chat_template = TEMPLATE
    ids = torch.tensor([token for text in texts for token in words(text)["input_ids"]])
    torch.manual_seed(seed)
    end, pad = words.eos_token_id, words.pad_token_id
    special = {"eos_token_id": end, "bos_token_id": end, "pad_token_id": pad}
    config = LlamaConfig(
        **LLM, vocab_size=len(words), max_position_embeddings=CONTEXT, tie_word_embeddings=True, **special
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def loss() -> Tensor:
        starts = order.integers(0, len(ids) - length, batch)
        rows = torch.stack([ids[at : at + length] for at in starts])
        return model(input_ids=rows, labels=rows).loss

    last = train(model, optimizer, loss, steps, 2e-3, "language model")
    model.save_pretrained(out)
    words.save_pretrained(out)
    return last


def word_tokenizer(texts: list[str], vocabulary: int = 512) -> Any:
    """A byte-level BPE in which the words of scenes are single tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<end>"]
    made.train_from_iterator(
        texts[:4000],
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made


class Pair(nn.Module):
    """An encoder and a causal text tower, each averaged or pooled and projected, with a learned scale (CLIP)."""

    def __init__(self, encoder: VisionEncoder, text: TextConfig) -> None:
        super().__init__()
        self.encoder, self.text = encoder, TextEncoder(text)
        width = encoder.config.width
        self.image_projection, self.text_projection = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))

    def forward(self, images: Tensor, text: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] and int64 [B, T] -> the loss, nats a pair."""
        image = F.normalize(self.image_projection(self.encoder(images).mean(1)), dim=-1)
        caption = F.normalize(self.text_projection(self.text.pool(text)), dim=-1)
        scale = self.log_scale.clamp(0, np.log(100)).exp()
        return softmax_loss(image, caption, image, caption, scale, 0) / len(images)


def encoder_shape(name: str = "aimv2-tiny-patch8-32") -> EncoderConfig:
    """The shape of every encoder that is trained here."""
    return model_config(name)[0]


def contrastive(data: Path, out: Path, steps: int, seed: int, batch: int = 128, peak: float = 1e-3) -> float:
    """An encoder trained with its text tower from nothing on images and captions, in a folder.

    Args:
        data: shards of captioned scenes.
        out: folder.
        steps: of ``batch`` pairs.
        seed: of weights and order.
        batch: pairs that are told apart.
        peak: learning rate.

    Returns:
        the loss of the last tenth of the steps, nats a pair.
    """
    read = [(parts["png"], parts["txt"].decode()) for parts in samples_of(data)]
    sees = aimv2.image_transform(encoder_shape().name)
    images = torch.stack([sees(Image.open(io.BytesIO(png))) for png, _ in read])
    words = train_tokenizer((caption for _, caption in read), 512)
    rows = [words.encode(caption, 77) for _, caption in read]
    text = torch.full((len(rows), max(map(len, rows))), words.eos_id)
    for row, ids in zip(text, rows):
        row[: len(ids)] = torch.tensor(ids)
    shape = encoder_shape()
    made = build(shape, None, seed)
    assert isinstance(made, VisionEncoder)
    tower = TextConfig(shape.width, 4, shape.heads, shape.hidden, words.vocab_size, text.shape[1], words.eos_id)
    torch.manual_seed(seed)
    model = Pair(made, tower)
    init_weights(model.text, seed + 1)
    groups = [{**group, "weight_decay": decay} for group, decay in zip(parameter_groups(model), (0.05, 0.0))]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=peak, betas=(0.9, 0.95), fused=True
    )
    order = np.random.default_rng(seed)

    def loss() -> Tensor:
        chosen = torch.from_numpy(order.choice(len(rows), batch, replace=False))
        return model.train()(images[chosen], text[chosen])

    last = train(model, optimizer, loss, steps, peak, "contrastive encoder")
    aimv2.save_pretrained(model.encoder.eval(), out)
    return last


@torch.no_grad()
def raw_patches(out: Path) -> None:
    """An encoder whose one block adds nothing: its features are the pixels of a patch, as wide as a patch has values."""
    width = 3 * PATCH**2
    shape = EncoderConfig("raw-patches", width, 1, 1, 8, PATCH, SIDE, (0.5,) * 3, (0.5,) * 3)
    made = build(shape, None, 0)
    assert isinstance(made, VisionEncoder) and made.patch_embed.proj.bias is not None
    made.patch_embed.proj.weight.copy_(torch.eye(width).view(width, 3, PATCH, PATCH))
    made.patch_embed.proj.bias.zero_()
    made.patch_embed.position.zero_()
    for last in (made.blocks[0].attn.proj, made.blocks[0].mlp.down):
        last.weight.zero_()
    aimv2.save_pretrained(made.eval(), out)


def untrained(out: Path, seed: int, side: int = SIDE) -> None:
    """An encoder of random weights for images of ``side`` pixels, in a folder."""
    shape = replace(encoder_shape(), image_size=side)
    aimv2.save_pretrained(build(shape, None, seed).eval(), out)  # type: ignore[arg-type]


# ---- rows of examples, whose question only they explain ----


WHAT = "What is it?"
HIDDEN = ("colour", "shape", "where")
EXAMPLES = 8  # most of them before a question


def hidden_answer(parts: dict[str, bytes], kind: str) -> str:
    """What ``WHAT`` means in a row of that kind, of a scene of one object."""
    (one,) = json.loads(parts["json"])["objects"]
    return str(one["place" if kind == "where" else kind])


def interleaved(data: Path, out: Path, seed: int) -> int:
    """Shards of conversations with one to nine images, each with :data:`WHAT` and its answer; all of one kind, which is drawn.

    Args:
        data: shards of scenes of one object.
        out: folder.
        seed: of the kinds and lengths.

    Returns:
        how many conversations.
    """
    order = np.random.default_rng(seed)
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split in ("train", "val"):
        scenes = [parts for tar in find_shards(data, split) for _, parts in read_samples(tar)]
        rows, at = [], 0
        while at < len(scenes):
            kind, length = HIDDEN[order.integers(len(HIDDEN))], 1 + int(order.integers(EXAMPLES + 1))
            row, at = scenes[at : at + length], at + length
            turns = []
            for parts in row:
                turns += [
                    {"from": "human", "value": f"<image>\n{WHAT}"},
                    {"from": "gpt", "value": hidden_answer(parts, kind)},
                ]
            images = {"png" if n == 0 else f"{n}.png": parts["png"] for n, parts in enumerate(row)}
            rows.append((f"{len(rows):06d}", {**images, "json": json.dumps({"conversations": turns}).encode()}))
        counts[split] = write_shard(out / f"{split}-000000.tar", rows)
    write_manifest(out, counts)
    return sum(counts.values())


def hidden_tasks(data: Path, out: Path, count: int) -> None:
    """A task of lmms-eval for each kind, its examples from a training split of the same kind.

    Args:
        data: shards of scenes of one object, of which the validation split is tested.
        out: folder of task files and tables.
        count: of scenes of each table, at most.
    """
    from datasets import Dataset, Features, Image, Value

    made = out.with_name(f".{out.name}")
    made.mkdir(parents=True, exist_ok=True)
    columns = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    for kind in HIDDEN:
        for split in ("train", "val"):
            scenes = [parts for tar in find_shards(data, split) for _, parts in read_samples(tar)][:count]
            rows = [
                {"image": {"bytes": parts["png"]}, "question": WHAT, "answer": hidden_answer(parts, kind)}
                for parts in scenes
            ]
            Dataset.from_list(rows, features=columns).to_parquet(made / f"{kind}-{split}.parquet")
        files = {"train": f"{out}/{kind}-train.parquet", "test": f"{out}/{kind}-val.parquet"}
        task = {
            "task": f"hidden_{kind}", "dataset_path": "parquet", "dataset_kwargs": {"data_files": files},
            "training_split": "train", "test_split": "test", "output_type": "generate_until", "doc_to_visual": "image",
            "doc_to_text": "question", "doc_to_target": "answer", "generation_kwargs": {"max_new_tokens": 8},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }  # fmt: skip
        (made / f"{kind}.yaml").write_text(json.dumps(task))
    made.rename(out)
