"""A spec and a form to the text of one file of kernels: thin mains over the fragments that they use.

Structure (how many parts, which layout, which codec, what comes out) is decided here, so that the text has no dead
branch; numbers are constants at its top. The same spec and form give the same text, byte by byte.
Online softmax: Milakov and Gimelshein, arXiv 1805.02867; tiles of queries and entries: FlashAttention, arXiv
2205.14135; rows that programs share, merged by their log-sum-exp: Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023).
"""

from __future__ import annotations

from kvcompile.kernels.spec import KernelSpec
from kvcompile.kernels.triton.files import assemble
from kvcompile.kernels.triton.forms import Form, check, key_blocks, value_blocks
from kvcompile.kernels.triton.parts import Argument, Emitter, Lines, indent

ROW = [
    "h = tl.program_id(0).to(tl.int64)",
    "b = tl.program_id(1).to(tl.int64)",
    "row = b * tl.num_programs(0) + h",
]
QUERIES = [
    Argument("queries", "*q"),
    Argument("queries_b", "i32"),
    Argument("queries_h", "i32"),
    Argument("at", "*i64"),
]
TOKENS = [Argument("queries_t", "i32"), Argument("count", "i32", False)]
TYPES = [Argument("DOT", "constexpr"), Argument("CODE", "constexpr")]


class Kernels:
    """The kernels of a spec in one form: `text`, and the `arguments` of each by name."""

    def __init__(self, spec: KernelSpec, form: Form) -> None:
        check(spec)
        self.spec, self.form = spec, form
        self.parts = [Emitter(i, part, spec, form) for i, part in enumerate(spec.parts)]
        self.arguments: dict[str, list[Argument]] = {}
        functions = []
        if form.work == "attend":
            functions.append(self._attend(True))
            if spec.scores and form.tokens == "one":
                functions.append(self._column_sums())
        else:
            functions.append(self._attend(False))
            functions += [self._columns(part) for part in self.parts]
        uses = ["merge"] if form.split and form.work == "attend" else []
        self.text = assemble(self._header(), self._constants(), functions, uses)

    @property
    def logits(self) -> bool:
        """Whether raw scores are written: with one new token they are few, and `column_sums` normalises them."""
        return self.form.work == "attend" and self.spec.scores and self.form.tokens == "one"

    @property
    def keeps_lse(self) -> bool:
        """Whether the log-sum-exp of every query comes out too."""
        return self.form.split or self.spec.scores or self.form.work == "lse"

    def _header(self) -> str:
        s, f = self.spec, self.form
        what = "the newest token" if f.tokens == "one" else "new tokens"
        lines = [f"Attention of {what} to rows of the cache: {s.name}.", "", "Written by kvcompile, not by hand."]
        lines += [f"Part {i}: {p.part.name}, tiles of {p.tile} entries." for i, p in enumerate(self.parts)]
        return "\n".join(lines)

    def _constants(self) -> dict[str, object]:
        s = self.spec
        constants: dict[str, object] = {"GROUP": s.group, "ROWS": self.form.rows}
        if s.softcap:
            constants |= {"SCALE": s.scale, "CAP": s.softcap}
        else:
            constants["SCALE"] = s.scale
        if s.sliding_window:
            constants["WINDOW"] = s.sliding_window
        return constants

    def _signature(self, name: str, arguments: list[Argument]) -> Lines:
        self.arguments[name] = arguments
        fixed = [f'"{a.name}"' for a in arguments if a.name in ("count", "width") or a.name.removeprefix("n").isdigit()]
        listed = [f"{a.name}: tl.constexpr" if a.type == "constexpr" else a.name for a in arguments]
        head = f"@triton.jit(do_not_specialize=[{', '.join(fixed)}])" if fixed else "@triton.jit"
        return ["", "", head, f"def {name}(", *indent([x + "," for x in listed]), "):"]

    def _rows(self, first: str = "", parts: list[Emitter] | None = None) -> Lines:
        """Query rows: m counts tokens x query heads of the group; `asked` are their true positions."""
        blocks, one = key_blocks(self.spec), self.form.tokens == "one"
        if one:
            lines = [
                "m = tl.arange(0, ROWS)",
                "real = m < GROUP",
                "asked = tl.load(at + b).to(tl.int32)  # -1: padding sees nothing",
                "offset = b * queries_b + (h * GROUP + m) * queries_h",
            ]
        else:
            lines = [
                f"m = {first} + tl.arange(0, ROWS)",
                "real = m < count * GROUP",
                "token = m // GROUP",
                "asked = tl.load(at + b * count + token, mask=real, other=-1).to(tl.int32)  # -1: padding sees nothing",
                "offset = b * queries_b + (h * GROUP + m % GROUP) * queries_h + token * queries_t",
            ]
        lines += [
            f"q{x} = query_block(queries, offset, real, {x * blocks.width}, {blocks.width}, {blocks.wide}).to(DOT)"
            for x in range(blocks.count)
        ]
        return lines + [line for part in (parts or self.parts) for line in part.query_sums()]

    def _masked(self, part: Emitter) -> Lines:
        """Scores to base 2, soft-capped, and hidden where an entry is not seen."""
        s, lines = self.spec, []
        if s.softcap:
            lines.append("s = softcapped(s * SCALE, CAP) * LOG2E")
        else:
            lines.append("s = s * (SCALE * LOG2E)")
        position = "asked" if self.form.tokens == "one" else "asked[:, None]"
        visible = f"ok[None, :] & ({position} >= 0)"
        if part.positioned:
            visible = f"(held[None, :] <= {position}) & ({position} >= 0)"
            if s.sliding_window:
                visible += f" & (held[None, :] > {position} - WINDOW)"
        return [*lines, f"s = tl.where({visible}, s, HIDDEN)"]

    def _load_positions(self, part: Emitter) -> Lines:
        if not part.positioned:
            return []
        return [f"held = tl.load(position_row{part.i} + entry, mask=ok, other=NEVER)"]

    def _before(self, part: Emitter) -> str:
        return " + ".join(["j", *(f"n{i}" for i in range(part.i))])

    def _stretch(self, part: Emitter, attend: bool) -> Lines:
        """The loop over the tiles of one part."""
        body = [*part.entries(), *self._load_positions(part), *part.loads("key"), *part.scores(), *self._masked(part)]
        if self.logits:
            place = f"logits + (row * GROUP + m)[:, None] * width + ({self._before(part)})[None, :]"
            body.append(f"tl.store({place}, s, mask=real[:, None] & ok[None, :])")
        body.append("top, total, p, fade = softmax_step(s, top, total)")
        if attend:
            body += [*part.loads("value"), *part.accumulate()]
        return [
            "",
            f"# part {part.i}: {part.part.name}",
            *part.length(),
            *part.address(attend, part.positioned),
            *part.bounds(),
            f"for j0 in range(start, stop, {part.tile}):",
            *indent(body),
        ]

    def _attend(self, values: bool) -> str:
        form, blocks = self.form, value_blocks(self.spec)
        arguments = QUERIES + (TOKENS if form.tokens == "many" else [])
        arguments += [Argument("sinks", "*fp32")] if self.spec.sink else []
        for part in self.parts:
            arguments += part.arguments(values, part.positioned)
        if values:
            arguments += [Argument("mid", "*fp32") if form.split else Argument("out", "*q")]
        arguments += [Argument("lse", "*fp32")] if self.keeps_lse else []
        arguments += [Argument("logits", "*fp32"), Argument("width", "i32", False)] if self.logits else []
        arguments += [Argument("SPLITS", "constexpr")] if form.split else []
        lines = [*ROW, *self._program(), *self._rows("tile * ROWS")]
        if form.tokens == "many":
            lines.append("newest = tl.max(asked, 0)")
            if self.spec.sliding_window:
                lines.append("oldest = tl.min(tl.where(asked >= 0, asked, NEVER), 0)")
        lines += self._nothing_seen()
        if values:
            lines += [f"acc{x} = tl.zeros([ROWS, {blocks.wide}], tl.float32)" for x in range(blocks.count)]
        for part in self.parts:
            lines += self._stretch(part, values)
        lines += ["", *(self._results() if values else [])]
        if self.keeps_lse:
            place = f"({self._line()}) * SPLITS + split" if form.split else self._line()
            lines.append(f"tl.store(lse + {place}, log_sum(top, total), mask=real)")
        name = "attend" if values else "log_sums"
        return "\n".join([*self._signature(name, arguments + TYPES), *indent(lines)]) + "\n"

    def _nothing_seen(self) -> Lines:
        """The softmax before the first entry: empty, or with the sink, of which one split knows."""
        if not self.spec.sink:
            return ["top = tl.full([ROWS], FLOOR, tl.float32)", "total = tl.zeros([ROWS], tl.float32)"]
        head = "m" if self.form.tokens == "one" else "m % GROUP"
        lines = [
            f"top = tl.load(sinks + h * GROUP + {head}, mask=real, other=0) * LOG2E  # a weight that goes to no value",
            "total = tl.full([ROWS], 1.0, tl.float32)",
        ]
        if self.form.split:
            lines += ["top = tl.where(split == 0, top, FLOOR)", "total = tl.where(split == 0, total, 0.0)"]
        return lines

    def _line(self) -> str:
        """Where query row m counts among all of the batch."""
        return "row * GROUP + m" if self.form.tokens == "one" else "row * count * GROUP + m"

    def _program(self) -> Lines:
        if self.form.tokens == "one":
            return ["split = tl.program_id(2)"] if self.form.split else []
        if not self.form.split:
            return ["tile = tl.program_id(2)"]
        return ["tile = tl.program_id(2) // SPLITS", "split = tl.program_id(2) % SPLITS"]

    def _results(self) -> Lines:
        """The tile's means, into the result or, of a split, beside those of the other splits."""
        blocks, dim = value_blocks(self.spec), self.spec.value_dim
        if self.form.split:
            lines = [f"place = mid + (({self._line()}) * SPLITS + split) * {dim}"]
        else:
            head = "m" if self.form.tokens == "one" else "m % GROUP"
            place = f"row * GROUP + {head}" if self.form.tokens == "one" else f"(row * GROUP + {head}) * count + token"
            lines = [f"place = out + ({place}) * {dim}"]
        type_ = "" if self.form.split else ".to(out.dtype.element_ty)"
        lines.append(f"c = tl.arange(0, {blocks.wide})")
        inside = "real[:, None]" + (f" & (c < {blocks.width})[None, :]" if blocks.width < blocks.wide else "")
        for x in range(blocks.count):
            first = f"({x * blocks.width} + c)" if x else "c"
            there = f"place[:, None] + {first}[None, :]"
            lines.append(f"tl.store({there}, mean_of(acc{x}, total){type_}, mask={inside})")
        return lines

    def _column_sums(self) -> str:
        """What each entry received from the one new token: raw scores, normalised and summed over the group."""
        arguments = [Argument("logits", "*fp32"), Argument("width", "i32", False), Argument("lse", "*fp32")]
        arguments += [Argument("sums", "*fp32"), Argument("sums_r", "i32", False)]
        for part in self.parts:
            arguments += part.length_arguments()
        lines = list(ROW)
        for part in self.parts:
            lines += part.length()
        total = " + ".join(f"n{part.i}" for part in self.parts)
        lines += [
            "j = tl.program_id(2) * 512 + tl.arange(0, 512)",
            f"ok = j < {total}",
            "received = tl.zeros([512], tl.float32)",
            "for g in range(GROUP):",
            "    whole = tl.load(lse + row * GROUP + g)",
            "    s = tl.load(logits + (row * GROUP + g) * width + j, mask=ok, other=HIDDEN)",
            "    received += tl.where(whole > FLOOR, tl.exp2(s - whole), 0.0)",
            "place = sums + row * sums_r + j",
            "tl.store(place, tl.load(place, mask=ok, other=0) + received, mask=ok)",
        ]
        return "\n".join([*self._signature("column_sums", arguments), *indent(lines)]) + "\n"

    def _columns(self, part: Emitter) -> str:
        """What each entry of a part received from all queries, given their log-sum-exp: one tile a program."""
        arguments = QUERIES + TOKENS
        for earlier in self.parts[: part.i]:
            arguments += earlier.length_arguments()
        arguments += part.arguments(False, part.positioned)
        arguments += [Argument("lse", "*fp32"), Argument("sums", "*fp32"), Argument("sums_r", "i32", False)]
        lines = list(ROW)
        for one in self.parts[: part.i + 1]:
            lines += one.length()
        lines += [*part.address(False, part.positioned), f"j0 = tl.program_id(2) * {part.tile}", f"stop = n{part.i}"]
        lines += ["if j0 < stop:"]
        loop = [
            *self._rows("m0", [part]),
            *part.scores(),
            *self._masked(part),
            f"whole = tl.load(lse + {self._line()}, mask=real, other=HIDDEN)",
            "received += tl.sum(tl.where((whole > FLOOR)[:, None], tl.exp2(s - whole[:, None]), 0.0), 0)",
        ]
        inner = [
            *part.entries(),
            *self._load_positions(part),
            *part.loads("key"),
            f"received = tl.zeros([{part.tile}], tl.float32)",
            "for m0 in range(0, count * GROUP, ROWS):",
            *indent(loop),
            f"place = sums + row * sums_r + {self._before(part)}",
            "tl.store(place, tl.load(place, mask=ok, other=0) + received, mask=ok)",
        ]
        name = f"columns{part.i}"
        return "\n".join([*self._signature(name, arguments + TYPES), *indent([*lines, *indent(inner)])]) + "\n"
