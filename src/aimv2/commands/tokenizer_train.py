"""``aimv2 tokenizer train``: a byte-level BPE from captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aimv2.config.types import PathText
from aimv2.errors import UsageError

EXAMPLES = "aimv2 tokenizer train captions.txt tokenizers/mine --vocab-size 8192"


@dataclass(kw_only=True)
class TokenizerTrainOptions:
    """Train a byte-level BPE on captions.

    Args:
        captions: text file with one caption per line, CSV, TSV, JSONL, JSON, or a folder or pattern of shards
        out: folder for the tokenizer
        vocab_size: number of tokens, end of text included
    """

    captions: PathText
    out: PathText
    vocab_size: int = 4096


def run(options: TokenizerTrainOptions) -> dict[str, Any]:
    from aimv2.data.text.captions import read_captions
    from aimv2.data.text.tokenizer import train_tokenizer

    out = Path(options.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"OUT {options.out}: something is there already; give a new folder, or an empty one", code="exists"
        )
    tokenizer = train_tokenizer(read_captions(options.captions), options.vocab_size)
    try:
        tokenizer.save(Path(options.out))
    except OSError as error:
        raise UsageError(f"OUT {options.out} can't be written: {error.strerror}") from None
    return {"out": options.out, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint()}
