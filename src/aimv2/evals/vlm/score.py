"""The command ``vlm score``: opens the model, answers, writes the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aimv2.config.types import split_words
from aimv2.distributed import World, default_device, join_world, leave_world, usable_device
from aimv2.errors import UsageError, shown
from aimv2.evals.harness import Evaluation
from aimv2.evals.result import FILE, read_result
from aimv2.evals.vlm.answered import Answerer, AnswerStore
from aimv2.evals.vlm.questions import CHANCE, QuestionSet, answered, figures_of, read_documents, table_of
from aimv2.features.fingerprint import weights_hash
from aimv2.vlm.model import open_vlm

if TYPE_CHECKING:
    from aimv2.commands.vlm_score import VlmScoreOptions

MAX_TOKENS = 16


@contextmanager
def processes() -> Iterator[World]:
    """The processes of torchrun, which a command leaves at its end."""
    world = join_world()
    try:
        yield world
    finally:
        leave_world()


def opened(
    vlm: str, device: str | None, batch_size: int, world: World | None = None, home: Path | None = None, rank: int = 0
) -> Answerer:
    """The model on its device, with the answers that ``home`` keeps of it.

    Args:
        vlm: a folder, RUN or RUN@STEP.
        device: None: of this process.
        batch_size: questions per forward pass.
        world: processes that divide the questions; None: only this one.
        home: folder of the result; None: nothing is kept.
        rank: names the file of answers.

    Raises:
        UsageError: no vision-language model, no such device.
    """
    model, processor = open_vlm(vlm)
    place = usable_device(default_device(device))
    decides = {"weights": weights_hash(model), "dtype": str(next(model.parameters()).dtype)}
    decides |= {"template": processor.chat_template, "pixels": processor.image_processor.to_json_string()}
    store = AnswerStore(home, rank, **decides)
    world = World(0, 1, place) if world is None else world
    return Answerer(model.to(place), processor, store, world, batch_size=batch_size)


def about_vlm(name: str, answerer: Answerer) -> dict[str, Any]:
    """What a result says of the model, with the proof that scoring left it as it was."""
    before = answerer.store.decides["weights"]
    if weights_hash(answerer.model.cpu()) != before:
        raise RuntimeError(f"{name}: the weights changed during the evaluation")
    encoder = answerer.model.encoder.config
    parts = {part: getattr(answerer.model, part) for part in ("encoder", "connector", "language", "head")}
    return {
        "name": name, "kind": "vlm", "weights_sha256": before, "unchanged": True, "image_size": encoder.image_size,
        "width": encoder.width, "features": answerer.model.features,
        "parameters": {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()},
    }  # fmt: skip


def sources_of(given: str) -> list[str]:
    """``"seen,unseen"`` -> both; a path, or a brace pattern, is one."""
    return [given] if "{" in given or Path(given).expanduser().exists() else split_words(given)


def refuse_other_result(
    out: Path | None, vlm: str, protocol: dict[str, Any], key: str, names: list[str], split: str | None = None
) -> None:
    """Raise UsageError where a folder holds a result that this one would replace: of another model, protocol or other data.

    Args:
        out: the folder; None: there is none.
        vlm: the name of the model.
        protocol: what of it is known before the model is opened.
        key: what holds ``names`` in a result's ``data``.
        names: of what is scored; further ones replace nothing, nor do further numbers of shots.
        split: of it.
    """
    if out is None or not (out / FILE).is_file():
        return
    stored = read_result(out)
    pairs: dict[str, tuple[Any, Any]] = {"VLM": (stored["model"]["name"], str(vlm))}
    pairs |= {name: (stored["protocol"].get(name), value) for name, value in json.loads(json.dumps(protocol)).items()}
    before, now = pairs.pop("shots", ([], []))
    pairs.pop("examples", None)  # follow from the shots
    if not set(before) <= set(now):
        pairs["shots"] = before, now
    pairs["split"] = stored["data"]["split"], split
    if lost := set(sources_of(stored["data"][key] or "")) - set(names):
        pairs["data"] = ", ".join(sorted(lost)), ", ".join(names)
    if why := [f"{name} {before}, now {now}" for name, (before, now) in pairs.items() if before != now]:
        raise UsageError(
            f"--out {out}: holds another result ({shown(why[0], 200)}), which would be replaced; give another folder, or remove its "
            f"{FILE} and keep the answers",
            code="exists",
        )


def evaluate_questions(options: VlmScoreOptions) -> dict[str, Any]:
    """Questions of one or several sources of shards; the first is the headline.

    Raises:
        UsageError: no questions, no vision-language model.
    """
    assert options.data is not None
    sources = sources_of(options.data)
    with processes() as world, Evaluation("vlm score", options.out) as evaluation:
        sets = [
            read_documents(source, options.split, options.limit, "--data", options.earlier_turns) for source in sources
        ]
        named = {one.name if len({s.name for s in sets}) == len(sets) else one.source: one for one in sets}
        evaluation.open_folder()
        max_tokens = options.max_tokens or MAX_TOKENS
        protocol = {
            "name": "questions, exact match" if options.earlier_turns else "single questions, exact match",
            "before_a_question": "earlier turns with right answers" if options.earlier_turns else None,
            "max_tokens": max_tokens, "decoding": "greedy", "chance": CHANCE,
            "exact_match": "lower case, single spaces, without a full stop at the end",
            "interval": "95%, Wilson, questions taken as independent", "limit": options.limit or None,
        }  # fmt: skip
        refuse_other_result(evaluation.out, options.vlm, protocol, "source", sources, options.split)
        answerer = opened(options.vlm, options.device, options.batch_size, world, evaluation.out, world.rank)
        answerer = replace(answerer, max_tokens=max_tokens)
        scored: dict[str, dict[str, Any]] = {}
        for name, one in named.items():
            answers, kept = answered(answerer, one.documents, options.seed, options.controls)
            scored[name] = {**figures_of(one.documents, answers), "samples": samples_of(one, answers)}
            scored[name] |= {"unreadable": one.unreadable, "without_questions": one.bad, "kept_images": kept}
        figures = {**next(iter(scored.values())), **({"sets": scored} if len(scored) > 1 else {})}
        first = sets[0]
        data = {
            "name": first.name, "dataset": None, "source": options.data, "split": options.split,
            "test_images": len({one.sample for one in first.documents}), "questions": len(first.documents),
        }  # fmt: skip
        about = about_vlm(options.vlm, answerer)
        if not world.main:
            evaluation.out = None
        return evaluation.result(protocol, about, data, figures, options.seed)


EXAMPLES = 5  # examples of each set that a result keeps


def samples_of(one: QuestionSet, answers: dict[str, list[str | None]]) -> list[dict[str, Any]]:
    """The first questions with their answers under each condition."""
    return [
        {
            "sample": document.sample, "question": document.question.messages[-1]["content"], "kind": document.kind,
            "answer": document.answer, "written": {name: texts[row] for name, texts in answers.items()},
        }
        for row, document in enumerate(one.documents[:EXAMPLES])
    ]  # fmt: skip


def lines_of(too_long: int, questions: int, kept: int) -> list[str]:
    """What a reader of a table has to know of questions that did not fit, and of images that were not exchanged."""
    lines = [f"counted as wrong, too long for the context: {too_long:,} of {questions:,}"] if too_long else []
    return [*lines, *([f"shuffled, without another image to take, their own kept: {kept:,}"] if kept else [])]


def render_questions(result: dict[str, Any]) -> str:
    """Tables as text, 80 columns."""
    figures, data = result["figures"], result["data"]
    lines = [f"{result['model']['name']}: questions of {data['source']}, {data['split']} split, by exact match"]
    for name, found in figures.get("sets", {data["name"]: figures}).items():
        lines += ["", name, table_of(found).to_text()]
        lines += lines_of(found["too_long"], found["questions"], found["kept_images"])
        if found["unreadable"]:
            lines.append(f"left out, unreadable images: {found['unreadable']:,}")
        if found["without_questions"]:
            lines.append("left out, " + ", ".join(f"{why}: {n:,}" for why, n in found["without_questions"].items()))
    return "\n".join(lines)
