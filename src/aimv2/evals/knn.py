"""The classifier without training: an image has the class of the training images nearest to it, by cosine.

Legend: N test images, M training images, B of a block, D width, C classes, S values of k, k = the largest of them.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aimv2.errors import UsageError, need
from aimv2.evals.harness import Evaluation
from aimv2.evals.options import PooledOptions
from aimv2.evals.pooled import Pooled, evaluate_pooled, open_splits, scores_of
from aimv2.evals.scores import top1
from aimv2.progress import tracked

DEFAULT_K = 20  # the headline if nothing chooses k (Caron et al., DINO, 2021: 20 works best for most)
TITLE = "nearest neighbours, in blocks"
BLOCK, SHELF = 512, 16384  # test and training images at once: a block of similarities takes 32 MiB


@dataclass(frozen=True)
class KnnSettings:
    """Everything that decides a kNN besides encoder and data.

    Attributes:
        ks: numbers of neighbours, rising.
        weights: uniform: every neighbour has one vote; distance: exp(cosine / temperature) votes (DINO).
        temperature: of the votes.
        backend: torch or faiss.
    """

    ks: tuple[int, ...]
    weights: str = "uniform"
    temperature: float = 0.07
    backend: str = "torch"


def choose_backend(given: str, device: torch.device) -> str:
    """``auto``: faiss on a CPU where it is installed (about half of torch's time there), else torch.

    Raises:
        UsageError: faiss given and not installed.
    """
    installed = importlib.util.find_spec("faiss") is not None
    if given == "faiss":
        need("faiss", "faiss", "--backend faiss")
    if given == "auto":
        return "faiss" if installed and device.type == "cpu" else "torch"
    return given


def predict(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, settings: KnnSettings, device: torch.device
) -> np.ndarray:
    """The class of each test image for each k.

    Cosine of a vector of zeros is 0. Equal votes go to the class with the lower number; of equally near training images
    (to the last bit of the computed cosine) the earlier one counts as nearer, with faiss whichever it finds.

    Args:
        train, test: float32 [M, D] and [N, D], not normalised.
        labels: int64 [M], 0..C-1.
        classes: C.
        settings: the largest k at most M.
        device: of the computation with torch.

    Returns:
        int64 [S, N]; memory besides the features is N * k numbers and one block of cosines, whatever M is.
    """
    assert max(settings.ks) <= len(train)
    known = torch.from_numpy(labels).to(device)
    similarity, rows = neighbours(train, test, max(settings.ks), settings.backend, device)
    parts = []
    for at in range(0, len(test), BLOCK):
        found = known[rows[at : at + BLOCK].to(device)]
        parts.append(vote(similarity[at : at + BLOCK].to(device), found, classes, settings).cpu())
    return torch.cat(parts, 1).numpy()


def vote(similarity: Tensor, found: Tensor, classes: int, settings: KnnSettings) -> Tensor:
    """Cosines [B, k] and classes [B, k] of the neighbours, nearest first -> the winners for each k, int64 [S, B]."""
    if settings.weights == "uniform":
        weights = torch.ones_like(similarity, dtype=torch.float64)
    else:  # exp((s - 1) / T) elects the same class as exp(s / T), and can't overflow
        weights = ((similarity.double() - 1) / settings.temperature).exp()
    votes = torch.zeros(len(found), classes, dtype=torch.float64, device=found.device)
    winners, done = [], 0
    for k in settings.ks:
        votes.scatter_add_(1, found[:, done:k], weights[:, done:k])
        winners.append(votes.argmax(1))  # the first of equal ones
        done = k
    return torch.stack(winners)


def neighbours(
    train: np.ndarray, test: np.ndarray, k: int, backend: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """For each test image: cosines [N, k], falling, and rows of the training images [N, k]."""
    if backend == "faiss":
        import faiss

        index = faiss.IndexFlatIP(train.shape[1])
        for at in range(0, len(train), SHELF):
            index.add(_unit(train[at : at + SHELF]).numpy())
        blocks = range(0, len(test), BLOCK)
        found = [index.search(_unit(test[at : at + BLOCK]).numpy(), k) for at in tracked(blocks, TITLE, len(blocks))]
        similarity, rows = (np.concatenate(parts) for parts in zip(*found))
        return torch.from_numpy(similarity), torch.from_numpy(rows)
    blocks, shelves = range(0, len(test), BLOCK), range(0, len(train), SHELF)
    best: list[tuple[Tensor, Tensor]] = []
    for at in tracked(
        shelves, TITLE, len(shelves)
    ):  # outermost: the training images are the most, they move to the device once
        shelf = _unit(train[at : at + SHELF]).to(device)
        more = [_nearest(_unit(test[begin : begin + BLOCK]).to(device), shelf, at, k) for begin in blocks]
        best = [_merge(old, new, k) for old, new in zip(best, more)] if best else more
    return torch.cat([part for part, _ in best]), torch.cat([part for _, part in best])


def _nearest(queries: Tensor, shelf: Tensor, first: int, k: int) -> tuple[Tensor, Tensor]:
    """Queries [B, D] against training images from row ``first`` on: cosines and rows of the nearest k, falling."""
    similarity = queries @ shelf.T
    columns = _top_columns(similarity, min(k, len(shelf)))
    nothing = similarity[:, :0], columns[:, :0]
    return _merge(nothing, (similarity.gather(1, columns), columns + first), k)


def _merge(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The nearest k of two lots; of equally near ones the old ones, then in their order."""
    both, rows = (torch.cat(parts, 1) for parts in zip(old, new))
    both, order = both.sort(dim=1, descending=True, stable=True)
    return both[:, :k], rows.gather(1, order[:, :k])


def _unit(features: np.ndarray) -> Tensor:
    """Rows of unit length; a row of zeros stays."""
    return F.normalize(torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32)), dim=1)


def _top_columns(similarity: Tensor, k: int) -> Tensor:
    """The columns [B, k], rising, of each row's k largest values; of equal values the first columns."""
    values, columns = similarity.topk(k, dim=1)
    crowded = (similarity >= values[:, -1:]).sum(1) > k  # topk took any of the equal ones
    if crowded.any():
        columns[crowded] = similarity[crowded].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return columns.sort(dim=1).values


def knn_figures(pooled: Pooled, settings: KnnSettings) -> dict[str, Any]:
    """The sweep over k for each layer; layer and k are chosen on the validation split only, if there is one."""
    classes, train, test = len(pooled.classes), pooled.train, pooled.test
    table, answers = [], []
    for number, layer in enumerate(pooled.layers):

        def predicted(features: np.ndarray, known: np.ndarray = train.features[number]) -> np.ndarray:
            return predict(known, train.labels, features, classes, settings, pooled.device)

        chosen_on = predicted(pooled.val.features[number]) if pooled.val is not None else None
        answer = predicted(test.features[number])
        for at, k in enumerate(settings.ks):
            row: dict[str, Any] = {"layer": layer, "k": k}
            if pooled.val is not None and chosen_on is not None:
                row["selection_top1"] = top1(chosen_on[at], pooled.val.labels)
            table.append({**row, "test_top1": top1(answer[at], test.labels)})
            answers.append(answer[at])
    if pooled.val is not None:
        best = max(range(len(table)), key=lambda at: table[at]["selection_top1"])  # the first of equal ones
        how = "validation split"
    else:
        default = min(settings.ks, key=lambda k: (abs(k - DEFAULT_K), k))
        best = pooled.headline() * len(settings.ks) + settings.ks.index(default)
        how = f"nothing: no validation split; k={default} and layer {table[best]['layer']} are fixed"
    figures = scores_of(answers[best], pooled)
    figures |= {
        "chosen": [{"layer": table[best]["layer"], "k": table[best]["k"]}],
        "selected_on": how,
        "table": table,
    }
    if len(pooled.layers) > 1:
        rows = [row for row in table if row["k"] == table[best]["k"]]
        figures["by_layer"] = {row["layer"]: row["test_top1"] for row in rows}
    return figures


def evaluate_knn(
    options: PooledOptions, settings: KnnSettings, pool: str = "mean", train_limit: int = 0
) -> dict[str, Any]:
    """The command ``knn``.

    Args:
        options: of the command.
        settings: its ``ks`` in any order, those above the number of training images left out and listed; backend may be auto.
        pool, train_limit: see :class:`aimv2.commands.knn.KnnOptions`.

    Raises:
        UsageError: options or data that do not fit.
    """
    with Evaluation("knn", options.out) as evaluation:
        backend = choose_backend(settings.backend, torch.device(options.where))
        splits, wanted = open_splits(options, train_limit), sorted(set(settings.ks))

        def at_most(images: int) -> KnnSettings:
            few = tuple(k for k in wanted if k <= images)
            if not few:
                raise UsageError(f"--k {wanted[0]}: more than the {images} training images; a smaller k expected")
            return replace(settings, ks=few, backend=backend)

        at_most(len(splits.train.labels))  # reported before the forward pass
        protocol = {
            "name": "kNN",
            "similarity": "cosine",
            "neighbours_from": "training split",
            "k": wanted,
            "weights": "uniform" if settings.weights == "uniform" else f"exp(cosine / {settings.temperature})",
            "backend": backend,
        }

        def method(pooled: Pooled) -> dict[str, Any]:
            mine = at_most(len(pooled.train.labels))
            left_out = [k for k in wanted if k not in mine.ks]
            return knn_figures(pooled, mine) | ({"k_left_out": left_out} if left_out else {})

        return evaluate_pooled(evaluation, options, splits, protocol, method, pool)
