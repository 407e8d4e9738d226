"""Vision models of transformers and timm as frozen encoders: loaded completely or refused, with their own preprocessing.

Legend: B images, N patches, D width.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aimv2.errors import UsageError, first_line, nearest
from aimv2.features.fingerprint import architecture, weights_hash
from aimv2.features.frozen import AVERAGE, LAST, Frozen
from aimv2.features.pixels import OPTIONS, Pixels, Stats, quiet, read_processor, refuse_other_inputs
from aimv2.interop import layouts
from aimv2.interop.checks import check_sizes, check_state, refuse_adapters
from aimv2.interop.hub import offline_if_unreachable
from aimv2.interop.load import model_type, say_left_out
from aimv2.interop.plain import open_plain

MASKED = "vit_mae"  # its encoder masks its own input
Outputs = Callable[[], Sequence[Tensor]]


def is_foreign(folder: Path) -> bool:
    """Whether a folder holds a model of ``transformers`` other than an AIMV2."""
    return model_type(folder) is not None


# ---- loading ----


def open_transformers(
    source: str, folder: Path, device: str | torch.device, auto: str = "AutoModel"
) -> tuple[Any, dict[str, str]]:
    """Opens a folder with ``AutoModel``, in evaluation mode; nothing is unpickled and no code of the folder runs.

    Args:
        source: for messages.
        folder: of config and weights.
        device: of the weights.
        auto: the class of ``transformers`` that opens it.

    Returns:
        the model, and the names of its weights that the folder lacks (they are random; see :func:`settle`), each with what the
        folder holds instead.

    Raises:
        UsageError: it can't be opened; the folder holds an adapter, code to fetch, or more blocks than the model has.
    """
    refuse_adapters(f"MODEL {source}", folder)
    check_sizes(f"MODEL {source}", folder)

    def read(**more: Any) -> Any:
        # sizes that do not match are refused below, by name
        return open_plain(auto, folder, ignore_mismatched_sizes=True, output_loading_info=True, **more)

    try:
        with quiet():
            model, found = read()
            base = getattr(model, "base_model_prefix", "")
            names = model.state_dict(), found["missing_keys"], found["unexpected_keys"]
            for mapping in layouts.renamings(f"MODEL {source}", base, *names):
                again = read(key_mapping=mapping)
                model, found = min((model, found), again, key=lambda one: len(one[1]["missing_keys"]))
    except UsageError:
        raise
    except Exception as error:  # of the file system, of a configuration, of a package that is missing
        found = {"error_msgs": [error]}
    if found["error_msgs"]:
        why = " ".join(" ".join(map(str, found["error_msgs"])).split())[:200]
        raise UsageError(f"MODEL {source}: transformers can't open it: {why}", code="unreadable")
    check_state(model.state_dict(), f"MODEL {source}", found["missing_keys"])
    left = sorted(found["unexpected_keys"])
    missing = dict.fromkeys(found["missing_keys"], f"; unused: {_some(left)}" if left else "")
    for name, stored, wanted in found["mismatched_keys"]:
        missing[name] = f": {name} is {list(stored)} there, {list(wanted)} by config.json"
    _refuse_left_over(source, model, left)
    say_left_out(f"MODEL {source}", left)
    return model.eval().to(device), missing


def _refuse_left_over(source: str, model: Any, left: list[str]) -> None:
    """
    Raises:
        UsageError: keys of blocks that the model lacks; keys of a head that it lacks are fine.
    """
    base = getattr(model, "base_model_prefix", "") + "."
    known = {re.sub(r"\d+", "#", name) for name in model.state_dict()}
    more = [key for key in left if re.sub(r"\d+", "#", key.removeprefix(base)) in known]
    if more:
        raise UsageError(
            f"MODEL {source}: its weights have more blocks than its config.json says: {_some(more)}; correct config.json"
        )


def probe_image(size: int, device: str | torch.device = "cpu") -> Tensor:
    """One image of noise to try a model on, the same at each call: uint8 [1, 3, size, size]."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=rng).to(device)


def settle(source: str, model: nn.Module, missing: Mapping[str, str], outputs: Outputs) -> None:
    """Ensures that the features depend only on stored weights, and removes from the model what they do not depend on.

    Args:
        source: for messages.
        model: in evaluation mode.
        missing: its random weights, each with what the folder holds instead.
        outputs: runs it on one image (and text) and returns everything that may be measured.

    Raises:
        UsageError: a random weight that the outputs depend on; outputs that differ from pass to pass.
    """
    before = _run(outputs)
    used = _used(model, outputs)
    owners = {id(module) for module in model.modules() for p in module.parameters(recurse=False) if id(p) in used}
    random, idle = [], set[int]()
    for name in sorted(missing):
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        value = getattr(owner, last)
        if isinstance(value, nn.Parameter):
            depends = id(value) in used
        else:  # statistics, which have no gradient
            depends = last != "num_batches_tracked" and (
                id(owner) in owners or not list(owner.parameters(recurse=False))
            )
        if depends:
            random.append(name)
        elif isinstance(value, Tensor) and value.is_floating_point():
            idle.add(id(value))
            value.data.fill_(math.nan)
    if random:
        instead = next((why for name in random if (why := missing[name]).startswith(":")), missing[random[0]])
        raise UsageError(
            f"MODEL {source}: its weights lack {len(random)} that its features depend on ({_some(random)}), which would be "
            f"random{instead}; correct config.json, or give the whole model"
        )
    if idle:
        _leave_out(model, used, idle, outputs, before)
    if not _same(before, _run(outputs)):
        raise UsageError(
            f"MODEL {source}: two passes over the same image differ, so that no result could be reproduced; a model whose "
            "features are a function of the image is expected",
            code="unsupported",
        )


class LeftOut(nn.Module):
    """Identity, in place of a head that the features do not depend on."""

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        return x


def _leave_out(model: nn.Module, used: set[int], idle: set[int], outputs: Outputs, wanted: list[Tensor]) -> None:
    """Removes what holds weights of ``idle`` and none of ``used``, where the model runs without it."""

    def tops(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        for name, child in module.named_children():
            inside = {id(value) for value in (*child.parameters(), *child.buffers())}
            if inside & idle and not inside & used:
                yield module, name
            else:
                yield from tops(child)

    for parent, name in list(tops(model)):
        child = parent._modules[name]
        parent._modules[name] = LeftOut()
        if not _still(outputs, wanted):
            parent._modules[name] = child
    for module in list(model.modules()):
        for name, value in list(module.named_parameters(recurse=False)):
            if id(value) in idle:
                module._parameters[name] = None
                if not _still(outputs, wanted):
                    module._parameters[name] = value


def _still(outputs: Outputs, wanted: list[Tensor]) -> bool:
    """Whether the model still runs with the same outputs."""
    try:
        return _same(wanted, _run(outputs))
    except Exception:  # any failure of a model that lacks a part
        return False


def _run(outputs: Outputs) -> list[Tensor]:
    with torch.no_grad():
        return [x.float().clone() for x in outputs()]


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(
        x.shape == y.shape
        and torch.allclose(x, y, rtol=1e-3, atol=1e-3 * float(x.abs().amax().nan_to_num() or 1), equal_nan=True)
        for x, y in zip(first, second)
    )


def _used(model: nn.Module, outputs: Outputs) -> set[int]:
    """Identities of the parameters that the outputs depend on: those in their graph; all where there is none."""
    with torch.enable_grad():
        waiting = [x.grad_fn for x in outputs() if x.grad_fn is not None]
    if not waiting:
        return {id(p) for p in model.parameters()}
    visited, found = set(waiting), set[int]()
    while waiting:
        node = waiting.pop()
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
        for after, _ in node.next_functions:
            if after is not None and after not in visited:
                visited.add(after)
                waiting.append(after)
    return found


def _some(names: Iterable[str]) -> str:
    """The first few, in order."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


# ---- transformers ----


def transformers_frozen(
    source: str, folder: Path, device: torch.device, stats: Stats | None, options: tuple[str, str] = OPTIONS
) -> Frozen:
    """Any vision model that ``AutoModel`` opens; class, register and detection tokens are dropped."""
    whole, missing = open_transformers(source, folder, device)
    model = getattr(whole, "vision_model", whole)
    inside = next((f"{name}." for name, module in whole.named_modules() if module is model and name), "")
    missing = {name.removeprefix(inside): why for name, why in missing.items() if name.startswith(inside)}
    refuse_other_inputs(source, model, model.forward)
    config, kind = model.config, next(model.parameters()).dtype  # as stored, which may be half precision
    pixels, size, _ = read_processor(source, folder, stats, _side(getattr(config, "image_size", None)), options)
    unmasked, first = _unmasked(model, size), 1

    def forward(images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Last features, and the hidden states where there are any."""
        out = model(pixel_values=pixels(images).to(kind), output_hidden_states=True, **unmasked(images))
        if getattr(out, "encoder_last_hidden_state", None) is not None:
            raise UsageError(
                f"MODEL {source}: {type(model).__name__} gives the queries of a decoder, not features of patches; "
                "give its encoder or backbone",
                code="unsupported",
            )
        maps = getattr(out, "feature_maps", None)  # of a backbone
        hidden = getattr(out, "hidden_states", None) or ()
        last = getattr(out, "last_hidden_state", None) if maps is None else maps[-1]
        if last is None:
            raise UsageError(
                f"MODEL {source}: {type(model).__name__} gives no features of patches (last_hidden_state), but "
                f"{', '.join(out)}; give its encoder",
                code="unsupported",
            )
        return last, [*hidden] if all(isinstance(x, Tensor) for x in hidden) else []

    probe = probe_image(size, device)

    def outputs() -> list[Tensor]:
        last, hidden = forward(probe)
        return [last, *hidden]

    def patches(x: Tensor) -> Tensor:
        if x.ndim == 4:
            return flat(source, x)
        return x[:, _leading(config, x.shape[1], size) : x.shape[1] - getattr(config, "num_detection_tokens", 0)]

    def run(images: Tensor, layers: Sequence[str]) -> list[Tensor]:
        last, hidden = forward(images)
        found = []
        for name in layers:
            if name == LAST:
                found.append(patches(last))
            elif name == AVERAGE:
                found.append(torch.stack([patches(h) for h in hidden[-6:]]).mean(0))
            else:
                block = hidden[int(name) + first]  # the embedding comes first, where it is there
                same = block.shape == last.shape  # stages of other widths have no norm in common
                found.append(patches(norm(block) if norm is not None and same else block))
        return found

    try:
        settle(source, model, missing, outputs)
        with torch.inference_mode():
            norm = last_norm(model, lambda: forward(probe))
            (last, hidden), depth = forward(probe), getattr(config, "num_hidden_layers", 0)
            width = patches(last).shape[-1]
            first = len(hidden) - depth
            depth = depth if first in (0, 1) else 0  # else nobody knows which block is which
    except UsageError:
        raise
    except Exception as error:  # any failure of a model for other input
        why, takes = " ".join(str(error).split())[:200], ", ".join(inspect.signature(model.forward).parameters)
        raise UsageError(
            f"MODEL {source}: {type(model).__name__} can't be run on RGB images of {size} x {size} px (it takes {takes}): {why}",
            code="unsupported",
        ) from None
    return _frozen(source, "transformers", size, width, depth, run, model, device, pixels)


def _frozen(
    source: str, kind: str, size: int, width: int, depth: int, run: Any, model: nn.Module, device: torch.device, pixels: Pixels
) -> Frozen:  # fmt: skip
    digest = weights_hash(model, str(pixels))
    shape = architecture(model)
    return Frozen(source, kind, size, width, depth, digest, run, model, device, pixels=pixels, architecture=shape)


def _side(size: Any) -> int | None:
    if isinstance(size, list | tuple):
        return max(size) if size else None
    return int(size) if isinstance(size, int) and size > 0 else None


def _unmasked(model: Any, size: int) -> Callable[[Tensor], dict[str, Tensor]]:
    """Extra arguments that turn off the masking of ViTMAE, which sorts patches by noise."""
    config = model.config
    if config.model_type != MASKED:
        return lambda images: {}
    config.mask_ratio = 0.0
    count = (size // (_side(config.patch_size) or size)) ** 2
    return lambda images: {"noise": torch.arange(count, device=images.device).float().expand(len(images), -1)}


def _leading(config: Any, tokens: int, size: int) -> int:
    """Number of tokens before the patches: by the configuration, else what exceeds a square."""
    registers, after = getattr(config, "num_register_tokens", None), getattr(config, "num_detection_tokens", 0)
    if registers is not None:
        return registers + 1
    patch = _side(getattr(config, "patch_size", None))
    grid = (size // patch) ** 2 if patch else 0
    if 0 < grid <= tokens - after <= grid + 16:
        return tokens - after - grid
    return tokens - after - math.isqrt(tokens - after) ** 2


def last_norm(model: nn.Module, forward: Callable[[], tuple[Tensor, list[Tensor]]]) -> nn.Module | None:
    """The norm between the last block and ``last_hidden_state``, whatever its name; None where there is none.

    CLIP and BEiT have none there: theirs is applied only to the pooled vector.
    """
    calls: dict[nn.Module, tuple[Any, Any]] = {}

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        calls[module] = inputs[0], output

    norms = [
        module
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__ and not any(part.isdigit() for part in name.split("."))  # not a block's own
    ]
    hooks = [module.register_forward_hook(record) for module in norms]
    try:
        last, hidden = forward()
    finally:
        for hook in hooks:
            hook.remove()

    if not hidden:
        return None

    def is_last(x: Any, output: Any) -> bool:
        ends = zip((x, output), (hidden[-1], last))
        return all(isinstance(x, Tensor) and x.shape == end.shape and torch.equal(x, end) for x, end in ends)

    return next((module for module, call in calls.items() if is_last(*call)), None)


# ---- timm ----


def timm_frozen(source: str, device: torch.device, stats: Stats | None) -> Frozen:
    """``timm:NAME``, with its pretrained weights."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        why = f"timm can't be imported here ({first_line(error)}): pip install timm, and the torchvision made for torch {torch.__version__}"
        raise UsageError(f"MODEL {source}: {why}", code="missing") from None
    name = source.removeprefix("timm:")
    if ":" not in name and not timm.is_model(name):
        raise UsageError(f"MODEL {source}: timm has no such model{nearest(name, timm.list_models())}", code="unknown")
    with offline_if_unreachable() as unreached:
        try:
            model: Any = timm.create_model(name, pretrained=True, num_classes=0).eval().to(device)
        except Exception as error:  # no network, no such weights
            why = f"the hub can't be reached ({unreached}) and the cache lacks it" if unreached else first_line(error)
            raise UsageError(f"MODEL {source}: timm can't open its weights: {why}", code="not-found") from None
    about = timm.data.resolve_model_data_config(model)
    if about["input_size"][0] != 3:
        raise UsageError(
            f"MODEL {source}: it takes images of {about['input_size'][0]} channels; an encoder of RGB images is expected",
            code="unsupported",
        )
    return of_timm(
        source, model, about["input_size"][-1], stats or Stats(tuple(about["mean"]), tuple(about["std"])), device
    )


def of_timm(source: str, model: Any, size: int, stats: Stats, device: torch.device) -> Frozen:
    """A model of timm that is in memory, in evaluation mode.

    Raises:
        UsageError: features that are no patches on a square grid, or differ from pass to pass.
    """
    pixels = Pixels(stats=stats, origin="timm")
    layout = str(getattr(model, "output_fmt", "") or "")
    layout = layout.rpartition(".")[2].upper()  # declared by the model; NCHW is not declared

    def run(images: Tensor, layers: Sequence[str]) -> list[Tensor]:
        x = model.forward_features(pixels(images))
        if not isinstance(x, Tensor) or x.ndim not in (3, 4):
            raise UsageError(f"MODEL {source}: {type(model).__name__} gives no patch features", code="unsupported")
        if x.ndim == 4:
            return [flat(source, x, layout or "NCHW")] * len(layers)
        before = getattr(model, "num_prefix_tokens", None)
        before = int(hasattr(model, "cls_token")) if before is None else before  # volo, convit: not counted
        count = x.shape[1] - before
        if count < 1 or math.isqrt(count) ** 2 != count:
            raise UsageError(f"MODEL {source}: {count} features of an image of {size} px are no square grid of patches")
        return [x[:, before:]] * len(layers)

    probe = probe_image(size, device)
    settle(source, model, {}, lambda: run(probe, [LAST]))
    with torch.inference_mode():
        width = run(probe, [LAST])[0].shape[-1]
    return _frozen(source, "timm", size, width, 0, run, model, device, pixels)


# ---- maps ----


def flat(source: str, x: Tensor, layout: str | None = None) -> Tensor:
    """A map of a square image -> [B, N, D], by rows.

    Args:
        source: for messages.
        x: [B, D, h, h] or [B, h, h, D].
        layout: NCHW or NHWC, as the model declares; None: inferred from equal sides.

    Raises:
        UsageError: an ambiguous shape, or one that contradicts the model's layout.
    """
    first, last = x.shape[2] == x.shape[3], x.shape[1] == x.shape[2]
    known = {"NCHW": first, "NHWC": last}.get(layout, False) if layout is not None else first != last
    if not known:
        raise UsageError(
            f"MODEL {source}: a map of {list(x.shape)} of a square image; {layout or 'NCHW or NHWC'} with two equal sides expected"
        )
    layout = layout or ("NCHW" if first else "NHWC")
    return x.flatten(2).transpose(1, 2) if layout == "NCHW" else x.flatten(1, 2)
