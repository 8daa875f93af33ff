"""Text in Markdown."""

from __future__ import annotations


def inline(text: str) -> str:
    """Text that cannot break a Markdown table or start markup."""
    flat = " ".join(text.split())
    return "".join("\\" + c if c in "\\`*_|<>[]" else c for c in flat)
