"""Instruction tuning: the connector and the language model of a vision-language model learn to answer (AIMV2, section 5.6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from aimv2.config.instruct import InstructTaskOptions
from aimv2.config.schema import OptimConfig
from aimv2.data.images.decode import ImageError
from aimv2.data.passed import PassedOver, passed_lines
from aimv2.data.shards.format import Parts
from aimv2.data.stream.conversations import (
    ConversationStream,
    ImagePart,
    Row,
    RowMaker,
    TooLong,
    held_out_rows,
    pack_texts,
    rows_to_batch,
)
from aimv2.data.stream.samples import View
from aimv2.data.text.conversations import BAD
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.io import say
from aimv2.models.groups import parameter_groups
from aimv2.models.lora import add_lora, merge_lora
from aimv2.models.sizes import EncoderConfig
from aimv2.objectives import Objective
from aimv2.objectives.instruct import InstructObjective
from aimv2.objectives.pretrain import text_targets
from aimv2.tasks.held_out import HeldOut, evaluating
from aimv2.tasks.task import CardText, Context, Task
from aimv2.vlm.build import USE
from aimv2.vlm.model import encoder_shape, vlm_folder
from aimv2.vlm.tuned import FolderWriter, TunedVisionLanguage, linear_names

VLM_HEAD = "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [aimv2, vision]\n---\n\n"
BATCH = 16  # held-out conversations in the model at once


@dataclass
class HeldOutRows(HeldOut):
    """Held-out conversations: ``rows``."""

    rows: list[Row]


class Instruct(Task):
    """A vision-language model of ``aimv2 vlm build``, its encoder frozen by default."""

    options: ClassVar[type[Any]] = InstructTaskOptions
    reads: ClassVar[tuple[str, ...]] = ("init", "optim.lora")
    figures: ClassVar[tuple[str, ...]] = ("val_answer_loss", "val_answer_accuracy")
    compiles = False
    demo = False
    command = "vlm train"
    resuming = False

    @property
    def own(self) -> InstructTaskOptions:
        """Its options."""
        return cast(InstructTaskOptions, self.config.objective)

    def check(self) -> None:
        if self.config.data.train is None:
            raise UsageError(
                "data.train is not set: conversations in shards are expected", option="data.train", code="missing"
            )
        vlm_folder(self.init(), "init")

    def init(self) -> str:
        """What ``init`` says."""
        if self.config.init is None:
            raise UsageError(
                "objective.name=instruct trains a vision-language model: --init VLM says which (a folder of `aimv2 vlm build`, "
                "or RUN of an earlier such run)",
                option="--init",
                code="missing",
            )
        return self.config.init

    def reads_text(self) -> bool:
        return False  # the tokenizer is the model's own

    def encoder_config(self, vocab_size: int) -> EncoderConfig:
        about = self.writer.processor.image_processor.to_dict()
        return encoder_shape(self.writer.config.vision_config, about, self.init())

    def defaults(self, pairs: int, kind: Any, given: set[str]) -> dict[str, Any]:
        """One epoch, in batches as those of Table C1 (LLaVA) where there are as many samples."""
        train = self.config.train
        batch = train.batch_size if "train.batch_size" in given else min(128, 1 << max(pairs, 1).bit_length() - 1)
        steps = max(1, math.ceil((train.epochs or 1) * pairs / batch))
        steps = train.steps if "train.steps" in given and train.steps is not None else steps
        every = max(1, min(1000, steps // 6))
        values = {
            "train.steps": steps,
            "train.batch_size": batch,
            "train.precision": kind.precision,
            "train.compile": "off",
        }
        return {**values, "train.save_every": every, "eval.every": every, "eval.samples": 500}

    def check_samples(self, samples: Sequence[Parts]) -> None:
        """Raises UsageError where none of the first samples is a conversation that fits."""
        maker, said, long = self.maker(self.writer.processor), "", ""
        for number, parts in enumerate(samples):
            try:
                maker(f"sample {number + 1}", parts)
                return
            except ImageError as error:
                said = said or str(error)
            except TooLong as error:
                long = long or str(error)
        if long and not said:
            raise UsageError(
                f"data.train: each of the first {len(samples)} conversations is longer than {maker.limit:,} tokens (the first: {long}); "
                "a larger objective.row_tokens, objective.long_rows=cut, or a VLM of smaller images or a longer context",
                option="objective.row_tokens",
                code="limit",
            )
        raise UsageError(
            f"data.train: none of the first {len(samples)} samples is a conversation or has captions (the first: {said}); "
            "`aimv2 data check` names what is wrong, `aimv2 data import` makes shards of conversations",
            option="data.train",
            code="missing",
        )

    def maker(self, processor: Any) -> RowMaker:
        """Samples to rows, as the options want them."""
        options, context = self.own, self.context
        limit = min((value for value in (options.row_tokens, context) if value is not None), default=None)
        cut = options.long_rows == "cut"
        return RowMaker(processor, limit, cut, options.caption_prompt, self.config.data.max_pixels)

    # ---- model and data ----

    @cached_property
    def writer(self) -> FolderWriter:
        """Of the model folders; that of ``init`` may be gone where the run resumes."""
        run = self.config.run
        return FolderWriter(vlm_folder(run if run and self.resuming else self.init(), "init"))

    @property
    def context(self) -> int | None:
        """Most positions of the language model; None where its configuration states none."""
        return getattr(self.writer.config.get_text_config(), "max_position_embeddings", None)

    def build(self, context: Context) -> TunedVisionLanguage:
        """The model of ``init``, in fp32; a resumed run finds it in its own folder."""
        config, options = self.config, self.own
        self.resuming = context.resuming
        model = TunedVisionLanguage.opened(self.writer.folder)
        model.layers()
        model.encoder.requires_grad_(not options.freeze)
        model.encoder.frozen = options.freeze
        if config.optim.lora:
            names = linear_names(model)
            model.head.requires_grad_(False)
            add_lora(model.language, config.optim.lora, config.seed, names)
        if options.pack:
            check_packing(model, ImagePart(self.writer.processor).shape)
        return model

    def objective(self, model: nn.Module) -> Objective:
        return InstructObjective()

    def view(self, encoder: EncoderConfig) -> View:
        patches = encoder.patches if encoder.image_size is not None else 0
        return View(encoder.image_size or 0, patches, captions=False)

    def stream(self, context: Context, model: nn.Module) -> ConversationStream:
        config, options, world = self.config, self.own, context.world
        return ConversationStream(
            config.data, self.maker(self.writer.processor), config.train.batch_size, config.seed, world.rank, world.size,
            options.length_window, config.train.accumulate, options.pack,
        )  # fmt: skip

    def parameter_groups(self, model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
        """Encoder, connector and language model, each decayed and not, with ``scale``."""
        assert isinstance(model, TunedVisionLanguage)
        options, groups = self.own, parameter_groups(model, optim)
        scales = {id(p): options.connector_scale for p in model.connector.parameters()}
        scales |= {id(p): options.encoder_scale for p in model.encoder.parameters()}
        if model.newline is not None:
            scales[id(model.newline)] = options.connector_scale
        found = []
        for group in groups:
            learning = [p for p in group["params"] if p.requires_grad]
            for scale in sorted({scales.get(id(p), 1.0) for p in learning}):
                params = [p for p in learning if scales.get(id(p), 1.0) == scale]
                found.append({**group, "name": f"{group['name']} x {scale:g}", "params": params, "scale": scale})
        return found

    # ---- what comes of it ----

    def held_out(self, shards: Sequence[Path], view: View, tokenizer: Any, world: World) -> HeldOutRows:
        maker, count = self.maker(self.writer.processor), self.config.eval.samples
        rows, long, passed = held_out_rows(shards, maker, count, world.rank, world.size)
        self.say_left_out(long, passed, maker.limit, world)
        if world.max(
            torch.tensor(float(not rows), device=world.device)
        ):  # ranks score all that there is, or their parts, together
            rows, *_ = held_out_rows(shards, maker, count, 0, 1)
        none = torch.zeros(0)
        return HeldOutRows(none, [], [], none, [row.key for row in rows], rows)

    def say_left_out(self, long: int, passed: PassedOver, limit: int | None, world: World) -> None:
        """A line for the held-out rows of all ranks that are too long, and for each kind of bad ones."""
        kinds = list(BAD.values())
        found = passed.result()
        own = torch.tensor(
            [long, *(found[kind]["number"] if kind in found else 0 for kind in kinds)], device=world.device
        )
        every, *counts = world.sum(own).tolist()
        if every:
            say(
                f"held-out conversations: {every:,} are longer than {limit:,} tokens and are left out (objective.row_tokens)"
            )
        for kind, number in zip(kinds, counts):
            if number:
                examples = found[kind]["examples"] if kind in found else []
                (line,) = passed_lines(
                    {kind: {"number": number, "examples": examples}}, "held-out conversations, left out"
                )
                say(line)

    @torch.no_grad()
    def validate(self, model: nn.Module, objective: Objective, data: HeldOut, world: World) -> dict[str, float]:
        """The answers of held-out conversations, in fp32, each token after the true ones before it.

        Returns:
            ``val_answer_loss`` (nats a token), and ``val_answer_accuracy``: the fraction of answers whose every token is the most
            likely one there, which greedy generation would write word for word after the true earlier turns.
        """
        assert isinstance(data, HeldOutRows) and isinstance(model, TunedVisionLanguage)
        rows = sorted(data.rows, key=lambda row: len(row.ids))
        shape = ImagePart(self.writer.processor).shape
        batches = [rows_to_batch(rows[at : at + BATCH], shape) for at in range(0, len(rows), BATCH)]
        most = int(world.max(torch.tensor(float(len(batches)), device=world.device)))
        sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # loss, tokens, right answers, answers
        with evaluating(model):
            for number in range(most):
                batch = batches[min(number, len(batches) - 1)]  # as many on each rank; see mean_loss
                moved = batch.to(world.device)
                found = model(moved, text_targets(moved), True)
                if number < len(batches):
                    assert found.right is not None
                    right = answers_right(batch.real_tokens(), found.right)
                    sums += torch.tensor([float(found.loss), float(batch.token_count), right.sum(), len(right)]).to(
                        sums
                    )
        loss, tokens, right_sum, answers = world.sum(sums).tolist()
        return {"val_answer_loss": loss / max(tokens, 1), "val_answer_accuracy": right_sum / max(answers, 1)}

    def exported(self, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return merge_lora(weights) if self.config.optim.lora else weights

    def write(self, folder: Path, model: nn.Module, weights: dict[str, Tensor], card: str) -> None:
        """A folder as that of ``init``, which transformers opens."""
        assert isinstance(model, TunedVisionLanguage)
        self.writer.write(folder, model, weights)
        use = USE.format(out="FOLDER")
        (folder / "README.md").write_text(f"{VLM_HEAD}{card}\n```python\n{use}\n```\n", encoding="utf-8")

    def card(self) -> CardText:
        options, lora = self.own, self.config.optim.lora
        eyes = "frozen" if options.freeze else f"trained at {options.encoder_scale:g} times the learning rate"
        learned = f"language model by low-rank updates of rank {lora}, merged" if lora else "language model"
        return CardText(
            "A vision-language model, tuned on conversations about images",
            f"answers; encoder {eyes}, connector at {options.connector_scale:g} times the learning rate, {learned}; init {self.init()}",
            "transformers, here from FOLDER:",
        )


def answers_right(rows: Tensor, right: Tensor) -> Tensor:
    """Whether all tokens of each answer are right: float [answers].

    Args:
        rows: int64 [R'], places of the scored tokens in the flat text, ascending; an answer's follow each other.
        right: bool [R], R >= R'.
    """
    number = (rows.diff(prepend=rows[:1] - 2) != 1).cumsum(0) - 1
    wrong = torch.zeros(int(number[-1]) + 1 if len(number) else 0)
    wrong.index_add_(0, number, (~right[: len(rows)].cpu()).float())
    return (wrong == 0).float()


def check_packing(model: TunedVisionLanguage, shape: tuple[int, ...]) -> None:
    """Raises UsageError where conversations in one row give another loss or gradient than in rows of their own.

    Args:
        model: as it is trained.
        shape: of an image's pixels.
    """
    vocabulary = model.language.get_input_embeddings().num_embeddings
    ids = [number % vocabulary for number in range(1, 60) if number % vocabulary != model.image_id]
    rows = [Row(str(at), ids[at : at + 7 + 2 * at], [False] * 3 + [True] * (4 + 2 * at), [], []) for at in range(4)]
    first, last = model.layers()[0], model.layers()[-1]
    learning = [p for p in {*first.parameters(), *last.parameters()} if p.requires_grad]
    found = []
    for batch in (plain := rows_to_batch(rows, shape), pack_texts(plain)):
        loss = model.eval()(batch, text_targets(batch)).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, learning)])
    for one, other in zip(*found):
        if not torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()) + 1e-8):
            kind, attention = (
                type(model.language).__name__,
                getattr(model.language.config, "_attn_implementation", "none"),
            )
            raise UsageError(
                f"objective.pack: conversations that share a row give another loss or gradient in {kind} with attention {attention}; "
                "leave it out",
                option="objective.pack",
                code="unsupported",
            )


TASK = Instruct
