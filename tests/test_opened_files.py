"""Files of others are opened in one place, which waits for no pipe: every reader with a pipe under the name of its file."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import aimv2
from aimv2.io import open_file

SOURCE = Path(aimv2.__file__).parent
PIPE = "no regular file, but a pipe, a device or a socket"
NATIVE = {
    "load", "memmap", "open_memmap", "memory_map", "ParquetFile", "read_schema", "read_metadata", "read_table", "loadmat",
    "safe_open", "load_file", "ZipFile", "from_file", "parse",
}  # fmt: skip
OWNERS = ("np", "numpy", "pyarrow", "pq", "parquet", "tokenizers", "ElementTree", "h5py", "zipfile", "np.lib.format")
# where a file is opened directly, and why it may be
DIRECT = {
    "io.py": "open_file itself; memory of the system",
    "cli/dispatch.py": "the null device",
    "data/shards/index.py": "offsets, with the same checks and O_NOFOLLOW",
    "data/shards/tars.py": "its own copy of a tar that open_file has opened",
    "data/stream/workers.py": "/proc",
    "data/text/encoding.py": "once more, after open_file",
    "doctor/machine.py": "/proc and /sys",
    "doctor/selftest.py": "the run that it has just written",
    "evals/after_training.py": "features that it has just written",
    "evals/compare.py": "a file of the package",
    "evals/vlm/benchmarks.py": "files of the package",
    "explorer/server.py": "files of the package",
    "interop/rendering.py": "/proc",
    "pipeline/work.py": "the lock, opened to be written",
    "report/page.py": "a file of the package",
    "train/lines.py": "metrics, opened to be appended to",
    "train/lock.py": "the lock, opened to be written",
    "train/sealing.py": "flushes what it has written",
}

# {case: statement}; PIPE is the name of a pipe, FOLDER a folder that holds one under the name of the file
READERS = {
    "text": "from aimv2.data.text.encoding import text_lines; list(text_lines(PIPE))",
    "json": "from aimv2.interop.shapes import read_json; from aimv2.io import read_file; read_file(PIPE)",
    "pickle-cifar": "from aimv2.data.datasets.cifar import load_pickle; load_pickle(PIPE)",
    "pickle-refs": "from aimv2.data.images.box_folders import open_refs; open_refs(PIPE, None)",
    "parquet": "from aimv2.data.images.tables import table_shape; table_shape(PIPE.rename(PIPE.with_suffix('.parquet')))",
    "arrow": "from aimv2.data.images.tables import table_shape; table_shape(PIPE.rename(PIPE.with_suffix('.arrow')))",
    "reference-tables": "from aimv2.data.images.box_folders import open_ref_tables; "
    "open_ref_tables([PIPE.rename(PIPE.with_suffix('.parquet'))], None)",
    "matlab": "from aimv2.data.images.forms import read_matrix; read_matrix(PIPE, 'x')",
    "hdf5": "from aimv2.data.images.readers import HDF5Images; HDF5Images(PIPE)(0)",
    "tar": "from aimv2.data.shards.tars import open_tar; open_tar(PIPE)",
    "pointer": "from aimv2.io import is_pointer, regular; assert not is_pointer(PIPE); regular(PIPE)",
    "template": "from aimv2.vlm.language import read_template; read_template('x', None, str(PIPE))",
    "result": "from aimv2.evals.result import read_result; read_result(str(PIPE))",
    "hash": "from aimv2.features.fingerprint import file_hash; file_hash(PIPE)",
    "tokenizer": "from aimv2.data.text.tokenizer import _from_file; _from_file(PIPE, None, 'x', 'data.tokenizer')",
    "weights": "from aimv2.interop.load import Weights; Weights([PIPE]).__enter__()",
    "array": "from aimv2.features.store import regular; regular(PIPE)",
    "list": "from aimv2.train.sealing import LIST, listed; PIPE.rename(PIPE.with_name(LIST)); listed(PIPE.parent)",
    "metadata": "from aimv2.train.plain_reader import PlainReader; PIPE.rename(PIPE.with_name('.metadata')); "
    "PlainReader(PIPE.parent).read_metadata()",
    "rank": "from aimv2.train.plain_state import read_pickled; read_pickled(PIPE)",
    "trainer": "from aimv2.train.checkpoint import read_about; (PIPE.parent / 'state').mkdir(); "
    "PIPE.rename(PIPE.parent / 'state' / 'trainer.json'); read_about(PIPE.parent)",
    "recipe": "from aimv2.config.recipes import head_lines; head_lines(PIPE)",
    "templates": "from aimv2.evals.templates import _read_json; _read_json(PIPE, '--templates', None)",
    "flickr": "from aimv2.data.images.box_folders import _flickr_picture; (PIPE.parent / 'Annotations').mkdir(); "
    "PIPE.rename(PIPE.parent / 'Annotations' / 'a.xml'); _flickr_picture(PIPE.parent, PIPE.parent / 'a.txt', '')",
    "yolo": "from aimv2.data.images.box_folders import open_yolo; open_yolo(PIPE, None)",
    **{
        f"import-{name}": f"command('data', 'import', PIPE.rename(PIPE.with_name({name!r})).parent, 'out')"
        for name in ("captions.csv", "captions.jsonl", "captions.json", "captions.txt", "a.txt", "a.json")
    },
    "import-refs": "command('data', 'import', PIPE.rename(PIPE.with_name('train.parquet')).parent, 'out', '--boxes', 'true')",
    "check": "command('data', 'check', PIPE.rename(PIPE.with_name('s.tar')))",
    "compare": "command('compare', PIPE)",
    "embed": "(PIPE.parent / 'config.json').write_text('{}'); command('embed', PIPE.rename(PIPE.with_name("
    "'model.safetensors')).parent, 'images', 'out')",
}  # fmt: skip
CHILD = """
import contextlib, io, os, sys, traceback
from pathlib import Path

def command(*words):
    from aimv2.cli.dispatch import main
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main([str(word) for word in words])
    raise OSError(f"{code} {said.getvalue()}")

for line in sys.stdin:
    case, _, statement = line.rstrip("\\n").partition("\\t")
    os.makedirs(case)
    PIPE = Path(case).absolute() / "pipe"
    os.mkfifo(PIPE)
    print(f"{case}\\t", end="", flush=True)
    try:
        exec(statement)
        print("nothing", flush=True)
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split()), flush=True)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """{case: the error}, of one process; a case that waits ends it, and has none."""
    pytest.importorskip("scipy"), pytest.importorskip("h5py")
    lines = "".join(f"{case}\t{statement}\n" for case, statement in READERS.items())
    home = tmp_path_factory.mktemp("pipes")
    try:
        done = subprocess.run(
            [sys.executable, "-c", CHILD],
            input=lines,
            capture_output=True,
            text=True,
            timeout=100,
            cwd=home,
            check=False,
        )
        text = done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode()
    return {case: error for case, _, error in (line.partition("\t") for line in text.splitlines())}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
@pytest.mark.parametrize("case", READERS)
def test_a_pipe_is_one_line(said: dict[str, str], case: str) -> None:
    assert said.get(case), f"waits; before it: {list(said)[-2:]}"
    kind, _, message = said[case].partition(" ")
    assert kind in ("OSError", "UsageError", "ImageError", "ValueError", "UnpicklingError", "FileNotFoundError"), said[
        case
    ]
    assert PIPE in message


def direct(tree: ast.AST) -> list[ast.Call]:
    """Calls that open a file by its name to be read, other than through ``aimv2.io``."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, first = ast.unparse(call.func), ast.unparse(call.args[0]) if call.args else ""
        owner, _, last = name.rpartition(".")
        given = [
            one.value for one in (*call.args, *(more.value for more in call.keywords)) if isinstance(one, ast.Constant)
        ]
        if {"w", "w+", "wb", "a", "ab"} & set(map(str, given)) or name in ("webbrowser.open", "torch.load"):
            continue
        native = (last in NATIVE and (owner in OWNERS or (not owner and last not in ("parse", "load")))) or name in (
            "Image.open",
            "h5py.File",
        )
        if (
            name in ("open", "os.open")
            or last in ("read_text", "read_bytes")
            or (
                last == "open"
                and ({"r", "rb"} & set(map(str, given)) or "encoding" in [more.arg for more in call.keywords])
            )
            or (native and not first.startswith(("regular(", "str(regular(", "io.BytesIO(")))
        ):
            found.append(call)
    return found


def test_a_folder_is_named_and_leaves_nothing_open(tmp_path: Path) -> None:
    most = os.dup(0)
    os.close(most)
    for _ in range(3):
        with pytest.raises(IsADirectoryError) as caught:
            open_file(tmp_path)
        assert caught.value.filename == str(tmp_path)
    free = os.dup(0)
    os.close(free)
    assert free == most


def test_files_are_opened_in_one_place() -> None:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        if calls := direct(ast.parse(path.read_text(encoding="utf-8"))):
            found[path.relative_to(SOURCE).as_posix()] = [f"{call.lineno}: {ast.unparse(call)}" for call in calls]
    assert {name: lines for name, lines in found.items() if name not in DIRECT} == {}
    assert set(DIRECT) - set(found) == set()


@pytest.mark.parametrize(
    "source",
    ["open(a)", "open(a, 'rb')", "Path(a).read_text()", "a.read_bytes()", "a.open('rb')", "a.open(encoding='utf-8')", "np.load(a)",
     "pyarrow.memory_map(str(a))", "h5py.File(a, 'r')", "Image.open(a)", "safe_open(a, 'pt')", "ElementTree.parse(a)"],
)  # fmt: skip
def test_the_search_finds(source: str) -> None:
    assert direct(ast.parse(source))
