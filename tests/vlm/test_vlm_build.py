"""``aimv2 vlm build``: the folder opens with transformers alone and computes what our own composition does."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import aimv2
from aimv2 import api
from aimv2.errors import UsageError
from aimv2.vlm.build import connector_of, plan
from aimv2.vlm.model import open_vlm
from tiny_llm import encoder, inputs, language_model, picture

LAYOUTS: dict[str, dict[str, Any]] = {
    "post": {"features": "post-norm"},
    "pre": {"features": "pre-norm"},
    "tiles2": {"tiles": 2},
    "tiles3": {"tiles": 3},
    "native": {"image_size": 40},
    "native-pre": {"image_size": 40, "features": "pre-norm"},
}
CLASSES = {"post": "DeepseekVL", "pre": "Llava", "tiles2": "LlavaNext", "tiles3": "LlavaNext", "native": "DeepseekVL"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``eyes``, ``eyes-native`` and ``llm``."""
    root = tmp_path_factory.mktemp("vlm")
    encoder(root / "eyes")
    encoder(root / "eyes-native", native=True)
    language_model(root / "llm", tie_word_embeddings=True)
    return root


@pytest.fixture(scope="module")
def built(parts: Path) -> Any:
    """Each layout, built at its first use."""
    made: dict[str, dict[str, Any]] = {}

    def build(name: str) -> Path:
        eyes = parts / ("eyes-native" if name.startswith("native") else "eyes")
        if name not in made:
            made[name] = api.vlm_build(eyes, parts / "llm", parts / name, **LAYOUTS[name])
        return parts / name

    return build


def opened(folder: Path) -> tuple[Any, Any]:
    """With transformers alone; weights that the folder lacks would be random."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, found = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval(), AutoProcessor.from_pretrained(folder)


def test_the_better_features_are_the_default(parts: Path) -> None:
    for eyes, features in {"eyes": "pre-norm", "eyes-native": "post-norm"}.items():
        config = aimv2.load_model(parts / eyes).config
        assert plan(config, None, 1, None).features == features


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_logits_are_ours(name: str, built: Any) -> None:
    folder = built(name)
    model, processor = opened(folder)
    assert (
        type(model).__name__
        == f"{CLASSES[name.removesuffix('-pre')] if name != 'native-pre' else 'Llava'}ForConditionalGeneration"
    )
    ours, _ = open_vlm(folder)
    shapes = [(50, 20)] * 2 if name.startswith("native") else [(50, 20), (21, 64), (33, 33)]
    given = inputs(processor, *[picture(*shape) for shape in shapes])
    wanted = model(**given).logits
    found = ours(given["input_ids"], given["pixel_values"], given["attention_mask"], given.get("image_sizes"))
    kept = given["attention_mask"].bool()
    assert float((wanted - found)[kept].abs().max()) < 1e-5 * float(wanted[kept].abs().max())
    assert float(wanted[kept].std()) > 0.1


@pytest.mark.parametrize("name", ["post", "pre", "native", "native-pre"])
@torch.no_grad()
def test_the_connector_gets_the_encoders_own_features(name: str, built: Any, parts: Path) -> None:
    folder = built(name)
    model, processor = opened(folder)
    given, caught = inputs(processor, picture(50, 20)), list[Any]()
    connector_of(model).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(**given)
    encoder = aimv2.load_model(parts / ("eyes-native" if "native" in name else "eyes"))
    images = given["pixel_values"]
    last, (before,) = encoder(images[..., : images.shape[-2] // 8 * 8, :], layers=[-1])
    tower = getattr(model.model, "vision_tower", None) or model.model.vision_model
    exact = tower(images, output_hidden_states=True)
    pre = name.endswith("pre")
    assert torch.equal(caught[0], exact.hidden_states[-1] if pre else exact.last_hidden_state)
    torch.testing.assert_close(caught[0], before if pre else last, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(last, before, atol=1e-2)


def test_images_are_padded_with_the_mean_and_resized(built: Any) -> None:
    folder = built("post")
    torch.manual_seed(0)
    image = picture(50, 20)
    plain, ours = opened(folder)[1].image_processor, open_vlm(folder)[1].image_processor
    mean, std = (np.array(values) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    square = Image.new("RGB", (50, 50), tuple(int(255 * value) for value in mean))
    square.paste(image, (0, 15))
    wanted = (np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC)) / 255 - mean) / std
    level = (
        1.01 / 255 / min(std) if find_spec("torchvision") else 1e-5
    )  # with which transformers resizes where it is there
    for processor, most in ((ours, 1e-5), (plain, level)):
        (pixels,) = processor(image, return_tensors="pt")["pixel_values"]
        np.testing.assert_allclose(pixels.permute(1, 2, 0), wanted, atol=most)


@torch.no_grad()
def test_it_answers(built: Any) -> None:
    model, processor = opened(built("post"))
    given = inputs(processor, picture(50, 20), picture(20, 50), text="a red square")
    assert (given["input_ids"] == processor.image_token_id).sum(1).tolist() == [16, 16]
    text = processor.batch_decode(given["input_ids"])[0]
    assert text.replace("<image>" * 16, "<image>") == "user: <image>\na red square\nassistant: "
    out = model.generate(**given, max_new_tokens=6, do_sample=False)
    ours, ids, mask = open_vlm(built("post"))[0], given["input_ids"], given["attention_mask"]
    for _ in range(out.shape[1] - ids.shape[1]):
        scores = ours(ids, given["pixel_values"], mask)[:, -1]
        scores[:, processor.image_token_id] = -torch.inf
        ids, mask = torch.cat((ids, scores.argmax(1)[:, None]), 1), torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    ended = (out == model.config.text_config.eos_token_id).cumsum(1)[:, given["input_ids"].shape[1] :] > 0
    assert ((ids == out)[:, given["input_ids"].shape[1] :] | ended).all()
    assert out.shape[1] > given["input_ids"].shape[1]
    assert processor.image_token_id not in out[:, given["input_ids"].shape[1] :]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    assert processor.apply_chat_template(plain) == "system: Be brief.\nuser: a\n"


@torch.no_grad()
def test_several_grids_in_one_batch_are_ours(built: Any) -> None:
    ours, processor = open_vlm(built("native"))
    one, two = (inputs(processor, picture(*shape)) for shape in ((40, 16), (24, 40)))
    ids = [given["input_ids"][0] for given in (one, two)]
    length = max(map(len, ids))
    both = torch.stack([torch.cat((torch.zeros(length - len(row), dtype=row.dtype), row)) for row in ids])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in ids]).long()
    found = ours(both, [one["pixel_values"][0], two["pixel_values"][0]], mask)
    for row, given in zip(found, (one, two)):
        alone = ours(given["input_ids"], given["pixel_values"])[0]
        torch.testing.assert_close(row[-len(alone) :], alone, rtol=1e-4, atol=1e-4)


def test_tied_or_not_the_words_are_as_before(parts: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    language_model(tmp_path / "llm", "qwen2", tie_word_embeddings=False, vocab_size=320)  # with rows to spare
    about = api.vlm_build(parts / "eyes", tmp_path / "llm", tmp_path / "vlm", dtype="bfloat16")
    model, processor = opened(tmp_path / "vlm")
    assert about["dtype"] == "bfloat16" and model.dtype == torch.bfloat16
    ids, image = torch.arange(8)[None], processor.image_token_id
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "llm", dtype=torch.bfloat16)(ids).logits
    others = torch.arange(320) != image
    assert torch.equal(model(ids).logits[..., others], before[..., others])
    rows = model.get_input_embeddings().weight, model.lm_head.weight
    for row in rows:
        torch.testing.assert_close(row[image], row[:image].float().mean(0).bfloat16())
    assert rows[0].data_ptr() != rows[1].data_ptr()


def test_the_card_says_what_it_is(built: Any, parts: Path) -> None:
    text = (built("tiles2") / "README.md").read_text()
    for words in (
        "untrained",
        "thumbnail and newline are ours",
        "language model: llm\n",
        "pre-norm",
        "Pre-norm gave better answers",
        "<image>",
    ):
        assert words in text, words
    assert str(parts) not in text
    assert "post-norm" in (built("post") / "README.md").read_text()
    assert json.loads((built("post") / "generation_config.json").read_text())["suppress_tokens"]


def test_the_seed_is_the_connectors(parts: Path, built: Any, tmp_path: Path) -> None:
    made = [built("post")]
    for seed in (0, 1):
        torch.rand(3)
        made.append(Path(api.vlm_build(parts / "eyes", parts / "llm", tmp_path / str(seed), seed=seed)["out"]))
    first, again, other = (nn.utils.parameters_to_vector(open_vlm(one)[0].connector.parameters()) for one in made)
    assert torch.equal(first, again) and not torch.equal(first, other)


# ---- wrong use ----


def refused(code: str, option: str, *words: Any, **options: Any) -> str:
    out = words[2]
    with pytest.raises(UsageError) as caught:
        api.vlm_build(*words, **options)
    assert (caught.value.code, caught.value.option) == (code, option), caught.value
    assert code == "exists" or not Path(out).exists()
    return str(caught.value)


def test_llm_that_is_none(parts: Path, built: Any, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "vocab_size": 99,
        "initializer_range": 0.5,
    }
    BertForMaskedLM(BertConfig(**small)).save_pretrained(tmp_path / "bert")
    T5ForConditionalGeneration(
        T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.safetensors").write_bytes((parts / "llm" / "model.safetensors").read_bytes())
    for name, code in (("bert", "mismatch"), ("t5", "mismatch"), ("bare", "not-found"), ("nowhere", "not-found")):
        text = refused(code, "LLM", parts / "eyes", tmp_path / name, tmp_path / "vlm")
        assert "causal language model" in text or name == "nowhere", text
    refused("mismatch", "LLM", parts / "eyes", parts / "eyes", tmp_path / "vlm")
    assert "already" in refused("mismatch", "LLM", parts / "eyes", built("post"), tmp_path / "vlm")


def test_encoder_that_is_none(parts: Path, built: Any, tmp_path: Path) -> None:
    assert "vision-language model" in refused("mismatch", "ENCODER", built("post"), parts / "llm", tmp_path / "vlm")
    refused("unsupported", "ENCODER", parts / "llm", parts / "llm", tmp_path / "vlm")
    refused("exists", "OUT", parts / "eyes", parts / "llm", built("post"))


def test_an_encoder_is_no_vlm(parts: Path) -> None:
    for name in ("eyes", "llm"):
        with pytest.raises(UsageError) as caught:
            open_vlm(parts / name)
        assert (caught.value.code, caught.value.option) == ("mismatch", "VLM")


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_chat_templates(parts: Path, tmp_path: Path) -> None:
    llm = language_model(tmp_path / "llm", template=None)
    words = parts / "eyes", llm, tmp_path / "vlm"
    assert "--chat-template FILE" in refused("missing", "LLM", *words)
    for text, code in (
        ("{{ messages[0]['role'] }}", "mismatch"),
        ("{% for %}", "unreadable"),
        (ENDLESS, "unreadable"),
        (None, "unreadable"),
    ):
        file = tmp_path / "template.jinja"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        refused(code, "--chat-template", *words, chat_template=str(file))
    file.write_text("\n{% for message in messages %}[{{ message.content }}]{% endfor %}")
    api.vlm_build(*words, chat_template=str(file))
    processor = opened(tmp_path / "vlm")[1]
    text = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}]
    assert processor.apply_chat_template([{"role": "user", "content": text}]) == "\n[<image>\na<image>\n]"


def test_image_tokens_that_overflow(parts: Path, tmp_path: Path, built: Any) -> None:
    llm = language_model(tmp_path / "llm", max_position_embeddings=40)
    assert "88 tokens" in refused("limit", "--tiles", parts / "eyes", llm, tmp_path / "vlm", tiles=2)
    refused("limit", "--image-size", parts / "eyes-native", llm, tmp_path / "vlm", image_size=80)
    api.vlm_build(parts / "eyes", llm, tmp_path / "vlm")
    ours, processor = open_vlm(tmp_path / "vlm")
    with pytest.raises(UsageError, match="32 of them") as caught:
        ours(inputs(processor, picture(9, 9), text="a").input_ids.repeat(1, 2))
    assert caught.value.code == "limit"


def test_options_that_do_not_go_together(parts: Path, tmp_path: Path) -> None:
    out = tmp_path / "vlm"
    text = refused("conflict", "--features", parts / "eyes", parts / "llm", out, features="post-norm", tiles=2)
    assert "pre-norm" in text and "--tiles" in text
    assert "64" in refused("conflict", "--image-size", parts / "eyes", parts / "llm", out, image_size=64)
    refused("conflict", "--tiles", parts / "eyes-native", parts / "llm", out, tiles=2)
    refused("invalid", "--image-size", parts / "eyes-native", parts / "llm", out, image_size=41)


def test_code_of_the_folder_never_runs(parts: Path, tmp_path: Path) -> None:
    llm = language_model(tmp_path / "llm")
    mark, config = tmp_path / "ran", json.loads((llm / "config.json").read_text())
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import LlamaConfig as Own, LlamaForCausalLM as OwnModel\n"
    (llm / "own.py").write_text(code)
    ways = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel", "AutoTokenizer": "own.Own"}
    (llm / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": ways}))
    assert "never run" in refused("mismatch", "LLM", parts / "eyes", llm, tmp_path / "vlm")
    (llm / "config.json").write_text(json.dumps({**config, "auto_map": ways}))  # of a model that transformers knows
    api.vlm_build(parts / "eyes", llm, tmp_path / "vlm")
    assert not mark.exists()
    opened(tmp_path / "vlm")
    assert not mark.exists()


def test_weights_are_checked(parts: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    llm = language_model(tmp_path / "llm")
    file = llm / "model.safetensors"
    whole = load_file(file)
    for name, changed in (("model.norm.weight", None), ("model.norm.weight", torch.ones(33))):
        more = {} if changed is None else {name: changed}
        save_file({key: value for key, value in whole.items() if key != name} | more, file, {"format": "pt"})
        assert name in refused("mismatch", "LLM", parts / "eyes", llm, tmp_path / "vlm")
    file.rename(llm / "pytorch_model.bin")
    refused("unsupported", "LLM", parts / "eyes", llm, tmp_path / "vlm")


def test_logits_that_the_classes_cannot_hold(parts: Path, tmp_path: Path) -> None:
    for kind in ("cohere", "gpt2"):  # a scale of logits; embeddings of another name, tied
        more = (
            {"logit_scale": 0.5} if kind == "cohere" else {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 256}
        )
        llm = language_model(tmp_path / kind, kind, **more)
        if kind == "cohere":
            assert "other logits" in refused("unsupported", "LLM", parts / "eyes", llm, tmp_path / kind / "vlm")
            continue
        api.vlm_build(parts / "eyes", llm, tmp_path / "vlm")
        assert opened(tmp_path / "vlm")[0].config.text_config.model_type == kind
