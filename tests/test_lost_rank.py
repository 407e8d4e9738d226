"""An error of torch's process groups that says that another rank has gone is one line; any other error stays as it is."""

from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import pytest
import torch.distributed as dist

from aimv2.cli import dispatch

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3690, "


def raised(kind: type[Exception], text: str) -> Callable[[list[str]], NoReturn]:
    def fail(words: list[str]) -> NoReturn:
        raise kind(text)

    return fail


def a_store_that_has_gone(words: list[str]) -> NoReturn:
    store = dist.TCPStore("127.0.0.1", 0, 1, True)
    store.set_timeout(timedelta(milliseconds=50))
    store.get("of a rank that does not come")
    raise AssertionError


LOST = {
    "gloo": raised(
        RuntimeError,
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:53",
    ),
    "gloo, reset": raised(
        RuntimeError,
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Read error [::1]:1: Connection reset by peer",
    ),
    "nccl, remote": raised(
        dist.DistBackendError,
        NCCL
        + "remote process exited or there was a network error, NCCL version 2.29.3\nncclRemoteError: A call failed "
        "possibly due to a network error or a remote process exiting prematurely.\nLast error:\nsocketProgress: Connection "
        "closed by remote peer node-1<40042>",
    ),
    "nccl, system": raised(dist.DistBackendError, NCCL + "unhandled system error\nncclSystemError: System call failed"),
    "nccl, aborted": raised(dist.DistBackendError, "NCCL communicator was aborted on rank 1."),
    "network": raised(dist.DistNetworkError, "The client socket has timed out after 600000ms while trying to connect"),
    "store": a_store_that_has_gone,
}
OTHERS = {
    "nccl, own mistake": raised(
        dist.DistBackendError, NCCL + "invalid usage\nncclInvalidUsage\nDuplicate GPU detected : rank 0 and rank 1"
    ),
    "nccl, own device": raised(
        dist.DistBackendError, NCCL + "unhandled cuda error\nncclUnhandledCudaError: out of memory"
    ),
    "another error": raised(RuntimeError, "the file gloo.txt has gone"),
    "another kind": raised(KeyError, "/gloo/"),
}


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.parametrize("kind", LOST)
def test_a_lost_rank_is_one_line(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dispatch, "dispatch", LOST[kind])
    assert dispatch.main(["pretrain"]) == 1
    assert capsys.readouterr().err == "rank 1 ends: the connection to another rank is lost\n"


@pytest.mark.parametrize("kind", OTHERS)
def test_other_errors_stay(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "dispatch", OTHERS[kind])
    with pytest.raises((RuntimeError, KeyError)):
        dispatch.main(["pretrain"])


def test_one_process_has_no_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(dispatch, "dispatch", LOST["gloo"])
    with pytest.raises(RuntimeError):
        dispatch.main(["pretrain"])
