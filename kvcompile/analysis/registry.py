"""Analyses by name. A new one is a module and its line in `ANALYSES`, or an entry point of another package."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from kvcompile.analysis.base import Analysis
from kvcompile.options import filled
from kvcompile.plan.extensions import imported, is_a, named, with_extensions

GROUP = "kvcompile.analyses"
ANALYSES = {
    "lmba": "kvcompile.analysis.lmba:LMBA",
    "lmbo": "kvcompile.analysis.lmbo:LMBO",
    "hit_rate": "kvcompile.analysis.hit_rate:HitRate",
    "needle_map": "kvcompile.analysis.compare.needle_map:NeedleMap",
    "budget_curve": "kvcompile.analysis.compare.budget_curve:BudgetCurve",
}


@functools.cache
def discover() -> dict[str, type[Analysis]]:
    """All analyses by name: those of `ANALYSES`, and entry points of the group `kvcompile.analyses`.

    Raises KvcompileError if an entry point cannot be loaded, is no analysis, or takes a name that is taken.
    """
    return with_extensions(GROUP, "analysis", imported(ANALYSES), "an Analysis", is_a(Analysis))


def analysis_class(name: str) -> type[Analysis]:
    """The analysis called `name`. Raises KvcompileError with the nearest name and the list of all."""
    return named("analysis", name, discover())


def build_analyses(options: Mapping[str, Mapping[str, Any] | None]) -> tuple[Analysis, ...]:
    """The analyses with their options over the defaults, in order.

    Raises KvcompileError for an unknown analysis or option, a value of the wrong type or out of range.
    """
    return tuple(filled(analysis_class(name), f"analysis.{name}", values or {}) for name, values in options.items())
