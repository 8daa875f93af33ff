"""A vanilla and a block transformer of one decode cost, trained from scratch on one text for the same minutes.

    python benchmarks/block_race.py --minutes 10 --out benchmarks/results/block_race

Contenders: `vanilla`; `block`, of the same width and as many layers as cost the same bytes a decoded token; and
`block, same layers`. They train in turns, by the same seconds, on the same sequences, each with its learning rate by
its own share of the time, and are measured on the same held-out text. The cost of a decoded token at a batch and a
context is what is read for it,

    weights / batch + keys and values,

of a block transformer the mean over a block of L tokens, for which its block decoder runs once. Tokens are bytes, or
those of SmolLM2 (`--tokens smollm2`). Text: the offline text, or a file (`--text`); its last eighth is held out.
Writes <out>.json, <out>.md and <out>.png.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator, ScalarFormatter
from tabulate import tabulate
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from kvcompile.adapters.architectures import describe
from kvcompile.build import build
from kvcompile.calibration.text import HELD_OUT
from kvcompile.evaluation.perplexity import forward
from kvcompile.heal.blocks.student import block_student
from kvcompile.heal.corpus import Blocks as Sequences
from kvcompile.heal.student import student
from kvcompile.models.sharing import shared
from kvcompile.plan.blocks import Blocks
from kvcompile.plan.plan import Plan
from kvcompile.structure.convert import convert, reshape

WARM_UP, LEAST = 0.05, 0.02  # of the time; of the peak learning rate
COLOURS = ("#8795a1", "#12876f", "#e08a1e")


@dataclass
class Contender:
    """One model in training. curve: (seconds, tokens, held-out loss in nats a token)."""

    name: str
    model: Any
    plan: Plan
    learner: Any
    optimizer: Any
    seconds: float = 0.0
    steps: int = 0
    losses: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))  # held out, by token, at last
    curve: list[tuple[float, int, float]] = field(default_factory=list)


def vanilla(args: argparse.Namespace, layers: int, vocabulary: int) -> Any:
    """A llama of this width, untrained; heads of 64 channels, embeddings tied to the head."""
    torch.manual_seed(args.seed)
    heads = args.width // 64
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.width,
        intermediate_size=64 * round(args.width * 8 / 3 / 64),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,  # neither text has it
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).float().eval()


def planned(model: Any, args: argparse.Namespace, blocks: bool) -> Plan:
    """The plan of the model as it is, or divided in the middle."""
    plan = describe(model.config)
    if blocks:
        plan = replace(plan, blocks=Blocks(args.block, len(plan.layers) // 2, args.embedder))
    plan.check()
    return plan


def cost(model: Any, plan: Plan, context: int, batch: int) -> dict[str, float]:
    """Bytes read, and FLOPs of weights, for one decoded token of one sequence."""
    base, runs = model.model, [1.0] * len(model.model.layers)  # passes of each layer's weights a token
    passes, extra = list(runs), 0
    if plan.blocks is not None:
        length, split, prefix = plan.blocks.length, plan.blocks.split, plan.blocks.prefix
        runs = [1 / length if i < split else 1.0 for i in range(len(runs))]
        passes = [1 / length if i < split else (prefix + length) / length for i in range(len(passes))]
        once = [base.block_expansion, *([base.block_embedder] if plan.blocks.embedder == "mean" else [])]
        extra = sum(p.numel() for module in once for p in module.parameters()) / length
    layers = [sum(p.numel() for p in layer.parameters()) for layer in base.layers]
    head = model.lm_head.weight.numel()
    read = sum(n * r for n, r in zip(layers, runs, strict=True)) + extra + head
    return {
        "bytes": 4 * read / batch + sum(row.read for row in plan.bytes(1, context)),
        "flops": 2 * (sum(n * r for n, r in zip(layers, passes, strict=True)) + extra + head),
    }


def equal_layers(args: argparse.Namespace, vocabulary: int) -> int:
    """The number of layers, even, at which a block transformer comes nearest to the vanilla model's cost."""

    def bytes_of(layers: int, blocks: bool) -> float:
        with torch.device("meta"):
            model = vanilla(args, layers, vocabulary)
        plan = planned(model, args, blocks)
        convert_anew(model, plan)
        return cost(model, plan, args.context, args.batch)["bytes"]

    first, second = bytes_of(2, True), bytes_of(4, True)  # two layers more cost the same everywhere
    return max(2, 2 + 2 * round((bytes_of(args.layers, False) - first) / (second - first)))


def convert_anew(model: Any, plan: Plan) -> None:
    """The modules of a block transformer, also on a meta model."""
    (reshape if model.device.type == "meta" else convert)(model, plan)


def contender(name: str, args: argparse.Namespace, layers: int, vocabulary: int, blocks: bool) -> Contender:
    """An untrained model and what trains it."""
    model = vanilla(args, layers, vocabulary)
    plan = planned(model, args, blocks)
    convert_anew(model, plan)
    learner = (block_student if blocks else student)(shared(model), plan, 0.0, 1.0).train()
    optimizer = torch.optim.AdamW(learner.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    return Contender(name, model, plan, learner, optimizer)


def train(c: Contender, data: Sequences, args: argparse.Namespace, seconds: float) -> None:
    """Train for so many seconds more."""
    c.learner.train()
    until = c.seconds + seconds
    while c.seconds < until:
        began = time.perf_counter()
        x = c.seconds / (60 * args.minutes)
        shape = LEAST + (1 - LEAST) * (1 + math.cos(math.pi * min(x, 1.0))) / 2
        for group in c.optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, max(x / WARM_UP, LEAST)) * shape
        rows = [data[(c.steps * args.sequences + i) % len(data)]["input_ids"] for i in range(args.sequences)]
        c.optimizer.zero_grad()
        c.learner(torch.stack(rows))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(c.learner.parameters(), 1.0)
        c.optimizer.step()
        c.steps += 1
        c.seconds += time.perf_counter() - began


@torch.no_grad()
def evaluate(c: Contender, windows: Tensor, args: argparse.Namespace) -> float:
    """Held-out nats a token, and a point of the curve."""
    c.learner.eval()
    logits = torch.cat([logits_of(c, row[None]) for row in windows])
    targets = windows[:, 1:]
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    c.losses, mean = losses.mean(0), float(losses.mean())
    c.curve.append((round(c.seconds, 1), c.steps * args.sequences * args.length, mean))
    return mean


def logits_of(c: Contender, ids: Tensor) -> Tensor:
    """Logits `[B, n, vocabulary]` of whole sequences, as in training."""
    if c.plan.blocks is not None:
        logits: Tensor = c.learner.blockwise(ids)[0]
        return logits
    positions = torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device).expand(ids.shape)
    return c.learner.kvcompile.graph(ids, None, positions, c.learner.new_cache(), slice(None))  # type: ignore[no-any-return]


@torch.inference_mode()
def speeds(contenders: list[Contender], ids: Tensor, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Tokens decoded a second by batch, models in turns, and bytes of the cache of a sequence after the prompt."""
    compiled = {c.name: build(shared(c.model), c.plan) for c in contenders}
    rows: dict[str, list[dict[str, float]]] = {c.name: [] for c in contenders}
    steps = args.block * args.decoded
    for batch in args.batches:
        prompts = torch.stack([ids[i * 31 : i * 31 + args.context] for i in range(batch)])
        taken: dict[str, list[float]] = {name: [] for name in compiled}
        held: dict[str, int] = {}
        for round_ in range(args.rounds + 1):  # the first one warms up
            for name, model in compiled.items():
                logits, cache = forward(model, prompts)
                held[name] = cache.nbytes()
                began = time.perf_counter()
                for _ in range(steps):
                    logits, cache = forward(model, logits.argmax(-1, keepdim=True), cache)
                if round_:
                    taken[name].append(batch * steps / (time.perf_counter() - began))
        for name, found in taken.items():
            rows[name].append({"batch": batch, "tokens/s": statistics.median(found), "cache bytes": held[name] / batch})
    return rows


def texts(args: argparse.Namespace) -> tuple[Tensor, Tensor, int, float]:
    """Ids to train on and held out, the size of the vocabulary, and bytes a token of what is held out."""
    if args.text:
        text = args.text.read_text(encoding="utf-8")
    else:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    cut = len(text) - len(text) // HELD_OUT
    parts = text[:cut], text[cut:]
    if args.tokens == "bytes":
        ids, vocabulary = [list(part.encode()) for part in parts], 256
    else:
        from kvcompile.config.schema import ModelConfig
        from kvcompile.models.loading import load

        _, tokenizer = load(ModelConfig())
        ids, vocabulary = [tokenizer(part)["input_ids"] for part in parts], len(tokenizer)
    train_ids, held_out = (torch.tensor(part, dtype=torch.int64, device="cpu") for part in ids)
    return train_ids, held_out, vocabulary, len(parts[1].encode()) / len(held_out)


def result(c: Contender, args: argparse.Namespace, speed: list[dict[str, float]], nbytes: float) -> dict[str, Any]:
    """What one contender came to, as plain data."""
    length = args.block  # the first loss is that of token 1, the second one of a block
    by_place = [float(c.losses[(place - 1) % length :: length].mean()) for place in range(length)]
    return {
        "layers": len(c.plan.layers),
        "parameters": sum(p.numel() for p in c.model.parameters()),
        "blocks": None if c.plan.blocks is None else asdict(c.plan.blocks),
        "cost": cost(c.model, c.plan, args.context, args.batch),
        "steps": c.steps,
        "tokens": c.steps * args.sequences * args.length,
        "seconds": round(c.seconds, 1),
        "loss": c.curve[-1][2],
        "bits a byte": c.curve[-1][2] / math.log(2) / nbytes,
        "loss by place in a block": by_place,
        "speed": speed,
        "curve": c.curve,
    }


def table(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """The contenders side by side."""
    head = ["", *found]

    def row(label: str, *value: Any) -> list[str]:
        return [label, *value]

    batches = {b: [next(s for s in r["speed"] if s["batch"] == b) for r in found.values()] for b in args.batches}
    rows = [
        row("layers", *(str(r["layers"]) for r in found.values())),
        row("parameters", *(f"{r['parameters'] / 1e6:.2f} M" for r in found.values())),
        row("MB read a decoded token", *(f"{r['cost']['bytes'] / 1e6:.2f}" for r in found.values())),
        row("MFLOP of weights a decoded token", *(f"{r['cost']['flops'] / 1e6:.2f}" for r in found.values())),
        row("tokens trained on", *(f"{r['tokens']:,}" for r in found.values())),
        row("held-out loss, nats a token", *(f"{r['loss']:.4f}" for r in found.values())),
        row("held-out bits a byte", *(f"{r['bits a byte']:.4f}" for r in found.values())),
        *(
            row(
                f"loss of token {i + 1} of each {args.block}",
                *(f"{r['loss by place in a block'][i]:.3f}" for r in found.values()),
            )
            for i in range(args.block)
        ),
        row("cache, KB a sequence", *(f"{s['cache bytes'] / 1e3:.1f}" for s in batches[args.batches[0]])),
        *(row(f"tokens/s, batch {b}", *(f"{s['tokens/s']:,.0f}" for s in cells)) for b, cells in batches.items()),
    ]
    return tabulate(rows, head, tablefmt="pipe", disable_numparse=True)


def draw(found: dict[str, dict[str, Any]], nbytes: float) -> Figure:
    """Loss over minutes, and tokens a second over the batch."""
    figure = Figure(figsize=(8.4, 3.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for (name, r), colour in zip(found.items(), COLOURS, strict=False):
        seconds, _, losses = zip(*r["curve"][1:], strict=True)
        bits = [loss / math.log(2) / nbytes for loss in losses]
        left.plot([s / 60 for s in seconds], bits, color=colour, label=f"{name.split(',')[0]}, {r['layers']} layers")
        right.plot([s["batch"] for s in r["speed"]], [s["tokens/s"] for s in r["speed"]], "o-", color=colour)
    left.set(title="Held-out bits a byte", xlabel="minutes of training")
    right.set(title="Tokens decoded a second", xlabel="batch", xscale="log", yscale="log")
    right.set_xticks([s["batch"] for s in next(iter(found.values()))["speed"]])
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter(ScalarFormatter())
    right.xaxis.set_minor_locator(NullLocator())
    right.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 1)))
    left.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#d5dce2", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, of each contender")
    parser.add_argument("--turn", type=float, default=15.0, help="seconds that one trains before the next does")
    parser.add_argument("--text", type=Path, help="a UTF-8 file (default: the offline text)")
    parser.add_argument("--tokens", choices=("bytes", "smollm2"), default="bytes")
    parser.add_argument("--layers", type=int, default=6, help="of the vanilla model")
    parser.add_argument("--width", type=int, default=256, help="channels, a multiple of 64")
    parser.add_argument("--block", type=int, default=4)
    parser.add_argument("--embedder", choices=("lookup", "mean"), default="lookup")
    parser.add_argument("--context", type=int, default=512, help="of the cost, and of the prompts decoded after")
    parser.add_argument("--batch", type=int, default=1, help="at which costs are equal")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence in training")
    parser.add_argument("--sequences", type=int, default=4, help="of a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--windows", type=int, default=16, help="held-out sequences")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64], help="that are decoded")
    parser.add_argument("--decoded", type=int, default=8, help="blocks of tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Train in turns, measure, write."""
    args = parsed()
    train_ids, held_out, vocabulary, nbytes = texts(args)
    equal = equal_layers(args, vocabulary)
    wanted = (("vanilla", args.layers, False), ("block", equal, True), ("block, same layers", args.layers, True))
    contenders = [contender(name, args, layers, vocabulary, blocks) for name, layers, blocks in wanted]
    data = Sequences(train_ids, args.length, 10**6, args.seed)
    step = (len(held_out) - args.length) // max(1, args.windows - 1)
    windows = torch.stack([held_out[i * step : i * step + args.length] for i in range(args.windows)])
    while contenders[-1].seconds < 60 * args.minutes:
        for c in contenders:
            if not c.steps:
                evaluate(c, windows, args)
            train(c, data, args, min(args.turn, 60 * args.minutes - c.seconds))
            print(f"{c.name}: {c.seconds:.0f} s, {c.steps} steps, {evaluate(c, windows, args):.4f}", flush=True)
    speed = speeds(contenders, held_out, args)
    found = {c.name: result(c, args, speed[c.name], nbytes) for c in contenders}
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"command": sys.argv[1:], "machine": machine, "text": len(train_ids), "contenders": found}
    args.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    draw(found, nbytes).savefig(args.out.with_suffix(".png"), dpi=120)
    head = f"{time.strftime('%Y-%m-%d')}, {machine}\n\n    python {' '.join(sys.argv)}\n"
    said = (
        f"{args.minutes:g} minutes of training each, in turns, on a text of {len(train_ids):,} tokens ({args.tokens}). "
        f"Costs are those of a token decoded at batch {args.batch} behind {args.context} tokens, as near as whole "
        "layers come for the first two contenders. The first token of each block is "
        "predicted from blocks alone, the last one also from the tokens before it: so the loss by place."
    )
    body = f"{head}\n{said}\n\n{table(found, args)}\n\n![Loss and speed]({args.out.name}.png)\n"
    args.out.with_suffix(".md").write_text(body, encoding="utf-8")
    print(body)


if __name__ == "__main__":
    main()
