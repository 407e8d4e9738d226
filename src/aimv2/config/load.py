"""Reads a configuration: defaults, then a YAML recipe, then dotted options; and where each value came from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from aimv2.config.objective import options_of, refuse_foreign, refuse_unread
from aimv2.config.schema import Config, config_class, flatten, get_value, known_keys, leaf_keys
from aimv2.errors import UsageError, nearest, one_line
from aimv2.io import parse_yaml, read_file

TASK = "objective.name"
INF = float("inf")
LIMITS = {  # least and largest value of numbers
    (
        1,
        INF,
    ): "train.steps train.batch_size train.patch_budget train.accumulate train.log_every train.stop_at eval.samples "
    "eval.probe_epochs data.max_pixels model.text_width model.text_depth model.text_heads model.text_hidden model.projection",
    (-1, INF): "parallel.replicate parallel.shard",
    (0, INF): "train.save_every train.keep data.shuffle_buffer data.max_bad optim.warmup optim.weight_decay optim.clip "
    "optim.freeze_encoder objective.alpha eval.every eval.captions eval.probe_samples eval.probe_val_samples eval.knn_samples",
    (2, INF): "data.max_tokens objective.classes",
    (258, INF): "data.vocab_size",
    (0, 256): "data.workers",
    (0, 4096): "data.pack optim.lora",
    (0, 2**32 - 1): "seed",
    (0, 1): "data.flip optim.eps",
    (1e-3, 1): "data.crop_scale objective.decoder_share optim.layer_decay",
    (0, 0.999999): "train.ema",
    (0, 0.999): "objective.smoothing",
    (1e-12, 1e3): "optim.lr eval.probe_lr",
    (1e-9, 1e6): "train.epochs train.max_hours",
    (0, 1e3): "optim.min_lr optim.start_lr",
    (1e-6, 1e6): "objective.teacher_weight",
}


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A YAML recipe, by path or by its shipped name, as flat ``{dotted key: value}``; unknown keys are refused by name."""
    from aimv2.config.recipes import recipe_file  # here: a run's own configuration needs no names

    path = recipe_file(path, "--config")
    try:
        tree = parse_yaml(read_file(path).decode()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}", code="unreadable") from None
    if not isinstance(tree, dict):
        raise UsageError(f"--config {path}: sections with keys expected, got {type(tree).__name__}")
    flat = flatten(tree)
    check_keys(flat, f"in {path}")
    return flat


def task_in(flat: dict[str, Any]) -> str | None:
    """``objective.name`` of flat values; None where they name none, or none that can be a name."""
    name = flat.get(TASK)
    return name if isinstance(name, str) else None


def check_keys(flat: dict[str, Any], where: str, below: dict[str, Any] | None = None) -> None:
    """Raises UsageError for the first key that does not exist, naming the nearest that does.

    Args:
        flat: values by dotted key.
        where: they come from, for the message.
        below: values that these override, which may name the task whose options ``flat`` sets.
    """
    kind = config_class(task_in({**(below or {}), **flat}))
    leaves, known = leaf_keys(kind), known_keys(kind)
    for key, value in flat.items():
        if key not in known:
            raise UsageError(f"unknown key '{key}' {where}{nearest(key, leaves)}", option=key, code="unknown")
        if key not in leaves:
            first = next(leaf.split(".", 1)[1] for leaf in leaves if leaf.startswith(key + "."))
            raise UsageError(
                f"'{key}' {where} is a section, got {value!r}; expected keys such as '{key}.{first}'", option=key
            )


def parse(flat: dict[str, Any], stored: bool = False) -> Config:
    """Flat values (strings are read as YAML) -> Config, typed and checked by jsonargparse.

    Args:
        flat: values by dotted key.
        stored: they are those of a run, which may hold options of other tasks, as earlier versions let them pass.

    Raises:
        UsageError: a value of another type than its key's, or out of range; options that exclude each other.
    """
    from aimv2.config.paths import from_homes

    task, flat = task_in(flat), renewed(from_homes(flat))
    parser = config_parser(task)
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        node = tree
        *sections, name = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    parsed = parser.parse_object(tree)
    config = config_class(task)(**vars(parser.instantiate(parsed)))
    check_ranges(config)
    if not stored and not config.resume:
        refuse_foreign(config)
        refuse_changed(config, getattr(options_of(config.objective.name), "UNREAD", ()))
    return config


def renewed(flat: dict[str, Any]) -> dict[str, Any]:
    """Flat values, those that had another type in earlier versions as they are now."""
    if (key := "train.checkpointing") not in flat:
        return flat
    return {**flat, key: {"true": "full", "false": "off"}.get(str(flat[key]).lower(), flat[key])}


def refuse_changed(config: Config, keys: Sequence[str]) -> None:
    """Raises UsageError for the first of the keys (or whole sections) that is not at its default; the task reads none of them."""
    plain = type(config)()
    for key in leaf_keys(type(config)):
        chosen = key in keys or key.partition(".")[0] in keys
        if chosen and (value := get_value(config, key)) != get_value(plain, key):
            raise UsageError(
                f"{key} {value}: objective.name={config.objective.name} does not read it; leave it out",
                option=key,
                code="conflict",
            )


@cache
def config_parser(task: str | None = None) -> Any:
    """jsonargparse's parser of a task's Config, made once: it takes longer than all that it parses."""
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            raise UsageError(one_line(message))

    parser = Parser(exit_on_error=True)
    parser.add_class_arguments(config_class(task), nested_key=None, fail_untyped=True)
    return parser


def check_ranges(config: Config) -> None:
    """Raises UsageError for a number outside its range and for choices that contradict each other."""
    for (low, high), keys in LIMITS.items():
        for key in keys.split():
            value = get_value(config, key)
            if value is not None and not low <= value <= high:
                limit = f"at least {low:g}" if high == INF else f"{low:g} to {high:g}"
                raise UsageError(f"{key} must be {limit}, got {value}")
    optim, train = config.optim, config.train
    if optim.decay == "full" and optim.weight_decay > 1e-2:
        raise UsageError(
            f"optim.weight_decay {optim.weight_decay} with optim.decay=full removes that fraction of every weight at each step; "
            "use at most 0.01, or optim.decay=torch"
        )
    options_of(config.objective.name).check(config)
    refuse_unread(config)
    if optim.lora and config.init is None:
        raise UsageError("optim.lora updates the weights of a model that is there: --init MODEL says which")
    if optim.fresh_decoder and config.init is None:
        raise UsageError("optim.fresh_decoder drops the decoder of a model: --init MODEL says which")
    chosen = train.batch_size != type(train)().batch_size  # nobody's number may still follow the data
    if train.patch_budget is None and chosen and train.batch_size % train.accumulate:
        raise UsageError(
            f"train.batch_size {train.batch_size} does not divide by train.accumulate {train.accumulate}",
            code="mismatch",
        )
    if not all(0 <= beta < 1 for beta in optim.betas):
        raise UsageError(f"optim.betas must be at least 0 and below 1, got {list(optim.betas)}")
    low, high = config.data.crop_ratio
    if not 0 < low <= high:
        raise UsageError(f"data.crop_ratio must be two positive numbers in order, got {[low, high]}")
    least, most = config.data.areas
    if not 1 <= least <= most <= 16:
        raise UsageError(
            f"data.areas must be two whole numbers in order, 1 to 16 (areas of 2^n patches), got {[least, most]}"
        )
    if not config.eval.prefixes:
        raise UsageError("eval.prefixes must name at least one fraction of the patches, such as [0.5]")
    if not all(0 < part < 1 for part in config.eval.prefixes):
        raise UsageError(f"eval.prefixes must lie between 0 and 1, got {list(config.eval.prefixes)}")
    if isinstance(config.data.train, list):
        for source in config.data.train:
            if source.weight <= 0:
                raise UsageError(
                    f"data.train: the weight of '{source.name or source.path}' must be positive, got {source.weight}"
                )


def provenance(recipe: dict[str, Any], options: dict[str, Any], recipe_name: str) -> dict[str, str]:
    """For each key where its value came from: default, the recipe, or the command line."""
    keys = leaf_keys(config_class(task_in({**recipe, **options})))
    return {key: "command line" if key in options else recipe_name if key in recipe else "default" for key in keys}
