"""The backend `kernels=triton`: generated kernels where tensors lie on a GPU, or where Triton's interpreter is on.

A view crosses into `torch.ops.kvcompile_triton.attend` as a list of tensors and a spec as text, so that torch.fx,
torch.compile and torch.export see one node. Importing this module imports no Triton.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels import compact as reference
from kvcompile.kernels import sdpa
from kvcompile.kernels.backend import Backend, Sources
from kvcompile.kernels.choose import ChooseSpec, EntryTable, GroupTable, Places
from kvcompile.kernels.choose import choose as choose_by_torch
from kvcompile.kernels.compact import Arrays, CompactSpec
from kvcompile.kernels.layout import DenseView, Queries, RaggedView, Segment, View, parts
from kvcompile.kernels.pointers import opaque
from kvcompile.kernels.reference.ghost import GhostSpec, Reread
from kvcompile.kernels.reference.ghost import ghost_scores as ghost_by_torch
from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.triton import tuning
from kvcompile.kernels.triton.emit import Kernels
from kvcompile.kernels.triton.entries.choose import Scoring
from kvcompile.kernels.triton.entries.compact import Compaction
from kvcompile.kernels.triton.entries.ghost import Ghosts
from kvcompile.kernels.triton.forms import KINDS
from kvcompile.plan.ghost import GhostRule
from kvcompile.plan.recall import Agreement

QUERY_TYPES = (torch.float32, torch.float16, torch.bfloat16)
SPLIT = (("", 1), ("-split", 2))  # ends of names of kernels whose rows one program reads, or several


@cache
def ready(device: str) -> None:
    """Raise KvcompileError unless generated kernels can run on a device of this type; make their operator known."""
    if importlib.util.find_spec("triton") is None:
        raise KvcompileError(
            "kernels=triton needs Triton, which is not installed", fix="pip install 'kvcompile[triton]'"
        )
    from kvcompile.kernels.triton import ops  # noqa: F401  registers the operator
    from kvcompile.kernels.triton.launch import interpreted

    if device != "cuda" and not interpreted():
        raise KvcompileError(
            "kernels=triton runs on a GPU, or on a CPU in Triton's interpreter",
            f"tensors on {device}",
            "move the model to a GPU, set TRITON_INTERPRET=1 (slow: for tests), or choose another backend",
        )


def supports(spec: KernelSpec, dtype: torch.dtype) -> bool:
    """Whether there are fragments for the number formats of a spec, and for queries of a dtype."""
    formats = [codec for part in spec.parts for codec in (part.key, part.value)]
    if spec.latent and any(codec.scaled for codec in formats):
        return False  # values that are channels of codes
    kinds = {codec.kind for codec in formats}
    return not (spec.bias or spec.alibi or spec.chunked) and dtype in QUERY_TYPES and kinds <= set(KINDS)


def attend(queries: Queries, view: View, spec: KernelSpec, sums: Tensor | None = None) -> Tensor:
    """Same contract as `reference.attend`, in the dtype of the queries; a row with nothing visible gives zeros.

    A prompt over nothing but itself (one dense, uncoded part, no window, no scores) is left to SDPA: prefill is not
    what generated kernels are for. Raises KvcompileError where there is no GPU, no interpreter or no Triton.
    """
    if not torch.compiler.is_compiling():  # a trace follows a choice of this backend, which has asked
        ready(queries.states.device.type)
    if _fresh(queries, view, spec):
        return sdpa.attend(queries, view, spec)
    states, at, tensors, longest = operands(queries, view)
    return torch.ops.kvcompile_triton.attend(states, at, tensors, sums, written(spec), longest, queries.sinks)  # type: ignore[no-any-return]


@opaque
def column_sums(queries: Queries, view: View, spec: KernelSpec, sums: Tensor, lse: Tensor | None = None) -> None:
    """Add to `sums [R, longest row]` the attention that each entry receives from `queries`, the last of a prefill.

    `lse [R, Q * g]` (base 2, token-major) spares a pass over the keys where it is known. No values are read.
    """
    ready(queries.states.device.type)
    from kvcompile.kernels.triton.launch import Call, columns

    columns(Call(spec, *operands(queries, view), queries.sinks), lse, sums)


@opaque
def compact(source: Arrays, target: Arrays, kept: Tensor, counts: list[int], first: list[int] | None = None) -> None:
    """Same contract as `kernels.compact.compact`. Raises KvcompileError where there is no GPU or interpreter."""
    ready(kept.device.type)
    if source.learns or target.learns:
        return reference.compact(source, target, kept, counts, first)
    from kvcompile.kernels.triton.entries import compact as generated

    generated.compact(source, target, kept, counts, first)


@opaque
def choose(
    queries: Tensor,
    table: GroupTable,
    wanted: list[int],
    lengths: list[int],
    agree: Agreement,
    together: int = 1,
    places: Places | None = None,
) -> EntryTable:
    """Same contract as `kernels.choose.choose`. Raises KvcompileError where there is no GPU or interpreter."""
    ready(queries.device.type)
    if queries.dtype not in QUERY_TYPES:
        return choose_by_torch(queries, table, wanted, lengths, agree, together, places)
    from kvcompile.kernels.triton.entries import choose as generated

    return generated.choose(queries, table, wanted, lengths, agree, together, places)


@opaque
def ghost(text: Reread, rule: GhostRule) -> Tensor:
    """Same contract as `reference.ghost.ghost_scores`. Raises KvcompileError where there is no GPU or interpreter."""
    ready(text.queries.device.type)
    if text.queries.dtype not in QUERY_TYPES:
        return ghost_by_torch(text, rule)
    from kvcompile.kernels.triton.entries import ghost as generated

    return generated.ghost_scores(text, rule)


def written(spec: KernelSpec) -> str:
    """A spec as text, in f-strings alone, which torch.compile can trace; `ops.read` reads it."""
    fields = f"{spec.group} {spec.head_dim} {spec.value_dim} {spec.scale!r} {spec.sliding_window or 0} "
    text = fields + f"{spec.softcap or 0.0!r} {spec.scores} {spec.latent} {spec.sink}"
    for p in spec.parts:
        text += f";{p.layout} {p.page} {p.key.kind} {p.key.axis} {p.key.group}"
        text += f" {p.value.kind} {p.value.axis} {p.value.group}"
    return text


def operands(queries: Queries, view: View) -> tuple[Tensor, Tensor, list[Tensor], list[int]]:
    """Queries, positions with -1 at padding, tensors of all parts, and the longest row of each part."""
    states, at = queries.states, queries.positions
    if states.stride(-1) != 1:
        states = states.contiguous()
    at = at if at.dtype == torch.int64 else at.long()
    at = at if queries.valid is None else at.masked_fill(~queries.valid, -1)
    tensors, longest = [], []
    for segment in parts(view):
        flat, most = _flatten(segment)
        tensors += flat
        longest.append(most)
    return states, at.contiguous(), tensors, longest


def _flatten(s: Segment) -> tuple[list[Tensor], int]:
    tensors = [x for x in (s.keys, s.values, s.key_scales, s.value_scales, s.positions) if x is not None]
    if isinstance(s, DenseView):
        return tensors, s.keys.shape[2]
    if isinstance(s, RaggedView):
        return [*tensors, s.begins, s.ends], max(s.lengths, default=0)
    return [*tensors, s.table, s.counts], s.table.shape[1] * s.page


def _fresh(queries: Queries, view: View, spec: KernelSpec) -> bool:
    if not isinstance(view, DenseView) or queries.valid is not None:
        return False
    plain = not (spec.parts[0].key.scaled or spec.parts[0].value.scaled)
    special = spec.scores or spec.sink or spec.softcap or spec.sliding_window
    return plain and not special and 1 < queries.states.shape[2] == view.keys.shape[2]


class TritonSources(Sources):
    """One module a kernel."""

    def attention(self, spec: KernelSpec, dtype: str, device: str) -> dict[str, str]:
        """For one new token, and for many."""
        if not supports(spec, getattr(torch, dtype)):
            return {}
        texts = {}
        for tokens in ("one", "many"):
            choice = tuning.choose(device, spec, tokens)
            for end, count in SPLIT:
                texts[f"{tokens}{end}.py"] = Kernels(spec, tuning.form(choice, tokens, count)).text
        return texts

    def column_sums(self, spec: KernelSpec, dtype: str, device: str) -> dict[str, str]:
        """Of the last queries."""
        if not supports(spec, getattr(torch, dtype)):
            return {}
        choice = tuning.choose(device, spec, "many")
        return {f"window{end}.py": Kernels(spec, tuning.form(choice, "many", n, "lse")).text for end, n in SPLIT}

    def compact(self, spec: CompactSpec) -> dict[str, str]:
        """Of any spec."""
        return {f"compact-{spec.name}.py": Compaction(spec).text}

    def choose(self, spec: ChooseSpec) -> dict[str, str]:
        """What scores the groups, for queries of the dtypes that there are kernels for."""
        return {f"{spec.name}.py": Scoring(spec).text} if getattr(torch, spec.dtype) in QUERY_TYPES else {}

    def ghost(self, spec: GhostSpec) -> dict[str, str]:
        """For queries of the dtypes that there are kernels for."""
        return {f"{spec.name}.py": Ghosts(spec).text} if getattr(torch, spec.dtype) in QUERY_TYPES else {}


TRITON = Backend(
    "triton",
    attend,
    ready=lambda device: ready(device.type),
    supports=supports,
    library_prompts=True,
    column_sums=column_sums,
    compact=compact,
    choose=choose,
    ghost=ghost,
    sources=TritonSources(),
)
