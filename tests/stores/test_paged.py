"""Rows in pages hold what ragged rows hold, whatever is done to them, and share memory where they can."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor

from kvcompile.kernels import reference
from kvcompile.kernels.layout import Queries
from kvcompile.kernels.spec import KernelSpec
from kvcompile.stores.paged import PagedStore
from kvcompile.stores.ragged import RaggedStore

HEADS, DIM, VALUE_DIM = 2, 4, 6
HEADROOM = 8
PER_TOKEN = (DIM + VALUE_DIM) * 4
Rows = list[tuple[Tensor, Tensor, Tensor]]


def same(paged: PagedStore, rows: Rows) -> None:
    """Both ways to read the rows give these ones."""
    assert paged.lengths == [len(p) for _, _, p in rows]
    assert paged.nbytes() == sum(paged.lengths) * PER_TOKEN
    for got, expected in zip(paged.rows(), rows, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    for b in range(paged.batch):
        keys, values, positions, lengths = paged.sequence(b)
        assert positions.shape == (HEADS, max(lengths))
        for h, n in enumerate(lengths):
            for x, y in zip((keys, values, positions), rows[b * HEADS + h], strict=True):
                assert torch.equal(x[h, :n], y)
            assert not keys[h, n:].any()
            assert not values[h, n:].any()
            assert bool((positions[h, n:] == -1).all())


def poison(store: PagedStore) -> None:
    """NaN wherever no row has an entry."""
    pool = store.pages.pool
    with pool.alone():
        at = [t.pages() for t in pool.tables]
        whole = torch.zeros(pool.capacity, dtype=torch.bool)
        whole[torch.cat(at)] = True
        free = (~whole).repeat_interleave(pool.page)
        if len(at) == 1:
            free[:] = True
            free[store.pages.all_slots()] = False
        store.keys[free] = float("nan")
        store.values[free] = float("nan")
        store.positions[free] = -9


def tokens(batch: int, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = batch, HEADS, count
    return torch.randn(*shape, DIM, generator=g), torch.randn(*shape, VALUE_DIM, generator=g)


def copied(rows: Rows) -> Rows:
    return [tuple(x.clone() for x in row) for row in rows]  # type: ignore[misc]


@pytest.mark.parametrize("page", [1, 3, 16])
@pytest.mark.parametrize("seed", range(4))
def test_random_operations_like_a_ragged_store(seed: int, page: int) -> None:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, seen, paged, ragged = rng.randint(1, 3), 0, None, None
    for turn in range(30):
        op = "append" if turn == 0 else rng.choice(["append", "step", "step", "keep", "select", "drop", "fork"])
        if op in ("append", "step"):
            count = 1 if op == "step" else rng.randint(1, 20)
            keys, values = tokens(batch, count, g)
            positions = torch.arange(seen, seen + count).expand(batch, -1)
            seen += count
            valid = None
            if op == "append" and rng.random() < 0.5:
                valid = torch.rand(batch, count, generator=g) < 0.7
            if paged is None or ragged is None:
                paged = PagedStore.empty(keys, values, page)
                ragged = RaggedStore(keys, values, batch, HEADS, [0] * batch * HEADS)
            for store in (paged, ragged):
                store.append(keys, values, positions, rng.choice([0, HEADROOM]), valid)
        elif op == "keep":
            indices = [torch.randperm(n, generator=g)[: rng.randint(0, n)].sort().values for n in ragged.lengths]
            paged, ragged = paged.keep(indices, HEADROOM), ragged.keep(indices, HEADROOM)
        elif op == "select":
            chosen = torch.tensor([rng.randrange(batch) for _ in range(rng.randint(1, 3))])
            batch = len(chosen)
            paged.select(chosen), ragged.select(chosen)
        elif op == "drop" and min(ragged.lengths) > 3:
            paged.drop_last(3), ragged.drop_last(3)
        elif op == "fork":
            paged = copy.deepcopy(paged)
        poison(paged)
        same(paged, ragged.rows())


def filled(batch: int, count: int, page: int = 16) -> PagedStore:
    g = torch.Generator().manual_seed(0)
    keys, values = tokens(batch, count, g)
    store = PagedStore.empty(keys, values, page)
    store.append(keys, values, torch.arange(count).expand(batch, -1), HEADROOM)
    return store


def more(store: PagedStore, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Append so many tokens to each row; what was appended."""
    keys, values = tokens(store.batch, count, torch.Generator().manual_seed(seed))
    at = max(store.lengths)
    positions = torch.arange(at, at + count).expand(store.batch, -1)
    store.append(keys, values, positions, HEADROOM)
    return keys, values, positions


@pytest.mark.parametrize("steps", [1, 40])
@pytest.mark.parametrize("prompt", [15, 16, 50])
def test_a_fork_goes_its_own_way(prompt: int, steps: int) -> None:
    """Forks with other continuations are what separate stores would be, and the shared pages are not written."""
    one = filled(2, prompt)
    start = copied(one.rows())
    forks = [one, one.fork(), one.fork()]
    full = prompt // 16 * 16
    at = one.pages.all_slots().view(4, prompt)[:, :full].flatten()
    before = one.keys[at].clone()
    added: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in forks]
    for i in range(steps):
        for f, store in enumerate(forks):
            added[f].append(more(store, 1 if f else 2, 10 * i + f))
    for store, new in zip(forks, added, strict=True):
        rows = []
        for r, row in enumerate(start):
            b, h = divmod(r, HEADS)
            pieces = [(k[b, h], v[b, h], p[b].int()) for k, v, p in new]
            rows.append(tuple(torch.cat((x, *xs)) for x, xs in zip(row, zip(*pieces, strict=True), strict=True)))
        same(store, rows)  # type: ignore[arg-type]
    assert torch.equal(one.keys[at], before)
    for store in forks[1:]:
        assert torch.equal(store.pages.table.host[:, : full // 16], one.pages.table.host[:, : full // 16])


def test_the_memory_of_a_fork_is_a_few_pages() -> None:
    one = filled(1, 5000)
    before, held = one.allocated(), one.nbytes()
    forks = [one.fork() for _ in range(10)]
    for i, store in enumerate(forks):
        more(store, 1, i)
    assert sum(store.nbytes() for store in forks) == 10 * (held + HEADS * PER_TOKEN)
    page = 16 * (PER_TOKEN + 4)
    assert one.pages.pool.used <= HEADS * (-(-5000 // 16) + 10 * 2), "the open page and the one ahead, a row and fork"
    assert one.allocated() - before <= 10 * HEADS * 4 * page
    del forks, store
    with one.pages.pool.alone():
        assert one.pages.pool.used <= HEADS * (-(-5000 // 16) + 1)
    same(one, filled(1, 5000).rows())


def test_repeated_sequences_share_the_prompt() -> None:
    store = filled(1, 1000)
    held = store.pages.pool.used
    store.select(torch.zeros(8, dtype=torch.long))
    assert store.pages.pool.used == held
    more(store, 1, 0)
    assert store.pages.pool.used == held + 7 * HEADS, "seven copies of the open page, and one row keeps it"
    rows = store.rows()
    assert all(torch.equal(rows[r][0][:1000], rows[r % HEADS][0][:1000]) for r in range(8 * HEADS))
    assert not torch.equal(rows[0][0], rows[HEADS][0])


def test_reordering_forever_does_not_grow() -> None:
    store = filled(3, 20)
    for i in range(150):
        store.select(torch.tensor([(i + j) % 3 for j in range(3)]))
        more(store, 1, i)
    room = (
        store.allocated() - store.nbytes() - sum(store.lengths) * 4 - sum(x.nbytes for x in store.pages.table.tensors())
    )
    assert room <= 3 * HEADS * (2 * 16 + 2 * HEADROOM) * (PER_TOKEN + 4)


def test_selecting_one_sequence_gives_memory_back() -> None:
    store = filled(3, 200)
    before = store.allocated()
    store.select(torch.tensor([1]))
    assert sum(x.untyped_storage().nbytes() for x in store.tensors()) <= before / 2


def test_allocated_is_what_the_tensors_keep_alive() -> None:
    store = filled(2, 100)
    for change in (lambda: more(store, 60, 0), lambda: store.keep([torch.arange(7)] * 4, HEADROOM), store.fork):
        change()
        assert store.allocated() == sum(x.untyped_storage().nbytes() for x in store.tensors())
        assert {id(store.keys), id(store.pages.table.host), id(store.pages.pool.references)} <= set(
            map(id, store.tensors())
        )


def test_rewritten_keys_are_nobody_elses() -> None:
    one = filled(1, 40)
    other, before = one.fork(), copied(one.rows())
    one.rewrite({r: (0, -k) for r, (k, _, _) in enumerate(before)})
    same(other, before)
    same(one, [(-k, v, p) for k, v, p in before])


def test_the_view_is_what_kernels_expect() -> None:
    store = filled(2, 37)
    store = store.keep([torch.arange(0, n, 1 + r) for r, n in enumerate(store.lengths)], HEADROOM)
    poison(store)
    (part,) = store.parts
    assert part.name == "paged16-float32"
    spec = KernelSpec(store.parts, 3, DIM, VALUE_DIM, 0.5)
    queries = Queries(torch.randn(2, 3 * HEADS, 1, DIM), torch.full((2, 1), 40))
    for r, (keys, values, positions) in enumerate(store.rows()):
        got = reference.row(store.view(), spec, *divmod(r, HEADS), dtype=torch.float32)
        assert all(torch.equal(x, y) for x, y in zip(got, (keys, values, positions), strict=True))
    assert bool(reference.attend(queries, store.view(), spec).isfinite().all())


def test_half_precision_is_stored_as_such() -> None:
    keys = torch.randn(1, HEADS, 3, DIM, dtype=torch.bfloat16)
    store = PagedStore.empty(keys, keys, 4)
    store.append(keys, keys, torch.arange(3).unsqueeze(0), 0)
    assert store.parts[0].key.kind == "bfloat16"
    assert store.nbytes() == 2 * HEADS * 3 * DIM * 2
