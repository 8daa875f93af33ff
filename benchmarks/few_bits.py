"""Weights in few bits: what they cost in perplexity and in a prompt, and what they save.

    OMP_NUM_THREADS=1 python benchmarks/few_bits.py --models "" MODEL.gguf --out benchmarks/results/few_bits

Perplexity of text read through a cache that keeps everything, one token at a time behind a context, over windows of two
texts: `x` is exp of the mean difference of the loss, paired by window, with its standard error over windows.
`prompt x`: seconds of a prompt of `--tokens` with floats over those with few bits, medians of rounds in turns. Bytes
are those of all weights, embeddings beside a head of its own included; `a step` those that one token reads.

A checkpoint that comes from a file of 4 bits lies on a grid that int4 holds as it is. `turned` rows are of the same
function off that grid: norms folded into what reads them, the residual stream turned by a random rotation.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from decode_linear import seconds
from decode_step import bytes_read
from tables import show

import kvcompile
from kvcompile.calibration.text import sentences
from kvcompile.config.schema import ModelConfig
from kvcompile.evaluation.perplexity import of_windows, spread
from kvcompile.kernels.names import WEIGHTS
from kvcompile.models.loading import load
from kvcompile.models.sharing import shared
from kvcompile.report.units import size
from kvcompile.structure.pack import weight_bytes

CONTEXT, SCORED = 512, 64


def losses(model: Any, windows: torch.Tensor) -> list[float]:
    """Mean loss of each window."""
    return [math.log(of_windows(model, row[None], CONTEXT)) for row in windows]


def paired(own: list[float], base: list[float]) -> str:
    """exp(mean difference), and its standard error."""
    apart = [a - b for a, b in zip(own, base, strict=True)]
    ratio = math.exp(statistics.mean(apart))
    return f"{ratio:.4f} ± {ratio * statistics.stdev(apart) / len(apart) ** 0.5:.4f}"


@torch.no_grad()
def turned(model: Any) -> Any:
    """The same function of a llama or qwen2, its weights turned: x Q in place of x, with Q orthogonal, by a seed."""
    width = model.config.hidden_size
    noise = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turn = torch.linalg.qr(noise)[0]

    def reads(linear: Any, norm: Any) -> None:
        folded = linear.weight.double() * norm.weight.double()
        linear.weight = torch.nn.Parameter((folded @ turn).to(linear.weight.dtype))

    def writes(linear: Any) -> None:
        linear.weight = torch.nn.Parameter((turn.T @ linear.weight.double()).to(linear.weight.dtype))

    inner, embeddings, norms = model.model, model.model.embed_tokens.weight.double(), [model.model.norm]
    reads(model.lm_head, inner.norm)
    model.config.tie_word_embeddings = False
    inner.embed_tokens.weight = torch.nn.Parameter((embeddings @ turn).to(model.dtype))
    for layer in inner.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            reads(linear, layer.input_layernorm)
        for linear in (mlp.gate_proj, mlp.up_proj):
            reads(linear, layer.post_attention_layernorm)
        writes(attention.o_proj)
        writes(mlp.down_proj)
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    for norm in norms:
        norm.weight.fill_(1.0)
    return model


def rows_of(path: str, dtype: str, off_grid: bool, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One model in one dtype: floats, then each format."""
    original, tokenizer = load(ModelConfig(**({"pretrained": path} if path else {}), dtype=dtype))
    original = turned(original) if off_grid else original
    models = {"floats": kvcompile.compile(shared(original))}
    models |= {each: kvcompile.compile(shared(original), overrides=[f"model.weights={each}"]) for each in WEIGHTS}
    ids = [tokenizer(" ".join(sentences(text)), return_tensors="pt").input_ids[0] for text in args.texts]
    windows = torch.cat([spread(each, CONTEXT, SCORED, args.windows) for each in ids])
    prompt = ids[0][None, : args.tokens]
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.rounds):
        for name, model in models.items():
            taken[name].append(seconds(lambda model=model: model(prompt, logits_to_keep=1)))
    loss = {name: losses(model, windows) for name, model in models.items()}
    rounded = {f"{name}": model for name, model in models.items() if name != "floats"}
    return [
        {
            "model": (Path(path).stem or "SmolLM2-135M") + ", turned" * off_grid,
            "dtype": dtype,
            "weights": name,
            "bytes": size(weight_bytes(model)),
            "a step": size(bytes_read(original, rounded, name)),
            "perplexity": round(math.exp(statistics.mean(loss[name])), 3),
            "x": paired(loss[name], loss["floats"]),
            "windows": len(windows),
            "prompt x": round(statistics.median(a / b for a, b in zip(taken["floats"], taken[name], strict=True)), 2),
        }
        for name, model in models.items()
    ]


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[""], help="paths; '' is the default model")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--texts", nargs="+", default=["reference:last", "library:last"])
    parser.add_argument("--windows", type=int, default=8, help="of each text")
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt that is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    args = parser.parse_args()
    with torch.inference_mode():
        rows = [
            row
            for path in args.models
            for dtype in args.dtypes
            for off_grid in (False, True)
            for row in rows_of(path, dtype, off_grid, args)
        ]
    show(args.out, rows)


if __name__ == "__main__":
    main()
