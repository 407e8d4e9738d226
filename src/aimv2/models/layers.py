"""Building blocks of every trunk: attention in its forms, SwiGLU, and the pre-norm block (AIMV2, Table 1).

Legend: B samples, N positions, D width, H heads, d = D / H, R packed rows.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimv2.models.masks import cached_mask, causal_mask, prefix_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NORM_EPS = 1e-5  # RMSNorm, everywhere
# what torch.compile, FSDP and checkpointing put into names, anywhere
WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
MATMUL_LENGTH = {False: 256, True: 1024}  # positions; True: bf16. Above, SDPA is faster or the scores too large


class Packed(NamedTuple):
    """Layout of B sequences of I image and up to T text positions in rows without padding.

    The first B * I rows are the image positions; row B * I + r is the text position ``token_rows[r]`` of the flat
    [B * T] text (B * T itself marks a padding row).
    """

    token_rows: Tensor  # int64 [R]
    samples: int  # B
    patches: int  # I
    text: int  # T
    spans: Spans | None = None  # images of different sizes: replaces the numbers above


class Spans(NamedTuple):
    """Sequences of different lengths in one row of R without padding, for attention within each.

    Sequences of similar length form a group and are padded for attention only: group g has ``groups[g] = (n, L)``, n
    sequences of up to L positions. ``slots`` is the index of every row in the concatenated n * L positions of all groups;
    padding rows hold their sum.
    """

    slots: Tensor  # int64 [R]
    groups: tuple[tuple[int, int], ...]
    masks: tuple[Tensor, ...] | None = None  # bool [n, 1, L, L] a group; None: causal


def prefix_spans(slots: Tensor, groups: tuple[tuple[int, int], ...], prefix_len: Tensor) -> Spans:
    """Spans under prefix attention, ``prefix_len`` int64 [sequences]; a prefix of all positions is bidirectional."""
    parts = prefix_len.split([count for count, _ in groups])
    masks = tuple(prefix_mask(part, length)[:, None] for part, (_, length) in zip(parts, groups))
    return Spans(slots, groups, masks)


class Documents(NamedTuple):
    """Images of different sizes in one row without padding, for attention within each image.

    ``lengths`` are their numbers of patches; ``starts`` is int32 [images + 1] on the device, the cumulative sum from 0.
    """

    lengths: tuple[int, ...]
    starts: Tensor


class Cache:
    """Key-value cache of one block: [B, H, cached, d] each."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append along the positions; return all keys and values so far."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key], 2), torch.cat([self.value, value], 2)
        self.key, self.value = key, value
        return key, value

    def select(self, rows: Tensor) -> None:
        """Reorder to samples ``rows`` (int64 [B']), repeats allowed (beam search)."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key[rows], self.value[rows]


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """Attention as two matmuls around a masked softmax; faster than SDPA on a CPU for short sequences.

    Args:
        q, k, v: [B, H, N, d].
        allowed: bool, broadcast to [B, H, N, N], or None for all.

    Returns:
        [B, H, N, d].
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def inline_attention(q: Tensor, k: Tensor, v: Tensor, prefix_len: Tensor | None) -> Tensor:
    """:func:`matmul_attention`, causal or with a prefix, for torch.compile on a CPU.

    The mask is a comparison of positions fused into the softmax: no [B, N, N] mask is materialised.

    Args:
        q, k, v: [B, H, N, d].
        prefix_len: int64 [B], or None for causal.

    Returns:
        [B, H, N, d].
    """
    length = q.shape[2]
    if prefix_len is None:
        return matmul_attention(q, k, v, causal_mask(length, q.device))
    return matmul_attention(q, k, v, prefix_mask(prefix_len, length)[:, None])


def prefers_matmul(q: Tensor) -> bool:
    """Whether two matmuls beat SDPA: on a CPU up to MATMUL_LENGTH positions (its kernel's backward pass is slow)."""
    if torch.compiler.is_exporting():  # the length may be unknown, and other engines recognise the SDPA operator
        return False
    return q.device.type == "cpu" and q.shape[2] <= MATMUL_LENGTH[q.dtype == torch.bfloat16]


def dtype_of(module: nn.Module) -> torch.dtype:
    """Dtype of the residual stream: that of a module's first floating-point parameter, whatever wraps its linears."""
    return next(part.dtype for part in module.parameters() if part.is_floating_point())


def unwrapped(model: Any) -> Any:
    """The model within torch.compile, DataParallel, DistributedDataParallel, FSDP or an averaged model."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


class Attention(nn.Module):
    """Multi-head self-attention with one fused query-key-value projection; no biases, no dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: Any = None,
        packed: Packed | None = None,
        keep: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend and project; arguments and result as those of :meth:`Block.forward`, ``x`` normalised."""
        qkv = self.qkv(x)
        if packed is not None:
            out = self.attend_packed(qkv, packed)
        elif cache is not None and mask is not None:
            out = self.attend_cached(qkv, cache)
        else:
            out = self.attend(qkv, mask)
            if cache is not None:
                cache.extend(*self.split(qkv)[1:])
        return self.proj(out if keep is None else out.index_select(0, keep))

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, 3 * D] -> query, key, value, each [B, H, N, d]."""
        batch, length, _ = qkv.shape
        q, k, v = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def attend(self, qkv: Tensor, mask: Any) -> Tensor:
        """Attention under ``mask``, before the output projection.

        Args:
            qkv: [B, N, 3 * D].
            mask: None = bidirectional; "causal"; int64 [B] prefix lengths; bool [B, 1, N, N]; a flex BlockMask;
                Documents or Spans (B = 1); or one that attends itself, such as Windows.

        Returns:
            [B, N, D].
        """
        if isinstance(mask, Spans):
            return self.attend_spans(qkv[0], mask)[None]
        if hasattr(mask, "attend"):
            return mask.attend(self, qkv)
        q, k, v = self.split(qkv)
        if isinstance(mask, Documents):
            return self.attend_documents(q, k, v, mask)
        compiling, by_matmul = torch.compiler.is_compiling() and q.device.type == "cpu", prefers_matmul(q)
        if mask is None:
            out = matmul_attention(q, k, v, None) if by_matmul else F.scaled_dot_product_attention(q, k, v)
        elif isinstance(mask, str):
            if compiling or by_matmul:
                out = inline_attention(q, k, v, None)
            else:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif not isinstance(mask, Tensor):
            from torch.nn.attention.flex_attention import flex_attention

            out = flex_attention(q, k, v, block_mask=mask)
        elif mask.dtype == torch.bool:
            plain = matmul_attention if by_matmul else F.scaled_dot_product_attention
            out = plain(q, k, v, mask)
        else:
            out = inline_attention(q, k, v, mask)
        return out.transpose(1, 2).flatten(2)

    def attend_documents(self, q: Tensor, k: Tensor, v: Tensor, rows: Documents) -> Tensor:
        """Bidirectional attention within each document: [1, H, N, d] each -> [1, N, D].

        On CUDA in half precision one variable-length kernel, elsewhere one call per document.
        """
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and varlen_available():
            from torch.nn.attention.varlen import varlen_attn

            longest = max(rows.lengths)
            q, k, v = (part[0].transpose(0, 1).contiguous() for part in (q, k, v))  # [N, H, d]
            out: Any = varlen_attn(q, k, v, rows.starts, rows.starts, longest, longest)
            return out.flatten(1)[None]
        parts = []
        for q1, k1, v1 in zip(*(part.split(rows.lengths, dim=2) for part in (q, k, v))):
            by_matmul = prefers_matmul(q1)
            out = matmul_attention(q1, k1, v1, None) if by_matmul else F.scaled_dot_product_attention(q1, k1, v1)
            parts.append(out.transpose(1, 2).flatten(2))
        return torch.cat(parts, dim=1)

    def attend_packed(self, qkv: Tensor, rows: Packed) -> Tensor:
        """Causal attention over [image ; caption] for packed rows: [B * I + R, 3 * D] -> [B * I + R, D]."""
        if rows.spans is not None:
            return self.attend_spans(qkv, rows.spans)
        image_rows = rows.samples * rows.patches
        image = qkv[:image_rows].view(rows.samples, rows.patches, -1)
        slots = rows.samples * rows.text
        text = qkv.new_zeros(slots + 1, qkv.shape[1]).index_copy(0, rows.token_rows, qkv[image_rows:])
        full = torch.cat([image, text[:slots].view(rows.samples, rows.text, -1)], dim=1)  # [B, I + T, 3 * D]
        out = self.attend(full, "causal")
        text_out = out[:, rows.patches :].reshape(slots, -1)
        text_out = text_out.index_select(0, rows.token_rows.clamp(max=slots - 1))
        return torch.cat([out[:, : rows.patches].reshape(image_rows, -1), text_out])

    def attend_spans(self, qkv: Tensor, spans: Spans) -> Tensor:
        """Attention within each sequence of the row: [R, 3 * D] -> [R, D]."""
        sizes = [count * length for count, length in spans.groups]
        full = qkv.new_zeros(sum(sizes) + 1, qkv.shape[1]).index_copy(0, spans.slots, qkv)
        out = []
        for number, (part, group) in enumerate(zip(full[:-1].split(sizes), spans.groups)):
            mask = "causal" if spans.masks is None else spans.masks[number]
            out.append(self.attend(part.view(*group, -1), mask).flatten(0, 1))
        return torch.cat(out).index_select(0, spans.slots.clamp(max=sum(sizes) - 1))

    def attend_cached(self, qkv: Tensor, cache: Cache) -> Tensor:
        """Causal attention of new positions over the cached ones and themselves: [B, new, 3 * D] -> [B, new, D]."""
        q, k, v = self.split(qkv)
        new = k.shape[2]
        k, v = cache.extend(k, v)
        mask = cached_mask(k.shape[2] - new, new, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Norm(nn.RMSNorm):
    """RMSNorm in the dtype of its input, whatever that of its weight (FSDP gathers weights in half precision)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``; gate and up are one fused projection, gate first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm block: attention, then SwiGLU, each added to its input.

    One class serves the encoder (padded [B, N, D] with a mask), the decoder in training (packed rows) and caption
    generation (cache).
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = Norm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = Norm(width, eps=NORM_EPS)
        self.mlp = SwiGLU(width, hidden)

    def forward(
        self,
        x: Tensor,
        mask: Any = None,
        packed: Packed | None = None,
        keep: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            x: [B, N, D], or packed rows [B * I + R, D].
            mask: see :meth:`Attention.attend` (padded input only); with ``cache`` None (a first call) or "causal".
            packed: the row layout, for packed input.
            keep: int64 [K]; only these packed rows leave the block (the last block needs scored rows only).
            cache: keys and values so far; ``x`` holds the new positions.

        Returns:
            like ``x``, or [K, D].
        """
        attended = self.attn(self.norm1(x), mask, packed, keep, cache)
        x = (x if keep is None else x.index_select(0, keep)) + attended
        return x + self.mlp(self.norm2(x))


def varlen_available() -> bool:
    """Whether torch has variable-length attention."""
    import importlib.util

    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def flex_available() -> bool:
    """Whether FlexAttention can be used in training (it has no backward pass on a CPU)."""
    return torch.cuda.is_available()


def prefix_attention_mask(prefix_len: Tensor, length: int, compiled: bool) -> Tensor | BlockMask:
    """The prefix mask in the form that suits the device; built once per batch, used by every block.

    Args:
        prefix_len: int64 [B], each in 1..length.
        length: N.
        compiled: whether the blocks run under torch.compile.

    Returns:
        a flex BlockMask (compiled on CUDA), the lengths themselves (compiled on a CPU: fused into the softmax), or
        bool [B, 1, N, N] (eager).
    """
    if compiled and prefix_len.device.type == "cpu":
        return prefix_len
    if compiled and flex_available():
        from torch.nn.attention.flex_attention import create_block_mask

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (k <= q) | (k < prefix_len[b])

        return create_block_mask(allowed, len(prefix_len), None, length, length, device=str(prefix_len.device))
    return prefix_mask(prefix_len, length)[:, None]
