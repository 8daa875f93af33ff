"""What a verdict holds for: one kernel's text, on one device, under one driver, with these versions."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kvcompile.kernels.backend import Backend
from kvcompile.kernels.spec import KernelSpec

CHECK = 1  # of the check itself: raise it when a check asks for more than before
DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")
PACKAGES = ("kvcompile", "torch", "triton")
UNKNOWN = "unknown"


def identity(backend: Backend, spec: KernelSpec, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """All that a verdict depends on, by name. A GPU is told by its kind, not by its number."""
    name = str(dtype).removeprefix("torch.")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    texts = {**backend.sources.attention(spec, name, gpu), **backend.sources.shared()}
    if spec.scores:
        texts |= {f"columns {end}": text for end, text in backend.sources.column_sums(spec, name, gpu).items()}
    return {
        "check": str(CHECK),
        "backend": backend.name,
        "spec": f"{spec.name} x{spec.scale!r}",
        "queries": name,
        "device": device_name(device),
        "driver": driver(device),
        "texts": hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest(),
        **versions(),
    }


def digest(facts: dict[str, str]) -> str:
    """Of an identity, for the name of a file."""
    return hashlib.sha256(json.dumps(sorted(facts.items())).encode()).hexdigest()[:20]


def device_name(device: torch.device) -> str:
    """`NVIDIA H100 PCIe`, or the instructions of a CPU, and whether Triton interprets kernels there."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}{_interpreted()}"
    return device.type


def driver(device: torch.device) -> str:
    """The driver of a GPU, and what torch was built for; of a CPU, the system."""
    if device.type != "cuda":
        return f"{platform.system()} {platform.release()}"
    built = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"{_driver()}; {built}"


@cache
def versions() -> dict[str, str]:
    """Of the packages that decide what a kernel computes."""
    return {name: _version(name) for name in PACKAGES}


@cache
def _driver() -> str:
    for path in DRIVERS:
        try:
            return Path(path).read_text("utf-8").splitlines()[0]
        except (OSError, UnicodeDecodeError, IndexError):
            continue
    return UNKNOWN


def _interpreted() -> str:
    import os

    return ", Triton's interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
