"""What is passed over: counted, and named by its kind and the first few; the same for import, check, embed and caption."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from aimv2.errors import shown

EXAMPLES = 3
HEIF = ("heic", "heif", "hif")
HEIF_READ = find_spec("pillow_heif") is not None
HEIF_NEEDS = "HEIC images, read after pip install 'aimv2[heic]'"
FORKS, HIDDEN, LINKS = "macOS resource forks (._*)", "hidden files and folders", "dead links"
SYSTEM, LOOPS = "folders of systems (thumbnails, bins)", "links back to a folder above"
OTHERS, CLOSED = "files of other kinds", "folders that can't be read"
COLUMNS = "columns that are not read"
BESIDE = "members next to another of their kind, which is read"
ODD_LABELS = "labels that are no whole number from 0"
SYSTEM_FOLDERS = ("@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", ".thumbnails")
_EXTENSIONS = {
    HEIF_NEEDS: "" if HEIF_READ else " ".join(HEIF),
    "RAW images of cameras; export them as JPEG": "3fr ari arw cr2 cr3 crw dcr dng erf fff iiq k25 kdc mef mos mrw nef nrw orf pef "
    "raf raw rw2 rwl sr2 srf srw x3f",
    "images of a form that is not read; export them as JPEG or PNG": "ai dds djvu emf eps exr fits hdr ico icns jxl jxr pcx pdf psb "
    "psd svg svgz tga wmf xcf",
    "archives that are not read here": "tar tgz gz bz2 xz zst zip 7z rar",
    "videos": "3gp avi flv m2ts m4v mkv mov mp4 mpeg mpg mts webm wmv",
}
# what to call files that look like pictures and are not read, by extension
PICTURES = tuple(_EXTENSIONS)[:3]
KINDS = {extension: kind for kind, extensions in _EXTENSIONS.items() for extension in extensions.split()}


def kind_of_file(name: str) -> str:
    """What to call a file that is not read."""
    last = name.rpartition("/")[2]
    if last.startswith("."):
        return FORKS if last.startswith("._") else HIDDEN
    return KINDS.get(last.rpartition(".")[2].lower(), OTHERS)


def is_system_folder(name: str) -> bool:
    """Whether a folder holds what a system keeps for itself: thumbnails of a NAS, bins, what macOS adds to archives."""
    return name.lower() in SYSTEM_FOLDERS or name.startswith("__MACOSX")


class PassedOver:
    """Counts by kind, each with the first few names."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, list[str]]] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PassedOver) and self._found == other._found

    def add(self, kind: str, *names: str, number: int | None = None) -> None:
        """Counts ``number`` of a kind, or as many as there are names."""
        if not names:
            return
        before, named = self._found.get(kind, (0, []))
        self._found[kind] = before + (len(names) if number is None else number), [*named, *names][:EXAMPLES]

    def add_files(self, names: Iterable[str]) -> None:
        """Counts files by their kinds."""
        for name in names:
            self.add(kind_of_file(name), name)

    def update(self, other: PassedOver) -> None:
        """Counts what another record counted, too."""
        for kind, (number, names) in other._found.items():
            self.add(kind, *names, number=number)

    def result(self) -> dict[str, dict[str, Any]]:
        """{kind: {number, examples}}, in order of kinds."""
        return {
            kind: {"number": number, "examples": [shown(name, 200) for name in names]}
            for kind, (number, names) in sorted(self._found.items())
        }


def passed_lines(result: dict[str, dict[str, Any]], what: str = "passed over") -> list[str]:
    """A line for each kind of :meth:`PassedOver.result`."""
    return [
        f"{what}: {kind}: {about['number']:,} ({', '.join(about['examples'])}"
        + ", ..." * (about["number"] > len(about["examples"]))
        + ")"
        for kind, about in result.items()
    ]
