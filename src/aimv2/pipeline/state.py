"""What of a chain is done, and what no longer holds: every stage keeps what went into it by hash.

A finished stage has OUT/STAGE/stage.json. One that began has OUT/.started/STAGE.json until then: many commands refuse a
folder with something of others in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from aimv2.errors import UsageError
from aimv2.interop.model_folder import checkpoint_at, split_step
from aimv2.io import matching, parse_json, read_file
from aimv2.pipeline.read import Chain, Job, fill, strings

FORMAT = "aimv2 stage 1"
RECORD, STARTED = "stage.json", ".started"
DONE, STALE, INTERRUPTED, FAILED, TO_DO = "done", "stale", "interrupted", "failed", "to do"
BY_CONTENT = 16 * 2**20  # bytes; larger files are compared by size and time
NOT_READ = ("cache", "features", "plot", "index_dir", "config", "name")  # written there, or compared by its values
DATA_KEYS = ("train", "val", "data", "images", "results", "source", "path", "val_list")
MODEL_KEYS = ("init", "model", "teacher")


@dataclass
class Status:
    """Where a job stands.

    Attributes:
        job: the job.
        state: done, stale, interrupted, failed or to do.
        why: of a stale one, what changed.
        inputs: label -> what is hashed and its hash; without those of stages that are not done.
        record: stage.json of a finished one, what was noted at the start of an unfinished one, else {}.
    """

    job: Job
    state: str
    why: str = ""
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def look(chain: Chain, jobs: Iterable[Job]) -> list[Status]:
    """The state of every job, in order; a job comes after what it needs.

    Raises:
        UsageError: an input that is not there, a folder in the way that no chain wrote.
    """
    found: dict[str, Status] = {}
    for job in jobs:
        found[job.name] = _look_at(chain, job, found)
    return list(found.values())


def _look_at(chain: Chain, job: Job, before: dict[str, Status]) -> Status:
    inputs = outside_inputs(chain, job)
    open_needs = [name for name in job.needs.values() if before[name].state != DONE]
    for stage, name in job.needs.items():
        if name not in open_needs:
            inputs[f"stage {stage}"] = {"path": str(before[name].job.folder), "hash": before[name].record["output"]}
    status = Status(job, TO_DO, inputs=inputs)
    record, started = read_record(job.folder / RECORD), read_record(started_file(job))
    if not record and not started:
        if job.folder.exists() and (not job.folder.is_dir() or any(job.folder.iterdir())):
            raise UsageError(
                f"stage '{job.name}': {job.folder} holds something that no chain wrote; move it, or choose another --out",
                code="exists",
            )
        return status
    status.record = record or started
    status.state = DONE if record else FAILED if started.get("failed") else INTERRUPTED
    if open_needs:
        status.why = f"'{open_needs[0]}', which it needs, is {before[open_needs[0]].state}"
    else:
        status.why = difference(status.record, job, inputs)
    if not status.why and record and record["output"] != output_hash(job, record):
        status.why = f"what lies in {job.folder} is not what the stage left there"
    if status.why and status.state == FAILED and not any(job.folder.glob("checkpoints/step-*")):
        return Status(job, TO_DO, inputs=inputs)  # a mistake that was mended, and nothing to lose
    if status.why:
        status.state = STALE
    return status


def started_file(job: Job) -> Path:
    """What an unfinished stage began with."""
    return job.folder.parent / STARTED / f"{job.name}.json"


def read_record(path: Path) -> dict[str, Any]:
    """A stage's record, {} without one.

    Raises:
        UsageError: damaged, or of another version.
    """
    try:
        stored = parse_json(read_file(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} can't be read: {error}; remove it with its stage's folder to run the stage again",
            code="unreadable",
        ) from None
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise UsageError(f"{path}: '{FORMAT}' expected; remove it with its stage's folder to run the stage again")
    return stored


def make_record(job: Job, inputs: dict[str, dict[str, str]]) -> dict[str, Any]:
    """What is known before a stage runs."""
    import aimv2

    return {
        "format": FORMAT,
        "stage": job.stage.name,
        "seed": job.seed,
        "verb": job.stage.verb,
        "title": job.stage.title,
        "command": ["aimv2", *job.command],
        "asked": job.asked,
        "options": job.values,
        "recipe": job.recipe,
        "inputs": inputs,
        "version": aimv2.__version__,
        "seconds": 0.0,
    }


def difference(record: dict[str, Any], job: Job, inputs: dict[str, dict[str, str]]) -> str:
    """What changed since the record was made, in words; "" for nothing."""
    if record["verb"] != job.stage.verb:
        return f"its verb was {record['verb']} and is {job.stage.verb}"
    for what, old, new in (("", record["asked"], job.asked), (" of its recipe", record["recipe"], job.recipe)):
        new = json.loads(json.dumps(new))
        for key in [*old, *(key for key in new if key not in old)]:
            if key != "config" and old.get(key, "not given") != new.get(key, "not given"):
                return f"{key}{what} was {old.get(key, 'not given')} and is {new.get(key, 'not given')}"
    stored = record["inputs"]
    for label in [*stored, *(label for label in inputs if label not in stored)]:
        now, then = inputs.get(label, {}), stored.get(label, {})
        if now.get("hash") != then.get("hash"):
            kind, name = label.split(" ", 1)
            if kind == "stage":
                return (
                    f"the result of '{name}' changed"
                    if now and then
                    else f"it needs '{name}' since"
                    if now
                    else (f"it does not need '{name}' any more")
                )
            return f"{kind} {(now or then)['path']} changed"
    return ""


def output_hash(job: Job, record: dict[str, Any]) -> str:
    """What a finished stage left, as one hash: its inputs and options with it, since sizes alone say little of weights."""
    if job.stage.verb == "pretrain":
        try:
            content = parse_json(read_file(job.folder / "summary.json"))["weights_sha256"]
        except (OSError, ValueError, KeyError, TypeError):  # train.stop_at leaves no summary
            content = fingerprint(str(job.folder), model=True)
    elif (job.folder / "result.json").is_file():
        content = hashlib.sha256(read_file(job.folder / "result.json")).hexdigest()
    else:
        content = json.dumps(sorted((name, size) for name, size, _ in files_in(job.folder) if name != RECORD))
    hashes = {label: found["hash"] for label, found in record["inputs"].items()}
    whole = [content, record["asked"], record["recipe"], hashes, record.get("result")]
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


# ---- what lies outside of the chain ----


def outside_inputs(chain: Chain, job: Job) -> dict[str, dict[str, str]]:
    """Files and folders that a stage reads and no stage writes: ``{"data.train {data}": {"path", "hash"}}``.

    Raises:
        UsageError: a missing one.
    """
    found = {}
    for key, written in paths_of(job):
        path = fill(written, {"data": chain.data}.get)
        if any(stage in job.needs for stage in re.findall(r"\{([\w-]+)\}", path)):
            continue
        last = key.rpartition(".")[2]
        is_model = last in MODEL_KEYS or (job.stage.verb, key) == ("convert", "source")
        if not matches(path, is_model):
            if is_model and not is_far(path, model=True):
                kinds = "a released name, a hub id, a model folder, a file, RUN or RUN@STEP"
                raise UsageError(f"CHAIN {chain.path}: stage '{job.stage.name}': {key} {path}: {kinds} expected")
            if not is_model and (job.stage.verb == "pretrain" or not is_far(path)):
                raise UsageError(
                    f"CHAIN {chain.path}: stage '{job.stage.name}': {key} {path}: no such file or folder",
                    code="not-found",
                )
            continue
        found[f"{key} {written}"] = {"path": path, "hash": outside(path, is_model)}
    return found


def paths_of(job: Job) -> Iterator[tuple[str, str]]:
    """(key, text) of all that is a path, or may be: known keys, and what has the form of one and exists."""
    values, root = {**job.recipe, **job.asked}, os.environ.get("AIMV2_DATA")
    if job.stage.verb == "pretrain" and values.get("data.train") is None and root:
        yield "data.train", root
    for key, value in values.items():
        last = key.rpartition(".")[2]
        if last in NOT_READ:
            continue
        if key == "data.train" and isinstance(value, list):
            for source in value:
                given = source if isinstance(source, str) else source.get("path")
                yield key, given or os.path.join(root or "", str(source.get("name")))
            continue
        for text in strings(value):
            known = last in DATA_KEYS or last in MODEL_KEYS or (job.stage.verb, key) == ("tokenizer_train", "captions")
            if known or ((os.sep in text or "." in text) and Path(text).expanduser().exists()):
                yield key, text


def is_far(text: str, model: bool = False) -> bool:
    """Whether a name means something on the hub, a model of another library, or a teacher's features with the data."""
    from aimv2.interop.hub import RELEASED, is_hub_id

    if model and (text in RELEASED or ":" in text or text == "stored"):
        return True
    return is_hub_id(text) and not Path(text).expanduser().parent.exists()


def matches(text: str, model: bool = False) -> list[Path]:
    """The files or folders that match a path, a glob, a brace pattern or RUN@STEP; [] where there is nothing."""
    path = Path(text).expanduser()
    if path.exists():
        return [path]
    if model and (run := split_step(text)) is not None:
        return [folder] if (folder := checkpoint_at(*run)) is not None else []
    if not any(mark in text for mark in "*?[{"):
        return []
    return sorted({path for _, _, paths in matching(text) for path in paths})


@cache
def outside(text: str, model: bool) -> str:
    """:func:`fingerprint` of what no stage changes: once a chain, however many stages read it."""
    return fingerprint(text, model)


def fingerprint(text: str, model: bool = False) -> str:
    """A hash of what lies at a path: small files by content; folders and large files by names, sizes and times.

    Args:
        text: a path, a glob or a brace pattern; of a model RUN or RUN@STEP too.
        model: of a run only the weights that would be read count.
    """
    digest = hashlib.sha256()
    for path in matches(text, model):
        steps = sorted((path / "checkpoints").glob("step-*")) if model else []
        path = steps[-1] if steps else path
        if path.is_file() and path.stat().st_size <= BY_CONTENT:
            digest.update(read_file(path))
        elif path.is_file():
            digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
        else:
            for name, size, time in sorted(files_in(path)):
                digest.update(f"{name} {size} {time}\n".encode())
    return digest.hexdigest()


def files_in(folder: Path) -> Iterator[tuple[str, int, int]]:
    """(name below the folder, bytes, time) of its files; hidden ones, such as an index of shards, left out."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(root, name)
            if not name.startswith(".") and os.path.isfile(path):
                stat = os.stat(path)
                yield os.path.relpath(path, folder), stat.st_size, stat.st_mtime_ns
