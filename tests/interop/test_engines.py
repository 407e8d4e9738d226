"""OpenVINO folders: what they refuse, and that int8 leaves standard output to the result."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_layouts import encoder

import aimv2
from aimv2.errors import UsageError
from aimv2.interop.convert import convert
from runs import call

pytestmark = pytest.mark.engine


def test_images_of_a_wrong_size(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from aimv2.interop.openvino import ABOUT, OpenVINOEncoder

    convert(encoder(28), tmp_path / "fixed", "openvino")
    convert(encoder(None), tmp_path / "native", "openvino")
    fixed, native = OpenVINOEncoder(tmp_path / "fixed"), OpenVINOEncoder(tmp_path / "native")
    for shape in ((1, 3, 42, 42), (1, 3, 42, 28)):
        with pytest.raises(ValueError, match="takes 28 x 28 px, got 42"):
            fixed(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"images must be \[B, 3, H, W\]"):
        fixed(torch.zeros(3, 28, 28))
    with pytest.raises(ValueError, match="takes 2 to 4096 patches"):
        native(torch.zeros(1, 3, 14, 14))
    assert native(torch.zeros(1, 3, 42, 28)).shape == (1, 6, 32)
    with pytest.raises(ValueError, match="uint8"):
        fixed(torch.zeros(1, 3, 28, 28, dtype=torch.int64))
    with pytest.raises(ValueError, match="normalised"):
        fixed(torch.full((1, 3, 28, 28), 255.0))
    again = pickle.loads(pickle.dumps(fixed))  # as worker processes get it
    assert torch.equal(again(torch.ones(1, 3, 28, 28)), fixed(torch.ones(1, 3, 28, 28)))
    with pytest.raises(UsageError, match=r"an OpenVINO export; .*OpenVINOEncoder opens it"):
        aimv2.load_model(tmp_path / "fixed")
    for text in ("{", "[]", "{}", '{"precision": "fp32", "patch_size": 14, "mean": [1], "std": [1, 1, 1]}'):
        (tmp_path / "fixed" / ABOUT).write_text(text)
        with pytest.raises(UsageError, match=ABOUT) as error:
            OpenVINOEncoder(tmp_path / "fixed")
        assert len(str(error.value).splitlines()) == 1


def test_int8_of_a_model_in_memory_and_json_alone_on_standard_output(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    from aimv2.interop.openvino import OpenVINOEncoder

    model = encoder(28)
    images = torch.randint(0, 256, (8, 3, 28, 28), dtype=torch.uint8)
    aimv2.save_pretrained(model, tmp_path / "memory", to="openvino", precision="int8", pixels=[images])
    got = OpenVINOEncoder(tmp_path / "memory")(images)
    assert torch.nn.functional.cosine_similarity(got, model(images), dim=-1).mean() > 0.99
    convert(model, tmp_path / "m", "safetensors")
    (tmp_path / "photos").mkdir()
    for at, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / f"{at}.png")
    words = [str(tmp_path / "m"), str(tmp_path / "out"), "--to", "openvino", "--precision", "int8"]
    ended = call("convert", *words, "--images", str(tmp_path / "photos"), "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["to"] == "openvino"
