"""``~`` in every option that takes a path; processes without HOME, without an entry in passwd, with a home that can't be written."""

from __future__ import annotations

import ast
import os
import pwd
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from PIL import Image

import aimv2
from aimv2 import api
from aimv2.cli import main
from aimv2.commands.parse import option_fields, options_class, read, spelled
from aimv2.commands.table import COMMANDS
from aimv2.config import detect, instruct
from aimv2.config.load import parse
from aimv2.config.paths import PATHS
from aimv2.config.schema import config_class, leaf_keys
from aimv2.config.types import Home, convert, rules
from aimv2.errors import UsageError
from aimv2.places import LIBRARIES, cache_folder, can_hold, private_folder
from aimv2.report.write import after_run
from aimv2.train.launch import about_run
from aimv2.train.loop import Trainer
from runs import exact, options, scenes, train

WORDS = {  # options of text that are no paths
    "ask", "baselines", "caption_column", "dataset", "decays", "device", "gpu", "host", "image_column", "image_mean", "image_size",
    "image_std", "invalid", "k", "layers", "licence", "message", "name", "names", "object_size", "only", "rates", "repository",
    "revision", "seeds", "shots", "split", "tasks", "template", "values", "words",
}  # fmt: skip
WORDS_OF_A_RUN = {
    "model.name", "eval.best", "log.wandb", "objective.teacher_sha256", "objective.caption_prompt"
}  # fmt: skip
OUTSIDER = 54321  # a number of no user


def holds_text(hint: Any) -> bool:
    """Whether a type takes any text."""
    if get_origin(hint) is Literal:
        return False
    return hint is str or any(holds_text(part) for part in get_args(hint))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


# ---- paths ----


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_that_takes_a_path_takes_a_home(name: str, home: Path) -> None:
    hints = get_type_hints(options_class(name), include_extras=True)
    for key in option_fields(name):
        if holds_text(hints[key]) and not str(hints[key]).startswith("dict"):
            option = spelled(name, key)
            takes = any(isinstance(rule, Home) for rule in rules(hints[key]))
            assert takes != (key in WORDS), f"{option} of {name}: PathText, or one of WORDS here?"
            if takes:
                assert convert("~/x y", hints[key], option) == f"{home}/x y"
                assert convert(["~", "a~"], hints[key], option) == [str(home), "a~"]


def test_every_key_of_a_configuration_that_takes_a_path_takes_a_home(home: Path) -> None:
    kinds = {
        section: type(getattr(config_class()(), section)) for section in ("model", "data", "objective", "eval", "log")
    }
    hints = {f"{section}.{key}": hint for section, kind in kinds.items() for key, hint in get_type_hints(kind).items()}
    hints |= {key: hint for key, hint in get_type_hints(config_class()).items() if key in leaf_keys()}
    for own in (instruct.OPTIONS, detect.OPTIONS):
        hints |= {f"objective.{key}": hint for key, hint in get_type_hints(own).items() if key in vars(own())}
    texts = {key for key, hint in hints.items() if holds_text(hint)}
    assert texts == {*PATHS, *WORDS_OF_A_RUN}
    config = parse({"run": "~", "init": "~/m@5", "data.train": [{"path": "~/a"}, {"name": "b"}], "data.val": "~/v"})
    assert (config.run, config.init, config.data.val) == (str(home), f"{home}/m@5", f"{home}/v")
    assert [source.path for source in config.data.train] == [f"{home}/a", ""]  # type: ignore[union-attr]


def test_the_home_of_a_user_and_of_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = pwd.getpwuid(os.getuid())
    assert read("knn", {"model": f"~{me.pw_name}/m", "data": "D"}).model == f"{me.pw_dir}/m"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UsageError, match=r"^--out ~nobody-of-ours/m: .*no user nobody-of-ours.*the whole path"
    ) as error:
        read("knn", {"model": "M", "data": "D", "out": "~nobody-of-ours/m"})
    assert error.value.option == "--out"
    (tmp_path / "~nobody-of-ours").mkdir()
    found = api.models  # Python's road is the same
    assert (
        found
        and read("embed", {"model": "M", "images": Path("~nobody-of-ours"), "out": "o"}).images == "./~nobody-of-ours"
    )


def test_models_of_python_by_their_home(home: Path) -> None:
    model = aimv2.create_model("aimv2-tiny-patch8-32", width=32, depth=1, heads=2, hidden=48)
    api.save_pretrained(model, "~/m")
    assert (home / "m/model.safetensors").is_file() and aimv2.load_model(Path("~/m")).config == model.config
    with pytest.raises(UsageError, match=r"^MODEL ~nobody-of-ours: .*no user nobody-of-ours"):
        aimv2.load_model("~nobody-of-ours")


def test_a_run_by_its_home(home: Path) -> None:
    scenes(home / "data", 40)
    train(Path("~/data"), Path("~/run"), train__steps=1, eval__captions=0)
    assert (home / "run/summary.json").is_file() and not Path("~").exists()
    assert api.report(["~/run"], out="~/page.html")["report"] == str(home / "page.html")
    assert api.doctor(runs=["~/run"])["failed"] == 0
    assert f"  train: {home}/data\n" in (home / "run/config.yaml").read_text()


# ---- commands to copy ----

NEXT_TO = re.compile(rf"\baimv2 ({'|'.join(COMMANDS)})\b[^`;:]*$")
NO_PATHS = {
    "name",
    "given",
    "self.task.command",
    "DENSE_SETS[name].verb",
    "command",
    "count",
}  # in messages that name a command
ODD = "my run's $x ~"


def test_printed_commands_quote_what_they_hold() -> None:
    found = 0
    for file in sorted(Path(aimv2.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = ""
            for part in node.values if isinstance(node, ast.JoinedStr) else ():
                if isinstance(part, ast.Constant):
                    text += part.value
                    continue
                assert isinstance(part, ast.FormattedValue)
                value = ast.unparse(part.value)
                if NEXT_TO.search(text):
                    found += 1
                    assert value.startswith("shlex.") or value in NO_PATHS, f"{file.name} {node.lineno}: {{{value}}}"
                text += "command" if value == "self.task.command" else "_"
    assert found > 2


def test_commands_with_odd_folders_can_be_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ODD
    (folder / "red").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(folder / "red/1.png")
    assert main(["pretrain", "--data.train", str(folder), "--run", str(tmp_path / "r")]) == 2
    command = capsys.readouterr().err.split("`")[1]
    assert shlex.split(command) == ["aimv2", "data", "import", str(folder), "OUT"]
    lines: list[str] = []
    after_run(folder, torch.device("cpu"), lines.append)  # no run is there
    assert shlex.split(lines[0].split("`")[1]) == ["aimv2", "report", str(folder)]
    trainer = SimpleNamespace(task=SimpleNamespace(command="detect train"), run=folder)
    again = Trainer.command_to_go_on(trainer)  # type: ignore[arg-type]
    assert shlex.split(again) == ["aimv2", "detect", "train", "--run", str(folder), "--resume"]
    monkeypatch.setattr(sys, "argv", ["aimv2", "report", str(folder)])
    assert shlex.split(str(about_run(parse({}), weights(tmp_path))["command"])) == ["aimv2", "report", str(folder)]


def weights(folder: Path) -> Path:
    (folder / "w").write_bytes(b"x")
    return folder / "w"


# ---- homes ----

SCRIPT = """
import getpass, os, sys
from aimv2.cli import main
run, words = sys.argv[1], sys.argv[2:]
assert os.getuid() == {uid}
try:
    sys.exit("a user " + getpass.getuser())
except (KeyError, OSError):
    pass
for line in (["--help"], [*words, "--train.stop_at", "1"], ["pretrain", "--run", run, "--resume"], ["report", run], ["doctor", run]):
    if code := main(line):
        sys.exit(f"{{line[0]}} ends with {{code}}")
"""


def outsider(words: list[str], environment: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python as a user whose number no passwd knows, and whom write bits bind; skipped where that is not permitted."""
    start = ["unshare", "--user", f"--map-user={OUTSIDER}", f"--map-group={OUTSIDER}"]
    try:
        tried = subprocess.run([*start, "true"], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if tried.returncode:
        pytest.skip(f"user namespaces are not permitted: {tried.stderr.strip()}")
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "LANG") if key in os.environ}
    words = [*start, sys.executable, *words]
    return subprocess.run(
        words, env={**kept, **environment}, cwd=cwd, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.mark.parametrize("kind", ["no HOME", "read-only home"])
def test_no_command_needs_a_home(kind: str, world: Any, tmp_path: Path) -> None:
    home, scratch, work = (tmp_path / name for name in ("home", "tmp", "work"))
    for folder in (home, scratch, work):
        folder.mkdir()
    home.chmod(0o555)
    environment = {"TMPDIR": str(scratch), **({"HOME": str(home)} if kind != "no HOME" else {})}
    words = options(
        world.scenes, work / "run", train__steps=2, eval__captions=0, data__workers=1, log__tensorboard=True
    )
    done = outsider(["-c", SCRIPT.format(uid=OUTSIDER), str(work / "run"), *words], environment, work)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in exact(work / "run") if "loss" in line] == [1, 2]
    assert (work / "run/report.html").is_file() and "Traceback" not in done.stderr
    assert [path.name for path in work.iterdir()] == ["run"]  # no folder called ~
    assert not list(home.iterdir())
    (cache,) = scratch.glob(f"aimv2-{OUTSIDER}")
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700 and list((cache / "aimv2/index").iterdir())


def test_a_temporary_cache_is_nobody_else_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = Path(private_folder())
    assert private_folder() == str(folder)
    folder.chmod(0o777)  # others could write to it
    assert private_folder() != str(folder)
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert private_folder() != str(folder)


def test_a_cache_that_is_in_the_way(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in (*LIBRARIES, "HF_HOME"):
        monkeypatch.setenv(name, "own")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("index") == home / ".cache/aimv2/index"
    (home / ".cache").mkdir()
    (home / ".cache/aimv2").write_text("no folder")
    assert cache_folder("index") == Path(private_folder()) / "aimv2/index"
    assert all(os.environ[name] == "own" for name in LIBRARIES)  # a library's own variable stays


def test_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/proc/self/x"])
    monkeypatch.setenv("HOME", "no/folder")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert main(["--version"]) == 0 and "XDG_CACHE_HOME" not in os.environ


def test_where_a_cache_can_be(tmp_path: Path) -> None:
    assert can_hold(str(tmp_path / "a/b")) and not can_hold("~/.cache")
    (tmp_path / "file").write_text("")
    assert not can_hold(str(tmp_path / "file/b"))
    assert not can_hold("/proc/self/x")
