"""Which samples of an import are validation data: by a fraction of the keys, by a list, or by what the source states."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from aimv2.data.images.entries import PlannedSource, SourceEntry
from aimv2.data.images.text_tables import no_text
from aimv2.data.text.encoding import text_lines
from aimv2.errors import UsageError

log = logging.getLogger(__name__)


@dataclass
class ValChooser:
    """Which keys are validation: by the key's hash, or by a list of keys and image names."""

    fraction: float
    names: set[str]
    matched: set[str] = field(default_factory=set)

    def __call__(self, item: SourceEntry) -> bool:
        if self.names:
            file = item.image.rpartition("/")[2]
            found = self.names & {item.key, item.image, file, file.rpartition(".")[0]}
            self.matched |= found
            return bool(found)
        digest = hashlib.sha256(item.key.encode()).digest()
        return int.from_bytes(digest[:8], "big") < self.fraction * 2**64

    def check_matched(self, source: str, file: str | None, out: Path) -> None:
        """Raises UsageError where no name of the list was found; some that were not are a warning."""
        if not (unmatched := len(self.names - self.matched)):
            return
        if not self.matched:
            raise UsageError(
                f"--val-list {file}: none of its {unmatched} names is a key or image name of {source}; the shards of "
                f"{out} are left unfinished: remove them, or give another list and another OUT",
                code="mismatch",
            )
        log.warning("--val-list: %d of %d names match no image", unmatched, len(self.names))


def choose_val(
    source: str, opened: PlannedSource, fraction: float, file: str | None
) -> tuple[ValChooser, Callable[[SourceEntry], bool]]:
    """What decides which entries are validation data: the options, else what the source states."""
    chooser = ValChooser(fraction, _listed_names(Path(file).expanduser()) if file else set())
    if file is not None and not chooser.names:
        raise UsageError(f"--val-list {file} is empty; expected one key or image name a line")
    if opened.is_val is None:
        return chooser, chooser
    if not fraction and not chooser.names:
        return chooser, opened.is_val
    which = "list" if file else "fraction"
    log.warning("%s: --val-%s decides what is validation, not the splits stated there", source, which)
    return chooser, chooser


def _listed_names(file: Path) -> set[str]:
    try:
        return set(text_lines(file))
    except UnicodeError:
        raise no_text(file, "--val-list") from None
