"""Backends of which one thing is wrong, and a process that checks one."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from kvcompile.kernels import reference, sdpa
from kvcompile.kernels.backend import Backend, Sources
from kvcompile.kernels.layout import Queries, RaggedView, View
from kvcompile.kernels.spec import KernelSpec, plain

SPEC = KernelSpec(plain("ragged", "float32"), 2, 16, 16, 0.25)


class Text(Sources):
    """One text, which `change` changes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def attention(self, spec: KernelSpec, dtype: str, device: str) -> dict[str, str]:
        return {"step.txt": self.text}


def right(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    if sums is not None:
        return reference.attend(queries, view, spec, sums)
    return sdpa.attend(queries, view, spec)


def forgets_the_newest(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    """An off-by-one error: the last entry of each row is not read."""
    assert isinstance(view, RaggedView)
    lengths = [n - 1 for n in view.lengths]
    return right(queries, replace(view, lengths=lengths, ends=view.ends - 1), spec, sums)


def wrong_for_several(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    out = right(queries, view, spec, sums)
    return out if queries.states.shape[2] == 1 else out * 1.1


def wrong_for_long_rows(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    assert isinstance(view, RaggedView)
    return right(queries, view, spec, sums) * (1.1 if max(view.lengths) > 256 else 1)


def wrong_sums(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    out = right(queries, view, spec, sums)
    if sums is not None:
        sums.mul_(1.1)
    return out


def unwritten(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    """What stands at padding is no number."""
    out = right(queries, view, spec, sums)
    return out if queries.valid is None else out.masked_fill(~queries.valid[:, None, :, None], float("nan"))


def of_another_dtype(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    return right(queries, view, spec, sums).double()


def does_not_launch(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    raise RuntimeError("out of resource: shared memory\nRequired: 200000")


def slow(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    time.sleep(0.01)
    return right(queries, view, spec, sums)


def backend(attend: object = right, text: str = "a text", **fields: object) -> Backend:
    return Backend("toy", attend, sources=Text(text), **fields)  # type: ignore[arg-type]


CPU = torch.device("cpu")
