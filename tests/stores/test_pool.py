"""A pool of pages never loses a page, gives none away twice, and lets its memory go."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcompile.stores.pages import PagedRows, ranges
from kvcompile.stores.pool import PagePool, PageTable

PAGE, ROWS, GROUP = 4, 3, 2
LIKE = {"codes": torch.zeros(1, 2), "scales": torch.zeros(1, 1), "positions": torch.zeros(1, dtype=torch.int32)}
PER = {"scales": GROUP}


def owned(rows: int = ROWS) -> PagedRows:
    return PagedRows.like(rows, PAGE, LIKE)


def entries(numbers: list[int]) -> dict[str, torch.Tensor]:
    x = torch.tensor(numbers, dtype=torch.float32).view(-1, 1)
    return {"codes": x.expand(-1, 2), "scales": -x, "positions": x[:, 0].int()}


def held(rows: PagedRows) -> list[list[int]]:
    """What each row holds, if all buffers agree."""
    with rows.pool.alone():
        read = rows.read(rows.all_slots())
    assert torch.equal(read["codes"][:, 1], read["positions"].float())
    assert torch.equal(-read["scales"][:, 0], read["positions"].float())
    return [x.tolist() for x in read["positions"].split(rows.lengths)]


class Sharing(RuleBasedStateMachine):
    """Any number of owners of one pool, each beside the lists that it should hold; every written number is new."""

    def __init__(self) -> None:
        super().__init__()
        first = owned()
        self.pool, self.next = first.pool, 0
        self.owners: list[tuple[PagedRows, list[list[int]]]] = [(first, [[] for _ in range(ROWS)])]

    def pick(self, which: int) -> tuple[PagedRows, list[list[int]]]:
        return self.owners[which % len(self.owners)]

    def fresh(self, count: int) -> list[int]:
        self.next += count
        return list(range(self.next - count, self.next))

    @rule(which=st.integers(0, 9), added=st.lists(st.integers(0, 2 * PAGE + 1), min_size=9, max_size=9))
    def extend(self, which: int, added: list[int]) -> None:
        rows, lists = self.pick(which)
        added = added[: len(lists)]
        numbers = [self.fresh(n) for n in added]
        with self.pool.alone():
            rows.write(rows.extend(added, 0), entries([n for new in numbers for n in new]))
        for mine, new in zip(lists, numbers, strict=True):
            mine.extend(new)

    @rule(which=st.integers(0, 9), times=st.integers(1, 2 * PAGE), headroom=st.sampled_from([0, 1, 2 * PAGE]))
    def step(self, which: int, times: int, headroom: int) -> None:
        rows, lists = self.pick(which)
        for _ in range(times):
            new = self.fresh(len(lists))
            with self.pool.alone():
                rows.write(rows.step(headroom), entries(new))
            for mine, number in zip(lists, new, strict=True):
                mine.append(number)

    @rule(which=st.integers(0, 9), data=st.data())
    def keep(self, which: int, data: st.DataObject) -> None:
        rows, lists = self.pick(which)
        masks = [data.draw(st.lists(st.booleans(), min_size=len(x), max_size=len(x))) for x in lists]
        with self.pool.alone():
            rows.keep([torch.tensor(m, dtype=torch.bool).nonzero().squeeze(1) for m in masks], PAGE)
        lists[:] = [[n for n, stays in zip(x, m, strict=True) if stays] for x, m in zip(lists, masks, strict=True)]

    @rule(which=st.integers(0, 9), count=st.integers(1, PAGE + 1))
    def truncate(self, which: int, count: int) -> None:
        rows, lists = self.pick(which)
        lists[:] = [x[: max(0, len(x) - count)] for x in lists]
        with self.pool.alone():
            rows.truncate([len(x) for x in lists])

    @rule(which=st.integers(0, 9), chosen=st.lists(st.integers(0, 8), min_size=1, max_size=6))
    def select(self, which: int, chosen: list[int]) -> None:
        rows, lists = self.pick(which)
        chosen = [c % len(lists) for c in chosen]
        with self.pool.alone():
            rows.select(torch.tensor(chosen))
        lists[:] = [list(lists[c]) for c in chosen]

    @precondition(lambda self: len(self.owners) < 4)
    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        rows, lists = self.pick(which)
        with self.pool.alone():
            self.owners.append((rows.fork(), [list(x) for x in lists]))

    @precondition(lambda self: len(self.owners) > 1)
    @rule(which=st.integers(0, 9))
    def leave(self, which: int) -> None:
        self.owners.pop(which % len(self.owners))

    @invariant()
    def every_page_is_counted_and_every_row_is_whole(self) -> None:
        with self.pool.alone():
            named = torch.zeros(self.pool.capacity, dtype=torch.int32)
            for rows, lists in self.owners:
                assert rows.lengths == rows.counts.tolist() == [len(x) for x in lists]
                pages = rows.table.pages()
                named.index_add_(0, pages, torch.ones_like(pages, dtype=torch.int32))
            assert torch.equal(named, self.pool.references), "a page is named without being counted, or not given back"
            assert set(self.pool._free[: self.pool.spare].tolist()) == set((named == 0).nonzero().squeeze(1).tolist())
            for name, buffer in self.pool.buffers.items():  # nobody reads what is free
                pages = buffer.view(-1, PAGE, *buffer.shape[1:])
                assert pages.shape[0] == self.pool.capacity, name
                pages[named == 0] = -99
        for rows, lists in self.owners:
            assert held(rows) == lists

    def teardown(self) -> None:
        self.owners.clear()
        with self.pool.alone():
            assert self.pool.used == 0, "a page leaked"
            assert self.pool.spare == self.pool.capacity
            assert not self.pool.tables


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def fill(rows: PagedRows, count: int, headroom: int = 0) -> None:
    total = count * len(rows.lengths)
    with rows.pool.alone():
        rows.write(rows.extend([count] * len(rows.lengths), headroom), entries(list(range(total))))


def test_a_page_needs_a_free_one() -> None:
    pool = PagePool(PAGE, LIKE)
    pool.grow(2)
    assert pool.allocate(1).tolist() == [0]
    with pytest.raises(RuntimeError, match="2 pages of 1"):
        pool.allocate(2)


def test_freed_pages_are_used_again() -> None:
    rows = owned()
    fill(rows, 5 * PAGE)
    with rows.pool.alone():
        rows.truncate([PAGE] * ROWS)
    before = rows.pool.capacity
    fill(rows, 4 * PAGE)
    assert rows.pool.capacity == before


def test_memory_goes_when_a_selection_empties_pages() -> None:
    rows = owned()
    fill(rows, 100 * PAGE)
    before = {name: x.untyped_storage().nbytes() for name, x in rows.pool.buffers.items()}
    with rows.pool.alone():
        rows.keep([torch.arange(0, 100 * PAGE, 20)] * ROWS, 0)
    for name, x in rows.pool.buffers.items():
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size() <= before[name] * 0.07


def test_memory_goes_with_the_last_owner() -> None:
    rows = owned()
    fill(rows, 10)
    with rows.pool.alone():
        other = rows.fork()
    alive = torch.utils.weak.WeakTensorKeyDictionary({rows.pool.buffers["codes"]: None})
    gc.disable()
    try:
        del rows
        assert len(alive) == 1
        del other
        assert len(alive) == 0, "a cycle keeps the pages of a cache that is gone"
    finally:
        gc.enable()


def test_a_full_page_is_never_copied_and_a_shared_open_one_once() -> None:
    rows = owned(1)
    fill(rows, 2 * PAGE + 1)
    with rows.pool.alone():
        rows.select(torch.tensor([0, 0, 0]))
        assert rows.pool.used == 3
        full = rows.table.host[:, :2].clone()
        rows.write(rows.step(0), entries([100, 101, 102]))
    assert torch.equal(rows.table.host[:, :2], full)
    assert rows.table.host[:, 2].unique().numel() == 3
    assert rows.pool.used == 5, "one of the three keeps the page"
    fill(rows, PAGE)
    assert rows.pool.used == 2 + 3 * 2


def test_entries_that_do_not_move_stay_shared() -> None:
    rows = owned(1)
    fill(rows, 4 * PAGE)
    with rows.pool.alone():
        other = rows.fork()
        rows.keep([torch.tensor([i for i in range(4 * PAGE) if i != 2 * PAGE + 1])], 0)
    assert (rows.table.host == other.table.host)[0, :4].tolist() == [True, True, False, False]
    assert held(other) == [list(range(4 * PAGE))]


def test_steps_look_for_pages_once_a_page() -> None:
    rows, looks = owned(), 0
    inner = rows._own

    def count(*args: object) -> None:
        nonlocal looks
        looks += 1
        inner(*args)  # type: ignore[arg-type]

    rows._own = count  # type: ignore[method-assign]
    fill(rows, 3)
    looks = 0
    for i in range(10 * PAGE):
        with rows.pool.alone():
            rows.write(rows.step(0), entries([i] * ROWS))
    assert looks == 10


def test_groups_of_tokens_share_an_entry() -> None:
    """As scales do: written and read by whole groups, wherever their pages are."""
    rows = PagedRows.like(2, PAGE, LIKE, PER)
    for start in range(0, 30, 6):
        with rows.pool.alone():
            slots = rows.extend([4, 2], 0)
            x = torch.arange(start, start + 6, dtype=torch.float32).view(-1, 1)
            rows.write(slots, {"codes": x.expand(-1, 2), "scales": x[::GROUP], "positions": x[:, 0].int()})
    rows.select(torch.tensor([1, 0, 0]))
    read = rows.read(rows.all_slots())
    assert torch.equal(read["scales"][:, 0].int(), read["positions"][::GROUP])
    first = [p for s in range(0, 30, 6) for p in (s + 4, s + 5)]
    assert read["positions"][:10].tolist() == first
    assert rows.pool.buffers["scales"].shape[0] * GROUP == rows.pool.capacity * PAGE


def test_the_table_beside_the_pages_follows_the_one_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where they are two."""
    monkeypatch.setattr(PageTable, "_mirrored", lambda table, host: host.clone())
    rows = owned()
    fill(rows, 3)
    with rows.pool.alone():
        other = rows.fork()
        for change in (
            lambda: rows.write(rows.step(0), entries([7] * ROWS)),
            lambda: rows.write(rows.extend([40, 3, 0], 0), entries(list(range(43)))),
            lambda: rows.keep([torch.arange(0, n, 9) for n in rows.lengths], 0),
            lambda: rows.pool.shrink(0),
            lambda: rows.select(torch.tensor([2, 2, 0])),
            lambda: rows.truncate([1, 2, 3]),
        ):
            change()
            for table in (rows.table, other.table):
                assert table.device is not table.host
                assert torch.equal(table.device, table.host)


def test_ranges() -> None:
    rows, entries_ = ranges(torch.tensor([2, 5, 0, 3]), torch.tensor([4, 5, 1, 1]))
    assert rows.tolist() == [0, 0, 2]
    assert entries_.tolist() == [2, 3, 0]


def test_slots_known_ahead_follow_when_another_owner_moves_the_pages() -> None:
    rows = owned()
    fill(rows, 10 * PAGE)
    with rows.pool.alone():
        other = rows.fork()
        rows.keep([torch.arange(2)] * ROWS, 0)
    fill(other, 90 * PAGE)
    with rows.pool.alone():
        rows.write(rows.step(0), entries([-1] * ROWS))
        rows.write(rows.step(0), entries([-2] * ROWS))
        moves = rows.pool.moves
        other.keep([torch.arange(2)] * ROWS, 0)
        assert rows.pool.moves == moves + 1
        rows.write(rows.step(0), entries([-3] * ROWS))
    assert [x[2:] for x in held(rows)] == [[-1, -2, -3]] * ROWS
    assert [len(x) for x in held(other)] == [2] * ROWS


def test_owners_may_live_in_threads() -> None:
    first = owned(2)
    fill(first, 5)
    with first.pool.alone():
        owners = [first, *(first.fork() for _ in range(3))]

    def live(owner: PagedRows, number: int) -> list[int]:
        for i in range(40):
            with owner.pool.alone():
                owner.write(owner.step(0), entries([number * 1000 + i] * 2))
            if i % 13 == 12:
                with owner.pool.alone():
                    owner.keep([torch.arange(0, n, 2) for n in owner.lengths], 0)
        return held(owner)[1]

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(live, owners, range(4)))
    alone = owned(2)
    fill(alone, 5)
    assert got[0] == live(alone, 0)
    assert [[n % 1000 for n in x] for x in got[1:]] == [[n % 1000 for n in got[0]]] * 3
    assert all(max(x) // 1000 == i for i, x in enumerate(got))
