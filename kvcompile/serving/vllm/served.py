"""The folder that vLLM serves: what it can hold of a plan, and `plan.json`, from which the same plan is made again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvcompile.errors import KvcompileError, wrapped_errors
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.selection import Selection
from kvcompile.plan.storage import PLAIN
from kvcompile.serving.vllm.rules import PromptRule, rules
from kvcompile.stack import apply_stack, build_stack

if TYPE_CHECKING:
    from kvcompile.plan.policy import Policy

FORMAT = 1
FILE = "plan.json"
MODEL_TYPE = "kvcompile (serve with vllm and kvcompile[vllm])"  # shown to whoever opens the folder without the plugin
TESTED = "0.32"  # of vLLM
FACTS = (
    *("index", "query_heads", "kv_heads", "head_dim", "owner", "scale", "sliding_window", "softcap"),
    *("rotates", "rotary", "key_norm", "sink"),
)
INSTEAD = "an allocation that does: none, or pyramidkv"
SAMPLE = (64, 256, 4)  # budget, tokens and floor of a layer, to see how an allocation splits


@dataclass(frozen=True)
class Served:
    """What vLLM does to the caches of a model.

    plan: layers in the shape of the weights, and what is selected of them. rules: by layer. digest: of the plan.
    """

    plan: Plan
    rules: tuple[PromptRule | None, ...]

    @property
    def digest(self) -> str:
        """Of the plan."""
        return self.plan.digest()


def refuse(plan: Plan) -> None:
    """Raise KvcompileError, with the reason, for what one block table a layer cannot express."""
    for p in plan.layers:
        _refuse_storage(p)
    if not plan.selected:
        raise KvcompileError(
            "vLLM serves a model that keeps every token as it is", "a stack that drops none", "export=[hf]"
        )
    for p in plan.selected:
        if p.selection is not None:
            _refuse_selection(plan, p, p.selection)


def _refuse_storage(p: LayerPlan) -> None:
    where = f"layer {p.index}"
    if p.latent is not None and p.latent.native:
        raise KvcompileError("vLLM keeps latents in a cache of another kind, which the plugin does not know", where)
    if p.shared:
        raise KvcompileError("the plugin frees blocks of layers that read their own cache", f"{where} reads another's")
    if p.chunked or p.value_head:
        kind = "attention in chunks" if p.chunked else "values of another size than keys"
        raise KvcompileError(f"{kind}: never tried in vLLM with the plugin", where)
    if p.recall is not None:
        raise KvcompileError(
            "vLLM frees blocks of what is dropped, and a recall drops nothing", f"{p.recall.policy!r} in {where}"
        )
    if replace(p.storage, rotated=False, policy="") == PLAIN:
        return
    if p.storage.page or p.storage.offload:
        raise KvcompileError(
            "vLLM keeps caches in its own blocks, on its own device",
            f"{'paged' if p.storage.page else 'offload'!r} in {where}",
        )
    raise KvcompileError(
        "the number formats of a cache in vLLM are its own",
        f"{p.storage.policy!r} in {where}",
        "drop it from the stack, and serve with --kv-cache-dtype fp8",
    )


def _refuse_selection(plan: Plan, p: LayerPlan, s: Selection) -> None:
    _raise_first(
        p,
        s,
        {
            "a threshold keeps as many tokens as scores say, and vLLM's scheduler must know": (s.budget is None, None),
            "two precisions in one cache have no place in vLLM's blocks": (s.tiers, None),
            "vLLM reads a prompt once, and this selection wants it read again": (s.refit or s.schedule.replay, None),
        },
    )
    _refuse_allocation(plan, p, s)
    _refuse_score(p, s)
    _raise_first(
        p,
        s,
        {
            "keys that move to other positions cannot be shared by requests": (
                s.positions == "compact",
                f"stack.{s.policy}.positions=original",
            ),
            "vLLM drops tokens at the end of a prompt, not while it decodes": (
                s.schedule.decode_every,
                f"stack.{s.policy}.decode_every=0",
            ),
            "vLLM drops tokens at the end of a prompt, not between its chunks": (
                plan.prefill_chunk and s.schedule.between_chunks,
                "prefill_chunk=0",
            ),
            "a layer with a sliding window frees its blocks itself": (
                p.sliding_window,
                f"stack.{s.policy}.skip_layers=<those with a window>",
            ),
            "learned sinks beside dropped tokens were never tried in vLLM": (p.sink, None),
            "ALiBi beside dropped tokens was never tried in vLLM": (p.alibi, None),
        },
    )


def _refuse_score(p: LayerPlan, s: Selection) -> None:
    needs = s.score.needs
    _raise_first(
        p,
        s,
        {
            "its score wants every query at once, and vLLM reads a prompt in chunks": (
                needs.queries is None and not needs.carries,
                None,
            ),
            "its score looks at more than the cache and the queries": (needs.norms, None),
        },
    )


def _raise_first(p: LayerPlan, s: Selection, reasons: dict[str, tuple[object, str | None]]) -> None:
    """Raise KvcompileError for the first of the reasons that holds; each goes with its fix, if there is one."""
    for rule, (holds, fix) in reasons.items():
        if holds:
            raise KvcompileError(rule, f"{s.policy!r} in layer {p.index}", fix)


def _refuse_allocation(plan: Plan, p: LayerPlan, s: Selection) -> None:
    """One block table a layer: its heads keep as many tokens as one another, known from the length of the prompt."""
    place, count = plan.rank(p.index)
    budget, tokens, floor = SAMPLE
    split = s.allocation.static(place, count, max(2, p.kv_heads), budget, tokens, floor)
    _raise_first(
        p,
        s,
        {
            "vLLM's scheduler must know from a prompt's length what stays, and this allocation asks the scores": (
                split is None,
                INSTEAD,
            ),
            "the heads of a layer share one block table in vLLM, and must keep as many tokens as one another": (
                (split is not None and len(set(split)) > 1) or s.allocation.traits.scope == "head",
                INSTEAD,
            ),
        },
    )


def served(plan: Plan, policies: Sequence[Policy], classes: int) -> tuple[Served, dict[str, Any]]:
    """What vLLM makes of a compiled `plan`, and the contents of `plan.json`.

    policies: the stack of the plan. classes: see `rules`.
    Raises KvcompileError where the policies that select give another plan than the compiled one.
    """
    facts = {
        "format": FORMAT,
        "architecture": plan.architecture,
        "dtype": plan.dtype,
        "classes": classes,
        "policies": [{"name": p.name, "options": dataclasses.asdict(p)} for p in policies if p.family == "selection"],
        "layers": [{name: getattr(p, name) for name in FACTS} for p in plan.layers],
    }
    made = read(facts)
    if [p.selection for p in made.plan.layers] != [p.selection for p in plan.layers]:
        raise KvcompileError(
            "the policies of a served model must give what was compiled",
            "another selection",
            "compile the model from a recipe, and export it as it was compiled",
        )
    return made, facts | {"digest": made.digest}


def read(facts: dict[str, Any], digest: str | None = None) -> Served:
    """The contents of `plan.json` as a plan. Data only: names of policies and their options.

    digest: what the config says of the plan. Raises KvcompileError for another one, and for what is no plan.
    """
    with wrapped_errors(f"{FILE} must be what export=[vllm] wrote", "export again"):
        if facts["format"] != FORMAT:
            raise KvcompileError(f"its format must be {FORMAT}", facts["format"])
        layers = tuple(LayerPlan(**{name: layer[name] for name in FACTS}) for layer in facts["layers"])
        names = [policy["name"] for policy in facts["policies"]]
        stack = build_stack(names, {policy["name"]: policy["options"] for policy in facts["policies"]})
        plan = apply_stack(Plan(str(facts["architecture"]), str(facts["dtype"]), layers), stack)
        refuse(plan)
        made = Served(plan, rules(plan, int(facts["classes"])))
        if digest not in (None, made.digest):
            raise KvcompileError("the plan must be the one that config.json was written for", made.digest)
    return made
