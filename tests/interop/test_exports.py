"""What is written for other engines computes what the model computes; verbs that write it leave nothing half-done."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_layouts import DECODER, encoder, equal, pair, shape

import aimv2
from aimv2 import api
from aimv2.errors import UsageError
from aimv2.interop import hub
from aimv2.interop.convert import convert
from aimv2.interop.onnx import Exported, example
from aimv2.models.create import build
from aimv2.models.sizes import MODELS, EncoderConfig, encoder_flops, encoder_parameters
from runs import call

FIXED = [(1, 28, 28), (3, 28, 28)]
NATIVE = [(1, 28, 28), (2, 42, 98), (1, 14, 56)]


def worst(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((got - wanted).abs().max() / wanted.abs().max()).detach())


@pytest.mark.engine
@pytest.mark.parametrize(("image_size", "shapes"), [(28, FIXED), (None, NATIVE)])
def test_onnx(image_size: int | None, shapes: list, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = encoder(image_size, pool_heads=2)
    half = build(model.config, None, seed=0).bfloat16()
    convert(half, tmp_path / "half", "onnx")
    assert next(half.parameters()).dtype == torch.bfloat16  # exporting leaves the model as it was
    convert(model, tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    for shape_ in shapes:
        images = torch.randn(shape_[0], 3, *shape_[1:])
        features, pooled = session.run(None, {"pixel_values": images.numpy()})
        assert worst(torch.from_numpy(features), model(images)) < 1e-4
        assert worst(torch.from_numpy(pooled), model.pooled(images)) < 1e-4


@pytest.mark.engine
@pytest.mark.parametrize(("image_size", "shapes"), [(28, FIXED), (None, NATIVE)])
def test_openvino(image_size: int | None, shapes: list, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from aimv2.interop.openvino import OpenVINOEncoder

    model = encoder(image_size)
    for precision, allowed in (("fp32", 1e-4), ("bf16", 3e-2)):
        convert(model, tmp_path / precision, "openvino", precision=precision)
        runs = OpenVINOEncoder(tmp_path / precision)
        for shape_ in shapes:
            images = torch.randint(0, 256, (shape_[0], 3, *shape_[1:]), dtype=torch.uint8)
            assert worst(runs(images), model(images)) < allowed


@pytest.mark.engine
def test_openvino_int8_is_near_and_smaller(tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    from aimv2.interop.openvino import OpenVINOEncoder

    model = encoder(28)
    images = torch.randint(0, 256, (16, 3, 28, 28), dtype=torch.uint8)
    convert(model, tmp_path / "fp32", "openvino")
    convert(model, tmp_path / "int8", "openvino", precision="int8", pixels=[images])
    got, wanted = OpenVINOEncoder(tmp_path / "int8")(images), model(images)
    assert torch.nn.functional.cosine_similarity(got, wanted, dim=-1).mean() > 0.99
    sizes = [(tmp_path / name / "openvino_model.bin").stat().st_size for name in ("int8", "fp32")]
    assert sizes[0] < 0.5 * sizes[1]
    with pytest.raises(UsageError, match="int8 needs --images"):
        convert(model, tmp_path / "none", "openvino", precision="int8")


def test_torch_export_round_trip(tmp_path: Path) -> None:
    for image_size, shapes in ((28, FIXED), (None, NATIVE[:2])):  # a grid of one row is another program to torch.export
        model = encoder(image_size)
        inputs, varies = example(model)
        with torch.no_grad():
            program = torch.export.export(Exported(model), (inputs,), dynamic_shapes=varies)
        torch.export.save(program, tmp_path / "m.pt2")
        loaded = torch.export.load(tmp_path / "m.pt2").module()
        for shape_ in shapes:
            images = torch.randn(shape_[0], 3, *shape_[1:])
            assert worst(loaded(images), model(images)) < 1e-5


# ---- the hub ----


def test_released_names_have_rows_and_forty_digits() -> None:
    assert len(hub.RELEASED) == 16
    for name, revision in hub.RELEASED.items():
        assert len(revision) == 40 and int(revision, 16)
        assert hub.shape_of(name).name in MODELS


def test_unreachable_hub_says_what_to_download(tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    ended = call("convert", "aimv2-large-patch14-224", str(tmp_path / "out"), "--to", "timm", env=env)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1
    revision = hub.RELEASED["aimv2-large-patch14-224"]
    assert f"hf download apple/aimv2-large-patch14-224 --revision {revision} --local-dir DIR" in ended.stderr


def test_push_is_refused_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(encoder(), tmp_path / "m", "safetensors")
    monkeypatch.setattr(hub, "unreachable", lambda: "no network")
    with pytest.raises(UsageError, match=r"can't be reached .*nothing was uploaded"):
        api.push(str(tmp_path / "m"), "me/mine")
    with pytest.raises(UsageError, match="owner/name is expected"):
        api.push(str(tmp_path / "m"), "mine")


# ---- verbs and functions ----


def test_convert_writes_a_card(tmp_path: Path) -> None:
    convert(encoder(28), tmp_path / "m", "safetensors")
    result = api.convert(str(tmp_path / "m"), str(tmp_path / "out"), "transformers", licence="mit")
    assert set(result["files"]) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("license: mit", "parameters", "licence of the weights: mit", "AutoModel.from_pretrained"):
        assert part in card


def test_save_pretrained(tmp_path: Path) -> None:
    model = build(shape(), DECODER, seed=1).eval()
    aimv2.save_pretrained(model, tmp_path / "m")
    equal(aimv2.load_model(tmp_path / "m", decoder=True), model)
    assert (
        "Load" in (tmp_path / "m" / "README.md").read_text()
        or "load_model" in (tmp_path / "m" / "README.md").read_text()
    )
    lit = pair()
    aimv2.save_pretrained(lit, tmp_path / "lit", to="transformers")
    equal(aimv2.load_model(tmp_path / "lit"), lit)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "M", "OUT", "--to", "tim"], "did you mean 'timm'"),
        (["convert", "M", "M", "--to", "timm"], "something is there already"),
        (["convert", "M", "OUT", "--to", "timm", "--precision", "int8"], "--precision is of --to openvino"),
        (["convert", "M", "OUT", "--to", "openvino", "--precision", "int8"], "needs --images"),
        (["convert", "M", "OUT", "--to", "openvino", "--precision", "int4"], "did you mean 'int8'"),
        (["convert", "aimv2-lage-patch14-224", "OUT", "--to", "timm"], "did you mean 'aimv2-large-patch14-224'"),
        (["embed", "M", "nowhere", "OUT"], "no such file or folder"),
        (["embed", "M", "M", "OUT", "--pool", "max"], "one of mean, attention, none is expected"),
        (["embed", "M", "M", "OUT", "--pool", "attention"], "no pooling head"),
        (["embed", "M", "M", "OUT", "--layers", "7"], "-3 to 2 expected"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from aimv2.cli import main

    convert(encoder(28), tmp_path / "M", "safetensors")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    given = [str(tmp_path / word) if word in ("M", "OUT") else word for word in words]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and said in error, error
    left = [path for path in map(str, tmp_path.rglob("*")) if path not in before and not Path(path).is_dir()]
    assert left == []


def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    absent = ("onnx", "openvino", "jax", "mlx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else real(name, *a))
    for extra in ("onnx", "openvino"):
        with pytest.raises(UsageError, match=rf"pip install 'aimv2\[{extra}\]'"):
            convert(encoder(28), tmp_path / extra, extra)


def test_table_of_models(capsys: pytest.CaptureFixture) -> None:
    from aimv2.cli import main

    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    rows = {row["name"]: row for row in api.models()["models"]}
    assert set(hub.RELEASED) | set(MODELS) == set(rows)
    for name in MODELS:
        with torch.device("meta"):
            assert rows[name]["parameters"] == sum(p.numel() for p in aimv2.VisionEncoder(MODELS[name][0]).parameters())
    head = EncoderConfig("x", 32, 2, 2, 48, 4, 16, pool_heads=2)
    with torch.device("meta"):
        assert encoder_parameters(head) == sum(p.numel() for p in aimv2.VisionEncoder(head).parameters())
    assert rows["aimv2-large-patch14-224"]["revision"] == hub.RELEASED["aimv2-large-patch14-224"]


def test_arithmetic_is_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = shape(28)
    with FlopCounterMode(display=False) as counter:
        encoder(28)(torch.randn(1, 3, 28, 28))
    assert counter.get_total_flops() == encoder_flops(config)


# ---- memory, and other people's registries ----

MEMORY = """
import sys, threading, time, torch, aimv2
import aimv2.interop.load, transformers, safetensors.torch
def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
peak, done = [0], [False]
def watch():
    while not done[0]:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
model = aimv2.load_model(sys.argv[1])
done[0] = True; thread.join()
size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1024
print((max(peak[0], anonymous()) - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["released", "transformers"])
def test_weights_are_never_held_twice(layout: str, tmp_path: Path) -> None:
    """A smaller twin of 3B: the memory of loading is that of the weights."""
    wide = EncoderConfig("wide", 1024, 6, 8, 2816, 14, 224)
    convert(build(wide, None, seed=0), tmp_path / "m", layout)
    ended = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "m")], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(ended.stdout) < 1.3


CLASH = """
import {first}
import {second}
from transformers import AutoConfig, AutoModel, CONFIG_MAPPING
assert CONFIG_MAPPING["aimv2"].__module__.startswith("transformers."), CONFIG_MAPPING["aimv2"]
assert CONFIG_MAPPING["aimv2_vision_model"].__module__.startswith("transformers.")
AutoConfig.register("mine", type("Mine", (CONFIG_MAPPING["aimv2"],), {{"model_type": "mine"}}))  # registries still work
model = aimv2.load_model({folder!r})
assert type(AutoModel.from_pretrained({folder!r})).__name__ == "Aimv2VisionModel"
"""


@pytest.mark.parametrize(("first", "second"), [("aimv2", "transformers"), ("transformers", "aimv2")])
def test_nothing_of_ours_takes_the_name_in_transformers(first: str, second: str, tmp_path: Path) -> None:
    convert(encoder(28), tmp_path / "m", "transformers")
    code = CLASH.format(first=first, second=second, folder=str(tmp_path / "m"))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_wrong_sizes_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes 28 x 28 px, got 42 x 42"):
        encoder(28)(torch.zeros(1, 3, 42, 42))
    native = build(EncoderConfig("native", 32, 1, 2, 48, 14, None), None)
    for side in (14, 14 * 65):
        with pytest.raises(ValueError, match="takes 112 to 4096 patches"):
            native(torch.zeros(1, 3, side, side))
    transform = aimv2.image_transform(native)
    from PIL import Image

    for size in ((20, 10), (5000, 200)):  # scaled into the range
        seen = transform(Image.new("RGB", size))
        assert 112 <= (seen.shape[1] // 14) * (seen.shape[2] // 14) <= 4096


def test_stored_config_survives(tmp_path: Path) -> None:
    lit = pair()
    convert(lit, tmp_path / "m", "safetensors")
    stored = json.loads((tmp_path / "m" / "config.json").read_text())
    assert stored["lit"]["encoder"]["pool_heads"] == 2
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["text.extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UsageError, match=r"key 'text.extra' is not part of the model"):
        aimv2.load_model(tmp_path / "m")
    assert np.isfinite(lit.scale.item())
