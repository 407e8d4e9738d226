"""``aimv2 vlm build``: an encoder under a causal language model, as one folder for ``transformers``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from aimv2.config.types import Bounds, PathText

EXAMPLES = """\
aimv2 vlm build aimv2-large-patch14-336 HuggingFaceTB/SmolLM2-135M-Instruct vlm
aimv2 vlm build runs/mine my-llm vlm --tiles 2"""


@dataclass(kw_only=True)
class VlmBuildOptions:
    """Put an encoder under a causal language model, as one folder that transformers opens.

    Args:
        encoder: released name, hub id, folder, .safetensors file, RUN or RUN@STEP
        llm: folder or hub id of a causal language model of transformers
        out: a new or empty folder
        features: of the encoder: pre-norm (before its last norm) or post-norm (its output); null: pre-norm, of native encoders post-norm
        tiles: 2 or 3: a thumbnail and 2 x 2 or 3 x 3 tiles of an image; 1: the image only
        chat_template: Jinja file of a chat template; null: the tokenizer's own
        image_size: longest side of an image in pixels, of native encoders; null: 448
        dtype: of the weights: float32, bfloat16 or float16; auto: the language model's
        seed: random seed of the connector's weights
    """

    encoder: PathText
    llm: PathText
    out: PathText
    features: Literal["post-norm", "pre-norm"] | None = None
    tiles: Annotated[int, Bounds(1, 3)] = 1
    chat_template: PathText | None = None
    image_size: Annotated[int | None, Bounds(1, 100_000)] = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    seed: int = 0


def run(options: VlmBuildOptions) -> dict[str, Any]:
    from aimv2.progress import heartbeat
    from aimv2.vlm.build import build

    with heartbeat(lambda: "building"):
        return build(**vars(options))
