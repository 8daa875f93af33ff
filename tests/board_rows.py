"""Rows by hand, with numbers that can be checked by eye."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvcompile.tasks.rows import Record, Row, Size, key_of

DENSE16 = 6400


def size(share: float) -> Size:
    held = round(DENSE16 * share)
    return Size(tokens=100, held=2 * held, held16=held, positions=400, dense=2 * DENSE16, dense16=DENSE16)


def row(
    stack: str = "dense",
    scores: Sequence[float] = (1.0,),
    share: float = 1.0,
    *,
    policies: Mapping[str, Mapping[str, Any]] | None = None,
    shard: tuple[int, int] = (0, 1),
    first: int = 0,
    losses: bool = False,
    **fields: Any,
) -> Row:
    """One row: a sample for each score, named from `first` on, in two parts in turn; or texts read, with losses."""
    if policies is None:
        policies = {} if stack == "dense" else {stack.split()[0]: {}}
    records = tuple(
        Record(f"s{i}", f"part {i % 2}", None, size(share), nll=value)
        if losses
        else Record(f"s{i}", f"part {i % 2}", 0, size(share), "said", value)
        for i, value in enumerate(scores, first)
    )
    facts: dict[str, Any] = {
        "command": f"kvcompile evaluate=[needle] recipe={stack}",
        "model": "SmolLM2-135M",
        "weights": "0123456789abcdef",
        "dtype": "float32",
        "task": "perplexity" if losses else "needle",
        "options": {"tokens": [1024], "seed": 0},
        "metric": "perplexity" if losses else "right answers",
        "exact": True,
        "question": "hidden",
        "versions": {"kvcompile": "0"},
        **fields,
    }
    key = key_of([stack, policies, shard, facts, [r.sample for r in records]])
    return Row(key=key, stack=stack, policies=dict(policies), shard=shard, records=records, seconds=1.5, **facts)
