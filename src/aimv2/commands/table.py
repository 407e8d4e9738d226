"""Every command by name: its positional arguments and a line of help. Strings only; serves ``aimv2 --help`` and completion."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command; its module in :mod:`aimv2.commands` has its name with ``_`` for a space.

    Attributes:
        words: positional arguments; the last may end in ``*`` (any number).
        summary: a line of help.
        configured: takes the whole configuration of a run as dotted options.
    """

    words: tuple[str, ...]
    summary: str
    configured: bool = False


COMMANDS = {
    "pretrain": Command((), "pre-train an AIMV2; with nothing given, the demo on captioned scenes", configured=True),
    "run": Command(("chain",), "run a chain of stages: what is not done yet, in order, and one report"),
    "recipes": Command(("names*",), "list the recipes and chains by name, or print one"),
    "data import": Command(("source", "out"), "convert captioned images to WebDataset shards"),
    "data check": Command(("source",), "check shards before training"),
    "data browse": Command((), "write a page of samples as the model will see them, before a run", configured=True),
    "data shapes": Command(("out",), "write the built-in captioned scenes"),
    "data teach": Command(("teacher", "data", "out"), "store a teacher's patch features with the images"),
    "tokenizer train": Command(("captions", "out"), "train a BPE tokenizer on captions"),
    "caption": Command(("model", "images*"), "write captions of images, or score them against references"),
    "compare": Command(("results*",), "compare results with the paper's tables: text, Markdown, JSON, a plot"),
    "models": Command((), "list every model: parameters, GFLOPs, input size, licence, revision"),
    "convert": Command(("source", "out"), "write a model for transformers, timm, ONNX, OpenVINO or aimv2"),
    "embed": Command(("model", "images", "out"), "write features of a folder, a list or shards as arrays or Parquet"),
    "probe": Command(("model",), "evaluate a frozen encoder: attentive probes, the whole grid at once"),
    "knn": Command(("model",), "evaluate a frozen encoder: nearest neighbours by cosine, a sweep over k"),
    "linear": Command(("model",), "evaluate a frozen encoder: a linear classifier, by L-BFGS or SGD"),
    "fewshot": Command(("model",), "evaluate a frozen encoder: a few images per class, over several draws"),
    "segment": Command(("model",), "evaluate a frozen encoder: segmentation by a linear probe on its patches"),
    "depth": Command(("model",), "evaluate a frozen encoder: depth by a linear probe on its patches"),
    "zeroshot": Command(("model",), "classify by class texts: a pair (LiT, CLIP, ...), or a decoder's likelihood"),
    "retrieve": Command(("model",), "image-text retrieval, recall at k: a pair, or a decoder's likelihood"),
    "report": Command(("runs*",), "write a page of one run (curves, pictures, figures), or a comparison of several"),
    "explore": Command(("model",), "explore a model in the browser: features, captions, next patches, search"),
    "doctor": Command((), "check this machine and train a tiny model; exit code 1 if a check failed"),
    "push": Command(("model", "repository"), "upload a model to the hub, with its card"),
}
GROUPS = {name.split()[0] for name in COMMANDS if " " in name}


def function_name(name: str) -> str:
    """``data import`` -> ``data_import``: the command's function in :mod:`aimv2.api`, and its module."""
    return name.replace(" ", "_")


def command_name(function: str) -> str:
    """``data_import`` -> ``data import``."""
    return next(name for name in COMMANDS if function_name(name) == function)
