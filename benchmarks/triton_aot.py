"""Generated Triton kernels, compiled ahead of time for GPUs that are not here: registers, spills, shared memory.

    python benchmarks/triton_aot.py --out benchmarks/results/triton_aot.md

Every spec that a shipped recipe leads to, on the shapes of Llama 3 8B (group 4, 128 channels) and of the default model
(group 3, 64 channels), then other formats, head dims and features; with one new token (`one`) and with many; and where
a score averages the attention of the last queries of a prompt, what adds that up (`window`). Then what moves the
entries that a selection keeps, by bytes of an entry (and tokens that share it), what scores the groups that a step may
recall, and what scores entries by what their own text looks back at (ghosts).
`--sample`: a few of them, for the tests. `--recall`: only attention to what a step chooses, and what scores groups.
`--ghosts`: only what scores ghosts.
What was compiled once comes from Triton's own cache. Exits with 1 where a kernel spills for an unknown reason, or takes
more shared memory than the target has. Nothing is run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tabulate import tabulate

from kvcompile.kernels.choose import ChooseSpec
from kvcompile.kernels.compact import CompactSpec
from kvcompile.kernels.reference.ghost import GhostSpec
from kvcompile.kernels.spec import KernelSpec, Part, plain
from kvcompile.plan.ghost import GhostRule
from kvcompile.plan.plan import Plan
from kvcompile.plan.storage import Codec

KIVI4 = Codec("int4", "channel", 32), Codec("int4", "token", 32)
KIVI2 = Codec("int2", "channel", 32), Codec("int2", "token", 32)
KIVI42 = Codec("int4", "channel", 32), Codec("int2", "token", 32)
INT8 = Codec("int8", "token"), Codec("int8", "token")
FP8 = Codec("float8", "token"), Codec("float8", "token")
Job = tuple[KernelSpec, str, str, str]
SHAPES = {
    "float16": {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8},
    "float32": {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3},
}
TARGETS = ("sm_80", "sm_90", "gfx942")
# Registers a thread at which one more program of 128 or 256 threads fits on a multiprocessor (64 Ki registers, in 8s).
# ptxas goes down to them and spills a few bytes for it: the int4 kernel of many tokens takes 128 registers and spills
# 16 bytes on sm_90, and told that it may take 168 (Triton's maxnreg), it takes 164 and spills nothing.
THRESHOLDS, FEW = (64, 80, 96, 128, 168), 32
UNEXPLAINED = "to be explained"
EXPLAINED = "ptxas chose fewer registers so that one more program fits on a multiprocessor, at the price of this spill"


def spec(parts: tuple[Part, ...], group: int = 4, dim: int = 128) -> KernelSpec:
    """A spec without window, soft-cap and scores."""
    return KernelSpec(parts, group, dim, dim, dim**-0.5)


def body(layout: str, codecs: tuple[Codec, Codec], dtype: str = "float16") -> tuple[Part, ...]:
    """Codes and their residual in the model's type."""
    return Part(layout, *codecs, 32 if layout == "paged" else 0), *plain(
        "ragged" if layout == "paged" else layout, dtype
    )


def paged(dtype: str, page: int = 16) -> tuple[Part, ...]:
    """Rows in pages."""
    return (replace(plain("paged", dtype)[0], page=page),)


def plans() -> Iterator[tuple[str, str, Plan]]:
    """The dtype, the recipe and the plan of every recipe on the shapes of two models."""
    from transformers import LlamaConfig

    from kvcompile.build import plan_of
    from kvcompile.config.compose import compose

    for dtype, shape in SHAPES.items():
        for recipe in sorted(f.name.removesuffix(".yaml") for f in files("kvcompile.recipes.recipe").iterdir()):
            config = compose([f"recipe={recipe}"])
            yield dtype, recipe, plan_of(LlamaConfig(**shape), dtype, config, config.policies())


def of_recipes(window: bool = False) -> dict[tuple[KernelSpec, str], list[str]]:
    """Specs and dtypes of the queries, and the recipes that lead to them, on the shapes of two models.

    window: those of column sums for scores, in place of those that attend.
    """
    from kvcompile.runtime.cache import KVCache

    found: dict[tuple[KernelSpec, str], list[str]] = {}
    for dtype, recipe, plan in plans():
        cache = KVCache(plan)
        for p in plan.layers:
            specs = (*cache.kernels.first(p.index), *cache.kernels.expected(p.index))
            if window:
                asked = p.selection is not None and p.selection.averages
                specs = tuple(cache.kernels.window_spec(p.index, one.parts) for one in specs) if asked else ()
            for one in specs:
                names = found.setdefault((one, dtype), [])
                names += [recipe] * (recipe not in names)
    return found


def of_recalls() -> list[Job]:
    """Attention to what a step of the recipes chooses, one new token a sequence, for every target."""
    from kvcompile.runtime.cache import KVCache

    specs: dict[tuple[KernelSpec, str], None] = {}
    for dtype, _, plan in plans():
        cache = KVCache(plan)
        specs |= {(one, dtype): None for p in plan.layers for one in cache.kernels.recalling(p.index)}
    return [(one, dtype, "one", target) for one, dtype in specs for target in TARGETS]


def every() -> list[tuple[KernelSpec, str]]:
    """Specs of the recipes, then other formats, layouts, head dims and features; with the dtypes of their queries."""
    found = list(of_recipes())
    found += [(spec(plain("ragged", "bfloat16")), "bfloat16"), (spec(body("ragged", KIVI4, "bfloat16")), "bfloat16")]
    found += [(spec(body("ragged", codecs)), "float16") for codecs in (KIVI2, KIVI42)]
    found += [(spec(body("dense", KIVI4)), "float16"), (spec(body("paged", KIVI4)), "float16")]
    found += [(spec(plain("ragged", "float16"), 4, dim), "float16") for dim in (80, 96, 256)]
    found += [(spec(body("ragged", KIVI4), 4, dim), "float16") for dim in (96, 256)]
    features = {"sliding_window": 4096, "softcap": 50.0, "scores": True, "sink": True}
    found += [
        (replace(spec(parts), **features), "float16") for parts in (plain("ragged", "float16"), body("ragged", KIVI4))
    ]
    return list(dict.fromkeys(found))


def sample() -> list[Job]:
    """One or two kernels for each target, with every codec among them."""
    one = [(plain("dense", "float16"), "sm_80"), (body("ragged", KIVI4), "sm_90"), (body("paged", KIVI2), "gfx942")]
    one += [(body("ragged", INT8), "sm_90"), (body("ragged", FP8), "sm_80"), (paged("float16"), "gfx942")]
    jobs = [(spec(parts), "float16", "one", target) for parts, target in one]
    jobs[3] = (replace(jobs[3][0], sink=True), *jobs[3][1:])
    return [*jobs, (spec(body("ragged", KIVI4)), "float16", "many", "sm_80")]


def jobs_of_all() -> list[Job]:
    """Every kernel for every target."""
    jobs = [(one, dtype, tokens, t) for one, dtype in every() for tokens in ("one", "many") for t in TARGETS]
    return [*jobs, *((one, dtype, "window", t) for one, dtype in of_recipes(window=True) for t in TARGETS)]


def compactions() -> dict[CompactSpec, list[str]]:
    """What moves kept entries, and the recipes that lead to it, on the shapes of the two models."""
    from kvcompile.artifact.compactions import expected

    found: dict[CompactSpec, list[str]] = {}
    for dtype, recipe, plan in plans():
        for p in plan.owners:
            for one in expected(p, dtype):
                names = found.setdefault(one, [])
                names += [recipe] * (recipe not in names)
    return found


def sample_of_moves() -> list[tuple[CompactSpec, str]]:
    """A gather, codes that share scales into pages, and a compaction in place, for one target each."""
    int4 = ((64, 1), (512, 32), (64, 1), (16, 1), (4, 1))
    found = [CompactSpec("dense", "ragged", ((256, 1), (256, 1), (4, 1))), CompactSpec("ragged", "paged32", int4)]
    return list(zip([*found, CompactSpec("paged16", "paged16", int4, in_place=True)], TARGETS, strict=True))


def moved(job: tuple[CompactSpec, str]) -> tuple[int, int, int]:
    """Registers, spilled bytes, shared bytes of a compaction."""
    from kvcompile.kernels.triton.aot import compile_compact

    made = compile_compact(*job)
    return made.registers, made.spilled, made.shared


def choosers() -> dict[ChooseSpec, list[str]]:
    """What scores groups that a step may recall, and the recipes that lead to it; both forms in any case."""
    from kvcompile.recall.choice import chooser

    specs: dict[ChooseSpec, list[str]] = {
        ChooseSpec(form, agree, group, dim, dtype): []
        for form, agree in (("vector", "mean"), ("bounds", "mean"), ("bounds", "max"))
        for group, dim, dtype in ((4, 128, "float16"), (3, 64, "float32"))
    }
    for _, recipe, plan in plans():
        for p in plan.layers:
            if (one := chooser(plan, p.index)) is not None:
                names = specs.setdefault(one, [])
                names += [recipe] * (recipe not in names)
    return specs


def sample_of_choosers() -> list[tuple[ChooseSpec, str]]:
    """A scoring kernel for each target."""
    ways = (("vector", "mean", 128), ("bounds", "mean", 80), ("bounds", "max", 128))
    return [
        (ChooseSpec(form, agree, 4, dim, "float16"), target)
        for (form, agree, dim), target in zip(ways, TARGETS, strict=True)
    ]


def scored(job: tuple[ChooseSpec, str]) -> tuple[int, int, int]:
    """Registers, spilled bytes, shared bytes of a scoring kernel."""
    from kvcompile.kernels.triton.aot import compile_choose

    result = compile_choose(*job)
    return result.registers, result.spilled, result.shared


def ghosts(few: bool = False) -> list[tuple[GhostSpec, str]]:
    """Ghost scores in the linear form, by dtype and channels of a head, for every target; `few`: one for each."""
    rule = GhostRule(256, 8, 0.125, None, 4)
    plain = [
        GhostSpec(rule, group, dim, dim, dtype)
        for group, dim, dtype in ((4, 128, "float16"), (3, 64, "float32"), (4, 80, "bfloat16"), (8, 256, "bfloat16"))
    ]
    if few:
        return list(zip(plain, TARGETS, strict=False))
    whole = replace(plain[0], rule=replace(rule, chunk=0, band=0, softcap=50.0), sink=True)
    return [(one, target) for one in (*plain, whole) for target in TARGETS]


def looked(job: tuple[GhostSpec, str]) -> tuple[int, int, int]:
    """Registers, spilled bytes, shared bytes of ghost scores: the most that one of their two kernels takes."""
    from kvcompile.kernels.triton.aot import compile_ghost

    both = compile_ghost(*job).values()
    return max(c.registers for c in both), max(c.spilled for c in both), max(c.shared for c in both)


def reason(target: str, registers: int, spilled: int) -> str:
    """Why a kernel spills."""
    chosen = target.startswith("sm") and registers in THRESHOLDS and spilled <= FEW
    return EXPLAINED if chosen else UNEXPLAINED


def table_beside(
    kind: str,
    jobs: Sequence[tuple[CompactSpec | ChooseSpec | GhostSpec, str]],
    results: list[tuple[int, int, int]],
    recipes: Mapping[Any, list[str]],
) -> tuple[str, list[str]]:
    """Markdown of kernels beside attention, and what is wrong."""
    cells: dict[CompactSpec | ChooseSpec | GhostSpec, dict[str, str]] = {}
    wrong = []
    for (one, target), (registers, spilled, shared) in zip(jobs, results, strict=True):
        cells.setdefault(one, {})[target] = cell = f"{registers} / {spilled} / {shared / 1024:.0f}K"
        if spilled:
            wrong.append(f"{kind} {one.name} on {target}: {cell} ({reason(target, registers, spilled)})")
    rows = [
        [one.name, *(row.get(t, "") for t in TARGETS), ", ".join(recipes.get(one, []))] for one, row in cells.items()
    ]
    head = [kind, *TARGETS, "recipes"]
    return tabulate(rows, head, tablefmt="github", disable_numparse=True) if rows else "", wrong


def compiled(job: Job) -> list[tuple[str, int, int, int]]:
    """Name, registers, spilled bytes, shared bytes of the kernels of one job."""
    from kvcompile.kernels.triton.aot import compile_spec

    one, dtype, tokens, target = job
    works = ("lse",) if tokens == "window" else ("attend", "lse") if tokens == "many" and one.scores else ("attend",)
    found = []
    for work in works:
        made = compile_spec(one, _tokens(tokens), target, dtype, work=work)
        found += [
            (name, c.registers, c.spilled, c.shared) for name, c in made.items() if name != "merge" or not found[1:]
        ]
    return found


def _tokens(tokens: str) -> str:
    return "many" if tokens == "window" else tokens


def table(jobs: list[Job], results: list[list[tuple[str, int, int, int]]]) -> tuple[str, list[str]]:
    """Markdown, and what is wrong."""
    from kvcompile.kernels.triton.aot import SHARED
    from kvcompile.kernels.triton.tuning import default

    cells: dict[tuple[str, str, str, str], dict[str, str]] = {}
    wrong = []
    for (one, dtype, tokens, target), kernels in zip(jobs, results, strict=True):
        choice = default(one, _tokens(tokens))
        cut = f"{choice.rows} x {choice.tile}, {choice.warps} warps"
        for name, registers, spilled, shared in kernels:
            cell = f"{registers} / {spilled} / {shared / 1024:.0f}K"
            cells.setdefault((one.name, dtype, f"{tokens}: {name}", cut), {})[target] = cell
            if spilled or shared > SHARED[target]:
                why = reason(target, registers, spilled) if shared <= SHARED[target] else UNEXPLAINED
                wrong.append(f"{one.name} {tokens} {name} on {target}: {cell} ({why})")
    rows = [[*key, *(row.get(t, "") for t in TARGETS)] for key, row in cells.items()]
    head = ["spec", "queries", "kernel", "rows x entries", *TARGETS]
    return tabulate(rows, head, tablefmt="github", disable_numparse=True), wrong


def reached() -> str:
    """Which recipes lead to which spec."""
    found = [*of_recipes().items(), *of_recipes(window=True).items()]
    rows = [[one.name, dtype, ", ".join(names)] for (one, dtype), names in found]
    return tabulate(rows, ["spec", "queries", "recipes"], tablefmt="github", disable_numparse=True)


def main() -> int:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--recall", action="store_true")
    parser.add_argument("--ghosts", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out")
    args = parser.parse_args()
    part = args.sample or args.recall or args.ghosts
    jobs = sample() if args.sample else of_recalls() if args.recall else [] if args.ghosts else jobs_of_all()
    recipes = {} if part else compactions()
    choosing = {} if args.sample or args.ghosts else choosers()
    moves = sample_of_moves() if args.sample else [(one, t) for one in recipes for t in TARGETS]
    choices = sample_of_choosers() if args.sample else [(one, t) for one in choosing for t in TARGETS]
    looks = [] if args.recall else ghosts(args.sample)
    with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
        results, moving = list(pool.map(compiled, jobs)), list(pool.map(moved, moves))
        scoring, looking = list(pool.map(scored, choices)), list(pool.map(looked, looks))
    text, wrong = table(jobs, results) if jobs else ("", list[str]())
    beside = [
        table_beside("compaction", moves, moving, recipes),
        table_beside("scores of groups", choices, scoring, choosing),
        table_beside("ghost scores", looks, looking, {}),
    ]
    wrong += [line for _, lines in beside for line in lines]
    total = sum(map(len, results)) + len(moving) + len(scoring) + 2 * len(looking)
    import triton

    title = "# Generated Triton kernels, compiled ahead of time"
    notes = [
        f"`python {' '.join(sys.argv)}`, triton {triton.__version__}.",
        "Registers a thread / bytes spilled a thread / shared memory a program. Default cuts;",
        "nothing was run, so nothing here says how fast a kernel is.",
        f"{len(wrong)} of {total} kernels spill or take too much shared memory.",
    ]
    reasons = "\n".join(f"- {w}" for w in wrong)
    shown = [] if part else ["## The recipes that lead to them", reached()]
    tables = (text, *(one for one, _ in beside))
    page = "\n\n".join(x for x in (title, "\n".join(notes), *tables, reasons, *shown) if x) + "\n"
    print(page)
    if args.out:
        Path(args.out).write_text(page, "utf-8")
    return 1 if any(UNEXPLAINED in w for w in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
