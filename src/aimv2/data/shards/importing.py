"""`aimv2 data import`: whatever people have, to shards, in several processes, resumable to the same bytes.

The plan is fixed by the source: item i of a split goes to shard i // shard_size, whether or not it
turns out readable. So each shard is a job of its own: any process may write it, in any order, and a shard
that is there is done. OUT/.import holds the options and a note for each shard (its count, its rejects) until
all are done.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from aimv2.data.images.box_rows import open_boxes
from aimv2.data.images.boxes import BOX_FAULTS
from aimv2.data.images.catalogue import Columns
from aimv2.data.images.conversation_rows import open_conversations
from aimv2.data.images.decode import MAX_PIXELS, ImageError, store_image
from aimv2.data.images.entries import Loaded, PlannedSource, Reject, SourceEntry
from aimv2.data.images.names import image_root_of
from aimv2.data.images.sources import TEMPLATE, SourceOptions, open_source
from aimv2.data.passed import ODD_LABELS, PassedOver, passed_lines
from aimv2.data.shards.format import MANIFEST, Parts, write_manifest, write_shard
from aimv2.data.shards.import_options import check_options
from aimv2.data.shards.val_choice import choose_val
from aimv2.data.text.conversations import holds_conversation
from aimv2.errors import UsageError, shown
from aimv2.io import parse_json, read_file, write_aside
from aimv2.progress import progress_bar

log = logging.getLogger(__name__)

WORK = ".import"
PLAN_FORMAT = 1


class ImageOptions(NamedTuple):
    """How images are stored; see `images.store_image`."""

    max_side: int | None
    max_pixels: int
    quality: int


class ShardJob(NamedTuple):
    """One shard to write."""

    name: str
    items: list[SourceEntry]

    def digest(self) -> str:
        """Changes when the source would put something else into this shard."""
        text = json.dumps([list(item[:6]) for item in self.items], sort_keys=True, default=str)  # all but the reader
        return hashlib.sha256(text.encode()).hexdigest()


class ShardNote(NamedTuple):
    """What became of a shard; ``passed`` as of `PassedOver.result`."""

    digest: str
    written: int
    rejects: list[Reject]
    passed: dict[str, dict[str, Any]]


def import_data(
    source: str,
    out: str | Path,
    *,
    captions: str | None = None,
    image_column: str | None = None,
    caption_column: str | list[str] | None = None,
    template: str = TEMPLATE,
    class_folders: bool = False,
    split: str | None = None,
    val_fraction: float = 0.0,
    val_list: str | None = None,
    max_side: int | None = None,
    shard_size: int = 1000,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    quality: int = 95,
    image_root: str | None = None,
    no_captions: bool = False,
    conversations: bool = False,
    boxes: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write ``out/train-NNNNNN.tar`` and ``out/val-NNNNNN.tar`` from a source; started again, it resumes.

    Args:
        source: A folder, a captions file, Parquet, Arrow, tars (a folder, glob or brace pattern of them) or a
            hub data set id.
        captions: Which captions file, where a folder has several.
        image_column: Column of a table or captions file.
        caption_column: The same; several are several fields.
        template: Caption of class folders, ``{}`` standing for the class.
        class_folders: The sub-folders are classes, whatever other files lie there.
        split: Which split, where a hub data set or a folder of Parquet files has several.
        val_fraction: Fraction of keys, chosen by their hash, that goes to ``val``.
        val_list: File with one key or image name a line that go to ``val``.
        max_side: Shrink images whose longest side has more pixels than this.
        shard_size: Planned samples a shard.
        workers: Processes; 0 and 1 work in this one, None means one a core, at most 8.
        max_pixels: Refuse larger images.
        quality: of the JPEGs that are encoded here.
        image_root: A folder outside the source, below which tables and captions files may name images.
        no_captions: A folder's images, without captions.
        conversations: Whole conversations, about any number of images, instead of captions.
        boxes: Boxes, classes and phrases, instead of captions.

    Returns:
        out, train, val, rejected, shards (numbers of each), passed_over ({kind: {number, examples}}), of conversations and boxes bad
        (likewise), seconds.

    Raises:
        UsageError: nothing to import, or no place for it.
    """
    started, out = time.monotonic(), Path(out).expanduser()
    named = _column_names(caption_column)
    image_options = ImageOptions(max_side, max_pixels, quality)
    options = {
        "source": _stable_name(source), "captions": captions, "image_column": image_column, "caption_column": named, "template": template,
        "split": split, "val_fraction": val_fraction, "shard_size": shard_size, "val_list": None, **image_options._asdict(),
    }  # fmt: skip
    later = {
        "class_folders": class_folders, "image_root": image_root and _stable_name(image_root), "no_captions": no_captions,
        "conversations": conversations, "boxes": boxes,
    }  # fmt: skip
    options |= {key: value for key, value in later.items() if value}  # an import begun by an older version resumes
    check_options(source, val_list, options)
    val_text = read_file(Path(val_list).expanduser()) if val_list else b""
    options["val_list"] = hashlib.sha256(val_text).hexdigest() if val_list else None
    _check_out(source, out)
    columns, root = Columns(image_column, tuple(named) if named else None), image_root_of(image_root)
    about = SourceOptions(captions, columns, template, split, out.resolve(), class_folders, root, no_captions)
    opened = (open_boxes if boxes else open_conversations if conversations else open_source)(source, about)
    chooser, is_val = choose_val(source, opened, val_fraction, val_list)
    plan = Plan(opened, is_val, shard_size)
    _prepare(out, options)
    count = min(os.cpu_count() or 1, 8) if workers is None else workers
    notes = _run(plan, opened, out, image_options, count, progress)
    chooser.check_matched(source, val_list, out)
    counts = _finish(out, notes, plan.rejects, opened, options)
    return {"out": str(out), **counts, "seconds": round(time.monotonic() - started, 2)}


def _column_names(given: str | list[str] | None) -> list[str] | None:
    """``a,b`` or a list -> the names of columns."""
    if given is None:
        return None
    words = given.split(",") if isinstance(given, str) else given
    if not (names := [name for word in words if (name := word.strip())]):
        raise UsageError(
            "--caption-column: empty; the name of a column, or several with commas, expected", code="missing"
        )
    return names


# ---- plan ----


@dataclass
class Plan:
    """Iterates the jobs of a source, in an order that depends only on the source and the options.

    Attributes:
        rejects: What needed no reading to be refused; complete after the iteration.
    """

    source: PlannedSource
    is_val: Callable[[SourceEntry], bool]
    shard_size: int
    rejects: list[Reject] = field(default_factory=list)

    def __iter__(self) -> Iterator[ShardJob]:
        waiting: dict[str, list[SourceEntry]] = {"train": [], "val": []}
        numbers = {"train": 0, "val": 0}
        used = dict[str, int]()
        for item in self.source.items:
            if isinstance(item, Reject):
                self.rejects.append(item)
                continue
            given = item
            if not self.source.unique_keys:
                item = item._replace(key=_unused(item.key, used))
            split = "val" if self.is_val(given if self.source.by_image else item) else "train"
            waiting[split].append(item)
            if len(waiting[split]) == self.shard_size:
                yield ShardJob(f"{split}-{numbers[split]:06d}", waiting[split])
                waiting[split] = []
                numbers[split] += 1
        for split, items in waiting.items():
            if items:
                yield ShardJob(f"{split}-{numbers[split]:06d}", items)


def _unused(key: str, used: dict[str, int]) -> str:
    """The key, or the next with a number that is free; ``used``: the numbers that keys have come to."""
    found = key
    while found in used:
        used[key] += 1
        found = f"{key}-{used[key]}"
    used[found] = 1
    return found


# ---- one shard ----


_stop: Any = None  # an event shared with the parent, in a worker process


def _start_worker(stop: Any) -> None:
    """Ctrl-C reaches every process of the terminal; only the parent handles it, and sets ``stop``."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker waits for jobs for ever, also when its parent was killed and a restart is at work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def write_job(
    job: ShardJob, out: Path, options: ImageOptions, advance: Callable[[int], None] | None = None
) -> ShardNote:
    """Write one shard and its note; both whole or not at all. ``advance`` counts the items."""
    rejects, passed = list[Reject](), PassedOver()

    def samples() -> Iterator[tuple[str, Parts]]:
        for item, loaded in zip(job.items, job.items[0].reader.load(job.items)):
            if _stop is not None and _stop.is_set():
                raise KeyboardInterrupt
            if advance is not None:
                advance(1)
            sample = loaded if isinstance(loaded, Reject) else _sample(item, loaded, options)
            if isinstance(sample, Reject):
                rejects.append(sample)
            else:
                if isinstance(loaded, Loaded) and loaded.odd_label is not None:
                    passed.add(ODD_LABELS, loaded.odd_label)
                for kind, name in loaded.noted if isinstance(loaded, Loaded) else ():
                    passed.add(kind, name)
                yield item.key, sample

    path = out / f"{job.name}.tar"
    written = write_shard(path, samples())
    if not written:
        path.unlink()
    note = ShardNote(job.digest(), written, rejects, passed.result())
    write_aside(out / WORK / f"{job.name}.json", json.dumps(note._asdict()))
    return note


def _sample(item: SourceEntry, loaded: Loaded, options: ImageOptions) -> Parts | Reject:
    talk = loaded.turns is not None
    if not talk and not loaded.captions and loaded.label is None and not getattr(item.reader, "images_only", False):
        keys = getattr(item.reader, "keys", None)
        more = ", but a conversation, which --conversations true imports" * holds_conversation(loaded.about)
        return Reject(item.key, item.image, f"no caption{' in ' + ', '.join(keys) if keys else ''}{more}")
    parts, about = Parts(), {"source": item.image, **loaded.about}
    try:
        for number, data in enumerate(loaded.images if talk else [loaded.data]):
            image = store_image(data, options.max_side, options.max_pixels, options.quality)
            parts[f"{number}.{image.extension}" if number else image.extension] = image.data
            about |= {"width": image.width, "height": image.height} if not number else {}
    except ImageError as error:
        return Reject(item.key, item.image, str(error), "image-unreadable" if talk else "", item.row)
    about |= {"conversations": loaded.turns} if talk else {}
    about |= {"captions": loaded.captions} if loaded.captions or not talk else {}
    if loaded.captions:
        parts["txt"] = next(iter(loaded.captions.values()))[0].encode("utf-8", "replace")
    record = json.dumps(about, ensure_ascii=False, sort_keys=True, default=str)
    parts["json"] = record.encode("utf-8", "replace")  # captions from the web hold halves of surrogate pairs
    if loaded.label is not None:
        parts["cls"] = loaded.label.encode()
    return parts


# ---- run ----


def _run(
    plan: Plan, source: PlannedSource, out: Path, options: ImageOptions, workers: int, progress: bool
) -> dict[str, ShardNote]:
    """Do all jobs that are not done yet; a note for each shard, by name."""
    notes: dict[str, ShardNote] = {}
    if source.total is not None and source.total <= plan.shard_size:
        workers = 1  # one shard: starting processes would take longer
    with progress_bar(f"importing {source.kind}", source.total, shown=progress) as advance:

        def done(job: ShardJob, note: ShardNote) -> None:
            notes[job.name] = note
            advance(len(job.items))

        def todo() -> Iterator[ShardJob]:
            for job in plan:
                if note := _read_note(out, job):
                    done(job, note)
                else:
                    yield job

        if workers > 1:
            _run_in_processes(todo(), out, options, workers, done)
        else:
            for job in todo():
                notes[job.name] = write_job(job, out, options, advance)
    return notes


def _run_in_processes(
    todo: Iterator[ShardJob],
    out: Path,
    options: ImageOptions,
    workers: int,
    done: Callable[[ShardJob, ShardNote], None],
) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of other threads
    stop = context.Event()
    running: dict[Future[ShardNote], ShardJob] = {}
    with ProcessPoolExecutor(workers, context, _start_worker, (stop,)) as pool:
        try:
            while True:
                while len(running) < 2 * workers and (job := next(todo, None)) is not None:
                    running[pool.submit(write_job, job, out, options)] = job
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done(running.pop(future), future.result())
        except BrokenProcessPool as error:
            raise UsageError(
                "a worker process was killed (out of memory, or an image that crashes its decoder); the same"
                " command resumes where it stopped: try fewer --workers",
                option="--workers",
            ) from error
        finally:
            stop.set()
            for future in running:
                future.cancel()


# ---- OUT ----


def _check_out(source: str, out: Path) -> None:
    """Refuse an output that is the source, finished, someone else's or not writable."""
    path = Path(source).expanduser()
    if path.exists() and out.exists() and path.resolve() == out.resolve():
        raise UsageError(f"OUT: {out} is SOURCE itself; choose another folder", code="conflict")
    if (out / MANIFEST).exists():
        raise UsageError(f"OUT: {out} already holds a finished import; choose another OUT or remove it", code="exists")
    if not (out / WORK / "plan.json").exists() and out.is_dir() and any(out.glob("*.tar")):
        raise UsageError(f"OUT: {out} already holds other shards; choose another OUT", code="exists")
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"OUT: {out} is not writable ({existing}); choose another OUT")


def _prepare(out: Path, options: dict[str, Any]) -> None:
    """Make the work folder, or accept the one that an interrupted import with these options left."""
    try:
        (out / WORK).mkdir(parents=True, exist_ok=True)
        plan = {"format": PLAN_FORMAT, "options": options}
        file = out / WORK / "plan.json"
        if not file.exists():
            write_aside(file, json.dumps(plan))
        before = parse_json(read_file(file))
        for aside in out.glob(".*.tmp-*"):
            aside.unlink()
        if not isinstance(before, dict) or not isinstance(before.get("options", {}), dict):
            raise ValueError("no object")
    except ValueError as error:
        message = f"OUT: {file} of an interrupted import can't be read ({error}); choose another OUT"
        raise UsageError(message, code="unreadable") from None
    except OSError as error:
        raise UsageError(f"OUT: {out} is not writable: {error.strerror or error}; choose another OUT") from error
    if before != json.loads(json.dumps(plan)):
        old = before.get("options", {})
        changed = ", ".join(f"{k} {old.get(k)!r} -> {v!r}" for k, v in options.items() if old.get(k) != v)
        raise UsageError(
            f"OUT: {out} holds an interrupted import with other options ({changed or 'another version'});"
            " give the same ones to resume, or choose another OUT",
            code="mismatch",
        )


def _read_note(out: Path, job: ShardJob) -> ShardNote | None:
    """The note of a shard that is done, None if it is not.

    Raises:
        UsageError: it is done, but the source would fill it differently now.
    """
    try:
        record = parse_json(read_file(out / WORK / f"{job.name}.json"))
        rejects = [Reject(*reject) for reject in record["rejects"]]
        note = ShardNote(record["digest"], record["written"], rejects, record.get("passed", {}))
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):  # damaged: written again
        return None
    if note.digest != job.digest():
        raise UsageError(
            f"SOURCE has changed since the import into {out} was interrupted (shard {job.name} would differ);"
            " remove OUT or choose another, and start again",
            code="mismatch",
        )
    return note if not note.written or (out / f"{job.name}.tar").exists() else None


def _finish(
    out: Path, notes: dict[str, ShardNote], rejects: list[Reject], source: PlannedSource, options: dict[str, Any]
) -> dict[str, Any]:
    """Merge the notes, mark the folder as finished and remove the work folder."""
    counts = {"train": 0, "val": 0}
    for name, note in sorted(notes.items()):
        counts[name.split("-")[0]] += note.written
        rejects = rejects + note.rejects
        for kind, about in note.passed.items():
            source.passed.add(kind, *about["examples"], number=about["number"])
    if rejects:
        records = [
            {key: value for key, value in reject._asdict().items() if value or key not in ("kind", "row")}
            for reject in rejects
        ]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (out / "rejected.jsonl").write_bytes("".join(lines).encode("utf-8", "replace"))
    if not any(counts.values()):
        shutil.rmtree(out / WORK)
        kinds = {kind: about["number"] for kind, about in bad_rows(rejects).items() if kind != "other"}
        why = "".join(f"; {number:,} {BOX_FAULTS.get(kind, kind)}" for kind, number in kinds.items())
        why += f"; the first: {shown(rejects[0].place, 200)}: {rejects[0].reason}" if rejects else ""
        why += "; ".join(("", *passed_lines(source.passed.result())))
        raise UsageError(f"SOURCE: empty data set: 0 samples, {len(rejects)} rejected{why}")
    if rejects:
        first = f"{shown(rejects[0].place, 200)}: {rejects[0].reason}"
        log.warning("%d rejected, the first %s; all of them in %s", len(rejects), first, out / "rejected.jsonl")
    if source.classes:
        (out / "classes.txt").write_text("".join(f"{name}\n" for name in source.classes), encoding="utf-8")
    kept = {split: number for split, number in counts.items() if number}
    about = {"rejected": len(rejects), "options": {k: v for k, v in options.items() if k != "source"}}
    write_manifest(out, kept, source=options["source"], kind=source.kind, **about, **source.manifest)
    shutil.rmtree(out / WORK)
    shards = sum(note.written > 0 for note in notes.values())
    result = {**counts, "rejected": len(rejects), "shards": shards, "passed_over": source.passed.result()}
    return result | ({"bad": bad_rows(rejects)} if options.get("conversations") or options.get("boxes") else {})


def bad_rows(rejects: list[Reject]) -> dict[str, dict[str, Any]]:
    """{kind: {number, examples}} of rejected conversations or pictures with boxes, as of `PassedOver.result`."""
    bad = PassedOver()
    for reject in rejects:
        bad.add(reject.kind or "other", reject.place)
    return bad.result()


def _stable_name(source: str) -> str:
    """The source so that the same one has the same name from another working folder."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source
