"""Duet, the model: a llama whose keys and values come out of one projection."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward


class DuetConfig(LlamaConfig):
    """As llama's."""

    model_type = "duet"


class DuetAttention(LlamaAttention):
    """`kv_proj` in place of `k_proj` and `v_proj`."""

    def __init__(self, config: DuetConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.kv_proj = nn.Linear(config.hidden_size, 2 * config.num_key_value_heads * self.head_dim, bias=False)
        del self.k_proj, self.v_proj

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """As llama's, but for where keys and values come from."""
        tokens = hidden_states.shape[:-1]
        queries = self.q_proj(hidden_states).view(*tokens, -1, self.head_dim).transpose(1, 2)
        keys, values = self.kv_proj(hidden_states).view(*tokens, -1, self.head_dim).transpose(1, 2).chunk(2, dim=1)
        queries, keys = apply_rotary_pos_emb(queries, keys, *position_embeddings)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(self, queries, keys, values, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*tokens, -1)), weights


class DuetForCausalLM(LlamaForCausalLM):
    """A llama with this attention."""

    config_class = DuetConfig

    def __init__(self, config: DuetConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = DuetAttention(config, index)
        self.post_init()


AutoConfig.register("duet", DuetConfig)
AutoModelForCausalLM.register(DuetConfig, DuetForCausalLM)
