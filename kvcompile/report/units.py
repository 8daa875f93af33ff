"""Bytes as people read them."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes in binary units: three digits, and all before the point (`1.5 KiB`, `1,000 KiB`)."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(count) >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:,.0f} {units[0]}" if abs(count) >= 999.5 else f"{count:.3g} {units[0]}"
