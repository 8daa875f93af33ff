"""A backend as `kernels=auto` takes it where nobody has measured it: kernel by kernel, as checks on the device say."""

from __future__ import annotations

import contextlib
import threading
import warnings
from dataclasses import replace
from functools import cache, partial

import torch

from kvcompile.kernels.backend import Backend
from kvcompile.kernels.choose import choose as choose_by_torch
from kvcompile.kernels.codecs import encode as encode_by_torch
from kvcompile.kernels.compact import compact as compact_by_torch
from kvcompile.kernels.demote import demote as demote_by_torch
from kvcompile.kernels.pointers import opaque
from kvcompile.kernels.reference.ghost import ghost_scores as ghost_by_torch
from kvcompile.kernels.selfcheck import bugreport, records
from kvcompile.kernels.selfcheck.check import check
from kvcompile.kernels.selfcheck.identity import device_name, identity
from kvcompile.kernels.selfcheck.verdict import Verdict
from kvcompile.kernels.spec import KernelSpec

Key = tuple[Backend, KernelSpec, torch.dtype, torch.device]

_verdicts: dict[Key, Verdict] = {}
_warned: set[Key] = set()
_lock = threading.RLock()


@cache
def trusted(backend: Backend, device: torch.device) -> Backend:
    """A backend whose attention is taken on a device where a check there found it right and faster than the library.

    Column sums are checked with it. What else it brings is left to torch, which nothing has to be believed of.
    """
    return replace(
        backend,
        checked=partial(_warning, backend, device),
        encode=encode_by_torch,
        compact=compact_by_torch,
        choose=choose_by_torch,
        demote=demote_by_torch,
        ghost=ghost_by_torch,
        linear=None,
        layers=None,
    )


@opaque
def verdict(
    backend: Backend, device: torch.device, spec: KernelSpec, dtype: torch.dtype, again: bool = False
) -> Verdict:
    """What a check found, once a process: on disk, or now.

    again: check now, whatever is known.
    Raises KvcompileError where the device does not work any more after the check.
    """
    key = backend, spec, dtype, device
    with _lock:
        if again or key not in _verdicts:
            facts = identity(backend, spec, dtype, device)
            _verdicts[key] = records.remembered(facts, partial(_checked, key, facts), again)
        return _verdicts[key]


@opaque
def _warning(backend: Backend, device: torch.device, spec: KernelSpec, dtype: torch.dtype) -> Verdict:
    """The same, with a warning, once a process, of a kernel that is wrong."""
    found, key = verdict(backend, device, spec, dtype), (backend, spec, dtype, device)
    if not found.right and key not in _warned:
        _warned.add(key)
        warnings.warn(complaint(backend, device, spec, found), stacklevel=3)
    return found


def complaints(device: torch.device) -> list[str]:
    """What is known in this process to be wrong on a device, a line each."""
    with _lock:
        wrong = [(b, spec, v) for (b, spec, _, place), v in _verdicts.items() if place == device and not v.right]
    return sorted({complaint(backend, device, spec, found) for backend, spec, found in wrong})


def complaint(backend: Backend, device: torch.device, spec: KernelSpec, found: Verdict) -> str:
    """What a user must know of a kernel that is wrong."""
    where = f" Please send the bug report {found.report}." if found.report else ""
    return (
        f"kernels=auto: the {backend.name} kernel {spec.name} is not right on {device_name(device)}: {found.problem}. "
        f"The library attends in its place.{where} `kvcompile doctor --again` checks it anew."
    )


def _checked(key: Key, facts: dict[str, str]) -> Verdict:
    """The verdict of a check made now, with its bug report where there is a problem."""
    backend, spec, dtype, device = key
    found = check(backend, spec, dtype, device)
    path = records.stem(facts).with_suffix(".md")
    with contextlib.suppress(OSError):
        if found.right:
            path.unlink(missing_ok=True)
        else:
            path.write_text(bugreport.text(backend, spec, dtype, device, facts, found), "utf-8")
            return replace(found, report=str(path))
    return found
