"""How a report reads: the same tables on screen and in Markdown."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.markup import escape
from rich.table import Table as RichTable
from tabulate import tabulate

from kvcompile.evaluation.needle import NeedleResult
from kvcompile.evaluation.speed import Comparison
from kvcompile.heal.record import HealRecord
from kvcompile.report.markdown import inline
from kvcompile.report.units import size

if TYPE_CHECKING:
    from rich.console import Console

    from kvcompile.evaluation.proof import LayerRow
    from kvcompile.report.report import Report

Verdict = Literal["better", "worse", "wrong", ""]
COLOUR: dict[Verdict, str] = {"better": "green", "worse": "bold red", "wrong": "bold red", "": ""}
NOISE = 0.05  # timings within this share of each other are no verdict


@dataclass(frozen=True)
class Cell:
    """A value, and whether it is better or worse than the uncompressed model's."""

    text: str
    verdict: Verdict = ""


Row = tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table of the report; `first` columns are text, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[Row]
    first: int = 1


def tables(report: Report) -> list[Table]:
    """The report's tables: summary, needle by length and depth, layers."""
    tables = [_summary(report)]
    if report.needle is not None:
        tables.append(_needle(*report.needle, *(report.needle_hidden or ())[1:]))
    if report.healed is not None:
        tables.append(_healed(report.healed))
    if report.exports:
        tables.append(_exports(report.exports))
    return [*tables, _layers(report)]


def markdown(report: Report) -> str:
    """The report as Markdown; values worse than the uncompressed model's are bold and marked."""
    parts = [f"# {inline(report.title)}", _facts(report, inline), "![Budget and needle](report.png)"]
    parts += [f"> **Warning:** {inline(w)}" for w in report.warnings]
    shown = tables(report)
    if report.needle is not None:
        shown.append(_answers(*report.needle, *(report.needle_hidden or ())[1:]))
    parts += [_section(table) for table in shown]
    return "\n\n".join(parts) + "\n"


def before_and_after(report: Report) -> str:
    """The summary alone, as a section of Markdown."""
    return _section(_summary(report))


def _section(table: Table) -> str:
    mark: dict[Verdict, str] = {"better": "{}", "worse": "**{}** (worse)", "wrong": "**{}** (wrong)", "": "{}"}
    rows = [[mark[c.verdict].format(inline(c.text)) for c in row] for row in table.rows]
    align = ["left"] * table.first + ["right"] * (len(table.header) - table.first)
    grid = tabulate(rows, table.header, tablefmt="pipe", colalign=align, disable_numparse=True)
    return f"## {table.title}\n\n{grid}"


def show(report: Report, console: Console) -> None:
    """Print the tables: worse in red, better in green."""
    console.print(f"\n[bold]{escape(report.title)}[/bold]", highlight=False)
    console.print(escape(_facts(report, str)), highlight=False)
    for table in reversed(tables(report)):  # the summary last, where the eye is
        grid = RichTable(title=table.title, title_justify="left", title_style="bold")
        for place, name in enumerate(table.header):
            grid.add_column(name, justify="left" if place < table.first else "right")
        for row in table.rows:
            grid.add_row(*(_coloured(cell) for cell in row))
        console.print(grid)
    for warning in report.warnings:
        console.print(f"[bold red]Warning:[/bold red] {escape(warning)}", highlight=False)


def _summary(report: Report) -> Table:
    rows = _bytes(report)
    rows.append((Cell("equal to the plan"), Cell(""), Cell(_kept_promise(report)), Cell("")))
    rows.append(_change("cache per prompt token", *report.per_token, size, -1))
    if report.parameters is not None:
        rows.append(_change("parameters", *report.parameters, "{:,.0f}".format, -1))
    if report.needle is not None:
        rows.append(_share("needle, question seen", *report.needle))
    if report.needle_hidden is not None:
        rows.append(_share("needle, question hidden", *report.needle_hidden))
    if report.perplexity is not None:
        rows.append(_change("perplexity, cached", *report.perplexity, perplexity, -1))
    if report.speed is not None:
        rows += _speed(report.speed, report.tokens)
    return Table("Before and after", ("", "uncompressed", "compiled", "change"), rows)


def _bytes(report: Report) -> list[Row]:
    """What is held, on the device and beside it, and what a decode step reads."""
    rows = [_change(f"cache after {report.tokens:,} tokens", report.dense_bytes, report.bytes_held, size, -1)]
    if report.index_bytes:
        rows.append((Cell("index of its groups"), Cell(size(0)), Cell(size(report.index_bytes)), Cell("")))
    if report.host_bytes or report.index_bytes:
        rows.append(_change("on the device between tokens", report.dense_bytes, report.device_bytes, size, -1))
    if report.host_bytes:
        rows.append((Cell("in host memory"), Cell(size(0)), Cell(size(report.host_bytes)), Cell("")))
    rows.append(_change("read per decode step", report.dense_read, report.read_bytes, size, -1))
    if report.recalls:
        kept, read = report.bytes_held / report.dense_bytes, report.read_bytes / report.dense_read
        rows.append((Cell("kept, and read"), Cell(_shares(1, 1)), Cell(_shares(kept, read)), Cell("")))
    if report.cluster_recall is not None:
        rows.append((Cell("cluster recall"), Cell(f"{1:.1%}"), Cell(f"{report.cluster_recall:.1%}"), Cell("")))
    return rows


def _shares(kept: float, read: float) -> str:
    return f"kept {kept:.1%}, read {read:.1%}"


def _kept_promise(report: Report) -> str:
    own = [r for r in report.rows if r.owner is None]
    free = [r for r in own if r.planned is None]
    thresholds = sum(r.threshold for r in free)
    parts = []
    if len(free) < len(own):
        parts.append(f"{_count(len(own) - len(free), 'layer')}: every head")
    if len(free) > thresholds:
        parts.append(f"{_count(len(free) - thresholds, 'layer')}: {report.planned_total or 0:,} tokens")
    if thresholds:
        parts.append(f"{_count(thresholds, 'layer')}: threshold, no plan")
    return ", ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _speed(speed: Comparison, proved: int) -> list[Row]:
    """Times and sizes; the change is the median over rounds, each against its own neighbour.

    proved: tokens of the one prompt whose cache has a row already.
    """
    first, *_, last = speed.speeds
    old, new = speed.speeds[first], speed.speeds[last]
    at = f"{new.context:,} tokens" + (f" x {new.batch}" if new.batch > 1 else "")
    cache = _change(f"cache, {at}", old.cache_bytes, new.cache_bytes, size, -1)
    again = f"{new.read_again:,} tokens, {new.read_again / (new.context * new.batch):.2f} prefills"
    replayed = (Cell("read again in a prefill, by its replay"), Cell("0"), Cell(again), Cell(""))
    return [
        _ratio(f"prefill, {at}", f"{old.prefill_s:.2f} s", f"{new.prefill_s:.2f} s", speed.prefill_ratio[last]),
        *([replayed] if new.read_again else []),
        _ratio(
            f"decode, {at}",
            f"{old.decode_tokens_s:.1f} tokens/s",
            f"{new.decode_tokens_s:.1f} tokens/s",
            speed.decode_ratio[last],
        ),
        *([] if (new.context, new.batch) == (proved, 1) else [cache]),
        _change(f"peak memory growth, {at}", old.peak_bytes, new.peak_bytes, size, -1, NOISE),
    ]


def _ratio(name: str, old: str, new: str, ratio: float) -> Row:
    verdict = _verdict(1.0, ratio, 1, NOISE)
    return (Cell(name), Cell(old), Cell(new, verdict), Cell(f"{ratio:.2f}x as fast", verdict))


def _layers(report: Report) -> Table:
    heads = Cell(str(sum(r.kv_heads for r in report.rows if r.owner is None)))
    total = sum(r.planned_bytes for r in report.rows)
    rows = [_layer(row) for row in report.rows]
    rows.append((Cell("all"), heads, Cell(""), *_sizes(report.bytes_held, total, report.dense_bytes)))
    header: tuple[str, ...] = ("layer", "KV heads", "tokens kept per head", "held", "planned", "dense", "kept")
    if report.recalls:
        reading = [(row.index_bytes, row.read, row.dense_read, row.cluster_recall) for row in report.rows]
        reading.append((report.index_bytes, report.read_bytes, report.dense_read, report.cluster_recall))
        header = (*header, "index", "read per step", "read", "cluster recall")
        rows = [(*row, *_reading(*numbers)) for row, numbers in zip(rows, reading, strict=True)]
    return Table(f"Layers after {report.tokens:,} tokens", header, rows, first=3)


def _reading(index: int, read: int, dense: int, recall: float | None) -> Row:
    verdict = _verdict(dense, read, -1)
    share = f"{read / dense:.1%}" if dense else ""
    recalled = "" if recall is None else f"{recall:.1%}"
    return (Cell(size(index)), Cell(size(read), verdict), Cell(share, verdict), Cell(recalled))


def _exports(exports: dict[str, dict[str, int]]) -> Table:
    rows = [
        (Cell(exporter), Cell(f"export/{exporter}/{name}"), Cell(size(count)))
        for exporter, files in exports.items()
        for name, count in (*files.items(), ("", sum(files.values())))
    ]
    return Table("Exports", ("exporter", "file", "size"), rows, first=2)


def _layer(row: LayerRow) -> Row:
    heads, tokens = str(row.kv_heads), " ".join(map(str, row.kept))
    if row.owner is not None:
        heads, tokens = "", f"reads layer {row.owner}"
    elif any(row.low):
        tokens = " ".join(f"{n} ({low} low)" for n, low in zip(row.kept, row.low, strict=True))
    elif len(row.kept) > 1 and len(set(row.kept)) == 1:
        tokens = f"{row.kept[0]} each"
    sizes = _sizes(row.bytes, row.planned_bytes, row.dense_bytes)
    return (Cell(str(row.layer)), Cell(heads), Cell(tokens), *sizes)


def _sizes(nbytes: int, planned: int, dense: int) -> Row:
    verdict = _verdict(dense, nbytes, -1)
    kept = f"{nbytes / dense:.1%}" if dense else ""
    return (Cell(size(nbytes), verdict), Cell(size(planned)), Cell(size(dense)), Cell(kept, verdict))


def _healed(record: HealRecord) -> Table:
    """Perplexity on the way: before the conversion, after it, after the training."""
    original, converted, healed = record.perplexity
    rows = [
        (Cell("original"), Cell(perplexity(original)), Cell("")),
        (Cell("converted"), Cell(perplexity(converted), "worse"), Cell(f"{converted / original:,.2f}x")),
        (
            Cell(f"healed: {record.gap_closed:.1%} of the gap closed"),
            Cell(perplexity(healed), _verdict(converted, healed, -1)),
            Cell(f"{healed / original:,.2f}x"),
        ),
    ]
    facts = {
        "trained on": f"{record.tokens:,} tokens of {record.source}",
        "weights": f"{record.parameters:,} ({record.weights})",
        "loss": record.loss,
        "time": f"{record.seconds / 60:.1f} minutes, {record.steps:,} steps",
    }
    rows += [(Cell(name), Cell(value), Cell("")) for name, value in facts.items()]
    return Table("Healing: perplexity of held-out text", ("", "", "of the original's"), rows)


def _needle(before: NeedleResult, seen: NeedleResult, *hidden: NeedleResult) -> Table:
    """Scores by text, form, length and depth: uncompressed, and compiled with the question seen and hidden."""
    every = (before, seen, *hidden)
    rows = [_scores_of(f"all ({_count(len(seen.records), 'prompt')})", every)]
    for name, text in (
        ("haystack", "in {}"),
        ("form", "form {}"),
        ("length", "{:,} tokens"),
        ("depth", "depth {:.0%}"),
    ):
        values = sorted({getattr(r, name) for r in seen.records})
        if len(values) > 1:
            rows += [_scores_of(text.format(v), [_only(result, name, v) for result in every]) for v in values]
    return Table("Needle in a haystack", ("", "uncompressed", "seen", "hidden")[: 1 + len(every)], rows)


def _answers(before: NeedleResult, seen: NeedleResult, *hidden: NeedleResult) -> Table:
    rows = [
        (
            Cell(f"{old.form} in {old.haystack}, {old.tokens:,} tokens, depth {old.depth:.0%}"),
            Cell(old.answer),
            *(Cell(r.text.strip(), "" if r.right else "wrong") for r in (old, *new)),
        )
        for old, *new in zip(before.records, *(result.records for result in (seen, *hidden)), strict=True)
    ]
    settings = ("question seen", "question hidden")[: 1 + len(hidden)]
    return Table("Needle answers", ("prompt", "number", "uncompressed", *settings), rows, first=3 + len(settings))


def _only(result: NeedleResult, name: str, value: Any) -> NeedleResult:
    return NeedleResult(tuple(r for r in result.records if getattr(r, name) == value))


def _share(name: str, before: NeedleResult, after: NeedleResult) -> Row:
    verdict = _verdict(before.mean, after.mean, 1)
    points = f"{100 * (after.mean - before.mean):+.0f} points" if after.mean != before.mean else "none"
    return (*_scores_of(name, (before, after)), Cell(points, verdict))


def _scores_of(name: str, results: Sequence[NeedleResult]) -> Row:
    """Shares of right answers with their intervals; the first is the uncompressed model's."""
    before, *others = results
    after = (Cell(_interval(result), _verdict(before.mean, result.mean, 1)) for result in others)
    return (Cell(name), Cell(_interval(before)), *after)


def _interval(result: NeedleResult) -> str:
    low, high = result.interval
    return f"{result.mean:.0%} ({100 * low:.0f}-{100 * high:.0f})"


def _change(name: str, old: float, new: float, text: Callable[[float], str], sign: int, noise: float = 0.0) -> Row:
    verdict = _verdict(old, new, sign, noise)
    return (Cell(name), Cell(text(old)), Cell(text(new), verdict), Cell(_changed(old, new), verdict))


def _changed(old: float, new: float) -> str:
    """The change in percent; tenfold and more as a factor."""
    if new == old or not old or math.isnan(new):
        return "none" if new == old else ""
    return f"{new / old:,.0f}x" if new >= 10 * old else f"{new / old - 1:+.1%}"


def _verdict(old: float, new: float, sign: int, noise: float = 0.0) -> Verdict:
    """`sign` 1: more is better, -1: less is. What is no number (NaN) is worse than any."""
    if math.isnan(new):
        return "worse"
    if abs(new - old) <= noise * abs(old):
        return ""
    return "better" if (new - old) * sign > 0 else "worse"


def perplexity(value: float) -> str:
    """Three decimals, or none where it is large."""
    return f"{value:.3f}" if value < 1000 else f"{value:,.0f}"


def _facts(report: Report, text: Callable[[str], str]) -> str:
    lines = {
        "model": report.model,
        "recipe": report.recipe,
        "policies": " -> ".join(report.policies) or "none",
        "versions": ", ".join(f"{name} {number}" for name, number in report.versions.items()),
        "machine": report.machine,
        "graph passes": ", ".join(f"{name} {times}" for name, times in report.passes.items()),
        "kernels": ", ".join(f"{name} ({_count(times, 'layer')})" for name, times in Counter(report.kernels).items()),
        "decode step": report.decode_step,
        "weights": report.weights,
    }
    return "\n".join(f"- {name}: {text(value)}" for name, value in lines.items() if value)


def _coloured(cell: Cell) -> str:
    colour = COLOUR[cell.verdict]
    return f"[{colour}]{escape(cell.text)}[/]" if colour else escape(cell.text)
