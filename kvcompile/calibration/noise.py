"""How far number formats move the logits of attention, layer by layer, over a piece of text."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvcompile.kernels.codecs import decode, encode
from kvcompile.plan.plan import Plan
from kvcompile.plan.selection import Needs, Score
from kvcompile.plan.storage import SINKS, Storage
from kvcompile.runtime.observation import Observation
from kvcompile.stores.encoded.hadamard import turn_basis

QUERIES = 64  # newest ones


def logit_noise(seen: Observation, storage: Storage) -> float:
    """Standard deviation of what encoding the keys of one layer adds to its logits, in nats.

    sqrt(mean over h, i, j of (s q_i . (k^_j - k_j))^2), q the newest queries, k all keys as they are stored: less their
    mean, and in the Hadamard basis, where `storage` says so; k^ what its codes stand for. A logit that is off by a nat
    weighs an entry 2.7 times; the fewer entries a selection leaves, the less that averages out.
    """
    if storage.key is None:
        return 0.0
    keys, queries = seen.keys.float(), seen.queries.float() * seen.scale
    if storage.centred:
        keys = keys - keys[:, SINKS:].mean(1, keepdim=True)
    if storage.rotated:
        keys, queries = turn_basis(keys), turn_basis(queries)
    keys = keys[:, : keys.shape[1] // storage.block * storage.block].contiguous()
    off = decode(*encode(keys, storage.key), storage.key) - keys
    moved = torch.einsum("hgwd,hnd->hgwn", queries, off)
    return float(moved.square().mean().sqrt())


@dataclass(frozen=True)
class NoiseMeter(Score):
    """Measures what the layers of `stored` would do to these keys, keeps everything."""

    stored: Plan = field(compare=False)
    found: dict[int, float] = field(default_factory=dict, compare=False)

    @property
    def needs(self) -> Needs:
        """The newest queries."""
        return Needs(queries=QUERIES)

    def score(self, seen: Observation) -> Tensor:
        """Zeros; what was measured goes to `found[layer]`."""
        self.found[seen.layer] = logit_noise(seen, self.stored.layers[seen.layer].storage)
        return torch.zeros(seen.keys.shape[:2], dtype=torch.float32, device=seen.keys.device)
