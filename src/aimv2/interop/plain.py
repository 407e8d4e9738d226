"""Classes of transformers, opened from a folder or a repository without running any code of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_plain(name: str, source: str | Path, **options: Any) -> Any:
    """``from_pretrained`` of a class of transformers; every call of ours goes through here.

    Code of the folder (``auto_map``, ``custom_generate``) is never run, and never offered at a prompt; weights are safetensors, never
    a pickle; a folder is opened without the hub.

    Args:
        name: of the class.
        source: a folder, or a name on the hub.
        options: of ``from_pretrained``.
    """
    import transformers

    kind = getattr(transformers, name)
    options.setdefault("local_files_only", Path(source).is_dir())
    if name != "GenerationConfig":  # has no code
        options["trust_remote_code"] = False
    if name.startswith("AutoModel") or issubclass(kind, transformers.PreTrainedModel):
        options["use_safetensors"] = True
    return kind.from_pretrained(source, **options)
