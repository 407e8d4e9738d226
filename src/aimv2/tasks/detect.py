"""Detection and grounding: a head of transformers on the encoder's feature pyramid learns boxes of classes and phrases (section 5.5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from aimv2.config.detect import DetectTaskOptions
from aimv2.config.schema import OptimConfig
from aimv2.data.images.boxes import boxes_in, doubt_of_form, regions_of
from aimv2.data.images.decode import ImageError
from aimv2.data.shards.format import Parts, json_of, read_samples
from aimv2.data.stream.regions import (
    HeldRegions,
    RegionMaker,
    RegionStream,
    class_names,
    held_out_regions,
    learned_names,
    phrases_in,
)
from aimv2.data.stream.samples import View, training_shards
from aimv2.data.text.phrases import Prompts, small_tokenizer, words_of
from aimv2.detect.build import (
    ABOUT,
    TEXT_LIMIT,
    build_detector,
    check_same_form,
    get_tokenizer,
    head_config,
    picture_side,
    settle_norms,
    square_side,
    write_detector,
)
from aimv2.detect.find import is_detector, open_detector
from aimv2.detect.model import Detector
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.interop.load import encoder_shape
from aimv2.interop.model_folder import find_model
from aimv2.interop.plain import open_plain
from aimv2.io import say
from aimv2.models.groups import parameter_groups
from aimv2.models.init import init_weights
from aimv2.models.lora import TARGETS, add_lora, merge_lora
from aimv2.models.sizes import EncoderConfig
from aimv2.objectives import Objective
from aimv2.objectives.detect import DetectObjective
from aimv2.tasks.held_out import HeldOut, evaluating
from aimv2.tasks.task import CardText, Context, Task

SETTLED = 32  # training pictures that batch norms take their statistics from
PHRASES = 200_000  # training samples whose phrases a tokenizer takes its words from, at most


@dataclass
class HeldPictures(HeldOut):
    """Held-out pictures with their regions: ``pictures``, of all ranks."""

    pictures: list[HeldRegions]


class Detect(Task):
    """A head of transformers on an encoder, frozen by default."""

    options: ClassVar[type[Any]] = DetectTaskOptions
    reads: ClassVar[tuple[str, ...]] = ("init", "optim.lora")
    figures: ClassVar[tuple[str, ...]] = ("val_ap", "val_ap50", "val_p_at_1")
    may_change: ClassVar[tuple[str, ...]] = ("objective.threshold",)
    compiles = False
    demo = False
    command = "detect train"
    resuming = False

    @property
    def own(self) -> DetectTaskOptions:
        """Its options."""
        return cast(DetectTaskOptions, self.config.objective)

    def check(self) -> None:
        if self.config.data.train is None:
            raise UsageError(
                "data.train is not set: shards with boxes are expected", option="data.train", code="missing"
            )
        if self.config.init is None and self.own.freeze:
            raise UsageError(
                "objective.name=detect trains a head on a frozen encoder: --init MODEL says which (objective.freeze=false trains one "
                "from random weights)",
                option="--init",
                code="missing",
            )
        self.shape()

    def reads_text(self) -> bool:
        return False  # the tokenizer is that of the text tower

    def encoder_config(self, vocab_size: int) -> EncoderConfig:
        return self.shape()

    def shape(self) -> EncoderConfig:
        """Of the encoder: of ``init``, or of the section ``model``."""
        if self.config.init is None:
            return super().encoder_config(1)
        from dataclasses import replace

        if is_detector(self.config.init):
            stored = open_plain("AutoConfig", find_model(self.config.init))
            return stored.backbone_config.shape
        return replace(encoder_shape(self.config.init), pool_heads=0)

    def defaults(self, pairs: int, kind: Any, given: set[str]) -> dict[str, Any]:
        """Twelve passes over the data in batches of 16, the mini-batch and the length that detectors are compared at."""
        train = self.config.train
        batch = train.batch_size if "train.batch_size" in given else min(16, 1 << max(pairs, 1).bit_length() - 1)
        steps = max(1, math.ceil((train.epochs or 12) * pairs / batch))
        steps = train.steps if "train.steps" in given and train.steps is not None else steps
        every = max(1, min(5000, steps // 6))
        return {
            "train.steps": steps, "train.batch_size": batch, "train.precision": kind.precision, "train.compile": "off",
            "train.save_every": every, "eval.every": every, "eval.samples": 500,
        }  # fmt: skip

    def check_samples(self, samples: Sequence[Parts]) -> None:
        """Raises UsageError where none of the first samples has a box, class names are missing, or boxes are in another form."""
        options, found, said, unnamed = self.own, 0, "", 0
        given, sizes = list[Any](), list[Any]()
        maker = RegionMaker(options, 64, 64, (0, 0, 0), [[]], None, 0.0, self.config.data.max_pixels)
        for number, parts in enumerate(samples):
            try:
                image, regions = maker.read(parts)
            except ImageError as error:
                said = said or f" (the first: sample {number + 1}, {error})"
                continue
            phrases = regions.phrases if options.head == "grounding" else []
            found += len(regions.boxes) + len(phrases)
            about = json_of(parts)
            own = boxes_in(about)
            given, sizes = given + own, sizes + [about.get("size") or image.size] * len(own)
            unnamed += regions_of(about, image.size)[1].count("no-class")
        if doubt := doubt_of_form(given, sizes):
            raise UsageError(
                f"data.train: {doubt}; KEY.json has [x, y, width, height] in pixels",
                option="data.train",
                code="mismatch",
            )
        if not found and unnamed:
            raise UsageError(
                f"data.train: class names are missing: none of {unnamed} objects of the first {len(samples)} samples has a `class`",
                option="data.train",
                code="missing",
            )
        if not found:
            raise UsageError(
                f"data.train: none of the first {len(samples)} samples has a box that objective.head={options.head} can learn{said}; "
                "KEY.json with `objects` or `phrases` is expected: `aimv2 data import` makes such shards of annotations",
                option="data.train",
                code="missing",
            )

    # ---- words and classes ----

    @cached_property
    def classes(self) -> list[list[str]]:
        """Class names of each source."""
        return [class_names(shards) for shards in training_shards(self.config.data)]

    @property
    def names(self) -> list[str]:
        """Class names of all sources."""
        return list(dict.fromkeys(name for names in self.classes for name in names))

    @cached_property
    def tokenizer(self) -> Any:
        """Of the text tower: its own, that of ``init`` or the run's, or one of the words of the data; None of a head without words."""
        if self.own.head != "grounding":
            return None
        if self.home is not None:
            return get_tokenizer(self.home)
        if self.own.text is not None:
            return get_tokenizer(self.own.text)
        shards = (shard for part in training_shards(self.config.data) for shard in part)
        samples = islice((parts for shard in shards for _, parts in read_samples(shard)), PHRASES)
        phrases = {phrase for parts in samples for phrase in phrases_in(json_of(parts))}
        return small_tokenizer(words_of([*self.names, *phrases]))

    @property
    def home(self) -> Path | None:
        """A folder of this very detector: the run's newest checkpoint where it resumes, or ``init`` where that is a detector."""
        if self.resuming and self.config.run:
            return find_model(self.config.run)
        if self.config.init is not None and is_detector(self.config.init):
            return find_model(self.config.init)
        return None

    def maker(self, encoder: EncoderConfig) -> RegionMaker:
        """Samples to rows, as the options want them."""
        options, data = self.own, self.config.data
        prompts, classes = None, self.classes
        if options.head == "grounding":
            prompts = Prompts(self.tokenizer, TEXT_LIMIT)
            classes = [learned_names(*one) for one in zip(training_shards(data), classes, strict=True)]
        fill = tuple(round(255 * value) for value in encoder.mean)
        sides = picture_side(options, encoder), square_side(options, encoder)
        return RegionMaker(options, *sides, fill, classes, prompts, data.flip, data.max_pixels)

    # ---- model and data ----

    def build(self, context: Context) -> Detector:
        """The head with random weights on the encoder of ``init``, or the detector of ``init``."""
        config, options, self.resuming = self.config, self.own, context.resuming
        if config.init is not None and not context.resuming and is_detector(config.init):
            model = self.continued(config.init)
        else:
            model = self.fresh(context.resuming)
        model.encoder.requires_grad_(not options.freeze)
        if config.optim.lora:
            add_lora(model.encoder, config.optim.lora, config.seed, TARGETS)
        return model

    def continued(self, source: str) -> Detector:
        """The detector of ``init``, whose head and classes must be those of the run."""
        given = open_detector(source, option="init")
        if given.model.head != self.own.head or (given.names != self.names and self.own.head != "grounding"):
            raise UsageError(
                f"init {source}: a detector with objective.head={given.model.head} of {len(given.names)} classes; the run has "
                f"objective.head={self.own.head} and {len(self.names)}",
                option="init",
                code="mismatch",
            )
        check_same_form(self.own, given.model, given.names, self.tokenizer, source)
        return given.model

    def fresh(self, resuming: bool) -> Detector:
        """A new head; where the run resumes its checkpoint fills it, and ``init`` may be gone."""
        from aimv2.interop.card import encoder_in
        from aimv2.interop.load import load_model

        config, options = self.config, self.own
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            shape = self.stored_shape() if resuming else self.shape()
            model = build_detector(options, head_config(options, shape, self.names, self.tokenizer))
            if resuming:
                return model
            if config.init is None:
                init_weights(model.encoder, config.seed)
            else:
                state = encoder_in(load_model(config.init)).state_dict()
                model.encoder.load_state_dict(
                    {key: value for key, value in state.items() if not key.startswith("head.")}
                )
        if options.head == "closed":
            settle_norms(model, self.first_pictures(model.encoder.config))
        return model

    def stored_shape(self) -> EncoderConfig:
        assert self.home is not None
        return open_plain("AutoConfig", self.home).backbone_config.shape

    def first_pictures(self, encoder: EncoderConfig) -> Tensor:
        """The first training pictures as they are: uint8 [B, 3, S, S], equal on every rank."""
        shards = [shard for part in training_shards(self.config.data) for shard in part]
        pictures, _ = held_out_regions(shards, self.maker(encoder), SETTLED, 0, 1)
        return torch.stack([torch.from_numpy(one.pixels) for one in pictures if one.pixels is not None])

    def objective(self, model: nn.Module) -> Objective:
        return DetectObjective(self.own.head, len(self.names))

    def view(self, encoder: EncoderConfig) -> View:
        square = square_side(self.own, encoder)
        return View(square, (square // encoder.patch_size) ** 2, captions=False)

    def stream(self, context: Context, model: nn.Module) -> RegionStream:
        assert isinstance(model, Detector)
        config, world, maker = self.config, context.world, self.maker(model.encoder.config)
        return RegionStream(
            config.data, maker, config.train.batch_size, config.seed, world.rank, world.size, config.train.accumulate
        )

    def parameter_groups(self, model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
        """Encoder, text tower and head, each decayed and not, the encoder by layer where ``optim.layer_decay`` says so, with ``scale``."""
        assert isinstance(model, Detector)
        options, encoder = self.own, model.encoder
        scales = {id(parameter): options.encoder_scale for parameter in encoder.parameters()}
        for below, part in enumerate(reversed([encoder.patch_embed, *encoder.blocks]), 1):
            scales |= {
                id(parameter): options.encoder_scale * optim.layer_decay**below for parameter in part.parameters()
            }
        if (tower := model.text_tower()) is not None:
            scales |= {id(parameter): options.text_scale for parameter in tower.parameters()}
        found = []
        for group in parameter_groups(model, optim):
            learning = [p for p in group["params"] if p.requires_grad]
            for scale in sorted({scales.get(id(p), 1.0) for p in learning}):
                params = [p for p in learning if scales.get(id(p), 1.0) == scale]
                found.append({**group, "name": f"{group['name']} x {scale:g}", "params": params, "scale": scale})
        return found

    # ---- what comes of it ----

    def held_out(self, shards: Sequence[Path], view: View, tokenizer: Any, world: World) -> HeldPictures:
        maker = self.maker(self.stored_shape() if self.resuming else self.shape())
        pictures, passed = held_out_regions(shards, maker, self.config.eval.samples, world.rank, world.size)
        if world.main:
            for kind, about in passed.result().items():
                say(f"held-out pictures: {about['number']:,} are left out: {kind}, such as {about['examples'][0]}")
        none = torch.zeros(0)
        return HeldPictures(none, [], [], none, [one.key for one in pictures], pictures)

    @torch.no_grad()
    def validate(self, model: nn.Module, objective: Objective, data: HeldOut, world: World) -> dict[str, float]:
        """Average precision of the classes and precision at 1 of the phrases of held-out pictures, in fp32.

        Returns:
            ``val_ap`` and ``val_ap50`` (COCO, of boxes; of a head of masks those around its masks), ``val_p_at_1``; those that there
            is something to score for, 0..1.
        """
        from aimv2.evals.detection.held import HeldTruth, score_held

        assert isinstance(data, HeldPictures) and isinstance(model, Detector)
        prompts = Prompts(self.tokenizer, TEXT_LIMIT) if self.own.head == "grounding" else None
        with evaluating(model):
            return score_held(model, prompts, HeldTruth(data.pictures, self.names), world)

    def exported(self, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return merge_lora(weights) if self.config.optim.lora else weights

    def write(self, folder: Path, model: nn.Module, weights: dict[str, Tensor], card: str) -> None:
        """A folder of transformers, with its tokenizer and what a picture is made into."""
        assert isinstance(model, Detector)
        options, encoder = self.own, model.encoder.config
        about = {
            "format": "aimv2 detector 1", "head": options.head, "image_size": picture_side(options, encoder),
            "square": square_side(options, encoder), "threshold": options.threshold, "classes": self.names,
        }  # fmt: skip
        write_detector(folder, model.net, model.saved(weights), self.tokenizer, about, card)

    def card(self) -> CardText:
        options = self.own
        how = f"LoRA of rank {self.config.optim.lora} merged in, trained" if self.config.optim.lora else "trained"
        learns = not options.freeze or self.config.optim.lora
        eyes = f"{how} at {options.encoder_scale:g} times the learning rate" if learns else "frozen"
        rule = {
            "grounding": "a phrase's score is the mean probability of its tokens (sigmoid), its boxes those of the queries",
            "closed": "a class's score is the sigmoid of its logit",
            "masks": "a mask's score is its class's probability times the mean probability inside it",
        }[options.head]
        return CardText(
            f"A detector (objective.head={options.head})",
            f"boxes; encoder {eyes}, init {self.config.init}; decoding: {rule}; no suppression of overlaps; drawn from a score of "
            f"{options.threshold:g} on",
            f"transformers once aimv2 is imported, or `aimv2.detect.find.open_detector(FOLDER)`; {ABOUT} says how pictures are resized",
        )


TASK = Detect
