"""``aimv2 plan``: what a run takes on cards that are not here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console

from aimv2.config.types import AboveZero, Bounds, PathText, PositiveInt
from aimv2.errors import UsageError
from aimv2.tables import TextTable, percent

EXAMPLES = """\
aimv2 plan --config aimv2-large-224 --gpus 64 --gpu h100 --nodes 8
aimv2 plan --config aimv2-3B-224 --gpus 8 --gpu a100-40 --price 1.5
aimv2 plan --check runs/mine"""
FIRST = "config gpus gpu nodes price mfu tokens decode_rate check train.batch_size train.accumulate train.checkpointing"
WORDS = {"copies": "weights in half precision", "buffers": "gathered and waiting (FSDP2)"}


@dataclass(kw_only=True)
class PlanOptions:
    """Plan a pre-training run before it is paid for: memory, layout, time, cost, loader.

    Parameters, FLOPs and bytes of checkpoints are counted, memory is computed tensor by tensor; everything in seconds is an estimate
    that rests on mfu. Nothing is trained, downloaded or written.

    Args:
        config: YAML recipe, by path or by a name of `aimv2 recipes`
        options: values by dotted key, which override the recipe's (``{"train.batch_size": 4096}``)
        gpus: GPUs of all nodes
        gpu: the card, such as h100, h200, b200, a100, a100-40, l40s, rtx4090, rtx5090, mi300x
        nodes: number of machines
        price: of a GPU and hour, in any currency; null: no cost
        mfu: assumed fraction of the card's dense bf16 peak that the step reaches
        tokens: assumed caption tokens of a pair, end of text included
        decode_rate: images a second that a CPU core reads; null: measured on this machine for a second
        write_speed: assumed gigabytes a second that a node writes to where checkpoints go
        check: a finished run to compare with its plan, in place of config: parameters, pairs/s, memory
    """

    config: PathText | None = None
    options: dict[str, Any] | None = None
    gpus: PositiveInt = 1
    gpu: str = "h100"
    nodes: PositiveInt = 1
    price: Annotated[float | None, Bounds(0)] = None
    mfu: Annotated[float, Bounds(0, 1, above=True)] = 0.4
    tokens: Annotated[float, Bounds(1)] = 32.0
    decode_rate: Annotated[float | None, Bounds(0, above=True)] = None
    write_speed: AboveZero = 1.0
    check: PathText | None = None


def run(options: PlanOptions) -> dict[str, Any]:
    """
    Returns:
        ``parameters``, ``configured`` and ``suggested`` (layout, ``memory_gb`` by part, ``peak_gb``, ``fits``), ``planned`` (which of
        them the rest is of), ``flops_a_pair``, ``flops_a_step``, ``pairs_per_s``, ``days``, ``cost``, ``cores``, ``read_mb_per_s``,
        ``checkpoint_gb``, ``save_seconds``, ``assumed``, ...; with ``check``: ``planned``, ``measured`` and ``ratios`` of ``parameters``,
        ``pairs_per_s`` and ``memory_gb``, ``mfu`` that the run reached.

    Raises:
        UsageError: an unknown card, a layout whose product is not the number of GPUs, a task that is not planned.
    """
    from aimv2.models.cards import find_card
    from aimv2.plan.make import Assumed, plan_run, read_config

    assumed = Assumed(options.mfu, options.tokens, options.decode_rate, options.write_speed * 1e9)
    given = dict(options.options or {})
    if options.check is not None:
        from aimv2.plan.check import check_run

        if options.config is not None or given:
            what = "--config" if options.config is not None else next(iter(given))
            raise UsageError(f"{what}: --check takes the run's own values; leave it out", option=what, code="conflict")
        return check_run(options.check, assumed)
    card = find_card(options.gpu)
    return plan_run(read_config(options.config, given), options.gpus, card, options.nodes, options.price, assumed)


def render(result: dict[str, Any], console: Console) -> None:
    """What is counted, the memory of the configured layout and of the one that fits, what is estimated; or planned and measured."""
    if "checked" in result:
        render_check(result, console)
        return
    counted = {
        "model": f"{result['model']}, {result['parameters'] / 1e6:,.1f}M parameters",
        "vocabulary": f"{result['vocabulary']:,} ({result['vocabulary_from']})",
        "GPUs": f"{result['gpus']} x {result['gpu']} on {result['nodes']} node{'s' * (result['nodes'] > 1)}",
        "FLOPs": f"{result['flops_a_pair']:.3g} a pair, {result['flops_a_step']:.3g} a step of {result['batch_size']:,} pairs",
    }
    show(console, counted)
    console.print(f"\n{memory_table(result).to_text()}")
    for line in fit_lines(result):
        console.print(line, soft_wrap=False, width=80)
    console.print(f"\nestimates, for the {result['planned']} layout")
    show(console, estimates(result))


def render_check(result: dict[str, Any], console: Console) -> None:
    """Planned, measured, and their ratio."""
    console.print(
        f"{result['checked']}: {result['model']}, step {result['step']}, {result['ranks']} rank(s), {result['device']}\n"
    )
    table = TextTable(("", "planned", "measured", "ratio"), right=("planned", "measured", "ratio"))
    for key, form, name in (
        ("parameters", ",", "parameters"),
        ("pairs_per_s", ",.1f", "pairs/s"),
        ("memory_gb", ",.2f", "memory, GB"),
    ):
        cells = [format(result[side][key], form) for side in ("planned", "measured")]
        table.rows.append([name, *cells, f"{result['ratios'][key]:.2f}"])
    console.print(table.to_text())
    base = f"; {result['process_gb']:.2f} GB of it are the process before its model" if result["process_gb"] else ""
    notes = {
        "pairs/s": f"planned with --mfu {result['mfu_assumed']:g} of the peak that the run's log counts with; the run reached "
        f"{percent(result['mfu'])}: plan the next one with --mfu {result['mfu']:.2f}",
        "memory": f"of a step; measured: the most that the log has, validation and saving included{base}",
        "captions": f"{result['tokens_a_pair']:.1f} tokens a pair in the mean, {result['flops_a_pair']:.3g} FLOPs a pair",
    }
    show(console, notes)


def show(console: Console, rows: dict[str, str]) -> None:
    """Two columns within 80."""
    console.print(TextTable((), [[key, text] for key, text in rows.items()]).to_text())


def estimates(result: dict[str, Any]) -> dict[str, str]:
    """What is in seconds, and what each figure rests on."""
    card, assumed = result["card"], result["assumed"]
    cost = "" if result["cost"] is None else f", cost {result['cost']:,.0f}"
    read = "" if result["read_mb_per_s"] is None else f", {result['read_mb_per_s']:,.0f} MB/s read"
    return {
        "speed": f"{result['pairs_per_s']:,.0f} pairs/s, {result['seconds_a_step']:.3g} s a step",
        "time": f"{result['days']:,.2f} days, {result['gpu_hours']:,.0f} GPU hours{cost}",
        "rests on": f"--mfu {assumed['mfu']:g}: {percent(assumed['mfu'])} of {card['bf16_tflops']:g} TFLOP/s, dense bf16 "
        f"({card['source']}); {result['tokens_a_pair']:g} caption tokens a pair; validation and saving are not counted",
        "loader": f"{result['cores']:,.0f} CPU cores, {result['cores_a_node']:,.0f} a node ({result['workers_a_rank']} workers a "
        f"rank; data.workers is {result['workers_configured']}){read}",
        "rests on ": f"{result['decoded_per_core_and_s']:,.0f} images a second and core: {result['decoded']}",
        "checkpoints": f"{result['checkpoint_gb']:,.1f} GB each, {result['checkpoints_gb']:,.1f} GB kept",
        "stall": f"{result['save_seconds']:,.1f} s a save at {assumed['write_gb_per_s']:g} GB/s a node ({percent(result['save_fraction'])} "
        "of the time)",
    }


def memory_table(result: dict[str, Any]) -> TextTable:
    """Parts of the peak, in GB, of the configured layout and of the first that fits."""
    shown = [("configured", result["configured"])]
    if result["suggested"] is not None and result["suggested"] != result["configured"]:
        shown.append(("suggested", result["suggested"]))
    heads = ["GB on each GPU", *(name for name, _ in shown)]
    table = TextTable(heads, right=heads[1:], whole=heads)
    for part in shown[0][1]["memory_gb"]:
        cells = [one["memory_gb"][part] for _, one in shown]
        if any(cells):
            table.rows.append([WORDS.get(part, part), *(f"{cell:,.2f}" for cell in cells)])
    table.rows.append(["peak", *(f"{one['peak_gb']:,.2f}" for _, one in shown)])
    table.rows.append(["room", *(f"{one['room_gb']:,.2f}" for _, one in shown)])
    for key in ("replicate", "shard", "accumulate", "pairs_at_once", "checkpointing"):
        table.rows.append([key.replace("_", " "), *(str(one[key]) for _, one in shown)])
    return table


def fit_lines(result: dict[str, Any]) -> list[str]:
    """Whether the configured layout fits, and what would."""
    configured, suggested = result["configured"], result["suggested"]
    if configured["fits"]:
        same = suggested == configured
        return ["The configured layout fits." + ("" if same else " The suggested one recomputes less, or sends less.")]
    if suggested is None:
        return ["Nothing fits: more GPUs, a card with more memory, or a smaller model (model.name)."]
    return ["The configured layout does not fit; the suggested one does."]
