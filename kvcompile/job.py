"""One job, end to end: measure the original, compile, prove that the compression ran, measure again, report, save."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from kvcompile import compiler
from kvcompile.artifact import artifact, weights
from kvcompile.artifact.manifest import RECIPE
from kvcompile.calibration.text import sentences
from kvcompile.config.recipe import from_recipe
from kvcompile.config.schema import Config, GateConfig, NeedleConfig
from kvcompile.errors import KvcompileError, QualityError
from kvcompile.evaluation import gate
from kvcompile.evaluation.heldout import longest, windows
from kvcompile.evaluation.needle import NeedleResult, NeedleTask, score
from kvcompile.evaluation.perplexity import of_windows
from kvcompile.evaluation.proof import prove
from kvcompile.evaluation.speed import Comparison, compare
from kvcompile.exporters.write import FOLDER, write_into
from kvcompile.heal.corpus import held_out
from kvcompile.models.sharing import shared
from kvcompile.plan.plan import Plan, converts
from kvcompile.progress import Progress, progress_bar
from kvcompile.report import card, files, report
from kvcompile.report.plan_table import notes
from kvcompile.report.report import Report
from kvcompile.report.units import size
from kvcompile.stack import StackPlan
from kvcompile.structure.pack import packed_as, weight_bytes, weight_count

if TYPE_CHECKING:
    from rich.console import Console

PROOF_TOKENS = 1024
Material = tuple[Tensor | None, list[NeedleTask]]  # windows of text for perplexity, and needle tasks
WORSE = 1.1  # perplexity against the original's, from which on a conversion is said to need healing


def compile_and_report(
    model: Any, tokenizer: Any, config: Config, progress: Progress, stack: StackPlan | None = None
) -> Outcome:
    """Compile a loaded model by `config` and leave an artifact with its report.

    stack: as it was planned before the model was loaded (None: it is planned now).
    Raises KvcompileError where the plan cannot be, or the live cache is not what the plan says.
    """
    folder = target(config)
    weights.require_plain(model)
    for exporter in config.exporters():
        exporter.refuse_tokenizer(tokenizer)
    material = _material(model, tokenizer, config)  # what cannot be measured fails before the work
    original = shared(model)
    workspace = folder.parent / f"{folder.name}-heal"
    compiled = compiler.assemble(model, config, tokenizer, progress, workspace, stack)
    measured = _measured(original, compiled, tokenizer, config, material, progress)
    del original
    measured = replace(measured, warnings=warnings(compiled, measured))
    judge(measured, config.gate, folder, compiled.kvcompile.recipe)

    def add(tmp: Path) -> None:
        nonlocal measured
        written = write_into(config.exporters(), compiled, tokenizer, tmp / FOLDER, measured, progress)
        measured = replace(measured, exports={each.exporter: each.files for each in written})
        files.write(measured, tmp)
        card.write(compiled, tmp, card.ARTIFACT, measured)

    artifact.save(compiled, folder, tokenizer, extra=add)
    if measured.healed is not None:
        shutil.rmtree(workspace, ignore_errors=True)
    files.show(measured)
    return Outcome(str(folder), report.summary(measured))


def _measured(
    original: Any, compiled: Any, tokenizer: Any, config: Config, material: Material, progress: Progress
) -> Report:
    """The report of a compiled model beside its original: that the compression ran, and what it costs."""
    text, tasks = material
    ids = _text(tokenizer, _proof_length(config, original))
    rows, planned_total = prove(compiled, ids)
    before, seen, hidden = _needle(original, compiled, tokenizer, tasks, progress) if tasks else (None, None, None)
    return Report(
        title=config.label,
        model=config.model.pretrained or config.model.name,
        recipe=config.recipe or "",
        policies=list(config.stack),
        machine=_machine(),
        versions=artifact.versions(),
        tokens=ids.shape[1],
        rows=rows,
        planned_total=planned_total,
        kernels=_kernels(compiled),
        passes=compiled.kvcompile.changes,
        decode_step=compiled.kvcompile.decode_step(),
        parameters=(weight_count(original), weight_count(compiled)),
        weights=_weights(original, compiled),
        perplexity=None if text is None else _perplexity(original, compiled, text, config, progress),
        healed=compiled.kvcompile.healed,
        needle=(before, seen) if before and seen else None,
        needle_hidden=(before, hidden) if before and hidden else None,
        speed=_speed(original, compiled, tokenizer, config, progress),
    )


def _weights(original: Any, compiled: Any) -> str:
    """What the weights were rounded to, and their bytes before and after; empty where they are floats."""
    format = packed_as(compiled)
    return f"{format}, {size(weight_bytes(compiled))} of {size(weight_bytes(original))}" if format else ""


def judge(measured: Report, wanted: GateConfig, folder: Path, recipe: str) -> None:
    """Raise QualityError if a report is worse than `wanted` allows, after writing it to `<folder>-failed`.

    `folder` itself is not touched: what an earlier compile left there stays.
    """
    broken = gate.broken(measured, wanted)
    if not broken:
        return
    place = folder.parent / f"{folder.name}-failed"
    files.keep(measured, place, {RECIPE: recipe})
    files.show(measured)
    (rule, got), *others = broken
    more = "".join(f"; {rule}, got {got}" for rule, got in others)
    fix = f"{gate.OPEN}; the report is in {place}, no artifact was written"
    raise QualityError(rule, f"{got}{more}", fix, output=str(place), summary=report.summary(measured))


def _proof_length(config: Config, model: Any) -> int:
    wanted = max(config.needle.tokens) if config.needle.enabled and config.needle.tokens else PROOF_TOKENS
    return min(wanted, longest(model))


def _text(tokenizer: Any, tokens: int) -> Tensor:
    """The first `tokens` tokens of the offline text."""
    ids = tokenizer(" ".join(sentences()), return_tensors="pt", truncation=True, max_length=tokens)["input_ids"]
    return torch.as_tensor(ids, dtype=torch.int64, device="cpu")


def _material(model: Any, tokenizer: Any, config: Config) -> Material:
    """What quality is measured on, as far as that is asked for: windows of text, and needle tasks.

    Raises KvcompileError for a text that cannot be read or is too short, and prompts too short to hide anything in.
    """
    wanted = config.needle
    tasks = _needle_tasks(wanted) if wanted.enabled else []
    for task in tasks:
        replace(task, samples=1).prompts(tokenizer)
    return windows(model, held_out(config, tokenizer), config.perplexity) if config.perplexity.enabled else None, tasks


def _needle_tasks(wanted: NeedleConfig) -> list[NeedleTask]:
    """One for each length and text; the texts share the depths where those are as many as all samples of a length."""
    texts = len(wanted.haystacks)
    step = texts if wanted.samples * texts == len(wanted.depths) else 1
    depths = [tuple(wanted.depths[i % step :: step]) for i in range(texts)]
    return [
        NeedleTask(length, wanted.samples, own, wanted.seed, source=text)
        for length in wanted.tokens
        for text, own in zip(wanted.haystacks, depths, strict=True)
    ]


def _needle(
    original: Any, compiled: Any, tokenizer: Any, tasks: list[NeedleTask], progress: Progress
) -> tuple[NeedleResult, NeedleResult, NeedleResult]:
    """Scores of the original, and of the compiled model with the question seen and hidden.

    What the original keeps does not depend on where the question stands: it is asked once.
    """

    def measured(model: Any, when: str, question: Literal["seen", "hidden"]) -> NeedleResult:
        def show(what: str, done: int, total: int) -> None:
            progress(f"{what}, {when}", done, total)

        first, *more = [score(model, tokenizer, task, show, question=question) for task in tasks]
        return sum(more, first)

    before = measured(original, "before", "seen")
    return before, measured(compiled, "after", "seen"), measured(compiled, "after", "hidden")


def _perplexity(original: Any, compiled: Any, rows: Tensor, config: Config, progress: Progress) -> tuple[float, float]:
    context = rows.shape[1] - config.perplexity.tokens - 1

    def measured(model: Any, when: str) -> float:
        def show(what: str, done: int, total: int) -> None:
            progress(f"{what}, {when}", done, total)

        return of_windows(model, rows, context, show)

    return measured(original, "before"), measured(compiled, "after")


def _speed(original: Any, compiled: Any, tokenizer: Any, config: Config, progress: Progress) -> Comparison | None:
    if not config.speed.enabled:
        return None
    progress("speed, before and after in turns", 0, 0)
    ids = _text(tokenizer, config.speed.context)
    return compare({"original": original, "compiled": compiled}, ids, config.speed.tokens, rounds=2)


def _kernels(model: Any) -> list[str]:
    """Which kernel decodes in which layer, and why it is not a generated one where `auto` could take none.

    `column sums` stand beside it where a kernel adds up for the scores what the last queries pay.
    """
    from kvcompile.kernels.dispatch import describe, why

    cache = model.new_cache()
    plan: Plan = model.kvcompile.plan
    specs = [cache.kernels.expected(p.index)[0] for p in plan.decoder.layers]
    reason = why(model.device) if model.kvcompile.kernels == "auto" else ""
    note = f" ({reason})" if reason else ""
    lines = []
    for p, spec in zip(plan.decoder.layers, specs, strict=True):
        averages = p.selection is not None and p.selection.averages
        sums = averages and cache.kernels.column_sums(p.index, spec.parts, model.dtype) is not None
        summed = " and column sums" if sums else ""
        lines.append(f"{spec.name}: {describe(cache.backend, spec, model.dtype)}{summed}{note}")
    return lines + ["the current block: library"] * (len(plan.layers) - len(lines))


def warnings(model: Any, measured: Report) -> list[str]:
    """What a reader of the numbers must know."""
    from kvcompile.kernels.selfcheck.trust import complaints

    plan: Plan = model.kvcompile.plan
    lines = [*complaints(model.device), *notes(plan)]
    before, after = measured.perplexity or (1.0, 1.0)
    if plan.blocks is not None and measured.healed is None:
        lines.append(
            "block_transformer: as converted the model is useless, since its layers were never trained to read blocks. "
            "Heal it: recipe=block_transformer_heal."
        )
    elif converts(plan) and measured.healed is None and not after <= WORSE * before:
        names = ", ".join(each.name for each in plan.applied if each.family == "structure")
        lines.append(
            f"{names}: the weights were converted and not trained since. Heal them: "
            "heal.tokens=1_000_000 and more, as recipe=mqa_heal does."
        )
    lines += [
        f"{name}: queries of {measured.tokens:,} tokens, turned on by {shift:,} positions, stand beyond the "
        f"{longest(model):,} that the model was trained on; scores may be worse there."
        for name, shift in sorted(
            {(p.selection.policy, p.selection.score.needs.rotation) for p in plan.selected if p.selection}
        )
        if shift and measured.tokens + shift > longest(model)
    ]
    if measured.weights and not measured.passes.get("DecodeLinear"):
        lines.append(
            "model.weights: nothing here reads weights in few bits, so floats are made of them at every token, which "
            "is slow. kernels=cpp reads them."
        )
    if model.device.type == "cpu" and any(p.storage.offload for p in plan.layers):
        lines.append(
            "offload: the model is on a CPU, where device and host are one memory. Stores were moved as on an "
            "accelerator, which costs time and saves nothing here."
        )
    return lines


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' * (threads != 1)}, {platform.system()}"


@dataclass(frozen=True)
class Outcome:
    """What one compile left: the artifact's folder and the numbers of its summary row."""

    path: str
    summary: dict[str, float | int | str | None]


def compile_config(config: Config) -> Outcome:
    """One job of the command line: load, measure, compile, prove, measure again, report, save."""
    from kvcompile.models.loading import config_of, load

    target(config)  # what cannot work, or cannot be written, fails before weights are read
    architecture = config_of(config.model)
    stack = compiler.plan_config(config, architecture)
    with progress_bar() as progress:
        model, tokenizer = load(config.model, progress, architecture)
        return compile_and_report(model, tokenizer, config, progress, stack)


def analyse_config(config: Config, console: Console) -> Outcome:
    """One job of analyses: load the original model, measure, write JSON, pictures and a report, and print it."""
    from rich.markdown import Markdown

    from kvcompile.analysis.run import analyse, section
    from kvcompile.analysis.run import target as folder_of
    from kvcompile.models.loading import config_of, load

    folder = folder_of(config)  # what cannot be written fails before weights are read
    architecture = config_of(config.model)
    said: list[str] = []
    with progress_bar() as progress:
        model, tokenizer = load(config.model, progress, architecture)
        found = analyse(model, tokenizer, config, progress, said.append)
    for finding in found:
        console.print(Markdown(section(finding)))
    for line in (*said, f"{folder}/report.md"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return Outcome(str(folder), {key: value for finding in found for key, value in finding.numbers.items()})


def target(config: Config) -> Path:
    """Where the artifact goes. Raises KvcompileError for a place that is no folder of ours, or has another stack."""
    from kvcompile.artifact.artifact import place

    if config.output is None:
        raise KvcompileError("a compile needs an output folder", "none", "output=<folder>")
    folder = place(config.output)
    there, here = _stack_at(folder / RECIPE), list(config.stack)
    if there is not None and there != here:
        raise KvcompileError(
            "an artifact is replaced by one of the same policies only",
            f"policy=[{','.join(here)}] where {folder} holds policy=[{','.join(there)}]",
            "output=<another folder>, or remove the old one",
        )
    return folder


def _stack_at(recipe: Path) -> list[str] | None:
    """The policies of an artifact's recipe, in order; None where there is none that can be read."""
    try:
        return list(from_recipe(recipe.read_text(encoding="utf-8")).stack)
    except (OSError, UnicodeDecodeError, KvcompileError):
        return None  # what is broken may be replaced
