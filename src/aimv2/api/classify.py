"""Classifiers on pooled features of a frozen encoder: knn, linear, fewshot. Heavy imports happen inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aimv2.api.probe import words
from aimv2.errors import UsageError, nearest

if TYPE_CHECKING:
    from aimv2.evals.pooled import Asked


def knn(
    model: str,
    data: str | None = None,
    dataset: str | None = None,
    k: str = "1,5,10,20,50,100,200",
    weights: str = "uniform",
    temperature: float = 0.07,
    backend: str = "auto",
    layers: str = "last",
    pool: str = "mean",
    baselines: str | None = None,
    train_limit: int = 0,
    test_limit: int = 0,
    image_size: int | str | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str | None = None,
    precision: str = "fp32",
    cache: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Measure a frozen encoder by its nearest neighbours: no training, cosine similarity, a sweep over k.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a folder of a transformers vision model,
            timm:NAME, or a folder that convert --to openvino wrote
        data: labelled images: class folders, shards, CIFAR's pickles, CSV lists, or a datasets hub id
        dataset: a registered name, whose counts are then checked; null: any data set
        k: numbers of neighbours; all are reported, the headline is chosen on the validation split, and is 20 without one
        weights: uniform (a vote each) or distance (exp(cosine / temperature) votes, as DINO's)
        temperature: of the votes by distance
        backend: torch, faiss, or auto (faiss on a CPU where it is installed); both are exact
        layers: last, avg6, all, or blocks with commas; all in the same pass
        pool: mean of the patches, or attention (models with a pooling head)
        baselines: random (the same encoder untrained), pixels (of a mean patch), or both with a comma; null: none
        train_limit: training images, drawn; 0: all
        test_limit: test images, drawn; 0: all
        image_size: pixels a side, learned positions interpolated; native: each image at its own size (native models)
        batch_size: images at once
        seed: of the random baseline
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the trunk's products, fp32 or bf16
        cache: folder of features that several verbs share; null: in the result's folder
        out: folder of result.json and feature cache; interrupted and started again it goes on
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """
    ks = _whole(k, "--k")
    _one_of("--weights", weights, ("uniform", "distance"))
    _one_of("--backend", backend, ("auto", "torch", "faiss"))
    _one_of("--pool", pool, ("mean", "attention"))
    if temperature <= 0:
        raise UsageError(f"--temperature {temperature}: a number above 0 expected")
    shared = (
        data,
        dataset,
        layers,
        pool,
        baselines,
        train_limit,
        test_limit,
        image_size,
        batch_size,
        seed,
        device,
        out,
        precision,
        cache,
    )
    asked = _asked(model, *shared, image_mean, image_std)
    from aimv2.evals.knn import measure_knn

    return measure_knn(asked, ks, weights, temperature, backend)


def linear(
    model: str,
    data: str | None = None,
    dataset: str | None = None,
    solver: str = "lbfgs",
    layers: str = "last",
    baselines: str | None = None,
    train_limit: int = 0,
    test_limit: int = 0,
    image_size: int | str | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str | None = None,
    precision: str = "fp32",
    cache: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Measure a frozen encoder by a linear classifier on the mean of its patch features, as CLIP's protocol has it.

    The value of the sweep is chosen on the validation split, else on a held-out fifth of the training images; then all
    of them are learned from, and the test images are looked at once.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a folder of a transformers vision model,
            timm:NAME, or a folder that convert --to openvino wrote
        data: labelled images: class folders, shards, CIFAR's pickles, CSV lists, or a datasets hub id
        dataset: a registered name, whose counts are then checked; null: any data set
        solver: lbfgs (logistic regression, CLIP's search over C) or sgd (a grid of rates in one computation)
        layers: last, avg6, all, or blocks with commas; the trunk runs once, the best on the validation images is reported
        baselines: random (the same encoder untrained), pixels (of a mean patch), or both with a comma; null: none
        train_limit: training images, drawn; 0: all
        test_limit: test images, drawn; 0: all
        image_size: pixels a side, learned positions interpolated; native: each image at its own size (native models)
        batch_size: images at once in the trunk
        seed: of held-out images, order of SGD and the random baseline
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the trunk's products, fp32 or bf16
        cache: folder of features that several verbs share; null: in the result's folder
        out: folder of result.json and feature cache; interrupted and started again it goes on
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """
    _one_of("--solver", solver, ("lbfgs", "sgd"))
    shared = (data, dataset, layers, "mean", baselines, train_limit, test_limit, image_size, batch_size)
    asked = _asked(model, *shared, seed, device, out, precision, cache, image_mean, image_std)
    from aimv2.evals.linear import measure_linear

    return measure_linear(asked, solver)


def fewshot(
    model: str,
    data: str | None = None,
    dataset: str | None = None,
    shots: str = "1,5,10",
    seeds: int = 5,
    layers: str = "last",
    baselines: str | None = None,
    test_limit: int = 0,
    image_size: int | str | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str | None = None,
    precision: str = "fp32",
    cache: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Measure a frozen encoder by a classifier that learns from a few images a class, over several draws.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a folder of a transformers vision model,
            timm:NAME, or a folder that convert --to openvino wrote
        data: labelled images: class folders, shards, CIFAR's pickles, CSV lists, or a datasets hub id
        dataset: a registered name, whose counts are then checked; null: any data set
        shots: images a class; the headline is of the largest number
        seeds: draws
        layers: last, avg6, all, or blocks with commas; the headline is of last where it is among them, else of the first
        baselines: random (the same encoder untrained), pixels (of a mean patch), or both with a comma; null: none
        test_limit: test images, drawn; 0: all
        image_size: pixels a side, learned positions interpolated; native: each image at its own size (native models)
        batch_size: images at once
        seed: the first one; draws and the random baseline follow from it
        device: cpu, cuda, ...; null: cuda where there is one
        precision: of the trunk's products, fp32 or bf16
        cache: folder of features that several verbs share; null: in the result's folder
        out: folder of result.json and feature cache; interrupted and started again it goes on
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """
    few = _whole(shots, "--shots")
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: at least 1 expected")
    shared = (
        data,
        dataset,
        layers,
        "mean",
        baselines,
        0,
        test_limit,
        image_size,
        batch_size,
        seed,
        device,
        out,
        precision,
        cache,
    )
    asked = _asked(model, *shared, image_mean, image_std)
    from aimv2.evals.fewshot import measure_fewshot

    return measure_fewshot(asked, few, seeds)


def _asked(
    model: str,
    data: str | None,
    dataset: str | None,
    layers: str,
    pool: str,
    baselines: str | None,
    train_limit: int,
    test_limit: int,
    image_size: int | str | None,
    batch_size: int,
    seed: int,
    device: str | None,
    out: str | None,
    precision: str,
    cache: str | None,
    image_mean: str | None,
    image_std: str | None,
) -> Asked:
    """What the three verbs share, checked."""
    from aimv2.api.features import usual_device
    from aimv2.evals.pooled import Asked
    from aimv2.evals.probe_result import BASELINES
    from aimv2.features.pixels import read_stats

    if data is None:
        raise UsageError("--data is missing: labelled images (class folders, shards, CIFAR's pickles, a CSV list)")
    names = words(baselines or "")
    for name in names:
        _one_of("--baselines", name, BASELINES)
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: at least 1 expected")
    for option, number in (("--train-limit", train_limit), ("--test-limit", test_limit), ("--seed", seed)):
        if number < 0:
            raise UsageError(f"{option} {number}: 0 or more expected")
    where = usual_device(device)
    return Asked(
        model,
        data,
        dataset,
        layers,
        pool,
        names,
        train_limit,
        test_limit,
        image_size,
        batch_size,
        seed,
        where,
        out,
        precision,
        cache,
        read_stats(image_mean, image_std),
    )


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{option} {value}: one of {', '.join(known)} expected{nearest(value, known)}")


def _whole(text: str, option: str) -> list[int]:
    """``"1,5"`` -> [1, 5].

    Raises:
        UsageError: not whole numbers from 1 on, or none.
    """
    found = words(text)
    if not found or not all(word.isdecimal() and int(word) > 0 for word in found):
        raise UsageError(f"{option} {text}: whole numbers from 1 on, with commas, expected")
    return [int(word) for word in found]
