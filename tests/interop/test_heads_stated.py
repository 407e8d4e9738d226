"""Heads of a decoder are those that the configuration states, in any of the words for them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file
from test_layouts import DECODER, shape

import aimv2
from aimv2.errors import UsageError
from aimv2.interop.convert import renamed
from aimv2.interop.layouts import trainer_rules
from aimv2.models.create import build

HEADS = [
    {"decoder": {"heads": 12}},
    {"text_config": {"num_attention_heads": 12}},
    {"text_decoder_config": {"n_heads": 12}},
    {"language_config": {"nhead": 12}},
    {"multimodal_decoder": {"decoder_attention_heads": 12}},
    {"decoder_num_heads": 12},
]


def test_heads_of_a_released_decoder_are_those_of_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The width alone can not tell them: 768 is 6 heads of a released text tower, or 12."""
    decoder = replace(DECODER, width=768, heads=12)
    model = build(shape(), decoder, seed=0).eval()
    save_file(renamed(model, trainer_rules(model.encoder.config, decoder)), tmp_path / "model.safetensors")
    for said in HEADS:
        (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2, **said}))
        assert aimv2.load_model(tmp_path, decoder=True).decoder.config.heads == 12, said
        (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2, **said}).replace("12", "7"))
        with pytest.raises(UsageError, match="7 attention heads do not divide the width 768"):
            aimv2.load_model(tmp_path, decoder=True)
    assert capsys.readouterr().err == ""
    (tmp_path / "config.json").write_text('{"num_attention_heads": 2}')
    assert aimv2.load_model(tmp_path, decoder=True).decoder.config.heads == 6
    assert "heads of the decoder taken from its width: 6" in capsys.readouterr().err
