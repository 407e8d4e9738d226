"""Builds a detector: the configuration of its head, first weights, and the folder that transformers opens again."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aimv2.config.detect import LEVELS, QUERIES, DetectTaskOptions
from aimv2.data.text.phrases import check_tokenizer
from aimv2.detect.model import Detector
from aimv2.errors import UsageError
from aimv2.interop.plain import open_plain
from aimv2.models.sizes import EncoderConfig

ABOUT = "detector.json"  # next to transformers' own config.json
TEXT_LIMIT = 256  # tokens of a text, as MM-Grounding-DINO has it
NATIVE_SIDE = 224
CLASSES = {
    "grounding": "MMGroundingDinoForObjectDetection",
    "closed": "RTDetrV2ForObjectDetection",
    "masks": "Mask2FormerForUniversalSegmentation",
}
KEPT = re.compile(
    r"backbone\.model\.|pixel_level_module\.encoder\.|text_backbone\.|embeddings?\b"
)  # initialized elsewhere


def picture_side(options: DetectTaskOptions, encoder: EncoderConfig) -> int:
    """Pixels of the longer side of a picture."""
    return options.image_size or encoder.image_size or NATIVE_SIDE


def square_side(options: DetectTaskOptions, encoder: EncoderConfig) -> int:
    """Pixels a side of the square around a picture, which every level of the pyramid divides into whole cells."""
    unit = encoder.patch_size * max(1, round(1 / min(options.pyramid or LEVELS[options.head])))
    return math.ceil(picture_side(options, encoder) / unit) * unit


def backbone_config(options: DetectTaskOptions, encoder: EncoderConfig) -> Any:
    """The backbone under the head.

    Raises:
        UsageError: levels that do not halve, a window larger than the map.
    """
    from aimv2.interop.backbone_config import Aimv2BackboneConfig

    levels = [int(level) if level >= 1 else level for level in options.pyramid or LEVELS[options.head]]
    if options.head == "masks" and len(levels) != 4:
        raise UsageError(
            f"objective.pyramid {levels}: Mask2Former needs four levels of cells per patch and side, such as [4, 2, 1, 0.5]",
            option="objective.pyramid",
            code="mismatch",
        )
    named = {"scales": "objective.pyramid", "window": "objective.window", "global_blocks": "objective.global_blocks"}
    try:
        return Aimv2BackboneConfig(
            encoder=encoder, scales=levels, pyramid_channels=options.width, window=options.window,
            global_blocks=min(options.global_blocks, encoder.depth), image_size=square_side(options, encoder),
        )  # fmt: skip
    except UsageError as error:
        words = str(error)
        key = next((key for name, key in named.items() if words.startswith(name)), error.option or "objective.pyramid")
        line = re.sub(rf"^{key.removeprefix('objective.')}\b", key, re.sub(r"^scales", "objective.pyramid", words))
        raise UsageError(line, option=key, code=error.code) from None


def text_config(options: DetectTaskOptions, tokenizer: Any) -> Any:
    """The BERT that reads the words."""
    from transformers import BertConfig

    if options.text is None:
        return BertConfig(
            vocab_size=len(tokenizer), hidden_size=options.width, num_hidden_layers=options.text_layers,
            num_attention_heads=heads(options.width), intermediate_size=4 * options.width, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, max_position_embeddings=TEXT_LIMIT, pad_token_id=0,
        )  # fmt: skip
    config = open_plain("AutoConfig", options.text)
    if config.model_type != "bert" or config.max_position_embeddings < TEXT_LIMIT:
        raise UsageError(
            f"objective.text {options.text}: a BERT of at least {TEXT_LIMIT} positions is expected, got {config.model_type}",
            option="objective.text",
            code="mismatch",
        )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return config


def heads(width: int) -> int:
    """Attention heads, 32 values each, at least two."""
    return max(2, width // 32)


def head_config(options: DetectTaskOptions, encoder: EncoderConfig, names: list[str], tokenizer: Any) -> Any:
    """The configuration of the whole model.

    Args:
        options: of the task.
        encoder: shape.
        names: classes of a closed head.
        tokenizer: of a head that reads words.

    Raises:
        UsageError: a width that the head can't have, levels or a window that do not fit.
    """
    from transformers import Mask2FormerConfig, MMGroundingDinoConfig, RTDetrV2Config

    width, backbone = options.width, backbone_config(options, encoder)
    if width % 32:
        raise UsageError(f"objective.width {width}: a multiple of 32 expected", option="objective.width")
    cells = sum((square_side(options, encoder) // encoder.patch_size * scale) ** 2 for scale in backbone.scales)
    most = QUERIES[options.head] if options.head == "masks" else min(QUERIES[options.head], int(cells))
    levels, queries = len(backbone.scales), options.queries or most
    if queries > cells and options.head != "masks":
        raise UsageError(
            f"objective.queries {queries}: the pyramid has {cells:.0f} cells for them; give at most as many",
            option="objective.queries",
            code="limit",
        )
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {n: at for at, n in enumerate(names)}}
    if options.head == "grounding":
        return MMGroundingDinoConfig(
            backbone_config=backbone, text_config=text_config(options, tokenizer), d_model=width, num_queries=queries,
            encoder_layers=options.encoder_layers or 6, decoder_layers=options.decoder_layers, encoder_ffn_dim=8 * width,
            decoder_ffn_dim=8 * width, encoder_attention_heads=heads(width), decoder_attention_heads=heads(width),
            num_feature_levels=levels, max_text_len=TEXT_LIMIT, dropout=0.0, fusion_droppath=0.0, auxiliary_loss=True,
        )  # fmt: skip
    if options.head == "closed":
        return RTDetrV2Config(
            backbone_config=backbone, d_model=width, encoder_hidden_dim=width, encoder_in_channels=[width] * levels,
            decoder_in_channels=[width] * levels, feat_strides=[round(stride) for stride in backbone.strides],
            encoder_layers=options.encoder_layers or 1, decoder_layers=options.decoder_layers, encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width, encoder_attention_heads=heads(width), decoder_attention_heads=heads(width),
            num_feature_levels=levels, decoder_n_levels=levels, encode_proj_layers=[levels - 1], num_queries=queries,
            num_denoising=0, **labels,
        )  # fmt: skip
    return Mask2FormerConfig(
        backbone_config=backbone, hidden_dim=width, feature_size=width, mask_feature_size=width, num_queries=queries,
        encoder_layers=options.encoder_layers or 6, decoder_layers=options.decoder_layers + 1, encoder_feedforward_dim=4 * width,
        dim_feedforward=8 * width, num_attention_heads=heads(width), feature_strides=[4, 8, 16, 32], **labels,
    )  # fmt: skip


def check_same_form(options: DetectTaskOptions, model: Detector, names: list[str], tokenizer: Any, source: str) -> None:
    """Raises UsageError where a stored detector has another form than the options: its weights hold the form, not the options."""
    wanted = head_config(replace(options, text=None), model.encoder.config, names, tokenizer)
    stored = model.net.config
    one, other = wanted.backbone_config, stored.backbone_config
    less = int(options.head == "masks")  # Mask2Former counts its first predictions as a layer
    forms = {
        "window": (one.window, other.window),
        "global_blocks": (one.global_blocks, other.global_blocks) if one.window else (0, 0),
        "pyramid": (one.scales, other.scales),
        "width": (one.pyramid_channels, other.pyramid_channels),
        "queries": (wanted.num_queries, stored.num_queries),
        "encoder_layers": (wanted.encoder_layers, stored.encoder_layers),
        "decoder_layers": (wanted.decoder_layers - less, stored.decoder_layers - less),
    }
    for key, (given, there) in forms.items():
        if given != there:
            raise UsageError(
                f"objective.{key} {given}: the detector of init {source} has {there}; give that",
                option=f"objective.{key}",
                code="mismatch",
            )


def build_detector(options: DetectTaskOptions, config: Any) -> Detector:
    """A detector with random weights, all but those of the encoder, which are the backbone's own."""
    import transformers

    net = getattr(transformers, CLASSES[options.head])(config)
    first_weights(net)
    if options.head == "grounding" and options.text is not None:
        tower = open_plain("BertModel", options.text, add_pooling_layer=False)
        net.model.text_backbone.load_state_dict(tower.state_dict())
    return Detector(options.head, net).float()


@torch.no_grad()
def first_weights(net: nn.Module) -> None:
    """Linears and convolutions of a head: Xavier-uniform, as DETR has it, but for those that begin at zero; batch norms as identity.

    The classes of transformers are made for trained weights: RT-DETR's begin with a standard deviation of 0.01, its batch norms around 0.
    """
    for name, module in net.named_modules():
        if KEPT.search(name) or (isinstance(weight := getattr(module, "weight", None), Tensor) and weight.is_meta):
            continue
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.any():
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
        elif name.endswith("enc_bbox_head"):  # proposals begin as their anchors
            nn.init.zeros_(module.layers[-1].weight)


@torch.no_grad()
def settle_norms(model: Detector, images: Tensor) -> None:
    """Sets the statistics of batch norms from images, one pass; they stay as they are from then on.

    Args:
        model: with its first weights.
        images: uint8 [B, 3, S, S], equal on every rank.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train()
        norm.momentum = None  # the mean over all passes
    if norms:
        model.net.model(model.encoder.normalize(images))
    for norm in norms:
        norm.eval()
        norm.momentum = 0.1


def get_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a BERT.

    Raises:
        UsageError: none there, or one whose ids MM-Grounding-DINO does not find phrases by.
    """
    try:
        tokenizer = open_plain("AutoTokenizer", source)
    except (OSError, ValueError) as error:
        line = str(error).split("\n")[0]
        raise UsageError(
            f"objective.text {source}: no tokenizer there: {line}", option="objective.text", code="not-found"
        ) from None
    check_tokenizer(tokenizer, str(source))
    return tokenizer


def write_detector(
    folder: Path, net: Any, weights: dict[str, Tensor], tokenizer: Any, about: dict[str, Any], card: str
) -> None:
    """A folder that ``transformers`` opens once ``aimv2`` is imported.

    Args:
        folder: created if missing.
        net: of the detector, for its configuration.
        weights: full CPU tensors by the net's names.
        tokenizer: of a head that reads words, or None.
        about: of ``detector.json``: what a picture is made into and how scores are read.
        card: README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    net.config.architectures = [type(net).__name__]
    net.config.save_pretrained(folder)
    save_file(
        {key: value.contiguous().clone() for key, value in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
