"""Options that several evaluations share. Light: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from aimv2.config.types import (
    BaselineList,
    Bounds,
    Count,
    Fraction,
    PathText,
    PositiveInt,
    SeedList,
    UnitRateList,
    UntrainedOnly,
    text,
)
from aimv2.errors import UsageError

if TYPE_CHECKING:
    from aimv2.features.frozen import Frozen
    from aimv2.features.pixels import Stats

LABELLED = "labelled images (class folders, shards, CIFAR's pickles, a CSV list)"


@dataclass(kw_only=True)
class ModelOptions:
    """A model and how it sees pixels.

    Args:
        model: released name, hub id, folder, .safetensors file, RUN or RUN@STEP; a folder of a transformers vision model,
            timm:NAME, or a folder written by convert --to openvino
        device: cpu, cuda, ...; null: cuda where there is one
        image_mean: for a transformers or timm model: mean R,G,B of pixels in 0 to 1; null: from its preprocessor_config.json
        image_std: standard deviation, given with image_mean
    """

    model: PathText
    device: str | None = None
    image_mean: str | None = None
    image_std: str | None = None

    @property
    def stats(self) -> Stats | None:
        """Mean and standard deviation that the user gives."""
        from aimv2.features.pixels import read_stats

        return read_stats(self.image_mean, self.image_std)

    @property
    def where(self) -> str:
        """The device, chosen where none is given."""
        from aimv2.distributed import default_device

        return default_device(self.device)


@dataclass(kw_only=True)
class EncoderOptions(ModelOptions):
    """A frozen encoder.

    Args:
        image_size: side in pixels, learned positions interpolated; native: each image at its own size (native models)
        layers: last, avg6, all, or block numbers with commas; one forward pass serves all of them
        baselines: random (the same encoder untrained), pixels, or both with a comma; null: none
        out: folder for result.json and the feature cache; an interrupted command continues there
    """

    image_size: int | str | None = None
    layers: str = "last"
    baselines: BaselineList = text(None)
    out: PathText | None = None

    def open(self, precision: str = "fp32") -> Frozen:
        """The encoder, on its device."""
        from aimv2.features.frozen import open_frozen

        return open_frozen(self.model, self.where, self.image_size, precision, self.stats)


@dataclass(kw_only=True)
class LabelledData:
    """Labelled images.

    Args:
        data: labelled images: class folders, shards, CIFAR's pickles, CSV lists, or a datasets hub id
        dataset: registered name, whose counts are then checked; null: any data set
        image_root: folder that absolute and .. paths of a list or table may lead to; relative ones are looked up there too;
            null: images lie below the list only
    """

    data: PathText | None = None
    dataset: str | None = None
    image_root: PathText | None = None

    @property
    def source(self) -> str:
        """
        Raises:
            UsageError: no data.
        """
        if self.data is None:
            raise UsageError(f"--data is missing: {LABELLED}", code="missing")
        return self.data


@dataclass(kw_only=True)
class ClassifierOptions(EncoderOptions, LabelledData):
    """A classifier on a frozen encoder.

    Args:
        precision: of the encoder's matmuls, fp32 or bf16
        cache: feature folder shared by several commands; null: in the result's folder
        test_fraction: for data without a test split: fraction of each class's images that is held out for it, by the (first)
            seed; null: 0.2
    """

    test_fraction: Annotated[float | None, Bounds(0, 1, above=True)] = None
    precision: Literal["fp32", "bf16"] = "fp32"
    cache: PathText | None = None


@dataclass(kw_only=True)
class PooledOptions(ClassifierOptions):
    """Classifiers on one pooled vector per image.

    Args:
        test_limit: number of test images to sample; 0: all
        batch_size: images per forward pass
        seed: random seed
    """

    test_limit: Count = 0
    batch_size: PositiveInt = 64
    seed: Count = 0


@dataclass(kw_only=True)
class DenseOptions(EncoderOptions):
    """Probes on the patch map.

    Args:
        val_list: for data without a test split: a file with one image name per line; null: ROOT/val.txt if it exists
        val_fraction: for data without a test split: fraction of images sampled for it
        layers: last, avg6, or block numbers with commas; several are concatenated; of a dpt head last stands for four, evenly spread
        rates: peak learning rates; all are trained at once, one is chosen on a held-out tenth of the training images; null: five from
            1e-4 to 1e-2, of a dpt head 1e-4 and 1e-3
        weight_decay: AdamW weight decay, 0 to 1
        epochs: passes over the training images
        batch_size: images per step
        seeds: random seeds of weights and order, with commas
        trunk_batch: images per forward pass of the encoder
        out: folder for result.json and the feature cache
        dataset: registered name, which is read as its archives unpack and whose classes, depths and crops are known; null: any data set
        head: linear, or dpt (four layers as maps of four scales, fused by convolutions)
    """

    data: PathText | None = None
    val_list: PathText | None = None
    val_fraction: float = 0.0
    rates: UnitRateList = text(None)
    weight_decay: Fraction = 1e-4
    epochs: PositiveInt = 20
    batch_size: PositiveInt = 16
    seeds: SeedList = text("0")
    trunk_batch: PositiveInt = 64
    dataset: str | None = None
    head: Literal["linear", "dpt"] = "linear"


@dataclass(kw_only=True)
class MatchOptions(ModelOptions):
    """Images against texts.

    Args:
        model: a LiT pair, a folder or hub id of a transformers pair such as CLIP or SigLIP, or a model that kept its decoder:
            RUN, RUN@STEP, or a folder written by convert --to safetensors
        by: contrastive (the two towers of a pair), likelihood (of the texts, by the decoder), or auto: what the model has
        baselines: random (the same model with an untrained encoder); null: none
        batch_size: images per forward pass
        out: folder for result.json
    """

    data: PathText | None = None
    by: Literal["auto", "contrastive", "likelihood"] = "auto"
    normalize: Literal["prior", "sum", "mean"] = "prior"
    seed: Count = 0
    baselines: UntrainedOnly = text(None)
    batch_size: PositiveInt = 64
    out: PathText | None = None


@dataclass(kw_only=True)
class ZeroshotData(MatchOptions, LabelledData):
    """Labelled images against the texts of their classes.

    Args:
        data: labelled images: class folders, shards, CIFAR's pickles, CSV lists, or a datasets hub id
    """
