"""Keys or values of a tile decoded to floats, channel after channel: for kernels that read them more than once."""

from __future__ import annotations

from kvcompile.kernels.cpp.emit.address import Address
from kvcompile.kernels.cpp.emit.stored import Stored
from kvcompile.kernels.cpp.emit.text import fill

AS_THEY_LIE = """
    // The ${name}s of a tile, [count][$dim], as they lie
    KV_INLINE const float* decoded_${name}s(const Row& row, const Tile& tile, float*) {
      return row.${name}s + $entry * $dim;
    }
    """

DECODE = """
    // The ${name}s of a tile as floats, [count][$dim]
    KV_INLINE const float* decoded_${name}s(const Row& row, const Tile& tile, float* to) {
      for (int t = 0; t < tile.count; t++) {
        const $element* x = row.${name}s + $entry * $step;
        $numbers
        UNROLL for (int c = 0; c < $runs; c++) {
          $stores
        }
      }
      return to;
    }
    """


def decoder(name: str, stored: Stored, where: Address) -> str:
    """Of a `name` (key or value): where the tile's floats lie, decoded to `to` unless they are floats already."""
    step = where.value_step if name == "value" else stored.width
    if stored.element == "float" and where.contiguous and step == stored.width:
        return fill(AS_THEY_LIE, name=name, dim=stored.dim, entry=where.entry("0"))
    count = "" if stored.lanes == 16 else f", {stored.lanes}"
    stores = [
        f"store(to + t * {stored.dim} + {stored.channel(i, 'c')}, {vector}{count});"
        for i, vector in enumerate(_vectors(name, stored, where))
    ]
    return fill(
        DECODE,
        name=name,
        dim=stored.dim,
        numbers=_numbers(name, stored, where),
        element=stored.element,
        entry=where.entry("t"),
        step=step,
        runs=stored.runs,
        stores="\n".join(stores),
    )


def _vectors(name: str, stored: Stored, where: Address) -> list[str]:
    if stored.scales == "none":
        return stored.codes("x", "c")
    if stored.scales == "groups":
        return stored.decoded("x", "c", "n")
    out = []
    for i, code in enumerate(stored.codes("x", "c")):
        scale, zero = f"set(tile.{name}_numbers[t])", f"set(tile.{name}_numbers[TILE + t])"
        if stored.scales == "channel":
            scale, zero = stored.part("n", i, "c"), stored.part(f"n + {stored.dim}", i, "c")
        out.append(stored.applied(code, scale, zero))
    return out


def _numbers(name: str, stored: Stored, where: Address) -> str:
    if stored.scales == "groups":
        return f"const float* n = tile.{name}_numbers + t;"
    if stored.scales == "channel":
        step = stored.codec.parameters * stored.dim
        return f"const fp16* n = row.{name}_scales + {where.group(stored, 't')} * {step};"
    return ""
