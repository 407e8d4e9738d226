"""Which files hold the weights: pointers, one of several, several sets, names that no file can have, models of other families."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_layouts import encoder, equal
from test_misfits import one_line

import aimv2
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.shards.format import find_shards
from aimv2.data.shards.tars import open_tar
from aimv2.data.text.tokenizer import load_tokenizer
from aimv2.errors import UsageError
from aimv2.features.frozen import open_frozen
from aimv2.interop.convert import convert

POINTER_TEXT = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 123\n" % (b"0" * 64)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors.index.json"],
)
def test_a_pointer_of_git_lfs_is_called_that(name: str, tmp_path: Path) -> None:
    convert(encoder(), tmp_path / "m", "transformers")
    (tmp_path / "m" / name).write_bytes(POINTER_TEXT)
    for opened in (aimv2.load_model, open_frozen):
        with pytest.raises(UsageError, match=f"{name}.* Git LFS pointer") as error:
            opened(str(tmp_path / "m"))
        assert one_line(error) and error.value.code == "unreadable"


def test_a_pointer_in_place_of_data_is_called_that(tmp_path: Path) -> None:
    for name in ("a.png", "a.tar", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes(POINTER_TEXT)
    with pytest.raises(ImageError, match="Git LFS pointer"):
        decode_image(tmp_path / "a.png")
    with pytest.raises(OSError, match="Git LFS pointer"):
        open_tar(tmp_path / "a.tar")
    for opened, name in (
        (load_tokenizer, "tokenizer.json"),
        (load_tokenizer, ""),
        (aimv2.load_model, "model.safetensors"),
        (lambda path: find_shards(path, "train"), "a.tar"),
    ):
        with pytest.raises(UsageError, match="Git LFS pointer"):
            opened(tmp_path / name)


def test_one_of_several_weight_files(tmp_path: Path) -> None:
    convert(encoder(), tmp_path / "m", "released")
    folder, weights = tmp_path / "m", load_file(tmp_path / "m" / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, name in enumerate(names):
        save_file({key: weights[key] for key in sorted(weights)[i::2]}, folder / name)
    equal(aimv2.load_model(folder), encoder())  # all are there: the index adds nothing
    equal(aimv2.load_model(folder / names[1]), encoder())
    (folder / names[0]).unlink()
    for given in (folder, folder / names[1]):
        with pytest.raises(UsageError, match=f"{names[1]} is one of 2 weight files; {names[0]} is not there") as error:
            aimv2.load_model(given)
        assert error.value.code == "not-found"


@pytest.mark.parametrize("other", ["ema-0000{}-of-00002", "model-0000{}-of-00003", "zz"])
def test_several_sets_of_weight_files_are_not_chosen_from(other: str, tmp_path: Path) -> None:
    convert(encoder(), tmp_path / "m", "released")
    folder, weights = tmp_path / "m", load_file(tmp_path / "m" / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for form, files in ((other, int(other[-1]) if "of" in other else 1), ("model-0000{}-of-00002", 2)):
        for i in range(files):
            save_file(dict(sorted(weights.items())[i::files]), folder / f"{form.format(i + 1)}.safetensors")
    with pytest.raises(UsageError, match="several weight files") as error:
        aimv2.load_model(folder)
    assert one_line(error) and error.value.code == "conflict"
    equal(aimv2.load_model(folder / "model-00001-of-00002.safetensors"), encoder())


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="MODEL xxx") as error:
        aimv2.load_model("x" * 3000)
    assert len(one_line(error)) < 300 and error.value.code == "not-found"


def test_a_model_of_another_family_is_called_that(tmp_path: Path) -> None:
    save_file({"embeddings.word_embeddings.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match="model_type 'bert'") as error:
        aimv2.load_model(tmp_path)
    assert one_line(error) and error.value.code == "unsupported"
