"""What the converted model is trained on: the original's outputs, layer by layer or end to end, or the text itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def relative_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over layers of `|y - t|^2 / |t|^2`, each over all tokens of the batch; y, t `[B, Q, hidden]`."""
    errors = [
        (y.float() - t.float()).square().mean() / t.float().square().mean()
        for y, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 KL(softmax(t / T) || softmax(y / T))`, mean over tokens; logits y, t `[B, Q, vocabulary]`.

    Source: distillation, arXiv 1503.02531, section 2.
    """
    y, t = (F.log_softmax(x.float().flatten(0, -2) / temperature, -1) for x in (student, teacher))
    return F.kl_div(y, t, reduction="batchmean", log_target=True) * temperature**2


def next_token(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the logits `[B, Q, vocabulary]` against the labels `[B, Q]` one place on; -100 is no label."""
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
