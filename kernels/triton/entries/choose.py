"""Scoring kernels: what the queries of each row want of its groups; torch finds the best of them on the device."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvcompile.errors import KvcompileError
from kvcompile.kernels.choose import ChooseSpec, EntryTable, GroupTable, Places, chosen_lengths, listed, spec_of, taken
from kvcompile.kernels.triton.files import assemble, load
from kvcompile.kernels.triton.forms import power_of_two
from kvcompile.kernels.triton.parts import Argument, Lines, indent
from kvcompile.kernels.triton.tuning import Choice
from kvcompile.plan.recall import Agreement

NUMBERS = 1 << 12  # of representatives that a program reads
CHOICE = Choice(0, 0, 4, 1)
FORMULAS = {"vector": "q . r", "bounds": "sum_d max(q_d low_d, q_d high_d)"}
AGREED = {"mean": "in sum over the queries of a KV head", "max": "the most that a query of a KV head wants"}


class Scoring:
    """The kernel of a spec: `text`, `arguments`, and the groups that a program scores, `block`.

    A program scores some groups of a row: `[block, channels]` of what stands for them, `[channels]` of each query.
    """

    def __init__(self, spec: ChooseSpec) -> None:
        self.spec, self.bounds = spec, spec.form == "bounds"
        self.wide = power_of_two(spec.head_dim)
        self.block = max(1, NUMBERS // (self.wide * (1 + self.bounds)))
        self.arguments = [Argument("queries", "*q"), Argument("representatives", "*q"), Argument("sizes", "*i32")]
        self.arguments += [Argument("wanted", "*fp32"), Argument("room", "i32", False)]
        head = f"{spec.name}: {FORMULAS[spec.form]}, {AGREED[spec.agree]}.\n\nWritten by kvcompile, not by hand."
        self.text = assemble(head, {}, ["\n".join(self._main()) + "\n"], [])

    def _main(self) -> Lines:
        dim, step = self.spec.head_dim, self.spec.head_dim * (1 + self.bounds)
        body = [
            "row = tl.program_id(0).to(tl.int64)",
            f"g = tl.program_id(1) * {self.block} + tl.arange(0, {self.block})",
            f"c = tl.arange(0, {self.wide})",
            f"here = c < {dim}",
            "ok = tl.load(sizes + row * room + g, mask=g < room, other=0) > 0",
            f"at = representatives + (row * room + g)[:, None] * {step} + c[None, :]",
            "there = ok[:, None] & here[None, :]",
        ]
        for i, name in enumerate(("low", "high") if self.bounds else ("r",)):
            offset = f" + {dim}" if i else ""
            body.append(f"{name} = tl.load(at{offset}, mask=there, other=0.0).to(tl.float32)")
        body += self._agreed()
        body.append("tl.store(wanted + row * room + g, tl.where(ok, agreed, float('-inf')), mask=g < room)")
        names = [f"{a.name}," for a in self.arguments]
        return ["", "", '@triton.jit(do_not_specialize=["room"])', "def score(", *indent(names), "):", *indent(body)]

    def _agreed(self) -> Lines:
        """`agreed [block]`: what the queries want of each group; where they want it in sum, they are added up first."""
        summed = self.spec.agree == "mean"
        product = "above * high + below * low" if self.bounds else "q * r"
        lines: Lines = []
        for h in range(self.spec.group):
            at = f"queries + (row * {self.spec.group} + {h}) * {self.spec.head_dim} + c"
            lines.append(f"x = tl.load({at}, mask=here, other=0.0).to(tl.float32)[None, :]")
            sides = {"below": "tl.minimum(x, 0.0)", "above": "tl.maximum(x, 0.0)"} if self.bounds else {"q": "x"}
            lines += [f"{name} = {f'{name} + ' if h and summed else ''}{side}" for name, side in sides.items()]
            if not summed:
                total = f"tl.sum({product}, 1)"
                lines.append(f"agreed = {f'tl.maximum(agreed, {total})' if h else total}")
        return [*lines, f"agreed = tl.sum({product}, 1)"] if summed else lines


@cache
def scoring(spec: ChooseSpec) -> tuple[Scoring, Any]:
    """The generated text and its module."""
    generated = Scoring(spec)
    return generated, load(generated.text, "choose")


def scores(queries: Tensor, table: GroupTable, spec: ChooseSpec) -> Tensor:
    """What the queries `[R, g, D]` want of the groups, `[R, G]` float32: the order of `kernels.choose.scores`.

    Raises KvcompileError where queries and representatives are not of one dtype.
    """
    from kvcompile.kernels.triton.launch import checked, launch  # Triton itself: the texts are made without it

    rows, room = table.sizes.shape
    generated, module = scoring(spec)
    queries, held = queries.contiguous(), table.representatives
    if held.dtype is not queries.dtype or not held.is_contiguous() or not table.sizes.is_contiguous():
        raise KvcompileError(
            f"a kernel reads what stands for groups as contiguous {str(queries.dtype).removeprefix('torch.')}",
            f"{str(held.dtype).removeprefix('torch.')} with strides {list(held.stride())}",
        )
    parts = (2,) * (spec.form == "bounds")
    values: dict[str, Any] = {
        "queries": checked("queries", queries, (rows, spec.group, spec.head_dim)),
        "representatives": checked("representatives", held, (rows, room, *parts, spec.head_dim)),
        "sizes": checked("sizes", table.sizes, (rows, room)),
        "wanted": torch.empty(rows, room, dtype=torch.float32, device=queries.device),
        "room": room,
    }
    launch(module.score, (rows, -(-room // generated.block)), generated.arguments, values, CHOICE)
    if spec.together == 1:
        return values["wanted"]  # type: ignore[no-any-return]
    return torch.unflatten(values["wanted"], 0, (-1, spec.together)).sum(1).repeat_interleave(spec.together, 0)


def choose(
    queries: Tensor,
    table: GroupTable,
    wanted: list[int],
    lengths: list[int],
    agree: Agreement,
    together: int = 1,
    places: Places | None = None,
) -> EntryTable:
    """Same contract as `kernels.choose.choose`; nothing waits for the device."""
    numbers = torch.tensor([wanted, lengths, table.ends], dtype=torch.int64, device="cpu").to(queries.device)
    scored = scores(queries, table, spec_of(queries, table, agree, together))
    took = taken(scored, table.sizes, numbers[0])
    return listed(table, took, numbers, chosen_lengths(table, wanted, lengths), places)
