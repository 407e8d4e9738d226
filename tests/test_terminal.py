"""What every verb owes a terminal: one JSON object, tables of 80 columns, no colour unasked, one line for what is missing,
completion."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from aimv2 import api
from aimv2.cli import main
from aimv2.commands.render import render as show
from aimv2.commands.table import COMMANDS
from aimv2.data.shards.format import json_of, read_samples
from aimv2.doctor.packages import requirements
from aimv2.errors import UsageError
from aimv2.interop.convert import convert
from aimv2.models.create import build
from aimv2.models.sizes import EncoderConfig
from aimv2.tables import FRACTIONS
from runs import TINY, command, read_terminal, scenes, train
from tiny_llm import language_model

EXTRAS = {
    "hub",
    "wandb",
    "onnx",
    "openvino",
    "jax",
    "caption",
    "faiss",
    "peft",
    "mlx",
    "ui",
    "docs",
    "heic",
    "vlm",
    "detect",
}
LABELLED = {"red": (200, 30, 30), "blue": (30, 60, 230)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned ``scenes``, a ``run`` on them, an encoder ``m``, labelled pictures, pictures with masks, ``photos``."""
    root = tmp_path_factory.mktemp("terminal")
    scenes(root / "scenes", 60)
    train(root / "scenes", root / "run", train__steps=2, eval__captions=4)
    config = EncoderConfig("tiny", 32, 3, 2, 48, 7, 56)
    convert(build(config, None, seed=0).eval(), root / "m", "safetensors")
    for split, count in (("train", 8), ("test", 4)):
        for name, colour in LABELLED.items():
            (root / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                picture(root / "data" / split / name / f"{number}.png", tuple(c + number for c in colour))
    for split in ("train", "val"):
        for number in range(6):
            picture(root / "masks" / "images" / split / f"{number}.png", (200, 30 * number, 30))
            picture(root / "masks" / "masks" / split / f"{number}.png", number % 2, "L")
            picture(root / "metres" / "images" / split / f"{number}.png", (200, 30 * number, 30))
            picture(root / "metres" / "depth" / split / f"{number}.png", 900 + 300 * number, "I;16")
    picture(root / "photos" / "red.png", (200, 30, 30))
    (root / "photos" / "red.txt").write_text("a red picture")
    stages = {"scenes": {"verb": "data shapes", "options": {"count": 5}}}
    language_model(root / "llm")
    (root / "chain.yaml").write_text(yaml.safe_dump({"out": str(root / "chain"), "stages": stages}))
    return root


def picture(path: Path, colour: Any, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (40, 30), colour).save(path)


# ---- one object, 80 columns ----

WORDS = {
    "pretrain": ["--run run --resume", "--run run --resume --print-config", "--dry-run {tiny}"],
    "run": ["chain.yaml"],
    "data import": ["photos new/shards --workers 1"],
    "data check": ["scenes"],
    "data browse": ["--config run/config.yaml --out new/page.html --count 4"],
    "data shapes": ["new/shapes --count 5"],
    "data teach": ["m photo-shards new/taught"],
    "tokenizer train": ["scenes new/tokenizer --vocab-size 300"],
    "caption": ["run photos --max-tokens 3", "run --data scenes --score --limit 4"],
    "compare": ["knn"],
    "models": [""],
    "plan": ["--config aimv2-large-224 --gpus 64 --gpu h100 --price 2 --decode-rate 100"],
    "recipes": [""],
    "convert": ["run new/converted"],
    "embed": ["run photos new/embedded"],
    "probe": ["m --data data --epochs 1 --batch-size 8"],
    "knn": ["m --data data --k 1,3 --out knn"],
    "linear": ["m --data data", "m --data data --solver sgd --layers 0,last"],
    "fewshot": ["m --data data --shots 1,2 --seeds 2"],
    "segment": ["m --data masks --epochs 1 --rates 1e-2"],
    "depth": ["m --data metres --epochs 1 --rates 1e-2"],
    "zeroshot": ["run --data data"],
    "retrieve": ["run --data scenes --candidates 12 --baselines random"],
    "report": ["run --images 1"],
    "vlm build": ["m llm new/vlm"],
    "vlm score": ["vlm --data questions --max-tokens 2 --batch-size 8"],
    "vlm train": [
        "--dry-run --init vlm --data.train scenes --data.workers 0 --train.steps 2 --train.batch_size 4 --train.precision fp32"
    ],
    "detect score": ["--predictions found.json --data boxes", "detector --data boxes"],
    "detect photo": ["photos --model detector --out new/found"],
    "detect train": ["--dry-run {detect}"],
    "explore": [],  # serves until it is stopped: tests/explorer
    "doctor": ["--quick"],
    "push": [],  # wants the hub: tests/interop
}

DETECT = (  # a tiny detector
    "init=m data.train=boxes data.workers=0 train.steps=1 train.batch_size=4 train.precision=fp32 objective.width=32 log.report=false "
    "objective.encoder_layers=1 objective.decoder_layers=2 objective.queries=8 objective.pyramid=[1,0.5] eval.samples=1 "
    "log.tensorboard=false"
)

# what may take longer than ten seconds and counts its images, batches or fits
WAITED = {
    *("knn", "linear", "fewshot", "probe", "segment", "depth", "zeroshot", "retrieve", "embed", "caption", "vlm score"),
    *("data import", "data check", "data shapes", "data teach"),
}


@pytest.mark.parametrize("name", sorted(COMMANDS, key=lambda name: name == "compare"))
def test_json_is_one_object_and_its_table_fits(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    prepare(name, place)
    monkeypatch.setattr("aimv2.progress.EVERY", 0.0)
    tiny = " ".join(f"--{key} {value}" for key, value in {**TINY, "data.train": "scenes"}.items())
    detect = " ".join(f"--{word.replace('=', ' ')}" for word in DETECT.split())
    for line in WORDS[name]:
        capsys.readouterr()
        assert main([*name.split(), *line.format(tiny=tiny, detect=detect).split(), "--json"]) == 0
        out, err = capsys.readouterr()
        assert out.endswith("\n") and out.count("\n") == 1, "one object on one line, and nothing else"
        result = json.loads(out)
        assert isinstance(result, dict) and "error" not in err
        if name in WAITED:
            assert re.search(r"^\S.*: \d+/\d+, eta [\d:]+$", err, re.M), "redirected, and it may take long"
        show(name, result)
        lines = capsys.readouterr().out.splitlines()
        # what is left: a path and a caption for other programs, and a long path of the user's, which is never broken
        tabled = [each for each in lines if not each.startswith("photos/") and str(place) not in each]
        assert lines and max(map(len, tabled), default=0) <= 80, max(lines, key=len)
        bare = [line for line in lines if re.match(r"\S[^.]*?\s{2,}(?:top1 )?[01]\.\d+(?![\d%])", line)]
        assert not [line for line in bare if FRACTIONS.search(line)], "a fraction is in percent"


def prepare(name: str, place: Path) -> None:
    """What a verb reads and another one writes."""
    if name == "data teach" and not (place / "photo-shards").exists():
        api.data_import("photos", "photo-shards", workers=1)
    if name == "vlm score" and not (place / "questions").exists():
        api.data_shapes("questions", 8, objects=3, questions=3, size=32)
    if name in ("vlm score", "vlm train") and not (place / "vlm").exists():
        api.vlm_build("m", "llm", "vlm")
    if name.startswith("detect") and not (place / "boxes").exists():
        api.data_shapes("boxes", 8, objects=3, size=32)
    if name in ("detect score", "detect photo") and not (place / "detector").exists():
        given = {key: value for key, value in (word.split("=") for word in DETECT.split())}
        api.detect_train(run="detector", options=given)
    if name == "detect score":
        key, parts = next(read_samples(Path("boxes/val-000000.tar")))
        found = [{"category_id": "red ring"}, {"phrase": json_of(parts)["phrases"][0]["phrase"]}]
        found = [one | {"image_id": key, "bbox": [1, 2, 9, 9], "score": 0.5} for one in found]
        Path("found.json").write_text(json.dumps(found))
    if name == "compare" and not (place / "knn").exists():
        api.knn("m", "data", out="knn")


# ---- colour ----


def in_terminal(*words: str, **env: str) -> str:
    """What a command writes to a terminal of its own."""
    main_end, command_end = pty.openpty()
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    with subprocess.Popen(
        command(*words), stdout=command_end, stderr=subprocess.DEVNULL, env={**plain, "TERM": "xterm-256color", **env}
    ) as started:
        os.close(command_end)
        out = read_terminal(main_end)
        assert started.wait(timeout=60) == 0
    return out


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")


def test_no_color_is_honoured(place: Path) -> None:
    words = ("data", "check", str(place / "scenes"))
    assert COLOUR.search(in_terminal(*words)), "colours in a terminal, else this shows nothing"
    assert not COLOUR.search(in_terminal(*words, NO_COLOR="1"))
    piped = subprocess.run(command(*words), capture_output=True, text=True, check=True, timeout=60)
    assert "\x1b" not in piped.stdout + piped.stderr


# ---- what is missing ----


class Without:
    """A finder that does not find some packages."""

    def __init__(self, finder: Any, hidden: Iterable[str]) -> None:
        self.finder, self.hidden = finder, set(hidden)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.partition(".")[0] in self.hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes packages as if they were not installed."""

    def hidden(*names: str) -> None:
        monkeypatch.setattr(sys, "meta_path", [Without(finder, names) for finder in sys.meta_path])
        for module in list(sys.modules):
            if module.partition(".")[0] in names:
                monkeypatch.delitem(sys.modules, module)

    return hidden


MISSING = {
    "onnx": ("onnx", "convert m new-onnx --to onnx"),
    "onnxscript": ("onnx", "convert m new-onnx --to onnx"),
    "openvino": ("openvino", "convert m new-openvino --to openvino"),
    "nncf": ("openvino", "convert m new-openvino --to openvino --precision int8 --images photos"),
    "faiss": ("faiss", "knn m --data data --backend faiss --out new-knn"),
    "peft": ("peft", "pretrain {tiny} --run new-run --init run --optim.lora 2"),
    "wandb": ("wandb", "pretrain {tiny} --run new-run --log.wandb project"),
    "pycocoevalcap": ("caption", "caption run --data scenes --score --out new-scores"),
    "datasets": ("hub", "data import owner/name new-shards"),
    "lmms_eval": ("vlm", "vlm score m --tasks gqa --out new-scores"),
    "faster_coco_eval": ("detect", "detect score --predictions found.json --data boxes --out new-scores"),
    "starlette": ("ui", "explore run"),
    "uvicorn": ("ui", "explore run"),
}


@pytest.mark.parametrize("package", MISSING)
def test_an_extra_that_is_missing_is_one_line(
    package: str,
    place: Path,
    hide: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    extra, line = MISSING[package]
    prepare(" ".join(line.split()[:2]), place)  # what the command reads
    tiny = " ".join(f"--{key} {value}" for key, value in {**TINY, "data.train": "scenes"}.items())
    hide(package)
    capsys.readouterr()
    assert main(line.format(tiny=tiny).split()) == 2
    out, err = capsys.readouterr()
    (told,) = [each for each in err.splitlines() if each.startswith("error: ")]
    assert out == "" and "Traceback" not in err
    assert package in told and f"pip install 'aimv2[{extra}]'" in told
    assert not list(place.glob("new-*")), "found out before anything is written"


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_a_backend_that_is_missing(backend: str, place: Path, hide: Callable[..., None]) -> None:
    hide(backend)
    with pytest.raises(UsageError, match=rf"pip install 'aimv2\[{backend}\]'"):
        api.load_model(str(place / "m"), backend=backend)


def test_each_extra_is_hidden_in_turn() -> None:
    asked = {extra for extra, _ in MISSING.values()} | {"jax", "mlx"}
    # no verb needs docs; without heic such images are counted and named
    assert asked | {"docs", "heic"} == EXTRAS == set(requirements()) - {""}


def test_a_package_of_the_base_that_is_missing(
    place: Path, hide: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    hide("tokenizers")
    assert main(["tokenizer", "train", "scenes", "new-tokenizer"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.fullmatch(r"error: the package of tokenizers is missing: pip install 'tokenizers>=[\d.]+'\n", err)
    with pytest.raises(ModuleNotFoundError):
        main(["tokenizer", "train", "scenes", "new-tokenizer", "--debug"])


NOWHERE = {
    "run": "/nowhere/chain.yaml",
    "data import": "/nowhere/photos new-out",
    "data check": "/nowhere/shards",
    "data browse": "--data.train /nowhere/shards",
    "data teach": "m /nowhere/shards new-out",
    "tokenizer train": "/nowhere/captions.txt new-out",
    "caption": "run /nowhere/a.png",
    "compare": "/nowhere/result.json",
    "convert": "/nowhere/model new-out",
    "embed": "m /nowhere/photos new-out",
    **{verb: "m --data /nowhere/data" for verb in ("probe", "knn", "linear", "fewshot", "segment", "depth")},
    "zeroshot": "run --data /nowhere/data",
    "retrieve": "run --data /nowhere/data",
    "report": "/nowhere/run",
    "explore": "/nowhere/model",
    "push": "/nowhere/model someone/something",
    "vlm build": "m /nowhere/llm new-out",
    "vlm score": "vlm --data /nowhere/questions --out new-scores",
    "detect score": "--predictions /nowhere/found.json --data scenes",
    "detect photo": "/nowhere/a.png --model m",
    "detect train": "--run new-out --init m --data.train /nowhere/shards",
    "vlm train": "--run new-out --init m --data.train /nowhere/shards",
    "pretrain": "--run new-out --data.train /nowhere/shards",
    "plan": "--config aimv2-large-224 --data.train /nowhere/shards",
}


@pytest.mark.parametrize("name", NOWHERE)
def test_a_file_that_is_missing_is_one_line(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    capsys.readouterr()
    assert main([*name.split(), *NOWHERE[name].split()]) == 2
    out, err = capsys.readouterr()
    (told,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and "/nowhere/" in told
    assert not list(place.glob("new-*"))


def test_every_verb_that_reads_files_is_tried_without_them() -> None:
    assert set(COMMANDS) - set(NOWHERE) == {"data shapes", "models", "recipes", "doctor"}
    assert set(WORDS) == set(COMMANDS)


# ---- completion ----


def offered(line: str, folder: Path, **env: str) -> tuple[list[str], str]:
    """What argcomplete's protocol gives behind a line, and standard error."""
    answer = folder / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run(
        command(), env={**os.environ, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), **env},
        capture_output=True, text=True, cwd=folder, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == ""
    return answer.read_text().split("\n"), done.stderr


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("aimv2 d", {"data", "depth", "detect", "doctor"}),
        ("aimv2 data ", {"import", "check", "browse", "shapes", "teach"}),
        ("aimv2 data check --", {"--tokenizer", "--min-side", "--json", "--debug", "--help", "--help-all"}),
        ("aimv2 pretrain --optim.sch", {"--optim.schedule "}),
        ("aimv2 pretrain --optim.schedule ", {"cosine", "half-cosine", "cooldown", "constant"}),
        ("aimv2 data browse --config r.yaml --cou", {"--count "}),
        ("aimv2 caption aimv2-large-patch14-448", {"aimv2-large-patch14-448 "}),
        ("aimv2 pretrain --config flick", {"flickr8k-tiny "}),
        ("aimv2 run r", {"resolution-cifar10", "runs/", "rubbish.txt"}),
        ("aimv2 recipes fi", {"finetune-classes "}),
        ("aimv2 report ru", {"runs/", "rubbish.txt"}),
    ],
)
def test_what_the_shell_offers(line: str, wanted: set[str], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "rubbish.txt").touch()
    found, err = offered(line, tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert set(found) == wanted
    assert "aimv2.cli" in err and not re.search(r"\| +(torch|jsonargparse|transformers)$", err, re.MULTILINE), "fast"


def test_bash_completes(tmp_path: Path) -> None:
    bash, register = shutil.which("bash"), Path(sys.executable).with_name("register-python-argcomplete")
    if bash is None or not register.exists():
        pytest.skip("no bash, or no argcomplete")
    script = f"""
        eval "$({register} aimv2)"
        COMP_LINE="aimv2 data br" COMP_POINT=13 COMP_TYPE=9 COMP_WORDS=(aimv2 data br) COMP_CWORD=2
        _python_argcomplete aimv2
        echo "${{COMPREPLY[@]}}"
    """
    path = f"{register.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [bash, "-c", script], capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=60, check=False
    )
    assert done.stdout.strip() == "browse", done.stderr
