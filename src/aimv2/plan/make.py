"""The plan of a pre-training run: parameters, memory, layout, time, money, reading, checkpoints.

Counted: parameters, FLOPs, bytes of checkpoints. Computed, and compared with measurements (docs/plan.md): memory. Estimated, on the
part of the peak that the user states: everything in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from aimv2.config.load import check_keys, parse, read_recipe
from aimv2.config.schema import Config
from aimv2.data.stream.samples import training_samples
from aimv2.data.text.tokenizer import load_tokenizer
from aimv2.errors import UsageError
from aimv2.models.cards import Card
from aimv2.models.flops import step_flops
from aimv2.models.sizes import DecoderConfig, EncoderConfig
from aimv2.plan.layouts import AGAIN, RESERVED, Choice, best_choice, choice, layout_of_config
from aimv2.plan.loading import Decoding, measure_decoding
from aimv2.plan.memory import Program, Sizes
from aimv2.tasks.pretrain import shapes
from aimv2.train import prepare
from aimv2.train.defaults import unfilled
from aimv2.train.outlook import checkpoint_bytes, most_kept

VOCABULARY = 32_000  # tokens of a tokenizer that is not on this machine (assumed; SigLIP's has as many)
ROOM = 0.9  # of a GPU's memory, less RESERVED, that a plan fills: the allocator needs the rest


@dataclass(frozen=True)
class Assumed:
    """What a plan rests on and nobody can count.

    Attributes:
        mfu: part of the card's peak that the step reaches, recomputation not counted as work.
        tokens: caption tokens of a pair, end of text included.
        decoding: images a second of a core; None: measured here.
        write: bytes a second that a node writes to where checkpoints go.
    """

    mfu: float
    tokens: float
    decoding: float | None
    write: float


def read_config(recipe: str | None, given: dict[str, Any]) -> Config:
    """The values of a run, as ``pretrain`` would have them.

    Raises:
        UsageError: no recipe; a task or a form of data whose memory is not modelled.
    """
    if recipe is None:
        raise UsageError(
            "--config is not given: a recipe is expected, by path or by a name of `aimv2 recipes` (or --check RUN)",
            option="--config",
            code="missing",
        )
    if "run" in given:
        raise UsageError("--run: nothing is trained or written; leave it out", option="--run", code="conflict")
    base = read_recipe(recipe)
    check_keys(given, "on the command line", base)
    config = parse({**base, **given})
    prepare.locate_data(config)
    if isinstance(config.data.train, list) and not all(source.path for source in config.data.train):
        config.data.train = None  # a recipe names its sources, not where they are
    check_planned(config)
    return config


def check_planned(config: Config, of_card: bool = True) -> None:
    """Raises UsageError where a plan's figures would be wrong; ``of_card``: also those that rest on the peak of a card."""
    why = None
    if config.objective.name != "pretrain":
        why = f"objective.name {config.objective.name}: only pre-training is planned"
    elif config.train.patch_budget is not None:
        why = f"train.patch_budget {config.train.patch_budget}: native steps are not planned; give a model of a fixed image size"
    elif config.optim.lora:
        why = f"optim.lora {config.optim.lora}: low-rank updates are not planned; leave optim.lora out"
    elif of_card and config.train.precision == "fp32":
        why = "train.precision fp32: the peaks of cards are those of bf16; plan with --train.precision bf16"
    elif config.model.name == "auto":
        why = "model.name auto: a plan is of a named model; give --model.name NAME (`aimv2 models` lists them)"
    if why is not None:
        raise UsageError(why, code="unsupported")


def vocabulary(config: Config) -> tuple[int, str]:
    """Tokens of the run's tokenizer, and where the number is from; nothing is downloaded."""
    source = config.data.tokenizer
    if source == "auto":
        return config.data.vocab_size, "data.vocab_size"
    if Path(source).expanduser().exists():
        return load_tokenizer(source).vocab_size, source
    return VOCABULARY, f"assumed; {source} is not on this machine"


def shapes_of(config: Config) -> tuple[EncoderConfig, DecoderConfig, str]:
    """Encoder, decoder, and where the vocabulary's size is from."""
    tokens, source = vocabulary(config)
    return *shapes(config, tokens), source


def sizes_of(config: Config, encoder: EncoderConfig, tokens: float, pairs: int) -> Sizes:
    """A micro-batch; its longest caption is taken to reach ``data.max_tokens``."""
    return Sizes(pairs, encoder.patches, tokens, config.data.max_tokens, encoder.patches / 2)


def plan_run(
    config: Config, gpus: int, card: Card, nodes: int, price: float | None, assumed: Assumed
) -> dict[str, Any]:
    """What the run takes on so many cards.

    Args:
        config: of the run.
        gpus: over all nodes.
        card: each of them.
        nodes: machines.
        price: of a GPU and hour; None: no cost.
        assumed: what the plan rests on.
    """
    encoder, decoder, source = shapes_of(config)
    model = unfilled(encoder, decoder)
    train = config.train
    if gpus % nodes:
        raise UsageError(f"--gpus {gpus} don't divide by --nodes {nodes}", option="--nodes", code="mismatch")
    if train.batch_size % gpus:
        raise UsageError(
            f"train.batch_size {train.batch_size} does not divide by {gpus} ranks (--gpus)",
            option="--gpus",
            code="mismatch",
        )
    pairs = train.batch_size // gpus
    sizes = sizes_of(config, encoder, assumed.tokens, pairs)
    program, room = Program(train.precision != "fp32", train.compile != "off"), ROOM * (card.memory - RESERVED)
    wanted = wanted_choice(config, model, sizes, gpus, room, program)
    best = best_choice(model, pairs, sizes, gpus, room, program, bool(train.ema))
    used = wanted if wanted.fits or best is None else best
    steps = steps_of(config)
    time = time_of(config, model, encoder, used, gpus, card, assumed, steps)
    decoding = (
        Decoding(assumed.decoding, 0.0, "--decode-rate") if assumed.decoding else measure_decoding(config, encoder)
    )
    return {
        "model": encoder.name,
        "gpu": card.title,
        "gpus": gpus,
        "nodes": nodes,
        "parameters": count(model),
        "encoder_parameters": count(model.encoder),
        "vocabulary": decoder.vocab_size,
        "vocabulary_from": source,
        "steps": steps,
        "batch_size": train.batch_size,
        "tokens_a_pair": assumed.tokens,
        "configured": described(wanted),
        "suggested": None if best is None else described(best),
        "planned": "configured" if used is wanted else "suggested",
        **time,
        "cost": None if price is None else price * gpus * time["days"] * 24,
        **loading(config, time["pairs_per_s"], gpus, nodes, decoding),
        **checkpoints(config, model, nodes, time["seconds_a_step"], assumed),
        "card": {"bf16_tflops": card.bf16 / 1e12, "memory_gb": card.memory / 1e9, "source": card.source},
        "assumed": {
            "mfu": assumed.mfu,
            "write_gb_per_s": assumed.write / 1e9,
            "reserved_gb": RESERVED / 1e9,
            "room": ROOM,
        },
    }


def count(module: Any) -> int:
    return sum(part.numel() for part in module.parameters())


def steps_of(config: Config) -> int:
    """Optimizer steps; epochs need the data."""
    if config.train.epochs is not None and config.data.train is not None:
        return math.ceil(config.train.epochs * training_samples(config.data) / config.train.batch_size)
    if config.train.epochs is not None:
        raise UsageError("train.epochs: the number of steps follows the data; give data.train or train.steps")
    return config.train.steps


def wanted_choice(config: Config, model: nn.Module, sizes: Sizes, gpus: int, room: float, program: Program) -> Choice:
    """The layout of the configuration."""
    train = config.train
    layout = layout_of_config(config, gpus)
    if sizes.pairs % train.accumulate:
        raise UsageError(
            f"train.batch_size {train.batch_size} gives {gpus} ranks (--gpus) {sizes.pairs:g} pairs each, which do not divide by "
            f"train.accumulate {train.accumulate}; change one of them",
            option="train.accumulate",
            code="mismatch",
        )
    return choice(model, int(sizes.pairs) // train.accumulate, sizes, layout, room, program, bool(train.ema))


def described(one: Choice) -> dict[str, Any]:
    """A choice in plain values; memory in 1e9 bytes."""
    layout = one.layout
    return {
        "replicate": layout.replicate,
        "shard": layout.shard,
        "accumulate": layout.accumulate,
        "pairs_at_once": one.pairs,
        "checkpointing": layout.checkpointing,
        "memory_gb": {part: size / 1e9 for part, size in one.memory.parts.items()},
        "peak_gb": one.memory.total / 1e9,
        "peak_at": one.memory.when,
        "room_gb": one.room / 1e9,
        "fits": one.fits,
    }


def time_of(
    config: Config,
    model: nn.Module,
    encoder: EncoderConfig,
    used: Choice,
    gpus: int,
    card: Card,
    assumed: Assumed,
    steps: int,
) -> dict[str, Any]:
    """FLOPs, counted, and the time that they take at a part of the peak."""
    pairs = config.train.batch_size
    flops = step_flops(model, pairs, encoder.patches, pairs * assumed.tokens)
    seconds = flops / (gpus * card.bf16 * assumed.mfu) * (1 + AGAIN[used.layout.checkpointing])
    return {
        "flops_a_pair": flops / pairs,
        "flops_a_step": flops,
        "seconds_a_step": seconds,
        "pairs_per_s": pairs / seconds,
        "days": seconds * steps / 86400,
        "gpu_hours": seconds * steps * gpus / 3600,
    }


def loading(config: Config, rate: float, gpus: int, nodes: int, decoding: Decoding) -> dict[str, Any]:
    """What the loader has to bring, and the cores that it needs for it."""
    cores = rate / decoding.per_second
    weight = decoding.bytes_a_pair or None
    return {
        "decoded_per_core_and_s": decoding.per_second,
        "decoded": decoding.of,
        "cores": cores,
        "cores_a_node": cores / nodes,
        "workers_a_rank": math.ceil(cores / gpus),
        "workers_configured": config.data.workers,
        "read_mb_per_s": weight and rate * weight / 1e6,
        "read_mb_per_s_a_node": weight and rate * weight / 1e6 / nodes,
    }


def checkpoints(config: Config, model: nn.Module, nodes: int, seconds: float, assumed: Assumed) -> dict[str, Any]:
    """Bytes of checkpoints, counted, and how long they hold the run up: written by every node, the model's folder by one."""
    train, one, weights = config.train, checkpoint_bytes(config, model), 4 * count(model)
    written = weights / assumed.write + (one - weights) / nodes / assumed.write
    every = (train.save_every or steps_of(config)) * seconds
    return {
        "checkpoint_gb": one / 1e9,
        "checkpoints_gb": one * most_kept(config, steps_of(config)) / 1e9,
        "save_seconds": written,
        "save_fraction": written / (written + every),
    }
