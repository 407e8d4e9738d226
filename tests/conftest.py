"""What several test modules need."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# tiny matmuls: threads that wait for each other cost ten times what they do; read by torch as it is imported, and by children
os.environ["OMP_NUM_THREADS"] = "1"
import torch

if TYPE_CHECKING:
    from world import TinyWorld

# left out by `make check`; the longest first
LONGEST = (
    "docs/test_doc_runs_others.py",
    "docs/test_doc_runs.py",
    "train/test_soak.py",
    "vlm/test_vlm_train.py",
    "train/test_resume.py",
    "report/test_report_page.py",
    "train/test_ranks.py",
    "train/test_relayout.py",
    "train/test_workers_fail.py",
    "train/test_same_run.py",
    "train/test_contrastive.py",
    "docs/test_notebooks.py",
    "test_chain.py",
    "train/test_compiled.py",
    "train/test_distill.py",
    "train/test_lora.py",
    "train/test_cooldown.py",
    "test_terminal.py",
    "test_wheel.py",
    "test_recipes.py",
    "train/test_ablation_runs.py",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)  # where a plugin had imported it before
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # `make test &` in a script: children could not be stopped
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.backends.cudnn.allow_tf32 = False  # on a GPU: fp32 convolutions as exact as on a CPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that two workers end together; their tests are marked slow."""
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONGEST)}
    for item in items:
        if item.path in place:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: place.get(item.path, len(place)))  # stable: others stay as they are


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with CIFAR-10 shards and captioned photographs beside the project; skipped where it is absent."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"{folder} is expected when CI is set")
        pytest.skip(f"no data in {folder}")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indices of shards stay out of the user's cache, those of fixtures too; no data set is picked up from the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.delenv("AIMV2_DATA", raising=False)
        yield


@pytest.fixture(scope="session")
def session_world(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> "TinyWorld":
    """See :class:`world.TinyWorld`; tests take the fixture ``world``."""
    from world import of_session

    return of_session(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def world(session_world: "TinyWorld", request: pytest.FixtureRequest) -> "Iterator[TinyWorld]":
    """Shards, a finished run and a model that all tests share; fails after a file that changed them."""
    yield session_world
    session_world.check(request.node.name)


@pytest.fixture
def forked_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages of a chain that runs in this process are forked: each is spared the seconds of its imports."""
    from forked import fork_stages

    fork_stages(monkeypatch)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, one for a whole file; skipped where there is none, but never when CI is set."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        why = f"no browser ({', '.join(BROWSERS)})"
        if os.environ.get("CI"):
            pytest.fail(f"{why}; .ci/run installs one")
        pytest.skip(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()
