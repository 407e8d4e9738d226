"""JAX and MLX compute what torch computes."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from test_layouts import encoder, pair

import aimv2
from aimv2.errors import UsageError
from aimv2.interop.convert import convert

pytestmark = pytest.mark.engine
SHAPES = [(28, 2, 28, 28), (None, 2, 42, 98), (None, 1, 14, 56)]


@pytest.mark.parametrize("backend", ["jax", "mlx"])
@pytest.mark.parametrize(("image_size", "batch", "height", "width"), SHAPES)
def test_equal_to_torch(
    backend: str, image_size: int | None, batch: int, height: int, width: int, tmp_path: Path
) -> None:
    pytest.importorskip(backend)
    model = encoder(image_size)
    convert(model, tmp_path / "m", "transformers")
    twin = aimv2.load_model(tmp_path / "m", backend=backend)
    twin.config = model.config  # its range of patches
    for images in (
        torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8),
        torch.randn(batch, 3, height, width),
    ):
        wanted = model(images).detach()
        got = torch.from_numpy(np.array(twin(images.numpy())))
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
        again = pickle.loads(pickle.dumps(twin))  # as worker processes get it
        assert np.array_equal(np.array(again(images.numpy())), np.array(twin(images.numpy())))


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_integers_that_are_not_uint8_are_refused(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    convert(encoder(28), tmp_path / "m", "transformers")
    twin = aimv2.load_model(tmp_path / "m", backend=backend)
    for dtype in (np.int64, np.int32, np.bool_):
        with pytest.raises(ValueError, match="uint8"):
            twin(np.zeros((1, 3, 28, 28), dtype))
    for dtype in (np.float32, np.float16):
        assert twin(np.zeros((1, 3, 28, 28), dtype)).shape == (1, 4, 32)


def test_jax_is_a_pure_function_to_jit_and_differentiate(tmp_path: Path) -> None:
    jax = pytest.importorskip("jax")
    model = encoder(28)
    convert(model, tmp_path / "m", "safetensors")
    twin = aimv2.load_model(tmp_path / "m", backend="jax")
    images = torch.randn(2, 3, 28, 28)
    pixels = twin.normalize(images.numpy())
    plain, jitted = twin.apply(twin.params, pixels), jax.jit(twin.apply)(twin.params, pixels)
    assert np.abs(np.array(plain) - np.array(jitted)).max() < 1e-5
    gradients = jax.grad(lambda params: (twin.apply(params, pixels) ** 2).sum())(twin.params)
    model(images).square().sum().backward()
    for key, parameter in model.named_parameters():
        wanted = parameter.grad.numpy()
        assert np.abs(np.array(gradients[key]) - wanted).max() < 1e-4 * np.abs(wanted).max(), key


def test_wrong_use(tmp_path: Path) -> None:
    convert(encoder(28), tmp_path / "m", "safetensors")
    convert(pair(), tmp_path / "lit", "safetensors")
    with pytest.raises(UsageError, match="did you mean 'jax'"):
        aimv2.load_model(tmp_path / "m", backend="jaxx")
    with pytest.raises(UsageError, match="the encoder only, in fp32"):
        aimv2.load_model(tmp_path / "m", backend="jax", dtype=torch.bfloat16)
    pytest.importorskip("jax")
    with pytest.raises(UsageError, match="an image encoder is expected, got LiT"):
        aimv2.load_model(tmp_path / "lit", backend="jax")
    with pytest.raises(ValueError, match="takes 28 x 28 px"):
        aimv2.load_model(tmp_path / "m", backend="jax")(np.zeros((1, 3, 42, 42), np.float32))
