"""Check packages, devices, hub, disks and process groups of this machine, without changing anything."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

import aimv2
from aimv2.doctor.check import Check, Status
from aimv2.doctor.packages import RequiredPackage, requirements, satisfies
from aimv2.errors import first_line
from aimv2.io import machine_memory

PYTHON = (3, 11)  # oldest supported version
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
HUB_TIMEOUT = 4.0  # seconds
FREE = {"working folder": 5.0, "hub cache": 5.0, "temporary files": 1.0, "shared memory": 0.5}  # GB that should be free


# ---- versions ----


def versions() -> Iterator[Check]:
    """Check Python, torch, dependencies and extras (with the command that installs them)."""
    enough = sys.version_info >= PYTHON
    wanted = ".".join(map(str, PYTHON))
    yield Check(
        "versions",
        "python",
        "ok" if enough else "fail",
        f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "" if enough else f"use Python {wanted} or newer",
    )
    yield Check("versions", "aimv2", "ok", aimv2.__version__)
    try:
        needed = requirements()
    except metadata.PackageNotFoundError:
        yield Check(
            "versions", "dependencies", "warn", "aimv2 itself is not installed", "pip install -e . in its folder"
        )
        return
    fine = []
    for name, wanted, found in needed.get("", []):
        if found is None or not satisfies(found, wanted):
            state = "missing" if found is None else f"{found}, {wanted} is needed"
            yield Check("versions", name, "fail", state, f"pip install '{name}{wanted}'")
        elif name == "torch":
            yield Check("versions", name, "ok", torch.__version__)
        else:
            fine.append(f"{name} {found}")
    yield Check("versions", "dependencies", "ok", ", ".join(fine))
    for extra, packages in needed.items():
        if extra:
            yield check_extra(extra, packages)


def check_extra(extra: str, packages: list[RequiredPackage]) -> Check:
    """Check the packages of an extra."""
    install, name = f"pip install 'aimv2[{extra}]'", f"extra {extra}"
    if not packages:
        return Check("versions", name, "off", "not for this platform")
    if absent := [package for package, _, found in packages if found is None]:
        return Check("versions", name, "off", f"{', '.join(absent)} missing: {install}")
    if old := [f"{p} {found} ({wanted})" for p, wanted, found in packages if found and not satisfies(found, wanted)]:
        return Check("versions", name, "warn", f"too old or new: {', '.join(old)}", install)
    return Check("versions", name, "ok", ", ".join(f"{package} {found}" for package, _, found in packages))


# ---- devices ----


def devices() -> Iterator[Check]:
    """Check the processor and its number formats, memory, and GPUs."""
    cores = os.cpu_count() or 1
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    count = f"{cores} cores" if own == cores else f"{own} of {cores} cores"
    yield Check("devices", "processor", "ok", f"{processor()}, {count}, {torch.get_num_threads()} threads in torch")
    formats = {
        "AVX-512": "_is_avx512_supported",
        "AVX-512 bf16": "_is_avx512_bf16_supported",
        "AMX": "_is_amx_tile_supported",
    }
    supported = [f"{name} {'yes' if probe(check) else 'no'}" for name, check in formats.items()]
    fast = probe(formats["AVX-512 bf16"]) or probe(formats["AMX"])
    yield Check("devices", "bf16 matmul", "ok" if fast else "off", ", ".join(supported))
    total, free = machine_memory()
    tight = free is not None and free < 2
    found = f"{total:.1f} GB" + (f", {free:.1f} GB free" if free is not None else "")
    advice = "close other programs, or use a smaller model.name and train.batch_size" if tight else ""
    yield Check("devices", "memory", "warn" if tight else "ok", found, advice)
    yield from gpus()


def probe(name: str) -> bool:
    """One of torch's CPU capability tests; False if this version lacks it."""
    test = getattr(torch.cpu, name, None)
    return bool(test and test())


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpus() -> Iterator[Check]:
    """Check every CUDA device with its memory and formats, or why there is none."""
    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi") is not None
        if driver and torch.version.cuda is None:
            advice = "install a CUDA build of torch: https://pytorch.org/get-started/locally"
            yield Check("devices", "GPU", "warn", "a driver is installed, but torch is a CPU build", advice)
        elif driver:
            advice = "check nvidia-smi: the driver may be older than torch's CUDA, or the devices hidden or in use"
            found = f"a driver is installed, but torch (CUDA {torch.version.cuda}) finds none"
            yield Check("devices", "GPU", "warn", found, advice)
        else:
            yield Check("devices", "GPU", "off", "none: models run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        about, capability = torch.cuda.get_device_properties(index), torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
        formats = f"bf16 {'yes' if capability >= (8, 0) else 'no'}, fp8 {'yes' if capability >= (8, 9) else 'no'}"
        found = f"{about.name}, {total / 1e9:.0f} GB, {free / 1e9:.0f} GB free, {formats}"
        busy = free < 0.2 * total
        advice = "another program uses most of its memory: see nvidia-smi" if busy else ""
        yield Check("devices", f"GPU {index}", "warn" if busy else "ok", found, advice)


# ---- hub ----


def hub() -> Iterator[Check]:
    """Check whether models can be downloaded by name."""
    from huggingface_hub import constants

    own = f"give folders as MODEL, or put models into {constants.HF_HUB_CACHE} (on a machine with access: hf download)"
    offline = [name for name in OFFLINE if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")]
    if offline:
        found = f"not tried, {', '.join(offline)} set: names are searched only in the cache"
        yield Check("hub", "model hub", "off", found)
        return
    began = time.perf_counter()
    why = unreachable_within(HUB_TIMEOUT)
    seconds = time.perf_counter() - began
    if why:
        yield Check("hub", "model hub", "warn", f"{constants.ENDPOINT}: {why}", own, seconds)
    else:
        yield Check("hub", "model hub", "ok", f"{constants.ENDPOINT} answers", seconds=seconds)


def unreachable_within(seconds: float) -> str:
    """Why the hub does not answer, "" if it does; in a thread, since a DNS lookup may exceed any request timeout."""
    from aimv2.interop.hub import unreachable

    answers: list[str] = []
    request = threading.Thread(target=lambda: answers.append(unreachable()), daemon=True)
    request.start()
    request.join(seconds)
    return answers[0] if answers else f"no answer within {seconds:g} s"


# ---- disk ----


def disk() -> Iterator[Check]:
    """Check free space where aimv2 writes."""
    from huggingface_hub import constants

    places = {
        "working folder": Path.cwd(),
        "hub cache": Path(constants.HF_HUB_CACHE),
        "temporary files": Path(tempfile.gettempdir()),
        "shared memory": Path("/dev/shm"),
    }
    advice = {
        "working folder": "free some space, or give --run and OUT on another disk",
        "hub cache": "free some space, or set HF_HOME to a folder on another disk",
        "temporary files": "free some space, or set TMPDIR to a folder on another disk",
        "shared memory": "dataloader workers pass batches through it: start the container with --shm-size=8g, or set data.workers=0",
    }
    for name, path in places.items():
        if name == "shared memory" and not path.is_dir():
            continue
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        free = shutil.disk_usage(existing).free / 1e9
        if not os.access(existing, os.W_OK):
            yield Check(
                "disk", name, "warn", f"{path}: can't be written", advice[name].replace("free some space, or ", "")
            )
        elif free < FREE[name]:
            yield Check("disk", name, "warn", f"{free:.1f} GB free at {path}", advice[name])
        else:
            yield Check("disk", name, "ok", f"{free:,.1f} GB free at {path}")


# ---- several processes ----


def distributed() -> Iterator[Check]:
    """Check process groups: gloo is tried, nccl only looked up."""
    import torch.distributed as dist

    if not dist.is_available():
        advice = "torch was built without it: install a standard build to train with torchrun"
        yield Check("distributed", "torch.distributed", "warn", "missing", advice)
        return
    began = time.perf_counter()
    why = try_gloo()
    advice = "gloo must find this host's name: see /etc/hosts, or set GLOO_SOCKET_IFNAME=lo" if why else ""
    found = why or "a group of one joined and summed"
    yield Check("distributed", "gloo (CPU)", "warn" if why else "ok", found, advice, time.perf_counter() - began)
    nccl, cuda = dist.is_nccl_available(), torch.cuda.is_available()
    advice = "install a CUDA build of torch with nccl to train on several GPUs" if cuda and not nccl else ""
    status: Status = "ok" if nccl else "warn" if cuda else "off"
    yield Check("distributed", "nccl (CUDA)", status, "available" if nccl else "not in this build of torch", advice)


def try_gloo() -> str:
    """Why a gloo group of one process does not work, "" if it does."""
    import torch.distributed as dist

    if dist.is_initialized():
        return ""
    try:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            ones = torch.ones(1)
            dist.all_reduce(ones)
            return "" if ones.item() == 1 else f"an all-reduce of 1 gave {ones.item():g}"
        finally:
            dist.destroy_process_group()
    except Exception as error:  # any network error
        return first_line(error)
