"""A vision-language model as one folder that ``transformers`` opens without code of ours: an encoder, the paper's 2-layer MLP
(section 5.6) and a causal language model.

Legend: N patches, D width of the encoder, L width of the language model.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import aimv2
from aimv2.errors import UsageError, first_line
from aimv2.features.pixels import quiet
from aimv2.interop import convert as out_of
from aimv2.interop import layouts, load
from aimv2.interop.card import encoder_in
from aimv2.interop.public import public, public_files
from aimv2.interop.rendering import render
from aimv2.interop.shapes import read_json
from aimv2.models.encoder import VisionEncoder
from aimv2.models.sizes import EncoderConfig
from aimv2.vlm.language import IMAGE_TOKEN, QUESTION, Language, is_vlm, named, open_language, probe_ids

NATIVE_SIDE = 448  # longest side of an image under a native encoder, in pixels
POST, PRE = "post-norm", "pre-norm"
BETTER = "1.6 points"  # benchmarks/vlm_twin_studies.py TWIN features --seeds 0,1,2
USE = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({out!r})
processor = AutoProcessor.from_pretrained({out!r})
parts = [{{"type": "image", "url": "photo.jpg"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": parts}}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])"""


@dataclass(frozen=True)
class Layout:
    """What the folder is to be.

    Attributes:
        features: post-norm (the encoder's output) or pre-norm (the last block's).
        tiles: g of g x g tiles and a thumbnail; 1: the image only.
        size: side of the square image, or the longest side under a native encoder, in pixels.
        patch: side of a patch, in pixels.
        native: images keep their aspect ratio.
    """

    features: str
    tiles: int
    size: int
    patch: int
    native: bool

    @property
    def most_tokens(self) -> int:
        """Image tokens of a square image, the most that one takes."""
        side = self.size // self.patch
        wide = side * self.tiles
        return side**2 + (wide * (wide + 1) if self.tiles > 1 else 0)


def plan(config: EncoderConfig, features: str | None, tiles: int, image_size: int | None) -> Layout:
    """The layout of an encoder's options.

    Raises:
        UsageError: options that do not go together.
    """
    native, why = config.image_size is None, ""
    wanted = features or (POST if native else PRE)
    if tiles > 1 and features == POST:
        why = f"--features {POST}: the class of transformers that takes tiles has pre-norm features; leave --features or --tiles out"
    elif tiles > 1 and native:
        why = f"--tiles {tiles}: a native encoder takes a larger image as it is; --image-size sets its side"
    elif image_size is not None and not native:
        why = f"--image-size {image_size}: this encoder takes {config.image_size} px; the option is of native encoders"
    if why:
        raise UsageError(why, code="conflict")
    size = config.image_size or image_size or NATIVE_SIDE
    low, high = config.min_patches, config.max_patches
    if size % config.patch_size or (native and not low <= (size // config.patch_size) ** 2 <= high):
        more = f", and a square image of {low} to {high} patches" if native else ""
        raise UsageError(f"--image-size {size}: a multiple of the patch size {config.patch_size} expected{more}")
    return Layout(wanted, tiles, size, config.patch_size, native)


def build(
    encoder: str, llm: str, out: str, features: str | None = None, tiles: int = 1, chat_template: str | None = None,
    image_size: int | None = None, dtype: str = "auto", seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Write the folder; the arguments are those of :class:`aimv2.commands.vlm_build.VlmBuildOptions`.

    Returns:
        what was built.

    Raises:
        UsageError: parts that do not fit, or something in ``out``.
    """
    out_of.check_out(out)
    trunk = open_encoder(encoder)
    layout = plan(trunk.config, features, tiles, image_size)
    language = open_language(llm, chat_template, dtype)
    processor = make_processor(trunk.config, layout, language.tokenizer)
    check_context(language, layout)
    model = assemble(trunk, language, layout, seed)
    with out_of.new_folder(out) as folder, quiet():
        try:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        except ValueError as error:  # generation settings that contradict each other
            raise UsageError(f"LLM {llm}: it can't be saved ({first_line(error)})", code="unsupported") from None
        parts = {"encoder": trunk, "connector": connector_of(model), "language model": language.model}
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        about: dict[str, Any] = {"out": str(folder), "encoder": encoder, "llm": llm, "class": type(model).__name__}
        about |= {
            "features": layout.features,
            "tiles": tiles,
            "image_tokens": layout.most_tokens,
            "context": language.context,
        }
        about |= {"dtype": str(language.model.dtype).removeprefix("torch."), "parameters": counts}
        (folder / "README.md").write_text(card(about, layout, language, seed), encoding="utf-8")
        public_files(folder)
    return about


def open_encoder(source: str) -> VisionEncoder:
    """The trunk of whatever :func:`aimv2.load_model` reads."""
    with named("ENCODER"):
        at = load.locate(source)
        config = read_json(at.folder / "config.json")
        if is_vlm(config):
            why = f"a vision-language model ('{config['model_type']}'); the encoder that it was built from is expected"
            raise UsageError(f"ENCODER {source}: {why}", code="mismatch")
        return encoder_in(load.load_model(at))


def tower_of(encoder: VisionEncoder, dtype: torch.dtype) -> Any:
    """The encoder as an ``Aimv2VisionModel``, without a pooling head."""
    from transformers import Aimv2VisionConfig, Aimv2VisionModel

    config = replace(encoder.config, pool_heads=0)
    about = out_of.transformers_config(config)
    del about["architectures"], about["model_type"]
    tower: Any = Aimv2VisionModel(Aimv2VisionConfig(**about))
    tower.load_state_dict(out_of.renamed(encoder, layouts.encoder_rules("transformers", config)))
    return tower.to(dtype)


def make_config(tower: Any, language: Language, layout: Layout) -> Any:
    """The configuration of the class that takes these features."""
    from transformers import DeepseekVLConfig, LlavaConfig, LlavaNextConfig

    text = language.model.config
    about = {"vision_config": tower.config, "text_config": text, "tie_word_embeddings": ties(language.model)}
    text.tie_word_embeddings = about["tie_word_embeddings"]
    if layout.features == POST:
        return DeepseekVLConfig(image_token_id=language.image_id, **about)
    about |= {"image_token_index": language.image_id, "projector_hidden_act": "gelu", "multimodal_projector_bias": True}
    about |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    about |= {"image_seq_length": layout.most_tokens}
    if layout.tiles == 1:
        return LlavaConfig(**about)
    return LlavaNextConfig(image_grid_pinpoints=[[layout.size * layout.tiles] * 2], **about)


def ties(model: Any) -> bool:
    """Whether the two embeddings are one tensor, under the name by which the vision-language classes tie them."""
    shared = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return shared and hasattr(model.base_model, "embed_tokens")


def assemble(encoder: VisionEncoder, language: Language, layout: Layout, seed: int) -> Any:
    """The model of transformers, of the parts' own modules and a connector with random weights.

    Raises:
        UsageError: a language model that gives other logits within it.
    """
    from transformers import AutoModelForImageTextToText

    llm = language.model
    tower = tower_of(encoder, llm.dtype)
    config = make_config(tower, language, layout)
    head = llm.get_output_embeddings()
    if head.weight is llm.get_input_embeddings().weight and not config.tie_word_embeddings:
        head = deepcopy(head)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    inner = model.model
    if type(inner.language_model) is not type(llm.base_model):
        what = f"{type(llm).__name__} is not a {type(inner.language_model).__name__} and a head"
        raise UsageError(f"LLM {language.given}: {what}, as the vision-language classes hold it", code="unsupported")
    setattr(inner, "vision_tower" if hasattr(inner, "vision_tower") else "vision_model", tower)
    inner.language_model, model.lm_head = llm.base_model, head
    fill_connector(model, seed, llm.dtype)
    left = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    assert not left, left
    model.generation_config = deepcopy(llm.generation_config)
    model.generation_config.suppress_tokens = [language.image_id]  # never written, only read
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = language.tokenizer.pad_token_id
    check_logits(language, model.eval())
    return model


def connector_of(model: Any) -> nn.Module:
    """The 2-layer MLP of a vision-language model."""
    return model.model.aligner if hasattr(model.model, "aligner") else model.model.multi_modal_projector


def fill_connector(model: Any, seed: int, dtype: torch.dtype) -> None:
    """Random weights for both layers, as PyTorch initializes a linear layer; of tiles also the newline, std 1/sqrt(L)."""
    layers = [layer for layer in connector_of(model).modules() if isinstance(layer, nn.Linear)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            layer.to_empty(device="cpu").reset_parameters()
        if hasattr(model.model, "image_newline"):
            width = layers[-1].out_features
            model.model.image_newline = nn.Parameter(torch.randn(width) / width**0.5)
    connector_of(model).to(dtype)
    if hasattr(model.model, "image_newline"):
        model.model.image_newline.data = model.model.image_newline.data.to(dtype)


@torch.no_grad()
def check_logits(language: Language, model: Any) -> None:
    """Raise UsageError where the language model gives other logits on text within ``model`` than without it."""
    ids = probe_ids(language.model)
    wanted = language.model(input_ids=ids).logits
    try:
        same = torch.equal(wanted, model(input_ids=ids).logits)
        why = "it gives other logits there (a scale or a cap of logits, which these classes lack)"
    except Exception as error:  # of a model with other inputs
        same, why = False, first_line(error)
    if not same:
        raise UsageError(f"LLM {language.given}: it can't run within {type(model).__name__}: {why}", code="unsupported")


def make_processor(config: EncoderConfig, layout: Layout, tokenizer: Any) -> Any:
    """The processor: images are padded to a square with the mean colour, then resized (Table C1); of native encoders only resized."""
    try:
        from transformers import LlavaImageProcessorPil, LlavaNextImageProcessorPil, LlavaNextProcessor, LlavaProcessor
    except ImportError:  # without torchvision, earlier versions have no image processors
        raise UsageError(
            "vlm build needs a newer transformers (5.24 was tried): pip install -U transformers", code="missing"
        ) from None
    side, most = layout.size, layout.size * layout.tiles
    square = {"height": side, "width": side}
    about: dict[str, Any] = {"image_mean": list(config.mean), "image_std": list(config.std)}
    about |= {"do_center_crop": False, "crop_size": square}
    if layout.tiles > 1:
        images: Any = LlavaNextImageProcessorPil(**about, size=square, image_grid_pinpoints=[[most, most]])
    elif layout.native:
        images = LlavaImageProcessorPil(**about, do_pad=False, size={"max_height": side, "max_width": side})
    else:
        images = LlavaImageProcessorPil(**about, do_pad=True, size=square)
    kind = LlavaNextProcessor if layout.tiles > 1 else LlavaProcessor
    about = {"patch_size": config.patch_size, "vision_feature_select_strategy": "full", "image_token": IMAGE_TOKEN}
    return kind(images, tokenizer, chat_template=tokenizer.chat_template, **about)


def check_context(language: Language, layout: Layout) -> None:
    """Raise UsageError where a short question on one image exceeds the context of the language model."""
    shown = render(language.tokenizer, QUESTION, prompt=True)
    text = language.tokenizer(shown, add_special_tokens=False)["input_ids"]
    needed, context = layout.most_tokens + len(text) - 1, language.context
    if context is not None and needed > context:
        option = "--tiles" if layout.tiles > 1 else "--image-size" if layout.native else "ENCODER"
        less = "an ENCODER of a smaller image size" if option == "ENCODER" else f"a smaller {option}"
        why = f"an image of {layout.most_tokens:,} tokens and a short question need {needed:,} positions"
        more = f"and its context holds {context:,}; {less}, or an LLM of a longer context"
        raise UsageError(f"LLM {language.given}: {why}, {more}", option=option, code="limit")


def card(about: dict[str, Any], layout: Layout, language: Language, seed: int) -> str:
    """README.md of the folder."""
    features = {
        POST: "the encoder's output, after its last norm (post-norm)",
        PRE: "the output of the encoder's last block, before its last norm (pre-norm)",
    }[layout.features]
    pixels = f"padded to a square with the mean colour, then resized to {layout.size} px"
    if layout.native:
        pixels = f"resized to at most {layout.size} px a side with their aspect ratio kept; images of one batch have one size"
    if layout.tiles > 1:
        grid = f"{layout.tiles} x {layout.tiles} tiles of {layout.size} px"
        pixels = f"a thumbnail of {layout.size} px, {grid}, a newline after each row of patches"
        pixels += " (thumbnail and newline are ours: the paper states neither)"
    row = "the mean of the rows of all other tokens" if language.added else "the language model's own"
    counts = ", ".join(f"{name} {number / 1e6:,.1f}M" for name, number in about["parameters"].items())
    lines = [
        f"A vision-language model in the class {about['class']} of transformers, written by aimv2 {aimv2.__version__}.",
        "",
        "**The connector is untrained**: its weights are random, and answers mean nothing until it is trained with the language model.",
        "",
        f"- encoder: {public(about['encoder'])}",
        f"- language model: {public(about['llm'])}",
        f"- connector: 2 linear layers with GELU between them, PyTorch's initialization, seed {seed}",
        f"- features: {features}. Pre-norm gave better answers on small scenes, by {BETTER} over three seeds",
        f"- images: {pixels}; at most {layout.most_tokens:,} tokens each, of a context of {about['context'] or 'unstated length'}",
        f"- image token: {IMAGE_TOKEN}, id {language.image_id}; its row in the embeddings is {row}; it is never generated",
        f"- parameters: {counts}; weights in {about['dtype']}",
        "",
        "```python",
        USE.format(out=Path(about["out"]).name),
        "```",
    ]
    head = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "tags: [aimv2, vision]", "---", ""]
    return "\n".join([*head, f"# {Path(about['out']).name}", "", *lines]) + "\n"
