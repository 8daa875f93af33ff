"""Losses of healing against their formulas, written out."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_ids, tiny_model

from kvcompile.adapters.architectures import describe
from kvcompile.heal.losses import divergence, next_token, relative_error
from kvcompile.heal.student import Teacher, student
from kvcompile.models.sharing import shared


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_is_from_the_original_to_the_student_at_a_temperature(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(2, 3, 5, generator=draw) for _ in range(2))
    p, q = ((x / temperature).softmax(-1) for x in (wanted, found))
    expected = temperature**2 * (p * (p.log() - q.log())).sum(-1).mean()
    torch.testing.assert_close(divergence(found, wanted, temperature), expected)


def test_an_error_of_a_layer_is_relative_to_what_the_layer_gives() -> None:
    """Layers of small outputs count as much as those of large ones."""
    draw = torch.Generator().manual_seed(0)
    wanted = [torch.randn(2, 3, 4, generator=draw) * size for size in (1.0, 100.0)]
    found = [wanted[0] * 1.1, wanted[1] * 1.2]
    torch.testing.assert_close(relative_error(found, wanted), torch.tensor((0.01 + 0.04) / 2))


def test_labels_are_the_next_tokens_and_some_are_none() -> None:
    model, ids = tiny_model(), tiny_ids(2, 12)
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        out = model(ids, labels=labels)
    torch.testing.assert_close(next_token(out.logits, labels), out.loss)


def test_hidden_states_are_part_of_the_loss_as_far_as_asked() -> None:
    model, ids = tiny_model(), tiny_ids(2, 12)
    plan = describe(model.config)
    targets = Teacher(model, plan).targets(ids, "model")
    bent = (targets["states"][0], *(s * 1.1 for s in targets["states"][1:]))
    for hidden in (0.0, 0.5, 1.0):
        loss = student(shared(model), plan, hidden, 1.0)(ids, targets={**targets, "states": bent})["loss"]
        torch.testing.assert_close(loss.detach(), torch.tensor(hidden * (0.1 / 1.1) ** 2), atol=1e-6, rtol=1e-3)
