"""Code that somebody planted where a library looks by name: none of it runs, also for a user who says yes at every prompt."""

import ast
import builtins
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import configure, vit

import aimv2
import tiny_llm
from aimv2 import api
from aimv2.config.load import read_recipe
from aimv2.config.objective import find_task
from aimv2.data.images.decode import ImageError, decode_image
from aimv2.data.images.readers import own_set
from aimv2.data.text.tokenizer import load_tokenizer
from aimv2.detect.build import get_tokenizer
from aimv2.errors import UsageError
from aimv2.features.foreign import open_transformers
from aimv2.features.pixels import read_processor
from aimv2.interop.openvino import OpenVINOEncoder
from aimv2.interop.plain import open_plain
from aimv2.report.charts import Line, Panel, draw_png
from aimv2.vlm.language import open_language
from aimv2.vlm.model import open_folder, open_processor

SOURCE = Path(aimv2.__file__).parent


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that planted code writes; checked at the end."""
    monkeypatch.setattr(builtins, "input", lambda *words: "y")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), path.read_text()


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.marker)!r}, 'w').write('a pickle')",)


def plant(folder: Path, marker: Path) -> None:
    """Every file that a class of transformers takes code from."""
    code = f"open({str(marker)!r}, 'a').write(__file__)\nfrom transformers import *\n"
    code += "\n".join(f"class {name}: pass" for name in ("Evil", "EvilFast"))
    (folder / "evil.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "\ndef generate(*args, **kwargs): pass\n")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(marker)))
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoImageProcessor", "AutoProcessor", "AutoBackbone")
    maps = {name: "evil.Evil" for name in names} | {"AutoTokenizer": ["evil.Evil", "evil.EvilFast"]}
    for name in ("config", "tokenizer_config", "preprocessor_config", "processor_config", "generation_config"):
        file = folder / f"{name}.json"
        about = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**about, "auto_map": maps, "custom_generate": str(folder)}))


def test_a_vision_model(tmp_path: Path, marker: Path) -> None:
    plant(folder := vit(tmp_path / "vit"), marker)
    model, missing = open_transformers("X", folder, "cpu")
    assert type(model).__module__.startswith("transformers.")
    assert not missing
    read_processor("X", folder, None, 32)
    configure(folder, model_type="evil")
    with pytest.raises(UsageError):
        open_transformers("X", folder, "cpu")


@pytest.mark.parametrize("how", ["index", "bin only"])
def test_a_pickle_in_the_place_of_weights(tmp_path: Path, marker: Path, how: str) -> None:
    plant(folder := vit(tmp_path / "vit"), marker)
    (folder / "model.safetensors").unlink()
    if how == "index":
        index = {"metadata": {}, "weight_map": {"embeddings.cls_token": "pytorch_model.bin"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="names pytorch_model.bin" if how == "index" else "can't open it"):
        open_transformers("X", folder, "cpu")
    with pytest.raises(Exception, match=r"safetensors|[Ww]eights"):
        open_plain("ViTModel", folder)


@pytest.mark.parametrize("name", ["evil/kernel", "kernels-community/flash-attn3:evil", "paged|evil/kernel"])
def test_attention_from_a_repository_is_refused(tmp_path: Path, name: str) -> None:
    folder = vit(tmp_path / "vit")
    configure(folder, parts=[{"attn_implementation": name}])
    with pytest.raises(UsageError, match="requires the attention"):
        open_transformers("X", folder, "cpu")


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch marker').read() }}",
    "{{ self.__init__.__globals__.__builtins__.open('marker', 'w') }}",
    "{% set x = messages.append(1) %}{{ raise_exception.__globals__ }}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_runs_in_a_sandbox(tmp_path: Path, marker: Path, template: str) -> None:
    folder = tiny_llm.language_model(tmp_path / "llm", template=template)
    assert (folder / "chat_template.jinja").read_text() == template
    try:
        found = open_language(str(folder), None, "auto")
    except UsageError:
        return
    assert "0x" not in found.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)


def test_a_language_model_and_its_tokenizer(tmp_path: Path, marker: Path) -> None:
    plant(folder := tiny_llm.language_model(tmp_path / "llm"), marker)
    assert type(open_language(str(folder), None, "auto").model).__module__.startswith("transformers.")
    load_tokenizer(str(folder))
    with pytest.raises(UsageError):
        get_tokenizer(folder)  # no BERT's
    open_plain("GenerationConfig", folder)


def test_a_vision_language_model(tmp_path: Path, marker: Path) -> None:
    plant(folder := tiny_llm.vlm(tmp_path), marker)
    (folder / "evil.py").rename(folder / "processing_evil.py")
    open_processor(folder)
    model, _ = open_folder(folder)
    assert type(model).__module__.startswith("transformers.")


def test_every_call_of_transformers_goes_through_one_function() -> None:
    """A new ``from_pretrained`` elsewhere could offer to run code at a prompt."""
    found = []
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                words = {one.arg: ast.unparse(one.value) for one in node.keywords}
                name = node.func.attr
                if name in ("from_pretrained", "from_config") and words.get("trust_remote_code") != "False":
                    found.append(f"{file.relative_to(SOURCE)}:{node.lineno}")
                if ast.unparse(node.func) in ("np.load", "numpy.load") and words.get("allow_pickle") != "False":
                    found.append(f"{file.relative_to(SOURCE)}:{node.lineno}")
    allowed = ("interop/plain.py", "interop/registration.py")  # options are set before; the user's own call
    assert [place for place in found if not place.startswith(allowed)] == []


@pytest.mark.parametrize("name", ["os.system", "evil", "aimv2.evil", "../evil", "evil:main"])
def test_a_recipe_names_no_code(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nTASK = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_task(name) is None
    recipe = tmp_path / "recipe.yaml"
    for text in ("x: !!python/object/apply:os.system [touch marker]", "x: !!python/name:evil.x"):
        recipe.write_text(text)
        with pytest.raises(UsageError):
            read_recipe(recipe)
    recipe.write_text("model: {class_path: evil.Evil, init_args: {}}\n")
    with pytest.raises(UsageError):
        api.pretrain(config=str(recipe), run=str(tmp_path / "run"))


def test_modules_in_the_working_folder(tmp_path: Path, marker: Path) -> None:
    for name in ("torch", "yaml", "numpy", "jsonargparse", "rich", "PIL", "sitecustomize", "evil"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write(__name__)\n")
    done = subprocess.run(
        [sys.executable, "-m", "aimv2", "models", "--json"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_settings_of_matplotlib_in_the_working_folder(tmp_path: Path, marker: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: true\nbackend: module://evil\n")
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    code = (
        "from pathlib import Path; from aimv2.report.charts import Panel, Line, draw_png\n"
        "import matplotlib; assert matplotlib.rcParams['text.usetex']\n"
        "draw_png([Panel('a_b', [Line('x', [1, 2], [1.0, 2.0])])], Path('a.png'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    draw_png([Panel("a_b", [Line("x", [1, 2], [1.0, 2.0])])], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_images_that_pillow_would_give_to_another_program(tmp_path: Path) -> None:
    """PostScript goes to Ghostscript; only formats of pictures are opened, whatever the name says."""
    with pytest.raises(ImageError):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(marker) (w) file\nshowpage\n")


def test_hdf5_shows_no_other_file(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(b"secret of this machine" * 8)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = np.arange(12)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["own"] = np.arange(12)
        file["link"] = h5py.ExternalLink("other.h5", "x")
        file["soft"] = h5py.SoftLink("/link")
        file.create_dataset("raw", (12,), "u1", external=[(str(tmp_path / "secret"), 0, 12)])
        layout = h5py.VirtualLayout((12,), "i8")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (12,))
        file.create_virtual_dataset("virtual", layout)
    with h5py.File(tmp_path / "a.h5", "r") as file:
        assert own_set(file, "own")[3] == 3
        assert bytes(file["raw"][:6]) == b"secret"  # why
        for name in ("link", "soft", "raw", "virtual"):
            with pytest.raises(ValueError, match="another file"):
                own_set(file, name)


def test_arrays_of_objects_are_not_read(tmp_path: Path, marker: Path) -> None:
    from aimv2.features.ragged import LENGTHS, open_ragged

    np.save(tmp_path / LENGTHS, np.array([Evil(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"objects|allow_pickle"):
        open_ragged(tmp_path, ["last"], 4, 1)
    torch.save(Evil(marker), tmp_path / "a.safetensors")
    with pytest.raises(UsageError):
        api.embed(str(tmp_path / "a.safetensors"), str(tmp_path), str(tmp_path / "out"))


def test_a_graph_of_openvino_with_an_operation_of_its_own(tmp_path: Path, marker: Path) -> None:
    pytest.importorskip("openvino")
    about = {"precision": "fp32", "patch_size": 8, "image_size": 16, "mean": [0, 0, 0], "std": [1, 1, 1]}
    (tmp_path / "openvino_config.json").write_text(json.dumps(about))
    (tmp_path / "openvino_model.bin").touch()
    (tmp_path / "plugins.xml").write_text('<ie><plugins><plugin name="CPU" location="evil.so"/></plugins></ie>')
    port = '<port id="0"><dim>1</dim></port>'
    (tmp_path / "openvino_model.xml").write_text(
        '<net name="x" version="11"><layers><layer id="0" name="a" type="Parameter" version="opset1">'
        f'<data shape="1" element_type="f32"/><output>{port}</output></layer>'
        f'<layer id="1" name="b" type="Evil" version="extension"><input>{port}</input></layer></layers>'
        '<edges><edge from-layer="0" from-port="0" to-layer="1" to-port="0"/></edges></net>'
    )
    with pytest.raises(UsageError, match="OpenVINO can't open"):
        OpenVINOEncoder(tmp_path)
