"""Protects the size of a prompt: the largest that fits, whatever lengths look like, in few calls."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcompile.tasks.ruler.base import largest

GROWTH: dict[str, Callable[[int], int]] = {
    "linear": lambda n: 7 * n + 30,
    "flat": lambda n: n // 5 + 30,
    "steps": lambda n: 40 * (n // 9) + n,
    "bent": lambda n: int(n**1.3) + 3,
    "late": lambda n: max(n, 20 * n - 4000),
}


@pytest.mark.parametrize("name", GROWTH)
@given(room=st.integers(1, 20_000), least=st.integers(1, 60))
def test_the_next_size_does_not_fit(name: str, room: int, least: int) -> None:
    length = GROWTH[name]
    size = largest(length, room, least)
    if size is None:
        assert length(least) > room
    else:
        assert length(size) <= room < length(size + 1)
        assert size >= least


@given(room=st.integers(100, 20_000), most=st.integers(5, 500))
def test_no_size_is_larger_than_the_most(room: int, most: int) -> None:
    length = GROWTH["linear"]
    assert largest(length, room, 5, most) == (min(most, (room - 30) // 7) if room >= length(5) else None)


@given(room=st.integers(100, 10**6))
def test_prompts_are_written_a_few_times_only(room: int) -> None:
    """A bisection alone would take log2 of the size: 20 calls at the longest."""
    calls = []

    def length(size: int) -> int:
        calls.append(size)
        return 3 * size + int(9 * math.sin(size))

    largest(length, room, 1)
    assert len(calls) <= 14
