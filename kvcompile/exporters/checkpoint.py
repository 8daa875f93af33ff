"""What a plain checkpoint can hold of a plan: weights in the shape of a stock class, nothing that acts at run time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvcompile.errors import KvcompileError
from kvcompile.plan.plan import LayerPlan, Plan
from kvcompile.plan.storage import PLAIN

SHARING = "gemma3n and gemma4"  # the only stock classes in which layers read the cache of another
USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (cls.from_pretrained("<this folder>") for cls in (AutoModelForCausalLM, AutoTokenizer))
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=30)[0]))
```"""


def require_plain(plan: Plan, model_config: Any, weights_only: bool, option: str) -> None:
    """Raise KvcompileError for what a checkpoint of the model's own class cannot express.

    weights_only: leave policies behind that act on the cache at run time; `option` is what sets it.
    """
    from kvcompile.adapters.architectures import architecture_of

    kind, grouped = model_config.model_type, architecture_of(model_config).grouped
    for p in plan.layers:
        if p.owner != p.index and not p.shared:
            raise KvcompileError(
                f"no stock class of transformers lets layers of {kind!r} read another layer's cache ({SHARING} do, "
                f"whose norms and scales {kind!r} has not)",
                f"layer {p.index} reading layer {p.owner}",
            )
        if p.latent is not None and not p.latent.native:
            raise KvcompileError(
                f"no stock class of {kind!r} caches a latent in place of keys and values",
                f"'mla' in layer {p.index}",
            )
        if p.heads is not None and not grouped:
            raise KvcompileError(
                f"the stock class of {kind!r} has as many KV heads as query heads",
                f"{p.kv_heads} and {p.query_heads} in layer {p.index}",
            )
    if weights_only:
        return
    for p in plan.layers:
        policy = acting(p)
        if policy:
            raise KvcompileError(
                "a checkpoint holds weights, and no policy that acts on the cache while the model runs",
                f"{policy!r} in layer {p.index}",
                f"{option}=true to leave it behind",
            )


def acting(p: LayerPlan) -> str | None:
    """The policy that acts on a layer's cache at run time; None: none. Rotation and mean keys alone change nothing."""
    for part in (p.selection, p.recall):
        if part is not None:
            return part.policy
    s = replace(p.storage, rotated=False, centred=0, policy="")
    if s == PLAIN:
        return None
    return "paged" if s.page else "offload" if s.offload else p.storage.policy
