"""Where a row's entries lie: what a kernel is told of each layout, and how it finds an entry. One class a layout.

The fields that `arguments` declares in C++ and the numbers that `pack` gives them stand side by side: same order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from kvcompile.kernels.codecs import dtype_of
from kvcompile.kernels.cpp.emit.stored import Stored
from kvcompile.kernels.cpp.emit.text import fill
from kvcompile.kernels.pointers import address
from kvcompile.kernels.spec import KernelSpec, Part

TILE = 64  # entries from one step of the softmax to the next


def aligned(part: Part) -> bool:
    """Whether tiles end where pages do, since a page holds a whole one: a tile is then one stretch of memory."""
    return part.layout == "paged" and part.page >= TILE


POOL = """
    KV_INLINE int64_t pool(const int32_t* table, int j) {
      return (int64_t)table[j / $page] * $page + j % $page;
    }
    """

FIELDS = """
    int skip;  // entries of its first page that come before it
    int64_t at[$room];  // places in the pools of what its pages hold, and those that come next
    """

ENTRIES = """
    tile.skip = from % $page;
    for (int i = 0; i < $pages; i++) {
      int64_t first = (int64_t)row.table[least(from / $page + i, (row.count - 1) / $page)] * $page;
      for (int t = 0; t < $page; t++) tile.at[i * $page + t] = first + t;
    }
    """


class Array(NamedTuple):
    """An array of a part, for C++ and as torch holds it: `tokens` consecutive tokens share an entry of this shape.

    step: elements from one entry to the next; strides: those of the entries and of all that lies in one.
    """

    name: str
    kind: str
    step: int
    tokens: int
    dtype: torch.dtype
    entry: tuple[int, ...]
    strides: tuple[int, ...]


def _codes(name: str, stored: Stored, step: int) -> Array:
    return Array(name, stored.element, step, 1, dtype_of(stored.codec), (stored.width,), (step, 1))


def _scales(name: str, stored: Stored) -> Array:
    codec, dim = stored.codec, stored.dim
    shared = codec.axis == "channel"
    inner = dim if shared else codec.groups(dim)
    step, tokens = codec.parameters * inner, codec.group if shared else 1
    return Array(name, "fp16", step, tokens, torch.float16, (codec.parameters, inner), (step, inner, 1))


class Address:
    """One part of every row. Positions are asked for only where something may be hidden.

    `contiguous`: the entries of a tile lie one after the other.
    """

    contiguous = True

    def __init__(self, part: Part, spec: KernelSpec, positions: bool) -> None:
        self.part, self.positions = part, positions
        self.key, self.value = Stored(part.key, spec.head_dim), Stored(part.value, spec.value_dim)
        self.value_step = self.key.width if spec.latent else self.value.width  # elements from one value to the next
        self.arrays = [_codes("keys", self.key, self.key.width), _codes("values", self.value, self.value_step)]
        for name, stored in (("key_scales", self.key), ("value_scales", self.value)):
            if stored.codec.scaled:
                self.arrays.append(_scales(name, stored))
        if positions:
            self.arrays.append(Array("positions", "int32_t", 1, 1, torch.int32, (), (1,)))
        self.names = [name for name, *_ in self.arrays]
        # how many of `count` entries a tile may have: asked of all parts where one of them has such pages
        self.together = (
            "KV_INLINE int together(int, int count) { return count; }" if any(map(aligned, spec.parts)) else ""
        )

    def pointers(self) -> str:
        """The arrays of the part as C++ declarations."""
        return "\n".join(f"const {kind}* {name};" for name, kind, *_ in self.arrays)

    def group(self, stored: Stored, t: str) -> str:
        """Which group of tokens entry `t` of the tile belongs to (axis `channel`)."""
        return f"({self.entry(t)}) / {stored.codec.group}"

    arguments = row = fields = entries = ""  # C++ text, where a layout has some

    def pack(self, view: Any, batch: int, heads: int) -> list[int]:
        """The numbers of `arguments`, in their order, for so many sequences and KV heads.

        Raises KvcompileError where the view is not what the kernel reads.
        """
        raise NotImplementedError

    def _addresses(self, view: Any) -> list[int]:
        """Of the arrays, where entries of all rows lie in one row of memory."""
        count = view.keys.shape[0]
        return [
            address(name, getattr(view, name), dtype, (count // tokens, *entry), strides)
            for name, _, _, tokens, dtype, entry, strides in self.arrays
        ]

    def entry(self, t: str) -> str:
        """Index of entry `t` of a tile, from the row's pointers."""
        return f"(int64_t)(tile.from + {t})"

    def later(self, t: str) -> str:
        """Index of the entry that comes a tile after entry `t`, to be fetched ahead (past the row's end: anywhere)."""
        return f"(int64_t)(tile.from + TILE + {t})"

    def position(self, j: str) -> str:
        """True position of entry `j` of a row."""
        return f"row.positions[{j}]"


class Dense(Address):
    """Rows of one length at fixed strides: row (b, h) starts at `b * sequence + h * head` of each array."""

    def __init__(self, part: Part, spec: KernelSpec, positions: bool) -> None:
        super().__init__(part, spec, positions)
        strides = "\n".join(f"int64_t {name}_sequence, {name}_head;" for name in self.names)
        self.arguments = f"{self.pointers()}\n{strides}\nint64_t length;"
        starts = ", ".join(f"p.{n} + b * p.{n}_sequence + h * p.{n}_head" for n in self.names)
        self.row = fill(
            """
            KV_INLINE Row row(const Part& p, int64_t heads, int64_t r) {
              int64_t b = r / heads, h = r % heads;
              return {$starts, (int)p.length};
            }
            """,
            starts=",\n          ".join(starts.split(", ")),
        )

    def pack(self, view: Any, batch: int, heads: int) -> list[int]:
        """Addresses, strides and the length."""
        length = view.keys.shape[2]
        values: list[int] = []
        steps: list[int] = []
        for name, _, _, tokens, dtype, entry, strides in self.arrays:
            x = getattr(view, name)
            alone = x.shape[1] == 1  # one row for all heads
            shape = (batch, 1 if alone else heads, length // tokens, *entry)
            values.append(address(name, x, dtype, shape, strides))
            sequence, head = x.stride()[:2]
            steps += (sequence, 0 if alone else head)
        return [*values, *steps, length]


class Ragged(Address):
    """Rows back to back: row r is entries `begins[r] : ends[r]`."""

    def __init__(self, part: Part, spec: KernelSpec, positions: bool) -> None:
        super().__init__(part, spec, positions)
        self.arguments = f"{self.pointers()}\nconst int64_t *begins, *ends;"
        starts = []
        for name, _, step, tokens, *_ in self.arrays:
            first = "first" if tokens == 1 else f"first / {tokens}"
            starts.append(f"p.{name} + {first} * {step}" if step > 1 else f"p.{name} + {first}")
        self.row = fill(
            """
            KV_INLINE Row row(const Part& p, int64_t, int64_t r) {
              int64_t first = p.begins[r];
              return {$starts, (int)(p.ends[r] - first)};
            }
            """,
            starts=",\n          ".join(starts),
        )

    def pack(self, view: Any, batch: int, heads: int) -> list[int]:
        """Addresses of the arrays, then of the borders."""
        rows = (batch * heads,)
        borders = [address(name, getattr(view, name), torch.int64, rows) for name in ("begins", "ends")]
        return self._addresses(view) + borders


class Paged(Address):
    """Rows in pages: entry j of row r is entry `table[r][j / page] * page + j % page` of the pools."""

    def __init__(self, part: Part, spec: KernelSpec, positions: bool) -> None:
        super().__init__(part, spec, positions)
        self.arguments = f"{self.pointers()}\nconst int32_t* table;\nint64_t pages;\nconst int64_t* counts;"
        starts = ",\n          ".join(f"p.{name}" for name in self.names)
        self.row = fill(
            """
            KV_INLINE Row row(const Part& p, int64_t, int64_t r) {
              return {$starts, (int)p.counts[r],
                      p.table + r * p.pages};
            }
            """,
            starts=starts,
        )
        self.contiguous = aligned(part)
        if self.contiguous or positions:
            self.row = fill(POOL, page=part.page) + "\n" + self.row
        if self.contiguous:
            self.together = fill(
                """
                KV_INLINE int together(int from, int count) { return least(count, $page - from % $page); }
                """,
                page=part.page,
            )
            self.fields = "int64_t first, next;  // places in the pools, of its entries and of the next tile's"
            self.entries = "tile.first = pool(row.table, from);\n"
            self.entries += "tile.next = pool(row.table, least(from + count, row.count - 1));\n"
        else:
            pages = self.pages((3 if self.key.codec.scaled or self.value.codec.scaled else 2) * TILE)
            self.fields = fill(FIELDS, room=pages * part.page)
            self.entries = fill(ENTRIES, page=part.page, pages=pages)
        # scales lie apart from each other: nothing but this foresees where the next tile's are, or on small pages those
        # of the tile after it, since a tile begins with its scales
        scales = self.later("t") if self.contiguous else "tile.at[tile.skip + 2 * TILE + t]"
        for name, kind, size, tokens, *_ in self.arrays:
            if name.endswith("_scales"):
                stride = min(part.page, 64)
                index = f"{scales}{f' / {tokens}' if tokens > 1 else ''} * {size}"
                fetched = f"{max(1, stride // tokens) * size} * sizeof({kind})"
                self.entries += f"for (int t = 0; t < TILE; t += {stride}) ahead(row.{name} + {index}, {fetched});\n"

    def pages(self, entries: int) -> int:
        """How many pages so many entries may lie in, wherever on a page the first is."""
        return (entries + self.part.page - 2) // self.part.page + 1

    def pack(self, view: Any, batch: int, heads: int) -> list[int]:
        """Addresses of the pools, the table, its width and the counts."""
        rows, table = batch * heads, view.table
        pages = address("table", table, torch.int32, (rows, table.shape[1]), (1,))
        counts = address("counts", view.counts, torch.int64, (rows,))
        return [*self._addresses(view), pages, table.stride(0), counts]

    def entry(self, t: str) -> str:
        """Index of entry `t` of a tile in the pools."""
        return f"(tile.first + {t})" if self.contiguous else f"tile.at[tile.skip + {t}]"

    def later(self, t: str) -> str:
        """Index of the entry that comes a tile later (past the row's end: on its last page)."""
        return f"(tile.next + {t})" if self.contiguous else f"tile.at[tile.skip + TILE + {t}]"

    def position(self, j: str) -> str:
        """True position of entry `j` of a row."""
        return f"row.positions[pool(row.table, {j})]"


LAYOUTS: dict[str, type[Address]] = {"dense": Dense, "ragged": Ragged, "paged": Paged}
