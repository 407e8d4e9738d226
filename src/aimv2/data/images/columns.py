"""Names of the columns that hold images, labels and captions, the same for import, evaluation and tokenizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from aimv2.errors import UsageError

# a table may have several of them: the first one counts
COLUMNS = {
    "image": (
        *("image", "file", "filename", "file_name", "path", "filepath", "image_path", "image_name"),
        *("image_file", "img", "jpg", "image_id"),
    ),
    "label": ("label", "labels", "fine_label", "class", "target", "cls", "category"),
    "caption": (
        *("caption", "captions", "text", "alt", "alt_text", "title", "description", "comment", "sentence"),
        *("sentences",),
    ),
}
FEATURES = {"image": "Image", "label": "ClassLabel"}  # types of the library `datasets`


def named_columns(names: Iterable[str], kind: str) -> list[str]:
    """The columns of a kind (image, label, caption) among ``names``, the first choice first; case does not matter."""
    known = {name.strip().lower(): name for name in names}
    return [known[word] for word in COLUMNS[kind] if word in known]


def find_column(names: Iterable[str], kind: str, types: Mapping[str, str] | None = None) -> str | None:
    """The column of a kind: by its type where the table states types, else by its name; None where there is none.

    Args:
        names: of all columns.
        kind: image, label or caption.
        types: {column: type}, types as in ``datasets.Features``.
    """
    typed = [name for name in names if types and types.get(name) == FEATURES.get(kind)]
    named = named_columns(names, kind)
    return next((name for name in named if name in typed or not typed), typed[0] if len(typed) == 1 else None)


@dataclass(frozen=True)
class Columns:
    """Columns that the user named; None: found by their types and names."""

    image: str | None = None
    captions: tuple[str, ...] | None = None

    def find(
        self, names: Iterable[str], source: str, types: Mapping[str, str] | None = None
    ) -> tuple[str, dict[str, str]]:
        """(image column, {caption column: field}) among ``names``.

        A single caption column is field ``caption``; several are fields of their own names.

        Raises:
            UsageError: a column is missing.
        """
        known = {name.strip().lower(): name for name in names}
        listed = ", ".join(known.values())
        image = known.get(self.image.lower()) if self.image else find_column(known.values(), "image", types)
        if image is None:
            wanted = f"{self.image!r}" if self.image else "of the usual names (image, file_name, path, ...)"
            raise UsageError(
                f"{source}: no image column {wanted} among {listed}; give --image-column", option="--image-column"
            )
        captions = self.captions or [
            name.strip().lower() for name in named_columns(known.values(), "caption") if name != image
        ]
        for name in captions:
            if name.lower() not in known:
                raise UsageError(
                    f"{source}: no column {name!r} among {listed}; change --caption-column", option="--caption-column"
                )
        if not captions:
            raise UsageError(
                f"{source}: captions missing: no caption column among {listed}; give --caption-column",
                option="--caption-column",
            )
        return image, {known[name.lower()]: name if len(captions) > 1 else "caption" for name in captions}
