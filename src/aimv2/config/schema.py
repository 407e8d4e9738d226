"""The configuration of a run: typed dataclasses, filled from a YAML recipe and then from the command line.

Light on purpose: nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, make_dataclass
from functools import cache, partial
from typing import Any, Literal, get_type_hints

from aimv2.config.objective import BUILT_IN, ObjectiveConfig, options_of

AUTO = (  # keys that follow the data and the device, where neither a recipe nor the user sets them: train/defaults.py
    "model.name", "data.vocab_size", "optim.warmup", "train.steps", "train.batch_size", "train.precision", "train.compile",
    "train.save_every", "eval.every", "eval.samples",
)  # fmt: skip


@dataclass
class ModelConfig:
    """Encoder and decoder: a row of the sizes table and what to change in it (null keeps the row's value).

    Args:
        name: a name of the sizes table (aimv2.list_models()); auto takes the shape of init, or without one picks by the
            size of the first images
        image_size: pixels a side
        patch_size: pixels a side of a patch
        width: encoder width
        depth: encoder blocks
        heads: encoder heads
        hidden: encoder SwiGLU width
        min_patches: fewest patches of an image that a native encoder is meant for
        max_patches: most of them
        decoder_width: decoder width (Table 9e)
        decoder_depth: decoder blocks (Table 9f)
        decoder_heads: decoder heads
        decoder_hidden: decoder SwiGLU width
        decoder_separate: one trunk for pixels and one for text instead of a joint one (Table 9d)
        text_width: contrastive only, as the next four: width of the text tower; null: the released one's 768, or the
            encoder's where that is narrower
        text_depth: blocks of the text tower; null: 12, or the narrower encoder's
        text_heads: heads of the text tower; null: 6, or the narrower encoder's
        text_hidden: SwiGLU width of the text tower; null: 2048, or the narrower encoder's
        projection: width of the space that images and texts share; null: 768, or the narrower encoder's width
    """

    name: str = "auto"
    image_size: int | None = None
    patch_size: int | None = None
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    hidden: int | None = None
    min_patches: int | None = None
    max_patches: int | None = None
    decoder_width: int | None = None
    decoder_depth: int | None = None
    decoder_heads: int | None = None
    decoder_hidden: int | None = None
    decoder_separate: bool | None = None
    text_width: int | None = None
    text_depth: int | None = None
    text_heads: int | None = None
    text_hidden: int | None = None
    projection: int | None = None


@dataclass
class Source:
    """One source of a mixture.

    Args:
        path: folder, glob, brace pattern or one tar of WebDataset samples; empty: data.train must give it by name
        name: of the source, for messages and logs
        weight: fraction of the drawn samples, any positive number
        captions: caption fields of the sample's .json and how often each is drawn; null: all captions alike
    """

    path: str = ""
    name: str = ""
    weight: float = 1.0
    captions: dict[str, float] | None = None


@dataclass
class DataConfig:
    """Where pairs come from and how they are transformed.

    Args:
        train: a path or a list of {name, path, weight, captions}; null: $AIMV2_DATA
        val: a path; null: the val-* (or test-*) shards of the training folders
        tokenizer: a folder, a tokenizer.json or a hub name; auto: that of init where its decoder is kept, else a BPE
            trained on the training captions
        vocab_size: tokens of a tokenizer that is trained (auto)
        max_tokens: most tokens of a caption, end of text included
        workers: data worker processes a rank; 0 reads in the training process
        timeout: seconds without progress after which a data worker counts as hung: the run saves and ends with exit code 75; 0
            waits for ever
        shuffle_buffer: samples from which the next one is drawn, in each worker
        crop_scale: smallest fraction of the image's area that a random crop keeps (AIMV2, Table A1)
        crop_ratio: range of the crop's aspect ratio
        areas: native models: the least and the largest n of the areas of 2^n patches (AIMV2, native resolution); crops keep
            the image's own aspect ratio
        pack: native models: mini-batches of one area that share a row without padding; 0: one area at a time
        flip: probability of a horizontal flip; 0 where captions speak of left and right
        max_pixels: larger images are rejected before decoding
        max_bad: samples that can't be used, each counted once over all ranks and visits, before the run saves and ends; null: as
            many as there are, of conversations (the default there) until more than half of the rows are bad
        index_dir: where the index of the shards is kept, its metadata written anew at each start; null: the cache folder of the user
        features: contrastive only: a folder for the frozen encoder's features of every training image, computed once
            from the centre view (no crops, no flips) and read from then on; null: the encoder runs at each visit
    """

    train: str | list[Source] | None = None
    val: str | None = None
    tokenizer: str = "auto"
    vocab_size: int = 4096
    max_tokens: int = 77
    workers: int = 2
    timeout: float = 300.0
    shuffle_buffer: int = 1000
    crop_scale: float = 0.4
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    areas: tuple[int, int] = (7, 12)
    pack: int = 0
    flip: float = 0.5
    max_pixels: int = 178_956_970
    max_bad: int | None = 100
    index_dir: str | None = None
    features: str | None = None


@dataclass
class OptimConfig:
    """AdamW and its schedule (AIMV2, Table A1).

    Args:
        lr: peak learning rate
        min_lr: learning rate at the end of a cosine or a cooldown
        start_lr: learning rate at the first step of the warmup
        warmup: steps of the warmup
        schedule: cosine to min_lr; half-cosine to half the peak; cooldown, linear to min_lr (with no config given a run given as
            init continues: its options, its AdamW state, 20% of its steps, from its learning rate to 1e-6); constant
        betas: AdamW betas
        eps: AdamW epsilon
        weight_decay: strength; see decay
        decay: full = the paper's fully decoupled rule (p *= 1 - weight_decay * lr / peak); torch = lr * weight_decay
        clip: largest gradient norm; 0: no clipping
        layer_decay: learning rate of an encoder block relative to the next one's; 1: one learning rate for all
        fresh_decoder: initialize only the encoder from init; the decoder starts from scratch
        freeze_encoder: steps at the start in which only the decoder learns; the encoder then learns at the schedule's learning rate
        lora: rank of low-rank updates of the encoder's matrices (instruct: of the language model's), their own weights frozen and
            merged when saved; 0 trains them all (aimv2[peft])
    """

    lr: float = 1e-3
    min_lr: float = 1e-5
    start_lr: float = 1e-6
    warmup: int = 12500
    schedule: Literal["cosine", "half-cosine", "cooldown", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    decay: Literal["full", "torch"] = "full"
    clip: float = 1.0
    layer_decay: float = 1.0
    fresh_decoder: bool = False
    freeze_encoder: int = 0
    lora: int = 0


@dataclass
class TrainConfig:
    """The loop.

    Args:
        steps: optimizer steps of the whole schedule
        epochs: passes over the training data, in place of steps, which they set; null: steps count
        stop_at: save and end at this step without touching the schedule
        max_hours: save and end after so many hours of training, without touching the schedule
        batch_size: pairs a step over all ranks
        patch_budget: native models: patches a step over all ranks, in place of batch_size
        accumulate: micro-batches a step
        precision: of matmuls; weights, targets and losses are always fp32; fp16 scales the loss
        compile: torch.compile of each block; auto: where a compiler is found
        checkpointing: recompute blocks in the backward pass instead of keeping their activations: full = all; selective = all
            but matmuls and attention kernels; true and false mean full and off
        save_every: steps between checkpoints; 0: only at the end
        keep: newest checkpoints to keep; 0 keeps all
        log_every: steps between lines of metrics
        ema: decay of a moving average of the trained weights, from the first ones on, which is validated and saved in their
            place; 0: none
    """

    steps: int = 1_500_000
    epochs: float | None = None
    stop_at: int | None = None
    max_hours: float | None = None
    batch_size: int = 8192
    patch_budget: int | None = None
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    compile: Literal["auto", "on", "off"] = "auto"
    checkpointing: Literal["off", "full", "selective"] = "off"
    save_every: int = 1000
    keep: int = 3
    log_every: int = 20
    ema: float = 0.0


@dataclass
class ParallelConfig:
    """How the ranks of torchrun hold the model (FSDP2); replicate times shard is their number.

    Args:
        replicate: copies of the weights; -1: as many as shard leaves
        shard: ranks that weights, gradients and AdamW state of a copy are divided over; -1: all that replicate leaves
        reshard: a block's weights are gathered for its forward pass, freed, and gathered again for its backward pass; false
            keeps them in between. Nothing is freed where shard is 1
    """

    replicate: int = 1
    shard: int = -1
    reshard: bool = True


@dataclass
class EvalConfig:
    """Validation on a split of its own, always in fp32 with a centre crop and the first caption.

    Args:
        every: steps between validations; 0: only at the end
        best: the figure, such as val_text_loss, whose best checkpoint is kept whatever train.keep says: RUN@best; null: none
        samples: pairs of the validation split to score
        prefixes: prefix lengths, as fractions of the patches, at which the pixel loss is scored
        captions: held-out images to caption at the end
        probe: attentive probe on labels (.cls) at the end, against the same probe on the untrained encoder
        probe_epochs: epochs of that probe
        probe_lr: its peak learning rate
        probe_heads: its attention heads; null: one per 64 values of the encoder's width
        probe_samples: labelled training images that the probe uses; 0: all
        probe_val_samples: labelled validation images that the probe is tested on; 0: all
        knn: at each validation, kNN accuracy of the encoder as it is on labels (.cls): val_knn_top1
        knn_samples: labelled training images that vote in it, evenly over the data and kept in memory; 0: all
    """

    every: int = 1000
    best: str | None = None
    samples: int = 2000
    prefixes: tuple[float, ...] = (0.1, 0.5, 0.9)
    captions: int = 8
    probe: bool = False
    probe_epochs: int = 10
    probe_lr: float = 1e-3
    probe_heads: int | None = None
    probe_samples: int = 0
    probe_val_samples: int = 0
    knn: bool = False
    knn_samples: int = 2000


@dataclass
class LogConfig:
    """Where figures go in addition to metrics.jsonl.

    Args:
        tensorboard: write TensorBoard events into the run folder
        wandb: a Weights & Biases project; null: none
        report: draw report.html of the run at its end (as `aimv2 report RUN` does)
    """

    tensorboard: bool = True
    wandb: str | None = None
    report: bool = True


@dataclass
class Config:
    """A training run.

    Args:
        run: the run folder
        init: a model to start from: released name, hub id, folder, file, RUN or RUN@STEP; pre-training takes its decoder
            too, where it has one
        seed: random seed for weights, data order, crops and prefix lengths
        resume: continue the run in the folder; auto: or start it
        overwrite: remove the run in the folder first
        take_over: write a run folder that a process on another machine seems to write
        accept_data: with resume, go on although the training data are not those that the run was trained on
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: str | None = None
    init: str | None = None
    seed: int = 0
    resume: bool | Literal["auto"] = False
    overwrite: bool = False
    take_over: bool = False
    accept_data: bool = False


@cache
def config_class(task: str | None = None) -> type[Config]:
    """The configuration of a task: :class:`Config`, its section ``objective`` extended by what a task from elsewhere brings.

    Raises:
        UsageError: no such task.
    """
    if task is None or task in BUILT_IN:
        return Config
    own = options_of(task)
    bases = (ObjectiveConfig,) if issubclass(ObjectiveConfig, own) else (own, ObjectiveConfig)
    options = make_dataclass("TaskOptions", [("name", str, task)], bases=bases)
    sections = [("objective", options, field(default_factory=options))]
    for section, kind in (("optim", OptimConfig), ("data", DataConfig)):
        if changed := getattr(own, section.upper(), None):  # defaults of its own
            sections += [(section, kind, field(default_factory=partial(kind, **changed)))]
    return make_dataclass("TaskConfig", sections, bases=(Config,), namespace={"__doc__": Config.__doc__})


def known_keys(kind: type = Config, prefix: str = "") -> list[str]:
    """Every key of the configuration: ``["model", "model.name", ...]``."""
    keys = []
    hints = get_type_hints(kind)
    for f in dataclasses.fields(kind):
        keys.append(prefix + f.name)
        if dataclasses.is_dataclass(hints[f.name]):
            keys += known_keys(hints[f.name], f"{prefix}{f.name}.")
    return keys


def leaf_keys(kind: type = Config) -> list[str]:
    """The keys that hold a value."""
    keys = known_keys(kind)
    return [key for key in keys if not any(other.startswith(key + ".") for other in keys)]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections -> ``{"train.steps": 10}``. Only sections of :class:`Config` are opened."""
    known = set(known_keys())
    sections = known - set(leaf_keys())
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix + str(key)
        if isinstance(value, dict) and (name in sections or name not in known):
            flat |= flatten(value, name + ".") or {name: value}
        else:
            flat[name] = value
    return flat


def get_value(config: Config, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested values, tuples as lists (what config.yaml holds)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    return plain(dataclasses.asdict(config))
