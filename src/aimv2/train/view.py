"""How a run's samples are transformed: to one size, or at their own size under a budget of patches."""

from __future__ import annotations

from aimv2.config.schema import Config, DataConfig
from aimv2.data.stream.samples import Native, View
from aimv2.distributed import World
from aimv2.errors import UsageError
from aimv2.models.sizes import EncoderConfig


def make_view(config: Config, encoder: EncoderConfig, captions: bool, world: World) -> View:
    """The view of an encoder's training data.

    Raises:
        UsageError: options that do not go with a native model, or only with one; areas that it is not meant for; a budget
            that they do not divide.
    """
    keep = config.objective.decoder_share
    if encoder.image_size is not None:
        given = {
            "train.patch_budget": config.train.patch_budget is not None,
            "data.pack": bool(config.data.pack),
            "data.areas": tuple(config.data.areas) != DataConfig().areas,
            "model.min_patches": config.model.min_patches is not None,
            "model.max_patches": config.model.max_patches is not None,
        }
        if name := next((name for name, there in given.items() if there), None):
            instead = "use train.batch_size" if name == "train.patch_budget" else f"leave {name} out"
            raise UsageError(
                f"{name} is for native models; {encoder.name} takes {encoder.image_size} px: {instead}, or give a native model.name",
                code="conflict",
            )
        return View(encoder.image_size, encoder.patches, captions, keep)
    if keep < 1:
        raise UsageError(f"objective.decoder_share {keep}: a native model's decoder gets all image positions; use 1")
    return View(0, 2 ** config.data.areas[1], captions, native=make_native(config, encoder, world))


def make_native(config: Config, encoder: EncoderConfig, world: World) -> Native:
    """Areas and budget; see :func:`make_view`."""
    low, high = config.data.areas
    least, most = 2**low, 2**high
    if not (encoder.min_patches <= least and most <= encoder.max_patches):
        raise UsageError(
            f"data.areas {[low, high]} are {least} to {most} patches; {encoder.name} takes {encoder.min_patches} to "
            f"{encoder.max_patches}: change data.areas, or model.min_patches and model.max_patches"
        )
    budget = config.train.patch_budget
    if budget is None:
        raise UsageError(
            f"train.patch_budget is not given: {encoder.name} takes images of {least} to {most} patches (data.areas), and a "
            "step takes as many as the budget holds"
        )
    workers, accumulate, pack = max(config.data.workers, 1), config.train.accumulate, config.data.pack
    rounds = accumulate * max(pack, 1)
    part, rest = divmod(budget, world.size * workers * rounds)
    if rest or part % most:
        raise UsageError(
            f"train.patch_budget {budget} over {world.size} ranks x {workers} data.workers x {accumulate} train.accumulate x "
            f"{max(pack, 1)} data.pack is not a multiple of the largest area, {most} patches (data.areas)"
        )
    from aimv2.data.stream.native import area_probabilities

    return Native(encoder.patch_size, area_probabilities(low, high), part, rounds, pack)
