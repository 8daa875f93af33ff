"""Compaction kernels: kept entries move as words, all arrays of a store in one launch; `kernels.compact` says where.

Elsewhere a program moves a block of one row's kept entries, in all arrays. In place programs must not overtake each
other: one goes through all kept entries of a row, and moves a stretch of every entry of one array.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kvcompile.kernels.compact import Arrays, CompactSpec, spec_of
from kvcompile.kernels.triton.files import assemble, load
from kvcompile.kernels.triton.forms import power_of_two
from kvcompile.kernels.triton.parts import Argument, Lines, indent
from kvcompile.kernels.triton.tuning import Choice

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
POINTERS = {8: "*i64", 4: "*i32", 2: "*i16", 1: "*u8"}
BLOCK = 1 << 14  # bytes that a program moves at a time
STRETCH = 128  # bytes of an entry that a program moves in place
CHOICE = Choice(0, 0, 4, 1)

# layout: what a kernel is told of it, and the place of entry `j`, counted in tokens
PLACES = {
    "dense": ([("sharing", "i32"), ("capacity", "i32")], "row // {side}_sharing{i} * {side}_capacity + {j}"),
    "ragged": ([("starts", "*i64")], "tl.load({side}_starts + row) + {j}"),
    "paged": (
        [("table", "*i32"), ("pages", "i32")],
        "tl.load({side}_table + row * {side}_pages + {j} // {page}, mask=ok, other=0).to(tl.int64) * {page}"
        " + {j} % {page}",
    ),
}


class Compaction:
    """The kernel of a spec: `text`, `arguments`, entries of a `block`, and `programs` for each row (in place)."""

    def __init__(self, spec: CompactSpec) -> None:
        self.spec = spec
        self.words = [max(w for w in WORDS if size % w == 0) for size, _ in spec.entries]
        self.widths = [size // word for (size, _), word in zip(spec.entries, self.words, strict=True)]
        self.stretches = [self._stretch(i) for i in range(len(self.words))]
        widest = max(power_of_two(n) * word for n, word in zip(self.stretches, self.words, strict=True))
        self.block = max(1, min(256, BLOCK // widest))
        self.programs = sum(w // s for w, s in zip(self.widths, self.stretches, strict=True))
        self.arguments = [Argument(n, "*i64") for n in ("kept", "borders", "first")]
        for side in ("from", "to"):
            self.arguments += [Argument(f"{side}{i}", POINTERS[word]) for i, word in enumerate(self.words)]
            self.arguments += self._place_arguments(side)
        head = f"Compaction: {spec.name}. Words of kept entries move.\n\nWritten by kvcompile, not by hand."
        self.text = assemble(head, {}, ["\n".join(self._main()) + "\n"], [])

    def _stretch(self, i: int) -> int:
        """Words of an entry of an array that a program moves."""
        width = self.widths[i]
        most = STRETCH // self.words[i] if self.spec.in_place else width
        return max(n for n in range(1, min(width, most) + 1) if width % n == 0)

    def _kind(self, side: str) -> tuple[str, str]:
        layout = self.spec.source if side == "from" else self.spec.target
        kind = layout.rstrip("0123456789")
        return kind, layout[len(kind) :]

    def _place_arguments(self, side: str) -> list[Argument]:
        arguments = []
        for name, type_ in PLACES[self._kind(side)[0]][0]:
            ends = range(len(self.words)) if name == "sharing" else [""]
            arguments += [Argument(f"{side}_{name}{end}", type_, type_.startswith("*")) for end in ends]
        return arguments

    def _place(self, side: str, i: int, j: str) -> str:
        kind, page = self._kind(side)
        return PLACES[kind][1].format(side=side, i=i, j=j, page=page)

    def _move(self, i: int, shift: str = "") -> Lines:
        """One array's words of the entries `entry` that are `ok`, to entries `place`."""
        tokens, width, stretch = self.spec.entries[i][1], self.widths[i], self.stretches[i]
        old, new, there = "old", "new", "ok & (old != new)" if self.spec.in_place else "ok"
        if tokens > 1:
            old, new, there = f"old // {tokens}", f"new // {tokens}", f"{there} & (i % {tokens} == 0)"
        lines = [f"old = {self._place('from', i, 'entry')}", f"new = {self._place('to', i, 'place')}"]
        cut = f"0, {stretch}"
        lines.append(f"words = value_block(from{i}{shift}, {old}, {width}, {there}, {cut}, {power_of_two(stretch)})")
        if self.spec.in_place:
            lines.append("tl.debug_barrier()")  # what another warp still has to read must not be written yet
        return [*lines, f"store_block(to{i}{shift}, {new}, {width}, {there}, {cut}, words)"]

    def _main(self) -> Lines:
        names = [f"{a.name}," for a in self.arguments]
        numbers = [a.name for a in self.arguments if a.type == "i32"]
        body = [
            "row = tl.program_id(0).to(tl.int64)",
            "begin = tl.load(borders + row)",
            "count = (tl.load(borders + row + 1) - begin).to(tl.int32)",
            "start = tl.load(first + row)",
        ]
        body += self._in_place() if self.spec.in_place else self._elsewhere()
        head = f"@triton.jit(do_not_specialize={numbers!r})" if numbers else "@triton.jit"
        return ["", "", head.replace("'", '"'), "def compact(", *indent(names), "):", *indent(body)]

    def _entries(self, start: str) -> Lines:
        return [
            f"i = {start} + tl.arange(0, {self.block})",
            "ok = i < count",
            "entry = tl.load(kept + begin + i, mask=ok, other=0)",
            "place = start + i",
        ]

    def _elsewhere(self) -> Lines:
        moves = [line for i in range(len(self.words)) for line in self._move(i)]
        known: dict[str, str] = {}  # places are named once, where arrays have them in common
        lines = []
        for line in moves:
            name, _, value = line.partition(" = ")
            if name not in ("old", "new") or known.get(name) != value:
                lines.append(line)
            known[name] = value
        return self._entries(f"tl.program_id(1) * {self.block}") + lines

    def _in_place(self) -> Lines:
        """Kept entries ascend, so none moves up: what a block overwrites has been moved, is in it, or was not kept."""
        lines, before = ["stretch = tl.program_id(1)"], 0
        for i, (width, stretch) in enumerate(zip(self.widths, self.stretches, strict=True)):
            programs = width // stretch
            shift = f" + (stretch - {before}) * {stretch}" if programs > 1 else ""
            loop = [*self._entries("at"), *self._move(i, shift)]
            lines.append(f"if (stretch >= {before}) & (stretch < {before + programs}):")
            lines += indent([f"for at in range(0, count, {self.block}):", *indent(loop)])
            before += programs
        return lines


@cache
def compaction(spec: CompactSpec) -> tuple[Compaction, Any]:
    """The generated text and its module."""
    generated = Compaction(spec)
    return generated, load(generated.text, "compact")


def compact(source: Arrays, target: Arrays, kept: Tensor, counts: list[int], first: list[int] | None = None) -> None:
    """Same contract as `kernels.compact.compact`."""
    if not kept.numel():
        return
    from kvcompile.kernels.triton.launch import checked, launch  # Triton itself: the texts are made without it

    generated, module = compaction(spec_of(source, target))
    rows = len(counts)
    numbers = torch.tensor([0, *accumulate(counts), *(first or [0] * rows)], dtype=torch.int64, device="cpu").to(
        kept.device
    )
    checked("kept", kept, (sum(counts),))
    bound: dict[str, Any] = {"kept": kept.contiguous(), "borders": numbers, "first": numbers[rows + 1 :]}
    for side, arrays in (("from", source), ("to", target)):
        if arrays.starts is not None:
            checked(f"{side}_starts", arrays.starts, (rows,))
        if arrays.table is not None:
            checked(f"{side}_table", arrays.table, (rows, arrays.table.shape[-1]))
        bound |= {f"{side}{i}": _words(x, generated.words[i]) for i, x in enumerate(arrays.flat())}
        bound |= {f"{side}_sharing{i}": n for i, n in enumerate(arrays.sharing(rows))}
        bound |= {f"{side}_starts": arrays.starts, f"{side}_table": arrays.table}
        bound[f"{side}_capacity"] = arrays.tensors[0].shape[2] if arrays.layout == "dense" else 0
        bound[f"{side}_pages"] = 0 if arrays.table is None else arrays.table.stride(0)
    blocks = generated.programs if generated.spec.in_place else -(-max(counts) // generated.block)
    launch(module.compact, (rows, blocks), generated.arguments, bound, CHOICE)


def _words(x: Tensor, size: int) -> Tensor:
    """The memory of an array as integers of so many bytes."""
    return x.detach().view(-1).view(torch.uint8).view(WORDS[size])
