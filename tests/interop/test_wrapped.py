"""Weights under the prefixes of training and of larger models, heads beside them, and models in memory within wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_layouts import encoder, equal, pair, shape, trainer_file
from torch import nn

import aimv2
from aimv2 import api
from aimv2.errors import UsageError
from aimv2.models.create import build, create_model
from aimv2.models.distilled import Distiller
from aimv2.models.encoder import VisionEncoder
from aimv2.models.init import init_weights
from aimv2.models.lit import TunedLiT
from aimv2.models.sizes import DecoderConfig, EncoderConfig
from aimv2.tasks.init_weights import origin_of

PREFIXES = (
    "module.", "_orig_mod.", "model.", "backbone.", "encoder.", "trunk.", "module._orig_mod.", "_orig_mod.module.",
    "model.backbone.", "model.encoder.", "module.model.backbone.encoder.", "model.vision_tower.",
)  # fmt: skip
LAYOUTS = ("released", "transformers", "timm", "safetensors")


def rekeyed(folder: Path, rename: Callable[[str], str], **more: torch.Tensor) -> None:
    file = next(folder.glob("*.safetensors"))
    save_file({rename(key): value for key, value in load_file(file).items()} | more, file)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefixes_are_read(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = encoder()
    folder = aimv2.save_pretrained(model, tmp_path / "m", layout)
    kept = (folder / "model.safetensors").read_bytes()
    for prefix in PREFIXES:
        (folder / "model.safetensors").write_bytes(kept)
        rekeyed(folder, lambda key, prefix=prefix: prefix + key)
        equal(model, aimv2.load_model(folder))
    assert capsys.readouterr().err == ""


def test_pairs_decoders_and_wrapped_blocks_are_read(tmp_path: Path) -> None:
    for name, layout in (("released", "released"), ("transformers", "transformers"), ("ours", "safetensors")):
        aimv2.save_pretrained(pair(), tmp_path / name, layout)
        rekeyed(tmp_path / name, lambda key: "module.model." + key)
        equal(pair(), aimv2.load_model(tmp_path / name))
    (tmp_path / "t").mkdir()
    model = trainer_file(tmp_path / "t")
    rekeyed(tmp_path / "t", lambda key: "module." + key.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."))
    equal(model, aimv2.load_model(tmp_path / "t", decoder=True))
    assert "encoder.blocks.1.attn.qkv.weight" in origin_of(str(tmp_path / "t")).rules


def test_what_lies_outside_and_classifiers_are_left_out_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, head = encoder(), {"weight": torch.zeros(3, 32), "bias": torch.zeros(3)}
    for number, (layout, prefix, names) in enumerate(
        [(layout, "", name) for layout in LAYOUTS for name in ("head.", "classifier.", "fc.", "head.fc.")]
        + [("released", "backbone.", "head.layers.0."), ("timm", "student.backbone.", "dino_head.mlp.0.")]
        + [("transformers", "model.vision_tower.", "language_model.layers.0.mlp.")]
    ):
        folder = aimv2.save_pretrained(model, tmp_path / str(number), layout)
        rekeyed(folder, lambda key, put=prefix: put + key, **{names + key: value for key, value in head.items()})
        equal(model, aimv2.load_model(folder))
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and "left out 2 keys" in said and f"{names}weight" in said, (layout, names)


def test_two_models_in_one_file_are_refused(tmp_path: Path) -> None:
    folder = aimv2.save_pretrained(encoder(), tmp_path / "m", "released")
    tensors = {"teacher." + key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
    rekeyed(folder, lambda key: "student." + key, **tensors)
    with pytest.raises(UsageError, match=r"under student\. and teacher\.") as error:
        aimv2.load_model(folder)
    assert error.value.code == "conflict"
    folder = aimv2.save_pretrained(encoder(), tmp_path / "twice", "released")
    rekeyed(folder, lambda key: "_orig_mod." + key, **load_file(folder / "model.safetensors"))
    with pytest.raises(UsageError, match="several models") as error:
        aimv2.load_model(folder)
    assert error.value.code == "conflict"


# ---- models in memory ----


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "g"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def compiled_blocks(model: nn.Module) -> nn.Module:
    model.blocks[1] = torch.compile(model.blocks[1])  # type: ignore[operator, index]
    return model


def checkpointed_blocks(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.blocks[0] = checkpoint_wrapper(model.blocks[0])  # type: ignore[operator, index]
    return model


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.blocks[0])  # type: ignore[operator, index]
    return fully_shard(model)  # type: ignore[return-value]


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": torch.compile,  # type: ignore[dict-item]
    "compiled in place": lambda model: model.compile() or model,  # type: ignore[func-returns-value]
    "compiled blocks": compiled_blocks,
    "checkpointed blocks": checkpointed_blocks,
    "DataParallel": nn.DataParallel,
    "DDP, compiled": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),  # type: ignore[return-value]
    "FSDP2": sharded,
    "averaged": torch.optim.swa_utils.AveragedModel,
}


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.usefixtures("group")
def test_a_wrapped_model_is_saved_as_the_model_itself(how: str, tmp_path: Path) -> None:
    plain = encoder()
    wrapped = WRAPPERS[how](encoder())
    assert aimv2.image_transform(wrapped).config == plain.config  # type: ignore[attr-defined]
    for to in ("safetensors", "transformers"):
        equal(plain, aimv2.load_model(aimv2.save_pretrained(wrapped, tmp_path / to, to)))


def test_models_in_training_are_saved_as_what_they_train(tmp_path: Path) -> None:
    student = build(shape(), DecoderConfig(32, 1, 2, 48, 11, 6), seed=0)
    equal(student, aimv2.load_model(aimv2.save_pretrained(Distiller(student, 8), tmp_path / "d"), decoder=True))  # type: ignore[arg-type]
    tuned = TunedLiT(pair().config, bias=True)
    init_weights(tuned, 0)
    found = aimv2.load_model(aimv2.save_pretrained(tuned, tmp_path / "t", "transformers"))
    assert found.log_scale.shape == () and torch.equal(found.text.embed.weight, tuned.text.embed.weight)  # type: ignore[attr-defined]


def test_what_is_no_whole_model_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = encoder()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"]), adapted)
    for model, said in ((adapted, "merge adapters"), (nn.DataParallel(nn.Linear(2, 2)), "got Linear")):
        with pytest.raises(UsageError, match=said):
            aimv2.save_pretrained(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_model_in_memory_is_no_model_of_a_command(tmp_path: Path) -> None:
    model = create_model("aimv2-tiny-patch8-32", seed=0)
    for call in (api.embed, api.knn, api.explore):
        with pytest.raises(UsageError, match="got a VisionEncoder in memory") as error:
            call(model, str(tmp_path), **({"out": str(tmp_path / "o")} if call is api.embed else {}))
        assert error.value.code == "mismatch" and len(str(error.value).splitlines()) == 1


def test_a_model_without_weights_is_one_line(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = VisionEncoder(EncoderConfig("tiny", 16, 1, 2, 16, 4, 8))
    with pytest.raises(UsageError) as error:
        aimv2.save_pretrained(model, tmp_path / "out")
    assert error.value.code == "missing" and not (tmp_path / "out").exists()
