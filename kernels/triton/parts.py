"""Emitters of one part of a row: where it lies, how its keys become scores and its values are accumulated.

Each returns lines of a kernel's body; names end with the number of the part. A new codec is one branch of `_numbers`,
one fragment for scores and one for values.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.kernels.triton.forms import Blocks, Form, key_blocks, mode, one_page, pieces, tile, value_blocks
from kvcompile.plan.formats import Float
from kvcompile.plan.storage import Codec

POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
Lines = list[str]


@dataclass(frozen=True)
class Argument:
    """An argument of a kernel: its name, its Triton type, whether it is a multiple of 16 as a rule."""

    name: str
    type: str
    aligned: bool = True


def indent(lines: Lines, by: int = 1) -> Lines:
    """The lines, `by` levels deeper."""
    return ["    " * by + line if line else line for line in lines]


@dataclass(frozen=True)
class Emitter:
    """One part of a spec in one form, as number `i`."""

    i: int
    part: Part
    spec: KernelSpec
    form: Form

    @property
    def tile(self) -> int:
        """Entries of a tile."""
        return tile(self.part, self.form.tile)

    @property
    def keys(self) -> Blocks:
        """Blocks of channels of the keys."""
        return key_blocks(self.spec)

    @property
    def values(self) -> Blocks:
        """Blocks of channels of the values."""
        return value_blocks(self.spec)

    @property
    def positioned(self) -> bool:
        """Whether true positions are read: one new token sees everything held, unless a window hides some of it."""
        return self.form.tokens == "many" or bool(self.spec.sliding_window)

    def _sides(self, with_values: bool) -> list[tuple[str, Codec, int]]:
        sides = [("key", self.part.key, self.spec.head_dim)]
        return sides + ([("value", self.part.value, self.spec.value_dim)] if with_values else [])

    def arguments(self, with_values: bool, positioned: bool) -> list[Argument]:
        """What must be passed to read this part."""
        i, dense = self.i, self.part.layout == "dense"
        steps = ("b", "h", "t") if dense else ("t",)
        arguments = []
        for side, codec, _ in self._sides(with_values):
            arguments.append(Argument(f"{side}s{i}", POINTERS.get(codec.kind, "*u8")))
            arguments += [Argument(f"{side}s{i}_{s}", "i32") for s in steps]
            if codec.scaled:
                arguments.append(Argument(f"{side}_scales{i}", "*fp16"))
                arguments += [Argument(f"{side}_scales{i}_{s}", "i32") for s in steps[:-1]]
        if positioned:
            arguments.append(Argument(f"positions{i}", "*i32"))
            arguments += [Argument(f"positions{i}_{s}", "i32", False) for s in steps[:-1]]
        return arguments + self.length_arguments()

    def length_arguments(self) -> list[Argument]:
        """What must be passed to know the row's entries in this part."""
        i = self.i
        if self.part.layout == "dense":
            return [Argument(f"n{i}", "i32", False)]
        if self.part.layout == "ragged":
            return [Argument(f"begins{i}", "*i64"), Argument(f"ends{i}", "*i64")]
        return [Argument(f"table{i}", "*i32"), Argument(f"table{i}_r", "i32", False), Argument(f"counts{i}", "*i64")]

    def length(self) -> Lines:
        """`n<i>`, the entries of this row."""
        i = self.i
        if self.part.layout == "ragged":
            return [f"begin{i} = tl.load(begins{i} + row)", f"n{i} = (tl.load(ends{i} + row) - begin{i}).to(tl.int32)"]
        return [] if self.part.layout == "dense" else [f"n{i} = tl.load(counts{i} + row).to(tl.int32)"]

    def address(self, with_values: bool, positioned: bool) -> Lines:
        """Where the row begins: pointers to entry 0, or to the pools and the row's line of the table."""
        i, lines = self.i, []
        for side, codec, dim in self._sides(with_values):
            lines.append(f"{side}_row{i} = " + self._row(f"{side}s{i}", f"begin{i} * {side}s{i}_t"))
            if codec.scaled:
                step = f"begin{i} * {codec.parameters * codec.groups(dim)}"
                if codec.axis == "channel":
                    step = f"begin{i} // {codec.group} * {codec.parameters * dim}"
                lines.append(f"{side}_scale_row{i} = " + self._row(f"{side}_scales{i}", step))
        if positioned:
            lines.append(f"position_row{i} = " + self._row(f"positions{i}", f"begin{i}"))
        if self.part.layout == "paged":
            return [f"table_row{i} = table{i} + row * table{i}_r", *lines]
        return lines

    def _row(self, name: str, begin: str) -> str:
        if self.part.layout == "dense":
            return f"{name} + b * {name}_b + h * {name}_h"
        return f"{name} + {begin}" if self.part.layout == "ragged" else name

    def bounds(self) -> Lines:
        """`start` and `stop` of this program's entries; no tile that every query is too early or late for."""
        i = self.i
        whole = f"0, n{i}"
        lines = [f"start, stop = {f'share(n{i}, split, SPLITS, {self.tile})' if self.form.split else whole}"]
        if self.form.tokens == "one":
            return lines
        paged = self.part.layout == "paged"
        name, row = (
            ("first_after_paged", f"position_row{i}, table_row{i}") if paged else ("first_after", f"position_row{i}")
        )
        page = f", {self.part.page}" if paged else ""
        lines.append(f"stop = tl.minimum(stop, {name}({row}, n{i}, newest{page}))")
        if self.spec.sliding_window:
            left = f"{name}({row}, n{i}, oldest - WINDOW{page})"
            lines.append(f"start = tl.maximum(start, {left} // {self.tile} * {self.tile})")
        return lines

    def entries(self) -> Lines:
        """`entry [N]`: where the entries of the tile at j0 lie, and `ok`, which of them exist."""
        lines = [f"j = j0 + tl.arange(0, {self.tile})", "ok = j < stop"]
        if self.part.layout != "paged":
            return [*lines, "entry = j"]
        if one_page(self.part, self.tile):
            lines.append(f"first = page_start(table_row{self.i}, j0, {self.part.page})")
            return [*lines, f"entry = first + tl.arange(0, {self.tile})"]
        return [*lines, f"entry = paged_entries(table_row{self.i}, j, ok, {self.part.page})"]

    def _first(self) -> str:
        return "first" if self.part.layout == "paged" else "j0"

    def loads(self, side: str) -> Lines:
        """`codes<c>`: the stored tile, in chunks of channels (keys as columns, values as rows)."""
        codec, blocks = self._side(side)
        chunks = blocks.count // pieces(codec)
        place = f"{side}_row{self.i}, entry, {side}s{self.i}_t, ok"
        return [
            f"{side}_codes{c} = {side}_block({place}, {c * blocks.width}, {blocks.width}, {blocks.wide})"
            for c in range(chunks)
        ]

    def _side(self, side: str) -> tuple[Codec, Blocks]:
        return (self.part.key, self.keys) if side == "key" else (self.part.value, self.values)

    def code(self, side: str, block: int) -> str:
        """The numbers of one block of channels of the tile, in the type that products are taken in."""
        codec, blocks = self._side(side)
        chunks = blocks.count // pieces(codec)
        name = f"{side}_codes{block % chunks}"
        if pieces(codec) > 1:
            return f"unpacked({name}, {block // chunks}, {codec.bits}, CODE)"
        if isinstance(codec.format, Float):
            return f"e4m3({name}, CODE)"
        return f"{name}.to({'DOT' if codec.kind in POINTERS else 'CODE'})"

    def _token(self, side: str) -> tuple[Lines, Codec, list[list[int]]]:
        """Loads of per-token scales and zeros, and the blocks that share each."""
        codec, blocks = self._side(side)
        count = codec.groups(blocks.dim)
        per = codec.parameters * count
        lines, sharing = [], []
        for g in range(count):
            place = f"{side}_scale_row{self.i}, entry, ok, {per}"
            lines.append(f"{side}_scale{g} = token_numbers({place}, {g})")
            if codec.parameters == 2:
                lines.append(f"{side}_zero{g} = token_numbers({place}, {count + g})")
            width = codec.group or blocks.dim
            sharing.append([x for x in range(blocks.count) if x * blocks.width // width == g])
        return lines, codec, sharing

    def _channel(self, side: str, block: int) -> tuple[Lines, Codec]:
        """Loads of one block's per-channel scales and zeros, of the tile's group or (`spread`) of each entry's."""
        codec, blocks = self._side(side)
        per, at = codec.parameters * blocks.dim, block * blocks.width
        size = f"{blocks.width}, {blocks.wide}"
        lines = []
        for k, name in enumerate(("scale", "zero")[: codec.parameters]):
            if mode(codec, self.tile) == "spread":
                place = f"{side}_scale_row{self.i}, entry // {codec.group}, ok, {per}, {k * blocks.dim + at}"
                lines.append(f"{side}_{name} = spread_numbers({place}, {size})")
            else:
                place = f"{side}_scale_row{self.i} + {self._first()} // {codec.group} * {per}"
                lines.append(f"{side}_{name} = channel_numbers({place}, {k * blocks.dim + at}, {size})")
        return lines, codec

    def scores(self) -> Lines:
        """`s [M, N]`: q . k of the tile whose stored keys are loaded."""
        read = mode(self.part.key, self.tile)
        every = range(self.keys.count)
        if read == "plain":
            to = "" if self.part.key.kind in POINTERS else ".to(CODE)"
            return _sum("s", [f"scores(q{x}{to}, {self.code('key', x)})" for x in every])
        if read == "token":
            lines, codec, sharing = self._token("key")
            terms = []
            for g, sharers in enumerate(sharing):
                lines += _sum(f"s{g}", [f"scores(q{x}.to(CODE), {self.code('key', x)})" for x in sharers])
                zero = f" + q_sum{g}_{self.i} * key_zero{g}[None, :]" if codec.parameters == 2 else ""
                terms.append(f"s{g} * key_scale{g}[None, :]{zero}")
            return lines + _sum("s", terms)
        lines = []
        for x in every:
            loads, codec = self._channel("key", x)
            zero = ""
            if read == "spread":
                zero = " + tl.trans(key_zero)" if codec.parameters == 2 else ""
                keys = f"({self.code('key', x)}.to(tl.float32) * tl.trans(key_scale){zero}).to(CODE)"
                lines += [*loads, f"s {'+=' if x else '='} scores(q{x}.to(CODE), {keys})"]
                continue
            zero = f" + channel_offset(q{x}, key_zero)" if codec.parameters == 2 else ""
            lines += [*loads, f"s {'+=' if x else '='} channel_scores(q{x}, {self.code('key', x)}, key_scale){zero}"]
        return lines

    def query_sums(self) -> Lines:
        """Sums of each query's channels, which the zeros of per-token keys multiply."""
        if mode(self.part.key, self.tile) != "token" or self.part.key.parameters == 1:
            return []
        sharing = self._token("key")[2]
        return [
            f"q_sum{g}_{self.i} = " + " + ".join(f"tl.sum(q{x}.to(tl.float32), 1)[:, None]" for x in sharers)
            for g, sharers in enumerate(sharing)
        ]

    def accumulate(self) -> Lines:
        """`acc<block>` faded, plus p v of the tile whose stored values are loaded."""
        read = mode(self.part.value, self.tile)
        every = range(self.values.count)
        lines: Lines = []
        if read == "plain":
            return [f"acc{x} = accumulate(p, {self.code('value', x)}, acc{x} * fade[:, None])" for x in every]
        if read == "token":
            lines, codec, sharing = self._token("value")
            for g, sharers in enumerate(sharing):
                zero = ""
                if codec.parameters == 2:
                    lines.append(f"offset{g} = tl.sum(p * value_zero{g}[None, :], 1)[:, None]")
                    zero = f" + offset{g}"
                for x in sharers:
                    old = f"acc{x} * fade[:, None]{zero}"
                    lines.append(f"acc{x} = token_accumulate(p, {self.code('value', x)}, value_scale{g}, {old})")
            return lines
        for x in every:
            loads, codec = self._channel("value", x)
            old = f"acc{x} * fade[:, None]"
            if read == "spread":
                zero = " + value_zero" if codec.parameters == 2 else ""
                values = f"({self.code('value', x)}.to(tl.float32) * value_scale{zero}).to(CODE)"
                lines += [*loads, f"acc{x} = accumulate(p, {values}, {old})"]
                continue
            if codec.parameters == 2:
                old += " + tl.sum(p, 1)[:, None] * value_zero[None, :]"
            lines += [*loads, f"acc{x} = channel_accumulate(p, {self.code('value', x)}, value_scale, {old})"]
        return lines


def _sum(name: str, terms: list[str]) -> Lines:
    return [f"{name} {'+=' if n else '='} {term}" for n, term in enumerate(terms)]
