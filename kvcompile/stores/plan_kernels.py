"""The attention kernels that the layers of a plan need, over the parts in which their stores lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kvcompile.kernels.backend import Attention, Backend, ColumnSums
from kvcompile.kernels.dispatch import serving
from kvcompile.kernels.spec import KernelSpec, Part
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.storage import PLAIN, Storage
from kvcompile.stores.factory import chosen_parts, expected_parts


class PlanKernels:
    """What each layer of a plan asks of a backend, and who serves it: one object for a cache and its forks."""

    def __init__(self, plan: Plan, backend: Backend) -> None:
        self.plan, self.backend = plan, backend
        self.specs: dict[tuple[int, tuple[Part, ...], bool], KernelSpec] = {}
        self.served: dict[
            tuple[int, torch.dtype, bool, bool], Attention
        ] = {}  # by the id of a spec, which `specs` keeps
        self.falls: dict[tuple[int, torch.device], torch.Tensor] = {}  # slopes by layer and device
        self.scoring: dict[tuple[int, tuple[Part, ...], torch.dtype], bool] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> PlanKernels:
        return self  # nothing in it depends on what a cache holds

    def spec(self, index: int, parts: tuple[Part, ...], scores: bool = False) -> KernelSpec:
        """The attention that a layer needs, as backends are asked for it; the same object at every call.

        Args:
            index: of the layer.
            parts: in which its store lies.
            scores: with column sums, for a score that is a sum of attention.
        """
        spec = self.specs.get((index, parts, scores))
        if spec is None:
            p = self.plan.layers[index]
            shape = p.group, p.key_dim, p.value_dim, p.scale
            latent = p.latent is not None
            variant: dict[str, Any] = {"softcap": p.softcap, "sink": p.sink, "alibi": bool(p.alibi)}
            variant |= {"rounded": p.alibi_rounded, "latent": latent, "chunked": p.chunked}
            spec = KernelSpec(parts, *shape, p.sliding_window, scores=scores, **variant)
            self.specs[index, parts, scores] = spec
        return spec

    def slopes(self, index: int, device: torch.device, heads: int | None = None) -> torch.Tensor | None:
        """What the logits of each query head of a layer fall by with distance, float32; None: they do not.

        heads: KV heads, by which the slopes `[H_q]` are then given, `[H_kv, g]`.
        """
        p, key = self.plan.layers[index], (index, device)
        if p.alibi and key not in self.falls:
            self.falls[key] = torch.tensor(p.alibi, dtype=torch.float32, device=device)
        slopes = self.falls.get(key)
        return slopes if slopes is None or heads is None else slopes.view(heads, -1)

    def attention(
        self, spec: KernelSpec, dtype: torch.dtype, gradients: bool = False, ahead: bool = False
    ) -> Attention:
        """What attends over one of `specs`: the backend, or who does where it cannot.

        Args:
            spec: of `spec`.
            dtype: of the queries.
            gradients: whether they must pass, which generated kernels do not let them.
            ahead: whether some queries see later tokens, which generated kernels do not know.
        """
        key = id(spec), dtype, gradients, ahead
        attend = self.served.get(key)
        if attend is None:
            attend = self.served[key] = serving(self.backend, spec, dtype, gradients, ahead).attend
        return attend

    def scores(self, index: int, parts: tuple[Part, ...], dtype: torch.dtype) -> bool:
        """Whether the kernels of layer `index` over these parts add up column sums for queries of a dtype."""
        key = index, parts, dtype
        if key not in self.scoring:
            self.scoring[key] = self.backend.takes(replace(self.spec(index, parts), scores=True), dtype)
        return self.scoring[key]

    def column_sums(self, index: int, parts: tuple[Part, ...], dtype: torch.dtype) -> ColumnSums | None:
        """What adds up attention of the last queries alone over these parts; None: a score computes it itself."""
        if self.backend.column_sums is None or not self.scores(index, parts, dtype):
            return None
        return self.backend.column_sums if self.backend.takes(self.window_spec(index, parts), dtype) else None

    def group(self, index: int) -> int:
        """Query heads per KV head of layer `index`, those of all layers that read it."""
        readers = [p for p in self.plan.layers if p.owner == index]
        return sum(p.query_heads for p in readers) // self.plan.layers[index].kv_heads

    def window_spec(self, index: int, parts: tuple[Part, ...]) -> KernelSpec:
        """What `column_sums` needs to know of layer `index`."""
        return replace(self.spec(index, parts), group=self.group(index), scores=True)

    def expected(self, index: int) -> list[KernelSpec]:
        """The kernels that layer `index` will need to decode: over rows of one length, and of any length."""
        return self._specs(index, self._owner(index).storage)

    def first(self, index: int) -> list[KernelSpec]:
        """The same while nothing is encoded yet, and for what reads a copy in plain numbers, as a replay does."""
        storage = self._owner(index).storage
        return self._specs(index, PLAIN if storage.quantized or self.plan.replayed is not None else storage)

    def recalling(self, index: int) -> list[KernelSpec]:
        """The kernels that layer `index` will need to decode over what is chosen: none, where it reads everything."""
        owner = self._owner(index)
        if owner.recall is None:
            return []
        storages = (PLAIN, owner.storage) if owner.storage.quantized else (PLAIN,)
        return [self.spec(index, chosen_parts(storage, self.plan.dtype)) for storage in storages]

    def _specs(self, index: int, storage: Storage) -> list[KernelSpec]:
        if self.plan.blocks is not None and index >= self.plan.blocks.split:
            return []  # the few entries of a token decoder need no kernel
        parts = [expected_parts(storage, layout, self.plan.dtype) for layout in ("dense", "ragged")]
        owner = self._owner(index)
        s = owner.selection
        summed = s is not None and s.score.needs.reduce == "sum" and s.schedule.decode_every > 0
        summed = summed or (owner.recall is not None and owner.recall.grouping.receives)
        demotes, dtype = s is not None and s.demotes, getattr(torch, self.plan.dtype)
        return [self.spec(index, p, demotes or (summed and self.scores(index, p, dtype))) for p in parts]

    def _owner(self, index: int) -> LayerPlan:
        """The layer whose cache layer `index` reads."""
        return self.plan.layers[self.plan.layers[index].owner]
