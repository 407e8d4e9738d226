"""`aimv2 run`: a chain of real tiny stages, run, run again, interrupted, made stale in every way, and written wrongly."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from aimv2 import api
from aimv2.cli import main
from aimv2.commands.run import EPILOG as EXAMPLE
from aimv2.errors import UsageError
from aimv2.evals.compare import METRICS
from aimv2.pipeline import report
from aimv2.pipeline.read import read_chain
from aimv2.pipeline.state import look
from forked import fork_stages
from runs import TINY, command, exact, scenes

CHAINS = sorted((Path(__file__).parents[1] / "recipes" / "chains").glob("*.yaml"))
TINY_CHAIN = CHAINS[[path.stem for path in CHAINS].index("chain-tiny")]
STAGES = ["scenes", "base", "high", "after"]
Tree = dict[str, Any]


def write(folder: Path, tree: Tree) -> str:
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)


def twin(folder: Path) -> Tree:
    """recipes/chains/chain-tiny.yaml with the smallest model, a recipe of its own, and labelled images from outside."""
    tree = yaml.safe_load(TINY_CHAIN.read_text())
    stages = tree["stages"]
    del stages["before"]
    stages["scenes"]["options"]["count"] = 60
    for name, steps in (("base", 6), ("high", 60)):
        stages[name]["options"] |= {**TINY, "train.steps": steps, "model.image_size": 32}
    (folder / "recipe.yaml").write_text("optim:\n  warmup: 3  # ours\n")
    stages["base"]["config"] = str(folder / "recipe.yaml")
    del stages["base"]["options"]["optim.warmup"]
    stages["after"]["options"] = {"data": "{data}", "k": "5", "layers": "last"}
    return {**tree, "out": str(folder / "out"), "data": str(folder / "labelled")}


def run_chain(*words: str) -> subprocess.CompletedProcess[str]:
    """``aimv2 run`` in this process, its stages forked."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        fork_stages(patch)
        code = main(["run", *words])
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tree, subprocess.CompletedProcess[str]]:
    """A folder with a chain that ran to its end, what its file says, and what the command printed."""
    folder = tmp_path_factory.mktemp("chain")
    scenes(folder / "labelled", 400)  # each of the 24 labels has an image
    tree = twin(folder)
    return folder, tree, run_chain(write(folder, tree), "--json")


@pytest.fixture
def copy(whole: tuple[Path, Tree, Any], tmp_path: Path) -> tuple[Path, Tree]:
    """The finished chain somewhere else, to be changed."""
    shutil.copytree(whole[0], tmp_path / "copy")
    tree = json.loads(json.dumps(whole[1]))
    tree |= {"out": str(tmp_path / "copy" / "out"), "data": str(tmp_path / "copy" / "labelled")}
    return tmp_path / "copy", tree


def states(told: Tree) -> dict[str, str]:
    return {row["stage"]: row["state"] for row in told["stages"]}


def reasons(told: Tree) -> dict[str, str]:
    return {row["stage"]: row["why"] for row in told["stages"]}


def status(folder: Path, tree: Tree) -> Tree:
    return api.run(write(folder, tree), status=True)


# ---- from nothing to a report ----


def test_a_chain_runs_and_prints_one_object(whole: tuple[Path, Tree, Any]) -> None:
    folder, _, ran = whole
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("\n") and ran.stdout.count("\n") == 1
    told = json.loads(ran.stdout)
    assert told == json.loads((folder / "out" / "report.json").read_text())
    assert told["finished"] and states(told) == dict.fromkeys(STAGES, "done")
    for name in STAGES:  # what a stage says carries its name; the chain says which one runs
        assert f", {name} (" in ran.stderr
    assert "base | run " in ran.stderr and "high | step 60/60 loss " in ran.stderr
    by_stage = {row["stage"]: row["figures"] for row in told["stages"]}
    summary = json.loads((folder / "out" / "high" / "summary.json").read_text())
    assert by_stage["high"]["val_text_loss"] == summary["val_text_loss"]
    result = json.loads((folder / "out" / "after" / "result.json").read_text())
    assert by_stage["after"] == {"top1": result["figures"]["top1"]}
    assert result["model"]["name"].startswith(str(folder / "out" / "high"))


def test_a_stage_keeps_what_made_it(whole: tuple[Path, Tree, Any]) -> None:
    folder, tree, _ = whole
    records = {name: json.loads((folder / "out" / name / "stage.json").read_text()) for name in STAGES}
    high, after = records["high"], records["after"]
    assert high["command"][:2] == ["aimv2", "pretrain"] and "--train.steps=60" in high["command"]
    assert high["options"]["init"] == str(folder / "out" / "base") and high["asked"]["init"] == "{base}"
    assert high["inputs"]["stage base"]["hash"] == records["base"]["output"]
    assert after["inputs"]["data {data}"]["path"] == tree["data"]
    assert records["base"]["recipe"] == {"optim.warmup": 3}
    assert high["result"]["step"] == 60 and high["seconds"] > 0 and high["version"]
    start = api.pretrain(str(folder / "recipe.yaml"), None, {"data.train": tree["data"]}, print_config=True)
    assert start["config"]["optim.warmup"] == 3


def test_the_second_run_does_nothing(whole: tuple[Path, Tree, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder, tree, _ = whole
    before = {path: path.stat().st_mtime_ns for name in STAGES for path in (folder / "out" / name).rglob("*")}
    assert api.run(write(folder, tree))["finished"]
    assert capsys.readouterr().err == "all stages are done\n"
    assert before == {path: path.stat().st_mtime_ns for name in STAGES for path in (folder / "out" / name).rglob("*")}


def test_tables_fit_and_status_runs_nothing(
    whole: tuple[Path, Tree, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, tree, _ = whole
    assert main(["run", write(folder, tree), "--status"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 and all(name in out for name in STAGES)
    markdown = (folder / "out" / "report.md").read_text()
    assert "| stage | seed | verb | state | s | figures |" in markdown and "| after: after it |" in markdown
    assert set(states(api.run(write(folder, tree), out=str(tmp_path / "new"), status=True)).values()) == {"to do"}
    assert not (tmp_path / "new").exists()


def test_a_chain_can_be_moved(copy: tuple[Path, Tree], whole: tuple[Path, Tree, Any]) -> None:
    folder, tree = copy
    assert set(states(status(folder, tree)).values()) == {"done"}


# ---- stopped in the middle ----


def test_interrupted_in_the_middle_it_goes_on_and_ends_the_same(
    copy: tuple[Path, Tree], whole: tuple[Path, Tree, Any]
) -> None:
    folder, tree = copy
    for name in ("high", "after"):
        shutil.rmtree(folder / "out" / name)
    path = write(folder, tree)
    child = subprocess.Popen(command("run", path), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert child.stderr is not None
    said = []
    for line in child.stderr:
        said.append(line)
        if line.startswith("high | step 2/60"):
            child.send_signal(signal.SIGINT)
    assert child.wait(timeout=60) == 130
    assert said[-1] == f"stopped in stage 'high'; go on with: aimv2 run {path}\n"
    assert states(status(folder, tree)) == {"scenes": "done", "base": "done", "high": "interrupted", "after": "to do"}
    steps = [int(path.name[5:]) for path in (folder / "out" / "high" / "checkpoints").iterdir()]
    assert steps and max(steps) < 60
    ran = run_chain(path)
    assert ran.returncode == 0 and "high | going on from step" in ran.stderr, ran.stderr
    assert exact(folder / "out" / "high") == exact(whole[0] / "out" / "high")
    tops = [
        json.loads((home / "out" / "after" / "result.json").read_text())["figures"]["top1"]
        for home in (folder, whole[0])
    ]
    assert tops[0] == tops[1]
    assert not list((folder / "out" / ".started").iterdir())


def test_a_failed_stage_is_named_and_what_came_before_stays(tmp_path: Path, forked_stages: None) -> None:
    tree: Tree = {
        "out": str(tmp_path / "out"),
        "stages": {
            "good": {"verb": "data shapes", "options": {"count": 4}},
            "bad": {"verb": "data_shapes", "options": {"count": 4, "size": 2}, "needs": ["good"]},
        },
    }
    with pytest.raises(
        UsageError, match=r"^stage 'bad' failed \(aimv2 data shapes .*\): size: got 2, expected at least"
    ):
        api.run(write(tmp_path, tree))
    assert states(status(tmp_path, tree)) == {"good": "done", "bad": "failed"}
    assert states(json.loads((tmp_path / "out" / "report.json").read_text()))["good"] == "done"
    tree["stages"]["bad"]["options"]["size"] = 24  # a mistake that is mended needs no --redo
    assert states(api.run(write(tmp_path, tree))) == {"good": "done", "bad": "done"}


def test_one_chain_at_a_time(copy: tuple[Path, Tree]) -> None:
    folder, tree = copy
    with (folder / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another `aimv2 run` is at work there"):
            api.run(write(folder, tree))


# ---- stale ----


def change_option(folder: Path, tree: Tree) -> None:
    tree["stages"]["high"]["options"]["optim.lr"] = 1e-3


def change_recipe(folder: Path, tree: Tree) -> None:
    tree["stages"]["base"]["config"] = str(folder / "recipe.yaml")
    (folder / "recipe.yaml").write_text("optim:\n  warmup: 2\n")


def change_data(folder: Path, tree: Tree) -> None:
    os.utime(folder / "labelled" / "train-000000.tar", (1, 1))


def change_weights(folder: Path, tree: Tree) -> None:
    summary = folder / "out" / "base" / "summary.json"
    stored = json.loads(summary.read_text())
    summary.write_text(json.dumps({**stored, "weights_sha256": "0" * 64}))


def add_need(folder: Path, tree: Tree) -> None:
    tree["stages"]["after"]["needs"] = ["base"]


@pytest.mark.parametrize(
    ("change", "stale", "why"),
    [
        (change_option, ["high", "after"], "optim.lr was 0.002 and is 0.001"),
        (change_recipe, ["base", "high", "after"], "optim.warmup of its recipe was 3 and is 2"),
        (change_data, ["after"], "data .*labelled changed"),
        (change_weights, ["base", "high", "after"], "what lies in .*base is not what the stage left there"),
        (add_need, ["after"], "it needs 'base' since"),
    ],
)
def test_a_change_makes_a_stage_and_what_follows_stale(
    copy: tuple[Path, Tree], change: Callable[[Path, Tree], None], stale: list[str], why: str
) -> None:
    folder, tree = copy
    change(folder, tree)
    told = status(folder, tree)
    assert [name for name, state in states(told).items() if state == "stale"] == stale
    assert set(states(told).values()) == {"done", "stale"}
    with pytest.raises(UsageError, match=rf"^stage '{stale[0]}' is stale: {why}; --redo .*: {', '.join(stale)}$"):
        api.run(write(folder, tree))
    assert all((folder / "out" / name / "stage.json").is_file() for name in STAGES), "a refusal clears nothing"


def test_what_decides_nothing_makes_nothing_stale(copy: tuple[Path, Tree]) -> None:
    folder, tree = copy
    (folder / "recipe.yaml").write_text("# said otherwise\noptim: {warmup: 3}\n")
    tree["stages"]["base"] |= {"config": str(folder / "recipe.yaml"), "title": "another"}
    (folder / "labelled" / ".index").write_text("beside the shards")
    tree["stages"]["more"] = {"verb": "data_check", "source": "{scenes}"}
    assert states(status(folder, tree)) == {**dict.fromkeys(STAGES, "done"), "more": "to do"}


def test_a_teacher_is_an_input_and_features_that_a_run_writes_are_none(tmp_path: Path) -> None:
    scenes(tmp_path / "data", 10)
    (tmp_path / "cache").mkdir()
    student = training(data__train=str(tmp_path / "data"), objective__name="distill", objective__teacher="{one}")
    own = {"data__train": str(tmp_path / "data"), "data__features": str(tmp_path / "cache")}
    pair = {**training(objective__name="contrastive", **own), "init": "{one}"}
    stored = training(data__train="{taught}", objective__name="distill", objective__teacher="stored")
    taught = {"verb": "data_teach", "teacher": "{one}", "data": str(tmp_path / "data")}
    stages = {"one": training(data__train=str(tmp_path / "data")), "student": student, "pair": pair, "taught": taught}
    path = write(tmp_path, {"out": str(tmp_path / "out"), "stages": {**stages, "pupil": stored}})
    chain = read_chain(path)
    needs = {job.name: list(job.needs) for job in chain.jobs}
    assert needs == {"one": [], "student": ["one"], "pair": ["one"], "taught": ["one"], "pupil": ["taught"]}
    inputs = {one.job.name: [label.split(" ")[0] for label in one.inputs] for one in look(chain, chain.jobs)}
    read = ["data.train"]
    assert inputs == {"one": read, "student": read, "pair": read, "taught": ["data"], "pupil": []}


def test_redo_runs_what_is_stale_and_nothing_else(copy: tuple[Path, Tree], forked_stages: None) -> None:
    folder, tree = copy
    tree["stages"]["base"]["options"]["train.steps"] = 4
    path = write(folder, tree)
    kept = (folder / "out" / "scenes" / "stage.json").stat().st_mtime_ns
    old = json.loads((folder / "out" / "base" / "stage.json").read_text())["output"]
    told = api.run(path, only="base", redo=True)
    assert states(told) == {"scenes": "done", "base": "done", "high": "stale", "after": "stale"}
    assert json.loads((folder / "out" / "base" / "summary.json").read_text())["step"] == 4
    assert json.loads((folder / "out" / "base" / "stage.json").read_text())["output"] != old
    assert (folder / "out" / "scenes" / "stage.json").stat().st_mtime_ns == kept
    assert reasons(status(folder, tree))["high"] == "the result of 'base' changed"
    assert reasons(status(folder, tree))["after"] == "'high', which it needs, is stale"


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out" / "one").mkdir(parents=True)
    (tmp_path / "out" / "one" / "thesis.txt").write_text("mine")
    tree = {"out": str(tmp_path / "out"), "stages": {"one": {"verb": "data_shapes"}}}
    with pytest.raises(UsageError, match=r"stage 'one': .* holds something that no chain wrote"):
        api.run(write(tmp_path, tree), redo=True)
    assert (tmp_path / "out" / "one" / "thesis.txt").read_text() == "mine"


# ---- seeds ----


def test_figures_over_seeds_are_numpys(tmp_path: Path, forked_stages: None, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = [0, 3, 4]
    tree: Tree = {
        "out": str(tmp_path / "out"),
        "seeds": seeds,
        "stages": {
            "shared": {"verb": "data_shapes", "seeds": False, "options": {"count": 3}},
            "own": {"verb": "data_shapes", "options": {"count": 4}},
            "checked": {"verb": "data_check", "source": "{own}", "needs": ["shared"]},
        },
        "report": {"the seed": "own.seed", "samples": "checked.samples", "of all": "shared.train", "none": "own.none"},
    }
    path = write(tmp_path, tree)
    assert main(["run", path, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = ["shared", *(f"{stage}-seed{seed}" for seed in seeds for stage in ("own", "checked"))]
    assert [Path(row["folder"]).name for row in told["stages"]] == names
    assert all((tmp_path / "out" / name / "stage.json").is_file() for name in names)
    rows = {row["title"]: row for row in told["figures"]}
    assert rows["the seed"]["by_seed"] == {str(seed): seed for seed in seeds}
    half = stats.t.ppf(0.975, 2) * np.std(seeds, ddof=1) / np.sqrt(3)
    wanted = np.mean(seeds) + np.array([0, -half, half])
    np.testing.assert_allclose([rows["the seed"][key] for key in ("mean", "low", "high")], wanted)
    assert rows["samples"]["mean"] == 5 and rows["samples"]["low"] == 5
    assert rows["of all"]["by_seed"] == {"shared": 3} and rows["of all"]["low"] is None
    assert told["missing"] == ["none"]
    text = report.as_text(told)
    assert "no stage has the figure 'none'" in text and max(map(len, text.splitlines())) <= 80
    assert f"{wanted[0]:.4f} | {wanted[1]:.4f} to {wanted[2]:.4f} | 3 |" in (tmp_path / "out" / "report.md").read_text()
    write(tmp_path, {**tree, "seeds": [*seeds, 5]})
    assert set(row["seed"] for row in api.run(path, status=True)["stages"] if row["state"] == "to do") == {5}


def test_usual_figures_are_those_that_are_compared() -> None:
    assert set(report.OF_A_RESULT) == {".".join(place) for place in METRICS}


# ---- what is wrong in a chain ----


def refused(tmp_path: Path, stages: Any = None, **top: Any) -> str:
    """The one line that a chain gives; nothing is written."""
    tree = {
        "out": str(tmp_path / "out"),
        "stages": {"one": {"verb": "data_shapes"}} if stages is None else stages,
        **top,
    }
    with pytest.raises(UsageError) as error:
        api.run(write(tmp_path, {key: value for key, value in tree.items() if value is not None}))
    assert not (tmp_path / "out").exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def shapes(**more: Any) -> Tree:
    return {"verb": "data_shapes", **more}


def training(**options: Any) -> Tree:
    given = {"data.train": "{one}", **{key.replace("__", "."): value for key, value in options.items()}}
    return {"verb": "pretrain", "options": {**TINY, **given}}


WRONG: list[tuple[Tree, str]] = [
    ({"one": shapes(needs=["two"]), "two": shapes(needs=["three"]), "three": shapes(needs=["one"])},
     "a cycle: one -> two -> three -> one;"),
    ({"one": {**training(), "init": "{one}"}}, "a cycle: one -> one;"),
    ({"one": {"verb": "data_check", "source": "{oen}"}}, "'{oen}' is none of the stages; did you mean 'one'?"),
    ({"one": shapes(needs=["other"])}, "'{other}' is none of the stages"),
    ({"one": {"verb": "data_shape"}}, "unknown verb 'data_shape'; did you mean 'data_shapes'?"),
    ({"one": {"verb": "run"}}, "unknown verb 'run'"),
    ({"one": {}}, "verb is missing"),
    ({"one": ["data_shapes"]}, "keys such as verb and options expected"),
    ({"one": shapes(option={})}, "unknown key 'option'; did you mean 'options'?"),
    ({"one": shapes(count=3)}, "unknown key 'count'; options of the command go below `options:`"),
    ({"one": shapes(options={"cuont": 3})}, "unknown option '--cuont'; did you mean '--count'?"),
    ({"one": shapes(options={"count": "many"})}, "count"),
    ({"one": shapes(options={"out": "x"})}, "options.out: the chain decides it"),
    ({"one": shapes(seeds=3)}, "seeds must be false"),
    ({"data": shapes()}, "stage 'data': a name of letters"),
    ({"one": shapes(), "two": training(train__stepz=3)}, "'train.stepz' in its options; did you mean 'train.steps'?"),
    ({"one": shapes(), "two": training(train__steps=0)}, "train.steps must be at least 1, got 0"),
    ({"one": shapes(), "two": training(init="x")}, "options.init: a key of the stage itself"),
    ({"one": shapes(), "two": training(data__train=None)}, "pretrain needs `data.train:`"),
    ({"one": shapes(), "two": {**training(), "config": "no.yaml"}}, "--config no.yaml: no such file"),
    ({"one": shapes(), "two": {**training(), "init": "one"}}, "a stage is named in braces: '{one}'"),
    ({"one": shapes(), "two": {**training(), "init": "no/where/at/all"}}, "init no/where/at/all: a released name"),
    ({"one": training(data__train="no/shards")}, "data.train no/shards: no such file or folder"),
    ({"one": {"verb": "data_check", "source": "no/such/folder"}}, "source no/such/folder: no such file or folder"),
    ({"one": {"verb": "data_check", "source": "{data}/x"}}, "{data} is undefined"),
    ({"one": shapes(options={"seed": "{seed}"})}, "{seed} is undefined: the chain names no seeds"),
    ({"one": {"verb": "data_check"}}, "data_check needs `source:`"),
    ({"one": shapes(), "two": {"verb": "knn", "options": {"data": "{one}"}}}, "knn needs `model:`"),
    ({"one": shapes(), "two": {"verb": "knn", "model": "{one}"}}, "knn needs `data:` in its options"),
    ({"one": shapes(), "two": training(train__save_every=2, train__keep=2), "three": {**training(), "init": "{two}@2"}},
     "{two}@2: the stage keeps 4, 6 (train.steps, train.save_every, train.keep)"),
    ({"one": shapes(), "two": {**training(), "init": "{one}@2"}}, "{one}@2: 'one' is no pretrain stage"),
]  # fmt: skip


@pytest.mark.parametrize(("stages", "line"), WRONG, ids=[line[:40] for _, line in WRONG])
def test_a_mistake_in_a_stage_is_one_line_before_anything_runs(tmp_path: Path, stages: Tree, line: str) -> None:
    said = refused(tmp_path, stages)
    assert line in said
    assert "chain.yaml" in said


@pytest.mark.parametrize(
    ("top", "line"),
    [
        ({"stage": {}}, "unknown key 'stage' in"),
        ({"stages": []}, "a mapping of stages expected"),
        ({"out": None}, "no folder for the stages"),
        ({"out": 3}, "out must be a path, got 3"),
        ({"seeds": 3}, "seeds must be a list of different whole numbers"),
        ({"seeds": [1, 1]}, "seeds must be a list of different whole numbers"),
        ({"report": "top1"}, "report must be a list of figures"),
        ({"report": {"a": "two.top1"}}, "'two.top1' of 'a' is not stage.figure"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_mistake_at_the_top_is_one_line(tmp_path: Path, top: Tree, line: str) -> None:
    assert line in refused(tmp_path, **top)


def test_shared_stages_need_no_seeded_ones_and_folders_are_not_shared(tmp_path: Path) -> None:
    checked = {"verb": "data_check", "source": "{one}", "seeds": False}
    assert "needs 'one', which runs once per seed" in refused(tmp_path, {"one": shapes(), "two": checked}, seeds=[0])
    said = refused(tmp_path, {"one": shapes(), "one-seed0": shapes(seeds=False)}, seeds=[0])
    assert "'one-seed0' and 'one' share a folder" in said


def test_a_file_that_is_no_chain_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "chain.yaml"
    twice = "out: x\nstages:\n  one: {verb: data_shapes}\n  one: {verb: data_check}\n"
    for text, line in ((None, "no such file"), ("{", "is not YAML"), (twice, "'one' is given twice, line 4")):
        if text is not None:
            path.write_text(text)
        assert main(["run", str(path)]) == 2
        out, err = capsys.readouterr()
        assert line in err and err.count("\n") == 1 and err.startswith("error: ") and not out


def test_only_names_stages(copy: tuple[Path, Tree]) -> None:
    folder, tree = copy
    told = api.run(write(folder, tree), only="base", status=True)
    assert list(states(told)) == ["scenes", "base"]
    with pytest.raises(UsageError, match=r"--only hihg: no such stage; did you mean 'high'"):
        api.run(write(folder, tree), only="base,hihg")


# ---- what is written about it ----


def test_the_example_of_the_help_is_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    example = "".join(line.removeprefix("  ") + "\n" for line in EXAMPLE.splitlines()[1:] if line.startswith("  "))
    chain = read_chain(write(tmp_path, yaml.safe_load(example)))
    assert [job.name for job in chain.jobs[:3]] == ["base-seed0", "adapted-seed0", "probed-seed0"]
    assert len(chain.jobs) == 9


def test_a_cooldown_goes_on_with_the_data_of_its_run(tmp_path: Path) -> None:
    base = training(optim__schedule="constant")
    finish = {"verb": "pretrain", "init": "{base}", "options": {"optim.schedule": "cooldown"}}
    stages = {"one": shapes(), "base": base, "finish": finish}
    assert [job.name for job in read_chain(write(tmp_path, {"out": "x", "stages": stages})).jobs] == list(stages)


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.stem)
def test_a_chain_recipe_reads_and_says_how_it_is_run(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("command", "source", "data", "hardware", "hours", "score"):
        assert any(line.startswith(f"#   {word} ") for line in head), f"{path.name}: no '{word}' in its head"
    assert any(f" aimv2 run {path.stem}" in line for line in head)
    assert read_chain(str(path), data=".").jobs
