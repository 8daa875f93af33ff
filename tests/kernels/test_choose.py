"""The reference chooser takes what sorting the groups takes, and its tables of entries are what they say."""

from __future__ import annotations

import pytest
import torch
from choices import SPECS, case, check, check_near

from kvcompile.kernels.choose import ChooseSpec, EntryTable, choose

specs = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


@specs
def test_the_best_groups_until_the_budget(spec: ChooseSpec) -> None:
    for seed in range(8):
        check(choose, case(spec, seed))
    check_near(choose, case(spec, 1, whole=False), 1e-4)


def test_names_are_unique() -> None:
    assert len({spec.name for spec in SPECS}) == len(SPECS)


def test_rows_and_tables_are_one_choice() -> None:
    device = torch.device("cpu")
    rows = [torch.tensor([1, 3]), torch.tensor([0, 2, 5]), torch.tensor([], dtype=torch.int64)]
    table = EntryTable.of(rows, device)
    assert table.entries.tolist() == [[1, 3, 0], [0, 2, 5], [0, 0, 0]]
    assert table.lengths == table.counts.tolist() == [2, 3, 0]
    assert [row.tolist() for row in table] == [row.tolist() for row in rows]
    whole = EntryTable.of(torch.tensor([[1, 3], [0, 2]]), device)
    assert [row.tolist() for row in whole] == [[1, 3], [0, 2]]


def test_a_table_is_split_where_its_rows_change_memory() -> None:
    rows = [torch.tensor([1, 3, 8, 9]), torch.tensor([0, 2]), torch.tensor([7])]
    old, new = EntryTable.of(rows, torch.device("cpu")).split([8, 4, 3])
    assert old.entries.tolist() == [[1, 3], [0, 2], [0, 0]]
    assert new.entries.tolist() == [[0, 1], [0, 0], [4, 0]]
    assert (old.lengths, new.lengths) == ([2, 2, 0], [2, 0, 1])
    assert (old.counts.tolist(), new.counts.tolist()) == ([2, 2, 0], [2, 0, 1])


def test_what_comes_later_is_added_behind_each_row() -> None:
    table = EntryTable.of([torch.tensor([1, 3]), torch.tensor([0, 2, 5])], torch.device("cpu"))
    longer = table.extended([7, 6], [10, 7])
    assert [row.tolist() for row in longer] == [[1, 3, 7, 8, 9], [0, 2, 5, 6]]
    assert longer.lengths == longer.counts.tolist() == [5, 4]
    assert [row.tolist() for row in table] == [[1, 3], [0, 2, 5]], "the table itself stays"
