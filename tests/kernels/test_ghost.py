"""The reference gives each entry the squared change of the outputs that a loop over entries gives it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ghosts import PLACES, RULE, SPECS, case, check, expected

from kvcompile.kernels.reference import ghost as module
from kvcompile.kernels.reference.ghost import GhostSpec, ghost_scores

SPEC = SPECS[0]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_scores_are_changes_of_the_output(spec: GhostSpec, place: tuple[int, int, int]) -> None:
    check(ghost_scores, case(spec, *place))


def test_float64_stays_float64_inside() -> None:
    c = case(SPEC, 40).double()
    torch.testing.assert_close(c.by(ghost_scores).double(), expected(c), rtol=1e-7, atol=0)


def test_blocks_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(replace(SPEC, rule=replace(RULE, chunk=0)), 40)
    whole = c.by(ghost_scores)
    monkeypatch.setattr(module, "QUERY_BLOCK", 7)
    torch.testing.assert_close(c.by(ghost_scores), whole)


def test_a_change_is_what_leaving_an_entry_out_does() -> None:
    """One query, no sinks: (p / (1 - p))^2 |v - o|^2 is |o' - o|^2 with the output o' over the other entries."""
    spec = replace(SPEC, rule=replace(RULE, chunk=0, band=0, own_from=9), group=1)
    c = case(spec, 1, sinks=0, heads=1).double()
    c = replace(c, keys=torch.randn(1, 6, 16).double(), values=torch.randn(1, 6, 16).double())
    c = replace(c, queries=torch.zeros(1, 1, 6, 16).double(), ghosts=torch.randn(1, 1, 6, 16).double())
    logits = c.ghosts[0, 0] @ c.keys[0].T * RULE.scale
    whole = logits.softmax(-1) @ c.values[0]
    for j in range(6):
        without = logits.clone()
        without[:, j] = -torch.inf
        moved = (without.softmax(-1) @ c.values[0] - whole).square().sum()
        torch.testing.assert_close(c.by(ghost_scores)[0, j].double(), moved, rtol=1e-6, atol=0)


def test_chunks_begin_at_true_positions() -> None:
    assert list(RULE.chunks(5, 20)) == [(0, 3), (3, 11), (11, 19), (19, 20)]
    assert list(RULE.chunks(8, 8)) == [(0, 8)]
    assert list(replace(RULE, chunk=0).chunks(5, 20)) == [(0, 20)]


def test_passes_of_whole_chunks_are_one_pass() -> None:
    """To the bit: a chunk sees the sinks and itself."""
    c = case(SPEC, 40)
    parts = [c.passed(ghost_scores, a, b) for a, b in ((0, 16), (16, 32), (32, 40))]
    assert torch.equal(torch.cat(parts, 1), c.by(ghost_scores))


def test_names_are_unique() -> None:
    assert len({spec.name for spec in SPECS}) == len(SPECS)
