"""Zero-shot and retrieval equal counts by hand; a prior takes from a text what it says of any image; wrong use is one line."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import aimv2
from aimv2 import api
from aimv2.cli import main
from aimv2.data.images.decode import decode_image
from aimv2.data.images.labelled import Labelled
from aimv2.data.scenes import write_scenes
from aimv2.data.shards.format import captions_of, image_of, read_samples
from aimv2.data.stream.transforms import image_transform
from aimv2.data.text.tokenizer import train_tokenizer
from aimv2.errors import UsageError
from aimv2.evals.retrieve import best_ranks, chance, recall, relevant
from aimv2.evals.scorer import by_cosine, by_likelihood, stacked
from aimv2.evals.scores import wilson
from aimv2.evals.templates import DEFAULT, IMAGENET, find_templates
from aimv2.evals.zeroshot import class_names
from aimv2.interop.convert import convert
from aimv2.interop.model_folder import save_model
from aimv2.models.aimv2 import AIMv2
from aimv2.models.create import build, create_model
from aimv2.models.init import init_weights
from aimv2.models.likelihood import score
from aimv2.models.lit import LiT, LiTConfig, TextConfig
from aimv2.models.sizes import EncoderConfig

COLOURS = {"red": (200, 30, 40), "green": (30, 160, 60), "blue": (40, 60, 220)}


# ---- a pair ----


def pair_at(folder: Path, plant: dict[str, tuple[int, int, int]]) -> Path:
    """A tiny pair whose texts ``plant`` lie exactly where plain images of their colour do."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    vocab = {name: number for number, name in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    text = TextConfig(16, 1, 2, 24, len(vocab), 24, vocab["<|endoftext|>"])
    image = EncoderConfig("tiny", 32, 1, 2, 48, 14, 28, pool_heads=2)
    with torch.device("meta"):
        model = LiT(LiTConfig(image, text, projection=20))
    model.to_empty(device="cpu")
    init_weights(model, 0)
    convert(model, folder, "released")
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    if plant:
        loaded = aimv2.load_model(folder)
        with torch.no_grad():
            wanted = loaded.encode_image(torch.stack([plain(colour) for colour in plant.values()]))  # [c, 20]
            pooled = loaded.text.pool(loaded.tokenizer(list(plant)))  # [c, 16]
            model.text_projection.weight.copy_((torch.linalg.pinv(pooled) @ wanted).T)
        (tokens := folder.with_name("tokens")).mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).rename(tokens / name)
        shutil.rmtree(folder)
        convert(model, folder, "released")
        shutil.copytree(tokens, folder, dirs_exist_ok=True)
    return folder


def plain(colour: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, 28, 28)


def class_folders(folder: Path) -> Path:
    """Four images a colour; of green one is red, of blue two are green."""
    really = {"red": ["red"] * 4, "green": ["green"] * 3 + ["red"], "blue": ["blue"] * 2 + ["green"] * 2}
    for name, colours in really.items():
        (folder / name).mkdir(parents=True)
        for number, colour in enumerate(colours):
            Image.new("RGB", (30, 28), COLOURS[colour]).save(folder / name / f"{number}.png")
    return folder


def test_zeroshot_equals_a_hand_count(tmp_path: Path) -> None:
    model = pair_at(tmp_path / "pair", {f"a {name} one": colour for name, colour in COLOURS.items()})
    data = class_folders(tmp_path / "data")
    result = api.zeroshot(str(model), str(data), templates="a {} one", out=str(tmp_path / "out"))
    figures = result["figures"]
    assert figures["top1"] == 9 / 12 and figures["top5"] is None and figures["chance"] == 1 / 3
    assert figures["per_class"] == [
        {"class": "blue", "top1": 0.5},
        {"class": "green", "top1": 0.75},
        {"class": "red", "top1": 1.0},
    ]
    assert figures["top1_interval"] == list(wilson(9, 12))
    assert result["model"]["unchanged"] and result["protocol"]["name"] == "zero-shot, contrastive"
    assert json.loads((tmp_path / "out" / "result.json").read_text())["figures"] == figures
    (tmp_path / "names.txt").write_text("blue: a blue one\ngreen: a red one\nred: a green one\n")  # two change places
    swapped = api.zeroshot(str(model), str(data), templates="{}", classes=str(tmp_path / "names.txt"))
    assert [row["top1"] for row in swapped["figures"]["per_class"]] == [0.5, 0.25, 0.0]


def test_a_class_is_the_normalised_mean_of_its_normalised_texts(tmp_path: Path) -> None:
    model = aimv2.load_model(pair_at(tmp_path / "pair", {}))
    groups = [[f"a {name}", f"one {name} thing", name] for name in ("cat", "dog")]
    images = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)
    found = by_cosine(model, groups)(images)
    with torch.no_grad():
        for image, (place, texts) in itertools.product(range(4), enumerate(groups)):
            vectors = [model.encode_text([text], normalize=False)[0] for text in texts]
            mean = sum(vector / vector.norm() for vector in vectors) / 3
            seen = model.encode_image(images[image : image + 1], normalize=False)[0]
            cosine = mean @ seen / (mean.norm() * seen.norm())
            assert found[image, place].item() == pytest.approx(cosine.item(), abs=1e-5)


def test_retrieval_by_a_pair(tmp_path: Path) -> None:
    """Of six images two have captions that are each other's: four of six are found both ways."""
    colours = {**COLOURS, "white": (250, 250, 250), "black": (5, 5, 5), "pink": (250, 140, 195)}
    model = pair_at(tmp_path / "pair", {f"a {name} one": colour for name, colour in colours.items()})
    (tmp_path / "data" / "images").mkdir(parents=True)
    lines = ["image,caption"]
    said = dict(zip(colours, ["red", "green", "white", "blue", "black", "pink"]))
    for name, colour in colours.items():
        Image.new("RGB", (28, 28), colour).save(tmp_path / "data" / "images" / f"{name}.png")
        lines.append(f"{name}.png,A {said[name]} one")
    (tmp_path / "data" / "captions.txt").write_text("\n".join(lines))
    result = api.retrieve(str(model), str(tmp_path / "data"), k="1,5")
    for way in ("text_to_image", "image_to_text"):
        figures = result["figures"][way]
        assert figures["R@1"] == pytest.approx(4 / 6) and figures["queries"] == figures["among"] == 6
        assert figures["R@1_chance"] == pytest.approx(1 / 6) and figures["R@5_chance"] == pytest.approx(5 / 6)
    assert result["protocol"]["candidates"] == 6 and "normalize" not in result["protocol"]


# ---- ranks ----


def test_ranks_by_hand() -> None:
    captions = [["a dog", "Two dogs"], ["a cat"], ["a  DOG", "a bird"]]
    own = relevant(captions)  # the dog of the first and third is one caption
    assert own.tolist() == [[True, True, False, True, False], [False, False, True, False, False], [1, 0, 0, 1, 1]]
    scores = np.array([[1.0, 3, 5, 0, 4], [0, 0, 2, 2, 1], [0, 0, 0, 9, 1]])
    assert best_ranks(scores, own).tolist() == [2, 1, 0]  # an equal score counts as before the right one
    figures = recall(scores, own, [1, 2])
    assert (figures["R@1"], figures["R@2"], figures["median_rank"]) == (1 / 3, 2 / 3, 2.0)
    assert figures["R@1_interval"] == list(wilson(1, 3))
    assert best_ranks(np.zeros((4, 9)), np.eye(4, 9, dtype=bool)).tolist() == [8] * 4  # a model that says nothing


def test_chance_by_counting_orders() -> None:
    own = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 1]], dtype=bool)
    for k in (1, 2, 3, 5):
        hits = [any(row[place] for place in order[:k]) for row in own for order in itertools.permutations(range(5))]
        assert chance(own, k) == pytest.approx(np.mean(hits))
    orders = np.random.default_rng(0).random((2000, 50, 50))
    shares = [(best_ranks(scores, np.eye(50, dtype=bool)) < 5).mean() for scores in orders]
    low, high = recall(orders[0], np.eye(50, dtype=bool), [5])["R@5_chance_interval"]
    assert np.mean([low <= share <= high for share in shares]) > 0.94 and high < 0.25


# ---- a decoder ----


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder / "data", 40, val_count=30, size=32)
    texts = [text for parts in samples(folder / "data") for text in captions_of(parts)["caption"]]
    options: dict = {"width": 32, "heads": 2, "hidden": 48, "depth": 2, "decoder_width": 32, "decoder_heads": 2}
    tokenizer = train_tokenizer(texts, 300)
    options |= {"decoder_hidden": 48, "decoder_depth": 2, "decoder_vocab_size": tokenizer.vocab_size}
    model = create_model("aimv2-tiny-patch8-32", decoder=True, seed=0, **options)
    assert isinstance(model, AIMv2)
    with torch.no_grad():  # so that texts and images matter
        model.decoder.text_head.linear.weight.mul_(8)
        model.decoder.token_embed.weight.mul_(30)
    save_model(model, folder / "model")
    tokenizer.save(folder / "model")
    return folder


def samples(data: Path, split: str = "val") -> list[dict[str, bytes]]:
    return [parts for _, parts in read_samples(data / f"{split}-000000.tar")]


def pixels(model: AIMv2, parts: list[dict[str, bytes]]) -> torch.Tensor:
    see = image_transform(model)
    return torch.stack([see(decode_image(image_of(part)[1])) for part in parts])  # type: ignore[index]


def test_retrieval_by_likelihood(scenes: Path) -> None:
    """All thirty held-out scenes: as ranked by hand from the plain scores; text to image is one by any normalisation."""
    model = aimv2.load_model(scenes / "model", decoder=True)
    found = samples(scenes / "data")
    texts = [captions_of(parts)["caption"][0] for parts in found]
    plain_scores = score(model, pixels(model, found), texts).numpy()
    same = np.array([[one == other for other in texts] for one in texts])
    results = {}
    for way in ("sum", "mean", "prior"):
        words = (str(scenes / "model"), str(scenes / "data"))
        results[way] = api.retrieve(*words, candidates=30, k="1,3", normalize=way, batch_size=7)["figures"]
    assert results["sum"]["text_to_image"] == results["mean"]["text_to_image"] == results["prior"]["text_to_image"]
    lengths = np.array([len(model.tokenizer.encode(text)) for text in texts])
    prior = np.log(np.exp(plain_scores).mean(0))  # no image is left that is no candidate
    for way, by_hand in (("sum", plain_scores), ("mean", plain_scores / lengths), ("prior", plain_scores - prior)):
        for k in (1, 3):
            image_to_text = [set(np.argsort(-row)[:k]) & set(np.flatnonzero(own)) for row, own in zip(by_hand, same)]
            text_to_image = [set(np.argsort(-row)[:k]) & set(np.flatnonzero(own)) for row, own in zip(by_hand.T, same)]
            assert results[way]["image_to_text"][f"R@{k}"] == pytest.approx(
                np.mean([bool(hit) for hit in image_to_text])
            )
            assert results[way]["text_to_image"][f"R@{k}"] == pytest.approx(
                np.mean([bool(hit) for hit in text_to_image])
            )
    assert results["sum"]["image_to_text"] != results["prior"]["image_to_text"]


def test_zeroshot_by_likelihood(scenes: Path) -> None:
    """As counted by hand over images, classes and two templates."""
    words = (str(scenes / "model"), str(scenes / "data"))
    templates = scenes / "templates.txt"
    templates.write_text("a small {} at the top left\n\na large {} at the bottom right\n")
    model = aimv2.load_model(scenes / "model", decoder=True)
    found = samples(scenes / "data")
    labels = [int(parts["cls"]) for parts in found]
    names = (scenes / "data" / "classes.txt").read_text().split("\n")[:-1]
    first, second = (
        score(model, pixels(model, found), [line.replace("{}", name) for name in names])
        for line in templates.read_text().split("\n\n")
    )
    best = torch.logaddexp(first, second).argsort(dim=1, descending=True)[:, :5]
    right = [label in row for label, row in zip(labels, best.tolist())]
    for normalize in ("sum", "prior"):
        result = api.zeroshot(*words, templates=str(templates), normalize=normalize, out=str(scenes / normalize))
        if normalize == "sum":
            assert result["figures"]["top5"] == np.mean(right)
            assert result["figures"]["top1"] == np.mean(best[:, 0].numpy() == labels)
    assert result["protocol"]["prior_from"] == "30 of the measured images, without their labels"
    prior = torch.logaddexp(first, second).logsumexp(0)
    top1 = np.mean((torch.logaddexp(first, second) - prior).argmax(1).numpy() == labels)
    assert result["figures"]["top1"] == top1
    limited = api.zeroshot(*words, templates="{}", limit=11, seed=3)
    assert limited["data"]["test_images"] == 11 and limited["figures"]["chance"] == 1 / 48


def test_the_baseline_is_the_model_with_an_untrained_encoder(scenes: Path, tmp_path: Path) -> None:
    """As measured of a model whose encoder was replaced by hand."""
    model = aimv2.load_model(scenes / "model", decoder=True)
    model.encoder = build(model.encoder.config, None, seed=3)
    save_model(model, tmp_path / "twin")
    model.tokenizer.save(tmp_path / "twin")
    data = str(scenes / "data")
    given: dict = {"seed": 3, "templates": "a small {} at the top left"}
    result = api.zeroshot(str(scenes / "model"), data, baselines="random", **given)["figures"]
    twin = api.zeroshot(str(tmp_path / "twin"), data, **given)["figures"]
    assert result.pop("baselines") == {"random": twin} and result != twin
    given = {"seed": 3, "candidates": 20, "k": "1,3"}
    result = api.retrieve(str(scenes / "model"), data, baselines="random", **given)
    twin = api.retrieve(str(tmp_path / "twin"), data, **given)["figures"]
    assert result["figures"]["baselines"] == {"random": twin}
    assert result["figures"]["image_to_text"] != twin["image_to_text"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    table = api.compare([str(tmp_path / "result.json")])["text"]
    assert "random encoder" in table and table.count("chance") == 1


def test_the_prior_is_the_mean_over_other_images(scenes: Path) -> None:
    """log p(text | image) - log mean p(text | other image): a text's own probability cancels."""
    model = aimv2.load_model(scenes / "model", decoder=True)
    images, others = pixels(model, samples(scenes / "data"))[:3], pixels(model, samples(scenes / "data", "train"))[:5]
    texts = ["a small red ring at the top left", "a", "red and red and red"]
    found = by_likelihood(model, [(text,) for text in texts], "prior", stacked(others, 2))(images)
    wanted = score(model, images, texts) - torch.log(score(model, others, texts).exp().mean(0))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    itself = by_likelihood(model, [(text,) for text in texts], "prior", [images[:1]])(images[:1])
    torch.testing.assert_close(itself, torch.zeros(1, 3, dtype=torch.float64), rtol=0, atol=1e-6)


def test_images_of_different_sizes(scenes: Path, tmp_path: Path) -> None:
    """A native model reads each photograph at its own shape; only images of one shape share a batch."""
    shape = {"width": 32, "heads": 2, "hidden": 48, "depth": 1, "patch_size": 8, "image_size": None, "min_patches": 4}
    decoder = {"decoder_width": 32, "decoder_heads": 2, "decoder_hidden": 48, "decoder_depth": 1}
    model = create_model("aimv2-tiny-patch8-32", True, 0, max_patches=40, decoder_vocab_size=300, **shape, **decoder)
    save_model(model, tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(scenes / "model" / name, tmp_path / "m")
    (tmp_path / "data").mkdir()
    lines = ["image,caption"]
    for number, size in enumerate([(64, 32), (64, 32), (40, 40), (32, 64), (64, 32)]):
        Image.new("RGB", size, (50 * number, 90, 20)).save(tmp_path / "data" / f"{number}.png")
        lines.append(f"{number}.png,a ring number {number}")
    (tmp_path / "data" / "captions.txt").write_text("\n".join(lines))
    words = (str(tmp_path / "m"), str(tmp_path / "data"))
    one, two = (api.retrieve(*words, candidates=5, k="1", batch_size=size)["figures"] for size in (1, 4))
    assert one == two and one["text_to_image"]["among"] == 5


def test_several_captions_an_image(scenes: Path, shared_data: Path) -> None:
    """Photographs with five captions each: an image is found by any of its own."""
    words = (str(scenes / "model"), str(shared_data / "flickr8k-1k"))
    result = api.retrieve(*words, candidates=12, normalize="sum", seed=1)
    ways = result["figures"]
    assert (ways["text_to_image"]["queries"], ways["text_to_image"]["among"]) == (60, 12)
    assert (ways["image_to_text"]["queries"], ways["image_to_text"]["among"]) == (12, 60)
    assert ways["image_to_text"]["R@10_chance"] == pytest.approx(1 - math.comb(55, 10) / math.comb(60, 10))
    assert result["data"]["images"] == 1000 and result["data"]["captions"] == 60


# ---- words ----


def test_templates(tmp_path: Path) -> None:
    assert len(IMAGENET) == len(set(IMAGENET)) == 80 and set(DEFAULT) < set(IMAGENET)
    assert all(line.count("{}") == 1 for line in IMAGENET)
    assert find_templates("default", "imagenet1k") == IMAGENET and find_templates("default", "food101") == DEFAULT
    assert find_templates("imagenet") == IMAGENET and find_templates("my {}!") == ("my {}!",)
    (tmp_path / "t.txt").write_text("a {}\n\nthe {}\n")
    assert find_templates(str(tmp_path / "t.txt")) == ("a {}", "the {}")
    (tmp_path / "t.txt").write_text("a photo of {c}.\n")  # CLIP_benchmark's
    (tmp_path / "t.json").write_text('{"cifar10": ["a {c}"], "dtd": ["x"]}')
    assert find_templates(str(tmp_path / "t.txt")) == ("a photo of {}.",) and find_templates("my {c}") == ("my {}",)
    assert find_templates(str(tmp_path / "t.json"), "cifar10") == ("a {}",)
    with pytest.raises(UsageError, match="holds lists for cifar10, dtd"):
        find_templates(str(tmp_path / "t.json"))


WRONG = [
    (
        "zeroshot ENCODER --data CLASSES",
        "an encoder only, which reads no text; a pair (LiT, CLIP, SigLIP) does, and so does scoring by",
    ),
    ("zeroshot WORDLESS --data CLASSES", "no tokenizer with the weights; put CLIP's tokenizer.json there"),
    ("zeroshot MODEL --data CLASSES --by contrastive", "has no text tower; --by likelihood"),
    ("zeroshot PAIR --data CLASSES --by likelihood", "is a pair without a decoder"),
    ("zeroshot IMAGEONLY --data CLASSES", "its decoder has no text head"),
    ("zeroshot MODEL --data CLASSES --classes TWO", "2 names, but"),
    ("zeroshot MODEL --data CLASSES --templates TWO", "'one' has no {}"),
    ("zeroshot MODEL --data CLASSES --templates imagnet", "did you mean 'imagenet'?"),
    ("zeroshot MODEL --data NUMBERS", "its classes are called 0, 1, ..."),
    ("zeroshot MODEL --data CLASSES --normalize gray", "one of prior, sum, mean is expected"),
    ("zeroshot MODEL", "--data is missing"),
    ("retrieve MODEL --data SCENES --candidates 31", "30 images, fewer than the 31 candidates"),
    ("retrieve MODEL --data SCENES", "fewer than the 100 candidates"),
    ("retrieve MODEL --data SCENES --candidates 10", "--k 10: below the number of candidates"),
    ("retrieve MODEL --data SCENES --candidates 9 --k best", "--k best: whole numbers"),
    ("retrieve MODEL --data CLASSES", "class folders without captions"),
    ("retrieve MODEL --data nowhere", "no such file or folder"),
    ("retrieve ENCODER --data SCENES", "an encoder only"),
    ("retrieve MODEL --data SCENES --baselines pixels", "raw pixels can't replace an encoder"),
    ("zeroshot MODEL --data CLASSES --baselines randm", "did you mean 'random'?"),
]


@pytest.fixture(scope="module")
def places(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("wrong")
    convert(build(EncoderConfig("tiny", 32, 1, 2, 48, 14, 28), None, seed=0), folder / "encoder", "safetensors")
    convert(create_model("aimv2-tiny-patch8-32", True, 0, decoder_text=False), folder / "image", "safetensors")
    convert(aimv2.load_model(pair_at(folder / "pair", {})), folder / "wordless", "released")
    (folder / "two.txt").write_text("one\ntwo\n")
    for name in ("0", "1"):
        (folder / "numbers" / name).mkdir(parents=True)
        Image.new("RGB", (30, 30)).save(folder / "numbers" / name / "x.png")
    known = {
        "ENCODER": folder / "encoder",
        "IMAGEONLY": folder / "image",
        "MODEL": scenes / "model",
        "PAIR": folder / "pair",
        "WORDLESS": folder / "wordless",
        "CLASSES": class_folders(folder / "classes"),
        "SCENES": scenes / "data",
        "TWO": folder / "two.txt",
        "NUMBERS": folder / "numbers",
    }
    return {name: str(path) for name, path in known.items()}


@pytest.mark.parametrize(("line", "said"), WRONG)
def test_wrong_use(line: str, said: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([places.get(word, word) for word in line.split()]) == 2
    error = capsys.readouterr().err.strip().split("\n")
    assert len(error) == 1 and said in error[0], error


def test_names_of_a_file_belong_to_their_classes(tmp_path: Path) -> None:
    classes = ("great_ape", "b\u00e9e", "cow")
    data = Labelled("d", "d", "test", classes, [], np.zeros(0, np.int64), lambda row: Image.new("RGB", (1, 1)))
    file = tmp_path / "names.txt"
    file.write_text("Cow\nbe\u0301e\ngreat ape\n")
    assert class_names(data, str(file)) == ("great ape", "be\u0301e", "Cow")
    file.write_text("one\ntwo\nthree\n")
    assert class_names(data, str(file)) == ("one", "two", "three")
    file.write_text("cow\ngreat ape\nbeetle\n")  # by position a cow would be a great ape
    with pytest.raises(UsageError, match="'cow' at line 1, which is not the line of the class cow") as caught:
        class_names(data, str(file))
    assert caught.value.code == "mismatch"
    file.write_text("great ape\nbeetle\ncow\n")
    with pytest.raises(UsageError, match="no name for the class b\u00e9e"):
        class_names(data, str(file))
    file.write_text("2 cow\n1 bee\n0 ape\n")
    assert class_names(data, str(file)) == ("ape", "bee", "cow")
    for doubled, lines, said in (
        (("crane", "crane", "cat"), "crane\nmaillot\ncat\n", "no name for the class crane"),
        (("Cat", "cat"), "cat\ndog\n", "'cat' at line 1, which is not the line of the class cat"),
    ):
        file.write_text(lines)
        with pytest.raises(UsageError, match=said):
            class_names(replace(data, classes=doubled), str(file))
    file.write_text("crane\ncrane\ncat\n")
    assert class_names(replace(data, classes=("crane", "crane", "cat")), str(file)) == ("crane", "crane", "cat")
