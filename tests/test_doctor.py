"""The doctor on this machine: all parts tried for real, and each kind of trouble told with what to do about it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

from aimv2 import api
from aimv2.cli import main
from aimv2.commands.render import render as show
from aimv2.doctor import kernels, machine, selftest
from aimv2.doctor.check import Check
from aimv2.doctor.packages import install_line, requirements
from aimv2.interop import load

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
GROUPS = ["versions", "devices", "kernels", "hub", "disk", "distributed", "self-test"]


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """Everything, once."""
    return api.doctor()


def found(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(check for check in result["checks"] if check["name"] == name)


# ---- all of it ----


def test_nothing_fails_where_the_tests_run(result: dict[str, Any]) -> None:
    assert list(dict.fromkeys(check["group"] for check in result["checks"])) == GROUPS
    assert result["failed"] == 0, [check for check in result["checks"] if check["status"] == "fail"]
    assert result["warned"] == sum(check["status"] == "warn" for check in result["checks"])
    for check in result["checks"]:
        assert check["found"] and "\n" not in check["found"] + check["advice"]
        assert bool(check["advice"]) == (check["status"] in ("warn", "fail"))
    first, last = map(float, re.match(r"([\d.]+) to ([\d.]+)", found(result, "loss")["found"]).groups())  # type: ignore[union-attr]
    assert last < 0.6 * first
    assert int(found(result, "speed")["found"].partition(" ")[0].replace(",", "")) > 1
    assert found(result, "math")["found"].startswith("forward and backward")
    assert 0 < found(result, "saved and loaded")["seconds"] < result["seconds"] < 120


def test_it_fits_80_columns(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    show("doctor", result)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for check in result["checks"]:
        assert any(re.match(rf"{check['status']} +{re.escape(check['name'])}  ", line) for line in lines), check


def test_every_package_of_the_project_is_looked_for(result: dict[str, Any]) -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    names = [re.split(r"[<>=\[; ]", line)[0] for line in project["dependencies"]]
    assert {name for name, _, _ in requirements()[""]} <= set(names)  # an older installation may lack the newest
    said = found(result, "dependencies")["found"]
    assert all(name in said for name, _, _ in requirements()[""] if name != "torch")
    for extra in set(requirements()) - {""}:
        check = found(result, f"extra {extra}")
        absent = [name for name, _, version in requirements()[extra] if version is None]
        assert (check["status"] == "off") == bool(absent or not requirements()[extra])
        assert not absent or f"pip install 'aimv2[{extra}]'" in check["found"]


def test_quick_leaves_the_run_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    told = json.loads(out)
    assert list(dict.fromkeys(check["group"] for check in told["checks"])) == GROUPS[:-1]


def test_exit_code_1_where_something_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "PYTHON", (9, 9))
    assert main(["doctor", "--quick"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^fail  python ", out, re.MULTILINE)
    assert "fail: python: use Python 9.9 or newer" in out and "1 failed" in out


# ---- its parts ----


def one(checks: Iterator[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_a_dependency_that_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {
        "": [("torch", ">=99", "2.1"), ("nowhere", ">=1", None), ("rich", "", "9.0")],
        "ui": [("starlette", ">=9", "1.0")],
    }
    monkeypatch.setattr(machine, "requirements", lambda: asked)
    checks = {check.name: check for check in machine.versions()}
    assert (checks["torch"].status, checks["torch"].advice) == ("fail", "pip install 'torch>=99'")
    assert (checks["nowhere"].found, checks["nowhere"].advice) == ("missing", "pip install 'nowhere>=1'")
    assert checks["dependencies"].found == "rich 9.0"
    assert (checks["extra ui"].status, checks["extra ui"].advice) == ("warn", "pip install 'aimv2[ui]'")


def test_how_a_missing_module_is_installed() -> None:
    assert install_line("faiss") == "pip install 'aimv2[faiss]'"
    assert install_line("yaml") == "pip install 'pyyaml>=6.0'"
    assert install_line("sklearn.linear_model") == "pip install 'scikit-learn>=1.6'"
    assert install_line("nowhere") is None


class Answers(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(503)  # busy, but there
        self.end_headers()

    def log_message(self, *words: Any) -> None:
        pass


def test_the_hub_in_each_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert one(machine.hub(), "model hub").status == "ok"
    server.shutdown()
    server.server_close()
    refused = one(machine.hub(), "model hub")
    assert refused.status == "warn" and constants.HF_HUB_CACHE in refused.advice
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes a connection and says nothing
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(machine, "HUB_TIMEOUT", 0.3)
        waited = one(machine.hub(), "model hub")
        assert waited.status == "warn" and "no answer within 0.3 s" in waited.found
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        asked = one(machine.hub(), "model hub")
        assert asked.status == "off" and "HF_HUB_OFFLINE" in asked.found


def test_a_disk_that_is_nearly_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "there" / "yet"))
    before = {check.name: check for check in machine.disk()}
    assert str(tmp_path) in before["working folder"].found and not (tmp_path / "not").exists()
    monkeypatch.setattr(machine, "FREE", dict.fromkeys(machine.FREE, 1e9))
    full = {check.name: check for check in machine.disk()}
    assert all(check.status == "warn" for check in full.values())
    assert "--run" in full["working folder"].advice and "HF_HOME" in full["hub cache"].advice
    assert "data.workers=0" in full["shared memory"].advice or not Path("/dev/shm").is_dir()


def test_a_process_group_is_joined_and_left() -> None:
    assert one(machine.distributed(), "gloo (CPU)").status == "ok"
    assert not torch.distributed.is_initialized()


def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v


def only_forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.requires_grad:
        raise NotImplementedError("no backward pass\nand more lines")
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("attend", "status", "said"), [(wrong, "fail", "differs from plain"), (only_forward, "fail", "no backward pass")]
)
def test_attention_that_does_not_work(
    monkeypatch: pytest.MonkeyPatch, attend: Callable[..., Tensor], status: str, said: str
) -> None:
    every = kernels.backends()
    monkeypatch.setattr(kernels, "backends", lambda: {**every, "math": attend, "flex": attend})
    math, flex = one(kernels.attention(), "math"), one(kernels.attention(), "flex")
    assert math.status == status and said in math.found and "\n" not in math.found
    assert flex.status == "off", "what has a substitute is no failure"
    assert flex.found.startswith("only forward" if attend is only_forward else "not on")


WITHOUT_COMPILER = """
from torch._inductor import config
config.cpp.cxx = ("/nowhere/c++",)
from aimv2.doctor import kernels
check = kernels.compiled()
print(check.status, "|", check.advice)
"""


def test_no_compiler(tmp_path: Path) -> None:
    """In a process of its own: a compiler that was not found is remembered by torch, and later tests would go without."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True, env=env, check=True
    )
    status, advice = ended.stdout.strip().splitlines()[-1].split(" | ")
    assert status == "warn" and "g++" in advice and "/nowhere" not in advice


# ---- the tiny run ----


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of two lines of metrics, whose values may be changed."""
    values = {**selftest.VALUES, "train.steps": 20}
    monkeypatch.setattr(selftest, "VALUES", values)
    return values


def test_a_model_that_does_not_learn(short: dict[str, Any]) -> None:
    short["optim.lr"] = short["optim.min_lr"] = short["optim.start_lr"] = 1e-9
    checks = {check.name: check for check in selftest.self_test()}
    assert checks["loss"].status == "fail" and "report it" in checks["loss"].advice
    assert checks["saved and loaded"].status == "ok"


def test_a_model_that_comes_back_changed(short: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = load.load_model

    def spoilt(*words: Any, **more: Any) -> Any:
        model = real(*words, **more)
        next(model.parameters()).data += 1e-3
        return model

    monkeypatch.setattr(load, "load_model", spoilt)
    check = one(selftest.self_test(), "saved and loaded")
    assert check.status == "fail" and "features differ by" in check.found


def test_a_run_that_cannot_start(short: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    short["model.heads"] = 3
    (check,) = selftest.self_test()
    assert (check.status, check.name) == ("fail", "a tiny run") and "UsageError: model.width 64" in check.found
    assert capsys.readouterr() == ("", "")
