"""Generated kernels on tensors: arguments by name, workspaces, grids. Nothing here waits for the device.

Grids come from capacities (shapes and numbers on the host), lengths are read on the device, so a decode step over
ragged or paged rows can be captured in a CUDA graph and replayed while rows grow in their room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels.reference import required
from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.kernels.triton import tuning
from kvcompile.kernels.triton.emit import Kernels
from kvcompile.kernels.triton.files import load
from kvcompile.kernels.triton.forms import Form, power_of_two
from kvcompile.kernels.triton.parts import Argument
from kvcompile.kernels.triton.tuning import Choice

DOTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
ELEMENTS = {  # of pointers; queries and results (`*q`) may be of any floating dtype
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*u8": torch.uint8,
    "*i16": torch.int16,
    "*i32": torch.int32,
    "*i64": torch.int64,
}
LN2 = 0.6931471805599453


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU (TRITON_INTERPRET=1 before Triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


@cache
def kernels(spec: KernelSpec, form: Form) -> tuple[Kernels, ModuleType]:
    """The generated text and its module."""
    generated = Kernels(spec, form)
    return generated, load(generated.text, f"{form.work}_{form.tokens}")


@cache
def _device(index: int) -> tuple[str, int]:
    if interpreted():
        return "interpreter", 1
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


@dataclass(frozen=True)
class Call:
    """One call of a spec: queries `[B, H_q, Q, D]`, their positions `[B, Q]` (-1: padding), the tensors of the view in
    the order of `flatten`, the longest row of each part, and the sink logits `[H_q]` of a spec with a sink.
    """

    spec: KernelSpec
    q: Tensor
    at: Tensor
    arrays: Sequence[Tensor]
    longest: Sequence[int]
    sinks: Tensor | None = None

    @property
    def tokens(self) -> str:
        """`one` or `many`."""
        return "one" if self.q.shape[2] == 1 else "many"

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.q.shape[1] // self.spec.group

    @property
    def rows(self) -> int:
        """Rows of the cache."""
        return self.q.shape[0] * self.heads

    @property
    def lines(self) -> int:
        """Query rows of one row of the cache."""
        return self.q.shape[2] * self.spec.group

    def bound(self) -> dict[str, Any]:
        """Every argument that queries and view give, by name."""
        q, wide = self.q, any(c.kind == "float32" for p in self.spec.parts for c in (p.key, p.value))
        dot = tl.float32 if interpreted() or wide else DOTS[q.dtype]
        bound: dict[str, Any] = {"queries": q, "at": self.at, "count": q.shape[2], "DOT": dot}
        bound |= {"queries_b": q.stride(0), "queries_h": q.stride(1), "queries_t": q.stride(2)}
        bound["CODE"] = tl.float32 if dot == tl.float32 else tl.float16  # codes and scales are float16 exactly
        if self.spec.sink:
            sinks = required(self.sinks, "a learned sink").float().contiguous()
            bound["sinks"] = checked("sinks", sinks, (q.shape[1],))
        self._require_queries()
        arrays = iter(self.arrays)
        for i, part in enumerate(self.spec.parts):
            names = [f"keys{i}", f"values{i}"]
            names += [f"{side}_scales{i}" for side, c in (("key", part.key), ("value", part.value)) if c.scaled]
            entries, total = self._entries(part), 0
            for name in [*names, f"positions{i}"]:
                x, (tokens, entry) = next(arrays), entries[name.rstrip("0123456789")]
                total = total or x.shape[0]  # of keys, which come first: entries of all rows, unless rows are dense
                each = self.longest[i] if part.layout == "dense" else total
                rows = (q.shape[0], x.shape[1] if x.shape[1] == 1 else self.heads) if part.layout == "dense" else ()
                checked(name, x, (*rows, each // tokens, *entry))
                bound |= _strided(name, x, part.layout == "dense")
            if part.layout == "dense":
                bound[f"n{i}"] = self.longest[i]
            elif part.layout == "ragged":
                bound |= {
                    f"{name}{i}": checked(f"{name}{i}", next(arrays), (self.rows,)) for name in ("begins", "ends")
                }
            else:
                table = next(arrays)
                checked(f"table{i}", table, (self.rows, table.shape[-1]))
                counts = checked(f"counts{i}", next(arrays), (self.rows,))
                bound |= {f"table{i}": table, f"table{i}_r": table.stride(0), f"counts{i}": counts}
        return bound

    def _require_queries(self) -> None:
        """Raise KvcompileError where queries or their positions are not what a kernel of the spec reads."""
        batch, _, count, _ = self.q.shape
        checked("queries", self.q, (batch, self.heads * self.spec.group, count, self.spec.head_dim))
        checked("positions of queries", self.at, (batch, count))

    def require_sums(self, sums: Tensor) -> None:
        """Raise KvcompileError for sums of fewer rows or entries than are sure to be there.

        A row may be short in one part and long in another, and what lies in pages the device counts.
        """
        parts = list(zip(self.spec.parts, self.longest, strict=True))
        dense = sum(longest for part, longest in parts if part.layout == "dense")
        ragged = max((longest for part, longest in parts if part.layout == "ragged"), default=0)
        least = dense + ragged
        checked("sums", sums, (self.rows, max(least, sums.shape[-1])))

    def _entries(self, part: Part) -> dict[str, tuple[int, tuple[int, ...]]]:
        """By array of a part: tokens that share an entry of it, and the shape of one entry."""
        entries: dict[str, tuple[int, tuple[int, ...]]] = {"positions": (1, ())}
        for side, codec, dim in (
            ("key", part.key, self.spec.head_dim),
            ("value", part.value, self.spec.value_dim),
        ):
            entries[f"{side}s"] = (1, (codec.width(dim),))
            if codec.scaled:
                shared = codec.axis == "channel"
                numbers = (codec.parameters, dim if shared else codec.groups(dim))
                entries[f"{side}_scales"] = (codec.group if shared else 1, numbers)
        return entries


def checked(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`x`, if it has this shape, entries of its last dimension side by side. Raises KvcompileError otherwise."""
    if x.shape != shape or (x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1 and x.numel()):
        raise KvcompileError(
            f"a kernel reads {name} as {list(shape)}, with last stride 1",
            f"{list(x.shape)} with strides {list(x.stride())}",
        )
    return x


def _strided(name: str, x: Tensor, dense: bool) -> dict[str, Any]:
    """A tensor of entries and its strides: `_b`, `_h` of a dense one, `_t` from one entry to the next.

    Raises KvcompileError where the numbers of one entry do not lie together, or offsets in a row exceed 32 bits.
    """
    entries = x[0, 0] if dense and x.numel() else x
    step = 1
    for size, stride in zip(reversed(entries.shape[1:]), reversed(entries.stride()[1:]), strict=True):
        if size > 1 and stride != step and x.numel():
            raise KvcompileError("the numbers of one entry must lie together", f"{name} with strides {x.stride()}")
        step *= size
    scales_or_positions = "scales" in name or "positions" in name  # read at the entry's number, without a stride
    if scales_or_positions and entries.shape[0] > 1 and entries.stride(0) != step and x.numel():
        raise KvcompileError("scales and positions must lie entry by entry", f"{name} with strides {x.stride()}")
    if dense and entries.shape[0] * entries.stride(0) >= 2**31:
        raise KvcompileError("one row of a cache must span less than 2^31 elements", f"{name} {tuple(x.shape)}")
    stored = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
    arguments: dict[str, Any] = {name: stored, f"{name}_t": x.stride(2 if dense else 0)}
    if dense:
        arguments |= {f"{name}_b": x.stride(0), f"{name}_h": x.stride(1) if x.shape[1] > 1 else 0}
    return arguments


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: list[Argument], bound: dict[str, Any], choice: Choice
) -> None:
    """Run a kernel with those of the `given` values that it takes.

    Raises KvcompileError for a tensor of another dtype than the kernel's text reads, or on another device than others.
    """
    tensors = [(a, bound[a.name]) for a in arguments if a.type.startswith("*")]
    for a, x in tensors:
        if x.dtype is not ELEMENTS.get(a.type, x.dtype) or x.device != tensors[0][1].device:
            raise KvcompileError(
                f"a kernel reads {a.name} as {a.type.removeprefix('*')} on {tensors[0][1].device}",
                f"{str(x.dtype).removeprefix('torch.')} on {x.device}",
            )
    kernel[grid](**{a.name: bound[a.name] for a in arguments}, num_warps=choice.warps, num_stages=choice.stages)


def attend(call: Call, sums: Tensor | None = None, choice: Choice | None = None) -> Tensor:
    """Attention `[B, H_q, Q, D_v]`; column sums are added to `sums [R, longest row]` (float32).

    Raises KvcompileError where the spec has scores and `sums` is None.
    """
    spec, q, tokens = call.spec, call.q, call.tokens
    if spec.scores and sums is None:
        raise KvcompileError("a spec with scores needs a tensor for the sums", spec.name)
    if sums is not None:
        call.require_sums(sums)
    out = q.new_empty(*q.shape[:3], spec.value_dim)
    if not out.numel():
        return out
    name, processors = _device(q.device.index or 0)
    choice = choice or tuning.choose(name, spec, tokens)
    tiles = -(-call.lines // choice.rows)
    splits = tuning.splits(choice, call.rows * tiles, sum(call.longest), processors)
    form = tuning.form(choice, tokens, splits)
    generated, module = kernels(spec, form)
    bound = {**call.bound(), "out": out, "SPLITS": splits}
    lse = merged = None
    if generated.keeps_lse:
        lse = merged = q.new_empty(call.rows, call.lines, splits, dtype=torch.float32)
        bound["lse"] = lse
    if form.split:
        bound["mid"] = q.new_empty(call.rows, call.lines, splits, spec.value_dim, dtype=torch.float32)
        merged = q.new_empty(call.rows, call.lines, dtype=torch.float32)
    if generated.logits and sums is not None:
        bound |= {"logits": q.new_empty(call.rows, spec.group, sums.shape[1], dtype=torch.float32)}
        bound["width"] = sums.shape[1]
    grid = (call.heads, q.shape[0], tiles * splits)
    launch(module.attend, grid, generated.arguments["attend"], bound, choice)
    if form.split:
        module.merge[call.lines, call.rows](
            bound["mid"], lse, out, merged, q.shape[2], spec.group, spec.value_dim, power_of_two(spec.value_dim), splits
        )
    if generated.logits and sums is not None:
        bound |= {"lse": merged, "sums": sums, "sums_r": sums.stride(0)}
        grid = (call.heads, q.shape[0], -(-sums.shape[1] // 512))
        launch(module.column_sums, grid, generated.arguments["column_sums"], bound, Choice(0, 0, 4, 1))
    elif sums is not None and spec.scores:
        columns(call, merged, sums, choice)
    return out


def log_sums(call: Call, choice: Choice | None = None) -> Tensor:
    """log2-sum-exp2 of each query's scores, `[R, Q * g]` (token-major), -1e30 where nothing is seen; keys only."""
    name, processors = _device(call.q.device.index or 0)
    choice = choice or tuning.choose(name, call.spec, "many")
    tiles = -(-call.lines // choice.rows)
    splits = tuning.splits(choice, call.rows * tiles, sum(call.longest), processors)
    form = tuning.form(choice, "many", splits, "lse")
    generated, module = kernels(call.spec, form)
    lse = call.q.new_empty(call.rows, call.lines, splits, dtype=torch.float32)
    bound = {**call.bound(), "lse": lse, "SPLITS": splits}
    grid = (call.heads, call.q.shape[0], tiles * splits)
    launch(module.log_sums, grid, generated.arguments["log_sums"], bound, choice)
    return torch.logsumexp(lse * LN2, -1) / LN2


def columns(call: Call, lse: Tensor | None, sums: Tensor, choice: Choice | None = None) -> None:
    """Add to `sums [R, longest row]` the attention that each entry receives from all the queries.

    Scores are computed again from the log-sum-exp `lse [R, Q * g]`, one tile of entries a program: no matrix of
    queries x entries is ever held.
    """
    call.require_sums(sums)
    lse = log_sums(call, choice) if lse is None else lse
    choice = choice or tuning.choose(_device(call.q.device.index or 0)[0], call.spec, "many")
    form = tuning.form(choice, "many", 1, "lse")
    generated, module = kernels(call.spec, form)
    bound = {**call.bound(), "lse": lse, "sums": sums, "sums_r": sums.stride(0)}
    for part, longest in zip(generated.parts, call.longest, strict=True):
        grid = (call.heads, call.q.shape[0], -(-longest // part.tile))
        if grid[2]:
            name = f"columns{part.i}"
            launch(getattr(module, name), grid, generated.arguments[name], bound, choice)
