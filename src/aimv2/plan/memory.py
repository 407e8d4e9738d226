"""Memory of a training step on one GPU, by part: what a model keeps for its backward pass, counted tensor by tensor.

Legend: B pairs of a micro-batch, I patches, R caption rows, T padded caption, N = I + T, S scored patches, D width, F SwiGLU width,
H heads, P = p * p * 3, V vocabulary; e bytes of a matmul's operand (2 in half precision, else 4).

The counts are those of the code in :mod:`aimv2.models`: a test compares each with what autograd keeps of real blocks, and
``benchmarks/plan_memory.py`` the sum with torch's own memory tracker and with measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from aimv2.batch import TEXT_BUCKET, round_up
from aimv2.models.decoder import CHUNK_ROWS
from aimv2.models.layers import Block

Checkpointing = Literal["off", "full", "selective"]
WORD = 4  # bytes of a weight, a gradient, a moment and of the residual stream
PARTS = ("weights", "copies", "gradients", "moments", "activations", "logits", "buffers")


@dataclass(frozen=True)
class Program:
    """How the step runs.

    Attributes:
        half: matmuls in bf16 or fp16.
        compiled: blocks under torch.compile, which recomputes what is cheap.
        matmul_length: positions up to which attention is two matmuls, which keep the scores, as on a CPU; one kernel above.
        fused_norm: RMSNorm keeps its input only (CUDA).
    """

    half: bool
    compiled: bool = False
    matmul_length: float = 0
    fused_norm: bool = True

    @property
    def e(self) -> int:
        return 2 if self.half else WORD

    def fused(self, length: float) -> bool:
        """Whether attention over so many positions is one kernel."""
        return length > self.matmul_length


@dataclass(frozen=True)
class RankLayout:
    """How the ranks divide a step.

    Attributes:
        replicate: copies of the weights.
        shard: ranks that weights, gradients and moments of a copy are divided over.
        accumulate: micro-batches a step.
        checkpointing: what a block recomputes in the backward pass.
        reshard: gathered weights of a block are freed after its forward pass.
    """

    replicate: int = 1
    shard: int = 1
    accumulate: int = 1
    checkpointing: Checkpointing = "off"
    reshard: bool = True

    @property
    def ranks(self) -> int:
        return self.replicate * self.shard


@dataclass(frozen=True)
class Sizes:
    """A micro-batch of one rank.

    Attributes:
        pairs: B.
        patches: I.
        tokens: caption tokens of a pair, in the mean.
        longest: caption tokens of the longest pair.
        scored: patches of a pair that are scored, in the mean; half of them, as prefixes are uniform.
    """

    pairs: float
    patches: int
    tokens: float
    longest: int
    scored: float

    @property
    def text_rows(self) -> float:
        return self.pairs * self.tokens

    @property
    def padded_text(self) -> int:
        return round_up(self.longest, TEXT_BUCKET)


@dataclass
class Segment:
    """A stretch of the forward pass: what it keeps until its backward pass, and the most that either needs for itself.

    Attributes:
        kept: bytes by part.
        parameters: trained ones, whose gradients exist from its backward pass on.
        matrices: those of its matmuls, of which half precision keeps a copy.
        forward, backward: bytes that it needs while it runs, beyond what is kept.
        block: gathered and freed as one (FSDP2).
    """

    kept: dict[str, float]
    parameters: int = 0
    matrices: int = 0
    forward: float = 0.0
    backward: float = 0.0
    block: bool = False


@dataclass
class Memory:
    """Bytes at the peak of a step, by part, and when that is."""

    parts: dict[str, float] = field(default_factory=dict)
    when: str = ""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


# ---- one block ----


def kept_by_block(
    block: Any, rows: float, kept_rows: float, slots: float, length: float, packed_text: float | None, program: Program
) -> float:
    """Bytes that a block keeps for its backward pass, without the casts of its weights.

    Args:
        block: a Block.
        rows: that enter it.
        kept_rows: that leave it (fewer in the last block of a decoder).
        slots: padded positions of its attention.
        length: of a sequence in its attention.
        packed_text: padded caption positions, where its rows are packed; None: the rows are the slots.
        program: how it runs.
    """
    width, hidden, heads, e = block.attn.proj.in_features, block.mlp.down.in_features, block.attn.heads, program.e
    fused, packed = program.fused(length), packed_text is not None
    if program.compiled:  # inputs of matmuls and of attention; norms and sums are recomputed
        kept = rows * (WORD * width + e * width + WORD) + kept_rows * (3 * e * width + 3 * e * hidden + WORD)
        kept += slots * 3 * e * width
        kept += slots * (WORD * heads + e * width if fused else scores(heads, length, program))
        return kept + (3 * e * width * packed_text if packed_text is not None else 0)
    norm = WORD * width + WORD + e * width + (0 if program.fused_norm else WORD * width)
    kept = rows * norm + kept_rows * (norm + e * width + 4 * e * hidden)  # attention's part, SwiGLU's
    kept += slots * (WORD * heads if fused else scores(heads, length, program))
    kept += slots * 3 * e * width if packed or not fused else rows * 3 * e * width  # queries, keys, values
    if packed:  # the rows from which the padded ones were copied, and the padded output of one kernel
        kept += rows * 3 * e * width + (slots * e * width if fused else 0)
    elif fused:  # the prefix mask, as the kernel takes it
        kept += slots * length * e
    return kept


def scores(heads: int, length: float, program: Program) -> float:
    """Bytes a position keeps of attention as two matmuls: the softmax, and its copy in half precision."""
    if program.compiled:
        return heads * length * 4 + (8 * heads if program.half else 0)
    return heads * length * (WORD + (program.e if program.half else 0))


def selected_by_block(
    block: Any, rows: float, kept_rows: float, slots: float, length: float, program: Program
) -> float:
    """Bytes that a block keeps where only outputs of matmuls and of attention are kept, and the rest is recomputed."""
    width, hidden, heads, e = block.attn.proj.in_features, block.mlp.down.in_features, block.attn.heads, program.e
    attention = e * width + (WORD * heads if program.fused(length) else e * heads * length)
    kept = rows * (WORD * width + 3 * e * width) + slots * attention
    return kept + kept_rows * (e * width + 2 * e * hidden + e * width)


def backward_of_block(block: Any, rows: float, slots: float, length: float, program: Program) -> float:
    """Bytes that the backward pass of a block needs beyond what it keeps: gradients of SwiGLU or of attention, and of the stream."""
    width, hidden, heads, e = block.attn.proj.in_features, block.mlp.down.in_features, block.attn.heads, program.e
    stream = rows * (WORD * width + e * width)
    attention = slots * (4 * e * width + (0 if program.fused(length) else 2 * WORD * heads * length))
    return stream + max(rows * 2 * e * hidden, attention)


# ---- the whole step ----


def parameters_of(module: Any) -> tuple[int, int]:
    """Parameters of a module, and those of them that are matrices of matmuls."""
    sizes = [(p.numel(), p.ndim > 1) for p in module.parameters() if p.requires_grad]
    return sum(n for n, _ in sizes), sum(n for n, matrix in sizes if matrix)


def segments_of(model: Any, sizes: Sizes, program: Program, checkpointing: Checkpointing) -> list[Segment]:
    """The forward pass of a pre-training step in order.

    Args:
        model: an AIMv2; its tensors may be on the device "meta".
        sizes: of the micro-batch.
        program: how the step runs.
        checkpointing: of the blocks.
    """
    encoder, decoder = model.encoder, model.decoder
    config, shape, e = encoder.config, decoder.config, program.e
    rows, width = sizes.pairs * sizes.patches, config.width
    pixels = 3 * config.patch_size**2
    plain_norm = 0 if program.fused_norm else WORD
    norm = lambda count, wide: count * wide * (WORD + plain_norm)  # noqa: E731
    segments = [
        Segment(
            dict(activations=rows * e * pixels + norm(rows, width) + rows * pixels),  # patches, and the uint8 images
            *parameters_of(encoder.patch_embed),
            forward=3 * WORD * rows * pixels,
        )
    ]
    segments += [
        block_segment(block, rows, rows, rows, sizes.patches, None, program, checkpointing) for block in encoder.blocks
    ]
    project = sum(parameters_of(part)[0] for part in (encoder.norm, decoder.project))
    if shape.text:
        project += parameters_of(decoder.token_embed)[0] + decoder.text_position.numel() + decoder.bos.numel()
    segments.append(
        Segment(
            dict(activations=norm(rows, width) + rows * e * width),
            project,
            decoder.project.weight.numel(),
            backward=rows * WORD * (width + shape.width),
        )
    )
    text = sizes.text_rows if shape.text else 0
    scored = sizes.pairs * sizes.scored if shape.pixels else 0
    joint = shape.text and shape.pixels and not shape.separate
    if shape.text:
        kept_rows, length = text + (scored if joint else 0), sizes.patches + sizes.padded_text
        padded = sizes.pairs * sizes.padded_text
        for block in decoder.trunk.blocks:
            out = kept_rows if block is decoder.trunk.blocks[-1] else rows + text
            slots = sizes.pairs * length
            segments.append(block_segment(block, rows + text, out, slots, length, padded, program, checkpointing))
    if hasattr(decoder, "pixel_trunk"):
        for block in decoder.pixel_trunk.blocks:
            segments.append(block_segment(block, rows, rows, rows, sizes.patches, None, program, checkpointing))
    return [*segments, heads_of(model, text, scored, rows, program)]


def block_segment(
    block: Block,
    rows: float,
    kept_rows: float,
    slots: float,
    length: float,
    packed_text: float | None,
    program: Program,
    checkpointing: Checkpointing,
) -> Segment:
    """A block; arguments as those of :func:`kept_by_block`."""
    whole = kept_by_block(block, rows, kept_rows, slots, length, packed_text, program)
    again = backward_of_block(block, rows, slots, length, program)
    width = block.attn.proj.in_features
    kept = {
        "off": whole,
        "full": WORD * width * rows,
        "selective": selected_by_block(block, rows, kept_rows, slots, length, program),
    }[checkpointing]
    total, matrices = parameters_of(block)
    working = again if checkpointing == "off" else again + max(0.0, whole - kept)
    return Segment(dict(activations=kept), total, matrices, forward=again, backward=working, block=True)


def heads_of(model: Any, text: float, scored: float, rows: float, program: Program) -> Segment:
    """The last norm, both heads and the losses; logits are kept whole up to 2 * CHUNK_ROWS rows, else recomputed in chunks."""
    decoder, shape, e = model.decoder, model.decoder.config, program.e
    pixels, vocabulary = 3 * model.encoder.config.patch_size**2, shape.vocab_size
    plain_norm = 0 if program.fused_norm else WORD
    kept: dict[str, float] = dict(activations=(text + scored) * shape.width * (WORD + plain_norm + e))
    matrices = total = 0
    forward = backward = 0.0
    if shape.text:
        chunked = text > 2 * CHUNK_ROWS
        at_once = min(text, CHUNK_ROWS) if chunked else text
        kept["logits"] = 0.0 if chunked else WORD * vocabulary * text
        forward = WORD * vocabulary * at_once * (2 if chunked else 1)
        backward = WORD * vocabulary * at_once * (3 if chunked else 2)
        matrices += decoder.text_head.linear.weight.numel()
        total += sum(parameters_of(part)[0] for part in (decoder.text_head, decoder.trunk.norm))
    if shape.pixels:
        kept["activations"] += WORD * pixels * scored
        backward = max(backward, WORD * pixels * (scored * 2 + rows * 4))  # targets of all patches, normalised
        matrices += decoder.pixel_head.weight.numel()
        total += decoder.pixel_head.weight.numel()
        total += decoder.pixel_trunk.norm.weight.numel() if hasattr(decoder, "pixel_trunk") else 0
    return Segment(kept, total, matrices, forward, backward)


def step_peak(model: Any, sizes: Sizes, layout: RankLayout, program: Program, ema: bool = False) -> Memory:
    """The most memory of a training step of one rank, after the first one.

    Args:
        model: an AIMv2; its tensors may be on the device "meta".
        sizes: of a micro-batch.
        layout: of the ranks.
        program: how the step runs.
        ema: whether an average of the weights is kept.

    Returns:
        by part: ``weights`` (fp32, with the average), ``copies`` (of weights in half precision, where autocast makes them), ``gradients``,
        ``moments``, ``activations``, ``logits``, ``buffers`` (FSDP2: gathered weights, gradients that wait to be divided).
    """
    segments = segments_of(model, sizes, program, layout.checkpointing)
    total, many = sum(p.numel() for p in model.parameters()), layout.ranks > 1
    half = program.half and many  # blocks gather their weights in half precision
    gathered = 2 if half else WORD  # bytes of a block's gathered weight
    stays = not layout.reshard or layout.shard == 1
    largest = max(one.parameters for one in segments if one.block)
    outside = sum(one.parameters for one in segments if not one.block)  # gathered for the whole step
    steady = {"weights": WORD * total / layout.shard * (2 if ema else 1), "moments": 2 * WORD * total / layout.shard}
    best = Memory()

    def copied(one: Segment) -> float:
        return 2.0 * one.matrices if program.half and not (one.block and half) else 0.0

    def look(reached: list[Segment], passed: int, extra: float, buffers: float, when: str) -> None:
        """The moment at which ``reached`` are kept and so many parameters have their gradients."""
        nonlocal best
        kept = {part: sum(one.kept.get(part, 0.0) for one in reached) for part in ("activations", "logits")}
        waiting = total - passed if layout.accumulate > 1 else 0
        parts = {**steady, "gradients": WORD * passed / layout.shard, "copies": sum(map(copied, reached))}
        if many:
            buffers += WORD * outside
        else:
            parts["gradients"] += WORD * waiting
        parts["buffers"] = buffers + (WORD * waiting if many else 0)
        parts |= {"activations": kept["activations"] + extra, "logits": kept["logits"]}
        best = max(best, Memory({part: parts[part] for part in PARTS}, when), key=lambda one: one.total)

    def ahead(reached: list[Segment]) -> float:
        """Gathered weights: of all blocks whose backward pass is to come, or of one and the next."""
        blocks = sum(one.parameters for one in reached if one.block)
        return gathered * (blocks if stays else min(2 * largest, blocks)) if many else 0.0

    end, passed = segments[-1], 0
    look(segments, 0, max(end.forward, end.backward), ahead(segments), "the losses")
    for index in reversed(range(len(segments))):
        one, reached = segments[index], segments[: index + 1]
        own = (
            (gathered + WORD) * one.parameters if one.block and many else 0.0
        )  # its gradient, and the copy that is reduced
        look(
            reached,
            passed if many else passed + one.parameters,
            one.backward,
            ahead(reached) + own,
            "the backward pass",
        )
        passed += one.parameters
    look([], total, 0.0, 0.0, "the optimizer's step")
    return best
