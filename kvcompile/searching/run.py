"""A search from end to end: model, study, climb, proof, and what is written of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcompile.analysis.compare.contest import Contest, room
from kvcompile.analysis.parts import Parts, digest, fingerprint
from kvcompile.errors import KvcompileError
from kvcompile.evaluation.heldout import longest
from kvcompile.paths import require_here, require_short
from kvcompile.progress import Progress, silent
from kvcompile.searching.climb import Clock, Search
from kvcompile.searching.fit import Fitter
from kvcompile.searching.meter import Context, Meter, contexts, few
from kvcompile.searching.space import Space
from kvcompile.searching.stack import Stack
from kvcompile.searching.study import Study, Tried
from kvcompile.searching.verify import Proof, Verifier
from kvcompile.searching.wish import Wish, front, ordered
from kvcompile.tasks.registry import build_tasks

if TYPE_CHECKING:
    from kvcompile.config.schema import Config, SearchConfig

MEASURED, PROVEN = "measured.jsonl", "proven.jsonl"
SEARCHING = 0.8  # of the minutes; the rest is for the proof
MINUTE = 60.0
GOOD = 0.95  # quality of what is called the best where none is wished for
BASES = 2  # in which a context is read, usually: as it is, and rotated
IN_TURNS = 6  # stacks, where prefills of all contexts are too much for the memory
SHOWN = 5  # stacks of a front that are proven


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        wish: what was wished for.
        best: the stack that comes nearest to it; None where there was no time for any.
        front: stacks that no other beats, fewest bytes first; of a wish for bytes alone, the best ones, the best first.
        proofs: of `best`, and of others of the front where the wish is open; what they made of unseen contexts.
        tried, refused: how many stacks were measured, and how many were refused by their plan.
        minutes: of this process.
        folder: where everything lies. fitter: what plans stacks on the model.
    """

    wish: Wish
    best: Tried | None
    front: tuple[Tried, ...]
    proofs: tuple[Proof, ...]
    every: tuple[Tried, ...]
    refused: int
    minutes: float
    folder: Path
    fitter: Fitter

    @property
    def stack(self) -> Stack:
        """The best stack. Raises KvcompileError where there is none."""
        if self.best is None:
            raise KvcompileError("a search must have time for one stack", "none was measured", "search.minutes=<more>")
        return self.best.stack

    @property
    def overrides(self) -> list[str]:
        """The best stack as settings of the command line, what `kvcompile.compile` takes."""
        return list(self.stack.overrides)

    @property
    def proof(self) -> Proof | None:
        """Of the best stack; None where there was no time."""
        return next((p for p in self.proofs if self.best and p.stack == self.best.stack), None)


def wish_of(wanted: SearchConfig) -> Wish:
    """What is wished for."""
    return Wish(None if wanted.bytes is None else Fraction(wanted.bytes), wanted.quality, wanted.perplexity)


def search_model(
    model: Any,
    tokenizer: Any,
    config: Config,
    space: Space,
    progress: Progress = silent,
    say: Callable[[str], None] = print,
) -> Result:
    """Search stacks of a loaded model for the wish of `config.search`, and prove the best; everything goes to a file.

    Raises KvcompileError for a model, a space or tasks that no search can be of, and where no stack can be.
    """
    wanted, begun = config.search, time.monotonic()
    folder = target(config)
    wish, dtype = wish_of(wanted), str(model.dtype).removeprefix("torch.")
    tasks = {key: tasks_of(getattr(space, key), wanted.tokens) for key in ("tasks", "unseen")}
    asked, unseen = (contexts(tokenizer, each, longest(model)) for each in tasks.values())
    rungs = rungs_of([few(context) for context in asked], wanted.rungs)
    weights = fingerprint(model)
    common = {"weights": weights, "dtype": dtype, "kernels": config.kernels}
    held = room(model.config, dtype, wanted.tokens, wanted.memory)
    contest = Contest(model, tokenizer, config.kernels, progress, held)
    meter = Meter(contest, Parts(folder / MEASURED, common), config.questions)
    settings = _settings(config, space, weights)
    study = Study(wanted.study, wanted.storage, folder, wish.aims, settings, wanted.seed)
    fitter = Fitter(model.config, wanted.tokens)
    batch = wanted.batch or (1 if held >= BASES * len(rungs[-1]) else IN_TURNS)
    search = Search(study, space, wish, fitter, meter, rungs, batch, wanted.stacks, progress, say)
    clock = Clock(wanted.minutes * MINUTE)
    search.run(Clock(SEARCHING * wanted.minutes * MINUTE))
    best, chosen = choose(search.found(), wish)
    verifier = Verifier(contest, tokenizer, Parts(folder / PROVEN, common), meter.questions, unseen, progress)
    stacks = [t.stack for t in _proven(best, chosen, wish)]
    proofs = verifier.prove(stacks, clock, least=1 if wanted.minutes else 0) if stacks else []
    spent = (time.monotonic() - begun) / MINUTE
    every = tuple(t for t in study.tried() if t.scores)
    return Result(wish, best, tuple(chosen), tuple(proofs), every, study.refused(), spent, folder, fitter)


def target(config: Config) -> Path:
    """Where a search goes, absolute, made. Raises KvcompileError where a file is, or nothing can be written."""
    require_here()
    folder = Path(str(config.output)).expanduser().resolve()
    require_short(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KvcompileError("a search needs a folder to write to", folder, "output=<elsewhere>") from error
    return folder


def tasks_of(options: Any, tokens: int) -> list[Any]:
    """Tasks with their options, their samples as long as the search says where the options do not."""
    tasks = []
    for task, given in zip(build_tasks(options), options.values(), strict=True):
        sized = any(f.name == "tokens" for f in fields(task)) and "tokens" not in (given or {})
        length = (tokens,) if sized and isinstance(getattr(task, "tokens", None), tuple) else tokens
        tasks.append(replace(task, tokens=length) if sized else task)  # type: ignore[call-arg]
    return tasks


def rungs_of(asked: Sequence[Context], sizes: Sequence[int]) -> list[list[Context]]:
    """Contexts of each rung, each rung beginning with the one before: so many that are asked about, and texts.

    Of the texts, the same share as of the others, rounded up. Raises KvcompileError where nothing is asked.
    """
    turns = [c for c in asked if c.sample.turns]
    texts = [c for c in asked if c.sample.rest]
    if not turns:
        raise KvcompileError("tasks of a search must ask something", "texts alone", "a task with questions: needle")
    rungs: list[list[Context]] = []
    before = shown = 0
    for size in dict.fromkeys(min(size, len(turns)) for size in sizes):
        read = math.ceil(size * len(texts) / len(turns))
        rungs.append([*(rungs[-1] if rungs else []), *turns[before:size], *texts[shown:read]])
        before, shown = size, read
    return rungs


def choose(found: Sequence[Tried], wish: Wish) -> tuple[Tried | None, list[Tried]]:
    """The stack nearest to a wish, and the front, fewest bytes first; of a wish for bytes alone, the best first."""
    by_number = {t.number: t for t in found}
    standings = [wish.standing(t.number, t.share, t.scores[-1]) for t in found]
    best_first = [by_number[s.number] for s in ordered(standings)]
    if not best_first:
        return None, []
    if wish.aims == 1:
        return best_first[0], best_first[:SHOWN]
    on_front = sorted((by_number[s.number] for s in front(standings)), key=lambda t: t.share)
    good = [t for t in on_front if (t.scores[-1].quality or 0.0) >= (wish.quality or GOOD)]
    best = good[0] if good else min(on_front, key=lambda t: t.scores[-1].excess, default=best_first[0])
    return best, on_front or [best]


def _proven(best: Tried | None, chosen: Sequence[Tried], wish: Wish) -> list[Tried]:
    """The best one alone where something is wished for; else as many of the front as are shown."""
    if best is None:
        return []
    if wish.bytes is not None or wish.quality is not None:
        return [best]
    return [best, *[t for t in chosen if t is not best][: SHOWN - 1]]


def _settings(config: Config, space: Space, weights: str) -> dict[str, Any]:
    """What all stacks of a study have in common, whoever tries them."""
    wanted = config.search
    content = [repr(space.places), repr(space.tasks), repr(space.unseen), repr(space.bytes)]
    return {
        "the model": weights[:16],
        "search.bytes": None if wanted.bytes is None else str(Fraction(wanted.bytes)),
        "search.quality": wanted.quality,
        "search.perplexity": wanted.perplexity,
        "search.tokens": wanted.tokens,
        "question": config.question,
        "search.rungs": list(wanted.rungs),
        f"the space {space.name}": digest(content)[:16],
    }
