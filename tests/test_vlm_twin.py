"""The twin's own parts: a language model of scene texts, a contrastive encoder, raw patches, the tables."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import aimv2
from aimv2 import api

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # dataclasses look their module up
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def parts() -> Any:
    return module("vlm_twin_parts")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("twin") / "scenes"
    api.data_shapes(out, count=40, size=64, objects=4, questions=6)
    return out


def test_raw_patches_are_the_pixels_of_each_patch(parts: Any, tmp_path: Path) -> None:
    parts.raw_patches(tmp_path / "raw")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = aimv2.load_model(tmp_path / "raw")(images)
    patches = F.unfold((images / 255 - 0.5) / 0.5, 8, stride=8).transpose(1, 2)
    torch.testing.assert_close(found, F.rms_norm(patches, (192,), eps=1e-5), rtol=1e-4, atol=1e-4)


def test_a_language_model_and_a_contrastive_encoder_make_a_vlm(parts: Any, scenes: Path, tmp_path: Path) -> None:
    assert 0 < parts.language_model(scenes, tmp_path / "llm", 2, 0, batch=2, length=32) < 10
    assert 0 < parts.contrastive(scenes, tmp_path / "eye", 2, 0, batch=8) < 10
    about = api.vlm_build(tmp_path / "eye", tmp_path / "llm", tmp_path / "vlm")
    assert about["image_tokens"] == 16
    found = api.vlm_score(tmp_path / "vlm", data=str(scenes), limit=1, controls=False)
    assert found["figures"]["questions"] >= 1


def test_the_training_texts_are_those_of_the_chat_template(parts: Any, scenes: Path, tmp_path: Path) -> None:
    """What the language model reads without images is what instruction tuning shows it after them."""
    from transformers import PreTrainedTokenizerFast

    texts = parts.texts_of(scenes)
    words = PreTrainedTokenizerFast(tokenizer_object=parts.word_tokenizer(texts), eos_token="<end>", pad_token="<pad>")
    words.chat_template = parts.TEMPLATE
    talk = [{"role": "user", "content": "Is there a ring?"}, {"role": "assistant", "content": "yes"}]
    assert words.apply_chat_template(talk, tokenize=False) == "Q: Is there a ring?\nA: yes<end>"
    assert any(text.startswith("Q: ") and "\nA: " in text and text.endswith("<end>") for text in texts)


def test_tables_are_means_over_kinds(parts: Any) -> None:
    twin = module("vlm_twin")

    def figures(right: float) -> dict[str, Any]:
        kind = {"text_only_accuracy": 0.25, "shuffled_accuracy": 0.2, "majority_accuracy": 0.3, "chance": 0.5}
        kinds = {name: {**kind, "accuracy": right if name == "count" else 0.5} for name in twin.KINDS}
        return {"kinds": kinds}

    found = {seed: {"aimv2": {"seen": figures(right), "unseen": figures(0.5)}} for seed, right in ((0, 0.9), (1, 0.7))}
    lines = twin.tables(found, ["aimv2"]).splitlines()
    assert lines[2] == "| aimv2 | 53.8 ± 1.3 | 50.0 ± 0.0 | 25.0 ± 0.0 | 20.0 ± 0.0 |"
    assert lines[3].startswith("| most frequent answer | 30.0 ± 0.0 |")
    assert "| aimv2 | 80.0 ± 10.0 | 50.0 ± 0.0 |" in twin.tables(found, ["aimv2"])
