"""Kernels of ghost scores: what each query gives away first, then what each entry is worth to the queries near it.

Two passes, as for column sums: one program a tile of queries keeps the maximum and the sum of its softmax and its
output, one program a tile of entries computes the logits near it again. No queries x entries are held, and as no two
programs add to one entry, sums come out the same every time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels.reference.ghost import GhostSpec, Reread, spec_of
from kvcompile.kernels.triton.files import assemble, load
from kvcompile.kernels.triton.forms import SMALLEST, power_of_two
from kvcompile.kernels.triton.parts import Argument, Lines, indent
from kvcompile.kernels.triton.tuning import Choice
from kvcompile.plan.ghost import GhostRule

NEAR = 16  # entries and query rows of a tile whose values and outputs are compared
ROWS = (1 << 12, 1 << 11)  # numbers of a tile of queries, of 16 bits and of 32: of more, registers spill
CHOICE = Choice(0, 0, 4, 1)

TENSORS = [
    ("queries", ("h", "g", "t")),
    ("ghosts", ("h", "g", "t")),
    ("keys", ("h", "t")),
    ("values", ("h", "t")),
    ("sink_keys", ("h", "t")),
    ("sink_values", ("h", "t")),
]
NUMBERS = ["tokens", "start", "sinks"]


def arguments(names: list[str]) -> list[Argument]:
    """Pointers to some tensors, and their strides."""
    return [
        argument
        for name, axes in TENSORS
        if name in names
        for argument in (Argument(name, "*q"), *(Argument(f"{name}_{axis}", "i32") for axis in axes))
    ]


class Ghosts:
    """The kernels of a spec: `text`, the `arguments` of each, and the query rows (`rows`) and entries of a tile."""

    def __init__(self, spec: GhostSpec) -> None:
        self.spec, self.rule = spec, spec.rule
        self.wide, self.values_wide = (max(SMALLEST, power_of_two(n)) for n in (spec.head_dim, spec.value_dim))
        most = ROWS[spec.dtype == "float32"] // max(self.wide, self.values_wide)
        self.rows = min(64, max(SMALLEST, most))
        self.tile = min(32, self.rows)
        self.arguments = {"look": self._looking(), "change": self._changing()}
        constants: dict[str, object] = {"GROUP": spec.group, "SCALE": self.rule.scale}
        constants |= {"CAP": self.rule.softcap}
        near = f"|t - j| <= {self.rule.band}" if self.rule.band else "all t"
        head = f"Ghost scores: {spec.name}. Sums over {near} of the squared change of o_t without j.\n\n"
        functions = ["\n".join(self._function(name)) + "\n" for name in self.arguments]
        self.text = assemble(f"{head}Written by kvcompile, not by hand.", constants, functions, [])

    def _looking(self) -> list[Argument]:
        sink = [Argument("learned", "*fp32")] * self.spec.sink
        results = [Argument(name, "*fp32") for name in ("tops", "shares", "outputs")]
        numbers = [Argument(name, "i32", False) for name in NUMBERS]
        return [*arguments([name for name, _ in TENSORS]), *sink, *results, *numbers, Argument("DOT", "constexpr")]

    def _changing(self) -> list[Argument]:
        results = [Argument(name, "*fp32") for name in ("tops", "shares", "outputs", "sums")]
        numbers = [Argument(name, "i32", False) for name in NUMBERS[:2]]
        return [*arguments(["ghosts", "keys", "values"]), *results, *numbers, Argument("DOT", "constexpr")]

    def _function(self, name: str) -> Lines:
        numbers = ", ".join(f'"{a.name}"' for a in self.arguments[name] if not a.aligned)
        signature = [f"{a.name}{': tl.constexpr' if a.type == 'constexpr' else ''}," for a in self.arguments[name]]
        body = self._look() if name == "look" else self._change()
        head = ["", "", f"@triton.jit(do_not_specialize=[{numbers}])", f"def {name}(", *indent(signature), "):"]
        return [*head, *indent([*self._chunk(), *body])]

    def _chunk(self) -> Lines:
        """Tokens `begin : end` of the call are the program's chunk."""
        chunk, lines = self.rule.chunk, ["h = tl.program_id(0).to(tl.int64)"]
        if not chunk:
            return [*lines, "begin = 0", "end = tokens"]
        return [
            *lines,
            f"after = (tl.program_id(1) + 1) * {chunk} - start % {chunk}",
            f"begin = tl.maximum(0, after - {chunk})",
            "end = tl.minimum(tokens, after)",
        ]

    def _rows(self, first: str, rows: int) -> Lines:
        """Query rows of the chunk from `first` on, numbered token by token."""
        return [
            f"m = {first} + tl.arange(0, {rows})",
            "t = begin + m // GROUP",
            "g = (m % GROUP).to(tl.int64)",
            "row = (h * tokens + t) * GROUP + g",
        ]

    def _query(self, name: str) -> str:
        at = f"h * {name}_h + g * {name}_g + t.to(tl.int64) * {name}_t"
        return f"q = query_block({name}, {at}, real, 0, {self.spec.head_dim}, {self.wide}).to(DOT)"

    def _logits(self, keys: str) -> Lines:
        """`s [M, N]`, times log2(e), of the entries `j` that are `ok`."""
        at = f"{keys} + h * {keys}_h, j.to(tl.int64), {keys}_t, ok, 0, {self.spec.head_dim}, {self.wide}"
        capped = "softcapped(scores(q, k) * SCALE, CAP)" if self.rule.softcap else "scores(q, k) * SCALE"
        return [f"k = key_block({at}).to(DOT)", f"s = {capped} * LOG2E"]

    def _see(self, prefix: str, first: str, end: str, causal: bool = False) -> Lines:
        """A step of the online softmax for every tile of entries `first : end`."""
        keys, values = f"{prefix}keys", f"{prefix}values"
        seen = "ok[None, :] & (j[None, :] <= t[:, None])" if causal else "ok[None, :]"
        at = f"{values} + h * {values}_h, j.to(tl.int64), {values}_t, ok, 0, {self.spec.value_dim}, {self.values_wide}"
        body = [
            f"j = at + tl.arange(0, {self.tile})",
            f"ok = j < {end}",
            *self._logits(keys),
            f"s = tl.where({seen}, s, HIDDEN)",
            "top, total, p, fade = softmax_step(s, top, total)",
            f"v = value_block({at}).to(DOT)",
            "acc = accumulate(p, v, acc * fade[:, None])",
        ]
        return [f"for at in range({first}, {end}, {self.tile}):", *indent(body)]

    def _look(self) -> Lines:
        lines = [f"first = tl.program_id(2) * {self.rows}", "if first >= (end - begin) * GROUP:", "    return"]
        lines += [*self._rows("first", self.rows), "real = t < end"]
        if self.spec.sink:
            lines.append("top = tl.load(learned + h * GROUP + g) * LOG2E")
            lines.append(f"total = tl.full([{self.rows}], 1.0, tl.float32)")
        else:
            lines += [f"top = tl.full([{self.rows}], FLOOR, tl.float32)"]
            lines += [f"total = tl.zeros([{self.rows}], tl.float32)"]
        lines.append(f"acc = tl.zeros([{self.rows}, {self.values_wide}], tl.float32)")
        lines += [self._query("ghosts"), "outside = tl.minimum(sinks, start + begin)"]
        lines += [*self._see("sink_", "0", "outside"), *self._see("", "begin", "end"), self._query("queries")]
        lines.append(f"last = tl.minimum(end, begin + (first + {self.rows - 1}) // GROUP + 1)")
        lines += self._see("", f"tl.maximum(begin, {self.rule.own_from} - start)", "last", causal=True)
        width = self.spec.value_dim
        return [
            *lines,
            "tl.store(tops + row, top, mask=real)",
            "tl.store(shares + row, 1.0 / total, mask=real)",
            f"store_block(outputs, row, {width}, real, 0, {width}, mean_of(acc, total))",
        ]

    def _change(self) -> Lines:
        band, width = self.rule.band, self.spec.value_dim
        near = f" & (tl.abs(t[:, None] - j[None, :]) <= {band})" if band else ""
        at = "values + h * values_h, j.to(tl.int64)"
        loop = [
            *self._rows("at", NEAR),
            "real = t < last",
            self._query("ghosts"),
            *self._logits("keys"),
            "top = tl.load(tops + row, mask=real, other=0.0)",
            "shrink = tl.load(shares + row, mask=real, other=0.0)",
            "p = tl.exp2(s - top[:, None]) * shrink[:, None]",
            "odds = p / tl.maximum(1.0 - p, 1e-6)",
            f"far = distances(outputs, row, real, {at}, values_t, ok, {width}, {NEAR})",
            f"x = tl.where(real[:, None] & ok[None, :]{near}, odds * odds * far, 0.0)",
            "received += tl.sum(x, 0)",
        ]
        return [
            f"first = begin + tl.program_id(2) * {NEAR}",
            "if first >= end:",
            "    return",
            f"j = first + tl.arange(0, {NEAR})",
            "ok = j < end",
            f"low = tl.maximum(begin, first - {band})" if band else "low = begin",
            f"last = tl.minimum(end, first + {NEAR + band})" if band else "last = end",
            f"received = tl.zeros([{NEAR}], tl.float32)",
            f"for at in range((low - begin) * GROUP, (last - begin) * GROUP, {NEAR}):",
            *indent(loop),
            "tl.store(sums + h * tokens + j, received, mask=ok)",
        ]


@cache
def kernels(spec: GhostSpec) -> tuple[Ghosts, Any]:
    """The generated text and its module."""
    generated = Ghosts(spec)
    return generated, load(generated.text, "ghost")


def ghost_scores(text: Reread, rule: GhostRule) -> Tensor:
    """Same contract as `kernels.reference.ghost.ghost_scores`; nothing waits for the device.

    Raises KvcompileError for tensors that are not of one dtype, or of other shapes than they must be.
    """
    from kvcompile.kernels.triton.launch import DOTS, checked, interpreted, launch

    queries, sinks, learned = text.queries, text.sinks, text.learned
    heads, group, tokens, dim = queries.shape
    spec, width = spec_of(text, rule), text.values.shape[2]
    generated, module = kernels(spec)
    first = sinks[0].shape[1]
    shapes: dict[str, tuple[int, ...]] = {"queries": (heads, group, tokens, dim), "ghosts": (heads, group, tokens, dim)}
    shapes |= {"keys": (heads, tokens, dim), "values": (heads, tokens, width)}
    shapes |= {"sink_keys": (heads, first, dim), "sink_values": (heads, first, width)}
    device, float32 = queries.device, torch.float32
    bound: dict[str, Any] = {
        "tops": torch.empty(heads, tokens, group, dtype=float32, device=device),
        "shares": torch.empty(heads, tokens, group, dtype=float32, device=device),
        "outputs": torch.empty(heads, tokens, group, width, dtype=float32, device=device),
        "sums": torch.empty(heads, tokens, dtype=float32, device=device),
        "learned": None if learned is None else checked("learned sinks", learned.float().contiguous(), (heads, group)),
        "DOT": DOTS[float32 if interpreted() else queries.dtype],
        **dict(zip(NUMBERS, (tokens, text.start, first), strict=True)),
    }
    for (name, axes), x in zip(TENSORS, text.tensors, strict=True):
        if x.dtype is not queries.dtype:
            raise KvcompileError(f"a kernel reads {name} as {spec.dtype}", str(x.dtype).removeprefix("torch."))
        bound[name] = checked(name, x, shapes[name])
        bound |= {f"{name}_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=False)}
    chunk = rule.chunk or tokens
    chunks = -(-(text.start % rule.chunk + tokens) // chunk) if rule.chunk else 1
    if tokens:
        longest = min(chunk, tokens)
        for name, tiles in (("look", -(-longest * group // generated.rows)), ("change", -(-longest // NEAR))):
            launch(getattr(module, name), (heads, chunks, tiles), generated.arguments[name], bound, CHOICE)
    return bound["sums"]  # type: ignore[no-any-return]
