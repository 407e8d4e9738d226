"""Sentences around a class name, ``{}`` standing for it: CLIP's eighty for ImageNet, a short list for any photographs.

Source: the notebook Prompt_Engineering_for_ImageNet of openai/CLIP (MIT), in its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aimv2.data.text.encoding import decode_text, text_lines
from aimv2.errors import UsageError, nearest
from aimv2.io import parse_json, read_file

DEFAULT = ("a photo of a {}.", "a photo of the {}.", "a good photo of a {}.")
IMAGENET = (
    *("a bad photo of a {}.", "a photo of many {}.", "a sculpture of a {}.", "a photo of the hard to see {}."),
    *("a low resolution photo of the {}.", "a rendering of a {}.", "graffiti of a {}.", "a bad photo of the {}."),
    *("a cropped photo of the {}.", "a tattoo of a {}.", "the embroidered {}.", "a photo of a hard to see {}."),
    *("a bright photo of a {}.", "a photo of a clean {}.", "a photo of a dirty {}.", "a dark photo of the {}."),
    *("a drawing of a {}.", "a photo of my {}.", "the plastic {}.", "a photo of the cool {}."),
    *("a close-up photo of a {}.", "a black and white photo of the {}.", "a painting of the {}."),
    *("a painting of a {}.", "a pixelated photo of the {}.", "a sculpture of the {}.", "a bright photo of the {}."),
    *("a cropped photo of a {}.", "a plastic {}.", "a photo of the dirty {}.", "a jpeg corrupted photo of a {}."),
    *("a blurry photo of the {}.", "a photo of the {}.", "a good photo of the {}.", "a rendering of the {}."),
    *("a {} in a video game.", "a photo of one {}.", "a doodle of a {}.", "a close-up photo of the {}."),
    *("a photo of a {}.", "the origami {}.", "the {} in a video game.", "a sketch of a {}.", "a doodle of the {}."),
    *("a origami {}.", "a low resolution photo of a {}.", "the toy {}.", "a rendition of the {}."),
    *("a photo of the clean {}.", "a photo of a large {}.", "a rendition of a {}.", "a photo of a nice {}."),
    *("a photo of a weird {}.", "a blurry photo of a {}.", "a cartoon {}.", "art of a {}.", "a sketch of the {}."),
    *("a embroidered {}.", "a pixelated photo of a {}.", "itap of the {}.", "a jpeg corrupted photo of the {}."),
    *("a good photo of a {}.", "a plushie {}.", "a photo of the nice {}.", "a photo of the small {}."),
    *("a photo of the weird {}.", "the cartoon {}.", "art of the {}.", "a drawing of the {}."),
    *("a photo of the large {}.", "a black and white photo of a {}.", "the plushie {}.", "a dark photo of a {}."),
    *("itap of a {}.", "graffiti of the {}.", "a toy {}.", "itap of my {}.", "a photo of a cool {}."),
    *("a photo of a small {}.", "a tattoo of the {}."),
)
LISTS = {"default": DEFAULT, "imagenet": IMAGENET}


def find_templates(given: str, dataset: str | None = None, many: bool = True) -> tuple[str, ...]:
    """The templates of ``--templates``.

    Args:
        given: ``default``, ``imagenet``, one template, or a file; see :func:`read_lines`. ``{c}`` is ``{}``.
        dataset: a registered name; the default of ``imagenet1k`` is ``imagenet``.
        many: that default may be of eighty.

    Raises:
        UsageError: none of these, a template without ``{}``, an empty file.
    """
    if given in LISTS:
        return LISTS["imagenet" if dataset == "imagenet1k" and many else given]
    if "{}" in plain(given):
        return (plain(given),)
    file = Path(given).expanduser()
    if not file.is_file():
        raise UsageError(
            f"--templates {given}: {', '.join(LISTS)}, a template with {{}} for the class, or a file of them expected"
            f"{nearest(given, LISTS)}"
        )
    found = [plain(line) for line in read_lines(file, "--templates", dataset)]
    for line in found:
        if "{}" not in line:
            raise UsageError(f"--templates {given}: '{line}' has no {{}}, where the class name goes", code="missing")
    return tuple(found)


def plain(template: str) -> str:
    """A template with ``{}`` for the class, which CLIP_benchmark writes ``{c}``."""
    return template.replace("{c}", "{}")


def read_lines(file: Path, option: str, dataset: str | None = None) -> list[str]:
    """The lines of a text file that are not blank, stripped; or a JSON list, or {data set: list} as CLIP_benchmark has it.

    Raises:
        UsageError: it can't be read, holds none, or not of the data set.
    """
    if file.suffix.lower() == ".json" and file.is_file():
        return _read_json(file, option, dataset)
    try:
        found = list(text_lines(file))
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{option} {file}: can't be read as text: {error}", code="unreadable") from None
    if not found:
        raise UsageError(f"{option} {file}: the file is empty; a line each is expected")
    return found


def _read_json(file: Path, option: str, dataset: str | None) -> list[str]:
    try:
        found = parse_json(decode_text(read_file(file), str(file)))
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {file}: can't be read as JSON: {error}", code="unreadable") from None
    if isinstance(found, dict) and dataset not in found:
        known = ", ".join(list(found)[:5])
        raise UsageError(
            f"{option} {file}: holds lists for {known}, ...; --dataset says which, got {dataset}", code="missing"
        )
    lines = found[dataset] if isinstance(found, dict) else found
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
        raise UsageError(f"{option} {file}: a list of texts is expected", code="unreadable")
    return [line.strip() for line in lines]


def fill(templates: Sequence[str], name: str) -> list[str]:
    """The templates with a class name in them."""
    return [template.replace("{}", name) for template in templates]
