"""What ``make fuzz`` found: each file ended in a traceback, a crash or never; now it is read or refused in one line."""

from pathlib import Path

import pytest

from fuzz_targets import TARGETS, try_spoiled

CORPUS = Path(__file__).parent / "fuzz_corpus"  # READER/NUMBER/path of the file in the reader's folder
READ = ("yolo",)  # their bad parts are left out and counted; the others are refused whole
FOUND = sorted(
    (folder.parent.name, folder.name, file.relative_to(folder).as_posix())
    for folder in CORPUS.glob("*/*")
    for file in folder.rglob("*")
    if file.is_file()
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The good files of each reader, made when they are needed first."""
    found = {}
    for name in sorted({target for target, *_ in FOUND}):
        found[name] = tmp_path_factory.mktemp("good") / name
        found[name].mkdir()
        TARGETS[name].make(found[name])
    return found


@pytest.mark.parametrize(("target", "number", "name"), FOUND)
def test_is_read_or_refused(target: str, number: str, name: str, good: dict[str, Path], tmp_path: Path) -> None:
    content = (CORPUS / target / number / name).read_bytes()
    assert try_spoiled(target, good[target], tmp_path / "work", name, content) == (target in READ)


@pytest.mark.parametrize("target", ["images", "tables", "shards", "boxes", "predictions", "yolo", "talks", "settings"])
def test_the_good_files_are_read(target: str, tmp_path: Path) -> None:
    """Else nothing of what spoiled ones do is about the reader."""
    (tmp_path / "good").mkdir()
    TARGETS[target].make(tmp_path / "good")
    for file in TARGETS[target].files(tmp_path / "good"):
        name = file.relative_to(tmp_path / "good").as_posix()
        assert try_spoiled(target, tmp_path / "good", tmp_path / "work", name, file.read_bytes()), name
