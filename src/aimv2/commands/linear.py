"""``aimv2 linear``: a linear classifier on pooled features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from aimv2.config.types import Count
from aimv2.evals.options import PooledOptions

EXAMPLES = """\
aimv2 linear aimv2-large-patch14-224 --data photos
aimv2 linear runs/mine --data photos --layers last,avg6 --out results/linear"""
FIRST = "data dataset solver layers baselines batch_size device out"


@dataclass(kw_only=True)
class LinearOptions(PooledOptions):
    """Evaluate a frozen encoder by a linear classifier on the mean of its patch features, following CLIP's protocol.

    The value of the sweep is chosen on the validation split, else on a held-out fifth of the training images; the classifier
    is then fitted on all of them and tested once.

    Args:
        solver: lbfgs (logistic regression, CLIP's search over C) or sgd (a grid of learning rates in one computation)
        layers: last, avg6, all, or block numbers with commas; one forward pass serves all of them, the best on the validation
            images is reported
        train_limit: number of training images to sample; 0: all
        seed: random seed of held-out images, the order of SGD and the random baseline
    """

    ORDER = (
        "model data dataset solver layers baselines train_limit test_limit image_size batch_size seed device precision "
        "cache out image_mean image_std image_root test_fraction"
    )
    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    train_limit: Count = 0


def run(options: LinearOptions) -> dict[str, Any]:
    from aimv2.evals.linear import evaluate_linear

    return evaluate_linear(options, options.solver, options.train_limit)
