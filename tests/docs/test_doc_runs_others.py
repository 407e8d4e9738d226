"""What the README and the other pages tell people to type runs, placeholders filled in: cut to a few steps on drawn pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doc_commands import ROOT, check, commands, lines_of, words_of
from doc_runs import DOCS, STEPS, fenced, run, run_page, twin
from PIL import Image

from aimv2.cli import main
from aimv2.explorer import server
from tiny_llm import language_model

pytestmark = pytest.mark.usefixtures("few_scenes")

TEXT_TOWER = ("text_width", "text_depth", "text_heads", "text_hidden", "projection")
PAIR = [word for key, size in zip(TEXT_TOWER, (16, 1, 2, 32, 16)) for word in (f"--model.{key}", str(size))]


@pytest.fixture(scope="module")
def lived_in(home: Path, done: Any) -> Path:
    """The reader's folder after the page on own photographs; masks and depths beside it, a chain of its own."""
    with pytest.MonkeyPatch.context() as patch:
        run_page("tutorials/own-photographs.md", home, done, patch)
    draw_maps(home / "masks", "masks", np.array([0, 1], np.uint8))
    draw_maps(home / "depths", "depth", np.array([1000, 2500], np.uint16))
    chain = (ROOT / "recipes" / "chains" / "chain-tiny.yaml").read_text()
    text = re.sub(r"train\.steps: \d+", "train.steps: 4", chain).replace("count: 2000", "count: 300")
    (home / "chain-tiny").write_text(
        re.sub(r"save_every: \d+", "save_every: 2", text).replace("eval.samples: 200", "eval.samples: 4")
    )
    language_model(home / "llm", max_position_embeddings=2048)
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a photo"}]
    rows = [{"image": path.name, "conversations": turns} for path in sorted((home / "photos").glob("*.jpg"))]
    (home / "llava.json").write_text(json.dumps(rows))
    return home


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What ``aimv2 explore`` would serve until it is interrupted."""
    served: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda answers, *_: served.append(answers))
    return served


def draw_maps(folder: Path, name: str, values: np.ndarray) -> None:
    """``folder/{train,val}/{images,NAME}``: the lower half of a picture is brighter, and has the second value."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for part in ("images", name):
            (folder / split / part).mkdir(parents=True)
        for number in range(count):
            lower = np.arange(32)[:, None] >= rng.integers(8, 24) + np.zeros(32, int)
            pixels = (60 + 120 * lower)[..., None] + rng.normal(0, 10, (32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / "images" / f"{number}.png")
            Image.fromarray(values[lower.astype(int)]).save(folder / split / name / f"{number}.png")


def fill(words: list[str], names: dict[str, str]) -> list[str]:
    """A command with its placeholders filled in."""
    return [names.get(word, word) for word in words]


# ---- README ----

FILLED = {
    **{
        "PHOTOS": "photos",
        "SHARDS": "readme/shards",
        "RUN": "readme/run",
        "HIGH": "readme/high",
        "PAIR": "readme/pair",
    },
    **{
        "DONE": "readme/done",
        "MODEL": "readme/run",
        "D": "labelled",
        "RESULT": "results/photos",
        "RUN@STEP": "readme/run@2",
    },
    **{"photo.jpg": "photos/0001.jpg", "CHAIN.yaml": "chain-tiny", "336": "48"},
}
DATA = {"retrieve": "photos", "caption": "photos", "segment": "masks", "depth": "depths"}  # others: labelled


def test_readme(lived_in: Path, monkeypatch: pytest.MonkeyPatch, shown: list[Any]) -> None:
    """Every command, placeholders filled in, and every block of Python; ``push`` needs a hub, ``torchrun`` several GPUs."""
    monkeypatch.chdir(lived_in)
    ran: list[str] = []
    for language, body in fenced(ROOT / "README.md"):
        for line in lines_of(body) if language == "bash" else []:
            for words in words_of(line):
                if words[0] != "aimv2" or words[1] == "push":
                    assert words[0] in ("make", "pip", "torchrun", "aimv2"), line
                    continue
                given = fill(words, FILLED | {"D": DATA.get(words[1], "labelled"), "OUT": f"readme/out-{len(ran)}"})
                if words[1] == "pretrain":  # a run of its own each, but one
                    at = given.index("--run") + 1
                    given[at] += f"-{len(ran)}" if Path(given[at]).is_dir() else ""
                    given += ["--train.save_every", "2"] if "--init" not in words else []
                    given += PAIR if "contrastive" in words else []
                given = [word for i, word in enumerate(given) if "--dataset" not in given[max(i - 1, 0) : i + 1]]
                run([*twin(given), *FEW_STEPS.get(words[1], [])], line)
                ran.append(words[1])
        if language == "python" and '"RUN"' in body:
            image = Image.open("photos/0001.jpg").convert("RGB")
            exec(compile(body.replace('"RUN"', '"readme/run"'), "README.md", "exec"), {"image": image})
    assert len(ran) > 25 and len(shown) == 1
    assert {"segment", "depth", "run", "explore", "zeroshot", "compare"} <= set(ran)


FEW_STEPS = {"segment": ["--epochs", "1"], "depth": ["--epochs", "1"]}


# ---- the page of stages ----


def test_stages(lived_in: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every command, the base model first."""
    monkeypatch.chdir(tmp_path)
    for name, place in (("chain-tiny", "chain-tiny"), ("photos", "labelled"), ("SHARDS", "shards/photos")):
        (tmp_path / name).symlink_to(lived_in / place)
    short = [word for key, value in STEPS.items() for word in (f"--{key}", str(value))]
    lines = [one.text for one in commands(DOCS / "stages.md") if not one.inline and not one.text.startswith("torchrun")]
    (made,) = {line for line in lines if "--run runs/base " in line}
    order = ["aimv2 data shapes shapes --count 300", made + " --train.save_every 10 --train.keep 0"]
    order += [line for line in dict.fromkeys(lines) if line != made and "data shapes" not in line]
    names = {"MODEL": "runs/base", "TAUGHT": "taught", "CHAIN.yaml": "chain-tiny"}
    assert len(order) > 17
    for number, line in enumerate(order):
        for words in words_of(line):
            given = fill(words[1:], names | {"RUN": f"runs/run-{number}"})
            if words[1] == "pretrain":
                given += [*short, *(["--train.steps", "20"] if line.startswith(made) else [])]
                if "SHARDS" in line or "TAUGHT" in line:  # no size given
                    given += ["--model.name", "aimv2-tiny-patch4-32"]
            run(given, line)


# ---- the rest ----

PAGES = {  # page -> what stands for a word of it
    "browse.md": {},
    "scenes.md": {},
    "vlm.md": {
        **{"RUN": "runs/photos", "LLM": "llm", "llava_v1_5_mix665k.json": "llava.json", "images": "photos"},
        **{"table.parquet": "talks/train-000000.tar", "tars/{000..099}.tar": "talks/train-000000.tar"},
        **{"VLM": "vlm.md-0", "D": "talks", "photo.jpg": "photos/0001.jpg"},
    },
    "localise.md": {
        **{"MODEL": "runs/photos", "RUN": "runs/photos", "val2017": "photos"},
        **{"runs/detector": "runs/localise.md-2", "photo.jpg": "photos/0001.jpg"},
    },
    "doctor.md": {},
    "plan.md": {"RUN": "runs/photos"},
    "explore.md": {"runs/demo": "runs/photos", "RUN": "runs/more"},
    "evaluate.md": {"RUN": "runs/photos", "../shared/data/cifar10": "labelled", "C": "cache"},
    "faq.md": {
        "SHARDS": "shards/photos",
        "MODEL": "runs/photos",
        "D": "labelled",
        "aimv2-3B-patch14-224": "runs/photos",
    },
}
DETECTOR = {
    **{"train.steps": 2, "train.batch_size": 4, "train.precision": "fp32", "data.workers": 0, "eval.samples": 4},
    **{"objective.width": 32, "objective.encoder_layers": 1, "objective.decoder_layers": 2, "objective.queries": 8},
}
TOY = {
    "detect train --init": [word for key, value in DETECTOR.items() for word in (f"--{key}", str(value))],
    "--config flickr8k": ["--data.tokenizer", "auto"],
    "finetune-classes": ["--data.train", "shards/labelled"],
    "aimv2 linear": ["--data", "labelled"],
    "aimv2 knn": ["--data", "labelled"],
    "aimv2 fewshot": ["--data", "labelled", "--shots", "1,2"],
    "vlm train --init": [
        "--train.steps",
        "2",
        "--train.batch_size",
        "4",
        "--train.precision",
        "fp32",
        "--data.workers",
        "0",
    ],
}


def write_boxes() -> None:
    """COCO's annotations of the photographs, and detections of them."""
    names = sorted(path.name for path in Path("photos").glob("*.jpg"))[:8]
    images = [{"id": at, "file_name": name, "width": 64, "height": 64} for at, name in enumerate(names)]
    for image in images:
        image["width"], image["height"] = Image.open(f"photos/{image['file_name']}").size
    boxes = [{"image_id": image["id"], "category_id": 1, "bbox": [4, 4, 20, 16]} for image in images]
    whole = [{**box, "id": at, "area": 320, "iscrowd": 0} for at, box in enumerate(boxes)]
    about = {"images": images, "annotations": whole, "categories": [{"id": 1, "name": "dog"}]}
    Path("instances_val2017.json").write_text(json.dumps(about))
    Path("found.json").write_text(json.dumps([{**box, "score": 0.9} for box in boxes]))


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, lived_in: Path, monkeypatch: pytest.MonkeyPatch, shown: list[Any]) -> None:
    monkeypatch.chdir(lived_in)
    if page == "faq.md":
        assert main(["data", "import", "labelled/train", "shards/labelled"]) == 0
    if page == "localise.md":
        write_boxes()
    lines = [one.text for one in commands(DOCS / page) if not one.inline]
    assert lines
    for number, line in enumerate(lines):
        for words in words_of(line):
            out = {"OUT": f"{page}-{number}", "--run": "--run"}
            given = fill(words, PAGES[page] | out)
            if "--run" in words:
                given[given.index("--run") + 1] = f"runs/{page}-{number - ('--resume' in words)}"
            given = [word for i, word in enumerate(given) if "--dataset" not in given[max(i - 1, 0) : i + 1]]
            more = [word for part, extra in TOY.items() if part in " ".join(words) for word in extra]
            if "--tasks" in words:  # of benchmarks that must be downloaded
                check(given)
                continue
            run([*twin(given), *more], line)
    assert len(shown) == {"explore.md": 3, "vlm.md": 1}.get(page, 0)


def test_every_page_with_commands_is_run() -> None:
    """A new page with commands needs its place here or among the tutorials."""
    run = {
        *PAGES,
        "stages.md",
        "start.md",
        "report.md",
        *(f"tutorials/{path.name}" for path in (DOCS / "tutorials").glob("*.md")),
    }
    have = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if any(not one.inline for one in commands(path))}
    assert have <= run
