"""Images against texts: zeroshot, retrieve. Heavy imports happen inside."""

from __future__ import annotations

from typing import Any

from aimv2.errors import UsageError, nearest


def zeroshot(
    model: str,
    data: str | None = None,
    dataset: str | None = None,
    templates: str = "default",
    classes: str | None = None,
    by: str = "auto",
    normalize: str = "prior",
    limit: int = 0,
    seed: int = 0,
    baselines: str | None = None,
    batch_size: int = 64,
    device: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Classify images by the texts of their classes, without training: top-1, top-5, by class (AIMV2, Table 5).

    Args:
        model: a LiT pair, a folder or hub id of a pair of transformers such as CLIP or SigLIP, or a model that kept its decoder:
            RUN, RUN@STEP, or a folder of convert --to safetensors
        data: labelled images: class folders, shards, CIFAR's pickles, CSV lists, or a datasets hub id
        dataset: a registered name, whose counts are then checked; null: any data set
        templates: default (three for photographs; of a pair on imagenet1k the eighty of CLIP), imagenet (these eighty), one with {}
            for the class, or a file of them, one a line
        classes: file of class names, one a line in the order of the labels; null: the data set's own
        by: contrastive (a pair's two towers), likelihood (of the texts, by the decoder), or auto: what the model has
        normalize: of the likelihood: sum, mean (a token), or prior (the sum, less the text's log-likelihood over other,
            unlabelled images)
        limit: images, drawn; 0: all
        seed: of the images drawn
        baselines: random (the same model, its encoder untrained); null: none
        batch_size: images at once
        device: cpu, cuda, ...; null: cuda where there is one
        out: folder of result.json
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """
    _check(by, normalize, batch_size)
    if data is None:
        raise UsageError("--data is missing: labelled images (class folders, shards, CIFAR's pickles, a CSV list)")
    if limit < 0:
        raise UsageError(f"--limit {limit}: 0 (all) or more expected")
    from aimv2.api.features import usual_device
    from aimv2.evals.scorer import open_matcher
    from aimv2.evals.untrained import check_baselines
    from aimv2.evals.zeroshot import Asked, measure
    from aimv2.features.pixels import read_stats

    baseline = check_baselines(baselines)
    asked = Asked(data, dataset, templates, classes, normalize, limit, seed, batch_size, out, baseline)
    return measure(open_matcher(model, by, usual_device(device), read_stats(image_mean, image_std)), asked)


def retrieve(
    model: str,
    data: str | None = None,
    captions: str | None = None,
    candidates: int | None = None,
    k: str = "1,5,10",
    by: str = "auto",
    normalize: str = "prior",
    seed: int = 0,
    baselines: str | None = None,
    batch_size: int = 64,
    device: str | None = None,
    out: str | None = None,
    image_mean: str | None = None,
    image_std: str | None = None,
) -> dict[str, Any]:
    """Find the image of a caption and a caption of an image: recall at k, both ways, beside chance.

    Args:
        model: a LiT pair, a folder or hub id of a pair of transformers such as CLIP or SigLIP, or a model that kept its decoder:
            RUN, RUN@STEP, or a folder of convert --to safetensors
        data: shards with captions (test-*, else val-*, else train-*), a folder of images with a captions file (image,caption)
            or sidecars, or a captions file beside its images
        captions: the captions file, where a folder has several; null: captions.txt
        candidates: images drawn, which are then searched with all their captions; null: 100 by likelihood, all for a pair
        k: places that count as found, with commas
        by: contrastive (a pair's two towers), likelihood (of the captions, by the decoder), or auto: what the model has
        normalize: of the likelihood, for image to text (text to image is the same by all): sum, mean (a token), or prior
            (the sum, less the caption's log-likelihood over up to 100 other images)
        seed: of the candidates
        baselines: random (the same model, its encoder untrained); null: none
        batch_size: images at once
        device: cpu, cuda, ...; null: cuda where there is one
        out: folder of result.json
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """
    _check(by, normalize, batch_size)
    if data is None:
        raise UsageError("--data is missing: images with captions (shards, or a folder with captions.txt)")
    if candidates is not None and candidates < 2:
        raise UsageError(f"--candidates {candidates}: at least 2 expected")
    words = [word.strip() for word in str(k).split(",")]
    if not all(word.isdigit() and int(word) for word in words):
        raise UsageError(f"--k {k}: numbers from 1 with commas expected, such as 1,5,10")
    from aimv2.api.features import usual_device
    from aimv2.evals.retrieve import Asked, measure
    from aimv2.evals.scorer import open_matcher
    from aimv2.evals.untrained import check_baselines
    from aimv2.features.pixels import read_stats

    baseline = check_baselines(baselines)
    asked = Asked(data, captions, candidates, tuple(map(int, words)), normalize, seed, batch_size, out, baseline)
    return measure(open_matcher(model, by, usual_device(device), read_stats(image_mean, image_std)), asked)


def _check(by: str, normalize: str, batch_size: int) -> None:
    from aimv2.evals.scorer import BY, NORMALIZE

    for option, value, known in (("--by", by, BY), ("--normalize", normalize, NORMALIZE)):
        if value not in known:
            raise UsageError(f"{option} {value}: one of {', '.join(known)} is expected{nearest(value, known)}")
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: at least 1 expected")
