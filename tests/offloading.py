"""Stacks that `offload` is put behind, and the tiny model compiled with one."""

from __future__ import annotations

from typing import Any

from contract_table import KIVI8, Options, compiled

SNAPKV: Options = {"snapkv": {"budget": 24, "window": 4, "kernel": 1, "decode_every": 8}}
STACKS: dict[str, Options] = {
    "plain": {},
    "kivi": KIVI8,
    "snapkv": SNAPKV,
    "adakv": {"adakv": {"budget": 24, "decode_every": 8}},
    "adakv, kivi": {"adakv": {"budget": 24, "decode_every": 8}, **KIVI8},
    "streaming, compact": {"streaming": {"budget": 24, "positions": "compact", "decode_every": 8}},
    "h2o, rotate, int8": {"h2o": {"budget": 24, "decode_every": 8}, "rotate": {}, "int8": {}},
    "zigzag": {"snapkv": {**SNAPKV["snapkv"]}, "zigzag": {"window": 8}},
    "zigzag, kivi": {"snapkv": {**SNAPKV["snapkv"]}, "zigzag": {"window": 8}, **KIVI8},
    "cla": {"cla": {}},
    "paged": {"paged": {"page": 4}},
    "adakv, paged": {"adakv": {"budget": 24, "decode_every": 8}, "paged": {"page": 4}},
    "zigzag, kivi, paged": {"snapkv": {**SNAPKV["snapkv"]}, "zigzag": {"window": 8}, **KIVI8, "paged": {"page": 4}},
}


def offloaded(stack: Options, architecture: str = "llama", fields: Any = None, **changes: Any) -> Any:
    """The tiny model compiled with a stack and `offload`."""
    return compiled({**stack, "offload": fields or {}}, architecture, **changes)
