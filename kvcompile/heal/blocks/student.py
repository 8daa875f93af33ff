"""The block transformer that learns from the original: its logits, and hidden states of the token decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from kvcompile.heal.blocks.forward import BlockForward
from kvcompile.heal.losses import divergence, next_token, relative_error
from kvcompile.heal.student import StudentMixin, Targets, trainable
from kvcompile.plan.plan import Plan


class BlockStudentMixin(StudentMixin):
    """A `StudentMixin` over blocks; `padding [B]` says how much of its first block each sequence leaves empty."""

    blockwise: BlockForward

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        targets: Targets | None = None,
        padding: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`{"loss"}` of `input_ids [B, Q]` against the targets, or of the labels where there are none.

        Hidden states are compared where both models have read the same tokens in the same layer: in the upper layers
        but the first, whose input is an embedding here, at the place from which the next token is predicted.
        """
        logits, states = self.blockwise(input_ids, padding)
        if targets is None:
            return {"loss": next_token(logits, input_ids if labels is None else labels)}
        loss = divergence(logits, targets["logits"], self.temperature)
        if self.hidden and len(states) > 1:
            loss = loss + self.hidden * relative_error(states[1:], targets["states"][1 - len(states) :])
        return {"loss": loss}


def block_student(model: Any, plan: Plan, hidden: float, temperature: float) -> Any:
    """As `student`, of a model that has the modules of a block transformer. Raises ValueError for another plan."""
    if plan.blocks is None:
        raise ValueError("the plan has no blocks")
    copied = trainable(model, replace(plan, blocks=None), BlockStudentMixin, hidden, temperature)
    object.__setattr__(copied, "blockwise", BlockForward(copied, plan.blocks))  # no submodule: it refers to the model
    return copied
