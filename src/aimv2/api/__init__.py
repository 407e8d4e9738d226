"""Every verb of the command line as one function. Heavy imports happen inside."""

from aimv2.api.browse import data_browse
from aimv2.api.classify import fewshot, knn, linear
from aimv2.api.compare import compare
from aimv2.api.dense import depth, segment
from aimv2.api.doctor import doctor
from aimv2.api.explore import explore
from aimv2.api.features import embed
from aimv2.api.language import caption
from aimv2.api.match import retrieve, zeroshot
from aimv2.api.models import convert, load_model, models, push, save_pretrained
from aimv2.api.probe import probe
from aimv2.api.report import report
from aimv2.api.stages import run
from aimv2.api.teach import data_teach
from aimv2.api.train import data_check, data_import, data_shapes, pretrain, tokenizer_train

__all__ = [
    "caption",
    "compare",
    "convert",
    "data_browse",
    "data_check",
    "data_import",
    "data_shapes",
    "data_teach",
    "depth",
    "doctor",
    "embed",
    "explore",
    "fewshot",
    "knn",
    "linear",
    "load_model",
    "models",
    "pretrain",
    "probe",
    "push",
    "report",
    "retrieve",
    "run",
    "save_pretrained",
    "segment",
    "tokenizer_train",
    "zeroshot",
]
