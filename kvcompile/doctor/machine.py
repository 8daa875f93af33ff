"""Facts about this machine, and what is wrong with it: compilers, threads, GPUs, Triton, versions, the cache folder."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from kvcompile.errors import KvcompileError
from kvcompile.kernels import dispatch, names
from kvcompile.kernels.cpp import build
from kvcompile.kernels.selfcheck import identity
from kvcompile.models.provenance import in_words, versions
from kvcompile.paths import cache_folder, make_folder, ours

CPU_FACTS = Path("/proc/cpuinfo")
Line = tuple[str, str, str]
"""(what, how it is here, what is wrong with it: empty where nothing is)."""


def machine() -> list[Line]:
    """Everything about this machine that decides which kernels run on it."""
    return [_python(), _processor(), _threads(), *_compiler(), *_gpus(), _triton(), _backends(), _folder()]


def _python() -> Line:
    system = f"Python {platform.python_version()} on {platform.system()} {platform.release()} {platform.machine()}"
    return "versions", f"{in_words(versions())}, triton {identity.versions()['triton']}; {system}", ""


def _processor() -> Line:
    try:
        found = re.search(r"^model name\s*: (.*)$", CPU_FACTS.read_text("utf-8"), re.M)
    except OSError:
        found = None
    name = found.group(1) if found else platform.processor() or platform.machine()
    return "CPU", f"{name}, {_cores()} cores for us; torch runs {torch.backends.cpu.get_cpu_capability()}", ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads() -> Line:
    threads, cores = torch.get_num_threads(), _cores()
    wrong = f"torch runs {threads} threads on {cores} cores. Fix: OMP_NUM_THREADS={cores}" if threads > cores else ""
    return "threads", f"{threads} of torch", wrong


def _compiler() -> Iterator[Line]:
    if reason := build.available():
        yield (
            "compiler",
            f"none: {reason}",
            f"no C++ kernel can be built: {reason}. On a CPU the library attends. Fix: {build.FIX}",
        )
        return
    tools = build.toolchain()
    yield "compiler", f"{tools.version} ({' '.join(tools.compiler)})", ""
    yield "C++ kernels", f"{tools.simd}; {' '.join(tools.flags)}", ""
    if tools.openmp is None:
        yield "OpenMP", f"none: {tools.note}", f"C++ kernels run on one thread: {tools.note}"
    else:
        yield "OpenMP", tools.openmp.runtime, ""


def _gpus() -> Iterator[Line]:
    if not torch.cuda.is_available():
        driver = next((path for path in identity.DRIVERS if Path(path).exists()), "")
        wrong = (
            f"the driver of a GPU is loaded ({driver}), which torch {torch.__version__} cannot use" if driver else ""
        )
        yield "GPU", "none that torch can use", wrong
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        about = f"{facts.name}, compute {facts.major}.{facts.minor}, {facts.multi_processor_count} multiprocessors"
        about += f", {facts.total_memory / 2**30:.0f} GiB"
        yield f"GPU {index}", f"{about}; {identity.driver(torch.device('cuda', index))}", ""


def _triton() -> Line:
    if find_spec("triton") is None:
        wrong = "a GPU without Triton: the library attends. Fix: pip install 'kvcompile[triton]'"
        return "Triton", "not installed", wrong if torch.cuda.is_available() else ""
    interprets = "; TRITON_INTERPRET=1: kernels are interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return "Triton", f"{identity.versions()['triton']}{interprets}", ""


def _backends() -> Line:
    try:
        dispatch.backends()
    except KvcompileError as error:
        return "backends", ", ".join(names.BUILT_IN), str(error)
    return "backends", ", ".join(names.names()), ""


def _folder() -> Line:
    """The folder of kernels and verdicts: made, and written to."""
    try:
        folder = cache_folder()
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, KvcompileError) as error:
        return (
            "cache folder",
            "none",
            f"kernels and verdicts cannot be kept: {error}. Fix: set KVCOMPILE_CACHE=<folder>",
        )
    wrong = "" if ours(folder) else f"others can write to {folder}, so nothing is run from it. Fix: chmod go-w {folder}"
    return "cache folder", str(folder), wrong
