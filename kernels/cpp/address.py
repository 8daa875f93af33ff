"""Where a row's entries lie: what a kernel is told of each layout, and how it finds an entry. One class a layout.

The fields that `arguments` declares in C++ and the numbers that `pack` gives them stand side by side: same order.
"""

from __future__ import annotations

from typing import Any

from kvcompile.kernels.cpp.stored import Stored
from kvcompile.kernels.cpp.text import fill
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


class Address:
    """One part of every row. Positions are asked for only where something may be hidden.

    `contiguous`: the entries of a tile lie one after the other.
    """

    contiguous = True

    def __init__(self, part: Part, spec: KernelSpec, positions: bool) -> None:
        self.part, self.positions = part, positions
        self.key, self.value = Stored(part.key, spec.head_dim), Stored(part.value, spec.value_dim)
        self.value_step = self.key.width if spec.latent else self.value.width  # elements from one value to the next
        # (name, C++ type, elements of one step along the tokens, tokens of one step)
        self.arrays = [
            ("keys", self.key.element, self.key.width, 1),
            ("values", self.value.element, self.value_step, 1),
        ]
        for name, stored in (("key_scales", self.key), ("value_scales", self.value)):
            if stored.scales == "channel":
                self.arrays.append((name, "fp16", stored.codec.parameters * stored.dim, stored.codec.group))
            elif stored.scales != "none":
                self.arrays.append((name, "fp16", stored.numbers, 1))
        if positions:
            self.arrays.append(("positions", "int32_t", 1, 1))
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

    def pack(self, view: Any) -> list[int]:
        """The numbers of `arguments`, in their order."""
        raise NotImplementedError

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

    def pack(self, view: Any) -> list[int]:
        """Addresses, strides and the length."""
        arrays = [getattr(view, name) for name in self.names]
        values = [x.data_ptr() for x in arrays]
        for x in arrays:
            sequence, head = x.stride()[:2]
            values += (sequence, head if x.shape[1] > 1 else 0)
        values.append(view.keys.shape[2])
        return values


class Ragged(Address):
    """Rows back to back: row r is entries `begins[r] : ends[r]`."""

    def __init__(self, part: Part, spec: KernelSpec, positions: bool) -> None:
        super().__init__(part, spec, positions)
        self.arguments = f"{self.pointers()}\nconst int64_t *begins, *ends;"
        starts = []
        for name, _, step, tokens in self.arrays:
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

    def pack(self, view: Any) -> list[int]:
        """Addresses of the arrays, then of the borders."""
        return [getattr(view, name).data_ptr() for name in (*self.names, "begins", "ends")]


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
        for name, kind, size, tokens in self.arrays:
            if name.endswith("_scales"):
                stride = min(part.page, 64)
                index = f"{scales}{f' / {tokens}' if tokens > 1 else ''} * {size}"
                fetched = f"{max(1, stride // tokens) * size} * sizeof({kind})"
                self.entries += f"for (int t = 0; t < TILE; t += {stride}) ahead(row.{name} + {index}, {fetched});\n"

    def pages(self, entries: int) -> int:
        """How many pages so many entries may lie in, wherever on a page the first is."""
        return (entries + self.part.page - 2) // self.part.page + 1

    def pack(self, view: Any) -> list[int]:
        """Addresses of the pools, the table, its width and the counts."""
        values = [getattr(view, name).data_ptr() for name in self.names]
        return [*values, view.table.data_ptr(), view.table.stride(0), view.counts.data_ptr()]

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
