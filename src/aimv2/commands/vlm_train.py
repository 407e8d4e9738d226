"""``aimv2 vlm train``: instruction tuning, a run of ``objective.name=instruct``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aimv2.commands.pretrain import PretrainOptions, run_as

EXAMPLES = """\
aimv2 vlm train --init vlm --data.train shards/talks --dry-run
aimv2 vlm train --init vlm --data.train shards/talks --run runs/vlm
aimv2 vlm train --config vlm-llava --init vlm --data.train talks --run runs/l
aimv2 vlm train --run runs/vlm --resume"""
FIRST = (
    "config run data.train init objective.freeze optim.lr optim.lora train.steps train.epochs train.batch_size resume overwrite dry_run "
    "print_config"
)


@dataclass(kw_only=True)
class VlmTrainOptions(PretrainOptions):
    """Tune a vision-language model of `aimv2 vlm build` on conversations about images.

    The connector and the language model learn, the encoder is frozen. The run's model folder opens with transformers, as that of init does.

    Args:
        config: YAML recipe, by path or by a name of `aimv2 recipes`; without one the values of Table C1 and one epoch
    """


def run(options: VlmTrainOptions) -> dict[str, Any]:
    """As :func:`aimv2.commands.pretrain.run`, whose run it is; another ``objective.name`` is a UsageError."""
    return run_as(options, "instruct", "vlm train")
