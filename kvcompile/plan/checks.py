"""What a plan must fulfil to run: every rule of it, checked before a weight is read; errors name policy and layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcompile.errors import KvcompileError
from kvcompile.plan.blocks import check_blocks
from kvcompile.plan.recall import Recall
from kvcompile.plan.selection import Selection, Tiers
from kvcompile.plan.storage import PLAIN, Codec
from kvcompile.plan.structure import Latent

if TYPE_CHECKING:
    from kvcompile.plan.plan import LayerPlan, Plan


def check(plan: Plan) -> None:
    """Raise KvcompileError, naming policy and layer, if a plan cannot run."""
    for p in plan.layers:
        _check_heads(p)
        _check_owner(p, plan.layers[p.owner])
    if plan.state_bytes:
        _check_states(plan)
    if plan.blocks is not None:
        check_blocks(plan, plan.blocks)
        plan = plan.decoder
        if any(p.storage.centred for p in plan.layers):
            rule = "center: mean keys are found in a model that attends to tokens, not to blocks"
            raise KvcompileError(rule, "'center' after 'block_transformer'", "drop one")
    for p in plan.layers:
        if p.latent is not None:
            _check_latent(p, p.latent)
        if p.selection is not None:
            _check_selection(plan, p, p.selection)
            if p.selection.schedule.replay is not None:
                _check_replay(plan, p, p.selection)
        if p.recall is not None:
            _check_recall(p, p.recall)
            if p.recall.far == "constant":
                _check_far(plan, p, p.recall)
        if not p.turnable:
            _check_turning(p)
        if p.alibi:
            _check_alibi(p)
        if p.storage != PLAIN:
            _check_storage(p)
        _check_tiers(p)


def _check_states(plan: Plan) -> None:
    """Of a model some of whose layers keep a state, which is of all tokens so far and goes on from where it is."""
    if plan.prefill_chunk:
        raise KvcompileError(
            "layers that keep a state read a prompt at once", f"prefill_chunk={plan.prefill_chunk}", "prefill_chunk=0"
        )
    if plan.replayed is not None or plan.blocks is not None:
        raise KvcompileError(
            "layers that keep a state read a text once, token by token",
            f"{plan.architecture} under {', '.join(repr(a.name) for a in plan.applied)}",
            "policies that neither read a text again nor divide it into blocks",
        )


def _check_alibi(p: LayerPlan) -> None:
    """Of a layer whose logits fall with the distance of tokens, which these policies do not know."""
    moments = p.selection is not None and p.selection.score.needs.moments
    blind = p.selection.policy if p.selection is not None and moments else p.recall.policy if p.recall else None
    if blind is not None:
        raise KvcompileError(
            f"{blind}: layer {p.index}: tokens are weighed by queries and keys alone, and the logits of this model "
            "fall with their distance (ALiBi)",
            fix="a score that looks at attention, such as snapkv or tova",
        )


def _check_turning(p: LayerPlan) -> None:
    """Of a layer whose keys stand for good where they were read: nothing turns them, or queries, to other positions."""
    s, far = p.selection, p.recall is not None and p.recall.far == "constant"
    turns = s is not None and bool(s.score.needs.rotation or (p.rotates and s.score.needs.moments))
    if far or turns or (s is not None and s.positions == "compact"):
        policy = s.policy if s is not None and not far else p.recall.policy if p.recall is not None else ""
        raise KvcompileError(
            f"{policy}: layer {p.index}: keys and queries are turned to other positions, which the attention of this "
            "model does not allow: a norm or a factor stands behind the rotation, or positions are learned",
            fix="a score that looks at keys or at attention, with original positions",
        )


def _check_heads(p: LayerPlan) -> None:
    if p.query_heads % p.kv_heads:
        raise KvcompileError(
            f"layer {p.index}: KV heads must divide the query heads", f"{p.kv_heads} and {p.query_heads}"
        )


def _check_owner(p: LayerPlan, owner: LayerPlan) -> None:
    """`owner`: whose cache the layer reads, its own or that of a layer before it."""
    if (owner.kv_heads, owner.key_dim) != (p.kv_heads, p.key_dim) or owner.owner != owner.index or p.owner > p.index:
        raise KvcompileError(
            f"layer {p.index} can only read the cache of an earlier layer that has its own and heads like it",
            f"layer {p.owner}: {owner.kv_heads} KV heads of {owner.key_dim}, not {p.kv_heads} of {p.key_dim}",
        )
    if (owner.sliding_window, owner.rotates) != (p.sliding_window, p.rotates):
        raise KvcompileError(
            f"layer {p.index} cannot read the cache of layer {p.owner}: window and positions must be alike",
            f"{_kind(p)} and {_kind(owner)}",
            "stack.cla.pattern=<owner of each layer, of its own kind>",
        )


def _kind(p: LayerPlan) -> str:
    window = f"sliding window {p.sliding_window}" if p.sliding_window else "full attention"
    return window if p.rotates else f"{window} without rotary positions"


def _check_selection(plan: Plan, p: LayerPlan, s: Selection) -> None:
    where = f"{s.policy}: layer {p.index}"
    if s.positions == "compact" and (s.score.needs.queries != 0 or s.uncertainty is not None):
        raise KvcompileError(
            f"{where}: compact positions need a score that looks at no queries",
            type(s.score).__name__,
            f"stack.{s.policy}.positions=original",
        )
    if p.latent is not None and s.score.needs.rotation:
        raise KvcompileError(
            f"{where}: queries that are turned on must meet keys, not latent rows",
            f"{type(s.score).__name__} over a latent",
            "another score, such as expected_attention's" + ("" if p.latent.native else ", or gqa in place of mla"),
        )
    if s.positions == "compact":
        alike = all(q.selection == s for q in plan.layers if q.owner == q.index)
        traits = s.allocation.traits
        if traits.scope == "head" or traits.cross_layer or not alike or p.sliding_window:
            raise KvcompileError(
                f"{where}: compact positions need every layer and head to keep the same tokens",
                f"allocation {type(s.allocation).__name__} (sliding window {p.sliding_window})",
                f"stack.{s.policy}.positions=original",
            )
    if s.budget is not None and s.budget.value > 1:
        sinks, recent = s.protected(int(s.budget.value))
        if sinks + recent > s.budget.value:
            raise KvcompileError(
                f"{where}: the budget must hold the {sinks} sinks and {recent} recent tokens that always stay",
                f"{s.budget.value:g} tokens",
                f"stack.{s.policy}.budget={sinks + recent} or more",
            )


def _check_replay(plan: Plan, p: LayerPlan, s: Selection) -> None:
    where = f"{s.replayer}: layer {p.index}"
    recalling = next((q.recall for q in plan.owners if q.recall is not None), None)
    if recalling is not None:
        raise KvcompileError(
            f"{where}: a replay looks at all that is held, which a recall chooses from",
            f"{recalling.policy!r} beside it",
            "drop one",
        )
    other = next((q for q in plan.selected if q.selection and q.selection.schedule != s.schedule), None)
    if other is not None:
        raise KvcompileError(
            f"{where}: all layers are replayed at once, so that all select at the same time",
            f"another schedule in layer {other.index}",
            "the same decode_every and between_chunks in every policy of the stack, or no skip_layers",
        )


def _check_recall(p: LayerPlan, recall: Recall) -> None:
    where, s = f"{recall.policy}: layer {p.index}", p.selection
    if p.owner != p.index:
        raise KvcompileError(
            f"{where} has no cache of its own, so what is read of it cannot be chosen",
            f"a layer that reads layer {p.owner}'s",
            f"stack.{recall.policy}.skip_layers=[{p.index}]",
        )
    if p.sliding_window:
        raise KvcompileError(
            f"{where} attends to a sliding window, all of which is read",
            f"a window of {p.sliding_window} tokens",
            f"stack.{recall.policy}.skip_layers=[{p.index}]",
        )
    if s is not None and s.schedule.decode_every:
        raise KvcompileError(
            f"{where}: tokens are in groups while they are decoded, so they are dropped at the end of a prompt alone",
            f"stack.{s.policy}.decode_every={s.schedule.decode_every}",
            f"stack.{s.policy}.decode_every=0",
        )
    if s is not None and s.positions == "compact":
        raise KvcompileError(
            f"{where}: tokens in groups keep their positions",
            f"stack.{s.policy}.positions=compact",
            f"stack.{s.policy}.positions=original",
        )
    if s is not None and recall.heads == "shared" and s.allocation.traits.scope == "head":
        raise KvcompileError(
            f"{where}: KV heads that share a choice of blocks hold equally many tokens",
            f"{s.policy!r}, which gives each head a budget of its own",
            f"stack.{recall.policy}.heads=own",
        )
    if s is not None and p.storage.quantized and recall.grouping.reorders:
        raise KvcompileError(
            f"{where}: a later prompt selects among tokens in the order of the text, which encoded groups have lost",
            f"{s.policy!r}, {recall.policy!r} and {p.storage.policy!r} in one stack",
            "drop one, or take a recall that leaves tokens where they are (quest)",
        )


def _check_far(plan: Plan, p: LayerPlan, recall: Recall) -> None:
    """Of a recall at a constant distance: positions of all layers move alike, and keys can be turned."""
    where, fix = f"{recall.policy}: layer {p.index}", f"stack.{recall.policy}.far=original"
    if p.storage.quantized or p.storage.rotated or p.storage.centred:
        raise KvcompileError(
            f"{where}: keys are turned to one distance, and must be stored plain for that",
            p.storage.text("the model's dtype"),
            fix,
        )
    for other in plan.owners:
        if other.selection is not None:
            raise KvcompileError(
                f"{where}: tokens at one distance are all there, so that positions of all layers move alike",
                f"{other.selection.policy!r}, which drops some in layer {other.index}",
                fix,
            )
        if other.rotates and other.recall != recall:
            kind = f"attends to a sliding window of {other.sliding_window}" if other.sliding_window else "reads all"
            raise KvcompileError(
                f"{where}: far tokens are at one distance in every layer, or in none",
                f"layer {other.index}, which {kind}",
                fix if other.sliding_window else f"stack.{recall.policy}.skip_layers=[], or {fix}",
            )


def _check_latent(p: LayerPlan, latent: Latent) -> None:
    if latent.native:
        _check_native(p)
        return
    where = f"mla: layer {p.index}"
    if p.key_norm:
        raise KvcompileError(
            f"{where}: keys that are normed after their projection are no linear function of a latent",
            "q/k norms",
            "policy=[gqa] or policy=[cla] instead",
        )
    if p.owner != p.index or p.heads is not None:
        other = "shares another layer's cache" if p.owner != p.index else "has merged heads"
        raise KvcompileError(
            f"{where}: a latent is made of the model's own keys and values", f"a layer that {other}", "drop one"
        )
    dense = 2 * latent.kv_heads * p.head_dim
    if latent.rank < 1 or latent.width > dense:
        raise KvcompileError(
            f"{where}: a latent row has 1 to {dense} numbers (rank + rope), as many as all keys and values",
            f"rank {latent.rank}, rope {latent.rope}",
        )
    if p.storage.quantized or p.storage.rotated or p.storage.centred:
        raise KvcompileError(
            f"{where}: a latent row keeps the model's dtype, in the basis of its factorisation",
            f"{p.storage.policy!r} after 'mla'",
            "a smaller stack.mla.rank instead",
        )


def _check_native(p: LayerPlan) -> None:
    """Of a model that caches latents itself: one row is all that its query heads share."""
    s, storage = p.selection, p.storage
    where = f"layer {p.index} of this model caches one latent row a token for all heads"
    if s is not None and s.allocation.traits.scope == "head":
        raise KvcompileError(
            f"{s.policy}: {where}, so that there are no heads to have budgets of their own",
            f"allocation {type(s.allocation).__name__}",
            "a policy that keeps equally many tokens in all heads, such as snapkv",
        )
    if storage.rotated or storage.centred or storage.low is not None or storage.key != storage.value:
        raise KvcompileError(
            f"{storage.policy}: {where}, of which keys and values are parts: it has one number format",
            "another basis, a mean of keys, or two formats",
            "int8, fp8, nf4 or kivi without these",
        )


def _check_storage(p: LayerPlan) -> None:
    s = p.storage
    where = f"{s.policy or 'storage'}: layer {p.index}"
    skip = f"stack.{s.policy}.skip_layers=[{p.index}]" if s.policy else None
    if p.owner != p.index:
        raise KvcompileError(
            f"{where} has no cache of its own, so how it is stored cannot be set",
            f"a layer that reads layer {p.owner}'s",
            skip,
        )
    if s.quantized and p.sliding_window:
        raise KvcompileError(
            f"{where} attends to a sliding window, which is kept in the model's dtype",
            f"a window of {p.sliding_window} tokens",
            skip,
        )
    if s.page % s.block:
        raise KvcompileError(
            f"{where}: a page holds whole groups of tokens that share scales",
            f"pages of {s.page}, groups of {s.block}",
            "put paged last in the stack",
        )
    if p.selection is not None and p.selection.positions == "compact" and (s.quantized or s.rotated or s.centred):
        raise KvcompileError(
            f"{where}: compact positions rotate stored keys, which must then be plain",
            s.text("the model's dtype") if s.quantized else "rotated" if s.rotated else "centred",
            f"stack.{p.selection.policy}.positions=original",
        )
    if s.centred:
        _check_centred(where, p)
    for codec, dim in ((s.key, p.key_dim), (s.value, p.key_dim if p.latent else p.value_dim)):
        if codec is not None:
            _check_codec(where, codec, dim)


def _check_centred(where: str, p: LayerPlan) -> None:
    """Nothing may see what all keys of a head have in common."""
    if p.softcap or p.sink:
        kind = "a soft-cap of its logits" if p.softcap else "a sink beside its keys"
        raise KvcompileError(
            f"{where}: keys may lose their mean where a softmax sees differences of logits alone", kind, "drop center"
        )
    if p.selection is not None and p.selection.score.needs.absolute:
        raise KvcompileError(
            f"{where}: the score measures keys themselves, which are less their mean",
            f"{p.selection.policy!r} and 'center' in one stack",
            "drop one, or take a score by attention (snapkv, ghost, kvzip)",
        )


def _check_tiers(p: LayerPlan) -> None:
    """Tiers are chosen by a selection and lie, token by token, in one stretch of memory a row."""
    low, tiers = p.storage.low, p.selection.tiers if p.selection is not None else None
    if p.owner != p.index or (low is None and tiers is None):
        return
    where = f"{p.storage.policy or 'tiers'}: layer {p.index}"
    if low is None or tiers is None or not p.storage.quantized:
        raise KvcompileError(
            f"{where}: two tiers need a selection that says which entries are high, and number formats for both",
            f"{'no ' if tiers is None else ''}selection of tiers, {'one format' if low is None else 'two formats'}",
        )
    codecs = (*p.storage.codecs("float32"), *low)
    if any(codec.axis != "token" for codec in codecs) or p.storage.residual:
        raise KvcompileError(
            f"{where}: entries change their tier one by one, so that each has its own scales, and none is residual",
            f"{', '.join(codec.name for codec in codecs)}, residual {p.storage.residual}",
        )
    if p.storage.page:
        raise KvcompileError(
            f"{where}: the entries of a tier lie in one stretch of memory", f"pages of {p.storage.page}", "drop paged"
        )
    if p.recall is not None:
        raise KvcompileError(
            f"{where}: recall chooses among entries in the order of their positions, which tiers do not keep",
            f"{p.recall.policy!r} beside it",
            "drop one",
        )
    if p.selection is not None and p.selection.demotes:
        _check_demotion(where, p.selection, tiers)
    for codec, dim in zip(low, (p.head_dim, p.value_dim), strict=True):
        _check_codec(where, codec, dim)


def _check_demotion(where: str, s: Selection, tiers: Tiers) -> None:
    queries = s.uncertainty.needs.queries if s.uncertainty else 0
    if tiers.alpha is None or not isinstance(s.recent, int) or not queries or s.recent > queries:
        raise KvcompileError(
            f"{where}: decoded tokens change the tiers by a threshold of the attention received, which is counted from "
            "as many queries as tokens always stay high, or more",
            f"alpha {tiers.alpha}, {s.recent} recent tokens, attention of {queries} queries",
        )
    if s.schedule.decode_every:
        raise KvcompileError(
            f"{where}: decoded tokens change the tiers one by one, or the selection is applied again every few",
            f"decode_every={s.schedule.decode_every}",
        )


def _check_codec(where: str, codec: Codec, dim: int) -> None:
    if codec.axis == "channel" and codec.group < 1:
        raise KvcompileError(f"{where}: scales per channel need a group of tokens", codec.group, "a group of 1 or more")
    if codec.axis == "token" and codec.group and dim % codec.group:
        raise KvcompileError(f"{where}: the group must divide the head size {dim}", codec.group, f"a divisor of {dim}")
    if codec.bits < 8 and dim * codec.bits % 8:
        raise KvcompileError(f"{where}: packed codes of a token must fill whole bytes", f"{dim} of {codec.bits} bits")
