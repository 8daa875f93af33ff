"""The quality gate: a compile that loses too much fails, and only its report is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvcompile.config.schema import GateConfig
    from kvcompile.evaluation.needle import NeedleResult
    from kvcompile.report.report import Report

OPEN = "keep more of the cache, heal the model, or open the gate"


def broken(report: Report, wanted: GateConfig) -> list[tuple[str, str]]:
    """What a report is worse in than `wanted` allows: (rule, what was measured). A perplexity that is no number is."""
    rules = (
        _perplexity(report, wanted),
        _needle("min_needle", wanted.min_needle, report.needle),
        _needle("min_needle_hidden", wanted.min_needle_hidden, report.needle_hidden),
    )
    return [text for text in rules if text]


def _perplexity(report: Report, wanted: GateConfig) -> tuple[str, str] | None:
    if wanted.max_ppl_increase is None or report.perplexity is None:
        return None
    before, after = report.perplexity
    if after <= before * (1 + wanted.max_ppl_increase):
        return None
    rule = f"gate.max_ppl_increase: perplexity may grow by {wanted.max_ppl_increase:.1%}"
    return rule, f"{before:.3f} -> {after:.3f} ({after / before - 1:+.1%})"


def _needle(
    field: str, least: float | None, results: tuple[NeedleResult, NeedleResult] | None
) -> tuple[str, str] | None:
    if not least or results is None:
        return None
    before, after = (result.mean for result in results)
    if not before:
        return f"gate.{field}: the uncompressed model must answer some of the needle prompts", f"{before:.0%}"
    if after >= before * least:
        return None
    where = ", with the question hidden," if field == "min_needle_hidden" else ""
    rule = f"gate.{field}: {least:.0%} of the uncompressed model's needle score{where} must be left"
    return rule, f"{before:.0%} -> {after:.0%}"
