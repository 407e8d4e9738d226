"""What is written for others holds no absolute path, user or host name: all bytes of every layout are searched."""

import json
import socket
from pathlib import Path

import pytest
import torch
from test_layouts import DECODER, shape

from aimv2 import api
from aimv2.interop.convert import FORMATS, convert
from aimv2.interop.model_folder import save_model
from aimv2.interop.public import public, public_recipe
from aimv2.models.create import build

USER, HOST = "marked-jane", "marked-host"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of a marked user on a marked machine, the working folder below it."""
    home = tmp_path / "homes" / USER
    (home / "work").mkdir(parents=True)
    for name in ("HOME", "USER", "LOGNAME"):
        monkeypatch.setenv(name, str(home) if name == "HOME" else USER)
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.chdir(home / "work")
    return home


CONFIG = f"""\
# started by {USER} on {HOST}
model: {{name: aimv2-tiny-patch8-32}}
data:
  train: [{{path: HOME/pairs of mine/train, weight: 2.0}}, {{path: ~/more/train}}]
  val: s3://{USER}:secret@bucket/val
  index_dir: HOME/index
log: {{wandb: {USER}/project}}
init: {HOST}:/runs/a
run: HOME/work/run
"""


def make_run(home: Path) -> Path:
    run = home / "work" / "run"
    save_model(build(shape(), DECODER, seed=0), run / "checkpoints" / "step-0000050" / "model")
    (run / "config.yaml").write_text(CONFIG.replace("HOME", str(home)))
    (run / "summary.json").write_text(json.dumps({"step": 50, "val_text_loss": 1.25, "command": f"aimv2 {home}"}))
    return run


def check(folder: Path, home: Path) -> None:
    marks = [USER, HOST, str(home), str(home.parent), "secret", str(Path(torch.__file__).parent), str(Path.cwd())]
    marks.append(str(Path(convert.__code__.co_filename).parents[1]))
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for mark in marks:
                at = content.find(mark.encode())
                assert at < 0, f"{file.name}: {content[max(at - 80, 0) : at + 120]!r}"


@pytest.mark.parametrize("to", FORMATS)
def test_a_converted_run(home: Path, to: str) -> None:
    if to in ("onnx", "openvino"):
        pytest.importorskip(to)
    run, out = make_run(home), home / "work" / "made"
    api.convert(str(run), str(out), to)
    check(out, home)
    text = (out / "README.md").read_text()
    assert "path: train" in text
    assert "s3://bucket/val" in text
    assert "wandb" not in text
    api.convert(str(run), "made-2", to)  # the same of a relative name
    check(home / "work" / "made-2", home)


def test_a_card_of_an_earlier_version_is_cleaned(home: Path) -> None:
    run = make_run(home)
    api.convert(str(run), "first", "safetensors")
    card = Path("first/README.md")
    card.write_text(card.read_text().replace("path: train", f"path: {home}/train"))
    about = json.loads(Path("first/config.json").read_text())
    Path("first/config.json").write_text(json.dumps(about))
    Path("first/tokenizer_config.json").write_text(
        json.dumps(
            {"name_or_path": f"{home}/llm", "chat_template": f"{{# {'x' * 9} #}}\n</s>[/INST]", "eos_token": "</s>"}
        )
    )
    api.convert("first", "second", "safetensors")
    check(Path("second"), home)
    assert json.loads(Path("second/tokenizer_config.json").read_text()) == {
        "name_or_path": "llm", "chat_template": "{# xxxxxxxxx #}\n</s>[/INST]", "eos_token": "</s>",
    }  # fmt: skip


def test_what_is_pushed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aimv2.interop import hub

    pushed = home / "pushed"

    def upload(folder: Path, repository: str, private: bool, message: str) -> str:
        folder.rename(pushed)  # the hub is not reached from here
        return repository

    monkeypatch.setattr(hub, "upload", upload)
    api.push(str(make_run(home)), "somebody/encoder")
    check(pushed, home)
    assert "from_pretrained('somebody/encoder')" in (pushed / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("init /home/x/runs/a@50; 3.5 px/s, a/b, https://host/path/x and s3://b/c", "init a@50; 3.5 px/s, a/b, https://host/path/x and s3://b/c"),
        ("/home/jane doe/my data", "my data"),
        ("C:\\Users\\jane\\data", "data"),
        ("~/data/train", "train"),
        ("../jane/data", "data"),
        ("</s> [/INST] 1/2", "</s> [/INST] 1/2"),
        (f"by {USER} at {HOST}.local", "by user at user.local"),
        (f"{USER}s", f"{USER}s"),
        ("aimv2-large-patch14-224", "aimv2-large-patch14-224"),
    ],
)  # fmt: skip
def test_texts(home: Path, given: str, expected: str) -> None:
    assert public(given) == expected


def test_words_of_other_meanings_stay(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "test")
    monkeypatch.setattr(socket, "gethostname", lambda: "vision.local")
    assert public("a vision model, scored on the test split") == "a vision model, scored on the test split"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a cat on a mat, cats, Cat, bobcat: 91.2", None),
        ("cat.jpg, pictures/cat.jpg, cat-2, cat_2, /cat-videos, a cat: yes, (cat), cat.", None),
        ("mat: a cat", None),
        ("cat", "user"),
        ("by cat@mat.local and jane@mat", "by user@user.local and jane@user"),
        ("ssh://cat@mat:22/x, http://mat.local/x, mat:/runs/a, mat:~/a", "ssh://user:22/x, http://user.local/x, user:/runs/a, user:~/a"),
        ("of ~cat, runs/cat/a, cat/project, a\\cat\\b", "of ~user, runs/user/a, user/project, a\\user\\b"),
    ],
)  # fmt: skip
def test_a_name_that_is_a_word_goes_only_where_it_is_a_name(
    home: Path, monkeypatch: pytest.MonkeyPatch, given: str, expected: str | None
) -> None:
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, "cat")
    monkeypatch.setattr(socket, "gethostname", lambda: "mat")
    assert public(given) == (expected or given)


def test_a_recipe_that_is_none(home: Path) -> None:
    assert public_recipe("a: [") == public_recipe("- 1") == ""
