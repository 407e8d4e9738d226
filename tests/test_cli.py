"""What a user types and reads: help, one JSON object, one line for a mistake, where values come from, a dry run."""

from __future__ import annotations

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import aimv2
from aimv2 import api
from aimv2.cli import main
from aimv2.cli.dispatch import read_options, read_words
from aimv2.commands.parse import module_of, option_fields, read
from aimv2.commands.table import COMMANDS, PARTS, function_name
from aimv2.config.load import parse, read_recipe
from aimv2.config.schema import AUTO, Config, DataConfig, config_class, get_value, leaf_keys
from aimv2.data.shards.format import read_samples
from aimv2.data.stream.samples import training_shards
from aimv2.errors import UsageError
from aimv2.train.defaults import defaults_for
from runs import TINY, call, options, scenes, train

RECIPE = Path(__file__).parents[1] / "recipes" / "cifar10-small.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 captioned scenes, 32 px."""
    return scenes(tmp_path_factory.mktemp("cli") / "scenes", 60)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    train(data, folder, train__steps=1, optim__warmup=1)
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(path)
    return path


class Shell:
    """The command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *words: Any) -> tuple[int, str, str]:
        """(exit code, standard output, standard error)."""
        self.capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = self.capsys.readouterr()
        return code, out, err

    def json(self, *words: Any) -> dict[str, Any]:
        """The one object that --json prints."""
        code, out, _ = self(*words, "--json")
        assert code == 0
        assert out.endswith("\n") and out.count("\n") == 1, "one object on one line, and nothing else"
        return json.loads(out)

    def refuses(self, *words: Any) -> str:
        """The one line that a mistake gives."""
        code, out, err = self(*words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1
        return err


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def tree(folder: Path) -> list[tuple[str, int]]:
    """What lies in a folder, with sizes."""
    return sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*") if p.is_file())


def python(code: str) -> str:
    """Standard output of a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


# ---- help ----


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["data", "--help"], ["pretrain", "--help"], ["recipes"]], ids=" ".join
)
def test_help_imports_no_torch(words: list[str]) -> None:
    said = python(f"import sys; from aimv2.cli import main; main({words}); print('torch' in sys.modules)")
    assert said.splitlines()[-1] == "False"
    assert len(said.splitlines()) > 1


def test_importing_the_package_imports_no_torch_until_a_name_needs_it() -> None:
    code = "import sys, aimv2; print('torch' in sys.modules); aimv2.VisionEncoder; print('torch' in sys.modules)"
    assert python(code).split() == ["False", "True"]


def test_overview_lists_every_verb(shell: Shell) -> None:
    code, out, err = shell("--help")
    assert (code, err) == (0, "")
    for name, command in COMMANDS.items():
        assert re.search(rf"^  {name}\s+{re.escape(command.summary)}$", out, re.MULTILINE)
        assert f"\n{command.part}:\n" in out and command.part in PARTS
    assert max(map(len, out.splitlines())) <= 80
    assert shell()[1] == out
    assert shell("--version")[1].strip() == aimv2.__version__


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_verb_gives_types_and_defaults(name: str, shell: Shell) -> None:
    code, out, err = shell(*name.split(), "--help-all")
    out = " ".join(out.split())
    assert (code, err) == (0, "")
    assert "--json" in out and "--debug" in out
    for key, default in verb_options(name).items():
        own = r"(?:(?! --\w).)*?"  # up to the next option
        shown = key if "." in key else key.replace("_", "-")
        said = re.search(rf" --{re.escape(shown)}\b{own}\(type: {own}default: ([^\s)]+)", out)
        assert said, f"{name}: --{key} has no type and default in its help"
        if COMMANDS[name].configured and key in AUTO:
            assert said[1] == "auto"
        elif isinstance(default, int | float) and not isinstance(default, bool):
            assert float(said[1]) == default
    for word in COMMANDS[name].words:
        assert re.search(rf" {word.rstrip('*').upper()} [^(]+\(required, type: ", out)


@pytest.mark.parametrize("name", COMMANDS)
def test_short_help_is_short_and_its_examples_parse(name: str, shell: Shell) -> None:
    code, out, err = shell(*name.split(), "--help")
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert len(lines) <= 58 and lines[0].startswith(f"usage: aimv2 {name}") and "\nexamples:\n" in out
    if hasattr(module_of(name), "FIRST"):
        assert max(map(len, lines)) <= 80 and len(lines) < 50
        assert f"`aimv2 {name} --help-all` shows every option." in out
        assert set(module_of(name).FIRST.split()) <= {
            *leaf_keys(config_class(COMMANDS[name].task)),
            *option_fields(name),
        }
    for example in module_of(name).EXAMPLES.splitlines():
        words = [word for word in shlex.split(example, comments=True) if word != "--json"]
        assert words[: 1 + len(name.split())] == ["aimv2", *name.split()]
        given = read_words(name, words[1 + len(name.split()) :])
        assert parse(given["options"]) if COMMANDS[name].configured else read(name, given)


def test_help_says_auto_for_the_keys_that_follow_data_and_device(shell: Shell, data: Path) -> None:
    samples = [
        sample for shards in training_shards(DataConfig(train=str(data))) for _, sample in read_samples(shards[0])
    ]
    assert set(defaults_for(samples, 60, "cpu", Config(), set())) | {"optim.warmup"} == set(AUTO)
    for words in (["pretrain", "--help"], ["pretrain", "--help-all"], ["data", "browse", "--help-all"]):
        out = " ".join(shell(*words)[1].split())
        assert "auto: without --config RECIPE the value follows the data and the device" in out
        assert not re.search(r"default: (1500000|8192|12500|bf16)", out)


def verb_options(name: str) -> dict[str, Any]:
    """Options of a verb and their defaults, by what they are made from."""
    command, kind = COMMANDS[name], config_class(COMMANDS[name].task)
    whole = {key: get_value(kind(), key) for key in leaf_keys(kind)} if command.configured else {}
    if command.configured and command.part == "train":
        return whole
    words = {word.rstrip("*") for word in COMMANDS[name].words} | ({"config", "options"} if whole else set())
    signature = inspect.signature(getattr(api, function_name(name)))
    return {**whole, **{key: p.default for key, p in signature.parameters.items() if key not in words}}


# ---- verbs and functions ----


def test_every_verb_is_a_function_of_the_same_options() -> None:
    assert set(api.__all__) - {"load_model", "save_pretrained"} == set(map(function_name, COMMANDS))
    for name, command in COMMANDS.items():
        signature = inspect.signature(getattr(api, function_name(name)))
        if name in ("pretrain", "vlm train", "detect train"):
            assert list(signature.parameters) == ["config", "run", "options", "dry_run", "print_config"]
            continue
        if name in ("data browse", "plan"):
            assert list(signature.parameters)[:2] == ["config", "options"]
        words = [word.rstrip("*") for word in command.words]
        required = [key for key, p in signature.parameters.items() if p.default is p.empty]
        if name in ("recipes", "detect score", "doctor"):  # all of them, predictions, or this machine, without a word
            words = []
        assert required == words, f"{name}: what has no default is a word of the command line, in this order"


def test_options_reach_the_function(shell: Shell, tmp_path: Path) -> None:
    by_words = shell.json("data", "shapes", tmp_path / "a", "--count", 7, "--size=24", "--seed", 3)
    by_call = api.data_shapes(str(tmp_path / "b"), count=7, size=24, seed=3)
    assert {**by_words, "out": ""} == {**by_call, "out": ""}
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_dotted_options_of_pretrain() -> None:
    words = ["--config", "r.yaml", "--train.steps=5", "--optim.lr", "2e-3", "--resume", "--dry-run", "--data.val", "-v"]
    recipe, given, switches = read_options(words)
    assert recipe == "r.yaml"
    assert given == {"train.steps": "5", "optim.lr": "2e-3", "resume": True, "data.val": "-v"}
    assert switches == {"dry_run"}


# ---- --json ----


def test_json_of_the_data_verbs(shell: Shell, data: Path, picture: Path, tmp_path: Path) -> None:
    made = shell.json("data", "shapes", tmp_path / "s", "--count", 5)
    assert (made["train"], made["val"]) == (5, 1)
    assert shell.json("data", "check", tmp_path / "s")["samples"] == 6
    (tmp_path / "photos").mkdir()
    picture.rename(tmp_path / "photos" / "red.png")
    (tmp_path / "photos" / "red.txt").write_text("a red picture")
    imported = shell.json("data", "import", tmp_path / "photos", tmp_path / "shards", "--workers", 1)
    assert (imported["train"], imported["val"], imported["rejected"]) == (1, 0, 0)
    trained = shell.json("tokenizer", "train", data, tmp_path / "tokenizer", "--vocab-size", 300)
    assert trained["vocab_size"] == 300
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()


def test_json_of_caption(shell: Shell, run: Path, picture: Path) -> None:
    (picture.parent / "broken.png").write_bytes(b"no picture")
    result = shell.json("caption", run, picture.parent, "--max-tokens", 4)
    assert [row["image"] for row in result["captions"]] == [str(picture)]
    assert [row["image"] for row in result["rejected"]] == [str(picture.parent / "broken.png")]


def test_json_of_pretrain_with_progress_beside_it(shell: Shell, data: Path, tmp_path: Path) -> None:
    words = options(data, tmp_path / "run", train__steps=2)
    code, out, err = shell(*words, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "steps 0 to 2" in err


def test_figures_for_people_fit_80_columns(shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = shell("data", "shapes", "s", "--count", 5)
    assert code == 0
    assert re.search(r"^train\s+5\s*$", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 80


# ---- mistakes ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretran"], "unknown command 'pretran'; did you mean 'pretrain'"),
        (["data", "chek", "x"], "unknown command 'data chek'; did you mean 'check'"),
        (["tokeniser", "train"], "did you mean 'tokenizer'"),
        (["data", "shapes", "x", "--cout", "3"], "unknown option '--cout'; did you mean '--count'"),
        (["data", "check", "x", "--min-sides", "3"], "did you mean '--min-side'"),
        (["pretrain", "--train.step", "3"], "unknown option '--train.step'; did you mean '--train.steps'"),
        (["pretrain", "--optim.weight-decy=1"], "did you mean '--optim.weight_decay'"),
        (["detect", "train", "--objectiv.head", "closed"], "did you mean '--objective.head'?"),
        (["pretrain", "--run"], "--run needs a value"),
        (["pretrain", "--train.steps", "--resume"], "--train.steps needs a value"),
        (["pretrain", "run"], "unexpected 'run'"),
        (["pretrain", "--train.steps", "many", "--print-config"], "train.steps"),
        (["pretrain", "--train", "3", "--run", "r"], "'train' on the command line is a section"),
        (["data", "shapes"], "OUT"),
        (["data", "shapes", "x", "--count", "many"], "count"),
        (["pretrain", "--dri-run"], "unknown option '--dri-run'; did you mean '--dry-run'"),
        (["data", "check", "nowhere"], "SOURCE: 'nowhere' does not exist"),
        (["knn", "nowhere", "--data", "nothing"], "MODEL nowhere: no such file"),
        (["probe", "nowhere.safetensors", "--data", "nothing"], "MODEL nowhere.safetensors: no such file"),
        (["caption", "no-such-model", "x.png"], "MODEL no-such-model: no such file, folder, run or released name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], said: str, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in shell.refuses(*words)
    assert tree(tmp_path) == []


def test_a_folder_that_is_not_shards_names_the_way_to_make_them(shell: Shell, picture: Path, tmp_path: Path) -> None:
    line = shell.refuses("pretrain", "--run", tmp_path / "run", "--data.train", picture.parent)
    assert f"`aimv2 data import {picture.parent} OUT`" in line
    spaced = tmp_path / "my photographs"
    spaced.mkdir()
    picture.rename(spaced / picture.name)
    line = shell.refuses("pretrain", "--run", tmp_path / "run", "--data.train", spaced)
    assert f"`aimv2 data import '{spaced}' OUT`" in line
    assert not (tmp_path / "run").exists()


def test_what_a_conversion_leaves_out_is_printed(shell: Shell, run: Path, tmp_path: Path) -> None:
    code, out, _ = shell("convert", run, tmp_path / "timm", "--to", "timm")
    assert code == 0 and re.search(r"^left out: .*decoder$", out, re.MULTILINE)


def test_a_validation_path_that_is_not_there_says_what_happens_without_it(
    shell: Shell, data: Path, tmp_path: Path
) -> None:
    line = shell.refuses(*options(data, tmp_path / "new"), "--data.val", 0)
    assert "data.val: " in line and "without data.val" in line


def test_debug_shows_the_traceback(shell: Shell) -> None:
    with pytest.raises(UsageError):
        main(["pretran", "--debug"])
    done = subprocess.run(
        [sys.executable, "-m", "aimv2", "--debug", "pretran"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.rstrip().endswith("(aimv2 --help lists them)")


def test_python_dash_m(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aimv2", "data", "chek"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: unknown command 'data chek'")


@pytest.mark.parametrize("words", [["--help"], ["pretrain", "--help"], ["data", "--help"]], ids=" ".join)
def test_a_closed_pipe_is_no_error(words: list[str]) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-m", "aimv2", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as started:
        assert started.stdout and started.stderr
        started.stdout.close()
        assert started.stderr.read() == ""
        assert started.wait(timeout=60) in (0, 141)


# ---- before a run ----


def test_print_config_says_where_each_value_came_from(shell: Shell, tmp_path: Path) -> None:
    words = ["pretrain", "--config", RECIPE, "--train.steps", 77, "--run", tmp_path / "run", "--print-config"]
    result = shell.json(*words)
    raw = read_recipe(RECIPE)
    assert set(result["config"]) == set(result["from"]) == set(leaf_keys())
    assert (result["config"]["train.steps"], result["from"]["train.steps"]) == (77, "command line")
    key = "optim.warmup"
    assert (result["config"][key], result["from"][key]) == (raw[key], str(RECIPE))
    assert "optim.eps" not in raw
    assert (result["config"]["optim.eps"], result["from"]["optim.eps"]) == (1e-8, "default")
    rates = {point["step"]: point["lr"] for point in result["learning_rate"]}
    assert rates[0] == Config().optim.start_lr and max(rates) == 76
    code, out, _ = shell(*words)
    assert code == 0
    assert re.search(r"^train\.steps:\s+77\s+# command line$", out, re.MULTILINE)
    assert re.search(rf"^# recipe: {re.escape(str(RECIPE))}$", out, re.MULTILINE)
    assert re.search(r"^optim\.warmup:\s+\d+\s+# recipe$", out, re.MULTILINE)
    assert re.search(r"^optim\.eps:\s+1e-08\s+# default$", out, re.MULTILINE)
    assert not (tmp_path / "run").exists()


def test_print_config_knows_the_data_of_the_environment(
    shell: Shell, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIMV2_DATA", str(data))
    result = shell.json("pretrain", "--print-config")
    assert (result["config"]["data.train"], result["from"]["data.train"]) == (str(data), "$AIMV2_DATA")


def test_mixture_on_the_command_line(shell: Shell, data: Path) -> None:
    mixture = f"[{{name: a, path: {data}, weight: 0.7}}, {{path: {data}, captions: {{caption: 1}}}}]"
    result = shell.json("pretrain", "--config", RECIPE, "--data.train", mixture, "--print-config")
    first, second = result["config"]["data.train"]
    assert first == {"path": str(data), "name": "a", "weight": 0.7, "captions": None}
    assert (second["weight"], second["captions"]) == (1.0, {"caption": 1.0})


@pytest.mark.parametrize(
    ("side", "name"),
    [(32, "aimv2-tiny-patch4-32"), (100, "aimv2-tiny-patch14-112")],
)
def test_defaults_follow_the_size_of_the_images(side: int, name: str, shell: Shell, tmp_path: Path) -> None:
    api.data_shapes(str(tmp_path / "data"), count=3, size=side)
    result = shell.json("pretrain", "--run", tmp_path / "run", "--data.train", tmp_path / "data", "--print-config")
    assert (result["config"]["model.name"], result["from"]["model.name"]) == (name, "auto")
    assert result["config"]["data.train"] == str(tmp_path / "data")
    asked = {"run": "command line", "data.train": "command line", "train.steps": "auto", "optim.lr": "default"}
    assert {key: result["from"][key] for key in asked} == asked
    assert not (tmp_path / "run").exists()


def test_data_without_a_config_trains(shell: Shell, data: Path, tmp_path: Path) -> None:
    small = {key: value for key, value in TINY.items() if key not in ("model.name", "train.precision")}
    small |= {"train.steps": 1, "optim.warmup": 1, "run": tmp_path / "run", "data.train": data}
    result = shell.json("pretrain", *(word for key, value in small.items() for word in (f"--{key}", value)))
    assert result["step"] == 1
    assert read_recipe(tmp_path / "run" / "config.yaml")["model.name"] == "aimv2-tiny-patch4-32"


def test_dry_run_reports_and_writes_nothing(
    shell: Shell, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    words = [*options(data, tmp_path / "run", train__steps=1000), "--dry-run"]
    result = shell.json(*words)
    assert tree(tmp_path) == before and not (tmp_path / "run").exists()
    assert shell.json(*options(data, tmp_path / "kept", train__steps=1000), "--dry-run")["samples"] == 60
    assert tree(tmp_path) == before
    pairs = TINY["train.batch_size"]
    assert result["patches_a_step"] == pairs * 16  # 32 px, patch 8
    assert pairs * 2 <= result["tokens_a_step"] <= pairs * 77
    assert result["encoder_parameters"] > 0 and result["decoder_parameters"] > 0
    assert 0.05 < result["memory_gb"] < 50 and result["memory_free_gb"] > 0 and result["compile_seconds"] == 0
    assert result["visits_a_sample"] == pytest.approx(1000 * pairs / 60) and result["validation_samples"] > 0
    parameters = result["encoder_parameters"] + result["decoder_parameters"]
    assert result["checkpoints_gb"] == pytest.approx(16 * parameters / 1e9) and result["disk_free_gb"] > 0  # one save
    assert result["expected_hours"] == pytest.approx(result["seconds_a_step"] * 1000 / 3600)
    rates = {point["step"]: point["lr"] for point in result["learning_rate"]}
    assert max(rates, key=lambda step: rates[step]) == TINY["optim.warmup"]
    assert rates[TINY["optim.warmup"]] == TINY["optim.lr"]


def test_dry_run_for_people(shell: Shell, data: Path, tmp_path: Path) -> None:
    code, out, _ = shell(*options(data, tmp_path / "run"), "--dry-run")
    assert code == 0
    for row in ("encoder_parameters", "memory_gb", "tokens_a_step", "expected_hours", "learning rate:"):
        assert re.search(rf"^{row}\s+\S", out, re.MULTILINE), row


def test_a_run_is_not_overwritten_unasked(shell: Shell, data: Path, run: Path) -> None:
    before = tree(run)
    assert "--resume" in shell.refuses(*options(data, run)) and tree(run) == before
    assert "train.steps is 1 there, got 9" in shell.refuses("pretrain", "--run", run, "--resume", "--train.steps", 9)
    assert tree(run) == before
    assert shell.json("pretrain", "--run", run, "--resume")["step"] == 1


def test_a_rank_of_several_says_everything_before_it_ends():
    for words, code, out, err in (
        (["--version"], 0, f"{aimv2.__version__}\n", ""),
        (["nonsense"], 2, "", "error: "),
    ):
        ended = call(*words, env={"WORLD_SIZE": "2", "RANK": "0"})
        assert ended.returncode == code
        assert ended.stdout == out
        assert ended.stderr.startswith(err)
