"""Protects what processes see of each other's trials while these are written, attribute by attribute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvcompile.searching.space import Stack
from kvcompile.searching.study import Study


def test_another_process_may_look_between_any_two_writes_of_a_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna = pytest.importorskip("optuna")
    mine, theirs = (Study("a", None, tmp_path, 1, {}, 0) for _ in range(2))
    seen: list[int] = []
    write = optuna.Trial.set_user_attr

    def written(trial: Any, key: str, value: Any) -> None:
        write(trial, key, value)
        seen.append(len(theirs.tried()))

    monkeypatch.setattr(optuna.Trial, "set_user_attr", written)
    stack = Stack({"snapkv": {"budget": 0.25}})
    mine.take(mine.ask(), stack, 0.25)
    assert seen[0] == 0
    assert seen[-1] == 1
    assert theirs.tried()[0].share == 0.25
