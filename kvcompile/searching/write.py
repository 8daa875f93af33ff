"""What is left of a search: the recipe, a report as Markdown and JSON, and the picture of what was tried."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from kvcompile.searching.fit import as_part
from kvcompile.searching.page import html
from kvcompile.searching.run import Result
from kvcompile.searching.study import Tried
from kvcompile.searching.verify import Proof
from kvcompile.tasks.scores import Estimate, by_part, quality

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

    from kvcompile.config.schema import Config

RECIPE = "found"
REPORT, DATA, PICTURE, PAGE = "report.md", "search.json", "front", "front.html"
DPI = 150


def write(result: Result, config: Config) -> None:
    """Write everything into the folder of a search; the recipe as `recipe/found.yaml`, so that it is a config dir."""
    folder = result.folder
    (folder / DATA).write_text(json.dumps(_plain(result, config), indent=1) + "\n", encoding="utf-8")
    (folder / REPORT).write_text(report(result, config), encoding="utf-8")
    if result.every:
        _draw(result, config, [folder / f"{PICTURE}.{kind}" for kind in ("png", "svg")])
        (folder / PAGE).write_text(html(result, config, _model(config)), encoding="utf-8")
    if result.best is not None:
        path = folder / "recipe" / f"{RECIPE}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(recipe(result, config), encoding="utf-8")


def show(result: Result, config: Config, console: Console) -> None:
    """Print the report."""
    from rich.markdown import Markdown

    lines = report(result, config).splitlines()
    console.print(Markdown("\n".join(line for line in lines if not line.startswith("!["))))
    console.print(f"{result.folder / REPORT}", markup=False, highlight=False, soft_wrap=True)


def recipe(result: Result, config: Config) -> str:
    """The best stack as a recipe: `kvcompile --config-dir <folder of the search> recipe=found`."""
    stack = result.stack
    content: dict[str, Any] = {"defaults": [{"override /policy": list(stack.options)}]}
    if fields := {name: values for name, values in stack.plain().items() if values}:
        content["stack"] = fields
    lines = ["# @package _global_", f"# Found by kvcompile search: {_verdict(result)}", f"# {command(config)}"]
    text: str = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
    return "\n".join([*lines, text])


def command(config: Config, folder: Path | str = "D") -> str:
    """The command line that compiles what was found; the folder of the search is named as its user sees fit."""
    return shlex.join(["kvcompile", "--config-dir", str(folder), f"recipe={RECIPE}", *_model(config)])


def _model(config: Config) -> list[str]:
    given = {key: getattr(config.model, key) for key in ("pretrained", "architecture")}
    return [f"model={config.model.name}", *(f"model.{key}={value}" for key, value in given.items() if value)]


def report(result: Result, config: Config) -> str:
    """The whole report."""
    wanted = config.search
    head = f"{config.model.name}, {wanted.tokens:,} tokens, the question {config.question}"
    parts = [f"# Search: {_wished(result)}", f"{head}. {_counts(result)}", _table(result)]
    if result.every:
        parts.append(f"![What was tried]({PICTURE}.svg)")
    if result.best is not None:
        parts += [_proofs(result), _verdict(result, full=True), _commands(result, config)]
    return "\n\n".join(parts) + "\n"


def _wished(result: Result) -> str:
    wish = result.wish
    said = [] if wish.bytes is None else [f"at most {as_part(wish.bytes)} of the bfloat16 bytes"]
    said += [] if wish.quality is None else [f"at least {wish.quality:.0%} of the answers"]
    said = said or ["bytes and quality open"]
    return ", ".join(said + ([f"perplexity at most {wish.perplexity:g} times"] if wish.perplexity else []))


def _counts(result: Result) -> str:
    rungs: dict[int, int] = {}
    for each in result.every:
        for rung in each.scores:
            rungs[rung.contexts] = rungs.get(rung.contexts, 0) + 1
    asked = ", ".join(f"{count} on {contexts} contexts" for contexts, count in sorted(rungs.items()))
    return f"{len(result.every)} stacks measured ({asked or 'none'}), {result.refused} refused by their plan."


def _table(result: Result) -> str:
    from tabulate import tabulate

    if not result.front:
        return "No stack was measured: there was no time for one."
    rows = [[*_numbers(t), _stack(t)] for t in result.front]
    header = ["bytes", "excess", "answers kept", "perplexity", "contexts", "stack"]
    table = tabulate(rows, header, "github", disable_numparse=True)
    return (
        "As the search saw it. Excess: nats a token of the right answers, over the uncompressed model's; answers kept: "
        f"exact ones, as a share of its.\n\n{table}"
    )


def _numbers(t: Tried) -> list[str]:
    last = t.scores[-1]
    kept = "-" if last.quality is None else f"{last.quality:.0%}"
    perplexity = "-" if last.perplexity is None else f"{last.perplexity:.3f}"
    return [as_part(t.share), f"{last.excess:+.3f} ± {last.error:.3f}", kept, perplexity, str(last.contexts)]


def _stack(t: Tried) -> str:
    return f"`{' '.join(t.stack.overrides)}`"


def _proofs(result: Result) -> str:
    if not result.proofs:
        return "**Not verified**: there was no time. The same command goes on, with more `search.minutes`."
    return "\n\n".join(["## Verified on what the search never saw", *map(_proof, result.proofs)])


def _proof(proof: Proof) -> str:
    from tabulate import tabulate

    dense = by_part(proof.dense)
    rows = []
    for part, records in by_part(proof.records).items():
        exact = all(r.score in (0.0, 1.0) for r in (*records, *dense[part]))
        rows.append(
            [part, *(_estimate(quality(each, exact), records[0].nll is None) for each in (dense[part], records))]
        )
    table = tabulate(rows, ["part", "uncompressed (95 %)", "stack (95 %)"], "github", disable_numparse=True)
    return f"`{' '.join(proof.stack.overrides)}`, {as_part(proof.share)} of the bytes as measured:\n\n{table}"


def _estimate(e: Estimate, share: bool) -> str:
    if not share:
        return f"perplexity {e.value:.2f} ({e.low:.2f}-{e.high:.2f})"
    return f"{100 * e.value:.0f} ({100 * e.low:.0f}-{100 * e.high:.0f}) of {e.answers}"


def _verdict(result: Result, full: bool = False) -> str:
    """One line on the best stack: what the search saw, what the proof says, and whether the wish is met."""
    if result.best is None:
        return ""
    seen, proof = result.best.scores[-1], result.proof
    kept = "no answers" if seen.quality is None else f"{seen.quality:.0%} of the answers"
    line = f"{as_part(result.best.share)} of the bytes; the search saw {kept} kept on {seen.contexts} contexts"
    if proof is None:
        return f"{line}; not verified."
    if proof.quality is None:
        return f"{line}; to unseen questions the uncompressed model gives no right answer."
    line += f"; on unseen ones {_percent(proof.quality)} stay"
    if proof.perplexity is not None:
        e = proof.perplexity
        line += f", perplexity {e.value:.3f} ({e.low:.3f}-{e.high:.3f}) times"
    misses = proof.misses(result.wish)
    if not full:
        return f"{line}{', which misses the wish' if misses else ''}."
    line += f" ({proof.quality.contexts} contexts, {proof.quality.answers} answers)."
    if misses:
        return f"{line} **The wish is missed: {'; '.join(misses)}.**"
    close = result.wish.quality is not None and proof.quality.low < result.wish.quality
    return f"{line} **The wish is met{', though the interval reaches below it' if close else ''}.**"


def _percent(e: Estimate) -> str:
    return f"{100 * e.value:.0f} % ({100 * e.low:.0f}-{100 * e.high:.0f})"


def _commands(result: Result, config: Config) -> str:
    long = shlex.join(["kvcompile", *result.overrides, *_model(config)])
    return f"The recipe is `recipe/{RECIPE}.yaml` in this folder, D:\n\n    {command(config)}\n\nor\n\n    {long}"


def _plain(result: Result, config: Config) -> dict[str, Any]:
    """The result as data."""

    def tried(t: Tried) -> dict[str, Any]:
        scores = [each.plain() for each in t.scores]
        return {"number": t.number, "stack": list(t.stack.overrides), "share": t.share, "scores": scores}

    def proven(p: Proof) -> dict[str, Any]:
        found = {"quality": p.quality, "perplexity": p.perplexity}
        numbers = {key: None if e is None else vars(e) for key, e in found.items()}
        return {"stack": list(p.stack.overrides), "share": float(p.share), **numbers, "misses": p.misses(result.wish)}

    return {
        "search": vars(config.search),
        "model": config.model.name,
        "minutes": round(result.minutes, 2),
        "best": tried(result.best) if result.best else None,
        "front": [tried(t) for t in result.front],
        "proofs": [proven(p) for p in result.proofs],
        "tried": [tried(t) for t in result.every],
        "refused": result.refused,
    }


def _draw(result: Result, config: Config, paths: Sequence[Path]) -> None:
    """Bytes and excess of everything tried; what climbed higher is darker, the front is joined."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from kvcompile.report.plot import INK, look

    figure = Figure(figsize=(7.2, 4.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no window system
    ax = figure.subplots()
    _points(ax, result)
    ax.set_xlabel("bytes held, share of the bfloat16 cache")
    ax.set_ylabel("excess of the right answers, nats a token")
    look(ax)
    figure.suptitle(f"{config.model.name}: {_wished(result)}", x=0.01, ha="left", fontweight="bold", color=INK)
    for path in paths:
        figure.savefig(path)


def _points(ax: Axes, result: Result) -> None:
    from matplotlib.ticker import FuncFormatter

    from kvcompile.report.plot import DENSE, KEPT, LOSS

    highest = max(len(t.scores) for t in result.every)
    for height in range(1, highest + 1):
        some = [t for t in result.every if len(t.scores) == height]
        shade = 0.25 + 0.75 * height / highest
        label = f"{some[0].scores[-1].contexts} contexts" if some else None
        places = [t.share for t in some], [max(t.scores[-1].excess, 0.0) for t in some]
        ax.scatter(*places, s=14 + 8 * height, color=KEPT if height == highest else DENSE, alpha=shade, label=label)
    joined = sorted(result.front, key=lambda t: t.share)
    if result.wish.aims == 2 and len(joined) > 1:
        ax.plot([t.share for t in joined], [max(t.scores[-1].excess, 0.0) for t in joined], color=KEPT, linewidth=1)
    if result.best is not None:
        place = [result.best.share], [max(result.best.scores[-1].excess, 0.0)]
        ax.scatter(*place, s=90, facecolors="none", edgecolors=LOSS, linewidths=1.6, label="best")
    ax.set_yscale("symlog", linthresh=0.05)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: as_part(x)))
    ax.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: ""))
    ax.legend(frameon=False, fontsize=8)
