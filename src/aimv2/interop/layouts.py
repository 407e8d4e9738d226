"""Tables that map tensor names between our models and other weight layouts.

A rule says that our tensor is theirs concatenated along the first dimension (query, key, value; gate, up), reshaped where the
numbers of dimensions differ. It applies both ways, so import and export share one table, and nothing is computed: round trips
are lossless.

Layouts: ``released`` (the authors' files on the hub), ``transformers``, ``timm``, ``trainer`` (checkpoints of the released
training code), ``ours``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from aimv2.errors import UsageError
from aimv2.models.layers import WRAPPER
from aimv2.models.lit import TextConfig
from aimv2.models.sizes import DecoderConfig, EncoderConfig

EMBED = ("proj.weight", "proj.bias", "norm.weight", "position")
BLOCK = ("norm1.weight", "attn.qkv.weight", "attn.proj.weight", "norm2.weight", "mlp.gate_up.weight", "mlp.down.weight")


@dataclass(frozen=True)
class TrunkNames:
    """Names of a trunk's tensors in one layout; ``{i}`` is the block.

    Attributes:
        block: their name for each of BLOCK, separated by spaces where they have several.
        norm: the norm after the last block.
    """

    block: tuple[str, ...]
    norm: str


def _trunk(prefix: str, block: str, norm: str) -> TrunkNames:
    """``block``: a name for each of BLOCK without ``.weight``, parts of a concatenated one joined by ``+``."""
    parts = (part.split("+") for part in block.split())
    return TrunkNames(tuple(" ".join(f"{prefix}{name}.weight" for name in names) for names in parts), norm)


def _names(prefix: str, names: str) -> tuple[str, ...]:
    return tuple(prefix + name for name in names.split())


_RELEASED = _trunk(
    "trunk.blocks.{i}.", "norm_1 attn.qkv attn.proj norm_2 mlp.fc1+mlp.fc3 mlp.fc2", "trunk.post_trunk_norm.weight"
)
_TRAINER = _trunk(
    "trunk.blocks.{i}.",
    "norm_1 attn.q_proj+attn.k_proj+attn.v_proj attn.proj norm_2 mlp.fc1+mlp.fc3 mlp.fc2",
    _RELEASED.norm,
)
_TRANSFORMERS = _trunk(
    "encoder.layers.{i}.",
    "rms_norm1 attention.q_proj+attention.k_proj+attention.v_proj attention.out_proj "
    "rms_norm2 ffn.gate_proj+ffn.up_proj ffn.down_proj",
    "rms_norm.weight",
)
_TIMM = _trunk("blocks.{i}.", "norm1 attn.qkv attn.proj norm2 mlp.fc1_g+mlp.fc1_x mlp.fc2", "norm.weight")
_PATCHIFIER = "patchifier.proj.weight patchifier.proj.bias patchifier.norm.weight pos_embed"


@dataclass(frozen=True)
class LayoutNames:
    """Names of all tensors in one layout.

    Attributes:
        trunk: names within the image encoder and within the text tower.
        embed: their name for each of EMBED.
        head: the pooling head: query, key, value, output weight, output bias; empty where the layout has none.
        image: prefix of the image encoder's keys in a file without a text tower.
        pair: prefixes of image encoder and text tower in a LiT pair; None where the layout has none.
        text: token embedding and positions of the text tower.
        ends: image projection, text projection and log of the logit scale of the pair.
    """

    trunk: TrunkNames
    embed: tuple[str, ...]
    head: tuple[str, ...] = ()
    image: str = ""
    pair: tuple[str, str] | None = None
    text: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


LAYOUTS = {
    "released": LayoutNames(
        _RELEASED,
        _names("preprocessor.", _PATCHIFIER),
        _names("head.", "cls_token k.weight v.weight linear.weight linear.bias"),
        pair=("image_encoder.", "text_encoder."),
        text=_names("preprocessor.", "text_embedding.weight positional_embedding"),
        ends=("image_projector.weight", "text_projector.weight", "log_logit_scale"),
    ),
    "transformers": LayoutNames(
        _TRANSFORMERS,
        _names("embeddings.", "patch_embed.weight patch_embed.bias rms_norm.weight position_embedding.weight"),
        _names("head.", "cls_token k_proj.weight v_proj.weight output_proj.weight output_proj.bias"),
        pair=("vision_model.", "text_model."),
        text=_names("embeddings.", "token_embedding.weight position_embedding.weight"),
        ends=("visual_projection.weight", "text_projection.weight", "logit_scale"),
    ),
    "timm": LayoutNames(_TIMM, (*_names("patch_embed.", "proj.weight proj.bias norm.weight"), "pos_embed")),
    "trainer": LayoutNames(_TRAINER, _names("preprocessor.blocks.0.", _PATCHIFIER), image="models.image_encoder."),
}

# the decoder of the released training code: ours, theirs
TRAINER_DECODER = {
    "decoder.project.weight": "preprocessor.vision_preprocessor.module.weight",
    "decoder.project.bias": "preprocessor.vision_preprocessor.module.bias",
    "decoder.token_embed.weight": "preprocessor.text_preprocessor.text_embedding.weight",
    "decoder.text_position": "preprocessor.text_preprocessor.positional_embedding",
    "decoder.bos": "preprocessor.text_preprocessor.cls_token",
    "decoder.text_head.linear.weight": "head.blocks.0.linear.weight",
    "decoder.pixel_head.weight": "head.blocks.1.linear.weight",
}

Rules = dict[str, tuple[str, ...]]  # our key -> theirs, in order


def _trunk_rules(trunk: TrunkNames, depth: int, ours: str, theirs: str) -> Rules:
    rules: Rules = {}
    for i in range(depth):
        for key, names in zip(BLOCK, trunk.block):
            rules[f"{ours}blocks.{i}.{key}"] = tuple(theirs + name.format(i=i) for name in names.split())
    rules[f"{ours}norm.weight"] = (theirs + trunk.norm,)
    return rules


def encoder_rules(layout: str, shape: EncoderConfig, ours: str = "", theirs: str = "") -> Rules:
    """Our key -> their keys, for an image encoder.

    Args:
        layout: one of LAYOUTS.
        shape: the encoder's config; a native one has no positions, ``pool_heads`` above 0 means a pooling head.
        ours, theirs: key prefixes of the two sides.

    Raises:
        UsageError: the layout does not support a pooling head.
    """
    names = LAYOUTS[layout]
    if shape.pool_heads and not names.head:
        raise UsageError(
            f"the {layout} layout has no pooling head; --to released or transformers keeps it", code="missing"
        )
    rules: Rules = {
        f"{ours}patch_embed.{key}": (theirs + name,)
        for key, name in zip(EMBED, names.embed)
        if key != "position" or shape.image_size is not None
    }
    rules |= _trunk_rules(names.trunk, shape.depth, ours, theirs)
    if shape.pool_heads:
        parts = ("query", "key.weight", "value.weight", "proj.weight", "proj.bias")
        rules |= {f"{ours}head.{part}": (theirs + name,) for part, name in zip(parts, names.head)}
    return rules


def pair_rules(layout: str, image_shape: EncoderConfig, text_shape: TextConfig) -> Rules:
    """Our key -> their keys, for a LiT pair.

    Raises:
        UsageError: the layout has no pairs.
    """
    names = LAYOUTS[layout]
    if names.pair is None:
        raise UsageError(
            f"the {layout} layout has no image-text pairs; --to released or transformers keeps both", code="missing"
        )
    image, text = names.pair
    rules = encoder_rules(layout, image_shape, "image.", image)
    rules |= {f"text.{key}": (text + name,) for key, name in zip(("embed.weight", "position"), names.text)}
    rules |= _trunk_rules(names.trunk, text_shape.depth, "text.", text)
    ends = ("image_projection.weight", "text_projection.weight", "log_scale")
    return rules | {key: (name,) for key, name in zip(ends, names.ends)}


def trainer_rules(encoder: EncoderConfig, decoder: DecoderConfig) -> Rules:
    """Our key -> their keys, for encoder and decoder in the released training code."""
    rules = encoder_rules("trainer", encoder, "encoder.", LAYOUTS["trainer"].image)
    theirs = "models.text_decoder."
    rules |= {key: (theirs + name,) for key, name in TRAINER_DECODER.items()}
    return rules | _trunk_rules(_TRAINER, decoder.depth, "decoder.trunk.", theirs)


@dataclass(frozen=True)
class Detected:
    """Layout of a weights file, detected from its keys.

    Attributes:
        layout: one of LAYOUTS, or ``ours``.
        image: prefix of the image encoder's keys.
        text: prefix of the text tower's (LiT) or decoder's keys; None: encoder only.
        head: whether the encoder has a pooling head.
        position: whether the encoder has a position parameter.
    """

    layout: str
    image: str
    text: str | None
    head: bool
    position: bool


# a classifier next to an encoder
HEAD = re.compile(r"(?:heads?|fc|fc_norm|classifier|linear)\.(?:(?:head|fc|dense|out_proj|\d+)\.)*(?:weight|bias)")
INNER = (
    "models.image_encoder.",
    "image_encoder.",
    "vision_model.",
    "encoder.",
    "image.",
    "",
)  # of the layouts themselves


def plain_names(keys: Collection[str], where: str) -> tuple[dict[str, str], list[str]]:
    """Names without what training or a larger model puts before those of an AIMV2 (``module.``, ``model.backbone.``, ...).

    Args:
        keys: keys of the file.
        where: name of the file, for the error message.

    Returns:
        key of each plain name, and the keys that lie outside of the prefix; all keys where no layout fits below any.

    Raises:
        UsageError: models under several prefixes, or with and without those of wrappers.
    """
    names: dict[str, str] = {}
    for key in keys:
        if (other := names.setdefault(WRAPPER.sub("", key), key)) != key:
            raise UsageError(f"{where}: several models: '{other}' and '{key}'; save one of them", code="conflict")
    if _detected(names) is not None:
        return names, []
    found: dict[str, dict[str, str]] = {}
    for end in {layout.embed[0] for layout in LAYOUTS.values()}:
        for whole in [key.removesuffix(end) for key in names if key.endswith("." + end)]:
            for inner in INNER:
                root = whole.removesuffix(inner)
                if whole.endswith(inner) and root.endswith("."):
                    below = {key.removeprefix(root): given for key, given in names.items() if key.startswith(root)}
                    if _detected(below) is not None:
                        found[root] = below
                        break
    if len(found) > 1:
        raise UsageError(
            f"{where}: several models, under {' and '.join(sorted(found)[:4])}; save one of them", code="conflict"
        )
    for below in found.values():
        used = set(below.values())
        return below, sorted(key for key in keys if key not in used)
    return names, []


WRAPPED = r"^(?:(?:module|_orig_mod|model|backbone)\.)+"  # what training puts before every key
WITHIN = f"(?:{WRAPPER.pattern})+"


def renamings(
    where: str, base: str, known: Collection[str], missing: Collection[str], unexpected: Collection[str]
) -> list[dict[str, str]]:
    """What to try on the keys of a file that are not those of a model of ``transformers``: pattern -> what replaces it.

    Args:
        where: name of the file, for the error message.
        base: the name that transformers may put before the model's own names.
        known: the model's names.
        missing: those of them that the file lacks.
        unexpected: keys of the file that are none of them.

    Raises:
        UsageError: weights that are there twice, with and without wrappers or under two prefixes.
    """
    plain = {key: WRAPPER.sub("", key) for key in sorted(unexpected)}
    once, wrapped = {name: name for name in {*known} - {*missing}}, False
    for key, name in plain.items():
        short = re.sub(WRAPPED, "", name)
        wrapped |= short != key
        short = short.removeprefix(f"{base}.")
        if short in known and (other := once.setdefault(short, key)) != key:
            raise UsageError(f"{where}: several models: '{other}' and '{key}'; save one of them", code="conflict")
    if not missing:
        return []
    counts = Counter(
        key.removesuffix(name)
        for key in plain.values()
        for name in (key.split(".", n)[-1] for n in range(1, key.count(".") + 1))
        if name in known
    )
    most = max(counts.values(), default=0)
    before = sorted(prefix for prefix, count in counts.items() if count == most > len(known) / 2)
    if len(before) > 1:
        raise UsageError(
            f"{where}: several models, under {' and '.join(before[:4])}; save one of them", code="conflict"
        )
    patterns = [WRAPPED] * wrapped + [f"^{re.escape(prefix)}" for prefix in before]
    return [{f"^{WITHIN}": "", WITHIN: "", pattern: ""} for pattern in patterns]


def detect(keys: Iterable[str], where: str) -> Detected:
    """Detect the layout of a file from its keys.

    Args:
        keys: keys of the file.
        where: name of the file, for the error message.

    Raises:
        UsageError: no layout fits; names a key.
    """
    known = set(keys)
    if (found := _detected(known)) is not None:
        return found
    first = min(known, default="none at all")
    raise UsageError(
        f"{where}: no layout of AIMV2 fits its keys (the first is '{first}'); supported are released, transformers, timm, "
        "the released training code's and ours",
        code="unsupported",
    )


def _detected(known: Collection[str]) -> Detected | None:
    for image in ("encoder.", ""):
        if f"{image}mlp.gate_up.weight" in known or f"{image}blocks.0.mlp.gate_up.weight" in known:
            text = "decoder." if any(key.startswith("decoder.") for key in known) else None
            return Detected("ours", image, text, f"{image}head.query" in known, f"{image}patch_embed.position" in known)
    if "image.blocks.0.mlp.gate_up.weight" in known:
        return Detected("ours", "image.", "text.", True, "image.patch_embed.position" in known)
    for name, layout in LAYOUTS.items():
        prefixes = [layout.image, *(layout.pair[:1] if layout.pair else ())]
        for image in prefixes:
            if image + layout.embed[0] in known and image + layout.trunk.norm in known:
                head = bool(layout.head) and image + layout.head[0] in known
                second = layout.pair[1] if layout.pair and image == layout.pair[0] else "models.text_decoder."
                text = second if any(key.startswith(second) for key in known) else None
                return Detected(name, image, text, head, image + layout.embed[3] in known)
    return None


def count_blocks(keys: Iterable[str], template: str) -> int:
    """Number of consecutive blocks whose key matches ``template`` (with ``{i}``)."""
    known, depth = set(keys), 0
    while template.format(i=depth) in known:
        depth += 1
    return depth
