"""The quality gate: a compile that loses too much fails, and only its report is kept."""

from __future__ import annotations

from pathlib import Path

from kvcompile import atomic
from kvcompile.artifact.manifest import RECIPE
from kvcompile.config.schema import GateConfig
from kvcompile.errors import KvcompileError, QualityError, first_line
from kvcompile.report import files, report
from kvcompile.report.report import Report

KEPT = {*files.FILES, RECIPE}


OPEN = "keep more of the cache, heal the model, or open the gate"


def check(made: Report, wanted: GateConfig, folder: Path, recipe: str) -> None:
    """Raise QualityError if a report is worse than `wanted` allows, after writing it to `<folder>-failed`.

    `folder` itself is not touched: what an earlier compile left there stays. A perplexity that is no number fails.
    """
    broken = [text for text in (_perplexity(made, wanted), _needle(made, wanted)) if text]
    if not broken:
        return
    place = folder.parent / f"{folder.name}-failed"
    keep(made, place, recipe)
    files.show(made)
    (rule, got), *others = broken
    more = "".join(f"; {rule}, got {got}" for rule, got in others)
    fix = f"{OPEN}; the report is in {place}, no artifact was written"
    raise QualityError(rule, f"{got}{more}", fix, output=str(place), summary=report.summary(made))


def keep(made: Report, place: Path, recipe: str) -> None:
    """Write the report and the recipe that led to it into the folder `place`, all at once, for reading only.

    Raises KvcompileError where something else than such a report lies there, or writing fails.
    """
    if place.exists() and not (place.is_dir() and {p.name for p in place.iterdir()} <= KEPT):
        raise KvcompileError(
            "the report of a failed compile replaces nothing but another such report",
            f"{place}: other files",
            "output=<elsewhere>",
        )
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic.making(place, ".failing-") as scratch:
            new = scratch / "report"
            new.mkdir()
            files.write(made, new)
            (new / RECIPE).write_text(recipe, encoding="utf-8")
            atomic.publish(new, place)
    except OSError as error:
        raise KvcompileError(f"the report could not be written to {place}", first_line(error)) from error


def _perplexity(made: Report, wanted: GateConfig) -> tuple[str, str] | None:
    if wanted.max_ppl_increase is None or made.perplexity is None:
        return None
    before, after = made.perplexity
    if after <= before * (1 + wanted.max_ppl_increase):
        return None
    rule = f"gate.max_ppl_increase: perplexity may grow by {wanted.max_ppl_increase:.1%}"
    return rule, f"{before:.3f} -> {after:.3f} ({after / before - 1:+.1%})"


def _needle(made: Report, wanted: GateConfig) -> tuple[str, str] | None:
    if not wanted.min_needle or made.needle is None:
        return None
    before, after = (result.mean for result in made.needle)
    if not before:
        return "gate.min_needle: the uncompressed model must answer some of the needle prompts", f"{before:.0%}"
    if after >= before * wanted.min_needle:
        return None
    rule = f"gate.min_needle: {wanted.min_needle:.0%} of the uncompressed model's needle score must be left"
    return rule, f"{before:.0%} -> {after:.0%}"
