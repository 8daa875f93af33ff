"""Append kernels: floats in, codes and scales out at given entries, bit for bit what `codecs.encode` gives on a CPU.

Divisions are IEEE divisions and codes are rounded half to even, as PyTorch does there. (On a GPU PyTorch divides by a
number with its reciprocal, so its scales may differ from these in the last bit.)
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels.triton.files import assemble, load
from kvcompile.kernels.triton.forms import Blocks, blocks, known, pieces, power_of_two
from kvcompile.kernels.triton.launch import launch
from kvcompile.kernels.triton.parts import POINTERS, Argument, Lines, indent
from kvcompile.kernels.triton.tuning import Choice
from kvcompile.plan.formats import Float
from kvcompile.plan.storage import Codec

TOKENS = 32  # of a program, where every token has its own scales


class Encoder:
    """The kernel that encodes vectors of `dim` channels: `text`, `arguments`, `tokens` a program."""

    def __init__(self, codec: Codec, dim: int) -> None:
        known(codec)
        self.codec, self.dim = codec, dim
        self.blocks: Blocks = blocks(dim, [codec])
        self.tokens = codec.group if codec.axis == "channel" else TOKENS
        self.arguments = [
            Argument("x", "*q"),
            Argument("x_t", "i32"),
            Argument("at", "*i64"),
            Argument("n", "i32", False),
        ]
        self.arguments += [Argument("codes", POINTERS.get(codec.kind, "*u8")), Argument("codes_t", "i32")]
        self.arguments += [Argument("scales", "*fp16")] if codec.scaled else []
        head = f"Encode new entries of {dim} channels as {codec.name}.\n\nWritten by kvcompile, not by hand."
        self.text = assemble(head, {}, ["\n".join(self._main()) + "\n"], [])

    def _main(self) -> Lines:
        names = [f"{a.name}," for a in self.arguments]
        wide = power_of_two(self.tokens)
        body = [
            f"t = tl.program_id(0) * {self.tokens} + tl.arange(0, {wide})",
            "ok = t < n" if wide == self.tokens else f"ok = (t < n) & (tl.arange(0, {wide}) < {self.tokens})",
            "entry = tl.load(at + t, mask=ok, other=0)",
        ]
        b = self.blocks
        body += [
            f"x{i} = value_block(x, t.to(tl.int64), x_t, ok, {i * b.width}, {b.width}, {b.wide}).to(tl.float32)"
            for i in range(b.count)
        ]
        body += (
            self._plain()
            if not self.codec.scaled
            else self._channel()
            if self.codec.axis == "channel"
            else self._token()
        )
        return ["", "", '@triton.jit(do_not_specialize=["n"])', "def encode(", *indent(names), "):", *indent(body)]

    def _bounds(self, i: int, low: str, high: str) -> Lines:
        """`low`, `high` of the real channels and tokens of block i."""
        inside = f"inside(ok, {self.blocks.width}, {self.blocks.wide})"
        along = 0 if self.codec.axis == "channel" else 1
        if self.codec.parameters == 1:
            return [f"{high} = tl.max(tl.where({inside}, tl.abs(x{i}), 0.0), {along})"]
        return [
            f"{low} = tl.min(tl.where({inside}, x{i}, float('inf')), {along})",
            f"{high} = tl.max(tl.where({inside}, x{i}, float('-inf')), {along})",
        ]

    def _numbers(self, low: str, high: str, name: str) -> Lines:
        """`scale<name>` and `zero<name>`, rounded to the float16 that is stored."""
        if self.codec.parameters == 1:
            return [f"scale{name} = float_scale({high})"]
        return [f"scale{name}, zero{name} = affine({low}, {high}, {2**self.codec.bits - 1})"]

    def _code(self, i: int, name: str, index: str) -> str:
        """The codes of block i."""
        if self.codec.parameters == 1:
            return f"to_e4m3(x{i}, scale{name}{index})"
        return f"quantised(x{i}, scale{name}{index}, zero{name}{index}, {2**self.codec.bits - 1})"

    def _store(self, expressions: list[str], chunk: int) -> Lines:
        """One chunk of stored elements, all pieces of each byte together."""
        b, bits = self.blocks, self.codec.bits
        whole = " | ".join(f"({e} << {i * bits})" if i else e for i, e in enumerate(expressions))
        return [f"store_block(codes, entry, codes_t, ok, {chunk * b.width}, {b.width}, {whole})"]

    def _plain(self) -> Lines:
        if isinstance(self.codec.format, Float):
            return [line for i in range(self.blocks.count) for line in self._store([f"to_e4m3_bits(x{i})"], i)]
        return [line for i in range(self.blocks.count) for line in self._store([f"x{i}.to(codes.dtype.element_ty)"], i)]

    def _packed(self, names: list[str], index: str) -> Lines:
        count = pieces(self.codec)
        chunks = self.blocks.count // count
        return [
            line
            for c in range(chunks)
            for line in self._store([self._code(p * chunks + c, names[p * chunks + c], index) for p in range(count)], c)
        ]

    def _token(self) -> Lines:
        codec, b, lines = self.codec, self.blocks, []
        groups, width = codec.groups(self.dim), codec.group or self.dim
        owner = [i * b.width // width for i in range(b.count)]
        for g in range(groups):
            in_group = [i for i in range(b.count) if owner[i] == g]
            for k, i in enumerate(in_group):
                if not k:
                    lines += self._bounds(i, "low", "high")
                    continue
                lines += self._bounds(i, "lower", "higher")
                lines += ["low = tl.minimum(low, lower)"] if codec.parameters == 2 else []
                lines.append("high = tl.maximum(high, higher)")
            lines += self._numbers("low", "high", str(g))
            for k, name in enumerate(("scale", "zero")[: codec.parameters]):
                place = f"scales + entry * {codec.parameters * groups} + {k * groups + g}"
                lines.append(f"tl.store({place}, {name}{g}.to(tl.float16), mask=ok)")
        return lines + self._packed([str(g) for g in owner], "[:, None]")

    def _channel(self) -> Lines:
        codec, b = self.codec, self.blocks
        lines = [
            f"group = tl.load(at + tl.program_id(0) * {codec.group}) // {codec.group}",
            f"c = tl.arange(0, {b.wide})",
        ]
        for i in range(b.count):
            lines += self._bounds(i, "low", "high") + self._numbers("low", "high", str(i))
            for k, name in enumerate(("scale", "zero")[: codec.parameters]):
                place = f"scales + group * {codec.parameters * self.dim} + {k * self.dim + i * b.width} + c"
                lines.append(f"tl.store({place}, {name}{i}.to(tl.float16), mask=c < {b.width})")
        return lines + self._packed([str(i) for i in range(b.count)], "[None, :]")


@cache
def _encoder(codec: Codec, dim: int) -> tuple[Encoder, Any]:
    encoder = Encoder(codec, dim)
    return encoder, load(encoder.text, "encode")


def append(x: Tensor, codec: Codec, codes: Tensor, scales: Tensor | None, at: Tensor) -> None:
    """Encode `x [N, D]` into entries `at [N]` (int64) of `codes [T, W]` and `scales` (see `layout`), in place.

    Axis `channel`: N and every run of `group` entries start on whole groups, and a group's entries lie together.
    Raises KvcompileError where N is no whole number of groups.
    """
    if codec.axis == "channel" and x.shape[0] % codec.group:
        raise KvcompileError(f"{codec.name} is encoded in whole groups of tokens", f"{x.shape[0]} tokens")
    if not x.shape[0]:
        return
    encoder, module = _encoder(codec, x.shape[1])
    x = x if x.stride(-1) == 1 else x.contiguous()
    stored = codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes
    bound = {"x": x, "x_t": x.stride(0), "at": at, "n": x.shape[0], "codes": stored, "codes_t": codes.stride(0)}
    bound["scales"] = scales
    grid = (math.ceil(x.shape[0] / encoder.tokens),)
    launch(module.encode, grid, encoder.arguments, bound, Choice(0, 0, 4, 1))
