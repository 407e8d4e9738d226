"""The full list of packages, and advisories against what is installed."""

import importlib.util
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("lock_tool", ROOT / "tools" / "lock.py")
assert spec is not None
assert spec.loader is not None
lock: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lock)


def record(*events: dict[str, str], versions: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """An OSV record about Pillow."""
    affected = {"package": {"ecosystem": "PyPI", "name": "Pillow"}, "versions": list(versions)}
    affected["ranges"] = [{"type": "ECOSYSTEM", "events": list(events)}]
    return {"id": "PYSEC-1", "summary": "A picture\nthat runs", "affected": [affected], **more}


@pytest.mark.parametrize(
    ("events", "version", "matched"),
    [
        ([{"introduced": "0"}], "13.0.0", True),
        ([{"introduced": "0"}, {"fixed": "13.0.0"}], "13.0.0", False),
        ([{"introduced": "0"}, {"fixed": "13.0.1"}], "13.0.0", True),
        ([{"introduced": "12"}, {"last_affected": "13.0"}], "13.0.0", True),
        ([{"introduced": "12"}, {"last_affected": "12.9"}], "13.0.0", False),
        ([{"introduced": "13.0.1"}], "13.0.0", False),
        ([{"introduced": "13.0.0"}, {"fixed": "14"}], "13.0.0rc1", False),
        ([{"introduced": "0"}, {"fixed": "9"}, {"introduced": "12"}, {"fixed": "13.1"}], "13.0.0", True),
        ([{"introduced": "0"}, {"fixed": "9"}, {"introduced": "12"}, {"fixed": "13.1"}], "10.0", False),
        ([{"fixed": "13.1"}, {"introduced": "0"}], "13.0.0", True),  # in any order
    ],
)
def test_versions(events: list[dict[str, str]], version: str, matched: bool) -> None:
    assert lock.matches(record(*events)["affected"][0], version) == matched


def test_advisories_of_a_file(tmp_path: Path) -> None:
    hit, none = record({"introduced": "0"}, {"fixed": "13.1"}), record(versions=("1.0",))
    line = "PYSEC-1: pillow 13.0.0; fixed in 13.1: A picture that runs"
    others = [record({"introduced": "0"}, withdrawn="2026-01-01"), {**hit, "affected": [{"package": {"name": "x"}}]}]
    git = record(versions=("13.0.0",))
    git["affected"][0]["ranges"] = [{"type": "GIT", "events": [{"introduced": "abc"}]}]
    one, many, packed = tmp_path / "one.json", tmp_path / "many.json", tmp_path / "all.zip"
    one.write_text(json.dumps(hit))
    many.write_text(json.dumps([none, *others, hit]))
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("a/PYSEC-1.json", json.dumps(hit))
        archive.writestr("b.json", json.dumps(none))
    for file in (one, many, packed):
        assert lock.advisories(file, {"pillow": "13.0.0"}) == [line]
        assert lock.advisories(file, {"pillow": "13.1"}) == []
    one.write_text(json.dumps(git))
    assert len(lock.advisories(one, {"pillow": "13.0.0"})) == 1


@pytest.mark.parametrize(
    "content", [b"[]", b"{}", b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"vulns": null}', b"5", b'"abc"', None]
)
def test_a_file_without_advisories_says_nothing_about_them(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "osv.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit, match=r"ADVISORIES .*osv\.json: .* is expected"):
        lock.main(["check", "--lock", str(ROOT / "constraints.lock"), "--advisories", str(file)])


def test_records_with_gaps(tmp_path: Path) -> None:
    file, odd = tmp_path / "osv.json", record({"introduced": "0", "fixed": "13.1"}, versions=("of old",))
    package = odd["affected"][0]["package"]
    file.write_text(
        json.dumps(
            [
                {"id": "A", "affected": None},
                {"id": "B", "affected": [{"package": package, "ranges": None}, {"package": None}]},
                {"id": "C", "affected": [{"package": package, "ranges": None, "versions": ["13.0.0"]}]},
                odd,
            ]
        )
    )
    assert [line.partition(":")[0] for line in lock.advisories(file, {"pillow": "13.0.0"})] == ["C", "PYSEC-1"]


def test_check_says_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "installed", lambda: {"a-b": "1.0", "pillow": "13.0.0", "new": "2"})
    file, advisory = tmp_path / "x.lock", tmp_path / "osv.json"
    file.write_text("# head\nA_B==1.0 \\\n    --hash=sha256:00\npillow==12.0\ngone==3\n")
    assert lock.main(["check", "--lock", str(file)]) == 1
    printed = capsys.readouterr().out
    assert "1 of 3 packages" in printed
    assert "not checked against advisories" in printed
    assert "pillow: 13.0.0, tested with 12.0" in printed
    assert "gone: not installed, tested with 3" in printed
    assert "new: 2, tested with none" in printed
    file.write_text("a-b==1.0\npillow==13.0.0\nnew==2\n")
    assert lock.main(["check", "--lock", str(file)]) == 0
    advisory.write_text(json.dumps(record({"introduced": "0"})))
    assert lock.main(["check", "--lock", str(file), "--advisories", str(advisory)]) == 1
    assert "PYSEC-1: pillow 13.0.0" in capsys.readouterr().out


def test_the_lock_holds_all_constraints() -> None:
    """And no address of an index."""
    text = (ROOT / "constraints.lock").read_text("utf-8")
    assert "://" not in text
    assert "index" not in text
    locked = lock.read_lock(ROOT / "constraints.lock")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            assert Version(locked[lock.canonicalize_name(name)][0]) == Version(version), line
    digests = [digest for _, hashes in locked.values() for digest in hashes]
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in digests)
    assert len(digests) > 100
