"""What the README tells people to type works."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aimv2.interop.convert import convert
from aimv2.models.create import create_model

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_a_released_encoder_in_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.split("## A released encoder")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    model = create_model("aimv2-large-patch14-224", seed=0, width=256, heads=2, hidden=64, depth=6).eval()
    convert(model, "released", "released")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)).save("photo.jpg")
    names: dict = {}
    exec(code.replace('"aimv2-large-patch14-224"', '"released"'), names)
    assert names["patches"].shape == (1, 256, 256) and names["vector"].shape == (1, 256)
    assert [tuple(m.shape) for m in names["maps"]] == [(1, 256, 16, 16)] * 2
    from transformers import AutoModel

    theirs = AutoModel.from_pretrained("out")(
        pixel_values=names["encoder"].normalize(names["images"])
    ).last_hidden_state
    assert (theirs - names["patches"]).abs().max() < 1e-4
