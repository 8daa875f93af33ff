"""LMBO's parts: the error of a truncated attention output is dropped mass times displacement."""

from __future__ import annotations

import torch

from kvcompile.evaluation.output_budget import output_budget, truncated_outputs

torch.manual_seed(0)
ATTENTION = (3 * torch.randn(5, 41)).softmax(-1)
VALUES = torch.randn(5, 41, 7)


def test_truncation_error_is_dropped_mass_times_displacement() -> None:
    outputs, mass = truncated_outputs(ATTENTION, VALUES)
    for r in range(5):
        whole = (ATTENTION[r].double().unsqueeze(-1) * VALUES[r].double()).sum(0)
        order = ATTENTION[r].argsort(descending=True)
        for b in (1, 4, 40):
            dropped = order[b:]
            weights = ATTENTION[r][dropped].double()
            mean = (weights.unsqueeze(-1) * VALUES[r][dropped].double()).sum(0) / weights.sum()
            error = (1 - mass[r, b - 1]) * (mean - outputs[r, b - 1])
            torch.testing.assert_close(whole - outputs[r, b - 1], error, rtol=1e-5, atol=1e-6)


def test_output_budget_is_the_first_that_is_like_the_whole() -> None:
    outputs, _ = truncated_outputs(ATTENTION, VALUES)
    for r, need in enumerate(output_budget(ATTENTION, VALUES, 0.9).tolist()):
        likeness = torch.cosine_similarity(outputs[r], outputs[r, -1:], dim=-1)
        assert likeness[need - 1] >= 0.9
        assert (likeness[: need - 1] < 0.9).all()


def test_output_budget_of_one_hot_attention_and_of_a_perfect_match() -> None:
    assert output_budget(torch.eye(41)[:5], VALUES).tolist() == [1] * 5
    assert (output_budget(ATTENTION, VALUES, 1.0) <= 41).all()
