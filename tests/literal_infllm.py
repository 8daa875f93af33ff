"""InfLLM word for word: the forward pass of a tiny llama in float64 with a Python list of blocks, slow and plain."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvcompile.policies.infllm import InfLLM


def turned(x: Tensor, at: Tensor, inv_freq: Tensor) -> Tensor:
    """Vectors `[..., n, D]` before rotation, at positions `at [n]`."""
    angle = torch.cat((at.double()[:, None] * inv_freq,) * 2, -1)
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat((-second, first), -1) * angle.sin()


@dataclass
class Layer:
    """Unrotated keys and values of every token `[H, n, D]`, what it received `[H, n]`, and what stands for blocks."""

    keys: Tensor
    values: Tensor
    received: Tensor
    blocks: list[Tensor] = field(default_factory=list)  # [H, D] each
    chosen: list[list[int]] = field(default_factory=list)  # tokens that each pass read, KV head 0


class Literal:
    """The model under an `InfLLM` policy, one sequence at a time."""

    def __init__(self, model: Any, policy: InfLLM) -> None:
        self.model, self.policy = copy.deepcopy(model).double(), policy
        c = self.model.config
        self.heads, self.dim = c.num_key_value_heads, c.head_dim
        self.group = c.num_attention_heads // self.heads
        inv = 1.0 / c.rope_parameters["rope_theta"] ** (torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim)
        self.inv_freq = inv
        empty = torch.zeros(self.heads, 0, self.dim, dtype=torch.float64)
        self.layers = [Layer(empty, empty, empty[..., 0]) for _ in self.model.model.layers]
        self.furthest = 0.0

    @torch.no_grad()
    def read(self, ids: Tensor, prompt: bool, last: bool = True) -> Tensor:
        """Logits `[n, vocabulary]` of the next tokens `ids [n]`, read together; the last chunk asks by its last one."""
        self.last = last
        base = self.model.model
        x = base.embed_tokens(ids)
        for layer, of in zip(base.layers, self.layers, strict=True):
            x = x + self.attention(layer.self_attn, of, layer.input_layernorm(x))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            self.make_blocks(of, prompt)
        return self.model.lm_head(base.norm(x))

    def rotary(self, of: Layer) -> Tensor:
        """The rotary position of every token: sinks first, blocks at 0, the window right after the sinks."""
        at, covered = torch.arange(of.keys.shape[1]), len(of.blocks) * self.policy.block
        if self.policy.far == "original":
            return at
        s = self.policy.sinks
        return torch.where(at < s, at, torch.where(at < s + covered, 0, at - covered))

    def attention(self, attn: Any, of: Layer, x: Tensor) -> Tensor:
        n = len(x)

        def heads(y: Tensor) -> Tensor:
            return y.view(n, -1, self.dim).transpose(0, 1)

        queries = heads(attn.q_proj(x))
        of.keys = torch.cat((of.keys, heads(attn.k_proj(x))), 1)
        of.values = torch.cat((of.values, heads(attn.v_proj(x))), 1)
        of.received = torch.cat((of.received, torch.zeros(self.heads, n, dtype=torch.float64)), 1)
        at, total = self.rotary(of), of.keys.shape[1]
        keys, asks = turned(of.keys, at, self.inv_freq), turned(queries, at[-n:], self.inv_freq)
        self.furthest = max(self.furthest, float(at[-1]))
        constant = self.policy.far == "constant"
        level = turned(queries, at[-1:].expand(n), self.inv_freq) if constant else asks
        query = level[:, -1] if self.last else level.mean(1)
        wanted = self.wanted(of, query.view(self.heads, self.group, self.dim), total)
        out = torch.zeros(n, self.heads * self.group, self.dim, dtype=torch.float64)
        for h in range(self.heads):
            for q in range(h * self.group, (h + 1) * self.group):
                for i in range(n):
                    past = [j for j in wanted[h] if j <= total - n + i]
                    weights = (keys[h, past] @ asks[q, i] * self.dim**-0.5).softmax(0)
                    out[i, q] = weights @ of.values[h, past]
                    of.received[h, past] += weights
        of.chosen.append(wanted[0])
        return attn.o_proj(out.flatten(1))

    def wanted(self, of: Layer, queries: Tensor, total: int) -> list[list[int]]:
        """The tokens that each KV head reads, by the mean query `[H, g, D]` of the chunk."""
        p = self.policy
        scores = torch.zeros(self.heads, len(of.blocks), dtype=torch.float64)
        for j, representative in enumerate(of.blocks):
            scores[:, j] = (queries @ representative.unsqueeze(-1)).mean((1, 2))
        if p.heads == "shared":
            scores = scores.sum(0, keepdim=True).expand(self.heads, -1)
        tokens = []
        for h in range(self.heads):
            left, inside = int(p.budget), []
            for j in sorted(range(len(of.blocks)), key=lambda j: -float(scores[h, j])):
                start = p.sinks + j * p.block
                inside += range(start, start + min(left, p.block))
                left = max(0, left - p.block)
            behind = range(p.sinks + len(of.blocks) * p.block, total)
            tokens.append([*range(min(p.sinks, total)), *sorted(inside), *behind])
        return tokens

    def make_blocks(self, of: Layer, prompt: bool) -> None:
        """Blocks of tokens that have left the window."""
        p = self.policy
        start = p.sinks + len(of.blocks) * p.block
        count = max(0, of.keys.shape[1] - start - p.recent) // p.block
        if not count or (not prompt and count * p.block < p.every):
            return
        for j in range(start, start + count * p.block, p.block):
            at = torch.zeros(p.block) if p.far == "constant" else torch.arange(j, j + p.block)
            keys = turned(of.keys[:, j : j + p.block], at, self.inv_freq)
            best = [
                sorted(range(p.block), key=lambda i: -float(of.received[h, j + i]))[: p.strongest]
                for h in range(self.heads)
            ]
            of.blocks.append(torch.stack([keys[h, best[h]].mean(0) for h in range(self.heads)]))
