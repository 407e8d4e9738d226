"""The explorer's server: who is answered, what is accepted, what is said, and that the answers are the model's."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import socket
import subprocess
import urllib.parse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from explored import COLOURS, Reply, ask, plain_pictures, sentence, serving, taught
from PIL import Image

import aimv2
from aimv2 import api
from aimv2.cli import main
from aimv2.data.stream.transforms import image_transform
from aimv2.explorer import album, server
from aimv2.explorer.answers import page_names
from aimv2.explorer.guard import hostname, known_host, rejection
from aimv2.explorer.prepare import prepare
from aimv2.explorer.server import SCRIPTS
from aimv2.models.likelihood import score
from aimv2.report.predictions import next_patches
from runs import command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model`` and the ``pictures`` that it was taught, one broken file among them; a secret beside."""
    folder = tmp_path_factory.mktemp("explorer")
    taught(folder / "model")
    plain_pictures(folder / "pictures")
    (folder / "pictures" / "zebra.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "secret.txt").write_text("nobody's business")
    return folder


@pytest.fixture(scope="module")
def url(place: Path) -> Any:
    with serving(place / "model", place / "pictures") as url:
        yield url


def question(url: str, name: str, **query: Any) -> Reply:
    return ask(url, f"/api/{name}?{urllib.parse.urlencode({'model': 0, 'image': 0, **query})}")


def encoded(kind: str, size: tuple[int, int] = (50, 40), colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


# ---- who is answered ----


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:80"}, 200),
        ({"Host": "[::1]:8421"}, 200),
        ({"Host": "evil.example"}, 400),
        ({"Host": "127.0.0.1.evil.example:8421"}, 400),
        ({"Host": "192.168.1.7:8421"}, 400),
        ({"Host": ""}, 400),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:9", "Origin": "http://localhost:9"}, 200),
        ({"Host": "localhost:9", "Origin": "http://localhost:10"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, 403),
    ],
    ids=str,
)
def test_only_its_own_page_is_answered(url: str, headers: dict[str, str], status: int) -> None:
    reply = ask(url, "/api/images", headers=headers)
    assert reply.status == status
    assert (status == 200) == ("images" in reply.json)
    assert "access-control-allow-origin" not in reply.headers
    if status != 200:
        assert reply.error.endswith(".")
        posted = ask(url, "/api/upload", "POST", encoded("PNG"), headers)
        assert posted.status == status and len(ask(url, "/api/images").json["images"]) == 7


def test_a_link_on_another_site_opens_the_page_but_no_answer() -> None:
    followed = {"host": "127.0.0.1:1", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert rejection("GET", "/", followed, "127.0.0.1") is None
    assert rejection("GET", "/api/images", followed, "127.0.0.1") is not None
    assert rejection("POST", "/", followed, "127.0.0.1") is not None
    assert rejection("PUT", "/", {"host": "localhost"}, "127.0.0.1") is not None


def test_hosts_beyond_loopback() -> None:
    """No name that a stranger can point here: numbers, and this machine's own name."""
    for asked in ("192.168.1.7:8421", "[fe80::1]:1", "localhost", socket.gethostname()):
        assert known_host(asked, "0.0.0.0"), asked
    assert known_host("box.lan:8421", "box.lan") and not known_host("box.lan:8421", "0.0.0.0")
    for asked in ("evil.example", "1.2.3.4.evil.example", "[::1", "[::1]evil", "localhost:x", "a:1:2", ""):
        assert not known_host(asked, "0.0.0.0"), asked
    assert hostname("LocalHost:80") == "localhost" and hostname("[::1]:80") == "::1"


def test_every_answer_forbids_a_browser_the_rest(url: str) -> None:
    for path in (
        "/",
        *(f"/{name}.js" for name in SCRIPTS),
        "/explorer.css",
        "/api/about",
        "/api/nothing",
        "/api/thumbnail/0.png",
    ):
        reply = ask(url, path)
        policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'" and reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cross-origin-resource-policy"] == "same-origin" and "server" not in reply.headers


def test_the_page_asks_nobody_else(url: str) -> None:
    for path in ("/", "/explorer.css", *(f"/{name}.js" for name in SCRIPTS)):
        reply = ask(url, path)
        text = reply.body.decode()
        assert reply.status == 200 and not re.search(r"(https?:)?//[a-z]+\.", text)
    assert not re.search(r"\son\w+=|style=|<script>", ask(url, "/").body.decode())  # the policy would block it


# ---- no path ----


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/..%2fsecret.txt",
        "/%2e%2e/%2e%2e/secret.txt",
        "/page.html",
        "/explorer.js/../../server.py",
        "//etc/passwd",
        "/api/thumbnail/../secret.txt",
        "/api/thumbnail/..%2f..%2fsecret.txt.png",
        "/api/thumbnail/-1.png",
        "/api/thumbnail/%2Fetc%2Fpasswd.png",
        "/api/thumbnail/red.png",
        "/api/thumbnail/99.png",
        "/api/../secret.txt",
        "/api/seen?model=0&image=../secret.txt",
        "/api/seen?model=0&image=/etc/passwd",
        "/api/seen?model=../model&image=0",
        "/api/__class__",
        "/api/by_name",
        "/openapi.json",
    ],
)
def test_nothing_is_reached_by_a_path(url: str, place: Path, path: str) -> None:
    reply = ask(url, path)
    assert reply.status in (400, 404), path
    assert reply.error.endswith(".")
    for told in (b"nobody", str(place).encode(), b"root:", b"Traceback"):
        assert told not in reply.body


def test_no_answer_tells_where_files_lie(url: str, place: Path) -> None:
    """Names of pictures are their last part, the model's is too."""
    about, images = ask(url, "/api/about"), ask(url, "/api/images")
    assert str(place.parent).encode() not in about.body + images.body
    assert about.json["models"][0]["name"] == "model"
    assert [one["name"] for one in images.json["images"]][-7:] == sorted(
        [*(f"{name}.png" for name in COLOURS), "zebra.png"]
    )
    reply = question(url, "seen", image=6)
    assert reply.status == 422 and reply.error.startswith("zebra.png can't be shown: ")
    assert str(place).encode() not in reply.body


# ---- uploads ----


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_picture_is_taken_by_what_it_holds(url: str, kind: str) -> None:
    reply = ask(url, "/api/upload?name=holiday.exe", "POST", encoded(kind))
    assert reply.status == 200 and reply.json["name"] == "holiday.exe" and reply.json["kind"] == "upload"
    seen = question(url, "seen", image=reply.json["image"]).json
    assert (seen["rows"], seen["columns"], seen["width"]) == (4, 4, 32)
    assert np.abs(pixels(seen["picture"]).astype(int) - (200, 30, 30)).max() < 8
    assert seen["box"] == pytest.approx([0.1, 0, 0.9, 1], abs=0.03)  # the centred square of 50 x 40
    assert ask(url, f"/api/thumbnail/{reply.json['image']}.png").headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"", 400, "empty"),
        (b"hello, I am a picture", 415, "a JPEG, PNG or WebP is expected"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "a JPEG, PNG or WebP is expected"),
        (encoded("GIF"), 415, "a JPEG, PNG or WebP is expected"),
        (encoded("TIFF"), 415, "a JPEG, PNG or WebP is expected"),
        (encoded("JPEG", (300, 300))[:-300], 415, "can't be used"),
        (encoded("PNG", (9000, 6000)), 415, "more than 50,000,000 pixels"),
        (b"\xff" * 1_000_001, 413, "larger than the limit of 1 MB"),
        (b"\xff" * 3_000_000, 413, "larger than the limit of 1 MB"),
    ],
    ids=["empty", "text", "svg", "gif", "tiff", "cut", "pixels", "one byte more", "large"],
)
def test_a_wrong_file_is_a_sentence(url: str, content: bytes, status: int, said: str) -> None:
    before = ask(url, "/api/images").json
    reply = ask(url, "/api/upload", "POST", content)
    assert reply.status == status and said in reply.error and reply.error.endswith(".")
    assert ask(url, "/api/images").json == before


def test_uploads_push_out_the_oldest_and_never_the_folder(place: Path) -> None:
    pictures = album.Album(str(place / "pictures"), 3, 32)
    others = [pictures.upload(encoded("PNG"), "one.png", f"tab {at}").number for at in range(album.STORED - album.KEPT)]
    added = [pictures.upload(encoded("PNG", (9 + at, 9)), f"{at}.png").number for at in range(album.KEPT + 2)]
    assert [entry.number for entry in pictures.shown("")] == [*reversed(added[2:]), 0, 1, 2]
    with pytest.raises(album.RequestError, match="no longer stored"):
        pictures.image(added[0])
    assert [entry.number for entry in pictures.shown("tab 0")] == [others[0], 0, 1, 2]  # a full tab costs no other
    pictures.upload(encoded("PNG"), "one more", "another tab")
    assert [entry.number for entry in pictures.shown("tab 0")] == [0, 1, 2]  # only all tabs together do
    assert len(pictures.added) == album.STORED


def test_the_other_thread_never_meets_half_a_removal() -> None:
    examples = album.Album(None, 3, 32)

    class Added(dict[int, album.Added]):
        def __delitem__(self, number: int) -> None:
            assert number not in examples.entries  # without it an upload's entry would lead to an image of the folder
            super().__delitem__(number)

    examples.added = Added()
    number = examples.example("a").number
    examples.remove(number, "a")
    assert number not in examples.added and 2**52 <= number < 2**53


def test_a_question_waits_for_one_part_of_the_start_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, warmed = list[Any](), list[Any]()

    class Thread:
        def __init__(self, *_: Any) -> None: ...

        def submit(self, function: Any, *given: Any) -> None:
            waiting.append((function, given))

    monkeypatch.setattr(server, "ThreadPoolExecutor", Thread)
    study = SimpleNamespace(album=None, models=[None, None])
    answers: Any = SimpleNamespace(study=study, about=dict, warm=lambda *part: warmed.append(part))
    server.make_app(answers, "127.0.0.1")
    while waiting:
        assert len(waiting) == 1
        function, given = waiting.pop()
        function(*given)
    assert sorted(warmed) == sorted((at, what) for at in (0, 1) for what in server.WARMED)


def test_uploads_belong_to_their_tab_once_and_can_be_removed(url: str) -> None:
    """The same file is not doubled; its number can't be guessed, and shows it in another tab; only its own tab removes it."""
    numbers = [
        ask(url, f"/api/upload?name=a.png&tab={tab}", "POST", encoded("PNG", (33, 33))).json["image"] for tab in "aab"
    ]
    assert numbers[0] == numbers[1] != numbers[2] and min(numbers) > 10**8
    drawn = ask(url, "/api/example?tab=b", "POST").json["image"]

    def listed(tab: str) -> list[int]:
        return [one["image"] for one in ask(url, f"/api/images?tab={tab}").json["images"]][:-7]

    assert (listed("a"), listed("b"), listed("c")) == ([numbers[0]], [drawn, numbers[2]], [])
    assert question(url, "entry", image=numbers[0]).json["name"] == "a.png"  # a copied address
    assert question(url, "seen", image=numbers[0]).status == 200
    path = f"/api/remove?image={numbers[0]}&tab="
    assert ask(url, path + "b", "POST").status == 404 and ask(url, path + "a").status == 404  # another tab's; a link
    assert ask(url, path + "a", "POST", headers={"Origin": "http://evil.example"}).status == 403
    assert ask(url, "/api/remove?image=0&tab=a", "POST").status == 404  # the folder's
    assert ask(url, f"/api/images?tab={'x' * 41}").status == 400
    assert ask(url, path + "a", "POST").json == {} and listed("a") == []
    assert question(url, "seen", image=numbers[0]).status == 404 and listed("b") == [drawn, numbers[2]]


def test_what_limits_leave_out_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert album.Album(str(place / "pictures"), 3, 32).left_out.startswith("The first 3 of 7 images are shown; ")
    assert album.Album(str(place / "pictures"), 0, 32).left_out == album.Album(None, 3, 32).left_out == ""
    monkeypatch.setattr(album, "COUNTING", 0)
    assert "The first 3 of more than 4 images" in album.Album(str(place / "pictures"), 3, 32).left_out
    assert album.shortened("x" * 100).startswith("…x") and len(album.shortened("x" * 100)) == album.NAME
    model = aimv2.load_model(place / "model", decoder=True)
    most = model.decoder.config.max_text
    answers = prepare(str(place / "model"), str(place / "pictures"), None, 3, 1, "cpu")
    said = answers.find({"model": "0", "text": "a red sheet " * (most // 2)})
    assert said["tokens"] == most and answers.find({"model": "0", "text": "a red sheet"})["tokens"] == 0


def test_models_of_one_name_are_told_apart() -> None:
    assert page_names(["runs/a/model/", "runs/b/model"]) == ["a/model", "b/model"]
    assert page_names(["/home/me/runs/demo", "aimv2-large"]) == ["demo", "aimv2-large"]
    assert page_names(["demo", "demo"]) == ["demo (1)", "demo (2)"] and page_names(["a/b"]) == ["b"]


# ---- answers ----


def test_answers_are_the_models(url: str, place: Path) -> None:
    model = aimv2.load_model(place / "model", decoder=True)
    names = sorted(COLOURS)
    see = image_transform(model)
    images = torch.stack([see(Image.open(place / "pictures" / f"{name}.png")) for name in names])
    with torch.inference_mode():
        features = model.encoder.encode(images, layers=[1])[0]
    units = torch.nn.functional.normalize(features, dim=-1)
    found = question(url, "similarity", image=2, layer=1, row=1, column=3).json
    cosine = units @ units[2, 7]  # [6, 16]
    np.testing.assert_allclose(np.ravel(found["own"]), cosine[2], atol=2e-4)
    assert found["own"][1][3] == 1.0 and (found["compared"], found["of"]) == (6, 6)
    best = cosine.max(1).values
    assert [one["image"] for one in found["others"]] == [n for n in best.argsort(descending=True).tolist() if n != 2]
    for one in found["others"]:
        np.testing.assert_allclose(np.ravel(one["map"]), cosine[one["image"]], atol=2e-4)
    attention = question(url, "attention", image=2, layer=1, row=1, column=3).json
    assert len(attention["heads"]) == 2 and np.sum(attention["mean"]) == pytest.approx(1, abs=1e-3)
    painted = question(url, "painting", image=2, share=0.3).json
    wanted = next_patches(model, images[2], 0.3)
    assert np.array_equal(pixels(painted["picture"]), wanted.image) and painted["prefix"] == 5
    assert question(url, "painting", image=2, share=0.3, rolled=1).json["picture"] != painted["picture"]
    words = question(url, "caption", image=names.index("blue")).json["words"]
    assert "".join(word["text"] for word in words) == sentence("blue") + "⏎"
    assert np.shape(words[0]["attention"]) == (4, 4) and words[-1]["probability"] > 0.5


def test_search_by_likelihood(url: str, place: Path) -> None:
    """The right picture first, for each; scores are log-likelihoods less the folder's mean probability."""
    model = aimv2.load_model(place / "model", decoder=True)
    names = sorted(COLOURS)
    images = torch.stack([image_transform(model)(Image.open(place / "pictures" / f"{name}.png")) for name in names])
    for name in names:
        query = {"text": f"  A {name}  sheet "}
        while (found := question(url, "search", **query).json)["compared"] < 6:  # a busy machine needs several requests
            assert found["of"] == 6
        assert found["by"] == "likelihood" and found["of"] == 6
        assert found["ranked"][0]["name"] == f"{name}.png"
        logs = score(model, images, [sentence(name)])[:, 0]
        plain = logs - logs.logsumexp(0) + np.log(6)
        for one in found["ranked"]:
            assert one["score"] == pytest.approx(plain[one["image"]].item(), abs=1e-3)
        scores = [one["score"] for one in found["ranked"]]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("name", "query", "status"),
    [
        ("pca", {"layer": 3}, 400),
        ("pca", {"layer": -1}, 400),
        ("pca", {}, 400),
        ("pca", {"model": 1, "layer": 0}, 404),
        ("similarity", {"layer": 0, "row": 4, "column": 0}, 400),
        ("attention", {"layer": 0, "row": 0, "column": 99}, 400),
        ("painting", {"share": "nan"}, 400),
        ("painting", {"share": "1.5"}, 400),
        ("painting", {"share": "1e999"}, 400),
        ("search", {"text": "  "}, 400),
        ("search", {"text": "x" * 501}, 400),
        ("seen", {"image": 10**17}, 400),
    ],
    ids=str,
)
def test_a_wrong_question_is_a_sentence(url: str, name: str, query: dict[str, Any], status: int) -> None:
    reply = question(url, name, **query)
    assert reply.status == status and reply.error.endswith(".") and "Traceback" not in reply.error


# ---- folders of embed ----


def test_stored_features_are_read_instead_of_the_pictures(place: Path, tmp_path: Path) -> None:
    names = sorted(COLOURS)
    for form in ("npy", "parquet"):
        api.embed(
            str(place / "model"), str(place / "pictures"), str(tmp_path / form), pool="none", format=form, device="cpu"
        )
        answers = prepare(str(place / "model"), str(tmp_path / form), None, 0, 1, "cpu")
        assert "are those that `aimv2 embed` stored" in answers.about({})["models"][0]["stored"]
        kept = answers.study.stored[0]
        assert sorted(kept) == list(range(6))
        plain = prepare(str(place / "model"), str(place / "pictures"), None, 0, 1, "cpu")
        for number in range(6):
            np.testing.assert_allclose(kept[number], plain.study.maps(0, [number], 2)[0], atol=1e-5)
        wanted = plain.find({"model": "0", "text": sentence("green")})
        found = answers.find({"model": "0", "text": sentence("green")})
        assert [one["name"] for one in found["ranked"]] == [one["name"] for one in wanted["ranked"]]
        kept[names.index("green")] = kept[names.index("red")]  # what is on disk is what is searched
        swapped = answers.find({"model": "0", "text": sentence("red")})["ranked"][:2]
        assert {one["name"] for one in swapped} == {"red.png", "green.png"}


def test_stored_features_of_another_kind_are_left_alone(place: Path, tmp_path: Path) -> None:
    api.embed(str(place / "model"), str(place / "pictures"), str(tmp_path / "means"), device="cpu")
    answers = prepare(str(place / "model"), str(tmp_path / "means"), None, 0, 1, "cpu")
    assert "pool=mean" in answers.about({})["models"][0]["stored"] and answers.study.stored == [{}]
    assert answers.find({"model": "0", "text": sentence("blue")})["ranked"][0]["name"] == "blue.png"


# ---- the command ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--images", "nowhere"], "--images nowhere: no such file or folder"),
        (["--upload-mb", "0"], "--upload-mb 0:"),
        (["--limit", "-1"], "--limit -1"),
        (["--port", "70000"], "--port 70000"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--host", "203.0.113.5"], "--host 203.0.113.5"),
        (["--other", "nothing-there"], "MODEL nothing-there"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_use_is_one_line(place: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = words if "--port" in words else [*words, "--port", "0"]
    assert main(["explore", str(place / "model"), *given, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_a_busy_port_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["explore", str(place / "model"), "--port", str(port)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: --port {port}: already in use; give another one, or 0 for any that is free\n"
    )


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest)
    )
    assert main(["explore", "anything"]) == 2
    assert capsys.readouterr().err == "error: explore needs the package uvicorn: pip install 'aimv2[ui]'\n"


def test_ctrl_c_ends_it_quietly(place: Path) -> None:
    """As started by a user, at every address: a line of warning, the line with the address; then 130 and no traceback."""
    words = command("explore", str(place / "model"), "--port", "0", "--host", "0.0.0.0", "--device", "cpu")
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as started:
        assert started.stdout and started.stderr
        assert started.stderr.readline().startswith("warning: --host 0.0.0.0: ")
        line = started.stderr.readline()
        found = re.fullmatch(r"explorer: http://0\.0\.0\.0:(\d+)/ \(Ctrl-C ends it\)\n", line)
        assert found, line
        url = f"http://127.0.0.1:{found[1]}/"
        assert ask(url, "/").status == 200
        assert len(ask(url, "/api/images").json["images"]) == 12  # drawn on the spot
        assert ask(url, "/api/example", "POST").json["says"].startswith("a ")
        assert ask(url, "/api/images", headers={"Host": "evil.example"}).status == 400
        started.send_signal(signal.SIGINT)
        assert started.wait(20) == 130
        assert (started.stdout.read(), started.stderr.read()) == ("", "stopped\n")
