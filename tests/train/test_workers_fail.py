"""Data workers that are killed or hang end a run with one line, saved, and it resumes exactly."""

import errno
import multiprocessing
import os
import re
import resource
import signal
import time

import pytest
import torch

from aimv2.cli import main
from aimv2.data.stream import samples
from aimv2.data.stream.workers import Watched
from aimv2.errors import LOST, WorkerLost
from aimv2.interop.model_folder import checkpoints
from aimv2.train import interrupt
from aimv2.train.loop import Trainer
from forked import call_on_ranks
from runs import exact, options, resume, train

HOW = {"data__workers": 2, "train__steps": 12}


@pytest.fixture(scope="module")
def data(world):
    return world.scenes


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The figures of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(data, run, **HOW)
    return exact(run)


def at_step(monkeypatch, step, act):
    """Calls ``act(trainer, workers)`` when the figures of a step are written."""
    report = Trainer.report

    def acting(trainer, log):
        report(trainer, log)
        if trainer.step == step:
            act(trainer, trainer.watched.processes())

    monkeypatch.setattr(Trainer, "report", acting)


def ends(data, run, monkeypatch, capsys, code=LOST, **more):
    """Runs to its end by ``code``; the last line, and the step where it was saved."""
    assert main(options(data, run, **HOW, **more)) == code
    monkeypatch.undo()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(f"go on with: aimv2 pretrain --run {run} --resume")
    assert not multiprocessing.active_children()
    return line, int(re.search(r"saved at step (\d+);|stopped at step (\d+), saved", line)[0].split()[3].strip(";,"))


def goes_on(run, whole):
    resume(run)
    return exact(run) == whole


def test_killed_worker_is_named_and_nothing_is_lost(data, whole, tmp_path, monkeypatch, capsys):
    pids = []

    def kill(_, workers):
        pids.extend(worker.pid for worker in workers)
        os.kill(pids[1], signal.SIGKILL)

    at_step(monkeypatch, 5, kill)
    line, step = ends(data, tmp_path / "run", monkeypatch, capsys)
    assert (
        line.startswith(f"error: data worker 2 of 2 (process {pids[1]}) was killed (SIGKILL)")
        and "data.workers" in line
    )
    assert step >= 5
    assert goes_on(tmp_path / "run", whole)


def test_worker_killed_before_a_checkpoint(data, whole, tmp_path, monkeypatch, capsys):
    def kill(_, workers):
        workers[0].kill()
        workers[0].join()

    at_step(monkeypatch, 6, kill)
    line, step = ends(data, tmp_path / "run", monkeypatch, capsys, train__save_every=3)
    assert line.startswith("error: data worker 1 of 2") and step == 6
    assert goes_on(tmp_path / "run", whole)


def test_worker_that_hangs_in_a_decoder(data, whole, tmp_path, monkeypatch, capsys):
    decode, hang = samples.decode_image, tmp_path / "hang"

    def hanging(*args):
        while hang.exists():
            time.sleep(0.1)
        return decode(*args)

    def from_now_on(trainer, _):
        hang.touch()
        trainer.watched.timeout = 2.0

    monkeypatch.setattr(samples, "decode_image", hanging)
    at_step(monkeypatch, 4, from_now_on)
    line, step = ends(data, tmp_path / "run", monkeypatch, capsys)
    assert "hangs: nothing for 2 s at " in line and ".tar/" in line and "data.timeout" in line
    assert step >= 4
    assert goes_on(tmp_path / "run", whole)


def test_ctrl_c_while_a_worker_hangs(data, whole, tmp_path, monkeypatch, capsys):
    def stop(_, workers):
        os.kill(workers[0].pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(interrupt, "PATIENCE", 1.0)
    at_step(monkeypatch, 4, stop)
    _, step = ends(data, tmp_path / "run", monkeypatch, capsys, code=130)
    assert step == 4
    assert goes_on(tmp_path / "run", whole)


@pytest.mark.parametrize("handler", [False, True])
def test_no_room_for_a_batch(data, tmp_path, monkeypatch, capsys, handler):
    """Also where a loader that was made in the main thread has left torch's handler there, which raises amid our wait."""
    before = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    if handler:
        torch.utils.data._utils.signal_handling._set_SIGCHLD_handler()
    draw = samples.PairEncoder.draw

    def limited(*args):
        if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100:  # in the worker: what a full /dev/shm answers
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return draw(*args)

    monkeypatch.setattr(samples.PairEncoder, "draw", limited)
    assert main(options(data, tmp_path / "run", **HOW)) == LOST
    line = capsys.readouterr().err.splitlines()[-1]
    signal.signal(signal.SIGCHLD, before)
    assert "has no room in /dev/shm for a batch" in line and "nothing was to be saved yet" in line


def test_workers_that_started_before_one_could_not_are_ended(monkeypatch):
    """They ignore the signal that Python sends at exit, and a process that used the package would wait for them."""
    start, started = multiprocessing.process.BaseProcess.start, []

    def refused(process):
        if started:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        started.append(process)
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refused)
    watched = Watched(torch.utils.data.DataLoader(range(8), num_workers=2), 2)
    with pytest.raises(WorkerLost, match="have no room in /dev/shm to start"):
        next(watched)
    started[0].join(20)
    assert started[0].exitcode == -signal.SIGKILL
    watched.close()


def lose_on_rank_1(words, hang, folder):
    """In a rank: a worker of the second one ends or hangs at step 3. Notes its code; where both end by themselves it waits
    for the other's, since the first that ends has the other one ended, as torchrun does."""

    def lose(trainer, workers):
        if trainer.world.rank == 1 and hang:
            os.kill(workers[0].pid, signal.SIGSTOP)
            trainer.watched.timeout = 2.0
        elif trainer.world.rank == 1:
            workers[0].kill()
            workers[0].join()

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, lose)
        code = main(words)
    (folder / f"code-{os.environ['RANK']}").write_text(str(code))
    until = time.monotonic() + 60
    while not hang and len(list(folder.glob("code-*"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    os._exit(code)


def ends_of_ranks(data, run, hang):
    """What they said, and their codes, as far as they were not ended; they must end."""
    with pytest.raises(AssertionError) as ended:
        call_on_ranks(2, lose_on_rank_1, options(data, run, **{**HOW, "data__workers": 1}), hang, run.parent)
    assert "Traceback" not in str(ended.value)
    return str(ended.value), {file.name: int(file.read_text()) for file in run.parent.glob("code-*")}


def test_two_ranks_save_and_end_together(data, tmp_path):
    said, codes = ends_of_ranks(data, tmp_path / "run", hang=False)
    assert "error: data worker 1 of 1" in said and "saved at step 3; go on with" in said
    assert codes == {"code-0": LOST, "code-1": LOST}
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [3]


def test_a_rank_that_is_amid_a_step_ends_with_the_other(data, tmp_path):
    said, codes = ends_of_ranks(data, tmp_path / "run", hang=True)
    assert "error: data worker 1 of 1" in said and "(it is stopped)" in said and "nothing was to be saved yet" in said
    assert codes["code-1"] == LOST and codes.get("code-0") != 0


def test_signal_while_it_compiles(data, whole, tmp_path, monkeypatch, capsys):
    def signalled(*args, **how):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it compiles on")

    run = tmp_path / "run"
    monkeypatch.setattr("aimv2.train.compiling.warm_up", signalled)
    monkeypatch.setattr("aimv2.train.compiling.want_compile", lambda train, world: (True, None))
    assert main(options(data, run, **HOW, train__compile="auto")) == 143
    monkeypatch.undo()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"stopped while compiling, after step 0; go on with: aimv2 pretrain --run {run} --resume"
    resume(run, train__compile="off")
    assert exact(run) == whole
