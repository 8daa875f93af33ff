"""The C++ chooser takes the very groups that the float64 loop takes, whatever the room around them holds."""

from __future__ import annotations

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvcompile.errors import KvcompileError
from kvcompile.kernels.choose import ChooseSpec
from kvcompile.kernels.cpp import build
from kvcompile.kernels.cpp import choose as generated
from kvcompile.kernels.dispatch import CPP

sys.path.insert(0, str(Path(__file__).parent.parent))

from choices import SPECS, Case, case, check, check_near

pytestmark = pytest.mark.skipif(build.available() is not None, reason="no C++ compiler here")
specs = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(generated._kernel, SPECS))


@specs
@pytest.mark.parametrize("threads", [1, 2])
def test_the_best_groups_until_the_budget(spec: ChooseSpec, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "SMALL", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for seed in range(12):
        check(generated.choose, case(spec, seed))


@specs
def test_scores_that_are_rounded(spec: ChooseSpec) -> None:
    check_near(generated.choose, case(spec, 1, whole=False), 1e-4)


def test_rows_of_many_tasks() -> None:
    """More groups than a thread scores at a time."""
    spec = ChooseSpec("vector", "mean", 3, 64, "float32")
    for seed in range(3):
        check(generated.choose, case(spec, seed, most=3 * generated.TASK_BYTES // 256 + 5))


def test_queries_that_lie_apart() -> None:
    one = case(SPECS[1], 2)
    apart = one.queries.transpose(0, 1).contiguous().transpose(0, 1)
    check(generated.choose, replace(one, queries=apart))


def test_infinite_scores_are_ordered_too() -> None:
    one = case(SPECS[0], 3)
    one.table.representatives[0, 5], one.table.representatives[0, 6] = float("inf"), -float("inf")
    one.queries[0] = 1
    check(generated.choose, one)


def wrong(one: Case) -> dict[str, Case]:
    table, x = one.table, one.table.representatives
    tables = {
        "other dtype": replace(table, representatives=x.half()),
        "other dim": replace(table, representatives=x[..., :-1]),
        "fewer rows": replace(table, representatives=x[1:]),
        "starts of another dtype": replace(table, starts=table.starts.long()),
        "sizes that lie apart": replace(table, sizes=table.sizes.T.contiguous().T),
    }
    ragged, paged = case(SPECS[0], 1), case(SPECS[0], 2)
    others = {
        "begins of another dtype": replace(ragged, places=replace(ragged.places, rows=ragged.places.rows.int())),
        "pages of fewer rows": replace(paged, places=replace(paged.places, rows=paged.places.rows[1:])),
    }
    return {name: replace(one, table=changed) for name, changed in tables.items()} | others


@pytest.mark.parametrize("name", wrong(case(SPECS[0], 0)))
def test_it_refuses_what_it_would_misread(name: str) -> None:
    with pytest.raises(KvcompileError, match="a kernel reads"):
        wrong(case(SPECS[0], 0))[name].by(CPP.choose)


def test_torch_chooses_in_other_dtypes() -> None:
    one = case(SPECS[0], 4)
    table = replace(one.table, representatives=one.table.representatives.double())
    check(CPP.choose, replace(one, queries=one.queries.double(), table=table))


def test_what_is_known_of_a_table_goes_with_it() -> None:
    """It is looked at once, for each kind of queries; nothing is left of it when a layer makes another."""
    one = case(SPECS[0], 5)
    table, before = one.table, len(generated._calls)
    for agree in ("mean", "mean", "max"):
        generated.choose(one.queries, table, one.wanted, one.lengths, agree)
    assert len(generated._calls) == before + 1
    assert len(generated._calls[table]) == 2
    del one, table
    gc.collect()
    assert len(generated._calls) == before
