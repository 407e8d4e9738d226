"""``aimv2 push``: a model to the hub."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimv2.commands import convert
from aimv2.config.types import PathText
from aimv2.errors import UsageError

EXAMPLES = "aimv2 push runs/mine me/my-encoder --private"


@dataclass(kw_only=True)
class PushOptions:
    """Upload a model to the hub, with its card.

    Args:
        model: a folder, .safetensors file, RUN or RUN@STEP
        repository: owner/name on the hub; created if it does not exist
        to: the layout: transformers, released, timm, onnx or safetensors (ours, with the decoder)
        private: make a new repository private
        licence: of the weights, for the model card
        message: of the commit
    """

    model: PathText
    repository: str
    to: convert.Target = "transformers"
    private: bool = False
    licence: str | None = None
    message: str = "Upload an AIMV2 encoder"


def run(options: PushOptions) -> dict[str, Any]:
    from aimv2.interop import hub

    if not hub.is_hub_id(options.repository):
        raise UsageError(f"REPOSITORY {options.repository}: owner/name is expected")
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "model"
        written = convert.ConvertOptions(source=options.model, out=str(out), to=options.to, licence=options.licence)
        result = convert.write(written, options.repository)
        url = hub.upload(out, options.repository, options.private, options.message)
    return {"url": url, "to": options.to, "files": result["files"]}
