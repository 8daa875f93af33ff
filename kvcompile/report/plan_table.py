"""`kvcompile plan=only`: what a stack will hold, layer by layer, before a weight is loaded."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

from kvcompile.plan.plan import LayerBytes, LayerPlan, Plan
from kvcompile.report.units import size

if TYPE_CHECKING:
    from rich.console import Console

    from kvcompile.config.schema import Config
    from kvcompile.plan.policy import Policy

GIB = 1 << 30
HEADINGS = ("layers", "KV heads", "kept per head", "precision", "bytes", "kept")
READING = ("index", "read per step", "read")  # of plans whose steps choose what they read
ENDLESS = 1 << 40  # tokens; a cache that still fits then does not grow with the prompt


def cache_bytes(plan: Plan, batch: int, tokens: int) -> tuple[int, int]:
    """(bytes held, bytes of the uncompressed model) after a prefill of `tokens` by `batch` sequences."""
    rows = plan.bytes(batch, tokens)
    return sum(row.bytes for row in rows), sum(row.dense_bytes for row in rows)


def headings(plan: Plan) -> tuple[str, ...]:
    """What stands over the columns of `rows_of`."""
    return HEADINGS + READING * recalls(plan)


def recalls(plan: Plan) -> bool:
    """Whether steps choose what they read of some layer."""
    return any(p.recall for p in plan.layers)


def reading(plan: Plan, batch: int, tokens: int) -> tuple[int, int]:
    """(bytes that a decode step reads, index included; that it reads uncompressed) after a prefill of `tokens`."""
    rows = plan.bytes(batch, tokens)
    return sum(row.read for row in rows), sum(row.dense_read for row in rows)


def total(plan: Plan, batch: int, tokens: int) -> str:
    """The three numbers in a sentence: held on the device, held in host memory, read per decode step."""
    nbytes, dense = cache_bytes(plan, batch, tokens)
    read, dense_read = reading(plan, batch, tokens)
    stays, away, _ = places(plan, batch, tokens)
    index = sum(row.index_bytes for row in plan.bytes(batch, tokens))
    groups = f" (index of groups {size(index)})" if recalls(plan) else ""
    return (
        f"on the device {size(stays)}{groups}, in host memory {size(away)}, read per decode step {size(read)}: "
        f"kept {nbytes / dense:.1%}, read {read / dense_read:.1%}"
    )


def places(plan: Plan, batch: int, tokens: int) -> tuple[int, int, int]:
    """(bytes that stay on the device, bytes in host memory between passes, most of these on the device at a time).

    An offloaded layer is on the device while it attends, and the next one comes meanwhile. An index stays.
    """
    rows = plan.bytes(batch, tokens)
    away = [row.host for row in rows if plan.layers[row.index].storage.offload]
    most = max((sum(away[i : i + 2]) for i in range(len(away))), default=0)
    return sum(row.bytes - row.host + row.index_bytes for row in rows), sum(away), most


def tokens_that_fit(plan: Plan, batch: int, memory: float, dense: bool = False) -> int | None:
    """The longest prompt whose cache fits in `memory` GiB of the device, for `batch` sequences; None: any length does.

    What is offloaded counts where it is on the device at a time.
    """

    def fits(tokens: int) -> bool:
        if dense:
            return cache_bytes(plan, batch, tokens)[1] <= memory * GIB
        stays, _, most = places(plan, batch, tokens)
        return stays + most <= memory * GIB

    if fits(ENDLESS):
        return None
    low, high = 0, ENDLESS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def summary(plan: Plan, config: Config) -> dict[str, float | int | str | None]:
    """The totals as one row, for the summary of a sweep."""
    wanted = config.plan
    nbytes, dense = cache_bytes(plan, wanted.batch, wanted.context)
    stays, away, _ = places(plan, wanted.batch, wanted.context)
    read, dense_read = reading(plan, wanted.batch, wanted.context)
    row: dict[str, float | int | str | None] = {"cache_bytes": nbytes, "dense_bytes": dense, "ratio": nbytes / dense}
    row.update(device_bytes=stays, host_bytes=away, read_bytes=read, read=read / dense_read)
    if wanted.memory:
        fit = tokens_that_fit(plan, wanted.batch, wanted.memory)
        row["tokens_that_fit"] = "any" if fit is None else fit
    return row


def show(plan: Plan, config: Config, console: Console, policies: Iterable[Policy] = ()) -> None:
    """Print the plan: a row for each run of layers alike, the total, the ratio, and what fits in the given memory.

    policies: those that made it; what they have yet to learn from the loaded model is told.
    """
    wanted = config.plan
    nbytes, dense = cache_bytes(plan, wanted.batch, wanted.context)
    console.print(table(plan, wanted.batch, wanted.context, title=f"{config.label}: {plan.architecture}"))
    console.print(f"total {size(nbytes)}, uncompressed {size(dense)}: {nbytes / dense:.1%}", highlight=False)
    console.print(total(plan, wanted.batch, wanted.context), highlight=False)
    _, away, most = places(plan, wanted.batch, wanted.context)
    if away:
        console.print(f"offloaded: up to {size(most)} more on the device while these layers attend", highlight=False)
    for policy in policies:
        if policy.uncalibrated:
            console.print(
                f"not calibrated: {policy.name} finds out {policy.uncalibrated} when a model is compiled; until then "
                "the rows above are an estimate",
                highlight=False,
            )
    for note in notes(plan):
        console.print(note, highlight=False)
    if wanted.memory:
        fit, before = (tokens_that_fit(plan, wanted.batch, wanted.memory, dense=d) for d in (False, True))
        console.print(
            f"{wanted.memory:g} GiB hold prompts of {_count(fit)} tokens, uncompressed {_count(before)} "
            f"(cache only, batch {wanted.batch})",
            highlight=False,
        )


def notes(plan: Plan) -> list[str]:
    """What of a plan is not exact though nothing is dropped: prompts in chunks over codes, or over what they choose."""
    between = [p for p in plan.owners if p.selection is None or p.selection.schedule.between_chunks]
    quantized = sorted({p.storage.policy for p in between if p.storage.quantized})
    choosing = sorted({p.recall.policy for p in between if p.recall is not None and p.recall.prompts})
    chunks = f"(prefill_chunk={plan.prefill_chunk:,}), so that its own logits are not exact"
    lines = [
        f"{name}: scores of all layers are ranked together, and nothing says that these mean the same in every layer."
        for name in sorted({p.selection.policy for p in plan.selected if p.selection and p.selection.mixes_units})
    ]
    if plan.blocks is not None:
        counting = sorted({x.policy for p in plan.owners for x in (p.selection, p.recall) if x is not None})
        also = f", also where {', '.join(counting)} counts tokens (budget, window, sinks)" if counting else ""
        lines.append(
            f"block_transformer: an entry of layers 0 to {plan.blocks.split - 1} is a block of {plan.blocks.length} "
            f"tokens{also}; read per step is the mean over the steps of a block."
        )
    replay = None if plan.replayed is None else plan.replayed.replay
    if replay is not None:
        policy = next(p.selection.replayer for p in plan.selected if p.selection is not None)
        lines.append(
            f"{policy}: a text is read again before tokens are dropped, in pieces of {replay.chunk:,}. A prefill takes "
            "several times as long, and a second copy of one sequence is held meanwhile."
        )
    if plan.prefill_chunk and quantized:
        what = f"{', '.join(quantized)}: later chunks of a prompt read the codes of earlier ones"
        lines.append(f"{what} {chunks}. prefill_chunk=0 reads a prompt exactly.")
    if plan.prefill_chunk and choosing:
        lines.append(f"{', '.join(choosing)}: later chunks of a prompt read what they choose of earlier ones {chunks}.")
    elif choosing:
        what = f"{', '.join(choosing)}: a prompt is read at once, all of it by every token and at its own positions"
        lines.append(f"{what}. prefill_chunk=512 looks up blocks in it, as the paper does.")
    return lines


def table(plan: Plan, batch: int, tokens: int, title: str) -> Table:
    """Layers x (KV heads, tokens kept per head, precision, bytes), consecutive layers alike in one row."""
    drawn = Table(title=f"{title}\nafter a prefill of {tokens:,} tokens, batch {batch}", title_justify="left")
    first, *others = headings(plan)
    drawn.add_column(first)
    for heading in others:
        drawn.add_column(heading, justify="right", overflow="fold")
    for cells in rows_of(plan, batch, tokens):
        drawn.add_row(*cells)
    return drawn


def rows_of(plan: Plan, batch: int, tokens: int) -> list[tuple[str, ...]]:
    """The plan as text by `headings`, one row for each run of layers alike."""
    runs = []
    rows = [_cells(p, row, plan.dtype) for p, row in zip(plan.layers, plan.bytes(batch, tokens), strict=True)]
    if recalls(plan):
        rows = [
            (*cells, size(row.index_bytes), size(row.read), f"{row.read / row.dense_read:.1%}")
            for cells, row in zip(rows, plan.bytes(batch, tokens), strict=True)
        ]
    for cells, run in itertools.groupby(enumerate(rows), key=lambda pair: pair[1]):
        numbers = [index for index, _ in run]
        span = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
        runs.append((span, *cells))
    return runs


def _cells(p: LayerPlan, row: LayerBytes, dtype: str) -> tuple[str, ...]:
    if p.owner != p.index:
        return str(p.kv_heads), f"reads layer {p.owner}", "", size(0), f"{0:.1%}"
    if row.kept is None:
        kept = f"{row.kept_total // p.kv_heads:,} on average, by input"
    else:
        low, high = min(row.kept), max(row.kept)
        kept = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    numbers = f"{dtype}, latent {p.latent.rank} + {p.latent.rope}" if p.latent else p.storage.text(dtype)
    return str(p.kv_heads), kept, numbers, size(row.bytes), f"{row.bytes / row.dense_bytes:.1%}"


def _count(tokens: int | None) -> str:
    return "any number of" if tokens is None else f"{tokens:,}"
