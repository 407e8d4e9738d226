"""A linear classifier on pooled features: L-BFGS with CLIP's search over C, or SGD over a grid of learning rates.

Legend: N images, B images a step, D width, C classes, G rates of the grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aimv2.data.images.labelled import hold_out
from aimv2.errors import UsageError
from aimv2.evals.harness import Evaluation
from aimv2.evals.options import PooledOptions
from aimv2.evals.pooled import Pooled, evaluate_pooled, open_splits, scores_of
from aimv2.evals.scores import top1
from aimv2.progress import progress_bar, tracked

# CLIP (Radford et al., 2021, appendix A.3): L-BFGS, at most 1000 iterations, strength between 1e-6 and 1e6 in 96 steps
PER_DECADE, LAST_STEP, FIRST_STRIDE, ITERATIONS = 8, 96, 16, 1000
MOST_FITS = 15  # of the search
RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
EPOCHS, BATCH, MOMENTUM = 100, 1024, 0.9


def logistic(features: np.ndarray, labels: np.ndarray, c: float, intercept: bool = True) -> tuple[Any, bool]:
    """Logistic regression by scikit-learn's L-BFGS on the features as they are.

    Args:
        features: [N, D].
        labels: int64 [N], two classes or more.
        c: inverse strength of the squared norm against the summed loss.
        intercept: with a bias, which is not punished.

    Returns:
        scikit-learn's fitted model, and whether it converged within 1000 iterations.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the result has it
        model = LogisticRegression(C=c, max_iter=ITERATIONS, fit_intercept=intercept).fit(features, labels)
    return model, int(np.max(model.n_iter_)) < ITERATIONS


def strength(step: int) -> float:
    """C of a step of CLIP's scale, 0..96: 1e-6 to 1e6, eight steps a decade."""
    return 10.0 ** (step / PER_DECADE - 6)


def search(score: Callable[[int], float]) -> dict[int, float]:
    """CLIP's search: seven steps over the whole scale, then both sides of the peak at half the distance, down to one step.

    Args:
        score: of a step, 0..96; called once for each that is looked at, MOST_FITS at most.

    Returns:
        the scores by step, in the order of the scale.
    """
    found = {step: score(step) for step in range(0, LAST_STEP + 1, FIRST_STRIDE)}
    stride = FIRST_STRIDE
    while stride > 1:
        stride //= 2
        steps = sorted(found)
        best = steps[peak([found[step] for step in steps])]
        for step in (best - stride, best + stride):
            if 0 <= step <= LAST_STEP and step not in found:
                found[step] = score(step)
    return dict(sorted(found.items()))


def peak(values: Sequence[float]) -> int:
    """Where the highest value is; of equal ones the middle one, for the edge of a plateau is there by chance."""
    ties = np.flatnonzero(np.asarray(values) == max(values))
    return int(ties[(len(ties) - 1) // 2])


class Standard:
    """Features to mean 0 and deviation 1, both of the training images: rates then mean the same for every encoder."""

    def __init__(self, features: np.ndarray, device: torch.device) -> None:
        self.device = device
        self.mean = features.mean(0, dtype=np.float64).astype(np.float32)
        self.scale = 1 / np.maximum(features.std(0, dtype=np.float64), 1e-6).astype(np.float32)

    def __call__(self, features: np.ndarray) -> Tensor:
        return torch.from_numpy((features - self.mean) * self.scale).to(self.device)


def sgd(
    x_ND: Tensor,
    labels: Tensor,
    classes: int,
    rates: tuple[float, ...],
    seed: int,
    epochs: int = EPOCHS,
    title: str = "SGD",
) -> tuple[Tensor, Tensor]:
    """Softmax regression by SGD with momentum, every rate at once: one product for all logits, one for all gradients.

    Args:
        x_ND: standardised features [N, D].
        labels: int64 [N].
        classes: C.
        rates: G peak rates, on a cosine down to 0; no decay of weights.
        seed: of the order of images.
        epochs: over the images.
        title: of the progress.

    Returns:
        weights [D, G, C] and biases [G, C], zero at the start. A learning rate that is too high may leave NaN, in its part only.
    """
    count, device = len(labels), x_ND.device
    size = min(BATCH, count)
    lr = torch.tensor(rates, device=device).view(-1, 1)  # [G, 1]
    weight, bias = (torch.zeros(n, len(rates), classes, device=device) for n in (x_ND.shape[1], 1))
    moving = [torch.zeros_like(part) for part in (weight, bias)]
    order = torch.Generator().manual_seed(seed)
    steps, step = epochs * (count // size), 0
    for _ in tracked(range(epochs), f"{title}, epochs", epochs):
        shuffled = torch.randperm(count, generator=order).to(device)
        for at in range(0, count - size + 1, size):
            rows = shuffled[at : at + size]
            x_BD = x_ND[rows]
            error = ((x_BD @ weight.flatten(1)).view(size, len(rates), classes) + bias).softmax(-1)  # [B, G, C]
            error[torch.arange(size, device=device), :, labels[rows]] -= 1
            error /= size
            now = lr * (0.5 + 0.5 * np.cos(np.pi * step / steps))
            gradients = ((x_BD.T @ error.flatten(1)).view_as(weight), error.sum(0, keepdim=True))
            for part, speed, gradient in zip((weight, bias), moving, gradients):
                speed.mul_(MOMENTUM).add_(gradient)
                part.sub_(now * speed)
            step += 1
    return weight, bias[0]


def sgd_predict(weight: Tensor, bias: Tensor, features: np.ndarray, see: Standard) -> np.ndarray:
    """The likeliest class by every rate: int64 [G, N]."""
    parts = []
    for at in range(0, len(features), BATCH):
        logits = (see(features[at : at + BATCH]) @ weight.flatten(1)).view(-1, *bias.shape) + bias  # [B, G, C]
        parts.append(logits.argmax(-1).T.cpu())
    return torch.cat(parts, 1).numpy()


def sweep_lbfgs(
    train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray], layer: str
) -> tuple[list[dict[str, Any]], int]:
    """CLIP's search: rows of the table, and which was best."""
    converged: dict[int, bool] = {}

    def score(step: int) -> float:
        fitted, converged[step] = logistic(*train, strength(step))
        advance(1)
        return top1(fitted.predict(val[0]), val[1])

    with progress_bar(f"layer {layer}, fits at most", MOST_FITS) as advance:
        found = search(score)
    rows = [
        {"C": strength(step), "selection_top1": value, "converged": converged[step]} for step, value in found.items()
    ]
    return rows, peak(list(found.values()))


def sweep_sgd(
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    classes: int,
    seed: int,
    device: torch.device,
    layer: str,
) -> tuple[list[dict[str, Any]], int]:
    """All rates in one computation: rows of the table, and which was best."""
    see = Standard(train[0], device)
    heads = sgd(see(train[0]), torch.from_numpy(train[1]).to(device), classes, RATES, seed, title=f"layer {layer}")
    tops = [top1(predicted, val[1]) for predicted in sgd_predict(*heads, val[0], see)]
    return [{"rate": rate, "selection_top1": top} for rate, top in zip(RATES, tops)], peak(tops)


def refit(row: dict[str, Any], x: np.ndarray, y: np.ndarray, test: np.ndarray, pooled: Pooled, seed: int) -> np.ndarray:
    """Learns from all images [N, D] with the chosen value; the classes of the test images."""
    if "C" in row:
        return logistic(x, y, row["C"])[0].predict(test)
    see, labels = Standard(x, pooled.device), torch.from_numpy(y).to(pooled.device)
    heads = sgd(see(x), labels, len(pooled.classes), (row["rate"],), seed)
    return sgd_predict(*heads, test, see)[0]


def linear_figures(pooled: Pooled, solver: str, seed: int) -> dict[str, Any]:
    """For each layer: the sweep on the validation images, then a fit on training and validation images, tested once.

    The headline's layer is the one that was best on the validation images.
    """
    known, val = pooled.train, pooled.val
    if len(np.unique(known.labels)) < 2:
        raise UsageError("--data: the training images have one class; two or more expected (a higher --train-limit?)")
    kept, held = hold_out(known.labels, seed) if val is None else (np.arange(len(known.labels)), None)
    if len(np.unique(known.labels[kept])) < 2:
        raise UsageError("--data: one class is left when a fifth is held out; more training images expected")
    table: list[dict[str, Any]] = []
    best: list[dict[str, Any]] = []
    answers = []
    for number, layer in enumerate(pooled.layers):
        x, y = known.features[number], known.labels
        train = (x[kept], y[kept])
        if val is not None:
            select = (val.features[number], val.labels)
            x, y = np.concatenate([x, select[0]]), np.concatenate([y, select[1]])
        else:
            select = (x[held], y[held])
        if solver == "lbfgs":
            rows, chosen = sweep_lbfgs(train, select, layer)
        else:
            rows, chosen = sweep_sgd(train, select, len(pooled.classes), seed, pooled.device, layer)
        answers.append(refit(rows[chosen], x, y, pooled.test.features[number], pooled, seed))
        rows[chosen]["test_top1"] = top1(answers[-1], pooled.test.labels)
        table += [{"layer": layer, **row} for row in rows]
        best.append({"layer": layer, **rows[chosen]})
    head = max(range(len(best)), key=lambda at: best[at]["selection_top1"])
    figures = scores_of(answers[head], pooled)
    how = "validation split" if val is not None else f"{len(held if held is not None else ())} training images held out"
    figures |= {
        "chosen": [{key: best[head][key] for key in ("layer", "C", "rate") if key in best[head]}],
        "selected_on": how,
        "table": table,
    }
    if len(pooled.layers) > 1:
        figures["by_layer"] = {row["layer"]: row["test_top1"] for row in best}
    return figures


def evaluate_linear(options: PooledOptions, solver: str, train_limit: int = 0) -> dict[str, Any]:
    """The command ``linear``; ``solver``: lbfgs or sgd.

    Raises:
        UsageError: options or data that do not fit.
    """
    protocol: dict[str, Any] = {"name": "linear", "solver": solver}
    if solver == "lbfgs":
        protocol |= {"features": "as they are", "C": "1e-6 to 1e6, 8 steps a decade, CLIP's search"}
        protocol |= {"iterations": ITERATIONS}
    else:
        protocol |= {"features": "standardised by the training images", "rates": list(RATES), "epochs": EPOCHS}
        protocol |= {"batch_size": BATCH, "momentum": MOMENTUM}
    with Evaluation("linear", options.out) as evaluation:
        splits = open_splits(options, train_limit)
        protocol["refit_on"] = "all training images" if splits.val is None else "training and validation images"
        return evaluate_pooled(
            evaluation,
            options,
            splits,
            protocol,
            lambda pooled: linear_figures(pooled, solver, options.seed),
        )
