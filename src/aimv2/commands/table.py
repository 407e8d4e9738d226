"""Every command by name: its positional arguments and a line of help. Strings only; serves ``aimv2 --help`` and completion."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command; its module in :mod:`aimv2.commands` has its name with ``_`` for a space.

    Attributes:
        words: positional arguments; the last may end in ``*`` (any number).
        summary: a line of help, at most 61 characters.
        part: what it is for, one of :data:`PARTS`.
        configured: takes the whole configuration of a run as dotted options.
        task: whose options it has; None: those of pre-training and its kin.
    """

    words: tuple[str, ...]
    summary: str
    part: str = "use"
    configured: bool = False
    task: str | None = None


PARTS = ("train", "data", "evaluate", "use")  # in the order in which ``aimv2 --help`` lists them
COMMANDS = {
    "pretrain": Command((), "pre-train an AIMV2; with nothing given, the demo", "train", configured=True),
    "vlm train": Command(
        (), "tune a vision-language model on conversations", "train", configured=True, task="instruct"
    ),
    "detect train": Command(
        (), "train a detector of classes or phrases on an encoder", "train", configured=True, task="detect"
    ),
    "run": Command(("chain",), "run a chain of stages: what is not done yet, and one report", "train"),
    "plan": Command((), "plan a run on GPUs: memory, layout, time, cost, before paying", "train", configured=True),
    "recipes": Command(("names*",), "list the recipes and chains by name, or print one", "train"),
    "report": Command(("runs*",), "write a page of one run, or a comparison of several", "train"),
    "data import": Command(("source", "out"), "convert captioned images to WebDataset shards", "data"),
    "data check": Command(("source",), "check shards before training", "data"),
    "data browse": Command((), "write a page of samples as the model will see them", "data", configured=True),
    "data shapes": Command(("out",), "write the built-in captioned scenes", "data"),
    "data teach": Command(("teacher", "data", "out"), "store a teacher's patch features with the images", "data"),
    "tokenizer train": Command(("captions", "out"), "train a BPE tokenizer on captions", "data"),
    "knn": Command(("model",), "classify by nearest neighbours: no training, a sweep over k", "evaluate"),
    "linear": Command(("model",), "a linear classifier on frozen features, by L-BFGS or SGD", "evaluate"),
    "probe": Command(("model",), "attentive probes on frozen features, the whole grid at once", "evaluate"),
    "fewshot": Command(("model",), "classify from a few images per class, over several draws", "evaluate"),
    "zeroshot": Command(("model",), "classify by class texts: a pair (LiT, CLIP), or a decoder", "evaluate"),
    "retrieve": Command(("model",), "image-text retrieval, recall at k: a pair, or a decoder", "evaluate"),
    "segment": Command(("model",), "segmentation by a probe of patches on frozen patch features", "evaluate"),
    "depth": Command(("model",), "depth by a probe of patches on frozen patch features", "evaluate"),
    "vlm score": Command(("vlm",), "score answers to questions on images", "evaluate"),
    "detect score": Command(("model*",), "score detections: COCO and LVIS AP, P@1 of phrases", "evaluate"),
    "compare": Command(("results*",), "compare results with the paper's tables; text, JSON, a plot", "evaluate"),
    "caption": Command(("model", "images*"), "write captions of images, or score them against references"),
    "detect photo": Command(("images*",), "find things in pictures by words, and draw their boxes"),
    "embed": Command(("model", "images", "out"), "write features of images as arrays or Parquet"),
    "explore": Command(("model",), "explore a model in the browser: features, captions, search"),
    "models": Command((), "list every model: parameters, GFLOPs, input size, licence"),
    "convert": Command(("source", "out"), "write a model for transformers, timm, ONNX or OpenVINO"),
    "push": Command(("model", "repository"), "upload a model to the hub, with its card"),
    "vlm build": Command(("encoder", "llm", "out"), "put an encoder under a language model, as one folder"),
    "doctor": Command(("runs*",), "check this machine, or the checkpoints of runs"),
}
GROUPS = {name.split()[0] for name in COMMANDS if " " in name}
FILES = {"detect": "detect photo"}  # what a group does with a file that stands where its command would


def function_name(name: str) -> str:
    """``data import`` -> ``data_import``: the command's function in :mod:`aimv2.api`, and its module."""
    return name.replace(" ", "_")


def command_name(function: str) -> str:
    """``data_import`` -> ``data import``."""
    return next(name for name in COMMANDS if function_name(name) == function)
