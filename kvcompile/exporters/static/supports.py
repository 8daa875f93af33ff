"""What programs of fixed shape cannot express, found before any work starts."""

from __future__ import annotations

from typing import Any

from kvcompile.adapters.architectures import lengthwise_ropes
from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.selection import Selection

HF = "export=[hf]"
SHORT = 64  # tokens; whether a split needs scores does not depend on their number


def refuse(plan: Plan, model_config: Any) -> None:
    """Raise KvcompileError, with the reason, for a plan that no program of fixed shape can follow."""
    for kind in lengthwise_ropes(model_config):
        rule = "rotary angles must not depend on the length of the input"
        raise KvcompileError(rule, f"rope {kind!r}", f"{HF}, whose model is transformers' own")
    if plan.state_bytes:
        raise KvcompileError("a program has rows of keys and values alone", "layers that keep a state", HF)
    if any(p.sink for p in plan.layers):
        raise KvcompileError("a program's softmax is over entries alone", "learned sinks", HF)
    if any(p.alibi for p in plan.layers):
        raise KvcompileError("a program's logits are products of queries and keys alone", "ALiBi", HF)
    if any(p.chunked for p in plan.layers):
        raise KvcompileError("a program's windows slide", "attention in chunks", HF)
    for p in plan.owners:
        _refuse_storage(p)
        if p.recall is not None:
            raise KvcompileError(
                f"layer {p.index}: each step of a program reads all that a row holds",
                f"{p.recall.policy!r}, which chooses what a step reads",
                f"drop {p.recall.policy}",
            )
        if p.selection is not None:
            _refuse_selection(plan, p, p.selection)


def _refuse_storage(p: LayerPlan) -> None:
    s, every = p.storage, p.selection.schedule.decode_every if p.selection else 0
    if s.page:
        raise KvcompileError(f"layer {p.index} must hold contiguous rows", f"pages of {s.page}", "drop paged")
    if s.offload:
        raise KvcompileError(f"layer {p.index} must stay on one device", "offloaded", "drop offload")
    if s.low is not None:
        raise KvcompileError(
            f"layer {p.index} must hold its tokens in one precision", f"{s.policy!r}", f"drop {s.policy}"
        )
    if s.quantized and p.latent is not None:
        raise KvcompileError(
            f"layer {p.index}: a program holds latent rows in the model's dtype", f"{s.policy!r}", f"drop {s.policy}"
        )
    if s.quantized and every and p.selection:
        raise KvcompileError(
            f"layer {p.index}: encoded tokens are not dropped while decoding",
            f"{s.policy} under {p.selection.policy} with decode_every={every}",
            f"stack.{p.selection.policy}.decode_every=0",
        )


def _refuse_selection(plan: Plan, p: LayerPlan, s: Selection) -> None:
    where = f"{s.policy}, layer {p.index}"
    if s.positions == "compact":
        raise KvcompileError(
            f"{where}: keys keep their true positions", "positions=compact", f"stack.{s.policy}.positions=original"
        )
    if s.schedule.replay is not None:
        raise KvcompileError(
            f"{where}: a program reads its prompt once",
            "a replay of the text before anything is dropped",
            "another score, such as policy=[expected_attention]",
        )
    needs = s.score.needs
    if needs.queries is None and not needs.carries:
        raise KvcompileError(
            f"{where}: a score may look at a fixed number of queries, or sum over all",
            type(s.score).__name__,
            f"another score in place of {s.policy}, such as snapkv's or h2o's",
        )
    if needs.moments and s.schedule.decode_every:
        raise KvcompileError(
            f"{where}: moments of queries are taken of the prompt alone",
            f"decode_every={s.schedule.decode_every}",
            f"stack.{s.policy}.decode_every=0",
        )
    if not needs.traceable:
        fix = f"another score in place of {s.policy}, such as snapkv's or h2o's"
        raise KvcompileError(f"{where}: a score must be made of tensor operations", type(s.score).__name__, fix)
    if s.allocation.traits.traceable:
        _refuse_allotted(p, s, where)
    elif s.budget is None or s.uncertainty is not None or plan.kept(p.index, SHORT) is None:
        raise KvcompileError(
            f"{where}: what a head keeps must follow from the length of the prompt alone",
            f"{type(s.allocation).__name__}, which looks at the scores",
            "a policy that splits its budget evenly, or by adakv",
        )
    if plan.prefill_chunk and s.schedule.between_chunks:
        raise KvcompileError(
            f"{where}: a program reads its prompt in one piece",
            f"prefill_chunk={plan.prefill_chunk}",
            f"prefill_chunk=0, or stack.{s.policy}.between_chunks=false",
        )


def _refuse_allotted(p: LayerPlan, s: Selection, where: str) -> None:
    """Layers or heads that split a known number of entries do so once; heads that compete share one plain row."""
    if s.budget is None:
        raise KvcompileError(
            f"{where}: how many tokens stay must follow from the length of the prompt alone",
            "a threshold, no budget",
            f"a policy with a budget in place of {s.policy}",
        )
    if s.schedule.decode_every:
        raise KvcompileError(
            f"{where}: what a head keeps is decided once, after the prompt",
            f"decode_every={s.schedule.decode_every}",
            f"stack.{s.policy}.decode_every=0",
        )
    if s.allocation.traits.competing and p.storage.quantized:
        fix = f"drop {p.storage.policy}, or the policy that lets heads share a budget"
        raise KvcompileError(
            f"{where}: heads that share a row hold plain numbers", f"{p.storage.policy!r} after it", fix
        )
    if s.allocation.traits.competing and p.softcap:
        fix = "drop the policy that lets heads share a budget"
        raise KvcompileError(f"{where}: heads that share a row take plain logits", f"soft-cap {p.softcap:g}", fix)
