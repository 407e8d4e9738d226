"""What is installed is whole: a wheel, unpacked elsewhere, runs the commands that read files of the package."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from urllib.parse import urljoin

import pytest

from runs import TINY

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index"]
SMALL = " ".join(f"--{key} {value}" for key, value in {**TINY, "eval.probe": False}.items())
# what a user types, in a folder that holds nothing
LINES = f"""\
recipes
recipes flickr8k-tiny
pretrain --config flickr8k-tiny --print-config
run chain-tiny --status
pretrain --run demo {SMALL}
report demo --out page.html --images 2
data browse --count 4 {SMALL}
data shapes scenes --count 300
knn demo --data scenes --out knn
compare knn --plot knn.png
models
"""
SCRIPT = """
import shlex, sys
import aimv2
from aimv2.cli import main
from aimv2.train import launch
assert aimv2.__file__.startswith(sys.argv[1]), aimv2.__file__
launch.DEMO_SCENES = 120
for line in sys.argv[2].splitlines():
    print(f"$ {line}", flush=True)
    if code := main(shlex.split(line)):
        sys.exit(f"{line}: {code}")
"""
EXPLORER = """
import sys
import aimv2
from aimv2.cli import main
from aimv2.models.create import create_model
assert aimv2.__file__.startswith(sys.argv[1]), aimv2.__file__
aimv2.save_pretrained(create_model("aimv2-tiny-patch8-32", width=16, heads=2, hidden=16, depth=1), "model")
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built without network and without a trace in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "places.cfg").write_text(f"[build]\nbuild_base = {folder}/build\n[egg_info]\negg_base = {folder}\n")
    build = [*PIP, "wheel", "--no-build-isolation", *OFFLINE, "--wheel-dir", folder, ROOT]
    env = {**os.environ, "DIST_EXTRA_CONFIG": str(folder / "places.cfg")}
    subprocess.run(build, check=True, env=env, timeout=240)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that it is installed into."""
    folder = tmp_path_factory.mktemp("elsewhere") / "site"
    subprocess.run([*PIP, "install", *OFFLINE, "--target", folder, wheel], check=True, timeout=240)
    return folder


@pytest.fixture
def env(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of a user of that folder, in an empty one."""
    monkeypatch.chdir(tmp_path)
    return {**os.environ, "PYTHONPATH": str(site)}


def test_a_wheel_holds_every_file(wheel: Path) -> None:
    sources = [path for path in (ROOT / "src" / "aimv2").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    wanted = {path.relative_to(ROOT / "src").as_posix() for path in sources}
    wanted |= {f"aimv2/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").rglob("*.yaml")}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == wanted


def test_what_is_installed_runs_from_an_empty_folder(site: Path, env: dict[str, str], tmp_path: Path) -> None:
    words = [sys.executable, "-c", SCRIPT, str(site), LINES]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    said = dict(zip(LINES.splitlines(), re.split(r"^\$ .*\n", done.stdout, flags=re.MULTILINE)[1:], strict=True))
    assert said["recipes flickr8k-tiny"] == (ROOT / "recipes" / "flickr8k-tiny.yaml").read_text()
    assert "stages-cifar10" in said["recipes"] and "to do" in said["run chain-tiny --status"]
    assert "demo" in said["compare knn --plot knn.png"] and (tmp_path / "knn.png").is_file()
    for page in ("page.html", "browse.html"):
        text = (tmp_path / page).read_text()
        assert "<style>" in text and "</html>" in text


def test_the_installed_explorer_serves_its_page(site: Path, env: dict[str, str]) -> None:
    words = [sys.executable, "-c", EXPLORER, str(site), *shlex.split("explore model --port 0 --device cpu")]
    with subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True) as started:
        try:
            assert started.stderr
            said = ""
            while not (found := re.search(r"^explorer: (http://\S+)", said, flags=re.MULTILINE)):
                line = started.stderr.readline()
                assert line, said  # it ended
                said += line
            url = found[1]
            page = fetched(url)
            files = re.findall(r'<(?:link|script)[^>]+(?:href|src)="(/[^"]+)"', page)
            assert len(files) >= 2 and all(fetched(urljoin(url, file)) for file in [*files, "/api/images"])
            started.send_signal(signal.SIGINT)
            assert started.wait(60) == 130
        finally:
            started.kill()


def fetched(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read().decode()
