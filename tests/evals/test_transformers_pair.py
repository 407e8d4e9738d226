"""CLIP and SigLIP of transformers: vectors, classes and ranks are those of transformers' own functions, called by hand."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from aimv2 import api
from aimv2.cli import main
from aimv2.data.shards.format import write_shard
from aimv2.evals.scorer import TransformersPair, open_matcher
from aimv2.features.fingerprint import weights_hash
from aimv2.features.frozen import LAST, open_frozen

WORDS = ["a", "red", "green", "blue", "one", "of", "the", "photo", "square", "big", "small", ".", "A", "Red"]
WORDS += ["[PAD]", "[UNK]", "<s>", "</s>"]
KINDS = ("clip", "siglip")
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**VISION, "vocab_size": len(WORDS), "max_position_embeddings": 12}
TEXT |= {f"{name}_token_id": WORDS.index(word) for name, word in (("pad", "[PAD]"), ("bos", "<s>"), ("eos", "</s>"))}
SEEN = {"image_size": 32, "patch_size": 8}
MEAN, STD = [0.1, 0.5, 0.7], [0.3, 0.4, 0.5]


def tokenizer() -> Any:
    """A word a token, in its own case."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(word, WORDS.index(word)) for word in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )


def folder_of(kind: str, folder: Path) -> Path:
    """A random pair; CLIP crops a square and keeps its processor as a part of ``processor_config.json``."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, SiglipConfig, SiglipModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    torch.manual_seed(0)
    square = {"height": 32, "width": 32}
    if kind == "clip":
        model: Any = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION | SEEN, projection_dim=20))
        see: Any = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square, image_mean=MEAN, image_std=STD)
        CLIPProcessor(see, tokenizer()).save_pretrained(folder)
    else:
        model = SiglipModel(SiglipConfig(text_config=TEXT | {"projection_size": 32}, vision_config=VISION | SEEN))
        SiglipImageProcessorPil(size=square, image_mean=MEAN, image_std=STD).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    with torch.no_grad():  # so that images and texts matter
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(1 if "position" in name else 8)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pairs")
    return {kind: folder_of(kind, folder / kind) for kind in KINDS}


def photos(count: int) -> list[Image.Image]:
    """Blocks of colour, wide and high."""
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, 256, (4, 5, 3) if n % 2 else (6, 4, 3), dtype=np.uint8) for n in range(count)]
    return [Image.fromarray(block).resize((60, 41) if n % 2 else (40, 70)) for n, block in enumerate(blocks)]


def by_hand(kind: str, folder: Path, images: list[Image.Image], texts: list[str], full: bool = True) -> Any:
    """(vectors of images, of texts), unit length, by transformers alone."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, SiglipModel

    model: Any = (CLIPModel if kind == "clip" else SiglipModel).from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)
    if kind == "clip":
        read = dict(words(texts, padding=True, truncation=True, max_length=12, return_tensors="pt"))
    else:
        how = {"padding": "max_length" if full else "longest", "truncation": True, "max_length": 12}
        read = {"input_ids": words([text.lower() for text in texts], return_tensors="pt", **how)["input_ids"]}
    with torch.no_grad():
        see = AutoImageProcessor.from_pretrained(folder, backend="pil")  # torchvision resizes otherwise
        seen = model.get_image_features(**see(images, return_tensors="pt"))
        said = model.get_text_features(**{name: read[name] for name in read if name != "token_type_ids"})
    return tuple(x.pooler_output / x.pooler_output.norm(dim=-1, keepdim=True) for x in (seen, said))


@pytest.mark.parametrize("kind", KINDS)
def test_vectors(kind: str, pairs: dict[str, Path]) -> None:
    images = photos(5)
    texts = ["a Red square .", "the big green photo of a small blue one . A red one of the photo", "blue"]
    matcher = open_matcher(str(pairs[kind]))
    assert isinstance(matcher.model, TransformersPair)
    views = torch.stack([matcher.see(image) for image in images])
    assert views.dtype == torch.uint8 and views.shape == (5, 3, 32, 32)
    seen, said = by_hand(kind, pairs[kind], images, texts)
    assert (matcher.model.encode_image(views) - seen).abs().max() < 1e-5
    assert (matcher.model.encode_text(texts) - said).abs().max() < 1e-5
    found = matcher.scorer([[text] for text in texts], "prior")(views)
    assert (found - seen @ said.T).abs().max() < 1e-5 and found.std(0).min() > 1e-3 and found.std(1).min() > 1e-3
    if kind == "siglip":  # what is said of its padding matters
        _, shorter = by_hand(kind, pairs[kind], images[:1], texts[:1], full=False)
        assert (shorter - said[:1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_zeroshot(kind: str, pairs: dict[str, Path], tmp_path: Path) -> None:
    classes, images = ["blue", "green", "red"], photos(18)
    for number, image in enumerate(images):
        (tmp_path / "data" / classes[number // 6]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "data" / classes[number // 6] / f"{number:02}.png")
    (tmp_path / "templates").write_text("a photo of the {} square .\nA big {} one\n")
    words = (str(pairs[kind]), str(tmp_path / "data"))
    result = api.zeroshot(*words, templates=str(tmp_path / "templates"), batch_size=7)
    texts = [line.format(name) for name in classes for line in ("a photo of the {} square .", "A big {} one")]
    seen, said = by_hand(kind, pairs[kind], images, texts)
    means = said.unflatten(0, (3, 2)).mean(1)
    best = (seen @ (means / means.norm(dim=1, keepdim=True)).T).argmax(1)
    right = best == torch.arange(3).repeat_interleave(6)
    assert result["figures"]["top1"] == pytest.approx(right.float().mean().item())
    shares = [row["top1"] for row in result["figures"]["per_class"]]
    assert shares == pytest.approx(right.float().view(3, 6).mean(1).tolist()) and len(set(best.tolist())) > 1
    from transformers import AutoModel

    about = result["model"]
    assert about["architecture"] == {"clip": "CLIPModel", "siglip": "SiglipModel"}[kind]
    assert about["weights_sha256"] == weights_hash(AutoModel.from_pretrained(pairs[kind])) and about["unchanged"]
    assert (about["kind"], about["image_size"], about["width"]) == ("transformers pair", 32, 32)
    assert result["protocol"]["view"] == f"as its {'' if kind == 'clip' else 'pre'}processor_config.json says"


@pytest.mark.parametrize("kind", KINDS)
def test_retrieve(kind: str, pairs: dict[str, Path], tmp_path: Path) -> None:
    images = photos(8)
    pool = itertools.product(("Red", "green", "blue"), ("big", "small"), ("square", "photo ."), ("a", "the"))
    captions = [f"{start} {size} {colour} {thing}" for colour, size, thing, start in pool][:16]
    samples = []
    for number, image in enumerate(images):
        image.save(tmp_path / "x.png")
        about = json.dumps({"captions": captions[2 * number : 2 * number + 2]}).encode()
        samples.append((f"{number}", {"png": (tmp_path / "x.png").read_bytes(), "json": about}))
    samples.insert(3, ("wordless", samples[0][1] | {"json": b"{}"}))
    samples.insert(5, ("broken", samples[0][1] | {"png": b"no image"}))
    write_shard(tmp_path / "test-000000.tar", samples)
    result = api.retrieve(str(pairs[kind]), str(tmp_path), k="1,3", batch_size=3)
    assert result["protocol"]["candidates"] == 8 and result["data"]["split"] == "test"
    assert sorted(row["key"] for row in result["data"]["rejected"]) == ["broken", "wordless"]
    seen, said = by_hand(kind, pairs[kind], images, captions)
    scores = (seen @ said.T).numpy()
    own = np.arange(16)[None] // 2 == np.arange(8)[:, None]
    for way, table, mine in (("image_to_text", scores, own), ("text_to_image", scores.T, own.T)):
        ranks = [min(np.flatnonzero(hit[np.argsort(-row)])) for row, hit in zip(table, mine)]
        figures = result["figures"][way]
        assert figures["median_rank"] == np.median(ranks) + 1 and figures["queries"] == len(ranks)
        assert figures["R@1"] == pytest.approx(np.mean(np.array(ranks) < 1))
        assert figures["R@3"] == pytest.approx(np.mean(np.array(ranks) < 3)) and 0 < figures["R@3"] < 1


def test_half_precision_and_a_processor_inside_another_file(pairs: dict[str, Path], tmp_path: Path) -> None:
    """Weights stay as stored, for pairs and for their image tower; the tower is shown what its processor says."""
    from transformers import CLIPModel

    shutil.copytree(pairs["clip"], tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    model: Any = CLIPModel.from_pretrained(pairs["clip"])
    views = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        wanted = model.vision_model((views / 255 - mean) / std).last_hidden_state[:, 1:]
    assert not (pairs["clip"] / "preprocessor_config.json").exists()
    assert (open_frozen(str(pairs["clip"]))(views, [LAST])[0] - wanted).abs().max() < 1e-5
    model.bfloat16().save_pretrained(tmp_path / "half")
    matcher = open_matcher(str(tmp_path / "half"))
    assert matcher.sha256 == weights_hash(model) != open_matcher(str(pairs["clip"])).sha256
    score = matcher.scorer([["a red photo"], ["blue"]], "prior")(views)
    whole = open_matcher(str(pairs["clip"])).scorer([["a red photo"], ["blue"]], "prior")(views)
    assert (score - whole).abs().max() < 0.1 and score.dtype == torch.float32
    assert open_frozen(str(tmp_path / "half"))(views, [LAST])[0].isfinite().all()


def test_wrong_pairs(pairs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(**VISION, **SEEN)).save_pretrained(tmp_path / "vit")
    for name, kind in (("mute", "clip"), ("blind", "siglip"), ("uncropped", "siglip")):
        shutil.copytree(pairs[kind], tmp_path / name)
    for file in (tmp_path / "mute").glob("tokenizer*"):  # transformers would make an empty one
        file.unlink()
    (tmp_path / "blind" / "preprocessor_config.json").unlink()
    file = tmp_path / "uncropped" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": {"shortest_edge": 32}}))
    (tmp_path / "data" / "red").mkdir(parents=True)
    photos(1)[0].save(tmp_path / "data" / "red" / "0.png")
    capsys.readouterr()
    for model, option, said in (
        (tmp_path / "vit", "auto", "an encoder only, which reads no text; a pair (LiT, CLIP, SigLIP) does"),
        (pairs["clip"], "likelihood", "is a pair without a decoder"),
        (tmp_path / "mute", "auto", "CLIPModel can't be used as a pair here: no tokenizer with the weights"),
        (tmp_path / "blind", "auto", "no preprocessor_config.json beside the weights"),
        (tmp_path / "uncropped", "auto", "keeps the sides of an image; one size for all is expected"),
    ):
        assert main(["zeroshot", str(model), "--data", str(tmp_path / "data"), "--by", option]) == 2
        error = capsys.readouterr().err.strip().split("\n")
        assert len(error) == 1 and said in error[0], error
