"""Exporter `deepseek`: a llama-like model with latents (policy mla) as a stock `DeepseekV3ForCausalLM`: same logits.

What the stock class has and we have not is filled so that it does nothing. Its experts: every layer is a dense one.
Its frequencies, one geometric row for all layers: `longrope` with a factor for each of those that any layer turns. Its
norm of the latent: one more number in it, a constant C that the bias of the down-projection sets, makes
|[c; C]| / sqrt(n) constant up to |c|^2 / 2 C^2 < 1e-6, and the norm's weight takes it back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kvcompile.errors import KvcompileError
from kvcompile.exporters.base import Exporter
from kvcompile.exporters.checkpoint import USAGE, acting
from kvcompile.plan.plan import Plan
from kvcompile.progress import no_foreign_bars

if TYPE_CHECKING:
    from torch import Tensor

TYPES = ("llama", "mistral", "smollm3")
KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings", "attention_dropout"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
SHARPNESS = 1e3  # C over the longest possible latent
NORM_EPS = 1e-6  # what transformers' class gives the norm of the latent


@dataclass(frozen=True)
class Deepseek(Exporter):
    """`AutoModelForCausalLM.from_pretrained(folder)`, without kvcompile: a `DeepseekV3ForCausalLM` of dense layers.

    Its cache holds latents too, a constant more than ours. In 16 bits the weight of its norm is rounded: float32 is
    exact to 1e-6.
    """

    name: ClassVar[str] = "deepseek"
    summary: ClassVar[str] = "stock DeepSeek-V3 checkpoint of a llama-like model with latents (policy mla)"
    usage: ClassVar[str] = USAGE

    def refuse(self, plan: Plan, model_config: Any) -> None:
        """Models without latents, of another family, and what DeepSeek's class has no place for."""
        if any(p.latent is None for p in plan.layers):
            raise KvcompileError("a DeepSeek checkpoint has a latent in every layer", "keys and values", "policy=[mla]")
        rope = (getattr(model_config, "rope_parameters", None) or {}).get("rope_type", "default")
        acts = [policy for p in plan.layers if (policy := acting(p))]
        reasons = {
            f"architecture {model_config.model_type!r}": model_config.model_type not in TYPES,
            "biases of queries": getattr(model_config, "attention_bias", False),
            "biases of the MLP": getattr(model_config, "mlp_bias", False),
            "a sliding window": any(p.sliding_window for p in plan.layers),
            f"{acts[:1]} acting on the cache": bool(acts),
            f"RoPE {rope!r}, which depends on the length": rope in ("dynamic", "longrope"),
        }
        for reason, wrong in reasons.items():
            if wrong:
                raise KvcompileError("the model must hold nothing that DeepSeek's class has no place for", reason)

    def write(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Config, generation config, weights and tokenizer, as transformers saves them."""
        with no_foreign_bars():
            to_deepseek(model).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def to_deepseek(model: Any) -> Any:
    """The stock model of a compiled one that `refuse` let pass, in its dtype, in eval mode."""
    import torch
    from transformers import DeepseekV3ForCausalLM

    from kvcompile.adapters.architectures import architecture_of

    plan: Plan = model.kvcompile.plan
    Deepseek().refuse(plan, model.config)
    turned = _frequencies(plan)
    config = _config(model, plan, turned)
    stock: Any = DeepseekV3ForCausalLM(config).to(model.dtype).eval()
    state = {name: x for name, x in model.state_dict().items() if ".self_attn." not in name}
    layers = getattr(model, model.base_model_prefix).layers
    attentions = architecture_of(model.config).attentions(model)
    with torch.no_grad():
        for index, (attention, layer) in enumerate(zip(attentions, layers, strict=True)):
            tensors = _attention(attention, plan, index, turned, config, layer.input_layernorm.weight)
            state |= {f"model.layers.{index}.self_attn.{name}": x.to(model.dtype) for name, x in tensors.items()}
    stock.load_state_dict(state)
    stock.generation_config = model.generation_config
    return stock


def _frequencies(plan: Plan) -> list[int]:
    """Every frequency as often as the layer that has it most often, ascending."""
    most: Counter[int] = Counter()
    for p in plan.layers:
        if p.latent is not None:
            most |= Counter(p.latent.frequencies)
    return sorted(most.elements())


def _config(model: Any, plan: Plan, turned: list[int]) -> Any:
    from transformers import DeepseekV3Config

    old, first = model.config, plan.layers[0]
    rotary = getattr(model, model.base_model_prefix).rotary_emb
    factors = [_factor(rotary.inv_freq[f]) for f in turned]
    ranks = [p.latent.rank for p in plan.layers if p.latent is not None]
    return DeepseekV3Config(
        **{name: getattr(old, name) for name in KEPT},
        num_key_value_heads=old.num_attention_heads,
        q_lora_rank=None,
        kv_lora_rank=max(ranks) + 1,
        qk_rope_head_dim=2 * len(turned),
        qk_nope_head_dim=first.head_dim,
        v_head_dim=first.head_dim,
        first_k_dense_replace=old.num_hidden_layers,
        num_mtp_layers=0,
        attention_bias=True,
        rope_interleave=False,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1.0,
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": float(rotary.attention_scaling),
            "original_max_position_embeddings": old.max_position_embeddings,
        },
    )


def _factor(frequency: Tensor) -> float:
    """x with 1 / x = frequency, to the bit of float32 where some x does that."""
    import torch

    first = 1 / frequency.float()
    beside = [
        torch.nextafter(first, torch.tensor(end, dtype=torch.float32, device="cpu")) for end in (0.0, float("inf"))
    ]
    return float(min((first, *beside), key=lambda x: abs(float(1 / x) - float(frequency))))


def _attention(
    attention: Any, plan: Plan, index: int, turned: list[int], config: Any, norm: Tensor
) -> dict[str, Tensor]:
    """The state of one stock attention: k_R at the layer's own frequencies, zeros at the others', and the constant."""
    import torch

    from kvcompile.structure.precision import precise

    p, latent = plan.layers[index], attention.latent
    how, rank, wide = p.latent, config.kv_lora_rank, config.qk_rope_head_dim
    if how is None:
        raise ValueError(f"layer {index} has no latent")
    at = _places(how.frequencies, turned)
    down, absorb, up = (precise(x) for x in (latent.down.weight, latent.absorb.weight, latent.up.weight))
    hidden, heads = down.shape[1], p.query_heads
    group = heads // absorb.shape[0]
    scale = p.scale * config.qk_head_dim**0.5  # the stock class divides by the root of its own head size

    # [c, zeros up to the common rank, C; k_R]
    rows = down.new_zeros(rank + wide, hidden)
    rows[: how.rank], rows[[rank + i for i in at]] = down[how.rope :], down[: how.rope]
    constant = SHARPNESS * float((down[how.rope :] * precise(norm)).norm()) * hidden**0.5
    bias = down.new_zeros(rank + wide)  # that of the latent's own projection was refused
    bias[rank - 1] = constant

    query = precise(attention.q_proj.weight).view(heads, p.head_dim, hidden)
    turns = query.new_zeros(heads, wide, hidden)
    turns[:, at] = absorb[:, : how.rope].repeat_interleave(group, 0) @ query
    expand = query.new_zeros(heads, 2 * p.head_dim, rank)
    expand[:, : p.head_dim, : how.rank] = absorb[:, how.rope :].mT.repeat_interleave(group, 0)
    expand[:, p.head_dim :, : how.rank] = up.repeat_interleave(group, 0)
    out, constants = attention.o_proj.weight, attention.o_proj.bias
    return {
        "q_proj.weight": torch.cat((query, turns), 1).flatten(0, 1) * scale,
        "kv_a_proj_with_mqa.weight": rows,
        "kv_a_proj_with_mqa.bias": bias,
        "kv_a_layernorm.weight": torch.full(
            (rank,), (constant**2 / rank + NORM_EPS) ** 0.5, dtype=torch.float64, device="cpu"
        ),
        "kv_b_proj.weight": expand.flatten(0, 1),
        "o_proj.weight": out,
        "o_proj.bias": out.new_zeros(hidden) if constants is None else constants,
    }


def _places(own: tuple[int, ...], turned: list[int]) -> list[int]:
    """Where a layer's k_R stands in the common one: its real parts, then its imaginary parts."""
    free: dict[int, list[int]] = {}
    for i, f in enumerate(turned):
        free.setdefault(f, []).append(i)
    real = [free[f].pop(0) for f in own]
    return real + [len(turned) + i for i in real]
