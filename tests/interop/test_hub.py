"""What comes from the hub: whole or not taken, asked for once where it can't change. The hub here is a small server."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from safetensors.torch import load_file, save_file
from test_layouts import encoder, equal, pair

import aimv2
from aimv2 import api
from aimv2.errors import UsageError
from aimv2.interop import hub
from aimv2.interop.convert import convert

OLD, NEW = "1" * 40, "2" * 40
NAME = "aimv2-large-patch14-224"


class Hub:
    """Repositories as the hub serves them: {owner/name: {commit: folder}}, the branch main, and what was asked."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Path]] = {}
        self.main: dict[str, str] = {}
        self.asked: list[str] = []

    def answer(self, path: str) -> tuple[bytes, str] | None:
        """(body, commit), or None: there is no such thing."""
        self.asked.append(path)
        words = path.partition("?")[0].strip("/").split("/")
        if words == [""]:
            return b"", ""
        repository = "/".join(words[2:4] if words[0] == "api" else words[:2])
        revision = words[5] if words[0] == "api" else words[3]
        commit = self.main.get(repository, "") if revision == "main" else revision
        folder = self.commits.get(repository, {}).get(commit)
        if folder is None:
            return None
        if words[4:5] == ["revision"] and words[0] == "api":
            about = {"id": repository, "sha": commit, "siblings": [], "tags": [], "private": False, "downloads": 0}
            return json.dumps(about).encode(), commit
        if words[0] == "api":
            files = [
                {
                    "type": "file",
                    "path": p.name,
                    "size": p.stat().st_size,
                    "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                }
                for p in folder.iterdir()
            ]
            return json.dumps(files).encode(), commit
        file = folder / words[4]
        return (file.read_bytes(), commit) if file.is_file() else None


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, and an empty cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    shelf = Hub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body: bool) -> None:
            found = shelf.answer(self.path)
            content, commit = found or (b"", "")
            self.send_response(200 if found else 404)
            if not found:
                self.send_header("X-Error-Code", "RepoNotFound" if "/api/" in self.path else "EntryNotFound")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_GET(self) -> None:
            self.reply(True)

        def do_HEAD(self) -> None:
            self.reply(False)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield shelf
    server.shutdown()
    server.server_close()
    close_session()


def put(shelf: Hub, repository: str, commit: str, folder: Path) -> None:
    shelf.commits.setdefault(repository, {})[commit] = folder
    shelf.main[repository] = commit


def snapshot(cache: Path, repository: str, commit: str) -> Path:
    return cache / f"models--{repository.replace('/', '--')}" / "snapshots" / commit


def forget(cache: Path, repository: str, commit: str, *names: str) -> None:
    """Takes files out of the cache, and the listing that newer clients keep, as older ones left it."""
    for name in names:
        (snapshot(cache, repository, commit) / name).unlink()
    shutil.rmtree(cache / f"models--{repository.replace('/', '--')}" / "trees", ignore_errors=True)
    tree = pytest.importorskip("huggingface_hub._tree_cache")
    tree._IN_MEMORY_TREE_CACHE.clear()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_a_cache_that_lacks_a_file_is_filled_up(name: str, served: Hub, tmp_path: Path) -> None:
    model, repository, commit = encoder(28), f"apple/{NAME}", hub.RELEASED[NAME]
    convert(model, tmp_path / "files", "released")
    put(served, repository, commit, tmp_path / "files")
    equal(aimv2.load_model(NAME), model)
    served.asked.clear()
    equal(aimv2.load_model(NAME), model)
    assert served.asked == []  # a commit never changes
    forget(tmp_path / "cache", repository, commit, name)
    loaded = aimv2.load_model(NAME)
    equal(loaded, model)
    assert loaded.config.mean == model.config.mean
    assert any(f"/resolve/{commit}/{name}" in path for path in served.asked)


def test_parts_of_the_weights_are_all_wanted(served: Hub, tmp_path: Path) -> None:
    model, repository, files = encoder(28), "someone/else", tmp_path / "files"
    convert(model, files, "transformers")
    tensors = load_file(files / "model.safetensors")
    (files / "model.safetensors").unlink()
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    for at, file in enumerate(names):
        save_file({key: tensors[key] for key in sorted(tensors)[at::2]}, files / file)
    index = {"weight_map": {key: names[at % 2] for at, key in enumerate(sorted(tensors))}}
    (files / "model.safetensors.index.json").write_text(json.dumps(index))
    put(served, repository, OLD, files)
    equal(aimv2.load_model(repository, revision=OLD), model)
    for lost in (names[1:], ["model.safetensors.index.json"]):
        forget(tmp_path / "cache", repository, OLD, *lost)
        equal(aimv2.load_model(repository, revision=OLD), model)
        assert any(lost[0] in path for path in served.asked)


def test_a_repository_without_preprocessor_is_known_to_have_none(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, repository, files = encoder(28), "someone/else", tmp_path / "files"
    convert(model, files, "released")
    (files / "preprocessor_config.json").unlink()
    put(served, repository, OLD, files)
    equal(aimv2.load_model(repository, revision=OLD), model)
    forget(tmp_path / "cache", repository, OLD)
    monkeypatch.setattr(hub, "unreachable", lambda: pytest.fail("asked for what is known"))
    equal(aimv2.load_model(repository, revision=OLD), model)
    note = tmp_path / "cache" / "models--someone--else" / ".no_exist" / OLD / "preprocessor_config.json"
    note.unlink()
    monkeypatch.setattr(hub, "unreachable", lambda: "no network")
    with pytest.raises(UsageError, match="the cache is incomplete"):
        aimv2.load_model(repository, revision=OLD)


def test_a_branch_is_asked_for_and_falls_back(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    old, new, repository = encoder(28), encoder(28, pool_heads=2), "someone/else"
    for model, commit in ((old, OLD), (new, NEW)):
        convert(model, tmp_path / commit, "released")
        put(served, repository, commit, tmp_path / commit)
        equal(aimv2.load_model(repository), model)  # the branch has moved, and the cache had the older one
    equal(aimv2.load_model(repository, revision=OLD), old)
    capsys.readouterr()
    monkeypatch.setattr(hub, "unreachable", lambda: "no network")
    equal(aimv2.load_model(repository), new)
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert "can't be reached (no network)" in said.err and NEW in said.err
    with pytest.raises(UsageError, match=r"hf download someone/else --revision other --local-dir DIR"):
        aimv2.load_model(repository, revision="other")


def test_a_pair_has_its_tokeniser(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "aimv2-large-patch14-224-lit"
    convert(pair(), tmp_path / "files", "released")
    put(served, f"apple/{name}", hub.RELEASED[name], tmp_path / "files")
    aimv2.load_model(name)
    monkeypatch.setattr(hub, "unreachable", lambda: "no network")
    folder = snapshot(tmp_path / "cache", f"apple/{name}", hub.RELEASED[name])
    assert not hub.complete(folder, f"apple/{name}")
    with pytest.raises(UsageError, match="the cache is incomplete"):
        aimv2.load_model(name)
    (folder / "tokenizer.json").write_text("{}")
    assert hub.complete(folder, f"apple/{name}")


def test_no_such_repository_or_no_weights(served: Hub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder here, and no such repository on the hub"):
        aimv2.load_model("someone/nothing")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "config.json").write_text("{}")
    put(served, "someone/else", OLD, tmp_path / "files")
    with pytest.raises(UsageError, match=r"no .safetensors file in the repository"):
        aimv2.load_model("someone/else")


def test_the_licence_comes_with_the_weights(served: Hub, tmp_path: Path) -> None:
    convert(encoder(28), tmp_path / "files", "released")
    (tmp_path / "files" / "README.md").write_text("---\nlicense: other\nlicense_name: theirs\n---\n\n# Model\n")
    put(served, "someone/else", OLD, tmp_path / "files")
    api.convert("someone/else", str(tmp_path / "out"), "timm")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: other\nlicense_name: theirs\n" in card and "licence of the weights: theirs" in card


def test_a_cached_pair_of_transformers_5_is_complete(tmp_path: Path) -> None:
    """It writes one file for tokenizer and images, which any client may have downloaded."""
    folder = tmp_path / "models--a--b" / "snapshots" / OLD
    convert(encoder(), folder, "transformers")
    processor = folder / "preprocessor_config.json"
    stored = json.loads(processor.read_text())
    processor.unlink()
    assert not hub.complete(folder, "a/b")
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": stored}))
    assert hub.complete(folder, "a/b")
