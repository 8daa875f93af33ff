"""Names that tell apart what is not the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def told_apart(entries: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The names of entries (name, options); behind a name that stands for several things, the options that differ.

    >>> told_apart([("needle", {"tokens": [512], "seed": 0}), ("needle", {"tokens": [1024], "seed": 0}), ("qa", {})])
    ['needle (tokens=[512])', 'needle (tokens=[1024])', 'qa']
    """
    entries_flat = [(name, dict(flat(options))) for name, options in entries]
    variants: dict[str, list[dict[str, str]]] = {}
    for name, options in entries_flat:
        same = variants.setdefault(name, [])
        if options not in same:
            same.append(options)
    labels = []
    for name, options in entries_flat:
        differing = [key for key in options if any(other.get(key) != options[key] for other in variants[name])]
        words = ", ".join(f"{key}={options[key]}" for key in differing)
        labels.append(f"{name} ({words})" if words else name)
    return labels


def flat(options: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Options of options by dotted names, their values as text."""
    for key, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
            yield f"{above}{key}", text
