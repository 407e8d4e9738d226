"""Locked-image tuning: a text tower and a pooling head learn with the frozen encoder of ``init`` (AIMV2, Table 5)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aimv2.config.objective import ContrastiveTaskOptions
from aimv2.config.schema import Config
from aimv2.data.text.clip import START, started
from aimv2.data.text.tokenizer import Tokenizer
from aimv2.distributed import World, gather_rows, local
from aimv2.errors import UsageError
from aimv2.interop.load import Weights, fill_tensor
from aimv2.models.flops import step_flops
from aimv2.models.init import init_weights
from aimv2.models.lit import LiTConfig, PairFeatures, TextConfig, TunedLiT
from aimv2.models.sizes import EncoderConfig
from aimv2.objectives import Objective
from aimv2.objectives.contrastive import ContrastiveObjective, summed_loss
from aimv2.tasks.held_out import HeldOut, evaluating, held_out_batches
from aimv2.tasks.init_weights import SHAPE, Origin, check_encoder, origin_of
from aimv2.tasks.pretrain import shapes
from aimv2.tasks.task import CardText, Context, Task

TEMPERATURE = {"softmax": 0.07, "sigmoid": 0.1}  # at the start: CLIP's, and SigLIP's scale of 10
ROWS = 1024  # of the matrix of scores, at once
BATCH = 64  # held-out pairs in the model at once


class Contrastive(Task):
    """A text tower and a pooling head on a frozen encoder."""

    options: ClassVar[type[Any]] = ContrastiveTaskOptions
    reads = ("init", "data.features")
    figures = ("val_contrastive_loss", "val_image_to_text", "val_text_to_image")
    start_text = START

    def check(self) -> None:
        if self.config.init is None:
            raise UsageError(
                "objective.name=contrastive trains a text tower on a frozen encoder: --init MODEL says which (released "
                "name, hub id, folder, file, RUN or RUN@STEP)",
                option="--init",
                code="missing",
            )

    def ready(self, tokenizer: Tokenizer) -> Tokenizer:
        return started(tokenizer)

    def encoder_config(self, vocab_size: int) -> EncoderConfig:
        assert self.config.init is not None
        origin = origin_of(self.config.init)
        check_shape(origin, self.config)
        return origin.encoder

    def build(self, context: Context) -> TunedLiT:
        """The trunk of ``init`` under new parts; a resumed run finds its trunk in its own folder.

        Raises:
            UsageError: an ``init`` that does not fit.
        """
        config, tokenizer = self.config, context.tokenizer
        given = config.run if context.resuming else config.init
        assert tokenizer is not None and given is not None
        origin = origin_of(given)
        check_shape(origin, config)
        sigmoid = config.objective.contrast == "sigmoid"
        with torch.device("meta"):
            built = TunedLiT(pair_shape(config, origin.encoder, tokenizer), sigmoid, config.data.features is not None)
        built.to_empty(device="cpu")
        init_weights(built, config.seed)
        with Weights(origin.at.files) as weights:
            for key, target in built.image.state_dict().items():
                if not key.startswith("head."):
                    fill_tensor(target, weights, origin.rules[f"encoder.{key}"])
        return built

    def objective(self, model: nn.Module) -> Objective:
        return ContrastiveObjective(self.config.objective)

    def stream(self, context: Context, model: nn.Module) -> Any:
        """With ``data.features`` batches of the trunk's features, computed first where they are not there; else None.

        Raises:
            UsageError: see :func:`aimv2.features.training_cache.training_features`.
        """
        config, world = self.config, context.world
        if config.data.features is None:
            return None
        from aimv2.features.training_cache import CachedPairStream, training_features

        assert isinstance(model, TunedLiT) and context.tokenizer is not None
        if config.train.batch_size % world.size:
            raise UsageError(
                f"train.batch_size {config.train.batch_size} does not divide by {world.size} ranks", code="mismatch"
            )
        ranks = world.rank, world.size
        found = training_features(config.data, model.image, world.device, config.train.precision, *ranks)
        return CachedPairStream(found, config.data, context.tokenizer, config.train.batch_size, config.seed, *ranks)

    def after_step(self, model: nn.Module) -> None:
        """Puts the learned scale back into its range; outside it would get no gradient, and stay there."""
        assert isinstance(model, TunedLiT)
        local(model.log_scale).clamp_(0, model.max_log_scale)

    def flops(self, model: nn.Module, pairs: float, patches: float, tokens: float) -> float:
        return step_flops(model, pairs, patches, tokens)

    @torch.no_grad()
    def validate(self, model: nn.Module, objective: Objective, data: HeldOut, world: World) -> dict[str, float]:
        """Every held-out pair among all of them, in fp32.

        Returns:
            ``val_contrastive_loss`` (nats a pair), ``val_image_to_text`` and ``val_text_to_image`` (fraction of queries whose
            best answer has their own caption; equal captions belong to each other's images), ``val_pairs``, ``val_scale`` of
            the cosines, and ``val_bias`` of a sigmoid.
        """
        assert isinstance(model, TunedLiT)
        with evaluating(model):
            own = encode(model, data, world)
        names = torch.tensor([caption_number(tokens) for tokens in data.tokens], device=world.device).view(-1, 1)
        image, text, names = (gather_rows(rows, world) for rows in (own.image, own.text, names))
        sums = torch.zeros(3, dtype=torch.float64, device=world.device)
        for at in range(0, len(image), ROWS):
            part = own._replace(image=image[at : at + ROWS], text=text[at : at + ROWS])
            wanted, loss = names[at : at + ROWS], summed_loss(part, image, text, at)
            to_text, to_image = names[(part.image @ text.T).argmax(1)], names[(part.text @ image.T).argmax(1)]
            sums += torch.stack(
                [loss.double(), (to_text == wanted).sum().double(), (to_image == wanted).sum().double()]
            )
        loss_sum, to_text_sum, to_image_sum = (sums / len(image)).tolist()
        figures = {
            "val_contrastive_loss": loss_sum,
            "val_image_to_text": to_text_sum,
            "val_text_to_image": to_image_sum,
            "val_pairs": float(len(image)),
            "val_scale": own.scale.item(),
        }
        return figures if own.bias is None else {**figures, "val_bias": own.bias.item()}

    def exported(self, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(model, TunedLiT)
        return model.saved(weights)

    def card(self) -> CardText:
        return CardText(
            "AIMV2 image-text pair: a text tower and a pooling head tuned to a frozen encoder",
            f"contrastive, {self.config.objective.contrast}; frozen encoder, init {self.config.init}",
            "`aimv2.load_model(FOLDER)` (both towers), measure it with `aimv2 zeroshot` and `aimv2 retrieve`",
        )


def pair_shape(config: Config, encoder: EncoderConfig, tokenizer: Tokenizer) -> LiTConfig:
    """Shape of the pair on an encoder: what ``model.text_*`` names, else the default tower.

    Raises:
        UsageError: heads that do not divide the width.
    """
    model, (default, projection) = config.model, default_tower(encoder)
    text = TextConfig(
        width=model.text_width or default.width,
        depth=model.text_depth or default.depth,
        heads=model.text_heads or default.heads,
        hidden=model.text_hidden or default.hidden,
        vocab_size=tokenizer.vocab_size,
        max_text=config.data.max_tokens,
        end=tokenizer.eos_id,
    )
    if text.width % text.heads:
        raise UsageError(
            f"model.text_heads {text.heads} does not divide model.text_width {text.width}", code="mismatch"
        )
    image = replace(encoder, pool_heads=encoder.heads)  # one number for both in the released layout
    return LiTConfig(image, text, model.projection or projection, TEMPERATURE[config.objective.contrast])


def default_tower(encoder: EncoderConfig) -> tuple[TextConfig, int]:
    """Text tower and projection where ``model`` names none: the released ones, or on a narrower encoder one of its shape."""
    released = TextConfig()
    if encoder.width >= released.width:
        return released, LiTConfig.projection
    shape = {key: getattr(encoder, key) for key in ("width", "depth", "heads", "hidden")}
    return replace(released, **shape), encoder.width


def check_shape(origin: Origin, config: Config) -> None:
    """Raises UsageError where ``config.model`` names another encoder than that of ``init``, or a native one is given."""
    there, model = origin.encoder, config.model
    if there.image_size is None:
        raise UsageError(f"init {origin.at.given}: a native model; LiT needs one image size, give a model that has one")
    if model.name != "auto":
        wanted: EncoderConfig = shapes(config, 1)[0]
    else:
        keys = (*SHAPE, "image_size")
        wanted = replace(there, **{key: getattr(model, key) for key in keys if getattr(model, key) is not None})
    check_encoder(origin, wanted)
    if wanted.image_size != there.image_size:
        raise UsageError(
            f"init {origin.at.given}: its frozen encoder takes {there.image_size} px, model.image_size is "
            f"{wanted.image_size}; leave it out, or adapt the encoder first (objective.name=pretrain)",
            code="conflict",
        )


def encode(model: nn.Module, data: HeldOut, world: World) -> PairFeatures:
    """Features of this rank's held-out pairs.

    Ranks run equally many batches, since a sharded model gathers its weights in each; a rank that has fewer repeats its
    last one.
    """
    batches = held_out_batches(data, 2, BATCH, 1, True)
    most = int(world.max(torch.tensor(float(len(batches)), device=world.device)))
    found: list[PairFeatures] = []
    for number in range(most):
        features = model(batches[min(number, len(batches) - 1)].to(world.device))
        found += [features] if number < len(batches) else []
    image, text = torch.cat([part.image for part in found]), torch.cat([part.text for part in found])
    return PairFeatures(image, text, found[0].scale, found[0].bias)


def caption_number(tokens: list[int]) -> int:
    """A caption as one number: equal token rows, equal numbers."""
    digest = hashlib.blake2b(" ".join(map(str, tokens)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


TASK = Contrastive
