"""Every recipe parses strictly, says what it must, holds the paper's numbers, and runs as a twin at toy size."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from aimv2 import api, load_model
from aimv2.cli.dispatch import read_options
from aimv2.config.load import parse, read_recipe
from aimv2.config.recipes import head_lines, recipe_file
from aimv2.config.schema import Config, get_value
from aimv2.data.shards.format import write_shard
from aimv2.data.stream.samples import TrainStream, View
from aimv2.data.text.clip import START
from aimv2.data.text.tokenizer import load_tokenizer, train_tokenizer
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import create_model
from aimv2.models.distilled import Distiller
from aimv2.models.flops import step_flops
from aimv2.models.lit import LiT, LiTConfig, TextConfig, TunedLiT
from aimv2.models.sizes import encoder_flops, model_config
from aimv2.train.view import make_view
from runs import metrics

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SIZES = ("large", "huge", "1B", "3B")
PAPER = [Path(__file__).parents[1] / "recipes" / f"aimv2-{size}-224.yaml" for size in SIZES]

# Table A1, with section 2 and appendix A
TABLE_A1 = {
    "data.tokenizer": "google/siglip-base-patch16-224",
    "data.max_tokens": 77,
    "data.crop_scale": 0.4,
    "data.crop_ratio": (0.75, 1.33),
    "data.flip": 0.5,
    "objective.name": "pretrain",
    "objective.alpha": 0.4,
    "objective.targets": "both",
    "objective.attention": "prefix",
    "optim.min_lr": 1e-5,
    "optim.start_lr": 1e-6,
    "optim.warmup": 12_500,
    "optim.schedule": "cosine",
    "optim.betas": (0.9, 0.95),
    "optim.eps": 1e-8,
    "optim.weight_decay": 1e-4,
    "optim.decay": "full",
    "optim.clip": 1.0,
    "train.steps": 1_500_000,
    "train.batch_size": 8192,
    "train.precision": "bf16",
}
PEAK_RATE = {"large": 1e-3, "huge": 8e-4, "1B": 8e-4, "3B": 4e-4}  # Table A1
SHAPE = {"large": (1024, 24), "huge": (1536, 24), "1B": (2048, 24), "3B": (3072, 24)}  # Table 1
IMAGENET = {"large": "86.6", "huge": "87.5", "1B": "88.1", "3B": "88.5"}  # Table 3
MIXTURE = {"dfn2b-alt": 30, "dfn2b-synthetic": 30, "coyo-alt": 9, "hqitp-alt": 28, "hqitp-synthetic": 3}  # Table 2

# what makes a twin of a recipe: everything else is the recipe's own
TOY = {
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
    "model.hidden": 32,
    "model.decoder_width": 16,
    "model.decoder_depth": 1,
    "model.decoder_heads": 2,
    "model.decoder_hidden": 32,
    "data.workers": 0,
    "data.max_bad": 0,
    "data.shuffle_buffer": 8,
    "optim.warmup": 1,
    "train.steps": 3,
    "train.batch_size": 8,
    "train.compile": "off",
    "train.log_every": 1,
    "eval.samples": 6,
    "eval.captions": 1,
    "eval.probe_epochs": 1,
    "log.tensorboard": False,
    "log.report": False,
}

ADAPTED = [Path(__file__).parents[1] / "recipes" / f"aimv2-large-{size}.yaml" for size in (336, 448)]
NATIVE = ADAPTED[0].with_name("aimv2-large-native.yaml")

TOY_PAIR = {
    "model.text_width": 16,
    "model.text_depth": 1,
    "model.text_heads": 2,
    "model.text_hidden": 32,
    "model.projection": 16,
}


def by_name(path: Path) -> str:
    return path.stem


def head_of(recipe: Path) -> str:
    """The comment that a recipe starts with."""
    return "\n".join(head_lines(recipe))


def picture(rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(out, "JPEG")
    return out.getvalue()


def write_source(folder: Path, name: str) -> None:
    """12 training and 6 validation pairs; COYO's as img2dataset writes them, the others with two caption fields."""
    rng = np.random.default_rng(len(name))
    folder.mkdir(parents=True)

    def pair(split: str, i: int) -> tuple[str, dict[str, bytes]]:
        parts = {"jpg": picture(rng), "cls": str(i % 3).encode()}
        alt, synthetic = f"alt words of {name} {i}", f"synthetic words of {name} {i}"
        if name == "coyo-alt":
            parts["txt"] = alt.encode()
        else:
            parts["json"] = json.dumps({"captions": {"alt": [alt], "synthetic": [synthetic]}}).encode()
        return f"{name}.{split}{i}".replace(".", "_"), parts

    for split, count in (("train", 12), ("val", 6)):
        write_shard(folder / f"{split}-000000.tar", [pair(split, i) for i in range(count)])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the five sources of Table 2, a tiny tokeniser of their captions and a tiny teacher."""
    folder = tmp_path_factory.mktemp("recipes")
    for name in MIXTURE:
        write_source(folder / "data" / name, name)
    captions = [f"{kind} words of {name} {i}" for kind in ("alt", "synthetic") for name in MIXTURE for i in range(12)]
    train_tokenizer(captions, 300).save(folder / "tokenizer")
    teacher = create_model("aimv2-tiny-patch14-112", seed=1, image_size=42, width=24, heads=3, hidden=32, depth=1)
    api.save_pretrained(teacher, folder / "teacher")
    train_tokenizer(captions, 300, start=START).save(folder / "pair-tokenizer")
    locked = create_model("aimv2-large-patch14-224", seed=2, image_size=42, width=16, depth=1, heads=2, hidden=32)
    api.save_pretrained(locked, folder / "locked")
    return folder


def toy_options(recipe: Path, home: Path) -> dict[str, Any]:
    """TOY, three patches a side, and local stand-ins for what the recipe takes from outside."""
    raw = read_recipe(recipe)
    options: dict[str, Any] = dict(TOY)
    if recipe == NATIVE:  # 4 to 16 patches, from an encoder with learnt positions
        options |= {"init": str(home / "locked"), "optim.freeze_encoder": 1, "model.min_patches": 4}
        options |= {"data.areas": [2, 4], "train.patch_budget": 64}
    else:
        options["model.image_size"] = 3 * model_config(raw["model.name"])[0].patch_size
    if "data.tokenizer" in raw:
        options["data.tokenizer"] = str(home / "tokenizer")
    else:
        options["data.vocab_size"] = 300
    if raw.get("objective.name") == "contrastive":
        options |= {"data.tokenizer": str(home / "pair-tokenizer"), "init": str(home / "locked"), **TOY_PAIR}
    if recipe in ADAPTED:  # from an encoder of 3 x 3 patches, whose positions are interpolated
        options |= {"init": str(home / "locked"), "model.image_size": 56, "optim.freeze_encoder": 1}
    if "objective.teacher" in raw:
        options["objective.teacher"] = str(home / "teacher")
    if "data.train" not in raw:
        options["data.train"] = str(home / "data" / "dfn2b-alt")
    return options


@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
def test_recipe_says_how_it_is_run(recipe: Path) -> None:
    head = head_of(recipe)
    for word in ("command", "source", "data", "hardware", "hours", "score"):
        assert re.search(rf"^\s*{word}\b\s+\S", head, re.MULTILINE), f"{recipe.name}: no '{word}' in its head"
    command = re.search(r"(?:pretrain|vlm train|detect train) (.*?)\n\s+source", head, re.DOTALL)
    assert command, f"{recipe.name}: no command"
    named, given, _ = read_options(command[1].split())
    assert named == recipe.stem and recipe_file(named, "--config") == recipe
    assert "run" in given


@pytest.mark.parametrize("recipe", RECIPES, ids=by_name)
def test_recipe_parses_strictly_and_names_no_path(recipe: Path, tmp_path: Path) -> None:
    raw = read_recipe(recipe)
    config = parse(raw)
    sources = config.data.train if isinstance(config.data.train, list) else []
    assert isinstance(raw.get("data.train", []), list)
    assert all(not source.path and source.name for source in sources)
    assert config.data.val is None and config.data.index_dir is None and config.run is None and config.init is None
    tree = yaml.safe_load(recipe.read_text())
    tree["train"]["stepz"] = 1
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UsageError, match=r"'train\.stepz'.*did you mean 'train\.steps'"):
        read_recipe(tmp_path / "wrong.yaml")


def test_all_recipes_are_known() -> None:
    assert set(PAPER) <= set(RECIPES) and "flickr8k-tiny" in map(by_name, RECIPES)


@pytest.mark.parametrize("size", SIZES)
def test_numbers_are_the_papers(size: str) -> None:
    recipe = PAPER[SIZES.index(size)]
    config = parse(read_recipe(recipe))
    assert {key: get_value(config, key) for key in TABLE_A1} == TABLE_A1
    assert config.optim.lr == PEAK_RATE[size]
    assert config.model.name == f"aimv2-{size}-patch14-224"
    encoder, decoder = model_config(config.model.name)
    assert (encoder.width, encoder.depth, encoder.patch_size, encoder.image_size) == (*SHAPE[size], 14, 224)
    assert (decoder.width, decoder.depth, decoder.separate) == (1024, 12, False)
    changed = {key: value for key, value in vars(config.model).items() if key != "name" and value is not None}
    assert not changed, "a recipe of a released size changes nothing of its row"
    assert isinstance(config.data.train, list)
    assert {source.name: round(100 * source.weight, 6) for source in config.data.train} == MIXTURE
    assert IMAGENET[size] in head_of(recipe)


def test_the_distilled_recipe_is_pretraining_but_for_what_is_ours() -> None:
    plain, distilled = read_recipe(PAPER[0]), read_recipe(PAPER[0].with_name("aimv2-large-distilled.yaml"))
    changed = {key for key in {*plain, *distilled} if plain.get(key) != distilled.get(key)}
    assert changed - {key for key in changed if key.startswith("objective.teacher")} == {
        "objective.name",
        "train.steps",
    }
    assert distilled["objective.teacher"] == "aimv2-3B-patch14-224"
    with torch.device("meta"):
        model = Distiller(
            AIMv2(*model_config("aimv2-large-patch14-224")), model_config("aimv2-3B-patch14-224")[0].width
        )
    student, teacher = step_flops(model, 1, 256, 32), encoder_flops(model_config("aimv2-3B-patch14-224")[0])
    total = (student + teacher) * 8192 * distilled["train.steps"]
    written = {
        "hours": r"hours\s+(\S+) \(estimate\)",
        "student": r"(\S+) FLOPs a pair with 32 caption tokens for the student",
        "teacher": r"(\S+) for the teacher",
        "total": r"= (\S+) FLOPs, over",
    }
    head = head_of(PAPER[0].with_name("aimv2-large-distilled.yaml"))
    found = {name: float(match[1]) for name, pattern in written.items() if (match := re.search(pattern, head))}
    hours = total / (64 * 989e12 * 0.4) / 3600
    assert found == pytest.approx({"hours": hours, "student": student, "teacher": teacher, "total": total}, rel=0.01)


LIT = PAPER[0].with_name("aimv2-large-lit.yaml")


def test_the_lit_recipe_makes_the_released_pair_in_three_billion_pairs() -> None:
    config, head = parse(read_recipe(LIT)), head_of(LIT)
    steps, batch = config.train.steps, config.train.batch_size
    assert 0 <= steps * batch - 3_000_000_000 < batch  # Table 5
    model = config.model
    assert (model.text_width, model.text_depth, model.text_heads, model.text_hidden) == (768, 12, 6, 2048)
    with torch.device("meta"):
        shape = replace(model_config(model.name)[0], pool_heads=8)
        pair = TunedLiT(LiTConfig(shape, TextConfig(), model.projection or 0), bias=False)
    assert sum(parameter.numel() for parameter in pair.parameters()) == 436_680_193  # the released one's
    a_pair = step_flops(pair, batch, 256, 32 * batch) / batch
    written = {
        "hours": r"hours\s+(\S+) \(estimate\)",
        "a_pair": r"(\S+) FLOPs a pair with 32 caption tokens",
        "total": r"= (\S+) FLOPs, over 16 x 989e12",
    }
    found = {name: float(match[1]) for name, pattern in written.items() if (match := re.search(pattern, head))}
    hours = a_pair * batch * steps / (16 * 989e12 * 0.4) / 3600
    assert found == pytest.approx({"hours": hours, "a_pair": a_pair, "total": a_pair * batch * steps}, rel=0.005)
    assert "77.0 zero-shot" in head and "--init aimv2-large-patch14-224" in head


def test_the_lit_twin_runs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIMV2_DATA", str(home / "data"))
    summary = api.pretrain(str(LIT), str(tmp_path / "run"), toy_options(LIT, home))
    trained = [line for line in metrics(tmp_path / "run") if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    assert all(math.isfinite(line[key]) for line in trained for key in ("loss", "contrastive_loss", "grad_norm"))
    assert math.isfinite(summary["val_contrastive_loss"]) and 0 <= summary["val_image_to_text"] <= 1
    assert isinstance(load_model(tmp_path / "run"), LiT)


@pytest.mark.parametrize("recipe", ADAPTED, ids=by_name)
def test_the_adapted_recipes_hold_what_section_2_4_says(recipe: Path) -> None:
    config, head = parse(read_recipe(recipe)), head_of(recipe)
    size = int(recipe.stem.rsplit("-", 1)[1])
    assert config.optim.weight_decay == 0
    assert 0 <= config.train.steps * config.train.batch_size - 2_000_000_000 < config.train.batch_size
    assert isinstance(config.data.train, list)
    kept = {name: percent for name, percent in MIXTURE.items() if not name.endswith("synthetic")}
    assert {source.name: round(100 * source.weight, 6) for source in config.data.train} == kept
    for line, source in zip(re.findall(r"([\d.]+)% of the rest", recipe.read_text()), config.data.train, strict=True):
        assert float(line) == pytest.approx(100 * kept[source.name] / sum(kept.values()), abs=0.05)
    with torch.device("meta"):
        model = AIMv2(*model_config(config.model.name))
    assert model.encoder.config.image_size == size
    a_pair = step_flops(model, 1, (size // 14) ** 2, 32)
    total = a_pair * config.train.batch_size * config.train.steps
    written = {
        "hours": r"hours\s+(\S+) \(estimate\)",
        "a_pair": r"(\S+) FLOPs a pair with 32 caption tokens",
        "total": r"= (\S+) FLOPs, over 64 x 989e12",
    }
    found = {name: float(match[1]) for name, pattern in written.items() if (match := re.search(pattern, head))}
    hours = total / (64 * 989e12 * 0.4) / 3600
    assert found == pytest.approx({"hours": hours, "a_pair": a_pair, "total": total}, rel=0.005)
    assert {336: "87.6", 448: "87.9"}[size] in head and "--init aimv2-large-patch14-224" in head


def test_the_native_recipe_keeps_one_budget_of_patches() -> None:
    """Areas and constant budget of section 2.4; hours by the mean over the areas that mini-batches draw."""
    config, head = parse(read_recipe(NATIVE)), head_of(NATIVE)
    assert (
        config.data.areas == (7, 12) and config.data.pack == 0 and config.train.batch_size == Config().train.batch_size
    )
    with torch.device("meta"):
        model = AIMv2(*model_config(config.model.name))
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == 308_935_680  # the released one's
    view = make_view(config, model.encoder.config, True, World(0, 64, torch.device("cpu")))
    assert view.native is not None
    shares, budget = view.native.areas, config.train.patch_budget
    assert list(shares) == [128, 256, 512, 1024, 2048, 4096]
    assert view.native.budget * 64 * config.data.workers == budget == 8192 * 256
    pairs = sum(share * budget / area for area, share in shares.items())  # a step, in the mean
    assert 0 <= config.train.steps * pairs - 2_000_000_000 < pairs
    a_step = sum(share * budget / area * step_flops(model, 1, area, 32) for area, share in shares.items())
    written = {
        "hours": r"hours\s+(\S+) \(estimate\)",
        "a_pair": r"(\S+) FLOPs a pair with 32 caption tokens",
        "patches": r"caption tokens \((\d+) patches",
        "pairs": r"x ([\d,]+) pairs x",
        "total": r"= (\S+) FLOPs, over 64 x 989e12",
    }
    texts = {name: match[1] for name, pattern in written.items() if (match := re.search(pattern, head))}
    found = {name: float(text.replace(",", "")) for name, text in texts.items()}
    total = a_step * config.train.steps
    hours = total / (64 * 989e12 * 0.4) / 3600
    wanted = {"hours": hours, "a_pair": a_step / pairs, "patches": budget / pairs, "pairs": pairs, "total": total}
    assert found == pytest.approx(wanted, rel=0.005)
    assert all(top1 in head for top1 in ("87.3 at native", "86.1 at 224", "87.1 at 448"))  # Table 6
    assert "--init aimv2-large-patch14-224" in head


@pytest.mark.parametrize(
    "recipe", [*PAPER, *ADAPTED, NATIVE, LIT, PAPER[0].with_name("aimv2-large-distilled.yaml")], ids=by_name
)
def test_every_value_says_whose_it_is(recipe: Path) -> None:
    for line in recipe.read_text().splitlines():
        if line.startswith("#") or line.rstrip().endswith(":"):
            continue
        assert re.search(r"# .*\b(Table \w+|section [\d.]+|appendix A|released code|ours)\b", line), line


@pytest.mark.parametrize("size", SIZES)
def test_hours_follow_from_the_arithmetic_of_a_step(size: str) -> None:
    head = head_of(PAPER[SIZES.index(size)])
    with torch.device("meta"):
        model = AIMv2(*model_config(f"aimv2-{size}-patch14-224"))
    a_pair = step_flops(model, 1, 256, 32)
    total = a_pair * 8192 * 1_500_000
    written = {
        "hours": r"hours\s+(\S+) \(estimate\)",
        "a_pair": r"(\S+) FLOPs a pair with 32 caption tokens",
        "total": r"= (\S+) FLOPs, over 64 x 989e12",
    }
    found = {name: float(match[1]) for name, pattern in written.items() if (match := re.search(pattern, head))}
    hours = total / (64 * 989e12 * 0.4) / 3600
    assert found == pytest.approx({"hours": hours, "a_pair": a_pair, "total": total}, rel=0.005)


# the twin of finetune-classes is tests/train/test_finetune.py
STAGES = ("pretrain", "distill")
PRETRAINING = [recipe for recipe in RECIPES if read_recipe(recipe).get("objective.name", "pretrain") in STAGES]


@pytest.mark.parametrize("recipe", PRETRAINING, ids=by_name)
def test_twin_runs(recipe: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIMV2_DATA", str(home / "data"))
    run = tmp_path / "run"
    summary = api.pretrain(str(recipe), str(run), toy_options(recipe, home))
    lines = metrics(run)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3]
    assert all(math.isfinite(line[key]) for line in trained for key in ("loss", "text_loss", "pixel_loss", "grad_norm"))
    held_out = [line for line in lines if "val_text_loss" in line]
    assert held_out and all(math.isfinite(line[k]) for line in held_out for k in ("val_text_loss", "val_pixel_loss"))
    assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["step"] == 3 and summary["parameters"] > summary["encoder_parameters"] > 0
    if parse(read_recipe(recipe)).eval.probe:
        assert 0 <= summary["probe_top1"] <= 1


@pytest.mark.parametrize("recipe", PAPER[:1], ids=by_name)
def test_mixture_draws_every_source_as_often_as_table_2(recipe: Path, home: Path, tmp_path: Path) -> None:
    raw = read_recipe(recipe)
    sources = [{**source, "path": str(home / "data" / source["name"])} for source in raw["data.train"]]
    config = parse({**raw, "data.train": sources, "data.workers": 0, "data.shuffle_buffer": 8, "data.max_bad": 0})
    tokenizer = load_tokenizer(home / "tokenizer")
    stream = TrainStream(config.data, View(14, 1), tokenizer, 20, seed=0)
    drawn: Counter[str] = Counter()
    for _ in range(30):
        batch = next(stream)
        for key, ids, length in zip(batch.keys, batch.text, batch.text_len):
            name = key.rsplit("_", 1)[0]
            caption = tokenizer.decode(ids[:length].tolist())
            assert caption.startswith(f"{name.rsplit('-', 1)[1]} words of {name} "), (key, caption)
            drawn[name] += 1
    assert set(drawn) == set(MIXTURE)
    for name, percent in MIXTURE.items():
        expected = percent / 100
        spread = 4 * math.sqrt(expected * (1 - expected) / 600)  # four standard deviations of 600 draws
        assert abs(drawn[name] / 600 - expected) < spread, (name, drawn)


def test_mixture_without_data_names_the_source(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'dfn2b-alt' has no path.*--data\.train.*AIMV2_DATA"):
        api.pretrain(str(PAPER[0]), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
